//! Metrics and the one table of tolerances.

use std::collections::HashMap;

use cudarc::driver::DeviceRepr;
use half::{bf16, f16};
use moe_kernels::reference::Real;
use moe_kernels::reference::activation::{activate, activate_glu, sigmoid};
use moe_kernels::rules::{Activation, Bound, Score};
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
        Dtype::F32 => UNIT,
        Dtype::F16 => 2f64.powi(-11),
        Dtype::Bf16 => 2f64.powi(-8),
        other => unreachable!("no test has {other}"),
    }
}

/// What one rounding to the type may do to a number of this magnitude.
pub fn rounding(dtype: Dtype, magnitude: f64) -> f64 {
    (unit_roundoff(dtype) * magnitude).max(smallest(dtype))
}

/// Half the distance of the type's smallest numbers: what one rounding may do where the type has no more digits.
fn smallest(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 2f64.powi(-150),
        Dtype::F16 => 2f64.powi(-25),
        Dtype::Bf16 => 2f64.powi(-134),
        other => unreachable!("no test has {other}"),
    }
}

/// The unit roundoff of f32, in which the bounds count.
pub const UNIT: f64 = 1.0 / 16_777_216.0;

/// Bounds on what a few f32 operations on exact inputs give: one rounding, and up to three more.
pub const FEW_ROUNDINGS: f64 = 4.0 * UNIT;

/// In the norm, of outputs whose parts are not followed one by one: a layer or a chain of products in f32, whose every product is good
/// to about 1e-6 in the norm at up to a few thousand terms.
pub const F32_PRODUCTS: f64 = 4e-6;

/// In the norm, of what two f64 computations make of values that were recorded or loaded in f32.
pub const RECORDED: f64 = 1e-6;

/// Relative, of one recorded weight: a small probability carries the absolute error of its f32 logit.
pub const RECORDED_WEIGHT: f64 = 1e-5;

/// In the norm, of gradients that autograd recorded in f32: sums of some hundred products behind one another, and in the router's differences of
/// such.
pub const RECORDED_GRADIENT: f64 = 4e-6;

/// In the norm, of a layer's router logits: f32 sums over the hidden size.
pub const LAYER_LOGITS: f64 = 1e-6;

/// In the norm, of a layer's gate weights: a logit's error is a weight's relative error, and logits are of the order of 10.
pub const LAYER_WEIGHTS: f64 = 1e-5;

/// Of a gradient of logits, relative to the token's own terms: scores good to a few 1e-7 and a dozen operations on them; ln and exp of a
/// p-norm carry the error of an exponent of some tens.
pub const GATING_GRADIENT: f64 = 4e-6;

/// Of the gradient of a factor of weights, relative to the sum of its terms' magnitudes: a weight good to a few 1e-7, and as many additions in a row
/// as a thread has choices.
pub const GATING_SCALE_GRADIENT: f64 = 4e-6;

/// Of a sum of f32 products in stages of 16 that are then added, relative to the sum of magnitudes: 16 roundings in a stage, and one for each of
/// some tens of stages.
pub const ROUTER_GRADIENT: f64 = 32.0 * UNIT;

/// Of a gradient through an activation, relative to its terms: functions good to a few 1e-7 and half a dozen roundings; Phi is off by 3e-7.
pub const ACTIVATION_GRADIENT: f64 = 2e-6;

/// In the norm, of a layer's output: the roundings of the intermediate and of each expert's output to the storage type, two or three
/// units roundoff; f32: the weights' error.
pub fn layer(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::Bf16 => 1e-2,
        Dtype::F16 => 2e-3,
        Dtype::F32 => LAYER_WEIGHTS,
        other => unreachable!("no test has {other}"),
    }
}

/// Of noisy gating's importance and load, relative to the sum of what is added: Phi is off by 3e-7, a softmax by 2e-7, and f32 sums
/// of some hundred terms by a few 1e-7.
pub const NOISY_SUMS: f64 = 2e-6;

/// The same of 2^20 terms, in three levels of about 600, 8 and 264.
pub const NOISY_SUMS_OF_MANY: f64 = 2e-5;

/// Of a loss that f32 makes of a vector of sums: the differences from the mean are small beside it, and squared.
pub const LOSS_OF_SUMS: f64 = 1e-5;

/// Relative error of a sum of non-negative f32 terms over a batch: each term good to a few units in the last place, and at most so many
/// additions in a row as a warp takes tokens (64), warps, pieces and parts. Errors of one sign in all would add up to 2^-24
/// each; they do not, but nothing is known of their signs.
pub const BATCH_SUMS: f64 = 1e-5;

