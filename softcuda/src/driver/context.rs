//! Contexts: `cuCtx*` and `cuDevicePrimaryCtx*`.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;

use super::handles::{self, Handle, Table, fresh};
use super::status::{CUresult, Failure, Outcome};
use super::stream::{Kind, Stream};
use super::{api, driver, lock, out};
use crate::device::Description;
use crate::exec::{DEFAULT_HEAP, Heap};

/// A context owns streams, events, modules and memory, and keeps the first fault of any kernel it ran.
pub(super) struct Context {
    pub handle: Handle,
    /// Ordinal of its device.
    pub device: u32,
    flags: AtomicU32,
    destroyed: AtomicBool,
    fault: Mutex<Option<Failure>>,
    faulted: AtomicBool,
    /// Start addresses of everything allocated in this context.
    pub allocations: Mutex<HashSet<u64>>,
    pub legacy_stream: Arc<Stream>,
    pub per_thread_streams: Mutex<HashMap<ThreadId, Arc<Stream>>>,
    /// Streams destroyed before their work was done.
    pub leaving_streams: Mutex<Vec<Arc<Stream>>>,
    /// Held while it is decided how a submission goes on, so that streams which wait for each other see each other.
    pub order: Mutex<()>,
    /// Other devices whose memory kernels of this context may use.
    pub peers: Mutex<HashSet<u32>>,
    limits: Mutex<HashMap<u32, usize>>,
    /// Where `malloc` of its kernels allocates.
    pub heap: Arc<Heap>,
    cache_config: AtomicU32,
}

pub(super) static CONTEXTS: Table<Context> = Table::new("context", CUresult::ERROR_INVALID_CONTEXT);

/// A device's primary context.
#[derive(Default)]
struct Primary {
    /// While it is retained, and how often.
    active: Option<(Arc<Context>, u32)>,
    /// For its next activation.
    flags: u32,
}

/// By ordinal.
static PRIMARIES: Mutex<BTreeMap<u32, Primary>> = Mutex::new(BTreeMap::new());

thread_local! {
    static CURRENT: RefCell<Vec<Arc<Context>>> = const { RefCell::new(Vec::new()) };
    /// Whether a host function of a stream runs.
    static IN_HOST_FUNCTION: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread still has a current context or none; not at its end.
pub(super) fn reachable() -> bool {
    CURRENT.try_with(|_| ()).is_ok()
}

/// Runs a host function of a stream, which may not call CUDA (driver API, `cuLaunchHostFunc`).
pub(super) fn without_api(function: impl FnOnce()) {
    IN_HOST_FUNCTION.set(true);
    function();
    IN_HOST_FUNCTION.set(false);
}

impl Context {
    fn create(device: u32, flags: u32) -> Arc<Context> {
        let handle = fresh();
        let context = Arc::new_cyclic(|this| Context {
            handle,
            device,
            flags: AtomicU32::new(flags),
            destroyed: AtomicBool::new(false),
            fault: Mutex::new(None),
            faulted: AtomicBool::new(false),
            allocations: Mutex::default(),
            legacy_stream: Arc::new(Stream::legacy(this.clone(), handle)),
            per_thread_streams: Mutex::default(),
            leaving_streams: Mutex::default(),
            order: Mutex::new(()),
            peers: Mutex::default(),
            limits: Mutex::default(),
            heap: Arc::new(Heap::new(device, DEFAULT_HEAP)),
            cache_config: AtomicU32::new(0),
        });
        CONTEXTS.insert(handle, context.clone());
        context
    }

    /// Frees all that the context owns.
    fn destroy(&self) {
        self.finish();
        self.destroyed.store(true, Ordering::Release);
        let _ = CONTEXTS.remove(self.handle);
        handles::close_context(self.handle);
        if let Ok(driver) = driver() {
            for addr in lock(&self.allocations).drain() {
                super::checks::leaked(addr);
                let _ = driver.memory.free(addr);
            }
            for addr in self.heap.take_live() {
                super::checks::leaked(addr);
                let _ = driver.memory.free(addr);
            }
        }
    }

    /// Puts the context in error; the first fault stays.
    pub fn set_fault(&self, failure: Failure) {
        lock(&self.fault).get_or_insert(failure);
        self.faulted.store(true, Ordering::Release);
    }

    /// Streams other than the legacy one.
    fn other_streams(&self) -> Vec<Arc<Stream>> {
        let mut streams = super::stream::STREAMS.select(|stream| stream.belongs_to(self.handle));
        streams.extend(lock(&self.per_thread_streams).values().cloned());
        let mut leaving = lock(&self.leaving_streams);
        leaving.retain(|stream| !stream.queue.is_idle());
        streams.extend(leaving.iter().cloned());
        drop(leaving);
        streams
    }

    /// Streams that wait for the legacy stream, and it for them.
    pub fn blocking_streams(&self) -> Vec<Arc<Stream>> {
        self.other_streams().into_iter().filter(|stream| stream.kind == Kind::Blocking).collect()
    }

    /// Waits for all work of this context.
    ///
    /// # Errors
    /// The context is in error.
    pub fn drain(&self) -> Outcome {
        self.finish();
        self.check()
    }

    /// Waits for all work of this context, whatever comes of it.
    fn finish(&self) {
        self.other_streams().iter().for_each(|stream| stream.finish());
        self.legacy_stream.finish();
    }

    pub fn description(&self) -> Outcome<&'static Description> {
        driver()?.device(self.device as i32)
    }

    /// The error that every call on this context returns, if it is in error or gone.
    pub fn check(&self) -> Outcome {
        if self.destroyed.load(Ordering::Acquire) {
            return Err(CUresult::ERROR_CONTEXT_IS_DESTROYED.into());
        }
        if self.faulted.load(Ordering::Acquire)
            && let Some(failure) = &*lock(&self.fault)
        {
            return Err(failure.clone());
        }
        Ok(())
    }
}

