//! Checks of `gating_backward_any` and `scale_sums`: rules, losses and batches that the common models' kernel does not know, all drawn at
//! once, against the reference.

use moe_kernels::reference::balance::cv_squared_gradient;
use moe_kernels::reference::gating::{BackwardInputs, GateGradients, Inputs, LossInputs, gate_backward_by, gate_by};
use moe_kernels::registry::Kernel;
use moe_kernels::routers::gating_backward::{self, GatingBackwardArgs, GatingBackwardDesc};
use moe_kernels::rules::{
    Appended, AppendedWeight, ChoiceBy, Gating, LogitRule, LossGradient, LossScore, Renormalise, Score, Sequences,
};
use moe_kernels::{Error, In, Kernels, Out, Workspace};

use crate::gating_backward::parts_of;
use crate::support::buffer::Guarded;
use crate::support::compare::{GATING_GRADIENT, GATING_SCALE_GRADIENT};
use crate::support::device;
use crate::support::inputs::normal;
use crate::timing::time;
use crate::tokens::{LogitsOn, Padding};

pub fn check(rng: &mut fastrand::Rng) {
    for (tokens, experts, top_k) in [(1, 1, 1), (37, 8, 2), (10, 33, 5), (3, 130, 30), (2, 70, 50), (300, 4, 1)] {
        for score in Score::ALL {
            for by in [
                None,
                Some(Renormalise::Plus(0.0)),
                Some(Renormalise::Plus(0.25)),
                Some(Renormalise::AtLeast(0.618_034)),
                Some(Renormalise::PNorm(f32::INFINITY)),
                Some(Renormalise::PNorm(2.5)),
            ] {
                for kind in [Logits::Normal, Logits::Extreme, Logits::Equal] {
                    let desc = draw(rng, score, by, [tokens, experts, top_k]);
                    let case = Case::new(rng, desc, kind);
                    let got = case.run(rng);
                    case.compare(&got);
                }
            }
        }
    }
    crate::choice_backward::within_gating(rng);
    large_joint_logits(rng);
    mixer_by_hand(rng);
    one_choice_has_none(rng);
    a_balanced_batch_has_none(rng);
    no_tokens();
    refuses(rng);
}

/// Without a grid's barrier the sums are a launch of their own: few and many choices and experts.
pub fn check_scale_sums(rng: &mut fastrand::Rng) {
    let kernels = Kernels::new(&device::context()).unwrap().without_cooperative_launch();
    for (tokens, experts, top_k) in [(1, 1, 1), (700, 5, 2), (90, 40, 8), (2000, 3, 3)] {
        for score in [Score::Softmax, Score::Sigmoid] {
            for appended in [false, true] {
                let columns = Appended::new(2, AppendedWeight::Column);
                let of_all = appended || score == Score::Sigmoid;
                let gating = Gating::new(score)
                    .renormalise(Some(Renormalise::Plus(0.5)))
                    .expert_scale(appended || !of_all || rng.bool())
                    .global_scale(of_all)
                    .appended((appended && score == Score::Sigmoid).then_some(columns));
                let desc = GatingBackwardDesc::new(tokens, experts, top_k, gating).accumulate(rng.bool());
                let case = Case::new(rng, desc, Logits::Normal);
                let got = case.run_on(&kernels, rng);
                case.compare(&got);
            }
        }
    }
}