/// A squared coefficient of variation is a difference of sums: twice the sums' error, on the scale of 1 + CV^2.
pub const BATCH_CV2: f64 = 4.0 * BATCH_SUMS;

/// Of losses of batches of at most some hundred tokens with equal shares.
pub const LOSSES: f64 = 1e-6;

/// Of a logarithm of a probability and of an entropy: exp and ln are good to 2e-7, and a difference of logits that f32 holds in a few units of
/// 2^-24 of the larger.
pub const LOGARITHMS: f64 = 2e-6;

/// Of the logarithm of a sum of exponentials, relative to 1 and itself: ln of kernels/common/noise and one addition.
pub const LOG_SUM_EXP: f64 = 3e-7;

/// Of Sinkhorn's potentials: each iteration adds a logarithm of a sum of f32, a few 1e-6, and they do not grow, as the iteration contracts.
pub const POTENTIALS: f64 = 2e-5;

/// Of Sinkhorn's error of the columns: differences of sums from their mean, in potentials that are off by [`POTENTIALS`].
pub const COLUMN_ERROR: f64 = 1e-4;

/// How many standard deviations of an error that is a sum of many independent roundings are allowed: a normal variable exceeds
/// 7 in 2.6e-12 of all cases.
const SURE: f64 = 7.0;

/// How a kernel adds products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// Fused multiply-add in f32, and additions in f32.
    Fma,
    /// 16-bit operands on the tensor cores: exact products, f32 accumulators.
    Mma16,
    /// The same in parts of 32 terms from zero, which f32 additions join; an f32 factor in three parts of 8 bits.
    MmaParts,
    /// Three TF32 products on the tensor cores, see `kernels/common/mma`.
    Tf32x3,
}

impl Arithmetic {
    /// Most by which a sum of `terms` products may be off: `value` is the sum, `magnitude` the sum of their magnitudes, `root` the root of
    /// the sum of their squares, which is what the sum amounts to where signs are random.
    ///
    /// Two bounds hold, and the smaller counts. Never is an error larger than each product's and each addition's at its worst, all of
    /// one sign: a multiple of `magnitude`. And as the roundings are independent, the error is no more than [`SURE`] standard deviations:
    /// n additions whose partial sums grow as a random walk does, to `root` if nothing is known of it, or straight to `value`,
    /// each off by `UNIT / sqrt(3)`, have `sqrt(n / 6) UNIT` times that. Neither asks whether the terms cancel.
    ///
    /// - 3xTF32: of `a b` is lost `small small`, 2^-20, and the last bits of either small part, 2^-22 each: 24 units at most, and at
    ///   uniformly distributed mantissas below 3.5 in the root mean square. A stage adds 32 products from zero, then one sum for each
    ///   stage joins the accumulator.
    /// - Tensor cores cut where f32 rounds: a unit for each instruction (a depth of 16, or 8 of TF32), towards zero. Of a
    ///   stage that starts from zero signs are random, of one accumulator they are not.
    /// - Parts of 32: softcuda rounds each of a part's 32 additions, or hardware cuts a few bits of each of four steps and the sums.
    pub fn sum_bound(self, terms: usize, value: f64, magnitude: f64, root: f64) -> f64 {
        let n = terms as f64;
        let (product, product_root, additions, cut) = match self {
            Arithmetic::Fma => (0.0, 0.0, n, 0.0),
            Arithmetic::Mma16 => (0.0, 0.0, n, (n / 16.0).ceil()),
            Arithmetic::MmaParts => (0.0, 0.0, 32f64.min(n) + (n / 32.0).ceil(), 4.0),
            Arithmetic::Tf32x3 => (24.0, 3.5, 32f64.min(n) + n / 32.0, 4.0),
        };
        let never = (product + additions + cut) * magnitude;
        let walk = root.hypot(value);
        let hardly = SURE * f64::hypot(product_root * root, (additions / 6.0).sqrt() * walk) + cut * walk;
        UNIT * never.min(hardly)
    }
}

/// A value and the most by which what the kernel holds in its place may be off.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bounded {
    pub value: f64,
    pub error: f64,
}

impl Bounded {
    /// `scale * sum + bias` in one fused rounding.
    pub fn scaled(self, scale: f64) -> Bounded {
        Bounded { value: self.value, error: scale.abs() * self.error + UNIT * self.value.abs() }
    }

