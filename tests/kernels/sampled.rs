//! Checks of `sampled_*`: experts drawn from the router's distribution.

use moe_kernels::In;
use moe_kernels::reference::sampled::gumbel_top_k;
use moe_kernels::registry::{Kernel, Spread};
use moe_kernels::routers::sampled::{self, SampledArgs, SampledDesc};
use moe_kernels::rules::{NoiseSource, SamplingRule};

use crate::noise_state::State;
use crate::noisy::{Logits, assert_same_bits};
use crate::support::buffer::Guarded;
use crate::support::compare::{LOGARITHMS, Shares, assert_weights};
use crate::support::device;
use crate::support::inputs::run_seed;
use crate::timing::time;
use crate::tokens::Padding;

pub fn check(variant: Spread, rng: &mut fastrand::Rng) {
    let most = variant.max_experts() as usize;
    let least = Spread::ALL.iter().map(|s| s.max_experts() as usize).filter(|&e| e < most).max().unwrap_or(0) + 1;
    // Somewhere between: over the seeds every register holds some lanes' experts and not the others'.
    for experts in [least, rng.usize(least..=most), most - 1, most] {
        for (tokens, top_k) in [(1, 1), (37, 2), (300, 3), (70, 8), (20, 32)] {
            let tokens = if experts > 512 { tokens.min(40) } else { tokens };
            for kind in Logits::ALL {
                let noise = NoiseSource::new(rng.u64(..), rng.u64(..));
                let inverse_temperature = [1.0, 0.5, 40.0, 0.0][rng.usize(..4)];
                let rule = SamplingRule::new(top_k.min(experts), noise).inverse_temperature(inverse_temperature);
                case(variant, rng, &SampledDesc::new(tokens, experts, rule), kind);
            }
        }
    }
    if variant.team == 2 {
        // More tokens than blocks, so that a block goes from one to the next.
        let blocks = 4 * (variant.resident_blocks() * device::kernels().device().multiprocessors) as usize;
        case(variant, rng, &SampledDesc::new(blocks + 70, least, rule(3, 1.0)), Logits::Skewed);
    }
    if most == 32 {
        pairs_come_as_often_as_the_formula_says();
        certain_and_even_policies();
        many_tokens(rng);
    }
}

struct Got {
    ids: Vec<i32>,
    weights: Vec<f32>,
    log_probabilities: Vec<f32>,
    entropy: Vec<f32>,
    perturbed: Vec<f32>,
}

impl Got {
    fn bits(&self) -> Vec<u32> {
        let floats = [&self.weights, &self.log_probabilities, &self.entropy, &self.perturbed];
        let ids = self.ids.iter().map(|&id| id as u32);
        floats.into_iter().flatten().map(|value| value.to_bits()).chain(ids).collect()
    }
}

fn launch(desc: &SampledDesc, logits: &[f32], state: &State) -> Got {
    launch_padded(desc, logits, state, &Padding::none(desc.tokens))
}

