//! Gradients against differences of the forward pass on the same device, of what the reference has no whole layer for: dropout, maps, admissions,
//! padding, choices and logits from elsewhere, other rows for the router.

use moe_kernels::Dtype;
use moe_kernels::layer::{BackwardDesc, LatentDesc, LayerDesc, MapDesc, Mlp, Norms, Origin, SharedDesc};
use moe_kernels::rules::{
    AdmissionRule, Dropout, Gating, Layout, LogitRule, NoiseSource, NullExperts, Order, Renormalise, RmsNorm, Score,
    SecondExpert, Sequences, WeightDesc, Weighting,
};

use crate::case::{Case, Problem};
use crate::compare::{Found, norm};

const TOKENS: usize = 37;

fn layer() -> LayerDesc {
    LayerDesc::new(Dtype::F32, 40, 24, 6, 2)
}

/// The values of a name, `gate_up` of one tensor.
fn values<'a>(problem: &'a mut Problem<f32, f32>, name: &str) -> &'a mut Vec<f32> {
    match name {
        "x" => &mut problem.x,
        "router_x" => &mut problem.router_x,
        "router" => &mut problem.router,
        "logits" => &mut problem.given_logits,
        "weights" => &mut problem.given_weights,
        "gate_up" => &mut problem.routed.up,
        "down" => &mut problem.routed.down,
        "shared.gate_up" => &mut problem.shared.as_mut().unwrap().up,
        "shared.down" => &mut problem.shared.as_mut().unwrap().down,
        "shared.gate" => &mut problem.shared_gate,
        "expert_scale" => &mut problem.scales[0],
        "global_scale" => &mut problem.scales[1],
        "router.norm" => &mut problem.norms[0],
        "norms.experts" => &mut problem.norms[1],
        "norms.slots" => &mut problem.norms[2],
        "norms.output" => &mut problem.norms[3],
        "latent.norm" => &mut problem.norms[4],
        "latent.input" => &mut problem.latent[0],
        "latent.input.bias" => &mut problem.latent_bias[0],
        "latent.output.bias" => &mut problem.latent_bias[1],
        "latent.output" => &mut problem.latent[1],
        other => unreachable!("no values of {other}"),
    }
}

/// What is differentiated, and the rows of choices by which it was computed.
fn value(problem: &mut Problem<f32, f32>) -> (f64, Vec<i32>) {
    problem.upload();
    problem.forward();
    let y = problem.stream.clone_dtoh(&problem.y).unwrap();
    let value = y.iter().zip(&problem.dy).map(|(&y, &d)| f64::from(y) * f64::from(d)).sum();
    let mut rows = problem.stream.clone_dtoh(problem.saved.dispatched().token_slot()).unwrap();
    rows.extend(problem.stream.clone_dtoh(problem.saved.ids()).unwrap());
    (value, rows)
}

fn gradients(problem: &Problem<f32, f32>) -> Found {
    let mut buffers = problem.buffers::<f32>();
    let gradients = problem.gradients(&mut buffers);
    problem.backward(gradients).unwrap();
    problem.found(&buffers)
}

