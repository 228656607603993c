//! Contexts, streams and buffers that another library made.
//!
//! An operation takes cudarc's types. What cudarc made of a driver's object knows nothing of how long that object lives: hence
//! `unsafe`, with a contract at each. Buffers enter by [`crate::In::from_raw`] and [`crate::Out::from_raw`].
//!
//! Make one value of a context, once, and share it: cudarc orders the streams of one value among themselves only, and operations refuse a
//! buffer or a stream of another value, of the same context too ([`crate::Error::DifferentContext`]).

use std::sync::Arc;

use cudarc::driver::sys::{CUcontext, CUdevice, CUstream};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use crate::{Error, device};

#[cfg(feature = "cust")]
pub mod cust;

const OPERATION: &str = "entering a context";

/// A context that another library made, current to the calling thread afterwards.
///
/// A device's primary context is retained, and stays at least as long as the value. Any other stays its maker's: it is never destroyed
/// from here, and the few words that hold the value are never freed.
///
/// # Errors
/// [`Error::NoCuda`], [`Error::Driver`].
///
/// # Safety
/// The context is alive, and unless it is a primary one stays so as long as the value, what was made of it, and their clones.
pub unsafe fn context(raw: CUcontext) -> Result<Arc<CudaContext>, Error> {
    let devices = device::count()?;
    // SAFETY: the context is alive; the rest is checked by the driver.
    unsafe { enter(raw, devices) }.map_err(Error::driver(OPERATION))
}

/// The context that is current to the calling thread: for a library that shows none of its handles.
///
/// # Errors
/// As for [`context`]; [`Error::Missing`] where none is current.
///
/// # Safety
/// As for [`context`].
pub unsafe fn current_context() -> Result<Arc<CudaContext>, Error> {
    device::count()?;
    let reason = "no context is current to this thread";
    let current = result::ctx::get_current().map_err(Error::driver(OPERATION))?;
    let raw = current.ok_or(Error::Missing { operation: OPERATION, argument: "context", reason })?;
    // SAFETY: as the caller says.
    unsafe { context(raw) }
}

/// A stream that another library made. Dropping the value does not destroy it.
///
/// # Safety
/// The stream belongs to `context` and lives as long as the value and its clones, of which each buffer that is allocated on it holds one.
/// What the other library puts on it, or on other streams, on memory that operations use is ordered by the caller.
pub unsafe fn stream(context: &Arc<CudaContext>, raw: CUstream) -> Arc<CudaStream> {
    // SAFETY: as the caller says.
    unsafe { context.wrap_borrowed_stream(raw) }
}

/// # Safety
/// As for [`context`].
unsafe fn enter(raw: CUcontext, devices: usize) -> Result<Arc<CudaContext>, DriverError> {
    // SAFETY: the context is alive, so it can be made current, and has a device.
    let handle = unsafe {
        result::ctx::set_current(raw)?;
        let mut handle: CUdevice = 0;
        sys::cuCtxGetDevice(&mut handle).result()?;
        handle
    };
    let handles = (0..devices).map(|ordinal| result::device::get(ordinal as i32));
    let handles = handles.collect::<Result<Vec<_>, _>>()?;
    let ordinal = handles.iter().position(|&other| other == handle).unwrap_or_default();
    let (mut flags, mut active) = (0, 0);
    // SAFETY: both numbers are written.
    unsafe { sys::cuDevicePrimaryCtxGetState(handle, &mut flags, &mut active) }.result()?;
    if active != 0 {
        let primary = CudaContext::new(ordinal)?;
        if primary.cu_ctx() == raw {
            return Ok(primary);
        }
        // Its maker holds it: releasing what was just retained does not end it.
        drop(primary);
    }
    // SAFETY: the context is alive and the device is its own; the value that would destroy it is never dropped.
    let context = unsafe { CudaContext::from_raw_context(ordinal, handle, raw) }?;
    std::mem::forget(context.clone());
    Ok(context)
}
