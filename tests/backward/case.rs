//! A layer with random weights, its gradients from the device and from the reference.

use std::cell::RefCell;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};
use moe_kernels::capacity::Ids;
use moe_kernels::experts::Weight;
use moe_kernels::experts::gemm::SwigluByExpert;
use moe_kernels::layer::{
    BackwardArgs, BackwardDesc, BackwardPlan, BackwardStage, Choices, ExpertWeights, LatentGradients, LatentWeights,
    LayerArgs, LayerDesc, LayerGradients, LayerPlan, LayerWeights, MapTable, Origin, RouteArgs, RouterGradients,
    RouterWeights, Saved, SharedGradients, SharedWeights, WeightGradients,
};
use moe_kernels::reference::layer::{self, Layer};
use moe_kernels::rules::{Activation, Bound, Dropout, Glu, IDENTITY, IdFormat, NONE, NullOutput};
use moe_kernels::{Element, Error, Kernels, TokenMask, Workspace};

use crate::compare::{Found, GUARD, HELD, JUNK, compare, read};
use crate::device;
use crate::mlp::{Gradients, Mlp, random, upload, upload_numbers};

/// A layer, a number of tokens, what is asked for, and which optional inputs there are.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub desc: LayerDesc,
    pub tokens: usize,
    pub back: BackwardDesc,
    pub router_bias: bool,
    /// Of both products, and of a shared expert's.
    pub biases: bool,
    /// A vector added to every token's sum.
    pub bias: bool,
    /// Every number of a SwiGLU by expert.
    pub by_expert: bool,
    pub dropout: Option<Dropout>,
    /// Whether seed and offset lie on the device, where the next step's are when the pass goes back.
    pub noise_state: bool,
    /// The last tokens that are padding.
    pub padding: usize,
    /// Whether the router sees other rows than the experts.
    pub router_x: bool,
    /// Whether every fifth token's first choice from elsewhere is no expert's number; of 64 bits its lower half is one.
    pub odd_ids: bool,
    /// Size of `dy`.
    pub dy: f32,
    pub seed: u64,
}

impl Case {
    pub fn new(desc: LayerDesc, tokens: usize) -> Case {
        let back = BackwardDesc::new();
        Case {
            desc,
            tokens,
            back,
            router_bias: false,
            biases: false,
            bias: false,
            by_expert: false,
            dropout: None,
            noise_state: false,
            padding: 0,
            router_x: false,
            odd_ids: false,
            dy: 1.0,
            seed: 1,
        }
    }

    pub fn back(self, back: BackwardDesc) -> Case {
        Case { back, ..self }
    }
}

/// Gradients of both experts' products.
const NAMES: [[&str; 6]; 2] = [
    ["gate_up", "gate_up.up", "down", "gate_up.bias", "gate_up.up_bias", "down.bias"],
    [
        "shared.gate_up",
        "shared.gate_up.up",
        "shared.down",
        "shared.gate_up.bias",
        "shared.gate_up.up_bias",
        "shared.down.bias",
    ],
];

/// Everything that a pass reads; `W` is the router's type.
pub struct Problem<T, W> {
    pub case: Case,
    pub stream: Arc<CudaStream>,
    pub kernels: &'static Kernels,
    pub plan: LayerPlan,
    pub back: BackwardPlan,
    pub x: Vec<T>,
    pub router_x: Vec<T>,
    pub dy: Vec<T>,
    pub router: Vec<W>,
    /// With [`Origin::Logits`] and [`Origin::Choices`].
    pub given_logits: Vec<f32>,
    pub given_weights: Vec<f32>,
    router_bias: Option<Vec<f32>>,
    pub routed: Mlp<T>,
    pub shared: Option<Mlp<T>>,
    pub shared_gate: Vec<W>,
    /// Factors of each expert's weight, and of all.
    pub scales: [Vec<f32>; 2],
    /// Weights of norms: of what the router sees, of what the experts see, of each expert's output, of the sum, of what is projected to a latent width.
    pub norms: [Vec<T>; 5],
    norms_on_device: [CudaSlice<T>; 5],
    /// Of a latent width: both projections, and their biases.
    pub latent: [Vec<T>; 2],
    latent_on_device: [CudaSlice<T>; 2],
    pub latent_bias: [Vec<T>; 2],
    latent_bias_on_device: [CudaSlice<T>; 2],
    scales_on_device: [CudaSlice<f32>; 2],
    bias: Vec<T>,
    bias_on_device: CudaSlice<T>,
    swiglu: [Vec<f32>; 4],
    shared_gate_on_device: CudaSlice<W>,
    swiglu_on_device: [CudaSlice<f32>; 4],
    x_on_device: CudaSlice<T>,
    router_x_on_device: CudaSlice<T>,
    given_on_device: (CudaSlice<f32>, GivenIds, CudaSlice<f32>),
    map_on_device: CudaSlice<i32>,
    mask_on_device: CudaSlice<u8>,
    /// Experts whose weights have no gradient.
    pub frozen: Option<CudaSlice<i32>>,
    pub dy_on_device: CudaSlice<T>,
    router_on_device: CudaSlice<W>,
    router_bias_on_device: Option<CudaSlice<f32>>,
    workspace: RefCell<Workspace>,
    pub saved: Saved<T>,
    pub y: CudaSlice<T>,
}

