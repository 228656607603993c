//! Checks of `auction`: BASE layers.

use moe_kernels::reference::base::{auction, optimum, weights};
use moe_kernels::routers::base::{self, BaseArgs, BaseDesc};
use moe_kernels::rules::AuctionRule;
use moe_kernels::{Out, Workspace};

use crate::support::buffer::Guarded;
use crate::support::compare::{Shares, assert_weights};
use crate::support::device;
use crate::support::inputs::normal;
use crate::timing::time;

pub fn check(rng: &mut fastrand::Rng) {
    for (experts, places) in [(1, 5), (2, 1), (4, 16), (7, 9)] {
        for kind in [Scores::Skewed, Scores::Ties, Scores::NotFinite] {
            let rule = AuctionRule::new(experts, [0.25, 0.01][rng.usize(..2)], 4096);
            case(rng, &BaseDesc::new(experts * places, rule), kind);
        }
    }
    // Several blocks bid and choose; a lane compares several experts, a warp bids for several tokens, a block keeps for several experts, and
    // a selection reads several keys a thread.
    // Long price wars are cut short: they cost rounds, not lines. A small epsilon makes keys of many digits, and after one round
    // tokens of all blocks are left over.
    for (experts, places, epsilon, max_rounds) in
        [(70, 2, 0.5, 9), (40, 7, 0.002, 6), (3, 250, 0.01, 6), (3, 250, 0.5, 1), (33, 1, 0.5, 8), (9, 2, 0.5, 40)]
    {
        for kind in [Scores::Skewed, Scores::Ties, Scores::NotFinite] {
            let rule = AuctionRule::new(experts, epsilon, max_rounds);
            case(rng, &BaseDesc::new(experts * places, rule), kind);
        }
    }
    // As many blocks as there may be, each with tokens of its own that the first block gives away.
    let device = device::kernels().device();
    let tokens = 2 * (device.multiprocessors as usize * 128 + 100);
    case(rng, &BaseDesc::new(tokens, AuctionRule::new(2, 0.5, 1)), Scores::Ties);
    every_limit(rng);
}

/// Every limit from none to more rounds than are needed: before any bid, within a step, and with a step's last round.
fn every_limit(rng: &mut fastrand::Rng) {
    let rule = |max_rounds| AuctionRule::new(3, 0.5, max_rounds);
    let scores = Scores::Skewed.draw(rng, 9 * 3, 3);
    let needed = auction(&scores, &rule(4096)).unwrap().rounds;
    for max_rounds in 0..=needed + 1 {
        launch(&BaseDesc::new(9, rule(max_rounds)), &scores, "every limit", &[]);
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

impl Scores {
    /// Rows of `experts`.
    fn draw(self, rng: &mut fastrand::Rng, len: usize, experts: usize) -> Vec<f32> {
        let favourite = rng.usize(..experts);
        let mut value = |i: usize| match self {
            Scores::Skewed => normal(rng) as f32 + if i % experts == favourite { 2.0 } else { 0.0 },
            Scores::Ties => [0.0, -0.0, 0.5][rng.usize(..3)],
            Scores::NotFinite => match rng.u32(..12) {
                0 => f32::NAN,
                1 => f32::NEG_INFINITY,
                2 => f32::INFINITY,
                _ => normal(rng) as f32,
            },
        };
        (0..len).map(&mut value).collect()
    }
}

fn case(rng: &mut fastrand::Rng, desc: &BaseDesc, kind: Scores) {
    let AuctionRule { experts, epsilon, .. } = desc.rule;
    let scores = kind.draw(rng, desc.tokens * experts, experts);
    // Larger ones before: nothing of an earlier call may be left in the workspace.
    let earlier: Vec<f32> = scores.iter().map(|score| 1e3 * score).collect();
    let name = format!("{kind:?}");
    let (got, status) = launch(desc, &scores, &name, if desc.tokens < 100 { &earlier } else { &[] });

    // The paper's promises, of the device's own output.
    for expert in 0..experts as i32 {
        let count = got.iter().filter(|&&id| id == expert).count();
        assert_eq!(count, desc.tokens / experts, "{desc:?} {name}: tokens of expert {expert}");
    }
    if kind != Scores::NotFinite && status[1] == 1 {
        let sum: f64 = got.iter().enumerate().map(|(t, &id)| f64::from(scores[t * experts + id as usize])).sum();
        let best = optimum(&scores, experts).unwrap();
        let bound = desc.tokens as f64 * f64::from(epsilon);
        assert!(sum >= best - bound, "{desc:?} {name}: sum {sum}, optimum {best}, allowed {bound} less");
    }
}

/// Ids and status, with weights and without, after a call with `earlier` scores, if there are any, in the same workspace.
fn launch(desc: &BaseDesc, scores: &[f32], name: &str, earlier: &[f32]) -> (Vec<i32>, Vec<u32>) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let experts = desc.rule.experts;
    let name = format!("{desc:?} {name}");
    let want = auction(scores, &desc.rule).unwrap();

    let input = Guarded::input(&stream, "scores", scores);
    let mut ids = Guarded::<i32>::output(&stream, "ids", desc.tokens);
    let mut gates = Guarded::<f32>::output(&stream, "weights", desc.tokens);
    let mut status = Guarded::<u32>::output(&stream, "status", 2);
    let mut workspace = Workspace::new(&stream, base::workspace_bytes(desc).unwrap()).unwrap();
    let mut run = |desc: &BaseDesc, scores: &Guarded<f32>, weighted: bool| {
        ids.reset(&stream);
        gates.reset(&stream);
        status.reset(&stream);
        let (scores, mut to, mut weights_to, mut status_to) =
            (scores.view(), ids.view_mut(), gates.view_mut(), status.view_mut());
        let mut args = BaseArgs::new(&scores, &mut to, &mut status_to, &mut workspace);
        args.weights = weighted.then(|| Out::from(&mut weights_to));
        base::forward(kernels, &stream, desc, args).unwrap();
        if !weighted {
            gates.assert_unchanged(&stream);
        }
        (ids.read(&stream), gates.read(&stream), status.read(&stream))
    };
    if !earlier.is_empty() {
        let mut desc = *desc;
        desc.rule.max_rounds = 2;
        run(&desc, &Guarded::input(&stream, "earlier scores", earlier), false);
    }
    let (got, gates, status) = run(desc, &input, true);
    assert_eq!(status, [want.rounds, want.converged as u32], "{name}: status");
    assert_eq!(got, want.ids, "{name}: ids");
    assert_weights(&name, &gates, &weights(scores, &got, experts).unwrap(), Shares::Sigmoid, 0);
    input.assert_unchanged(&stream);
    let again = run(desc, &input, false);
    assert_eq!((&got, &status), (&again.0, &again.2), "{name}: another run, without weights, assigned otherwise");
    time(&stream, &name, || drop(run(desc, &input, true)));
    (got, status)
}
