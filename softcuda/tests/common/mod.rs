//! What the driver's tests share.
#![allow(dead_code)]

use std::ffi::c_void;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cudarc::driver::{CudaContext, CudaStream, DriverError, sys};
use softcuda::Installed;

/// Installs the device and keeps other tests of the binary out: captures and faults are visible to a whole context.
pub fn device() -> (Installed, Arc<CudaContext>, MutexGuard<'static, ()>) {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let installed = softcuda::install().expect("the software device");
    let context = CudaContext::new(0).expect("a context");
    (installed, context, turn)
}

/// The code of a failure, and the driver's text for it.
pub fn failure<T>(result: Result<T, DriverError>) -> (sys::CUresult, String) {
    match result {
        Ok(_) => panic!("succeeded"),
        Err(error) => (error.0, error.error_string().unwrap().to_string_lossy().into_owned()),
    }
}

/// As [`failure`], for a raw call.
pub fn status(result: sys::CUresult) -> (sys::CUresult, String) {
    failure(result.result())
}

/// A text that contains every one of `parts`.
#[track_caller]
pub fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

/// Holds a stream until something is sent, or its other end dropped.
pub fn hold(stream: &CudaStream) -> Sender<()> {
    unsafe extern "C" fn wait(data: *mut c_void) {
        // SAFETY: from `hold`, once.
        let receiver = unsafe { Box::from_raw(data.cast::<Receiver<()>>()) };
        let _ = receiver.recv_timeout(Duration::from_secs(20));
    }
    let (sender, receiver) = channel();
    let data = Box::into_raw(Box::new(receiver)).cast();
    unsafe { sys::cuLaunchHostFunc(stream.cu_stream(), Some(wait), data) }.result().unwrap();
    sender
}
