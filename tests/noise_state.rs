//! Seed and offset on the device: every operation that draws gives the bits of the host source that state and rule add up to, and a
//! captured graph that moves its state on draws anew at each replay.

#[path = "support/device.rs"]
#[allow(dead_code)]
mod device;

use std::sync::{Arc, Once};

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr};
use half::{bf16, f16};
use moe_kernels::capacity::admission::{self, AdmissionArgs, AdmissionDesc};
use moe_kernels::experts::combine::CombineArgs;
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Rows};
use moe_kernels::experts::{Dispatched, Weight};
use moe_kernels::layer::{
    Choices, ExpertWeights, ExpertsArgs, LayerArgs, LayerDesc, LayerWeights, RouteArgs, RouterWeights,
};
use moe_kernels::reference;
use moe_kernels::routers::hierarchical::{self, HierarchicalArgs, HierarchicalDesc, PrimaryOutputs};
use moe_kernels::routers::jitter::{self, JitterArgs, JitterDesc};
use moe_kernels::routers::noise_state;
use moe_kernels::routers::noisy::{self, NoisyArgs, NoisyDesc, NoisyLogits, NoisySums};
use moe_kernels::routers::sampled::{self, SampledArgs, SampledDesc};
use moe_kernels::rules::{AdmissionRule, Dropout, Dtype, NoiseSource, NoisyRule, SamplingRule};
use moe_kernels::{Element, Error, In, Kernels, Workspace};

/// Noise states, and offsets of a rule: halves that carry, sums that pass 2^64, and zeros.
const STATES: [([u64; 2], u64); 4] = [
    ([0, 0], 0),
    ([0x0123_4567_89ab_cdef, 0xffff_ffff], 1),
    ([u64::MAX, 0xffff_fff0_0000_0003], 0x0000_0010_0000_0000),
    ([1 << 32, u64::MAX], 9),
];

/// A stream whose buffers record no events, as those of a graph must not.
fn stream() -> Arc<CudaStream> {
    static TRACKING: Once = Once::new();
    let stream = device::stream();
    // SAFETY: no buffer of this binary is used by two streams.
    TRACKING.call_once(|| unsafe { stream.context().disable_event_tracking() });
    stream
}

fn uniform(seed: u64, len: usize, scale: f32) -> Vec<f32> {
    let mut rng = fastrand::Rng::with_seed(seed);
    (0..len).map(|_| (2.0 * rng.f32() - 1.0) * scale).collect()
}

fn read<T: DeviceRepr>(stream: &Arc<CudaStream>, buffer: &CudaSlice<T>) -> Vec<T> {
    stream.clone_dtoh(buffer).unwrap()
}

