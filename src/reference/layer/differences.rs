//! The analytic gradients against central differences of the forward pass.

use super::super::gemm::MatrixGradient;
use super::*;
use crate::reference::balance::balance;
use crate::rules::{BalanceRule, Bound, Glu, Groups, Layout, LossGradient, LossScore, Renormalise, Score, Swiglu};

const TOKENS: usize = 5;
const HIDDEN: usize = 4;
const INTER: usize = 3;
const SHARED: usize = 2;
const EXPERTS: usize = 5;
const TOP_K: usize = 2;

/// Everything that a layer may have, by name; what a case leaves out has no gradient.
#[derive(Clone)]
struct Values {
    tensors: Vec<(&'static str, Vec<f64>)>,
}

impl Values {
    fn random(seed: u64, glu: Glu) -> Values {
        let mut rng = fastrand::Rng::with_seed(seed);
        let rows = |n: usize| if glu == Glu::None { n } else { 2 * n };
        let sizes = [
            ("x", TOKENS * HIDDEN),
            ("router", EXPERTS * HIDDEN),
            ("router_bias", EXPERTS),
            ("up", EXPERTS * rows(INTER) * HIDDEN),
            ("up_bias", EXPERTS * rows(INTER)),
            ("down", EXPERTS * HIDDEN * INTER),
            ("down_bias", EXPERTS * HIDDEN),
            ("shared_up", rows(SHARED) * HIDDEN),
            ("shared_up_bias", rows(SHARED)),
            ("shared_down", HIDDEN * SHARED),
            ("shared_down_bias", HIDDEN),
            ("shared_gate", HIDDEN),
            ("bias", HIDDEN),
        ];
        let mut random = |len| (0..len).map(|_| 2.0 * rng.f64() - 1.0).collect();
        Values { tensors: sizes.map(|(name, len)| (name, random(len))).to_vec() }
    }

    fn get(&self, name: &str) -> &[f64] {
        &self.tensors.iter().find(|(known, _)| *known == name).unwrap().1
    }
}

/// What a case turns on.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    seed: u64,
    gating: Gating,
    router_bias: bool,
    correction_bias: Option<&'static [f64]>,
    weighting: Weighting,
    capacity: Option<Capacity>,
    null: Option<NullExperts>,
    glu: Glu,
    layout: Layout,
    biases: bool,
    activation: Activation,
    by_expert: bool,
    shared: bool,
    shared_activation: Option<Activation>,
    shared_gate: bool,
    scales: [f64; 2],
    bias: bool,
    losses: Option<LossGradient>,
}

impl Case {
    fn plain(name: &'static str) -> Case {
        Case {
            name,
            seed: 1,
            gating: Gating::new(Score::Softmax),
            router_bias: false,
            correction_bias: None,
            weighting: Weighting::Output,
            capacity: None,
            null: None,
            glu: Glu::Split,
            layout: Layout::Nk,
            biases: false,
            activation: Activation::Silu,
            by_expert: false,
            shared: false,
            shared_activation: None,
            shared_gate: false,
            scales: [1.0; 2],
            bias: false,
            losses: None,
        }
    }

    /// Calls `of` with the layer that has these values.
    fn with<O>(&self, values: &Values, of: impl FnOnce(&[f64], &Layer<f64, f64>) -> O) -> O {
        let null = self.null.map_or(0, |null| null.count);
        let (here, rows) = (EXPERTS - null, if self.glu == Glu::None { 1 } else { 2 });
        let activations: Vec<Activation> =
            (0..here).map(|e| Swiglu::clamped(1.0 + 0.1 * e as f32).alpha(1.0 + 0.2 * e as f32).into()).collect();
        let matrix = |name, bias, experts: usize, [n, k]: [usize; 2], glu: Glu| {
            let weight_rows = if glu == Glu::None { n } else { rows * n };
            ExpertMatrix {
                weight: &values.get(name)[..experts * weight_rows * k],
                bias: self.biases.then(|| &values.get(bias)[..experts * weight_rows]),
                n,
                k,
                glu,
                layout: self.layout,
            }
        };
        let shared = (
            matrix("shared_up", "shared_up_bias", 1, [SHARED, HIDDEN], self.glu),
            matrix("shared_down", "shared_down_bias", 1, [HIDDEN, SHARED], Glu::None),
        );
        let layer = Layer {
            hidden: HIDDEN,
            router_weight: values.get("router"),
            router_bias: self.router_bias.then(|| values.get("router_bias")),
            correction_bias: self.correction_bias,
            top_k: TOP_K,
            gating: self.gating,
            weighting: self.weighting,
            capacity: self.capacity,
            up: matrix("up", "up_bias", here, [INTER, HIDDEN], self.glu),
            activation: self.activation,
            activations: self.by_expert.then_some(&activations[..]),
            down: matrix("down", "down_bias", here, [HIDDEN, INTER], Glu::None),
            shared: self.shared.then_some(shared),
            shared_activation: self.shared_activation,
            shared_gate: self.shared_gate.then(|| values.get("shared_gate")),
            scales: self.scales,
            bias: self.bias.then(|| values.get("bias")),
            null: self.null,
        };
        of(values.get("x"), &layer)
    }

