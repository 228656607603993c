//! MegaBlocks, `tests/ops` and `tests/layers`: gathers and scatters, histograms, sorts, and layers with and without a capacity.
//!
//! Scaled down: 16384 and 1024 tokens to 160 and 128, rows of 1536 and 768 to 96 and 48, layers of 16384 tokens, hidden size 512 to 64 tokens of 64.

use half::{bf16, f16};
use moe_kernels::Dtype;
use moe_kernels::capacity::dispatch::DispatchDesc;
use moe_kernels::experts::permute::Unfilled;
use moe_kernels::layer::{LayerDesc, Mlp};
use moe_kernels::rules::{Activation, Capacity, Gating, Layout, Score, WeightDesc};

use crate::calls::{self, Experts};
use crate::close::{assert_choice, assert_layer, assert_rounded};
use crate::data::{rng, scores, values, wide, wide32};
use crate::formulas::{bincount, softmax, sorted_slots};
use crate::gradients;
use crate::suite::{Peer, Section, product};
use crate::support::compare::Storage;
use crate::support::inputs::normals;

pub fn peer() -> Peer {
    let suite =
        "`tests/ops`: padded and binned gather and scatter, histogram, sort; `tests/layers`: moe, dmoe, glu, gradients";
    let mut sections =
        vec![gather(true), scatter(true), gather(false), scatter(false), histogram(), sort(), moe(), dmoe()];
    sections.extend(gradients::layers::megablocks());
    sections.push(gradients::routers::megablocks());
    Peer { name: "MegaBlocks", suite, sections }
}

/// Tokens, width, experts, choices of the padded gather and scatter.
fn padded_shapes() -> Vec<[usize; 4]> {
    let mut shapes = vec![[4, 2, 2, 1], [4, 2, 2, 2]];
    for [tokens, width] in [[1024, 1], [1024, 1536], [16384, 768], [16384, 1]] {
        for (experts, top_k) in product(&[4, 64, 128], &[1, 2, 4]) {
            shapes.push([tokens, width, experts, top_k]);
        }
    }
    shapes
}

/// Those of the binned ones, which give every expert the same rows.
fn binned_shapes() -> Vec<[usize; 4]> {
    let mut shapes = vec![[4, 2, 2, 1], [4, 2, 2, 2], [4, 2, 2, 4]];
    for [tokens, width] in [[1024, 1536], [16384, 768]] {
        for (experts, top_k) in product(&[4, 64, 128], &[1, 2, 4]) {
            shapes.push([tokens, width, experts, top_k]);
        }
    }
    shapes
}

fn smaller([tokens, width, experts, top_k]: [usize; 4]) -> [usize; 4] {
    let tokens = [(1024, 128), (16384, 160)].iter().find(|(from, _)| *from == tokens).map_or(tokens, |to| to.1);
    [tokens, if width > 16 { width / 16 } else { width }, experts, top_k]
}

/// Rows by expert, each expert's on a multiple of 128 (padded) or as many as an even load (binned), the rest zero.
struct Rows {
    sorted: calls::Sorted,
    /// The slot of each row.
    slots: Vec<Option<usize>>,
}

fn rows(ids: &[i32], tokens: usize, experts: usize, top_k: usize, padded: bool) -> Rows {
    let desc = DispatchDesc::new(tokens, experts, top_k, 128);
    let even = tokens * top_k / experts;
    let desc =
        if padded { desc.row_multiple(128) } else { desc.capacity(Some(Capacity::new(even, tokens).padded(true))) };
    let sorted = calls::sort(ids, None, &desc);
    let all = sorted_slots(ids, experts);
    let mut slots = vec![];
    for e in 0..experts as i32 {
        let mut of: Vec<_> = all.iter().copied().filter(|&s| ids[s] == e).map(Some).collect();
        let rows = if padded { of.len().next_multiple_of(128) } else { even };
        of.resize(rows, None);
        slots.extend(of);
    }
    Rows { sorted, slots }
}

fn draw(name: &str, [tokens, width, experts, top_k]: [usize; 4]) -> (Vec<f16>, Vec<i32>, fastrand::Rng) {
    let mut rng = rng(name);
    let x = values(&mut rng, tokens * width);
    // With repeats: a token may have an expert twice.
    let ids = (0..tokens * top_k).map(|_| rng.i32(0..experts as i32)).collect();
    (x, ids, rng)
}