/// Along the gradient and along a random direction, the slope is what the gradient says.
fn check(case: Case) {
    let mut problem = Problem::<f32, f32>::new(case);
    let (_, rows) = value(&mut problem);
    let found = gradients(&problem);
    let mut rng = fastrand::Rng::with_seed(5);
    let inner = |name: &str| match name {
        name if name.ends_with("bias") => !name.starts_with("latent"),
        "logits" => case.back.origin != Origin::Logits,
        "weights" => case.back.origin != Origin::Choices,
        _ => false,
    };
    for (name, gradient) in found.iter().filter(|(name, _)| !inner(name)) {
        let size = norm(gradient.iter().copied());
        assert!(size.is_finite() && size > 1e-3, "{name}: {size}");
        let random: Vec<f64> = gradient.iter().map(|_| rng.f64() - 0.5).collect();
        for direction in [gradient, &random] {
            let length = norm(direction.iter().copied());
            let want: f64 = gradient.iter().zip(direction).map(|(g, d)| g * d / length).sum();
            let kept = values(&mut problem, name).clone();
            let mut at = |step: f64| {
                let moved = kept.iter().zip(direction).map(|(&v, d)| v + (step * d / length) as f32).collect();
                *values(&mut problem, name) = moved;
                value(&mut problem)
            };
            // A step that changes a choice, and with it the rows of others, is too large.
            let slopes = [0.02, 0.005, 0.001].map(|step| {
                let [(above, above_rows), (below, below_rows)] = [at(step), at(-step)];
                ((above_rows, below_rows) == (rows.clone(), rows.clone())).then_some((above - below) / (2.0 * step))
            });
            *values(&mut problem, name) = kept;
            let got = slopes
                .into_iter()
                .flatten()
                .next()
                .unwrap_or_else(|| panic!("{name}: another seed, whose choices are further apart"));
            // Terms of third order in the step, and roundings of f32 divided by it.
            assert!((got - want).abs() <= 4e-3 * size, "{name}: {got} where the gradient says {want}, of {size}");
        }
    }
}

#[test]
fn dropout() {
    let dropout = Some(Dropout::new(0.4, NoiseSource::new(7, 9)));
    for weighting in [Weighting::Output, Weighting::Input, Weighting::Activation] {
        let shared = Some(SharedDesc::new(24, Mlp::swiglu(Dtype::F32)));
        let desc = layer().weighting(weighting).shared(shared);
        check(Case { dropout, ..Case::new(desc, TOKENS) });
    }
    check(Case { dropout, noise_state: true, ..Case::new(layer(), TOKENS) });
}

/// Of what the router sees, of what the experts see, of both; beside a shared expert, which sees x itself, and identities, which yield what experts see.
#[test]
fn norms() {
    let norm = RmsNorm::new(1e-5);
    let to_router = norm.factor(0.5);
    let [router, experts] = [Norms::new().router(Some(to_router)), Norms::new().experts(Some(norm))];
    let both = router.experts(Some(norm));
    for norms in [router, experts, both] {
        check(Case::new(layer().norms(norms), TOKENS));
    }
    let shared = Some(SharedDesc::new(24, Mlp::swiglu(Dtype::F32)));
    check(Case::new(layer().norms(both).shared(shared), TOKENS));
    let wide = Some(SharedDesc::new(32, Mlp::swiglu(Dtype::F32)));
    check(Case::new(layer().norms(experts).shared(wide.map(|wide| wide.gated(true))), TOKENS));
    check(Case::new(layer().norms(experts).null(Some(NullExperts::identity(2))), TOKENS));
    check(Case::new(layer().norms(both).weighting(Weighting::Input), TOKENS));
    check(Case::new(layer().norms(both), TOKENS).back(BackwardDesc::new().recompute(true)));
    check(Case { router_x: true, ..Case::new(layer().norms(both), TOKENS) });
    check(Case { seed: 3, ..Case::new(layer().norms(both), TOKENS).back(BackwardDesc::new().origin(Origin::Choices)) });
}

