//! The way back from the weights of pairs of keys to the keys' scores.

use crate::reference::{ReferenceError, require, require_shape};
use crate::rules::KeySplit;

/// `[T, 2 keys]`: the gradients of the scores of `sum d_weights weights`, where [`super::product_keys`] has chosen `ids` with `weights`, each `[T,k]`;
/// the choice is constant. A pair's sum has `weight (d - sum weight d)`, of which both of its keys' scores get all.
///
/// # Errors
/// Lengths that do not fit, an id beyond `keys^2`.
pub fn product_keys_backward(
    ids: &[i32],
    weights: &[f64],
    d_weights: &[f64],
    keys: usize,
    top_k: usize,
    split: KeySplit,
) -> Result<Vec<f64>, ReferenceError> {
    require("keys", keys > 0, || "at least 1".into(), keys)?;
    require("top_k", top_k > 0 && ids.len().is_multiple_of(top_k), || format!("rows of {top_k}"), ids.len())?;
    require_shape("weights", weights, &[ids.len()])?;
    require_shape("d_weights", d_weights, &[ids.len()])?;
    let odd = ids.iter().find(|&&id| usize::try_from(id).map_or(true, |id| id >= keys * keys));
    require("ids", odd.is_none(), || format!("0 to {}", keys * keys - 1), odd.unwrap_or(&0))?;

    let tokens = ids.len() / top_k;
    let mut d_scores = vec![0.0; tokens * 2 * keys];
    for token in 0..tokens {
        let [first, second] = split.places(token, tokens, keys);
        let slots = token * top_k..(token + 1) * top_k;
        let mean: f64 = weights[slots.clone()].iter().zip(&d_weights[slots.clone()]).map(|(w, d)| w * d).sum();
        for slot in slots {
            let d_sum = weights[slot] * (d_weights[slot] - mean);
            let id = ids[slot] as usize;
            d_scores[first + id / keys] += d_sum;
            d_scores[second + id % keys] += d_sum;
        }
    }
    Ok(d_scores)
}

#[cfg(test)]
mod tests {
    use super::super::product_keys;
    use super::*;

    #[test]
    fn by_finite_differences() {
        let mut rng = fastrand::Rng::with_seed(6);
        let (tokens, keys, top_k) = (4, 3, 4);
        let scores: Vec<f64> = (0..tokens * 2 * keys).map(|_| 4.0 * rng.f64() - 2.0).collect();
        let d: Vec<f64> = (0..tokens * top_k).map(|_| rng.f64() - 0.5).collect();
        for split in [KeySplit::Row, KeySplit::Batch] {
            let gated = product_keys(&scores, keys, top_k, split).unwrap();
            let got = product_keys_backward(&gated.ids, &gated.weights, &d, keys, top_k, split).unwrap();
            for (i, got) in got.iter().enumerate() {
                let moved = |by: f64| {
                    let mut moved = scores.clone();
                    moved[i] += by;
                    let moved = product_keys(&moved, keys, top_k, split).unwrap();
                    assert_eq!(moved.ids, gated.ids);
                    moved.weights.iter().zip(&d).map(|(w, d)| w * d).sum::<f64>()
                };
                let want = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                assert!((got - want).abs() < 1e-9, "{split:?} {i}: {got}, want {want}");
            }
        }
        assert_eq!(product_keys_backward(&[9], &[1.0], &[1.0], 3, 1, KeySplit::Row).unwrap_err().argument, "ids");
    }
}