    /// The result, what is differentiated, and the counts of choices.
    fn value(&self, values: &Values, dy: &[f64]) -> (Forward, f64, Vec<i32>) {
        let result = self.with(values, |x, layer| forward(x, layer).unwrap());
        let mut value: f64 = result.y.iter().zip(dy).map(|(y, d)| y * d).sum();
        let mut counts = Vec::new();
        if let Some(losses) = self.losses {
            let rule = BalanceRule::new(losses.score, TOKENS);
            let of = balance(&result.logits, &result.ids, &result.weights, EXPERTS, TOP_K, &rule).unwrap();
            value += f64::from(losses.balance) * of.totals.loss() + f64::from(losses.z) * of.z_loss;
            counts = of.totals.counts.iter().map(|&count| count as i32).collect();
        }
        (result, value, counts)
    }

    fn check(&self) {
        let values = Values::random(self.seed, self.glu);
        let mut rng = fastrand::Rng::with_seed(99);
        let dy: Vec<f64> = (0..TOKENS * HIDDEN).map(|_| 2.0 * rng.f64() - 1.0).collect();
        let (result, _, counts) = self.value(&values, &dy);
        let losses = self.losses.as_ref().map(|losses| (losses, &counts[..], TOKENS));
        let got = self.with(&values, |x, layer| backward(x, layer, &result, &dy, losses).unwrap());
        let matrix = |d: &MatrixGradient| (d.weight.clone(), d.bias.clone());
        let mut found = vec![("x", Some(got.x)), ("router", Some(got.router_weight)), ("router_bias", got.router_bias)];
        let ((up, up_bias), (down, down_bias)) = (matrix(&got.up), matrix(&got.down));
        found.extend([("up", Some(up)), ("up_bias", up_bias), ("down", Some(down)), ("down_bias", down_bias)]);
        let of_shared = got.shared.as_ref().map(|(up, down)| (matrix(up), matrix(down)));
        if let Some(((up, up_bias), (down, down_bias))) = of_shared {
            found.extend([("shared_up", Some(up)), ("shared_up_bias", up_bias)]);
            found.extend([("shared_down", Some(down)), ("shared_down_bias", down_bias)]);
        }
        found.extend([("shared_gate", got.shared_gate), ("bias", got.bias)]);

        for (at, (name, tensor)) in values.tensors.iter().enumerate() {
            let moved = |i: usize, by: f64| {
                let mut moved = values.clone();
                moved.tensors[at].1[i] += by;
                let (moved, value, _) = self.value(&moved, &dy);
                assert_eq!(moved.ids, result.ids, "{}: a step of {name}[{i}] changes the choice", self.name);
                value
            };
            let step = 1e-5;
            let want: Vec<f64> = (0..tensor.len()).map(|i| (moved(i, step) - moved(i, -step)) / (2.0 * step)).collect();
            let got = found.iter().find(|(known, _)| known == name).and_then(|(_, d)| d.clone());
            // Values that the case does not use, or not to the end: the differences are 0 there.
            let mut got = got.unwrap_or_default();
            got.resize(tensor.len(), 0.0);
            let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
            let error = norm(&mut got.iter().zip(&want).map(|(got, want)| got - want));
            let size = norm(&mut want.iter().copied());
            assert!(error <= 1e-8 * size + 1e-9, "{}: {name} is off by {error:e} of {size:e}", self.name);
        }
    }
}

#[test]
fn every_gating() {
    let rules: [Option<Renormalise>; 4] =
        [None, Some(Renormalise::Plus(0.3)), Some(Renormalise::AtLeast(5.0)), Some(Renormalise::PNorm(2.5))];
    for score in [Score::Softmax, Score::TopkSoftmax, Score::Sigmoid, Score::SqrtSoftplus] {
        for renormalise in rules {
            let gating = Gating::new(score).renormalise(renormalise).scale(1.5);
            Case { gating, ..Case::plain("gating") }.check();
        }
    }
    let gating = Gating::new(Score::Sigmoid).renormalised();
    let correction_bias = Some(&[0.3, -0.2, 0.1, 0.4, -0.3][..]);
    Case { gating, correction_bias, router_bias: true, ..Case::plain("biases of the router") }.check();
    let gating = gating.groups(Some(Groups::new(5, 3).score(crate::rules::GroupScore::Max)));
    Case { gating, ..Case::plain("groups") }.check();
}

