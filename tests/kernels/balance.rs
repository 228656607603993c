//! Checks of `gating_*_measured`, `balance_loss` and `update_bias`: choices, losses and statistics against the reference.

use moe_kernels::reference::balance::{Balance, cv_squared, probabilities};
use moe_kernels::reference::{self, sampled::log_sum_exp};
use moe_kernels::registry::{Gate, Kernel, MeasuredGate};
use moe_kernels::routers::balance_loss::{self, BalanceLossArgs, BalanceLossDesc};
use moe_kernels::routers::gating::{GatingDesc, RuleInputs};
use moe_kernels::routers::measured_gating::{self, MeasuredGatingArgs, MeasuredGatingDesc, RouterStats, Totals};
use moe_kernels::routers::update_bias::{self, UpdateBiasArgs, UpdateBiasDesc};
use moe_kernels::rules::{BalanceRule, Garbage, Gating, LossCounts, LossScore, Score, Sequences};
use moe_kernels::{In, Workspace};

use crate::any_rule;
use crate::gating::{Logits, coarse, correction_bias, every_group_rule, garbage, groups, logits, renormalise};
use crate::registers;
use crate::support::buffer::Guarded;
use crate::support::compare::{BATCH_CV2, BATCH_SUMS, FEW_ROUNDINGS, LOG_SUM_EXP, Shares, assert_weights, to_f64};
use crate::support::device;
use crate::timing::time;
use crate::tokens::{LogitsOn, Padding};

pub fn check(variant: MeasuredGate, rng: &mut fastrand::Rng) {
    let Some(score) = variant.score else { return any_rule::check_measured(variant, rng) };
    let most = variant.gate().max_experts() as usize;
    let least = Gate::VALUES.iter().map(|&v| 32 * v as usize).filter(|&e| e < most).max().unwrap_or(0) + 1;
    let wide = most > 1024;
    for experts in [least, (least + most) / 2, most] {
        for (tokens, top_k, sequence) in
            [(1, 1, 1), (37, 2, 10), (9, 8, 9), (300, 4, 300), (333, 3, 100), (300, 3, 100), (260, 2, 1), (5, 32, 2)]
        {
            let (tokens, sequence): (usize, usize) =
                if wide { (tokens.min(40), sequence.min(40)) } else { (tokens, sequence) };
            for kind in [Logits::Normal, Logits::Ties, Logits::NotFinite] {
                if wide && rng.u32(..3) > 0 {
                    continue;
                }
                let top_k = top_k.min(experts);
                let gating = Gating::new(score)
                    .renormalise(renormalise(rng))
                    .scale(if rng.bool() { 1.0 } else { 2.5 })
                    .garbage(garbage(rng))
                    .groups(groups(rng, score, experts, top_k));
                let losses = [LossScore::Softmax, LossScore::Sigmoid, LossScore::PlainSigmoid];
                let loss = losses[rng.usize(..if score == Score::Sigmoid { 3 } else { 1 })];
                let counts = [LossCounts::Choice, LossCounts::FirstChoice, LossCounts::Scores][rng.usize(..3)];
                let alternate = tokens.is_multiple_of(sequence) && rng.bool();
                let rule = BalanceRule::new(loss, sequence)
                    .sequences(if alternate { Sequences::Alternating } else { Sequences::Following })
                    .counts(counts)
                    .capacity(rng.bool().then(|| 1 + rng.usize(..4)));
                let gating = GatingDesc::new(tokens, experts, top_k, gating);
                case(variant, rng, &MeasuredGatingDesc::new(gating).rule(rule), kind);
            }
        }
    }
    for (experts, top_k, groups) in every_group_rule(score, most) {
        let gating = GatingDesc::new(23, experts, top_k, Gating::new(score).groups(Some(groups)));
        case(variant, rng, &MeasuredGatingDesc::new(gating), Logits::Normal);
    }
    if variant.values >= 4 {
        for (name, gating, logits) in registers::batches(score, [least, most], 32, rng) {
            case_of(variant, rng, &MeasuredGatingDesc::new(gating), name, logits, None);
        }
    }
}

/// What a call wrote.
pub struct Measured {
    pub ids: Vec<i32>,
    pub weights: Vec<f32>,
    pub log_sum_exp: Vec<f32>,
    pub probabilities: Vec<f32>,
    pub counts: Vec<i32>,
    pub loss_counts: Vec<i32>,
    pub probability: Vec<f32>,
    pub importance: Vec<f32>,
    pub stats: RouterStats,
    /// Tokens that the loss's totals are of, if there were several calls.
    pub tokens: u32,
}

