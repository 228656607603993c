//! Checks of `choice_backward_*` and `sigmoid_gate`.

use half::{bf16, f16};
use moe_kernels::Dtype;
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use moe_kernels::experts::Dispatched;
use moe_kernels::experts::choice_backward::{self, ChoiceBackwardArgs, ChoiceBackwardDesc, Identities};
use moe_kernels::experts::sigmoid_gate::{self, SigmoidGateArgs};
use moe_kernels::reference::choice_backward as reference;
use moe_kernels::rules::{Capacity, IDENTITY, NONE};

use crate::support::buffer::Guarded;
use crate::support::compare::{Arithmetic, Storage, UNIT, assert_bounded, to_f64};
use crate::support::device;
use crate::support::inputs::{normal, normals};
use crate::timing::time;

pub fn check(dtype: Dtype, rng: &mut fastrand::Rng) {
    match dtype {
        Dtype::Bf16 => typed::<bf16>(rng),
        Dtype::F16 => typed::<f16>(rng),
        Dtype::F32 => typed::<f32>(rng),
        other => unreachable!("no kernel has {other}"),
    }
}

/// Which choices are identities.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Nothing,
    Range,
    Map(usize),
}

fn typed<T: Storage>(rng: &mut fastrand::Rng) {
    for (tokens, hidden, experts, top_k) in
        [(1, 1, 1, 1), (3, 64, 9, 4), (2, 263, 40, 33), (400, 33, 6, 2), (5, 512, 64, 64), (7, 31, 80, 63)]
    {
        for kind in [Kind::Nothing, Kind::Range, Kind::Map(1), Kind::Map(3)] {
            case::<T>(rng, [tokens, hidden, experts, top_k], kind);
        }
    }
    case::<T>(rng, [0, 8, 4, 2], Kind::Range);
}

