//! Losses that count the largest scores where a bias or groups choose others (DeepSeek-V3, eq. 18): the measured gating against the
//! reference, for sequences that a block holds and for ones that are cut.

#[path = "support/device.rs"]
#[allow(dead_code)]
mod device;

use moe_kernels::Workspace;
use moe_kernels::reference::balance::balance;
use moe_kernels::routers::gating::GatingDesc;
use moe_kernels::routers::measured_gating::{self, MeasuredGatingArgs, MeasuredGatingDesc, RouterStats, Totals};
use moe_kernels::rules::{Gating, Groups, LossScore, Score};

/// Tokens, experts, choices, tokens of a sequence.
const SHAPES: [(usize, usize, usize, usize); 5] =
    [(37, 8, 2, 10), (500, 64, 6, 500), (3000, 32, 4, 1500), (60, 700, 8, 25), (40, 2100, 4, 40)];

fn run(score: Score, shape: (usize, usize, usize, usize), biased: bool, groups: Option<Groups>, unbiased: bool) -> f32 {
    let (tokens, experts, top_k, sequence) = shape;
    let (stream, kernels) = (device::stream(), device::kernels());
    let mut rng = fastrand::Rng::with_seed(experts as u64);
    let logits: Vec<f32> = (0..tokens * experts).map(|_| 6.0 * rng.f32() - 3.0).collect();
    let bias: Vec<f32> = (0..experts).map(|_| 1.5 * rng.f32()).collect();
    let mut desc = MeasuredGatingDesc::new(GatingDesc::new(tokens, experts, top_k, Gating::new(score).groups(groups)));
    let loss = if score == Score::Sigmoid { LossScore::Sigmoid } else { LossScore::Softmax };
    desc.rule.score = loss;
    desc.rule.tokens_per_sequence = sequence;
    desc.rule.capacity = Some(3);
    desc.rule.unbiased = unbiased;

    let on_device = stream.clone_htod(&logits).unwrap();
    let bias = biased.then(|| stream.clone_htod(&bias).unwrap());
    let mut ids = stream.alloc_zeros::<i32>(tokens * top_k).unwrap();
    let mut weights = stream.alloc_zeros::<f32>(tokens * top_k).unwrap();
    let [mut counts, mut loss_counts] = [(); 2].map(|()| stream.alloc_zeros::<i32>(experts).unwrap());
    let [mut probability, mut importance] = [(); 2].map(|()| stream.alloc_zeros::<f32>(experts).unwrap());
    let mut stats = stream.alloc_zeros::<RouterStats>(1).unwrap();
    let bytes = measured_gating::workspace_bytes(&desc, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    let totals = Totals::new(&mut counts, &mut loss_counts, &mut probability, &mut importance);
    let mut args = MeasuredGatingArgs::new(&on_device, &mut ids, &mut weights, totals, &mut stats, &mut workspace);
    args.correction_bias = bias.as_ref().map(Into::into);
    measured_gating::forward(kernels, &stream, &desc, args).unwrap();

    let [ids, counts, loss_counts] = [&ids, &counts, &loss_counts].map(|list| stream.clone_dtoh(list).unwrap());
    let weights: Vec<f64> = stream.clone_dtoh(&weights).unwrap().into_iter().map(f64::from).collect();
    let got = stream.clone_dtoh(&stats).unwrap()[0];
    let want = balance(&logits, &ids, &weights, experts, top_k, &desc.rule).unwrap();
    let case = format!("{score:?} {shape:?} biased {biased} unbiased {unbiased}");
    assert_eq!(counts, want.counts, "{case}");
    assert_eq!(loss_counts.iter().map(|&count| count as u64).collect::<Vec<_>>(), want.totals.counts, "{case}");
    assert_eq!(u64::from(got.dropped), want.dropped, "{case}");
    for (got, want) in [(got.sequence_loss, want.sequence_loss), (got.balance_loss, want.totals.loss())] {
        assert!((f64::from(got) / want - 1.0).abs() < 1e-5, "{case}: {got} is not {want}");
    }
    let importance: f64 = stream.clone_dtoh(&importance).unwrap().into_iter().map(f64::from).sum();
    assert!((importance / weights.iter().sum::<f64>() - 1.0).abs() < 1e-5, "{case}");
    got.sequence_loss
}

#[test]
fn a_bias_moves_the_choice_and_not_what_the_losses_count() {
    for score in [Score::Sigmoid, Score::Softmax] {
        for shape in SHAPES {
            let [with, without] = [true, false].map(|biased| run(score, shape, biased, None, true));
            assert_eq!(with, without, "{score:?} {shape:?}");
            let chosen = run(score, shape, true, None, false);
            assert_ne!(chosen, with, "{score:?} {shape:?}: the bias should have a say in this test");
        }
    }
}

#[test]
fn groups_have_no_say_either() {
    for shape in SHAPES {
        let groups = Some(Groups::new(4, 2));
        let [with, without] = [groups, None].map(|groups| run(Score::Sigmoid, shape, false, groups, true));
        assert_eq!(with, without, "{shape:?}");
        run(Score::Sigmoid, shape, true, groups, false);
    }
}

#[test]
fn without_bias_or_groups_it_is_the_choice() {
    for score in Score::COMMON {
        for shape in SHAPES {
            let [unbiased, chosen] = [true, false].map(|unbiased| run(score, shape, false, None, unbiased));
            assert_eq!(unbiased, chosen, "{score:?} {shape:?}");
        }
    }
}
