//! Every router in a whole layer: its choices on the device lead where the reference's lead on the host, through admission, capacity, expert
//! maps, null experts and dropout, in one call and in parts.
//!
//! Shapes are drawn; `MOE_SEED` draws others.

#[path = "support/device.rs"]
#[allow(dead_code)]
mod device;

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};
use half::bf16;
use moe_kernels::experts::combine::{CombineArgs, Identity};
use moe_kernels::experts::{Dispatched, Weight, tiles};
use moe_kernels::layer::{
    Choices, ExpertWeights, ExpertsArgs, ExpertsPlan, LayerArgs, LayerDesc, LayerWeights, MapDesc, MapTable, Measured,
    RouteArgs, RouterWeights, Stage,
};
use moe_kernels::reference;
use moe_kernels::routers::affinity::{self, AffinityArgs, AffinityDesc};
use moe_kernels::routers::base::{self, BaseArgs, BaseDesc};
use moe_kernels::routers::cosine::{CosineDesc, CosineWeights};
use moe_kernels::routers::expert_choice::{self, ExpertChoiceDesc};
use moe_kernels::routers::gating::{self, GatingArgs, GatingDesc};
use moe_kernels::routers::hash::{self, HashArgs, HashBy, HashDesc};
use moe_kernels::routers::hierarchical::{self, HierarchicalArgs, HierarchicalDesc, PrimaryOutputs};
use moe_kernels::routers::measured_gating::{RouterStats, Totals};
use moe_kernels::routers::noisy::{self, NoisyArgs, NoisyDesc, NoisyLogits, NoisySums};
use moe_kernels::routers::sampled::{self, SampledArgs, SampledDesc};
use moe_kernels::routers::sinkhorn::{self, SinkhornArgs, SinkhornDesc};
use moe_kernels::rules::Dtype;
use moe_kernels::rules::{
    AdmissionRule, Affinity, AuctionRule, BalanceRule, Capacity, Dropout, Gating, Groups, IDENTITY, IdFormat,
    LossScore, NONE, NoiseSource, NoisyRule, NullExperts, Order, SamplingRule, Score, SecondExpert,
};
use moe_kernels::{DeviceInfo, Kernels, Workspace};

/// Draws of each router.
const DRAWS: u64 = 4;

/// A layer with random weights, on the device and on the host.
struct Layer {
    stream: Arc<CudaStream>,
    kernels: &'static Kernels,
    rng: fastrand::Rng,
    desc: LayerDesc,
    tokens: usize,
    x: Vec<bf16>,
    gate_up: Vec<bf16>,
    down: Vec<bf16>,
    router: Vec<bf16>,
    on_device: [CudaSlice<bf16>; 4],
    logits: Vec<f32>,
}

impl Layer {
    /// `shape`: tokens, experts, top_k.
    fn new(seed: u64, shape: impl Fn(&mut fastrand::Rng) -> (usize, usize, usize)) -> Layer {
        let of_run = std::env::var("MOE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0u64);
        let mut rng = fastrand::Rng::with_seed(of_run.wrapping_mul(1000) + seed);
        let (tokens, experts, top_k) = shape(&mut rng);
        let (hidden, intermediate) = (8 * rng.usize(1..12), 8 * rng.usize(1..9));
        eprintln!("seed {seed} of run {of_run}: {tokens} tokens, {experts} experts, {top_k}, {hidden}, {intermediate}");
        let desc = LayerDesc::new(Dtype::Bf16, hidden, intermediate, experts, top_k);
        let mut tensor = |len: usize, scale: f32| -> Vec<bf16> {
            (0..len).map(|_| bf16::from_f32((2.0 * rng.f32() - 1.0) * scale)).collect()
        };
        let x = tensor(tokens * hidden, 1.0);
        let gate_up = tensor(experts * 2 * intermediate * hidden, 2.0 / (hidden as f32).sqrt());
        let down = tensor(experts * hidden * intermediate, 1.0 / (intermediate as f32).sqrt());
        let router = tensor(experts * hidden, 1.0);
        let stream = device::stream();
        let on_device = [&x, &gate_up, &down, &router].map(|values| stream.clone_htod(values).unwrap());
        let logits = (0..tokens * experts).map(|_| 4.0 * rng.f32() - 2.0).collect();
        Layer { stream, kernels: device::kernels(), rng, desc, tokens, x, gate_up, down, router, on_device, logits }
    }

    fn upload<T: cudarc::driver::DeviceRepr>(&self, values: &[T]) -> CudaSlice<T> {
        self.stream.clone_htod(values).unwrap()
    }

    fn zeros<T: cudarc::driver::DeviceRepr + cudarc::driver::ValidAsZeroBits>(&self, len: usize) -> CudaSlice<T> {
        self.stream.alloc_zeros(len.max(1)).unwrap()
    }

    fn read<T: cudarc::driver::DeviceRepr>(&self, values: &CudaSlice<T>) -> Vec<T> {
        self.stream.clone_dtoh(values).unwrap()
    }

    fn workspace(&self, bytes: usize) -> Workspace {
        Workspace::new(&self.stream, bytes).unwrap()
    }

    fn device(&self) -> &DeviceInfo {
        self.kernels.device()
    }

    fn weights(&self) -> LayerWeights<'_> {
        let [_, gate_up, down, router] = &self.on_device;
        LayerWeights::new(RouterWeights::new(router), ExpertWeights::new(Weight::new(gate_up), Weight::new(down)))
    }