fn case<T: Storage>(rng: &mut fastrand::Rng, [tokens, hidden, experts, top_k]: [usize; 4], kind: Kind) {
    let name = format!("{} T={tokens} H={hidden} E={experts} k={top_k} {kind:?}", T::DTYPE);
    let (kernels, stream) = (device::kernels(), device::stream());
    // Ids as the router knows them, some of them no expert's; the last two of each token's experts are identities.
    let count = tokens * top_k;
    let ids: Vec<i32> = (0..count)
        .map(|_| match rng.u32(..12) {
            0 => -1,
            1 => experts as i32 + 2,
            2 => i32::MIN,
            _ => rng.i32(0..experts as i32 + 2),
        })
        .collect();
    let identities = experts as u32..experts as u32 + 2;
    let is_one = |id: i32| identities.contains(&(id as u32));
    // With rows for the others, of which few get one.
    let local: Vec<i32> = ids.iter().map(|&id| if (0..experts as i32).contains(&id) { id } else { -1 }).collect();
    let capacity = Capacity::new(1.max(tokens / 8), tokens.max(1));
    let shape = DispatchDesc::new(tokens, experts, top_k, 16).capacity(Some(capacity));
    let mut dispatched = Dispatched::new(&stream, &shape.shape()).unwrap();
    let bytes = dispatch::workspace_bytes(&shape, kernels.device()).unwrap();
    let mut workspace = moe_kernels::Workspace::new(&stream, bytes).unwrap();
    let on_device = stream.clone_htod(if local.is_empty() { &[0][..] } else { &local[..] }).unwrap();
    dispatch::forward(kernels, &stream, &shape, DispatchArgs::new(&on_device, &mut dispatched, &mut workspace))
        .unwrap();
    let rows = *dispatched.shape();
    let token_slot = stream.clone_dtoh(dispatched.token_slot()).unwrap();
    let token_slot = &token_slot[..count];

    let d_slots: Vec<f32> = (0..rows.slots).map(|_| normal(rng) as f32).collect();
    let (mut x, mut dy) = (normals::<T>(rng, tokens * hidden, 1.0), normals::<T>(rng, tokens * hidden, 1.0));
    let identity = |at: usize| kind != Kind::Nothing && is_one(ids[at]);
    let want =
        reference::choice_backward(&to_f64(&d_slots), token_slot, identity, (&to_f64(&x)[..], &to_f64(&dy)[..]), top_k);
    let want = want.unwrap();
    let bounds: Vec<f64> = (0..count)
        .map(|at| {
            let row = at / top_k * hidden..at / top_k * hidden + hidden;
            let terms: Vec<f64> = to_f64(&x[row.clone()]).iter().zip(to_f64(&dy[row])).map(|(x, d)| x * d).collect();
            let magnitude = terms.iter().map(|term| term.abs()).sum();
            let root = terms.iter().map(|term| term * term).sum::<f64>().sqrt();
            if token_slot[at] < 0 && identity(at) {
                Arithmetic::Fma.sum_bound(hidden, want[at], magnitude, root)
            } else {
                0.0
            }
        })
        .collect();
    // Nothing of a token without an identity is read.
    for t in 0..tokens {
        if !(t * top_k..(t + 1) * top_k).any(|at| token_slot[at] < 0 && identity(at)) {
            x[t * hidden..][..hidden].fill(T::from_f32(f32::NAN));
            dy[t * hidden..][..hidden].fill(T::from_f32(f32::NAN));
        }
    }
    let columns = if let Kind::Map(columns) = kind { columns } else { 1 };
    let entry = |at: usize| match (at % columns, at / columns < experts) {
        (0, true) => [NONE, 0, at as i32][at % 3],
        (0, false) => IDENTITY,
        _ => [NONE, IDENTITY][at % 2],
    };
    let map: Vec<i32> = (0..(experts + 2) * columns).map(entry).collect();

    let desc = ChoiceBackwardDesc::new(T::DTYPE, rows, hidden);
    let (d_slots, ids) = (Guarded::input(&stream, "d_slots", &d_slots), Guarded::input(&stream, "ids", &ids));
    let (x, dy) = (Guarded::input(&stream, "x", &x), Guarded::input(&stream, "dy", &dy));
    let map = Guarded::input(&stream, "map", &map);
    let mut d_weights = Guarded::<f32>::output(&stream, "d_weights", count);
    let mut launch = || {
        d_weights.reset(&stream);
        {
            let (d_slots, ids, x, dy, map) = (d_slots.view(), ids.view(), x.view(), dy.view(), map.view());
            let mut to = d_weights.view_mut();
            let mut args = ChoiceBackwardArgs::new(&d_slots, &dispatched, &mut to);
            args.identities = match kind {
                Kind::Nothing => None,
                Kind::Range => Some(Identities::new(&ids, identities.clone(), &x, &dy)),
                Kind::Map(columns) => Some(Identities::of_map(&ids, &map, columns, &x, &dy)),
            };
            choice_backward::forward::<T>(kernels, &stream, &desc, args).unwrap();
        }
        d_weights.read(&stream)
    };
    let got = launch();
    assert_eq!(
        got.iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
        launch().iter().map(|v| v.to_bits()).collect::<Vec<_>>()
    );
    assert_bounded(&name, &to_f64(&got), &want, &bounds, Dtype::F32);
    d_slots.assert_unchanged(&stream);
    time(&stream, &name, || drop(launch()));
}

pub fn check_gate(rng: &mut fastrand::Rng) {
    let (kernels, stream) = (device::kernels(), device::stream());
    for tokens in [0, 1, 255, 256, 700] {
        let mut logits: Vec<f32> = (0..tokens).map(|_| 6.0 * normal(rng) as f32).collect();
        for (at, odd) in [f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 90.0, -90.0].into_iter().enumerate() {
            if at + 1 < tokens {
                logits[at] = odd;
            }
        }
        let d: Vec<f32> = (0..tokens).map(|_| normal(rng) as f32).collect();
        let (logits_in, d_in) = (Guarded::input(&stream, "logits", &logits), Guarded::input(&stream, "d", &d));
        for back in [false, true] {
            let mut out = Guarded::<f32>::output(&stream, "out", tokens);
            {
                let (logits, d, mut to) = (logits_in.view(), d_in.view(), out.view_mut());
                let args = SigmoidGateArgs::new(&logits, &mut to);
                let args = if back { args.d(&d) } else { args };
                sigmoid_gate::forward(kernels, &stream, tokens, args).unwrap();
            }
            let want: Vec<f64> = logits
                .iter()
                .zip(&d)
                .map(|(&logit, &d)| reference::sigmoid_gate(logit.into(), back.then_some(d.into())))
                .collect();
            // Each sigmoid to a few units in the last place, and a denormal one to the least.
            let bounds: Vec<f64> = want.iter().map(|want| 16.0 * UNIT * want.abs() + 1e-38).collect();
            assert_bounded(&format!("T={tokens} back={back}"), &to_f64(&out.read(&stream)), &want, &bounds, Dtype::F32);
        }
        logits_in.assert_unchanged(&stream);
    }
}
