use moe_kernels::reference::dispatch::DispatchRule;
use moe_kernels::reference::gating::{Gated, gate};
use moe_kernels::registry::{Gate, Kernel};
use moe_kernels::rules::{Capacity, Gating, GroupScore, Groups, Renormalise, Score};

use crate::device::{Arg, Input, Output, launch, optional};
use crate::dispatch::Results;
use crate::random::{Logits, Random};

/// DeepSeek-V3's.
const EPSILON: Renormalise = Renormalise::Plus(1e-20);

/// Flags of a rule: groups are compared by scores, and where the number of choice values begins that make a group's score.
const BY_SCORE: u32 = 32;
const GROUP_TERMS: u32 = 8;

#[derive(Clone, Copy)]
struct Case {
    rule: Gating,
    top_k: usize,
    experts: usize,
    tokens: usize,
    blocks: u32,
    bias: bool,
    logits: Logits,
    /// Also sort the slots: capacity if any, rows of a tile.
    dispatch: Option<(Option<Capacity>, usize)>,
}

fn case(score: Score, experts: usize, top_k: usize) -> Case {
    Case {
        rule: Gating::new(score),
        top_k,
        experts,
        tokens: 6,
        blocks: 1,
        bias: false,
        logits: Logits::Normal,
        dispatch: None,
    }
}

impl Case {
    fn groups(mut self, count: usize, kept: usize, score: GroupScore) -> Case {
        self.rule.groups = Some(Groups::new(count, kept).score(score));
        self
    }

    fn renormalise(mut self, scale: f32) -> Case {
        (self.rule.renormalise, self.rule.scale) = (Some(EPSILON), scale);
        self
    }

    fn run(self) {
        let values = *Gate::VALUES.iter().find(|&&values| 32 * values as usize >= self.experts).unwrap();
        self.run_with(values);
    }

    fn run_with(self, values: u32) {
        let Case { rule, top_k, experts, tokens, blocks, bias, logits, dispatch } = self;
        let kernel = Kernel::Gating(Gate { score: Some(rule.score), values, dispatch: dispatch.is_some() });
        let what = format!(
            "{} E={experts} T={tokens} P={blocks} k={top_k} bias={bias} {logits:?} {rule:?} {dispatch:?}",
            kernel.name()
        );
        let mut random = Random::new((experts * tokens + top_k) as u64);
        let logits = logits.draw(&mut random, tokens * experts);
        let bias: Option<Vec<f32>> = bias.then(|| (0..experts).map(|_| 0.3 * random.normal()).collect());
        let want = gate(&logits, bias.as_deref(), experts, top_k, &rule).unwrap();

        let (logits, bias) = (Input::new(&logits), bias.map(|bias| Input::new(&bias)));
        let ids = Output::new::<i32>(tokens * top_k);
        let weights = Output::new::<f32>(tokens * top_k);
        let groups = rule.groups.unwrap_or(Groups::new(1, 1).score(GroupScore::Max));
        let terms = match groups.score {
            GroupScore::TopSum(terms) => terms as u32,
            _ => 1,
        };
        let mut flags = u32::from(rule.renormalise.is_some());
        if groups.count > 1 {
            let by_score = terms > 1 && rule.score != Score::TopkSoftmax;
            flags |= (u32::from(by_score) * BY_SCORE) | (terms << GROUP_TERMS);
        }
        let mut args = vec![
            Arg::In(&logits),
            optional(&bias),
            Arg::Out(&ids),
            Arg::Out(&weights),
            Arg::U32(tokens as u32),
            Arg::U32(experts as u32),
            Arg::U32(top_k as u32),
            Arg::U32(groups.count as u32),
            Arg::U32(groups.kept as u32),
            Arg::U32(flags),
            Arg::F32(rule.scale),
            Arg::F32(1e-20),
            Arg::Null,
            Arg::Null,
            Arg::U32(0),
        ];
        let sorted = dispatch.map(|(capacity, tile_m)| {
            let rule = DispatchRule { experts, top_k, capacity, tile_m };
            Results::new(&want.ids, rule, blocks)
        });
        if let Some(sorted) = &sorted {
            let mut lists = sorted.args();
            // Behind the rows of a tile: experts that have rows.
            lists.insert(4, Arg::U32(experts as u32));
            args.extend(lists);
        }
        let counters = launch(kernel, [blocks, 1, 1], tokens as u64, &args);
        check(&what, &want, &ids.read(), &weights.read(), top_k);
        match sorted {
            Some(sorted) => sorted.check(&what, &weights.read()),
            None => assert_eq!(counters.shared.requests, 0, "{what}: shared memory"),
        }
    }
}