    /// `down(silu(gate x) * up x)` of one expert for token `t`, with `keep` of what stands between.
    fn expert(&self, expert: usize, t: usize, keep: impl Fn(usize, f64) -> f64) -> Vec<f64> {
        let LayerDesc { hidden, intermediate, .. } = self.desc;
        let dot = |row: &[bf16], x: &[bf16]| -> f64 { row.iter().zip(x).map(|(w, x)| w.to_f64() * x.to_f64()).sum() };
        let x = &self.x[t * hidden..][..hidden];
        let row = |r: usize| dot(&self.gate_up[(expert * 2 * intermediate + r) * hidden..][..hidden], x);
        let h: Vec<f64> = (0..intermediate)
            .map(|i| {
                let gate = row(i);
                keep(i, gate / (1.0 + (-gate).exp()) * row(intermediate + i))
            })
            .collect();
        (0..hidden)
            .map(|c| {
                let row = &self.down[(expert * hidden + c) * intermediate..][..intermediate];
                row.iter().zip(&h).map(|(w, h)| w.to_f64() * h).sum()
            })
            .collect()
    }

    /// The layer's result for these choices.
    fn expected(&self, choices: &[(usize, usize, f64)]) -> Vec<f64> {
        let hidden = self.desc.hidden;
        let mut y = vec![0.0; self.tokens * hidden];
        for &(t, expert, weight) in choices {
            let out = self.expert(expert, t, |_, h| h);
            y[t * hidden..][..hidden].iter_mut().zip(out).for_each(|(y, out)| *y += weight * out);
        }
        y
    }

    fn close(&self, what: &str, got: &[bf16], want: &[f64]) {
        assert!(got.iter().all(|y| y.is_finite()), "{what}");
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
        let off = square(&mut got.iter().zip(want).map(|(got, want)| got.to_f64() - want)).sqrt();
        let norm = square(&mut want.iter().copied()).sqrt();
        assert!(off <= 1e-2 * norm, "{what}: off by {off:.3e} of {norm:.3e}");
    }

    /// Runs the layer by choices that lie on the device, in one call and in parts, and compares with what they mean.
    fn check(&self, what: &str, ids: &CudaSlice<i32>, weights: &CudaSlice<f32>) {
        let top_k = self.desc.top_k;
        let choices: Vec<_> = (self.read(ids).iter().zip(self.read(weights)).enumerate())
            .filter(|(_, (id, _))| (0..self.desc.experts as i32).contains(id))
            .map(|(slot, (&id, weight))| (slot / top_k, id as usize, f64::from(weight)))
            .collect();
        let want = self.expected(&choices);

        let plan = self.desc.plan(self.tokens, self.device()).unwrap();
        let mut workspace = self.workspace(plan.workspace_bytes());
        let mut y = self.zeros::<bf16>(self.tokens * self.desc.hidden);
        let args = LayerArgs::new(&self.on_device[0], &mut y).choices(Choices::new(ids, weights));
        plan.forward(self.kernels, &self.stream, &self.weights(), args, &mut workspace).unwrap();
        let whole = self.read(&y);
        self.close(what, &whole, &want);

        let mut dispatched = Dispatched::new(&self.stream, &plan.route().rows()).unwrap();
        let choices = Choices::new(ids, weights);
        let route = plan.route();
        route
            .forward_choices(self.kernels, &self.stream, choices, RouteArgs::new(), &mut dispatched, &mut workspace)
            .unwrap();
        let parts = self.rest(plan.experts(), &dispatched);
        assert_eq!(parts, whole, "{what}: parts");
    }

    /// The second and third part.
    fn rest(&self, plan: &ExpertsPlan, dispatched: &Dispatched) -> Vec<bf16> {
        let hidden = self.desc.hidden;
        let mut workspace = self.workspace(plan.workspace_bytes());
        let mut y_slots = self.zeros::<bf16>(plan.rows().slots * hidden);
        let args = ExpertsArgs::new(&self.on_device[0], dispatched, &mut y_slots);
        plan.forward(self.kernels, &self.stream, &self.weights().experts, args, &mut workspace).unwrap();
        let mut y = self.zeros::<bf16>(self.tokens * hidden);
        plan.combine(self.kernels, &self.stream, CombineArgs::new(&y_slots, dispatched, &mut y)).unwrap();
        self.read(&y)
    }
}

fn small(rng: &mut fastrand::Rng) -> (usize, usize, usize) {
    let experts = rng.usize(2..20);
    (rng.usize(1..90), experts, rng.usize(1..=experts.min(5)))
}