/// Something that no common rule has, or batches that its kernel does not take.
fn draw(
    rng: &mut fastrand::Rng,
    score: Score,
    by: Option<Renormalise>,
    [tokens, experts, top_k]: [usize; 3],
) -> GatingBackwardDesc {
    let mixes = score == Score::SparseMixer;
    let top_k = if mixes { top_k.min(2) } else { top_k };
    let columns = !mixes && score != Score::Softmax && rng.bool();
    let weight = if columns { AppendedWeight::Column } else { AppendedWeight::Fixed(0.75) };
    let appended = rng.bool().then(|| Appended::new(1 + rng.usize(..2), weight));
    let gating = Gating::new(score)
        .renormalise(by)
        .scale(if rng.bool() { 1.0 } else { 2.5 })
        .jitter([0.01, 0.15, 2.0][rng.usize(..3)])
        .expert_scale(rng.bool())
        .global_scale(rng.bool())
        .appended(appended);
    let loss = LossGradient::new([LossScore::Softmax, LossScore::Sigmoid, LossScore::PlainSigmoid][rng.usize(..3)]);
    let mut maybe = |value: f32| if rng.bool() { value } else { 0.0 };
    let loss = loss.balance(maybe(0.5)).z(maybe(0.1)).importance(maybe(0.2)).sequence(maybe(0.3));
    let each = (1..=tokens).filter(|n| tokens.is_multiple_of(*n)).nth(rng.usize(..2)).unwrap_or(1);
    let loss = match rng.bool() {
        true => loss.tokens_per_sequence(each).sequences(Sequences::Alternating),
        false => loss.tokens_per_sequence(1 + rng.usize(..tokens + 2)),
    };
    let rule = LogitRule::PLAIN.factor([1.0, 0.5][rng.usize(..2)]).softcap([None, Some(30.0)][rng.usize(..2)]);
    let desc = GatingBackwardDesc::new(tokens, experts, top_k.min(experts), gating)
        .losses(rng.bool().then_some(loss))
        .parts([1, 1, 2][rng.usize(..3)])
        .accumulate(rng.bool())
        .logit_rule(rule);
    let selected = gating_backward::select(&desc, device::kernels().device()).unwrap().kernel.variant();
    if selected == (Kernel::GatingBackward { any: true }) {
        desc
    } else {
        desc.logit_rule(LogitRule::PLAIN.factor(0.5))
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Logits {
    Normal,
    /// Far apart, with -Inf, and rows of garbage.
    Extreme,
    /// Ties everywhere.
    Equal,
}

struct Case {
    desc: GatingBackwardDesc,
    logits: Vec<f32>,
    on_device: LogitsOn,
    padding: Padding,
    ids: Vec<i32>,
    /// Sums of all parts.
    d_weights: Vec<f32>,
    in_parts: Vec<f32>,
    expert_scale: Vec<f32>,
    global_scale: f32,
    counts: Vec<i32>,
    counted: Option<u32>,
    importance: Vec<f32>,
    sequence_counts: Vec<i32>,
    /// None: all tokens of each count.
    sequence_tokens: Option<Vec<u32>>,
    /// What results hold before: logits, factors of experts, the factor of all.
    before: [Vec<f32>; 3],
    name: String,
}

impl Case {
    fn new(rng: &mut fastrand::Rng, desc: GatingBackwardDesc, kind: Logits) -> Case {
        let stream = device::stream();
        let GatingBackwardDesc { tokens, experts, top_k, gating, .. } = desc;
        let columns = experts + gating.appended_columns();
        let choices = top_k + gating.appended_experts();
        let mut logits: Vec<f32> = (0..tokens * columns)
            .map(|_| match kind {
                Logits::Normal => normal(rng) as f32,
                Logits::Extreme => [-60.0, -3.0, 0.0, 20.0, 0.5, f32::NEG_INFINITY][rng.usize(..6)],
                Logits::Equal => 0.75,
            })
            .collect();
        if kind == Logits::Extreme && tokens > 3 {
            logits[..columns].fill(f32::NAN);
            logits[columns..2 * columns].fill(f32::NEG_INFINITY);
            logits[2 * columns] = f32::INFINITY;
            logits[3 * columns + rng.usize(..columns)] = f32::NAN;
        }
        let on_device = LogitsOn::draw(&stream, rng, &mut logits);
        let padding = Padding::draw(&stream, rng, tokens);
        let mut ids = choose(&logits, &desc, None);
        for (at, id) in ids.iter_mut().enumerate() {
            // Turned away, or chosen of what has no probability.
            let logit = logits.get(at / choices * columns + *id as usize);
            if rng.u32(..6) == 0 || (*id < columns as i32 && logit == Some(&f32::NEG_INFINITY)) {
                *id = [-1, i32::MIN, (experts + 7) as i32][rng.usize(..3)];
            }
        }
        if tokens > 5 {
            ids[5 * choices..6 * choices].fill(-1);
        }
        let known =
            |at: usize, id: i32| (0..(if at % choices < top_k { experts } else { columns }) as i32).contains(&id);
        let d_weights: Vec<f32> = ids
            .iter()
            .enumerate()
            // What is not chosen has any gradient.
            .map(|(at, &id)| if known(at, id) { normal(rng) as f32 } else { f32::NAN })
            .collect();
        let (in_parts, d_weights) = parts_of(rng, &d_weights, desc.parts);
        let sequences = desc.sequences();
        let numbers = |rng: &mut fastrand::Rng, len: usize| (0..len).map(|_| 0.5 + rng.f32()).collect::<Vec<f32>>();
        let before = [tokens * columns, experts, 1].map(|len| (0..len).map(|_| normal(rng) as f32).collect());
        let sequence_tokens = rng.bool().then(|| (0..sequences).map(|_| rng.u32(..4)).collect());
        Case {
            logits,
            ids,
            d_weights,
            in_parts,
            expert_scale: numbers(rng, experts),
            global_scale: 1.25,
            counts: (0..experts).map(|_| rng.i32(0..9)).collect(),
            counted: Some(tokens.div_ceil(2) as u32).filter(|_| desc.losses.is_some() && rng.bool()),
            importance: numbers(rng, experts),
            sequence_counts: (0..sequences * experts).map(|_| rng.i32(0..9)).collect(),
            sequence_tokens,
            before,
            name: format!("{desc:?} {kind:?}, {} logits, {}", on_device.name(), padding.name()),
            desc,
            on_device,
            padding,
        }
    }

    fn has(&self, factor: fn(&LossGradient) -> f32) -> bool {
        self.desc.losses.as_ref().is_some_and(|losses| factor(losses) != 0.0)
    }

    fn run(&self, rng: &mut fastrand::Rng) -> [Vec<f32>; 3] {
        self.run_on(device::kernels(), rng)
    }

    /// Launches twice: gradients of logits, of factors of experts and of the factor of all.
    fn run_on(&self, kernels: &Kernels, rng: &mut fastrand::Rng) -> [Vec<f32>; 3] {
        let stream = device::stream();
        let Case { desc, name, .. } = self;
        let gating = &desc.gating;
        let floats = |what, values: &[f32]| Guarded::input(&stream, what, values);
        let ints = |what, values: &[i32]| Guarded::input(&stream, what, values);
        let given = [
            floats("d_weights", &self.in_parts),
            floats("expert_scale", &self.expert_scale),
            floats("global_scale", &[self.global_scale]),
            floats("importance", &self.importance),
        ];
        let lists =
            [ints("ids", &self.ids), ints("counts", &self.counts), ints("sequence_counts", &self.sequence_counts)];
        let counted = Guarded::input(&stream, "counted", &[self.counted.unwrap_or(0)]);
        let lengths = Guarded::input(&stream, "sequence_tokens", self.sequence_tokens.as_deref().unwrap_or(&[0]));
        let mut workspace = Workspace::new(&stream, gating_backward::workspace_bytes(desc).unwrap()).unwrap();
        // Each of the two may be asked for alone.
        let [of_experts, of_all] =
            [gating.expert_scale && (!gating.global_scale || rng.u32(..4) > 0), gating.global_scale];
        let mut launch = || {
            let mut out = [("d_logits", 0), ("d_expert_scale", 1), ("d_global_scale", 2)].map(|(what, i)| {
                if desc.accumulate {
                    Guarded::filled_output(&stream, what, &self.before[i], 0)
                } else {
                    Guarded::<f32>::output(&stream, what, self.before[i].len())
                }
            });
            {
                let [d_weights, expert_scale, global_scale, importance] = [0, 1, 2, 3].map(|i| given[i].view());
                let [ids, counts, sequence_counts] = [0, 1, 2].map(|i| lists[i].view());
                let (counted, lengths) = (counted.view(), lengths.view());
                let [d_logits, d_expert, d_global] = &mut out;
                let (mut d_logits, mut d_expert, mut d_global) =
                    (d_logits.view_mut(), d_expert.view_mut(), d_global.view_mut());
                self.on_device.with(|logits| {
                    self.padding.with(|mask| {
                        let mut args = GatingBackwardArgs::new(logits, &ids, &d_weights, &mut d_logits).mask(mask);
                        args.expert_scale = gating.expert_scale.then(|| In::from(&expert_scale));
                        args.global_scale = gating.global_scale.then(|| In::from(&global_scale));
                        args.counts = self.has(|losses| losses.balance).then(|| In::from(&counts));
                        args.counted = self.counted.map(|_| In::from(&counted));
                        args.importance = self.has(|losses| losses.importance).then(|| In::from(&importance));
                        if self.has(|losses| losses.sequence) {
                            args.sequence_counts = Some(In::from(&sequence_counts));
                            args.sequence_tokens = self.sequence_tokens.as_ref().map(|_| In::from(&lengths));
                        }
                        args.d_expert_scale = of_experts.then(|| Out::from(&mut d_expert));
                        args.d_global_scale = of_all.then(|| Out::from(&mut d_global));
                        args.workspace = (of_experts || of_all).then_some(&mut workspace);
                        gating_backward::forward(kernels, &stream, desc, args).unwrap();
                    });
                });
            }
            let asked = [true, of_experts, of_all];
            let mut asked = asked.into_iter();
            out.map(|out| if asked.next().unwrap() { out.read(&stream) } else { Vec::new() })
        };
        let got = launch();
        let bits = |of: &[Vec<f32>; 3]| of.each_ref().map(|of| of.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
        assert_eq!(bits(&got), bits(&launch()), "{name}: another run gave other bits");
        time(&stream, name, || drop(launch()));
        given.iter().for_each(|buffer| buffer.assert_unchanged(&stream));
        lists.iter().for_each(|buffer| buffer.assert_unchanged(&stream));
        self.on_device.assert_unchanged(&stream);
        self.padding.assert_unchanged(&stream);
        got
    }

    fn want(&self, d_weights: &[f64]) -> GateGradients {
        let GatingBackwardDesc { tokens, experts, top_k, gating, losses, logit_rule, .. } = self.desc;
        let wide = |values: &[f32]| values.iter().map(|&v| v.into()).collect::<Vec<f64>>();
        let (expert_scale, importance) = (wide(&self.expert_scale), wide(&self.importance));
        let full = |s: usize| {
            let losses = losses.unwrap();
            match losses.sequences {
                Sequences::Following => (tokens - s * losses.tokens_per_sequence).min(losses.tokens_per_sequence),
                _ => losses.tokens_per_sequence,
            }
        };
        let lengths: Vec<usize> = match &self.sequence_tokens {
            Some(lengths) => lengths.iter().map(|&n| n as usize).collect(),
            None => (0..self.desc.sequences()).map(|s| losses.map_or(1, |_| full(s))).collect(),
        };
        let losses = losses.map(|rule| LossInputs {
            rule,
            counts: &self.counts,
            counted: self.counted.map_or(tokens, |n| n as usize),
            importance: &importance,
            sequence_counts: &self.sequence_counts,
            sequence_tokens: &lengths,
        });
        let masked = self.padding.valid.iter().any(|valid| !valid) || self.padding.name().contains("true");
        let inputs = BackwardInputs {
            expert_scale: gating.expert_scale.then_some(&expert_scale[..]),
            global_scale: gating.global_scale.then_some(self.global_scale.into()),
            valid: masked.then_some(&self.padding.valid[..]),
            logit_rule,
            losses,
        };
        gate_backward_by(&self.logits, &self.ids, d_weights, experts, top_k, &gating, inputs).unwrap()
    }

    fn compare(&self, got: &[Vec<f32>; 3]) {
        let Case { desc, name, logits, .. } = self;
        let &GatingBackwardDesc { tokens, experts, top_k, gating, logit_rule, .. } = desc;
        let (columns, choices) = (experts + gating.appended_columns(), top_k + gating.appended_experts());
        let d: Vec<f64> = self.d_weights.iter().map(|&d| d.into()).collect();
        let want = self.want(&d);
        let factor = f64::from(gating.scale) * f64::from(self.global_scale) * 1.5 * f64::from(logit_rule.factor);
        let importance = |losses: &LossGradient| {
            let wide: Vec<f64> = self.importance.iter().map(|&v| v.into()).collect();
            let largest = cv_squared_gradient(&wide).into_iter().map(f64::abs).fold(0.0, f64::max);
            // A difference of sums, of the order of the slope.
            f64::from(losses.importance) * (largest + 2.0 / experts as f64)
        };
        let of_losses = desc.losses.map_or(0.0, |losses| {
            // h and its mean, which cancel, at most 8 slots an expert; the slope of z is its whole size.
            let counted = self.counted.map_or(tokens, |n| n as usize) as f64;
            let balance = 8.0 * f64::from(losses.balance) * experts as f64 / (counted * counted);
            let sequence = 8.0 * f64::from(losses.sequence) * experts as f64 / top_k as f64;
            balance + sequence + 2.0 * f64::from(losses.z) / counted * 25.0
        });
        for t in 0..tokens {
            let row = &want.logits[t * columns..][..columns];
            let upstream = d[t * choices..][..choices].iter().filter(|d| d.is_finite());
            let upstream = upstream.map(|d| d * d).sum::<f64>().sqrt()
                + desc.losses.as_ref().map_or(0.0, importance) * (choices as f64).sqrt();
            let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
            let scale = of_losses + norm.max(factor * upstream * self.largest_weight(t));
            for (e, &want) in row.iter().enumerate() {
                let i = t * columns + e;
                let before = if desc.accumulate { f64::from(self.before[0][i]) } else { 0.0 };
                // What the cap leaves of a logit near it is a difference from 1.
                let bound = GATING_GRADIENT * (scale + before.abs());
                let error = (f64::from(got[0][i]) - want - before).abs();
                assert!(
                    error <= bound,
                    "{name}: token {t} {:?}, ids {:?}, expert {e} is {}, want {}, off by {error:e} > {bound:e}",
                    &logits[t * columns..][..columns],
                    &self.ids[t * choices..][..choices],
                    got[0][i],
                    want + before
                );
            }
        }
        // The same sums of magnitudes.
        let magnitudes: Vec<f64> = d.iter().map(|d| if d.is_finite() { d.abs() } else { 0.0 }).collect();
        let terms = magnitudes.iter().sum::<f64>() * f64::from(gating.scale) * 2.0 * self.largest_weight_of_all();
        let more = desc.losses.as_ref().map_or(0.0, importance) * (tokens * choices) as f64 * f64::from(gating.scale);
        let bound = GATING_SCALE_GRADIENT * (terms + more + 4.0);
        for (which, want) in [(1, &want.expert_scale[..]), (2, &[want.global_scale][..])] {
            for (e, &got) in got[which].iter().enumerate() {
                let before = if desc.accumulate { f64::from(self.before[which][e]) } else { 0.0 };
                let error = (f64::from(got) - want[e] - before).abs();
                assert!(
                    error <= bound,
                    "{name}: factor {which} of {e} is {got}, want {}, off by {error:e}",
                    want[e] + before
                );
            }
        }
    }

    fn weights(&self, t: usize) -> Vec<f64> {
        let &GatingBackwardDesc { experts, top_k, gating, .. } = &self.desc;
        let columns = experts + gating.appended_columns();
        let choices = top_k + gating.appended_experts();
        let rule = gating.choice(ChoiceBy::Given).scale(1.0).expert_scale(false).global_scale(false);
        let ids = &self.ids[t * choices..][..top_k];
        let row = &self.logits[t * columns..][..columns];
        gate_by(row, experts, top_k, &rule, Inputs { given: Some(ids), ..Inputs::default() }).unwrap().weights
    }

    fn largest_weight(&self, t: usize) -> f64 {
        self.weights(t).into_iter().filter(|weight| weight.is_finite()).fold(0.0, f64::max)
    }

    fn largest_weight_of_all(&self) -> f64 {
        (0..self.desc.tokens).map(|t| self.largest_weight(t)).fold(0.0, f64::max)
    }
}

/// Ids that the rule chooses, with appended experts behind them.
fn choose(logits: &[f32], desc: &GatingBackwardDesc, bias: Option<&[f64]>) -> Vec<i32> {
    let rule = desc.gating.expert_scale(false).global_scale(false);
    let inputs = Inputs { correction_bias: bias, ..Inputs::default() };
    gate_by(logits, desc.experts, desc.top_k, &rule, inputs).unwrap().ids
}

fn plain(rng: &mut fastrand::Rng, desc: GatingBackwardDesc, logits: &[f32], ids: &[i32]) -> Case {
    let mut case = Case::new(rng, desc, Logits::Normal);
    case.logits = logits.to_vec();
    case.ids = ids.to_vec();
    case.padding = Padding::none(desc.tokens);
    case.on_device = LogitsOn::F32(Guarded::input(&device::stream(), "logits", logits));
    case.d_weights = ids.iter().map(|_| normal(rng) as f32).collect();
    case.in_parts = case.d_weights.clone();
    case
}

/// Shares of sigmoids that are all 1: a factor of all that is taken out of them must not make them vanish.
fn large_joint_logits(rng: &mut fastrand::Rng) {
    let gating = Gating::new(Score::Sigmoid)
        .renormalise(Some(Renormalise::Plus(0.0)))
        .appended(Some(Appended::new(1, AppendedWeight::Column)));
    let desc = GatingBackwardDesc::new(2, 3, 2, gating);
    let logits = [150.0, 120.0, 90.0, 140.0, 0.5, -1.0, 160.0, 2.0];
    let ids = choose(&logits, &desc, None);
    let case = plain(rng, desc, &logits, &ids);
    let got = case.run(rng);
    case.compare(&got);
}

/// Three experts of which two are near: p (d - dot) over those; the second round without the first.
fn mixer_by_hand(rng: &mut fastrand::Rng) {
    let desc = GatingBackwardDesc::new(1, 3, 2, Gating::new(Score::SparseMixer).jitter(0.3));
    // (1 - 0.5) / 1 is below 0.6, (1 + 2) / 2 is above; then (0.5 + 2) / 2 is.
    let case = plain(rng, desc, &[1.0, 0.5, -2.0], &[0, 1]);
    let got = case.run(rng);
    let p = 1.0 / (1.0 + (-0.5f64).exp());
    let want = p * (1.0 - p) * f64::from(case.d_weights[0]);
    for (got, want) in got[0].iter().zip([want, -want, 0.0]) {
        assert!((f64::from(*got) - want).abs() < 1e-6, "{got} {want}");
    }
    case.compare(&got);
}

/// Exactly none, whatever is rounded.
fn one_choice_has_none(rng: &mut fastrand::Rng) {
    for score in Score::ALL {
        for by in [Renormalise::Plus(0.0), Renormalise::PNorm(f32::INFINITY)] {
            let gating = Gating::new(score).renormalise(Some(by)).expert_scale(true);
            let desc = GatingBackwardDesc::new(40, 5, 1, gating);
            let logits: Vec<f32> = (0..200).map(|_| 3.0 * normal(rng) as f32).collect();
            let ids = choose(&logits, &desc, None);
            let case = plain(rng, desc, &logits, &ids);
            let got = case.run(rng);
            assert!(got[0].iter().all(|&d| d == 0.0), "{score:?} {by:?}: {:?}", got[0]);
        }
    }
}

/// Equal importance is the least: no gradient, and no number that is none.
fn a_balanced_batch_has_none(rng: &mut fastrand::Rng) {
    let losses = LossGradient::new(LossScore::Softmax).importance(1.0);
    let desc = GatingBackwardDesc::new(8, 4, 1, Gating::new(Score::Sigmoid)).losses(Some(losses));
    for importance in [0.0, 2.0] {
        let ids: Vec<i32> = (0..8).map(|t| t % 4).collect();
        let mut case = plain(rng, desc, &[0.25; 32], &ids);
        case.importance = vec![importance; 4];
        case.d_weights = vec![0.0; 8];
        case.in_parts = case.d_weights.clone();
        case.counted = None;
        assert!(case.run(rng)[0].iter().all(|&d| d == 0.0));
    }
}

/// Nothing is launched; what sums over tokens is 0.
fn no_tokens() {
    let (kernels, stream) = (device::kernels(), device::stream());
    let desc = GatingBackwardDesc::new(0, 4, 2, Gating::new(Score::Softmax).expert_scale(true).global_scale(true));
    let (none, no_ids) = (Guarded::input(&stream, "none", &[0f32; 4]), Guarded::input(&stream, "ids", &[0i32]));
    let mut out = [("d_logits", 1), ("d_expert_scale", 4), ("d_global_scale", 1)]
        .map(|(what, len)| Guarded::<f32>::output(&stream, what, len));
    let mut workspace = Workspace::new(&stream, gating_backward::workspace_bytes(&desc).unwrap()).unwrap();
    {
        let (none, no_ids) = (none.view(), no_ids.view());
        let [d_logits, d_expert, d_global] = &mut out;
        let (mut d_logits, mut d_expert, mut d_global) =
            (d_logits.view_mut(), d_expert.view_mut(), d_global.view_mut());
        let args = GatingBackwardArgs::new(&none, &no_ids, &none, &mut d_logits)
            .expert_scale(&none)
            .global_scale(&none)
            .d_expert_scale(&mut d_expert)
            .d_global_scale(&mut d_global)
            .workspace(&mut workspace);
        gating_backward::forward(kernels, &stream, &desc, args).unwrap();
    }
    assert_eq!(out[1].read(&stream), [0.0; 4]);
    assert_eq!(out[2].read(&stream), [0.0]);
}

fn refuses(rng: &mut fastrand::Rng) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let logits = Guarded::input(&stream, "logits", &[normal(rng) as f32; 4]);
    let (ids, d) = (Guarded::input(&stream, "ids", &[0, 1]), Guarded::input(&stream, "d_weights", &[1.0f32; 2]));
    let refused = |gating: Gating, losses: Option<LossGradient>, set: &dyn Fn(&mut GatingBackwardArgs<'_>)| {
        let mut out = Guarded::<f32>::output(&stream, "d_logits", 4);
        let (logits, ids, d, mut to) = (logits.view(), ids.view(), d.view(), out.view_mut());
        let mut args = GatingBackwardArgs::new(&logits, &ids, &d, &mut to);
        set(&mut args);
        let desc = GatingBackwardDesc::new(2, 2, 1, gating).losses(losses);
        gating_backward::forward(kernels, &stream, &desc, args).unwrap_err()
    };
    let (plain, losses) = (Gating::new(Score::Softmax), LossGradient::new(LossScore::Softmax));
    let missing = |error: Error, of: &str| {
        assert!(matches!(&error, Error::Missing { argument, .. } if *argument == of), "{error}")
    };
    missing(refused(plain.expert_scale(true), None, &|_| ()), "expert_scale");
    missing(refused(plain.global_scale(true), None, &|_| ()), "global_scale");
    missing(refused(plain, Some(losses.importance(1.0)), &|_| ()), "importance");
    missing(refused(plain, Some(losses.sequence(1.0)), &|_| ()), "sequence_counts");
}
