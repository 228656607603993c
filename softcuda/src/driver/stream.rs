//! Streams: `cuStream*`, apart from capture.

use std::cell::Cell;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Weak};

use super::capture::{self, Captured};
use super::context::{Context, current};
use super::event::EVENTS;
use super::handles::{Children, Handle, Owned, fresh};
use super::order::StreamOrder;
use super::queue::{self, Queue, Task};
use super::status::{CUresult, Outcome};
use super::work::Op;
use super::{api, lock, out};

/// Priorities run from 0, the least, to this.
pub(super) const GREATEST_PRIORITY: i32 = -5;

const NON_BLOCKING: u32 = 1;

/// `CU_STREAM_LEGACY` and `CU_STREAM_PER_THREAD`.
const LEGACY: Handle = 1;
const PER_THREAD: Handle = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The null stream: waits for all blocking streams, and they for it.
    Legacy,
    Blocking,
    NonBlocking,
}

pub(super) struct Stream {
    pub handle: Handle,
    pub kind: Kind,
    priority: i32,
    context: Weak<Context>,
    context_handle: Handle,
    pub queue: Queue,
    pub order: StreamOrder,
    /// The capture that this stream takes part in.
    pub capture: Mutex<Option<Captured>>,
}

pub(super) static STREAMS: Children<Stream> = Children::new("stream", CUresult::ERROR_INVALID_HANDLE);

impl Owned for Stream {
    fn owner(&self) -> Handle {
        self.context_handle
    }
}

impl Stream {
    fn new(handle: Handle, kind: Kind, priority: i32, context: Weak<Context>, context_handle: Handle) -> Stream {
        let (queue, order) = (Queue::default(), StreamOrder::default());
        Stream { handle, kind, priority, context, context_handle, queue, order, capture: Mutex::new(None) }
    }

    /// The null stream of a context that is being made.
    pub fn legacy(context: Weak<Context>, context_handle: Handle) -> Stream {
        Stream::new(LEGACY, Kind::Legacy, 0, context, context_handle)
    }

    pub fn belongs_to(&self, context: Handle) -> bool {
        self.context_handle == context
    }

    pub fn context(&self) -> Outcome<Arc<Context>> {
        self.context.upgrade().ok_or_else(|| CUresult::ERROR_CONTEXT_IS_DESTROYED.into())
    }

    /// Adds `op` to the stream: to the graph where it is capturing, else to its work.
    pub fn submit(self: &Arc<Self>, op: Op) -> Outcome {
        if let Some(captured) = &mut *lock(&self.capture) {
            return captured.add(op);
        }
        op.check()?;
        self.submit_task(Task::Op(Arc::new(op)))
    }

    /// Adds a task to the work of the stream, which is not capturing.
    pub fn submit_task(self: &Arc<Self>, task: Task) -> Outcome {
        let context = self.context()?;
        if self.kind == Kind::Legacy {
            capture::forbid_implicit(context.handle)?;
        }
        queue::submit(self, &context, task)
    }

    /// As [`Stream::settle`], and where it is the legacy stream also for the streams that it would wait for.
    pub fn drain(&self) -> Outcome {
        if self.kind == Kind::Legacy {
            self.context()?.blocking_streams().iter().for_each(|stream| stream.finish());
        }
        self.settle()
    }

    /// The host waits for the work of this stream alone.
    ///
    /// # Errors
    /// The context is in error: some of that work faulted, or was not done because other work had.
    pub fn settle(&self) -> Outcome {
        self.finish();
        self.context()?.check()
    }

    /// Waits until nothing is left to do, whatever came of it.
    pub fn finish(&self) {
        self.queue.drain();
        self.order.met_by_host();
    }
}

thread_local! {
    /// Whether the call that this thread is in takes no stream for its own default one.
    static DEFAULT_PER_THREAD: Cell<bool> = const { Cell::new(false) };
}

/// Makes a call in which no stream means the thread's own default stream.
pub(super) fn with_default_per_thread(call: impl FnOnce() -> CUresult) -> CUresult {
    let before = DEFAULT_PER_THREAD.replace(true);
    let result = call();
    DEFAULT_PER_THREAD.set(before);
    result
}

/// The stream of a handle, special ones included, whose context is alive and not in error.
pub(super) fn stream(handle: Handle) -> Outcome<Arc<Stream>> {
    let handle = if handle == 0 && DEFAULT_PER_THREAD.get() { PER_THREAD } else { handle };
    match handle {
        0 | LEGACY => Ok(current()?.legacy_stream.clone()),
        PER_THREAD => {
            let context = current()?;
            let mut streams = lock(&context.per_thread_streams);
            let make =
                || Arc::new(Stream::new(PER_THREAD, Kind::Blocking, 0, Arc::downgrade(&context), context.handle));
            Ok(streams.entry(std::thread::current().id()).or_insert_with(make).clone())
        }
        _ => {
            super::driver()?;
            let stream = STREAMS.get(handle)?;
            stream.context()?.check()?;
            Ok(stream)
        }
    }
}

