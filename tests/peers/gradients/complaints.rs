//! What users of other libraries complain of in their trackers, as points: each is the case that went wrong there.

use half::{bf16, f16};
use moe_kernels::Dtype;
use moe_kernels::capacity::dispatch::DispatchDesc;
use moe_kernels::capacity::row_groups::RowLayout;
use moe_kernels::experts::k_grouped::{Gathered, KGroupedDesc};
use moe_kernels::experts::permute::Unfilled;
use moe_kernels::layer::{LayerDesc, Mlp};
use moe_kernels::rules::{
    BalanceRule, Gating, GroupScore, Groups, LossGradient, LossScore, Masked, Renormalise, Score,
};

use super::formulas::differences;
use super::{empty, products, routers};
use crate::calls::{self, Chosen, Experts, ExpertsGradients, Losses};
use crate::close::{assert_norm, assert_rounded};
use crate::data::{probabilities, random_ids, rng, scores, values, wide, wide32};
use crate::formulas::{bincount, softmax};
use crate::products::groups;
use crate::suite::{Peer, Section};
use crate::support::compare::layer;
use crate::support::inputs::normals;

pub fn peer() -> Peer {
    let suite = "issues of grouped_gemm, tokamax, PyTorch, TransformerEngine, torchtitan, transformers, Automodel, SGLang, Megatron-LM, vmoe, marin, vLLM";
    Peer { name: "trackers", suite, sections: vec![rows(), gates(), layers(), empty::batches()] }
}

/// Groups of rows.
fn rows() -> Section {
    let mut section = Section::new("rows");
    for (name, sizes) in [
        ("first", vec![0, 0, 5, 40]),
        ("last", vec![40, 5, 0, 0]),
        ("between", vec![3, 0, 0, 17, 0, 1]),
        ("all", vec![0, 0, 0]),
        ("all but one", vec![0, 64, 0]),
    ] {
        for transposed in [false, true] {
            // grouped_gemm #36, tokamax #887, PyTorch #172439.
            let name = format!("empty experts: {name}, transposed={transposed}");
            let (point, sizes) = (name.clone(), sizes.clone());
            section.point(name, move || products::check(&point, &sizes, 32, 24, transposed));
        }
    }
    // marin #8339: gradients of weights that wanted offsets on multiples of 64.
    section.point("offsets on no multiple of anything", || {
        products::check("offsets", &[1, 63, 65, 7, 127, 2, 31], 32, 40, false);
    });
    // TransformerEngine #3116, PyTorch #193633: what stands between experts' rows is no number, and is multiplied by nothing.
    section.point("NaN between experts' rows", || {
        let (tokens, experts, top_k, width) = (40, 6, 2, 32);
        let rng = &mut rng("NaN between");
        let ids = random_ids(rng, tokens, experts, top_k);
        let desc = DispatchDesc::new(tokens, experts, top_k, 16).row_multiple(16);
        let sorted = calls::sort(&ids, None, &desc);
        let x: Vec<bf16> = values(rng, tokens * width);
        let rows = sorted.permute(&x, width, Unfilled::Keep);
        let tokens_of = sorted.slot_token();
        assert!(tokens_of.contains(&-1), "no gaps");
        let poisoned: Vec<bf16> = rows
            .chunks(width)
            .zip(&tokens_of)
            .flat_map(|(row, &t)| if t < 0 { vec![bf16::NAN; width] } else { row.to_vec() })
            .collect();
        let back = sorted.unpermute(&poisoned, None, width);
        let want: Vec<f64> = wide(&x).iter().map(|v| v * top_k as f64).collect();
        assert_rounded(&wide(&back), &want, Dtype::Bf16);
        let (d_rows, d_weights) = sorted.unpermute_backward(&poisoned, &x, false, width);
        assert!(d_weights.iter().all(|d| d.is_nan()), "weights' gradients were not asked for");
        for (row, &t) in d_rows.chunks(width).zip(&tokens_of) {
            let want = usize::try_from(t).map_or(vec![bf16::ZERO; width], |t| x[t * width..][..width].to_vec());
            assert!(row == want);
        }
    });
    // The same of products along the rows: those past the last are not read.
    section.point("NaN behind the last row", || {
        let (rows, used, m, n) = (64, 37, 16, 24);
        let rng = &mut rng("NaN behind");
        let [a, b] = [m, n].map(|width| {
            let mut values: Vec<bf16> = values(rng, rows * width);
            values[used * width..].fill(bf16::NAN);
            values
        });
        let lists = groups(RowLayout::Counts { rows }, 3, 16, &[30, 0, 7]);
        let desc = KGroupedDesc::new(Dtype::Bf16, lists.desc.shape(), m, n).gathered(Gathered::Neither).f32_out(true);
        let got = lists.k_grouped_f32(&desc, &a, &b, None);
        let (a, b) = (wide(&a), wide(&b));
        for (e, rows) in [0..30, 30..30, 30..37].into_iter().enumerate() {
            let sum = |i: usize| rows.clone().map(|r| a[r * m + i / n] * b[r * n + i % n]).sum::<f64>();
            let want: Vec<f64> = (0..m * n).map(sum).collect();
            assert_rounded(&wide32(&got[e * m * n..][..m * n]), &want, Dtype::F32);
        }
    });
    section.refuse(1, "another architecture's wrong result (Liger-Kernel #1413) needs that architecture");
    section
}

