//! Checks of `noisy_backward` and `noisy_backward_grouped` against the reference, whose own tests are finite differences.

use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use moe_kernels::experts::Dispatched;
use moe_kernels::reference::noisy::{self as reference, hierarchical_of, noisy_top_k};
use moe_kernels::routers::hierarchical::HierarchicalDesc;
use moe_kernels::routers::hierarchical_backward::{
    self, HierarchicalBackwardArgs, HierarchicalBackwardDesc, PrimaryInputs,
};
use moe_kernels::routers::noisy::NoisyLogits;
use moe_kernels::routers::noisy_backward::{self, NoisyBackwardArgs, NoisyBackwardDesc, NoisyGradients};
use moe_kernels::rules::{NoiseSource, NoisyRule};
use moe_kernels::{Error, In, Workspace};

use crate::gradients::{Results, row_norm, upstream};
use crate::noise_state::State;
use crate::noisy::Logits;
use crate::support::buffer::Guarded;
use crate::support::compare::to_f64;
use crate::support::device;
use crate::support::inputs::normal;

pub fn check(rng: &mut fastrand::Rng) {
    for (tokens, experts, top_k) in
        [(1, 1, 1), (37, 8, 2), (200, 5, 5), (60, 33, 4), (9, 130, 8), (5, 260, 32), (3, 1000, 1)]
    {
        for kind in Logits::ALL {
            for losses in [true, false] {
                let epsilon = if rng.bool() { 1e-2 } else { 0.0 };
                let noise = NoiseSource::new(rng.u64(..), rng.u64(..));
                let rule = NoisyRule::new(top_k, noise).noise_epsilon(epsilon);
                // Without noise to speak of a chance is a step: its slope is beyond f32 where it is at all.
                let load = if losses && kind != Logits::Ties { 0.3 } else { 0.0 };
                let importance = if losses { 0.5 } else { 0.0 };
                let desc = NoisyBackwardDesc::new(tokens, experts, rule).importance(importance).load(load);
                case(rng, desc, kind);
            }
        }
    }
    for experts in [70, 260] {
        let rule = NoisyRule::new(2, NoiseSource::new(rng.u64(..), rng.u64(..))).noise_epsilon(1e-2);
        let logits = one_is_next(rng, 18, experts);
        of_logits(rng, NoisyBackwardDesc::new(18, experts, rule).importance(0.5).load(0.3), logits, "one is next");
    }
    ties_of_thresholds(rng);
    one_choice_has_none(rng);
    by_slot(rng);
    refuses(rng);
}

/// Rows of three near one another, at each of many places in turn, and all others far below: where two are chosen, whoever overlooks the
/// next one takes a threshold that is far off.
fn one_is_next(rng: &mut fastrand::Rng, rows: usize, experts: usize) -> (Vec<f32>, Vec<f32>) {
    let mut clean: Vec<f32> = (0..rows * experts).map(|_| normal(rng) as f32 - 30.0).collect();
    for (row, clean) in clean.chunks_mut(experts).enumerate() {
        let next = (row * 32 + row / 4 * 5) % experts;
        clean[next] = 6.0;
        clean[(next + 1) % experts] = 6.25;
        clean[(next + 2 + rng.usize(..experts - 2)) % experts] = 6.5;
    }
    (clean, (0..rows * experts).map(|_| 0.5 + 0.1 * normal(rng) as f32).collect())
}

fn case(rng: &mut fastrand::Rng, desc: NoisyBackwardDesc, kind: Logits) {
    let logits = kind.draw(rng, desc.tokens * desc.experts, desc.experts);
    of_logits(rng, desc, logits, &format!("{kind:?}"));
}

