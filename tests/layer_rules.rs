//! Every gating rule in a whole layer: what the layer's own router and gating choose is what the reference chooses from the logits that the
//! layer returns, and the layer computes what it computes of those choices; in one call, in parts, with a map, and measured.
//!
//! Shapes and rules are drawn; `MOE_SEED` draws others.

#[path = "support/device.rs"]
#[allow(dead_code)]
mod device;

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr};
use half::bf16;
use moe_kernels::experts::combine::CombineArgs;
use moe_kernels::experts::{Dispatched, Weight};
use moe_kernels::layer::{
    Choices, ExpertWeights, ExpertsArgs, LayerArgs, LayerDesc, LayerWeights, MapDesc, MapTable, Measured, RouteArgs,
    RouterWeights,
};
use moe_kernels::reference::gating::{Gated, Inputs, gate_by};
use moe_kernels::reference::hash::{Hash, route};
use moe_kernels::reference::router;
use moe_kernels::routers::gating::Given;
use moe_kernels::routers::measured_gating::{RouterStats, Totals};
use moe_kernels::rules::{
    Appended, AppendedWeight, BalanceRule, ChoiceBy, Dtype, Gating, LogitRule, LossScore, Renormalise, Score,
};
use moe_kernels::{Kernels, Workspace};

const VOCABULARY: usize = 23;

/// A layer with a rule, its weights on the device.
struct Case {
    stream: Arc<CudaStream>,
    kernels: &'static Kernels,
    what: String,
    desc: LayerDesc,
    tokens: usize,
    x: Vec<bf16>,
    matrix: Vec<bf16>,
    bias: Vec<f32>,
    expert_scale: Vec<f32>,
    global_scale: f32,
    table: Vec<i64>,
    words: Vec<i32>,
    at: OnDevice,
}

struct OnDevice {
    x: CudaSlice<bf16>,
    matrix: CudaSlice<bf16>,
    gate_up: CudaSlice<bf16>,
    down: CudaSlice<bf16>,
    bias: CudaSlice<f32>,
    expert_scale: CudaSlice<f32>,
    global_scale: CudaSlice<f32>,
    table: CudaSlice<i64>,
    words: CudaSlice<i32>,
}

/// What a run gave.
#[derive(PartialEq, Debug)]
struct Answer {
    ids: Vec<i32>,
    weights: Vec<u32>,
    y: Vec<u16>,
}

impl Case {
    fn new(seed: u64, name: &str, rule: Gating, logits: LogitRule) -> Case {
        let of_run = std::env::var("MOE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0u64);
        let mut rng = fastrand::Rng::with_seed(of_run.wrapping_mul(1000) + seed);
        let (tokens, experts) = (rng.usize(1..70), rng.usize(3..20));
        let top_k = if rule.score == Score::SparseMixer { 2 } else { rng.usize(1..=experts.min(5)) };
        let (hidden, intermediate) = (8 * rng.usize(1..9), 8 * rng.usize(1..6));
        let desc = LayerDesc::new(Dtype::Bf16, hidden, intermediate, experts, top_k).gating(rule).logits(logits);
        let mut tensor = |len: usize, scale: f32| -> Vec<bf16> {
            (0..len).map(|_| bf16::from_f32((2.0 * rng.f32() - 1.0) * scale)).collect()
        };
        let (all, columns) = (desc.all_experts(), desc.logit_columns());
        let x = tensor(tokens * hidden, 1.0);
        let gate_up = tensor(all * 2 * intermediate * hidden, 2.0 / (hidden as f32).sqrt());
        let down = tensor(all * hidden * intermediate, 1.0 / (intermediate as f32).sqrt());
        let matrix = tensor(columns * hidden, 6.0 / (hidden as f32).sqrt());
        let bias: Vec<f32> = (0..experts).map(|_| rng.f32() - 0.5).collect();
        let expert_scale: Vec<f32> = (0..experts).map(|_| 0.5 + rng.f32()).collect();
        let global_scale = 0.5 + rng.f32();
        let table: Vec<i64> = (0..VOCABULARY * top_k).map(|_| rng.i64(-1..experts as i64)).collect();
        let words: Vec<i32> = (0..tokens).map(|_| rng.i32(-1..=VOCABULARY as i32)).collect();
        let stream = device::stream();
        let on = |values: &[bf16]| stream.clone_htod(values).unwrap();
        let at = OnDevice {
            x: on(&x),
            matrix: on(&matrix),
            gate_up: on(&gate_up),
            down: on(&down),
            bias: stream.clone_htod(&bias).unwrap(),
            expert_scale: stream.clone_htod(&expert_scale).unwrap(),
            global_scale: stream.clone_htod(&[global_scale]).unwrap(),
            table: stream.clone_htod(&table).unwrap(),
            words: stream.clone_htod(&words).unwrap(),
        };
        let what = format!("{name}, seed {seed} of run {of_run}: {tokens} tokens, {top_k} of {experts}, {rule:?}");
        let kernels = device::kernels();
        Case { stream, kernels, what, desc, tokens, x, matrix, bias, expert_scale, global_scale, table, words, at }
    }

    fn has_bias(&self) -> bool {
        let Gating { score, choice, .. } = self.desc.gating;
        choice == ChoiceBy::Logit
            || matches!(score, Score::Softmax | Score::Sigmoid | Score::SqrtSoftplus) && choice == ChoiceBy::Score
    }

    fn weights(&self) -> LayerWeights<'_> {
        let rule = self.desc.gating;
        let mut router = RouterWeights::new(&self.at.matrix);
        router.correction_bias = self.has_bias().then(|| (&self.at.bias).into());
        router.expert_scale = rule.expert_scale.then(|| (&self.at.expert_scale).into());
        router.global_scale = rule.global_scale.then(|| (&self.at.global_scale).into());
        LayerWeights::new(router, ExpertWeights::new(Weight::new(&self.at.gate_up), Weight::new(&self.at.down)))
    }

