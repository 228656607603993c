//! Layers drawn at random: what is tested one by one elsewhere, in each other's company.

use half::{bf16, f16};
use moe_kernels::layer::{BackwardDesc, LatentDesc, LayerDesc, MapDesc, Mlp, Norms, Origin, SharedDesc};
use moe_kernels::rules::{
    Activation, AdmissionRule, Capacity, Dropout, Gating, Glu, IdFormat, Layout, LossGradient, LossScore, NoiseSource,
    NullExperts, Renormalise, RmsNorm, Score, WeightDesc, Weighting,
};
use moe_kernels::{Dtype, Element, Error};

use crate::case::{Case, Problem, fits, keep};
use crate::compare::{Found, HELD, JUNK, compare_terms, norm, tolerance};
use crate::device;
use crate::mlp::{PLAIN, bounded_units};
use crate::seed::generator;

/// `MOE_LAYERS` says how many, in place of these.
const LAYERS: usize = 12;

fn one_of<T: Copy>(rng: &mut fastrand::Rng, of: &[T]) -> T {
    of[rng.usize(..of.len())]
}

/// True once in so many times.
fn once_in(rng: &mut fastrand::Rng, times: usize) -> bool {
    rng.usize(..times) == 0
}

/// A width of at least 16, as sums of fewer cancel; most are of whole vectors.
fn width(rng: &mut fastrand::Rng, most: usize) -> usize {
    if once_in(rng, 5) { rng.usize(16..=most) } else { 8 * rng.usize(2..=most / 8) }
}

fn activation(rng: &mut fastrand::Rng, dtype: Dtype, glu: Glu) -> Activation {
    let mut all = PLAIN.to_vec();
    // What is kept in 16 bits may be rounded to the other side of a bound, where the slope is another.
    if dtype == Dtype::F32 {
        all.extend(bounded_units());
    }
    all.retain(|&activation| fits(activation, glu));
    one_of(rng, &all)
}

fn mlp(rng: &mut fastrand::Rng, dtype: Dtype) -> Mlp {
    let (weight, glu) = (WeightDesc::new(dtype), one_of(rng, &Glu::ALL));
    let [up, down] = [(); 2].map(|()| one_of(rng, &[Layout::Nk, Layout::Kn]));
    let activation = activation(rng, dtype, glu);
    Mlp::swiglu(dtype).gate_up(weight.layout(up).glu(glu)).down(weight.layout(down)).activation(activation)
}

fn gating(rng: &mut fastrand::Rng) -> Gating {
    let score = one_of(rng, &[Score::Softmax, Score::TopkSoftmax, Score::Sigmoid, Score::SqrtSoftplus]);
    let renormalise = one_of(
        rng,
        &[None, Some(Renormalise::Plus(0.0)), Some(Renormalise::Plus(1e-3)), Some(Renormalise::AtLeast(0.5))],
    );
    Gating::new(score).renormalise(renormalise).scale(one_of(rng, &[1.0, 2.5]))
}

fn layer(rng: &mut fastrand::Rng, dtype: Dtype, router_dtype: Dtype) -> LayerDesc {
    let experts = rng.usize(1..=12);
    let top_k = rng.usize(1..=experts.min(4));
    let mlp_desc = mlp(rng, dtype);
    let mut desc = LayerDesc::new(dtype, width(rng, 160), width(rng, 160), experts, top_k)
        .router_dtype(router_dtype)
        .gating(gating(rng))
        .mlp(mlp_desc)
        .weighting(one_of(rng, &[Weighting::Output, Weighting::Output, Weighting::Input, Weighting::Activation]))
        .batch_invariant(once_in(rng, 4))
        .routed_scale(one_of(rng, &[1.0, 1.0, 0.5]));
    match rng.usize(..6) {
        0 => desc = desc.capacity(Some(Capacity::new(rng.usize(1..=8), rng.usize(1..=40)).padded(rng.bool()))),
        1 if experts > top_k => {
            let count = rng.usize(1..=experts - top_k);
            desc = desc.null(Some(one_of(rng, &[NullExperts::zero(count), NullExperts::identity(count)])));
        }
        _ => {}
    }
    if rng.bool() {
        let form = if rng.bool() { mlp_desc } else { mlp(rng, dtype) };
        let size = if rng.bool() { desc.intermediate } else { width(rng, 200) };
        desc = desc.shared(Some(SharedDesc::new(size, form).gated(rng.bool()).scale(one_of(rng, &[1.0, 0.75]))));
    }
    desc
}

