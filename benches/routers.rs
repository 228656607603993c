//! The routers beyond softmax top-k, over the shapes of models in use.
//!
//! On the software device the shapes are scaled down ([`shapes`]) and a time is a time of the software, not of a GPU. There each
//! time stands below what one launch did by the device's counters.

mod shapes;
#[path = "../tests/support/mod.rs"]
mod support;

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use cudarc::driver::CudaStream;
use moe_kernels::Workspace;
use moe_kernels::capacity::admission::{self, AdmissionArgs, AdmissionDesc};
use moe_kernels::capacity::expert_map::{self, ExpertMapArgs, ExpertMapDesc};
use moe_kernels::routers::balance::{self, BiasDesc, MeasureDesc, MeasuredArgs, Totals};
use moe_kernels::routers::base::{self, BaseArgs, BaseDesc};
use moe_kernels::routers::expert_choice::{self, ChoiceArgs, ExpertChoiceDesc, TokenSlotsArgs, TokenSlotsDesc};
use moe_kernels::routers::gating::{self, GatingArgs, GatingDesc};
use moe_kernels::routers::hash::{self, HashArgs, HashBy, HashDesc};
use moe_kernels::routers::hierarchical::{self, HierarchicalArgs, HierarchicalDesc, PrimaryOutputs};
use moe_kernels::routers::jitter::{self, JitterDesc};
use moe_kernels::routers::noisy::{self, NoisyArgs, NoisyDesc, NoisyLogits, NoisySums};
use moe_kernels::routers::sampled::{self, SampledArgs, SampledDesc};
use moe_kernels::routers::sinkhorn::{self, SinkhornArgs, SinkhornDesc};
use moe_kernels::rules::Affinity;
use moe_kernels::rules::AuctionRule;
use moe_kernels::rules::Dtype;
use moe_kernels::rules::Gating;
use moe_kernels::rules::NoisyRule;
use moe_kernels::rules::SamplingRule;
use moe_kernels::rules::Score;
use moe_kernels::rules::{AdmissionRule, NoiseSource, Order, SecondExpert};
use support::{device, inputs};

