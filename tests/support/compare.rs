//! Metrics and the one table of tolerances.

use cudarc::driver::DeviceRepr;
use half::{bf16, f16};
use moe_kernels::reference::Real;
use moe_kernels::{Dtype, Element};

/// A storage type that tests can make from f64, rounding to nearest even.
pub trait Storage: Real + Element + DeviceRepr + bytemuck::Pod + PartialEq {
    fn from_f64(value: f64) -> Self;
}

impl Storage for f32 {
    fn from_f64(value: f64) -> f32 {
        value as f32
    }
}

impl Storage for bf16 {
    fn from_f64(value: f64) -> bf16 {
        bf16::from_f64(value)
    }
}

impl Storage for f16 {
    fn from_f64(value: f64) -> f16 {
        f16::from_f64(value)
    }
}

/// Half a unit in the last place, relative: what one rounding to the type may do to a value.
pub fn unit_roundoff(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 2f64.powi(-24),
        Dtype::F16 => 2f64.powi(-11),
        Dtype::Bf16 => 2f64.powi(-8),
        other => unreachable!("no test has {other}"),
    }
}

/// Largest relative error, in the norm of the reference, of f32 arithmetic on inputs that the reference saw rounded: FMA and
/// 3xTF32 have products good to 2^-21 or better, and sums of up to a few thousand terms in another order than the
/// reference's differ by a few 1e-7.
pub const F32_ARITHMETIC: f64 = 1e-6;

/// `|got - want| / |want|` over all elements. Values that are not finite must agree exactly, NaN with NaN, and stay out of
/// the norm: one would hide every other.
pub fn relative_error(name: &str, got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len(), "{name}: lengths");
    let (mut difference, mut norm) = (0.0, 0.0);
    for (index, (&g, &w)) in got.iter().zip(want).enumerate() {
        if w.is_finite() {
            assert!(g.is_finite(), "{name}[{index}]: got {g}, want {w}");
            difference += (g - w) * (g - w);
            norm += w * w;
        } else {
            assert!(g == w || (g.is_nan() && w.is_nan()), "{name}[{index}]: got {g}, want {w}");
        }
    }
    if difference == 0.0 { 0.0 } else { (difference / norm.max(f64::MIN_POSITIVE)).sqrt() }
}

/// Asserts that `got` is f32 arithmetic rounded once to `dtype`: [`F32_ARITHMETIC`] in the norm, and every element within one
/// rounding of the reference's, beside what f32 sums are off by at the scale of the whole. An error that hides in one
/// element of many is found, and so is a second rounding.
pub fn assert_rounded_once(name: &str, got: &[f64], want: &[f64], dtype: Dtype) {
    let roundoff = unit_roundoff(dtype);
    let error = relative_error(name, got, want);
    let tolerance = F32_ARITHMETIC + roundoff;
    assert!(error <= tolerance, "{name}: relative error {error:.3e}, tolerated {tolerance:.3e}");
    let finite = want.iter().filter(|w| w.is_finite());
    let scale = (finite.clone().map(|w| w * w).sum::<f64>() / finite.count().max(1) as f64).sqrt();
    for (index, (&g, &w)) in got.iter().zip(want).enumerate().filter(|(_, (_, w))| w.is_finite()) {
        let bound = roundoff * w.abs() + 4.0 * F32_ARITHMETIC * (w.abs() + scale);
        assert!((g - w).abs() <= bound, "{name}[{index}]: got {g:e}, want {w:e}, bound {bound:.3e}");
    }
}

pub fn to_f64<T: Real>(values: &[T]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}
