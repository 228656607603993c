//! Checks of `sparse_mixer`: experts drawn from what is near the largest logit, and that the way back of their weights is on average that of the choice.

use moe_kernels::In;
use moe_kernels::reference::gating::softmax;
use moe_kernels::reference::sparse_mixer::sparse_mixer as reference;
use moe_kernels::routers::gating_backward::{self, GatingBackwardArgs, GatingBackwardDesc};
use moe_kernels::routers::sparse_mixer::{self, SparseMixerArgs, SparseMixerDesc};
use moe_kernels::rules::{Gating, MixerRule, NoiseSource, Score};

use crate::noise_state::State;
use crate::noisy::Logits;
use crate::support::buffer::Guarded;
use crate::support::compare::{Shares, assert_weights};
use crate::support::device;
use crate::support::inputs::{normal, run_seed};
use crate::timing::time;
use crate::tokens::Padding;

pub fn check(rng: &mut fastrand::Rng) {
    // Around a step of the warp, and of the noise: 32 and 128 experts.
    for experts in [1, 2, 16, 31, 32, 33, 127, 128, 129, 300, 4096] {
        for (tokens, top_k) in [(0, 1), (1, 2), (37, 1), (70, 2)] {
            let tokens = if experts > 300 { tokens.min(9) } else { tokens };
            for kind in Logits::ALL {
                let noise = NoiseSource::new(rng.u64(..), rng.u64(..));
                let rule = MixerRule::new(top_k.min(experts), [0.01, 0.15, 0.5, 4.0][rng.usize(..4)], noise);
                let (logits, _) = kind.draw(rng, tokens * experts, experts);
                case(rng, &SparseMixerDesc::new(tokens, experts, rule), &logits, &format!("{kind:?}"));
            }
        }
    }
    // On the edge of what is near, and more tokens than warps, so that a warp goes from one to the next.
    let rule = MixerRule::new(2, 0.125, NoiseSource::new(rng.u64(..), 5));
    case(rng, &SparseMixerDesc::new(40, 4, rule), &[4.0, 3.0, 3.0 - 2f32.powi(-20), -4.0].repeat(40), "edge");
    let tokens = 64 * device::kernels().device().multiprocessors as usize + 70;
    let logits: Vec<f32> = (0..tokens * 3).map(|_| normal(rng) as f32).collect();
    case(rng, &SparseMixerDesc::new(tokens, 3, rule), &logits, "many");
    garbage();
    the_mean_gradient_is_that_of_the_choice();
}

fn launch(desc: &SparseMixerDesc, logits: &[f32], state: &State, name: &str) -> (Vec<i32>, Vec<f32>) {
    launch_padded(desc, logits, state, &Padding::none(desc.tokens), name)
}

fn launch_padded(
    desc: &SparseMixerDesc,
    logits: &[f32],
    state: &State,
    padding: &Padding,
    name: &str,
) -> (Vec<i32>, Vec<f32>) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let choices = desc.tokens * desc.rule.top_k;
    let input = Guarded::input(&stream, "logits", logits);
    let run = || {
        let mut ids = Guarded::<i32>::ids(&stream, "ids", choices);
        let mut weights = Guarded::<f32>::output(&stream, "weights", choices);
        {
            let (logits, mut ids, mut weights, state) =
                (input.view(), ids.view_mut(), weights.view_mut(), state.view());
            padding.with(|mask| {
                let mut args = SparseMixerArgs::new(&logits, &mut ids, &mut weights).mask(mask);
                args.noise_state = state.as_ref().map(In::from);
                sparse_mixer::forward(kernels, &stream, desc, args).unwrap();
            });
        }
        (ids.read(&stream), weights.read(&stream))
    };
    let (got, again) = (run(), run());
    let bits = |weights: &[f32]| weights.iter().map(|weight| weight.to_bits()).collect::<Vec<_>>();
    assert!(got.0 == again.0 && bits(&got.1) == bits(&again.1), "{name}: another run gave other bits");
    time(&stream, name, || drop(run()));
    input.assert_unchanged(&stream);
    state.assert_unchanged();
    padding.assert_unchanged(&stream);
    got
}

