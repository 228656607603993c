//! The loss of importance and of loads under noise of one deviation for all experts.

mod backward;

use super::activation::erf;
use super::{ReferenceError, require, require_shape};

pub use backward::load_importance_backward;

/// Sums by expert, and losses of them.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadImportance {
    /// `[E]`, sums of scores.
    pub importance: Vec<f64>,
    /// `[E]`, expected tokens.
    pub load: Vec<f64>,
    /// The mean of the two, the loss of importance, that of load.
    pub losses: [f64; 3],
}

/// `var(v) / (mean(v)^2 + 1e-10)`, the variance over `E - 1` (Tutel's `load_importance_loss`; that of [`super::balance::cv_squared`] is over `E`).
pub fn cv_squared(values: &[f64]) -> f64 {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / (count - 1.0);
    variance / (mean * mean + 1e-10)
}

/// `importance_e = sum_t S_te`, `load_e = sum_t Phi((S_te - l_t) / d)` with `l_t` the smallest logit of the token's choices and `d` the noise's
/// deviation; the loss is the mean of both [`cv_squared`] (Tutel's `load_importance_loss`, with `d` its `gate_noise / E`).
///
/// `scores [T,E]` are without noise, `logits [T,E]` those that chose `ids [T,k]`; `valid [T]` says which tokens are no padding. Nor does a token
/// count without an expert, with a score that is not finite, with a logit of NaN or +Inf, or without one above -Inf.
///
/// # Errors
/// Lengths that do not fit.
pub fn load_importance(
    scores: &[f32],
    logits: &[f32],
    ids: &[i32],
    experts: usize,
    deviation: f64,
    valid: &[bool],
) -> Result<LoadImportance, ReferenceError> {
    require("experts", experts >= 2, || "at least 2".to_owned(), experts)?;
    require_shape("scores", scores, &[valid.len(), experts])?;
    require_shape("logits", logits, &[valid.len(), experts])?;
    let top_k = ids.len().checked_div(valid.len()).unwrap_or(0);
    require_shape("ids", ids, &[valid.len(), top_k])?;
    let (mut importance, mut load) = (vec![0.0; experts], vec![0.0; experts]);
    for (t, _) in valid.iter().enumerate().filter(|(_, valid)| **valid) {
        let [scores, logits] = [scores, logits].map(|rows| &rows[t * experts..][..experts]);
        let chosen = ids[t * top_k..][..top_k].iter().filter_map(|&id| logits.get(usize::try_from(id).ok()?));
        let Some(threshold) = chosen.copied().reduce(f32::min) else { continue };
        let sound = logits.iter().all(|&l| l < f32::INFINITY) && logits.iter().any(|&l| l > f32::NEG_INFINITY);
        if !sound || !scores.iter().all(|score| score.is_finite()) {
            continue;
        }
        for (e, &score) in scores.iter().enumerate() {
            let z = (f64::from(score) - f64::from(threshold)) / deviation;
            importance[e] += f64::from(score);
            load[e] += 0.5 * (1.0 + erf(z * std::f64::consts::FRAC_1_SQRT_2));
        }
    }
    let [a, b] = [&importance, &load].map(|values| cv_squared(values));
    Ok(LoadImportance { importance, load, losses: [(a + b) / 2.0, a, b] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_and_two_experts_by_hand() {
        // Threshold 0.5: one expert is level with it, half of the noise lifts it; the other is far below.
        let got = load_importance(&[0.5, 0.25], &[0.5, 0.1], &[0], 2, 0.01, &[true]).unwrap();
        assert_eq!((got.importance, got.load), (vec![0.5, 0.25], vec![0.5, 0.0]));
        // Means 3/8 and 1/4; variances 2 (1/8)^2 and 2 (1/4)^2.
        let [loss, importance, load] = got.losses;
        assert!((importance - 2.0 / 9.0).abs() < 1e-8 && (load - 2.0).abs() < 1e-7, "{importance} {load}");
        assert_eq!(loss, (importance + load) / 2.0);
    }

    #[test]
    fn garbage_does_not_count() {
        for (scores, logits, id) in [
            ([f32::NAN, 0.5], [0.0, 0.0], 0),
            ([0.5, 0.5], [f32::NAN, 0.0], 1),
            ([0.5, 0.5], [0.0, f32::INFINITY], 0),
            ([0.5, 0.5], [f32::NEG_INFINITY; 2], 0),
            ([0.5, 0.5], [0.0, 0.0], -1),
            ([0.5, 0.5], [0.0, 0.0], 2),
        ] {
            let got = load_importance(&scores, &logits, &[id], 2, 0.5, &[true]).unwrap();
            assert_eq!(got.importance, [0.0, 0.0], "{scores:?} {logits:?} {id}");
            assert_eq!(got.losses, [0.0; 3]);
        }
    }
}
