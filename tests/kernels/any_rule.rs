//! Checks of `gating_any_*`: rules that no kernel is made for, said at run time; alone, with dispatch, and measured.

use cudarc::driver::CudaView;
use moe_kernels::capacity::Ids;
use moe_kernels::capacity::dispatch::DispatchDesc;
use moe_kernels::reference::gating::{Gated, Inputs, gate_by};
use moe_kernels::reference::hash::{Hash, route};
use moe_kernels::registry::{Gate, Kernel, MeasuredGate};
use moe_kernels::routers::gating::{self, GatingArgs, GatingDesc, Given, RuleInputs};
use moe_kernels::routers::gating_dispatch::{self, GatingDispatchArgs, GatingDispatchDesc};
use moe_kernels::routers::measured_gating::MeasuredGatingDesc;
use moe_kernels::rules::{
    Appended, AppendedWeight, BalanceRule, Capacity, ChoiceBy, Gating, IdFormat, LossCounts, LossScore, Renormalise,
    Score,
};
use moe_kernels::{In, Tensor, TokenMask, reference};

use crate::balance;
use crate::dispatch::{Outputs, rule_of};
use crate::gating::{Logits, coarse, correction_bias, every_group_rule, garbage, groups, logits, renormalise};
use crate::support::buffer::Guarded;
use crate::support::compare::{Shares, assert_bounded, to_f64, weight_bounds};
use crate::support::device;
use crate::timing::time;
use crate::tokens::{LogitsOn, Padding};

/// Numbers of experts: of the width below, between, and as many as fit.
fn sizes(values: u32) -> [usize; 4] {
    let most = 32 * values as usize;
    let least = Gate::ANY_VALUES.iter().map(|&v| 32 * v as usize).filter(|&e| e < most).max().unwrap_or(0) + 1;
    [least, least + 11, (least + most) / 2, most]
}

pub fn check(variant: Gate, rng: &mut fastrand::Rng) {
    for experts in sizes(variant.values) {
        for (tokens, top_k) in [(1, 1), (37, 2), (9, 8), (60, 5), (3, 30)] {
            let tokens = if variant.dispatch && tokens == 60 { 300 } else { tokens };
            for kind in [Logits::Normal, Logits::Ties, Logits::NotFinite] {
                for score in Score::ALL {
                    let case = Case::draw(rng, score, tokens, experts, top_k.min(experts), kind);
                    run(variant, rng, &case);
                }
            }
        }
    }
    for score in [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus] {
        for (experts, top_k, groups) in every_group_rule(score, 32 * variant.values as usize) {
            let rule = Gating::new(score).groups(Some(groups)).expert_scale(true);
            let case = Case::new(rng, rule, [23, experts, top_k], Logits::Normal);
            run(variant, rng, &case);
        }
    }
    // More tokens than there are warps, so that a warp has several: `dispatch` has them with few tokens already.
    if !variant.dispatch {
        let warps = 8 * device::kernels().device().multiprocessors * variant.warps();
        let rule = Gating::new(Score::SqrtSoftplus).renormalised();
        let experts = sizes(variant.values)[0].max(2);
        let case = Case::new(rng, rule, [warps as usize + 5, experts, 2], Logits::Normal);
        run(variant, rng, &case);
    }
}

pub fn check_measured(variant: MeasuredGate, rng: &mut fastrand::Rng) {
    for experts in sizes(variant.values) {
        for (tokens, top_k, sequence) in [(1, 1, 1), (37, 2, 10), (9, 8, 9), (130, 4, 130), (5, 30, 2)] {
            for kind in [Logits::Normal, Logits::Ties, Logits::NotFinite] {
                for score in Score::ALL {
                    let case = Case::draw(rng, score, tokens, experts, top_k.min(experts), kind);
                    // Of sigmoids that all vanish there is no distribution.
                    let by_sigmoid = score == Score::Sigmoid && !case.low && rng.bool();
                    let loss = if by_sigmoid { LossScore::Sigmoid } else { LossScore::Softmax };
                    let counts = [LossCounts::Choice, LossCounts::FirstChoice, LossCounts::Scores][rng.usize(..3)];
                    let rule = BalanceRule::new(loss, sequence)
                        .counts(counts)
                        .capacity(rng.bool().then(|| 1 + rng.usize(..4)));
                    measure(variant, rng, &case, rule);
                }
            }
        }
    }
}