/// Of each expert's output, which is weighted behind it or before, and of the sum, beside a shared expert and a residual's place.
#[test]
fn norms_behind_the_experts() {
    let norm = RmsNorm::new(1e-5);
    let [slots, output] = [Norms::new().slots(Some(norm)), Norms::new().output(Some(norm.factor(0.5)))];
    let all = slots.output(Some(norm)).experts(Some(norm)).router(Some(norm));
    for norms in [slots, output] {
        for weighting in [Weighting::Output, Weighting::Input, Weighting::Activation] {
            check(Case { biases: true, ..Case::new(layer().norms(norms).weighting(weighting), TOKENS) });
        }
    }
    check(Case::new(layer().norms(all), TOKENS));
    check(Case::new(layer().norms(all), TOKENS).back(BackwardDesc::new().recompute(true)));
    for size in [24, 32] {
        let shared = Some(SharedDesc::new(size, Mlp::swiglu(Dtype::F32)));
        check(Case::new(layer().norms(slots.output(Some(norm))).shared(shared), TOKENS));
    }
    check(Case {
        seed: 3,
        ..Case::new(layer().norms(slots), TOKENS).back(BackwardDesc::new().origin(Origin::Choices))
    });
    check(Case { padding: 11, ..Case::new(layer().norms(all.router(None)), TOKENS) });
    let dropout = Some(Dropout::new(0.4, NoiseSource::new(7, 9)));
    check(Case { dropout, ..Case::new(layer().norms(slots), TOKENS) });
    check(Case::new(layer().norms(output).null(Some(NullExperts::identity(2))), TOKENS));
}

/// Experts of a latent width, with each norm that may stand there, biases and either order of the projections.
#[test]
fn latent_widths() {
    let norm = RmsNorm::new(1e-5);
    let latent = |layout| {
        let weight = WeightDesc::new(Dtype::F32).layout(layout);
        LatentDesc::new(Dtype::F32, 16).input(weight).output(weight)
    };
    let all = Norms::new().slots(Some(norm)).output(Some(norm)).experts(Some(norm));
    for layout in Layout::ALL {
        let plain = layer().latent(Some(latent(layout)));
        check(Case { biases: true, ..Case::new(plain, TOKENS) });
        check(Case::new(layer().latent(Some(latent(layout).norm(Some(norm)))).norms(all), TOKENS));
        let shared = Some(SharedDesc::new(24, Mlp::swiglu(Dtype::F32)).gated(true));
        check(Case::new(plain.shared(shared), TOKENS));
    }
    let normed = layer().latent(Some(latent(Layout::Nk).norm(Some(norm))));
    check(Case::new(normed.weighting(Weighting::Input), TOKENS).back(BackwardDesc::new().recompute(true)));
    check(Case { seed: 3, ..Case::new(normed, TOKENS).back(BackwardDesc::new().origin(Origin::Choices)) });
    check(Case::new(normed.null(Some(NullExperts::identity(2))), TOKENS));
    check(Case { router_x: true, ..Case::new(normed, TOKENS) });
}

/// Factors that a router learns, and logits that are scaled and capped.
#[test]
fn learned_factors() {
    for score in [Score::Softmax, Score::Sigmoid] {
        let gating = Gating::new(score).renormalised().expert_scale(true).global_scale(true);
        let logits = LogitRule::PLAIN.factor(0.75).softcap(Some(2.0));
        check(Case::new(layer().gating(gating).logits(logits), TOKENS));
    }
}

/// Some experts elsewhere, some identities.
#[test]
fn maps() {
    let desc = layer().map(Some(MapDesc::new(2))).gating(Gating::new(Score::Softmax));
    check(Case::new(desc, TOKENS));
    check(Case::new(desc, TOKENS).back(BackwardDesc::new().origin(Origin::Choices)));
}

/// A factor of the sum over the experts beside identities, a map and a norm of each expert's output; with an admission, which may drop an identity.
#[test]
fn factors_of_the_sum() {
    let plain = layer().gating(Gating::new(Score::Softmax)).routed_scale(0.4);
    let choices = BackwardDesc::new().origin(Origin::Choices);
    for back in [BackwardDesc::new(), choices] {
        check(Case { seed: 3, ..Case::new(plain.null(Some(NullExperts::identity(2))), TOKENS).back(back) });
        check(Case::new(plain.map(Some(MapDesc::new(2))), TOKENS).back(back));
        let rule = AdmissionRule::new(6, 2, 5, 20).candidates(4).renormalise(Some(Renormalise::Plus(0.0)));
        check(Case::new(plain.map(Some(MapDesc::new(2))).admission(Some(rule)), TOKENS).back(back));
    }
    let norm = Some(RmsNorm::new(1e-5));
    for weighting in [Weighting::Output, Weighting::Input, Weighting::Activation] {
        check(Case { biases: true, ..Case::new(plain.norms(Norms::new().slots(norm)).weighting(weighting), TOKENS) });
    }
    let normed = plain.norms(Norms::new().slots(norm)).null(Some(NullExperts::identity(2)));
    check(Case::new(normed, TOKENS));
}

