//! Checks of `noisy_grouped_*`: the hierarchical mixture of experts, all three launches of it.

use moe_kernels::reference::noisy::{hierarchical_of as reference, noise_deviation};
use moe_kernels::registry::{Kernel, Noisy, Spread};
use moe_kernels::routers::hierarchical::{self, HierarchicalArgs, HierarchicalDesc, PrimaryOutputs};
use moe_kernels::routers::noisy::{NoisyLogits, NoisySums};
use moe_kernels::rules::{NoiseSource, NoisyRule};
use moe_kernels::{In, Workspace};

use crate::noise_state::State;
use crate::noisy::{
    Got, Logits, assert_finite, assert_loss, assert_same_bits, assert_sums, of_tokens, tokens_of_parts,
};
use crate::support::buffer::Guarded;
use crate::support::compare::{Shares, assert_weights};
use crate::support::device;
use crate::timing::time;
use crate::tokens::Padding;

pub fn check(variant: Noisy, rng: &mut fastrand::Rng) {
    let most = variant.spread.max_experts() as usize;
    let least = Spread::ALL.iter().map(|s| s.max_experts() as usize).filter(|&e| e < most).max().unwrap_or(0) + 1;
    // Somewhere between: over the seeds every register holds some lanes' experts and not the others'.
    for experts in [least, rng.usize(least..=most), most] {
        let fit = 4096 / experts;
        for (tokens, groups, primary_k, k) in
            [(1, 1, 1, 1), (203, 5, 2, 3), (70, 16, 4, 8), (40, 3, 1, 32), (90, 300, 2, 2), (20, 64, 32, 1)]
        {
            let groups = groups.min(fit);
            let tokens = if experts > 512 { tokens.min(40) } else { tokens };
            for kind in Logits::ALL {
                let mut rule = |top_k: usize, of: usize| {
                    let epsilon = if rng.bool() { 1e-2 } else { 0.0 };
                    NoisyRule::new(top_k.min(of), NoiseSource::new(rng.u64(..), rng.u64(..))).noise_epsilon(epsilon)
                };
                let (primary, secondary) = (rule(primary_k, groups), rule(k, experts));
                case(variant, rng, &HierarchicalDesc::new(tokens, groups, experts, primary, secondary), kind);
            }
        }
    }
    // More than 16 parts of one group, of which a warp adds up 16 at a time.
    let rule = |top_k| NoisyRule::new(top_k, NoiseSource::new(3, 4)).noise_epsilon(1e-2);
    let desc = HierarchicalDesc::new(tokens_of_parts(variant.spread), 1, least, rule(1), rule(2.min(least)));
    case(variant, rng, &desc, Logits::Skewed);
    if most == 32 {
        balanced();
        no_tokens();
    }
}

/// `clean` and `raw` of both levels.
struct Inputs {
    primary: (Vec<f32>, Vec<f32>),
    secondary: (Vec<f32>, Vec<f32>),
}

