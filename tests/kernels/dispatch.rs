//! Checks of `dispatch_*`, and of what the fused `gating_*_dispatch` writes.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use moe_kernels::experts::{Dispatched, SlotShape};
use moe_kernels::reference::dispatch::{DispatchRule, Dispatched as Plan};
use moe_kernels::registry::{Dispatch, Kernel};
use moe_kernels::rules::Capacity;
use moe_kernels::{Out, Workspace, reference};

use crate::ids::{Stored, format};
use crate::rows;
use crate::support::buffer::Guarded;
use crate::support::device;
use crate::timing::time;
use crate::tokens::Padding;

/// The reference's rule without a capacity.
pub fn rule(experts: usize, top_k: usize, tile_m: usize) -> DispatchRule {
    DispatchRule { experts, top_k, capacity: None, tile_m }
}

/// The reference's rule of a descriptor.
pub fn rule_of(desc: &DispatchDesc) -> DispatchRule {
    DispatchRule { capacity: desc.capacity, ..rule(desc.experts, desc.top_k, desc.tile_m) }
}

/// What dispatch writes, beside junk.
pub struct Outputs {
    pub dispatched: Dispatched,
    pub workspace: Workspace,
    shape: SlotShape,
}

impl Outputs {
    pub fn new(stream: &Arc<CudaStream>, shape: SlotShape, workspace_bytes: usize) -> Outputs {
        let workspace = Workspace::new(stream, workspace_bytes).unwrap();
        Outputs { dispatched: rows::junk(stream, &shape), workspace, shape }
    }

    /// Junk in all outputs; the workspace stays as the last launch left it.
    pub fn reset(&mut self, stream: &Arc<CudaStream>) {
        self.dispatched = rows::junk(stream, &self.shape);
    }

    /// Everything equals the reference bit for bit, and nothing else was written; without weights none of theirs.
    pub fn assert_equal(&self, stream: &Arc<CudaStream>, name: &str, want: &Plan, weights: Option<&[f32]>) {
        let of = &self.dispatched;
        let read = |what: &str, list, len| rows::read::<i32>(stream, &format!("{name}: {what}"), list, len);
        assert_eq!(read("counts", of.counts(), want.counts.len()), want.counts, "{name}: counts");
        assert_eq!(read("offsets", of.offsets(), want.offsets.len()), want.offsets, "{name}: offsets");
        let token_slot = read("token_slot", of.token_slot(), want.token_slot.len());
        assert_eq!(token_slot, want.token_slot, "{name}: token_slot");
        let live = want.slot_token.len();
        assert_eq!(read("slot_token", of.slot_token(), live), want.slot_token, "{name}: slot_token");
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let weighted = if weights.is_some() { live } else { 0 };
        let slot_weight = rows::read(stream, &format!("{name}: slot_weight"), of.slot_weight(), weighted);
        let want_weight = weights.map_or(vec![], |weights| want.slot_weight(weights));
        assert_eq!(bits(&slot_weight), bits(&want_weight), "{name}: slot_weight");
        assert_eq!(read("num_tiles", of.num_tiles(), 1)[0] as usize, want.tiles.len(), "{name}: num_tiles");
        let tiles = rows::read(stream, &format!("{name}: tiles"), of.tiles(), want.tiles.len());
        assert_eq!(tiles, want.tiles, "{name}: tiles");
    }
}

pub fn check(variant: Dispatch, rng: &mut fastrand::Rng) {
    let most = variant.max_experts as usize;
    let least = Dispatch::MAX_EXPERTS.iter().map(|&e| e as usize).filter(|&e| e < most).max().unwrap_or(0) + 1;
    let expert_counts =
        if least == 1 { vec![1, 3, 60, 64, 257, most] } else { vec![least, (least + most) / 2 + 1, most] };
    for experts in expert_counts {
        for (tokens, top_k) in [(1, 1), (5, 3), (129, 2), (90, 5), (700, 8), (61, 64)] {
            let top_k = top_k.min(experts);
            let capacities = [
                None,
                Some(Capacity::new(2, 17).padded(false)),
                Some(Capacity::new(3, tokens).padded(true)),
                Some(Capacity::new(1, 1).padded(false)),
            ];
            let limited = experts <= Dispatch::MAX_LIMITED_EXPERTS as usize;
            for capacity in if limited { &capacities[..] } else { &capacities[..1] } {
                let tile_m = [16, 64, 128][rng.usize(..3)];
                let ids = format(rng, variant.ids_bytes);
                let desc = DispatchDesc::new(tokens, experts, top_k, tile_m).capacity(*capacity).ids(ids);
                case(variant, rng, &desc);
            }
        }
    }
}

