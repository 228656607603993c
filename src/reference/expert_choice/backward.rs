//! The gradient of logits by which experts chose tokens.

use super::Chosen;
use crate::reference::activation::sigmoid;
use crate::reference::gating::softmax;
use crate::reference::{Real, ReferenceError, require, require_shape};
use crate::rules::Affinity;

/// `[T,E]`: the gradient of `sum d_slot_weight slot_weight` by `logits [T,E]`, where slots are those of `chosen`, `[E,c]`. The choice is constant.
/// Slots without a token have none; a row with NaN or +Inf, or nothing above -Inf, has no gradient.
///
/// # Errors
/// Lengths that do not fit, a token beyond the logits.
pub fn affinities_backward<L: Real, S>(
    logits: &[L],
    experts: usize,
    affinity: Affinity,
    chosen: &Chosen<S>,
    d_slot_weight: &[f64],
) -> Result<Vec<f64>, ReferenceError> {
    require("experts", experts > 0, || "at least 1".into(), experts)?;
    let tokens = logits.len() / experts;
    require_shape("logits", logits, &[tokens, experts])?;
    require_shape("d_slot_weight", d_slot_weight, &[chosen.slot_token.len()])?;
    let capacity = chosen.slot_token.len() / experts;
    // The gradient of every affinity.
    let mut d = vec![0.0; logits.len()];
    for (slot, &token) in chosen.slot_token.iter().enumerate() {
        if let Ok(token) = usize::try_from(token) {
            require("slot_token", token < tokens, || format!("below {tokens}"), token)?;
            d[token * experts + slot / capacity] += d_slot_weight[slot];
        }
    }
    for (row, d) in logits.chunks(experts).zip(d.chunks_mut(experts)) {
        let row: Vec<f64> = row.iter().map(|&l| l.into()).collect();
        if !row.iter().all(|&l| l < f64::INFINITY) || row.iter().all(|&l| l == f64::NEG_INFINITY) {
            d.fill(0.0);
            continue;
        }
        match affinity {
            Affinity::Softmax => {
                let p = softmax(&row);
                let mean: f64 = p.iter().zip(&*d).map(|(p, d)| p * d).sum();
                d.iter_mut().zip(&p).for_each(|(d, p)| *d = p * (*d - mean));
            }
            Affinity::Sigmoid => d.iter_mut().zip(&row).for_each(|(d, &l)| *d *= sigmoid(l) * sigmoid(-l)),
            Affinity::Logit => {}
        }
    }
    Ok(d)
}

#[cfg(test)]
mod tests {
    use super::super::{affinities, choose};
    use super::*;

    #[test]
    fn by_finite_differences() {
        let mut rng = fastrand::Rng::with_seed(9);
        let (tokens, experts, capacity) = (7, 4, 3);
        let logits: Vec<f64> = (0..tokens * experts).map(|_| 4.0 * rng.f64() - 2.0).collect();
        let d: Vec<f64> = (0..experts * capacity).map(|_| rng.f64() - 0.5).collect();
        for affinity in [Affinity::Softmax, Affinity::Sigmoid, Affinity::Logit] {
            let chosen = choose(&affinities(&logits, experts, affinity).unwrap(), experts, capacity).unwrap();
            let value = |logits: &[f64]| -> f64 {
                let values = affinities(logits, experts, affinity).unwrap();
                let slots = chosen.slot_token.iter().enumerate();
                slots.map(|(slot, &t)| d[slot] * values[slot / capacity * tokens + t as usize]).sum()
            };
            let got = affinities_backward(&logits, experts, affinity, &chosen, &d).unwrap();
            for (i, &got) in got.iter().enumerate() {
                let moved = |by: f64| {
                    let mut moved = logits.clone();
                    moved[i] += by;
                    value(&moved)
                };
                let want = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                assert!((got - want).abs() < 1e-9, "{affinity:?} {i}: {got}, want {want}");
            }
        }
    }

    #[test]
    fn places_without_a_token_and_garbage_have_none() {
        let chosen = Chosen { slot_token: vec![0, -1, 1, -1], slot_weight: vec![0.0; 4] };
        let logits = [0.0, 1.0, f64::NAN, 0.0];
        let got = affinities_backward(&logits, 2, Affinity::Logit, &chosen, &[1.0, 9.0, 1.0, 9.0]).unwrap();
        assert_eq!(got, [1.0, 0.0, 0.0, 0.0]);
    }
}
