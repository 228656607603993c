//! Checks of `gating_backward`: every rule and loss against the reference, whose own tests are finite differences.

use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use moe_kernels::experts::Dispatched;
use moe_kernels::reference::gating::{gate, gate_backward};
use moe_kernels::registry::Kernel;
use moe_kernels::routers::gating_backward::{self, GatingBackwardArgs, GatingBackwardDesc};
use moe_kernels::rules::{Capacity, ChoiceBy, Gating, LossGradient, LossScore, Renormalise, Score};
use moe_kernels::{Error, In, Workspace};

use crate::support::buffer::Guarded;
use crate::support::compare::{GATING_GRADIENT, to_f64};
use crate::support::device;
use crate::support::inputs::normal;
use crate::timing::time;

const SCORES: [Score; 4] = [Score::Softmax, Score::TopkSoftmax, Score::Sigmoid, Score::SqrtSoftplus];

pub fn check(rng: &mut fastrand::Rng) {
    for score in SCORES {
        for renormalise in [
            None,
            Some(Renormalise::Plus(0.0)),
            Some(Renormalise::Plus(0.25)),
            Some(Renormalise::AtLeast(1e-9)),
            Some(Renormalise::AtLeast(3.0)),
            Some(Renormalise::PNorm(1.0)),
            Some(Renormalise::PNorm(0.5)),
            Some(Renormalise::PNorm(0.1)),
            Some(Renormalise::PNorm(3.0)),
        ] {
            for (tokens, experts, top_k) in [(1, 1, 1), (37, 8, 2), (10, 33, 5), (3, 130, 32), (2, 70, 50), (300, 4, 1)]
            {
                let gating = Gating::new(score).renormalise(renormalise).scale([1.0, 2.5][rng.usize(..2)]);
                let losses = [
                    None,
                    Some(LossGradient::new(LossScore::Softmax).balance(0.5)),
                    Some(LossGradient::new(LossScore::Sigmoid).balance(0.5).z(0.1)),
                    Some(LossGradient::new(LossScore::Softmax).z(0.1)),
                    Some(LossGradient::new(LossScore::PlainSigmoid).balance(0.5)),
                ][rng.usize(..5)];
                let desc = GatingBackwardDesc::new(tokens, experts, top_k, gating)
                    .losses(losses)
                    .parts([1, 1, 3][rng.usize(..3)])
                    .accumulate(rng.bool());
                case(rng, &desc, Logits::Normal);
                case(rng, &desc, Logits::Extreme);
            }
        }
    }
    given_twice(rng);
    by_slot(rng);
    one_choice_has_none(rng);
    needs_counts(rng);
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Logits {
    Normal,
    /// Far apart, with -Inf, and rows of garbage.
    Extreme,
}

fn case(rng: &mut fastrand::Rng, desc: &GatingBackwardDesc, kind: Logits) {
    let &GatingBackwardDesc { tokens, experts, top_k, gating, .. } = desc;
    let mut logits: Vec<f32> = (0..tokens * experts)
        .map(|_| match kind {
            Logits::Normal => normal(rng) as f32,
            Logits::Extreme => [-60.0, -3.0, 0.0, 20.0, 0.5, f32::NEG_INFINITY][rng.usize(..6)],
        })
        .collect();
    if kind == Logits::Extreme && tokens > 3 {
        logits[..experts].fill(f32::NAN);
        logits[experts..2 * experts].fill(f32::NEG_INFINITY);
        logits[2 * experts] = f32::INFINITY;
        logits[3 * experts + rng.usize(..experts)] = f32::NAN;
    }
    let mut ids = gate::<f32, f32>(&logits, None, experts, top_k, &gating.renormalise(None)).unwrap().ids;
    for id in &mut ids {
        // Turned away, or chosen of what has no probability.
        let logit_of = |id: i32| logits[id as usize % experts];
        if rng.u32(..6) == 0 || logit_of(*id) == f32::NEG_INFINITY {
            *id = [-1, i32::MIN, experts as i32][rng.usize(..3)];
        }
    }
    if tokens > 5 {
        ids[5 * top_k..6 * top_k].fill(-1);
    }
    run(rng, desc, &logits, &ids, &format!("{desc:?} {kind:?}"));
}

fn run(rng: &mut fastrand::Rng, desc: &GatingBackwardDesc, logits: &[f32], ids: &[i32], name: &str) -> Vec<f32> {
    let (kernels, stream) = (device::kernels(), device::stream());
    let &GatingBackwardDesc { tokens, experts, top_k, ref gating, losses, accumulate, .. } = desc;
    let kernel = Kernel::GatingBackward { any: false };
    assert_eq!(gating_backward::select(desc, kernels.device()).unwrap().kernel.variant(), kernel);
    let d_weights: Vec<f32> = ids
        .iter()
        // What is not chosen has any gradient.
        .map(|&id| if (0..experts as i32).contains(&id) { normal(rng) as f32 } else { f32::NAN })
        .collect();
    let counts: Vec<i32> = (0..experts).map(|_| rng.i32(0..9)).collect();
    let counted = if rng.bool() { Some(tokens.div_ceil(2) as u32) } else { None }.filter(|_| losses.is_some());
    let before: Vec<f32> = (0..tokens * experts).map(|_| normal(rng) as f32).collect();

    let (in_parts, d_weights) = parts_of(rng, &d_weights, desc.parts);
    let given = [Guarded::input(&stream, "logits", logits), Guarded::input(&stream, "d_weights", &in_parts)];
    let (chosen, slots) = (Guarded::input(&stream, "ids", ids), Guarded::input(&stream, "counts", &counts));
    let number = Guarded::input(&stream, "counted", &[counted.unwrap_or(0)]);
    let launch = || {
        let mut out = if accumulate {
            Guarded::filled_output(&stream, "d_logits", &before, 0)
        } else {
            Guarded::<f32>::output(&stream, "d_logits", tokens * experts)
        };
        {
            let [logits, d_weights] = [given[0].view(), given[1].view()];
            let (ids, counts, number, mut to) = (chosen.view(), slots.view(), number.view(), out.view_mut());
            let mut args = GatingBackwardArgs::new(&logits, &ids, &d_weights, &mut to);
            args.counts = losses.filter(|losses| losses.balance != 0.0).map(|_| In::from(&counts));
            args.counted = counted.map(|_| In::from(&number));
            gating_backward::forward(kernels, &stream, desc, args).unwrap();
        }
        out.read(&stream)
    };
    let got = launch();
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&got), bits(&launch()), "{name}: another run gave other bits");
    time(&stream, name, || drop(launch()));
    for buffer in &given {
        buffer.assert_unchanged(&stream);
    }

    let d: Vec<f64> = to_f64(&d_weights);
    let of_losses = losses.as_ref().map(|losses| (losses, &counts[..], counted.map_or(tokens, |n| n as usize)));
    let want = gate_backward(logits, ids, &d, experts, top_k, gating, of_losses).unwrap();
    // Nothing but rounding would reach what was not chosen.
    let chosen_alone = gating.renormalise == Some(Renormalise::Plus(0.0)) && losses.is_none() && !accumulate;
    for t in 0..tokens {
        let range = t * experts..(t + 1) * experts;
        let row = &want[range.clone()];
        if chosen_alone {
            let others = (0..experts).filter(|&e| !ids[t * top_k..][..top_k].contains(&(e as i32)));
            others.for_each(|e| assert_eq!(got[t * experts + e], 0.0, "{name}: token {t}, expert {e} was not chosen"));
        }
        // Terms of both signs cancel: relative to what the token's own terms are, upstream times weight, and the losses' parts.
        let upstream = d[t * top_k..][..top_k].iter().filter(|d| d.is_finite()).map(|d| d * d).sum::<f64>().sqrt();
        let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
        // h and its mean, which cancel, at most 8 slots an expert.
        let h = of_losses.map_or(0.0, |(losses, _, counted)| {
            8.0 * f64::from(losses.balance) * experts as f64 / (counted * counted) as f64
        });
        let scale = h + norm.max(f64::from(gating.scale) * upstream * slope(logits, ids, t, desc));
        for (e, (i, &want)) in range.zip(row).enumerate() {
            let (want, more) =
                if accumulate { (want + f64::from(before[i]), f64::from(before[i]).abs()) } else { (want, 0.0) };
            let bound = GATING_GRADIENT * (scale + more);
            let error = (f64::from(got[i]) - want).abs();
            assert!(
                error <= bound,
                "{name}: token {t}, expert {e} is {}, want {want}, off by {error:e} > {bound:e}",
                got[i]
            );
        }
    }
    got
}

