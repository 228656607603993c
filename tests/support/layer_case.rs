//! A layer with random weights, run on the device and computed in f64.

use std::sync::{Arc, OnceLock};

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr};
use moe_kernels::experts::Weight;
use moe_kernels::experts::gemm::SwigluByExpert;
use moe_kernels::layer::{
    ExpertWeights, LayerArgs, LayerDesc, LayerWeights, Mlp, RouteArgs, RouterWeights, SharedWeights, Stage, TokenSums,
    Weighting,
};
use moe_kernels::reference::{activation, gating};
use moe_kernels::rules::{Activation, Bound, Glu, Layout, NullOutput, Swiglu};
use moe_kernels::{Element, Kernels, Workspace};

use super::{compare, device};

pub struct Device {
    pub stream: Arc<CudaStream>,
    pub kernels: &'static Kernels,
    pub soft: Option<&'static softcuda::Control>,
}

pub fn open() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| Device {
        stream: device::context().default_stream(),
        kernels: device::kernels(),
        soft: device::control(),
    })
}

/// A layer, a number of tokens, and which optional inputs there are.
#[derive(Clone, Copy)]
pub struct Case {
    pub desc: LayerDesc,
    pub tokens: usize,
    pub router_bias: bool,
    pub correction_bias: bool,
    pub expert_bias: bool,
    pub residual: bool,
    /// A vector added to every token's sum.
    pub bias: bool,
    /// Every number of a SwiGLU by expert.
    pub by_expert: bool,
}

impl Case {
    pub fn new(desc: LayerDesc, tokens: usize) -> Case {
        Case {
            desc,
            tokens,
            router_bias: false,
            correction_bias: false,
            expert_bias: false,
            residual: false,
            bias: false,
            by_expert: false,
        }
    }
}

/// Tensors, each from a seed of its own.
pub struct Random;

impl Random {
    /// Uniform in (-scale, scale).
    pub fn tensor<T: Element>(seed: u64, len: usize, scale: f32) -> Vec<T> {
        let mut rng = fastrand::Rng::with_seed(seed);
        (0..len).map(|_| T::from_f32((2.0 * rng.f32() - 1.0) * scale)).collect()
    }
}

struct Matrices<T> {
    weight: Vec<T>,
    bias: Option<Vec<T>>,
}

struct MlpValues<T> {
    gate_up: Matrices<T>,
    down: Matrices<T>,
}

impl<T: Element> MlpValues<T> {
    fn new(seed: u64, case: &Case, mlp: &Mlp, experts: usize, intermediate: usize, bias: bool) -> MlpValues<T> {
        let hidden = case.desc.hidden;
        let columns = if mlp.gate_up.glu == Glu::None { intermediate } else { 2 * intermediate };
        let matrices = |seed, n: usize, k: usize| Matrices {
            weight: Random::tensor(seed, experts * n * k, 1.0 / (k as f32).sqrt()),
            bias: bias.then(|| Random::tensor(seed + 1, experts * n, 0.5)),
        };
        MlpValues { gate_up: matrices(seed, columns, hidden), down: matrices(seed + 2, hidden, intermediate) }
    }
}

/// Everything that goes in, on the host.
struct Values<T, W> {
    x: Vec<T>,
    residual: Option<Vec<T>>,
    router: Vec<W>,
    router_bias: Option<Vec<f32>>,
    correction_bias: Option<Vec<f32>>,
    routed: MlpValues<T>,
    shared: Option<MlpValues<T>>,
    shared_gate: Option<Vec<W>>,
    bias: Option<Vec<T>>,
    /// Alpha, bounds of gate and up value, offset, each for every expert.
    swiglu: Option<[Vec<f32>; 4]>,
}

