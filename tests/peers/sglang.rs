//! SGLang, `sgl-kernel/tests`.
//!
//! Scaled down: token counts above 96.

use moe_kernels::Dtype;
use moe_kernels::capacity::dispatch::DispatchDesc;
use moe_kernels::rules::{Appended, AppendedWeight, Gating, Groups, Renormalise, Score};

use crate::calls::{self, Chosen};
use crate::close::assert_choice;
use crate::data::{random_ids, rng, rounded, scores, wide32};
use crate::formulas::{bincount, cumulative, group_limited, sigmoid, softmax};
use crate::suite::{Peer, Section, product, scaled};
use crate::support::inputs::normals;

pub fn peer() -> Peer {
    let suite = "`sgl-kernel/tests`: moe_align, topk_softmax, topk_sigmoid, fused_gate, kimi_k2 gate, ep pre_reorder";
    let sections = vec![
        align(),
        topk_softmax(),
        topk_sigmoid(),
        topk_sigmoid_types(),
        renormalised(),
        biased(),
        fused_gate(),
        kimi(),
        pre_reorder(),
    ];
    Peer { name: "SGLang", suite, sections }
}

/// Rows of 256 experts on block boundaries.
fn align() -> Section {
    let mut section = Section::new("align");
    let tokens = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096];
    for block in [32, 64, 128, 256] {
        for (tokens, top_k) in product(&tokens, &[1, 2, 4, 8, 16, 32, 64]) {
            let name = format!("block={block} n={tokens} topk={top_k}");
            let point = name.clone();
            let tokens = scaled(tokens, 96);
            section.point(name, move || {
                let ids = random_ids(&mut rng(&point), tokens, 256, top_k);
                let desc = DispatchDesc::new(tokens, 256, top_k, block).row_multiple(block);
                let sorted = calls::sort(&ids, None, &desc);
                let padded: Vec<i32> =
                    bincount(&ids, 256).iter().map(|&c| (c as usize).next_multiple_of(block) as i32).collect();
                let offsets = cumulative(&padded);
                assert_eq!(sorted.offsets(), offsets);
                // The expert of each block.
                let count = calls::down(&sorted.stream, sorted.dispatched.num_tiles(), 1)[0] as usize;
                let tiles = sorted.stream.clone_dtoh(sorted.dispatched.tiles()).unwrap();
                let got: Vec<i32> = tiles[..count].iter().map(|tile| tile[0]).collect();
                let want: Vec<i32> = (0..256).flat_map(|e| vec![e as i32; padded[e] as usize / block]).collect();
                assert_eq!(got, want);
                assert_eq!(calls::count(&ids, 256, block).1, offsets);
            });
        }
    }
    section
}

const TOKENS: [usize; 6] = [1, 16, 128, 512, 1024, 2048];
const EXPERTS: [usize; 7] = [4, 8, 16, 32, 64, 128, 256];

/// One gating of normal logits.
fn gate_point(name: &str, [tokens, experts, top_k]: [usize; 3], dtype: Dtype, rule: Gating, biased: bool) {
    let rng = &mut rng(name);
    let tokens = scaled(tokens, 96);
    let logits = scores(rng, tokens * experts, dtype);
    let bias = biased.then(|| normals::<f32>(rng, experts, 1.0));
    let chosen = calls::gate_as(dtype, &logits, experts, top_k, rule, bias.as_deref(), None);
    let logits = wide32(&logits);
    let bias = bias.map_or(vec![0.0; experts], |bias| wide32(&bias));
    let share = |t: usize| -> Vec<f64> {
        let row = &logits[t * experts..][..experts];
        if rule.score == Score::Sigmoid { row.iter().map(|&l| sigmoid(l)).collect() } else { softmax(row) }
    };
    let value = |t: usize| share(t).iter().zip(&bias).map(|(s, b)| s + b).collect();
    assert_choice(&chosen, top_k, value, |t, ids| {
        let of: Vec<f64> = ids.iter().map(|&e| share(t)[e]).collect();
        let sum: f64 = if rule.renormalise.is_some() { of.iter().sum() } else { 1.0 };
        of.iter().map(|s| s / sum).collect()
    });
}

fn gates(section_name: &'static str, experts: &[usize], dtypes: &[Dtype], rule: Gating, biased: bool) -> Section {
    let mut section = Section::new(section_name);
    for &dtype in dtypes {
        for (tokens, &experts) in TOKENS.into_iter().flat_map(|t| experts.iter().map(move |e| (t, e))) {
            for top_k in [1, 2, 4] {
                let name = format!("{dtype} n={tokens} e={experts} topk={top_k}");
                let point = format!("{section_name} {name}");
                section.point(name, move || gate_point(&point, [tokens, experts, top_k], dtype, rule, biased));
            }
        }
    }
    section
}

fn topk_softmax() -> Section {
    gates("topk_softmax", &EXPERTS, &[Dtype::F32], Gating::new(Score::Softmax), false)
}

fn topk_sigmoid() -> Section {
    gates("topk_sigmoid", &EXPERTS, &[Dtype::F32], Gating::new(Score::Sigmoid), false)
}

fn topk_sigmoid_types() -> Section {
    gates("topk_sigmoid_types", &EXPERTS, &Dtype::ALL, Gating::new(Score::Sigmoid), false)
}

fn renormalised() -> Section {
    gates("renormalised", &EXPERTS, &[Dtype::Bf16], Gating::new(Score::Sigmoid).renormalised(), false)
}