fn gather(padded: bool) -> Section {
    let mut section = Section::new(if padded { "padded_gather" } else { "binned_gather" });
    for shape in if padded { padded_shapes() } else { binned_shapes() } {
        let [tokens, width, experts, top_k] = smaller(shape);
        let name = format!("sl={} hs={} ne={experts} topk={top_k}", shape[0], shape[1]);
        let point = name.clone();
        section.point(name, move || {
            let (x, ids, _) = draw(&point, [tokens, width, experts, top_k]);
            let rows = rows(&ids, tokens, experts, top_k, padded);
            let got = rows.sorted.permute(&x, width, Unfilled::ZeroGaps);
            let row = |slot: &Option<usize>| {
                slot.map_or(vec![f16::ZERO; width], |s| x[s / top_k * width..][..width].to_vec())
            };
            assert!(got == rows.slots.iter().flat_map(row).collect::<Vec<_>>());
        });
    }
    section
}

fn scatter(padded: bool) -> Section {
    let mut section = Section::new(if padded { "padded_scatter" } else { "binned_scatter" });
    for shape in if padded { padded_shapes() } else { binned_shapes() } {
        let [tokens, width, experts, top_k] = smaller(shape);
        let name = format!("sl={} hs={} ne={experts} topk={top_k}", shape[0], shape[1]);
        let point = name.clone();
        section.point(name, move || {
            let (x, ids, mut rng) = draw(&point, [tokens, width, experts, top_k]);
            let rows = rows(&ids, tokens, experts, top_k, padded);
            let weights: Vec<f32> = ids.iter().map(|_| f16::from_f32(rng.f32()).to_f32()).collect();
            let moved = rows.sorted.permute(&x, width, Unfilled::ZeroGaps);
            let got = rows.sorted.unpermute(&moved, Some(&weights), width);
            let mut want = vec![0.0; tokens * width];
            for slot in rows.slots.iter().flatten() {
                let t = slot / top_k;
                let weight = f64::from(weights[*slot]);
                want[t * width..][..width].iter_mut().zip(&x[t * width..]).for_each(|(y, x)| *y += weight * x.to_f64());
            }
            assert_rounded(&wide(&got), &want, Dtype::F16);
        });
    }
    section
}

/// Counts of each of m rows of numbers.
fn histogram() -> Section {
    let mut section = Section::new("histogram");
    for (m, n) in product(&[1, 2, 8], &[32, 1024, 16384]) {
        for (bits, experts) in product(&[16, 32, 64], &[128, 1024]) {
            let name = format!("m={m} n={n} i{bits} max={experts}");
            let point = name.clone();
            section.point(name, move || {
                let rng = &mut rng(&point);
                for _ in 0..m {
                    let ids: Vec<i32> = (0..n).map(|_| rng.i32(0..experts as i32)).collect();
                    let want = bincount(&ids, experts);
                    if bits == 64 {
                        let wide: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
                        assert_eq!(calls::count_wide(&wide, experts), want);
                    } else {
                        // 16 bits are widened by the caller.
                        assert_eq!(calls::count(&ids, experts, 1).0, want);
                    }
                }
            });
        }
    }
    section
}

/// Numbers below 128 and their places, by a dispatch of one choice a token.
fn sort() -> Section {
    let mut section = Section::new("sort");
    for (n, bits) in product(&[32usize, 1024, 16384], &[16, 32, 64]) {
        let name = format!("n={n} i{bits} max=128");
        let point = name.clone();
        section.point(name, move || {
            let rng = &mut rng(&point);
            let ids: Vec<i32> = (0..n).map(|_| rng.i32(0..128)).collect();
            let sorted = calls::sort(&ids, None, &DispatchDesc::new(n, 128, 1, 16));
            let want: Vec<i32> = sorted_slots(&ids, 128).iter().map(|&slot| slot as i32).collect();
            assert_eq!(sorted.slot_token(), want);
        });
    }
    section.refuse(9, "sorts of numbers that are no experts");
    section
}

