//! The gradient of logits, from those of weights and losses, by the chain rule over the formulas of the forward pass.

use super::scores::{softmax, sqrt_softplus};
use crate::reference::activation::sigmoid;
use crate::reference::sampled::log_sum_exp;
use crate::reference::{Real, ReferenceError, require, require_shape};
use crate::rules::{Gating, LossGradient, LossScore, Renormalise, Score};

/// `[T,E]`: the gradient of `logits [T,E]` of `sum d_weights weights + losses`, where `weights [T,k]` are those that [`super::gate`] gives to `ids`.
///
/// The choice is constant: correction bias and groups have no gradient. `counts [E]` are those of the balancing loss, constant too
/// (Fedus et al. 2021, section 2.2), and losses are means over `counted` tokens. Ids outside `0..E` are no choices. A token that has none is
/// padding, and one with +Inf or nothing above -Inf among its logits is garbage: their rows are 0.
///
/// # Errors
/// Lengths that do not fit.
pub fn gate_backward<L: Real>(
    logits: &[L],
    ids: &[i32],
    d_weights: &[f64],
    experts: usize,
    top_k: usize,
    rule: &Gating,
    losses: Option<(&LossGradient, &[i32], usize)>,
) -> Result<Vec<f64>, ReferenceError> {
    require("experts", experts > 0, || "at least 1".into(), experts)?;
    let tokens = logits.len() / experts;
    require("logits", logits.len() == tokens * experts, || format!("rows of {experts}"), logits.len())?;
    require_shape("ids", ids, &[tokens, top_k])?;
    require_shape("d_weights", d_weights, &[tokens, top_k])?;
    let mut gradient = Vec::with_capacity(logits.len());
    for t in 0..tokens {
        let row: Vec<f64> = logits[t * experts..][..experts].iter().map(|&l| l.into()).collect();
        let ids = &ids[t * top_k..][..top_k];
        let chosen: Vec<(usize, f64)> = ids
            .iter()
            .zip(&d_weights[t * top_k..])
            .filter_map(|(&id, &d)| Some((usize::try_from(id).ok().filter(|&id| id < experts)?, d)))
            .collect();
        let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if chosen.is_empty() || !largest.is_finite() {
            gradient.extend(std::iter::repeat_n(0.0, experts));
            continue;
        }
        let mut own = of_weights(&row, &chosen, rule);
        if let Some((losses, counts, counted)) = losses {
            let of_losses = of_losses(&row, losses, counts, counted);
            own.iter_mut().zip(of_losses).for_each(|(sum, d)| *sum += d);
        }
        gradient.extend(own);
    }
    Ok(gradient)
}

/// Of `sum_j d_j weight_j`.
fn of_weights(row: &[f64], chosen: &[(usize, f64)], rule: &Gating) -> Vec<f64> {
    let logits: Vec<f64> = chosen.iter().map(|&(e, _)| row[e]).collect();
    let all = softmax(row);
    let scores: Vec<f64> = match rule.score {
        Score::Softmax => chosen.iter().map(|&(e, _)| all[e]).collect(),
        Score::Sigmoid => logits.iter().map(|&l| sigmoid(l)).collect(),
        Score::SqrtSoftplus => logits.iter().map(|&l| sqrt_softplus(l)).collect(),
        Score::TopkSoftmax | Score::SparseMixer => softmax(&logits),
    };
    let upstream: Vec<f64> = chosen.iter().map(|&(_, d)| f64::from(rule.scale) * d).collect();
    let d_scores = d_scores(&scores, &upstream, rule.renormalise);
    let mut gradient = vec![0.0; row.len()];
    match rule.score {
        // dp_i/dl_e = p_i ([i = e] - p_e)
        Score::Softmax => {
            for (&(e, _), (p, d)) in chosen.iter().zip(scores.iter().zip(&d_scores)) {
                gradient[e] += p * d;
                gradient.iter_mut().zip(&all).for_each(|(sum, q)| *sum -= p * d * q);
            }
        }
        Score::TopkSoftmax | Score::SparseMixer => {
            let mean: f64 = scores.iter().zip(&d_scores).map(|(p, d)| p * d).sum();
            for (&(e, _), (p, d)) in chosen.iter().zip(scores.iter().zip(&d_scores)) {
                gradient[e] += p * (d - mean);
            }
        }
        Score::Sigmoid => {
            for (&(e, _), d) in chosen.iter().zip(&d_scores) {
                gradient[e] += d * sigmoid(row[e]) * sigmoid(-row[e]);
            }
        }
        // d sqrt(s) / dl = sigmoid(l) / (2 sqrt(s)), s the softplus
        Score::SqrtSoftplus => {
            for (&(e, _), (p, d)) in chosen.iter().zip(scores.iter().zip(&d_scores)) {
                gradient[e] += if *p == 0.0 { 0.0 } else { d * sigmoid(row[e]) / (2.0 * p) };
            }
        }
    }
    gradient
}