#[test]
fn gating_of_every_score() {
    for (seed, score) in (0..).zip([Score::Softmax, Score::TopkSoftmax, Score::Sigmoid].repeat(2)) {
        let mut layer = Layer::new(seed, small);
        layer.desc = layer.desc.gating(Gating::new(score).scale(1.5));
        let choices = layer.tokens * layer.desc.top_k;
        let (mut ids, mut weights) = (layer.zeros(choices), layer.zeros(choices));
        let desc = GatingDesc::new(layer.tokens, layer.desc.experts, layer.desc.top_k, layer.desc.gating);
        let logits = layer.upload(&layer.logits);
        let args = GatingArgs::new(&logits, &mut ids, &mut weights);
        gating::forward(layer.kernels, &layer.stream, &desc, args).unwrap();
        layer.check(&format!("{score:?}"), &ids, &weights);
        // The layer's own router and gating, fused with the dispatch.
        let plan = layer.desc.plan(layer.tokens, layer.device()).unwrap();
        assert!(!plan.stages().any(|(stage, _)| matches!(stage, Stage::Gate | Stage::Dispatch)), "{score:?}");
        let mut workspace = layer.workspace(plan.workspace_bytes());
        let mut y = layer.zeros::<bf16>(layer.tokens * layer.desc.hidden);
        let args =
            LayerArgs::new(&layer.on_device[0], &mut y).route(RouteArgs::new().ids(&mut ids).weights(&mut weights));
        plan.forward(layer.kernels, &layer.stream, &layer.weights(), args, &mut workspace).unwrap();
        let x: Vec<bf16> = layer.x.clone();
        let logits = reference::router::router(&x, &layer.router, None::<&[bf16]>, layer.desc.hidden).unwrap();
        let want =
            reference::gating::gate(&logits, None::<&[f64]>, layer.desc.experts, layer.desc.top_k, &layer.desc.gating)
                .unwrap();
        assert_eq!(layer.read(&ids), want.ids, "{score:?}");
        let choices: Vec<_> = (want.ids.iter().zip(&want.weights).enumerate())
            .map(|(slot, (&id, &weight))| (slot / layer.desc.top_k, id as usize, weight))
            .collect();
        layer.close("whole", &layer.read(&y), &layer.expected(&choices));
    }
}

#[test]
fn groups() {
    for seed in 10..10 + DRAWS {
        let mut layer = Layer::new(seed, |rng| (rng.usize(1..60), 4 * rng.usize(2..8), rng.usize(1..4)));
        layer.desc = layer.desc.gating(Gating::new(Score::Sigmoid).groups(Some(Groups::new(4, 2))).renormalised());
        let plan = layer.desc.plan(layer.tokens, layer.device()).unwrap();
        let mut workspace = layer.workspace(plan.workspace_bytes());
        let choices = layer.tokens * layer.desc.top_k;
        let (mut ids, mut weights) = (layer.zeros(choices), layer.zeros(choices));
        let mut y = layer.zeros::<bf16>(layer.tokens * layer.desc.hidden);
        let bias = layer.upload(&vec![0.25f32; layer.desc.experts]);
        let route = RouteArgs::new().ids(&mut ids).weights(&mut weights);
        let args = LayerArgs::new(&layer.on_device[0], &mut y).route(route);
        let mut params = layer.weights();
        params.router = params.router.correction_bias(&bias);
        plan.forward(layer.kernels, &layer.stream, &params, args, &mut workspace).unwrap();
        let y = layer.read(&y);
        let again = layer.read(&weights);
        layer.check("groups", &ids, &weights);
        assert!(y.iter().any(|y| *y != bf16::ZERO) && again == layer.read(&weights));
    }
}

#[test]
fn noisy_top_k() {
    for seed in 20..20 + DRAWS {
        let mut layer = Layer::new(seed, small);
        let (tokens, experts, top_k) = (layer.tokens, layer.desc.experts, layer.desc.top_k);
        let noise = NoiseSource::new(layer.rng.u64(..), layer.rng.u64(..));
        let rule = NoisyRule::new(top_k, noise);
        let raw: Vec<f32> = layer.logits.iter().rev().copied().collect();
        let (clean_on_device, raw_on_device) = (layer.upload(&layer.logits), layer.upload(&raw));
        let (mut ids, mut weights) = (layer.zeros(tokens * top_k), layer.zeros(tokens * top_k));
        let logits = NoisyLogits::apart(&clean_on_device, &raw_on_device);
        let args = NoisyArgs::new(logits, &mut ids, &mut weights);
        noisy::forward(layer.kernels, &layer.stream, &NoisyDesc::new(tokens, experts, rule), args).unwrap();
        let want = reference::noisy::noisy_top_k(&layer.logits, &raw, experts, &rule).unwrap();
        assert_eq!(layer.read(&ids), want.ids);
        layer.check("noisy", &ids, &weights);
    }
}

#[test]
fn a_hierarchy() {
    for seed in 30..30 + DRAWS {
        let mut layer = Layer::new(seed, |rng| (rng.usize(1..50), 3 * rng.usize(2..7), 2 * 2));
        let (tokens, groups) = (layer.tokens, 3);
        let experts = layer.desc.experts / groups;
        let noise = NoiseSource::new(layer.rng.u64(..), 5);
        let (primary, secondary) = (NoisyRule::new(2, noise), NoisyRule::new(2, noise));
        let primary_clean: Vec<f32> = (0..tokens * groups).map(|_| layer.rng.f32()).collect();
        let primary_raw: Vec<f32> = (0..tokens * groups).map(|_| layer.rng.f32() - 1.0).collect();
        let raw: Vec<f32> = layer.logits.iter().map(|l| l * 0.3).collect();
        let buffers = [&primary_clean, &primary_raw, &layer.logits, &raw].map(|values| layer.upload(values));
        let desc = HierarchicalDesc::new(tokens, groups, experts, primary, secondary);
        let mut workspace = layer.workspace(hierarchical::workspace_bytes(&desc, layer.device()).unwrap());
        let (mut primary_ids, mut primary_weights) = (layer.zeros(tokens * 2), layer.zeros(tokens * 2));
        let (mut ids, mut weights) = (layer.zeros(tokens * 4), layer.zeros(tokens * 4));
        let mut counts = [layer.zeros::<i32>(groups), layer.zeros::<i32>(groups * experts)];
        let mut sums: Vec<CudaSlice<f32>> =
            [groups, groups, 2, groups * experts, groups * experts, 2].iter().map(|&n| layer.zeros(n)).collect();
        {
            let [group_counts, all_counts] = &mut counts;
            let [a, b, c, d, e, f] = &mut sums[..] else { unreachable!() };
            let outputs =
                PrimaryOutputs::new(&mut primary_ids, &mut primary_weights, NoisySums::new(group_counts, a, b, c));
            let args = HierarchicalArgs::new(
                NoisyLogits::apart(&buffers[0], &buffers[1]),
                NoisyLogits::apart(&buffers[2], &buffers[3]),
                outputs,
                &mut ids,
                &mut weights,
                NoisySums::new(all_counts, d, e, f),
                &mut workspace,
            );
            hierarchical::forward(layer.kernels, &layer.stream, &desc, args).unwrap();
        }
        let want = reference::noisy::hierarchical(
            &primary_clean,
            &primary_raw,
            groups,
            &primary,
            &layer.logits,
            &raw,
            experts,
            &secondary,
        )
        .unwrap();
        assert_eq!(layer.read(&ids), want.ids);
        layer.check("hierarchical", &ids, &weights);
    }
}