#[test]
fn every_activation_and_layout() {
    let units = [
        Swiglu::GPT_OSS.gate(Bound::Clamp(0.5)).up(Bound::Clamp(0.6)),
        Swiglu::clamped(0.2).clamp_after(true),
        Swiglu::softcapped(0.8, 1.2).alpha(0.8).factor(0.5).offset(-0.25),
    ];
    let plain = [
        Activation::Identity,
        Activation::Relu,
        Activation::ReluSquared,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Silu,
    ];
    for layout in [Layout::Nk, Layout::Kn] {
        for glu in [Glu::None, Glu::Split, Glu::UpFirst, Glu::Interleaved] {
            let units = units.map(Activation::from).into_iter().filter(|_| glu != Glu::None);
            for activation in plain.into_iter().chain(units) {
                Case { activation, glu, layout, biases: true, ..Case::plain("activation") }.check();
            }
        }
    }
    Case { by_expert: true, biases: true, ..Case::plain("numbers by expert") }.check();
}

#[test]
fn every_weighting() {
    for weighting in [Weighting::Output, Weighting::Input, Weighting::Activation] {
        let case = Case { weighting, biases: true, ..Case::plain("weighting") };
        case.check();
        let capacity = Some(Capacity::new(1, 3));
        Case { capacity, scales: [0.5, 1.0], ..case }.check();
        Case { capacity: capacity.map(|capacity| capacity.padded(true)), ..case }.check();
        for null in [NullExperts::zero(2), NullExperts::identity(2)] {
            Case { null: Some(null), scales: [0.7, 1.0], ..case }.check();
        }
    }
}

#[test]
fn what_stands_around() {
    let shared = Case { shared: true, biases: true, bias: true, scales: [0.5, 0.25], ..Case::plain("shared") };
    shared.check();
    Case { shared_gate: true, shared_activation: Some(Activation::Gelu), ..shared }.check();
    let everything = Case {
        shared_gate: true,
        weighting: Weighting::Activation,
        null: Some(NullExperts::identity(1)),
        capacity: Some(Capacity::new(2, 5)),
        layout: Layout::Kn,
        ..shared
    };
    Case { losses: Some(LossGradient::new(LossScore::Sigmoid).balance(0.7).z(0.3)), ..everything }.check();
    Case { losses: Some(LossGradient::new(LossScore::Softmax).balance(0.7).z(0.3)), ..shared }.check();
}

/// Nothing depends on rows that nobody fills, and an expert without rows has gradients of 0.
#[test]
fn experts_without_rows() {
    let mut values = Values::random(1, Glu::Split);
    // The last expert is out of reach.
    values.tensors[0].1.iter_mut().for_each(|x| *x = x.abs());
    values.tensors[1].1[(EXPERTS - 1) * HIDDEN..].fill(-50.0);
    let case = Case { capacity: Some(Capacity::new(2, 5).padded(true)), biases: true, ..Case::plain("empty") };
    let dy = vec![1e-5; TOKENS * HIDDEN];
    let (result, ..) = case.value(&values, &dy);
    assert_eq!(result.plan.counts[EXPERTS - 1], 0);
    let got = case.with(&values, |x, layer| backward(x, layer, &result, &dy, None).unwrap());
    let all = [&got.x, &got.router_weight, &got.up.weight, &got.down.weight];
    assert!(all.into_iter().flatten().all(|d| d.is_finite()));
    let last = |d: &[f64]| d[d.len() / EXPERTS * (EXPERTS - 1)..].iter().all(|&d| d == 0.0);
    assert!(last(&got.up.weight) && last(&got.down.weight) && last(&got.down.bias.unwrap()));
}

#[test]
fn no_tokens() {
    let mut values = Values::random(1, Glu::Split);
    values.tensors[0].1.clear();
    let case = Case { shared: true, shared_gate: true, bias: true, ..Case::plain("nobody") };
    let (result, ..) = case.value(&values, &[]);
    let got = case.with(&values, |x, layer| backward(x, layer, &result, &[], None).unwrap());
    assert!(got.x.is_empty() && got.up.weight.iter().chain(&got.router_weight).all(|&d| d == 0.0));
}

#[test]
fn a_gradient_of_another_length() {
    let (values, case) = (Values::random(1, Glu::Split), Case::plain("short"));
    let (result, ..) = case.value(&values, &[0.0; TOKENS * HIDDEN]);
    let error = case.with(&values, |x, layer| backward(x, layer, &result, &[0.0; 3], None).unwrap_err());
    assert_eq!(error.argument, "dy");
}
