//! Checks of `admission_*`: GShard, GLaM, V-MoE and Switch orders, overflow, the random second expert.

use moe_kernels::capacity::admission::{self, AdmissionArgs, AdmissionDesc};
use moe_kernels::reference::admission::Admitted;
use moe_kernels::registry::{Admission, Dispatch, Kernel};
use moe_kernels::rules::{AdmissionRule, NoiseSource, Order, Renormalise, SecondExpert, Sequences, capacity};
use moe_kernels::{In, Workspace, reference};

use crate::noise_state::State;
use crate::support::buffer::Guarded;
use crate::support::device;
use crate::timing::time;

pub fn check(variant: Admission, rng: &mut fastrand::Rng) {
    let most = variant.max_experts as usize;
    let small = most == Dispatch::MAX_EXPERTS[0] as usize;
    let expert_counts = if small { vec![1, 7, 64, most] } else { vec![1025, most] };
    for experts in expert_counts {
        for (tokens, candidates, group) in [(1, 1, 1), (67, 2, 67), (300, 2, 100), (130, 4, 33), (515, 3, 600)] {
            for (order, passed_on) in
                [(Order::ByToken, false), (Order::ByToken, true), (Order::ByChoice, false), (Order::ByChoice, true)]
            {
                let candidates = candidates.min(experts);
                let top_k = if passed_on { 1 + rng.usize(..candidates) } else { candidates };
                let noise = NoiseSource::new(rng.u64(..), rng.u64(..));
                let threshold = [0.0, 0.25, 0.5, 1.0][rng.usize(..4)];
                let second = match (top_k, rng.u32(..3)) {
                    (2, 1) => SecondExpert::Above(threshold),
                    (2, 2) => SecondExpert::Random { threshold, noise },
                    _ => SecondExpert::Always,
                };
                let epsilon = [0.0, 1e-7, 0.8][rng.usize(..3)];
                let renormalise =
                    [None, Some(Renormalise::Plus(epsilon)), Some(Renormalise::AtLeast(epsilon))][rng.usize(..3)];
                let capacity = capacity(group.min(tokens), experts, top_k, [0.5, 1.0, 2.0][rng.usize(..3)]);
                let alternate = tokens.is_multiple_of(group) && rng.bool();
                let rule = AdmissionRule::new(experts, top_k, capacity, group)
                    .candidates(candidates)
                    .groups(if alternate { Sequences::Alternating } else { Sequences::Following })
                    .order(order)
                    .prioritised(rng.bool())
                    .second(second)
                    .renormalise(renormalise);
                case(variant, rng, &AdmissionDesc::new(tokens, rule));
            }
        }
    }
    // Several warps propose to few favourites, who refuse most.
    for _ in 0..3 {
        for prioritised in [false, true] {
            let rule = AdmissionRule::new(most, 1, 3, 400).candidates(3).prioritised(prioritised);
            case(variant, rng, &AdmissionDesc::new(400, rule));
        }
    }
    if small {
        frequency_of_the_second_expert();
        very_many_tokens(rng);
    }
}

/// Distinct choices of each token, with a favourite expert in half of the cases; one in ten is no expert and asks for nothing.
fn choices(rng: &mut fastrand::Rng, desc: &AdmissionDesc) -> Vec<i32> {
    let (experts, candidates) = (desc.rule.experts, desc.rule.candidates);
    let skewed = rng.bool();
    let mut ids = Vec::with_capacity(desc.tokens * candidates);
    for _ in 0..desc.tokens {
        let mut row: Vec<i32> = Vec::with_capacity(candidates);
        while row.len() < candidates {
            let range = if skewed && rng.bool() { experts.min(candidates) } else { experts };
            let id = rng.usize(..range) as i32;
            if !row.contains(&id) {
                row.push(id);
            }
        }
        let nothing = [-1, i32::MIN, i32::MAX, experts as i32];
        ids.extend(row.into_iter().map(|id| if rng.u32(..10) == 0 { nothing[rng.usize(..4)] } else { id }));
    }
    ids
}

