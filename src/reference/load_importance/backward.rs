//! The gradient of the loss of importance and of loads.

use crate::reference::{ReferenceError, require_shape};

/// Of scores and of logits, `[T,E]` each: of `factor` times the first of [`super::LoadImportance::losses`], by the chain rule over its formulas, with
/// `importance` and `load` as it adds them up.
///
/// The threshold of a token is a logit, that of its choice with the smallest, of equal ones the last; it is not detached (Tutel:
/// `topk_logits[:, -1]`). What does not count there has no gradient.
///
/// # Errors
/// Lengths that do not fit.
#[allow(clippy::too_many_arguments)]
pub fn load_importance_backward(
    scores: &[f32],
    logits: &[f32],
    ids: &[i32],
    experts: usize,
    deviation: f64,
    valid: &[bool],
    [importance, load]: [&[f64]; 2],
    factor: f64,
) -> Result<[Vec<f64>; 2], ReferenceError> {
    require_shape("scores", scores, &[valid.len(), experts])?;
    require_shape("logits", logits, &[valid.len(), experts])?;
    let top_k = ids.len().checked_div(valid.len()).unwrap_or(0);
    require_shape("ids", ids, &[valid.len(), top_k])?;
    let [of_importance, of_load] = [importance, load].map(cv_squared_gradient);
    let [mut d_scores, mut d_logits] = [scores, logits].map(|of| vec![0.0; of.len()]);
    for (t, _) in valid.iter().enumerate().filter(|(_, valid)| **valid) {
        let [scores, logits] = [scores, logits].map(|rows| &rows[t * experts..][..experts]);
        let chosen = ids[t * top_k..][..top_k].iter().filter_map(|&id| usize::try_from(id).ok());
        let chosen = chosen.filter(|&id| id < experts);
        let last_smallest = |a: usize, b: usize| if logits[b] <= logits[a] { b } else { a };
        let Some(at) = chosen.reduce(last_smallest) else { continue };
        let sound = logits.iter().all(|&l| l < f32::INFINITY) && logits.iter().any(|&l| l > f32::NEG_INFINITY);
        if !sound || !scores.iter().all(|score| score.is_finite()) {
            continue;
        }
        for (e, &score) in scores.iter().enumerate() {
            let z = (f64::from(score) - f64::from(logits[at])) / deviation;
            let density = (-z * z / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt() / deviation;
            let a = 0.5 * factor * of_load[e] * density;
            d_scores[t * experts + e] += 0.5 * factor * of_importance[e] + a;
            d_logits[t * experts + at] -= a;
        }
    }
    Ok([d_scores, d_logits])
}

/// Of [`super::cv_squared`], whose variance is over `E - 1`.
fn cv_squared_gradient(values: &[f64]) -> Vec<f64> {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / (count - 1.0);
    let divisor = mean * mean + 1e-10;
    let of = |v: f64| 2.0 / divisor * ((v - mean) / (count - 1.0) - variance * mean / (count * divisor));
    values.iter().map(|&v| of(v)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::load_importance;
    use super::*;

    /// In f32 inputs: steps of 2^-8, and errors of their square.
    #[test]
    fn by_finite_differences() {
        let mut rng = fastrand::Rng::with_seed(10);
        let (tokens, experts, step) = (4, 5, 1.0f32 / 256.0);
        let draw = |rng: &mut fastrand::Rng| (rng.u32(0..256)) as f32 / 256.0;
        let scores: Vec<f32> = (0..tokens * experts).map(|_| draw(&mut rng)).collect();
        let logits: Vec<f32> = (0..tokens * experts).map(|_| draw(&mut rng)).collect();
        let ids: Vec<i32> = (0..tokens as i32).flat_map(|t| [t % 5, (t + 2) % 5]).collect();
        let valid = [true, true, false, true];
        let loss = |scores: &[f32], logits: &[f32]| {
            load_importance(scores, logits, &ids, experts, 0.5, &valid).unwrap().losses[0]
        };
        let sums = load_importance(&scores, &logits, &ids, experts, 0.5, &valid).unwrap();
        let of = [&sums.importance[..], &sums.load[..]];
        let [d_scores, d_logits] =
            load_importance_backward(&scores, &logits, &ids, experts, 0.5, &valid, of, 3.0).unwrap();
        for i in 0..tokens * experts {
            let at = |by: f32| {
                let moved = |values: &[f32], by: f32| {
                    let mut values = values.to_vec();
                    values[i] += by;
                    values
                };
                [loss(&moved(&scores, by), &logits), loss(&scores, &moved(&logits, by))]
            };
            let ([up_s, up_l], [down_s, down_l]) = (at(step), at(-step));
            let width = 2.0 * f64::from(step);
            for (got, want) in [(d_scores[i], up_s - down_s), (d_logits[i], up_l - down_l)] {
                let want = 3.0 * want / width;
                assert!((got - want).abs() < 2e-4, "{i}: {got}, want {want}");
            }
        }
    }

    #[test]
    fn equal_sums_have_none() {
        assert_eq!(cv_squared_gradient(&[2.0; 3]), [0.0; 3]);
        assert_eq!(cv_squared_gradient(&[0.0; 3]), [0.0; 3]);
    }
}