impl<T: Element, W: Element> Values<T, W> {
    fn new(case: &Case) -> Values<T, W> {
        let LayerDesc { hidden, experts, intermediate, mlp, .. } = &case.desc;
        let elements = case.tokens * hidden;
        Values {
            x: Random::tensor(1, elements, 1.0),
            residual: case.residual.then(|| Random::tensor(2, elements, 1.0)),
            router: Random::tensor(3, experts * hidden, 0.3),
            router_bias: case.router_bias.then(|| Random::tensor(4, *experts, 0.5)),
            correction_bias: case.correction_bias.then(|| Random::tensor(5, *experts, 0.5)),
            routed: MlpValues::new(10, case, mlp, case.desc.local_experts(), *intermediate, case.expert_bias),
            shared: case
                .desc
                .shared
                .map(|shared| MlpValues::new(20, case, &shared.mlp, 1, shared.intermediate, case.expert_bias)),
            shared_gate: case.desc.shared.filter(|shared| shared.gated).map(|_| Random::tensor(30, *hidden, 0.3)),
            bias: case.bias.then(|| Random::tensor(31, *hidden, 0.5)),
            swiglu: case.by_expert.then(|| {
                let around = |seed, middle: f32| -> Vec<f32> {
                    Random::tensor::<f32>(seed, *experts, 0.2).iter().map(|v| middle + v).collect()
                };
                [around(32, 1.3), around(33, 0.4), around(34, 0.5), around(35, 0.7)]
            }),
        }
    }
}

/// Everything that comes out, in f64.
struct Expected {
    logits: Vec<f64>,
    ids: Vec<i32>,
    weights: Vec<f64>,
    counts: Vec<i32>,
    y: Vec<f64>,
}

fn wide<T: Element>(value: T) -> f64 {
    value.to_f32().into()
}

/// `scale * W x + bias` of one expert.
fn linear<T: Element>(
    matrices: &Matrices<T>,
    layout: Layout,
    expert: usize,
    x: &[f64],
    scale: f64,
) -> impl Fn(usize, usize) -> f64 {
    let k = x.len();
    move |row, rows| {
        let at = |column| match layout {
            Layout::Nk => (expert * rows + row) * k + column,
            Layout::Kn => (expert * k + column) * rows + row,
            other => unreachable!("no case has a layout {other:?}"),
        };
        let sum: f64 = (0..k).map(|column| wide(matrices.weight[at(column)]) * x[column]).sum();
        scale * sum + matrices.bias.as_ref().map_or(0.0, |bias| wide(bias[expert * rows + row]))
    }
}

fn apply(activation: Activation, value: f64) -> f64 {
    let gauss = |v: f64| 0.5 * (1.0 + activation::erf(v / std::f64::consts::SQRT_2));
    match activation {
        Activation::Identity => value,
        Activation::Relu => value.max(0.0),
        Activation::Gelu => value * gauss(value),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (value + 0.044715 * value.powi(3));
            0.5 * value * (1.0 + inner.tanh())
        }
        Activation::ReluSquared => value.max(0.0).powi(2),
        Activation::Silu => value / (1.0 + (-value).exp()),
        other => unreachable!("only with a gate: {other:?}"),
    }
}

/// [`Swiglu`]'s table.
fn swiglu(unit: &Swiglu, gate: f64, up: f64) -> f64 {
    let silu = |linear: f64, gate: f64| linear / (1.0 + (-f64::from(unit.alpha) * gate).exp());
    let gate = match unit.gate {
        Bound::Clamp(limit) if unit.clamp_after => silu(gate, gate).min(limit.into()),
        Bound::Clamp(limit) => silu(gate.min(limit.into()), gate.min(limit.into())),
        Bound::Softcap(cap) => silu(f64::from(cap) * (gate / f64::from(cap)).tanh(), gate),
        _ => silu(gate, gate),
    };
    let up = match unit.up {
        Bound::Clamp(limit) => up.clamp(-f64::from(limit), limit.into()),
        Bound::Softcap(cap) => f64::from(cap) * (up / f64::from(cap)).tanh(),
        _ => up,
    };
    gate * (f64::from(unit.factor) * up + f64::from(unit.offset))
}