/// For calls that need no current context: the driver is there, and this is no host function of a stream.
pub(super) fn check_caller() -> Outcome {
    driver()?;
    if IN_HOST_FUNCTION.get() {
        return Err(CUresult::ERROR_NOT_PERMITTED.with("a host function of a stream may not call CUDA"));
    }
    Ok(())
}

/// The context that an allocation was made in.
pub(super) fn owner(start: u64) -> Option<Arc<Context>> {
    CONTEXTS.select(|context| lock(&context.allocations).contains(&start)).pop()
}

/// The calling thread's context, even one in error.
pub(super) fn current_any() -> Outcome<Arc<Context>> {
    check_caller()?;
    CURRENT
        .with_borrow(|stack| stack.last().cloned())
        .ok_or_else(|| CUresult::ERROR_INVALID_CONTEXT.with("no context is current to this thread"))
}

/// The calling thread's context.
pub(super) fn current() -> Outcome<Arc<Context>> {
    let context = current_any()?;
    context.check()?;
    Ok(context)
}

/// Releases a primary context once, or for good; to be destroyed by the caller, who holds no lock then.
fn release(primary: &mut Primary, all: bool) -> Outcome<Option<Arc<Context>>> {
    let Some((_, count)) = &mut primary.active else {
        return Err(CUresult::ERROR_INVALID_CONTEXT.with("the primary context is not retained"));
    };
    *count -= 1;
    let last = *count == 0 || all;
    Ok(if last { primary.active.take().map(|(context, _)| context) } else { None })
}