fn case(rng: &mut fastrand::Rng, desc: &SparseMixerDesc, logits: &[f32], kind: &str) {
    let state = State::draw(rng);
    let padding = Padding::draw(&device::stream(), rng, desc.tokens);
    let name = format!("{desc:?} {kind} {state:?} {}", padding.name());
    let mut rule = desc.rule;
    rule.noise = state.of(rule.noise);
    let want = reference(logits, desc.experts, &rule).unwrap();
    let (ids, weights) = launch_padded(desc, logits, &state, &padding, &name);
    let k = desc.rule.top_k;
    // A token's draws are the same whoever else counts.
    let (ids, weights) = padding.choices_of_tokens(&name, &ids, &weights, k);
    assert_eq!(ids, padding.of_tokens(&want.ids, k), "{name}: ids");
    assert_weights(&name, &weights, &padding.of_tokens(&want.weights, k), Shares::Softmax(desc.experts), 0);
}

fn garbage() {
    let desc = |top_k| SparseMixerDesc::new(1, 3, MixerRule::new(top_k, 0.1, NoiseSource::new(3, 1)));
    let got = launch(&desc(2), &[f32::NAN; 3], &State::NONE, "NaN");
    assert_eq!(got, (vec![0, 1], vec![0.0, 0.0]));
    // Nobody is near but the largest.
    let got = launch(&desc(2), &[0.0, 5.0, -20.0], &State::NONE, "sure");
    assert_eq!((got.0[0], got.1[0]), (1, 1.0));
}

/// Of a token that makes `y = a w + b w^2 + c w^3` of its expert's weight w, the gradient of the logits is on average, for experts that have not the
/// largest logit, `y(q) dq/dl` (Heun's rule is exact for a cubic); of the largest `q y'(q) dq/dl`. Means of 32768 tokens are within 6 of their
/// standard deviations: one of 5 10^8 is not.
fn the_mean_gradient_is_that_of_the_choice() {
    const TOKENS: usize = 32768;
    const CUBICS: [[f64; 3]; 4] = [[1.0, -2.0, 4.0], [-3.0, 5.0, 2.0], [2.0, 1.0, -6.0], [0.5, 3.0, 1.0]];
    let (row, jitter) = ([0.75f32, 0.5, -0.25, 0.125], 4.0);
    let logits = row.repeat(TOKENS);
    let desc = SparseMixerDesc::new(TOKENS, 4, MixerRule::new(1, jitter, NoiseSource::new(run_seed(), 29)));
    let (ids, weights) = launch(&desc, &logits, &State::NONE, "means");
    let slope_of = |expert: usize, w: f64| {
        let [a, b, c] = CUBICS[expert];
        a + 2.0 * b * w + 3.0 * c * w * w
    };
    let d_weights: Vec<f32> =
        ids.iter().zip(&weights).map(|(&id, &w)| slope_of(id as usize, w.into()) as f32).collect();

    let (kernels, stream) = (device::kernels(), device::stream());
    let (logits, ids) = (stream.clone_htod(&logits).unwrap(), stream.clone_htod(&ids).unwrap());
    let d_weights = stream.clone_htod(&d_weights).unwrap();
    let mut d_logits = stream.alloc_zeros::<f32>(4 * TOKENS).unwrap();
    let back = GatingBackwardDesc::new(TOKENS, 4, 1, Gating::new(Score::SparseMixer).jitter(jitter));
    let args = GatingBackwardArgs::new(&logits, &ids, &d_weights, &mut d_logits);
    gating_backward::forward(kernels, &stream, &back, args).unwrap();
    let d = stream.clone_dtoh(&d_logits).unwrap();

    let q = softmax(&row.map(f64::from));
    for e in 0..4 {
        let slope = |i: usize| q[i] * (f64::from(u8::from(i == e)) - q[e]);
        let value = |i: usize| CUBICS[i].iter().rev().fold(0.0, |sum, c| (sum + c) * q[i]);
        let want = q[0] * slope_of(0, q[0]) * slope(0) + (1..4).map(|i| value(i) * slope(i)).sum::<f64>();
        let values = || d.chunks(4).map(|row| f64::from(row[e]));
        let n = TOKENS as f64;
        let mean = values().sum::<f64>() / n;
        let deviation = (values().map(|v| (v - mean).powi(2)).sum::<f64>() / n / n).sqrt();
        assert!((mean - want).abs() <= 6.0 * deviation, "expert {e}: mean {mean}, want {want}, deviation {deviation}");
        assert!(deviation < 0.02, "expert {e}: {deviation} tells nothing");
    }
}