/// `scales`: of the input and of what the activation yields.
fn expert_mlp<T: Element>(
    values: &MlpValues<T>,
    mlp: &Mlp,
    expert: usize,
    intermediate: usize,
    x: &[f64],
    [scale, of_hidden]: [f64; 2],
) -> Vec<f64> {
    let first = linear(&values.gate_up, mlp.gate_up.layout, expert, x, scale);
    let gated = |gate: f64, up: f64| match mlp.activation {
        Activation::Swiglu(unit) => swiglu(&unit, gate, up),
        activation => apply(activation, gate) * up,
    };
    let n = intermediate;
    let hidden: Vec<f64> = (0..n)
        .map(|i| match mlp.gate_up.glu {
            Glu::None => apply(mlp.activation, first(i, n)),
            Glu::Split => gated(first(i, 2 * n), first(n + i, 2 * n)),
            Glu::UpFirst => gated(first(n + i, 2 * n), first(i, 2 * n)),
            Glu::Interleaved => gated(first(2 * i, 2 * n), first(2 * i + 1, 2 * n)),
            other => unreachable!("no case has a gate {other:?}"),
        })
        .map(|value| of_hidden * value)
        .collect();
    let second = linear(&values.down, mlp.down.layout, expert, &hidden, 1.0);
    (0..x.len()).map(|row| second(row, x.len())).collect()
}

/// A unit of which every number is an expert's own.
fn of_expert(unit: Swiglu, [alpha, gate, up, offset]: [f32; 4]) -> Swiglu {
    let bound = |bound, value| match bound {
        Bound::Clamp(_) => Bound::Clamp(value),
        Bound::Softcap(_) => Bound::Softcap(value),
        _ => unreachable!("of a bound that there is"),
    };
    unit.alpha(alpha).gate(bound(unit.gate, gate)).up(bound(unit.up, up)).offset(offset)
}

fn expected<T: Element, W: Element>(case: &Case, values: &Values<T, W>) -> Expected {
    let desc = &case.desc;
    let (hidden, experts, top_k) = (desc.hidden, desc.experts, desc.top_k);
    let token = |t: usize| -> Vec<f64> { values.x[t * hidden..][..hidden].iter().map(|&x| wide(x)).collect() };
    let mut logits = Vec::new();
    for t in 0..case.tokens {
        let x = token(t);
        for e in 0..experts {
            let row = &values.router[e * hidden..][..hidden];
            let sum: f64 = row.iter().zip(&x).map(|(&w, &x)| wide(w) * x).sum();
            logits.push(sum + values.router_bias.as_ref().map_or(0.0, |bias| bias[e].into()));
        }
    }
    let gated = gating::gate(&logits, values.correction_bias.as_deref(), experts, top_k, &desc.gating).unwrap();

    let mut counts = vec![0; desc.local_experts()];
    // Slots that an expert took of the current sequence.
    let mut taken = vec![0; experts];
    let mut y = Vec::new();
    for t in 0..case.tokens {
        if desc.capacity.is_some_and(|capacity| t % capacity.tokens_per_sequence == 0) {
            taken.fill(0);
        }
        let x = token(t);
        let mut sum: Vec<f64> = match &values.residual {
            Some(residual) => residual[t * hidden..][..hidden].iter().map(|&r| wide(r)).collect(),
            None => vec![0.0; hidden],
        };
        let mut add = |values: Vec<f64>, weight: f64| {
            sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += weight * value);
        };
        if let (Some(shared), Some(mlp)) = (&desc.shared, &values.shared) {
            let gate = values.shared_gate.as_ref().map(|gate| {
                let logit: f64 = gate.iter().zip(&x).map(|(&w, &x)| wide(w) * x).sum();
                1.0 / (1.0 + (-logit).exp())
            });
            let weight = f64::from(shared.scale) * gate.unwrap_or(1.0);
            add(expert_mlp(mlp, &shared.mlp, 0, shared.intermediate, &x, [1.0; 2]), weight);
        }
        if let Some(bias) = &values.bias {
            add(bias.iter().map(|&value| wide(value)).collect(), 1.0);
        }
        let routed = f64::from(desc.routed_scale);
        for j in t * top_k..(t + 1) * top_k {
            let (expert, weight) = (gated.ids[j] as usize, gated.weights[j]);
            if expert >= desc.local_experts() {
                if desc.null.is_some_and(|null| null.output == NullOutput::Input) {
                    add(x.clone(), routed * weight);
                }
                continue;
            }
            taken[expert] += 1;
            if desc.capacity.is_some_and(|capacity| taken[expert] > capacity.per_expert) {
                continue;
            }
            counts[expert] += 1;
            let (scales, weight) = match desc.weighting {
                Weighting::Input => ([weight, 1.0], 1.0),
                Weighting::Activation => ([1.0, weight], 1.0),
                Weighting::Output => ([1.0; 2], weight),
                other => unreachable!("no case weighs {other:?}"),
            };
            let mut mlp = desc.mlp;
            if let (Some(numbers), Activation::Swiglu(unit)) = (&values.swiglu, &mut mlp.activation) {
                *unit = of_expert(*unit, numbers.each_ref().map(|numbers| numbers[expert]));
            }
            add(expert_mlp(&values.routed, &mlp, expert, desc.intermediate, &x, scales), routed * weight);
        }
        y.extend(sum);
    }
    Expected { logits, ids: gated.ids, weights: gated.weights, counts, y }
}

