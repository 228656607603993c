//! The definition of every operation: plain CPU code that reads like the formula.
//!
//! It is the oracle of the tests. Inputs are slices of any storage type ([`Real`]), widened to f64 without rounding; every
//! sum, exponential and product is f64 and is never rounded to a storage type in between. Choices of experts are made in the
//! type of the logits that are given, so that ids can be compared bit for bit with a kernel that chooses in f32.
//!
//! Matrices are row-major. Letters: `T` tokens, `H` hidden size, `I` intermediate size, `E` experts, `k` experts a token,
//! `S = T*k` slots.

pub mod activation;
pub mod admission;
pub mod balance;
pub mod base;
pub mod combine;
pub mod dispatch;
pub mod expert_choice;
pub mod expert_map;
pub mod gating;
pub mod gemm;
pub mod hash;
pub mod jitter;
pub mod layer;
pub mod noisy;
pub mod random;
pub mod router;
pub mod sampled;
pub mod sinkhorn;

/// A storage type whose every value is an f64.
pub trait Real: Copy + Into<f64> + Send + Sync {
    /// The nearest value of this type, ties to even, widened again.
    fn round(value: f64) -> f64;
}

impl Real for f64 {
    fn round(value: f64) -> f64 {
        value
    }
}

impl Real for f32 {
    fn round(value: f64) -> f64 {
        value as f32 as f64
    }
}

impl Real for half::bf16 {
    fn round(value: f64) -> f64 {
        half::bf16::from_f64(value).to_f64()
    }
}

impl Real for half::f16 {
    fn round(value: f64) -> f64 {
        half::f16::from_f64(value).to_f64()
    }
}

/// An argument of a reference function that does not fit the shapes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("reference argument `{argument}`: expected {expected}, found {found}")]
pub struct ReferenceError {
    /// Name of the argument.
    pub argument: &'static str,
    /// What would have been accepted.
    pub expected: String,
    /// What was given.
    pub found: String,
}

pub(crate) fn require(
    argument: &'static str,
    holds: bool,
    expected: impl FnOnce() -> String,
    found: impl ToString,
) -> Result<(), ReferenceError> {
    if holds { Ok(()) } else { Err(ReferenceError { argument, expected: expected(), found: found.to_string() }) }
}

/// `slice` must hold a whole matrix of these extents.
pub(crate) fn require_shape<T>(argument: &'static str, slice: &[T], extents: &[usize]) -> Result<(), ReferenceError> {
    let elements = extents.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent));
    require(argument, elements == Some(slice.len()), || format!("a slice of {extents:?} elements"), slice.len())
}
