//! Routers' ways back: gradients of logits from those of weights and of losses, against differences of the peers' formulas, choices and counts constant.

use moe_kernels::Dtype;
use moe_kernels::rules::{Gating, LossGradient, LossScore, Renormalise, Score};

use super::formulas::differences;
use crate::calls::{self, Chosen, Losses};
use crate::close::assert_rounded;
use crate::data::{rng, scores, values, wide, wide32, with_type};
use crate::formulas::{order, sigmoid, softmax};
use crate::megatron::{Form, logits as megatron_logits};
use crate::suite::{Section, product, scaled};
use crate::support::compare::GATING_GRADIENT;
use crate::support::inputs::{normal, normals};
use crate::transformer_engine::router::{groups, pattern};

/// Every token's row within the bound of its own norm and of `scale`: of what cancels in it.
fn assert_rows(got: &[f32], experts: usize, row: impl Fn(usize) -> (Vec<f64>, f64)) {
    for (t, got) in got.chunks(experts).enumerate() {
        let (want, scale) = row(t);
        let most = GATING_GRADIENT * (want.iter().map(|w| w * w).sum::<f64>().sqrt() + scale) + 1e-30;
        for (e, (&got, want)) in got.iter().zip(want).enumerate() {
            let off = (f64::from(got) - want).abs();
            assert!(off <= most, "token {t}, expert {e}: {got:e}, want {want:e}, off by {off:e} > {most:e}");
        }
    }
}

/// `weights(row, ids)` is what the peer weighs the experts `ids` with.
pub fn check_weights(
    name: &str,
    logits: &[f32],
    [experts, top_k]: [usize; 2],
    chosen: &Chosen,
    rule: Gating,
    weights: impl Fn(&[f64], &[usize]) -> Vec<f64>,
) {
    let rng = &mut rng(name);
    let d: Vec<f32> = chosen.ids.iter().map(|_| normal(rng) as f32).collect();
    let got = calls::gate_backward(logits, [experts, top_k], (&chosen.ids, &d), rule, None);
    let (logits, d) = (wide32(logits), wide32(&d));
    assert_rows(&got, experts, |t| {
        let ids: Vec<usize> = chosen.ids[t * top_k..][..top_k].iter().map(|&id| id as usize).collect();
        let d = &d[t * top_k..][..top_k];
        let value = |row: &[f64]| weights(row, &ids).iter().zip(d).map(|(w, d)| w * d).sum();
        let scale = d.iter().map(|d| d * d).sum::<f64>().sqrt() * f64::from(rule.scale);
        (differences(&logits[t * experts..][..experts], value), scale)
    });
}

/// `loss(t, row)` is what token t adds to the loss; no weight has a gradient.
fn check_losses(
    logits: &[f32],
    [experts, top_k]: [usize; 2],
    losses: Losses<'_>,
    loss: impl Fn(usize, &[f64]) -> f64,
    scale: impl Fn(usize, &[f64]) -> f64,
) {
    let slots = logits.len() / experts * top_k;
    let ids: Vec<i32> = (0..slots).map(|slot| (slot % top_k) as i32).collect();
    let given = (&ids[..], &vec![0.0; slots][..]);
    let got = calls::gate_backward(logits, [experts, top_k], given, Gating::new(Score::Softmax), Some(losses));
    let logits = wide32(logits);
    assert_rows(&got, experts, |t| {
        let row = &logits[t * experts..][..experts];
        (differences(row, |row| loss(t, row)), scale(t, row))
    });
}

/// A loss's probabilities: softmax, or sigmoids by their sum.
fn shares(row: &[f64], sigmoids: bool) -> Vec<f64> {
    if !sigmoids {
        return softmax(row);
    }
    let all: Vec<f64> = row.iter().map(|&l| sigmoid(l)).collect();
    let sum: f64 = all.iter().sum::<f64>() + 1e-20;
    all.iter().map(|s| s / sum).collect()
}