struct Uploaded<T> {
    weight: CudaSlice<T>,
    bias: Option<CudaSlice<T>>,
}

impl<T: Element> Uploaded<T> {
    fn new(stream: &Arc<CudaStream>, matrices: &Matrices<T>) -> Uploaded<T> {
        Uploaded {
            weight: upload(stream, &matrices.weight),
            bias: matrices.bias.as_ref().map(|bias| upload(stream, bias)),
        }
    }

    fn weight(&self) -> Weight<'_> {
        let weight = Weight::new(&self.weight);
        self.bias.iter().fold(weight, |weight, bias| weight.bias(bias))
    }
}

/// Copies to the device; an empty tensor becomes one unused element.
fn upload<T: DeviceRepr + Default + Clone>(stream: &Arc<CudaStream>, values: &[T]) -> CudaSlice<T> {
    if values.is_empty() {
        return stream.clone_htod(&[T::default()]).expect("device memory");
    }
    stream.clone_htod(values).expect("device memory")
}

/// Elements past the end of each output, which must keep their value.
const GUARD: usize = 64;

/// An output of `len` elements of junk, and its guard.
fn junk<T: Element>(stream: &Arc<CudaStream>, len: usize) -> CudaSlice<T> {
    stream.clone_htod(&vec![T::from_f32(JUNK); len + GUARD]).expect("device memory")
}

const JUNK: f32 = 12288.0;
const INT_JUNK: i32 = -77;

fn int_junk(stream: &Arc<CudaStream>, len: usize) -> CudaSlice<i32> {
    stream.clone_htod(&vec![INT_JUNK; len + GUARD]).expect("device memory")
}

fn read<T: DeviceRepr + Copy + PartialEq + std::fmt::Debug + Default>(
    stream: &Arc<CudaStream>,
    name: &str,
    from: &CudaSlice<T>,
    junk: T,
) -> Vec<T> {
    let mut values = stream.clone_dtoh(from).expect("the kernels ran");
    let guard = values.split_off(values.len() - GUARD);
    assert!(guard.iter().all(|value| *value == junk), "{name}: written past its end");
    values
}

/// What a pass wrote.
struct Got<T> {
    logits: Vec<f32>,
    ids: Vec<i32>,
    weights: Vec<f32>,
    counts: Vec<i32>,
    y: Vec<T>,
}

/// `||got - want|| / ||want||`.
fn relative_error(got: impl Iterator<Item = f64>, want: &[f64]) -> f64 {
    let difference: f64 = got.zip(want).map(|(got, want)| (got - want).powi(2)).sum();
    let norm: f64 = want.iter().map(|want| want.powi(2)).sum();
    (difference / norm.max(f64::MIN_POSITIVE)).sqrt()
}

pub fn check<T: Element + PartialEq + std::fmt::Debug, W: Element + PartialEq>(case: &Case) {
    run::<T, W>(open(), case, &mut None);
}