/// Choices, weights and losses.
fn gates() -> Section {
    let mut section = Section::new("gates");
    // Automodel #1408, transformers #43688: a loss's factor that is lost or counted twice. The gradient is that of the loss that is told.
    for (tokens, factor) in [(32, 1.0), (32, 0.01), (64, 0.01), (128, 0.5)] {
        section.point(format!("scale of the balancing loss: {factor} of {tokens} tokens"), move || {
            let (experts, top_k) = (8, 2);
            let logits = scores(&mut rng("scale"), tokens * experts, Dtype::F32);
            let (gating, rule) = (Gating::new(Score::Softmax), BalanceRule::new(LossScore::Softmax, tokens));
            let told = calls::measure(&logits, experts, top_k, gating, rule, None);
            let counts = told.loss_counts;
            let loss = |logits: &[f64]| -> f64 {
                let mut sums = vec![0.0; experts];
                for row in logits.chunks(experts) {
                    sums.iter_mut().zip(softmax(row)).for_each(|(sum, p)| *sum += p);
                }
                let sum: f64 = sums.iter().zip(&counts).map(|(p, &n)| p * f64::from(n)).sum();
                experts as f64 * sum / (tokens * tokens) as f64
            };
            let wide_logits = wide32(&logits);
            let want = loss(&wide_logits);
            assert!((f64::from(told.stats.balance_loss) - want).abs() <= 1e-5 * want);
            let want: Vec<f64> = differences(&wide_logits, loss).iter().map(|d| factor * d).collect();
            let losses = Losses {
                rule: LossGradient::new(LossScore::Softmax).balance(factor as f32),
                counts: &counts,
                sequence_counts: &[],
                importance: &[],
            };
            let ids: Vec<i32> = (0..tokens * top_k).map(|slot| (slot % top_k) as i32).collect();
            let d = vec![0.0; ids.len()];
            let got = calls::gate_backward(&logits, [experts, top_k], (&ids, &d), gating, Some(losses));
            assert_norm(&wide32(&got), &want, 2e-5);
        });
    }
    // SGLang #31213, Megatron-LM #7081: a correction bias or counts that a 16-bit type cannot tell apart.
    section.point("a bias of f32 beyond bf16's digits", || {
        // In bf16 all of them are 100.
        let bias = [100.0, 100.01, 100.02, 100.03];
        let rule = Gating::new(Score::Sigmoid).renormalise(Some(Renormalise::Plus(0.0)));
        let chosen = calls::gate_as(Dtype::Bf16, &[0.0; 40], 4, 2, rule, Some(&bias), None);
        assert!(chosen.ids.chunks(2).all(|ids| ids == [3, 2]), "{:?}", chosen.ids);
        assert!(chosen.weights.iter().all(|&w| w == 0.5));
    });
    section.point("counts beyond 256", || {
        let ids: Vec<i32> = (0..2051).map(|slot| i32::from(slot % 4 == 0)).collect();
        assert_eq!(calls::count(&ids, 2, 1).0, bincount(&ids, 2));
    });
    // A renormalisation that is wrong and correlates above 0.99: every weight and every gradient is looked at by itself.
    for (name, rule) in [
        ("softmax", Gating::new(Score::Softmax).renormalise(Some(Renormalise::Plus(0.0)))),
        ("sigmoid", Gating::new(Score::Sigmoid).renormalise(Some(Renormalise::Plus(0.0)))),
        ("sigmoid, not divided", Gating::new(Score::Sigmoid)),
        ("softmax, not divided", Gating::new(Score::Softmax)),
    ] {
        section.point(format!("renormalisation of {name}"), move || {
            let (experts, top_k) = (16, 4);
            let logits = scores(&mut rng(name), 48 * experts, Dtype::F32);
            let chosen = calls::gate(&logits, experts, top_k, rule, None);
            let weights = |row: &[f64], ids: &[usize]| -> Vec<f64> {
                let all = match rule.score {
                    Score::Softmax => softmax(row),
                    _ => row.iter().map(|&l| crate::formulas::sigmoid(l)).collect(),
                };
                let sum = if rule.renormalise.is_some() { ids.iter().map(|&e| all[e]).sum() } else { 1.0 };
                ids.iter().map(|&e| all[e] / sum).collect()
            };
            let rows = wide32(&logits);
            for (t, got) in chosen.weights.chunks(top_k).enumerate() {
                let ids: Vec<usize> = chosen.ids[t * top_k..][..top_k].iter().map(|&id| id as usize).collect();
                let want = weights(&rows[t * experts..][..experts], &ids);
                assert!(got.iter().zip(want).all(|(&g, w)| (f64::from(g) - w).abs() <= 2e-6 * w), "token {t}");
            }
            routers::check_weights(name, &logits, [experts, top_k], &chosen, rule, weights);
        });
    }
    // vmoe #218: the squared coefficient of variation has a slope where its root has none.
    section.point("importance in balance", || {
        let (experts, top_k) = (4, 2);
        let logits = scores(&mut rng("balance"), 12 * experts, Dtype::F32);
        let rule = Gating::new(Score::Softmax);
        let chosen = calls::gate(&logits, experts, top_k, rule, None);
        let losses = Losses {
            rule: LossGradient::new(LossScore::Softmax).importance(0.1),
            counts: &[],
            sequence_counts: &[],
            importance: &[3.0; 4],
        };
        let d = vec![0.0; chosen.ids.len()];
        let got = calls::gate_backward(&logits, [experts, top_k], (&chosen.ids, &d), rule, Some(losses));
        assert!(got.iter().all(|&d| d == 0.0), "{got:?}");
    });
    // Megatron-LM #1441, torchtitan #2111: a group's score by its largest expert or by its two largest.
    for (score, want) in [(GroupScore::Max, [0, 1]), (GroupScore::TopSum(2), [2, 3])] {
        section.point(format!("groups by {score:?}"), move || {
            let groups = Groups::new(2, 1).score(score).masked(Masked::Out);
            let chosen =
                calls::gate(&[3.0, -4.0, 2.0, 1.5], 4, 2, Gating::new(Score::Sigmoid).groups(Some(groups)), None);
            assert_eq!(chosen.ids, want);
        });
    }
    section
}