impl Measured {
    fn bits(&self) -> Vec<u32> {
        let floats = [&self.weights, &self.log_sum_exp, &self.probabilities, &self.probability, &self.importance];
        let ints = [&self.ids, &self.counts, &self.loss_counts];
        let stats: [u32; 12] = bytemuck::cast(self.stats);
        let floats = floats.into_iter().flatten().map(|value| value.to_bits());
        floats.chain(ints.into_iter().flatten().map(|&value| value as u32)).chain(stats).collect()
    }
}

/// Runs `desc` `times` times, the later ones onto the totals of the earlier, which must each give the same bits if they start anew.
pub fn measure_by(
    desc: &MeasuredGatingDesc,
    logits: &LogitsOn,
    padding: &Padding,
    bias: Option<&[f32]>,
    inputs: RuleInputs<'_>,
    times: usize,
) -> Measured {
    let (kernels, stream) = (device::kernels(), device::stream());
    let GatingDesc { tokens, experts, top_k, .. } = desc.gating;
    let bias = bias.map(|bias| Guarded::input(&stream, "correction_bias", bias));
    let row = top_k + desc.gating.gating.appended_experts();
    let mut ids = Guarded::ids(&stream, "ids", tokens * row);
    let mut weights = Guarded::output(&stream, "weights", tokens * row);
    let mut lse = Guarded::output(&stream, "log_sum_exp", tokens);
    let mut shares = Guarded::output(&stream, "probabilities", tokens * experts);
    let mut counts = Guarded::output(&stream, "counts", experts);
    let mut loss_counts = Guarded::output(&stream, "loss_counts", experts);
    let mut probability = Guarded::output(&stream, "probability", experts);
    let mut importance = Guarded::output(&stream, "importance", experts);
    let mut counted = Guarded::<u32>::output(&stream, "tokens", 1);
    let mut stats = Guarded::<RouterStats>::output(&stream, "stats", 1);
    let bytes = measured_gating::workspace_bytes(desc, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    let mut run = |desc: &MeasuredGatingDesc, rest: bool| {
        [&mut ids, &mut counts].into_iter().for_each(|buffer| buffer.reset(&stream));
        [&mut weights, &mut lse, &mut shares, &mut importance].into_iter().for_each(|buffer| buffer.reset(&stream));
        stats.reset(&stream);
        // These are added to, if there were tokens before.
        if desc.earlier_tokens == 0 {
            loss_counts.reset(&stream);
            probability.reset(&stream);
            counted.reset(&stream);
        }
        let bias = bias.as_ref().map(Guarded::view);
        let (mut ids_to, mut weights_to, mut lse_to, mut shares_to) =
            (ids.view_mut(), weights.view_mut(), lse.view_mut(), shares.view_mut());
        let (mut counts_to, mut loss_counts_to, mut probability_to, mut importance_to) =
            (counts.view_mut(), loss_counts.view_mut(), probability.view_mut(), importance.view_mut());
        let (mut stats_to, mut counted_to) = (stats.view_mut(), counted.view_mut());
        logits.with(|logits| {
            padding.with(|mask| {
                let mut totals =
                    Totals::new(&mut counts_to, &mut loss_counts_to, &mut probability_to, &mut importance_to);
                // Several calls know the number of tokens that counted from the device alone.
                if times > 1 {
                    totals = totals.tokens(&mut counted_to);
                }
                let (ids_to, weights_to, stats_to) = (&mut ids_to, &mut weights_to, &mut stats_to);
                let mut args =
                    MeasuredGatingArgs::new(logits, ids_to, weights_to, totals, stats_to, &mut workspace).mask(mask);
                if rest {
                    args = args.log_sum_exp(&mut lse_to).probabilities(&mut shares_to);
                }
                args.correction_bias = bias.as_ref().map(In::from);
                args.rule = inputs;
                measured_gating::forward(kernels, &stream, desc, args).unwrap();
            });
        });
        Measured {
            ids: ids.read(&stream),
            weights: weights.read(&stream),
            log_sum_exp: lse.read(&stream),
            probabilities: shares.read(&stream),
            counts: counts.read(&stream),
            loss_counts: loss_counts.read(&stream),
            probability: probability.read(&stream),
            importance: importance.read(&stream),
            stats: stats.read(&stream)[0],
            tokens: counted.read(&stream)[0],
        }
    };
    let mut got = run(desc, true);
    let mut alone = run(desc, false);
    for left in [&alone.log_sum_exp, &alone.probabilities] {
        assert!(left.iter().all(|value| value.to_bits() == u32::MAX), "{desc:?}: wrote what was not asked for");
    }
    (alone.log_sum_exp, alone.probabilities) = (got.log_sum_exp.clone(), got.probabilities.clone());
    assert_eq!(alone.bits(), got.bits(), "{desc:?}: another run, without the rest, gave other bits");
    time(&stream, &format!("{desc:?}"), || drop(run(desc, true)));
    for layer in 1..times {
        got = run(&desc.earlier_tokens(layer), true);
    }
    logits.assert_unchanged(&stream);
    padding.assert_unchanged(&stream);
    got
}

/// `got` is `want` to within `tolerance` of `scale + |want|`, NaN where that is NaN.
fn near(name: &str, got: f32, want: f64, tolerance: f64, scale: f64) {
    let close = (f64::from(got) - want).abs() <= tolerance * (scale + want.abs());
    let same = f64::from(got) == want || (got.is_nan() && want.is_nan());
    assert!(close || same, "{name}: got {got:e}, want {want:e}");
}

fn case(variant: MeasuredGate, rng: &mut fastrand::Rng, desc: &MeasuredGatingDesc, kind: Logits) {
    let GatingDesc { tokens, experts, gating, .. } = desc.gating;
    let mut values = logits(rng, kind, tokens * experts);
    let with_bias = gating.score != Score::TopkSoftmax && rng.bool();
    if with_bias || gating.groups.is_some() {
        coarse(&mut values);
    }
    let bias = with_bias.then(|| correction_bias(rng, experts, &gating));
    // A token that no sum may hear of.
    if matches!(kind, Logits::NotFinite) && tokens > 1 {
        // Sigmoids of -200 vanish in f32: no token where garbage counts nowhere, but NaN that f64 has not where it is seen.
        let seen = gating.garbage == Garbage::Propagate;
        let odd = [f32::NAN, f32::NEG_INFINITY, -200.0][rng.usize(..if seen { 2 } else { 3 })];
        values[(tokens - 1) * experts..].fill(odd);
    }
    case_of(variant, rng, desc, &format!("{kind:?}"), values, bias);
}

fn case_of(
    variant: MeasuredGate,
    rng: &mut fastrand::Rng,
    desc: &MeasuredGatingDesc,
    name: &str,
    mut values: Vec<f32>,
    bias: Option<Vec<f32>>,
) {
    let GatingDesc { tokens, experts, top_k, gating, .. } = desc.gating;
    let selection = measured_gating::select(desc, device::kernels().device()).unwrap();
    assert_eq!(selection.kernel.variant(), Kernel::MeasuredGating(variant));
    let on_device = LogitsOn::draw(&device::stream(), rng, &mut values);
    let padding = Padding::draw(&device::stream(), rng, tokens);
    let name = format!("{desc:?} {name} bias={} {} {}", bias.is_some(), on_device.name(), padding.name());
    let gated = reference::gating::gate(&values, bias.as_deref(), experts, top_k, &gating).unwrap();
    let gated = gated.without_padding(&padding.valid);
    let counts = reference::balance::counted(&values, experts, &desc.rule, gating.garbage, Some(&padding.valid));
    let layers = 1 + rng.usize(..3);
    let got = measure_by(desc, &on_device, &padding, bias.as_deref(), RuleInputs::new(), layers);
    assert_eq!(got.ids, gated.ids, "{name}: ids");
    let shares = Shares::of(gating.score, experts, top_k);
    assert_weights(&name, &got.weights, &gated.weights, shares, if gating.renormalise.is_some() { top_k } else { 0 });

    check_measures(&name, &got, desc, [&values, &got.weights], &got.ids, &counts, layers);
}

/// What was measured in `layers` calls, of the same logits `values [T,E]`, `weights [T,k]` and ids each, of those tokens that count.
pub fn check_measures(
    name: &str,
    got: &Measured,
    desc: &MeasuredGatingDesc,
    [values, weights]: [&[f32]; 2],
    ids: &[i32],
    counts: &[bool],
    layers: usize,
) {
    let GatingDesc { tokens, experts, top_k, .. } = desc.gating;
    let weights = to_f64(weights);
    let want = reference::balance::balance_of(values, ids, &weights, experts, top_k, &desc.rule, counts).unwrap();
    if layers > 1 {
        assert_eq!(got.tokens as usize, layers * want.totals.tokens, "{name}: tokens of the totals");
    }
    assert_eq!(got.counts, want.counts, "{name}: counts");
    for (e, (&got, &want)) in got.loss_counts.iter().zip(&want.totals.counts).enumerate() {
        assert_eq!(got as u64, layers as u64 * want, "{name}: loss_counts[{e}]");
    }
    let mean = tokens as f64 / experts as f64;
    for (e, (&got, &want)) in got.probability.iter().zip(&want.totals.probability).enumerate() {
        near(&format!("{name}: probability[{e}]"), got, layers as f64 * want, BATCH_SUMS, 0.01 * mean);
    }
    for (e, (&got, &want)) in got.importance.iter().zip(&want.importance).enumerate() {
        near(&format!("{name}: importance[{e}]"), got, want, BATCH_SUMS, 0.0);
    }
    for (t, row) in values.chunks(experts).enumerate() {
        let row = to_f64(row);
        let shares = &got.probabilities[t * experts..][..experts];
        if !counts[t] {
            assert!(shares.iter().chain([&got.log_sum_exp[t]]).all(|&value| value == 0.0), "{name}: token {t} adds");
            continue;
        }
        near(
            &format!("{name}: log_sum_exp[{t}]"),
            got.log_sum_exp[t],
            log_sum_exp(row.iter().copied()),
            LOG_SUM_EXP,
            1.0,
        );
        // Sigmoids are divided by the sum of all of them.
        let (of, divided) = match desc.rule.score {
            LossScore::Softmax => (Shares::Softmax(experts), 0),
            LossScore::Sigmoid => (Shares::Sigmoid, experts),
            LossScore::PlainSigmoid => (Shares::Sigmoid, 0),
            other => unreachable!("no case has {other:?}"),
        };
        assert_weights(
            &format!("{name}: probabilities[{t}]"),
            shares,
            &probabilities(&row, desc.rule.score),
            of,
            divided,
        );
    }
    check_stats(name, &got.stats, &want, desc, layers);
}

fn check_stats(name: &str, got: &RouterStats, want: &Balance, desc: &MeasuredGatingDesc, layers: usize) {
    let (tokens, top_k) = (want.totals.tokens, desc.gating.top_k);
    assert_eq!(got.tokens as usize, tokens, "{name}");
    let slots: i64 = want.counts.iter().map(|&count| i64::from(count)).sum();
    assert_eq!(i64::from(got.slots), slots, "{name}");
    assert_eq!(u64::from(got.dropped), want.dropped, "{name}: dropped");
    assert_eq!(got.max_load as i32, want.counts.iter().copied().max().unwrap_or(0), "{name}");
    let mut totals = want.totals.clone();
    (1..layers).for_each(|_| totals.add(&want.totals));
    near(&format!("{name}: balance_loss"), got.balance_loss, totals.loss(), BATCH_SUMS, 0.0);
    near(&format!("{name}: sequence_loss"), got.sequence_loss, want.sequence_loss, BATCH_SUMS, 0.0);
    near(&format!("{name}: z_loss"), got.z_loss, want.z_loss, BATCH_SUMS, 1.0);
    near(&format!("{name}: entropy"), got.entropy, want.entropy, BATCH_SUMS, 1.0);
    near(&format!("{name}: importance_cv2"), got.importance_cv2, cv_squared(&want.importance), BATCH_CV2, 1.0);
    let counts: Vec<f64> = want.counts.iter().map(|&count| f64::from(count)).collect();
    near(&format!("{name}: load_cv2"), got.load_cv2, cv_squared(&counts), FEW_ROUNDINGS, 0.0);
    near(&format!("{name}: max_over_mean"), got.max_over_mean, want.max_over_mean(), FEW_ROUNDINGS, 0.0);
    let fraction = want.dropped as f64 / (tokens * top_k).max(1) as f64;
    near(&format!("{name}: dropped_fraction"), got.dropped_fraction, fraction, FEW_ROUNDINGS, 0.0);
}

/// Losses of totals that were made elsewhere; the fields that totals do not determine stay.
pub fn check_losses(rng: &mut fastrand::Rng) {
    let (kernels, stream) = (device::kernels(), device::stream());
    for experts in [1, 7, 64, 256, 300, 4096] {
        let counts: Vec<i32> = (0..experts).map(|_| rng.i32(0..1 << 20)).collect();
        let loss_counts: Vec<i32> = (0..experts).map(|_| rng.i32(0..i32::MAX)).collect();
        let probability: Vec<f32> = (0..experts).map(|_| 1e5 * rng.f32()).collect();
        let importance: Vec<f32> = (0..experts).map(|_| 1e3 * rng.f32()).collect();
        let desc = BalanceLossDesc::new(1 + rng.usize(..1 << 30), experts);
        let at = [&counts, &loss_counts].map(|values| Guarded::input(&stream, "totals", values));
        let sums = [&probability, &importance].map(|values| Guarded::input(&stream, "totals", values));
        let mut stats = Guarded::<RouterStats>::output(&stream, "stats", 1);
        let before = stats.read(&stream)[0];
        let [counts_in, loss_counts_in] = at.each_ref().map(Guarded::view);
        let [probability_in, importance_in] = sums.each_ref().map(Guarded::view);
        let mut to = stats.view_mut();
        let args = BalanceLossArgs::new(&counts_in, &loss_counts_in, &probability_in, &importance_in, &mut to);
        balance_loss::forward(kernels, &stream, &desc, args).unwrap();
        let got = stats.read(&stream)[0];
        at.iter().for_each(|input| input.assert_unchanged(&stream));
        let name = format!("{desc:?}");
        let want = reference::balance::Totals {
            tokens: desc.tokens,
            counts: loss_counts.iter().map(|&count| count as u64).collect(),
            probability: to_f64(&probability),
        };
        // One rounding of an f64.
        near(&name, got.balance_loss, want.loss(), FEW_ROUNDINGS, 0.0);
        near(&name, got.importance_cv2, cv_squared(&to_f64(&importance)), FEW_ROUNDINGS, 0.0);
        let loads: Vec<f64> = counts.iter().map(|&count| f64::from(count)).collect();
        near(&name, got.load_cv2, cv_squared(&loads), FEW_ROUNDINGS, 0.0);
        let slots: i64 = counts.iter().map(|&count| i64::from(count)).sum();
        let largest = counts.iter().copied().max().unwrap();
        near(&name, got.max_over_mean, f64::from(largest) * experts as f64 / slots as f64, FEW_ROUNDINGS, 0.0);
        assert_eq!((got.slots, got.max_load), (slots as u32, largest as u32), "{name}");
        let kept = |stats: RouterStats| {
            [stats.sequence_loss, stats.z_loss, stats.entropy, stats.dropped_fraction].map(f32::to_bits)
        };
        assert_eq!(kept(got), kept(before), "{name}");
        assert_eq!((got.tokens, got.dropped), (before.tokens, before.dropped), "{name}");
    }
}

/// The update is exact, and moves against the load.
pub fn check_bias(rng: &mut fastrand::Rng) {
    let (kernels, stream) = (device::kernels(), device::stream());
    for experts in [1, 2, 31, 64, 256, 257, 4096] {
        for range in [1, 3, i32::MAX] {
            let counts: Vec<i32> = (0..experts).map(|_| rng.i32(0..range)).collect();
            let bias: Vec<f32> = (0..experts).map(|_| rng.f32() - 0.5).collect();
            let rate = [0.001, 0.0, -0.5][rng.usize(..3)];
            let input = Guarded::input(&stream, "counts", &counts);
            let mut updated = Guarded::input(&stream, "bias", &bias);
            let desc = UpdateBiasDesc::new(experts, rate);
            let (counts_in, mut to) = (input.view(), updated.view_mut());
            update_bias::forward(kernels, &stream, &desc, UpdateBiasArgs::new(&counts_in, &mut to)).unwrap();
            let got = updated.read(&stream);
            let want = reference::balance::update_bias(&bias, &counts, rate).unwrap();
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&got), bits(&want), "{desc:?}");
            let mean = counts.iter().map(|&count| f64::from(count)).sum::<f64>() / experts as f64;
            for e in 0..experts {
                let moved = f64::from(got[e]) - f64::from(bias[e]);
                assert!(moved * f64::from(rate) * (mean - f64::from(counts[e])) >= 0.0, "{desc:?}: expert {e}");
            }
            input.assert_unchanged(&stream);
        }
    }
}
