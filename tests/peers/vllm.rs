//! vLLM, `tests/kernels/moe`.
//!
//! Scaled down: token counts above 96 and sizes of products (each module's lists say to what), hidden sizes of permutations by 32. The suite runs
//! permutations with scratch buffers of its own or of the caller's: here a workspace always is the caller's, and the second launch on one is
//! compared too.

use half::bf16;
use moe_kernels::Dtype;
use moe_kernels::capacity::dispatch::DispatchDesc;
use moe_kernels::experts::gemm::{GemmDesc, Rows, Strides};
use moe_kernels::experts::permute::Unfilled;
use moe_kernels::layer::{LayerDesc, MapDesc};
use moe_kernels::rules::{Activation, Gating, Glu, Groups, Renormalise, Score, WeightDesc};

use crate::calls::{self, Chosen, Experts};
use crate::close::{assert_choice, assert_layer, assert_rounded};
use crate::data::{random_ids, rng, scores, values, wide, wide32};
use crate::formulas::{bincount, cumulative, group_limited, linear, sigmoid, silu, softmax, sorted_slots};
use crate::products::Product;
use crate::suite::{Peer, Section, product, scaled};
use crate::support::inputs::normals;

pub fn peer() -> Peer {
    let suite = "`tests/kernels/moe`: moe, permute, align, fused and grouped top-k, counts, expert maps";
    let sections = vec![
        fused_moe(),
        permute_unpermute(),
        permute_invalid_ids(),
        align_block_size(),
        align_block_size_with_map(),
        fused_topk(),
        grouped_topk(),
        count_tokens(),
        count_tokens_by_size(),
        stale_ids(),
    ];
    Peer { name: "vLLM", suite, sections }
}

/// An expert's output: `down (silu(gate x) * (up x))`, gate's rows before up's.
fn expert(x: &[f64], gate_up: &[f64], down: &[f64]) -> Vec<f64> {
    let projected = linear(x, gate_up);
    let (gate, up) = projected.split_at(projected.len() / 2);
    let h: Vec<f64> = gate.iter().zip(up).map(|(&g, u)| silu(g) * u).collect();
    linear(&h, down)
}

/// Softmax of bf16 scores, the k largest not renormalised, with and without an expert map that knows some experts only, and with weights that are
/// views of rows 128 elements longer.
///
/// (tokens, I, H): (1, 128, 128), (1, 2048, 128), (33, 2048, 128), (32768, 2048, 511), (40000, 1024, 1024) become these.
fn fused_moe() -> Section {
    const SHAPES: [[usize; 3]; 5] = [[1, 32, 32], [1, 128, 32], [33, 128, 32], [96, 128, 39], [104, 64, 64]];
    let mut section = Section::new("fused_moe");
    for [tokens, inner, hidden] in SHAPES {
        for (experts, top_k) in product(&[8, 64, 192], &[2, 6]) {
            for (ep_size, padded) in product(&[1, 4], &[false, true]) {
                let name =
                    format!("m={tokens} n={inner} k={hidden} e={experts} topk={top_k} ep={ep_size} pad={padded}");
                let point = name.clone();
                section.point(name, move || {
                    fused_moe_point(&point, [tokens, inner, hidden], [experts, top_k, ep_size], padded)
                });
            }
        }
    }
    section
}