/// Of `sum_j d_j a_j / D(a)`, by a.
fn d_scores(a: &[f64], d: &[f64], renormalise: Option<Renormalise>) -> Vec<f64> {
    let sum: f64 = a.iter().sum();
    let dot: f64 = a.iter().zip(d).map(|(a, d)| a * d).sum();
    // (d D - dot D') / D^2, D' = dD/da
    let quotient = |divisor: f64, slope: &dyn Fn(f64) -> f64| -> Vec<f64> {
        a.iter().zip(d).map(|(&a, d)| (d * divisor - dot * slope(a)) / divisor / divisor).collect()
    };
    match renormalise {
        None => d.to_vec(),
        Some(Renormalise::Plus(epsilon)) => quotient(sum + f64::from(epsilon), &|_| 1.0),
        Some(Renormalise::AtLeast(epsilon)) if sum < f64::from(epsilon) => quotient(epsilon.into(), &|_| 0.0),
        Some(Renormalise::AtLeast(_)) => quotient(sum, &|_| 1.0),
        Some(Renormalise::PNorm(p)) => {
            let p = f64::from(p);
            let norm = a.iter().map(|a| a.powf(p)).sum::<f64>().powf(1.0 / p);
            // At 0 infinite for p < 1, but a score's slope there takes more away: a a^(p-1) is 0.
            quotient(norm, &|a| if a == 0.0 { 0.0 } else { (a / norm).powf(p - 1.0) })
        }
    }
}

/// Of `balance E sum_e counts[e]/T sum_t q[t,e]/T + z / T sum_t lse^2`.
fn of_losses(row: &[f64], losses: &LossGradient, counts: &[i32], counted: usize) -> Vec<f64> {
    let tokens = counted as f64;
    let factor = f64::from(losses.balance) * row.len() as f64 / (tokens * tokens);
    let h: Vec<f64> = counts.iter().map(|&count| factor * f64::from(count)).collect();
    let all = softmax(row);
    let mut gradient: Vec<f64> = if losses.balance == 0.0 {
        vec![0.0; row.len()]
    } else {
        match losses.score {
            LossScore::Softmax => {
                let mean: f64 = h.iter().zip(&all).map(|(h, q)| h * q).sum();
                all.iter().zip(&h).map(|(q, h)| q * (h - mean)).collect()
            }
            // q = s / sum s: dq_i/dl_e = s_e (1 - s_e) ([i = e] - q_i) / sum s
            LossScore::Sigmoid => {
                let sum: f64 = row.iter().map(|&l| sigmoid(l)).sum();
                let mean: f64 = h.iter().zip(row).map(|(h, &l)| h * sigmoid(l) / sum).sum();
                row.iter().zip(&h).map(|(&l, h)| sigmoid(l) * sigmoid(-l) * (h - mean) / sum).collect()
            }
            LossScore::PlainSigmoid => row.iter().zip(&h).map(|(&l, h)| sigmoid(l) * sigmoid(-l) * h).collect(),
        }
    };
    let z = 2.0 * f64::from(losses.z) / tokens * log_sum_exp(row.iter().copied());
    gradient.iter_mut().zip(&all).for_each(|(sum, p)| *sum += z * p);
    gradient
}

#[cfg(test)]
mod tests {
    use super::super::Inputs;
    use super::super::gate_by;
    use super::*;
    use crate::reference::balance::balance;
    use crate::rules::{BalanceRule, ChoiceBy};

