//! `cuInit`, `cuDriverGetVersion` and `cuDevice*`.

use std::ffi::c_char;

use super::status::{CUresult, Outcome};
use super::{api, driver, initialize, out};

/// The CUDA version whose API and PTX this driver follows: 1000 * major + 10 * minor.
const VERSION: i32 = 13050;

pub(super) fn check_device(device: i32) -> Outcome {
    if device == 0 {
        Ok(())
    } else {
        Err(CUresult::ERROR_INVALID_DEVICE.with(format!("{device}: the only device is 0")))
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuInit(flags: u32) -> CUresult {
    api("cuInit", || {
        if flags != 0 {
            return Err(CUresult::ERROR_INVALID_VALUE.with("`flags` must be 0"));
        }
        initialize()
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut i32) -> CUresult {
    api("cuDriverGetVersion", || unsafe { out(version, "driverVersion", VERSION) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut i32, ordinal: i32) -> CUresult {
    api("cuDeviceGet", || {
        driver()?;
        check_device(ordinal)?;
        unsafe { out(device, "device", 0) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut i32) -> CUresult {
    api("cuDeviceGetCount", || {
        driver()?;
        unsafe { out(count, "count", 1) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: i32, device: i32) -> CUresult {
    api("cuDeviceGetName", || {
        let driver = driver()?;
        check_device(device)?;
        if name.is_null() || len < 1 {
            return Err(CUresult::ERROR_INVALID_VALUE.with("no room for the name"));
        }
        let text = driver.device.name();
        let len = text.len().min(len as usize - 1);
        // SAFETY: the caller's buffer has at least `len + 1` bytes.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr(), name.cast(), len);
            name.add(len).write(0);
        }
        Ok(())
    })
}

fn uuid(to: *mut [u8; 16], device: i32) -> Outcome {
    driver()?;
    check_device(device)?;
    unsafe { out(to, "uuid", *b"softcuda-device0") }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid(to: *mut [u8; 16], device: i32) -> CUresult {
    api("cuDeviceGetUuid", || uuid(to, device))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid_v2(to: *mut [u8; 16], device: i32) -> CUresult {
    api("cuDeviceGetUuid_v2", || uuid(to, device))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, device: i32) -> CUresult {
    api("cuDeviceTotalMem_v2", || {
        let driver = driver()?;
        check_device(device)?;
        unsafe { out(bytes, "bytes", driver.memory.total() as usize) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(value: *mut i32, attribute: u32, device: i32) -> CUresult {
    api("cuDeviceGetAttribute", || {
        let driver = driver()?;
        check_device(device)?;
        let known = driver.device.attribute(attribute);
        let known =
            known.ok_or_else(|| CUresult::ERROR_INVALID_VALUE.with(format!("{attribute} is no known attribute")))?;
        unsafe { out(value, "pi", known) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceComputeCapability(major: *mut i32, minor: *mut i32, device: i32) -> CUresult {
    api("cuDeviceComputeCapability", || {
        let driver = driver()?;
        check_device(device)?;
        let (a, b) = driver.device.compute_capability;
        unsafe {
            out(major, "major", a as i32)?;
            out(minor, "minor", b as i32)
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceCanAccessPeer(can: *mut i32, device: i32, peer: i32) -> CUresult {
    api("cuDeviceCanAccessPeer", || {
        driver()?;
        check_device(device)?;
        check_device(peer)?;
        unsafe { out(can, "canAccessPeer", 0) }
    })
}

/// Profiling starts and stops nothing: counters are switched by `softcuda_*` controls.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuProfilerStart() -> CUresult {
    api("cuProfilerStart", || super::context::current().map(drop))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuProfilerStop() -> CUresult {
    api("cuProfilerStop", || super::context::current().map(drop))
}
