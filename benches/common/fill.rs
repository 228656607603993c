//! Random values made on the device: a host would need minutes for the weights of one layer.

use std::sync::{Arc, OnceLock};

use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr, DriverError};
use moe_kernels::routers::jitter::{self, JitterArgs, JitterDesc};
use moe_kernels::rules::NoiseSource;
use moe_kernels::{Element, Kernels};

/// Values that the host draws, once; no multiple of a row, so that rows of a matrix do not repeat one another.
const DRAWN: usize = (1 << 20) - 3;

/// Deviation of `u`, uniform between 0 and 2, times a value of deviation 1.
const SPREAD: f32 = 1.154_700_5;

/// `len` values of mean 0 and deviation `scale`, all different for all practical purposes: about a million normal ones, repeated, each
/// times its own factor between 0 and 2 (the kernel of [`jitter`]).
///
/// # Errors
/// The device's, out of memory included.
pub fn values<T: Element + DeviceRepr>(
    stream: &Arc<CudaStream>,
    kernels: &Kernels,
    len: usize,
    scale: f32,
    seed: u64,
) -> Result<CudaSlice<T>, Box<dyn std::error::Error>> {
    let mut out = repeated(stream, len, scale / SPREAD)?;
    let desc = JitterDesc::new(T::DTYPE, len, 1.0, NoiseSource::new(seed, 0));
    jitter::forward(kernels, stream, &desc, JitterArgs::in_place(&mut out))?;
    Ok(out)
}

/// `len` values of mean 0 and deviation `scale`: about a million normal ones, repeated. Nothing runs on the device.
///
/// # Errors
/// The device's, out of memory included.
pub fn repeated<T: Element + DeviceRepr>(
    stream: &Arc<CudaStream>,
    len: usize,
    scale: f32,
) -> Result<CudaSlice<T>, DriverError> {
    let block: Vec<T> = drawn().iter().take(len).map(|value| T::from_f32(value * scale)).collect();
    // SAFETY: everything is written before it is read.
    let mut out = unsafe { stream.alloc::<T>(len)? };
    stream.memcpy_htod(&block, &mut out.slice_mut(..block.len()))?;
    spread(stream, &mut out, block.len())?;
    Ok(out)
}

fn drawn() -> &'static [f32] {
    static DRAWN_ONCE: OnceLock<Vec<f32>> = OnceLock::new();
    DRAWN_ONCE.get_or_init(|| {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut normal = || {
            // Box-Muller.
            let radius = (-2.0 * (1.0 - rng.f32()).ln()).sqrt();
            radius * (std::f32::consts::TAU * rng.f32()).cos()
        };
        (0..DRAWN).map(|_| normal()).collect()
    })
}

/// Repeats the first `whole` elements to the end: each copy doubles what there is.
fn spread<T: DeviceRepr>(
    stream: &Arc<CudaStream>,
    out: &mut CudaSlice<T>,
    mut whole: usize,
) -> Result<(), DriverError> {
    let len = out.len();
    while whole < len {
        let more = whole.min(len - whole);
        let (from, mut to) = out.split_at_mut(whole);
        stream.memcpy_dtod(&from.slice(..more), &mut to.slice_mut(..more))?;
        whole += more;
    }
    Ok(())
}
