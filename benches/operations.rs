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
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use moe_kernels::experts::combine::{self, CombineArgs, CombineDesc};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Rows};
use moe_kernels::experts::{Dispatched, Weight, tiles};
use moe_kernels::layer::Mlp;
use moe_kernels::routers::gating::{self, GatingArgs, GatingDesc};
use moe_kernels::routers::router::{self, RouterArgs, RouterDesc};
use moe_kernels::rules::{Gating, Score};
use moe_kernels::{Dtype, Workspace};
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
    let desc = RouterDesc::new(Dtype::Bf16, tokens, experts, hidden);
    bench("router", &mut || {
        let args = RouterArgs::new(&x, &router_weight, &mut logits);
        router::forward(kernels, &stream, &desc, args).unwrap()
    });

    let mut ids = stream.alloc_zeros::<i32>(tokens * top_k).unwrap();
    let mut weights = stream.alloc_zeros::<f32>(tokens * top_k).unwrap();
    let desc = GatingDesc::new(tokens, experts, top_k, Gating::new(Score::Softmax).renormalised());
    bench("gating", &mut || {
        let args = GatingArgs::new(&logits, &mut ids, &mut weights);
        gating::forward(kernels, &stream, &desc, args).unwrap()
    });

    let slots = tokens * top_k;
    let tile = tiles::select_tile(Dtype::Bf16, slots, experts, kernels.device()).unwrap();
    let desc = DispatchDesc::new(tokens, experts, top_k, tile.bm as usize);
    let rows = desc.shape();
    let mut workspace = Workspace::new(&stream, dispatch::workspace_bytes(&desc, kernels.device()).unwrap()).unwrap();
    let mut dispatched = Dispatched::new(&stream, &rows).unwrap();
    bench("dispatch", &mut || {
        let args = DispatchArgs::new(&ids, &mut dispatched, &mut workspace);
        dispatch::forward(kernels, &stream, &desc, args).unwrap()
    });

    let mlp = Mlp::swiglu(Dtype::Bf16);
    let mut h = stream.alloc_zeros::<bf16>(slots * intermediate).unwrap();
    let desc = GemmDesc::new(Dtype::Bf16, Rows::Grouped(rows), intermediate, hidden)
        .gather(true)
        .weight(mlp.gate_up)
        .activation(mlp.activation);
    bench("gemm 1", &mut || {
        let args = GemmArgs::new(&x, Weight::new(&gate_up), &mut h).dispatched(&dispatched);
        gemm::forward(kernels, &stream, &desc, args).unwrap()
    });

    let mut y_slots = stream.alloc_zeros::<bf16>(slots * hidden).unwrap();
    let desc = GemmDesc::new(Dtype::Bf16, Rows::Grouped(rows), hidden, intermediate).weight(mlp.down);
    bench("gemm 2", &mut || {
        let args = GemmArgs::new(&h, Weight::new(&down), &mut y_slots).dispatched(&dispatched);
        gemm::forward(kernels, &stream, &desc, args).unwrap()
    });

    let mut y = stream.alloc_zeros::<bf16>(tokens * hidden).unwrap();
    let desc = CombineDesc::new(Dtype::Bf16, rows, hidden);
    bench("combine", &mut || {
        let args = CombineArgs::new(&y_slots, &dispatched, &mut y).weights(&weights);
        combine::forward(kernels, &stream, &desc, args).unwrap()
    });
}

criterion_group!(benches, operations);
criterion_main!(benches);
