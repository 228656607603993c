//! The whole layer: time, launches, and what the host spends on enqueueing it.
//!
//! On the software device the shapes are scaled down ([`shapes`]) and a time is a time of the software, not of a GPU. The
//! host's time is measured with the device switched off (`softcuda` takes launches and executes nothing), so it includes
//! the software driver's own checks; goals: at most 5 launches, 15 µs.

mod shapes;
#[path = "../tests/support/mod.rs"]
mod support;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use cudarc::driver::CudaSlice;
use half::bf16;
use moe_kernels::experts::Weight;
use moe_kernels::layer::{ExpertWeights, LayerArgs, LayerDesc, LayerPlan, LayerWeights, RouterWeights};
use moe_kernels::{Dtype, Workspace};
use support::{counters, device, inputs};

/// A layer with its weights on the device.
struct Layer {
    plan: LayerPlan,
    router: CudaSlice<bf16>,
    gate_up: CudaSlice<bf16>,
    down: CudaSlice<bf16>,
    x: CudaSlice<bf16>,
    y: CudaSlice<bf16>,
    workspace: Workspace,
}

impl Layer {
    fn new(shape: shapes::Shape, tokens: usize) -> Layer {
        let stream = device::stream();
        let kernels = device::kernels();
        let rng = &mut inputs::generator(shape.model);
        let shapes::Shape { experts, top_k, hidden, intermediate, .. } = shape;
        let desc = LayerDesc::new(Dtype::Bf16, hidden, intermediate, experts, top_k);
        let plan = desc.plan(tokens, kernels.device()).expect("every published shape is supported");
        kernels.preload(plan.kernels()).expect("kernels load");
        let mut values = |len: usize| {
            stream.clone_htod(&inputs::normals::<bf16>(rng, len, 0.1)).expect("the device holds the layer")
        };
        Layer {
            router: values(experts * hidden),
            gate_up: values(experts * 2 * intermediate * hidden),
            down: values(experts * hidden * intermediate),
            x: values(tokens * hidden),
            y: values(tokens * hidden),
            workspace: Workspace::new(&stream, plan.workspace_bytes()).expect("the device holds the workspace"),
            plan,
        }
    }

    fn enqueue(&mut self, stream: &std::sync::Arc<cudarc::driver::CudaStream>) {
        let experts = ExpertWeights::new(Weight::new(&self.gate_up), Weight::new(&self.down));
        let weights = LayerWeights::new(RouterWeights::new(&self.router), experts);
        let args = LayerArgs::new(&self.x, &mut self.y);
        self.plan
            .forward(device::kernels(), stream, &weights, args, &mut self.workspace)
            .expect("a planned layer runs");
    }
}

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
            let mut layer = Layer::new(shape, tokens);
            counters::print(&title, || layer.enqueue(&stream));
            assert!(layer.plan.launches() <= 5, "{}: {} launches", shape.model, layer.plan.launches());
            group.bench_function(name, |bencher| {
                bencher.iter(|| {
                    layer.enqueue(&stream);
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
    let mut layer = Layer::new(shapes::SHAPES[0].scaled(1).0, 16);
    control.set_executing(false);
    criterion.bench_function("host time of 5 launches", |bencher| bencher.iter(|| layer.enqueue(&stream)));
    control.set_executing(true);
}

criterion_group!(layer, host, forward);
criterion_main!(layer);
