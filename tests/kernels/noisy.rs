//! Checks of `noisy_*`: noisy top-k gating.

use cudarc::driver::CudaSlice;
use moe_kernels::reference::balance::cv_squared;
use moe_kernels::reference::noisy::{noisy_top_k, noisy_top_k_of};
use moe_kernels::registry::{Kernel, Noisy, Spread};
use moe_kernels::routers::noisy::{self, NoisyArgs, NoisyDesc, NoisyLogits, NoisySums};
use moe_kernels::rules::{NoiseSource, NoisyRule};
use moe_kernels::{In, Workspace};

use crate::noise_state::State;
use crate::support::buffer::Guarded;
use crate::support::compare::{LOSS_OF_SUMS, LOSSES, NOISY_SUMS, NOISY_SUMS_OF_MANY, Shares, assert_weights, to_f64};
use crate::support::device;
use crate::support::inputs::{normal, run_seed};
use crate::timing::time;
use crate::tokens::Padding;

pub fn check(variant: Noisy, rng: &mut fastrand::Rng) {
    if variant.grouped {
        return crate::hierarchical::check(variant, rng);
    }
    let most = variant.spread.max_experts() as usize;
    let least = Spread::ALL.iter().map(|s| s.max_experts() as usize).filter(|&e| e < most).max().unwrap_or(0) + 1;
    // Somewhere between: over the seeds every register holds some lanes' experts and not the others'.
    for experts in [least, rng.usize(least..=most), most - 1, most] {
        for (tokens, top_k) in [(1, 1), (37, 2), (300, 4), (70, 8), (3, 32)] {
            let tokens = if experts > 512 { tokens.min(40) } else { tokens };
            for kind in Logits::ALL {
                let noise = NoiseSource::new(rng.u64(..), rng.u64(..));
                let noise_epsilon = if rng.bool() { 1e-2 } else { 0.0 };
                let rule = NoisyRule::new(top_k.min(experts), noise).noise_epsilon(noise_epsilon);
                case(variant, rng, &NoisyDesc::new(tokens, experts, rule), kind);
            }
        }
    }
    // More than 16 parts, of which a warp adds up 16 at a time.
    let desc = NoisyDesc::new(tokens_of_parts(variant.spread), least, rule(2.min(least), 1e-2));
    assert!(noisy::select(&desc, device::kernels().device(), true).unwrap().grid[0] > 16, "{desc:?}: few parts");
    case(variant, rng, &desc, Logits::Skewed);
    if variant.spread.team == 2 {
        // More tokens than blocks, so that a block goes from one to the next.
        let blocks = (variant.spread.resident_blocks() * device::kernels().device().multiprocessors) as usize;
        case(variant, rng, &NoisyDesc::new(blocks + 70, least, rule(3, 1e-2)), Logits::Skewed);
    }
    if most == 32 {
        pairs_come_as_often_as_the_formula_says();
        noise_is_normal();
        losses_of_a_balanced_and_of_a_one_sided_router();
        no_tokens();
        many_tokens(rng);
    }
}