/// `values` as the sum of `parts` vectors one behind the other, added up in f32 in their order; and that sum.
pub fn parts_of(rng: &mut fastrand::Rng, values: &[f32], parts: usize) -> (Vec<f32>, Vec<f32>) {
    let more: Vec<f32> = (0..(parts - 1) * values.len()).map(|_| normal(rng) as f32).collect();
    let all = [values, &more].concat();
    let sum = |i: usize| all.iter().skip(i).step_by(values.len()).copied().reduce(|a, b| a + b).unwrap();
    let sums = (0..values.len()).map(sum).collect();
    (all, sums)
}

/// How much a weight changes with a logit, about: the largest weight.
fn slope(logits: &[f32], ids: &[i32], token: usize, desc: &GatingBackwardDesc) -> f64 {
    let (experts, top_k) = (desc.experts, desc.top_k);
    let ids = &ids[token * top_k..][..top_k];
    let rule = desc.gating.choice(ChoiceBy::Given).scale(1.0);
    let inputs = moe_kernels::reference::gating::Inputs { given: Some(ids), ..Default::default() };
    let row = &logits[token * experts..][..experts];
    let weights = moe_kernels::reference::gating::gate_by(row, experts, top_k, &rule, inputs).unwrap().weights;
    weights.into_iter().filter(|weight| weight.is_finite()).fold(0.0, f64::max)
}

