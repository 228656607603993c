//! Checks of `affinity_backward` against the reference, whose own tests are finite differences.

use moe_kernels::experts::Dispatched;
use moe_kernels::reference::expert_choice::{Chosen, affinities_backward, choose_of};
use moe_kernels::routers::affinity_backward::{self, AffinityBackwardArgs, AffinityBackwardDesc};
use moe_kernels::routers::expert_choice::{self, ExpertChoiceDesc};
use moe_kernels::rules::Affinity;
use moe_kernels::{Error, In, Workspace};

use crate::gradients::{Results, upstream};
use crate::support::buffer::Guarded;
use crate::support::device;
use crate::support::inputs::normal;
use crate::tokens::Padding;

pub fn check(rng: &mut fastrand::Rng) {
    for (tokens, experts, capacity) in [(1, 1, 1), (37, 8, 5), (40, 33, 3), (9, 130, 9), (300, 4, 60), (5, 600, 1)] {
        for affinity in [Affinity::Softmax, Affinity::Sigmoid, Affinity::Logit] {
            for garbage in [false, true] {
                let choice = ExpertChoiceDesc::new(tokens, experts, capacity);
                case(rng, AffinityBackwardDesc::new(choice, affinity), garbage);
            }
        }
    }
}

fn case(rng: &mut fastrand::Rng, desc: AffinityBackwardDesc, garbage: bool) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let ExpertChoiceDesc { tokens, experts, capacity, .. } = desc.choice;
    let mut logits: Vec<f32> = (0..tokens * experts).map(|_| 2.0 * normal(rng) as f32).collect();
    if garbage {
        const ODD: [f32; 4] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -150.0];
        logits.iter_mut().for_each(|logit| {
            if rng.u32(..3 * experts as u32) == 0 {
                *logit = ODD[rng.usize(..4)];
            }
        });
        logits[..experts].fill(f32::NEG_INFINITY);
    }
    let padding = Padding::draw(&stream, rng, tokens);
    // Whom experts choose is of no matter here: by numbers that have nothing to do with the logits.
    let affinities: Vec<f32> = (0..experts * tokens).map(|_| rng.f32()).collect();
    let chosen: Chosen<f32> = choose_of(&affinities, experts, capacity, &padding.valid).unwrap();
    let name = format!("{desc:?} garbage {garbage} {}", padding.name());
    let mut dispatched = Dispatched::new(&stream, &expert_choice::rows(&desc.choice, 16)).unwrap();
    let bytes = expert_choice::workspace_bytes(&desc.choice, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    let affinities = Guarded::input(&stream, "affinities", &affinities);
    padding.with(|mask| {
        let affinities = affinities.view();
        let from = In::from(&affinities);
        let rows = &mut dispatched;
        expert_choice::dispatch_masked(kernels, &stream, &desc.choice, 16, from, mask, rows, &mut workspace).unwrap();
    });
    let (mut d, mut d_wide) = upstream(rng, experts * capacity);
    for (slot, &token) in chosen.slot_token.iter().enumerate() {
        // Places without a token hold anything.
        if token < 0 {
            (d[slot], d_wide[slot]) = (f32::NAN, f64::NAN);
        }
    }
    let on_device = [Guarded::input(&stream, "logits", &logits), Guarded::input(&stream, "d_slot_weight", &d)];
    let results = Results::draw(rng, &[tokens * experts]);
    let desc = desc.accumulate(results.accumulate);
    let got = results.run(&name, |out| {
        let ([logits, d], mut to) = (on_device.each_ref().map(Guarded::view), out[0].view_mut());
        let args = AffinityBackwardArgs::new(&logits, &dispatched, &d, &mut to);
        affinity_backward::forward(kernels, &stream, &desc, args).unwrap();
    });
    let want = affinities_backward(&logits, experts, desc.affinity, &chosen, &d_wide).unwrap();
    results.compare(&name, 0, &got[0], &want, experts, |_| 2.0);
    on_device.iter().for_each(|buffer| buffer.assert_unchanged(&stream));

    let other = AffinityBackwardDesc::new(ExpertChoiceDesc::new(tokens + 1, experts, capacity), desc.affinity);
    let ([logits, d], mut out) = (on_device.each_ref().map(Guarded::view), Guarded::<f32>::output(&stream, "d", 1));
    let mut to = out.view_mut();
    let args = AffinityBackwardArgs::new(&logits, &dispatched, &d, &mut to);
    let error = affinity_backward::forward(kernels, &stream, &other, args).unwrap_err();
    assert!(matches!(error, Error::Invalid { argument: "dispatched", .. }), "{error}");
}