/// Bits of what `draw` gives by the device's state and by the host's source: equal, and not those of the source alone.
fn compare<R: PartialEq + std::fmt::Debug>(draw: impl Fn(&Arc<CudaStream>, NoiseSource, Option<In<'_, u64>>) -> R) {
    let stream = stream();
    for (state, offset) in STATES {
        let on_device = stream.clone_htod(&state).unwrap();
        // The source's own seed counts for nothing.
        let source = NoiseSource::new(!state[0], offset);
        let got = draw(&stream, source, Some(In::from(&on_device)));
        let want = draw(&stream, NoiseSource::new(state[0], state[1].wrapping_add(offset)), None);
        assert_eq!(got, want, "state {state:x?}, offset {offset:#x}");
        assert_eq!(source.with_state(state), NoiseSource::new(state[0], state[1].wrapping_add(offset)));
        assert_ne!(got, draw(&stream, source, None), "the source alone draws the same");
        assert_eq!(read(&stream, &on_device), state, "a draw changes no state");
    }
}

#[test]
fn noisy_by_a_state() {
    let kernels = device::kernels();
    for (tokens, experts, top_k) in [(40, 24, 3), (5, 700, 4)] {
        let [clean, raw] = [1, 2].map(|seed| uniform(seed, tokens * experts, 1.0));
        compare(|stream, noise, state| {
            let desc = NoisyDesc::new(tokens, experts, NoisyRule::new(top_k, noise));
            let (clean, raw) = (stream.clone_htod(&clean).unwrap(), stream.clone_htod(&raw).unwrap());
            let mut ids = stream.alloc_zeros::<i32>(tokens * top_k).unwrap();
            let mut weights = stream.alloc_zeros::<f32>(tokens * top_k).unwrap();
            let mut noisy = stream.alloc_zeros::<f32>(tokens * experts).unwrap();
            let mut args = NoisyArgs::new(NoisyLogits::apart(&clean, &raw), &mut ids, &mut weights).noisy(&mut noisy);
            args.noise_state = state;
            noisy::forward(kernels, stream, &desc, args).unwrap();
            (read(stream, &ids), read(stream, &weights), read(stream, &noisy))
        });
    }
}

#[test]
fn hierarchical_by_a_state() {
    let kernels = device::kernels();
    let (tokens, groups, experts) = (30, 4, 6);
    let [primary, all] = [tokens * groups * 2, tokens * groups * experts * 2];
    let (primary, all) = (uniform(3, primary, 1.0), uniform(4, all, 1.0));
    compare(|stream, noise, state| {
        let desc = HierarchicalDesc::new(tokens, groups, experts, NoisyRule::new(2, noise), NoisyRule::new(3, noise));
        let (primary, all) = (stream.clone_htod(&primary).unwrap(), stream.clone_htod(&all).unwrap());
        let ints = |len: usize| stream.alloc_zeros::<i32>(len).unwrap();
        let floats = |len: usize| stream.alloc_zeros::<f32>(len).unwrap();
        let (mut primary_ids, mut primary_weights) = (ints(tokens * 2), floats(tokens * 2));
        let (mut ids, mut weights) = (ints(tokens * 6), floats(tokens * 6));
        let (mut primary_noisy, mut noisy) = (floats(tokens * groups), floats(tokens * 2 * experts));
        let (mut counts_g, mut counts_e) = (ints(groups), ints(groups * experts));
        let [mut importance_g, mut load_g] = [(); 2].map(|()| floats(groups));
        let [mut importance_e, mut load_e] = [(); 2].map(|()| floats(groups * experts));
        let [mut losses_g, mut losses_e] = [(); 2].map(|()| floats(2));
        let mut workspace =
            Workspace::new(stream, hierarchical::workspace_bytes(&desc, kernels.device()).unwrap()).unwrap();
        let first = NoisySums::new(&mut counts_g, &mut importance_g, &mut load_g, &mut losses_g);
        let first = PrimaryOutputs::new(&mut primary_ids, &mut primary_weights, first).noisy(&mut primary_noisy);
        let mut args = HierarchicalArgs::new(
            NoisyLogits::together(&primary),
            NoisyLogits::together(&all),
            first,
            &mut ids,
            &mut weights,
            NoisySums::new(&mut counts_e, &mut importance_e, &mut load_e, &mut losses_e),
            &mut workspace,
        )
        .noisy(&mut noisy);
        args.noise_state = state;
        hierarchical::forward(kernels, stream, &desc, args).unwrap();
        (
            read(stream, &ids),
            read(stream, &weights),
            read(stream, &primary_noisy),
            read(stream, &noisy),
            read(stream, &losses_e),
        )
    });
}

#[test]
fn sampled_by_a_state() {
    let kernels = device::kernels();
    let (tokens, experts, top_k) = (50, 40, 3);
    let logits = uniform(5, tokens * experts, 2.0);
    compare(|stream, noise, state| {
        let desc = SampledDesc::new(tokens, experts, SamplingRule::new(top_k, noise));
        let logits = stream.clone_htod(&logits).unwrap();
        let mut ids = stream.alloc_zeros::<i32>(tokens * top_k).unwrap();
        let mut weights = stream.alloc_zeros::<f32>(tokens * top_k).unwrap();
        let mut perturbed = stream.alloc_zeros::<f32>(tokens * experts).unwrap();
        let mut args = SampledArgs::new(&logits, &mut ids, &mut weights).perturbed(&mut perturbed);
        args.noise_state = state;
        sampled::forward(kernels, stream, &desc, args).unwrap();
        (read(stream, &ids), read(stream, &weights), read(stream, &perturbed))
    });
}

fn jitter_by_a_state<T: Element + PartialEq + std::fmt::Debug>() {
    let values: Vec<T> = uniform(6, 1003, 1.0).into_iter().map(T::from_f32).collect();
    compare(|stream, noise, state| {
        let desc = JitterDesc::new(T::DTYPE, values.len(), 0.25, noise);
        let mut y = stream.clone_htod(&values).unwrap();
        let mut args = JitterArgs::in_place(&mut y);
        args.noise_state = state;
        jitter::forward(device::kernels(), stream, &desc, args).unwrap();
        read(stream, &y)
    });
}

#[test]
fn jitter_of_every_type_by_a_state() {
    jitter_by_a_state::<bf16>();
    jitter_by_a_state::<f16>();
    jitter_by_a_state::<f32>();
}

#[test]
fn admission_by_a_state() {
    let (tokens, experts) = (200, 6);
    let mut rng = fastrand::Rng::with_seed(7);
    let ids: Vec<i32> = (0..tokens).flat_map(|_| [rng.i32(0..3), rng.i32(3..6)]).collect();
    let weights: Vec<f32> = (0..tokens).flat_map(|_| [0.7, 0.5 * rng.f32()]).collect();
    compare(|stream, noise, state| {
        let desc = AdmissionDesc::new(tokens, AdmissionRule::gshard(experts, 20, 64, noise));
        let (ids, weights) = (stream.clone_htod(&ids).unwrap(), stream.clone_htod(&weights).unwrap());
        let mut admitted = stream.alloc_zeros::<i32>(tokens * 2).unwrap();
        let mut admitted_weights = stream.alloc_zeros::<f32>(tokens * 2).unwrap();
        let mut workspace = Workspace::new(stream, admission::workspace_bytes(&desc).unwrap()).unwrap();
        let mut args = AdmissionArgs::new(&ids, &weights, &mut admitted, &mut admitted_weights, &mut workspace);
        args.noise_state = state;
        admission::forward(device::kernels(), stream, &desc, args).unwrap();
        (read(stream, &admitted), read(stream, &admitted_weights))
    });
}

fn dropout_by_a_state<T: Element + PartialEq + std::fmt::Debug>() {
    let (rows, n, k) = (40, 24, 16);
    let cast = |values: Vec<f32>| -> Vec<T> { values.into_iter().map(T::from_f32).collect() };
    let (a, b) = (cast(uniform(8, rows * k, 1.0)), cast(uniform(9, n * k, 1.0)));
    let desc = GemmDesc::new(T::DTYPE, Rows::Dense(rows), n, k);
    compare(|stream, noise, state| {
        let (a, b) = (stream.clone_htod(&a).unwrap(), stream.clone_htod(&b).unwrap());
        let mut out = stream.alloc_zeros::<T>(rows * n).unwrap();
        let mut args = GemmArgs::new(&a, Weight::new(&b), &mut out).dropout(Dropout::new(0.4, noise));
        args.noise_state = state;
        gemm::forward(device::kernels(), stream, &desc, args).unwrap();
        read(stream, &out)
    });
}

#[test]
fn dropout_of_every_type_by_a_state() {
    dropout_by_a_state::<bf16>();
    dropout_by_a_state::<f16>();
    dropout_by_a_state::<f32>();
}

#[test]
fn a_state_moves_on_as_the_reference_says() {
    let stream = stream();
    for (state, draws) in [([3, 4], 0), ([5, 0xffff_ffff], 1), ([6, 7], 0x1234_5678_9abc_def0), ([8, u64::MAX - 1], 5)]
    {
        let mut on_device = stream.clone_htod(&[state[0], state[1], 77]).unwrap();
        noise_state::advance(device::kernels(), &stream, &mut on_device, draws).unwrap();
        let [seed, offset] = reference::noise_state::advance(state, draws);
        assert_eq!(read(&stream, &on_device), [seed, offset, 77]);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (stream, kernels) = (stream(), device::kernels());
    let mut state = stream.clone_htod(&[1u64, 2]).unwrap();
    let mut y = stream.alloc_zeros::<f32>(8).unwrap();
    let desc = JitterDesc::new(Dtype::F32, 8, 0.5, NoiseSource::new(1, 0));
    let half = state.slice(..1);
    let short = jitter::forward(kernels, &stream, &desc, JitterArgs::in_place(&mut y).noise_state(&half));
    assert_eq!(short, Err(Error::BufferTooShort { operation: "jitter", argument: "noise_state", needed: 2, got: 1 }));
    let short = noise_state::advance(kernels, &stream, &mut state.slice_mut(..1), 1).unwrap_err();
    assert_eq!(short.argument(), Some("state"));

    // A state where nothing is drawn.
    let (a, b) = (stream.alloc_zeros::<f32>(64).unwrap(), stream.alloc_zeros::<f32>(64).unwrap());
    let product = GemmDesc::new(Dtype::F32, Rows::Dense(1), 8, 8);
    let idle =
        gemm::forward(kernels, &stream, &product, GemmArgs::new(&a, Weight::new(&b), &mut y).noise_state(&state));
    assert!(matches!(idle, Err(Error::Unexpected { operation: "gemm", argument: "noise_state", .. })), "{idle:?}");

    let (ids, weights) = (stream.clone_htod(&[0i32]).unwrap(), stream.clone_htod(&[1.0f32]).unwrap());
    let mut admitted = stream.alloc_zeros::<i32>(1).unwrap();
    let rule = AdmissionDesc::new(1, AdmissionRule::new(2, 1, 1, 1));
    let mut workspace = Workspace::new(&stream, admission::workspace_bytes(&rule).unwrap()).unwrap();
    let args = AdmissionArgs::new(&ids, &weights, &mut admitted, &mut y, &mut workspace).noise_state(&state);
    let idle = admission::forward(kernels, &stream, &rule, args);
    assert!(matches!(idle, Err(Error::Unexpected { operation: "admission", argument: "noise_state", .. })), "{idle:?}");

    let layer = Step::new(&stream, 3);
    let mut out = layer.outputs();
    let args = LayerArgs::new(&layer.x, &mut out.y).noise_state(&state);
    let idle = layer.plan().forward(kernels, &stream, &layer.weights(), args, &mut out.workspace);
    assert!(matches!(idle, Err(Error::Unexpected { operation: "layer", argument: "noise_state", .. })), "{idle:?}");
}

/// A step that draws three times: noisy gating, an admission's second experts, dropout inside the experts.
struct Step {
    stream: Arc<CudaStream>,
    kernels: &'static Kernels,
    desc: LayerDesc,
    tokens: usize,
    clean: CudaSlice<f32>,
    raw: CudaSlice<f32>,
    x: CudaSlice<bf16>,
    router: CudaSlice<bf16>,
    gate_up: CudaSlice<bf16>,
    down: CudaSlice<bf16>,
}

struct Outputs {
    ids: CudaSlice<i32>,
    weights: CudaSlice<f32>,
    admitted: CudaSlice<i32>,
    y: CudaSlice<bf16>,
    workspace: Workspace,
}

const EXPERTS: usize = 8;

impl Step {
    fn new(stream: &Arc<CudaStream>, tokens: usize) -> Step {
        let (hidden, intermediate) = (32, 24);
        let upload = |seed, len| {
            let values: Vec<bf16> = uniform(seed, len, 0.5).into_iter().map(bf16::from_f32).collect();
            stream.clone_htod(&values).unwrap()
        };
        Step {
            stream: stream.clone(),
            kernels: device::kernels(),
            desc: LayerDesc::new(Dtype::Bf16, hidden, intermediate, EXPERTS, 2),
            tokens,
            clean: stream.clone_htod(&uniform(11, tokens * EXPERTS, 1.0)).unwrap(),
            raw: stream.clone_htod(&uniform(12, tokens * EXPERTS, 1.0)).unwrap(),
            x: upload(13, tokens * hidden),
            router: upload(14, EXPERTS * hidden),
            gate_up: upload(15, EXPERTS * 2 * intermediate * hidden),
            down: upload(16, EXPERTS * hidden * intermediate),
        }
    }

    /// The layer, with second experts drawn by offset 1 of `noise`.
    fn drawing(self, noise: NoiseSource) -> Step {
        let rule = AdmissionRule::gshard(EXPERTS, 12, self.tokens, noise);
        Step { desc: self.desc.admission(Some(rule)), ..self }
    }

    fn plan(&self) -> moe_kernels::layer::LayerPlan {
        self.desc.plan(self.tokens, self.kernels.device()).unwrap()
    }

    fn weights(&self) -> LayerWeights<'_> {
        let experts = ExpertWeights::new(Weight::new(&self.gate_up), Weight::new(&self.down));
        LayerWeights::new(RouterWeights::new(&self.router), experts)
    }

    fn outputs(&self) -> Outputs {
        let choices = 2 * self.tokens;
        Outputs {
            ids: self.stream.alloc_zeros(choices).unwrap(),
            weights: self.stream.alloc_zeros(choices).unwrap(),
            admitted: self.stream.alloc_zeros(choices).unwrap(),
            y: self.stream.alloc_zeros(self.tokens * self.desc.hidden).unwrap(),
            workspace: Workspace::new(&self.stream, self.plan().workspace_bytes()).unwrap(),
        }
    }

    /// Noisy gating by `[0]`, dropout by `[1]`, and the layer by its own rule.
    fn enqueue(&self, out: &mut Outputs, noise: [NoiseSource; 2], state: Option<&CudaSlice<u64>>) {
        let gating = NoisyDesc::new(self.tokens, EXPERTS, NoisyRule::new(2, noise[0]));
        let mut args = NoisyArgs::new(NoisyLogits::apart(&self.clean, &self.raw), &mut out.ids, &mut out.weights);
        args.noise_state = state.map(In::from);
        noisy::forward(self.kernels, &self.stream, &gating, args).unwrap();
        let mut args = LayerArgs::new(&self.x, &mut out.y)
            .choices(Choices::new(&out.ids, &out.weights))
            .route(RouteArgs::new().ids(&mut out.admitted))
            .dropout(Dropout::new(0.3, noise[1]));
        args.noise_state = state.map(In::from);
        self.plan().forward(self.kernels, &self.stream, &self.weights(), args, &mut out.workspace).unwrap();
    }

    fn read(&self, out: &Outputs) -> (Vec<i32>, Vec<i32>, Vec<bf16>) {
        (read(&self.stream, &out.ids), read(&self.stream, &out.admitted), read(&self.stream, &out.y))
    }
}

/// Route, experts and combine by a state are the whole layer by that state: bits of `admitted` and `y`.
#[test]
fn a_layer_in_parts_by_a_state() {
    let stream = stream();
    let own = [0, 1, 2].map(|offset| NoiseSource::new(0, offset));
    let step = Step::new(&stream, 40).drawing(own[1]);
    let state = stream.clone_htod(&[21u64, 1 << 40]).unwrap();
    let mut out = step.outputs();
    step.enqueue(&mut out, [own[0], own[2]], Some(&state));
    let whole = step.read(&out);

    let (plan, kernels, slots) = (step.plan(), step.kernels, 2 * step.tokens);
    let mut dispatched = Dispatched::new(&stream, &plan.route().rows()).unwrap();
    let choices = Choices::new(&out.ids, &out.weights);
    let mut admitted = stream.alloc_zeros::<i32>(slots).unwrap();
    let args = RouteArgs::new().ids(&mut admitted).noise_state(&state);
    plan.route().forward_choices(kernels, &stream, choices, args, &mut dispatched, &mut out.workspace).unwrap();
    let mut y_slots = stream.alloc_zeros::<bf16>(slots * step.desc.hidden).unwrap();
    let dropout = Dropout::new(0.3, own[2]);
    let args = ExpertsArgs::new(&step.x, &dispatched, &mut y_slots).dropout(dropout).noise_state(&state);
    plan.experts().forward(kernels, &stream, &step.weights().experts, args, &mut out.workspace).unwrap();
    plan.experts().combine(kernels, &stream, CombineArgs::new(&y_slots, &dispatched, &mut out.y)).unwrap();
    assert_eq!((read(&stream, &admitted), read(&stream, &out.y)), (whole.1, whole.2));
}

#[test]
fn a_captured_graph_draws_anew_at_each_replay() {
    let stream = stream();
    // Offsets 0, 1 and 2 of the state.
    let own = [0, 1, 2].map(|offset| NoiseSource::new(0, offset));
    let step = Step::new(&stream, 40).drawing(own[1]);
    let kernels = step.kernels;
    let start = [0xfeed_beef_0000_0001, 0xffff_fffd];
    let mut state = stream.clone_htod(&start).unwrap();
    let mut out = step.outputs();
    let gating = NoisyDesc::new(step.tokens, EXPERTS, NoisyRule::new(2, own[0]));
    kernels
        .preload(
            step.plan()
                .stages_of_choices()
                .map(|(_, selection)| selection.kernel)
                .chain([noisy::select(&gating, kernels.device(), false).unwrap().kernel, noise_state::select().kernel]),
        )
        .unwrap();

    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    step.enqueue(&mut out, [own[0], own[2]], Some(&state));
    noise_state::advance(kernels, &stream, &mut state, 3).unwrap();
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).unwrap().expect("a graph");

    let mut now = start;
    let mut draws = Vec::new();
    for replay in 0..3 {
        graph.launch().unwrap();
        let got = step.read(&out);
        let host = own.map(|noise| noise.with_state(now));
        let by_host = Step::new(&stream, 40).drawing(host[1]);
        let mut want = by_host.outputs();
        by_host.enqueue(&mut want, [host[0], host[2]], None);
        assert_eq!(got, by_host.read(&want), "replay {replay}");
        // The gate's noise against plain host code too.
        let rule = NoisyRule::new(2, host[0]);
        let (clean, raw) = (read(&stream, &step.clean), read(&stream, &step.raw));
        assert_eq!(got.0, reference::noisy::noisy_top_k(&clean, &raw, EXPERTS, &rule).unwrap().ids);
        draws.push(got);
        now = reference::noise_state::advance(now, 3);
    }
    assert_eq!(read(&stream, &state), now);
    for (one, other) in [(0, 1), (0, 2), (1, 2)] {
        assert_ne!(draws[one].0, draws[other].0, "ids of replays {one} and {other}");
        assert_ne!(draws[one].2, draws[other].2, "outputs of replays {one} and {other}");
    }
}
