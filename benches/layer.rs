//! The whole layer: time, launches, and what the host spends on enqueueing it.
//!
//! On the software device the shapes are scaled down ([`shapes`]) and a time is a time of the software, not of a GPU. The
//! host's time is measured with the device switched off (`softcuda` takes launches and executes nothing), so it includes
//! the software driver's own checks; goals: at most 5 launches, 15 µs.

#[path = "common/fill.rs"]
mod fill;
#[allow(dead_code)] // each bench uses its own part
#[path = "common/model.rs"]
mod model;
#[path = "common/shapes.rs"]
mod shapes;
#[path = "../tests/support/mod.rs"]
mod support;

use std::cell::OnceCell;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use model::Model;
use support::{counters, device};

fn forward(criterion: &mut Criterion) {
    let stream = device::stream();
    let soft = device::control().is_some();
    let mut group = criterion.benchmark_group(if soft { "layer on softcuda, scaled" } else { "layer" });
    group.sample_size(10).warm_up_time(std::time::Duration::from_millis(200));
    group.measurement_time(std::time::Duration::from_secs(1));
    for &shape in shapes::SHAPES {
        for &tokens in shape.tokens {
            // Named after the shape as published: scaled down, some would share a name.
            let name = BenchmarkId::new(shape.model, tokens);
            let title = format!("layer/{}/{tokens}", shape.model);
            let (shape, tokens) = if soft { shape.scaled(tokens) } else { (shape, tokens) };
            // Only what a filter leaves is made, when its turn comes.
            let model = OnceCell::new();
            let mut passes = None;
            group.bench_function(name, |bencher| {
                let passes = passes.get_or_insert_with(|| {
                    let model = model.get_or_init(|| Model::new(&stream, device::kernels(), &shape).expect("weights"));
                    let mut passes = model.passes(tokens, 1).expect("every published shape is supported");
                    counters::print(&title, || passes.layer(0).expect("a planned layer runs"));
                    let launches = passes.plan().launches();
                    assert!(launches <= 5, "{}: {launches} launches", shape.model);
                    passes
                });
                bencher.iter(|| {
                    passes.layer(0).expect("a planned layer runs");
                    stream.synchronize().expect("the layer runs to its end");
                })
            });
        }
    }
}

/// Time of the host for one layer of five launches. Needs the software device, which can be switched off.
fn host(criterion: &mut Criterion) {
    let stream = device::stream();
    let Some(control) = device::control() else {
        return println!("host time per layer: only on softcuda, which can be switched off");
    };
    let model = Model::new(&stream, device::kernels(), &shapes::SHAPES[0].scaled(1).0).expect("weights");
    let mut passes = model.passes(16, 1).expect("a plan");
    control.set_executing(false);
    criterion.bench_function("host time of 5 launches", |bencher| {
        bencher.iter(|| passes.layer(0).expect("a planned layer is enqueued"));
    });
    control.set_executing(true);
}

criterion_group!(layer, host, forward);
criterion_main!(layer);