fn routers(criterion: &mut Criterion) {
    let soft = device::control().is_some();
    for &shape in shapes::SHAPES {
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
    let logits = stream.clone_htod(&inputs::normals::<f32>(rng, tokens * experts, 1.0)).unwrap();

    let score = if model == "deepseek-v3" { Score::Sigmoid } else { Score::Softmax };
    let gated = GatingDesc { tokens, experts, top_k, gating: Gating::new(score) };
    let mut chosen_ids = stream.alloc_zeros(tokens * top_k).unwrap();
    let mut shares = stream.alloc_zeros(tokens * top_k).unwrap();
    bench("gating", &mut || {
        let args = GatingArgs { logits: &logits, correction_bias: None, ids: &mut chosen_ids, weights: &mut shares };
        gating::forward(kernels, &stream, &gated, args).unwrap()
    });
    let desc = MeasureDesc::new(gated);
    let [counts, loss_counts] = &mut [experts; 2].map(|len| stream.alloc_zeros(len).unwrap());
    let [probability, importance] = &mut [experts; 2].map(|len| stream.alloc_zeros(len).unwrap());
    let mut stats = stream.alloc_zeros(1).unwrap();
    let bytes = balance::workspace_bytes(&desc, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    bench("gating with losses and statistics", &mut || {
        let args = MeasuredArgs {
            logits: &logits,
            correction_bias: None,
            ids: &mut chosen_ids,
            weights: &mut shares,
            log_sum_exp: None,
            probabilities: None,
            totals: Totals { counts, loss_counts, probability, importance },
            stats: &mut stats,
            workspace: &mut workspace,
        };
        balance::forward(kernels, &stream, &desc, args).unwrap()
    });
    let mut correction = stream.alloc_zeros(experts).unwrap();
    let step = BiasDesc { experts, rate: 1e-3 };
    bench("bias update", &mut || balance::update_bias(kernels, &stream, &step, counts, &mut correction).unwrap());
    // Half of the experts are here; the others are another device's.
    let map: Vec<i32> = (0..experts as i32).map(|e| if e % 2 == 0 { e / 2 } else { rules::NONE }).collect();
    let map = stream.clone_htod(&map).unwrap();
    let desc = ExpertMapDesc { tokens, experts, top_k, max_replicas: 1, seed: 0 };
    let mut local_ids = stream.alloc_zeros(tokens * top_k).unwrap();
    bench("expert map", &mut || {
        let args = ExpertMapArgs {
            ids: &chosen_ids,
            weights: None,
            map: &map,
            replicas: None,
            local_ids: &mut local_ids,
            identity_weight: None,
        };
        expert_map::forward(kernels, &stream, &desc, args).unwrap()
    });

    let candidates = 2.min(experts);
    let mut ids = stream.alloc_zeros(tokens * candidates).unwrap();
    let mut weights = stream.alloc_zeros(tokens * candidates).unwrap();
    let gating = Gating { renormalise: true, ..Gating::new(Score::Softmax) };
    let desc = GatingDesc { tokens, experts, top_k: candidates, gating };
    let args = GatingArgs { logits: &logits, correction_bias: None, ids: &mut ids, weights: &mut weights };
    gating::forward(kernels, &stream, &desc, args).unwrap();
    let mut admitted = stream.alloc_zeros(tokens * candidates).unwrap();
    let mut admitted_weights = stream.alloc_zeros(tokens * candidates).unwrap();
    for (name, prioritised) in [("GShard admission", false), ("V-MoE admission", true)] {
        let noise = NoiseSource { seed: 1, offset: 0 };
        let second = SecondExpert::Random { threshold: 0.5, noise };
        let group = tokens.min(2048);
        let rule = AdmissionRule {
            experts,
            candidates,
            top_k: candidates,
            capacity: rules::capacity(group, experts, candidates, 1.25),
            tokens_per_group: group,
            order: Order::ByChoice,
            prioritised,
            second: if candidates == 2 { second } else { SecondExpert::Always },
        };
        let desc = AdmissionDesc { tokens, rule };
        let mut workspace = Workspace::new(&stream, admission::workspace_bytes(&desc).unwrap()).unwrap();
        bench(name, &mut || {
            let args = AdmissionArgs {
                ids: &ids,
                weights: &weights,
                priority: None,
                admitted: &mut admitted,
                admitted_weights: &mut admitted_weights,
                workspace: &mut workspace,
            };
            admission::forward(kernels, &stream, &desc, args).unwrap()
        });
    }

    let capacity = rules::capacity(tokens, experts, top_k, 1.0).min(tokens);
    let desc = ExpertChoiceDesc { tokens, experts, capacity };
    let mut affinities = stream.alloc_zeros(tokens * experts).unwrap();
    bench("affinity", &mut || {
        expert_choice::affinity(kernels, &stream, &desc, Affinity::Softmax, &logits, &mut affinities).unwrap()
    });
    let mut slot_token = stream.alloc_zeros(desc.slots()).unwrap();
    bench("expert choice", &mut || {
        let args = ChoiceArgs { affinities: &affinities, slot_token: &mut slot_token, slot_weight: None };
        expert_choice::choose(kernels, &stream, &desc, args).unwrap()
    });
    let lists = TokenSlotsDesc { tokens, slots: desc.slots() };
    let mut offsets = stream.alloc_zeros(tokens + 1).unwrap();
    let mut slots = stream.alloc_zeros(desc.slots()).unwrap();
    let bytes = expert_choice::token_slots_workspace_bytes(&lists, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    bench("token slots", &mut || {
        let args = TokenSlotsArgs {
            slot_token: &slot_token,
            offsets: &mut offsets,
            slots: &mut slots,
            workspace: &mut workspace,
        };
        expert_choice::token_slots(kernels, &stream, &lists, args).unwrap()
    });

    let mut status = stream.alloc_zeros(2).unwrap();
    if tokens.is_multiple_of(experts) {
        let desc = BaseDesc { tokens, rule: AuctionRule { experts, epsilon: 0.01, max_rounds: 1 << 16 } };
        let mut workspace = Workspace::new(&stream, base::workspace_bytes(&desc).unwrap()).unwrap();
        let mut ids = stream.alloc_zeros(tokens).unwrap();
        bench("BASE", &mut || {
            let args = BaseArgs {
                scores: &logits,
                ids: &mut ids,
                weights: None,
                status: &mut status,
                workspace: &mut workspace,
            };
            base::forward(kernels, &stream, &desc, args).unwrap()
        });
    }

    let desc = SinkhornDesc { tokens, experts, top_k: 1, iterations: 10, tolerance: -1.0 };
    let bytes = sinkhorn::workspace_bytes(&desc, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    let mut potentials = stream.alloc_zeros(experts).unwrap();
    bench("S-BASE, 10 iterations", &mut || {
        let args = SinkhornArgs {
            logits: &logits,
            ids: &mut ids,
            weights: None,
            potentials: &mut potentials,
            status: &mut status,
            workspace: &mut workspace,
        };
        sinkhorn::forward(kernels, &stream, &desc, args).unwrap()
    });

    let noise = NoiseSource { seed: 1, offset: 0 };
    let raw = stream.clone_htod(&inputs::normals::<f32>(rng, tokens * experts, 1.0)).unwrap();
    let mut chosen = stream.alloc_zeros(tokens * top_k).unwrap();
    let mut chosen_weights = stream.alloc_zeros(tokens * top_k).unwrap();
    let rule = NoisyRule { top_k, noise_epsilon: 1e-2, noise };
    let desc = NoisyDesc { tokens, experts, rule };
    let mut workspace = Workspace::new(&stream, noisy::workspace_bytes(&desc, kernels.device()).unwrap()).unwrap();
    let mut counts = stream.alloc_zeros(experts).unwrap();
    let [importance, load, losses] = &mut [experts, experts, 2].map(|len| stream.alloc_zeros(len).unwrap());
    for (name, summed) in [("noisy top-k", false), ("noisy top-k with losses", true)] {
        bench(name, &mut || {
            let sums = NoisySums { counts: &mut counts, importance, load, losses, workspace: &mut workspace };
            let args = NoisyArgs {
                logits: NoisyLogits::Apart { clean: &logits, raw: &raw },
                ids: &mut chosen,
                weights: &mut chosen_weights,
                noisy: None,
                thresholds: None,
                sums: summed.then_some(sums),
            };
            noisy::forward(kernels, &stream, &desc, args).unwrap()
        });
    }

    // The same experts in groups of about 16, two groups a token.
    let groups = (experts / 16).max(2);
    let secondary = NoisyRule { top_k: top_k.div_ceil(2).min(experts / groups), ..rule };
    let primary = NoisyRule { top_k: 2, ..rule };
    let desc = HierarchicalDesc { tokens, groups, experts: experts / groups, primary, secondary };
    let group_logits = stream.clone_htod(&inputs::normals::<f32>(rng, tokens * groups * 2, 1.0)).unwrap();
    let bytes = hierarchical::workspace_bytes(&desc, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    let [group_ids, group_counts, slot_ids, all_counts] =
        &mut [2 * tokens, groups, 2 * tokens * secondary.top_k, experts].map(|len| stream.alloc_zeros(len).unwrap());
    let [group_weights, group_importance, group_load, group_losses, slot_weights] =
        &mut [2 * tokens, groups, groups, 2, 2 * tokens * secondary.top_k].map(|len| stream.alloc_zeros(len).unwrap());
    bench("hierarchical", &mut || {
        let args = HierarchicalArgs {
            primary_logits: NoisyLogits::Together(&group_logits),
            logits: NoisyLogits::Apart { clean: &logits, raw: &raw },
            primary: PrimaryOutputs {
                ids: group_ids,
                weights: group_weights,
                counts: group_counts,
                importance: group_importance,
                load: group_load,
                losses: group_losses,
                noisy: None,
                thresholds: None,
            },
            ids: slot_ids,
            weights: slot_weights,
            noisy: None,
            thresholds: None,
            counts: all_counts,
            importance,
            load,
            losses,
            workspace: &mut workspace,
        };
        hierarchical::forward(kernels, &stream, &desc, args).unwrap()
    });

    let desc = SampledDesc { tokens, experts, rule: SamplingRule { top_k, inverse_temperature: 1.0, noise } };
    let mut log_probabilities = stream.alloc_zeros(tokens * top_k).unwrap();
    let mut entropy = stream.alloc_zeros(tokens).unwrap();
    bench("sampled", &mut || {
        let args = SampledArgs {
            logits: &logits,
            ids: &mut chosen,
            weights: &mut chosen_weights,
            log_probabilities: Some(&mut log_probabilities),
            entropy: Some(&mut entropy),
            perturbed: None,
        };
        sampled::forward(kernels, &stream, &desc, args).unwrap()
    });

    let x = stream.clone_htod(&inputs::normals::<half::bf16>(rng, tokens * shape.hidden, 1.0)).unwrap();
    let mut y = stream.alloc_zeros::<half::bf16>(tokens * shape.hidden).unwrap();
    let desc = JitterDesc { dtype: Dtype::Bf16, elements: tokens * shape.hidden, epsilon: 0.01, noise };
    bench("jitter", &mut || jitter::forward(kernels, &stream, &desc, &x, &mut y).unwrap());

    let words: Vec<i32> = (0..tokens).map(|_| rng.i32(0..50_000)).collect();
    let words = stream.clone_htod(&words).unwrap();
    let desc = HashDesc { tokens, experts, top_k: 1, hash: HashBy::Mix { seed: 1 } };
    bench("hash", &mut || {
        let args = HashArgs { token_ids: &words, table: None, ids: &mut ids };
        hash::forward(kernels, &stream, &desc, args).unwrap()
    });
}

criterion_group!(benches, routers);
criterion_main!(benches);
