//! `cuInit`, `cuDriverGetVersion` and `cuDevice*`.

use std::ffi::c_char;

use super::status::{CUresult, Outcome};
use super::{api, api_always, driver, initialize, out};

/// The CUDA version whose API and PTX this driver follows: 1000 * major + 10 * minor.
const VERSION: i32 = 13050;

pub(super) fn check_device(device: i32) -> Outcome<u32> {
    driver()?.device(device).map(|_| device as u32)
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
    api_always("cuDriverGetVersion", || unsafe { out(version, "driverVersion", VERSION) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut i32, ordinal: i32) -> CUresult {
    api("cuDeviceGet", || {
        check_device(ordinal)?;
        unsafe { out(device, "device", ordinal) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut i32) -> CUresult {
    api("cuDeviceGetCount", || unsafe { out(count, "count", driver()?.devices.len() as i32) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: i32, device: i32) -> CUresult {
    api("cuDeviceGetName", || {
        let device = driver()?.device(device)?;
        if name.is_null() || len < 1 {
            return Err(CUresult::ERROR_INVALID_VALUE.with("no room for the name"));
        }
        let text = device.name();
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
    let mut uuid = *b"softcuda-device\0";
    uuid[15] = b'0' + check_device(device)? as u8;
    unsafe { out(to, "uuid", uuid) }
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
        let device = check_device(device)?;
        unsafe { out(bytes, "bytes", driver()?.memory.total_of(device) as usize) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(value: *mut i32, attribute: u32, device: i32) -> CUresult {
    api("cuDeviceGetAttribute", || {
        // PCI_BUS_ID
        if attribute == 33 {
            return unsafe { out(value, "pi", check_device(device)? as i32) };
        }
        let known = driver()?.device(device)?.attribute(attribute);
        let known =
            known.ok_or_else(|| CUresult::ERROR_INVALID_VALUE.with(format!("{attribute} is no known attribute")))?;
        unsafe { out(value, "pi", known) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceComputeCapability(major: *mut i32, minor: *mut i32, device: i32) -> CUresult {
    api("cuDeviceComputeCapability", || {
        let (a, b) = driver()?.device(device)?.compute_capability;
        unsafe {
            out(major, "major", a as i32)?;
            out(minor, "minor", b as i32)
        }
    })
}

/// The address that the PCI bus would have the device at.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetPCIBusId(text: *mut c_char, len: i32, device: i32) -> CUresult {
    api("cuDeviceGetPCIBusId", || {
        let address = format!("0000:{:02X}:00.0\0", check_device(device)?);
        if text.is_null() || len < address.len() as i32 {
            return Err(CUresult::ERROR_INVALID_VALUE.with("no room for the address"));
        }
        // SAFETY: the caller's buffer has `len` bytes.
        unsafe { std::ptr::copy_nonoverlapping(address.as_ptr(), text.cast(), address.len()) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetByPCIBusId(device: *mut i32, text: *const c_char) -> CUresult {
    api("cuDeviceGetByPCIBusId", || {
        if text.is_null() {
            return Err(CUresult::ERROR_INVALID_VALUE.with("`pciBusId` is null"));
        }
        // SAFETY: a NUL-terminated text, by the API's contract.
        let text = unsafe { std::ffi::CStr::from_ptr(text) }.to_string_lossy();
        // [domain]:[bus]:[device].[function], of which the last may be missing
        let mut parts = text.split([':', '.']).map(|part| i32::from_str_radix(part, 16).ok());
        let bus = match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(Some(0)), Some(Some(bus)), Some(Some(0)), None | Some(Some(0))) => bus,
            _ => return Err(CUresult::ERROR_INVALID_DEVICE.with(format!("no device is at `{text}`"))),
        };
        check_device(bus)?;
        unsafe { out(device, "dev", bus) }
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
