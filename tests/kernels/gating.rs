//! Checks of `gating_*`, alone and fused with dispatch.

use moe_kernels::capacity::dispatch::DispatchDesc;
use moe_kernels::registry::{Gate, Kernel, WideGate};
use moe_kernels::routers::gating::{self, GatingArgs, GatingDesc};
use moe_kernels::routers::gating_dispatch::{self, GatingDispatchArgs, GatingDispatchDesc};
use moe_kernels::rules::{Capacity, Garbage, Gating, GroupScore, Groups, Masked, Renormalise, Score};
use moe_kernels::{In, reference};

use crate::any_rule;
use crate::dispatch::{Outputs, rule_of};
use crate::registers;
use crate::support::buffer::Guarded;
use crate::support::compare::{Shares, assert_weights};
use crate::support::device;
use crate::support::inputs::normal;
use crate::timing::time;
use crate::tokens::{LogitsOn, Padding};

/// More than 32 choices.
pub fn check_wide(variant: WideGate, rng: &mut fastrand::Rng) {
    let most = variant.gate().max_experts() as usize;
    let least = WideGate::VALUES.iter().map(|&v| 32 * v as usize).filter(|&e| e < most).max().unwrap_or(32) + 1;
    for experts in [least, (least + most) / 2, most] {
        for (tokens, top_k) in [(1, 33), (23, 64), (9, 40), (5, 63)] {
            let top_k = top_k.min(experts);
            for logits in [Logits::Normal, Logits::Ties, Logits::NotFinite] {
                let gating = Gating::new(variant.score)
                    .renormalise(renormalise(rng))
                    .scale(if rng.bool() { 1.0 } else { 2.5 })
                    .garbage(garbage(rng))
                    .groups(groups(rng, variant.score, experts, top_k));
                let with_bias = variant.score != Score::TopkSoftmax && rng.bool();
                let desc = GatingDesc::new(tokens, experts, top_k, gating);
                case(Kernel::GatingWide(variant), rng, &desc, logits, with_bias);
            }
        }
    }
    for (experts, _, groups) in every_group_rule(variant.score, most) {
        let eligible = if groups.masked == Masked::Zero { experts } else { experts / groups.count * groups.kept };
        if eligible >= 33 {
            let gating = Gating::new(variant.score).groups(Some(groups));
            let desc = GatingDesc::new(23, experts, eligible.min(40), gating);
            case(Kernel::GatingWide(variant), rng, &desc, Logits::Normal, false);
        }
    }
    registers::check(Kernel::GatingWide(variant), variant.score, [least, most], 64, rng);
    let warps = 8 * device::kernels().device().multiprocessors * variant.gate().warps();
    if variant.values == 8 {
        registers::check_ahead(Kernel::GatingWide(variant), variant.score, [least + 1, most], 33, rng);
        let desc = GatingDesc::new(warps as usize + 5, 70, 35, Gating::new(variant.score));
        case(Kernel::GatingWide(variant), rng, &desc, Logits::Normal, variant.score != Score::TopkSoftmax);
    }
}

