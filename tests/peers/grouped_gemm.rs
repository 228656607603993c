//! grouped_gemm, `tests/test_permuteTopK.py`, `test_torch_ops.py`, `test_sinkhorn.py`; the gradients of `ops_test.py`.
//!
//! Scaled down: 8192 tokens to 96, widths 4096 and 2048 to 64, 2048 x 8192 matrices to 64 x 256.

use moe_kernels::Dtype;
use moe_kernels::capacity::dispatch::DispatchDesc;
use moe_kernels::capacity::row_groups::RowLayout;
use moe_kernels::experts::gemm::{GemmDesc, Rows};
use moe_kernels::experts::permute::Unfilled;
use moe_kernels::rules::{Layout, WeightDesc};

use crate::calls;
use crate::close::assert_rounded;
use crate::data::{probabilities, random_ids, rng, values, wide, wide32, with_type};
use crate::formulas::{bincount, softmax, sorted_slots};
use crate::gradients;
use crate::products::{Product, groups};
use crate::suite::{Peer, Section};
use crate::support::compare::Storage;
use crate::support::inputs::normals;

pub fn peer() -> Peer {
    let suite = "`tests`: test_permuteTopK, test_torch_ops, test_sinkhorn; `ops_test.py`: gradients";
    let back = gradients::products::grouped_gemm();
    let sections = vec![permute_top_k(), permute_twice(), products(), sinkhorn(), back];
    Peer { name: "grouped_gemm", suite, sections }
}

const WIDTH: usize = 64;

fn permute_top_k() -> Section {
    let mut section = Section::new("permute_top_k");
    let bf16 = Dtype::Bf16;
    let points = [
        (Dtype::F32, 96, 8, 1),
        (Dtype::F16, 96, 8, 1),
        (bf16, 96, 8, 1),
        (bf16, 96, 4, 1),
        (bf16, 96, 5, 2),
        (bf16, 96, 6, 3),
        (bf16, 96, 7, 4),
        (bf16, 96, 8, 5),
        (bf16, 0, 8, 5),
    ];
    for (dtype, tokens, experts, top_k) in points {
        let name = format!("{dtype} n={tokens} e={experts} topk={top_k}");
        let point = name.clone();
        section.point(name, move || with_type!(dtype, T => permute_point::<T>(&point, tokens, experts, top_k)));
    }
    section.refuse(2, "8-bit floats: quantised types come with their products");
    section
}

fn permute_point<T: Storage>(name: &str, tokens: usize, experts: usize, top_k: usize) {
    let rng = &mut rng(name);
    let x: Vec<T> = values(rng, tokens * WIDTH);
    let ids = random_ids(rng, tokens, experts, top_k);
    let probs = probabilities(rng, tokens, top_k);
    let sorted = calls::sort(&ids, Some(&probs), &DispatchDesc::new(tokens, experts, top_k, 16));
    let slots = sorted_slots(&ids, experts);
    let got = sorted.permute(&x, WIDTH, Unfilled::Keep);
    assert!(got == slots.iter().flat_map(|&s| x[s / top_k * WIDTH..][..WIDTH].to_vec()).collect::<Vec<_>>());
    let y = wide(&sorted.unpermute(&got, Some(&probs), WIDTH));
    let mut want = vec![0.0; tokens * WIDTH];
    for (row, &slot) in slots.iter().enumerate() {
        let weight = wide32(&probs)[slot];
        let to = &mut want[slot / top_k * WIDTH..][..WIDTH];
        to.iter_mut().zip(&got[row * WIDTH..]).for_each(|(y, &v)| *y += weight * v.into());
    }
    assert_rounded(&y, &want, T::DTYPE);
}

/// Two permutations there and back leave every bit where it was.
fn permute_twice() -> Section {
    let mut section = Section::new("permute_twice");
    for (dtype, tokens) in [(Dtype::F32, 96), (Dtype::F16, 96), (Dtype::Bf16, 96), (Dtype::Bf16, 0)] {
        section.point(format!("{dtype} n={tokens}"), move || {
            with_type!(dtype, T => {
                let rng = &mut rng("permute_twice");
                let x: Vec<T> = (0..tokens).flat_map(|i| vec![T::from_f64((i % 300) as f64); WIDTH]).collect();
                let mut now = x.clone();
                for _ in 0..10 {
                    let ids: Vec<i32> = (0..tokens).map(|_| rng.i32(0..8)).collect();
                    let sorted = calls::sort(&ids, None, &DispatchDesc::new(tokens, 8, 1, 16));
                    let rows = sorted.permute(&now, WIDTH, Unfilled::Keep);
                    now = sorted.unpermute(&rows, None, WIDTH);
                }
                assert!(now == x);
            })
        });
    }
    section.refuse(2, "8-bit floats: quantised types come with their products");
    section
}