/// A rule and what it takes.
pub struct Case {
    pub tokens: usize,
    pub experts: usize,
    pub top_k: usize,
    pub rule: Gating,
    pub logits: Vec<f32>,
    pub on_device: LogitsOn,
    pub bias: Option<Vec<f32>>,
    pub expert_scale: Option<Vec<f32>>,
    pub global_scale: Option<f32>,
    pub given: Option<Drawn>,
    /// Whether all logits are far below 0.
    low: bool,
    name: String,
}

/// Ids that are given, or a table of them and words.
pub struct Drawn {
    pub ids: Vec<i64>,
    format: IdFormat,
    words: Option<(Vec<i64>, IdFormat)>,
}

const VOCABULARY: usize = 19;
const FORMATS: [IdFormat; 3] = [IdFormat::I32, IdFormat::U32, IdFormat::I64];

impl Case {
    pub fn draw(
        rng: &mut fastrand::Rng,
        score: Score,
        tokens: usize,
        experts: usize,
        top_k: usize,
        kind: Logits,
    ) -> Case {
        let mixes = score == Score::SparseMixer;
        let top_k = if mixes { top_k.min(2) } else { top_k };
        let choice = [ChoiceBy::Score, ChoiceBy::Logit, ChoiceBy::Given][rng.usize(..3)];
        let by = match rng.u32(..3) {
            0 => Some(Renormalise::PNorm([0.5, 1.0, 2.0, 3.7, f32::INFINITY][rng.usize(..5)])),
            1 => Some(Renormalise::Plus(0.0)),
            _ => renormalise(rng),
        };
        let columns = !mixes && score != Score::Softmax && rng.bool();
        let weight = if columns { AppendedWeight::Column } else { AppendedWeight::Fixed(0.75) };
        let appended = rng.bool().then(|| Appended::new(1 + rng.usize(..2), weight));
        let of_groups = if mixes { None } else { groups(rng, score, experts, top_k) };
        let masks_logits = choice == ChoiceBy::Logit || !score.precedes_choice();
        let rule = Gating::new(score)
            .choice(choice)
            .renormalise(by)
            .scale(if rng.bool() { 1.0 } else { 2.5 })
            .groups(of_groups.map(|of| if masks_logits { of.masked(moe_kernels::rules::Masked::Out) } else { of }))
            .jitter([0.01, 0.15, 2.0][rng.usize(..3)])
            .expert_scale(rng.bool())
            .global_scale(rng.bool())
            .appended(appended)
            .garbage(garbage(rng));
        // Something that no common kernel has.
        let rule = match score {
            Score::Softmax | Score::TopkSoftmax | Score::Sigmoid
                if rule.choice == ChoiceBy::Score && appended.is_none() && !rule.global_scale =>
            {
                rule.expert_scale(true)
            }
            _ => rule,
        };
        Case::new(rng, rule, [tokens, experts, top_k], kind)
    }

    /// A rule's inputs.
    pub fn new(rng: &mut fastrand::Rng, rule: Gating, [tokens, experts, top_k]: [usize; 3], kind: Logits) -> Case {
        let Gating { score, choice, .. } = rule;
        let mut logits = logits(rng, kind, tokens * (experts + rule.appended_columns()));
        if matches!(score, Score::SqrtSoftplus | Score::SparseMixer) {
            logits.iter_mut().for_each(|logit| *logit = (8.0 * *logit).round() / 8.0);
        } else {
            coarse(&mut logits);
        }
        // Scores near the end of f32, and joint ones beyond it, which are still shares.
        let low = matches!(score, Score::Sigmoid | Score::SqrtSoftplus) && rng.u8(..4) == 0;
        if low {
            let jointly = rule.appended_columns() > 0 && rule.renormalise == Some(Renormalise::Plus(0.0));
            let down = if jointly && score == Score::Sigmoid { 150.0 } else { 70.0 };
            logits.iter_mut().for_each(|logit| *logit -= down);
        }
        let on_device = LogitsOn::draw(&device::stream(), rng, &mut logits);
        let biased = choice == ChoiceBy::Logit || score.precedes_choice();
        let given = (choice == ChoiceBy::Given).then(|| Drawn::draw(rng, tokens, experts, top_k));
        Case {
            name: format!("{tokens} tokens, {top_k} of {experts}, {rule:?} {kind:?}"),
            bias: (biased && rng.bool()).then(|| correction_bias(rng, experts, &rule)),
            expert_scale: rule.expert_scale.then(|| (0..experts).map(|_| 0.5 + rng.f32()).collect()),
            global_scale: rule.global_scale.then(|| 0.5 + rng.f32()),
            tokens,
            experts,
            top_k,
            rule,
            logits,
            on_device,
            given,
            low,
        }
    }