/// Changes the primary context of a device.
fn with_primary<T>(dev: i32, change: impl FnOnce(u32, &mut Primary) -> Outcome<T>) -> Outcome<T> {
    let device = super::init::check_device(dev)?;
    change(device, lock(&PRIMARIES).entry(device).or_default())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut Handle, dev: i32) -> CUresult {
    api("cuDevicePrimaryCtxRetain", || {
        with_primary(dev, |device, primary| {
            let (active, count) = primary.active.get_or_insert_with(|| (Context::create(device, primary.flags), 0));
            unsafe { out(context, "pctx", active.handle)? };
            *count += 1;
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRelease_v2(dev: i32) -> CUresult {
    api("cuDevicePrimaryCtxRelease_v2", || {
        let last = with_primary(dev, |_, primary| release(primary, false))?;
        last.iter().for_each(|context| context.destroy());
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxReset_v2(dev: i32) -> CUresult {
    api("cuDevicePrimaryCtxReset_v2", || {
        // Resetting an inactive context is no error.
        let last =
            with_primary(dev, |_, primary| if primary.active.is_some() { release(primary, true) } else { Ok(None) })?;
        last.iter().for_each(|context| context.destroy());
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxGetState(dev: i32, flags: *mut u32, active: *mut i32) -> CUresult {
    api("cuDevicePrimaryCtxGetState", || {
        with_primary(dev, |_, primary| unsafe {
            out(flags, "flags", primary.flags)?;
            out(active, "active", primary.active.is_some().into())
        })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxSetFlags_v2(dev: i32, flags: u32) -> CUresult {
    api("cuDevicePrimaryCtxSetFlags_v2", || {
        with_primary(dev, |_, primary| {
            primary.flags = flags;
            if let Some((context, _)) = &primary.active {
                context.flags.store(flags, Ordering::Relaxed);
            }
            Ok(())
        })
    })
}

fn create(flags: u32, dev: i32) -> Outcome<Handle> {
    let context = Context::create(super::init::check_device(dev)?, flags);
    let handle = context.handle;
    CURRENT.with_borrow_mut(|stack| stack.push(context));
    Ok(handle)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxCreate_v2(context: *mut Handle, flags: u32, dev: i32) -> CUresult {
    api("cuCtxCreate_v2", || unsafe { out(context, "pctx", create(flags, dev)?) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxCreate_v3(
    context: *mut Handle,
    _affinity: *const u8,
    affinities: i32,
    flags: u32,
    dev: i32,
) -> CUresult {
    api("cuCtxCreate_v3", || {
        if affinities != 0 {
            return Err(super::unsupported("execution affinity"));
        }
        unsafe { out(context, "pctx", create(flags, dev)?) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxCreate_v4(context: *mut Handle, params: *const u8, flags: u32, dev: i32) -> CUresult {
    api("cuCtxCreate_v4", || {
        if !params.is_null() {
            return Err(super::unsupported("a context with affinity or graphics parameters"));
        }
        unsafe { out(context, "pctx", create(flags, dev)?) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxDestroy_v2(context: Handle) -> CUresult {
    api("cuCtxDestroy_v2", || {
        let context = CONTEXTS.get(context)?;
        let is_primary = |primary: &Primary| matches!(&primary.active, Some((it, _)) if it.handle == context.handle);
        if lock(&PRIMARIES).values().any(is_primary) {
            return Err(CUresult::ERROR_INVALID_CONTEXT.with("the primary context is released, not destroyed"));
        }
        CURRENT.with_borrow_mut(|stack| {
            if stack.last().is_some_and(|top| top.handle == context.handle) {
                stack.pop();
            }
        });
        context.destroy();
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCurrent(context: *mut Handle) -> CUresult {
    api("cuCtxGetCurrent", || {
        driver()?;
        let handle = CURRENT.with_borrow(|stack| stack.last().map_or(0, |context| context.handle));
        unsafe { out(context, "pctx", handle) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxSetCurrent(context: Handle) -> CUresult {
    api("cuCtxSetCurrent", || {
        driver()?;
        let next = if context == 0 { None } else { Some(CONTEXTS.get(context)?) };
        CURRENT.with_borrow_mut(|stack| {
            stack.pop();
            stack.extend(next);
        });
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxPushCurrent_v2(context: Handle) -> CUresult {
    api("cuCtxPushCurrent_v2", || {
        driver()?;
        let context = CONTEXTS.get(context)?;
        CURRENT.with_borrow_mut(|stack| stack.push(context));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxPopCurrent_v2(context: *mut Handle) -> CUresult {
    api("cuCtxPopCurrent_v2", || {
        let top = current_any()?;
        CURRENT.with_borrow_mut(Vec::pop);
        if context.is_null() { Ok(()) } else { unsafe { out(context, "pctx", top.handle) } }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetDevice(dev: *mut i32) -> CUresult {
    api("cuCtxGetDevice", || unsafe { out(dev, "device", current_any()?.device as i32) })
}

/// The context of a handle, the current one for none.
fn given_or_current(context: Handle) -> Outcome<Arc<Context>> {
    if context == 0 { current() } else { CONTEXTS.get(context) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetDevice_v2(dev: *mut i32, context: Handle) -> CUresult {
    api("cuCtxGetDevice_v2", || {
        driver()?;
        unsafe { out(dev, "device", given_or_current(context)?.device as i32) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetId(context: Handle, id: *mut u64) -> CUresult {
    api("cuCtxGetId", || {
        driver()?;
        unsafe { out(id, "ctxId", given_or_current(context)?.handle as u64) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetApiVersion(context: Handle, version: *mut u32) -> CUresult {
    api("cuCtxGetApiVersion", || {
        if context != 0 {
            CONTEXTS.get(context)?;
        }
        // The version of the interface that cuCtxCreate_v2 and later give.
        unsafe { out(version, "version", 3020) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetFlags(flags: *mut u32) -> CUresult {
    api("cuCtxGetFlags", || unsafe { out(flags, "flags", current()?.flags.load(Ordering::Relaxed)) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxSetFlags(flags: u32) -> CUresult {
    api("cuCtxSetFlags", || {
        current()?.flags.store(flags, Ordering::Relaxed);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxSynchronize() -> CUresult {
    api("cuCtxSynchronize", || {
        let context = current()?;
        synchronize(&context)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxSynchronize_v2(context: Handle) -> CUresult {
    api("cuCtxSynchronize_v2", || {
        driver()?;
        let context = given_or_current(context)?;
        context.check()?;
        synchronize(&context)
    })
}

fn synchronize(context: &Context) -> Outcome {
    super::capture::forbid_in(context.handle, "cuCtxSynchronize")?;
    context.drain()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetStreamPriorityRange(least: *mut i32, greatest: *mut i32) -> CUresult {
    api("cuCtxGetStreamPriorityRange", || {
        current()?;
        // Either pointer may be null.
        for (to, value) in [(least, 0), (greatest, super::stream::GREATEST_PRIORITY)] {
            if !to.is_null() {
                unsafe { out(to, "priority", value)? };
            }
        }
        Ok(())
    })
}

/// Limits by `CUlimit`: stack size, printf buffer, malloc heap, device-runtime depth and launches, L2 fetch granularity and
/// persisting L2.
const MALLOC_HEAP: u32 = 2;
const LIMITS: [(u32, usize); 7] =
    [(0, 1024), (1, 1 << 20), (MALLOC_HEAP, DEFAULT_HEAP as usize), (3, 2), (4, 2048), (5, 64), (6, 0)];

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetLimit(value: *mut usize, limit: u32) -> CUresult {
    api("cuCtxGetLimit", || {
        let context = current()?;
        let default = LIMITS.iter().find(|(known, _)| *known == limit);
        let (_, default) = default.ok_or(CUresult::ERROR_UNSUPPORTED_LIMIT)?;
        let set = lock(&context.limits).get(&limit).copied();
        unsafe { out(value, "pvalue", set.unwrap_or(*default)) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxSetLimit(limit: u32, value: usize) -> CUresult {
    api("cuCtxSetLimit", || {
        let context = current()?;
        if !LIMITS.iter().any(|(known, _)| *known == limit) {
            return Err(CUresult::ERROR_UNSUPPORTED_LIMIT.into());
        }
        // "Must be set before launching any kernel that uses malloc() or free()" (driver API, cuCtxSetLimit).
        if limit == MALLOC_HEAP && !context.heap.set_limit(value as u64) {
            return Err(CUresult::ERROR_INVALID_VALUE.with("a kernel has used the malloc heap already"));
        }
        lock(&context.limits).insert(limit, value);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCacheConfig(config: *mut u32) -> CUresult {
    api("cuCtxGetCacheConfig", || unsafe { out(config, "pconfig", current()?.cache_config.load(Ordering::Relaxed)) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxSetCacheConfig(config: u32) -> CUresult {
    api("cuCtxSetCacheConfig", || {
        if config > 3 {
            return Err(CUresult::ERROR_INVALID_VALUE.with(format!("{config} is not a CUfunc_cache")));
        }
        // A preference without effect: caches are not modelled.
        current()?.cache_config.store(config, Ordering::Relaxed);
        Ok(())
    })
}