fn fused_moe_point(
    name: &str,
    [tokens, inner, hidden]: [usize; 3],
    [experts, top_k, ep_size]: [usize; 3],
    padded: bool,
) {
    let rng = &mut rng(name);
    let x: Vec<bf16> = normals(rng, tokens * hidden, 0.1);
    let mut gate_up: Vec<bf16> = normals(rng, experts * 2 * inner * hidden, 0.1);
    let mut down: Vec<bf16> = normals(rng, experts * hidden * inner, 0.1);
    let logits = scores(rng, tokens * experts, Dtype::Bf16);
    let rule = Gating::new(Score::Softmax);
    let chosen = calls::gate_as(Dtype::Bf16, &logits, experts, top_k, rule, None, None);
    let logits = wide32(&logits);
    let share = |t: usize| softmax(&logits[t * experts..][..experts]);
    assert_choice(&chosen, top_k, share, |t, ids| ids.iter().map(|&e| share(t)[e]).collect());

    // Some experts, drawn with repeats: the last place that names one has it.
    let mut local = experts;
    let mut map: Vec<i32> = (0..experts as i32).collect();
    if ep_size > 1 {
        local = experts / ep_size;
        map = vec![-1; experts];
        let here: Vec<usize> = (0..local).map(|_| rng.usize(..experts)).collect();
        here.iter().enumerate().for_each(|(place, &e)| map[e] = place as i32);
        let rows = |all: &[bf16], size: usize| -> Vec<bf16> {
            here.iter().flat_map(|&e| all[e * size..][..size].to_vec()).collect()
        };
        (gate_up, down) = (rows(&gate_up, 2 * inner * hidden), rows(&down, hidden * inner));
    }
    if padded {
        let ids: Vec<i32> = chosen.ids.iter().map(|&id| map[id as usize]).collect();
        let got = wide(&by_views(&x, &ids, &chosen.weights, [inner, hidden, local, top_k], &gate_up, &down));
        compare_fused(&got, &chosen, &map, [inner, hidden, top_k], &wide(&x), &wide(&gate_up), &wide(&down));
        return;
    }
    let desc =
        LayerDesc::new(Dtype::Bf16, hidden, inner, experts, top_k).map((ep_size > 1).then(|| MapDesc::new(local)));
    let map_here = (ep_size > 1).then_some(&map[..]);
    let layer = Experts {
        desc,
        x: &x,
        chosen: &chosen,
        gate_up: &gate_up,
        gate_up_bias: None,
        down: &down,
        down_bias: None,
        map: map_here,
    };
    let got = wide(&layer.run());
    compare_fused(&got, &chosen, &map, [inner, hidden, top_k], &wide(&x), &wide(&gate_up), &wide(&down));
}

/// A layer's steps one by one, each weight a view of longer rows.
fn by_views(
    x: &[bf16],
    ids: &[i32],
    weights: &[f32],
    [inner, hidden, experts, top_k]: [usize; 4],
    gate_up: &[bf16],
    down: &[bf16],
) -> Vec<bf16> {
    const BEHIND: usize = 128;
    let tokens = x.len() / hidden;
    let sorted = calls::sort(ids, None, &DispatchDesc::new(tokens, experts, top_k, 16));
    let slots = sorted.shape.slots;
    let padded = |rows: &[bf16], width: usize| -> Vec<bf16> {
        rows.chunks(width).flat_map(|row| row.iter().copied().chain([bf16::NAN; BEHIND])).collect()
    };
    let product = |a: &[bf16], rows: &[bf16], [n, k]: [usize; 2], gated: bool| {
        let form = WeightDesc::new(Dtype::Bf16).glu(if gated { Glu::Split } else { Glu::None });
        let desc = GemmDesc::new(Dtype::Bf16, Rows::Grouped(sorted.shape), n, k).gather(gated).weight(form);
        let desc = desc.activation(if gated { Activation::Silu } else { Activation::Identity });
        let line = k + BEHIND;
        let strides = Strides::packed(&desc).weight(desc.pre_activation_columns() * line, line, 1);
        let desc = desc.strides(Some(strides));
        let lists = Some((&sorted.stream, &sorted.dispatched));
        Product { desc, a, weight: &padded(rows, k), bias: None, lists, len: slots * n }.run()
    };
    let h = product(x, gate_up, [inner, hidden], true);
    sorted.unpermute(&product(&h, down, [hidden, inner], false), Some(weights), hidden)
}

/// Of every choice whose expert `map` knows, the expert's output by its weight.
fn compare_fused(
    got: &[f64],
    chosen: &Chosen,
    map: &[i32],
    [inner, hidden, top_k]: [usize; 3],
    x: &[f64],
    gate_up: &[f64],
    down: &[f64],
) {
    let mut want = vec![0.0; x.len()];
    for (slot, (&id, &weight)) in chosen.ids.iter().zip(&chosen.weights).enumerate() {
        let Ok(e) = usize::try_from(map[id as usize]) else { continue };
        let t = slot / top_k;
        let (g, d) =
            (&gate_up[e * 2 * inner * hidden..][..2 * inner * hidden], &down[e * hidden * inner..][..hidden * inner]);
        let out = expert(&x[t * hidden..][..hidden], g, d);
        want[t * hidden..][..hidden].iter_mut().zip(out).for_each(|(y, out)| *y += f64::from(weight) * out);
    }
    assert_layer(got, &want, Dtype::Bf16);
}