fn of_logits(rng: &mut fastrand::Rng, desc: NoisyBackwardDesc, (clean, raw): (Vec<f32>, Vec<f32>), kind: &str) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let NoisyBackwardDesc { tokens, experts, rule, importance, load, .. } = desc;
    let state = State::draw(rng);
    let drawn = with_state(rule, &state);
    let gated = noisy_top_k(&clean, &raw, experts, &drawn).unwrap();
    let mut ids = gated.ids.clone();
    if tokens > 3 {
        ids[2 * rule.top_k..3 * rule.top_k].fill(-1);
    }
    let (d, d_wide) = upstream(rng, tokens * rule.top_k);
    // Sums as the device holds them; NaN among logits leaves them numbers.
    let narrow = |values: &[f64]| values.iter().map(|&v| v as f32).collect::<Vec<f32>>();
    let (importance_sums, load_sums) = (narrow(&gated.importance), narrow(&gated.load));
    let (d_load, d_load_wide) = upstream(rng, experts);
    let extra = (load != 0.0 && rng.bool()).then_some(&d_load_wide[..]);
    let together = rng.bool();
    let name = format!("{desc:?} {kind} {state:?} together {together}");
    let rows: Vec<f32> =
        (0..tokens).flat_map(|t| [&clean[t * experts..][..experts], &raw[t * experts..][..experts]].concat()).collect();
    let input = |what, values: &[f32]| Guarded::input(&stream, what, values);
    let inputs = [input("clean", &clean), input("raw", &raw), input("logits", &rows)];
    let sums = [input("importance", &importance_sums), input("load", &load_sums), input("d_load", &d_load)];
    let (ids_on, d_on) = (Guarded::input(&stream, "ids", &ids), input("d_weights", &d));
    let len = tokens * experts;
    let results = Results::draw(rng, &if together { vec![2 * len] } else { vec![len, len] });
    let desc = desc.accumulate(results.accumulate);
    let got = results.run(&name, |out| {
        let views = inputs.each_ref().map(Guarded::view);
        let [importance_sums, load_sums, d_load] = sums.each_ref().map(Guarded::view);
        let (ids, d) = (ids_on.view(), d_on.view());
        let state = state.view();
        let mut to: Vec<_> = out.iter_mut().map(Guarded::view_mut).collect();
        let (logits, to) = match to.as_mut_slice() {
            [both] => (NoisyLogits::together(&views[2]), NoisyGradients::together(both)),
            [clean, raw] => (NoisyLogits::apart(&views[0], &views[1]), NoisyGradients::apart(clean, raw)),
            _ => unreachable!(),
        };
        let mut args = NoisyBackwardArgs::new(logits, &ids, &d, to);
        args.noise_state = state.as_ref().map(In::from);
        args.importance = (importance != 0.0).then(|| In::from(&importance_sums));
        args.load = (load != 0.0).then(|| In::from(&load_sums));
        args.d_load = extra.map(|_| In::from(&d_load));
        noisy_backward::forward(kernels, &stream, &desc, args).unwrap();
    });
    let of = [&to_f64(&importance_sums)[..], &to_f64(&load_sums)[..]];
    let factors = [importance.into(), load.into()];
    let want = reference::noisy_backward(&clean, &raw, experts, &drawn, &ids, &d_wide, of, factors, extra).unwrap();
    // Slopes of losses are differences of sums; noise is at most 5.3.
    let least = of[1].iter().copied().fold(0.0, f64::max).max(1e-3);
    let slope = f64::from(load) * 4.0 / least + if extra.is_some() { 4.0 } else { 0.0 };
    let scale = |t: usize| {
        let steepest = (0..experts).map(|e| 1.0 / deviation(raw[t * experts + e], &rule)).fold(0.0, f64::max);
        6.0 * (row_norm(&d_wide, rule.top_k, t) + f64::from(importance) * 4.0) + slope * steepest.min(1e6)
    };
    if together {
        let both: Vec<f64> = (0..tokens)
            .flat_map(|t| [&want.clean[t * experts..][..experts], &want.raw[t * experts..][..experts]].concat())
            .collect();
        results.compare(&name, 0, &got[0], &both, 2 * experts, scale);
    } else {
        results.compare(&name, 0, &got[0], &want.clean, experts, scale);
        results.compare(&name, 1, &got[1], &want.raw, experts, scale);
    }
    inputs.iter().chain(&sums).for_each(|buffer| buffer.assert_unchanged(&stream));
}