#[test]
fn sampling() {
    for seed in 40..40 + DRAWS {
        let mut layer = Layer::new(seed, small);
        let (tokens, experts, top_k) = (layer.tokens, layer.desc.experts, layer.desc.top_k);
        let rule = SamplingRule::new(top_k, NoiseSource::new(layer.rng.u64(..), 1));
        let logits = layer.upload(&layer.logits);
        let (mut ids, mut weights) = (layer.zeros(tokens * top_k), layer.zeros(tokens * top_k));
        let args = SampledArgs::new(&logits, &mut ids, &mut weights);
        sampled::forward(layer.kernels, &layer.stream, &SampledDesc::new(tokens, experts, rule), args).unwrap();
        let want = reference::sampled::gumbel_top_k(&layer.logits, experts, &rule).unwrap();
        assert_eq!(layer.read(&ids), want.ids);
        layer.check("sampled", &ids, &weights);
    }
}

#[test]
fn cosines() {
    for seed in 45..45 + DRAWS {
        let mut layer = Layer::new(seed, small);
        let LayerDesc { hidden, experts, top_k, .. } = layer.desc;
        let (tokens, width) = (layer.tokens, layer.rng.usize(1..40));
        let mut values = |len: usize| -> Vec<f32> { (0..len).map(|_| 2.0 * layer.rng.f32() - 1.0).collect() };
        let (projection, bias, similar) = (values(width * hidden), values(width), values(experts * width));
        let [projection_on, bias_on, similar_on] = [&projection, &bias, &similar].map(|values| layer.upload(values));
        let desc = CosineDesc::new(Dtype::Bf16, tokens, hidden, width, experts).weight(Dtype::F32).temperature(2.5);
        let plan = desc.plan(layer.device()).unwrap();
        let mut workspace = layer.workspace(plan.workspace_bytes());
        let mut logits = layer.zeros::<f32>(tokens * experts);
        let weights = CosineWeights::new(&projection_on, &similar_on).bias(&bias_on);
        let (kernels, stream, x) = (layer.kernels, &layer.stream, &layer.on_device[0]);
        plan.forward::<bf16, f32>(kernels, stream, weights, x, &mut logits, &mut workspace).unwrap();
        let wide = |values: &[f32]| values.iter().map(|&value| value.into()).collect::<Vec<f64>>();
        let x: Vec<f64> = layer.x.iter().map(|x| x.to_f64()).collect();
        let bounds = [2.5, f64::from(desc.most)];
        let want =
            reference::cosine::cosine(&x, &wide(&projection), &wide(&bias), &wide(&similar), bounds, None).unwrap();
        let got = layer.read(&logits);
        let off = got.iter().zip(&want).map(|(got, want)| (f64::from(*got) - want).abs()).fold(0.0, f64::max);
        // Of cosines of at most e^2.5, by sums of at most 96 f32 products; a short projection makes the most of its rounding.
        assert!(off <= 1e-3, "logits are off by {off:e}");

        // The layer's own gating of the same logits.
        layer.desc = layer.desc.gating(Gating::new(Score::Softmax).renormalised());
        let plan = layer.desc.plan(tokens, layer.device()).unwrap();
        let mut workspace = layer.workspace(plan.workspace_bytes());
        let (mut ids, mut weights) = (layer.zeros(tokens * top_k), layer.zeros(tokens * top_k));
        let mut y = layer.zeros::<bf16>(tokens * hidden);
        let route = RouteArgs::new().given_logits(&logits).ids(&mut ids).weights(&mut weights);
        let args = LayerArgs::new(&layer.on_device[0], &mut y).route(route);
        let mut params = layer.weights();
        params.router = RouterWeights::of_logits();
        plan.forward(layer.kernels, &layer.stream, &params, args, &mut workspace).unwrap();
        let chosen = reference::gating::gate(&got, None::<&[f64]>, experts, top_k, &layer.desc.gating).unwrap();
        assert_eq!(layer.read(&ids), chosen.ids);
        layer.check("cosine", &ids, &weights);
    }
}

