//! SparseMixer in training: Liu et al. 2023, "Bridging Discrete and Backpropagation: Straight-Through and Beyond", "Sparse Backpropagation for MoE
//! Training" (arXiv:2310.00811); 2024, "GRIN: GRadient-INformed MoE" (arXiv:2409.12136); PhiMoE's `sparsemixer` in training.

use super::gating::{near_largest, softmax, top};
use super::{ReferenceError, require};
use crate::rules::MixerRule;
use crate::rules::noise::{gumbel, uniform};

/// What SparseMixer draws.
#[derive(Clone, Debug, PartialEq)]
pub struct Mixed {
    /// `[T,k]`, in the order in which they are drawn.
    pub ids: Vec<i32>,
    /// `[T,k]`.
    pub weights: Vec<f64>,
}

/// Draws `k` experts, 1 or 2, of each row of `logits [T,E]`.
///
/// Each is drawn from `q`, the softmax over those experts near the largest logit `m` that are left (`(m - l) / max(|l|, m)` is not above twice the
/// jitter, in f32), by Gumbel noise in f32; of equal perturbed logits the lower id, NaN last. Its weight is `q_i B`: `B` is 1 for the expert with the
/// largest logit (of equal ones the lower id) and for others with the chance 1/4, else 1/3. A weight that is no number is 0.
///
/// With one expert a token that yields `y = f(q_i B)`, the mean of `f'(q_i B) dq_i/dl` is, for an expert that has not the largest logit,
/// `sum (f_i(q_i) - f_i(0)) dq_i/dl` by Heun's third-order rule, exactly for cubic `f`: the gradient of the choice. So the way back is that of
/// the weights without `B` ([`super::gating::gate_backward_by`]).
///
/// # Errors
/// Lengths that do not fit `experts`, `top_k` other than 1 and 2 or above `experts`.
pub fn sparse_mixer(logits: &[f32], experts: usize, rule: &MixerRule) -> Result<Mixed, ReferenceError> {
    require("experts", experts > 0, || "at least 1".into(), experts)?;
    require("logits", logits.len().is_multiple_of(experts), || format!("rows of {experts}"), logits.len())?;
    let most = experts.min(2);
    require("top_k", (1..=most).contains(&rule.top_k), || format!("1 to {most}"), rule.top_k)?;
    let mut result = Mixed { ids: Vec::new(), weights: Vec::new() };
    for (t, row) in logits.chunks(experts).enumerate() {
        let wide: Vec<f64> = row.iter().map(|&l| l.into()).collect();
        let mut out = None;
        for choice in 0..rule.top_k {
            let word = |stream: usize, e: usize| rule.noise.gate_word(stream as u32, t as u32, e as u32);
            let near = near_largest(&wide, out, rule.jitter);
            let left: Vec<usize> = (0..experts).filter(|&e| near[e]).collect();
            let q = softmax(&left.iter().map(|&e| wide[e]).collect::<Vec<_>>());
            let perturbed: Vec<f64> = left.iter().map(|&e| (row[e] + gumbel(word(2 * choice, e))).into()).collect();
            let drawn = top(&perturbed, 1)[0];
            let id = left[drawn];
            let largest = (0..experts).filter(|&e| Some(e) != out).map(|e| row[e]).fold(f32::NEG_INFINITY, f32::max);
            let is_first = (0..experts).find(|&e| Some(e) != out && row[e] == largest) == Some(id);
            let whole = is_first || uniform(word(4 + choice, 0)) > 0.75;
            let weight = if q[drawn].is_nan() { 0.0 } else { q[drawn] };
            result.ids.push(id as i32);
            result.weights.push(if whole { weight } else { weight / 3.0 });
            out = Some(id);
        }
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::gating::gate_backward;
    use crate::rules::{Gating, NoiseSource, Score};

    /// A cubic of what an expert is weighed with, and its slope.
    fn cubic(expert: usize, w: f64) -> (f64, f64) {
        let [a, b, c] = [[1.0, -2.0, 4.0], [-3.0, 5.0, 2.0], [2.0, 1.0, -6.0], [0.5, 3.0, 1.0]][expert];
        (a * w + b * w * w + c * w * w * w, a + 2.0 * b * w + 3.0 * c * w * w)
    }

    #[test]
    fn the_mean_gradient_is_that_of_the_choice() {
        let (experts, tokens) = (4, 60_000);
        let row = [0.75f32, 0.5, -0.25, 0.125];
        let rule = MixerRule::new(1, 2.0, NoiseSource::new(7, 3));
        let logits = row.repeat(tokens);
        let got = sparse_mixer(&logits, experts, &rule).unwrap();
        let slopes: Vec<f64> = got.ids.iter().zip(&got.weights).map(|(&id, &w)| cubic(id as usize, w).1).collect();
        let gating = Gating::new(Score::SparseMixer).jitter(rule.jitter);
        let d = gate_backward(&logits, &got.ids, &slopes, experts, 1, &gating, None).unwrap();
        let q = softmax(&row.map(f64::from));
        let slope = |i: usize, e: usize| q[i] * (f64::from(u8::from(i == e)) - q[e]);
        for e in 0..experts {
            // The expert with the largest logit is weighed whole.
            let whole = q[0] * cubic(0, q[0]).1 * slope(0, e);
            let want: f64 = whole + (1..experts).map(|i| cubic(i, q[i]).0 * slope(i, e)).sum::<f64>();
            let values: Vec<f64> = d.chunks(experts).map(|row| row[e]).collect();
            let n = tokens as f64;
            let mean = values.iter().sum::<f64>() / n;
            let deviation = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n / n).sqrt();
            assert!((mean - want).abs() < 5.0 * deviation, "{e}: {mean}, want {want} +- {deviation}");
            assert!(deviation < 0.05 * want.abs().max(0.02), "{e}: {deviation} tells nothing of {want}");
        }
    }

    #[test]
    fn far_experts_are_out_and_garbage_is_zero() {
        let rule = MixerRule::new(2, 0.05, NoiseSource::new(1, 0));
        // 0.9 and more of 2 is near, then of 1.
        let got = sparse_mixer(&[2.0, 1.0, -3.0, 0.95].repeat(50), 4, &rule).unwrap();
        assert!(got.ids.chunks(2).all(|ids| ids[0] == 0 && [1, 3].contains(&ids[1])));
        assert!(got.ids.chunks(2).any(|ids| ids[1] == 1) && got.ids.chunks(2).any(|ids| ids[1] == 3));
        assert!(got.weights.chunks(2).all(|weights| weights[0] == 1.0));
        let got = sparse_mixer(&[f32::NAN; 3], 3, &rule).unwrap();
        assert_eq!((got.ids, got.weights), (vec![0, 1], vec![0.0, 0.0]));
    }
}