    fn route_args(&self) -> RouteArgs<'_> {
        match self.desc.gating.choice {
            ChoiceBy::Given => RouteArgs::new().given(Given::table(&self.at.table, VOCABULARY, &self.at.words)),
            _ => RouteArgs::new(),
        }
    }

    fn read<T: DeviceRepr>(&self, values: &CudaSlice<T>) -> Vec<T> {
        self.stream.clone_dtoh(values).unwrap()
    }

    fn answer(&self, ids: &CudaSlice<i32>, weights: &CudaSlice<f32>, y: &CudaSlice<bf16>) -> Answer {
        Answer {
            ids: self.read(ids),
            weights: self.read(weights).into_iter().map(f32::to_bits).collect(),
            y: self.read(y).into_iter().map(bf16::to_bits).collect(),
        }
    }

    /// The layer with its own router: its answer, logits, and counts where it measures. `of`: this layer with something that changes no result.
    fn whole(&self, of: &LayerDesc) -> (Answer, Vec<f32>, Vec<i32>) {
        let experts = of.experts;
        let ints = || self.stream.alloc_zeros::<i32>(experts).unwrap();
        let floats = || self.stream.alloc_zeros::<f32>(experts).unwrap();
        let (mut counts, mut loss_counts, mut probability, mut importance) = (ints(), ints(), floats(), floats());
        let mut stats = self.stream.alloc_zeros::<RouterStats>(1).unwrap();
        let identity: Vec<i32> = (0..of.all_experts() as i32).collect();
        let map = self.stream.clone_htod(&identity).unwrap();
        let plan = of.plan(self.tokens, self.kernels.device()).unwrap();
        let slots = self.tokens * of.all_choices();
        let mut workspace = Workspace::new(&self.stream, plan.workspace_bytes()).unwrap();
        let mut logits = self.stream.alloc_zeros::<f32>(self.tokens * of.logit_columns()).unwrap();
        let mut ids = self.stream.alloc_zeros::<i32>(slots).unwrap();
        let mut weights = self.stream.alloc_zeros::<f32>(slots).unwrap();
        let mut y = self.stream.alloc_zeros::<bf16>(self.tokens * of.hidden).unwrap();
        let mut route = self.route_args().logits(&mut logits).ids(&mut ids).weights(&mut weights);
        if of.measure.is_some() {
            let totals = Totals::new(&mut counts, &mut loss_counts, &mut probability, &mut importance);
            route = route.measured(Measured::new(totals, &mut stats));
        }
        if of.map.is_some() {
            route = route.map(MapTable::new(&map));
        }
        let args = LayerArgs::new(&self.at.x, &mut y).route(route);
        plan.forward(self.kernels, &self.stream, &self.weights(), args, &mut workspace).unwrap();
        (self.answer(&ids, &weights, &y), self.read(&logits), self.read(&counts))
    }

    /// The same in three parts.
    fn parts(&self) -> Answer {
        let plan = self.desc.plan(self.tokens, self.kernels.device()).unwrap();
        let slots = self.tokens * self.desc.all_choices();
        let mut workspace = Workspace::new(&self.stream, plan.workspace_bytes()).unwrap();
        let mut ids = self.stream.alloc_zeros::<i32>(slots).unwrap();
        let mut weights = self.stream.alloc_zeros::<f32>(slots).unwrap();
        let mut y = self.stream.alloc_zeros::<bf16>(self.tokens * self.desc.hidden).unwrap();
        let mut dispatched = Dispatched::new(&self.stream, &plan.route().rows()).unwrap();
        let (kernels, stream) = (self.kernels, &self.stream);
        let LayerWeights { router, experts, .. } = self.weights();
        let args = self.route_args().ids(&mut ids).weights(&mut weights);
        plan.route().forward(kernels, stream, &router, &self.at.x, args, &mut dispatched, &mut workspace).unwrap();
        let mut y_slots = stream.alloc_zeros::<bf16>(plan.experts().rows().slots * self.desc.hidden).unwrap();
        let args = ExpertsArgs::new(&self.at.x, &dispatched, &mut y_slots);
        plan.experts().forward(kernels, stream, &experts, args, &mut workspace).unwrap();
        plan.experts().combine(kernels, stream, CombineArgs::new(&y_slots, &dispatched, &mut y)).unwrap();
        self.answer(&ids, &weights, &y)
    }

    /// The experts alone, of choices that are given with their weights: a layer of as many experts as there are in all.
    fn of_choices(&self, ids: &[i32], weights: &[f32]) -> Vec<u16> {
        let LayerDesc { hidden, intermediate, .. } = self.desc;
        let desc = LayerDesc::new(
            Dtype::Bf16,
            hidden,
            intermediate,
            self.desc.all_experts(),
            self.desc.all_choices().min(self.desc.all_experts()),
        );
        let plan = desc.plan(self.tokens, self.kernels.device()).unwrap();
        let mut workspace = Workspace::new(&self.stream, plan.workspace_bytes()).unwrap();
        let (ids, weights) = (self.stream.clone_htod(ids).unwrap(), self.stream.clone_htod(weights).unwrap());
        let mut y = self.stream.alloc_zeros::<bf16>(self.tokens * hidden).unwrap();
        let args = LayerArgs::new(&self.at.x, &mut y).choices(Choices::new(&ids, &weights));
        plan.forward(self.kernels, &self.stream, &self.weights(), args, &mut workspace).unwrap();
        self.read(&y).into_iter().map(bf16::to_bits).collect()
    }

    fn want(&self, logits: &[f32]) -> Gated {
        let rule = self.desc.gating;
        let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|&value| value.into()).collect() };
        let (bias, scale) = (wide(&self.bias), wide(&self.expert_scale));
        let table: Vec<i32> = self.table.iter().map(|&id| id as i32).collect();
        let given = route(&self.words, Hash::Table(&table), self.desc.experts, self.desc.top_k).unwrap();
        let inputs = Inputs {
            correction_bias: self.has_bias().then_some(&bias),
            expert_scale: rule.expert_scale.then_some(&scale),
            global_scale: rule.global_scale.then_some(self.global_scale.into()),
            given: (rule.choice == ChoiceBy::Given).then_some(&given),
        };
        gate_by(logits, self.desc.experts, self.desc.top_k, &rule, inputs).unwrap()
    }

    fn check(&self) {
        let what = &self.what;
        let (whole, logits, _) = self.whole(&self.desc);
        let product = router::router::<_, _, f32>(&self.x, &self.matrix, None, self.desc.hidden).unwrap();
        for (got, want) in logits.iter().zip(router::finish(&product, self.desc.logits)) {
            assert!((f64::from(*got) - want).abs() < 2e-5, "{what}: logit {got} is not {want}");
        }
        let want = self.want(&logits);
        assert_eq!(whole.ids, want.ids, "{what}: ids");
        let weights: Vec<f32> = whole.weights.iter().map(|&bits| f32::from_bits(bits)).collect();
        for (got, want) in weights.iter().zip(&want.weights) {
            assert!((f64::from(*got) - want).abs() <= 2e-6 * want.abs(), "{what}: weight {got} is not {want}");
        }
        assert!(whole.y == self.of_choices(&whole.ids, &weights), "{what}: y");
        assert_eq!(self.parts(), whole, "{what}: parts");
        self.mapped(&whole);
        self.measured(&whole);
    }

    /// A map that changes nothing: gating and dispatch are launches of their own then.
    fn mapped(&self, whole: &Answer) {
        let (got, ..) = self.whole(&self.desc.map(Some(MapDesc::new(self.desc.all_experts()))));
        assert_eq!(got, *whole, "{}: with a map", self.what);
    }

    fn measured(&self, whole: &Answer) {
        let experts = self.desc.experts;
        let rule = BalanceRule::new(LossScore::Softmax, self.tokens);
        let (got, _, counts) = self.whole(&self.desc.measure(Some(rule)));
        assert_eq!(got, *whole, "{}: measured", self.what);
        let mut want = vec![0; experts];
        for &id in whole.ids.iter().filter(|&&id| (0..experts as i32).contains(&id)) {
            want[id as usize] += 1;
        }
        assert_eq!(counts, want, "{}: counts", self.what);
    }
}