    const RULES: [Option<Renormalise>; 6] = [
        None,
        Some(Renormalise::Plus(0.0)),
        Some(Renormalise::Plus(0.3)),
        Some(Renormalise::AtLeast(1e-3)),
        Some(Renormalise::AtLeast(5.0)),
        Some(Renormalise::PNorm(2.5)),
    ];

    /// The weights of ids that stay the same.
    fn weights(logits: &[f64], given: &[i32], experts: usize, top_k: usize, rule: &Gating) -> Vec<f64> {
        let rule = rule.choice(ChoiceBy::Given);
        gate_by(logits, experts, top_k, &rule, Inputs { given: Some(given), ..Inputs::default() }).unwrap().weights
    }

    fn differences(logits: &[f64], value: impl Fn(&[f64]) -> f64) -> Vec<f64> {
        let step = 1e-5;
        (0..logits.len())
            .map(|i| {
                let at = |by: f64| {
                    let mut moved = logits.to_vec();
                    moved[i] += by;
                    value(&moved)
                };
                (at(step) - at(-step)) / (2.0 * step)
            })
            .collect()
    }

    fn near(name: &str, got: &[f64], want: &[f64]) {
        let norm = want.iter().map(|v| v * v).sum::<f64>().sqrt();
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            assert!((got - want).abs() <= 1e-7 * norm + 1e-9, "{name}: {i} is {got}, want {want}");
        }
    }

    #[test]
    fn weights_by_finite_differences() {
        let mut rng = fastrand::Rng::with_seed(1);
        let (tokens, experts, top_k) = (3, 7, 3);
        for score in [Score::Softmax, Score::TopkSoftmax, Score::Sigmoid, Score::SqrtSoftplus] {
            for renormalise in RULES {
                let rule = Gating::new(score).renormalise(renormalise).scale(2.5);
                let logits: Vec<f64> = (0..tokens * experts).map(|_| 4.0 * rng.f64() - 2.0).collect();
                let mut ids: Vec<i32> = (0..tokens).flat_map(|_| [5, 0, 3]).collect();
                ids[4] = -1;
                let d: Vec<f64> = (0..tokens * top_k).map(|_| rng.f64() - 0.5).collect();
                let got = gate_backward(&logits, &ids, &d, experts, top_k, &rule, None).unwrap();
                let want = differences(&logits, |logits| {
                    weights(logits, &ids, experts, top_k, &rule).iter().zip(&d).map(|(w, d)| w * d).sum()
                });
                near(&format!("{rule:?}"), &got, &want);
            }
        }
    }

    #[test]
    fn losses_by_finite_differences() {
        let mut rng = fastrand::Rng::with_seed(2);
        let (tokens, experts, top_k) = (5, 6, 2);
        let logits: Vec<f64> = (0..tokens * experts).map(|_| 4.0 * rng.f64() - 2.0).collect();
        let ids: Vec<i32> = (0..tokens as i32).flat_map(|t| [t % 6, (t + 2) % 6]).collect();
        let none = vec![0.0; tokens * top_k];
        for score in [LossScore::Softmax, LossScore::Sigmoid, LossScore::PlainSigmoid] {
            let measured = |logits: &[f64]| {
                balance(logits, &ids, &none, experts, top_k, &BalanceRule::new(score, tokens)).unwrap()
            };
            let counts: Vec<i32> = measured(&logits).totals.counts.iter().map(|&count| count as i32).collect();
            let losses = LossGradient::new(score).balance(0.7).z(0.3);
            let rule = Gating::new(Score::Sigmoid);
            let got =
                gate_backward(&logits, &ids, &none, experts, top_k, &rule, Some((&losses, &counts, tokens))).unwrap();
            let want = differences(&logits, |logits| {
                let of = measured(logits);
                0.7 * of.totals.loss() + 0.3 * of.z_loss
            });
            near(&format!("{score:?}"), &got, &want);
        }
    }

    #[test]
    fn one_renormalised_choice_has_no_gradient() {
        let rule = Gating::new(Score::Softmax).renormalised();
        let got = gate_backward(&[0.3, -1.0, 2.0], &[1], &[3.0], 3, 1, &rule, None).unwrap();
        assert!(got.iter().all(|d| d.abs() < 1e-15), "{got:?}");
    }
}