fn case(rng: &mut fastrand::Rng, dtype: Dtype, router_dtype: Dtype) -> Case {
    let desc = layer(rng, dtype, router_dtype);
    let losses = LossGradient::new(LossScore::Softmax).balance(0.01).z(0.001);
    let back = BackwardDesc::new()
        .accumulate(once_in(rng, 3))
        .recompute(once_in(rng, 3))
        .losses(once_in(rng, 3).then_some(losses));
    Case {
        router_bias: rng.bool(),
        biases: rng.bool(),
        bias: once_in(rng, 3),
        by_expert: matches!(desc.mlp.activation, Activation::Swiglu(_)) && rng.bool(),
        seed: rng.u64(..1 << 32),
        ..Case::new(desc, one_of(rng, &[1, 2, 7, 16, 37, 70, 130, 200])).back(back)
    }
}

/// Whether there is such a layer; if not, it is refused with a reason.
fn is_possible(case: &Case) -> bool {
    let plan = case.desc.plan(case.tokens, device::kernels().device());
    let Err(why) = plan.and_then(|plan| plan.backward_plan(&case.back)) else { return true };
    assert!(matches!(why, Error::Unsupported { .. } | Error::Invalid { .. }), "{why}");
    println!("refused: {why}");
    false
}

/// Forward and back against the reference; false where rounding chose other experts.
fn holds<T: Element, W: Element, G: Element>(case: Case) -> bool {
    let mut problem = Problem::<T, W>::new(case);
    problem.forward();
    if !problem.agrees() {
        return false;
    }
    let y: Vec<f64> = problem.stream.clone_dtoh(&problem.y).unwrap().iter().map(|v| v.to_f32().into()).collect();
    let want = problem.expected_y();
    let error = norm(y.iter().zip(&want).map(|(got, want)| got - want));
    assert!(error <= tolerance(T::DTYPE) * norm(want.iter().copied()), "y: {error:e}");
    let mut buffers = problem.buffers::<G>();
    let gradients = problem.gradients(&mut buffers);
    problem.backward(gradients).unwrap();
    compare_terms(T::DTYPE, &problem.found(&buffers), &problem.expected(), |name| problem.terms(name));
    true
}

#[test]
fn in_company() {
    let layers = std::env::var("MOE_LAYERS").ok().map_or(LAYERS, |text| text.parse().expect("MOE_LAYERS: a number"));
    let rng = &mut generator("layers at random");
    let (mut tried, mut elsewhere) = (0, 0);
    while tried < layers {
        let form = rng.usize(..6);
        let dtypes = [
            [Dtype::F32; 2],
            [Dtype::F32; 2],
            [Dtype::Bf16; 2],
            [Dtype::Bf16, Dtype::F32],
            [Dtype::F16; 2],
            [Dtype::F16, Dtype::F32],
        ];
        let [dtype, router_dtype] = dtypes[form];
        let case = case(rng, dtype, router_dtype);
        if !is_possible(&case) {
            continue;
        }
        tried += 1;
        println!("{tried}: {case:?}");
        let holds = match form {
            0 | 1 => holds::<f32, f32, f32>(case),
            2 => holds::<bf16, bf16, bf16>(case),
            3 => holds::<bf16, f32, f32>(case),
            4 => holds::<f16, f16, f32>(case),
            _ => holds::<f16, f32, f16>(case),
        };
        elsewhere += usize::from(!holds);
    }
    assert!(elsewhere <= 1 + layers / 50, "{elsewhere} of {layers} chose other experts");
}