/// Runs the case twice and compares; makes a workspace if none is given.
pub fn run<T: Element + PartialEq + std::fmt::Debug, W: Element + PartialEq>(
    d: &Device,
    case: &Case,
    workspace: &mut Option<Workspace>,
) {
    let stream = &d.stream;
    let LayerDesc { hidden, experts, top_k, .. } = case.desc;
    let (elements, choices) = (case.tokens * hidden, case.tokens * top_k);
    let values = Values::<T, W>::new(case);
    let inputs = Inputs::new(stream, &values);
    let plan = case.desc.plan(case.tokens, d.kernels.device()).expect("a valid layer");
    let workspace =
        workspace.get_or_insert_with(|| Workspace::new(stream, plan.workspace_bytes()).expect("device memory"));

    let mut pass = || {
        let mut logits = junk::<f32>(stream, case.tokens * experts);
        let (mut ids, mut weights) = (int_junk(stream, choices), junk::<f32>(stream, choices));
        let (mut counts, mut y) = (int_junk(stream, case.desc.local_experts()), junk::<T>(stream, elements));
        let route = RouteArgs::new().logits(&mut logits).ids(&mut ids).weights(&mut weights).counts(&mut counts);
        let mut args = LayerArgs::new(&inputs.x, &mut y).route(route);
        args.residual = inputs.residual.as_ref().map(Into::into);
        let mut stages: Vec<Stage> = Vec::new();
        plan.forward_observed(d.kernels, stream, &inputs.weights(), args, workspace, &mut |stage| stages.push(stage))
            .expect("the layer is enqueued");
        if let Err(error) = stream.synchronize() {
            panic!("{error:?}: {}", d.soft.and_then(|control| control.last_fault()).unwrap_or_default());
        }
        assert_eq!(stages, plan.stages().map(|(stage, _)| stage).collect::<Vec<_>>());
        Got {
            logits: read(stream, "logits", &logits, JUNK),
            ids: read(stream, "ids", &ids, INT_JUNK),
            weights: read(stream, "weights", &weights, JUNK),
            counts: read(stream, "counts", &counts, INT_JUNK),
            y: read(stream, "y", &y, T::from_f32(JUNK)),
        }
    };
    let got = pass();
    let want = expected(case, &values);
    assert_eq!(got.ids, want.ids);
    assert_eq!(got.counts, want.counts);
    for (name, error, most) in [
        ("logits", relative_error(got.logits.iter().map(|&v| v.into()), &want.logits), compare::LAYER_LOGITS),
        ("weights", relative_error(got.weights.iter().map(|&v| v.into()), &want.weights), compare::LAYER_WEIGHTS),
        ("y", relative_error(got.y.iter().map(|&v| wide(v)), &want.y), compare::layer(T::DTYPE)),
    ] {
        println!("{} tokens, {}: {name} off by {error:.1e}", case.tokens, T::DTYPE);
        assert!(error <= most, "{name}: relative error {error:.3e}, at most {most:.0e}");
    }
    let again = pass();
    assert!(got.weights == again.weights, "the same input gave other weights");
    if case.desc.token_sums == TokenSums::Ordered {
        assert!(got.y == again.y, "the same input gave other bits");
    }
    inputs.assert_unchanged(stream, &values);
}

struct Inputs<T, W> {
    x: CudaSlice<T>,
    residual: Option<CudaSlice<T>>,
    router: CudaSlice<W>,
    router_bias: Option<CudaSlice<f32>>,
    correction_bias: Option<CudaSlice<f32>>,
    gate_up: Uploaded<T>,
    down: Uploaded<T>,
    shared: Option<(Uploaded<T>, Uploaded<T>)>,
    shared_gate: Option<CudaSlice<W>>,
    bias: Option<CudaSlice<T>>,
    swiglu: Option<[CudaSlice<f32>; 4]>,
}

