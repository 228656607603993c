//! Each operation alone, over the shapes of models in use.
//!
//! On the software device the shapes are scaled down ([`shapes`]) and a time is a time of the software, not of a GPU; what one
//! launch of each case did is printed before its times.

mod shapes;
#[path = "../tests/support/mod.rs"]
mod support;

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use half::bf16;
use moe_kernels::Workspace;
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc, DispatchOutputs, TileList};
use moe_kernels::experts::combine::{self, CombineArgs, CombineDesc};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Schedule, Tiles};
use moe_kernels::experts::tiles;
use moe_kernels::routers::gating::{self, GatingArgs, GatingDesc};
use moe_kernels::routers::router::{self, RouterArgs, RouterDesc};
use moe_kernels::rules::Activation;
use moe_kernels::rules::Dtype;
use moe_kernels::rules::Gating;
use moe_kernels::rules::{Glu, Layout, Score};
use support::{counters, device, inputs};

/// Runs every operation of a layer once, each under its own name, on the data that the one before it made.
fn operations(criterion: &mut Criterion) {
    let soft = device::control().is_some();
    for &shape in shapes::SHAPES {
        for &tokens in shape.tokens {
            // Named after the shape as published: scaled down, some would share a name.
            let name = format!("{}/{tokens}", shape.model);
            let (shape, tokens) = if soft { shape.scaled(tokens) } else { (shape, tokens) };
            one_shape(criterion, &name, shape, tokens, if soft { " on softcuda, scaled" } else { "" });
        }
    }
}

fn one_shape(criterion: &mut Criterion, name: &str, shape: shapes::Shape, tokens: usize, suffix: &str) {
    let stream = device::stream();
    let kernels = device::kernels();
    let rng = &mut inputs::generator(shape.model);
    let shapes::Shape { experts, top_k, hidden, intermediate, .. } = shape;
    let mut bench = |operation: &str, launch: &mut dyn FnMut()| {
        counters::print(&format!("{operation}{suffix}/{name}"), &mut *launch);
        let mut group = criterion.benchmark_group(format!("{operation}{suffix}"));
        group.sample_size(10).warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(500));
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                launch();
                stream.synchronize().expect("the operation runs to its end");
            })
        });
    };
    let mut values = |len: usize| stream.clone_htod(&inputs::normals::<bf16>(rng, len, 0.1)).unwrap();
    let (x, router_weight) = (values(tokens * hidden), values(experts * hidden));
    let (gate_up, down) = (values(experts * 2 * intermediate * hidden), values(experts * hidden * intermediate));

    let mut logits = stream.alloc_zeros::<f32>(tokens * experts).unwrap();
    let desc = RouterDesc { x: Dtype::Bf16, weight: Dtype::Bf16, tokens, experts, hidden };
    bench("router", &mut || {
        let args = RouterArgs { x: &x, weight: &router_weight, bias: None, logits: &mut logits };
        router::forward(kernels, &stream, &desc, args).unwrap()
    });

    let mut ids = stream.alloc_zeros::<i32>(tokens * top_k).unwrap();
    let mut weights = stream.alloc_zeros::<f32>(tokens * top_k).unwrap();
    let desc = GatingDesc { tokens, experts, top_k, gating: Gating::new(Score::Softmax).renormalised() };
    bench("gating", &mut || {
        let args = GatingArgs { logits: &logits, correction_bias: None, ids: &mut ids, weights: &mut weights };
        gating::forward(kernels, &stream, &desc, args).unwrap()
    });

    let slots = tokens * top_k;
    let tile = tiles::select_tile(Dtype::Bf16, slots, experts, kernels.device()).unwrap();
    let tile_m = tile.bm as usize;
    let desc = DispatchDesc { tokens, experts, top_k, capacity: None, tile_m };
    let max_tiles = desc.max_tiles();
    let mut workspace = Workspace::new(&stream, dispatch::workspace_bytes(&desc, kernels.device()).unwrap()).unwrap();
    let mut counts = stream.alloc_zeros(experts).unwrap();
    let mut offsets = stream.alloc_zeros(experts + 1).unwrap();
    let mut slot_token = stream.alloc_zeros(slots).unwrap();
    let mut token_slot = stream.alloc_zeros(slots).unwrap();
    let mut list = stream.alloc_zeros(max_tiles).unwrap();
    let mut num_tiles = stream.alloc_zeros(1).unwrap();
    bench("dispatch", &mut || {
        let outputs = DispatchOutputs {
            counts: &mut counts,
            offsets: &mut offsets,
            slot_token: &mut slot_token,
            token_slot: &mut token_slot,
            slot_weight: None,
            tiles: Some(TileList { tiles: &mut list, num_tiles: &mut num_tiles }),
        };
        let args = DispatchArgs { ids: &ids, weights: None, outputs, workspace: &mut workspace };
        dispatch::forward(kernels, &stream, &desc, args).unwrap()
    });

    let schedule = Schedule::Grouped { tile_m, max_tiles };
    let mut h = stream.alloc_zeros::<bf16>(slots * intermediate).unwrap();
    let first = GemmDesc {
        dtype: Dtype::Bf16,
        rows: slots,
        a_rows: tokens,
        experts,
        n: intermediate,
        k: hidden,
        glu: Glu::Split,
        activation: Activation::Silu,
        layout: Layout::Nk,
        schedule,
    };
    bench("gemm 1", &mut || {
        let args = GemmArgs {
            a: &x,
            b: &gate_up,
            bias: None,
            slot_token: Some(&slot_token),
            row_scale: None,
            tiles: Some(Tiles { tiles: &list, num_tiles: &num_tiles }),
            out: &mut h,
        };
        gemm::forward(kernels, &stream, &first, args).unwrap()
    });

    let mut y_slots = stream.alloc_zeros::<bf16>(slots * hidden).unwrap();
    let second = GemmDesc {
        a_rows: slots,
        n: hidden,
        k: intermediate,
        glu: Glu::None,
        activation: Activation::Identity,
        ..first
    };
    bench("gemm 2", &mut || {
        let args = GemmArgs {
            a: &h,
            b: &down,
            bias: None,
            slot_token: None,
            row_scale: None,
            tiles: Some(Tiles { tiles: &list, num_tiles: &num_tiles }),
            out: &mut y_slots,
        };
        gemm::forward(kernels, &stream, &second, args).unwrap()
    });

    let mut y = stream.alloc_zeros::<bf16>(tokens * hidden).unwrap();
    let desc = CombineDesc { dtype: Dtype::Bf16, tokens, top_k, hidden, slots };
    bench("combine", &mut || {
        let args = CombineArgs {
            y_slots: &y_slots,
            token_slot: &token_slot,
            weights: Some(&weights),
            residual: None,
            addend: None,
            y: &mut y,
        };
        combine::forward(kernels, &stream, &desc, args).unwrap()
    });
}

criterion_group!(benches, operations);
criterion_main!(benches);