fn launch_padded(desc: &SampledDesc, logits: &[f32], state: &State, padding: &Padding) -> Got {
    let (kernels, stream) = (device::kernels(), device::stream());
    let choices = desc.tokens * desc.rule.top_k;
    let input = Guarded::input(&stream, "logits", logits);
    let mut ids = Guarded::<i32>::ids(&stream, "ids", choices);
    let mut weights = Guarded::<f32>::output(&stream, "weights", choices);
    let mut logs = Guarded::<f32>::output(&stream, "log_probabilities", choices);
    let mut entropy = Guarded::<f32>::output(&stream, "entropy", desc.tokens);
    let mut perturbed = Guarded::<f32>::output(&stream, "perturbed", desc.tokens * desc.experts);
    let mut run = |rest: bool| {
        ids.reset(&stream);
        [&mut weights, &mut logs, &mut entropy, &mut perturbed].into_iter().for_each(|buffer| buffer.reset(&stream));
        let (logits, mut to, mut weights_to) = (input.view(), ids.view_mut(), weights.view_mut());
        let (mut logs_to, mut entropy_to, mut perturbed_to) =
            (logs.view_mut(), entropy.view_mut(), perturbed.view_mut());
        let state = state.view();
        padding.with(|mask| {
            let mut args = SampledArgs::new(&logits, &mut to, &mut weights_to).mask(mask);
            args.noise_state = state.as_ref().map(In::from);
            if rest {
                args = args.log_probabilities(&mut logs_to).entropy(&mut entropy_to).perturbed(&mut perturbed_to);
            }
            sampled::forward(kernels, &stream, desc, args).unwrap();
        });
        if !rest {
            [&logs, &entropy, &perturbed].into_iter().for_each(|buffer| buffer.assert_unchanged(&stream));
        }
        Got {
            ids: ids.read(&stream),
            weights: weights.read(&stream),
            log_probabilities: logs.read(&stream),
            entropy: entropy.read(&stream),
            perturbed: perturbed.read(&stream),
        }
    };
    let got = run(true);
    assert!(got.bits() == run(true).bits(), "{desc:?}: another run gave other bits");
    let alone = run(false);
    assert_eq!(alone.ids, got.ids, "{desc:?}: other ids without the rest");
    assert_same_bits(&format!("{desc:?}: weights without the rest"), &alone.weights, &got.weights);
    time(&stream, &format!("{desc:?}"), || drop(run(true)));
    input.assert_unchanged(&stream);
    state.assert_unchanged();
    got
}

fn assert_logarithms(name: &str, got: &[f32], want: &[f64]) {
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let near = (f64::from(g) - w).abs() <= LOGARITHMS * w.abs().max(1.0) || f64::from(g) == w;
        assert!(near || (g.is_nan() && w.is_nan()), "{name}[{i}]: {g:e}, want {w:e}");
    }
}

fn case(variant: Spread, rng: &mut fastrand::Rng, desc: &SampledDesc, kind: Logits) {
    let selection = sampled::select(desc, device::kernels().device()).unwrap();
    assert_eq!(selection.kernel.variant(), Kernel::Sampled(variant));
    let state = State::draw(rng);
    let name = format!("{desc:?} {kind:?} {state:?}");
    let (logits, _) = kind.draw(rng, desc.tokens * desc.experts, desc.experts);
    let mut drawn = desc.rule;
    drawn.noise = state.of(drawn.noise);
    let mut want = gumbel_top_k(&logits, desc.experts, &drawn).unwrap();
    let padding = Padding::draw(&device::stream(), rng, desc.tokens);
    let name = format!("{name} {}", padding.name());
    let got = launch_padded(desc, &logits, &state, &padding);
    padding.assert_unchanged(&device::stream());
    let top_k = desc.rule.top_k;
    for t in (0..desc.tokens).filter(|&t| !padding.valid[t]) {
        want.ids[t * top_k..][..top_k].fill(-1);
        want.weights[t * top_k..][..top_k].fill(0.0);
        want.log_probabilities[t * top_k..][..top_k].fill(0.0);
        want.entropy[t] = 0.0;
        // Not written: the junk of before.
        want.perturbed[t * desc.experts..][..desc.experts].fill(f32::from_bits(u32::MAX));
    }
    assert_same_bits(&format!("{name}: perturbed"), &got.perturbed, &want.perturbed);
    assert_eq!(got.ids, want.ids, "{name}: ids");
    assert_weights(&name, &got.weights, &want.weights, Shares::Softmax(desc.experts), 0);
    assert_logarithms(&format!("{name}: log-probabilities"), &got.log_probabilities, &want.log_probabilities);
    assert_logarithms(&format!("{name}: entropy"), &got.entropy, &want.entropy);
}