/// Whole layers.
fn layers() -> Section {
    let mut section = Section::new("layers");
    // torchtitan #2416, transformers #48687: ranks that have some experts each; their gradients of x and of weights add up to the whole, once.
    section.point("gradients of ranks add up", || {
        let (tokens, hidden, inner, experts, top_k) = (24, 32, 16, 8, 3);
        let rng = &mut rng("ranks");
        let x: Vec<f32> = values(rng, tokens * hidden);
        let dy: Vec<f32> = values(rng, tokens * hidden);
        let gate_up: Vec<f32> = normals(rng, experts * 2 * inner * hidden, 0.2);
        let down: Vec<f32> = normals(rng, experts * hidden * inner, 0.2);
        let chosen =
            Chosen { ids: random_ids(rng, tokens, experts, top_k), weights: probabilities(rng, tokens, top_k) };
        let run = |first: usize, count: usize, ids: Vec<i32>| {
            let desc = LayerDesc::new(Dtype::F32, hidden, inner, count, top_k);
            let chosen = Chosen { ids, weights: chosen.weights.clone() };
            let part = |of: usize| first * of..(first + count) * of;
            let of = Experts {
                desc,
                x: &x,
                chosen: &chosen,
                gate_up: &gate_up[part(2 * inner * hidden)],
                gate_up_bias: None,
                down: &down[part(hidden * inner)],
                down_bias: None,
                map: None,
            };
            of.gradients(&dy)
        };
        let whole = run(0, experts, chosen.ids.clone());
        let ranks = [0, 4].map(|first: i32| {
            let local = chosen.ids.iter().map(|&id| if (first..first + 4).contains(&id) { id - first } else { -1 });
            run(first as usize, 4, local.collect())
        });
        let sum = |a: &[f32], b: &[f32]| wide32(a).iter().zip(b).map(|(a, &b)| a + f64::from(b)).collect::<Vec<_>>();
        assert_norm(&sum(&ranks[0].x, &ranks[1].x), &wide32(&whole.x), 4e-6);
        assert_norm(&sum(&ranks[0].weights, &ranks[1].weights), &wide32(&whole.weights), 4e-6);
        let both = |of: fn(&ExpertsGradients<f32>) -> &[f32]| wide32(&[of(&ranks[0]), of(&ranks[1])].concat());
        assert_norm(&both(|d| &d.gate_up), &wide32(&whole.gate_up), 4e-6);
        assert_norm(&both(|d| &d.down), &wide32(&whole.down), 4e-6);
    });
    // vLLM #13232: an expert's output beyond f16 whose share is within it, where the weight comes before the rounding.
    section.point("f16 outputs beyond its range before they are weighed", || {
        let (tokens, hidden, inner, experts, top_k) = (8, 32, 16, 4, 2);
        let rng = &mut rng("f16");
        let x: Vec<f16> = vec![f16::ONE; tokens * hidden];
        let gate_up: Vec<f16> = vec![f16::from_f32(2.0); experts * inner * hidden];
        let down: Vec<f16> = vec![f16::from_f32(100.0); experts * hidden * inner];
        // 64 a unit, 102400 an output; a hundredth of that each.
        let chosen = Chosen { ids: random_ids(rng, tokens, experts, top_k), weights: vec![0.01; tokens * top_k] };
        let desc = LayerDesc::new(Dtype::F16, hidden, inner, experts, top_k).mlp(Mlp::relu(Dtype::F16));
        let of = Experts {
            desc,
            x: &x,
            chosen: &chosen,
            gate_up: &gate_up,
            gate_up_bias: None,
            down: &down,
            down_bias: None,
            map: None,
        };
        let y = wide(&of.run());
        assert!(y.iter().all(|y| (y - 2048.0).abs() <= 8.0), "{y:?}");
    });
    // sonic-moe #63: gradients of the order of 1e-5, which an absolute tolerance of 1e-2 takes for any others.
    section.point("gradients near 1e-5", || {
        let (tokens, hidden, inner, experts, top_k) = (24, 32, 16, 4, 2);
        let rng = &mut rng("tiny");
        let x: Vec<bf16> = values(rng, tokens * hidden);
        let dy: Vec<bf16> = values(rng, tokens * hidden);
        let small: Vec<bf16> = dy.iter().map(|d| bf16::from_f64(d.to_f64() * 2f64.powi(-17))).collect();
        let gate_up: Vec<bf16> = normals(rng, experts * 2 * inner * hidden, 0.2);
        let down: Vec<bf16> = normals(rng, experts * hidden * inner, 0.2);
        let chosen =
            Chosen { ids: random_ids(rng, tokens, experts, top_k), weights: probabilities(rng, tokens, top_k) };
        let of = Experts {
            desc: LayerDesc::new(Dtype::Bf16, hidden, inner, experts, top_k),
            x: &x,
            chosen: &chosen,
            gate_up: &gate_up,
            gate_up_bias: None,
            down: &down,
            down_bias: None,
            map: None,
        };
        let (large, tiny) = (of.gradients(&dy), of.gradients(&small));
        // A power of two moves no digit of bf16.
        let scaled = |values: &[f64]| values.iter().map(|v| v * 2f64.powi(-17)).collect::<Vec<_>>();
        assert_norm(&wide(&tiny.x), &scaled(&wide(&large.x)), layer(Dtype::F32));
        assert_norm(&wide32(&tiny.gate_up), &scaled(&wide32(&large.gate_up)), layer(Dtype::F32));
        assert_norm(&wide32(&tiny.down), &scaled(&wide32(&large.down)), layer(Dtype::F32));
        assert_norm(&wide32(&tiny.weights), &scaled(&wide32(&large.weights)), layer(Dtype::F32));
    });
    section
}
