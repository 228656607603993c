//! An admission's way back.

use super::choices;
use crate::reference::{ReferenceError, require_shape};
use crate::rules::{AdmissionRule, Renormalise};

/// Gradients `[T,K]` of the weights that [`super::admit`] admits by `rule`, from those `[T,n]` of the weights that it gives, in f64.
///
/// Who gets what is constant: in *Switch Transformers* and *GShard* it is a mask, made of cumulative sums of one-hot choices.
///
/// # Errors
/// Those of [`super::admit`], and gradients of another length.
pub fn admit_backward(
    ids: &[i32],
    weights: &[f32],
    priority: Option<&[f32]>,
    rule: &AdmissionRule,
    d_admitted: &[f64],
) -> Result<Vec<f64>, ReferenceError> {
    let choices = choices(ids, weights, priority, rule)?;
    require_shape("d_admitted", d_admitted, &[choices.len()])?;
    let mut d_weights = vec![0.0; weights.len()];
    for (choices, d) in choices.chunks(rule.top_k).zip(d_admitted.chunks(rule.top_k)) {
        let got: Vec<(usize, f64)> = choices.iter().zip(d).filter_map(|(&slot, &d)| Some((slot?, d))).collect();
        let weight = |slot: usize| f64::from(weights[slot]);
        let sum: f64 = got.iter().map(|&(slot, _)| weight(slot)).sum();
        // The divisor and its slope by each weight.
        let (divisor, slope) = match rule.renormalise {
            None => (1.0, 0.0),
            Some(Renormalise::AtLeast(epsilon)) if sum <= f64::from(epsilon) => (f64::from(epsilon), 0.0),
            Some(Renormalise::Plus(epsilon)) => (sum + f64::from(epsilon), 1.0),
            Some(_) => (sum, 1.0),
        };
        if divisor == 0.0 {
            continue;
        }
        let along: f64 = got.iter().map(|&(slot, d)| d * weight(slot)).sum();
        for (slot, d) in got {
            d_weights[slot] = d / divisor - slope * along / (divisor * divisor);
        }
    }
    Ok(d_weights)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::admission::admit;
    use crate::rules::Order;

    const IDS: [i32; 9] = [0, 1, 2, 0, 2, 1, 0, 1, -1];
    const WEIGHTS: [f32; 9] = [0.5, 0.25, 0.125, 0.75, 0.125, 0.0625, 0.375, 0.5, 0.25];

    /// Against differences of the forward pass.
    #[test]
    fn slopes() {
        let d = [0.3, -0.7, 1.1, 0.2, -0.4, 0.9];
        let rule = AdmissionRule::new(3, 2, 2, 3).candidates(3);
        for order in [Order::ByToken, Order::ByChoice] {
            for renormalise in
                [None, Some(Renormalise::Plus(0.0)), Some(Renormalise::Plus(0.5)), Some(Renormalise::AtLeast(0.7))]
            {
                let rule = rule.order(order).renormalise(renormalise);
                let got = admit_backward(&IDS, &WEIGHTS, None, &rule, &d).unwrap();
                let value = |weights: &[f32]| -> f64 {
                    let admitted = admit(&IDS, weights, None, &rule).unwrap().weights;
                    admitted.iter().zip(d).map(|(&w, d)| f64::from(w) * d).sum()
                };
                for at in 0..WEIGHTS.len() {
                    let moved = |step: f32| {
                        let mut weights = WEIGHTS;
                        weights[at] += step;
                        value(&weights)
                    };
                    let step = 1.0 / 256.0;
                    let slope = (moved(step) - moved(-step)) / f64::from(2.0 * step);
                    assert!((got[at] - slope).abs() < 2e-3, "{rule:?} {at}: {} or {slope}", got[at]);
                }
            }
        }
    }

    #[test]
    fn a_token_without_weight_has_no_gradient() {
        let rule = AdmissionRule::new(3, 2, 2, 3).renormalise(Some(Renormalise::Plus(0.0)));
        let got = admit_backward(&[0, 1], &[0.0, 0.0], None, &rule, &[1.0, 2.0]).unwrap();
        assert_eq!(got, [0.0, 0.0]);
    }
}
