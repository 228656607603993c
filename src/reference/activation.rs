//! Activations between the two expert matrices. Sources are with each variant of [`Activation`].

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI, FRAC_2_SQRT_PI};

use crate::rules::Activation;

/// `act(value)`. Of [`Activation::ClampedSwiglu`] it is the gate's factor alone, `g sigmoid(alpha g)`.
pub fn activate(activation: Activation, value: f64) -> f64 {
    match activation {
        Activation::Identity => value,
        // NaN stays NaN, which f64::max would drop.
        Activation::Relu => {
            if value < 0.0 {
                0.0
            } else {
                value
            }
        }
        Activation::Gelu => 0.5 * value * (1.0 + erf(value * FRAC_1_SQRT_2)),
        Activation::GeluTanh => {
            0.5 * value * (1.0 + (FRAC_2_PI.sqrt() * (value + 0.044715 * value * value * value)).tanh())
        }
        Activation::Silu => value * sigmoid(value),
        Activation::ClampedSwiglu { alpha, limit } => {
            let gate = if value > limit.into() { limit.into() } else { value };
            gate * sigmoid(f64::from(alpha) * gate)
        }
    }
}

/// The hidden value of a gated expert: `act(gate) * up`, gpt-oss's `(up + 1) * act(gate)` with a clamped `up`.
pub fn activate_glu(activation: Activation, gate: f64, up: f64) -> f64 {
    match activation {
        Activation::ClampedSwiglu { limit, .. } => {
            let limit = f64::from(limit);
            let up = if up > limit { limit } else { up };
            let up = if up < -limit { -limit } else { up };
            (up + 1.0) * activate(activation, gate)
        }
        _ => activate(activation, gate) * up,
    }
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
    fn clamped_swiglu_clamps_the_gate_from_above_only() {
        let act = Activation::ClampedSwiglu { alpha: 2.0, limit: 3.0 };
        close(activate_glu(act, 10.0, 10.0), 4.0 * 3.0 * sigmoid(6.0));
        close(activate_glu(act, -10.0, -10.0), -2.0 * -10.0 * sigmoid(-20.0));
        close(activate_glu(act, 1.0, 0.5), 1.5 * sigmoid(2.0));
    }
}
