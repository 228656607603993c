//! Checks of `auction`: BASE layers.

use moe_kernels::Workspace;
use moe_kernels::base::{self, AuctionRule, BaseArgs, BaseDesc};
use moe_kernels::reference::base::{auction, optimum, weights};

use crate::noisy::assert_same_bits;
use crate::support::buffer::Guarded;
use crate::support::compare::{Shares, assert_weights};
use crate::support::device;
use crate::support::inputs::normal;
use crate::timing::time;

pub fn check(rng: &mut fastrand::Rng) {
    for (experts, places) in [(1, 5), (2, 1), (4, 16), (7, 9)] {
        for kind in [Scores::Skewed, Scores::Ties, Scores::NotFinite] {
            let rule = AuctionRule { experts, epsilon: [0.25, 0.01][rng.usize(..2)], max_rounds: 4096 };
            case(rng, &BaseDesc { tokens: experts * places, rule }, kind);
        }
    }
    // Several blocks bid and choose; a lane compares several experts, a warp bids for several tokens, a block keeps for several experts, and
    // a selection reads several keys a thread.
    // Long price wars are cut short: they cost rounds, not lines.
    for (experts, places, epsilon, max_rounds) in
        [(9, 2, 0.5, 60), (70, 2, 0.5, 30), (33, 1, 0.5, 30), (3, 203, 0.5, 12), (40, 12, 0.5, 16)]
    {
        for kind in [Scores::Skewed, Scores::Ties, Scores::NotFinite] {
            let rule = AuctionRule { experts, epsilon, max_rounds };
            case(rng, &BaseDesc { tokens: experts * places, rule }, kind);
        }
    }
    // A limit that is met within a step, and before any bid.
    for max_rounds in [0, 3] {
        let rule = AuctionRule { experts: 8, epsilon: 1e-3, max_rounds };
        case(rng, &BaseDesc { tokens: 40, rule }, Scores::Skewed);
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Scores {
    /// Normal, with a favourite expert.
    Skewed,
    /// Few distinct values.
    Ties,
    /// With NaN and infinities.
    NotFinite,
}

fn case(rng: &mut fastrand::Rng, desc: &BaseDesc, kind: Scores) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let AuctionRule { experts, epsilon, .. } = desc.rule;
    let name = format!("{desc:?} {kind:?}");
    let favourite = rng.usize(..experts);
    let scores: Vec<f32> = (0..desc.tokens * experts)
        .map(|i| match kind {
            Scores::Skewed => normal(rng) as f32 + if i % experts == favourite { 2.0 } else { 0.0 },
            Scores::Ties => [0.0, -0.0, 0.5][rng.usize(..3)],
            Scores::NotFinite => match rng.u32(..12) {
                0 => f32::NAN,
                1 => f32::NEG_INFINITY,
                2 => f32::INFINITY,
                _ => normal(rng) as f32,
            },
        })
        .collect();
    let want = auction(&scores, &desc.rule).unwrap();

    let input = Guarded::input(&stream, "scores", &scores);
    let mut ids = Guarded::<i32>::output(&stream, "ids", desc.tokens);
    let mut gates = Guarded::<f32>::output(&stream, "weights", desc.tokens);
    let mut status = Guarded::<u32>::output(&stream, "status", 2);
    let mut workspace = Workspace::new(&stream, base::workspace_bytes(desc).unwrap()).unwrap();
    let mut run = || {
        ids.reset(&stream);
        gates.reset(&stream);
        status.reset(&stream);
        let args = BaseArgs {
            scores: &input.view(),
            ids: &mut ids.view_mut(),
            weights: Some(&mut gates.view_mut()),
            status: &mut status.view_mut(),
            workspace: &mut workspace,
        };
        base::forward(kernels, &stream, desc, args).unwrap();
        (ids.read(&stream), gates.read(&stream), status.read(&stream))
    };
    let (got, gates, status) = run();
    assert_eq!(status, [want.rounds, want.converged as u32], "{name}: status");
    assert_eq!(got, want.ids, "{name}: ids");
    assert_weights(&name, &gates, &weights(&scores, &got, experts).unwrap(), Shares::Sigmoid, 0);
    input.assert_unchanged(&stream);
    let again = run();
    assert_eq!((&got, &status), (&again.0, &again.2), "{name}: another run assigned otherwise");
    assert_same_bits(&format!("{name}: weights of another run"), &again.1, &gates);
    time(&stream, &name, || drop(run()));

    // The paper's promises, of the device's own output.
    for expert in 0..experts as i32 {
        let count = got.iter().filter(|&&id| id == expert).count();
        assert_eq!(count, desc.tokens / experts, "{name}: tokens of expert {expert}");
    }
    if kind != Scores::NotFinite && status[1] == 1 {
        let sum: f64 = got.iter().enumerate().map(|(t, &id)| f64::from(scores[t * experts + id as usize])).sum();
        let best = optimum(&scores, experts).unwrap();
        let bound = desc.tokens as f64 * f64::from(epsilon);
        assert!(sum >= best - bound, "{name}: sum {sum}, optimum {best}, allowed {bound} less");
    }
}
