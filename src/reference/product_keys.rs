//! Product keys: Lample et al. 2019, "Large Memory Layers with Product Keys", section 3.2; as a router of experts He 2024, "Mixture of A Million
//! Experts" (PEER), section 2.

mod backward;

use super::gating::{Gated, descending, softmax, top};
use super::{Real, ReferenceError, require};
use crate::rules::KeySplit;

pub use backward::product_keys_backward;

/// The `top_k` experts `a * keys + b` with the largest `first[a] + second[b]` of each row, and the softmax over their sums.
///
/// `scores` are `[T, 2 keys]`; [`KeySplit`] says which are a row's first and second list. Larger sums come first; of equal ones the one whose
/// first key stands before in its list, then whose second does, where a list goes from the largest score down, equal ones by number, NaN last.
/// A sum that is NaN stands with -Inf. NaN and infinite scores reach weights as the softmax has it.
///
/// Sums are rounded to `L`.
///
/// # Errors
/// Lengths that do not fit, `top_k` of 0 or beyond `keys^2`.
pub fn product_keys<L: Real>(
    scores: &[L],
    keys: usize,
    top_k: usize,
    split: KeySplit,
) -> Result<Gated, ReferenceError> {
    require("keys", keys > 0, || "at least 1".into(), keys)?;
    require("scores", scores.len().is_multiple_of(2 * keys), || format!("rows of {}", 2 * keys), scores.len())?;
    require("top_k", (1..=keys * keys).contains(&top_k), || format!("1 to {}", keys * keys), top_k)?;
    let tokens = scores.len() / (2 * keys);
    let mut gated = Gated { ids: Vec::new(), weights: Vec::new() };
    for token in 0..tokens {
        let [first, second] = split.places(token, tokens, keys).map(|at| {
            let list: Vec<f64> = scores[at..at + keys].iter().map(|&score| score.into()).collect();
            list
        });
        let (by_first, by_second) = (top(&first, keys), top(&second, keys));
        let pairs = by_first.iter().flat_map(|&a| by_second.iter().map(move |&b| (a, b)));
        let mut pairs: Vec<(usize, f64)> = pairs.map(|(a, b)| (a * keys + b, L::round(first[a] + second[b]))).collect();
        let place = |sum: f64| if sum.is_nan() { f64::NEG_INFINITY } else { sum };
        // A stable sort keeps the order of the lists among equal sums.
        pairs.sort_by(|a, b| descending(place(a.1), place(b.1)));
        pairs.truncate(top_k);
        gated.ids.extend(pairs.iter().map(|&(id, _)| id as i32));
        gated.weights.extend(softmax(&pairs.iter().map(|&(_, sum)| sum).collect::<Vec<_>>()));
    }
    Ok(gated)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_pairs() {
        // Sums: 3, 1 | 5, 3 for keys (0, 0), (0, 1) | (1, 0), (1, 1).
        let gated = product_keys(&[1.0, 3.0, 2.0, 0.0], 2, 3, KeySplit::Row).unwrap();
        assert_eq!(gated.ids, [2, 3, 0]);
        let weight = 1.0 / (1.0 + 2.0 * (-2f64).exp());
        assert!((gated.weights[0] - weight).abs() < 1e-15 && gated.weights[1] == gated.weights[2]);
    }

    #[test]
    fn split_across_the_batch() {
        // Two rows of (a, b | c, d) and (e, f | g, h): token 0 has (a, b) and (e, f), token 1 (c, d) and (g, h).
        let scores = [0.0, 1.0, 5.0, 2.0, 0.0, 7.0, 3.0, 1.0];
        assert_eq!(product_keys(&scores, 2, 1, KeySplit::Batch).unwrap().ids, [3, 0]);
        assert_eq!(product_keys(&scores, 2, 1, KeySplit::Row).unwrap().ids, [2, 2]);
    }

    #[test]
    fn ties_and_what_is_no_number() {
        let (nan, inf) = (f64::NAN, f64::INFINITY);
        assert_eq!(product_keys(&[1.0, 1.0, 0.0, 0.0], 2, 4, KeySplit::Row).unwrap().ids, [0, 1, 2, 3]);
        // inf - inf stands with -inf: by the lists' order.
        let gated = product_keys(&[-inf, inf, -inf, 0.0], 2, 4, KeySplit::Row).unwrap();
        assert_eq!(gated.ids, [3, 2, 1, 0]);
        let gated = product_keys(&[nan, nan, nan, nan], 2, 2, KeySplit::Row).unwrap();
        assert_eq!(gated.ids, [0, 1]);
        assert!(gated.weights.iter().all(|weight| weight.is_nan()));
    }
}
