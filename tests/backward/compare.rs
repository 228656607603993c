//! How near gradients are.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};
use moe_kernels::{Dtype, Element};

/// Named gradients.
pub type Found = Vec<(&'static str, Vec<f64>)>;

/// What outputs hold before a pass: junk, and with `accumulate` what is added to.
pub const JUNK: f32 = 12288.0;
pub const HELD: f32 = 0.25;
/// Elements behind each output that must keep their value.
pub const GUARD: usize = 64;

/// An output without its guard, which must be as it was.
pub fn read<E: Element>(stream: &Arc<CudaStream>, name: &str, from: &CudaSlice<E>) -> Vec<f64> {
    let mut values: Vec<f64> = stream.clone_dtoh(from).unwrap().into_iter().map(|v| v.to_f32().into()).collect();
    let guard = values.split_off(values.len() - GUARD);
    assert!(guard.iter().all(|&value| value == f64::from(JUNK)), "{name}: written past its end");
    values
}

/// In the norm: f32 sums of a few hundred terms behind one another; in 16 bits the roundings of what lies between products.
pub fn tolerance(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 5e-6,
        Dtype::F16 => 2e-3,
        Dtype::Bf16 => 1e-2,
        other => unreachable!("no case has {other}"),
    }
}

pub fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|v| v * v).sum::<f64>().sqrt()
}

/// What the reference's own f64 leaves of what cancels.
const OWN: f64 = 1e-12;

/// Both lists name the same, and each is near in the norm.
pub fn compare(dtype: Dtype, got: &Found, want: &Found) {
    compare_terms(dtype, got, want, |_| 0.0);
}

/// The same where what is added up to a gradient may be larger than itself: `terms` is the norm of that, by name.
pub fn compare_terms(dtype: Dtype, got: &Found, want: &Found, terms: impl Fn(&str) -> f64) {
    let names = |found: &Found| found.iter().map(|(name, values)| (*name, values.len())).collect::<Vec<_>>();
    assert_eq!(names(got), names(want));
    for ((name, got), (_, want)) in got.iter().zip(want) {
        let error = norm(got.iter().zip(want).map(|(got, want)| got - want));
        let size = norm(want.iter().copied()).max(terms(name));
        // What comes through the gating: the chosen experts' gradients cancel there.
        let gated = ["logits", "router", "router_bias", "weights"].contains(name);
        let most = tolerance(dtype) * if gated { 2.0 } else { 1.0 };
        assert!(error <= most * size + OWN, "{dtype} {name}: {error:e} of {size:e}");
    }
}
