//! What cannot be done is refused by the name of the argument, before anything is launched.

use cudarc::driver::CudaSlice;
use moe_kernels::experts::Weight;
use moe_kernels::layer::{
    BackwardArgs, BackwardDesc, BackwardPlan, ExpertWeights, LatentDesc, LayerArgs, LayerDesc, LayerGradients,
    LayerWeights, MapDesc, Mlp, NormGradients, Norms, Origin, RouteArgs, RouterGradients, RouterWeights, Saved,
    SharedGradients, WeightGradients,
};
use moe_kernels::rules::{
    AdmissionRule, Capacity, Gain, Glu, LossGradient, LossScore, Renormalise, RmsNorm, WeightDesc, Weighting,
};
use moe_kernels::{Dtype, Error, Workspace};

use crate::device;

const TOKENS: usize = 9;

fn layer() -> LayerDesc {
    LayerDesc::new(Dtype::F32, 16, 8, 4, 2)
}

fn plan(desc: LayerDesc, back: BackwardDesc) -> Result<BackwardPlan, Error> {
    desc.plan(TOKENS, device::kernels().device()).unwrap().backward_plan(&back)
}

#[test]
fn of_plans() {
    let fault = |desc: LayerDesc, back: BackwardDesc| plan(desc, back).unwrap_err().argument().unwrap();
    let none = BackwardDesc::new();
    let norm = Some(RmsNorm::new(1e-6).gain(Gain::One));
    assert!(plan(layer().norms(Norms::new().router(norm).experts(norm)), none).is_ok());
    assert!(plan(layer().norms(Norms::new().slots(norm).output(norm)), none).is_ok());
    assert!(plan(layer().latent(Some(LatentDesc::new(Dtype::F32, 8))), none).is_ok());
    assert!(plan(layer().norms(Norms::new().slots(norm)).routed_scale(0.5), none).is_ok());
    let rule = AdmissionRule::new(4, 2, 3, TOKENS);
    assert!(plan(layer().admission(Some(rule.candidates(3))), none).is_ok());
    let anew = rule.renormalise(Some(Renormalise::Plus(0.0)));
    assert!(plan(layer().admission(Some(anew)), none).is_ok());
    assert!(plan(layer().map(Some(MapDesc::new(2))).routed_scale(0.5), none).is_ok());
    let weight = WeightDesc::new(Dtype::F32);
    let apart = Mlp::swiglu(Dtype::F32).gate_up(weight.glu(Glu::Apart));
    assert!(plan(layer().mlp(apart).weighting(Weighting::Input), none).is_ok());
    let losses = LossGradient::new(LossScore::Softmax).balance(1.0);
    assert_eq!(fault(layer(), none.origin(Origin::Choices).losses(Some(losses))), "losses");
    assert_eq!(fault(layer(), none.losses(Some(losses.z(f32::NAN)))), "losses.z");
    let large = Norms::new().slots(norm.map(|norm| norm.factor(1e30)));
    assert_eq!(fault(layer().norms(large).routed_scale(1e30), none), "routed_scale");
    // The layer's own router is not asked.
    assert!(plan(layer().norms(Norms::new().router(norm)), none.origin(Origin::Choices)).is_ok());
}

/// A layer that has run, and its buffers.
struct Ready {
    back: BackwardPlan,
    saved: Saved<f32>,
    workspace: Workspace,
    values: CudaSlice<f32>,
    numbers: CudaSlice<i32>,
}

impl Ready {
    fn new(desc: LayerDesc, back: BackwardDesc) -> Ready {
        let stream = device::stream();
        let back = plan(desc, back).unwrap();
        let bytes = back.layer().workspace_bytes().max(back.workspace_bytes());
        let mut ready = Ready {
            saved: Saved::new(&stream, &back).unwrap(),
            workspace: Workspace::new(&stream, bytes).unwrap(),
            values: stream.alloc_zeros(4096).unwrap(),
            numbers: stream.alloc_zeros(64).unwrap(),
            back,
        };
        if back.desc().origin == Origin::Router {
            let mut y = stream.alloc_zeros(4096).unwrap();
            let Ready { saved, workspace, values, .. } = &mut ready;
            let args = LayerArgs::new(&*values, &mut y);
            let weights = weights(values);
            back.layer().forward_saving(device::kernels(), &stream, &weights, args, saved, workspace).unwrap();
        }
        ready
    }