/// Ids of choices from elsewhere, as the descriptor has them stored.
enum GivenIds {
    Narrow(CudaSlice<i32>),
    Wide(CudaSlice<i64>),
}

impl GivenIds {
    fn new(stream: &Arc<CudaStream>, case: &Case, mut ids: Vec<i32>, candidates: usize) -> GivenIds {
        let wide = case.desc.choices == IdFormat::I64;
        let mut all: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
        if case.odd_ids {
            all.iter_mut().step_by(5 * candidates).for_each(|id| *id |= 1 << 32);
            ids.iter_mut().step_by(5 * candidates).for_each(|id| *id = -1);
        }
        if wide { GivenIds::Wide(upload_numbers(stream, &all)) } else { GivenIds::Narrow(upload_numbers(stream, &ids)) }
    }

    fn ids(&self) -> Ids<'_> {
        match self {
            GivenIds::Narrow(ids) => ids.into(),
            GivenIds::Wide(ids) => ids.into(),
        }
    }
}

/// Gradients on the device; those of weights are of `G`.
pub struct Buffers<T, G> {
    pub x: CudaSlice<T>,
    pub router_x: CudaSlice<T>,
    pub logits: CudaSlice<f32>,
    pub weights: CudaSlice<f32>,
    pub router: CudaSlice<f32>,
    pub router_bias: CudaSlice<f32>,
    pub expert_scale: CudaSlice<f32>,
    pub global_scale: CudaSlice<f32>,
    pub shared_gate: CudaSlice<f32>,
    pub bias: CudaSlice<f32>,
    pub norms: [CudaSlice<f32>; 5],
    /// Both projections, and their biases.
    pub latent: [CudaSlice<G>; 4],
    pub routed: Gradients<G>,
    pub shared: Gradients<G>,
}

impl<T: Element, W: Element> Problem<T, W> {
    pub fn new(case: Case) -> Problem<T, W> {
        Problem::on(case, device::stream(), device::kernels())
    }