fn loss_score(sigmoids: bool) -> LossScore {
    if sigmoids { LossScore::Sigmoid } else { LossScore::Softmax }
}

/// Slots of each expert, by the largest scores of some tokens.
fn largest(logits: &[f64], experts: usize, top_k: usize) -> Vec<i32> {
    let mut counts = vec![0; experts];
    logits.chunks(experts).for_each(|row| order(row)[..top_k].iter().for_each(|&e| counts[e] += 1));
    counts
}

/// `topk_sigmoid` or `topk_softmax` of the fused router, the grids of their forward halves.
pub fn te_weights(sigmoids: bool) -> Section {
    let mut section = Section::new(if sigmoids { "topk_sigmoid_backward" } else { "topk_softmax_backward" });
    for (tokens, experts) in product(&[2048, 7168, if sigmoids { 8992 } else { 14234 }], &[128, 32]) {
        for (top_k, grouped) in product(&[4, 8], &[false, true]) {
            // A bias, which the weights do not see, of sigmoids; of softmaxes whether they come before the choice.
            for (scale, other) in product(&[None, Some(1.2f32)], &[true, false]) {
                let name = format!("n={tokens} e={experts} topk={top_k} groups={grouped} scale={scale:?} {other}");
                let point = name.clone();
                section.point(name, move || {
                    let tokens = scaled(tokens, 24) + tokens / 1024;
                    let factor = scale.unwrap_or(1.0);
                    let score = match (sigmoids, other) {
                        (true, _) => Score::Sigmoid,
                        (false, true) => Score::Softmax,
                        (false, false) => Score::TopkSoftmax,
                    };
                    let rule = Gating::new(score)
                        .renormalise(sigmoids.then_some(Renormalise::Plus(1e-20)))
                        .scale(factor)
                        .groups(groups(grouped, top_k));
                    let logits = pattern(tokens, experts, sigmoids);
                    let bias: Vec<f32> = (0..experts).rev().map(|e| e as f32 * 0.1).collect();
                    let bias = (sigmoids && other).then_some(&bias[..]);
                    let chosen = calls::gate(&logits, experts, top_k, rule, bias);
                    check_weights(&point, &logits, [experts, top_k], &chosen, rule, |row, ids| {
                        let of: Vec<f64> = match score {
                            Score::Softmax => {
                                let all = softmax(row);
                                ids.iter().map(|&e| all[e]).collect()
                            }
                            Score::TopkSoftmax => softmax(&ids.iter().map(|&e| row[e]).collect::<Vec<_>>()),
                            _ => {
                                let of: Vec<f64> = ids.iter().map(|&e| sigmoid(row[e])).collect();
                                let sum: f64 = of.iter().sum::<f64>() + 1e-20;
                                of.iter().map(|s| s / sum).collect()
                            }
                        };
                        of.iter().map(|w| f64::from(factor) * w).collect()
                    });
                });
            }
        }
    }
    section
}

/// The auxiliary loss `E c / (k T^2) sum_e n_e sum_t p[t,e]` through its scores to the logits.
pub fn te_aux_loss() -> Section {
    let mut section = Section::new("aux_loss_backward");
    let (top_k, coefficient) = (4, 0.01);
    for (tokens, experts) in product(&[2048usize, 7168, 14234], &[256, 128, 32]) {
        for sigmoids in [false, true] {
            let name = format!("n={tokens} e={experts} topk={top_k} sigmoid={sigmoids}");
            let point = name.clone();
            section.point(name, move || {
                let tokens = scaled(tokens, 16) + tokens / 2048;
                let rng = &mut rng(&point);
                let counts: Vec<i32> = (0..experts).map(|_| rng.i32(1..1000)).collect();
                let factor = coefficient * experts as f64 / top_k as f64 / (tokens * tokens) as f64;
                // Ours counts slots by token, the suite by slot.
                let rule = LossGradient::new(loss_score(sigmoids)).balance((coefficient / top_k as f64) as f32);
                let terms = |row: &[f64]| -> f64 {
                    shares(row, sigmoids).iter().zip(&counts).map(|(p, &n)| factor * f64::from(n) * p).sum()
                };
                let losses = Losses { rule, counts: &counts, sequence_counts: &[], importance: &[] };
                let logits = pattern(tokens, experts, sigmoids);
                check_losses(&logits, [experts, top_k], losses, |_, row| terms(row), |_, row| terms(row));
            });
        }
    }
    section
}