fn permute_unpermute() -> Section {
    let mut section = Section::new("permute_unpermute");
    for (tokens, hidden) in product(&[1, 33, 1024, 5000], &[2048, 7168]) {
        for (experts, top_k) in product(&[16, 64, 256], &[2, 6, 8]) {
            for (ep_size, scratch) in product(&[1, 4, 16], &[false, true]) {
                let name =
                    format!("n={tokens} hidden={hidden} e={experts} topk={top_k} ep={ep_size} scratch={scratch}");
                let point = name.clone();
                let sizes = [scaled(tokens, 96), hidden / 32, experts, top_k, ep_size];
                section.point(name, move || permute_point(&point, sizes));
            }
        }
    }
    section
}

/// Rows by local expert and token; offsets; where each slot went; then 0.5 times the rows and noise, back by softmax weights.
fn permute_point(name: &str, [tokens, hidden, experts, top_k, ep_size]: [usize; 5]) {
    let rng = &mut rng(name);
    let x: Vec<bf16> = values(rng, tokens * hidden);
    let logits = scores(rng, tokens * experts, Dtype::Bf16);
    let rule = Gating::new(Score::Softmax);
    let chosen = calls::gate_as(Dtype::Bf16, &logits, experts, top_k, rule, None, None);
    let local = experts / ep_size;
    let first = rng.usize(..ep_size) * local;
    let map: Vec<i32> =
        (0..experts).map(|e| if (first..first + local).contains(&e) { (e - first) as i32 } else { -1 }).collect();
    let ids: Vec<i64> = chosen.ids.iter().map(|&id| id.into()).collect();
    let ids = if ep_size > 1 { calls::map_ids(&ids, top_k, &map) } else { chosen.ids.clone() };
    let want_ids: Vec<i32> = chosen.ids.iter().map(|&id| if ep_size > 1 { map[id as usize] } else { id }).collect();
    assert_eq!(ids, want_ids, "local ids");

    let sorted = calls::sort(&ids, Some(&chosen.weights), &DispatchDesc::new(tokens, local, top_k, 16));
    let slots = sorted_slots(&want_ids, local);
    assert_eq!(sorted.offsets(), cumulative(&bincount(&want_ids, local)), "offsets");
    let mut row_of = vec![-1; ids.len()];
    slots.iter().enumerate().for_each(|(row, &slot)| row_of[slot] = row as i32);
    assert_eq!(sorted.token_slot(), row_of, "rows of slots");
    let want: Vec<bf16> = slots.iter().flat_map(|&s| x[s / top_k * hidden..][..hidden].to_vec()).collect();
    let rows = sorted.permute(&x, hidden, Unfilled::Keep);
    assert!(rows == want, "permuted rows");
    assert!(sorted.permute(&x, hidden, Unfilled::Keep) == want, "permuted rows again");

    let noise: Vec<bf16> = normals(rng, rows.len(), 1.0);
    let rows: Vec<bf16> =
        rows.iter().zip(noise).map(|(row, noise)| bf16::from_f32(0.5 * row.to_f32() + noise.to_f32())).collect();
    let got = wide(&sorted.unpermute(&rows, Some(&chosen.weights), hidden));
    let mut want = vec![0.0; tokens * hidden];
    for (row, &slot) in slots.iter().enumerate() {
        let weight = f64::from(chosen.weights[slot]);
        let t = slot / top_k;
        let of = &rows[row * hidden..][..hidden];
        want[t * hidden..][..hidden].iter_mut().zip(of).for_each(|(y, v)| *y += weight * v.to_f64());
    }
    assert_rounded(&got, &want, Dtype::Bf16);
}

