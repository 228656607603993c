//! The fused router's choices, scores and losses.

use moe_kernels::rules::{BalanceRule, Gating, GroupScore, Groups, LossScore, Renormalise, Score};

use crate::calls;
use crate::close::assert_choice;
use crate::data::{rng, wide32};
use crate::formulas::{group_limited, order, sigmoid, softmax};
use crate::suite::{Section, product, scaled};

/// The suite's logits: rising by 1e-2 within a token and by 1e-4 from token to token (sigmoid), or by 1e-4 through all.
pub fn pattern(tokens: usize, experts: usize, sigmoids: bool) -> Vec<f32> {
    let value = |t: usize, e: usize| {
        if sigmoids {
            (e as f32 - (experts / 2) as f32) * 1e-2 + (t as f32 - (tokens / 2) as f32) * 1e-4
        } else {
            ((t * experts + e) as f32 - (tokens * experts / 2) as f32) * 1e-4
        }
    };
    (0..tokens).flat_map(|t| (0..experts).map(move |e| value(t, e)).collect::<Vec<_>>()).collect()
}

/// Gates and map `[T, E]` of a choice, as the suite has them.
fn check_maps(chosen: &calls::Chosen, experts: usize, top_k: usize) {
    let (map, gates) = calls::ids_to_map(&chosen.ids, &chosen.weights, experts, top_k);
    let rows = chosen.ids.chunks(top_k).zip(chosen.weights.chunks(top_k));
    for ((ids, weights), (map, gates)) in rows.zip(map.chunks(experts).zip(gates.chunks(experts))) {
        for e in 0..experts {
            let place = ids.iter().position(|&id| id as usize == e);
            assert_eq!(map[e] != 0, place.is_some());
            assert_eq!(gates[e], place.map_or(0.0, |j| weights[j]));
        }
    }
}

/// 4 of 8 groups, ranked by the sum of their `topk / 4` best.
pub fn groups(grouped: bool, top_k: usize) -> Option<Groups> {
    grouped.then(|| Groups::new(8, 4).score(GroupScore::TopSum(top_k / 4)))
}

fn limited(values: Vec<f64>, grouped: bool, top_k: usize) -> Vec<f64> {
    if grouped { group_limited(&values, 8, 4, top_k / 4, f64::NEG_INFINITY) } else { values }
}

pub fn topk_sigmoid() -> Section {
    let mut section = Section::new("topk_sigmoid");
    for (tokens, experts) in product(&[2048, 7168, 8992], &[128, 32]) {
        for (top_k, grouped) in product(&[4, 8], &[false, true]) {
            for (scale, biased) in product(&[None, Some(1.2f32)], &[true, false]) {
                let name =
                    format!("n={tokens} e={experts} topk={top_k} groups={grouped} scale={scale:?} bias={biased}");
                section.point(name, move || {
                    let tokens = scaled(tokens, 96) + tokens / 1024;
                    let logits = pattern(tokens, experts, true);
                    let bias = biased.then(|| (0..experts).rev().map(|e| e as f32 * 0.1).collect::<Vec<_>>());
                    let rule = Gating::new(Score::Sigmoid)
                        .renormalise(Some(Renormalise::Plus(1e-20)))
                        .scale(scale.unwrap_or(1.0))
                        .groups(groups(grouped, top_k));
                    let chosen = calls::gate(&logits, experts, top_k, rule, bias.as_deref());
                    let logits = wide32(&logits);
                    let bias = bias.map_or(vec![0.0; experts], |bias| wide32(&bias));
                    let share = |t: usize, e: usize| sigmoid(logits[t * experts + e]);
                    let value = |t| limited((0..experts).map(|e| share(t, e) + bias[e]).collect(), grouped, top_k);
                    let factor = f64::from(scale.unwrap_or(1.0));
                    assert_choice(&chosen, top_k, value, |t, ids| {
                        let sum: f64 = ids.iter().map(|&e| share(t, e)).sum();
                        ids.iter().map(|&e| factor * share(t, e) / (sum + 1e-20)).collect()
                    });
                    check_maps(&chosen, experts, top_k);
                });
            }
        }
    }
    section
}