fn rule(top_k: usize, inverse_temperature: f32) -> SamplingRule {
    SamplingRule::new(top_k, NoiseSource::new(run_seed(), 23)).inverse_temperature(inverse_temperature)
}

/// Ordered pairs of 4 experts: `P(a, b) = p_a p_b / (1 - p_a)`. Chi-square of 11 degrees of freedom exceeds 52 for fewer than 1 of 10^6 seeds
/// (the upper tail at 52 is 2.7e-7). The log-probabilities that the device writes are those of the same formula.
fn pairs_come_as_often_as_the_formula_says() {
    const DRAWS: usize = 16384;
    let p = [0.4f64, 0.3, 0.2, 0.1];
    let logits: Vec<f32> = p.iter().map(|p| (p.ln() / 2.0) as f32).collect();
    let desc = SampledDesc::new(DRAWS, 4, rule(2, 2.0));
    let got = launch(&desc, &logits.repeat(DRAWS), &State::NONE);
    let mut chi_square = 0.0;
    for a in 0..4 {
        for b in (0..4).filter(|&b| b != a) {
            let chance = p[a] * p[b] / (1.0 - p[a]);
            let pairs = got.ids.chunks(2).zip(got.log_probabilities.chunks(2));
            let of_this: Vec<_> = pairs.filter(|(ids, _)| **ids == [a as i32, b as i32]).collect();
            for (_, logs) in &of_this {
                assert!(((f64::from(logs[0]) + f64::from(logs[1])).exp() / chance - 1.0).abs() <= LOGARITHMS);
            }
            let expected = chance * DRAWS as f64;
            chi_square += (of_this.len() as f64 - expected).powi(2) / expected;
        }
    }
    assert!(chi_square < 52.0, "chi-square {chi_square}");
    let entropy = -p.iter().map(|p| p * p.ln()).sum::<f64>();
    assert!(got.entropy.iter().all(|&found| (f64::from(found) - entropy).abs() <= LOGARITHMS));
}

fn certain_and_even_policies() {
    let certain = launch(&SampledDesc::new(1, 4, rule(2, 1e3)), &[0.0, 5.0, 1.0, f32::NEG_INFINITY], &State::NONE);
    assert_eq!((certain.ids, certain.weights), (vec![1, 2], vec![1.0, 0.0]));
    // What is left after the first draw is as certain, though the policy gives it nothing.
    assert_eq!((certain.log_probabilities, certain.entropy), (vec![0.0, 0.0], vec![0.0]));
    let even = launch(&SampledDesc::new(1, 4, rule(4, 0.0)), &[0.0, 5.0, 1.0, 2.0], &State::NONE);
    for (log, left) in even.log_probabilities.iter().zip([4f32, 3.0, 2.0, 1.0]) {
        assert!(f64::from((log + left.ln()).abs()) <= LOGARITHMS, "{log}");
    }
    let desc = SampledDesc::new(0, 4, rule(2, 1.0));
    assert!(launch(&desc, &[], &State::NONE).ids.is_empty());
}

/// Close to 2^20 tokens.
fn many_tokens(rng: &mut fastrand::Rng) {
    let desc = SampledDesc::new((1 << 20) - 5, 3, rule(1, 1.0));
    let (logits, _) = Logits::Skewed.draw(rng, desc.tokens * 3, 3);
    let stream = device::stream();
    let input = stream.clone_htod(&logits).unwrap();
    let mut ids = Guarded::<i32>::ids(&stream, "ids", desc.tokens);
    let mut weights = Guarded::<f32>::output(&stream, "weights", desc.tokens);
    let (mut to, mut weights_to) = (ids.view_mut(), weights.view_mut());
    let args = SampledArgs::new(&input, &mut to, &mut weights_to);
    sampled::forward(device::kernels(), &stream, &desc, args).unwrap();
    let want = gumbel_top_k(&logits, 3, &desc.rule).unwrap();
    assert!(ids.read(&stream) == want.ids, "ids of many tokens");
}