/// What the reference has no whole layer for, beside what it has: norms, a latent width, maps, admissions, learned factors, dropout, choices and logits from elsewhere.
fn beyond_the_reference(rng: &mut fastrand::Rng, dtype: Dtype) -> Case {
    let case = case(rng, dtype, dtype);
    let mut desc = case.desc;
    let norm = RmsNorm::new(1e-5);
    let mut some = |times: usize| once_in(rng, times).then_some(norm);
    desc = desc.norms(Norms::new().router(some(4)).experts(some(4)).slots(some(4)).output(some(4)));
    if once_in(rng, 4) {
        let latent = LatentDesc::new(dtype, 8 * rng.usize(2..=8)).norm(once_in(rng, 2).then_some(norm));
        desc = desc.latent(Some(latent));
    }
    if desc.null.is_none() {
        desc = desc.map(once_in(rng, 4).then_some(MapDesc::new(desc.experts.div_ceil(3))));
        if once_in(rng, 4) {
            let candidates = rng.usize(desc.top_k..=desc.experts);
            let rule = AdmissionRule::new(desc.experts, desc.top_k, rng.usize(1..=8), rng.usize(1..=40));
            let renormalise = one_of(rng, &[None, Some(Renormalise::Plus(0.0))]);
            desc = desc.admission(Some(rule.candidates(candidates).renormalise(renormalise)));
        }
    }
    desc = desc.gating(desc.gating.expert_scale(once_in(rng, 4)).global_scale(once_in(rng, 4)));
    if desc.admission.is_none() {
        desc = desc.choices(one_of(rng, &[IdFormat::I32, IdFormat::I64]));
    }
    let origin = one_of(rng, &[Origin::Router, Origin::Router, Origin::Logits, Origin::Choices]);
    let losses = case.back.losses.filter(|_| origin != Origin::Choices);
    if origin != Origin::Router {
        desc.norms.router = None;
    }
    Case {
        desc,
        back: case.back.origin(origin).losses(losses),
        router_bias: case.router_bias && origin == Origin::Router,
        bias: case.bias && desc.latent.is_none(),
        router_x: once_in(rng, 4) && origin == Origin::Router,
        dropout: once_in(rng, 4).then_some(Dropout::new(0.3, NoiseSource::new(3, 4))),
        ..case
    }
}

/// What is asked for is the same whatever else is asked for, and what is not is left alone. The same to the bit, but where other launches make it: of a bias without
/// its weight, of one tensor of two, and beside a shared expert, whose rows may have been in the launch.
fn parts_hold<T: Element, G: Element>(case: Case, rng: &mut fastrand::Rng) {
    let mut problem = Problem::<T, T>::new(case);
    problem.forward();
    let some_of = |rng: Option<&mut fastrand::Rng>| -> (Vec<String>, Found) {
        let mut buffers = problem.buffers::<G>();
        let mut gradients = problem.gradients(&mut buffers);
        let mut asked = Vec::new();
        if let Some(rng) = rng {
            keep(&mut gradients, |name| {
                let asks = rng.bool();
                asked.extend(asks.then(|| name.to_owned()));
                asks
            });
        }
        // Nothing that another pass has left there.
        problem.renew_workspace();
        problem.backward(gradients).unwrap();
        (asked, problem.found(&buffers))
    };
    let (_, whole) = some_of(None);
    assert!(whole.iter().all(|(_, values)| values.iter().all(|value| value.is_finite())));
    for _ in 0..2 {
        let (asked, some) = some_of(Some(rng));
        for ((name, got), (_, want)) in some.iter().zip(&whole) {
            let is_asked = |name: &str| asked.iter().any(|known| known == name);
            if is_asked(name) {
                let joined = case.desc.shared.is_some() || case.desc.mlp.gate_up.glu == Glu::Apart;
                let elsewhere = joined || bias_of(name).is_some_and(|weight| !is_asked(weight));
                let off = norm(got.iter().zip(want).map(|(got, want)| got - want));
                let most = if elsewhere { tolerance(T::DTYPE) * (1.0 + norm(want.iter().copied())) } else { 0.0 };
                assert!(off <= most, "{name} beside {asked:?}: {off:e}");
            } else {
                let untouched = |value: &f64| [JUNK, HELD].map(f64::from).contains(value);
                assert!(got.iter().all(untouched), "{name} was not asked for, but {asked:?}");
            }
        }
    }
}

/// The weight that a bias stands beside.
fn bias_of(name: &str) -> Option<&str> {
    match name {
        "router_bias" => Some("router"),
        "gate_up.up_bias" => Some("gate_up.up"),
        "shared.gate_up.up_bias" => Some("shared.gate_up.up"),
        name => name.strip_suffix(".bias"),
    }
}

#[test]
fn in_part() {
    let layers = std::env::var("MOE_LAYERS").ok().map_or(LAYERS, |text| text.parse().expect("MOE_LAYERS: a number"));
    let rng = &mut generator("parts of layers at random");
    let mut tried = 0;
    while tried < layers {
        let half = rng.bool();
        let case = beyond_the_reference(rng, if half { Dtype::Bf16 } else { Dtype::F32 });
        if !is_possible(&case) {
            continue;
        }
        tried += 1;
        println!("{tried}: {case:?}");
        match (half, rng.bool()) {
            (false, _) => parts_hold::<f32, f32>(case, rng),
            (true, false) => parts_hold::<bf16, f32>(case, rng),
            (true, true) => parts_hold::<bf16, bf16>(case, rng),
        }
    }
}