    pub fn desc(&self) -> GatingDesc {
        GatingDesc::new(self.tokens, self.experts, self.top_k, self.rule)
    }

    pub fn all_choices(&self) -> usize {
        self.top_k + self.rule.appended_experts()
    }

    /// Ids `[T,k]` as the reference takes them: -1 where a token's word is in no table.
    fn given_ids(&self) -> Option<Vec<i32>> {
        let given = self.given.as_ref()?;
        let narrow = |id: &i64| i32::try_from(*id).unwrap_or(-1);
        let ids: Vec<i32> = given.ids.iter().map(narrow).collect();
        let Some((words, _)) = &given.words else { return Some(ids) };
        let words: Vec<i32> = words.iter().map(narrow).collect();
        Some(route(&words, Hash::Table(&ids), self.experts, self.top_k).unwrap())
    }

    pub fn want(&self) -> Gated {
        let (bias, scale) = (self.bias.as_deref().map(to_f64), self.expert_scale.as_deref().map(to_f64));
        let given = self.given_ids();
        let inputs = Inputs {
            correction_bias: bias.as_deref(),
            expert_scale: scale.as_deref(),
            global_scale: self.global_scale.map(f64::from),
            given: given.as_deref(),
        };
        gate_by(&self.logits, self.experts, self.top_k, &self.rule, inputs).unwrap()
    }

    fn assert_weights(&self, got: &[f32], want: &[f64]) {
        let top_k = self.all_choices();
        let shares = Shares::of(self.rule.score, self.experts, top_k);
        let chosen = if self.rule.renormalise.is_some() { top_k } else { 0 };
        // A p-norm is off as its weights are, and by the logarithms' errors, of which each counts as far as its power does: p x^p |ln x| is at most
        // 1/e, and the p-th root divides by p. Scales are two products more, a shifted sigmoid an exponential.
        let more = match self.rule.renormalise {
            Some(Renormalise::PNorm(p)) if p.is_finite() => 8.0 + 2.0 * (top_k as f64 + 4.0) / f64::from(p),
            _ => 6.0,
        };
        let bounds: Vec<f64> = weight_bounds(want, shares, chosen)
            .iter()
            .zip(want)
            .map(|(bound, want)| bound + more * want.abs() / 16_777_216.0)
            .collect();
        assert_bounded(&self.name, &to_f64(got), want, &bounds, moe_kernels::rules::Dtype::F32);
    }
}

impl Drawn {
    fn draw(rng: &mut fastrand::Rng, tokens: usize, experts: usize, top_k: usize) -> Drawn {
        let format = FORMATS[rng.usize(..3)];
        let words = rng.bool().then(|| {
            let format = FORMATS[rng.usize(..3)];
            (numbers(rng, tokens, VOCABULARY, format), format)
        });
        let rows = if words.is_some() { VOCABULARY } else { tokens };
        Drawn { ids: numbers(rng, rows * top_k, experts, format), format, words }
    }
}

/// Numbers below `limit`, of which a few are not: as wrong as the format can be.
fn numbers(rng: &mut fastrand::Rng, len: usize, limit: usize, format: IdFormat) -> Vec<i64> {
    let wrong = match format {
        IdFormat::I64 => [-1, limit as i64, 1 << 32, i64::MIN],
        _ => [-1, limit as i64, i64::from(i32::MAX), -1],
    };
    let number = |rng: &mut fastrand::Rng| match rng.u32(..12) {
        0 => wrong[rng.usize(..4)],
        _ => rng.i64(0..limit as i64),
    };
    (0..len).map(|_| number(rng)).collect()
}

/// Integers on the device in one of the formats.
enum Stored {
    I32(Guarded<i32>),
    U32(Guarded<u32>),
    I64(Guarded<i64>),
}