impl<T: Element + PartialEq, W: Element + PartialEq> Inputs<T, W> {
    fn new(stream: &Arc<CudaStream>, values: &Values<T, W>) -> Inputs<T, W> {
        Inputs {
            x: upload(stream, &values.x),
            residual: values.residual.as_ref().map(|values| upload(stream, values)),
            router: upload(stream, &values.router),
            router_bias: values.router_bias.as_ref().map(|values| upload(stream, values)),
            correction_bias: values.correction_bias.as_ref().map(|values| upload(stream, values)),
            gate_up: Uploaded::new(stream, &values.routed.gate_up),
            down: Uploaded::new(stream, &values.routed.down),
            shared: values
                .shared
                .as_ref()
                .map(|mlp| (Uploaded::new(stream, &mlp.gate_up), Uploaded::new(stream, &mlp.down))),
            shared_gate: values.shared_gate.as_ref().map(|gate| upload(stream, gate)),
            bias: values.bias.as_ref().map(|bias| upload(stream, bias)),
            swiglu: values.swiglu.as_ref().map(|all| all.each_ref().map(|numbers| upload(stream, numbers))),
        }
    }

    fn weights(&self) -> LayerWeights<'_> {
        let mut router = RouterWeights::new(&self.router);
        router.bias = self.router_bias.as_ref().map(Into::into);
        router.correction_bias = self.correction_bias.as_ref().map(Into::into);
        let mut experts = ExpertWeights::new(self.gate_up.weight(), self.down.weight());
        experts.shared = self.shared.as_ref().map(|(gate_up, down)| {
            let shared = SharedWeights::new(gate_up.weight(), down.weight());
            self.shared_gate.iter().fold(shared, |shared, gate| shared.gate(gate))
        });
        experts.bias = self.bias.as_ref().map(Into::into);
        if let Some([alpha, gate, up, offset]) = &self.swiglu {
            experts.swiglu = SwigluByExpert::new().alpha(alpha).gate(gate).up(up).offset(offset);
        }
        LayerWeights::new(router, experts)
    }

    fn assert_unchanged(&self, stream: &Arc<CudaStream>, values: &Values<T, W>) {
        let same = |got: &CudaSlice<T>, want: &[T]| {
            stream.clone_dtoh(got).expect("the kernels ran").iter().zip(want).all(|(got, want)| got == want)
        };
        assert!(same(&self.x, &values.x), "x was written");
        assert!(same(&self.gate_up.weight, &values.routed.gate_up.weight), "gate_up was written");
        assert!(same(&self.down.weight, &values.routed.down.weight), "down was written");
        assert!(stream.clone_dtoh(&self.router).expect("the kernels ran") == values.router, "router was written");
    }
}

/// Captures the layer on a stream of its own, replays it on other input, and compares with a plain pass.
pub fn captured(case: &Case) {
    type T = half::bf16;
    let d = open();
    let context = d.stream.context();
    let stream = &context.new_stream().expect("a stream");
    // SAFETY: every buffer of this test is used on this stream only.
    unsafe { context.disable_event_tracking() };
    let values = Values::<T, T>::new(case);
    let mut inputs = Inputs::new(stream, &values);
    let plan = case.desc.plan(case.tokens, d.kernels.device()).expect("a valid layer");
    let mut workspace = Workspace::new(stream, plan.workspace_bytes()).expect("device memory");
    let mut y = junk::<T>(stream, case.tokens * case.desc.hidden);
    d.kernels.preload(plan.kernels()).expect("the kernels load");

    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).expect("capture begins");
    let args = LayerArgs::new(&inputs.x, &mut y);
    plan.forward(d.kernels, stream, &inputs.weights(), args, &mut workspace).expect("the layer is captured");
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).expect("capture ends").expect("a graph");

    let untouched = stream.clone_dtoh(&y).expect("a copy");
    assert!(untouched.iter().all(|&value| value == T::from_f32(JUNK)), "capture must not run anything");
    for seed in [100, 200] {
        stream.memcpy_htod(&Random::tensor::<T>(seed, values.x.len(), 1.0), &mut inputs.x).expect("a copy");
        graph.launch().expect("the graph runs");
        let replayed = read(stream, "y", &y, T::from_f32(JUNK));
        let mut direct = junk::<T>(stream, case.tokens * case.desc.hidden);
        let args = LayerArgs::new(&inputs.x, &mut direct);
        plan.forward(d.kernels, stream, &inputs.weights(), args, &mut workspace).expect("the layer is enqueued");
        assert_eq!(replayed, read(stream, "y", &direct, T::from_f32(JUNK)));
    }
}
