//! Activations between the two expert matrices. Sources are with each variant of [`Activation`].

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI, FRAC_2_SQRT_PI};

use crate::rules::{Activation, Bound, Swiglu};

/// `act(value)`. Of [`Activation::Swiglu`] it is the gate's factor alone.
pub fn activate(activation: Activation, value: f64) -> f64 {
    match activation {
        Activation::Identity => value,
        Activation::Relu => relu(value),
        Activation::ReluSquared => relu(value) * relu(value),
        Activation::Gelu => 0.5 * value * (1.0 + erf(value * FRAC_1_SQRT_2)),
        Activation::GeluTanh => {
            0.5 * value * (1.0 + (FRAC_2_PI.sqrt() * (value + 0.044715 * value * value * value)).tanh())
        }
        Activation::Silu => value * sigmoid(value),
        Activation::Swiglu(unit) => swiglu_gate(&unit, value),
    }
}

/// The hidden value of a gated expert: `act(gate) * up`, or what [`Swiglu`] says.
pub fn activate_glu(activation: Activation, gate: f64, up: f64) -> f64 {
    let up = match activation {
        Activation::Swiglu(unit) => f64::from(unit.factor) * bounded(unit.up, up) + f64::from(unit.offset),
        _ => up,
    };
    activate(activation, gate) * up
}

/// NaN stays NaN, which f64::max would drop.
fn relu(value: f64) -> f64 {
    if value < 0.0 { 0.0 } else { value }
}

/// A gate's clamp bounds it from above only.
fn swiglu_gate(unit: &Swiglu, gate: f64) -> f64 {
    let silu = |linear: f64, gate: f64| linear * sigmoid(f64::from(unit.alpha) * gate);
    match unit.gate {
        Bound::None => silu(gate, gate),
        Bound::Clamp(limit) if unit.clamp_after => at_most(silu(gate, gate), limit.into()),
        Bound::Clamp(limit) => {
            let gate = at_most(gate, limit.into());
            silu(gate, gate)
        }
        Bound::Softcap(cap) => silu(softcap(gate, cap.into()), gate),
    }
}

/// The up value under its bound.
fn bounded(bound: Bound, value: f64) -> f64 {
    match bound {
        Bound::None => value,
        Bound::Clamp(limit) => -at_most(-at_most(value, limit.into()), limit.into()),
        Bound::Softcap(cap) => softcap(value, cap.into()),
    }
}

/// `min(value, limit)`, of NaN NaN.
fn at_most(value: f64, limit: f64) -> f64 {
    if value > limit { limit } else { value }
}

/// `cap tanh(value / cap)`.
fn softcap(value: f64, cap: f64) -> f64 {
    cap * (value / cap).tanh()
}

/// `1 / (1 + exp(-v))`.
pub fn sigmoid(value: f64) -> f64 {
    1.0 / (1.0 + (-value).exp())
}

/// The error function, to about 1e-15: `2/sqrt(pi) exp(-x^2) sum_n 2^n x^(2n+1) / (2n+1)!!` (Abramowitz and Stegun 7.1.6),
/// whose terms all have the sign of x.
pub fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > 1e-17 * sum.abs() {
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
    }
    FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: f64, want: f64) {
        assert!((got - want).abs() <= 1e-14 * want.abs().max(1.0), "{got} is not {want}");
    }

    #[test]
    fn erf_at_tabulated_points() {
        close(erf(0.0), 0.0);
        close(erf(0.5), 0.520_499_877_813_046_5);
        close(erf(1.0), 0.842_700_792_949_714_9);
        close(erf(-2.0), -0.995_322_265_018_952_7);
        close(erf(4.0), 0.999_999_984_582_742_1);
        assert_eq!(erf(f64::INFINITY), 1.0);
        assert!(erf(f64::NAN).is_nan());
    }

    #[test]
    fn activations_at_one() {
        close(activate(Activation::Silu, 1.0), 0.731_058_578_630_004_9);
        close(activate(Activation::Gelu, 1.0), 0.841_344_746_068_542_9);
        close(activate(Activation::GeluTanh, 1.0), 0.841_191_990_608_276_8);
        close(activate(Activation::Relu, -1.0), 0.0);
        assert!(activate(Activation::Relu, f64::NAN).is_nan());
    }

    #[test]
    fn squares_above_zero() {
        close(activate(Activation::ReluSquared, 3.0), 9.0);
        close(activate(Activation::ReluSquared, -3.0), 0.0);
        close(activate_glu(Activation::ReluSquared, 3.0, -2.0), -18.0);
        assert!(activate(Activation::ReluSquared, f64::NAN).is_nan());
    }

    #[test]
    fn gpt_oss_clamps_the_gate_from_above_only() {
        let act = Swiglu::clamped(3.0).alpha(2.0).offset(1.0).into();
        close(activate_glu(act, 10.0, 10.0), 4.0 * 3.0 * sigmoid(6.0));
        close(activate_glu(act, -10.0, -10.0), -2.0 * -10.0 * sigmoid(-20.0));
        close(activate_glu(act, 1.0, 0.5), 1.5 * sigmoid(2.0));
    }

    #[test]
    fn plain_swiglu_is_silu() {
        for (gate, up) in [(0.5, -3.0), (-20.0, 40.0), (7.0, 0.0)] {
            close(activate_glu(Swiglu::new().into(), gate, up), activate_glu(Activation::Silu, gate, up));
            close(
                activate_glu(Swiglu::clamped(f32::INFINITY).into(), gate, up),
                activate_glu(Activation::Silu, gate, up),
            );
        }
    }

    #[test]
    fn a_clamp_after_the_silu_sees_its_value() {
        let before = Swiglu::clamped(2.0);
        let after = before.clamp_after(true);
        // silu(2) is 1.76, silu(2.5) is 2.31.
        close(activate_glu(before.into(), 2.5, 3.0), 2.0 * 2.0 * sigmoid(2.0));
        close(activate_glu(after.into(), 2.5, 3.0), 2.0 * 2.0);
        close(activate_glu(after.into(), 2.0, -3.0), -2.0 * 2.0 * sigmoid(2.0));
    }

    #[test]
    fn a_softcap_leaves_the_sigmoid_alone() {
        let act = Swiglu::softcapped(4.0, 25.0).into();
        close(activate_glu(act, 8.0, 50.0), 4.0 * 2f64.tanh() * sigmoid(8.0) * 25.0 * 2f64.tanh());
        close(activate_glu(act, f64::INFINITY, f64::NEG_INFINITY), -100.0);
        let gate_alone = Swiglu::softcapped(4.0, 1.0).up(Bound::None).factor(2.0).offset(-1.0).into();
        close(activate_glu(gate_alone, -8.0, 50.0), 4.0 * -(2f64.tanh()) * sigmoid(-8.0) * 99.0);
    }

    #[test]
    fn nan_passes_every_bound() {
        for unit in [Swiglu::GPT_OSS, Swiglu::GPT_OSS.clamp_after(true), Swiglu::softcapped(1.0, 1.0)] {
            assert!(activate_glu(unit.into(), f64::NAN, 1.0).is_nan());
            assert!(activate_glu(unit.into(), 1.0, f64::NAN).is_nan());
        }
    }
}