enum Viewed<'a> {
    I32(CudaView<'a, i32>),
    U32(CudaView<'a, u32>),
    I64(CudaView<'a, i64>),
}

impl Stored {
    fn new(name: &'static str, values: &[i64], format: IdFormat) -> Stored {
        let stream = device::stream();
        match format {
            IdFormat::I32 => {
                Stored::I32(Guarded::input(&stream, name, &values.iter().map(|&v| v as i32).collect::<Vec<_>>()))
            }
            IdFormat::U32 => {
                Stored::U32(Guarded::input(&stream, name, &values.iter().map(|&v| v as u32).collect::<Vec<_>>()))
            }
            _ => Stored::I64(Guarded::input(&stream, name, values)),
        }
    }

    fn view(&self) -> Viewed<'_> {
        match self {
            Stored::I32(ids) => Viewed::I32(ids.view()),
            Stored::U32(ids) => Viewed::U32(ids.view()),
            Stored::I64(ids) => Viewed::I64(ids.view()),
        }
    }
}

impl Viewed<'_> {
    fn ids(&self) -> Ids<'_> {
        match self {
            Viewed::I32(ids) => Ids::from(ids),
            Viewed::U32(ids) => Ids::from(ids),
            Viewed::I64(ids) => Ids::from(ids),
        }
    }
}

/// A case's inputs beside its logits on the device.
pub struct OnDevice {
    expert_scale: Option<Guarded<f32>>,
    global_scale: Option<Guarded<f32>>,
    given: Option<(Stored, Option<Stored>)>,
}

impl OnDevice {
    pub fn new(case: &Case) -> OnDevice {
        let stream = device::stream();
        let floats = |name, values: &[f32]| Guarded::input(&stream, name, values);
        OnDevice {
            expert_scale: case.expert_scale.as_deref().map(|values| floats("expert_scale", values)),
            global_scale: case.global_scale.map(|value| floats("global_scale", &[value])),
            given: case.given.as_ref().map(|given| {
                let words = given.words.as_ref().map(|(words, format)| Stored::new("words", words, *format));
                (Stored::new("given", &given.ids, given.format), words)
            }),
        }
    }

