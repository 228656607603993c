//! Managed memory. Host and device share their memory here, so hints about where it should lie are checked and change
//! nothing.

use super::context::current;
use super::handles::Handle;
use super::memory::allocate;
use super::status::{CUresult, Outcome};
use super::stream::stream;
use super::{api, capture, driver, out};
use crate::memory::Kind;

fn check_managed(addr: u64, bytes: usize) -> Outcome {
    let allocation = driver()?.memory.check(addr, bytes as u64)?;
    if allocation.kind == Kind::Managed {
        Ok(())
    } else {
        Err(CUresult::ERROR_INVALID_VALUE.with(format!("{addr:#x} is not managed memory")))
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocManaged(to: *mut u64, bytes: usize, flags: u32) -> CUresult {
    api("cuMemAllocManaged", || {
        let context = current()?;
        // CU_MEM_ATTACH_GLOBAL, CU_MEM_ATTACH_HOST
        if flags != 1 && flags != 2 {
            return Err(CUresult::ERROR_INVALID_VALUE.with(format!("{flags:#x} are not flags of cuMemAllocManaged")));
        }
        capture::forbid_unsafe("cuMemAllocManaged")?;
        unsafe { out(to, "dptr", allocate(&context, bytes, Kind::Managed)?) }
    })
}

/// `CUmemLocation`, passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Location {
    kind: u32,
    id: i32,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAdvise_v2(addr: u64, bytes: usize, advice: u32, _location: Location) -> CUresult {
    api("cuMemAdvise_v2", || advise(addr, bytes, advice))
}

fn advise(addr: u64, bytes: usize, advice: u32) -> Outcome {
    current()?;
    if !(1..=6).contains(&advice) {
        return Err(CUresult::ERROR_INVALID_VALUE.with(format!("{advice} is not a CUmem_advise")));
    }
    check_managed(addr, bytes)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemPrefetchAsync_v2(
    addr: u64,
    bytes: usize,
    _location: Location,
    flags: u32,
    handle: Handle,
) -> CUresult {
    api("cuMemPrefetchAsync_v2", || {
        stream(handle)?;
        if flags != 0 {
            return Err(CUresult::ERROR_INVALID_VALUE.with("`flags` must be 0"));
        }
        check_managed(addr, bytes)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamAttachMemAsync(handle: Handle, addr: u64, _bytes: usize, _flags: u32) -> CUresult {
    api("cuStreamAttachMemAsync", || {
        stream(handle)?;
        check_managed(addr, 1)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAdvise(addr: u64, bytes: usize, advice: u32, _device: i32) -> CUresult {
    api("cuMemAdvise", || advise(addr, bytes, advice))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemPrefetchAsync(addr: u64, bytes: usize, _device: i32, handle: Handle) -> CUresult {
    api("cuMemPrefetchAsync", || {
        stream(handle)?;
        check_managed(addr, bytes)
    })
}