/// Tokens that make 17 to 20 parts.
pub fn tokens_of_parts(spread: Spread) -> usize {
    if spread.team == 1 { 550 } else { 70 }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Logits {
    /// Normal; some experts are more popular.
    Skewed,
    /// Few distinct values and no noise to speak of: lower ids win.
    Ties,
    /// With NaN and infinities in both products.
    NotFinite,
}

impl Logits {
    pub const ALL: [Logits; 3] = [Logits::Skewed, Logits::Ties, Logits::NotFinite];

    /// `clean` and `raw`, rows of `experts`.
    pub fn draw(self, rng: &mut fastrand::Rng, len: usize, experts: usize) -> (Vec<f32>, Vec<f32>) {
        const ODD: [f32; 6] = [f32::NAN, f32::NEG_INFINITY, f32::INFINITY, f32::MAX, -0.0, 1e-41];
        let skew = |i: usize| -((i % experts + 1) as f32).ln();
        let mut value = |i: usize, raw: bool| match self {
            Logits::Skewed => normal(rng) as f32 + if raw { 0.0 } else { skew(i) },
            // softplus(-200) is 0, and a deviation of 2^-126 moves no logit.
            Logits::Ties if raw => -200.0,
            Logits::Ties => [-1.0, -0.0, 0.0, 0.5][rng.usize(..4)],
            Logits::NotFinite if rng.u32(..6) == 0 => ODD[rng.usize(..6)],
            Logits::NotFinite => 3.0 * normal(rng) as f32,
        };
        let clean = (0..len).map(|i| value(i, false)).collect();
        (clean, (0..len).map(|i| value(i, true)).collect())
    }
}

#[derive(Debug)]
pub struct Got {
    pub ids: Vec<i32>,
    pub weights: Vec<f32>,
    pub noisy: Vec<f32>,
    pub thresholds: Vec<f32>,
    pub counts: Vec<i32>,
    pub importance: Vec<f32>,
    pub load: Vec<f32>,
    pub losses: Vec<f32>,
}

impl Got {
    pub fn bits(&self) -> Vec<u32> {
        let floats = [&self.weights, &self.noisy, &self.thresholds, &self.importance, &self.load, &self.losses];
        let ints = self.ids.iter().chain(&self.counts).map(|&id| id as u32);
        floats.into_iter().flatten().map(|value| value.to_bits()).chain(ints).collect()
    }
}

fn launch(desc: &NoisyDesc, clean: &[f32], raw: &[f32], together: bool, state: &State) -> Got {
    launch_padded(desc, clean, raw, together, state, &Padding::none(desc.tokens))
}

fn launch_padded(
    desc: &NoisyDesc,
    clean: &[f32],
    raw: &[f32],
    together: bool,
    state: &State,
    padding: &Padding,
) -> Got {
    let (kernels, stream) = (device::kernels(), device::stream());
    let NoisyDesc { tokens, experts, rule, .. } = *desc;
    let both: Vec<f32> = clean.chunks(experts).zip(raw.chunks(experts)).flat_map(|(c, r)| [c, r].concat()).collect();
    let inputs = if together {
        vec![Guarded::input(&stream, "logits", &both)]
    } else {
        vec![Guarded::input(&stream, "clean", clean), Guarded::input(&stream, "raw", raw)]
    };
    let choices = tokens * rule.top_k;
    let mut ids = Guarded::<i32>::ids(&stream, "ids", choices);
    let mut weights = Guarded::<f32>::output(&stream, "weights", choices);
    let mut noisy = Guarded::<f32>::output(&stream, "noisy", tokens * experts);
    let mut thresholds = Guarded::<f32>::output(&stream, "thresholds", tokens * 2);
    let mut counts = Guarded::<i32>::output(&stream, "counts", experts);
    let mut importance = Guarded::<f32>::output(&stream, "importance", experts);
    let mut load = Guarded::<f32>::output(&stream, "load", experts);
    let mut losses = Guarded::<f32>::output(&stream, "losses", 2);
    let bytes = noisy::workspace_bytes(desc, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    let mut run = |rest: bool| {
        [&mut ids, &mut counts].into_iter().for_each(|buffer| buffer.reset(&stream));
        [&mut weights, &mut noisy, &mut thresholds, &mut importance, &mut load, &mut losses]
            .into_iter()
            .for_each(|buffer| buffer.reset(&stream));
        let views: Vec<_> = inputs.iter().map(Guarded::view).collect();
        let logits = match views.as_slice() {
            [both] => NoisyLogits::together(both),
            [clean, raw] => NoisyLogits::apart(clean, raw),
            _ => unreachable!(),
        };
        let (mut to, mut weights_to) = (ids.view_mut(), weights.view_mut());
        let (mut noisy_to, mut thresholds_to) = (noisy.view_mut(), thresholds.view_mut());
        let (mut counts_to, mut importance_to, mut load_to, mut losses_to) =
            (counts.view_mut(), importance.view_mut(), load.view_mut(), losses.view_mut());
        let state = state.view();
        padding.with(|mask| {
            let mut args = NoisyArgs::new(logits, &mut to, &mut weights_to).mask(mask);
            args.noise_state = state.as_ref().map(In::from);
            if rest {
                let sums = NoisySums::new(&mut counts_to, &mut importance_to, &mut load_to, &mut losses_to);
                args = args.noisy(&mut noisy_to).thresholds(&mut thresholds_to).sums(sums, &mut workspace);
            }
            noisy::forward(kernels, &stream, desc, args).unwrap();
        });
        if !rest {
            counts.assert_unchanged(&stream);
            [&noisy, &thresholds, &importance, &load, &losses]
                .into_iter()
                .for_each(|buffer| buffer.assert_unchanged(&stream));
        }
        Got {
            ids: ids.read(&stream),
            weights: weights.read(&stream),
            noisy: noisy.read(&stream),
            thresholds: thresholds.read(&stream),
            counts: counts.read(&stream),
            importance: importance.read(&stream),
            load: load.read(&stream),
            losses: losses.read(&stream),
        }
    };
    let got = run(true);
    assert_eq!(got.bits(), run(true).bits(), "{desc:?}: another run gave other bits");
    let alone = run(false);
    assert_eq!(alone.ids, got.ids, "{desc:?}: other ids without the rest");
    assert_same_bits(&format!("{desc:?}: weights without the rest"), &alone.weights, &got.weights);
    time(&stream, &format!("{desc:?}"), || drop(run(true)));
    inputs.iter().for_each(|input| input.assert_unchanged(&stream));
    state.assert_unchanged();
    got
}

/// Bit for bit, but for which NaN it is.
pub fn assert_same_bits(name: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{name}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!(g.to_bits() == w.to_bits() || (g.is_nan() && w.is_nan()), "{name}[{i}]: {g:e}, want {w:e}");
    }
}

/// Within [`NOISY_SUMS`] of the largest that the sum of `terms` numbers of 0 to 1 can be off by.
pub fn assert_sums(name: &str, got: &[f32], want: &[f64]) {
    let scale = want.iter().filter(|w| w.is_finite()).fold(0.0, |most: f64, w| most.max(w.abs()));
    for (e, (&g, &w)) in got.iter().zip(want).enumerate() {
        let near = (f64::from(g) - w).abs() <= NOISY_SUMS * scale.max(1.0);
        assert!(near || (g.is_nan() && w.is_nan()), "{name}[{e}]: {g}, want {w}");
    }
}

/// A loss follows from the vector that the device itself wrote: `n` differences, each rounded, in f32.
pub fn assert_loss(name: &str, got: f32, of: &[f32]) {
    let want = cv_squared(&to_f64(of));
    let near = (f64::from(got) - want).abs() <= LOSS_OF_SUMS * want + LOSS_OF_SUMS * LOSS_OF_SUMS;
    assert!(near || (got.is_nan() && want.is_nan()), "{name}: {got:e}, want {want:e}");
}

fn case(variant: Noisy, rng: &mut fastrand::Rng, desc: &NoisyDesc, kind: Logits) {
    let selection = noisy::select(desc, device::kernels().device(), true).unwrap();
    assert_eq!(selection.kernel.variant(), Kernel::Noisy(variant));
    let state = State::draw(rng);
    let name = format!("{desc:?} {kind:?} {state:?}");
    let (clean, raw) = kind.draw(rng, desc.tokens * desc.experts, desc.experts);
    let mut drawn = desc.rule;
    drawn.noise = state.of(drawn.noise);
    let padding = Padding::draw(&device::stream(), rng, desc.tokens);
    let name = format!("{name} {}", padding.name());
    let want = noisy_top_k_of(&clean, &raw, desc.experts, &drawn, &padding.valid).unwrap();
    let mut got = launch_padded(desc, &clean, &raw, rng.bool(), &state, &padding);
    padding.assert_unchanged(&device::stream());
    of_tokens(&name, &padding, &mut got, desc.experts, desc.rule.top_k, 1);
    assert_same_bits(&format!("{name}: H"), &got.noisy, &want.noisy);
    assert_eq!(got.ids, want.ids, "{name}: ids");
    // Keys make zeros positive.
    let positive: Vec<f32> = want.thresholds.iter().map(|threshold| threshold + 0.0).collect();
    assert_same_bits(&format!("{name}: thresholds"), &got.thresholds, &positive);
    assert_weights(&name, &got.weights, &want.weights, Shares::Softmax(desc.rule.top_k), 0);
    assert_eq!(got.counts, want.counts, "{name}: counts");
    assert_finite(&name, &got);
    assert_sums(&format!("{name}: importance"), &got.importance, &want.importance);
    assert_sums(&format!("{name}: load"), &got.load, &want.load);
    assert_loss(&format!("{name}: importance loss"), got.losses[0], &got.importance);
    assert_loss(&format!("{name}: load loss"), got.losses[1], &got.load);
}

/// Leaves of a level's rows, `width` noisy logits, `choices` and as many pairs of thresholds as `gates` a token, those of tokens that count. Of padding
/// ids and weights are written, and no more.
pub fn of_tokens(name: &str, padding: &Padding, got: &mut Got, width: usize, choices: usize, gates: usize) {
    for (rows, width) in [(&mut got.noisy, width), (&mut got.thresholds, 2 * gates)] {
        let left = padding.of_padding(rows, width);
        assert!(left.iter().all(|value| value.to_bits() == u32::MAX), "{name}: more of padding than is said");
        *rows = padding.of_tokens(rows, width);
    }
    (got.ids, got.weights) = padding.choices_of_tokens(name, &got.ids, &got.weights, choices);
}

/// Whatever the logits are.
pub fn assert_finite(name: &str, got: &Got) {
    for values in [&got.weights, &got.importance, &got.load, &got.losses] {
        assert!(values.iter().all(|value| value.is_finite()), "{name}: {values:?}");
    }
}

fn rule(top_k: usize, noise_epsilon: f32) -> NoisyRule {
    NoisyRule::new(top_k, NoiseSource::new(run_seed(), 17)).noise_epsilon(noise_epsilon)
}

/// Of two experts the first wins with chance `Phi((c0 - c1) / sqrt(d0^2 + d1^2))`, and so say both counts and loads.
///
/// 8192 draws for each of 6 differences; a count is off by more than 5.1 standard deviations in 3.4e-7 of all seeds, for the six together
/// in 2e-6. The load's terms have no larger variance than the count's.
fn pairs_come_as_often_as_the_formula_says() {
    const DRAWS: usize = 8192;
    let normal_cdf =
        |z: f64| 0.5 * (1.0 + moe_kernels::reference::activation::erf(z * std::f64::consts::FRAC_1_SQRT_2));
    for (difference, raw) in [
        (0.0, [0.0f32, 0.0]),
        (0.5, [0.0, 0.0]),
        (-0.5, [1.0, -2.0]),
        (1.5, [-1.0, 1.0]),
        (3.0, [2.0, 2.0]),
        (0.01, [-4.0, -4.0]),
    ] {
        let desc = NoisyDesc::new(DRAWS, 2, rule(1, 1e-2));
        let got = launch(&desc, &[difference, 0.0].repeat(DRAWS), &raw.repeat(DRAWS), false, &State::NONE);
        let [d0, d1] = raw.map(|raw| f64::from(raw).exp().ln_1p() + 1e-2);
        let p = normal_cdf(f64::from(difference) / (d0 * d0 + d1 * d1).sqrt());
        let deviation = (DRAWS as f64 * p * (1.0 - p)).sqrt();
        for found in [f64::from(got.counts[0]), got.load[0].into()] {
            assert!((found - DRAWS as f64 * p).abs() <= 5.1 * deviation, "{difference}, {raw:?}: {found}, chance {p}");
        }
    }
}

/// Noise that the device added, in 32 parts of equal chance: chi-square of 31 degrees of freedom exceeds 90 for fewer than 1 of 10^6 seeds
/// (its tail there is 1.2e-7). Mean and variance likewise within 5 standard errors.
fn noise_is_normal() {
    const TOKENS: usize = 4096;
    let desc = NoisyDesc::new(TOKENS, 32, rule(1, 0.0));
    let n = TOKENS * 32;
    // softplus(ln(e - 1)) = 1
    let raw = (std::f64::consts::E - 1.0).ln() as f32;
    let got = launch(&desc, &vec![0.0; n], &vec![raw; n], false, &State::NONE);
    let mut counts = [0.0f64; 32];
    let (mut sum, mut squares) = (0.0, 0.0);
    for &h in &got.noisy {
        let z = f64::from(h);
        let u = 0.5 * (1.0 + moe_kernels::reference::activation::erf(z * std::f64::consts::FRAC_1_SQRT_2));
        counts[((32.0 * u) as usize).min(31)] += 1.0;
        (sum, squares) = (sum + z, squares + z * z);
    }
    let expected = n as f64 / 32.0;
    let chi_square: f64 = counts.iter().map(|count| (count - expected) * (count - expected) / expected).sum();
    assert!(chi_square < 90.0, "chi-square {chi_square}");
    let n = n as f64;
    assert!((sum / n).abs() < 5.0 / n.sqrt() && (squares / n - 1.0).abs() < 5.0 * (2.0 / n).sqrt(), "{sum} {squares}");
    // The library's own function tells each of them.
    for (t, e) in [(0, 0), (7, 31), (4095, 5)] {
        let want = noisy::noise(desc.rule.noise, t, e);
        assert!(
            f64::from((got.noisy[(t * 32 + e) as usize] - want).abs()) <= LOSSES * f64::from(want.abs()),
            "noise of {t}, {e}"
        );
    }
}

/// The paper's losses vanish when all experts get the same, and reach E - 1 when one gets everything.
fn losses_of_a_balanced_and_of_a_one_sided_router() {
    for experts in [4, 12, 30] {
        let desc = NoisyDesc::new(10 * experts, experts, rule(1, 0.0));
        let n = desc.tokens * experts;
        let prefers =
            |t: usize, e: usize, balanced: bool| if e == if balanced { t % experts } else { 3 } { 4.0 } else { 0.0 };
        for balanced in [true, false] {
            let clean: Vec<f32> = (0..n).map(|i| prefers(i / experts, i % experts, balanced)).collect();
            let got = launch(&desc, &clean, &vec![-200.0; n], true, &State::NONE);
            for loss in got.losses {
                let want = if balanced { 0.0 } else { experts as f32 - 1.0 };
                assert!(
                    f64::from((loss - want).abs()) <= LOSSES * f64::from(want),
                    "{experts} experts, balanced {balanced}: {loss}"
                );
            }
        }
    }
}

fn no_tokens() {
    let (kernels, stream) = (device::kernels(), device::stream());
    let desc = NoisyDesc::new(0, 5, rule(2, 0.0));
    let nothing: CudaSlice<f32> = stream.alloc_zeros(1).unwrap();
    let mut ids = Guarded::<i32>::ids(&stream, "ids", 1);
    let mut weights = Guarded::<f32>::output(&stream, "weights", 1);
    let mut counts = Guarded::<i32>::output(&stream, "counts", 5);
    let mut importance = Guarded::<f32>::output(&stream, "importance", 5);
    let mut load = Guarded::<f32>::output(&stream, "load", 5);
    let mut losses = Guarded::<f32>::output(&stream, "losses", 2);
    let bytes = noisy::workspace_bytes(&desc, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    let (mut to, mut weights_to) = (ids.view_mut(), weights.view_mut());
    let (mut counts_to, mut importance_to, mut load_to, mut losses_to) =
        (counts.view_mut(), importance.view_mut(), load.view_mut(), losses.view_mut());
    let sums = NoisySums::new(&mut counts_to, &mut importance_to, &mut load_to, &mut losses_to);
    let logits = NoisyLogits::together(&nothing);
    let args = NoisyArgs::new(logits, &mut to, &mut weights_to).sums(sums, &mut workspace);
    noisy::forward(kernels, &stream, &desc, args).unwrap();
    ids.assert_unchanged(&stream);
    assert_eq!(counts.read(&stream), [0; 5]);
    assert_eq!([importance.read(&stream), load.read(&stream)], [[0.0; 5]; 2]);
    assert_eq!(losses.read(&stream), [0.0; 2]);
}

/// Close to 2^20 tokens: the first and the last are those of the reference, and every token is counted.
fn many_tokens(rng: &mut fastrand::Rng) {
    let desc = NoisyDesc::new((1 << 20) - 3, 4, rule(1, 1e-2));
    let (kernels, stream) = (device::kernels(), device::stream());
    let (clean, raw) = Logits::Skewed.draw(rng, desc.tokens * 4, 4);
    let (device_clean, device_raw) = (stream.clone_htod(&clean).unwrap(), stream.clone_htod(&raw).unwrap());
    let mut ids = Guarded::<i32>::ids(&stream, "ids", desc.tokens);
    let mut weights = Guarded::<f32>::output(&stream, "weights", desc.tokens);
    let mut counts = Guarded::<i32>::output(&stream, "counts", 4);
    let mut importance = Guarded::<f32>::output(&stream, "importance", 4);
    let mut load = Guarded::<f32>::output(&stream, "load", 4);
    let mut losses = Guarded::<f32>::output(&stream, "losses", 2);
    let bytes = noisy::workspace_bytes(&desc, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    let (mut to, mut weights_to) = (ids.view_mut(), weights.view_mut());
    let (mut counts_to, mut importance_to, mut load_to, mut losses_to) =
        (counts.view_mut(), importance.view_mut(), load.view_mut(), losses.view_mut());
    let sums = NoisySums::new(&mut counts_to, &mut importance_to, &mut load_to, &mut losses_to);
    let logits = NoisyLogits::apart(&device_clean, &device_raw);
    let args = NoisyArgs::new(logits, &mut to, &mut weights_to).sums(sums, &mut workspace);
    noisy::forward(kernels, &stream, &desc, args).unwrap();
    let want = noisy_top_k(&clean, &raw, 4, &desc.rule).unwrap();
    assert!(ids.read(&stream) == want.ids, "ids of many tokens");
    assert_eq!(counts.read(&stream), want.counts);
    assert!(weights.read(&stream).iter().all(|&weight| weight == 1.0));
    for (got, want) in load.read(&stream).iter().zip(&want.load) {
        assert!((f64::from(*got) / want - 1.0).abs() <= NOISY_SUMS_OF_MANY, "load {got}, want {want}");
    }
}