pub fn topk_softmax() -> Section {
    let mut section = Section::new("topk_softmax");
    for (tokens, experts) in product(&[2048, 7168, 14234], &[128, 32]) {
        for (top_k, grouped) in product(&[4, 8], &[false, true]) {
            for (scale, before) in product(&[None, Some(1.2f32)], &[true, false]) {
                let name = format!("n={tokens} e={experts} topk={top_k} groups={grouped} scale={scale:?} pre={before}");
                section.point(name, move || {
                    let tokens = scaled(tokens, 96) + tokens / 1024;
                    let logits = pattern(tokens, experts, false);
                    let score = if before { Score::Softmax } else { Score::TopkSoftmax };
                    let factor = scale.unwrap_or(1.0);
                    let rule = Gating::new(score).scale(factor).groups(groups(grouped, top_k));
                    let chosen = calls::gate(&logits, experts, top_k, rule, None);
                    let logits = wide32(&logits);
                    let row = |t: usize| logits[t * experts..][..experts].to_vec();
                    let value = |t| limited(if before { softmax(&row(t)) } else { row(t) }, grouped, top_k);
                    assert_choice(&chosen, top_k, value, |t, ids| {
                        let of: Vec<f64> = if before {
                            ids.iter().map(|&e| softmax(&row(t))[e]).collect()
                        } else {
                            softmax(&ids.iter().map(|&e| row(t)[e]).collect::<Vec<_>>())
                        };
                        of.iter().map(|p| f64::from(factor) * p).collect()
                    });
                    check_maps(&chosen, experts, top_k);
                });
            }
        }
    }
    section
}

/// The scores that the auxiliary loss adds up, and the experts that it counts: those of the largest plain scores.
pub fn scores_for_aux_loss() -> Section {
    let mut section = Section::new("scores_for_aux_loss");
    for (tokens, experts) in product(&[2048, 7168, 14234], &[256, 128, 32]) {
        for (top_k, sigmoids) in product(&[4, 8], &[false, true]) {
            let name = format!("n={tokens} e={experts} topk={top_k} sigmoid={sigmoids}");
            section.point(name, move || {
                let tokens = scaled(tokens, 96) + tokens / 1024;
                let logits = pattern(tokens, experts, sigmoids);
                let (score, loss) =
                    if sigmoids { (Score::Sigmoid, LossScore::Sigmoid) } else { (Score::Softmax, LossScore::Softmax) };
                let rule = BalanceRule::new(loss, tokens);
                let got = calls::measure(&logits, experts, top_k, Gating::new(score), rule, None);
                let logits = wide32(&logits);
                let mut counts = vec![0; experts];
                for t in 0..tokens {
                    let row = &logits[t * experts..][..experts];
                    let of: Vec<f64> = if sigmoids {
                        let all: Vec<f64> = row.iter().map(|&l| sigmoid(l)).collect();
                        let sum: f64 = all.iter().sum::<f64>() + 1e-20;
                        all.iter().map(|s| s / sum).collect()
                    } else {
                        softmax(row)
                    };
                    for (e, want) in of.iter().enumerate() {
                        let p = f64::from(got.probabilities[t * experts + e]);
                        assert!((p - want).abs() <= 2e-5 * want, "token {t}, expert {e}: {p}, want {want}");
                    }
                    order(row)[..top_k].iter().for_each(|&e| counts[e] += 1);
                }
                assert_eq!(got.loss_counts, counts, "experts that the loss counts");
            });
        }
    }
    section
}

/// `E c / (k T^2) sum_e n_e sum_t p[t,e]` of counts and probabilities that somebody else has.
pub fn aux_loss() -> Section {
    let mut section = Section::new("aux_loss");
    let (top_k, coefficient) = (4, 0.01);
    for (tokens, experts) in product(&[2048usize, 7168, 14234], &[256, 128, 32]) {
        let name = format!("n={tokens} e={experts} topk={top_k}");
        let point = name.clone();
        section.point(name, move || {
            let rng = &mut rng(&point);
            let counts: Vec<i32> = (0..experts).map(|_| rng.i32(1..1000)).collect();
            let probs = pattern(tokens, experts, true);
            let sums: Vec<f64> =
                (0..experts).map(|e| (0..tokens).map(|t| f64::from(probs[t * experts + e])).sum()).collect();
            let sums: Vec<f32> = sums.iter().map(|&sum| sum as f32).collect();
            let (t, k) = (tokens as f64, top_k as f64);
            let want: f64 = counts.iter().zip(&sums).map(|(&n, &p)| f64::from(n) * f64::from(p)).sum::<f64>()
                * experts as f64
                * coefficient
                / (k * t * t);
            // Ours counts slots by token, the suite by slot.
            let got = f64::from(calls::balance_loss(&counts, &sums, tokens)) * coefficient / k;
            let size: f64 = counts.iter().zip(&sums).map(|(&n, &p)| f64::from(n) * f64::from(p).abs()).sum::<f64>()
                * experts as f64
                * coefficient
                / (k * t * t);
            assert!((got - want).abs() <= 1e-5 * size, "{got}, want {want}");
        });
    }
    section
}