#[test]
fn admissions() {
    for gating in [Gating::new(Score::Softmax), Gating::new(Score::Softmax).renormalised()] {
        let rule = AdmissionRule::new(6, 2, 5, 20);
        let desc = layer().gating(gating);
        check(Case::new(desc.admission(Some(rule)), TOKENS));
        let rule = rule.order(Order::ByChoice).second(SecondExpert::Above(0.4));
        check(Case::new(desc.admission(Some(rule)), TOKENS));
        // Groups whose tokens alternate.
        let alternate = AdmissionRule::new(6, 2, 3, 12).groups(Sequences::Alternating);
        check(Case::new(desc.admission(Some(alternate)), 36));
        check(Case::new(desc.admission(Some(alternate.candidates(4))), 36));
    }
}

/// Choices that a full expert passes on, and weights that are divided by what is left of them: by the layer's choices and by others', with a map.
#[test]
fn admissions_that_weigh_anew() {
    let rule = AdmissionRule::new(6, 2, 5, 20);
    let divided = |epsilon| Some(Renormalise::Plus(epsilon));
    let passed_on = rule.candidates(4);
    let softmax = layer().gating(Gating::new(Score::Softmax));
    for rule in [
        passed_on,
        passed_on.order(Order::ByChoice),
        rule.renormalise(divided(0.0)),
        passed_on.renormalise(divided(0.25)),
        passed_on.order(Order::ByChoice).renormalise(Some(Renormalise::AtLeast(0.4))),
    ] {
        check(Case::new(softmax.admission(Some(rule)), TOKENS));
    }
    let desc = softmax.admission(Some(passed_on.renormalise(divided(0.0))));
    for origin in [Origin::Logits, Origin::Choices] {
        check(Case::new(desc, TOKENS).back(BackwardDesc::new().origin(origin)));
        check(Case::new(desc.map(Some(MapDesc::new(2))), TOKENS).back(BackwardDesc::new().origin(origin)));
    }
    check(Case::new(softmax.admission(Some(rule)).map(Some(MapDesc::new(2))), TOKENS));
    check(Case::new(desc.gating(Gating::new(Score::Sigmoid).renormalised()), TOKENS));
}

#[test]
fn padding() {
    let shared = Some(SharedDesc::new(24, Mlp::swiglu(Dtype::F32)).gated(true));
    check(Case { padding: 11, ..Case::new(layer().shared(shared), TOKENS) });
}

#[test]
fn choices_and_logits_from_elsewhere() {
    for origin in [Origin::Logits, Origin::Choices] {
        let back = BackwardDesc::new().origin(origin);
        let shared = Some(SharedDesc::new(24, Mlp::swiglu(Dtype::F32)).gated(true));
        check(Case { seed: 3, ..Case::new(layer().shared(shared), TOKENS).back(back) });
        check(Case { seed: 3, ..Case::new(layer().null(Some(NullExperts::identity(2))), TOKENS).back(back) });
        check(Case { seed: 3, ..Case::new(layer().weighting(Weighting::Input), TOKENS).back(back) });
    }
}

#[test]
fn other_rows_for_the_router() {
    let shared = Some(SharedDesc::new(24, Mlp::swiglu(Dtype::F32)).gated(true));
    check(Case { router_x: true, ..Case::new(layer(), TOKENS) });
    check(Case { router_x: true, ..Case::new(layer().shared(shared), TOKENS) });
}