pub fn check(variant: Gate, rng: &mut fastrand::Rng) {
    let Some(score) = variant.score else { return any_rule::check(variant, rng) };
    let most = variant.max_experts() as usize;
    let least = Gate::VALUES.iter().map(|&v| 32 * v as usize).filter(|&e| e < most).max().unwrap_or(0) + 1;
    let middle = (least + most) / 2;
    for experts in [least, middle, most - 1, most] {
        for (tokens, top_k) in [(1, 1), (37, 2), (9, 8), (70, 5), (3, 32)] {
            let tokens = if variant.dispatch && tokens == 70 { 300 } else { tokens };
            let top_k = top_k.min(experts);
            for logits in [Logits::Normal, Logits::Ties, Logits::NotFinite] {
                let gating = Gating::new(score)
                    .renormalise(renormalise(rng))
                    .scale(if rng.bool() { 1.0 } else { 2.5 })
                    .garbage(garbage(rng))
                    .groups(groups(rng, score, experts, top_k));
                let with_bias = score != Score::TopkSoftmax && rng.bool();
                let desc = GatingDesc::new(tokens, experts, top_k, gating);
                case(Kernel::Gating(variant), rng, &desc, logits, with_bias);
            }
        }
    }
    for (experts, top_k, groups) in every_group_rule(score, most) {
        let desc = GatingDesc::new(23, experts, top_k, Gating::new(score).groups(Some(groups)));
        case(Kernel::Gating(variant), rng, &desc, Logits::Normal, false);
    }
    if variant.values >= 4 {
        registers::check(Kernel::Gating(variant), score, [least, most], 32, rng);
    }
    if !variant.dispatch && variant.values == 16 {
        registers::check_ahead(Kernel::Gating(variant), score, [least + 1, most], 4, rng);
    }
    // More tokens than there are warps, so that a warp has several: `dispatch` has them with few tokens already.
    if !variant.dispatch && variant.values <= 32 {
        let warps = 8 * device::kernels().device().multiprocessors * variant.warps();
        let gating = Gating::new(score);
        let desc = GatingDesc::new(warps as usize + 5, least.max(2), 2, gating);
        case(Kernel::Gating(variant), rng, &desc, Logits::Normal, score != Score::TopkSoftmax);
        case(Kernel::Gating(variant), rng, &desc, Logits::Ties, false);
    }
}

/// Groups that divide the experts and leave enough of them, half of the time.
pub fn groups(rng: &mut fastrand::Rng, scores: Score, experts: usize, top_k: usize) -> Option<Groups> {
    let counts: Vec<usize> = (2..=32).filter(|count| experts.is_multiple_of(*count) && experts / count >= 2).collect();
    if counts.is_empty() || rng.bool() {
        return None;
    }
    let count = counts[rng.usize(..counts.len())];
    let fewest = top_k.div_ceil(experts / count);
    let kept = fewest + rng.usize(..=count - fewest);
    let score = match rng.usize(..3) {
        0 => GroupScore::Max,
        1 => GroupScore::TOP_TWO,
        _ => GroupScore::TopSum(1 + rng.usize(..(experts / count).min(8))),
    };
    let zero = scores != Score::TopkSoftmax && rng.u8(..4) == 0;
    Some(Groups::new(count, kept).score(score).masked(if zero { Masked::Zero } else { Masked::Out }))
}

/// `(experts, k, groups)`: every score of groups and what becomes of the others, where each decides; groups that end with 32 experts, between,
/// and several in 32.
pub fn every_group_rule(scores: Score, most: usize) -> Vec<(usize, usize, Groups)> {
    let masks: &[Masked] = if scores == Score::TopkSoftmax { &[Masked::Out] } else { &[Masked::Out, Masked::Zero] };
    let mut rules = Vec::new();
    for (experts, count) in [(most, 4), (most - 8, 8)] {
        for score in [GroupScore::Max, GroupScore::TOP_TWO, GroupScore::TopSum(3)] {
            rules.extend(masks.iter().map(|&masked| (experts, 4, Groups::new(count, 2).score(score).masked(masked))));
        }
    }
    // As many groups as there may be, which end in other places.
    for (size, score) in [(most / 32, GroupScore::Max), (most / 32 - 1, GroupScore::TOP_TWO)] {
        if size >= 2 && 32 * size > most / 2 {
            rules.push((32 * size, 4, Groups::new(32, 4).score(score)));
        }
    }
    rules
}

/// A way to divide by the sum of weights, half of the time. Sums are above 0 in each.
pub fn renormalise(rng: &mut fastrand::Rng) -> Option<Renormalise> {
    let ways =
        [Renormalise::Plus(1e-20), Renormalise::Plus(1e-6), Renormalise::AtLeast(1e-12), Renormalise::AtLeast(0.25)];
    rng.bool().then(|| ways[rng.usize(..ways.len())])
}

/// NaN in a third of the cases.
pub fn garbage(rng: &mut fastrand::Rng) -> Garbage {
    if rng.u8(..3) == 0 { Garbage::Propagate } else { Garbage::Zero }
}