fn with_state(mut rule: NoisyRule, state: &State) -> NoisyRule {
    rule.noise = state.of(rule.noise);
    rule
}

fn deviation(raw: f32, rule: &NoisyRule) -> f64 {
    let deviation = reference::noise_deviation(raw, rule.noise_epsilon);
    if deviation.is_finite() { deviation.into() } else { 1.0 }
}

/// Gradients of both products, apart, of choices that the reference makes.
fn plain(desc: &NoisyBackwardDesc, [clean, raw]: [&[f32]; 2], ids: &[i32], d: &[f32], d_load: &[f32]) -> [Vec<f32>; 2] {
    let (kernels, stream) = (device::kernels(), device::stream());
    let input = |what, values: &[f32]| Guarded::input(&stream, what, values);
    let inputs = [input("clean", clean), input("raw", raw), input("d_weights", d), input("d_load", d_load)];
    let ids = Guarded::input(&stream, "ids", ids);
    let mut out = [clean.len(), raw.len()].map(|len| Guarded::<f32>::output(&stream, "gradient", len));
    {
        let ([clean, raw, d, d_load], ids) = (inputs.each_ref().map(Guarded::view), ids.view());
        let [d_clean, d_raw] = &mut out.each_mut().map(Guarded::view_mut);
        let to = NoisyGradients::apart(d_clean, d_raw);
        let args = NoisyBackwardArgs::new(NoisyLogits::apart(&clean, &raw), &ids, &d, to).d_load(&d_load);
        noisy_backward::forward(kernels, &stream, desc, args).unwrap();
    }
    out.map(|out| out.read(&stream))
}

/// Equal logits, noise that moves none of them: the threshold of who is kept is the first of those that are not.
fn ties_of_thresholds(rng: &mut fastrand::Rng) {
    let rule = NoisyRule::new(2, NoiseSource::new(1, 2)).noise_epsilon(1e-20);
    let (clean, raw) = (vec![0.5f32; 2 * 40], vec![-200.0f32; 2 * 40]);
    let gated = noisy_top_k(&clean, &raw, 40, &rule).unwrap();
    assert_eq!(gated.ids, [0, 1, 0, 1]);
    // Of 1e-20 from 0.4 / 1e-20: ordinary numbers.
    let d_load: Vec<f32> = (0..40).map(|_| 1e-20 * rng.f32()).collect();
    let desc = NoisyBackwardDesc::new(2, 40, rule);
    let [got, _] = plain(&desc, [&clean, &raw], &gated.ids, &[0.0; 4], &d_load);
    let density = 0.398_942_3;
    let a = |e: usize| f64::from(d_load[e]) / 1e-20 * density;
    for t in 0..2 {
        for e in 0..40 {
            let want = match e {
                1 => a(1) - (2..40).map(a).sum::<f64>(),
                2 => a(2) - a(0) - a(1),
                _ => a(e),
            };
            let got = f64::from(got[t * 40 + e]);
            assert!((got - want).abs() < 2e-5, "token {t}, expert {e} is {got}, want {want}");
        }
    }
}

/// Exactly none through a gate that is always 1.
fn one_choice_has_none(rng: &mut fastrand::Rng) {
    let rule = NoisyRule::new(1, NoiseSource::new(3, 2)).noise_epsilon(1e-2);
    let (clean, raw) = Logits::Skewed.draw(rng, 30 * 7, 7);
    let ids = noisy_top_k(&clean, &raw, 7, &rule).unwrap().ids;
    let (d, _) = upstream(rng, 30);
    for got in plain(&NoisyBackwardDesc::new(30, 7, rule), [&clean, &raw], &ids, &d, &[0.0; 7]) {
        assert!(got.iter().all(|&d| d == 0.0), "{got:?}");
    }
}