#[test]
fn hashes() {
    for seed in 50..50 + DRAWS {
        let mut layer = Layer::new(seed, small);
        let (tokens, experts, top_k) = (layer.tokens, layer.desc.experts, layer.desc.top_k);
        let token_ids: Vec<i32> = (0..tokens).map(|_| layer.rng.i32(-2..45)).collect();
        let weights = layer.upload(&vec![1.0 / top_k as f32; tokens * top_k]);
        let mut ids = layer.zeros(tokens * top_k);
        let on_device = layer.upload(&token_ids);
        // A table with places that hold no expert.
        let table: Vec<i32> = (0..40 * top_k).map(|_| layer.rng.i32(-1..=experts as i32)).collect();
        let table_on_device = layer.upload(&table);
        let mix = layer.rng.u64(..);
        for (by, reference_by) in [
            (HashBy::Mix { seed: mix }, reference::hash::Hash::Mix { seed: mix }),
            (HashBy::Table { vocabulary: 40 }, reference::hash::Hash::Table(&table)),
        ] {
            let mut args = HashArgs::new(&on_device, &mut ids);
            if matches!(by, HashBy::Table { .. }) {
                args = args.table(&table_on_device);
            }
            hash::forward(layer.kernels, &layer.stream, &HashDesc::new(tokens, experts, top_k, by), args).unwrap();
            assert_eq!(layer.read(&ids), reference::hash::route(&token_ids, reference_by, experts, top_k).unwrap());
            layer.check(&format!("{by:?}"), &ids, &weights);
        }
    }
}

#[test]
fn balanced_assignments() {
    for seed in 60..60 + DRAWS {
        let layer = Layer::new(seed, |rng| {
            let experts = rng.usize(1..9);
            (experts * rng.usize(1..10), experts, 1)
        });
        let (tokens, experts) = (layer.tokens, layer.desc.experts);
        let rule = AuctionRule::new(experts, 1e-3, 10_000);
        let desc = BaseDesc::new(tokens, rule);
        let scores = layer.upload(&layer.logits);
        let (mut ids, mut weights) = (layer.zeros(tokens), layer.zeros(tokens));
        let mut status = layer.zeros(2);
        let mut workspace = layer.workspace(base::workspace_bytes(&desc).unwrap());
        let args = BaseArgs::new(&scores, &mut ids, &mut status, &mut workspace).weights(&mut weights);
        base::forward(layer.kernels, &layer.stream, &desc, args).unwrap();
        assert_eq!(layer.read(&ids), reference::base::auction(&layer.logits, &rule).unwrap().ids);
        layer.check("base", &ids, &weights);
    }
    for seed in 70..70 + DRAWS {
        let layer = Layer::new(seed, small);
        let (tokens, experts, top_k) = (layer.tokens, layer.desc.experts, layer.desc.top_k);
        let desc = SinkhornDesc::new(tokens, experts, top_k, 20, -1.0);
        let logits = layer.upload(&layer.logits);
        let (mut ids, mut weights) = (layer.zeros(tokens * top_k), layer.zeros(tokens * top_k));
        let (mut potentials, mut status) = (layer.zeros(experts), layer.zeros(2));
        let mut workspace = layer.workspace(sinkhorn::workspace_bytes(&desc, layer.device()).unwrap());
        let args = SinkhornArgs::new(&logits, &mut ids, &mut potentials, &mut status, &mut workspace);
        sinkhorn::forward(layer.kernels, &layer.stream, &desc, args.weights(&mut weights)).unwrap();
        let want = reference::sinkhorn::choose(&layer.logits, &layer.read(&potentials), top_k).unwrap();
        assert_eq!(layer.read(&ids), want);
        layer.check("sinkhorn", &ids, &weights);
    }
}

#[test]
fn experts_that_choose_their_tokens() {
    for seed in 80..80 + DRAWS {
        let mut layer = Layer::new(seed, small);
        let (tokens, experts) = (layer.tokens, layer.desc.experts);
        let capacity = layer.rng.usize(1..=tokens);
        let logits = layer.upload(&layer.logits);
        let mut affinities = layer.zeros(tokens * experts);
        let args = AffinityArgs::new(&logits, &mut affinities);
        let desc = AffinityDesc::new(tokens, experts, Affinity::Softmax);
        affinity::forward(layer.kernels, &layer.stream, &desc, args).unwrap();

        let desc = ExpertChoiceDesc::new(tokens, experts, capacity);
        let tile_m = tiles::select_tile(Dtype::Bf16, desc.slots(), experts, layer.device()).unwrap().bm as usize;
        let rows = expert_choice::rows(&desc, tile_m);
        let mut dispatched = Dispatched::new(&layer.stream, &rows).unwrap();
        let mut workspace = layer.workspace(expert_choice::workspace_bytes(&desc, layer.device()).unwrap());
        let on_device = (&affinities).into();
        expert_choice::dispatch(
            layer.kernels,
            &layer.stream,
            &desc,
            tile_m,
            on_device,
            &mut dispatched,
            &mut workspace,
        )
        .unwrap();
        let want = reference::expert_choice::choose(&layer.read(&affinities), experts, capacity).unwrap();
        let choices: Vec<_> = (want.slot_token.iter().zip(&want.slot_weight).enumerate())
            .map(|(slot, (&t, &weight))| (t as usize, slot / capacity, f64::from(weight)))
            .collect();
        let plan = ExpertsPlan::new(&layer.desc, &rows, layer.device()).unwrap();
        layer.close("expert choice", &layer.rest(&plan, &dispatched), &layer.expected(&choices));
    }
}

