//! Quantile balancing.

use moe_kernels::rules::{ChoiceBy, Score};

use super::{Form, logits};
use crate::calls;
use crate::close::assert_choice;
use crate::data::{rng, wide32};
use crate::formulas::order;
use crate::suite::{Section, product};
use crate::support::inputs::normals;

/// One step of the dual update: each expert's quantile of what its scores are above the first score that fails; choices by logits less that, weighted
/// by sigmoids.
pub fn quantile_balancing() -> Section {
    let mut section = Section::new("quantile_balancing");
    for (tokens, experts, top_k) in [(64, 8, 2), (40, 8, 1), (12, 4, 1)] {
        section.point(format!("n={tokens} e={experts} topk={top_k}"), move || {
            let scores: Vec<f32> = normals(&mut rng("quantile"), tokens * experts, 1.0);
            check_quantile(&scores, &vec![0.0; experts], top_k);
        });
    }
    let shape = (256, 512, 10);
    for quantile in [true, false] {
        section.point(format!("router quantile={quantile}"), move || {
            let (tokens, experts, top_k) = shape;
            let rng = &mut rng("compact router");
            let mut logits: Vec<f32> = normals(rng, tokens * experts, 1.0);
            // Weights of nearly nothing keep their experts.
            logits[..experts].fill(-100.0);
            let bias: Vec<f32> = normals(rng, experts, 0.3);
            let rule = Form::Sigmoid.rule().scale(2.5);
            let rule = if quantile { rule.choice(ChoiceBy::Logit) } else { rule };
            let chosen = calls::gate(&logits, experts, top_k, rule, Some(&bias));
            let (wide, bias64) = (wide32(&logits), wide32(&bias));
            let row = |t: usize| &wide[t * experts..][..experts];
            let value = |t: usize| -> Vec<f64> {
                let of = if quantile { row(t).to_vec() } else { Form::Sigmoid.values(row(t)) };
                of.iter().zip(&bias64).map(|(v, b)| v + b).collect()
            };
            let weight = |t: usize, ids: &[usize]| -> Vec<f64> {
                Form::Sigmoid.weights(row(t), ids).iter().map(|w| 2.5 * w).collect()
            };
            assert_choice(&chosen, top_k, value, weight);
            if quantile {
                check_quantile(&logits, &bias, top_k);
            }
        });
    }
    // A forward pass alone, of softmax and sigmoid, before the choice and after: k different experts a token.
    for (sigmoids, before) in product(&[false, true], &[true, false]) {
        section.point(format!("forward sigmoid={sigmoids} pre={before}"), move || {
            let (tokens, experts, top_k) = (64, 8, 2);
            let logits = logits(&mut rng("quantile forward"), tokens, experts);
            let rule = Form::of(sigmoids, before).rule();
            let rule = if rule.score == Score::TopkSoftmax { rule } else { rule.choice(ChoiceBy::Logit) };
            let chosen = calls::gate(&logits, experts, top_k, rule, None);
            let (map, _) = calls::ids_to_map(&chosen.ids, &chosen.weights, experts, top_k);
            assert!(map.chunks(experts).all(|row| row.iter().map(|&one| usize::from(one)).sum::<usize>() == top_k));
        });
    }
    section.refuse(5, "quantiles estimated from histograms: here they are exact");
    section
}

fn check_quantile(scores: &[f32], bias: &[f32], top_k: usize) {
    let experts = bias.len();
    let tokens = scores.len() / experts;
    let rule = Form::Sigmoid.rule().choice(ChoiceBy::Logit);
    let chosen = calls::gate(scores, experts, top_k + 1, rule, Some(bias));
    let got = calls::quantile_bias(scores, &chosen.ids, bias, top_k);
    let (scores, bias) = (wide32(scores), wide32(bias));
    let rows: Vec<&[f64]> = scores.chunks(experts).collect();
    // What just fails of each token's scores, which the choice saw with the bias.
    let alpha: Vec<f64> = rows
        .iter()
        .map(|row| {
            let values: Vec<f64> = row.iter().zip(&bias).map(|(s, b)| s + b).collect();
            values[order(&values)[top_k]]
        })
        .collect();
    for (e, &got) in got.iter().enumerate() {
        let mut above: Vec<f64> = rows.iter().zip(&alpha).map(|(row, alpha)| row[e] - alpha).collect();
        above.sort_by(|a, b| b.total_cmp(a));
        let want = -above[tokens * top_k / experts];
        // A sum and a difference in f32, each off by half a unit of its terms' last place, in either of two rows.
        let size = rows.iter().zip(&alpha).map(|(row, alpha)| row[e].abs() + alpha.abs()).fold(0.0, f64::max);
        let bound = 2.0 * f64::from(f32::EPSILON) * size;
        assert!((f64::from(got) - want).abs() <= bound, "expert {e}: {got}, want {want}, bound {bound:e}");
    }
}
