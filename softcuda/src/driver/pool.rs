//! Stream-ordered allocation: `cuMemAllocAsync`, `cuMemFreeAsync` and memory pools.
//!
//! Work is done when it is enqueued, so allocation and release take effect at once, as in a stream with nothing before them.
//! Pools keep nothing back; their attributes are kept and reported.

use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::sync::{Arc, LazyLock, Mutex};

use super::context::current;
use super::handles::{Handle, Table};
use super::memory::allocate_on;
use super::status::{CUresult, Outcome};
use super::stream::stream;
use super::work::Op;
use super::{api, driver, lock, out};
use crate::memory::Kind;

struct Pool {
    device: u32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Reuse by event dependencies, opportunistic, by internal dependencies.
    reuse: [i32; 3],
    release_threshold: u64,
    used: u64,
    used_high: u64,
}

static POOLS: Table<Pool> = Table::new("memory pool", CUresult::ERROR_INVALID_VALUE);

/// By device.
static DEFAULTS: Mutex<BTreeMap<u32, Handle>> = Mutex::new(BTreeMap::new());

/// The pools that `cuMemAllocAsync` takes from, by device, where they are not the default.
static CURRENT: Mutex<BTreeMap<u32, Handle>> = Mutex::new(BTreeMap::new());

fn default_pool(device: u32) -> Handle {
    *lock(&DEFAULTS).entry(device).or_insert_with(|| POOLS.add(Pool::new(device)))
}

fn current_pool(device: u32) -> Handle {
    let set = lock(&CURRENT).get(&device).copied();
    set.unwrap_or_else(|| default_pool(device))
}

type Owners = HashMap<u64, (Arc<Pool>, u64)>;

/// Pool and size of every live stream-ordered allocation.
static OWNERS: LazyLock<Mutex<Owners>> = LazyLock::new(Mutex::default);

impl Pool {
    fn new(device: u32) -> Pool {
        Pool { device, state: Mutex::new(State { reuse: [1; 3], ..State::default() }) }
    }
}

