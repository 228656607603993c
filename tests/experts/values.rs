//! Drawn values in a storage type.

use cudarc::driver::DeviceRepr;
use half::{bf16, f16};
use moe_kernels::reference::Real;
use moe_kernels::{Dtype, Element};

/// A storage type that tests can make from f64, rounding to nearest even.
pub trait Storage: Real + Element + DeviceRepr + bytemuck::Pod + PartialEq {
    /// Half a unit in the last place, relative.
    const ROUNDOFF: f64;
    /// Half the distance of the smallest numbers.
    const SMALLEST: f64;

    fn from_f64(value: f64) -> Self;
}

impl Storage for f32 {
    const ROUNDOFF: f64 = 1.0 / 16_777_216.0;
    const SMALLEST: f64 = f32::MIN_POSITIVE as f64 / 16_777_216.0;

    fn from_f64(value: f64) -> f32 {
        value as f32
    }
}

impl Storage for bf16 {
    const ROUNDOFF: f64 = 1.0 / 256.0;
    const SMALLEST: f64 = f32::MIN_POSITIVE as f64 / 256.0;

    fn from_f64(value: f64) -> bf16 {
        bf16::from_f64(value)
    }
}

impl Storage for f16 {
    const ROUNDOFF: f64 = 1.0 / 2048.0;
    const SMALLEST: f64 = 1.0 / 33_554_432.0;

    fn from_f64(value: f64) -> f16 {
        f16::from_f64(value)
    }
}

/// The generator of a test; `MOE_SEED` gives another.
pub fn generator(test: &str, dtype: Dtype) -> fastrand::Rng {
    let seed = std::env::var("MOE_SEED").map_or(0, |text| text.parse::<u64>().expect("MOE_SEED is a number"));
    eprintln!("{test} {dtype}: MOE_SEED={seed}");
    let name = format!("{test} {dtype}");
    fastrand::Rng::with_seed(name.bytes().fold(seed, |hash, byte| hash.wrapping_mul(0x100_0000_01b3) ^ u64::from(byte)))
}

/// `len` normal values times `scale` (Box-Muller), rounded to the storage type: the reference sees what the kernel sees.
pub fn normals<T: Storage>(rng: &mut fastrand::Rng, len: usize, scale: f64) -> Vec<T> {
    let mut normal = || (-2.0 * (1.0 - rng.f64()).ln()).sqrt() * (std::f64::consts::TAU * rng.f64()).cos();
    (0..len).map(|_| T::from_f64(scale * normal())).collect()
}

pub fn wide<T: Real>(values: &[T]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}