/// Softmax over the chosen has no score to add a bias to.
fn biases(score: Score) -> &'static [bool] {
    if score == Score::TopkSoftmax { &[false] } else { &[false, true] }
}

fn check(what: &str, want: &Gated, ids: &[i32], weights: &[f32], top_k: usize) {
    for (t, (got, want)) in ids.chunks(top_k).zip(want.ids.chunks(top_k)).enumerate() {
        assert_eq!(got, want, "{what}: ids of token {t}");
    }
    for (at, (&got, &want)) in weights.iter().zip(&want.weights).enumerate() {
        // exp of a difference of up to 88 carries that many half ulps of the difference.
        let bound = 6e-6 * want.abs() + 1e-30;
        let near = (f64::from(got) - want).abs() <= bound || (got.is_nan() && want.is_nan());
        assert!(near, "{what}: weight {at} is {got}, should be {want}");
    }
}

/// Every variant at the edges of its range of experts.
fn all_widths(score: Score) {
    for values in Gate::VALUES {
        let most = 32 * values as usize;
        for experts in [most / 2 + 1, most - 1, most] {
            for dispatch in [None, Some((None, 4))] {
                for &bias in biases(score) {
                    let tokens = if values > 32 { 2 } else { 5 };
                    let top_k = experts.min(6);
                    Case { tokens, bias, dispatch, ..case(score, experts, top_k) }.run_with(values);
                }
            }
        }
    }
}

#[test]
fn all_widths_of_softmax() {
    all_widths(Score::Softmax);
}

#[test]
fn all_widths_of_sigmoid() {
    all_widths(Score::Sigmoid);
}

#[test]
fn all_widths_of_topk_softmax() {
    all_widths(Score::TopkSoftmax);
}

#[test]
fn numbers_of_choices() {
    for score in Score::COMMON {
        for (experts, top_k) in [
            (1, 1),
            (5, 5),
            (8, 2),
            (31, 31),
            (32, 32),
            (33, 32),
            (60, 4),
            (64, 8),
            (128, 1),
            (160, 6),
            (257, 9),
            (512, 10),
        ] {
            case(score, experts, top_k).run();
            case(score, experts, top_k).renormalise(2.5).run();
        }
    }
}

#[test]
fn kinds_of_logits() {
    for score in Score::COMMON {
        for logits in Logits::ALL {
            for &bias in biases(score) {
                for (experts, top_k) in [(8, 2), (33, 33 - 1), (60, 4), (300, 32)] {
                    Case { logits, bias, ..case(score, experts, top_k) }.run();
                    let dispatch = Some((None, 3));
                    Case { logits, bias, dispatch, ..case(score, experts, top_k).renormalise(1.0) }.run();
                }
            }
        }
    }
}

#[test]
fn groups() {
    for score in Score::COMMON {
        for logits in Logits::ALL {
            for &bias in biases(score) {
                for by in [GroupScore::TOP_TWO, GroupScore::Max] {
                    for (experts, groups, kept, top_k) in
                        [(256, 8, 4, 8), (60, 5, 2, 4), (60, 20, 3, 4), (160, 8, 3, 6), (64, 2, 1, 32), (96, 32, 5, 3)]
                    {
                        Case { logits, bias, tokens: 3, ..case(score, experts, top_k) }.groups(groups, kept, by).run();
                    }
                }
                // Groups of one expert.
                let single = Case { logits, bias, tokens: 3, ..case(score, 30, 4) };
                single.groups(30, 6, GroupScore::Max).run();
                single.groups(30, 30, GroupScore::TOP_TWO).run();
            }
        }
        Case { tokens: 2, bias: score != Score::TopkSoftmax, ..case(score, 4000, 7) }
            .groups(10, 2, GroupScore::TOP_TWO)
            .run();
        Case { tokens: 2, ..case(score, 4096, 8) }.groups(32, 4, GroupScore::Max).run();
    }
}