/// Admission with candidates to pass on to, then a map with experts that are elsewhere and null experts, then a capacity.
#[test]
fn admission_map_and_capacity() {
    for seed in 90..90 + 3 * DRAWS {
        let mut layer = Layer::new(seed, |rng| (rng.usize(1..90), rng.usize(4..16), 2));
        let (tokens, experts, top_k) = (layer.tokens, layer.desc.experts, 2);
        let by_token = layer.rng.bool();
        let group = layer.rng.usize(1..=tokens);
        let rule = AdmissionRule::new(experts, top_k, layer.rng.usize(1..8), group)
            .candidates(3)
            .order(if by_token { Order::ByToken } else { Order::ByChoice })
            .prioritised(layer.rng.bool())
            .second(SecondExpert::Always);
        // Half of the experts are here, some pass their input on, some yield nothing.
        let here = experts / 2;
        let map: Vec<i32> = (0..experts as i32)
            .map(|e| {
                if e < here as i32 {
                    here as i32 - 1 - e
                } else if e % 2 == 0 {
                    IDENTITY
                } else {
                    NONE
                }
            })
            .collect();
        let capacity = Capacity::new(layer.rng.usize(1..20), layer.rng.usize(1..=tokens));
        layer.desc = layer
            .desc
            .admission(Some(rule))
            .map(Some(MapDesc::new(here)))
            .capacity(Some(capacity))
            .gating(Gating::new(Score::Softmax));
        let map_on_device = layer.upload(&map);
        let plan = layer.desc.plan(tokens, layer.device()).unwrap();
        let mut workspace = layer.workspace(plan.workspace_bytes());
        let (mut ids, mut weights) = (layer.zeros(tokens * top_k), layer.zeros(tokens * top_k));
        let mut counts = layer.zeros(here);
        let mut y = layer.zeros::<bf16>(tokens * layer.desc.hidden);
        let route =
            RouteArgs::new().ids(&mut ids).weights(&mut weights).counts(&mut counts).map(MapTable::new(&map_on_device));
        let args = LayerArgs::new(&layer.on_device[0], &mut y).route(route);
        plan.forward(layer.kernels, &layer.stream, &layer.weights(), args, &mut workspace).unwrap();

        let logits = reference::router::router(&layer.x, &layer.router, None::<&[bf16]>, layer.desc.hidden).unwrap();
        let gated = reference::gating::gate(&logits, None::<&[f64]>, experts, 3, &layer.desc.gating).unwrap();
        let candidate_weights: Vec<f32> = gated.weights.iter().map(|&w| w as f32).collect();
        let admitted = reference::admission::admit(&gated.ids, &candidate_weights, None, &rule).unwrap();
        assert_eq!(layer.read(&ids), admitted.ids);
        // From here on by hand: which choices have rows, which add x.
        let hidden = layer.desc.hidden;
        let mut want = vec![0.0; tokens * hidden];
        let mut taken = vec![0; here];
        let mut rows = vec![0; here];
        for t in 0..tokens {
            if t % capacity.tokens_per_sequence == 0 {
                taken.fill(0);
            }
            for j in t * top_k..(t + 1) * top_k {
                let (id, weight) = (admitted.ids[j], f64::from(admitted.weights[j]));
                let target = usize::try_from(id).map_or(NONE, |id| map[id]);
                let mut add = |values: Vec<f64>| {
                    want[t * hidden..][..hidden].iter_mut().zip(values).for_each(|(y, v)| *y += weight * v);
                };
                if target == IDENTITY {
                    add(layer.x[t * hidden..][..hidden].iter().map(|x| x.to_f64()).collect());
                } else if let Ok(local) = usize::try_from(target) {
                    taken[local] += 1;
                    if taken[local] <= capacity.per_expert {
                        rows[local] += 1;
                        add(layer.expert(local, t, |_, h| h));
                    }
                }
            }
        }
        assert_eq!(layer.read(&counts), rows);
        layer.close("admission, map, capacity", &layer.read(&y), &want);
    }
}

