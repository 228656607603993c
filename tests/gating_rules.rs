//! Rules of gating that models differ in: group scores by choice values, masks, epsilons; each in gating, gating with dispatch, and measured
//! gating, against the reference.

#[path = "support/device.rs"]
#[allow(dead_code)]
mod device;

use std::sync::Arc;

use cudarc::driver::CudaStream;
use moe_kernels::capacity::dispatch::DispatchDesc;
use moe_kernels::experts::Dispatched;
use moe_kernels::reference::gating::{Gated, gate};
use moe_kernels::routers::gating::{self, GatingArgs, GatingDesc};
use moe_kernels::routers::gating_dispatch::{self, GatingDispatchArgs, GatingDispatchDesc};
use moe_kernels::routers::measured_gating::{self, MeasuredGatingArgs, MeasuredGatingDesc, RouterStats, Totals};
use moe_kernels::rules::{Garbage, Gating, GroupScore, Groups, Masked, Renormalise, Score};
use moe_kernels::{Kernels, Workspace};

struct Device {
    stream: Arc<CudaStream>,
    kernels: &'static Kernels,
}

impl Device {
    fn new() -> Device {
        Device { stream: device::stream(), kernels: device::kernels() }
    }

    /// Ids and weights of all three kernels, which must agree to the bit.
    fn gate(
        &self,
        logits: &[f32],
        bias: Option<&[f32]>,
        experts: usize,
        top_k: usize,
        rule: Gating,
    ) -> (Vec<i32>, Vec<f32>) {
        let (stream, kernels) = (&self.stream, self.kernels);
        let tokens = logits.len() / experts;
        let logits = stream.clone_htod(logits).unwrap();
        // One element in: aligned to its elements, to no more.
        let bias = bias.map(|bias| stream.clone_htod(&[&[f32::NAN], bias].concat()).unwrap());
        let bias = bias.as_ref().map(|bias| bias.slice(1..));
        let ints = |n: usize| stream.alloc_zeros::<i32>(n).unwrap();
        let floats = |n: usize| stream.alloc_zeros::<f32>(n).unwrap();
        let desc = GatingDesc::new(tokens, experts, top_k, rule);

        let (mut ids, mut weights) = (ints(tokens * top_k), floats(tokens * top_k));
        let mut args = GatingArgs::new(&logits, &mut ids, &mut weights);
        args.correction_bias = bias.as_ref().map(|bias| bias.into());
        gating::forward(kernels, stream, &desc, args).unwrap();
        let read = |ids, weights| -> (Vec<i32>, Vec<f32>) {
            (stream.clone_dtoh(ids).unwrap(), stream.clone_dtoh(weights).unwrap())
        };
        let alone = read(&ids, &weights);
        let bits = |(ids, weights): &(Vec<i32>, Vec<f32>)| -> (Vec<i32>, Vec<u32>) {
            (ids.clone(), weights.iter().map(|w| w.to_bits()).collect())
        };

        let both = GatingDispatchDesc::new(rule, DispatchDesc::new(tokens, experts, top_k, 16));
        let mut dispatched = Dispatched::new(stream, &both.dispatch.shape()).unwrap();
        let bytes = gating_dispatch::workspace_bytes(&both, kernels.device()).unwrap();
        let mut workspace = Workspace::new(stream, bytes).unwrap();
        let (mut ids, mut weights) = (ints(tokens * top_k), floats(tokens * top_k));
        let mut args = GatingDispatchArgs::new(&logits, &mut ids, &mut weights, &mut dispatched, &mut workspace);
        args.correction_bias = bias.as_ref().map(|bias| bias.into());
        gating_dispatch::forward(kernels, stream, &both, args).unwrap();
        assert_eq!(bits(&read(&ids, &weights)), bits(&alone), "with dispatch");

        let measured = MeasuredGatingDesc::new(desc);
        let bytes = measured_gating::workspace_bytes(&measured, kernels.device()).unwrap();
        let mut workspace = Workspace::new(stream, bytes).unwrap();
        let (mut ids, mut weights) = (ints(tokens * top_k), floats(tokens * top_k));
        let (mut counts, mut loss_counts) = (ints(experts), ints(experts));
        let (mut probability, mut importance) = (floats(experts), floats(experts));
        let mut stats = stream.clone_htod(&[RouterStats::default()]).unwrap();
        let totals = Totals::new(&mut counts, &mut loss_counts, &mut probability, &mut importance);
        let mut args = MeasuredGatingArgs::new(&logits, &mut ids, &mut weights, totals, &mut stats, &mut workspace);
        args.correction_bias = bias.as_ref().map(|bias| bias.into());
        measured_gating::forward(kernels, stream, &measured, args).unwrap();
        assert_eq!(bits(&read(&ids, &weights)), bits(&alone), "measured");
        alone
    }
}