#[test]
fn deepseek_v3() {
    let base = case(Score::Sigmoid, 256, 8).groups(8, 4, GroupScore::TOP_TWO).renormalise(2.5);
    for (tokens, blocks) in [(1, 1), (64, 1), (65, 3)] {
        Case { tokens, blocks, bias: true, ..base }.run();
        Case { tokens, blocks, bias: true, dispatch: Some((None, 16)), ..base }.run();
    }
}

#[test]
fn rows_of_warps() {
    for tokens in [1, 3, 8, 9, 40, 1000] {
        for blocks in [1, 2, 6] {
            Case { tokens, blocks, ..case(Score::Softmax, 60, 4) }.run();
            Case { tokens, blocks, dispatch: Some((None, 16)), ..case(Score::TopkSoftmax, 32, 4) }.run();
        }
    }
}

#[test]
fn capacity() {
    for padded in [false, true] {
        for (experts, blocks) in [(8, 1), (8, 3), (64, 2), (600, 2), (1500, 2), (2500, 2)] {
            let capacity = Some(Capacity::new(2, 7).padded(padded));
            let tokens = if experts > 1000 { 15 } else { 60 };
            Case { tokens, blocks, dispatch: Some((capacity, 4)), ..case(Score::Softmax, experts, 1) }.run();
            let logits = Logits::Equal;
            Case { tokens, blocks, logits, dispatch: Some((capacity, 4)), ..case(Score::Softmax, experts, 2) }.run();
        }
    }
}

#[test]
fn same_bits_for_any_grid() {
    let weights = |blocks: u32| {
        let logits = Input::new(&Logits::Normal.draw(&mut Random::new(9), 64 * 96));
        let (ids, weights) = (Output::new::<i32>(64 * 6), Output::new::<f32>(64 * 6));
        let numbers = [64, 96, 6, 1, 1, 1].map(Arg::U32);
        let mut args = vec![Arg::In(&logits), Arg::Null, Arg::Out(&ids), Arg::Out(&weights)];
        args.extend(numbers);
        args.extend([1.0, 1e-20].map(Arg::F32));
        args.extend([Arg::Null, Arg::Null, Arg::U32(0)]);
        let kernel = Gate { score: Some(Score::Softmax), values: 4, dispatch: false };
        launch(Kernel::Gating(kernel), [blocks, 1, 1], blocks.into(), &args);
        weights.read::<u32>()
    };
    assert_eq!(weights(1), weights(5));
}

/// What the kernels' headers state: instructions of a warp for a token, by the difference of two launches. Masks, 16-bit logits and garbage cost
/// nothing where they are not asked for.
#[test]
fn instructions_of_a_token() {
    let all = |score, experts: usize, top_k: usize, tokens: usize| {
        let values = *Gate::VALUES.iter().find(|&&values| 32 * values as usize >= experts).unwrap();
        let logits = Input::new(&Logits::Normal.draw(&mut Random::new(3), tokens * experts));
        let (ids, weights) = (Output::new::<i32>(tokens * top_k), Output::new::<f32>(tokens * top_k));
        let mut args = vec![Arg::In(&logits), Arg::Null, Arg::Out(&ids), Arg::Out(&weights)];
        args.extend([tokens as u32, experts as u32, top_k as u32, 1, 1, 0].map(Arg::U32));
        args.extend([1.0, 0.0].map(Arg::F32));
        args.extend([Arg::Null, Arg::Null, Arg::U32(0)]);
        let kernel = Kernel::Gating(Gate { score: Some(score), values, dispatch: false });
        launch(kernel, [1, 1, 1], 0, &args).warp_instructions.iter().sum::<u64>()
    };
    for (score, experts, top_k, most) in [
        (Score::Softmax, 8, 2, 145),
        (Score::Softmax, 64, 8, 332),
        (Score::Softmax, 128, 8, 470),
        (Score::Softmax, 512, 10, 1184),
        (Score::Softmax, 4096, 4, 4828),
        (Score::TopkSoftmax, 32, 4, 148),
        (Score::TopkSoftmax, 128, 4, 230),
        (Score::Sigmoid, 128, 1, 122),
    ] {
        let got = (all(score, experts, top_k, 80) - all(score, experts, top_k, 40)) / 40;
        println!("{score:?}, {top_k} of {experts}: {got}");
        assert!(got <= most, "{score:?}, {top_k} of {experts}: {got} instructions, {most} before");
    }
}