/// The last experts compute nothing: by choices from elsewhere, in one call and in parts, in 32-bit ids of either kind, and as a map says it.
#[test]
fn null_experts_of_any_router() {
    for seed in 150..150 + 2 * DRAWS {
        let mut layer = Layer::new(seed, small);
        let (tokens, experts, top_k) = (layer.tokens, layer.desc.experts, layer.desc.top_k);
        let (hidden, count) = (layer.desc.hidden, layer.rng.usize(1..experts));
        let here = experts - count;
        let passes = seed % 2 == 0;
        let null = if passes { NullExperts::identity(count) } else { NullExperts::zero(count) };
        let scale = [1.0, 0.5][layer.rng.usize(..2)];
        let plain = layer.desc.routed_scale(scale);
        layer.desc = plain.null(Some(null));
        // Every number that may occur, and some that no expert has.
        let ids: Vec<i32> = (0..tokens * top_k).map(|_| layer.rng.i32(-1..experts as i32 + 2)).collect();
        let weights: Vec<f32> = ids.iter().map(|_| layer.rng.f32() - 0.3).collect();
        let mut want = vec![0.0; tokens * hidden];
        for (slot, (&id, &weight)) in ids.iter().zip(&weights).enumerate() {
            let (t, Ok(id)) = (slot / top_k, usize::try_from(id)) else { continue };
            let out: Vec<f64> = match id {
                id if id < here => layer.expert(id, t, |_, h| h),
                id if id < experts && passes => layer.x[t * hidden..][..hidden].iter().map(|x| x.to_f64()).collect(),
                _ => continue,
            };
            let weight = f64::from(scale) * f64::from(weight);
            want[t * hidden..][..hidden].iter_mut().zip(out).for_each(|(y, out)| *y += weight * out);
        }

        let (ids_on_device, weights_on_device) = (layer.upload(&ids), layer.upload(&weights));
        let unsigned = layer.upload(&ids.iter().map(|&id| id as u32).collect::<Vec<_>>());
        let whole = |desc: LayerDesc, choices: Choices<'_>, map: Option<MapTable<'_>>| {
            let plan = desc.plan(tokens, layer.device()).unwrap();
            let mut workspace = layer.workspace(plan.workspace_bytes());
            let mut y = layer.zeros::<bf16>(tokens * hidden);
            let mut route = RouteArgs::new();
            route.map = map;
            let args = LayerArgs::new(&layer.on_device[0], &mut y).choices(choices).route(route);
            plan.forward(layer.kernels, &layer.stream, &layer.weights(), args, &mut workspace).unwrap();
            layer.read(&y)
        };
        let y = whole(layer.desc, Choices::new(&ids_on_device, &weights_on_device), None);
        layer.close("null experts", &y, &want);
        let of_words = whole(layer.desc.choices(IdFormat::U32), Choices::new(&unsigned, &weights_on_device), None);
        assert_eq!(of_words, y, "unsigned ids");
        let entry = if passes { IDENTITY } else { NONE };
        let map: Vec<i32> = (0..experts as i32).map(|e| if e < here as i32 { e } else { entry }).collect();
        let map = layer.upload(&map);
        let choices = Choices::new(&ids_on_device, &weights_on_device);
        let mapped = whole(plain.map(Some(MapDesc::new(here))), choices, Some(MapTable::new(&map)));
        layer.close("as a map says", &mapped, &want);

        let plan = layer.desc.plan(tokens, layer.device()).unwrap();
        let mut workspace = layer.workspace(plan.workspace_bytes());
        let mut dispatched = Dispatched::new(&layer.stream, &plan.route().rows()).unwrap();
        let choices = Choices::new(&ids_on_device, &weights_on_device);
        let (kernels, stream) = (layer.kernels, &layer.stream);
        plan.route()
            .forward_choices(kernels, stream, choices, RouteArgs::new(), &mut dispatched, &mut workspace)
            .unwrap();
        let mut y_slots = layer.zeros::<bf16>(plan.experts().rows().slots * hidden);
        let args = ExpertsArgs::new(&layer.on_device[0], &dispatched, &mut y_slots);
        plan.experts().forward(kernels, stream, &layer.weights().experts, args, &mut workspace).unwrap();
        let mut parts = layer.zeros::<bf16>(tokens * hidden);
        let mut args = CombineArgs::new(&y_slots, &dispatched, &mut parts);
        if passes {
            let numbers = here as u32..experts as u32;
            args =
                args.identity(Identity::of_choices(&layer.on_device[0], &ids_on_device, &weights_on_device, numbers));
        }
        plan.experts().combine(kernels, stream, args).unwrap();
        assert_eq!(layer.read(&parts), y, "parts");
    }
}

#[test]
fn a_measured_layer_has_the_losses_of_its_gating() {
    for seed in 120..120 + DRAWS {
        let mut layer = Layer::new(seed, small);
        let (tokens, experts, top_k) = (layer.tokens, layer.desc.experts, layer.desc.top_k);
        let rule = BalanceRule::new(LossScore::Softmax, layer.rng.usize(1..=tokens));
        layer.desc = layer.desc.measure(Some(rule));
        let plan = layer.desc.plan(tokens, layer.device()).unwrap();
        let mut workspace = layer.workspace(plan.workspace_bytes());
        let (mut counts, mut loss_counts) = (layer.zeros::<i32>(experts), layer.zeros::<i32>(experts));
        let (mut probability, mut importance) = (layer.zeros::<f32>(experts), layer.zeros::<f32>(experts));
        let mut stats = layer.upload(&[RouterStats::default()]);
        let (mut ids, mut weights) = (layer.zeros(tokens * top_k), layer.zeros(tokens * top_k));
        let mut y = layer.zeros::<bf16>(tokens * layer.desc.hidden);
        let totals = Totals::new(&mut counts, &mut loss_counts, &mut probability, &mut importance);
        let route = RouteArgs::new().ids(&mut ids).weights(&mut weights).measured(Measured::new(totals, &mut stats));
        let args = LayerArgs::new(&layer.on_device[0], &mut y).route(route);
        plan.forward(layer.kernels, &layer.stream, &layer.weights(), args, &mut workspace).unwrap();
        let whole = layer.read(&y);
        let logits = reference::router::router(&layer.x, &layer.router, None::<&[bf16]>, layer.desc.hidden).unwrap();
        let got_ids = layer.read(&ids);
        let got_weights: Vec<f64> = layer.read(&weights).into_iter().map(f64::from).collect();
        let want = reference::balance::balance(&logits, &got_ids, &got_weights, experts, top_k, &rule).unwrap();
        let stats = layer.read(&stats)[0];
        let loss = want.totals.loss();
        assert!((f64::from(stats.balance_loss) - loss).abs() <= 1e-4 * loss, "{stats:?}, not {loss}");
        assert_eq!(stats.tokens as usize, tokens);
        layer.desc = layer.desc.measure(None);
        layer.check("measured", &ids, &weights);
        assert!(whole.iter().any(|y| *y != bf16::ZERO));
    }
}

