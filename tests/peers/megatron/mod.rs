//! Megatron-LM, `tests/unit_tests/transformer/moe`: what one device computes.
//!
//! Scaled down: tokens above 96; the router's product of 4096 x 7168 x 256 to 96 x 448 x 16. What spreads over ranks, and the plumbing of
//! configurations, is not this library's.

mod quantile;
mod rows;

use half::bf16;
use moe_kernels::Dtype;
use moe_kernels::rules::{BalanceRule, Gating, GroupScore, Groups, LossScore, Renormalise, Score};

use crate::calls;
use crate::close::{assert_choice, assert_norm};
use crate::data::{rng, values, wide, wide32, with_type};
use crate::formulas::{bincount, group_limited, linear, order, sigmoid, softmax};
use crate::gradients::routers;
use crate::suite::{Peer, Section, product};
use crate::support::inputs::normals;

pub fn peer() -> Peer {
    let suite = "`tests/unit_tests/transformer/moe`: routers, aux_loss, multihot_indices_converter, token dropping, quantile_balancing, qb_routing, gradients";
    let sections = vec![
        rows::multihot(),
        routers(),
        group_limited_routers(),
        bias_update(),
        rows::token_dropping(),
        quantile::quantile_balancing(),
        aux_losses(),
        router_product(),
        routers::megatron_product(),
        routers::megatron_weights(),
        routers::megatron_losses(),
    ];
    Peer { name: "Megatron-LM", suite, sections }
}

/// A router's logits for `tokens` tokens of 12 elements, its weight of bf16, summed in f32.
pub fn logits(rng: &mut fastrand::Rng, tokens: usize, experts: usize) -> Vec<f32> {
    let x: Vec<bf16> = values(rng, tokens * 12);
    let weight: Vec<bf16> = normals(rng, experts * 12, 0.5);
    let weight = wide(&weight);
    wide(&x).chunks(12).flat_map(|row| linear(row, &weight)).map(|l| l as f32).collect()
}

/// How scores are formed: softmax before or after the choice, or sigmoid over the sum of the chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    Before,
    After,
    Sigmoid,
}

impl Form {
    pub fn of(sigmoids: bool, before: bool) -> Form {
        match (sigmoids, before) {
            (true, _) => Form::Sigmoid,
            (false, true) => Form::Before,
            (false, false) => Form::After,
        }
    }

    pub fn rule(self) -> Gating {
        match self {
            Form::Before => Gating::new(Score::Softmax),
            Form::After => Gating::new(Score::TopkSoftmax),
            Form::Sigmoid => Gating::new(Score::Sigmoid).renormalise(Some(Renormalise::Plus(1e-20))),
        }
    }

    pub fn values(self, row: &[f64]) -> Vec<f64> {
        match self {
            Form::Before => softmax(row),
            Form::After => row.to_vec(),
            Form::Sigmoid => row.iter().map(|&l| sigmoid(l)).collect(),
        }
    }

    pub fn weights(self, row: &[f64], ids: &[usize]) -> Vec<f64> {
        let of: Vec<f64> = ids.iter().map(|&e| self.values(row)[e]).collect();
        match self {
            Form::Before => of,
            Form::After => softmax(&of),
            Form::Sigmoid => of.iter().map(|s| s / (of.iter().sum::<f64>() + 1e-20)).collect(),
        }
    }
}

