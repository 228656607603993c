//! From logits to scores.

use crate::reference::activation::sigmoid;
use crate::rules::Score;

/// The score of each expert; the logits themselves where a score follows the choice.
pub(super) fn scores(score: Score, logits: &[f64]) -> Vec<f64> {
    match score {
        Score::Softmax => softmax(logits),
        Score::Sigmoid => logits.iter().map(|&logit| sigmoid(logit)).collect(),
        Score::SqrtSoftplus => logits.iter().map(|&logit| sqrt_softplus(logit)).collect(),
        Score::TopkSoftmax | Score::SparseMixer => logits.to_vec(),
    }
}

/// `exp(v - max) / sum exp(v - max)`.
pub fn softmax(values: &[f64]) -> Vec<f64> {
    let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exponentials: Vec<f64> = values.iter().map(|&value| (value - max).exp()).collect();
    let sum: f64 = exponentials.iter().sum();
    exponentials.into_iter().map(|exponential| exponential / sum).collect()
}

/// `sqrt(ln(1 + exp(value)))`, where `exp(value)` would overflow as `sqrt(value + ln(1 + exp(-value)))`.
pub fn sqrt_softplus(value: f64) -> f64 {
    if value > 0.0 { (value + (-value).exp().ln_1p()).sqrt() } else { value.exp().ln_1p().sqrt() }
}

/// `-ln(1 + exp(-value))`.
pub(super) fn ln_sigmoid(value: f64) -> f64 {
    if value > 0.0 { -(-value).exp().ln_1p() } else { value - value.exp().ln_1p() }
}

/// SparseMixer's softmax: over the experts near `m`, the largest of the logits that are not out, the probability of expert `of`.
///
/// An expert is masked if `(m - l) / max(|l|, m) > 2 jitter`, computed in f32 as the model does.
pub(super) fn mixed(logits: &[f64], out: Option<usize>, of: usize, jitter: f32) -> f64 {
    mixture(logits, out, jitter)[of]
}

/// SparseMixer's softmax, of every expert.
pub(super) fn mixture(logits: &[f64], out: Option<usize>, jitter: f32) -> Vec<f64> {
    let near = near_largest(logits, out, jitter);
    softmax(&near.iter().zip(logits).map(|(&near, &l)| if near { l } else { f64::NEG_INFINITY }).collect::<Vec<_>>())
}

/// Whether SparseMixer leaves an expert: it is not out, and near the largest of those.
pub(in crate::reference) fn near_largest(logits: &[f64], out: Option<usize>, jitter: f32) -> Vec<bool> {
    let left = |e: usize| if Some(e) == out { f64::NEG_INFINITY } else { logits[e] };
    let largest = (0..logits.len()).map(left).fold(f64::NEG_INFINITY, f64::max);
    let masked = |e: usize| {
        let (logit, largest) = (logits[e] as f32, largest as f32);
        // NaN stays NaN, which f32::max would drop: no comparison with it masks.
        let factor = if logit.is_nan() { logit } else { logit.abs().max(largest) };
        (largest - logit) / factor > 2.0 * jitter
    };
    (0..logits.len()).map(|e| Some(e) != out && !masked(e)).collect()
}