    fn fault<'a>(&'a mut self, change: impl FnOnce(&mut BackwardArgs<'a, f32>, &'a CudaSlice<i32>)) -> &'static str {
        let Ready { back, saved, workspace, values, numbers } = self;
        let mut args = BackwardArgs::new(&*values, &*values, LayerGradients::new());
        change(&mut args, numbers);
        let result = back.backward(device::kernels(), &device::stream(), &weights(values), saved, args, workspace);
        result.unwrap_err().argument().unwrap()
    }
}

fn weights(values: &CudaSlice<f32>) -> LayerWeights<'_> {
    LayerWeights::new(RouterWeights::new(values), ExpertWeights::new(Weight::new(values), Weight::new(values)))
}

fn none<'a>() -> LayerGradients<'a, f32> {
    LayerGradients::new()
}

fn router<'a>() -> RouterGradients<'a> {
    RouterGradients::new()
}

#[test]
fn of_calls() {
    let stream = device::stream();
    let mut out = stream.alloc_zeros::<f32>(4096).unwrap();
    let mut small = stream.alloc_zeros::<f32>(3).unwrap();
    let mut half = stream.alloc_zeros::<half::f16>(4096).unwrap();
    let fault = |gradients: LayerGradients<'_, f32>| {
        let mut gradients = gradients;
        let mut ready = Ready::new(layer(), BackwardDesc::new());
        let Ready { back, saved, workspace, values, .. } = &mut ready;
        let args = BackwardArgs::new(&*values, &*values, gradients.reborrow());
        let result = back.backward(device::kernels(), &device::stream(), &weights(values), saved, args, workspace);
        result.unwrap_err().argument().unwrap()
    };
    assert_eq!(fault(none().router_x(&mut out)), "gradients.router_x");
    assert_eq!(fault(none().x(&mut small)), "gradients.x");
    assert_eq!(fault(none().router(router().matrix(&mut small))), "gradients.router.matrix");
    assert_eq!(fault(none().router(router().expert_scale(&mut out))), "gradients.router.expert_scale");
    assert_eq!(fault(none().router(router().global_scale(&mut out))), "gradients.router.global_scale");
    assert_eq!(fault(none().router(router().norm(&mut out))), "gradients.router.norm");
    assert_eq!(fault(none().norms(NormGradients::new().experts(&mut out))), "gradients.norms.experts");
    assert_eq!(fault(none().gate_up(WeightGradients::new(&mut small))), "gradients.gate_up");
    assert_eq!(fault(none().gate_up(WeightGradients::new(&mut half))), "gradients.gate_up");
    assert_eq!(fault(none().gate_up(WeightGradients::apart(&mut out, &mut small))), "gradients.gate_up.up");
    assert_eq!(fault(none().gate_up(WeightGradients::none().bias(&mut out))), "gradients.gate_up.bias");
    assert_eq!(fault(none().down(WeightGradients::none().bias(&mut out))), "gradients.down.bias");
    let shared = SharedGradients::new().down(WeightGradients::new(&mut out));
    assert_eq!(fault(none().shared(shared)), "gradients.shared");
    assert_eq!(fault(none().shared(SharedGradients::new().gate(&mut out))), "gradients.shared");

    let mut ready = Ready::new(layer(), BackwardDesc::new());
    let other = stream.alloc_zeros::<f32>(4096).unwrap();
    let words = stream.alloc_zeros::<u32>(4).unwrap();
    assert_eq!(ready.fault(|args, _| args.router_x = Some((&other).into())), "router_x");
    assert_eq!(ready.fault(|args, _| args.given_logits = Some((&other).into())), "given_logits");
    assert_eq!(ready.fault(|args, numbers| args.loss_counts = Some(numbers.into())), "loss_counts");
    assert_eq!(ready.fault(|args, _| args.counted = Some((&words).into())), "counted");
    assert_eq!(ready.fault(|args, _| args.importance = Some((&other).into())), "importance");
    assert_eq!(ready.fault(|args, numbers| args.sequence_counts = Some(numbers.into())), "sequence_counts");
    assert_eq!(ready.fault(|args, _| args.sequence_tokens = Some((&words).into())), "sequence_tokens");
    assert_eq!(ready.fault(|args, _| args.x = (&small).into()), "x");
    assert_eq!(ready.fault(|args, _| args.dy = (&small).into()), "dy");
    let Ready { back, saved, workspace, values, .. } = &mut ready;
    let mut dx = stream.alloc_zeros::<f32>(4096).unwrap();
    let args = BackwardArgs::new(&*values, &*values, none().x(&mut dx));
    let without = LayerWeights::new(RouterWeights::of_logits(), weights(values).experts);
    let result = back.backward(device::kernels(), &stream, &without, saved, args, workspace);
    assert_eq!(result.unwrap_err().argument(), Some("router.matrix"));
    let losses = LossGradient::new(LossScore::Softmax);
    let with = |losses| BackwardDesc::new().losses(Some(losses));
    // Where rows are not all choices their counts are not the loss's.
    let limited = layer().capacity(Some(Capacity::new(1, 1)));
    assert_eq!(Ready::new(limited, with(losses.balance(1.0))).fault(|_, _| ()), "loss_counts");
    assert_eq!(Ready::new(layer(), with(losses.importance(1.0))).fault(|_, _| ()), "importance");
    assert_eq!(Ready::new(layer(), with(losses.sequence(1.0))).fault(|_, _| ()), "sequence_counts");
}