    /// `act(gate)`, or for a gated matrix `act(gate) * up`: what the function makes of its arguments' errors, taken at the ends of
    /// their intervals and so its slope there, and what the kernel's activation is off by itself.
    pub fn activated(activation: Activation, gate: Bounded, up: Option<Bounded>) -> Bounded {
        let of = |gate, up: Option<f64>| match up {
            Some(up) => activate_glu(activation, gate, up),
            None => activate(activation, gate),
        };
        let value = of(gate.value, up.map(|up| up.value));
        let mut moved = 0f64;
        for sign in [-1.0, 1.0] {
            for other in [-1.0, 1.0] {
                let corner = of(gate.value + sign * gate.error, up.map(|up| up.value + other * up.error));
                moved = moved.max((corner - value).abs());
            }
        }
        let own = value.abs() * UNIT * (1.0 + activation_units(activation, gate.value));
        let tail = if activation == Activation::Gelu && gate.value - gate.error < -6.0 { GELU_TAIL } else { 0.0 };
        let own = own + tail * up.map_or(1.0, |up| up.value.abs() + up.error);
        // The up value's own error is relative to it before an offset takes some of it away.
        let own = own
            + match (activation, up) {
                (Activation::Swiglu(unit), Some(up)) if matches!(unit.up, Bound::Softcap(_)) => {
                    let alone = Activation::Swiglu(unit.offset(0.0));
                    SOFTCAP * UNIT * activate_glu(alone, gate.value, up.value).abs()
                }
                _ => 0.0,
            };
        // The reference's 1 + erf and 1 + tanh keep no more of a small value than f64 has beside 1.
        let reference = f64::EPSILON * gate.value.abs() * up.map_or(1.0, |up| 1.0 + up.value.abs());
        Bounded { value, error: moved + own + reference }
    }
}

/// Most by which gelu is off below -6, where its polynomial was not fitted: largest at -6.4, of a value of -5e-10.
const GELU_TAIL: f64 = 2e-14;

/// By how many units relative to its value an activation of `kernels/common/activation` is off.
///
/// All are `x s` with `s = 1 / (1 + exp(-z))` or the normal distribution's, by ex2.approx (2^-22.5) and rcp.approx (2^-23): an error of
/// the exponent, a few units of `|z|`, counts as far as s is below 1. The polynomial in gelu's exponent was fitted to 2.6e-7.
fn activation_units(activation: Activation, x: f64) -> f64 {
    let (z, fit) = match activation {
        Activation::Identity | Activation::Relu => return 0.0,
        Activation::Silu => (x, 0.0),
        Activation::ReluSquared => return 1.0,
        Activation::Swiglu(unit) => {
            let gate = match unit.gate {
                Bound::Clamp(limit) if !unit.clamp_after => x.min(limit.into()),
                _ => x,
            };
            let capped = if matches!(unit.gate, Bound::Softcap(_)) { SOFTCAP } else { 0.0 };
            return capped + gate_units(sigmoid(f64::from(unit.alpha) * gate), f64::from(unit.alpha) * gate, 0.0);
        }
        Activation::GeluTanh => (2.0 * (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x), 0.0),
        // ln Phi(x) of negative x is about -x^2/2 - ln |x| - 1.
        Activation::Gelu => (if x < 0.0 { x * x / 2.0 + 2.0 } else { 2.0 }, 4.4),
        other => unreachable!("no test has {other:?}"),
    };
    gate_units(if x == 0.0 { 0.5 } else { activate(activation, x) / x.min(f64::INFINITY) }, z, fit)
}

/// Of `x s(z)` with `s(z) = share`.
fn gate_units(share: f64, z: f64, fit: f64) -> f64 {
    4.0 + (2.0 * (1.0 - share)).clamp(0.0, 1.0) * (2.9 + fit + 5.0 * z.abs())
}

/// Of `c tanh(v / c)`: 3 of the quotient by a reciprocal, at most 12 of the hyperbolic tangent, which is off most just above 0.625, a product.
const SOFTCAP: f64 = 16.0;

/// Relative error of one of the shares into which a softmax over `experts` divides 1, in units, by `kernels/common/exp`.
///
/// The exponential's 0.9e-7 (1.5 units) and, of the rounded difference of two logits, as many units as it is large, which is not above
/// `-ln share`; the sum's the same on average, where the difference is at most `ln experts`, and a rounding for each level of the
/// tree by which it is added; the quotient's rounding.
fn share_units(share: f64, experts: usize) -> f64 {
    let experts = experts as f64;
    4.0 + share.abs().max(f64::MIN_POSITIVE).ln().abs() + experts.ln() + experts.log2().ceil()
}

