//! What the driver's tests share.
#![allow(dead_code)]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaContext, DriverError, sys};
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
