//! Metrics and the one table of tolerances.

use cudarc::driver::DeviceRepr;
use half::{bf16, f16};
use moe_kernels::Element;
use moe_kernels::reference::Real;
use moe_kernels::registry::Dtype;

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

/// Largest relative error, in the norm of the reference, of one operation whose inputs the reference saw rounded.
///
/// - f32 through 3xTF32 or FMA: products are exact to 2^-21 or better, sums are f32 in another order than the reference's;
///   for sums of up to a few thousand terms that is a few 1e-7 in the norm.
/// - bf16 and f16: exact products, f32 sums, one rounding of the result: half a unit in the last place is 2^-9 and 2^-12 at
///   most, and in the norm about 0.58 of it.
pub fn one_rounding(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 1e-6,
        Dtype::F16 => 0.7 * 2f64.powi(-12) + 1e-6,
        Dtype::Bf16 => 0.7 * 2f64.powi(-9) + 1e-6,
    }
}

/// f32 arithmetic that ends in f32: logits and gate weights.
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

/// Asserts [`relative_error`] within `tolerance`, and that no single element is off by more than the tolerance allows a
/// whole row: an error that hides in one element of many is found too.
pub fn assert_close(name: &str, got: &[f64], want: &[f64], tolerance: f64) {
    let error = relative_error(name, got, want);
    assert!(error <= tolerance, "{name}: relative error {error:.3e}, tolerated {tolerance:.3e}");
    let finite = want.iter().filter(|w| w.is_finite());
    let scale = (finite.clone().map(|w| w * w).sum::<f64>() / finite.count().max(1) as f64).sqrt();
    for (index, (&g, &w)) in got.iter().zip(want).enumerate().filter(|(_, (_, w))| w.is_finite()) {
        // A rounding is relative to the element; sums are relative to the scale of the whole.
        let bound = 4.0 * tolerance * (w.abs() + 4.0 * scale);
        assert!((g - w).abs() <= bound, "{name}[{index}]: got {g:e}, want {w:e}, bound {bound:.3e}");
    }
}

pub fn to_f64<T: Real>(values: &[T]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}
