//! Memory that is allocated at once: `cuMemAlloc`, `cuMemHostAlloc` and their kin, and what addresses can tell.

use std::ffi::c_void;

use super::context::{Context, check_caller, current, current_any, owner};
use super::status::{CUresult, Outcome};
use super::{api, capture, driver, lock, out, registered};
use crate::memory::{Allocation, Kind, Memory};

/// Allocates for `context`, which frees what is left when it is destroyed.
pub(super) fn allocate(context: &Context, bytes: usize, kind: Kind) -> Outcome<u64> {
    allocate_on(context, context.device, bytes, kind)
}

/// [`allocate`] on a device that need not be the context's.
pub(super) fn allocate_on(context: &Context, device: u32, bytes: usize, kind: Kind) -> Outcome<u64> {
    let addr = driver()?.memory.alloc_on(device, bytes as u64, kind)?;
    lock(&context.allocations).insert(addr);
    Ok(addr)
}

/// Frees an allocation whose kind is among `kinds`.
pub(super) fn release(addr: u64, kinds: &[Kind]) -> Outcome {
    check_release(addr, kinds)?;
    // Forgotten first: once it is free, the address may be that of another allocation.
    if let Some(context) = owner(addr) {
        lock(&context.allocations).remove(&addr);
    }
    Ok(driver()?.memory.free(addr)?)
}

/// Frees an allocation when all work of its context is done. The pointer says which context that is: none need be current.
fn release_now(function: &str, addr: u64, kinds: &[Kind]) -> Outcome {
    check_caller()?;
    capture::forbid_unsafe(function)?;
    check_release(addr, kinds)?;
    let state = owner(addr).map_or(Ok(()), |context| context.drain());
    super::checks::freed(addr, super::order::of_host());
    state.and(release(addr, kinds))
}

