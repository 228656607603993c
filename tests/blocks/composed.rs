//! Norms and latent projections in a layer, each alone and all together, against the operations' own definitions one after the other.

use cudarc::driver::CudaSlice;
use moe_kernels::experts::combine::CombineArgs;
use moe_kernels::experts::{Dispatched, Weight};
use moe_kernels::layer::{
    ExpertWeights, ExpertsArgs, LatentDesc, LatentWeights, LayerArgs, LayerDesc, LayerPlan, LayerWeights, Mlp,
    NormWeights, Norms, RouteArgs, RouterWeights, SharedDesc, SharedWeights, Weighting,
};
use moe_kernels::reference::combine::combine;
use moe_kernels::reference::dispatch::{DispatchRule, dispatch};
use moe_kernels::reference::gating::gate;
use moe_kernels::reference::gemm::{ExpertMatrix, dense_gemm, grouped_gemm};
use moe_kernels::reference::rms_norm::{Rows, rms_norm};
use moe_kernels::reference::router::router;
use moe_kernels::rules::{Activation, Capacity, Gain, Gating, Glu, Layout, RmsNorm, Score};
use moe_kernels::{Dtype, Workspace};

use crate::run::{Run, close};
use crate::support::compare::{Storage, to_f64};
use crate::support::inputs::{generator, normals};

const TOKENS: usize = 43;
const HIDDEN: usize = 48;
const WIDE: usize = 40;
const EXPERTS: usize = 6;
const K: usize = 2;
const SHARED: usize = 32;

/// What a layer has of all that may stand round its experts.
#[derive(Clone, Copy, Debug, Default)]
struct Parts {
    router: Option<RmsNorm>,
    experts: Option<RmsNorm>,
    latent: Option<(usize, Option<RmsNorm>)>,
    slots: Option<RmsNorm>,
    output: Option<RmsNorm>,
    shared: bool,
    residual: bool,
    weighs_input: bool,
    capacity: bool,
}

fn norm(gain: Gain) -> Option<RmsNorm> {
    Some(RmsNorm::new(1e-3).gain(gain).factor(0.75))
}

pub fn parts<T: Storage>() {
    let shared = Parts { shared: true, ..Parts::default() };
    let latent = |width, gain| Some((width, gain));
    let cases = [
        Parts { router: norm(Gain::OnePlus), ..Parts::default() },
        Parts { router: norm(Gain::One), residual: true, ..shared },
        Parts { experts: norm(Gain::Weight), ..shared },
        Parts { latent: latent(24, None), ..Parts::default() },
        Parts { latent: latent(20, norm(Gain::OnePlus)), residual: true, ..Parts::default() },
        Parts { latent: latent(24, norm(Gain::One)), ..shared },
        Parts { latent: latent(20, None), residual: true, ..shared },
        Parts { slots: norm(Gain::OnePlusFirst), capacity: true, ..Parts::default() },
        Parts { slots: norm(Gain::Weight), weighs_input: true, ..shared },
        // A.X K1's: of routed and shared experts, before the residual.
        Parts { output: norm(Gain::Weight), ..shared },
        Parts { output: norm(Gain::OnePlus), residual: true, ..shared },
        Parts {
            router: norm(Gain::Weight),
            experts: norm(Gain::OnePlus),
            latent: latent(24, norm(Gain::Weight)),
            slots: norm(Gain::OnePlusFirst),
            output: norm(Gain::One),
            residual: true,
            capacity: true,
            ..shared
        },
    ];
    for parts in cases {
        case::<T>(&parts);
    }
}

/// Route, experts and sum one by one.
fn in_parts<T: Storage>(
    run: &Run,
    plan: &LayerPlan,
    weights: &LayerWeights<'_>,
    x: &CudaSlice<T>,
    residual: Option<&CudaSlice<T>>,
) -> Vec<f64> {
    let Run { kernels, stream } = run;
    let shape = plan.route().rows();
    let mut rows = Dispatched::new(stream, &shape).unwrap();
    let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
    let route = RouteArgs::new();
    plan.route().forward::<T>(kernels, stream, &weights.router, x, route, &mut rows, &mut workspace).unwrap();
    let mut y_slots = run.out::<T>(shape.slots * HIDDEN);
    let mut shared = plan.desc().shared.map(|_| run.out::<T>(TOKENS * HIDDEN));
    let mut args = ExpertsArgs::new(x, &rows, &mut y_slots);
    args.shared = shared.as_mut().map(Into::into);
    plan.experts().forward(kernels, stream, &weights.experts, args, &mut workspace).unwrap();
    let mut y = run.out::<T>(TOKENS * HIDDEN);
    let mut args = CombineArgs::new(&y_slots, &rows, &mut y);
    args.residual = residual.map(Into::into);
    args.addend = shared.as_ref().map(Into::into);
    plan.experts().combine(kernels, stream, args).unwrap();
    run.get(&y)
}