    pub fn on(case: Case, stream: Arc<CudaStream>, kernels: &'static Kernels) -> Problem<T, W> {
        let desc = &case.desc;
        let mut rng = fastrand::Rng::with_seed(case.seed);
        let plan = desc.plan(case.tokens, kernels.device()).unwrap();
        let back = plan.backward_plan(&case.back).unwrap();
        let elements = case.tokens * desc.hidden;
        let x = random::<T>(&mut rng, elements, 1.0);
        let router_x = random::<T>(&mut rng, elements, 1.0);
        let dy = random::<T>(&mut rng, elements, case.dy);
        let router = random::<W>(&mut rng, desc.experts * desc.hidden, 0.5);
        let router_bias = case.router_bias.then(|| random::<f32>(&mut rng, desc.experts, 0.5));
        let routed = {
            let sizes = [desc.local_experts(), desc.intermediate, desc.expert_width()];
            Mlp::new(&stream, &mut rng, desc.mlp, sizes, case.biases)
        };
        let shared = desc.shared.map(|shared| {
            let sizes = [1, shared.intermediate, desc.hidden];
            Mlp::new(&stream, &mut rng, shared.mlp, sizes, case.biases)
        });
        let shared_gate = random::<W>(&mut rng, desc.hidden, 0.5);
        let bias = random::<T>(&mut rng, desc.hidden, 0.5);
        let mut around = |middle: f32| {
            random::<f32>(&mut rng, desc.local_experts(), 0.2).iter().map(|v| middle + v).collect::<Vec<f32>>()
        };
        let swiglu = [around(1.3), around(0.4), around(0.5), around(0.7)];
        let given_logits = random::<f32>(&mut rng, case.tokens * desc.experts, 2.0);
        let candidates = desc.admission.map_or(desc.top_k, |rule| rule.candidates);
        let mut given_weights = random::<f32>(&mut rng, case.tokens * candidates, 1.0);
        if desc.admission.is_some_and(|rule| rule.renormalise.is_some()) {
            // Their sum divides.
            given_weights.iter_mut().for_each(|weight| *weight = weight.abs() + 0.25);
        }
        let mut order: Vec<i32> = (0..desc.experts as i32).collect();
        let mut given_ids = Vec::new();
        for _ in 0..case.tokens {
            rng.shuffle(&mut order);
            given_ids.extend(&order[..candidates]);
        }
        // Every third expert is here, the next one elsewhere, the next an identity.
        let map = (0..desc.experts as i32).map(|e| [e / 3, NONE, IDENTITY][e as usize % 3]).collect::<Vec<i32>>();
        let mask: Vec<u8> = (0..case.tokens).map(|t| u8::from(t + case.padding < case.tokens)).collect();
        let mut of_scales = fastrand::Rng::with_seed(case.seed + 100);
        let scales = [(0..desc.experts).map(|_| 0.5 + of_scales.f32()).collect(), vec![1.25]];
        let width = desc.expert_width();
        let norms = [desc.hidden, desc.hidden, width, desc.hidden, width].map(|width| {
            let values = random::<f32>(&mut of_scales, width, 0.5);
            values.iter().map(|v| T::from_f32(1.0 + v)).collect::<Vec<T>>()
        });
        let projection = if desc.latent.is_some() { desc.hidden * width } else { 0 };
        let latent = [(); 2].map(|()| random::<T>(&mut of_scales, projection, 0.3));
        let latent_bias = [width, desc.hidden].map(|outputs| random::<T>(&mut of_scales, outputs, 0.5));
        let bytes = plan.workspace_bytes().max(back.workspace_bytes());
        Problem {
            shared_gate_on_device: upload(&stream, &shared_gate),
            scales_on_device: scales.each_ref().map(|scales| upload(&stream, scales)),
            bias_on_device: upload(&stream, &bias),
            norms_on_device: norms.each_ref().map(|weight| upload(&stream, weight)),
            latent_on_device: latent.each_ref().map(|weight| upload(&stream, weight)),
            latent_bias_on_device: latent_bias.each_ref().map(|bias| upload(&stream, bias)),
            swiglu_on_device: swiglu.each_ref().map(|numbers| upload(&stream, numbers)),
            x_on_device: upload(&stream, &x),
            router_x_on_device: upload(&stream, &router_x),
            given_on_device: (
                upload(&stream, &given_logits),
                GivenIds::new(&stream, &case, given_ids, candidates),
                upload(&stream, &given_weights),
            ),
            map_on_device: upload_numbers(&stream, &map),
            mask_on_device: upload_numbers(&stream, &mask),
            frozen: None,
            dy_on_device: upload(&stream, &dy),
            router_on_device: upload(&stream, &router),
            router_bias_on_device: router_bias.as_ref().map(|bias| upload(&stream, bias)),
            workspace: RefCell::new(Workspace::new(&stream, bytes).unwrap()),
            saved: Saved::new(&stream, &back).unwrap(),
            y: upload(&stream, &x),
            case,
            stream,
            kernels,
            plan,
            back,
            x,
            router_x,
            dy,
            given_logits,
            given_weights,
            router,
            router_bias,
            routed,
            shared,
            shared_gate,
            scales,
            norms,
            latent,
            latent_bias,
            bias,
            swiglu,
        }
    }

