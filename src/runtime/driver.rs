//! Questions to the driver that cudarc does not put, or answers with a panic where there is no driver or an old one.

use std::ffi::c_void;

use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaContext, DriverError, result};
use libloading::Library;

use crate::Error;

/// The driver library. cudarc's calls panic where there is none, and its own look for it does not exist where another crate has
/// chosen to link.
fn library() -> Option<Library> {
    const NAMES: [&str; 3] = if cfg!(windows) {
        ["nvcuda.dll", "cuda.dll", "nvcuda64.dll"]
    } else {
        ["libcuda.so", "libcuda.so.1", "libnvcuda.so"]
    };
    // SAFETY: opens the driver library, as any call of cudarc would.
    NAMES.into_iter().find_map(|name| unsafe { Library::new(name) }.ok())
}

/// Number of devices; an error where cudarc's own calls would panic for want of a driver library.
pub(crate) fn device_count() -> Result<usize, Error> {
    if library().is_none() {
        return Err(Error::NoCuda);
    }
    match result::init() {
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => return Ok(0),
        other => other.map_err(Error::driver("starting the driver"))?,
    }
    let count = result::device::get_count().map_err(Error::driver("counting devices"))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Whether a context still works: after a fault of a kernel every call on it that touches the device returns the fault's error.
pub(crate) fn check_health(context: &CudaContext, operation: &'static str) -> Result<(), Error> {
    context.mem_get_info().map(drop).map_err(Error::driver(operation))
}

/// The newest CUDA that the driver knows: 12030 of 12.3.
pub(crate) fn version() -> Result<i32, Error> {
    let mut version = 0;
    // SAFETY: writes one number.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(Error::driver("kernels"))?;
    Ok(version)
}

/// Multiprocessors that work of `context` may run on, by the device's number and what the context's share of it is: of a green context
/// its partition, under MPS its execution affinity. A driver that knows neither, or does not answer, says nothing of a share.
pub(crate) fn multiprocessors(context: &CudaContext, of_device: u32) -> Result<u32, Error> {
    context.bind_to_thread().map_err(Error::driver("device attributes"))?;
    let library = library();
    let shares = library.as_ref().map_or([None, None], |library| {
        // SAFETY: the context is alive and current.
        unsafe { [share_of_partition(library, context.cu_ctx()), share_of_affinity(library)] }
    });
    Ok(least(of_device, shares))
}

/// Zero is no answer: work runs somewhere.
fn least(of_device: u32, shares: [Option<u32>; 2]) -> u32 {
    shares.into_iter().flatten().filter(|&share| share > 0).fold(of_device.max(1), u32::min)
}

/// `cuCtxGetDevResource` (CUDA 12.4) of the type SM.
///
/// # Safety
/// The context is alive.
unsafe fn share_of_partition(library: &Library, context: sys::CUcontext) -> Option<u32> {
    type GetDevResource = unsafe extern "C" fn(sys::CUcontext, *mut c_void, u32) -> u32;
    const SM: u32 = 1;
    // `CUdevResource` is at most 152 bytes in CUDA 12.4 to 13.4; after its type and 92 bytes comes the number of multiprocessors.
    let mut resource = [0u64; 64];
    // SAFETY: the driver's signature; the buffer holds a `CUdevResource` with room to spare.
    unsafe {
        let get = library.get::<GetDevResource>(b"cuCtxGetDevResource\0").ok()?;
        (get(context, resource.as_mut_ptr().cast(), SM) == 0).then(|| (resource[96 / 8] & 0xffff_ffff) as u32)
    }
}

/// `cuCtxGetExecAffinity` (CUDA 11.4) of the current context, by number of multiprocessors.
///
/// # Safety
/// A context is current.
unsafe fn share_of_affinity(library: &Library) -> Option<u32> {
    type GetExecAffinity = unsafe extern "C" fn(*mut c_void, u32) -> u32;
    const SM_COUNT: u32 = 0;
    // `CUexecAffinityParam`: its type, then the number.
    let mut affinity = [0u32; 64];
    // SAFETY: the driver's signature; the buffer holds a `CUexecAffinityParam` with room to spare.
    unsafe {
        let get = library.get::<GetExecAffinity>(b"cuCtxGetExecAffinity\0").ok()?;
        (get(affinity.as_mut_ptr().cast(), SM_COUNT) == 0).then_some(affinity[1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_share_counts() {
        assert_eq!(least(132, [None, None]), 132);
        assert_eq!(least(132, [Some(16), None]), 16);
        assert_eq!(least(132, [Some(132), Some(33)]), 33);
        assert_eq!(least(132, [Some(0), Some(264)]), 132);
        assert_eq!(least(0, [None, None]), 1);
    }

    #[test]
    fn an_undivided_device_is_one_partition() {
        softcuda::install_if_no_gpu().expect("a real or a software device can be had");
        let context = crate::device::open(0).unwrap();
        let which = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let all = context.attribute(which).unwrap() as u32;
        // SAFETY: the context is alive and current.
        let shares = unsafe {
            let library = library().unwrap();
            [share_of_partition(&library, context.cu_ctx()), share_of_affinity(&library)]
        };
        // None: a driver that does not know the call.
        assert!(shares.iter().all(|share| share.is_none_or(|share| share == all)), "{shares:?} of {all}");
        assert_eq!(multiprocessors(&context, all), Ok(all));
    }

    #[test]
    fn the_layout_of_a_partition() {
        // What the bindings of this build say of the layout that `share_of_partition` reads.
        assert!(size_of::<sys::CUdevResource>() <= size_of::<[u64; 64]>());
        assert_eq!(std::mem::offset_of!(sys::CUdevResource, __bindgen_anon_1), 96);
        assert!(size_of::<sys::CUexecAffinityParam>() <= size_of::<[u32; 64]>());
        assert_eq!(std::mem::offset_of!(sys::CUexecAffinityParam, param), 4);
    }
}