fn column(count: usize) -> Option<Appended> {
    Some(Appended::new(count, AppendedWeight::Column))
}

#[test]
fn every_rule_in_a_layer() {
    use Renormalise::{AtLeast, PNorm, Plus};
    use Score::{Sigmoid, Softmax, SparseMixer, SqrtSoftplus, TopkSoftmax};
    let plain = LogitRule::PLAIN;
    let rule = Gating::new;
    let rules = [
        ("ernie4_5_moe", rule(Softmax).renormalise(Some(AtLeast(1e-12))), plain),
        ("longcat_flash", rule(Softmax).scale(6.0), plain),
        ("dbrx", rule(Softmax).renormalise(Some(PNorm(2.0))), plain),
        ("gemma4", rule(Softmax).renormalised().expert_scale(true), plain),
        ("openai_privacy_filter", rule(TopkSoftmax).scale(0.25), plain),
        ("biased top-k then softmax", rule(TopkSoftmax).choice(ChoiceBy::Logit), plain),
        ("deepseek_v4", rule(SqrtSoftplus).renormalise(Some(Plus(1e-20))).scale(1.5), plain),
        (
            "deepseek_v4's hash layer",
            rule(SqrtSoftplus).choice(ChoiceBy::Given).renormalise(Some(Plus(1e-20))).scale(1.5),
            plain,
        ),
        ("replay of softmax", rule(Softmax).choice(ChoiceBy::Given).renormalised(), plain),
        ("inkling", rule(Sigmoid).renormalised().scale(2.5).global_scale(true).appended(column(2)), plain),
        ("fixed", rule(Softmax).renormalised().appended(Some(Appended::new(1, AppendedWeight::Fixed(1.0)))), plain),
        ("kolibri1", rule(Sigmoid).choice(ChoiceBy::Logit), plain),
        ("flint", rule(Sigmoid).renormalised(), plain),
        ("phimoe", rule(SparseMixer).jitter(0.15), plain),
        ("laguna", rule(Sigmoid).renormalised(), plain.softcap(Some(6.0))),
        ("muse_spark", rule(Sigmoid).renormalise(Some(Plus(1e-15))), plain.factor(0.25)),
    ];
    for (seed, (name, gating, logits)) in (0..).zip(rules) {
        for draw in 0..2 {
            Case::new(2 * seed + draw, name, gating, logits).check();
        }
    }
}