    fn router_weights(&self) -> RouterWeights<'_> {
        let mut router = RouterWeights::new(&self.router_on_device);
        let gating = &self.case.desc.gating;
        let [of_experts, of_all] = &self.scales_on_device;
        router.expert_scale = gating.expert_scale.then_some(of_experts.into());
        router.global_scale = gating.global_scale.then_some(of_all.into());
        if self.norms()[0] {
            router = router.norm(&self.norms_on_device[0]);
        }
        self.router_bias_on_device.iter().fold(router, |router, bias| router.bias(bias))
    }

    fn expert_weights(&self) -> ExpertWeights<'_> {
        let (gate_up, down) = self.routed.weights();
        let mut experts = ExpertWeights::new(gate_up, down);
        if self.case.by_expert {
            let [alpha, gate, up, offset] = &self.swiglu_on_device;
            experts = experts.swiglu(SwigluByExpert::new().alpha(alpha).gate(gate).up(up).offset(offset));
        }
        if self.norms()[1] {
            experts.norms = experts.norms.experts(&self.norms_on_device[1]);
        }
        if self.norms()[2] {
            experts.norms = experts.norms.slots(&self.norms_on_device[2]);
        }
        if self.norms()[3] {
            experts.norms = experts.norms.output(&self.norms_on_device[3]);
        }
        if let Some(latent) = self.case.desc.latent {
            let [input, output] = [0, 1].map(|side| {
                let weight = Weight::new(&self.latent_on_device[side]);
                if self.case.biases { weight.bias(&self.latent_bias_on_device[side]) } else { weight }
            });
            let weights = LatentWeights::new(input, output);
            let normed = latent.norm.is_some();
            experts = experts.latent(if normed { weights.norm(&self.norms_on_device[4]) } else { weights });
        }
        if self.case.bias {
            experts = experts.bias(&self.bias_on_device);
        }
        let Some((shared, of)) = self.shared.as_ref().zip(self.case.desc.shared) else { return experts };
        let (gate_up, down) = shared.weights();
        let shared = SharedWeights::new(gate_up, down);
        experts.shared(if of.gated { shared.gate(&self.shared_gate_on_device) } else { shared })
    }

    /// Which norms there are, each with a weight.
    fn norms(&self) -> [bool; 5] {
        let (norms, latent) = (&self.case.desc.norms, self.case.desc.latent);
        [
            norms.router.is_some() && self.case.back.origin == Origin::Router,
            norms.experts.is_some(),
            norms.slots.is_some(),
            norms.output.is_some(),
            latent.is_some_and(|latent| latent.norm.is_some()),
        ]
    }

    fn route(&self) -> RouteArgs<'_> {
        let mut route = RouteArgs::new();
        if self.case.padding > 0 {
            route.mask = TokenMask::attention(&self.mask_on_device);
        }
        route.map = self.case.desc.map.map(|_| MapTable::new(&self.map_on_device));
        route
    }

    /// Puts the values on the device again, after some were changed.
    pub fn upload(&mut self) {
        let stream = &self.stream;
        self.x_on_device = upload(stream, &self.x);
        self.router_x_on_device = upload(stream, &self.router_x);
        self.dy_on_device = upload(stream, &self.dy);
        self.router_on_device = upload(stream, &self.router);
        self.shared_gate_on_device = upload(stream, &self.shared_gate);
        self.scales_on_device = self.scales.each_ref().map(|scales| upload(stream, scales));
        (self.given_on_device.0, self.given_on_device.2) =
            (upload(stream, &self.given_logits), upload(stream, &self.given_weights));
        self.norms_on_device = self.norms.each_ref().map(|weight| upload(stream, weight));
        self.latent_on_device = self.latent.each_ref().map(|weight| upload(stream, weight));
        self.latent_bias_on_device = self.latent_bias.each_ref().map(|bias| upload(stream, bias));
        self.routed.upload(stream);
        self.shared.iter_mut().for_each(|shared| shared.upload(stream));
    }

    pub fn forward(&mut self) {
        let fresh = Saved::new(&self.stream, &self.back).unwrap();
        self.forward_into(fresh);
    }

    /// The same on memory that an earlier pass has filled.
    pub fn forward_into_what_was_saved(&mut self) {
        let fresh = Saved::new(&self.stream, &self.back).unwrap();
        let used = std::mem::replace(&mut self.saved, fresh);
        self.forward_into(used);
    }

    fn forward_into(&mut self, mut saved: Saved<T>) {
        let mut y = self.y.clone();
        let weights = LayerWeights::new(self.router_weights(), self.expert_weights());
        let mut args = LayerArgs::new(&self.x_on_device, &mut y);
        args.dropout = self.case.dropout;
        args.route = self.route();
        let (logits, ids, chosen) = &self.given_on_device;
        match self.case.back.origin {
            Origin::Logits => args.route.given_logits = Some(logits.into()),
            Origin::Choices => args.choices = Some(Choices::new(ids.ids(), chosen)),
            _ => {}
        }
        if self.case.router_x {
            args.router_x = Some((&self.router_x_on_device).into());
        }
        let mut state = self.stream.clone_htod(&[11_u64, 22]).unwrap();
        if self.case.noise_state {
            args.noise_state = Some((&state).into());
        }
        let mut workspace = self.workspace.borrow_mut();
        self.plan.forward_saving(self.kernels, &self.stream, &weights, args, &mut saved, &mut workspace).unwrap();
        drop(workspace);
        self.stream.memcpy_htod(&[12, 23], &mut state).unwrap();
        (self.y, self.saved) = (y, saved);
    }

    /// A workspace that no pass has seen.
    pub fn renew_workspace(&self) {
        let bytes = self.plan.workspace_bytes().max(self.back.workspace_bytes());
        *self.workspace.borrow_mut() = Workspace::new(&self.stream, bytes).unwrap();
    }

    /// All gradients that there are.
    pub fn buffers<G: Element>(&self) -> Buffers<T, G> {
        let desc = &self.case.desc;
        let (routed, asked) = (self.routed_here(), self.case.back.origin == Origin::Router);
        let held = if self.case.back.accumulate { HELD } else { JUNK };
        fn full<E: Element>(stream: &Arc<CudaStream>, len: usize, value: f32) -> CudaSlice<E> {
            let mut all = vec![E::from_f32(value); len];
            all.extend([E::from_f32(JUNK); GUARD]);
            stream.clone_htod(&all).unwrap()
        }
        let mlp = |mlp: Option<&Mlp<T>>| mlp.map_or([0; 6], Mlp::lens).map(|len| full::<G>(&self.stream, len, held));
        Buffers {
            x: full(&self.stream, self.case.tokens * desc.hidden, JUNK),
            router_x: full(&self.stream, if self.case.router_x { self.case.tokens * desc.hidden } else { 0 }, JUNK),
            logits: full(&self.stream, if routed { self.case.tokens * desc.experts } else { 0 }, JUNK),
            weights: full(&self.stream, self.given_weights.len(), JUNK),
            router: full(&self.stream, if asked { desc.experts * desc.hidden } else { 0 }, held),
            router_bias: full(&self.stream, if asked && self.case.router_bias { desc.experts } else { 0 }, held),
            expert_scale: full(&self.stream, if desc.gating.expert_scale { desc.experts } else { 0 }, held),
            global_scale: full(&self.stream, usize::from(desc.gating.global_scale), held),
            bias: full(&self.stream, if self.case.bias { desc.hidden } else { 0 }, held),
            norms: [0, 1, 2, 3, 4].map(|norm| {
                let there = self.norms()[norm];
                full(&self.stream, if there { self.norms[norm].len() } else { 0 }, held)
            }),
            latent: {
                let biased = self.case.biases && desc.latent.is_some();
                let biases = if biased { [desc.expert_width(), desc.hidden] } else { [0; 2] };
                let [input, output] = self.latent.each_ref().map(Vec::len);
                [input, output, biases[0], biases[1]].map(|len| full::<G>(&self.stream, len, held))
            },
            shared_gate: full(&self.stream, if self.gated() { desc.hidden } else { 0 }, held),
            routed: mlp(Some(&self.routed)),
            shared: mlp(self.shared.as_ref()),
        }
    }

    /// What all of `buffers` are for.
    pub fn gradients<'a, G: Element>(&self, buffers: &'a mut Buffers<T, G>) -> LayerGradients<'a, T> {
        let (gated, scaled) = (self.gated(), self.case.desc.gating);
        let (routes, asked, other) = (self.routed_here(), self.case.back.origin == Origin::Router, self.case.router_x);
        let Buffers {
            x,
            router_x,
            logits,
            weights,
            router,
            router_bias,
            expert_scale,
            global_scale,
            shared_gate,
            bias,
            norms,
            latent,
            routed,
            shared,
        } = buffers;
        let [of_router_norm, of_expert_norm, of_slot_norm, of_output_norm, of_latent_norm] = norms;
        let [router_norm, expert_norm, slot_norm, output_norm, latent_norm] = self.norms();
        let [gate_up, down] = self.routed.gradients(routed);
        let mut gradients = LayerGradients::new().x(x).weights(weights).gate_up(gate_up).down(down);
        gradients.router_x = other.then_some(router_x.into());
        gradients.logits = routes.then_some(logits.into());
        gradients.bias = self.case.bias.then_some(bias.into());
        gradients.norms.experts = expert_norm.then_some(of_expert_norm.into());
        gradients.norms.slots = slot_norm.then_some(of_slot_norm.into());
        gradients.norms.output = output_norm.then_some(of_output_norm.into());
        if self.case.desc.latent.is_some() {
            let [input, output, input_bias, output_bias] = latent;
            let (mut of_input, mut of_output) = (WeightGradients::new(input), WeightGradients::new(output));
            if self.case.biases {
                (of_input, of_output) = (of_input.bias(input_bias), of_output.bias(output_bias));
            }
            gradients.latent = LatentGradients::new().input(of_input).output(of_output);
            gradients.latent.norm = latent_norm.then_some(of_latent_norm.into());
        }
        if asked {
            let mut of = RouterGradients::new().matrix(router);
            of.expert_scale = scaled.expert_scale.then_some(expert_scale.into());
            of.global_scale = scaled.global_scale.then_some(global_scale.into());
            of.norm = router_norm.then_some(of_router_norm.into());
            gradients = gradients.router(if self.case.router_bias { of.bias(router_bias) } else { of });
        }
        let Some(of) = &self.shared else { return gradients };
        let [gate_up, down] = of.gradients(shared);
        let shared = SharedGradients::new().gate_up(gate_up).down(down);
        gradients.shared(if gated { shared.gate(shared_gate) } else { shared })
    }

    /// Whether the layer's gating chose.
    fn routed_here(&self) -> bool {
        self.case.back.origin != Origin::Choices
    }

    fn gated(&self) -> bool {
        self.case.desc.shared.is_some_and(|shared| shared.gated)
    }

    /// Choices of each expert, on the device.
    pub fn loss_counts(&self) -> CudaSlice<i32> {
        self.stream.clone_htod(&self.counts()).unwrap()
    }

    pub fn backward(&self, gradients: LayerGradients<'_, T>) -> Result<Vec<BackwardStage>, Error> {
        let counts = self.loss_counts();
        self.backward_by(gradients, &counts)
    }

    /// The launches alone, with the counts of the balancing loss.
    pub fn backward_by(
        &self,
        mut gradients: LayerGradients<'_, T>,
        counts: &CudaSlice<i32>,
    ) -> Result<Vec<BackwardStage>, Error> {
        let mut args = self.args(gradients.reborrow());
        if self.case.back.losses.is_some_and(|losses| losses.balance != 0.0) {
            args = args.loss_counts(counts);
        }
        self.enqueue(args)
    }

    /// What the backward pass reads, without losses.
    pub fn args<'a>(&'a self, gradients: LayerGradients<'a, T>) -> BackwardArgs<'a, T> {
        let (logits, ids, chosen) = &self.given_on_device;
        let regraded = self.case.desc.admission.is_some_and(|rule| rule.regrades());
        let asked = self.case.desc.map.is_some() || self.identities() || regraded;
        let choices = asked.then(|| Choices::new(ids.ids(), chosen));
        let mut args = BackwardArgs::new(&self.x_on_device, &self.dy_on_device, gradients);
        args.router_x = self.case.router_x.then_some((&self.router_x_on_device).into());
        args.given_logits = (self.case.back.origin == Origin::Logits).then_some(logits.into());
        args.choices = choices.filter(|_| self.case.back.origin == Origin::Choices);
        args.map = self.case.desc.map.map(|_| MapTable::new(&self.map_on_device));
        args.frozen = self.frozen.as_ref().map(Into::into);
        args
    }

    pub fn enqueue(&self, args: BackwardArgs<'_, T>) -> Result<Vec<BackwardStage>, Error> {
        let mut stages = Vec::new();
        let weights = LayerWeights::new(self.router_weights(), self.expert_weights());
        let workspace = &mut *self.workspace.borrow_mut();
        let observer = &mut |stage| stages.push(stage);
        let (kernels, stream) = (self.kernels, &self.stream);
        let result = self.back.backward_observed(kernels, stream, &weights, &self.saved, args, workspace, observer);
        result.map(|()| stages)
    }

    fn identities(&self) -> bool {
        self.case.desc.null.is_some_and(|null| null.output == NullOutput::Input)
    }

    /// Choices of each expert.
    fn counts(&self) -> Vec<i32> {
        let mut counts = vec![0; self.case.desc.experts];
        if self.routed_here() {
            let ids = self.stream.clone_dtoh(self.saved.ids()).unwrap();
            let choices = ids[..self.case.tokens * self.case.desc.top_k].iter().filter(|id| **id >= 0);
            choices.for_each(|&id| counts[id as usize] += 1);
        }
        counts
    }

    pub fn found<G: Element>(&self, buffers: &Buffers<T, G>) -> Found {
        let mut found = vec![
            ("x", read(&self.stream, "x", &buffers.x)),
            ("router_x", read(&self.stream, "router_x", &buffers.router_x)),
            ("logits", read(&self.stream, "logits", &buffers.logits)),
            ("weights", read(&self.stream, "weights", &buffers.weights)),
            ("router", read(&self.stream, "router", &buffers.router)),
            ("router_bias", read(&self.stream, "router_bias", &buffers.router_bias)),
            ("expert_scale", read(&self.stream, "expert_scale", &buffers.expert_scale)),
            ("global_scale", read(&self.stream, "global_scale", &buffers.global_scale)),
            ("bias", read(&self.stream, "bias", &buffers.bias)),
            ("router.norm", read(&self.stream, "router.norm", &buffers.norms[0])),
            ("norms.experts", read(&self.stream, "norms.experts", &buffers.norms[1])),
            ("norms.slots", read(&self.stream, "norms.slots", &buffers.norms[2])),
            ("norms.output", read(&self.stream, "norms.output", &buffers.norms[3])),
            ("latent.norm", read(&self.stream, "latent.norm", &buffers.norms[4])),
        ];
        let projections = ["latent.input", "latent.output", "latent.input.bias", "latent.output.bias"];
        let of = projections.into_iter().zip(&buffers.latent);
        found.extend(of.map(|(name, buffer)| (name, read(&self.stream, name, buffer))));
        found.retain(|(_, values)| !values.is_empty());
        if self.gated() {
            found.push(("shared.gate", read(&self.stream, "shared.gate", &buffers.shared_gate)));
        }
        for (names, buffers) in NAMES.into_iter().zip([&buffers.routed, &buffers.shared]) {
            let all = names.into_iter().zip(buffers).map(|(name, buffer)| (name, read(&self.stream, name, buffer)));
            found.extend(all.filter(|(_, values)| !values.is_empty()));
        }
        found
    }

    /// The layer in f64 of the same rounded inputs, and its forward pass by the reference.
    fn with_reference<R>(&self, then: impl FnOnce(&[f64], &Layer<f64, f64>, &layer::Forward) -> R) -> R {
        let desc = &self.case.desc;
        let wide = |values: &[T]| values.iter().map(|v| v.to_f32().into()).collect::<Vec<f64>>();
        let router: Vec<f64> = self.router.iter().map(|v| v.to_f32().into()).collect();
        let router_bias: Option<Vec<f64>> =
            self.router_bias.as_ref().map(|bias| bias.iter().map(|&v| v.into()).collect());
        let shared_gate: Vec<f64> = self.shared_gate.iter().map(|v| v.to_f32().into()).collect();
        let bias = wide(&self.bias);
        let activations: Vec<Activation> = (0..desc.local_experts())
            .map(|expert| of_expert(desc.mlp.activation, self.swiglu.each_ref().map(|numbers| numbers[expert])))
            .collect();
        let routed = self.routed.wide();
        let (up, down) = self.routed.matrices(&routed);
        let shared = self.shared.as_ref().map(|shared| (shared, shared.wide()));
        let of = Layer {
            hidden: desc.hidden,
            router_weight: &router,
            router_bias: router_bias.as_deref(),
            correction_bias: None,
            top_k: desc.top_k,
            gating: desc.gating,
            weighting: desc.weighting,
            capacity: desc.capacity,
            up,
            activation: desc.mlp.activation,
            activations: self.case.by_expert.then_some(&activations[..]),
            down,
            shared: shared.as_ref().map(|(shared, wide)| shared.matrices(wide)),
            shared_activation: desc.shared.map(|shared| shared.mlp.activation),
            shared_gate: self.gated().then_some(&shared_gate[..]),
            scales: [f64::from(desc.routed_scale), desc.shared.map_or(1.0, |shared| f64::from(shared.scale))],
            bias: self.case.bias.then_some(&bias[..]),
            null: desc.null,
        };
        let x = wide(&self.x);
        then(&x, &of, &layer::forward(&x, &of).unwrap())
    }

    /// What the reference's forward pass gives.
    pub fn expected_y(&self) -> Vec<f64> {
        self.with_reference(|_, _, forward| forward.y.clone())
    }

    /// Whether the reference chose the same experts: not where rounding decides between two.
    pub fn agrees(&self) -> bool {
        let ids = self.stream.clone_dtoh(self.saved.ids()).unwrap();
        self.with_reference(|_, _, forward| forward.ids == ids[..forward.ids.len()])
    }

    /// What a gradient is the sum of, in the norm, where that may cancel: products of `dy` with experts' outputs, and what follows from these alone.
    pub fn terms(&self, name: &str) -> f64 {
        let Case { desc, tokens, .. } = &self.case;
        let rows = self.dy.chunks(desc.hidden);
        let products =
            |row: &[T], of: &[f64]| row.iter().zip(of).map(|(dy, y)| (f64::from(dy.to_f32()) * y).powi(2)).sum::<f64>();
        let [of_routed, of_shared] = self.with_reference(|x, _, forward| {
            let slots = forward.plan.token_slot.chunks(desc.top_k).zip(rows.clone()).flat_map(|(slots, row)| {
                slots.iter().filter_map(move |&slot| usize::try_from(slot).ok()).map(move |slot| (slot, row))
            });
            let routed = slots.map(|(slot, row)| products(row, &forward.y_slots[slot * desc.hidden..][..desc.hidden]));
            // An identity's output is x.
            let is_identity = |id: &&i32| self.identities() && **id >= desc.local_experts() as i32;
            let of_x = forward.ids.chunks(desc.top_k).zip(rows.clone()).zip(x.chunks(desc.hidden));
            let identities =
                of_x.map(|((ids, row), x)| ids.iter().filter(is_identity).count() as f64 * products(row, x));
            let routed = routed.chain(identities);
            let shared = forward.shared.iter().flat_map(|all| all.chunks(desc.hidden)).zip(rows);
            [routed.sum::<f64>().sqrt(), shared.map(|(of, row)| products(row, of)).sum::<f64>().sqrt()]
        });
        let of_routed = of_routed * f64::from(desc.gating.scale * desc.routed_scale);
        // A sum of as many as there are tokens; a row of x has about the norm sqrt(H).
        match name {
            "weights" | "logits" => of_routed,
            "router_bias" => of_routed * (*tokens as f64).sqrt(),
            "router" => of_routed * (desc.hidden as f64).sqrt(),
            "shared.gate" => 0.25 * of_shared * (desc.hidden as f64).sqrt(),
            _ => 0.0,
        }
    }

    /// The gradients by the reference.
    pub fn expected(&self) -> Found {
        assert!(self.agrees(), "another choice: take another seed");
        let dy: Vec<f64> = self.dy.iter().map(|v| v.to_f32().into()).collect();
        let counts = self.counts();
        let losses = self.case.back.losses.as_ref().map(|losses| (losses, &counts[..], self.case.tokens));
        let want = self.with_reference(|x, of, forward| layer::backward(x, of, forward, &dy, losses).unwrap());
        let mut found = vec![("x", want.x), ("logits", want.logits), ("weights", want.weights)];
        found.push(("router", want.router_weight));
        found.extend(want.router_bias.map(|bias| ("router_bias", bias)));
        found.extend(want.bias.map(|bias| ("bias", bias)));
        found.extend(want.shared_gate.map(|gate| ("shared.gate", gate)));
        let mut mlp = |names: [&'static str; 6], gradients: [Vec<f64>; 6]| {
            found.extend(names.into_iter().zip(gradients).filter(|(_, values)| !values.is_empty()));
        };
        mlp(NAMES[0], self.routed.found(want.up, want.down));
        if let Some(((up, down), of)) = want.shared.zip(self.shared.as_ref()) {
            mlp(NAMES[1], of.found(up, down));
        }
        if self.case.back.accumulate {
            let added = found.iter_mut().filter(|(name, _)| !["x", "logits", "weights"].contains(name));
            added.flat_map(|(_, values)| values).for_each(|value| *value += f64::from(HELD));
        }
        found
    }
}