/// Coarse enough that sums with a score are either equal or far apart in f32: a choice cannot hang on the last bit of an exponential. Where
/// groups are ranked by sums, the same in all of a group: else the sum of two groups may be the same number, rounded differently.
pub fn correction_bias(rng: &mut fastrand::Rng, experts: usize, gating: &Gating) -> Vec<f32> {
    let alike =
        gating.groups.filter(|groups| groups.score != GroupScore::Max).map_or(1, |groups| experts / groups.count);
    let values: Vec<f32> = (0..experts / alike).map(|_| rng.i32(-8..8) as f32 / 16.0).collect();
    (0..experts).map(|e| values[e / alike]).collect()
}

/// Rounded so that scores are either equal or far apart in f32: for rules that compare scores, whose last bit is the exponential's.
pub fn coarse(logits: &mut [f32]) {
    logits.iter_mut().for_each(|logit| *logit = (64.0 * *logit).round() / 64.0);
}

#[derive(Clone, Copy, Debug)]
pub enum Logits {
    Normal,
    /// Few distinct values: lower ids win.
    Ties,
    /// Rows with NaN and infinities of both signs.
    NotFinite,
}

pub fn logits(rng: &mut fastrand::Rng, kind: Logits, len: usize) -> Vec<f32> {
    (0..len)
        .map(|_| match kind {
            Logits::Normal => 2.0 * normal(rng) as f32,
            Logits::Ties => [-1.0, -0.0, 0.0, 0.5][rng.usize(..4)],
            Logits::NotFinite => match rng.u32(..8) {
                0 => f32::NAN,
                1 => f32::NEG_INFINITY,
                2 if rng.u32(..len as u32) < 4 => f32::INFINITY,
                _ => normal(rng) as f32,
            },
        })
        .collect()
}

/// What a case is about: its logits, and a bias.
pub struct Batch {
    name: String,
    logits: Vec<f32>,
    bias: Option<Vec<f32>>,
    /// So many tokens in front are padding, and logits stay f32 if there are any; none: padding is drawn.
    padding: Option<usize>,
}

impl Batch {
    pub fn new(name: impl Into<String>, logits: Vec<f32>) -> Batch {
        Batch { name: name.into(), logits, bias: None, padding: None }
    }

    pub fn behind_padding(self, padding: usize) -> Batch {
        Batch { padding: Some(padding), ..self }
    }
}

fn case(variant: Kernel, rng: &mut fastrand::Rng, desc: &GatingDesc, kind: Logits, with_bias: bool) {
    let mut logits = logits(rng, kind, desc.tokens * desc.experts);
    // A token with nothing but NaN: what is no expert would come before its experts.
    if matches!(kind, Logits::NotFinite) && desc.tokens > 1 {
        logits[(desc.tokens - 1) * desc.experts..].fill(f32::NAN);
    }
    if with_bias || desc.gating.groups.is_some() {
        coarse(&mut logits);
    }
    let bias = with_bias.then(|| correction_bias(rng, desc.experts, &desc.gating));
    case_of(variant, rng, desc, Batch { bias, ..Batch::new(format!("{kind:?}"), logits) });
}