/// `router_gating_linear`: gradients of its input, of its weight and of its bias, which the peer sums in f32 too.
pub fn megatron_product() -> Section {
    let mut section = Section::new("router_product_backward");
    let (tokens, experts, hidden) = (96, 16, 448);
    for (dtype, together) in product(&[Dtype::Bf16, Dtype::F32], &[false, true]) {
        let name = format!("{dtype} {}", if together { "in one launch" } else { "in two" });
        let point = name.clone();
        section.point(name, move || {
            with_type!(dtype, T => {
                let rng = &mut rng(&point);
                let (x, weight): (Vec<T>, Vec<T>) = (values(rng, tokens * hidden), values(rng, experts * hidden));
                let d = normals::<f32>(rng, tokens * experts, 1.0);
                let (dx, d_weight, d_bias) = calls::router_backward(&x, &weight, &d, hidden, together);
                let (x, weight, d) = (wide(&x), wide(&weight), wide32(&d));
                let sum = |terms: &dyn Fn(usize) -> f64, count: usize| -> f64 { (0..count).map(terms).sum() };
                let want_dx: Vec<f64> = (0..tokens * hidden)
                    .map(|i| sum(&|e| d[i / hidden * experts + e] * weight[e * hidden + i % hidden], experts))
                    .collect();
                let want_weight: Vec<f64> = (0..experts * hidden)
                    .map(|i| sum(&|t| d[t * experts + i / hidden] * x[t * hidden + i % hidden], tokens))
                    .collect();
                let want_bias: Vec<f64> = (0..experts).map(|e| sum(&|t| d[t * experts + e], tokens)).collect();
                assert_rounded(&wide(&dx), &want_dx, dtype);
                assert_rounded(&wide32(&d_weight), &want_weight, Dtype::F32);
                assert_rounded(&wide32(&d_bias), &want_bias, Dtype::F32);
            })
        });
    }
    section.refuse(1, "products in f64");
    section
}

/// Weights of the four forms of a score.
pub fn megatron_weights() -> Section {
    let mut section = Section::new("routers_backward");
    for (sigmoids, before) in product(&[true, false], &[true, false]) {
        let name = format!("sigmoid={sigmoids} pre={before}");
        let point = name.clone();
        section.point(name, move || {
            let (tokens, experts, top_k) = (64, 4, 2);
            let logits = megatron_logits(&mut rng(&point), tokens, experts);
            let form = Form::of(sigmoids, before);
            let chosen = calls::gate(&logits, experts, top_k, form.rule(), None);
            check_weights(&point, &logits, [experts, top_k], &chosen, form.rule(), |row, ids| form.weights(row, ids));
        });
    }
    // A single choice that is divided by itself moves with no logit, exactly.
    section.point("one choice over its sum", || {
        let logits = megatron_logits(&mut rng("one choice"), 64, 4);
        let rule = Form::Sigmoid.rule().renormalise(Some(Renormalise::Plus(0.0)));
        let chosen = calls::gate(&logits, 4, 1, rule, None);
        let got = calls::gate_backward(&logits, [4, 1], (&chosen.ids, &[3.0; 64]), rule, None);
        assert!(got.iter().all(|&d| d == 0.0), "{got:?}");
    });
    section
}

