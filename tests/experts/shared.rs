//! Layers with a shared expert: in the launches of the others or its own, gated or not, in one call, by choices from elsewhere, and in parts.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};
use half::bf16;
use moe_kernels::experts::combine::CombineArgs;
use moe_kernels::experts::{Dispatched, Weight};
use moe_kernels::layer::{
    Choices, ExpertWeights, ExpertsArgs, LayerArgs, LayerDesc, LayerPlan, LayerWeights, RouteArgs, RouterWeights,
    SharedDesc, SharedWeights, Stage, Weighting,
};
use moe_kernels::reference;
use moe_kernels::reference::activation::activate_glu;
use moe_kernels::reference::gemm::ExpertMatrix;
use moe_kernels::rules::{Glu, Layout};
use moe_kernels::{Dtype, Selection, Workspace};

use crate::device;
use crate::values::{generator, normals, wide};

/// A layer with a shared expert like the others, drawn.
struct Layer {
    desc: LayerDesc,
    tokens: usize,
    x: Vec<bf16>,
    router: Vec<bf16>,
    gate: Vec<bf16>,
    /// The experts' two matrices, then the shared expert's.
    matrices: [Vec<bf16>; 4],
}

/// What a layer writes.
#[derive(Debug, PartialEq)]
struct Results {
    y: Vec<bf16>,
    shared_hidden: Vec<bf16>,
    shared_before: Vec<bf16>,
    /// What stands before the activation of the routed rows.
    before: Vec<bf16>,
    /// Logits of the gate.
    gate: Vec<f32>,
}

impl Layer {
    fn draw(rng: &mut fastrand::Rng, gated: bool) -> Layer {
        // A quarter of the widths is no multiple of 8.
        let mut width = || if rng.usize(..4) == 0 { rng.usize(1..150) } else { 8 * rng.usize(1..20) };
        let (hidden, intermediate) = (width(), width());
        let (experts, tokens) = (rng.usize(2..9), rng.usize(1..200));
        let top_k = rng.usize(1..=experts.min(4));
        let weighting = [Weighting::Output, Weighting::Input, Weighting::Activation][rng.usize(..3)];
        let desc = LayerDesc::new(Dtype::Bf16, hidden, intermediate, experts, top_k).weighting(weighting);
        let desc = desc.shared(Some(SharedDesc::new(intermediate, desc.mlp).gated(gated)));
        eprintln!("{tokens} tokens, {desc:?}");
        let (down, up) = ((intermediate as f64).powf(-0.5), (hidden as f64).powf(-0.5));
        let both = 2 * intermediate * hidden;
        Layer {
            desc,
            tokens,
            x: normals(rng, tokens * hidden, 1.0),
            router: normals(rng, experts * hidden, up),
            gate: normals(rng, hidden, up),
            matrices: [(experts * both, up), (experts * both / 2, down), (both, up), (both / 2, down)]
                .map(|(len, scale)| normals(rng, len, scale)),
        }
    }

    fn gated(&self) -> bool {
        self.desc.shared.is_some_and(|shared| shared.gated)
    }

    /// Gate and up of the shared expert in two tensors, which is another form than the experts'.
    fn apart(mut self) -> Layer {
        if let Some(shared) = &mut self.desc.shared {
            shared.mlp.gate_up = shared.mlp.gate_up.glu(Glu::Apart);
        }
        self
    }

