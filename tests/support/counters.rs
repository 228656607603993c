//! What launches do, counted by the software device, to stand beside times.

use std::fmt::Write;
use std::sync::Once;

use moe_kernels::kernels::embedded;

use super::device;

/// Runs `launch` once and prints what each of its launches did, under `name`. Nothing on a real device, which counts nothing.
///
/// The numbers are those of a model of the device that the software device stands for (`SOFTCUDA_DEVICE`).
pub fn print(name: &str, launch: impl FnOnce()) {
    let Some(control) = device::control() else { return };
    static ONCE: Once = Once::new();
    ONCE.call_once(|| control.record_registers(&registers()));
    let ((), profile) = control.profiled(launch);
    for launch in &profile.launches {
        println!("{name} on the model of {}: {launch}", launch.device);
    }
}

/// What `ptxas` reported of every kernel that it assembled when this was built; of several architectures the first.
fn registers() -> String {
    let mut lines = String::new();
    for kernel in embedded() {
        if let Some(image) = kernel.images.first() {
            writeln!(lines, "{} {}", kernel.name, image.registers).expect("strings take all that is written");
        }
    }
    lines
}