/// The loss of the batch, that of each sequence, the z-loss, and all of them together, each with its factor.
pub fn megatron_losses() -> Section {
    let mut section = Section::new("aux_losses_backward");
    for (sequences, sigmoids) in product(&[1usize, 2], &[false, true]) {
        for (balance, sequence, z) in [(0.01, 0.0, 0.0), (0.0, 0.01, 0.0), (0.0, 0.0, 1e-3), (0.01, 0.02, 1e-3)] {
            let name = format!("sequences={sequences} sigmoid={sigmoids} aux={balance} seq_aux={sequence} z={z}");
            let point = name.clone();
            section.point(name, move || {
                let (length, experts, top_k) = (32, 32, 8);
                let tokens = length * sequences;
                let logits = megatron_logits(&mut rng(&point), tokens, experts);
                let all = wide32(&logits);
                let counts = largest(&all, experts, top_k);
                let by_sequence: Vec<i32> =
                    all.chunks(length * experts).flat_map(|rows| largest(rows, experts, top_k)).collect();
                let rule = LossGradient::new(loss_score(sigmoids))
                    .balance((balance / top_k as f64) as f32)
                    .sequence(sequence as f32)
                    .z(z as f32)
                    .tokens_per_sequence(length);
                let of = |counts: &[i32], row: &[f64], n: usize| -> f64 {
                    let sum: f64 = shares(row, sigmoids).iter().zip(counts).map(|(p, &c)| p * f64::from(c)).sum();
                    sum * experts as f64 / top_k as f64 / (n * n) as f64
                };
                let parts = |t: usize, row: &[f64]| {
                    let own = &by_sequence[t / length * experts..][..experts];
                    let log_sum = row.iter().map(|l| l.exp()).sum::<f64>().ln();
                    [
                        balance * of(&counts, row, tokens),
                        sequence * of(own, row, length) / sequences as f64,
                        z * log_sum * log_sum / tokens as f64,
                    ]
                };
                let losses = Losses { rule, counts: &counts, sequence_counts: &by_sequence, importance: &[] };
                let loss = |t: usize, row: &[f64]| parts(t, row).iter().sum();
                check_losses(&logits, [experts, top_k], losses, loss, |t, row| parts(t, row).iter().sum());
            });
        }
    }
    section
}

/// Softmax weights with the balancing loss, with the z-loss of 1e-3 and without, in the shapes of `forward_backward`.
pub fn megablocks() -> Section {
    let mut section = Section::new("router_backward");
    let shapes = [[1, 1], [2, 1], [4, 1], [8, 1], [2, 2], [4, 2], [4, 4], [8, 2], [8, 4], [8, 8]];
    for (&[experts, top_k], z) in shapes.iter().flat_map(|shape| [(shape, 0.0), (shape, 1e-3)]) {
        let name = format!("ne={experts} topk={top_k} zloss={z}");
        let point = name.clone();
        section.point(name, move || {
            let tokens = 64;
            let logits = scores(&mut rng(&point), tokens * experts, moe_kernels::Dtype::F32);
            let rule = Gating::new(Score::Softmax);
            let chosen = calls::gate(&logits, experts, top_k, rule, None);
            check_weights(&point, &logits, [experts, top_k], &chosen, rule, |row, ids| {
                let all = softmax(row);
                ids.iter().map(|&e| all[e]).collect()
            });
            let counts = largest(&wide32(&logits), experts, top_k);
            let factor = 0.1;
            let losses = Losses {
                rule: LossGradient::new(LossScore::Softmax).balance(factor as f32).z(z as f32),
                counts: &counts,
                sequence_counts: &[],
                importance: &[],
            };
            let parts = |row: &[f64]| {
                let sum: f64 = softmax(row).iter().zip(&counts).map(|(p, &c)| p * f64::from(c)).sum();
                let log_sum = row.iter().map(|l| l.exp()).sum::<f64>().ln();
                let balance = f64::from(factor as f32) * sum * experts as f64 / (tokens * tokens) as f64;
                [balance, f64::from(z as f32) * log_sum * log_sum / tokens as f64]
            };
            let loss = |_: usize, row: &[f64]| parts(row).iter().sum();
            check_losses(&logits, [experts, top_k], losses, loss, |_, row| parts(row).iter().sum());
        });
    }
    section
}