fn launch(desc: &AdmissionDesc, ids: &[i32], weights: &[f32], priority: Option<&[f32]>, state: &State) -> Admitted {
    let (kernels, stream) = (device::kernels(), device::stream());
    let input_ids = Guarded::input(&stream, "ids", ids);
    let input_weights = Guarded::input(&stream, "weights", weights);
    let input_priority = priority.map(|values| Guarded::input(&stream, "priority", values));
    let places = desc.tokens * desc.rule.top_k;
    let mut admitted = Guarded::output(&stream, "admitted", places);
    let mut admitted_weights = Guarded::output(&stream, "admitted_weights", places);
    let mut workspace = Workspace::new(&stream, admission::workspace_bytes(desc).unwrap()).unwrap();
    let mut run = || {
        admitted.reset(&stream);
        admitted_weights.reset(&stream);
        let (ids, weights, priority) =
            (input_ids.view(), input_weights.view(), input_priority.as_ref().map(Guarded::view));
        let (mut to, mut weights_to) = (admitted.view_mut(), admitted_weights.view_mut());
        let mut args = AdmissionArgs::new(&ids, &weights, &mut to, &mut weights_to, &mut workspace);
        args.priority = priority.as_ref().map(In::from);
        let state = state.view();
        args.noise_state = state.as_ref().map(In::from);
        admission::forward(kernels, &stream, desc, args).unwrap();
        Admitted { ids: admitted.read(&stream), weights: admitted_weights.read(&stream) }
    };
    let got = run();
    let again = run();
    assert_eq!(got.ids, again.ids, "{desc:?}: another run admitted otherwise");
    assert_eq!(bits(&got.weights), bits(&again.weights), "{desc:?}: another run gave other bits");
    time(&stream, &format!("{desc:?}"), || drop(run()));
    input_ids.assert_unchanged(&stream);
    input_weights.assert_unchanged(&stream);
    state.assert_unchanged();
    got
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn case(variant: Admission, rng: &mut fastrand::Rng, desc: &AdmissionDesc) {
    let rule = &desc.rule;
    let selection = admission::select(desc, device::kernels().device()).unwrap();
    assert_eq!(selection.kernel.variant(), Kernel::Admission(variant));
    let ids = choices(rng, desc);
    // Few distinct values, so that priorities tie; some are not numbers.
    let mut values = |len: usize| -> Vec<f32> {
        (0..len)
            .map(|_| match rng.u32(..40) {
                0 => f32::NAN,
                1 if rule.renormalise.is_none() => f32::NEG_INFINITY,
                2 => -0.0,
                n => (n % 13) as f32 / 13.0,
            })
            .collect()
    };
    let weights = values(ids.len());
    let own = values(desc.tokens);
    let priority = (rule.prioritised && desc.tokens % 2 == 1).then_some(own.as_slice());
    let (mut drawn, mut state) = (*rule, State::NONE);
    if let SecondExpert::Random { noise, .. } = &mut drawn.second {
        state = State::draw(rng);
        *noise = state.of(*noise);
    }
    let want = reference::admission::admit(&ids, &weights, priority, &drawn).unwrap();
    let got = launch(desc, &ids, &weights, priority, &state);
    assert_eq!(got.ids, want.ids, "{desc:?} {state:?}: ids");
    if rule.renormalise.is_none() {
        assert_eq!(bits(&got.weights), bits(&want.weights), "{desc:?} {state:?}: weights");
    } else {
        // A quotient is good to an ulp.
        for (got, want) in got.weights.iter().zip(&want.weights) {
            let near = (got - want).abs() <= 2.0 * f32::EPSILON * want.abs() || (got.is_nan() && want.is_nan());
            assert!(near, "{desc:?} {state:?}: weight {got:e} is not {want:e}");
        }
    }
    // GShard's promise, of the device's own output.
    let groups = desc.tokens.div_ceil(rule.tokens_per_group);
    let mut taken = vec![0; groups * rule.experts];
    for (t, got) in got.ids.chunks(rule.top_k).enumerate() {
        let group = if rule.groups == Sequences::Alternating { t % groups } else { t / rule.tokens_per_group };
        got.iter().filter(|&&id| id >= 0).for_each(|&id| taken[group * rule.experts + id as usize] += 1);
    }
    assert!(taken.iter().all(|&taken| taken <= rule.capacity), "{desc:?}: an expert took more than its capacity");
}

/// One group of 2^20 tokens, more turns than 2^16 by far, overflow passed on in either order.
fn very_many_tokens(rng: &mut fastrand::Rng) {
    const TOKENS: usize = 1 << 20;
    let ids: Vec<i32> = (0..TOKENS)
        .flat_map(|_| {
            // The favourite overflows, and so does whom it passes tokens on to.
            let first = if rng.u32(..4) > 0 { 0 } else { rng.i32(0..4) };
            [first, (first + rng.i32(1..4)) % 4]
        })
        .collect();
    let weights = vec![1.0; ids.len()];
    for order in [Order::ByToken, Order::ByChoice] {
        let rule = AdmissionRule::new(4, 1, capacity(TOKENS, 4, 1, 1.0), TOKENS).candidates(2).order(order);
        let want = reference::admission::admit(&ids, &weights, None, &rule).unwrap();
        let got = launch(&AdmissionDesc::new(TOKENS, rule), &ids, &weights, None, &State::NONE);
        assert!(got.ids == want.ids && bits(&got.weights) == bits(&want.weights), "{rule:?}");
        assert!(want.ids.contains(&-1), "some token finds both its experts full");
    }
}

/// A second expert of weight g is asked for with probability `min(1, g / threshold)`.
///
/// Each count of n = 4096 draws lies within 5 standard deviations of its mean: a false alarm in fewer than 1 of 300 000
/// seeds for the 5 weights together (normal tail 5.7e-7 each).
fn frequency_of_the_second_expert() {
    const DRAWS: usize = 4096;
    const WEIGHTS: [f32; 5] = [0.05, 0.125, 0.25, 0.375, 0.6];
    let noise = NoiseSource::new(crate::support::inputs::run_seed(), 3);
    let second = SecondExpert::Random { threshold: 0.5, noise };
    let rule = AdmissionRule::new(2, 2, DRAWS, DRAWS).order(Order::ByChoice).second(second);
    let tokens = DRAWS * WEIGHTS.len();
    let ids: Vec<i32> = (0..tokens).flat_map(|_| [0, 1]).collect();
    let weights: Vec<f32> = (0..tokens).flat_map(|t| [1.0, WEIGHTS[t / DRAWS]]).collect();
    let got = launch(&AdmissionDesc::new(tokens, rule), &ids, &weights, None, &State::NONE);
    for (of_weight, weight) in got.ids.chunks(2 * DRAWS).zip(WEIGHTS) {
        let sent = of_weight.iter().filter(|&&id| id == 1).count() as f64;
        let p = (f64::from(weight) / 0.5).min(1.0);
        let deviation = (DRAWS as f64 * p * (1.0 - p)).sqrt();
        assert!((sent - DRAWS as f64 * p).abs() <= 5.0 * deviation, "weight {weight}: {sent} of {DRAWS}");
    }
}