fn routers() -> Section {
    let mut section = Section::new("routers");
    for (sigmoids, before) in product(&[true, false], &[true, false]) {
        section.point(format!("sigmoid={sigmoids} pre={before}"), move || {
            let (tokens, experts, top_k) = (64, 4, 2);
            let logits = logits(&mut rng("routers"), tokens, experts);
            let form = Form::of(sigmoids, before);
            let chosen = calls::gate(&logits, experts, top_k, form.rule(), None);
            let logits = wide32(&logits);
            let row = |t: usize| &logits[t * experts..][..experts];
            assert_choice(&chosen, top_k, |t| form.values(row(t)), |t, ids| form.weights(row(t), ids));
        });
    }
    // The last quarter of each sequence is padding: no experts, no weights, no counts; the others are as without.
    section.point("padding mask", || {
        let (length, sequences, experts, top_k) = (32, 2, 4, 2);
        let logits = logits(&mut rng("padding"), length * sequences, experts);
        let padding: Vec<u8> = (0..length * sequences).map(|t| u8::from(t % length >= length * 3 / 4)).collect();
        let rule = Form::After.rule();
        let masked = calls::gate_as(Dtype::F32, &logits, experts, top_k, rule, None, Some(&padding));
        let all = calls::gate(&logits, experts, top_k, rule, None);
        for (t, &padding) in padding.iter().enumerate() {
            let of = t * top_k..(t + 1) * top_k;
            if padding == 1 {
                assert_eq!((&masked.ids[of.clone()], &masked.weights[of]), (&[-1; 2][..], &[0.0; 2][..]), "token {t}");
            } else {
                assert_eq!(masked.ids[of.clone()], all.ids[of.clone()], "token {t}");
                assert_eq!(masked.weights[of.clone()], all.weights[of], "token {t}");
            }
        }
        let (map, probs) = calls::ids_to_map(&masked.ids, &masked.weights, experts, top_k);
        for (t, &padding) in padding.iter().enumerate() {
            let chosen: u8 = map[t * experts..][..experts].iter().sum();
            assert_eq!(chosen, if padding == 1 { 0 } else { 2 });
            assert!(padding == 0 || probs[t * experts..][..experts].iter().all(|&p| p == 0.0));
        }
    });
    // Choices that are drawn to balance whatever the logits say: here that every token wants the same two experts.
    section.point("forced balance", || {
        let (tokens, experts, top_k) = (64, 4, 2);
        let logits: Vec<f32> = (0..tokens).flat_map(|_| [9.0, 8.0, -9.0, -9.0]).collect();
        let chosen = calls::draw(&logits, experts, top_k, 0.0, 7);
        assert!(chosen.ids.chunks(top_k).all(|ids| ids[0] != ids[1]));
        let counts = bincount(&chosen.ids, experts);
        assert_eq!(counts.iter().sum::<i32>() as usize, tokens * top_k);
        // Even would be 32 each, with a deviation of 4.
        assert!(counts.iter().all(|&count| (count - 32).abs() <= 16), "{counts:?}");
    });
    section
}

fn group_limited_routers() -> Section {
    let mut section = Section::new("group_limited_routers");
    for ((kept, groups), (sigmoids, before)) in product(&[(3, 8), (2, 4)], &product(&[true, false], &[true, false])) {
        section.point(format!("groups={kept} of {groups} sigmoid={sigmoids} pre={before}"), move || {
            let (tokens, experts, top_k) = (96, 16, 4);
            let terms = top_k / kept;
            let scale = if before { 16.0 } else { 1.0 };
            let logits = logits(&mut rng("group_limited"), tokens, experts);
            let form = Form::of(sigmoids, before);
            let of = Groups::new(groups, kept).score(GroupScore::TopSum(terms));
            let chosen = calls::gate(&logits, experts, top_k, form.rule().scale(scale).groups(Some(of)), None);
            let logits = wide32(&logits);
            let row = |t: usize| &logits[t * experts..][..experts];
            let value = |t: usize| group_limited(&form.values(row(t)), groups, kept, terms, f64::NEG_INFINITY);
            let weight = |t: usize, ids: &[usize]| -> Vec<f64> {
                form.weights(row(t), ids).iter().map(|w| f64::from(scale) * w).collect()
            };
            assert_choice(&chosen, top_k, value, weight);
            for ids in chosen.ids.chunks(top_k) {
                let mut of: Vec<usize> = ids.iter().map(|&id| id as usize / (experts / groups)).collect();
                of.sort_unstable();
                of.dedup();
                assert!(of.len() <= kept, "groups {of:?}");
            }
        });
    }
    section
}

/// The expert bias that balances without a loss, and choices under a bias.
fn bias_update() -> Section {
    let mut section = Section::new("bias_update");
    section.point("update", || {
        let (tokens, experts, top_k, rate) = (64, 8, 2, 0.1f32);
        let logits = logits(&mut rng("bias_update"), tokens, experts);
        let chosen = calls::gate(&logits, experts, top_k, Form::Sigmoid.rule(), Some(&[0.0; 8]));
        let counts = bincount(&chosen.ids, experts);
        let mean = (tokens * top_k) as f32 / experts as f32;
        let sign = |count: i32| (mean - count as f32).partial_cmp(&0.0).map_or(0, |order| order as i32) as f32;
        let want: Vec<f32> = counts.iter().map(|&count| rate * sign(count)).collect();
        assert!(want.iter().any(|&step| step != 0.0));
        assert_eq!(calls::update_bias(&counts, &[0.0; 8], rate), want);
    });
    for sigmoids in [true, false] {
        section.point(format!("choice sigmoid={sigmoids}"), move || {
            let (tokens, experts, top_k) = (64, 8, 2);
            let rng = &mut rng("bias_choice");
            let logits = logits(rng, tokens, experts);
            let bias: Vec<f32> = normals(rng, experts, 1.0);
            // Softmax after the choice has no scores that a bias could move: the suite falls back to none.
            let form = Form::of(sigmoids, false);
            let chosen = calls::gate(&logits, experts, top_k, form.rule(), sigmoids.then_some(&bias[..]));
            let (logits, bias) = (wide32(&logits), wide32(&bias));
            let row = |t: usize| &logits[t * experts..][..experts];
            let value = |t: usize| -> Vec<f64> {
                let of = form.values(row(t));
                if sigmoids { of.iter().zip(&bias).map(|(s, b)| s + b).collect() } else { of }
            };
            assert_choice(&chosen, top_k, value, |t, ids| form.weights(row(t), ids));
        });
    }
    section
}

