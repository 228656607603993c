//! Against central finite differences of the forward formulas.

use super::super::{Inputs, gate_by};
use super::*;
use crate::reference::balance::{balance, cv_squared};
use crate::reference::router::finish;
use crate::rules::{Appended, AppendedWeight, BalanceRule, ChoiceBy};

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
        let measured =
            |logits: &[f64]| balance(logits, &ids, &none, experts, top_k, &BalanceRule::new(score, tokens)).unwrap();
        let counts: Vec<i32> = measured(&logits).totals.counts.iter().map(|&count| count as i32).collect();
        let losses = LossGradient::new(score).balance(0.7).z(0.3);
        let rule = Gating::new(Score::Sigmoid);
        let got = gate_backward(&logits, &ids, &none, experts, top_k, &rule, Some((&losses, &counts, tokens))).unwrap();
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

/// Everything at once, of every score: what an SGD step of the router's product and of both factors sees.
#[test]
fn every_rule_by_finite_differences() {
    let mut rng = fastrand::Rng::with_seed(3);
    let (tokens, experts) = (4, 6);
    let mut cases = 0;
    for score in Score::ALL {
        for renormalise in
            RULES.into_iter().chain([Some(Renormalise::PNorm(f32::INFINITY)), Some(Renormalise::PNorm(1.0))])
        {
            for appended in [
                None,
                Some(Appended::new(2, AppendedWeight::Fixed(0.5))),
                Some(Appended::new(2, AppendedWeight::Column)),
            ] {
                let columns = appended.is_some_and(|appended| appended.has_columns());
                if columns && matches!(score, Score::Softmax | Score::SparseMixer) {
                    continue;
                }
                let top_k = 2;
                let rule = Gating::new(score)
                    .renormalise(renormalise)
                    .scale(1.5)
                    .jitter(0.4)
                    .expert_scale(true)
                    .global_scale(true)
                    .appended(appended)
                    .choice(ChoiceBy::Given);
                let given: Vec<i32> = [5, 0, 3, 1, -1, 2, 4, 5].to_vec();
                let width = experts + rule.appended_columns();
                let raw: Vec<f64> = (0..tokens * width).map(|_| 2.0 * rng.f64() - 1.0).collect();
                let logit_rule = LogitRule::PLAIN.factor(1.25).softcap(Some(3.0));
                let expert_scale: Vec<f64> = (0..experts).map(|_| 0.5 + rng.f64()).collect();
                let choices = top_k + rule.appended_experts();
                let d: Vec<f64> = (0..tokens * choices).map(|_| rng.f64() - 0.5).collect();
                let gated = |raw: &[f64], scales: &[f64]| {
                    let (expert, global) = (&scales[..experts], scales[experts]);
                    let inputs = Inputs {
                        given: Some(&given),
                        expert_scale: Some(expert),
                        global_scale: Some(global),
                        ..Inputs::default()
                    };
                    gate_by(&finish(raw, logit_rule), experts, top_k, &rule, inputs).unwrap()
                };
                let importance = |weights: &[f64], ids: &[i32]| {
                    let mut sums = vec![0.0; experts];
                    for (&id, weight) in ids.iter().zip(weights) {
                        if (0..experts as i32).contains(&id) {
                            sums[id as usize] += weight;
                        }
                    }
                    sums
                };
                let scales: Vec<f64> = expert_scale.iter().copied().chain([1.75]).collect();
                let forward = gated(&raw, &scales);
                let sums = importance(&forward.weights, &forward.ids);
                let value = |raw: &[f64], scales: &[f64]| {
                    let got = gated(raw, scales);
                    let upstream: f64 = got.weights.iter().zip(&d).map(|(w, d)| w * d).sum();
                    upstream + 0.25 * cv_squared(&importance(&got.weights, &got.ids))
                };
                let losses = LossInputs {
                    rule: LossGradient::new(LossScore::Softmax).importance(0.25),
                    counts: &[],
                    counted: tokens,
                    importance: &sums,
                    sequence_counts: &[],
                    sequence_tokens: &[],
                };
                let inputs = BackwardInputs {
                    expert_scale: Some(&expert_scale),
                    global_scale: Some(1.75),
                    logit_rule,
                    losses: Some(losses),
                    ..BackwardInputs::default()
                };
                let logits = finish(&raw, logit_rule);
                let got = gate_backward_by(&logits, &forward.ids, &d, experts, top_k, &rule, inputs).unwrap();
                near(&format!("{rule:?}"), &got.logits, &differences(&raw, |raw| value(raw, &scales)));
                let of_scales = differences(&scales, |scales| value(&raw, scales));
                near(&format!("{rule:?}: expert_scale"), &got.expert_scale, &of_scales[..experts]);
                near(&format!("{rule:?}: global_scale"), &[got.global_scale], &of_scales[experts..]);
                cases += 1;
            }
        }
    }
    assert_eq!(cases, 8 * (2 * 2 + 3 * 3));
}

