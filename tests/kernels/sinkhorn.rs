//! Checks of `sinkhorn_*`: S-BASE.

use moe_kernels::reference;
use moe_kernels::registry::{Dispatch, Kernel, Sinkhorn};
use moe_kernels::routers::sinkhorn::{self, SinkhornArgs, SinkhornDesc};
use moe_kernels::{Out, Workspace};

use crate::support::buffer::Guarded;
use crate::support::compare::{COLUMN_ERROR, POTENTIALS, Shares, assert_weights, to_f64};
use crate::support::device;
use crate::support::inputs::normal;
use crate::timing::time;

pub fn check(variant: Sinkhorn, rng: &mut fastrand::Rng) {
    let most = variant.max_experts as usize;
    let small = most == Dispatch::MAX_EXPERTS[0] as usize;
    // Of 1024 experts and two blocks the second clears what the first reads.
    let shapes: &[(usize, usize, usize)] = if small {
        &[(1, 1, 1), (40, 4, 2), (203, 33, 3), (64, 100, 32), (40, 1024, 1), (150, 3, 1)]
    } else {
        &[(5, 1025, 2), (20, 1100, 2), (3, 4096, 4)]
    };
    for (turn, &(tokens, experts, top_k)) in shapes.iter().enumerate() {
        for (kind_turn, kind) in [Logits::Skewed, Logits::Ties, Logits::NotFinite].into_iter().enumerate() {
            let (iterations, tolerance) = [(0, 0.0), (7, -1.0), (60, 1e-3)][(turn + kind_turn) % 3];
            let desc = SinkhornDesc::new(tokens, experts, top_k, iterations, tolerance);
            case(variant, rng, &desc, kind);
        }
    }
    if small {
        balanced(rng);
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Logits {
    /// Normal, with a favourite expert.
    Skewed,
    /// Few distinct values.
    Ties,
    /// With NaN and infinities, and a token with nothing else.
    NotFinite,
}

fn logits(rng: &mut fastrand::Rng, desc: &SinkhornDesc, kind: Logits) -> Vec<f32> {
    let favourite = rng.usize(..desc.experts);
    (0..desc.tokens * desc.experts)
        .map(|i| match kind {
            Logits::Skewed => normal(rng) as f32 + if i % desc.experts == favourite { 2.0 } else { 0.0 },
            Logits::Ties => [0.0, -0.0, 0.5][rng.usize(..3)],
            Logits::NotFinite if i < desc.experts => f32::NEG_INFINITY,
            Logits::NotFinite => match rng.usize(..8 * desc.experts) {
                0 => f32::NAN,
                1 => f32::INFINITY,
                n if n % 8 == 3 => f32::NEG_INFINITY,
                _ => normal(rng) as f32,
            },
        })
        .collect()
}

struct Got {
    ids: Vec<i32>,
    weights: Vec<f32>,
    potentials: Vec<f32>,
    status: Vec<u32>,
}

fn launch(desc: &SinkhornDesc, logits: &[f32]) -> Got {
    let (kernels, stream) = (device::kernels(), device::stream());
    let input = Guarded::input(&stream, "logits", logits);
    let choices = desc.tokens * desc.top_k;
    let mut ids = Guarded::<i32>::output(&stream, "ids", choices);
    let mut weights = Guarded::<f32>::output(&stream, "weights", choices);
    let mut potentials = Guarded::<f32>::output(&stream, "potentials", desc.experts);
    let mut status = Guarded::<u32>::output(&stream, "status", 2);
    let bytes = sinkhorn::workspace_bytes(desc, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    let mut run = |weighted: bool| {
        ids.reset(&stream);
        weights.reset(&stream);
        potentials.reset(&stream);
        status.reset(&stream);
        let (logits, mut to, mut weights_to) = (input.view(), ids.view_mut(), weights.view_mut());
        let (mut potentials_to, mut status_to) = (potentials.view_mut(), status.view_mut());
        let mut args = SinkhornArgs::new(&logits, &mut to, &mut potentials_to, &mut status_to, &mut workspace);
        args.weights = weighted.then(|| Out::from(&mut weights_to));
        sinkhorn::forward(kernels, &stream, desc, args).unwrap();
        if !weighted {
            weights.assert_unchanged(&stream);
        }
        Got {
            ids: ids.read(&stream),
            weights: weights.read(&stream),
            potentials: potentials.read(&stream),
            status: status.read(&stream),
        }
    };
    let (got, again, alone) = (run(true), run(true), run(false));
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(got.ids, again.ids, "{desc:?}: another run chose otherwise");
    assert_eq!(got.status, again.status, "{desc:?}: another run took other iterations");
    assert_eq!(bits(&got.potentials), bits(&again.potentials), "{desc:?}: another run gave other bits");
    assert_eq!(bits(&got.weights), bits(&again.weights), "{desc:?}: another run gave other bits");
    assert_eq!((&got.ids, &got.status), (&alone.ids, &alone.status), "{desc:?}: without weights chose otherwise");
    time(&stream, &format!("{desc:?}"), || drop(run(true)));
    input.assert_unchanged(&stream);
    got
}

fn case(variant: Sinkhorn, rng: &mut fastrand::Rng, desc: &SinkhornDesc, kind: Logits) {
    let selection = sinkhorn::select(desc, device::kernels().device()).unwrap();
    assert_eq!(selection.kernel.variant(), Kernel::Sinkhorn(variant));
    let name = format!("{desc:?} {kind:?}");
    let logits = logits(rng, desc, kind);
    let got = launch(desc, &logits);
    // As many iterations as the device did: near the tolerance f32 may end one earlier or later.
    let done = got.status[0];
    assert!(done <= desc.iterations, "{name}: {done} iterations");
    let want = reference::sinkhorn::balance(&logits, desc.experts, done, -1.0).unwrap();
    let error = f64::from(f32::from_bits(got.status[1]));
    assert!(
        (error - want.error).abs() <= COLUMN_ERROR * (1.0 + want.error),
        "{name}: error {error}, want {}",
        want.error
    );
    assert!(done == desc.iterations || error <= f64::from(desc.tolerance), "{name}: ended early, error {error}");
    for (e, (&v, &want)) in got.potentials.iter().zip(&want.potentials).enumerate() {
        assert!(
            (f64::from(v) - want).abs() <= POTENTIALS * (1.0 + want.abs()),
            "{name}: potential {e} is {v}, want {want}"
        );
    }
    // The choice follows from the device's own potentials bit for bit.
    let ids = reference::sinkhorn::choose(&logits, &got.potentials, desc.top_k).unwrap();
    assert_eq!(got.ids, ids, "{name}: ids");
    let weights = reference::sinkhorn::weights(&logits, &ids, desc.experts, desc.top_k).unwrap();
    assert_weights(&name, &got.weights, &weights, Shares::Softmax(desc.experts), 0);
}

/// Enough iterations make every column of the plan T/E, from a router that sends most tokens to one expert.
fn balanced(rng: &mut fastrand::Rng) {
    let desc = SinkhornDesc::new(96, 12, 1, 500, 1e-4);
    let logits = logits(rng, &desc, Logits::Skewed);
    let got = launch(&desc, &logits);
    assert!(got.status[0] < 500, "not balanced in {} iterations", got.status[0]);
    for load in reference::sinkhorn::loads(&logits, &to_f64(&got.potentials)) {
        assert!((load / 8.0 - 1.0).abs() <= 2.0 * COLUMN_ERROR, "load {load}");
    }
}