fn create(to: *mut Handle, flags: u32, priority: i32) -> Outcome {
    let context = current()?;
    if flags > NON_BLOCKING {
        return Err(CUresult::ERROR_INVALID_VALUE.with(format!("{flags:#x} are not flags of a stream")));
    }
    let kind = if flags == NON_BLOCKING { Kind::NonBlocking } else { Kind::Blocking };
    let handle = fresh();
    let priority = priority.clamp(GREATEST_PRIORITY, 0);
    unsafe { out(to, "phStream", handle)? };
    STREAMS.insert(handle, Arc::new(Stream::new(handle, kind, priority, Arc::downgrade(&context), context.handle)));
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(to: *mut Handle, flags: u32) -> CUresult {
    api("cuStreamCreate", || create(to, flags, 0))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreateWithPriority(to: *mut Handle, flags: u32, priority: i32) -> CUresult {
    api("cuStreamCreateWithPriority", || create(to, flags, priority))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamDestroy_v2(handle: Handle) -> CUresult {
    api("cuStreamDestroy_v2", || {
        super::driver()?;
        let stream = STREAMS.remove(handle)?;
        capture::leave(&stream);
        let context = stream.context()?;
        // Its work goes on.
        if !stream.queue.is_idle() {
            lock(&context.leaving_streams).push(stream);
        }
        context.check()
    })
}

/// What waiting for a stream may not be: part of a capture, or a wait for one.
fn check_wait(stream: &Stream, function: &str) -> Outcome {
    if let Some(captured) = &*lock(&stream.capture) {
        captured.capture.invalidate();
        return Err(CUresult::ERROR_STREAM_CAPTURE_UNSUPPORTED.with(format!("{function} of a capturing stream")));
    }
    if stream.kind == Kind::Legacy {
        capture::forbid_implicit(stream.context()?.handle)?;
    }
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamSynchronize(handle: Handle) -> CUresult {
    api("cuStreamSynchronize", || {
        let stream = stream(handle)?;
        check_wait(&stream, "synchronisation")?;
        stream.drain()
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamQuery(handle: Handle) -> CUresult {
    api("cuStreamQuery", || {
        let stream = stream(handle)?;
        check_wait(&stream, "query")?;
        if !stream.queue.is_idle() {
            return Err(CUresult::ERROR_NOT_READY.into());
        }
        stream.order.met_by_host();
        // What was done since the call began may have faulted.
        stream.context()?.check()
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamWaitEvent(handle: Handle, event: Handle, flags: u32) -> CUresult {
    api("cuStreamWaitEvent", || {
        let stream = stream(handle)?;
        let event = EVENTS.get(event)?;
        if flags != 0 {
            return Err(super::unsupported(format!("cuStreamWaitEvent with flags {flags:#x}")));
        }
        capture::wait(&stream, &event)?;
        let mark = event.mark();
        stream.order.learn(&mark.clock);
        match mark.at {
            // A point that is reached already needs no waiting for.
            Some(point) if point.reached().is_none() => stream.submit_task(Task::Wait(point)),
            _ => Ok(()),
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamGetCtx(handle: Handle, context: *mut Handle) -> CUresult {
    api("cuStreamGetCtx", || unsafe { out(context, "pctx", stream(handle)?.context_handle) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamGetFlags(handle: Handle, flags: *mut u32) -> CUresult {
    api("cuStreamGetFlags", || {
        let value = if stream(handle)?.kind == Kind::NonBlocking { NON_BLOCKING } else { 0 };
        unsafe { out(flags, "flags", value) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamGetPriority(handle: Handle, priority: *mut i32) -> CUresult {
    api("cuStreamGetPriority", || unsafe { out(priority, "priority", stream(handle)?.priority) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamGetDevice(handle: Handle, device: *mut i32) -> CUresult {
    api("cuStreamGetDevice", || unsafe { out(device, "device", stream(handle)?.context()?.device as i32) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamGetId(handle: Handle, id: *mut u64) -> CUresult {
    api("cuStreamGetId", || {
        let stream = stream(handle)?;
        // Special handles are shared by contexts, their identifiers are not.
        let value = if stream.handle > PER_THREAD { stream.handle } else { stream.context_handle + stream.handle };
        unsafe { out(id, "streamId", value as u64) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchHostFunc(
    handle: Handle,
    function: Option<unsafe extern "C" fn(*mut std::ffi::c_void)>,
    data: usize,
) -> CUresult {
    api("cuLaunchHostFunc", || {
        let function = function.ok_or_else(|| CUresult::ERROR_INVALID_VALUE.with("`fn` is null"))?;
        stream(handle)?.submit(Op::Host { function, data })
    })
}

/// The older form of [`cuLaunchHostFunc`], which is told how the stream's work has gone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamAddCallback(
    handle: Handle,
    function: Option<unsafe extern "C" fn(Handle, CUresult, *mut std::ffi::c_void)>,
    data: usize,
    flags: u32,
) -> CUresult {
    api("cuStreamAddCallback", || {
        let function = function.ok_or_else(|| CUresult::ERROR_INVALID_VALUE.with("`callback` is null"))?;
        if flags != 0 {
            return Err(CUresult::ERROR_INVALID_VALUE.with("`flags` must be 0"));
        }
        let stream = stream(handle)?;
        if let Some(captured) = &*lock(&stream.capture) {
            captured.capture.invalidate();
            return Err(CUresult::ERROR_STREAM_CAPTURE_UNSUPPORTED.with("a callback cannot be captured"));
        }
        stream.submit(Op::Callback { function, stream: handle, data })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamIsCapturing(handle: Handle, status: *mut u32) -> CUresult {
    api("cuStreamIsCapturing", || {
        let stream = stream(handle)?;
        if stream.kind == Kind::Legacy {
            capture::forbid_implicit(stream.context()?.handle)?;
        }
        // CU_STREAM_CAPTURE_STATUS_NONE, ACTIVE, INVALIDATED
        let value = lock(&stream.capture)
            .as_ref()
            .map_or(0, |captured| if captured.capture.invalid.load(Ordering::Acquire) { 2 } else { 1 });
        unsafe { out(status, "captureStatus", value) }
    })
}
