//! The same micro-programs on a real driver: after a program has run on the executor, it is loaded and launched through
//! `cudarc` on copies of the buffers that its parameters name, and must leave the same bytes in them.
//!
//! `MOE_DEVICE=cuda` asks for it, `MOE_DEVICE=soft` forbids it, and without either it happens where a driver is present.
//! Not compared: approximate functions, which only have error bounds, and what is the device's own choice.

use std::sync::{Arc, LazyLock};

use cudarc::driver::{CudaContext, DevicePtr, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;

use crate::device::Run;

/// Words of programs whose results differ from device to device.
const OWN: [&str; 7] = [".approx", "%clock", "%globaltimer", "%smid", "%nsmid", "%gridid", "_smem_size"];

fn context() -> Option<&'static Arc<CudaContext>> {
    static CONTEXT: LazyLock<Option<Arc<CudaContext>>> = LazyLock::new(|| {
        let asked = std::env::var("MOE_DEVICE").unwrap_or_default();
        // SAFETY: loads the driver's library, as any use of cudarc does.
        let present = asked != "soft" && unsafe { cudarc::driver::sys::is_culib_present() };
        assert!(present || asked != "cuda", "MOE_DEVICE=cuda, but no driver loads");
        present.then(|| CudaContext::new(0).expect("the driver has a device"))
    });
    CONTEXT.as_ref()
}

/// Whether there is a driver to compare with.
pub fn present() -> bool {
    context().is_some()
}

/// Launches the module's kernel; `before` are the buffers that parameters name as they were, `after` what they must become.
pub fn compare(text: &str, run: &Run, params: &[u64], before: &[(usize, Vec<u8>)], after: &[Vec<u8>]) {
    let Some(context) = context() else { return };
    let (major, _) = context.compute_capability().expect("a compute capability");
    if run.own || OWN.iter().any(|word| text.contains(word)) || major < 9 || run.shared > 48 << 10 {
        return;
    }
    let stream = context.default_stream();
    let module = context.load_module(Ptx::from_src(text)).unwrap_or_else(|e| panic!("the driver refuses: {e}\n{text}"));
    let function = module.load_function("k").expect("the kernel is there");
    let copies: Vec<_> = before.iter().map(|(_, bytes)| stream.clone_htod(bytes).expect("device memory")).collect();
    let mut values = params.to_vec();
    for ((index, _), copy) in before.iter().zip(&copies) {
        values[*index] = copy.device_ptr(&stream).0;
    }
    let config =
        LaunchConfig { grid_dim: (run.grid, 1, 1), block_dim: (run.block, 1, 1), shared_mem_bytes: run.shared };
    let mut launch = stream.launch_builder(&function);
    values.iter().for_each(|value| {
        launch.arg(value);
    });
    // SAFETY: the same program has just run on the executor, which checks every access.
    let launched = unsafe { if run.cooperative { launch.launch_cooperative(config) } else { launch.launch(config) } };
    launched.unwrap_or_else(|e| panic!("the driver does not launch: {e}\n{text}"));
    for (copy, want) in copies.iter().zip(after) {
        let got = stream.clone_dtoh(copy).unwrap_or_else(|e| panic!("on the driver: {e}\n{text}"));
        assert_eq!(&got, want, "the driver's result differs from the executor's\n{text}");
    }
}