/// Rows rounded up to multiples, and ended within an expert, between two, before the first and past the last.
pub fn check_rows(variant: Dispatch, rng: &mut fastrand::Rng) {
    let most = variant.max_experts as usize;
    let least = Dispatch::MAX_EXPERTS.iter().map(|&e| e as usize).filter(|&e| e < most).max().unwrap_or(0) + 1;
    let expert_counts = if least == 1 { vec![1, 3, 60, 257, most] } else { vec![least, most] };
    for experts in expert_counts {
        for (tokens, top_k) in [(1, 1), (5, 3), (129, 2), (700, 8), (61, 64)] {
            let top_k = top_k.min(experts);
            let slots = tokens * top_k;
            for multiple in [1, 2, 7, 16, 128] {
                let max_rows =
                    [None, Some(0), Some(rng.usize(..=slots)), Some(multiple * rng.usize(1..=3)), Some(1 << 20)];
                for max_rows in max_rows {
                    if (multiple, max_rows) == (1, None) {
                        continue;
                    }
                    let limited = experts <= Dispatch::MAX_LIMITED_EXPERTS as usize && rng.bool();
                    let capacity = limited.then(|| Capacity::new(3, 17).padded(false));
                    let ids = format(rng, variant.ids_bytes);
                    let desc = DispatchDesc::new(tokens, experts, top_k, [16, 64][rng.usize(..2)])
                        .capacity(capacity)
                        .ids(ids)
                        .row_multiple(multiple)
                        .max_rows(max_rows);
                    case(variant, rng, &desc);
                }
            }
        }
    }
}

/// How ids are spread.
const SKEWS: [&str; 3] = ["uniform", "one expert", "a few experts"];

fn case(variant: Dispatch, rng: &mut fastrand::Rng, desc: &DispatchDesc) {
    let kernels = device::kernels();
    let stream = device::stream();
    let skew = rng.usize(..SKEWS.len());
    let name = format!("{desc:?} {}", SKEWS[skew]);
    let favourite = rng.usize(..desc.experts) as i32;
    let ids: Vec<i32> = (0..desc.tokens * desc.top_k)
        .map(|_| match (rng.u32(..10), skew) {
            (0, _) => -1,
            (_, 1) => favourite,
            (_, 2) => (favourite + rng.i32(0..3)) % desc.experts as i32,
            _ => rng.usize(..desc.experts) as i32,
        })
        .collect();
    let weights: Vec<f32> = ids.iter().map(|_| rng.f32()).collect();
    let padding = Padding::draw(&stream, rng, desc.tokens);
    let name = format!("{name} {}", padding.name());
    // The ids of padding are not looked at.
    let counted: Vec<i32> =
        ids.iter().enumerate().map(|(at, &id)| if padding.valid[at / desc.top_k] { id } else { -1 }).collect();
    let mut want = reference::dispatch::dispatch(&counted, &rule_of(desc)).unwrap();
    let mut want_dropped = 0;
    let mut kernel = Kernel::Dispatch(variant);
    if desc.row_multiple > 1 || desc.max_rows.is_some() {
        (want, want_dropped) = want.with_rows(desc.row_multiple, desc.max_rows, desc.tile_m).unwrap();
        kernel = Kernel::DispatchRows(variant);
    }

    assert_eq!(dispatch::select(desc, kernels.device()).unwrap().kernel.variant(), kernel);
    let ids = Stored::new(&stream, rng, desc.ids, &ids, desc.experts);
    let device_weights = Guarded::input(&stream, "weights", &weights);
    let bytes = dispatch::workspace_bytes(desc, kernels.device()).unwrap();
    let mut outputs = Outputs::new(&stream, desc.shape(), bytes);
    let mut dropped = Guarded::<i32>::output(&stream, "dropped", 1);
    let launch = |outputs: &mut Outputs, dropped: Option<&mut Guarded<i32>>, weighted: bool| {
        let mut dropped = dropped.map(Guarded::view_mut);
        let weights = device_weights.view();
        let Outputs { dispatched, workspace, .. } = outputs;
        ids.with(|ids| {
            padding.with(|mask| {
                let mut args = DispatchArgs::new(ids, dispatched, workspace).mask(mask);
                args.weights = weighted.then_some((&weights).into());
                args.dropped = dropped.as_mut().map(Out::from);
                dispatch::forward(kernels, &stream, desc, args).unwrap();
            });
        });
    };
    launch(&mut outputs, desc.max_rows.map(|_| &mut dropped), true);
    outputs.assert_equal(&stream, &name, &want, Some(&weights));
    if desc.max_rows.is_some() {
        assert_eq!(dropped.read(&stream), [want_dropped as i32], "{name}: dropped");
    }
    // The second launch finds the grid barrier as the first left it.
    outputs.reset(&stream);
    launch(&mut outputs, None, false);
    outputs.assert_equal(&stream, &name, &want, None);
    ids.assert_unchanged(&stream);
    device_weights.assert_unchanged(&stream);
    padding.assert_unchanged(&stream);
    time(&stream, &name, || launch(&mut outputs, None, true));
}