/// Both levels; the first is itself a noisy gating.
fn launch(desc: &HierarchicalDesc, inputs: &Inputs, state: &State, padding: &Padding) -> (Got, Got) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let HierarchicalDesc { tokens, groups, experts, primary, secondary, .. } = *desc;
    let (all, slots) = (groups * experts, tokens * primary.top_k);
    let input = |name, values: &[f32]| Guarded::input(&stream, name, values);
    let (primary_clean, primary_raw) =
        (input("primary clean", &inputs.primary.0), input("primary raw", &inputs.primary.1));
    let (clean, raw) = (input("clean", &inputs.secondary.0), input("raw", &inputs.secondary.1));
    let ints = |name, len| Guarded::<i32>::output(&stream, name, len);
    let floats = |name, len| Guarded::<f32>::output(&stream, name, len);
    let (mut first_ids, mut first_counts) = (ints("primary.ids", slots), ints("primary.counts", groups));
    let mut first = [
        floats("primary.weights", slots),
        floats("primary.noisy", tokens * groups),
        floats("primary.thresholds", 2 * tokens),
        floats("primary.importance", groups),
        floats("primary.load", groups),
        floats("primary.losses", 2),
    ];
    let (mut ids, mut counts) = (ints("ids", slots * secondary.top_k), ints("counts", all));
    let mut second = [
        floats("weights", slots * secondary.top_k),
        floats("noisy", slots * experts),
        floats("thresholds", 2 * slots),
        floats("importance", all),
        floats("load", all),
        floats("losses", 2),
    ];
    let bytes = hierarchical::workspace_bytes(desc, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    let mut run = |rest: bool| {
        [&mut first_ids, &mut first_counts, &mut ids, &mut counts].into_iter().for_each(|buffer| buffer.reset(&stream));
        first.iter_mut().chain(&mut second).for_each(|buffer| buffer.reset(&stream));
        let [primary_weights, primary_noisy, primary_thresholds, primary_importance, primary_load, primary_losses] =
            &mut first.each_mut().map(|buffer| buffer.view_mut());
        let [weights, noisy, thresholds, importance, load, losses] =
            &mut second.each_mut().map(|buffer| buffer.view_mut());
        let inputs = [&primary_clean, &primary_raw, &clean, &raw].map(Guarded::view);
        let [first_ids_to, first_counts_to, ids_to, counts_to] =
            &mut [&mut first_ids, &mut first_counts, &mut ids, &mut counts].map(Guarded::view_mut);
        let state = state.view();
        padding.with(|mask| {
            let sums = NoisySums::new(first_counts_to, primary_importance, primary_load, primary_losses);
            let mut primary = PrimaryOutputs::new(first_ids_to, primary_weights, sums);
            if rest {
                primary = primary.noisy(primary_noisy).thresholds(primary_thresholds);
            }
            let args = HierarchicalArgs::new(
                NoisyLogits::apart(&inputs[0], &inputs[1]),
                NoisyLogits::apart(&inputs[2], &inputs[3]),
                primary,
                ids_to,
                weights,
                NoisySums::new(counts_to, importance, load, losses),
                &mut workspace,
            );
            let mut args = if rest { args.noisy(noisy).thresholds(thresholds) } else { args };
            args.noise_state = state.as_ref().map(In::from);
            hierarchical::forward(kernels, &stream, desc, args.mask(mask)).unwrap();
        });
        if !rest {
            [&first[1], &first[2], &second[1], &second[2]]
                .into_iter()
                .for_each(|unasked| unasked.assert_unchanged(&stream));
        }
        let read = |ids: &Guarded<i32>, counts: &Guarded<i32>, rest: &[Guarded<f32>; 6]| {
            let [weights, noisy, thresholds, importance, load, losses] =
                rest.each_ref().map(|buffer| buffer.read(&stream));
            let (ids, counts) = (ids.read(&stream), counts.read(&stream));
            Got { ids, weights, noisy, thresholds, counts, importance, load, losses }
        };
        (read(&first_ids, &first_counts, &first), read(&ids, &counts, &second))
    };
    let (got, mut again) = (run(true), run(false));
    for (again, got) in [(&mut again.0, &got.0), (&mut again.1, &got.1)] {
        (again.noisy, again.thresholds) = (got.noisy.clone(), got.thresholds.clone());
    }
    let bits = |got: &(Got, Got)| (got.0.bits(), got.1.bits());
    assert!(bits(&got) == bits(&again), "{desc:?}: another run, without the rest, gave other bits");
    time(&stream, &format!("{desc:?}"), || drop(run(true)));
    [&primary_clean, &primary_raw, &clean, &raw].iter().for_each(|input| input.assert_unchanged(&stream));
    state.assert_unchanged();
    got
}

fn case(variant: Noisy, rng: &mut fastrand::Rng, desc: &HierarchicalDesc, kind: Logits) {
    let selection = hierarchical::select(desc, device::kernels().device()).unwrap();
    assert_eq!(selection.secondary.kernel.variant(), Kernel::Noisy(variant));
    let state = State::draw(rng);
    let name = format!("{desc:?} {kind:?} {state:?}");
    let HierarchicalDesc { tokens, groups, experts, mut primary, mut secondary, .. } = *desc;
    [&mut primary, &mut secondary].into_iter().for_each(|rule| rule.noise = state.of(rule.noise));
    let inputs = Inputs {
        primary: kind.draw(rng, tokens * groups, groups),
        secondary: kind.draw(rng, tokens * groups * experts, experts),
    };
    let padding = Padding::draw(&device::stream(), rng, tokens);
    let name = format!("{name} {}", padding.name());
    let (mut first, mut got) = launch(desc, &inputs, &state, &padding);
    padding.assert_unchanged(&device::stream());
    of_tokens(&name, &padding, &mut first, groups, primary.top_k, 1);
    of_tokens(&name, &padding, &mut got, primary.top_k * experts, primary.top_k * secondary.top_k, primary.top_k);
    let valid: Vec<usize> = (0..tokens).filter(|&token| padding.valid[token]).collect();
    let (clean, raw) = &inputs.secondary;
    let want = reference(
        &inputs.primary.0,
        &inputs.primary.1,
        groups,
        &primary,
        clean,
        raw,
        experts,
        &secondary,
        &padding.valid,
    )
    .unwrap();
    assert_eq!(first.ids, want.primary.ids, "{name}: groups");
    assert_same_bits(&format!("{name}: H of groups"), &first.noisy, &want.primary.noisy);
    assert_sums(&format!("{name}: load of groups"), &first.load, &want.primary.load);
    assert_eq!(got.ids, want.ids, "{name}: ids");
    assert_weights(&name, &got.weights, &want.weights, Shares::Product(primary.top_k, secondary.top_k), 0);
    assert_eq!(got.counts, want.counts, "{name}: counts");
    [&first, &got].into_iter().for_each(|level| assert_finite(&name, level));
    assert_sums(&format!("{name}: importance"), &got.importance, &want.importance);
    assert_sums(&format!("{name}: load"), &got.load, &want.load);
    assert_loss(&format!("{name}: importance loss"), got.losses[0], &got.importance);
    assert_loss(&format!("{name}: load loss"), got.losses[1], &got.load);
    // H of the rows of chosen groups, by the library's own noise.
    for (row, &group) in got.noisy.chunks(experts).zip(&first.ids).take(9) {
        let slot = (row.as_ptr() as usize - got.noisy.as_ptr() as usize) / (4 * experts);
        let token = valid[slot / primary.top_k];
        let at = (token * groups + group as usize) * experts;
        let of = |e: usize| {
            let noise = hierarchical::noise(secondary.noise, token as u32, group as u32, e as u32);
            noise.mul_add(noise_deviation(raw[at + e], secondary.noise_epsilon), clean[at + e])
        };
        let want: Vec<f32> = (0..experts).map(of).collect();
        assert_same_bits(&format!("{name}: H of slot {slot}"), row, &want);
        let mut falling: Vec<f32> = want.into_iter().filter(|h| !h.is_nan()).collect();
        falling.sort_by(|a, b| b.total_cmp(a));
        for (threshold, place) in got.thresholds[2 * slot..][..2].iter().zip([secondary.top_k - 1, secondary.top_k]) {
            let of_none = if place >= experts { f32::NEG_INFINITY } else { f32::NAN };
            let want = falling.get(place).copied().unwrap_or(of_none);
            assert!(
                *threshold == want || (threshold.is_nan() && want.is_nan()),
                "{name}: threshold {threshold}, {want}"
            );
        }
    }
}