fn close(what: &str, got: &[f32], want: &[f64]) {
    for (got, want) in got.iter().zip(want) {
        let off = (f64::from(*got) - want).abs();
        assert!(off <= 2e-6 * want.abs() || (got.is_nan() && want.is_nan()), "{what}: {got} is not {want}");
    }
}

/// The inputs that were found: groups ranked by logits where there was no bias.
#[test]
fn groups_are_ranked_by_choice_values() {
    let device = Device::new();
    for (score, logits, want) in [
        (Score::Sigmoid, [10.0, -1.0, 3.0, 2.9], [2, 3]),
        (Score::Softmax, [3.0, -9.0, 2.0, 1.9], [0, 1]),
        // Without scores before the choice, logits are what is added up.
        (Score::TopkSoftmax, [10.0, -1.0, 3.0, 2.9], [0, 1]),
    ] {
        let rule = Gating::new(score).groups(Some(Groups::new(2, 1)));
        let reference = gate::<f32, f32>(&logits, None, 4, 2, &rule).unwrap();
        let (mut ids, weights) = device.gate(&logits, None, 4, 2, rule);
        assert_eq!(ids, reference.ids, "{score:?}");
        close("weights", &weights, &reference.weights);
        ids.sort();
        assert_eq!(ids, want, "{score:?}");
        if score != Score::TopkSoftmax {
            let with_zeros = device.gate(&logits, Some(&[0.0; 4]), 4, 2, rule);
            assert_eq!(with_zeros.0, reference.ids, "a bias of zeros changes nothing");
        }
    }
}

#[test]
fn epsilons_are_the_models() {
    let device = Device::new();
    // Scores near 1e-7, so that every epsilon shows.
    let logits = [-16.0f32, -16.5, -17.0, -20.0];
    for renormalise in
        [0.0, 1e-20, 1e-15, 1e-6].map(Renormalise::Plus).into_iter().chain([1e-12, 1e-3].map(Renormalise::AtLeast))
    {
        let rule = Gating::new(Score::Sigmoid).renormalise(Some(renormalise)).scale(2.5);
        let want = gate::<f32, f32>(&logits, None, 4, 2, &rule).unwrap();
        let (ids, weights) = device.gate(&logits, None, 4, 2, rule);
        assert_eq!(ids, want.ids);
        close(&format!("{renormalise:?}"), &weights, &want.weights);
    }
    let sum = |renormalise| -> f32 {
        device.gate(&logits, None, 4, 2, Gating::new(Score::Sigmoid).renormalise(Some(renormalise))).1.iter().sum()
    };
    assert!(sum(Renormalise::Plus(1e-6)) < 0.5 && (sum(Renormalise::Plus(1e-20)) - 1.0).abs() < 1e-6);
    assert!(sum(Renormalise::AtLeast(1e-3)) < 1e-3 && (sum(Renormalise::AtLeast(1e-12)) - 1.0).abs() < 1e-6);
    // NaN stays in its weights, whatever the clamp.
    let nan = [f32::NAN, 1.0, 0.0, 0.5];
    let rule = Gating::new(Score::Sigmoid).renormalise(Some(Renormalise::AtLeast(0.5)));
    let (ids, weights) = device.gate(&nan, None, 4, 4, rule.garbage(Garbage::Propagate));
    assert_eq!(ids, [1, 3, 2, 0]);
    assert!(weights.iter().all(|w| w.is_nan()));
    let (ids, weights) = device.gate(&nan, None, 4, 4, rule);
    assert_eq!((ids, weights), (vec![1, 3, 2, 0], vec![0.0; 4]));
}