#[test]
fn the_loss_by_sequence_by_finite_differences() {
    let mut rng = fastrand::Rng::with_seed(4);
    let (tokens, experts, top_k) = (9, 5, 2);
    let logits: Vec<f64> = (0..tokens * experts).map(|_| 4.0 * rng.f64() - 2.0).collect();
    let ids: Vec<i32> = (0..tokens as i32).flat_map(|t| [t % 3, (t + 2) % 5]).collect();
    let none = vec![0.0; tokens * top_k];
    for score in [LossScore::Softmax, LossScore::Sigmoid, LossScore::PlainSigmoid] {
        for (each, sequences) in [(4, Sequences::Following), (3, Sequences::Alternating)] {
            let rule = BalanceRule::new(score, each).sequences(sequences);
            let value = |logits: &[f64]| balance(logits, &ids, &none, experts, top_k, &rule).unwrap().sequence_loss;
            let count = tokens.div_ceil(each);
            let (mut counts, mut lengths) = (vec![0; count * experts], vec![0; count]);
            for t in 0..tokens {
                let s = if sequences == Sequences::Following { t / each } else { t % count };
                lengths[s] += 1;
                ids[t * top_k..][..top_k].iter().for_each(|&id| counts[s * experts + id as usize] += 1);
            }
            let losses = LossInputs {
                rule: LossGradient::new(score).sequence(0.7).tokens_per_sequence(each).sequences(sequences),
                counts: &[],
                counted: tokens,
                importance: &[],
                sequence_counts: &counts,
                sequence_tokens: &lengths,
            };
            let inputs = BackwardInputs { losses: Some(losses), ..BackwardInputs::default() };
            let got = gate_backward_by(&logits, &ids, &none, experts, top_k, &Gating::new(Score::Softmax), inputs);
            let want = differences(&logits, |logits| 0.7 * value(logits));
            near(&format!("{score:?} {sequences:?}"), &got.unwrap().logits, &want);
        }
    }
}

/// BASE weighs by the sigmoid of the assigned score, Sinkhorn by the softmax, and neither plan is differentiated: the same operation goes back.
#[test]
fn routers_whose_plan_is_constant() {
    let mut rng = fastrand::Rng::with_seed(5);
    let (tokens, experts) = (6, 3);
    let logits: Vec<f64> = (0..tokens * experts).map(|_| 4.0 * rng.f64() - 2.0).collect();
    let ids: Vec<i32> = (0..tokens as i32).map(|t| t % 3).collect();
    let d: Vec<f64> = (0..tokens).map(|_| rng.f64() - 0.5).collect();
    let dot = |weights: &[f64]| weights.iter().zip(&d).map(|(w, d)| w * d).sum::<f64>();
    let way_back = |score| gate_backward(&logits, &ids, &d, experts, 1, &Gating::new(score), None).unwrap();
    let sinkhorn = |logits: &[f64]| dot(&crate::reference::sinkhorn::weights(logits, &ids, experts, 1).unwrap());
    near("Sinkhorn", &way_back(Score::Softmax), &differences(&logits, sinkhorn));
    let base = |logits: &[f64]| {
        let gate = |t: usize| sigmoid(logits[t * experts + ids[t] as usize]);
        dot(&(0..tokens).map(gate).collect::<Vec<_>>())
    };
    near("BASE", &way_back(Score::Sigmoid), &differences(&logits, base));
}

#[test]
fn what_is_no_number_has_no_gradient() {
    let (nan, inf) = (f64::NAN, f64::INFINITY);
    let rule = Gating::new(Score::Sigmoid);
    for row in [[0.5, nan, 0.0], [0.5, 0.0, inf], [-inf, -inf, -inf]] {
        let got = gate_backward(&row, &[0], &[1.0], 3, 1, &rule, None).unwrap();
        assert_eq!(got, [0.0; 3], "{row:?}");
    }
    assert!(gate_backward(&[0.5, -inf, 0.0], &[0], &[1.0], 3, 1, &rule, None).unwrap()[0] > 0.2);
}