/// Leaves those gradients of which `asked` is false, by their names in [`Found`].
pub fn keep<T>(gradients: &mut LayerGradients<'_, T>, mut asked: impl FnMut(&str) -> bool) {
    let (router, norms, latent) = (&mut gradients.router, &mut gradients.norms, &mut gradients.latent);
    for (name, of) in [
        ("logits", &mut gradients.logits),
        ("weights", &mut gradients.weights),
        ("router", &mut router.matrix),
        ("router_bias", &mut router.bias),
        ("expert_scale", &mut router.expert_scale),
        ("global_scale", &mut router.global_scale),
        ("router.norm", &mut router.norm),
        ("bias", &mut gradients.bias),
        ("norms.experts", &mut norms.experts),
        ("norms.slots", &mut norms.slots),
        ("norms.output", &mut norms.output),
        ("latent.norm", &mut latent.norm),
        ("shared.gate", &mut gradients.shared.gate),
    ] {
        of.take_if(|_| !asked(name));
    }
    for (name, of) in [("x", &mut gradients.x), ("router_x", &mut gradients.router_x)] {
        of.take_if(|_| !asked(name));
    }
    let shared = &mut gradients.shared;
    for (names, of) in
        [(NAMES[0], [&mut gradients.gate_up, &mut gradients.down]), (NAMES[1], [&mut shared.gate_up, &mut shared.down])]
    {
        let [up, down] = of;
        let all = [&mut up.matrix, &mut up.up, &mut down.matrix, &mut up.bias, &mut up.up_bias, &mut down.bias];
        for (name, of) in names.into_iter().zip(all) {
            of.take_if(|_| !asked(name));
        }
    }
    for ([name, bias_name], of) in [
        (["latent.input", "latent.input.bias"], &mut latent.input),
        (["latent.output", "latent.output.bias"], &mut latent.output),
    ] {
        of.matrix.take_if(|_| !asked(name));
        // A bias's goes along with its matrix's.
        let matrix = of.matrix.is_some();
        of.bias.take_if(|_| !matrix || !asked(bias_name));
    }
}

