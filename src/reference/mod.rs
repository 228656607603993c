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
pub mod by_sequence;
pub mod choice_backward;
pub mod chunks;
pub mod column_products;
pub mod combine;
pub mod cosine;
pub mod dispatch;
pub mod expert_choice;
pub mod expert_counts;
pub mod expert_map;
pub mod gating;
pub mod gemm;
pub mod gemm_backward;
pub mod gradient_norm;
pub mod hash;
pub mod jitter;
pub mod k_grouped;
pub mod keep_largest;
pub mod layer;
pub mod load_importance;
pub mod network;
pub mod noise_state;
pub mod noisy;
mod parallel;
pub mod permute;

pub mod product_keys;
pub mod quantile_bias;
pub mod rms_norm;
pub mod router;
pub mod routing_map;
pub mod row_groups;
pub mod sampled;
pub mod sinkhorn;
pub mod sparse_mixer;
pub mod token_banks;
pub mod unit_experts;

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
        half::bf16::from_f32(rounded_to_odd(value)).to_f64()
    }
}

impl Real for half::f16 {
    fn round(value: f64) -> f64 {
        half::f16::from_f32(rounded_to_odd(value)).to_f64()
    }
}

/// The f32 next to `value` towards zero, its last bit set if it is not `value` itself: rounding that to fewer bits is rounding
/// `value` (Boldo and Melquiond 2008). The conversions from f64 of `half` look at the upper 32 bits of the f64 only.
fn rounded_to_odd(value: f64) -> f32 {
    let near = value as f32;
    if f64::from(near) == value || value.is_nan() {
        return near;
    }
    let below = near.to_bits() - u32::from(f64::from(near).abs() > value.abs());
    f32::from_bits(below | 1)
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

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn rounding_sees_every_bit() {
        for sign in [1.0, -1.0] {
            // 1 + 2^-8 is between two bf16, and 1 + 2^-11 between two f16: the even one is 1.
            let half_ulp = |bits: i32| 1.0 + 2f64.powi(-bits);
            for bits in [9, 30, 40, 52] {
                let more = 2f64.powi(-bits);
                assert_eq!(bf16::round(sign * (half_ulp(8) + more)), sign * (1.0 + 2f64.powi(-7)), "{bits}");
                assert_eq!(bf16::round(sign * (half_ulp(8) - more)), sign, "{bits}");
            }
            for bits in [12, 40, 52] {
                let more = 2f64.powi(-bits);
                assert_eq!(f16::round(sign * (half_ulp(11) + more)), sign * (1.0 + 2f64.powi(-10)), "{bits}");
                assert_eq!(f16::round(sign * (half_ulp(11) - more)), sign, "{bits}");
            }
            assert_eq!((bf16::round(sign * half_ulp(8)), f16::round(sign * half_ulp(11))), (sign, sign));
            assert_eq!(
                (bf16::round(sign * 1e300), f16::round(sign * 65520.0)),
                (sign * f64::INFINITY, sign * f64::INFINITY)
            );
            assert_eq!(f16::round(sign * 65519.99), sign * 65504.0);
        }
        assert_eq!(bf16::round(-0.0).to_bits(), (-0.0f64).to_bits());
        assert!(bf16::round(f64::NAN).is_nan());
    }
}