/// Whether an allocation of one of `kinds` starts at `addr`.
pub(super) fn check_release(addr: u64, kinds: &[Kind]) -> Outcome {
    let memory = &driver()?.memory;
    let found = memory.find(addr).filter(|allocation| allocation.start == addr);
    match found {
        Some(allocation) if kinds.contains(&allocation.kind) => Ok(()),
        Some(allocation) => {
            Err(CUresult::ERROR_INVALID_VALUE.with(format!("{addr:#x} is {} memory", kind_name(allocation.kind))))
        }
        None => {
            let reason = memory.describe(addr);
            Err(CUresult::ERROR_INVALID_VALUE.with(format!("not the start of an allocation: {reason}")))
        }
    }
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Device => "device",
        Kind::Host => "page-locked host",
        Kind::Managed => "managed",
        Kind::Module => "a module's",
        Kind::Heap => "a kernel's heap",
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(to: *mut u64, bytes: usize) -> CUresult {
    api("cuMemAlloc_v2", || {
        let context = current()?;
        capture::forbid_unsafe("cuMemAlloc_v2")?;
        unsafe { out(to, "dptr", allocate(&context, bytes, Kind::Device)?) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFree_v2(addr: u64) -> CUresult {
    api("cuMemFree_v2", || {
        if addr == 0 {
            check_caller()?;
            return current_any().map_or(Ok(()), |context| context.check());
        }
        release_now("cuMemFree_v2", addr, &[Kind::Device, Kind::Managed])
    })
}

fn allocate_host(to: *mut u64, bytes: usize, flags: u32) -> Outcome {
    let context = current()?;
    // CU_MEMHOSTALLOC_PORTABLE, DEVICEMAP, WRITECOMBINED
    if flags > 7 {
        return Err(CUresult::ERROR_INVALID_VALUE.with(format!("{flags:#x} are not flags of cuMemHostAlloc")));
    }
    capture::forbid_unsafe("cuMemHostAlloc")?;
    unsafe { out(to, "pp", allocate(&context, bytes, Kind::Host)?) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(to: *mut u64, bytes: usize, flags: u32) -> CUresult {
    api("cuMemHostAlloc", || allocate_host(to, bytes, flags))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocHost_v2(to: *mut u64, bytes: usize) -> CUresult {
    api("cuMemAllocHost_v2", || allocate_host(to, bytes, 0))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeHost(addr: u64) -> CUresult {
    api("cuMemFreeHost", || release_now("cuMemFreeHost", addr, &[Kind::Host]))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostGetDevicePointer_v2(to: *mut u64, host: u64, flags: u32) -> CUresult {
    api("cuMemHostGetDevicePointer_v2", || {
        current()?;
        let known = driver()?.memory.find(host).is_some_and(|allocation| allocation.kind == Kind::Host)
            || registered::containing(host).is_some();
        if flags != 0 || !known {
            return Err(CUresult::ERROR_INVALID_VALUE.with(format!("{host:#x} is not page-locked host memory")));
        }
        unsafe { out(to, "pdptr", host) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> CUresult {
    api("cuMemGetInfo_v2", || {
        let device = current()?.device;
        let memory = &driver()?.memory;
        unsafe {
            out(free, "free", memory.available_of(device) as usize)?;
            out(total, "total", memory.total_of(device) as usize)
        }
    })
}

fn containing(memory: &Memory, addr: u64) -> Outcome<Allocation> {
    memory.find(addr).ok_or_else(|| CUresult::ERROR_INVALID_VALUE.with(memory.describe(addr)))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetAddressRange_v2(base: *mut u64, bytes: *mut usize, addr: u64) -> CUresult {
    api("cuMemGetAddressRange_v2", || {
        check_caller()?;
        let allocation = containing(&driver()?.memory, addr)?;
        for (to, value) in [(base, allocation.start), (bytes.cast(), allocation.bytes())] {
            if !to.is_null() {
                unsafe { out(to, "pointer", value)? };
            }
        }
        Ok(())
    })
}

/// Writes one `CUpointer_attribute` of `addr`.
unsafe fn attribute(to: *mut c_void, attribute: u32, addr: u64) -> Outcome {
    check_caller()?;
    let allocation = containing(&driver()?.memory, addr)?;
    let on_host = matches!(allocation.kind, Kind::Host | Kind::Managed);
    let flag = |value: bool| unsafe { out(to.cast::<u32>(), "data", value.into()) };
    let wide = |value: u64| unsafe { out(to.cast::<u64>(), "data", value) };
    match attribute {
        // CONTEXT
        1 => wide(owner(allocation.start).map_or(0, |context| context.handle) as u64),
        // MEMORY_TYPE: CU_MEMORYTYPE_HOST, CU_MEMORYTYPE_DEVICE
        2 => unsafe { out(to.cast::<u32>(), "data", if allocation.kind == Kind::Host { 1 } else { 2 }) },
        // DEVICE_POINTER
        3 => wide(addr),
        // HOST_POINTER
        4 if on_host => wide(addr),
        4 => Err(CUresult::ERROR_INVALID_VALUE.with(format!("{addr:#x} has no host pointer"))),
        // SYNC_MEMOPS: every operation is synchronous
        6 => flag(true),
        // BUFFER_ID
        7 => wide(allocation.serial),
        // IS_MANAGED
        8 => flag(allocation.kind == Kind::Managed),
        // DEVICE_ORDINAL
        9 => unsafe { out(to.cast::<i32>(), "data", allocation.device as i32) },
        // RANGE_START_ADDR
        11 => wide(allocation.start),
        // RANGE_SIZE
        12 => wide(allocation.bytes()),
        // MAPPED
        13 => flag(true),
        _ => Err(super::unsupported(format!("pointer attribute {attribute}"))),
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuPointerGetAttribute(to: *mut c_void, which: u32, addr: u64) -> CUresult {
    api("cuPointerGetAttribute", || unsafe { attribute(to, which, addr) })
}

/// As [`cuPointerGetAttribute`] for each; what an address does not have reads as null and is no error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuPointerGetAttributes(
    count: u32,
    attributes: *const u32,
    data: *const *mut c_void,
    addr: u64,
) -> CUresult {
    api("cuPointerGetAttributes", || {
        check_caller()?;
        if count > 0 && (attributes.is_null() || data.is_null()) {
            return Err(CUresult::ERROR_INVALID_VALUE.with("attributes are counted but not given"));
        }
        for place in 0..count as usize {
            // SAFETY: `count` elements each, by the API's contract.
            let (which, to) = unsafe { (*attributes.add(place), *data.add(place)) };
            // CONTEXT, DEVICE_POINTER, HOST_POINTER, BUFFER_ID, RANGE_START_ADDR, RANGE_SIZE are of 8 bytes
            let wide = matches!(which, 1 | 3 | 4 | 7 | 11 | 12);
            unsafe {
                match attribute(to, which, addr) {
                    Err(failure) if failure.code == CUresult::ERROR_NOT_SUPPORTED => return Err(failure),
                    Err(_) if wide => out(to.cast::<u64>(), "data", 0)?,
                    Err(_) => out(to.cast::<u32>(), "data", 0)?,
                    Ok(()) => {}
                }
            }
        }
        Ok(())
    })
}