/// Balancing losses: of the whole batch, of each sequence, and both of one sequence the same.
fn aux_losses() -> Section {
    let mut section = Section::new("aux_losses");
    for (sequences, what) in [(1, "one sequence"), (2, "two sequences")] {
        for sigmoids in [false, true] {
            section.point(format!("{what} sigmoid={sigmoids}"), move || {
                let (length, experts, top_k) = (32, 32, 8);
                let tokens = length * sequences;
                let logits = logits(&mut rng(what), tokens, experts);
                let form = Form::of(sigmoids, false);
                let score = if sigmoids { LossScore::Sigmoid } else { LossScore::Softmax };
                let rule = BalanceRule::new(score, length);
                let got = calls::measure(&logits, experts, top_k, form.rule(), rule, None);
                let logits = wide32(&logits);
                let of = |tokens: std::ops::Range<usize>| -> f64 {
                    let n = tokens.len() as f64;
                    let (mut sums, mut counts) = (vec![0.0; experts], vec![0.0; experts]);
                    for t in tokens {
                        let row = &logits[t * experts..][..experts];
                        let scores = if sigmoids { Form::Sigmoid.values(row) } else { softmax(row) };
                        let total: f64 = scores.iter().sum();
                        sums.iter_mut().zip(&scores).for_each(|(sum, s)| *sum += s / total);
                        order(row)[..top_k].iter().for_each(|&e| counts[e] += 1.0);
                    }
                    let sum: f64 = sums.iter().zip(&counts).map(|(p, c)| p * c).sum();
                    sum * experts as f64 / (top_k as f64 * n * n)
                };
                let whole = of(0..tokens);
                let each: f64 =
                    (0..sequences).map(|s| of(s * length..(s + 1) * length)).sum::<f64>() / sequences as f64;
                let close =
                    |got: f32, want: f64| assert!((f64::from(got) - want).abs() <= 1e-5 * want, "{got}, want {want}");
                // Ours counts slots by token, the suite by slot.
                close(got.stats.balance_loss / top_k as f32, whole);
                close(got.stats.sequence_loss, each);
                let z: f64 = (0..tokens)
                    .map(|t| logits[t * experts..][..experts].iter().map(|l| l.exp()).sum::<f64>().ln().powi(2))
                    .sum::<f64>()
                    / tokens as f64;
                close(got.stats.z_loss, z);
            });
        }
    }
    section
}

/// The router's product, with and without a bias, whatever the type of its input.
fn router_product() -> Section {
    let mut section = Section::new("router_product");
    let (tokens, experts, hidden) = (96, 16, 448);
    for (dtype, biased) in product(&[Dtype::Bf16, Dtype::F32], &[false, true]) {
        section.point(format!("{dtype} bias={biased}"), move || {
            with_type!(dtype, T => {
                let rng = &mut rng("router_product");
                let (x, weight): (Vec<T>, Vec<T>) = (values(rng, tokens * hidden), values(rng, experts * hidden));
                let bias = biased.then(|| normals::<f32>(rng, experts, 1.0));
                let got = calls::router(&x, &weight, bias.as_deref(), hidden);
                let (weight, bias) = (wide(&weight), bias.map_or(vec![0.0; experts], |bias| wide32(&bias)));
                let want: Vec<f64> = wide(&x)
                    .chunks(hidden)
                    .flat_map(|row| linear(row, &weight).iter().zip(&bias).map(|(l, b)| l + b).collect::<Vec<_>>())
                    .collect();
                assert_norm(&wide32(&got), &want, 2e-6);
            })
        });
    }
    section.refuse(2, "products in f64");
    section
}
