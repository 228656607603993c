//! Checks of `route_*`: the bits of a router and a gating with dispatch in launches of their own, which have checks against the reference. A softmax over
//! very many experts is added up in another order.

use half::{bf16, f16};
use moe_kernels::capacity::dispatch::DispatchDesc;
use moe_kernels::experts::Dispatched;
use moe_kernels::registry::{Kernel, Route};
use moe_kernels::routers::gating_dispatch::{self, GatingDispatchArgs, GatingDispatchDesc};
use moe_kernels::routers::route::{self, RouteArgs, RouteDesc};
use moe_kernels::routers::router::{self, RouterArgs, RouterDesc, SharedGate};
use moe_kernels::rules::{Capacity, Gating, LogitRule, Score};
use moe_kernels::{In, Workspace, reference};

use crate::any_rule::{Case, OnDevice};
use crate::dispatch::{Outputs, rule_of};
use crate::gating::{Logits, every_group_rule, garbage, groups, renormalise};
use crate::support::buffer::Guarded;
use crate::support::compare::Storage;
use crate::support::device;
use crate::support::inputs::normals;
use crate::timing::time;
use crate::tokens::Padding;

pub fn check(variant: Route, rng: &mut fastrand::Rng) {
    if variant.is_many() {
        return check_many(variant, rng);
    }
    let most = variant.gate().max_experts() as usize;
    let least = if variant.values == Route::VALUES[0] { 1 } else { 32 * Route::VALUES[0] as usize + 1 };
    for experts in [least, least + 7, (least + most) / 2, most] {
        for (tokens, top_k, hidden) in [(1, 1, 2048), (8, 8, 72), (5, 2, 8), (3, 30, 264), (7, 4, 1000)] {
            let top_k = top_k.min(experts);
            let scores = variant.score.map_or(Score::ALL.to_vec(), |score| vec![score]);
            for score in scores {
                let case = match variant.score {
                    None => Case::draw(rng, score, tokens, experts, top_k, Logits::Normal),
                    Some(_) => {
                        let rule = Gating::new(score)
                            .renormalise(renormalise(rng))
                            .scale(if rng.bool() { 1.0 } else { 2.5 })
                            .garbage(garbage(rng))
                            .groups(groups(rng, score, experts, top_k));
                        Case::new(rng, rule, [tokens, experts, top_k], Logits::Normal)
                    }
                };
                of_any_types(variant, rng, &case, hidden);
            }
        }
    }
    // As many groups of depth as a round takes, in every pair of types.
    for types in 0..TYPES {
        let score = variant.score.unwrap_or(Score::SqrtSoftplus);
        let case = match variant.score {
            None => Case::draw(rng, score, 2, least, 1, Logits::Normal),
            Some(_) => Case::new(rng, Gating::new(score), [2, least, 1], Logits::Normal),
        };
        with_and_without(types, variant, rng, &case, 2048);
    }
    // Groups of every kind, up to the last expert.
    if let Some(score) = variant.score {
        for (experts, top_k, groups) in every_group_rule(score, most) {
            let case = Case::new(rng, Gating::new(score).groups(Some(groups)), [7, experts, top_k], Logits::Normal);
            of_any_types(variant, rng, &case, 24);
        }
    }
}

/// Experts that end with a block of eight and within one, with a block of 32 and within; more tokens than warps; as many choices as lanes.
fn check_many(variant: Route, rng: &mut fastrand::Rng) {
    let score = variant.score.expect("a kernel for a score");
    let (least, most) = (32 * Route::VALUES[1] as usize + 1, variant.gate().max_experts() as usize);
    let sizes = [(1, 1, 72), (16, 8, 8), (5, 2, 264), (13, 32, 40), (8, 4, 24)];
    for experts in [least, least + 7, (least + most) / 2, most] {
        for (tokens, top_k, hidden) in sizes {
            let rule = Gating::new(score)
                .renormalise(renormalise(rng))
                .scale(if rng.bool() { 1.0 } else { 2.5 })
                .garbage(garbage(rng));
            let case = Case::new(rng, rule, [tokens, experts, top_k], Logits::Normal);
            of_any_types(variant, rng, &case, hidden);
        }
    }
    // Deep enough for two rounds of the router's product.
    for types in 0..TYPES {
        let case = Case::new(rng, Gating::new(score), [3, least, 2], Logits::Normal);
        with_and_without(types, variant, rng, &case, 2056);
    }
}

fn of_any_types(variant: Route, rng: &mut fastrand::Rng, case: &Case, hidden: usize) {
    let (types, beside) = (rng.usize(..TYPES), Beside::draw(rng));
    of_types(types, variant, rng, case, hidden, beside);
}

/// Of a pair of types, deep, and of as little depth with what that has not: each type's code for it is its own.
fn with_and_without(types: usize, variant: Route, rng: &mut fastrand::Rng, case: &Case, hidden: usize) {
    let Beside { gated, biased } = Beside::draw(rng);
    of_types(types, variant, rng, case, hidden, Beside { gated, biased });
    of_types(types, variant, rng, case, 40, Beside { gated: !gated, biased: !biased });
}