/// Values of the type, on the host and on the device.
struct Both<T> {
    values: Vec<f64>,
    device: CudaSlice<T>,
}

impl<T: Storage> Both<T> {
    fn draw(run: &Run, rng: &mut fastrand::Rng, len: usize, scale: f64) -> Both<T> {
        let values = normals::<T>(rng, len, scale);
        Both { values: to_f64(&values), device: run.stream.clone_htod(&values).expect("device memory") }
    }
}

fn case<T: Storage>(parts: &Parts) {
    let (run, mut rng) = (Run::new(), generator(&format!("{parts:?}")));
    let width = parts.latent.map_or(HIDDEN, |(width, _)| width);
    let gating = Gating::new(Score::Softmax).renormalised();
    let capacity = parts.capacity.then(|| Capacity::new(10, TOKENS).padded(true));
    let desc = LayerDesc::new(T::DTYPE, HIDDEN, WIDE, EXPERTS, K)
        .router_dtype(Dtype::F32)
        .gating(gating)
        .capacity(capacity)
        .weighting(if parts.weighs_input { Weighting::Input } else { Weighting::Output })
        .shared(parts.shared.then(|| SharedDesc::new(SHARED, Mlp::swiglu(T::DTYPE))))
        .norms(Norms::new().router(parts.router).experts(parts.experts).slots(parts.slots).output(parts.output))
        .latent(parts.latent.map(|(width, norm)| LatentDesc::new(T::DTYPE, width).norm(norm)));

    let scale = |k: usize| 1.0 / (k as f64).sqrt();
    let mut draw = |len: usize, scale: f64| Both::<T>::draw(&run, &mut rng, len, scale);
    let x = draw(TOKENS * HIDDEN, 1.0);
    let residual = draw(TOKENS * HIDDEN, 1.0);
    let gate_up = draw(EXPERTS * 2 * WIDE * width, scale(width));
    let down = draw(EXPERTS * width * WIDE, 2.0 * scale(WIDE));
    let (before, after) = (draw(width * HIDDEN, scale(HIDDEN)), draw(HIDDEN * width, scale(width)));
    let (after_bias, shared_up) = (draw(HIDDEN, 0.5), draw(2 * SHARED * HIDDEN, scale(HIDDEN)));
    let shared_down = draw(HIDDEN * SHARED, scale(SHARED));
    let [router_gain, experts_gain, output_gain] = [(); 3].map(|()| draw(HIDDEN, 0.5));
    let [latent_gain, slots_gain] = [(); 2].map(|()| draw(width, 0.5));
    let matrix = Both::<f32>::draw(&run, &mut rng, EXPERTS * HIDDEN, 2.0 * scale(HIDDEN));

    let has = |norm: Option<RmsNorm>| norm.is_some_and(|norm| norm.gain.has_weight());
    let mut router_weights = RouterWeights::new(&matrix.device);
    router_weights.norm = has(parts.router).then(|| (&router_gain.device).into());
    let mut norms = NormWeights::new();
    norms.experts = has(parts.experts).then(|| (&experts_gain.device).into());
    norms.slots = has(parts.slots).then(|| (&slots_gain.device).into());
    norms.output = has(parts.output).then(|| (&output_gain.device).into());
    let mut experts = ExpertWeights::new(Weight::new(&gate_up.device), Weight::new(&down.device)).norms(norms);
    if parts.shared {
        let shared = SharedWeights::new(Weight::new(&shared_up.device), Weight::new(&shared_down.device));
        experts = experts.shared(shared);
    }
    if let Some((_, norm)) = parts.latent {
        let output = Weight::new(&after.device).bias(&after_bias.device);
        let mut latent = LatentWeights::new(Weight::new(&before.device), output);
        latent.norm = has(norm).then(|| (&latent_gain.device).into());
        experts = experts.latent(latent);
    }
    let weights = LayerWeights::new(router_weights, experts);

    let plan = desc.plan(TOKENS, run.kernels.device()).unwrap();
    let mut workspace = Workspace::new(&run.stream, plan.workspace_bytes()).unwrap();
    let mut y = run.out::<T>(TOKENS * HIDDEN);
    let (mut ids, mut shares) = (run.out_ints(TOKENS * K), run.out::<f32>(TOKENS * K));
    let route = RouteArgs::new().ids(&mut ids).weights(&mut shares);
    let mut args = LayerArgs::new(&x.device, &mut y).route(route);
    args.residual = parts.residual.then(|| (&residual.device).into());
    let mut stages = Vec::new();
    let observe = &mut |stage| stages.push(stage);
    plan.forward_observed(run.kernels, &run.stream, &weights, args, &mut workspace, observe).unwrap();
    // With a residual behind a projection one launch more adds it.
    let more = usize::from(parts.residual && parts.latent.is_some() && parts.output.is_none());
    let planned: Vec<_> = plan.stages().map(|(stage, _)| stage).collect();
    assert_eq!(stages.len(), planned.len() + more, "{parts:?}: {stages:?} of {planned:?}");

    if parts.latent.is_none() && parts.output.is_none() {
        let other = in_parts::<T>(&run, &plan, &weights, &x.device, parts.residual.then_some(&residual.device));
        assert!(run.get(&y) == other, "{parts:?}: other bits in parts");
    }

    // The same, operation by operation.
    let normed = |rows: &[f64], norm: Option<RmsNorm>, gain: &Both<T>, width: usize| {
        let Some(norm) = norm else { return rows.to_vec() };
        let weight = norm.gain.has_weight().then_some(gain.values.as_slice());
        let (addend, addend_scale, row_scale, residual) = (None, None, None, None);
        rms_norm(&Rows { x: rows, width, weight, addend, addend_scale, row_scale, residual }, &norm).unwrap().y
    };
    let seen = normed(&x.values, parts.router, &router_gain, HIDDEN);
    let logits = router(&seen, &matrix.values, None::<&[f64]>, HIDDEN).unwrap();
    let gated = gate(&logits, None::<&[f64]>, EXPERTS, K, &gating).unwrap();
    assert_eq!(run.get_ints(&ids), gated.ids, "{parts:?}: ids");
    let rule = DispatchRule { experts: EXPERTS, top_k: K, capacity, tile_m: 16 };
    let rows = dispatch(&gated.ids, &rule).unwrap();

    let plain = |weight: &Both<T>, bias: Option<&Both<T>>, n, k, glu| {
        let bias = bias.map(|bias| bias.values.clone());
        (weight.values.clone(), bias, n, k, glu)
    };
    let dense = |a: &[f64], (weight, bias, n, k, glu): (Vec<f64>, Option<Vec<f64>>, usize, usize, Glu), act| {
        let matrix = ExpertMatrix { weight: &weight, bias: bias.as_deref(), n, k, glu, layout: Layout::Nk };
        dense_gemm(a, &matrix, act).unwrap()
    };
    let mut input = normed(&x.values, parts.experts, &experts_gain, HIDDEN);
    if let Some((_, norm)) = parts.latent {
        input = dense(&input, plain(&before, None, width, HIDDEN, Glu::None), Activation::Identity);
        input = normed(&input, norm, &latent_gain, width);
    }
    let grouped = |a: &[f64], weight: &Both<T>, n, k, glu, first: bool, act| {
        let matrix = ExpertMatrix { weight: &weight.values, bias: None, n, k, glu, layout: Layout::Nk };
        let scale = (first && parts.weighs_input).then(|| rows.slot_weight(&gated.weights));
        grouped_gemm(a, &matrix, &rows, first, scale.as_deref(), act).unwrap()
    };
    let h = grouped(&input, &gate_up, WIDE, width, Glu::Split, true, Activation::Silu);
    let y_slots = grouped(&h, &down, width, WIDE, Glu::None, false, Activation::Identity);
    let y_slots = normed(&y_slots, parts.slots, &slots_gain, width);
    let by_weight = (!parts.weighs_input).then_some(gated.weights.as_slice());
    let mut sum = combine(&y_slots, &rows.token_slot, by_weight, None, None::<&[f64]>, K, width).unwrap();
    if parts.latent.is_some() {
        sum = dense(&sum, plain(&after, Some(&after_bias), HIDDEN, width, Glu::None), Activation::Identity);
    }
    let add = |sum: &mut Vec<f64>, more: &[f64]| sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
    if parts.shared {
        let h = dense(&x.values, plain(&shared_up, None, SHARED, HIDDEN, Glu::Split), Activation::Silu);
        add(&mut sum, &dense(&h, plain(&shared_down, None, HIDDEN, SHARED, Glu::None), Activation::Identity));
    }
    sum = normed(&sum, parts.output, &output_gain, HIDDEN);
    if parts.residual {
        add(&mut sum, &residual.values);
    }
    let want: Vec<f32> = sum.iter().map(|&value| value as f32).collect();
    close(&format!("{parts:?}"), &run.get(&y), &want, T::DTYPE);
}
