//! Choices of experts.

use moe_kernels::Dtype;
use moe_kernels::rules::{Gating, Groups, Renormalise, Score};

use crate::calls;
use crate::close::assert_choice;
use crate::data::{rng, scores, wide32};
use crate::formulas::{group_limited, sigmoid, softmax};
use crate::suite::{Section, product};
use crate::support::inputs::normals;

/// Softmax or sigmoid, with and without a correction bias and renormalisation. The hidden size of the suite's tokens has no part in it.
pub fn fused_topk() -> Section {
    let mut section = Section::new("fused_topk");
    for (tokens, hidden) in product(&[1usize, 33, 56], &[1024, 2048]) {
        for (experts, top_k) in product(&[6, 16], &[3, 4]) {
            for (renormalise, sigmoids) in product(&[true, false], &[false, true]) {
                for (dtype, biased) in product(&Dtype::ALL, &[false, true]) {
                    let name = format!(
                        "n={tokens} hidden={hidden} e={experts} topk={top_k} renorm={renormalise} sigmoid={sigmoids} {dtype} bias={biased}"
                    );
                    let point = name.clone();
                    section.point(name, move || {
                        let rng = &mut rng(&point);
                        let logits = scores(rng, tokens * experts, dtype);
                        let bias = biased.then(|| normals::<f32>(rng, experts, 1.0));
                        let rule = Gating::new(if sigmoids { Score::Sigmoid } else { Score::Softmax });
                        let rule = if renormalise { rule.renormalised() } else { rule };
                        let chosen = calls::gate_as(dtype, &logits, experts, top_k, rule, bias.as_deref(), None);
                        let logits = wide32(&logits);
                        let bias = bias.map_or(vec![0.0; experts], |bias| wide32(&bias));
                        let share = |t: usize| shares(&logits[t * experts..][..experts], sigmoids);
                        let value = |t: usize| share(t).iter().zip(&bias).map(|(s, b)| s + b).collect();
                        assert_choice(&chosen, top_k, value, |t, ids| {
                            let of: Vec<f64> = ids.iter().map(|&e| share(t)[e]).collect();
                            let sum: f64 = if renormalise { of.iter().sum() } else { 1.0 };
                            of.iter().map(|s| s / sum).collect()
                        });
                    });
                }
            }
        }
    }
    for (experts, top_k) in product(&[6, 8, 16], &[3, 4]) {
        for (sigmoids, value) in product(&[false, true], &[f32::NAN, f32::INFINITY]) {
            for (dtype, biased) in product(&Dtype::ALL, &[false, true]) {
                let name = format!("e={experts} topk={top_k} sigmoid={sigmoids} all {value} {dtype} bias={biased}");
                let point = name.clone();
                section.point(name, move || garbage_point(&point, [experts, top_k], sigmoids, value, dtype, biased));
            }
        }
    }
    section
}

fn shares(logits: &[f64], sigmoids: bool) -> Vec<f64> {
    if sigmoids { logits.iter().map(|&l| sigmoid(l)).collect() } else { softmax(logits) }
}

/// A row of nothing but NaN or Inf among others has different experts that there are, and no weight that is NaN; the others are as ever.
fn garbage_point(name: &str, [experts, top_k]: [usize; 2], sigmoids: bool, value: f32, dtype: Dtype, biased: bool) {
    let rng = &mut rng(name);
    let tokens = 3;
    let mut logits = scores(rng, tokens * experts, dtype);
    logits[experts..2 * experts].fill(value);
    let bias = biased.then(|| normals::<f32>(rng, experts, 1.0));
    let rule = Gating::new(if sigmoids { Score::Sigmoid } else { Score::Softmax }).renormalised();
    let chosen = calls::gate_as(dtype, &logits, experts, top_k, rule, bias.as_deref(), None);
    for (t, ids) in chosen.ids.chunks(top_k).enumerate() {
        let fine = |(j, id): (usize, &i32)| (0..experts as i32).contains(id) && !ids[..j].contains(id);
        assert!(ids.iter().enumerate().all(fine), "token {t}: {ids:?}");
    }
    assert!(chosen.weights.iter().all(|w| w.is_finite()), "{:?}", chosen.weights);
    // The row before and the row behind, as if it were not there.
    let keep = |values: &[f32], width: usize| [&values[..width], &values[2 * width..]].concat();
    let without = calls::gate_as(dtype, &keep(&logits, experts), experts, top_k, rule, bias.as_deref(), None);
    assert_eq!([&chosen.ids[..top_k], &chosen.ids[2 * top_k..]].concat(), without.ids);
    assert_eq!(keep(&chosen.weights, top_k), without.weights);
}

/// 2 of 8 groups of two, ranked by their two largest biased scores.
pub fn grouped_topk() -> Section {
    let mut section = Section::new("grouped_topk");
    let (experts, top_k, groups, kept) = (16, 2, 8, 2);
    for (tokens, hidden) in product(&[1usize, 33, 64], &[1024, 2048]) {
        for (renormalise, sigmoids) in product(&[true, false], &[false, true]) {
            for (scale, dtype) in product(&[1.0f32, 2.5], &[Dtype::Bf16, Dtype::F32]) {
                let name =
                    format!("n={tokens} hidden={hidden} renorm={renormalise} sigmoid={sigmoids} scale={scale} {dtype}");
                let point = name.clone();
                section.point(name, move || {
                    let rng = &mut rng(&point);
                    let logits = scores(rng, tokens * experts, dtype);
                    let bias: Vec<f32> = normals(rng, experts, 1.0);
                    let rule = Gating::new(if sigmoids { Score::Sigmoid } else { Score::Softmax })
                        .renormalise(renormalise.then_some(Renormalise::Plus(0.0)))
                        .scale(scale)
                        .groups(Some(Groups::new(groups, kept)));
                    let chosen = calls::gate_as(dtype, &logits, experts, top_k, rule, Some(&bias), None);
                    let (logits, bias) = (wide32(&logits), wide32(&bias));
                    let share = |t: usize| shares(&logits[t * experts..][..experts], sigmoids);
                    let value = |t: usize| {
                        let biased: Vec<f64> = share(t).iter().zip(&bias).map(|(s, b)| s + b).collect();
                        group_limited(&biased, groups, kept, 2, f64::NEG_INFINITY)
                    };
                    assert_choice(&chosen, top_k, value, |t, ids| {
                        let of: Vec<f64> = ids.iter().map(|&e| share(t)[e]).collect();
                        let sum: f64 = if renormalise { of.iter().sum() } else { 1.0 };
                        of.iter().map(|s| f64::from(scale) * s / sum).collect()
                    });
                });
            }
        }
    }
    section
}
