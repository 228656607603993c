//! Layers and their products.

use half::bf16;
use moe_kernels::Dtype;
use moe_kernels::capacity::dispatch::DispatchDesc;
use moe_kernels::experts::gemm::{GemmDesc, Rows, Strides};
use moe_kernels::layer::{LayerDesc, MapDesc};
use moe_kernels::rules::{Activation, Gating, Glu, Score, WeightDesc};

use crate::calls::{self, Chosen, Experts};
use crate::close::{assert_choice, assert_layer};
use crate::data::{rng, scores, wide, wide32};
use crate::formulas::{linear, silu, softmax};
use crate::products::Product;
use crate::suite::{Section, product};
use crate::support::inputs::normals;

/// Softmax of bf16 scores, the k largest not renormalised, with and without an expert map that knows some experts only, and with weights that are
/// views of rows 128 elements longer.
///
/// (tokens, I, H): (1, 128, 128), (1, 2048, 128), (33, 2048, 128), (32768, 2048, 511), (40000, 1024, 1024) become these.
pub fn fused_moe() -> Section {
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

/// An expert's output: `down (silu(gate x) * (up x))`, gate's rows before up's.
fn expert(x: &[f64], gate_up: &[f64], down: &[f64]) -> Vec<f64> {
    let projected = linear(x, gate_up);
    let (gate, up) = projected.split_at(projected.len() / 2);
    let h: Vec<f64> = gate.iter().zip(up).map(|(&g, u)| silu(g) * u).collect();
    linear(&h, down)
}