#[test]
fn of_what_was_saved() {
    let stream = device::stream();
    let mut ready = Ready::new(layer(), BackwardDesc::new());
    // Not filled, of another layer, for another plan.
    ready.saved = Saved::new(&stream, &ready.back).unwrap();
    assert_eq!(ready.fault(|_, _| ()), "saved");
    let mut ready = Ready::new(layer(), BackwardDesc::new());
    ready.back = plan(layer().routed_scale(2.0), BackwardDesc::new()).unwrap();
    assert_eq!(ready.fault(|_, _| ()), "saved");
    ready.back = plan(layer(), BackwardDesc::new().recompute(true)).unwrap();
    assert_eq!(ready.fault(|_, _| ()), "saved");
    ready.back = plan(layer(), BackwardDesc::new().origin(Origin::Choices)).unwrap();
    assert_eq!(ready.fault(|_, _| ()), "saved");
    let of_halves = plan(layer(), BackwardDesc::new()).unwrap();
    assert_eq!(Saved::<half::f16>::new(&stream, &of_halves).unwrap_err().argument(), Some("saved"));
    let mut ready = Ready::new(layer(), BackwardDesc::new());
    ready.workspace = Workspace::new(&stream, ready.back.workspace_bytes() - 1).unwrap();
    assert_eq!(ready.fault(|_, _| ()), "workspace");

    // The forward pass fills what belongs to it, and nobody else's buffer in its place.
    let Ready { back, mut saved, mut workspace, values, .. } = Ready::new(layer(), BackwardDesc::new());
    let mut y = stream.alloc_zeros::<f32>(4096).unwrap();
    let mut other = stream.alloc_zeros::<f32>(4096).unwrap();
    let mut numbers = stream.alloc_zeros::<i32>(4096).unwrap();
    let mut fault = |args: LayerArgs<'_, f32>, plan: &moe_kernels::layer::LayerPlan| {
        let weights = weights(&values);
        let result = plan.forward_saving(device::kernels(), &stream, &weights, args, &mut saved, &mut workspace);
        result.unwrap_err().argument().unwrap()
    };
    let plan = back.layer();
    assert_eq!(fault(LayerArgs::new(&values, &mut y).pre_activation(&mut other), plan), "pre_activation");
    let route = RouteArgs::new().logits(&mut other);
    assert_eq!(fault(LayerArgs::new(&values, &mut y).route(route), plan), "logits");
    let route = RouteArgs::new().ids(&mut numbers);
    assert_eq!(fault(LayerArgs::new(&values, &mut y).route(route), plan), "ids");
    let route = RouteArgs::new().counts(&mut numbers);
    assert_eq!(fault(LayerArgs::new(&values, &mut y).route(route), plan), "counts");
    let route = RouteArgs::new().given_logits(&other);
    assert_eq!(fault(LayerArgs::new(&values, &mut y).route(route), plan), "saved");
    let larger = layer().plan(TOKENS + 1, device::kernels().device()).unwrap();
    assert_eq!(fault(LayerArgs::new(&values, &mut y), &larger), "saved");
}