const LAYERS: [[usize; 2]; 13] =
    [[1, 1], [2, 1], [4, 1], [8, 1], [1, 1], [2, 1], [4, 1], [2, 2], [4, 2], [4, 4], [8, 2], [8, 4], [8, 8]];

/// GELU (tanh) between two matrices that are transposed, a capacity factor of 1: what an expert has no place for is dropped.
fn moe() -> Section {
    layers::<f16>("moe", Some(1.0), &LAYERS)
}

/// The same dropless, in blocks or as grouped products; one more with a narrower hidden size, and all with experts as wide as the hidden size
/// against the layer with a capacity that drops nothing.
fn dmoe() -> Section {
    let mut all = LAYERS.to_vec();
    all.push([1, 1]);
    layers::<bf16>("dmoe", None, &all)
}

fn layers<T: Storage>(name: &'static str, factor: Option<f64>, shapes: &[[usize; 2]]) -> Section {
    let mut section = Section::new(name);
    for (i, &[experts, top_k]) in shapes.iter().enumerate() {
        // Experts twice as wide as the hidden size, and as wide.
        for inner in [128, 64] {
            let name = format!("{i} ne={experts} topk={top_k} ffn={inner}");
            let point = name.clone();
            section.point(name, move || layer_point::<T>(&point, experts, top_k, inner, factor));
        }
    }
    section
}

fn layer_point<T: Storage>(name: &str, experts: usize, top_k: usize, inner: usize, factor: Option<f64>) {
    let (tokens, hidden) = (64, 64);
    let rng = &mut rng(name);
    let x: Vec<T> = values(rng, tokens * hidden);
    let up: Vec<T> = normals(rng, experts * hidden * inner, 0.1);
    let down: Vec<T> = normals(rng, experts * inner * hidden, 0.1);
    let logits = scores(rng, tokens * experts, T::DTYPE);
    let chosen = calls::gate(&logits, experts, top_k, Gating::new(Score::Softmax), None);
    let logits = wide32(&logits);
    let share = |t: usize| softmax(&logits[t * experts..][..experts]);
    assert_choice(&chosen, top_k, share, |t, ids| ids.iter().map(|&e| share(t)[e]).collect());

    let capacity = factor.map(|factor| (factor * (top_k * tokens) as f64 / experts as f64) as usize);
    let weight = WeightDesc::new(T::DTYPE).layout(Layout::Kn);
    let mlp = Mlp::relu(T::DTYPE).gate_up(weight).down(weight).activation(Activation::GeluTanh);
    let desc = LayerDesc::new(T::DTYPE, hidden, inner, experts, top_k)
        .mlp(mlp)
        .capacity(capacity.map(|capacity| Capacity::new(capacity, tokens)));
    let layer = Experts {
        desc,
        x: &x,
        chosen: &chosen,
        gate_up: &up,
        gate_up_bias: None,
        down: &down,
        down_bias: None,
        map: None,
    };
    let got = wide(&layer.run());
    let (x, up, down) = (wide(&x), wide(&up), wide(&down));
    let mut taken = vec![0; experts];
    let mut want = vec![0.0; tokens * hidden];
    for (slot, (&id, &weight)) in chosen.ids.iter().zip(&chosen.weights).enumerate() {
        let (t, e) = (slot / top_k, id as usize);
        taken[e] += 1;
        if capacity.is_some_and(|capacity| taken[e] > capacity) {
            continue;
        }
        let x = &x[t * hidden..][..hidden];
        let column = |w: &[f64], rows: usize, columns: usize, of: &[f64], n: usize| -> f64 {
            (0..rows).map(|k| w[e * rows * columns + k * columns + n] * of[k]).sum()
        };
        let h: Vec<f64> = (0..inner).map(|n| gelu_tanh(column(&up, hidden, inner, x, n))).collect();
        for n in 0..hidden {
            want[t * hidden + n] += f64::from(weight) * column(&down, inner, hidden, &h, n);
        }
    }
    assert_layer(&got, &want, T::DTYPE);
}

/// `v/2 (1 + tanh(sqrt(2/pi) (v + 0.044715 v^3)))`.
fn gelu_tanh(v: f64) -> f64 {
    0.5 * v * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (v + 0.044715 * v.powi(3))).tanh())
}
