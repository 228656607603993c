//! When the driver cannot be used: by a thread that is at its end, and in the child of a fork.
//!
//! At the end of a thread, and of the process on the thread that calls `exit`, destructors of thread-local variables run before
//! exit handlers and static destructors do. What those then call finds the driver's own thread-local state gone, and is told
//! `CUDA_ERROR_DEINITIALIZED`.
//!
//! A fork copies the driver's memory but not its threads, and whatever lock another thread held stays locked. As NVIDIA's does,
//! the driver answers `CUDA_ERROR_NOT_INITIALIZED` in a child whose parent had initialised it, also to `cuInit`.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use super::status::{CUresult, Outcome};
use super::{context, order};

static FORKED: AtomicBool = AtomicBool::new(false);

/// From here on children of forks know that they are such.
pub(super) fn watch_forks() {
    extern "C" fn in_child() {
        FORKED.store(true, Ordering::Relaxed);
    }
    static ONCE: Once = Once::new();
    // SAFETY: the library is never unloaded, and the handler only stores to an atomic.
    ONCE.call_once(|| unsafe {
        libc::pthread_atfork(None, None, Some(in_child));
    });
}

/// Whether this is a child of the process that initialised the driver.
pub(super) fn is_forked() -> bool {
    FORKED.load(Ordering::Relaxed)
}

/// Whether this thread may call the driver.
pub(super) fn check() -> Outcome {
    if is_forked() {
        return Err(CUresult::ERROR_NOT_INITIALIZED
            .with("this process was forked from one that had initialised CUDA; only the parent can go on with it"));
    }
    if !context::reachable() || !order::reachable() {
        return Err(CUresult::ERROR_DEINITIALIZED.into());
    }
    Ok(())
}
