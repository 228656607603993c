//! The routers beyond softmax top-k, over the shapes of models in use.
//!
//! On the software device the shapes are scaled down ([`shapes`]) and a time is a time of the software, not of a GPU. There each
//! time stands below what one launch did by the device's counters.

#[path = "common/fill.rs"]
mod fill;
#[path = "common/shapes.rs"]
mod shapes;
#[path = "../tests/support/mod.rs"]
mod support;

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use cudarc::driver::CudaStream;
use moe_kernels::capacity::admission::{self, AdmissionArgs, AdmissionDesc};
use moe_kernels::capacity::expert_map::{self, ExpertMapArgs, ExpertMapDesc};
use moe_kernels::capacity::token_slots::{self, TokenSlotsArgs, TokenSlotsDesc};
use moe_kernels::routers::affinity::{self, AffinityArgs, AffinityDesc};
use moe_kernels::routers::base::{self, BaseArgs, BaseDesc};
use moe_kernels::routers::expert_choice::{self, ExpertChoiceArgs, ExpertChoiceDesc};
use moe_kernels::routers::gating::{self, GatingArgs, GatingDesc};
use moe_kernels::routers::hash::{self, HashArgs, HashBy, HashDesc};
use moe_kernels::routers::hierarchical::{self, HierarchicalArgs, HierarchicalDesc, PrimaryOutputs};
use moe_kernels::routers::jitter::{self, JitterArgs, JitterDesc};
use moe_kernels::routers::measured_gating::{self, MeasuredGatingArgs, MeasuredGatingDesc, Totals};
use moe_kernels::routers::noisy::{self, NoisyArgs, NoisyDesc, NoisyLogits, NoisySums};
use moe_kernels::routers::sampled::{self, SampledArgs, SampledDesc};
use moe_kernels::routers::sinkhorn::{self, SinkhornArgs, SinkhornDesc};
use moe_kernels::routers::update_bias::{self, UpdateBiasArgs, UpdateBiasDesc};
use moe_kernels::rules::{
    self, AdmissionRule, Affinity, AuctionRule, Gating, NoiseSource, NoisyRule, Order, SamplingRule, Score,
    SecondExpert,
};
use moe_kernels::{Dtype, Workspace};
use support::{device, inputs};

fn routers(criterion: &mut Criterion) {
    let soft = device::control().is_some();
    for &shape in shapes::SHAPES.iter().filter(|shape| shapes::asked_for(shape.model)) {
        for &tokens in shape.tokens {
            let (shape, tokens) = if soft { shape.scaled(tokens) } else { (shape, tokens) };
            one_shape(criterion, shape, tokens, if soft { " on softcuda, scaled" } else { "" });
        }
    }
}

/// What one launch does, kernel by kernel: sectors of global memory and wavefronts of shared memory beside the fewest that the same
/// accesses could need.
fn print_counters(name: &str, stream: &CudaStream, launch: &mut dyn FnMut()) {
    let Some(control) = device::control() else { return };
    control.set_counting(true);
    launch();
    stream.synchronize().expect("the router runs to its end");
    for (kernel, counters) in control.counters() {
        let instructions: u64 = counters.warp_instructions.iter().sum();
        let (global, shared) = (counters.global, counters.shared);
        println!(
            "{name}: {kernel}: {instructions} instructions of {} warps, {} sectors ({} ideal), {} wavefronts ({} ideal)",
            counters.warps, global.sectors, global.ideal_sectors, shared.wavefronts, shared.ideal_wavefronts
        );
    }
    control.set_counting(false);
}