    /// Calls `with` with the inputs.
    pub fn with<R>(&self, with: impl FnOnce(RuleInputs<'_>) -> R) -> R {
        let expert_scale = self.expert_scale.as_ref().map(Guarded::view);
        let global_scale = self.global_scale.as_ref().map(Guarded::view);
        let given = self.given.as_ref().map(|(ids, words)| (ids.view(), words.as_ref().map(Stored::view)));
        let mut inputs = RuleInputs::new();
        inputs.expert_scale = expert_scale.as_ref().map(In::from);
        inputs.global_scale = global_scale.as_ref().map(In::from);
        inputs.given = given.as_ref().map(|(ids, words)| match words {
            None => Given::ids(ids.ids()),
            Some(words) => Given::table(ids.ids(), VOCABULARY, words.ids()),
        });
        with(inputs)
    }
}

fn run(variant: Gate, rng: &mut fastrand::Rng, case: &Case) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let padding = Padding::draw(&stream, rng, case.tokens);
    let name = &format!("{} {} {}", case.name, case.on_device.name(), padding.name());
    let want = case.want().without_padding(&padding.valid);
    let desc = case.desc();
    let bias = case.bias.as_ref().map(|values| Guarded::input(&stream, "correction_bias", values));
    let on_device = OnDevice::new(case);
    let (choices, appended) = (case.tokens * case.all_choices(), case.rule.appended_experts());
    let mut ids = Guarded::<i32>::ids(&stream, "ids", choices);
    let mut weights = Guarded::<f32>::output(&stream, "weights", choices);
    let capacities = [None, Some(Capacity::new(2, 13).padded(false)), Some(Capacity::new(2, case.tokens).padded(true))];
    // Some of the experts have no rows.
    let null = if variant.dispatch && appended == 0 && rng.bool() { rng.usize(..case.experts) } else { 0 };
    let order = DispatchDesc::new(case.tokens, case.experts + appended - null, case.all_choices(), 16)
        .capacity(capacities[rng.usize(..3)]);
    let fused = GatingDispatchDesc::new(case.rule, order).null_experts(null);
    let selection = if variant.dispatch {
        gating_dispatch::select(&fused, kernels.device())
    } else {
        gating::select(&desc, kernels.device())
    };
    assert_eq!(selection.unwrap().kernel.variant(), Kernel::Gating(variant), "{name}");
    let bytes = gating_dispatch::workspace_bytes(&fused, kernels.device()).unwrap();
    let mut outputs = Outputs::new(&stream, order.shape(), bytes);
    let launch = |ids: &mut Guarded<i32>, weights: &mut Guarded<f32>, outputs: &mut Outputs| {
        let bias = bias.as_ref().map(Guarded::view);
        let correction_bias = bias.as_ref().map(In::from);
        let (mut ids, mut weights) = (ids.view_mut(), weights.view_mut());
        let mut forward = |rule: RuleInputs<'_>, logits: Tensor<'_>, mask: TokenMask<'_>| {
            if !variant.dispatch {
                let mut args = GatingArgs::new(logits, &mut ids, &mut weights).rule(rule).mask(mask);
                args.correction_bias = correction_bias;
                return gating::forward(kernels, &stream, &desc, args).unwrap();
            }
            let Outputs { dispatched, workspace, .. } = outputs;
            let args = GatingDispatchArgs::new(logits, &mut ids, &mut weights, dispatched, workspace);
            let mut args = args.rule(rule).mask(mask);
            args.correction_bias = correction_bias;
            gating_dispatch::forward(kernels, &stream, &fused, args).unwrap()
        };
        on_device.with(|rule| case.on_device.with(|logits| padding.with(|mask| forward(rule, logits, mask))));
    };
    launch(&mut ids, &mut weights, &mut outputs);
    let (got_ids, got_weights) = (ids.read(&stream), weights.read(&stream));
    assert_eq!(got_ids, want.ids, "{name}: ids");
    case.assert_weights(&got_weights, &want.weights);
    let sorted = variant.dispatch.then(|| reference::dispatch::dispatch(&want.ids, &rule_of(&order)).unwrap());
    if let Some(sorted) = &sorted {
        outputs.assert_equal(&stream, name, sorted, Some(&got_weights));
    }
    case.on_device.assert_unchanged(&stream);
    padding.assert_unchanged(&stream);
    time(&stream, name, || launch(&mut ids, &mut weights, &mut outputs));
    ids.reset(&stream);
    weights.reset(&stream);
    outputs.reset(&stream);
    launch(&mut ids, &mut weights, &mut outputs);
    assert_eq!(ids.read(&stream), got_ids, "{name}: another run chose otherwise");
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&weights.read(&stream)), bits(&got_weights), "{name}: another run gave other bits");
}

fn measure(variant: MeasuredGate, rng: &mut fastrand::Rng, case: &Case, rule: BalanceRule) {
    let desc = MeasuredGatingDesc::new(case.desc()).rule(rule);
    let selection = moe_kernels::routers::measured_gating::select(&desc, device::kernels().device()).unwrap();
    assert_eq!(selection.kernel.variant(), Kernel::MeasuredGating(variant));
    let padding = Padding::draw(&device::stream(), rng, case.tokens);
    let want = case.want().without_padding(&padding.valid);
    let on_device = OnDevice::new(case);
    let bias = case.bias.as_deref();
    let got = on_device.with(|inputs| balance::measure_by(&desc, &case.on_device, &padding, bias, inputs, 1));
    assert_eq!(got.ids, want.ids, "{}: ids", case.name);
    case.assert_weights(&got.weights, &want.weights);
    // Losses are of the experts that a choice is among.
    let columns = case.experts + case.rule.appended_columns();
    let own: Vec<f32> = case.logits.chunks(columns).flat_map(|row| &row[..case.experts]).copied().collect();
    let row = case.all_choices();
    let ids: Vec<i32> = got.ids.chunks(row).flat_map(|row| &row[..case.top_k]).copied().collect();
    let weights: Vec<f32> = got.weights.chunks(row).flat_map(|row| &row[..case.top_k]).copied().collect();
    let name = format!("{} {} {}", case.name, case.on_device.name(), padding.name());
    let counts = reference::balance::counted(&own, case.experts, &rule, case.rule.garbage, Some(&padding.valid));
    balance::check_measures(&name, &got, &desc, [&own, &weights], &ids, &counts, 1);
}