fn biased() -> Section {
    const EXPERTS: [usize; 8] = [4, 8, 16, 32, 48, 64, 128, 256];
    gates("biased", &EXPERTS, &[Dtype::F32], Gating::new(Score::Sigmoid).renormalised(), true)
}

const LENGTHS: [usize; 22] =
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536];

/// Uniform logits and bias, the experts of the best groups by their two largest, weights over their sum, times 2.5 or not; and shared experts
/// behind each token's choices, whose weight is the sum of the others over 2.5.
fn fused_gate() -> Section {
    let mut section = Section::new("fused_gate");
    for tokens in LENGTHS {
        for [experts, groups, kept, top_k] in [[128, 4, 2, 4], [256, 8, 4, 8], [512, 16, 8, 16]] {
            for (shared, scaled_output) in product(&[0, 1, 2], &[false, true]) {
                let name = format!("n={tokens} e={experts} shared={shared} scale={scaled_output}");
                let point = name.clone();
                let tokens = scaled(tokens, 96);
                section.point(name, move || {
                    let rng = &mut rng(&point);
                    let logits: Vec<f32> = (0..tokens * experts).map(|_| rng.f32()).collect();
                    let bias: Vec<f32> = (0..experts).map(|_| rng.f32()).collect();
                    let scale = if scaled_output { 2.5 } else { 1.0 };
                    // Of weights that add to `scale`.
                    let of_shared = if scaled_output { 1.0 } else { 0.4 };
                    let appended = (shared > 0).then(|| Appended::new(shared, AppendedWeight::Fixed(of_shared)));
                    let rule = Gating::new(Score::Sigmoid)
                        .renormalise(Some(Renormalise::Plus(0.0)))
                        .scale(scale)
                        .groups(Some(Groups::new(groups, kept)))
                        .appended(appended);
                    let all = calls::gate(&logits, experts, top_k, rule, Some(&bias));
                    let mut chosen = Chosen { ids: vec![], weights: vec![] };
                    let rows = all.ids.chunks(top_k + shared).zip(all.weights.chunks(top_k + shared));
                    for (ids, weights) in rows {
                        chosen.ids.extend_from_slice(&ids[..top_k]);
                        chosen.weights.extend_from_slice(&weights[..top_k]);
                        let behind: Vec<i32> = (experts..experts + shared).map(|e| e as i32).collect();
                        assert_eq!(ids[top_k..], behind);
                        let sum: f32 = weights[..top_k].iter().sum();
                        weights[top_k..]
                            .iter()
                            .for_each(|w| assert!((w - sum / 2.5).abs() < 1e-5, "shared weight {w}"));
                    }
                    let (logits, bias) = (wide32(&logits), wide32(&bias));
                    let share = |t: usize, e: usize| sigmoid(logits[t * experts + e]);
                    let value = |t: usize| {
                        let biased: Vec<f64> = (0..experts).map(|e| share(t, e) + bias[e]).collect();
                        group_limited(&biased, groups, kept, 2, f64::NEG_INFINITY)
                    };
                    assert_choice(&chosen, top_k, value, |t, ids| {
                        let sum: f64 = ids.iter().map(|&e| share(t, e)).sum();
                        ids.iter().map(|&e| f64::from(scale) * share(t, e) / sum).collect()
                    });
                });
            }
        }
    }
    section
}

/// 6 of 384 experts without groups, logits and bias of one type.
fn kimi() -> Section {
    let mut section = Section::new("kimi_k2_gate");
    let (experts, top_k) = (384, 6);
    let mut add = |tokens: usize, dtype: Dtype, scaled_output: bool, what: &str| {
        let name = format!("{what} n={tokens} {dtype} scale={scaled_output}");
        let point = name.clone();
        let tokens = scaled(tokens, 96);
        section.point(name, move || {
            let rng = &mut rng(&point);
            let mut uniform = |len: usize| -> Vec<f32> { (0..len).map(|_| rounded(rng.f32(), dtype)).collect() };
            let (logits, bias) = (uniform(tokens * experts), uniform(experts));
            let scale = if scaled_output { 2.872 } else { 1.0 };
            let rule = Gating::new(Score::Sigmoid).renormalised().scale(scale);
            let chosen = calls::gate_as(dtype, &logits, experts, top_k, rule, Some(&bias), None);
            let (logits, bias) = (wide32(&logits), wide32(&bias));
            let share = |t: usize, e: usize| sigmoid(logits[t * experts + e]);
            let value = |t: usize| (0..experts).map(|e| share(t, e) + bias[e]).collect();
            assert_choice(&chosen, top_k, value, |t, ids| {
                let sum: f64 = ids.iter().map(|&e| share(t, e)).sum();
                ids.iter().map(|&e| f64::from(scale) * share(t, e) / sum).collect()
            });
            if !scaled_output {
                let sums = chosen.weights.chunks(top_k).map(|row| row.iter().sum::<f32>());
                sums.for_each(|sum| assert!((sum - 1.0).abs() < 1e-4, "weights add to {sum}"));
            }
        });
    };
    for (tokens, dtype) in product(&LENGTHS, &[Dtype::F32, Dtype::F16, Dtype::Bf16]) {
        add(tokens, dtype, false, "grid");
        add(tokens, dtype, true, "grid");
    }
    add(1024, Dtype::F32, false, "specific");
    add(4096, Dtype::F32, false, "specific");
    section
}

/// The suite's rows are multiplied by scales of a quantisation on the way.
fn pre_reorder() -> Section {
    let mut section = Section::new("ep_pre_reorder");
    section
        .refuse(108, "scales of quantised rows on the way to their places: quantised types come with their products");
    section
}