/// Two choices of one expert add up, in their order.
fn given_twice(rng: &mut fastrand::Rng) {
    for score in SCORES {
        let gating = Gating::new(score).choice(ChoiceBy::Given).renormalised();
        let desc = GatingBackwardDesc::new(2, 3, 4, gating);
        run(rng, &desc, &[0.1, -0.4, 1.0, 0.0, 0.2, 0.3], &[2, 0, 2, 2, 1, 1, -1, 0], &format!("{score:?} twice"));
    }
}

/// Exactly none, whatever is rounded.
fn one_choice_has_none(rng: &mut fastrand::Rng) {
    for score in SCORES {
        for by in [Renormalise::Plus(0.0), Renormalise::AtLeast(1e-12)] {
            let desc = GatingBackwardDesc::new(40, 5, 1, Gating::new(score).renormalise(Some(by)));
            let logits: Vec<f32> = (0..200).map(|_| 3.0 * normal(rng) as f32).collect();
            let ids: Vec<i32> = (0..40).map(|_| rng.i32(..5)).collect();
            let got = run(rng, &desc, &logits, &ids, &format!("{score:?} {by:?} alone"));
            assert!(got.iter().all(|&d| d == 0.0), "{score:?} {by:?}: {got:?}");
        }
    }
}

fn needs_counts(rng: &mut fastrand::Rng) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let logits = Guarded::input(&stream, "logits", &[normal(rng) as f32; 4]);
    let ids = Guarded::input(&stream, "ids", &[0, 1]);
    let d_weights = Guarded::input(&stream, "d_weights", &[1.0f32; 2]);
    let mut out = Guarded::<f32>::output(&stream, "d_logits", 4);
    let losses = LossGradient::new(LossScore::Softmax).balance(1.0);
    let desc = GatingBackwardDesc::new(2, 2, 1, Gating::new(Score::Softmax)).losses(Some(losses));
    let (logits, ids, d_weights, mut to) = (logits.view(), ids.view(), d_weights.view(), out.view_mut());
    let args = GatingBackwardArgs::new(&logits, &ids, &d_weights, &mut to);
    let error = gating_backward::forward(kernels, &stream, &desc, args).unwrap_err();
    assert!(matches!(error, Error::Missing { argument: "counts", .. }), "{error}");
}

/// Gradients that lie by slot: as those of choices, of which one that was turned away has none.
fn by_slot(rng: &mut fastrand::Rng) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let (tokens, experts) = (40, 40);
    for top_k in [2, 36] {
        let gating = Gating::new(Score::Sigmoid).renormalise(Some(Renormalise::Plus(0.25)));
        let desc = GatingBackwardDesc::new(tokens, experts, top_k, gating);
        let logits: Vec<f32> = (0..tokens * experts).map(|_| normal(rng) as f32).collect();
        let ids = gate::<f32, f32>(&logits, None, experts, top_k, &gating.renormalise(None)).unwrap().ids;
        let most = Capacity::new(tokens * top_k / experts, tokens);
        let order = DispatchDesc::new(tokens, experts, top_k, 16).capacity(Some(most));
        let mut dispatched = Dispatched::new(&stream, &order.shape()).unwrap();
        let bytes = dispatch::workspace_bytes(&order, kernels.device()).unwrap();
        let mut workspace = Workspace::new(&stream, bytes).unwrap();
        let ids_on = Guarded::input(&stream, "ids", &ids);
        dispatch::forward(kernels, &stream, &order, DispatchArgs::new(&ids_on.view(), &mut dispatched, &mut workspace))
            .unwrap();
        let token_slot = stream.clone_dtoh(dispatched.token_slot()).unwrap();
        let token_slot = &token_slot[..tokens * top_k];
        assert!(token_slot.iter().any(|&slot| slot < 0), "nothing was turned away");
        let of_slots: Vec<f32> = (0..dispatched.shape().slots).map(|_| normal(rng) as f32).collect();
        let of_choice = |&slot: &i32| usize::try_from(slot).map_or(0.0, |slot| of_slots[slot]);
        let of_choices: Vec<f32> = token_slot.iter().map(of_choice).collect();
        let logits_on = Guarded::input(&stream, "logits", &logits);
        let run = |d: &[f32], dispatched: Option<&Dispatched>| {
            let d = Guarded::input(&stream, "d_weights", d);
            let mut out = Guarded::<f32>::output(&stream, "d_logits", tokens * experts);
            {
                let (logits, ids, d, mut to) = (logits_on.view(), ids_on.view(), d.view(), out.view_mut());
                let mut args = GatingBackwardArgs::new(&logits, &ids, &d, &mut to);
                args.dispatched = dispatched;
                gating_backward::forward(kernels, &stream, &desc, args).unwrap();
            }
            out.read(&stream)
        };
        assert_eq!(run(&of_slots, Some(&dispatched)), run(&of_choices, None), "{top_k} choices");
    }
}