#[test]
fn dropout_inside_the_experts() {
    for seed in 130..130 + DRAWS {
        let mut layer = Layer::new(seed, small);
        let (tokens, top_k, intermediate) = (layer.tokens, layer.desc.top_k, layer.desc.intermediate);
        let ids: Vec<i32> = (0..tokens)
            .flat_map(|_| {
                let mut all: Vec<i32> = (0..layer.desc.experts as i32).collect();
                layer.rng.shuffle(&mut all);
                all.truncate(top_k);
                all
            })
            .collect();
        let weights: Vec<f32> = ids.iter().map(|_| layer.rng.f32()).collect();
        let noise = NoiseSource::new(layer.rng.u64(..), 3);
        let dropout = Dropout::new(0.4, noise);
        let plan = layer.desc.plan(tokens, layer.device()).unwrap();
        let mut workspace = layer.workspace(plan.workspace_bytes());
        let mut y = layer.zeros::<bf16>(tokens * layer.desc.hidden);
        let (ids_on_device, weights_on_device) = (layer.upload(&ids), layer.upload(&weights));
        let choices = Choices::new(&ids_on_device, &weights_on_device);
        let args = LayerArgs::new(&layer.on_device[0], &mut y).choices(choices).dropout(dropout);
        plan.forward(layer.kernels, &layer.stream, &layer.weights(), args, &mut workspace).unwrap();

        let rule = reference::dispatch::DispatchRule { experts: layer.desc.experts, top_k, capacity: None, tile_m: 16 };
        let rows = reference::dispatch::dispatch(&ids, &rule).unwrap();
        let hidden = layer.desc.hidden;
        let mut want = vec![0.0; tokens * hidden];
        for (slot, (&id, &weight)) in ids.iter().zip(&weights).enumerate() {
            let (t, row) = (slot / top_k, rows.token_slot[slot] as usize);
            let out = layer.expert(id as usize, t, |i, h| {
                let mut one = vec![0.0; row * intermediate + i + 1];
                one[row * intermediate + i] = h;
                reference::gemm::dropout(&mut one, 0.4, noise).unwrap();
                one[row * intermediate + i]
            });
            want[t * hidden..][..hidden].iter_mut().zip(out).for_each(|(y, out)| *y += f64::from(weight) * out);
        }
        layer.close("dropout", &layer.read(&y), &want);
    }
}

#[test]
fn ids_of_a_framework() {
    let layer = Layer::new(140, |_| (70, 9, 3));
    let mut rng = fastrand::Rng::with_seed(1);
    let ids: Vec<i32> = (0..210).map(|_| rng.i32(-1..9)).collect();
    let weights = layer.upload(&(0..210).map(|_| rng.f32()).collect::<Vec<_>>());
    let here = layer.upload(&ids);
    layer.check("i32", &here, &weights);
    let run = |desc: &LayerDesc, choices: Choices<'_>| {
        let plan = desc.plan(70, layer.device()).unwrap();
        let mut workspace = layer.workspace(plan.workspace_bytes());
        let mut y = layer.zeros::<bf16>(70 * desc.hidden);
        layer.kernels.preload(plan.stages_of_choices().map(|(_, selection)| selection.kernel)).unwrap();
        let args = LayerArgs::new(&layer.on_device[0], &mut y).choices(choices);
        plan.forward(layer.kernels, &layer.stream, &layer.weights(), args, &mut workspace).unwrap();
        layer.read(&y)
    };
    let want = run(&layer.desc, Choices::new(&here, &weights));
    let unsigned = layer.upload(&ids.iter().map(|&id| id as u32).collect::<Vec<_>>());
    let wide = layer.upload(&ids.iter().map(|&id| i64::from(id)).collect::<Vec<_>>());
    assert_eq!(run(&layer.desc.choices(IdFormat::U32), Choices::new(&unsigned, &weights)), want);
    assert_eq!(run(&layer.desc.choices(IdFormat::I64), Choices::new(&wide, &weights)), want);
}

/// The residual may be `y` itself.
#[test]
fn y_accumulates() {
    let layer = Layer::new(150, |_| (40, 6, 2));
    let plan = layer.desc.plan(40, layer.device()).unwrap();
    let mut workspace = layer.workspace(plan.workspace_bytes());
    let elements = 40 * layer.desc.hidden;
    let before: Vec<bf16> = (0..elements).map(|i| bf16::from_f32(i as f32 / 100.0 - 3.0)).collect();
    let residual = layer.upload(&before);
    let mut apart = layer.zeros::<bf16>(elements);
    let args = LayerArgs::new(&layer.on_device[0], &mut apart).residual(&residual);
    plan.forward(layer.kernels, &layer.stream, &layer.weights(), args, &mut workspace).unwrap();
    let mut y = layer.upload(&before);
    let args = LayerArgs::new(&layer.on_device[0], &mut y).accumulate();
    plan.forward(layer.kernels, &layer.stream, &layer.weights(), args, &mut workspace).unwrap();
    assert_eq!(layer.read(&y), layer.read(&apart));
    assert_ne!(layer.read(&y), before);
}