fn one_shape(criterion: &mut Criterion, shape: shapes::Shape, tokens: usize, suffix: &str) {
    let stream = device::stream();
    let kernels = device::kernels();
    let rng = &mut inputs::generator(shape.model);
    let shapes::Shape { model, experts, top_k, .. } = shape;
    let mut bench = |router: &str, launch: &mut dyn FnMut()| {
        print_counters(&format!("{router}{suffix}/{model}/{tokens}"), &stream, launch);
        let mut group = criterion.benchmark_group(format!("{router}{suffix}"));
        group.sample_size(10).warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(500));
        group.bench_function(BenchmarkId::new(model, tokens), |bencher| {
            bencher.iter(|| {
                launch();
                stream.synchronize().expect("the router runs to its end");
            })
        });
    };
    let logits = fill::values::<f32>(&stream, kernels, tokens * experts, 1.0, 1).unwrap();

    let score = if model == "deepseek-v3" { Score::Sigmoid } else { Score::Softmax };
    let gated = GatingDesc::new(tokens, experts, top_k, Gating::new(score));
    let mut chosen_ids = stream.alloc_zeros(tokens * top_k).unwrap();
    let mut shares = stream.alloc_zeros(tokens * top_k).unwrap();
    bench("gating", &mut || {
        let args = GatingArgs::new(&logits, &mut chosen_ids, &mut shares);
        gating::forward(kernels, &stream, &gated, args).unwrap()
    });
    let desc = MeasuredGatingDesc::new(gated);
    let [counts, loss_counts] = &mut [experts; 2].map(|len| stream.alloc_zeros(len).unwrap());
    let [probability, importance] = &mut [experts; 2].map(|len| stream.alloc_zeros(len).unwrap());
    let mut stats = stream.alloc_zeros(1).unwrap();
    let bytes = measured_gating::workspace_bytes(&desc, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    bench("gating with losses and statistics", &mut || {
        let totals = Totals::new(&mut *counts, &mut *loss_counts, &mut *probability, &mut *importance);
        let (ids, weights) = (&mut chosen_ids, &mut shares);
        let args = MeasuredGatingArgs::new(&logits, ids, weights, totals, &mut stats, &mut workspace);
        measured_gating::forward(kernels, &stream, &desc, args).unwrap()
    });
    let mut correction = stream.alloc_zeros(experts).unwrap();
    let step = UpdateBiasDesc::new(experts, 1e-3);
    bench("bias update", &mut || {
        let args = UpdateBiasArgs::new(&*counts, &mut correction);
        update_bias::forward(kernels, &stream, &step, args).unwrap()
    });
    // Half of the experts are here; the others are another device's.
    let map: Vec<i32> = (0..experts as i32).map(|e| if e % 2 == 0 { e / 2 } else { rules::NONE }).collect();
    let map = stream.clone_htod(&map).unwrap();
    let desc = ExpertMapDesc::new(tokens, experts, top_k);
    let mut local_ids = stream.alloc_zeros(tokens * top_k).unwrap();
    bench("expert map", &mut || {
        let args = ExpertMapArgs::new(&chosen_ids, &map, &mut local_ids);
        expert_map::forward(kernels, &stream, &desc, args).unwrap()
    });

    let candidates = 2.min(experts);
    let mut ids = stream.alloc_zeros(tokens * candidates).unwrap();
    let mut weights = stream.alloc_zeros(tokens * candidates).unwrap();
    let desc = GatingDesc::new(tokens, experts, candidates, Gating::new(Score::Softmax).renormalised());
    let args = GatingArgs::new(&logits, &mut ids, &mut weights);
    gating::forward(kernels, &stream, &desc, args).unwrap();
    let mut admitted = stream.alloc_zeros(tokens * candidates).unwrap();
    let mut admitted_weights = stream.alloc_zeros(tokens * candidates).unwrap();
    for (name, prioritised) in [("GShard admission", false), ("V-MoE admission", true)] {
        let second = SecondExpert::gshard(NoiseSource::new(1, 0));
        let group = tokens.min(2048);
        let capacity = rules::capacity(group, experts, candidates, 1.25);
        let rule = AdmissionRule::new(experts, candidates, capacity, group)
            .order(Order::ByChoice)
            .prioritised(prioritised)
            .second(if candidates == 2 { second } else { SecondExpert::Always });
        let desc = AdmissionDesc::new(tokens, rule);
        let mut workspace = Workspace::new(&stream, admission::workspace_bytes(&desc).unwrap()).unwrap();
        bench(name, &mut || {
            let args = AdmissionArgs::new(&ids, &weights, &mut admitted, &mut admitted_weights, &mut workspace);
            admission::forward(kernels, &stream, &desc, args).unwrap()
        });
    }

    let capacity = rules::capacity(tokens, experts, top_k, 1.0).min(tokens);
    let mut affinities = stream.alloc_zeros(tokens * experts).unwrap();
    let desc = AffinityDesc::new(tokens, experts, Affinity::Softmax);
    bench("affinity", &mut || {
        affinity::forward(kernels, &stream, &desc, AffinityArgs::new(&logits, &mut affinities)).unwrap()
    });
    let desc = ExpertChoiceDesc::new(tokens, experts, capacity);
    let mut slot_token = stream.alloc_zeros(desc.slots()).unwrap();
    bench("expert choice", &mut || {
        expert_choice::forward(kernels, &stream, &desc, ExpertChoiceArgs::new(&affinities, &mut slot_token)).unwrap()
    });
    let lists = TokenSlotsDesc::new(tokens, desc.slots());
    let mut offsets = stream.alloc_zeros(tokens + 1).unwrap();
    let mut slots = stream.alloc_zeros(desc.slots()).unwrap();
    let bytes = token_slots::workspace_bytes(&lists, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    bench("token slots", &mut || {
        let args = TokenSlotsArgs::new(&slot_token, &mut offsets, &mut slots, &mut workspace);
        token_slots::forward(kernels, &stream, &lists, args).unwrap()
    });

    let mut status = stream.alloc_zeros(2).unwrap();
    if tokens.is_multiple_of(experts) {
        let desc = BaseDesc::new(tokens, AuctionRule::new(experts, 0.01, 1 << 16));
        let mut workspace = Workspace::new(&stream, base::workspace_bytes(&desc).unwrap()).unwrap();
        let mut ids = stream.alloc_zeros(tokens).unwrap();
        bench("BASE", &mut || {
            let args = BaseArgs::new(&logits, &mut ids, &mut status, &mut workspace);
            base::forward(kernels, &stream, &desc, args).unwrap()
        });
    }

    let desc = SinkhornDesc::new(tokens, experts, 1, 10, -1.0);
    let bytes = sinkhorn::workspace_bytes(&desc, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    let mut potentials = stream.alloc_zeros(experts).unwrap();
    bench("S-BASE, 10 iterations", &mut || {
        let args = SinkhornArgs::new(&logits, &mut ids, &mut potentials, &mut status, &mut workspace);
        sinkhorn::forward(kernels, &stream, &desc, args).unwrap()
    });

    let noise = NoiseSource::new(1, 0);
    let raw = fill::values::<f32>(&stream, kernels, tokens * experts, 1.0, 2).unwrap();
    let mut chosen = stream.alloc_zeros(tokens * top_k).unwrap();
    let mut chosen_weights = stream.alloc_zeros(tokens * top_k).unwrap();
    let desc = NoisyDesc::new(tokens, experts, NoisyRule::new(top_k, noise));
    let mut workspace = Workspace::new(&stream, noisy::workspace_bytes(&desc, kernels.device()).unwrap()).unwrap();
    let mut counts = stream.alloc_zeros(experts).unwrap();
    let [importance, load, losses] = &mut [experts, experts, 2].map(|len| stream.alloc_zeros(len).unwrap());
    for (name, summed) in [("noisy top-k", false), ("noisy top-k with losses", true)] {
        bench(name, &mut || {
            let mut args = NoisyArgs::new(NoisyLogits::apart(&logits, &raw), &mut chosen, &mut chosen_weights);
            if summed {
                let sums = NoisySums::new(&mut counts, &mut *importance, &mut *load, &mut *losses);
                args = args.sums(sums, &mut workspace);
            }
            noisy::forward(kernels, &stream, &desc, args).unwrap()
        });
    }

    // The same experts in groups of about 16, two groups a token.
    let groups = (experts / 16).max(2);
    let secondary = NoisyRule::new(top_k.div_ceil(2).min(experts / groups), noise);
    let desc = HierarchicalDesc::new(tokens, groups, experts / groups, NoisyRule::new(2, noise), secondary);
    let group_logits = fill::values::<f32>(&stream, kernels, tokens * groups * 2, 1.0, 3).unwrap();
    let bytes = hierarchical::workspace_bytes(&desc, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    let [group_ids, group_counts, slot_ids, all_counts] =
        &mut [2 * tokens, groups, 2 * tokens * secondary.top_k, experts].map(|len| stream.alloc_zeros(len).unwrap());
    let [group_weights, group_importance, group_load, group_losses, slot_weights] =
        &mut [2 * tokens, groups, groups, 2, 2 * tokens * secondary.top_k].map(|len| stream.alloc_zeros(len).unwrap());
    bench("hierarchical", &mut || {
        let group_sums =
            NoisySums::new(&mut *group_counts, &mut *group_importance, &mut *group_load, &mut *group_losses);
        let primary = PrimaryOutputs::new(&mut *group_ids, &mut *group_weights, group_sums);
        let (group_logits, logits) = (NoisyLogits::together(&group_logits), NoisyLogits::apart(&logits, &raw));
        let sums = NoisySums::new(&mut *all_counts, &mut *importance, &mut *load, &mut *losses);
        let (ids, weights) = (&mut *slot_ids, &mut *slot_weights);
        let args = HierarchicalArgs::new(group_logits, logits, primary, ids, weights, sums, &mut workspace);
        hierarchical::forward(kernels, &stream, &desc, args).unwrap()
    });

    let desc = SampledDesc::new(tokens, experts, SamplingRule::new(top_k, noise));
    let mut log_probabilities = stream.alloc_zeros(tokens * top_k).unwrap();
    let mut entropy = stream.alloc_zeros(tokens).unwrap();
    bench("sampled", &mut || {
        let args = SampledArgs::new(&logits, &mut chosen, &mut chosen_weights)
            .log_probabilities(&mut log_probabilities)
            .entropy(&mut entropy);
        sampled::forward(kernels, &stream, &desc, args).unwrap()
    });

    let x = fill::values::<half::bf16>(&stream, kernels, tokens * shape.hidden, 1.0, 4).unwrap();
    let mut y = stream.alloc_zeros::<half::bf16>(tokens * shape.hidden).unwrap();
    let desc = JitterDesc::new(Dtype::Bf16, tokens * shape.hidden, 0.01, noise);
    bench("jitter", &mut || jitter::forward(kernels, &stream, &desc, JitterArgs::new(&x, &mut y)).unwrap());

    let words: Vec<i32> = (0..tokens).map(|_| rng.i32(0..50_000)).collect();
    let words = stream.clone_htod(&words).unwrap();
    let desc = HashDesc::new(tokens, experts, 1, HashBy::Mix { seed: 1 });
    bench("hash", &mut || hash::forward(kernels, &stream, &desc, HashArgs::new(&words, &mut ids)).unwrap());
}

criterion_group!(benches, routers);
criterion_main!(benches);