fn allocate_from(to: *mut u64, bytes: usize, pool: Handle, stream_handle: Handle) -> Outcome {
    let stream = stream(stream_handle)?;
    let pool = POOLS.get(pool)?;
    if let Some(captured) = &*lock(&stream.capture) {
        captured.capture.invalidate();
        return Err(super::unsupported("stream-ordered allocation during capture"));
    }
    if bytes == 0 {
        return unsafe { out(to, "dptr", 0) };
    }
    let addr = allocate_on(&*stream.context()?, pool.device, bytes, Kind::Device)?;
    {
        let mut state = lock(&pool.state);
        state.used += bytes as u64;
        state.used_high = state.used_high.max(state.used);
    }
    lock(&OWNERS).insert(addr, (pool, bytes as u64));
    unsafe { out(to, "dptr", addr) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocAsync(to: *mut u64, bytes: usize, handle: Handle) -> CUresult {
    api("cuMemAllocAsync", || {
        let device = stream(handle)?.context()?.device;
        allocate_from(to, bytes, current_pool(device), handle)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocFromPoolAsync(to: *mut u64, bytes: usize, pool: Handle, handle: Handle) -> CUresult {
    api("cuMemAllocFromPoolAsync", || allocate_from(to, bytes, pool, handle))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeAsync(addr: u64, handle: Handle) -> CUresult {
    api("cuMemFreeAsync", || {
        let stream = stream(handle)?;
        if addr == 0 {
            return Ok(());
        }
        if let Some(captured) = &*lock(&stream.capture) {
            captured.capture.invalidate();
            return Err(CUresult::ERROR_INVALID_VALUE
                .with("memory allocated outside a graph cannot be freed during its capture"));
        }
        // What cannot be freed is refused now, for in its turn nobody hears of it.
        stream.submit(Op::Free { addr })?;
        if let Some((pool, bytes)) = lock(&OWNERS).remove(&addr) {
            lock(&pool.state).used -= bytes;
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetDefaultMemPool(pool: *mut Handle, device: i32) -> CUresult {
    api("cuDeviceGetDefaultMemPool", || {
        let device = super::init::check_device(device)?;
        unsafe { out(pool, "pool_out", default_pool(device)) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetMemPool(pool: *mut Handle, device: i32) -> CUresult {
    api("cuDeviceGetMemPool", || {
        let device = super::init::check_device(device)?;
        unsafe { out(pool, "pool", current_pool(device)) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceSetMemPool(device: i32, pool: Handle) -> CUresult {
    api("cuDeviceSetMemPool", || {
        let device = super::init::check_device(device)?;
        if POOLS.get(pool)?.device != device {
            return Err(CUresult::ERROR_INVALID_VALUE.with("the pool is another device's"));
        }
        lock(&CURRENT).insert(device, pool);
        Ok(())
    })
}

/// Head of `CUmemPoolProps`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct PoolProperties {
    alloc_type: u32,
    handle_types: u32,
    location_type: u32,
    location_id: i32,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemPoolCreate(pool: *mut Handle, properties: *const PoolProperties) -> CUresult {
    api("cuMemPoolCreate", || {
        current()?;
        if properties.is_null() {
            return Err(CUresult::ERROR_INVALID_VALUE.with("`poolProps` is null"));
        }
        // SAFETY: not null, and the structure begins with these fields.
        let PoolProperties { alloc_type, handle_types, location_type, location_id } =
            unsafe { properties.read_unaligned() };
        // CU_MEM_ALLOCATION_TYPE_PINNED on CU_MEM_LOCATION_TYPE_DEVICE
        if alloc_type != 1 || location_type != 1 {
            return Err(CUresult::ERROR_INVALID_VALUE.with("a pool must be of pinned memory on a device"));
        }
        let device = super::init::check_device(location_id)?;
        if handle_types != 0 {
            return Err(super::unsupported("a pool with shareable handles"));
        }
        unsafe { out(pool, "pool", POOLS.add(Pool::new(device))) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemPoolDestroy(pool: Handle) -> CUresult {
    api("cuMemPoolDestroy", || {
        driver()?;
        if lock(&DEFAULTS).values().any(|default| *default == pool) {
            return Err(CUresult::ERROR_INVALID_VALUE.with("the default pool cannot be destroyed"));
        }
        POOLS.remove(pool)?;
        lock(&CURRENT).retain(|_, current| *current != pool);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemPoolTrimTo(pool: Handle, _keep: usize) -> CUresult {
    api("cuMemPoolTrimTo", || {
        driver()?;
        POOLS.get(pool).map(drop)
    })
}

/// `CUmemPool_attribute`: 1 to 3 are `int`, the others `cuuint64_t`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemPoolGetAttribute(pool: Handle, attribute: u32, value: *mut c_void) -> CUresult {
    api("cuMemPoolGetAttribute", || {
        driver()?;
        let pool = POOLS.get(pool)?;
        let state = lock(&pool.state);
        let wide = match attribute {
            1..=3 => return unsafe { out(value.cast(), "value", state.reuse[attribute as usize - 1]) },
            4 => state.release_threshold,
            // RESERVED_MEM_CURRENT and USED_MEM_CURRENT: nothing is held back.
            5 | 7 => state.used,
            6 | 8 => state.used_high,
            _ => return Err(super::unsupported(format!("memory pool attribute {attribute}"))),
        };
        unsafe { out(value.cast(), "value", wide) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemPoolSetAttribute(pool: Handle, attribute: u32, value: *mut c_void) -> CUresult {
    api("cuMemPoolSetAttribute", || {
        driver()?;
        let pool = POOLS.get(pool)?;
        if value.is_null() {
            return Err(CUresult::ERROR_INVALID_VALUE.with("`value` is null"));
        }
        let mut state = lock(&pool.state);
        // SAFETY: not null, and of the attribute's type by the API's contract.
        unsafe {
            match attribute {
                1..=3 => state.reuse[attribute as usize - 1] = value.cast::<i32>().read_unaligned(),
                4 => state.release_threshold = value.cast::<u64>().read_unaligned(),
                6 | 8 if value.cast::<u64>().read_unaligned() == 0 => state.used_high = state.used,
                _ => {
                    let text = format!("memory pool attribute {attribute} cannot be set to that");
                    return Err(CUresult::ERROR_INVALID_VALUE.with(text));
                }
            }
        }
        Ok(())
    })
}