/// Gradients that lie by slot are the same; one without a slot has none.
fn by_slot(rng: &mut fastrand::Rng) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let (tokens, experts, top_k) = (40, 6, 2);
    let rule = NoisyRule::new(top_k, NoiseSource::new(3, 2)).noise_epsilon(1e-2);
    let (clean, raw) = Logits::Skewed.draw(rng, tokens * experts, experts);
    let ids = noisy_top_k(&clean, &raw, experts, &rule).unwrap().ids;
    let order =
        DispatchDesc::new(tokens, experts, top_k, 16).capacity(Some(moe_kernels::rules::Capacity::new(5, tokens)));
    let mut dispatched = Dispatched::new(&stream, &order.shape()).unwrap();
    let mut workspace = Workspace::new(&stream, dispatch::workspace_bytes(&order, kernels.device()).unwrap()).unwrap();
    let ids_on = Guarded::input(&stream, "ids", &ids);
    dispatch::forward(kernels, &stream, &order, DispatchArgs::new(&ids_on.view(), &mut dispatched, &mut workspace))
        .unwrap();
    let token_slot = stream.clone_dtoh(dispatched.token_slot()).unwrap();
    assert!(token_slot.iter().any(|&slot| slot < 0), "nothing was turned away");
    let slots = dispatched.shape().slots;
    let (of_slots, _) = upstream(rng, slots);
    let of_choice = |&slot: &i32| usize::try_from(slot).map_or(0.0, |slot| of_slots[slot]);
    let d: Vec<f32> = token_slot[..tokens * top_k].iter().map(of_choice).collect();
    let desc = NoisyBackwardDesc::new(tokens, experts, rule);
    let want = plain(&desc, [&clean, &raw], &ids, &d, &vec![0.0; experts]);
    let inputs = [("clean", &clean), ("raw", &raw), ("d_weights", &of_slots)]
        .map(|(what, values)| Guarded::input(&stream, what, values));
    let mut out = [0; 2].map(|_| Guarded::<f32>::output(&stream, "gradient", tokens * experts));
    {
        let ([clean, raw, d], ids) = (inputs.each_ref().map(Guarded::view), ids_on.view());
        let [d_clean, d_raw] = &mut out.each_mut().map(Guarded::view_mut);
        let to = NoisyGradients::apart(d_clean, d_raw);
        let args = NoisyBackwardArgs::new(NoisyLogits::apart(&clean, &raw), &ids, &d, to).dispatched(&dispatched);
        noisy_backward::forward(kernels, &stream, &desc, args).unwrap();
    }
    assert_eq!(out.map(|out| out.read(&stream)), want);
}

fn refuses(rng: &mut fastrand::Rng) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let (values, _) = upstream(rng, 4);
    let input = Guarded::input(&stream, "logits", &values);
    let ids = Guarded::input(&stream, "ids", &[0, 1]);
    let mut out = [0; 2].map(|_| Guarded::<f32>::output(&stream, "gradient", 4));
    let rule = NoisyRule::new(1, NoiseSource::new(3, 2));
    let (input, ids) = (input.view(), ids.view());
    let [d_clean, d_raw] = &mut out.each_mut().map(Guarded::view_mut);
    let logits = NoisyLogits::apart(&input, &input);
    let args = NoisyBackwardArgs::new(logits, &ids, &input, NoisyGradients::apart(d_clean, d_raw));
    let desc = NoisyBackwardDesc::new(2, 2, rule).load(1.0);
    let error = noisy_backward::forward(kernels, &stream, &desc, args).unwrap_err();
    assert!(matches!(error, Error::Missing { argument: "load", .. }), "{error}");
}

