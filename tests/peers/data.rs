//! Inputs that peers draw: choices without repeats, scores of a type, probabilities.

use moe_kernels::Dtype;
use moe_kernels::reference::Real;

use crate::support::compare::Storage;
use crate::support::inputs::{generator, normals};

/// The generator of a point.
pub fn rng(name: &str) -> fastrand::Rng {
    generator(name)
}

/// `top_k` different experts for each token, in no order: `randperm(E)[:k]`.
pub fn random_ids(rng: &mut fastrand::Rng, tokens: usize, experts: usize, top_k: usize) -> Vec<i32> {
    let mut all: Vec<i32> = (0..experts as i32).collect();
    let mut ids = Vec::with_capacity(tokens * top_k);
    for _ in 0..tokens {
        // The first k of a Fisher-Yates shuffle.
        for j in 0..top_k {
            all.swap(j, rng.usize(j..experts));
        }
        ids.extend_from_slice(&all[..top_k]);
    }
    ids
}

/// Normal scores, rounded to a type and widened again.
pub fn scores(rng: &mut fastrand::Rng, len: usize, dtype: Dtype) -> Vec<f32> {
    let exact: Vec<f32> = normals(rng, len, 1.0);
    exact.into_iter().map(|v| rounded(v, dtype)).collect()
}

/// A value as the type holds it.
pub fn rounded(value: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::Bf16 => half::bf16::round(value.into()) as f32,
        Dtype::F16 => half::f16::round(value.into()) as f32,
        _ => value,
    }
}

/// Uniform in [0, 1), divided by each row's sum.
pub fn probabilities(rng: &mut fastrand::Rng, tokens: usize, top_k: usize) -> Vec<f32> {
    let mut all: Vec<f32> = (0..tokens * top_k).map(|_| rng.f32()).collect();
    for row in all.chunks_mut(top_k) {
        let sum: f32 = row.iter().sum::<f32>().max(1e-20);
        row.iter_mut().for_each(|p| *p /= sum);
    }
    all
}

/// Rows of any bits but those of [`crate::calls::junk`].
pub fn values<T: Storage>(rng: &mut fastrand::Rng, len: usize) -> Vec<T> {
    normals(rng, len, 1.0)
}

/// Widened.
pub fn wide<T: Storage>(values: &[T]) -> Vec<f64> {
    values.iter().map(|&v| v.into()).collect()
}

/// Widened.
pub fn wide32(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| v.into()).collect()
}

/// Runs `$body` with `$t` the type of the value `$dtype`.
macro_rules! with_type {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            moe_kernels::Dtype::Bf16 => {
                type $t = half::bf16;
                $body
            }
            moe_kernels::Dtype::F16 => {
                type $t = half::f16;
                $body
            }
            _ => {
                type $t = f32;
                $body
            }
        }
    };
}
pub(crate) use with_type;