/// A unit of which every number is an expert's own.
fn of_expert(activation: Activation, [alpha, gate, up, offset]: [f32; 4]) -> Activation {
    let bound = |bound, value| match bound {
        Bound::Clamp(_) => Bound::Clamp(value),
        Bound::Softcap(_) => Bound::Softcap(value),
        other => other,
    };
    match activation {
        Activation::Swiglu(unit) => {
            unit.alpha(alpha).gate(bound(unit.gate, gate)).up(bound(unit.up, up)).offset(offset).into()
        }
        other => other,
    }
}

/// Device against reference.
pub fn check<T: Element, W: Element, G: Element>(case: Case) {
    let mut problem = Problem::<T, W>::new(case);
    problem.forward();
    let mut buffers = problem.buffers::<G>();
    let gradients = problem.gradients(&mut buffers);
    let stages = problem.backward(gradients).unwrap();
    // All that is planned, and gradients by choice, which are asked for here.
    let planned = |stage: &BackwardStage| problem.back.stages().any(|(known, _)| known == *stage);
    let beside: Vec<BackwardStage> = stages.iter().copied().filter(|stage| !planned(stage)).collect();
    // Biases' gradients are in the launches of their weights'; a gate's values stand beside that of the bias which they scale.
    let on_request = [BackwardStage::Choices, BackwardStage::Bias, BackwardStage::SharedGate];
    let known = |stage| on_request.contains(stage);
    assert!(beside.iter().all(known), "{beside:?}");
    assert_eq!(stages.len() - beside.len(), problem.back.launches());
    compare(T::DTYPE, &problem.found(&buffers), &problem.expected());
}

/// Whether the activation is one of a gated unit alone.
pub fn fits(activation: Activation, glu: Glu) -> bool {
    match activation {
        Activation::Identity => glu == Glu::None,
        activation => glu != Glu::None || !activation.needs_gate(),
    }
}
