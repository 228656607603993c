//! The same micro-programs on a real driver: after a program has run on the executor, it is loaded and launched through
//! `cudarc` on copies of the buffers that its parameters name, and must leave the same bytes in them.
//!
//! `MOE_DEVICE=cuda` asks for it, `MOE_DEVICE=soft` forbids it, and without either it happens where a driver is present.
//! `SOFTCUDA_DIFFERENCES=FILE` lists what differs, one line each, and goes on. Not compared: approximate functions, which only have error bounds, and what is the device's own choice.

use cudarc::driver::{DevicePtr, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;

use crate::device::Run;
use crate::nvidia::{context, difference, differs};

/// Words of programs whose results differ from device to device.
const OWN: [&str; 7] = [".approx", "%clock", "%globaltimer", "%smid", "%nsmid", "%gridid", "_smem_size"];

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
    let module = match context.load_module(Ptx::from_src(text)) {
        Ok(module) => module,
        Err(error) => return differs(&format!("the driver refuses the program: {error}"), text),
    };
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
    if let Err(error) = launched {
        return differs(&format!("the driver does not launch: {error}"), text);
    }
    for ((copy, want), (index, _)) in copies.iter().zip(after).zip(before) {
        // A fault ends the context, and with it whatever else this process would compare.
        let got = stream.clone_dtoh(copy).unwrap_or_else(|e| panic!("on the driver: {e}\n{text}"));
        if let Some(words) = difference(&got, want) {
            differs(&format!("buffer of p{index}: {words}"), text);
        }
    }
}
