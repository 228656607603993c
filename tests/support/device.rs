//! The one device of a test binary.

use std::sync::{Arc, OnceLock};

use cudarc::driver::{CudaContext, CudaStream};
use moe_kernels::Kernels;

/// Which driver serves this process.
fn choice() -> &'static softcuda::Choice {
    static CHOICE: OnceLock<softcuda::Choice> = OnceLock::new();
    CHOICE.get_or_init(|| softcuda::install_if_no_gpu().expect("a real or a software device can be had"))
}

/// The software device's controls; none on a real one.
pub fn control() -> Option<&'static softcuda::Control> {
    choice().control()
}

/// The real GPU if there is one, else the software device; `MOE_DEVICE=soft|cuda` forces one.
pub fn context() -> Arc<CudaContext> {
    static CONTEXT: OnceLock<Arc<CudaContext>> = OnceLock::new();
    CONTEXT
        .get_or_init(|| {
            choice();
            let context = CudaContext::new(0).expect("device 0 opens");
            let (major, minor) = context.compute_capability().expect("the device knows its architecture");
            eprintln!("device: {} (sm_{major}{minor})", context.name().expect("the device has a name"));
            context
        })
        .clone()
}

/// A stream of its own for each test, so that tests may run side by side.
pub fn stream() -> Arc<CudaStream> {
    context().new_stream().expect("the device gives a stream")
}

/// The same for few multiprocessors, where blocks that stay meet many tiles of a small case.
pub fn few() -> &'static Kernels {
    static KERNELS: OnceLock<Kernels> = OnceLock::new();
    KERNELS.get_or_init(|| Kernels::new(&context()).expect("the device takes the kernels").on_multiprocessors(8))
}

/// The kernels of [`context`].
pub fn kernels() -> &'static Kernels {
    static KERNELS: OnceLock<Kernels> = OnceLock::new();
    KERNELS.get_or_init(|| Kernels::new(&context()).expect("the device takes the kernels"))
}
