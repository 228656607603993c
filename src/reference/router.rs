//! Router: `logits = x W^T + b`.
//!
//! Shazeer et al. 2017, "Outrageously Large Neural Networks", section 2.1 (the gating network without noise); in f32
//! whatever the type of x after Fedus et al. 2021, "Switch Transformers", section 2.4 (selective precision).

use super::parallel::map_rows;
use super::{Real, ReferenceError, require, require_shape};
use crate::rules::LogitRule;

/// `logits[t,e] = sum_h x[t,h] weight[e,h] + bias[e]`, `[T,E]`.
///
/// `x` is `[T,H]`, `weight` `[E,H]`, `bias` `[E]` (gpt-oss).
///
/// # Errors
/// A slice whose length does not fit `hidden`.
pub fn router<X: Real, W: Real, B: Real>(
    x: &[X],
    weight: &[W],
    bias: Option<&[B]>,
    hidden: usize,
) -> Result<Vec<f64>, ReferenceError> {
    require("hidden", hidden > 0, || "at least 1".into(), hidden)?;
    require("x", x.len().is_multiple_of(hidden), || format!("rows of {hidden} elements"), x.len())?;
    require("weight", weight.len().is_multiple_of(hidden), || format!("rows of {hidden} elements"), weight.len())?;
    let experts = weight.len() / hidden;
    if let Some(bias) = bias {
        require_shape("bias", bias, &[experts])?;
    }
    let logits = |row: &[X]| -> Vec<f64> {
        weight.chunks(hidden).enumerate().map(|(e, w)| dot(row, w) + bias.map_or(0.0, |b| b[e].into())).collect()
    };
    Ok(map_rows(x, hidden, logits).concat())
}

/// What `rule` makes of the product's logits: `cap(factor l)` with `cap(l) = c tanh(l / c)` (transformers, `MuseSparkTopkRouter`,
/// `LagunaTopKRouter`).
pub fn finish(logits: &[f64], rule: LogitRule) -> Vec<f64> {
    let cap = |l: f64| rule.softcap.map_or(l, |c| f64::from(c) * (l / f64::from(c)).tanh());
    logits.iter().map(|&l| cap(f64::from(rule.factor) * l)).collect()
}

pub(crate) fn dot<A: Real, B: Real>(a: &[A], b: &[B]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| a.into() * b.into()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adds_the_bias_of_each_expert() {
        let logits = router(&[1f32, 2.0, 3.0, 4.0], &[1f32, 0.0, 0.5, -1.0, 2.0, 2.0], Some(&[0.0f32, 10.0, -1.0]), 2);
        assert_eq!(logits.unwrap(), [1.0, 8.5, 5.0, 3.0, 7.5, 13.0]);
    }

    #[test]
    fn a_cap_bends_and_a_factor_scales() {
        let rule = LogitRule::PLAIN.factor(0.5).softcap(Some(2.0));
        let logits = finish(&[0.0, 4.0, -1e9], rule);
        assert_eq!(logits, [0.0, 2.0 * 1f64.tanh(), -2.0]);
    }

    #[test]
    fn no_tokens_give_no_logits() {
        assert_eq!(router::<f32, f32, f32>(&[], &[1.0, 2.0], None, 2).unwrap(), [0.0; 0]);
    }

    #[test]
    fn a_ragged_row_is_an_error() {
        let error = router::<f32, f32, f32>(&[1.0; 5], &[1.0; 4], None, 2).unwrap_err();
        assert_eq!(error.argument, "x");
        assert_eq!(error.to_string(), "reference argument `x`: expected rows of 2 elements, found 5");
    }
}