/// Each token prefers one group and one expert in it, evenly: all four losses vanish.
fn balanced() {
    let rule = NoisyRule::new(1, NoiseSource::new(5, 6)).noise_epsilon(0.0);
    let desc = HierarchicalDesc::new(96, 6, 4, rule, rule);
    let prefers = |e: usize, of: usize| if e == of { 4.0f32 } else { 0.0 };
    let primary: Vec<f32> = (0..96 * 6).map(|i| prefers(i % 6, i / 6 % 6)).collect();
    let secondary: Vec<f32> = (0..96 * 24).map(|i| prefers(i % 4, i / 24 / 6 % 4)).collect();
    let quiet = |like: &Vec<f32>| vec![-200.0; like.len()];
    let inputs =
        Inputs { primary: (primary.clone(), quiet(&primary)), secondary: (secondary.clone(), quiet(&secondary)) };
    let (first, got) = launch(&desc, &inputs, &State::NONE, &Padding::none(96));
    assert_eq!((first.counts, got.counts), (vec![16; 6], vec![4; 24]));
    assert_eq!((first.losses, got.losses), (vec![0.0; 2], vec![0.0; 2]));
    assert_eq!((got.importance, got.load), (vec![4.0; 24], vec![4.0; 24]));
}

fn no_tokens() {
    let rule = NoisyRule::new(1, NoiseSource::new(5, 6)).noise_epsilon(0.0);
    let desc = HierarchicalDesc::new(0, 6, 4, rule, rule);
    let (kernels, stream) = (device::kernels(), device::stream());
    let nothing = stream.alloc_zeros::<f32>(1).unwrap();
    let mut ids = [stream.alloc_zeros::<i32>(1).unwrap(), stream.alloc_zeros::<i32>(1).unwrap()];
    let mut weights = [stream.alloc_zeros::<f32>(1).unwrap(), stream.alloc_zeros::<f32>(1).unwrap()];
    let mut counts = [6, 24].map(|len| Guarded::<i32>::output(&stream, "counts", len));
    let mut sums = [6, 6, 2, 24, 24, 2].map(|len| Guarded::<f32>::output(&stream, "sums", len));
    let bytes = hierarchical::workspace_bytes(&desc, kernels.device()).unwrap();
    {
        let [importance, load, losses, all_importance, all_load, all_losses] =
            &mut sums.each_mut().map(|buffer| buffer.view_mut());
        let [primary_counts, all_counts] = &mut counts.each_mut().map(|buffer| buffer.view_mut());
        let [primary_ids, ids] = &mut ids;
        let [primary_weights, weights] = &mut weights;
        let mut workspace = Workspace::new(&stream, bytes).unwrap();
        let sums = NoisySums::new(primary_counts, importance, load, losses);
        let args = HierarchicalArgs::new(
            NoisyLogits::together(&nothing),
            NoisyLogits::together(&nothing),
            PrimaryOutputs::new(primary_ids, primary_weights, sums),
            ids,
            weights,
            NoisySums::new(all_counts, all_importance, all_load, all_losses),
            &mut workspace,
        );
        hierarchical::forward(kernels, &stream, &desc, args).unwrap();
    }
    assert!(counts.iter().all(|counts| counts.read(&stream).iter().all(|&count| count == 0)));
    assert!(sums.iter().all(|sums| sums.read(&stream).iter().all(|&sum| sum == 0.0)));
}