/// What the router has beside its weight.
#[derive(Clone, Copy)]
struct Beside {
    /// A shared expert's gate.
    gated: bool,
    biased: bool,
}

impl Beside {
    fn draw(rng: &mut fastrand::Rng) -> Beside {
        Beside { gated: rng.bool(), biased: rng.bool() }
    }
}

/// Pairs of types that a route takes.
const TYPES: usize = 5;

fn of_types(types: usize, variant: Route, rng: &mut fastrand::Rng, case: &Case, hidden: usize, beside: Beside) {
    match types {
        0 => run::<bf16, bf16>(variant, rng, case, hidden, beside),
        1 => run::<bf16, f32>(variant, rng, case, hidden, beside),
        2 => run::<f16, f16>(variant, rng, case, hidden, beside),
        3 => run::<f16, f32>(variant, rng, case, hidden, beside),
        _ => run::<f32, f32>(variant, rng, case, hidden, beside),
    }
}

/// What a launch or two leave.
struct Made {
    logits: Guarded<f32>,
    gate: Guarded<f32>,
    ids: Guarded<i32>,
    weights: Guarded<f32>,
}

fn run<X: Storage, W: Storage>(
    variant: Route,
    rng: &mut fastrand::Rng,
    case: &Case,
    hidden: usize,
    Beside { gated, biased }: Beside,
) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let (tokens, experts, appended) = (case.tokens, case.experts, case.rule.appended_experts());
    let (columns, choices) = (experts + case.rule.appended_columns(), tokens * case.all_choices());
    let padding = Padding::draw(&stream, rng, tokens);
    let rule = match rng.usize(..3) {
        0 => LogitRule::PLAIN.factor(0.25).softcap(Some(3.0)),
        1 => LogitRule::PLAIN.factor(-0.5),
        _ => LogitRule::PLAIN,
    };
    let router = RouterDesc::new(X::DTYPE, tokens, columns, hidden).weight(W::DTYPE).shared_gate(gated).logits(rule);
    let capacities = [None, Some(Capacity::new(2, 13).padded(false)), Some(Capacity::new(2, tokens).padded(true))];
    // Some of the experts have no rows.
    let null = if appended == 0 && rng.bool() { rng.usize(..experts) } else { 0 };
    let (null, capacity) = if variant.is_many() { (0, None) } else { (null, capacities[rng.usize(..3)]) };
    let order = DispatchDesc::new(tokens, experts + appended - null, case.all_choices(), 16).capacity(capacity);
    let choice = GatingDispatchDesc::new(case.rule, order).null_experts(null);
    let desc = RouteDesc::new(router, choice);
    let name = &format!("{desc:?} bias={biased} {}", padding.name());
    assert_eq!(route::select(&desc, kernels.device()).unwrap().kernel.variant(), Kernel::Route(variant), "{name}");

    // A token of zeros, whose logits are the biases: equal ones where there are none. One with a NaN.
    let mut x: Vec<X> = normals(rng, tokens * hidden, 1.0);
    if tokens > 2 {
        x[hidden..2 * hidden].fill(X::from_f64(0.0));
        x[2 * hidden + hidden / 2] = X::from_f64(if rng.bool() { f64::NAN } else { f64::INFINITY });
    }
    let x = Guarded::input(&stream, "x", &x);
    let other_x = Guarded::input(&stream, "x", &normals::<X>(rng, tokens * hidden, 1.0));
    let weight = Guarded::input(&stream, "weight", &normals::<W>(rng, columns * hidden, (hidden as f64).powf(-0.5)));
    let mut added = normals::<f32>(rng, columns, 1.0);
    if rng.bool() {
        // Sigmoids that are all 1, of logits that differ.
        added.iter_mut().for_each(|bias| *bias += 25.0);
    }
    let bias = biased.then(|| Guarded::input(&stream, "bias", &added));
    let gate_weight = Guarded::input(&stream, "shared_gate.weight", &normals::<W>(rng, hidden, 0.1));
    let correction_bias = case.bias.as_ref().map(|values| Guarded::input(&stream, "correction_bias", values));
    let rule_inputs = OnDevice::new(case);
    let made = || Made {
        logits: Guarded::output(&stream, "logits", tokens * columns),
        gate: Guarded::output(&stream, "shared_gate.logits", tokens),
        ids: Guarded::ids(&stream, "ids", choices),
        weights: Guarded::output(&stream, "weights", choices),
    };
    let launch_of =
        |x: &Guarded<X>, made: &mut Made, dispatched: &mut Dispatched, workspace: &mut Workspace, together: bool| {
            let (x, weight, gate_weight) = (x.view(), weight.view(), gate_weight.view());
            let (bias, correction_bias) =
                (bias.as_ref().map(Guarded::view), correction_bias.as_ref().map(Guarded::view));
            let (bias, correction_bias) = (bias.as_ref().map(In::from), correction_bias.as_ref().map(In::from));
            let (mut ids, mut weights) = (made.ids.view_mut(), made.weights.view_mut());
            let mut gate_logits = made.gate.view_mut();
            rule_inputs.with(|rule| {
                padding.with(|mask| {
                    if together {
                        let gate = gated.then(|| SharedGate::new(&gate_weight, &mut gate_logits));
                        let mut logits = made.logits.view_mut();
                        let args =
                            RouteArgs::new(&x, &weight, &mut logits, &mut ids, &mut weights, dispatched, workspace);
                        let mut args = args.rule(rule).mask(mask);
                        (args.bias, args.correction_bias, args.shared_gate) = (bias, correction_bias, gate);
                        return route::forward::<X, W>(kernels, &stream, &desc, args).unwrap();
                    }
                    {
                        let gate = gated.then(|| SharedGate::new(&gate_weight, &mut gate_logits));
                        let mut logits = made.logits.view_mut();
                        let mut args = RouterArgs::<X, W>::new(&x, &weight, &mut logits);
                        (args.bias, args.shared_gate) = (bias, gate);
                        router::forward(kernels, &stream, &router, args).unwrap();
                    }
                    let logits = made.logits.view();
                    let args = GatingDispatchArgs::new(&logits, &mut ids, &mut weights, dispatched, workspace);
                    let mut args = args.rule(rule).mask(mask);
                    args.correction_bias = correction_bias;
                    gating_dispatch::forward(kernels, &stream, &choice, args).unwrap()
                });
            });
        };
    let launch = |made: &mut Made, dispatched: &mut Dispatched, workspace: &mut Workspace, together: bool| {
        launch_of(&x, made, dispatched, workspace, together);
    };
    let bytes = gating_dispatch::workspace_bytes(&choice, kernels.device()).unwrap();
    let (mut want, mut lists) = (made(), Outputs::new(&stream, order.shape(), bytes));
    launch(&mut want, &mut lists.dispatched, &mut lists.workspace, false);
    let ids = want.ids.read(&stream);
    let weights = want.weights.read(&stream);
    let sorted = reference::dispatch::dispatch(&ids, &rule_of(&order)).unwrap();
    lists.assert_equal(&stream, name, &sorted, Some(&weights));

    let bytes = route::workspace_bytes(&desc, kernels.device()).unwrap();
    let (mut got, mut lists) = (made(), Outputs::new(&stream, order.shape(), bytes));
    let bits = |values: &Guarded<f32>| values.read(&stream).into_iter().map(f32::to_bits).collect::<Vec<_>>();
    // The second time in the workspace as the first has left it.
    for _ in 0..2 {
        launch(&mut got, &mut lists.dispatched, &mut lists.workspace, true);
        assert_eq!(bits(&got.logits), bits(&want.logits), "{name}: logits");
        assert_eq!(bits(&got.gate), bits(&want.gate), "{name}: logits of the gate");
        assert_eq!(got.ids.read(&stream), ids, "{name}: ids");
        let own = got.weights.read(&stream);
        if variant.is_many() && variant.score == Some(Score::Softmax) {
            assert_near(name, &own, &weights, softmax_bound(experts));
        } else {
            assert_eq!(bits(&got.weights), bits(&want.weights), "{name}: weights");
        }
        lists.assert_equal(&stream, name, &sorted, Some(&own));
        got = made();
        lists.reset(&stream);
    }
    time(&stream, name, || launch(&mut got, &mut lists.dispatched, &mut lists.workspace, true));
    if hidden == 72 {
        // Behind a launch that writes other logits to the same place: this one may begin before that has ended.
        launch_of(&other_x, &mut got, &mut lists.dispatched, &mut lists.workspace, true);
        launch(&mut got, &mut lists.dispatched, &mut lists.workspace, true);
        assert_eq!(bits(&got.logits), bits(&want.logits), "{name}: logits behind another launch");
    }
    x.assert_unchanged(&stream);
    weight.assert_unchanged(&stream);
}

/// What two softmaxes of so many logits differ by at most, relative to a weight: each rounds as often as it adds on the longest way to its sum (a lane's
/// logits and five exchanges; three, a lane's blocks and five), and has a few exponentials and quotients of about an ulp.
fn softmax_bound(experts: usize) -> f64 {
    let (alone, by_blocks) = (experts.div_ceil(32) + 5, 3 + experts.div_ceil(256) + 5);
    (alone + by_blocks + 24) as f64 * 2f64.powi(-24)
}

fn assert_near(name: &str, got: &[f32], want: &[f32], bound: f64) {
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let far = (f64::from(got) - f64::from(want)).abs() > bound * f64::from(want.abs());
        let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
        assert!(same || !(far || got.is_nan() || want.is_nan()), "{name}: weight {i} is {got}, not {want}");
    }
}