/// Ids and weights against the reference, and what dispatch makes of them; the same again.
pub fn case_of(variant: Kernel, rng: &mut fastrand::Rng, desc: &GatingDesc, batch: Batch) {
    let dispatches = matches!(variant, Kernel::Gating(Gate { dispatch: true, .. }));
    let (kernels, stream) = (device::kernels(), device::stream());
    let Batch { name, mut logits, bias, padding } = batch;
    let in_front = padding.unwrap_or(0);
    let device_logits = if in_front > 0 {
        LogitsOn::F32(Guarded::input(&stream, "logits", &logits))
    } else {
        LogitsOn::draw(&stream, rng, &mut logits)
    };
    let padding = match padding {
        None => Padding::draw(&stream, rng, desc.tokens),
        Some(0) => Padding::none(desc.tokens),
        Some(tokens) => Padding::in_front(&stream, tokens, desc.tokens),
    };
    let name = format!("{desc:?} {name} bias={} {} {}", bias.is_some(), device_logits.name(), padding.name());
    let counting = &logits[in_front * desc.experts..];
    let mut want = reference::gating::gate(counting, bias.as_deref(), desc.experts, desc.top_k, &desc.gating).unwrap();
    want.ids.splice(..0, vec![-1; in_front * desc.top_k]);
    want.weights.splice(..0, vec![0.0; in_front * desc.top_k]);
    let want = want.without_padding(&padding.valid);

    let bias = bias.map(|values| Guarded::input(&stream, "correction_bias", &values));
    let choices = desc.tokens * desc.top_k;
    let mut ids = Guarded::<i32>::ids(&stream, "ids", choices);
    let mut weights = Guarded::<f32>::output(&stream, "weights", choices);
    let capacities = [None, Some(Capacity::new(2, 13).padded(false)), Some(Capacity::new(2, desc.tokens).padded(true))];
    let capacity = capacities[rng.usize(..3)];
    // Some of the experts have no rows.
    let null = if dispatches && rng.bool() { rng.usize(..desc.experts) } else { 0 };
    let order = DispatchDesc::new(desc.tokens, desc.experts - null, desc.top_k, 16).capacity(capacity);
    let fused = GatingDispatchDesc::new(desc.gating, order).null_experts(null);
    let selection = if dispatches {
        gating_dispatch::select(&fused, kernels.device())
    } else {
        gating::select(desc, kernels.device())
    };
    assert_eq!(selection.unwrap().kernel.variant(), variant);
    let bytes = if dispatches { gating_dispatch::workspace_bytes(&fused, kernels.device()).unwrap() } else { 16 };
    let mut outputs = Outputs::new(&stream, order.shape(), bytes);
    let launch = |ids: &mut Guarded<i32>, weights: &mut Guarded<f32>, outputs: &mut Outputs| {
        let bias = bias.as_ref().map(Guarded::view);
        let correction_bias = bias.as_ref().map(In::from);
        let (mut ids, mut weights) = (ids.view_mut(), weights.view_mut());
        device_logits.with(|logits| {
            padding.with(|mask| {
                if !dispatches {
                    let mut args = GatingArgs::new(logits, &mut ids, &mut weights).mask(mask);
                    args.correction_bias = correction_bias;
                    return gating::forward(kernels, &stream, desc, args).unwrap();
                }
                let Outputs { dispatched, workspace, .. } = outputs;
                let mut args =
                    GatingDispatchArgs::new(logits, &mut ids, &mut weights, dispatched, workspace).mask(mask);
                args.correction_bias = correction_bias;
                gating_dispatch::forward(kernels, &stream, &fused, args).unwrap()
            });
        });
    };
    launch(&mut ids, &mut weights, &mut outputs);
    let (got_ids, got_weights) = (ids.read(&stream), weights.read(&stream));
    assert_eq!(got_ids, want.ids, "{name}: ids");
    let shares = Shares::of(desc.gating.score, desc.experts, desc.top_k);
    assert_weights(
        &name,
        &got_weights,
        &want.weights,
        shares,
        if desc.gating.renormalise.is_some() { desc.top_k } else { 0 },
    );
    device_logits.assert_unchanged(&stream);
    padding.assert_unchanged(&stream);
    let sorted = dispatches.then(|| reference::dispatch::dispatch(&want.ids, &rule_of(&order)).unwrap());
    if let Some(sorted) = &sorted {
        outputs.assert_equal(&stream, &name, sorted, Some(&got_weights));
    }
    time(&stream, &name, || launch(&mut ids, &mut weights, &mut outputs));
    ids.reset(&stream);
    weights.reset(&stream);
    outputs.reset(&stream);
    launch(&mut ids, &mut weights, &mut outputs);
    assert_eq!(ids.read(&stream), got_ids, "{name}: another run chose otherwise");
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    assert_eq!(bits(weights.read(&stream)), bits(got_weights.clone()), "{name}: another run gave other bits");
    if let Some(sorted) = &sorted {
        outputs.assert_equal(&stream, &format!("{name}: another run"), sorted, Some(&got_weights));
    }
}