/// Ids that are no expert's, and experts that are elsewhere: their tokens' output is zero.
fn permute_invalid_ids() -> Section {
    let mut section = Section::new("permute_invalid_ids");
    section.point("five tokens", || {
        let x: Vec<bf16> = (0..80).map(|v| bf16::from_f32(v as f32)).collect();
        let ids = calls::map_ids(&[0, -1, 1, 4, 2], 1, &[0, 1, -1, -1]);
        let sorted = calls::sort(&ids, None, &DispatchDesc::new(5, 2, 1, 16));
        assert_eq!(sorted.offsets(), [0, 1, 2]);
        let rows = sorted.permute(&x, 16, Unfilled::Keep);
        assert!(rows == [&x[..16], &x[32..48]].concat());
        let back = sorted.unpermute(&rows, None, 16);
        let mut want = vec![bf16::ZERO; 80];
        want[..16].copy_from_slice(&x[..16]);
        want[32..48].copy_from_slice(&x[32..48]);
        assert!(back == want);
    });
    section
}

/// `sorted_ids`, `expert_ids` of blocks and the number of padded rows, from ids; the order within an expert is free there, ours is stable.
fn align_block_size() -> Section {
    let mut section = Section::new("align_block_size");
    for (tokens, top_k) in product(&[1, 3, 256, 2256, 4096], &[1, 2, 16, 32]) {
        for (experts, block) in product(&[32, 160, 256, 257], &[32, 128]) {
            for pad_sorted in [false, true] {
                let name = format!("m={tokens} topk={top_k} e={experts} block={block} pad={pad_sorted}");
                let point = name.clone();
                let tokens = scaled(tokens, 96);
                section.point(name, move || align_point(&point, tokens, top_k, experts, block));
            }
        }
    }
    section.point("deterministic", || {
        let ids: Vec<i32> = {
            let rng = &mut rng("deterministic");
            (0..256).map(|_| rng.i32(0..32)).collect()
        };
        let run = || {
            let sorted = calls::sort(&ids, None, &DispatchDesc::new(128, 32, 2, 64).row_multiple(64));
            (sorted.token_slot(), sorted.slot_token(), sorted.offsets())
        };
        let first = run();
        (0..4).for_each(|_| assert_eq!(run(), first));
    });
    section.refuse(128, "blocks of a batched layout from counts: its products take the counts themselves");
    section
}

fn align_point(name: &str, tokens: usize, top_k: usize, experts: usize, block: usize) {
    let ids = random_ids(&mut rng(name), tokens, experts, top_k);
    check_aligned(&ids, top_k, experts, block);
}

/// Each expert's rows begin on a block; its slots are in them, in order; tiles name the block's expert.
fn check_aligned(ids: &[i32], top_k: usize, experts: usize, block: usize) {
    let tokens = ids.len() / top_k;
    let desc = DispatchDesc::new(tokens, experts, top_k, block).row_multiple(block);
    let sorted = calls::sort(ids, None, &desc);
    let counts = bincount(ids, experts);
    let padded: Vec<i32> = counts.iter().map(|&c| (c as usize).next_multiple_of(block) as i32).collect();
    let offsets = cumulative(&padded);
    assert_eq!(sorted.offsets(), offsets, "offsets");
    assert_eq!(sorted.counts(), counts, "counts");
    assert_eq!(calls::count(ids, experts, block), (counts.clone(), offsets.clone()), "counts alone");
    let mut slot_token = vec![-1; offsets[experts] as usize];
    let mut token_slot = vec![-1; ids.len()];
    let mut at = offsets.clone();
    for slot in sorted_slots(ids, experts) {
        let row = &mut at[ids[slot] as usize];
        slot_token[*row as usize] = (slot / top_k) as i32;
        token_slot[slot] = *row;
        *row += 1;
    }
    assert_eq!(sorted.slot_token(), slot_token, "tokens of rows");
    assert_eq!(sorted.token_slot(), token_slot, "rows of slots");
    // One tile a block, so that tile b's expert is the suite's expert_ids[b].
    let num_tiles = calls::down(&sorted.stream, sorted.dispatched.num_tiles(), 1)[0] as usize;
    let tiles = sorted.stream.clone_dtoh(sorted.dispatched.tiles()).unwrap();
    let blocks: Vec<[i32; 2]> = tiles[..num_tiles].iter().map(|tile| [tile[0], tile[1]]).collect();
    let want: Vec<[i32; 2]> = (0..experts)
        .flat_map(|e| (offsets[e]..offsets[e + 1]).step_by(block).map(move |row| [e as i32, row]))
        .collect();
    assert_eq!(blocks, want, "blocks");
}