/// A dropped expert's 0 beats a kept one whose biased score is negative.
#[test]
fn masked_with_zero() {
    let device = Device::new();
    let logits = [2.0f32, 1.0, -1.0, -1.5];
    let bias = [0.0f32, -2.0, 0.0, -3.0];
    let groups = Groups::new(2, 1).score(GroupScore::Max);
    for (masked, want) in [(Masked::Out, [0, 1]), (Masked::Zero, [0, 2])] {
        let rule = Gating::new(Score::Sigmoid).groups(Some(groups.masked(masked)));
        let reference = gate(&logits, Some(&bias), 4, 2, &rule).unwrap();
        let (ids, weights) = device.gate(&logits, Some(&bias), 4, 2, rule);
        assert_eq!((ids, reference.ids), (want.to_vec(), want.to_vec()), "{masked:?}");
        close("weights", &weights, &reference.weights);
    }
    // More choices than kept experts: the others come by number.
    let rule = Gating::new(Score::Softmax).groups(Some(groups.masked(Masked::Zero)));
    let (ids, _) = device.gate(
        &[0.0, 1.0, 5.0, 4.0, 0.0, 0.0],
        None,
        6,
        6,
        rule.groups(Some(Groups::new(3, 1).masked(Masked::Zero))),
    );
    assert_eq!(ids, [2, 3, 0, 1, 4, 5]);
}