#[test]
fn what_a_rule_takes_is_there_exactly_where_it_says() {
    let fault = |gating: Gating, expert_scale: bool, global_scale: bool| {
        let case = Case::new(0, "refused", gating, LogitRule::PLAIN);
        let mut router = RouterWeights::new(&case.at.matrix);
        router.expert_scale = expert_scale.then(|| (&case.at.expert_scale).into());
        router.global_scale = global_scale.then(|| (&case.at.global_scale).into());
        let experts = ExpertWeights::new(Weight::new(&case.at.gate_up), Weight::new(&case.at.down));
        let plan = case.desc.plan(case.tokens, case.kernels.device()).unwrap();
        let mut workspace = Workspace::new(&case.stream, plan.workspace_bytes()).unwrap();
        let mut y = case.stream.alloc_zeros::<bf16>(case.tokens * case.desc.hidden).unwrap();
        let args = LayerArgs::new(&case.at.x, &mut y);
        let weights = LayerWeights::new(router, experts);
        let error = plan.forward(case.kernels, &case.stream, &weights, args, &mut workspace).unwrap_err();
        error.argument().unwrap()
    };
    let softmax = Gating::new(Score::Softmax);
    assert_eq!(fault(softmax.expert_scale(true), false, false), "expert_scale");
    assert_eq!(fault(softmax, true, false), "expert_scale");
    assert_eq!(fault(softmax.global_scale(true), false, false), "global_scale");
    assert_eq!(fault(softmax, false, true), "global_scale");
    assert_eq!(fault(softmax.choice(ChoiceBy::Given), false, false), "given");
}