pub fn check_grouped(rng: &mut fastrand::Rng) {
    for (tokens, groups, experts, primary_k, top_k) in
        [(1, 1, 1, 1, 1), (50, 5, 8, 2, 3), (23, 3, 33, 1, 4), (12, 16, 4, 4, 4), (6, 2, 140, 2, 16)]
    {
        for kind in [Logits::Skewed, Logits::NotFinite] {
            for losses in [true, false] {
                let noise = [0, 1].map(|_| NoiseSource::new(rng.u64(..), rng.u64(..)));
                let rules = |top_k| {
                    let of = |which, top_k| NoisyRule::new(top_k, noise[which]).noise_epsilon(1e-2);
                    HierarchicalDesc::new(tokens, groups, experts, of(0, primary_k), of(1, top_k))
                };
                let forward = rules(top_k);
                let desc = HierarchicalBackwardDesc::new(forward);
                let desc = match losses {
                    true => desc.primary_importance(0.5).primary_load(0.25).importance(0.4).load(0.3),
                    false => desc,
                };
                let padded = rng.bool();
                let logits = kind.draw(rng, tokens * groups * experts, experts);
                grouped(rng, desc, logits, &format!("{kind:?}"), padded);
                if experts > 128 && losses && kind == Logits::Skewed {
                    let desc = HierarchicalBackwardDesc::new(rules(2)).importance(0.4).load(0.3);
                    let logits = one_is_next(rng, tokens * groups, experts);
                    grouped(rng, desc, logits, "one is next", false);
                }
            }
        }
    }
}

/// Rows of tokens that are valid, at their places among all; `empty` in the others'.
fn spread<T: Copy>(rows: &[T], valid: &[bool], empty: T) -> Vec<T> {
    let count = valid.iter().filter(|&&valid| valid).count();
    let width = rows.len().checked_div(count).unwrap_or_default();
    let mut rows = rows.chunks(width.max(1));
    let mut row = |valid| if valid { rows.next().expect("a row each").to_vec() } else { vec![empty; width] };
    valid.iter().flat_map(|&valid| row(valid)).collect()
}