/// The same after an expert map that leaves every second expert out.
fn align_block_size_with_map() -> Section {
    let mut section = Section::new("align_block_size_with_map");
    for (tokens, top_k) in product(&[16, 32], &[2, 4]) {
        let name = format!("m={tokens} topk={top_k}");
        let point = name.clone();
        section.point(name, move || {
            let ids = random_ids(&mut rng(&point), tokens, 8, top_k);
            let map: Vec<i32> = (0..8).map(|e| if e % 2 == 0 { e / 2 } else { -1 }).collect();
            let wide: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
            let local = calls::map_ids(&wide, top_k, &map);
            assert_eq!(local, ids.iter().map(|&id| map[id as usize]).collect::<Vec<_>>());
            check_aligned(&local, top_k, 4, 64);
        });
    }
    section
}

/// Softmax or sigmoid, with and without a correction bias and renormalisation. The hidden size of the suite's tokens has no part in it.
fn fused_topk() -> Section {
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

fn shares(logits: &[f64], sigmoids: bool) -> Vec<f64> {
    if sigmoids { logits.iter().map(|&l| sigmoid(l)).collect() } else { softmax(logits) }
}

/// 2 of 8 groups of two, ranked by their two largest biased scores.
fn grouped_topk() -> Section {
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

/// Slots of the experts of each rank, from ids of 64 bits.
fn count_tokens() -> Section {
    let mut section = Section::new("count_tokens");
    let sizes = [1, 4, 8, 11, 19, 128, 127, 405, 1024, 3333, 6666, 7317];
    for (tokens, top_k) in product(&sizes, &[2, 6, 8]) {
        for ep_size in [1, 2, 4] {
            let name = format!("n={tokens} topk={top_k} ep={ep_size}");
            let point = name.clone();
            section.point(name, move || count_point(&point, tokens, top_k, ep_size));
        }
    }
    section
}

fn count_tokens_by_size() -> Section {
    let mut section = Section::new("count_tokens_by_size");
    for tokens in (1..8192).step_by(11) {
        let name = format!("numel={tokens}");
        let point = name.clone();
        section.point(name, move || count_point(&point, tokens, 1, 2));
    }
    section
}

fn count_point(name: &str, tokens: usize, top_k: usize, ep_size: usize) {
    let experts = 32;
    let ids: Vec<i64> = random_ids(&mut rng(name), tokens, experts, top_k).into_iter().map(i64::from).collect();
    let local = experts / ep_size;
    for rank in 0..ep_size {
        let first = rank * local;
        let map: Vec<i32> =
            (0..experts).map(|e| if (first..first + local).contains(&e) { (e - first) as i32 } else { -1 }).collect();
        let want: Vec<i32> =
            (first..first + local).map(|e| ids.iter().filter(|&&id| id == e as i64).count() as i32).collect();
        let here = calls::map_ids(&ids, top_k, &map);
        assert_eq!(calls::count(&here, local, 1).0, want, "rank {rank}");
    }
    if ep_size == 1 {
        let want: Vec<i32> = (0..experts as i64).map(|e| ids.iter().filter(|&&id| id == e).count() as i32).collect();
        assert_eq!(calls::count_wide(&ids, experts), want);
    }
}

/// Ids far past the experts, as stale memory holds them, index nothing.
fn stale_ids() -> Section {
    let mut section = Section::new("stale_ids");
    let map: Vec<i32> = (0..16).map(|e| if e < 8 { e } else { -1 }).collect();
    let of = map.clone();
    section.point("counts", move || {
        let local = calls::map_ids(&[0, 1, 7, 3, 123_456_789, 2, 98_765, 2_071_690_107], 2, &of);
        assert_eq!(calls::count(&local, 8, 1).0, [1, 1, 1, 1, 0, 0, 0, 1]);
    });
    section.point("weighted sum", move || {
        let local = calls::map_ids(&[0, 1, 2, 3, 123_456_789, 4, 98_765, 2_071_690_107], 2, &map);
        let sorted = calls::sort(&local, None, &DispatchDesc::new(4, 8, 2, 16));
        let rows = vec![1.0f32; sorted.rows() * 32];
        let y = sorted.unpermute(&rows, Some(&[1.0; 8]), 32);
        assert_eq!(y.chunks(32).map(|row| row[0]).collect::<Vec<_>>(), [2.0, 2.0, 1.0, 0.0]);
    });
    section
}
