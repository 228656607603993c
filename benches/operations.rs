//! Each operation alone, over the shapes of models in use.
//!
//! On the software device the shapes are scaled down ([`shapes`]) and a time is a time of the software, not of a GPU; what one
//! launch of each case did is printed before its times.

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
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use model::{Model, Operation, Passes};
use support::{counters, device};

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
    // Only what a filter leaves is made, when its turn comes.
    let model = OnceCell::new();
    let mut passes = None;
    let operations: [(&str, Operation<'_>); 6] = [
        ("router", Passes::router),
        ("gating", Passes::gating),
        ("dispatch", Passes::dispatch),
        ("gate_up", Passes::gate_up),
        ("down", Passes::down),
        ("combine", Passes::combine),
    ];
    for (operation, pass) in operations {
        let mut group = criterion.benchmark_group(format!("{operation}{suffix}"));
        group.sample_size(10).warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(500));
        let mut counted = false;
        group.bench_function(name, |bencher| {
            let passes = passes.get_or_insert_with(|| {
                let model = model.get_or_init(|| Model::new(&stream, device::kernels(), &shape).expect("weights"));
                let mut passes = model.passes(tokens, 1).expect("every published shape is supported");
                passes.sound().expect("the operations agree with the layer");
                passes
            });
            if !std::mem::replace(&mut counted, true) {
                let launch = || pass(passes, 0).expect("the operation is enqueued");
                counters::print(&format!("{operation}{suffix}/{name}"), launch);
            }
            bencher.iter(|| {
                pass(passes, 0).expect("the operation is enqueued");
                stream.synchronize().expect("the operation runs to its end");
            })
        });
    }
}

criterion_group!(benches, operations);
criterion_main!(benches);