/// Rows that lie by expert, by counts on the device; weights `[H, I]` or transposed.
fn products() -> Section {
    let mut section = Section::new("grouped_gemm");
    for (dtype, tokens, transposed) in [
        (Dtype::F32, 96, false),
        (Dtype::F16, 96, false),
        (Dtype::Bf16, 96, true),
        (Dtype::Bf16, 0, true),
        (Dtype::Bf16, 0, false),
    ] {
        let name = format!("{dtype} rows={tokens} trans_b={transposed}");
        let point = name.clone();
        section.point(name, move || with_type!(dtype, T => product_point::<T>(&point, tokens, transposed)));
    }
    section
}

fn product_point<T: Storage>(name: &str, rows: usize, transposed: bool) {
    let (width, inner, experts) = (64, 256, 8);
    let rng = &mut rng(name);
    let mut ids: Vec<i32> = (0..rows).map(|_| rng.i32(0..experts as i32)).collect();
    ids.sort_unstable();
    let x: Vec<T> = normals(rng, rows * width, 0.02);
    let weight: Vec<T> = normals(rng, experts * width * inner, 0.02);
    let lists = groups(RowLayout::Counts { rows }, experts, 16, &bincount(&ids, experts));
    let layout = if transposed { Layout::Nk } else { Layout::Kn };
    let desc = GemmDesc::new(T::DTYPE, Rows::Grouped(lists.desc.shape()), inner, width)
        .weight(WeightDesc::new(T::DTYPE).layout(layout));
    let run = Product {
        desc,
        a: &x,
        weight: &weight,
        bias: None,
        lists: Some((&lists.stream, &lists.dispatched)),
        len: rows * inner,
    };
    let got = run.run();
    let (x, weight) = (wide(&x), wide(&weight));
    let at = |e: usize, n: usize, k: usize| {
        weight[e * width * inner + if transposed { n * width + k } else { k * inner + n }]
    };
    let want: Vec<f64> = (0..rows * inner)
        .map(|i| (i / inner, i % inner))
        .map(|(r, n)| (0..width).map(|k| x[r * width + k] * at(ids[r] as usize, n, k)).sum())
        .collect();
    assert_rounded(&wide(&got), &want, T::DTYPE);
}

/// The plan `d0_t exp(c_te) d1_e` whose rows add to 1/T and whose columns add to 1/E: that of ours is `softmax(c + v) / T`. The suite ends where `d1`
/// moves by less than 1e-4 on average; ours once columns are as equal as f32 tells.
fn sinkhorn() -> Section {
    let mut section = Section::new("sinkhorn");
    for (tokens, experts) in [(4096, 8), (8192, 8), (8192, 16)] {
        let name = format!("{tokens} x {experts}");
        let point = name.clone();
        section.point(name, move || {
            let rng = &mut rng(&point);
            let costs: Vec<f32> = (0..tokens * experts).map(|_| rng.f32()).collect();
            let potentials = wide32(&calls::sinkhorn(&costs, experts, 100, 1e-6));
            let costs = wide32(&costs);
            let exps: Vec<f64> = costs.iter().map(|c| c.exp()).collect();
            let (mut d0, mut d1) = (vec![1.0; tokens], vec![1.0; experts]);
            loop {
                for (row, d0) in exps.chunks(experts).zip(&mut d0) {
                    let sum: f64 = row.iter().zip(&d1).map(|(c, d)| c * d).sum();
                    *d0 = 1.0 / tokens as f64 / (sum + 1e-8);
                }
                let old = d1.clone();
                for (e, d1) in d1.iter_mut().enumerate() {
                    let sum: f64 = exps.chunks(experts).zip(&d0).map(|(row, d0)| row[e] * d0).sum();
                    *d1 = 1.0 / experts as f64 / (sum + 1e-8);
                }
                let moved: f64 = old.iter().zip(&d1).map(|(a, b)| (a - b).abs()).sum();
                if moved / experts as f64 <= 1e-4 {
                    break;
                }
            }
            for (t, row) in costs.chunks(experts).enumerate() {
                let moved: Vec<f64> = row.iter().zip(&potentials).map(|(c, v)| c + v).collect();
                for (e, share) in softmax(&moved).into_iter().enumerate() {
                    let (got, want) = (share / tokens as f64, d0[t] * exps[t * experts + e] * d1[e]);
                    assert!((got - want).abs() <= 1e-5 * want + 1e-8, "token {t}, expert {e}: {got:e}, want {want:e}");
                }
            }
        });
    }
    section
}