/// How weights come from logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shares {
    /// Softmax over so many.
    Softmax(usize),
    /// A softmax over so many times one over so many others.
    Product(usize, usize),
    /// Sigmoid of each: 1.5 units of the exponential, a sum and a quotient.
    Sigmoid,
    /// sqrt(softplus) of each: half of an exponential's and a logarithm's errors, a root and a product.
    SqrtSoftplus,
}

impl Shares {
    /// Those of a gating: over all `experts`, over the `top_k` chosen, or each by itself.
    pub fn of(score: Score, experts: usize, top_k: usize) -> Shares {
        match score {
            Score::Softmax | Score::SparseMixer => Shares::Softmax(experts),
            Score::TopkSoftmax => Shares::Softmax(top_k),
            Score::Sigmoid => Shares::Sigmoid,
            Score::SqrtSoftplus => Shares::SqrtSoftplus,
            other => unreachable!("no test has {other:?}"),
        }
    }
}

/// Bounds on gate weights that are correct to the last places that `kernels/common/exp` promises: shares, divided by the sum of `chosen` of them
/// if `chosen` is not 0, and scaled.
pub fn weight_bounds(want: &[f64], shares: Shares, chosen: usize) -> Vec<f64> {
    let units = |share| match shares {
        Shares::Softmax(experts) => share_units(share, experts),
        Shares::Product(first, second) => 5.0 + share_units(share, first * second),
        Shares::Sigmoid => 3.5,
        Shares::SqrtSoftplus => 4.0,
    };
    let divided = |w: f64| if chosen > 0 { units(w) + (chosen as f64).log2().ceil() + 1.0 } else { 0.0 };
    want.iter().map(|&w| UNIT * w.abs() * (units(w) + divided(w) + 1.0) + 4.0 * smallest(Dtype::F32)).collect()
}

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

/// Asserts that every element of `got` is within its bound of `want`, and then rounded once to `dtype`. Values that are not finite agree
/// exactly, NaN with NaN.
pub fn assert_bounded(name: &str, got: &[f64], want: &[f64], bounds: &[f64], dtype: Dtype) {
    assert_eq!((got.len(), got.len()), (want.len(), bounds.len()), "{name}: lengths");
    for (index, ((&g, &w), &bound)) in got.iter().zip(want).zip(bounds).enumerate() {
        if w.is_finite() {
            let most = bound + rounding(dtype, w.abs() + bound);
            assert!((g - w).abs() <= most, "{name}[{index}]: got {g:e}, want {w:e}, bound {most:.3e}");
        } else {
            assert!(g == w || (g.is_nan() && w.is_nan()), "{name}[{index}]: got {g}, want {w}");
        }
    }
}

/// [`assert_bounded`] of sums of products, and that all together are within a third of their bounds, so that no loss of digits hides under
/// bounds that are meant for single elements.
pub fn assert_sums(name: &str, got: &[f64], want: &[f64], bounds: &[f64], dtype: Dtype) {
    assert_bounded(name, got, want, bounds, dtype);
    let (mut squares, mut allowed, mut rounded) = (0.0, 0.0, 0.0);
    // Equal values, such as those that a clamp makes, are rounded alike: together they are one error.
    let mut shares = HashMap::<u64, f64>::new();
    for ((&g, &w), &bound) in got.iter().zip(want).zip(bounds).filter(|((_, w), _)| w.is_finite()) {
        let rounding = rounding(dtype, w.abs() + bound);
        squares += (g - w).powi(2);
        allowed += bound * bound;
        rounded += rounding * rounding;
        *shares.entry(w.to_bits()).or_default() += bound * bound + rounding * rounding;
    }
    // A uniform error has 0.58 of its largest in the root mean square. With n independent ones that mean wanders by the order of
    // 1 / sqrt(n), where n counts those that have a share in the whole: not zeros, nor what is small beside the largest.
    let fourths: f64 = shares.values().map(|share| share * share).sum();
    let n = (allowed + rounded).powi(2) / fourths.max(f64::MIN_POSITIVE);
    let wander = 1.5 / n.max(1.0).sqrt();
    let most = (1.0 / 3.0 + wander).min(1.0) * allowed.sqrt() + (0.6 + wander).min(1.0) * rounded.sqrt();
    assert!(squares.sqrt() <= most, "{name}: all together off by {:.3e}, bound {most:.3e}", squares.sqrt());
}

/// [`assert_bounded`] of gate weights in f32.
pub fn assert_weights(name: &str, got: &[f32], want: &[f64], shares: Shares, chosen: usize) {
    assert_bounded(name, &to_f64(got), want, &weight_bounds(want, shares, chosen), Dtype::F32);
}

pub fn to_f64<T: Real>(values: &[T]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}