/// Drawn rules on drawn logits. What is chosen must be the reference's wherever no two choice values are so near that the last bits of a score
/// decide: logits lie on a grid, so that scores differ by far more, or not at all.
#[test]
fn drawn_rules() {
    let of_run = std::env::var("MOE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0u64);
    let device = Device::new();
    for seed in 0..60 {
        let mut rng = fastrand::Rng::with_seed(of_run.wrapping_mul(1000) + seed);
        let count = rng.usize(1..9);
        let size = rng.usize(1..13) * if seed % 10 == 9 { 8 } else { 1 };
        let experts = count * size;
        let kept = rng.usize(1..=count);
        let terms = rng.usize(1..=size.min(6));
        let group_score = if rng.bool() { GroupScore::TopSum(terms) } else { GroupScore::Max };
        let score = [Score::Softmax, Score::TopkSoftmax, Score::Sigmoid][rng.usize(0..3)];
        let masked = if rng.bool() || score == Score::TopkSoftmax { Masked::Out } else { Masked::Zero };
        let eligible = if masked == Masked::Zero { experts } else { kept * size };
        let top_k = rng.usize(1..=eligible.min(12));
        let renormalise =
            [None, Some(Renormalise::Plus(0.0)), Some(Renormalise::Plus(1e-6)), Some(Renormalise::AtLeast(0.4))];
        let groups = Groups::new(count, kept).score(group_score).masked(masked);
        let rule = Gating::new(score).groups(Some(groups)).renormalise(renormalise[rng.usize(0..4)]).scale(1.25);
        let tokens = rng.usize(1..40);
        // Distinct multiples of 1/8 within a token: sigmoids and softmaxes differ relatively by a tenth.
        let logits: Vec<f32> = (0..tokens)
            .flat_map(|_| {
                let mut row: Vec<f32> = (0..experts).map(|e| (e as f32 - experts as f32 / 2.0) / 8.0).collect();
                rng.shuffle(&mut row);
                row
            })
            .collect();
        let bias: Vec<f32> = (0..experts).map(|_| rng.i32(-4..4) as f32 / 16.0 + 0.01).collect();
        let bias = (score != Score::TopkSoftmax && rng.bool()).then_some(&bias[..]);
        let what =
            format!("seed {seed}: {experts} experts, {tokens} tokens, {top_k}, bias {}, {rule:?}", bias.is_some());
        let want = gate(&logits, bias, experts, top_k, &rule).unwrap();
        let (ids, weights) = device.gate(&logits, bias, experts, top_k, rule);
        for t in 0..tokens {
            let row = t * top_k..(t + 1) * top_k;
            if ids[row.clone()] != want.ids[row.clone()] {
                let near = near_ties(&logits[t * experts..][..experts], bias, &rule);
                assert!(near, "{what}: token {t}: {:?}, not {:?}", &ids[row.clone()], &want.ids[row.clone()]);
                continue;
            }
            close(&what, &weights[row.clone()], &want.weights[row]);
        }
    }
}

/// Whether two choice values, or two group scores, are within a few units of the last place of f32.
fn near_ties(logits: &[f32], bias: Option<&[f32]>, rule: &Gating) -> bool {
    let wide: Vec<f64> = logits.iter().map(|&l| l.into()).collect();
    let everything = Gating::new(rule.score);
    let Gated { ids, weights } = gate::<f64, f32>(&wide, None, logits.len(), logits.len(), &everything).unwrap();
    let mut choice = vec![0.0; logits.len()];
    for (id, weight) in ids.iter().zip(weights) {
        let id = *id as usize;
        choice[id] = if rule.score == Score::TopkSoftmax { wide[id] } else { weight };
        choice[id] += bias.map_or(0.0, |bias| f64::from(bias[id]));
    }
    let groups = rule.groups.unwrap();
    let mut sums: Vec<f64> = choice
        .chunks(logits.len() / groups.count)
        .map(|group| {
            let mut group = group.to_vec();
            group.sort_by(|a, b| b.total_cmp(a));
            let terms = match groups.score {
                GroupScore::TopSum(terms) => terms,
                _ => 1,
            };
            group.iter().take(terms).sum()
        })
        .collect();
    let near = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values.windows(2).any(|pair| (pair[1] - pair[0]).abs() <= 1e-6 * pair[1].abs().max(1e-3))
    };
    choice.push(0.0);
    near(&mut choice) || near(&mut sums)
}

#[test]
fn rules_that_cannot_be_are_refused() {
    let fault =
        |rule: Gating, top_k: usize| GatingDesc::new(4, 12, top_k, rule).validate().unwrap_err().argument().unwrap();
    let groups = |groups: Groups| Gating::new(Score::Sigmoid).groups(Some(groups));
    assert_eq!(fault(groups(Groups::new(4, 2).score(GroupScore::TopSum(4))), 2), "groups.score");
    assert_eq!(fault(groups(Groups::new(4, 2).score(GroupScore::TopSum(0))), 2), "groups.score");
    assert_eq!(fault(groups(Groups::new(4, 2)), 7), "top_k");
    let by_logits = Gating::new(Score::TopkSoftmax).groups(Some(Groups::new(4, 2).masked(Masked::Zero)));
    assert_eq!(fault(by_logits, 2), "groups.masked");
    assert_eq!(GatingDesc::new(4, 12, 7, groups(Groups::new(4, 2).masked(Masked::Zero))).validate(), Ok(()));
    let rule = |epsilon| Gating::new(Score::Sigmoid).renormalise(Some(Renormalise::Plus(epsilon)));
    assert_eq!(fault(rule(-1e-9), 2), "renormalise");
    assert_eq!(fault(rule(f32::NAN), 2), "renormalise");
}