fn grouped(
    rng: &mut fastrand::Rng,
    desc: HierarchicalBackwardDesc,
    (clean, raw): (Vec<f32>, Vec<f32>),
    kind: &str,
    padded: bool,
) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let HierarchicalDesc { tokens, groups, experts, primary, secondary, .. } = desc.forward;
    let all = groups * experts;
    let state = State::draw(rng);
    let name = format!("{desc:?} {kind} {state:?}");
    let first_logits = Logits::Skewed.draw(rng, tokens * groups, groups);
    let [drawn_first, drawn] = [primary, secondary].map(|rule| with_state(rule, &state));
    let valid: Vec<bool> = (0..tokens).map(|t| t == 0 || !padded || rng.u32(..3) > 0).collect();
    let mut gated =
        hierarchical_of(&first_logits.0, &first_logits.1, groups, &drawn_first, &clean, &raw, experts, &drawn, &valid)
            .unwrap();
    // Padding has ids -1 and weights 0, as the forward pass writes them.
    gated.ids = spread(&gated.ids, &valid, -1);
    gated.weights = spread(&gated.weights, &valid, 0.0);
    gated.primary.ids = spread(&gated.primary.ids, &valid, -1);
    gated.primary.weights = spread(&gated.primary.weights, &valid, 0.0);
    let each = primary.top_k * secondary.top_k;
    let (d, d_wide) = upstream(rng, tokens * each);
    // As the device holds them.
    let narrow = |values: &[f64]| values.iter().map(|&v| v as f32).collect::<Vec<f32>>();
    let mut rounded = gated.clone();
    let round = |values: &mut Vec<f64>| values.iter_mut().for_each(|v| *v = f64::from(*v as f32));
    let hierarchical = &mut rounded;
    [&mut hierarchical.importance, &mut hierarchical.load, &mut hierarchical.primary.importance]
        .into_iter()
        .for_each(round);
    [&mut hierarchical.primary.load, &mut hierarchical.primary.weights].into_iter().for_each(round);
    let input = |what, values: &[f32]| Guarded::input(&stream, what, values);
    let inputs = [
        input("primary clean", &first_logits.0),
        input("primary raw", &first_logits.1),
        input("clean", &clean),
        input("raw", &raw),
        input("d_weights", &d),
        input("primary.weights", &narrow(&gated.primary.weights)),
        input("primary.importance", &narrow(&gated.primary.importance)),
        input("primary.load", &narrow(&gated.primary.load)),
        input("importance", &narrow(&gated.importance)),
        input("load", &narrow(&gated.load)),
    ];
    let ints = |what, values: &[i32]| Guarded::input(&stream, what, values);
    let lists = [
        ints("primary.ids", &gated.primary.ids),
        ints("primary.counts", &gated.primary.counts),
        ints("ids", &gated.ids),
    ];
    let lengths = [tokens * groups, tokens * groups, tokens * all, tokens * all];
    let results = Results::draw(rng, &lengths);
    let desc = desc.accumulate(results.accumulate);
    let got = results.run(&name, |out| {
        let bytes = hierarchical_backward::workspace_bytes(&desc).unwrap();
        let mut workspace = Workspace::new(&stream, bytes).unwrap();
        let views: Vec<_> = inputs.iter().map(Guarded::view).collect();
        let [first_ids, counts, ids] = lists.each_ref().map(Guarded::view);
        let mut to: Vec<_> = out.iter_mut().map(Guarded::view_mut).collect();
        let [a, b, c, d] = to.as_mut_slice() else { unreachable!() };
        let state = state.view();
        let mut args = HierarchicalBackwardArgs::new(
            NoisyLogits::apart(&views[0], &views[1]),
            NoisyLogits::apart(&views[2], &views[3]),
            PrimaryInputs::new(&first_ids, &views[5], &counts, [&views[6], &views[7]]),
            &ids,
            &views[4],
            NoisyGradients::apart(a, b),
            NoisyGradients::apart(c, d),
            &mut workspace,
        );
        args.noise_state = state.as_ref().map(In::from);
        args.importance = (desc.importance != 0.0).then(|| In::from(&views[8]));
        args.load = (desc.load != 0.0).then(|| In::from(&views[9]));
        hierarchical_backward::forward(kernels, &stream, &desc, args).unwrap();
    });
    let factors = [desc.primary_importance, desc.primary_load, desc.importance, desc.load].map(f64::from);
    let first_of = [&first_logits.0[..], &first_logits.1[..]];
    let want = reference::hierarchical_backward(
        first_of,
        groups,
        &drawn_first,
        [&clean, &raw],
        experts,
        &drawn,
        &rounded,
        &d_wide,
        factors,
    )
    .unwrap();
    // Slopes of losses are differences of sums, divided by deviations of at least 1e-2.
    let steep = |factor: f64, sums: &[f64]| factor * 400.0 / sums.iter().copied().fold(0.0, f64::max).max(1e-2);
    let of_losses = steep(factors[1] + factors[3], &gated.primary.load)
        + steep(factors[3], &gated.load)
        + 8.0 * (factors[0] + factors[2]);
    let scale = |t: usize| 6.0 * row_norm(&d_wide, each, t) + of_losses;
    results.compare(&name, 0, &got[0], &want[0].clean, groups, scale);
    results.compare(&name, 1, &got[1], &want[0].raw, groups, scale);
    results.compare(&name, 2, &got[2], &want[1].clean, all, scale);
    results.compare(&name, 3, &got[3], &want[1].raw, all, scale);
    inputs.iter().for_each(|buffer| buffer.assert_unchanged(&stream));
}
