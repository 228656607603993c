//! S-BASE: routing by an entropy-regularised optimal transport.
//!
//! Clark et al. 2022, "Unified Scaling Laws for Routed Language Models" (arXiv:2202.01169), section 3.1 and appendix B.2.1:
//!
//! maximise `sum_te plan[t,e] l[t,e] + entropy(plan)` where every token's row sums to 1 and every expert's column to `T/E`.
//!
//! The plan is `exp(l[t,e] + u[t] + v[e])` (Sinkhorn; Cuturi 2013), and a token goes to the experts of its largest entries.
//!
//! That is for training; at evaluation the largest logits choose (gating with [`crate::rules::Score::Softmax`]). Megatron-LM weighs a single
//! choice by the sigmoid of its logit; the paper, and this, by the softmax.

use super::gating::{descending, softmax};
use super::{Real, ReferenceError, require, require_shape};

/// Potentials of the experts after some iterations.
#[derive(Clone, Debug, PartialEq)]
pub struct Balanced {
    /// `v [E]`.
    pub potentials: Vec<f64>,
    /// Iterations done.
    pub iterations: u32,
    /// Largest `|column sum / (T/E) - 1|` of the plan that the last iteration began with.
    pub error: f64,
}

/// Column sums of the plan whose rows are normalised, `softmax(l[t] + v)` for each token. A token whose logits contain NaN or
/// +Inf, or are all -Inf, has no plan and counts for nothing.
pub fn loads<L: Real>(logits: &[L], potentials: &[f64]) -> Vec<f64> {
    let mut loads = vec![0.0; potentials.len()];
    for row in logits.chunks(potentials.len()) {
        let shifted: Vec<f64> = row.iter().zip(potentials).map(|(&logit, v)| logit.into() + v).collect();
        let plan = softmax(&shifted);
        if plan.iter().all(|p| p.is_finite()) {
            loads.iter_mut().zip(plan).for_each(|(load, p)| *load += p);
        }
    }
    loads
}

/// Alternates the two conditions: rows are normalised by the softmax, and columns by
/// `v[e] += ln(T/E) - ln(sum_t plan[t,e])`, until every column of the plan is within `tolerance` of `T/E`, relatively, or
/// `iterations` are done. `T` counts the tokens that have a plan; a column sum below 1e-30 counts as that.
///
/// # Errors
/// Lengths that do not fit.
pub fn balance<L: Real>(
    logits: &[L],
    experts: usize,
    iterations: u32,
    tolerance: f64,
) -> Result<Balanced, ReferenceError> {
    require("experts", experts > 0, || "at least 1".into(), experts)?;
    require("logits", logits.len().is_multiple_of(experts), || format!("rows of {experts}"), logits.len())?;
    let mut balanced = Balanced { potentials: vec![0.0; experts], iterations: 0, error: 0.0 };
    while balanced.iterations < iterations {
        let loads = loads(logits, &balanced.potentials);
        let share = (loads.iter().sum::<f64>() / experts as f64).max(1e-30);
        balanced.iterations += 1;
        balanced.error = loads.iter().map(|load| (load / share - 1.0).abs()).fold(0.0, f64::max);
        for (v, load) in balanced.potentials.iter_mut().zip(&loads) {
            *v += (share / load.max(1e-30)).ln();
        }
        if balanced.error <= tolerance {
            break;
        }
    }
    Ok(balanced)
}

/// Ids `[T,k]` of the largest `l[t,e] + v[e]`, larger first, equal ones by expert, NaN last. The sum is rounded to `L`.
///
/// # Errors
/// Lengths that do not fit, `top_k` of 0 or beyond the experts.
pub fn choose<L: Real>(logits: &[L], potentials: &[L], top_k: usize) -> Result<Vec<i32>, ReferenceError> {
    let experts = potentials.len();
    require("potentials", experts > 0, || "at least 1 expert".into(), experts)?;
    require("logits", logits.len().is_multiple_of(experts), || format!("rows of {experts}"), logits.len())?;
    require("top_k", (1..=experts).contains(&top_k), || format!("1 to {experts}"), top_k)?;
    let mut ids = Vec::new();
    for row in logits.chunks(experts) {
        let value = |e: usize| L::round(row[e].into() + potentials[e].into());
        let mut order: Vec<usize> = (0..experts).collect();
        order.sort_by(|&a, &b| descending(value(a), value(b)));
        ids.extend(order[..top_k].iter().map(|&e| e as i32));
    }
    Ok(ids)
}

/// `weights[t,j] = softmax(l[t])[ids[t,j]]`: the router's own probability, as the plan only chooses.
///
/// # Errors
/// Lengths that do not fit.
pub fn weights<L: Real>(logits: &[L], ids: &[i32], experts: usize, top_k: usize) -> Result<Vec<f64>, ReferenceError> {
    require("top_k", top_k > 0, || "at least 1".into(), top_k)?;
    require_shape("logits", logits, &[ids.len() / top_k, experts])?;
    let mut weights = Vec::new();
    for (row, ids) in logits.chunks(experts).zip(ids.chunks(top_k)) {
        let row: Vec<f64> = row.iter().map(|&logit| logit.into()).collect();
        let p = softmax(&row);
        weights.extend(ids.iter().map(|&id| p[id as usize]));
    }
    Ok(weights)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_become_equal() {
        // Expert 0 is everybody's favourite.
        let logits: Vec<f32> = (0..40).map(|i| if i % 4 == 0 { 3.0 } else { (i * 7 % 11) as f32 * 0.3 }).collect();
        let got = balance(&logits, 4, 500, 1e-9).unwrap();
        assert!(got.error <= 1e-9 && got.iterations < 500);
        for load in loads(&logits, &got.potentials) {
            assert!((load - 2.5).abs() < 1e-8, "{load}");
        }
    }

    #[test]
    fn one_step_by_hand() {
        // Plan rows (3/4, 1/4): columns 3/2, 1/2 of 1 each.
        let l = 3f64.ln();
        let got = balance(&[l, 0.0, l, 0.0], 2, 1, 0.0).unwrap();
        assert!((got.error - 0.5).abs() < 1e-12);
        assert!((got.potentials[0] - (2f64 / 3.0).ln()).abs() < 1e-12);
        assert!((got.potentials[1] - 2f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn tokens_without_numbers_count_for_nothing() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        let got = balance(&[0.0, 1.0, nan, 0.0, inf, 0.0, -inf, -inf], 2, 50, 1e-12).unwrap();
        assert_eq!(got.potentials, balance(&[0.0f32, 1.0], 2, 50, 1e-12).unwrap().potentials);
        assert_eq!(choose(&[nan, -inf, 1.0, 1.0], &[0.0, 0.0], 2).unwrap(), [1, 0, 0, 1]);
    }

    #[test]
    fn potentials_decide_between_experts() {
        assert_eq!(choose(&[1.0f32, 0.0, 0.5], &[0.0, 2.0, 0.0], 2).unwrap(), [1, 0]);
    }
}