    /// `run(plan, x, weights, workspace)` with everything on the device.
    fn on_device<R>(
        &self,
        stream: &Arc<CudaStream>,
        run: impl FnOnce(&LayerPlan, &CudaSlice<bf16>, &LayerWeights<'_>, &mut Workspace) -> R,
    ) -> R {
        let plan = self.desc.plan(self.tokens, device::kernels().device()).unwrap();
        let upload = |values: &Vec<bf16>| stream.clone_htod(values).unwrap();
        let [gate_up, down, shared_up, shared_down] = self.matrices.each_ref().map(upload);
        let (x, router, gate) = (upload(&self.x), upload(&self.router), upload(&self.gate));
        let (gates, ups) = shared_up.split_at(shared_up.len() / 2);
        let apart = self.desc.shared.is_some_and(|shared| shared.mlp.gate_up.glu == Glu::Apart);
        let shared_up = if apart { Weight::apart(&gates, &ups) } else { Weight::new(&shared_up) };
        let mut shared = SharedWeights::new(shared_up, Weight::new(&shared_down));
        if self.gated() {
            shared = shared.gate(&gate);
        }
        let experts = ExpertWeights::new(Weight::new(&gate_up), Weight::new(&down)).shared(shared);
        let weights = LayerWeights::new(RouterWeights::new(&router), experts);
        let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
        run(&plan, &x, &weights, &mut workspace)
    }

    /// In one call, by the layer's own choices, which are returned, or those given.
    fn run(&self, given: Option<&(Vec<i32>, Vec<f32>)>) -> (Results, (Vec<i32>, Vec<f32>)) {
        let (kernels, stream) = (device::kernels(), device::stream());
        let LayerDesc { hidden, intermediate, top_k, .. } = self.desc;
        self.on_device(&stream, |plan, x, weights, workspace| {
            let zeros = |columns: usize| stream.alloc_zeros::<bf16>(self.tokens * columns).unwrap();
            let [mut y, mut h, mut before] = [hidden, intermediate, 2 * intermediate].map(zeros);
            let mut routed = stream.alloc_zeros::<bf16>(self.tokens * top_k * 2 * intermediate).unwrap();
            let mut gate = stream.alloc_zeros::<f32>(self.tokens).unwrap();
            let mut ids = stream.alloc_zeros::<i32>(self.tokens * top_k).unwrap();
            let mut choice_weights = stream.alloc_zeros::<f32>(self.tokens * top_k).unwrap();
            let mut args = LayerArgs::new(x, &mut y).shared_hidden(&mut h).shared_pre_activation(&mut before);
            args = args.pre_activation(&mut routed);
            if self.gated() {
                args = args.shared_gate(&mut gate);
            }
            let given =
                given.map(|(ids, weights)| (stream.clone_htod(ids).unwrap(), stream.clone_htod(weights).unwrap()));
            args = match &given {
                Some((ids, weights)) => args.choices(Choices::new(ids, weights)),
                None => args.route(RouteArgs::new().ids(&mut ids).weights(&mut choice_weights)),
            };
            plan.forward(kernels, &stream, weights, args, workspace).unwrap();
            let [y, shared_hidden, shared_before] = [&y, &h, &before].map(|values| stream.clone_dtoh(values).unwrap());
            let before = stream.clone_dtoh(&routed).unwrap();
            let results = Results { y, shared_hidden, shared_before, before, gate: stream.clone_dtoh(&gate).unwrap() };
            (results, (stream.clone_dtoh(&ids).unwrap(), stream.clone_dtoh(&choice_weights).unwrap()))
        })
    }

    /// `y` and the gate's logits, part by part.
    fn parts(&self) -> (Vec<bf16>, Vec<f32>) {
        let (kernels, stream) = (device::kernels(), device::stream());
        let hidden = self.desc.hidden;
        self.on_device(&stream, |plan, x, weights, workspace| {
            let mut dispatched = Dispatched::new(&stream, &plan.route().rows()).unwrap();
            let args = RouteArgs::new();
            plan.route().forward(kernels, &stream, &weights.router, x, args, &mut dispatched, workspace).unwrap();
            let rows = |rows: usize| stream.alloc_zeros::<bf16>(rows * hidden).unwrap();
            let [mut y_slots, mut shared, mut y] = [plan.experts().rows().slots, self.tokens, self.tokens].map(rows);
            let mut gate = stream.alloc_zeros::<f32>(self.tokens).unwrap();
            let mut args = ExpertsArgs::new(x, &dispatched, &mut y_slots).shared(&mut shared);
            if self.gated() {
                args = args.shared_gate(&mut gate);
            }
            plan.experts().forward(kernels, &stream, &weights.experts, args, workspace).unwrap();
            let mut args = CombineArgs::new(&y_slots, &dispatched, &mut y).addend(&shared);
            if self.gated() {
                args = args.addend_gate(&gate);
            }
            plan.experts().combine(kernels, &stream, args).unwrap();
            (stream.clone_dtoh(&y).unwrap(), stream.clone_dtoh(&gate).unwrap())
        })
    }

    fn reference(&self) -> reference::layer::Forward {
        let LayerDesc { hidden, intermediate, top_k, gating, .. } = self.desc;
        let matrix = |weight, n, k, glu| ExpertMatrix { weight, bias: None, n, k, glu, layout: Layout::Nk };
        let mlp = |i: usize| {
            let (up, down) = (&self.matrices[i][..], &self.matrices[i + 1][..]);
            (matrix(up, intermediate, hidden, Glu::Split), matrix(down, hidden, intermediate, Glu::None))
        };
        let (up, down) = mlp(0);
        let layer = reference::layer::Layer {
            hidden,
            router_weight: &self.router,
            router_bias: None,
            correction_bias: None,
            top_k,
            gating,
            weighting: self.desc.weighting,
            capacity: None,
            up,
            activation: self.desc.mlp.activation,
            activations: None,
            down,
            shared: Some(mlp(2)),
            shared_activation: None,
            shared_gate: self.gated().then_some(&self.gate[..]),
            scales: [1.0; 2],
            bias: None,
            null: None,
        };
        reference::layer::forward(&self.x, &layer).unwrap()
    }

    /// Compares with the reference.
    fn check(&self, got: &Results) {
        let (want, LayerDesc { hidden, intermediate, mlp, .. }) = (self.reference(), self.desc);
        close("y", &wide(&got.y), &want.y, 1e-2);
        if let Some(logits) = &want.shared_gate {
            close("gate", &wide(&got.gate), logits, 1e-5);
        }
        for (i, h) in got.shared_hidden.iter().enumerate() {
            let (t, column) = (i / intermediate, i % intermediate);
            let row = &got.shared_before[t * 2 * intermediate..][..2 * intermediate];
            let want = activate_glu(mlp.activation, row[column].to_f64(), row[intermediate + column].to_f64());
            // Each of both was rounded for itself.
            assert!((h.to_f64() - want).abs() <= 0.03 * want.abs() + 1e-6, "{t}, {column}: {h}, {want}");
        }
        let up = ExpertMatrix {
            weight: &self.matrices[0][..],
            bias: None,
            n: intermediate,
            k: hidden,
            glu: Glu::Split,
            layout: Layout::Nk,
        };
        let scale = want.plan.slot_weight(&want.weights);
        let scale = (self.desc.weighting == Weighting::Input).then_some(&scale[..]);
        let before = reference::gemm::grouped_pre_activation(&self.x, &up, &want.plan, true, scale).unwrap();
        close("before the activation of routed rows", &wide(&got.before), &before, 1e-2);
        let dot = |x: &[bf16], w: &[bf16]| x.iter().zip(w).map(|(x, w)| x.to_f64() * w.to_f64()).sum::<f64>();
        let rows = |x: &[bf16]| self.matrices[2].chunks(hidden).map(|w| dot(x, w)).collect::<Vec<f64>>();
        let sums: Vec<f64> = self.x.chunks(hidden).flat_map(rows).collect();
        close("before the activation", &wide(&got.shared_before), &sums, 1e-2);
    }
}

fn close(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let off = norm(&mut got.iter().zip(want).map(|(got, want)| got - want));
    let norm = norm(&mut want.iter().copied());
    assert!(off <= tolerance * norm, "{what}: off by {off:.3e} of {norm:.3e}");
}

/// In the others' launches and in its own it has the same bits: both add in the same order.
#[test]
fn a_shared_expert_joins_the_others() {
    let mut rng = generator("a shared expert", Dtype::Bf16);
    for round in 0..12 {
        let layer = Layer::draw(&mut rng, round % 2 == 0);
        let plan = layer.desc.plan(layer.tokens, device::kernels().device()).unwrap();
        // Few tokens have some of these in one.
        let together = |stages: &mut dyn Iterator<Item = (Stage, Selection)>| {
            stages.filter(|(stage, _)| matches!(stage, Stage::Route | Stage::DownCombine)).count()
        };
        assert_eq!(plan.launches() + together(&mut plan.stages()), 5, "a gate costs no launch");
        let by_choices = plan.stages_of_choices().count() + together(&mut plan.stages_of_choices());
        assert_eq!(by_choices, if layer.gated() { 5 } else { 4 }, "without the router the gate has one");
        assert_eq!(plan.stages_of_choices().any(|(stage, _)| stage == Stage::SharedGate), layer.gated());

        let (whole, choices) = layer.run(None);
        layer.check(&whole);
        assert_eq!(layer.run(Some(&choices)).0, whole, "by choices from elsewhere");
        assert_eq!(layer.parts(), (whole.y.clone(), whole.gate.clone()), "in parts");
        let apart = layer.apart();
        let plan = apart.desc.plan(apart.tokens, device::kernels().device()).unwrap();
        assert_eq!(plan.launches() + together(&mut plan.stages()), 7);
        assert_eq!(apart.run(None), (whole, choices), "in launches of its own");
    }
}

/// What contradicts the descriptor is named.
#[test]
fn faults_name_their_argument() {
    let mut rng = generator("faults", Dtype::Bf16);
    let (kernels, stream) = (device::kernels(), device::stream());
    let fault = |layer: &Layer, change: &dyn Fn(&mut LayerWeights<'_>), buffers: [bool; 2]| {
        layer.on_device(&stream, |plan, x, weights, workspace| {
            let mut weights = *weights;
            change(&mut weights);
            let buffer = |len: usize| stream.alloc_zeros::<bf16>(len).unwrap();
            let [mut y, mut h] =
                [layer.desc.hidden, layer.desc.intermediate].map(|columns| buffer(layer.tokens * columns));
            let mut logits = stream.alloc_zeros::<f32>(layer.tokens).unwrap();
            let mut args = LayerArgs::new(x, &mut y);
            if buffers[0] {
                args = args.shared_hidden(&mut h);
            }
            if buffers[1] {
                args = args.shared_gate(&mut logits);
            }
            let got = plan.forward(kernels, &stream, &weights, args, workspace);
            got.map_err(|error| error.argument().map(str::to_owned))
        })
    };
    let (gated, plain) = (Layer::draw(&mut rng, true), Layer::draw(&mut rng, false));
    let named = |argument: &str| Err(Some(argument.to_owned()));
    assert_eq!(fault(&gated, &|_| (), [true, true]), Ok(()));
    let without = |weights: &mut LayerWeights<'_>| weights.experts.shared.as_mut().unwrap().gate = None;
    assert_eq!(fault(&gated, &without, [false, false]), named("shared.gate"));
    let with = |weights: &mut LayerWeights<'_>| {
        let matrix = weights.router.matrix.unwrap();
        weights.experts.shared.as_mut().unwrap().gate = Some(matrix);
    };
    assert_eq!(fault(&plain, &with, [false, false]), named("shared.gate"));
    assert_eq!(fault(&plain, &|_| (), [true, false]), Ok(()));
    assert_eq!(fault(&plain, &|_| (), [false, true]), named("shared_gate"));
    let mut alone = plain;
    alone.desc.shared = None;
    let unshared = |weights: &mut LayerWeights<'_>| weights.experts.shared = None;
    assert_eq!(fault(&alone, &unshared, [true, false]), named("shared_hidden"));
}
