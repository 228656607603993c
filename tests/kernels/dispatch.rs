//! Checks of `dispatch_*`, and of what the fused `gating_*_dispatch` writes.

use cudarc::driver::{CudaStream, CudaViewMut};
use moe_kernels::Workspace;
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc, DispatchOutputs, TileEntry, TileList};
use moe_kernels::reference;
use moe_kernels::reference::dispatch::{DispatchRule, Dispatched};
use moe_kernels::registry::{Dispatch, Kernel};
use moe_kernels::rules::Capacity;
use std::sync::Arc;

use crate::support::buffer::Guarded;
use crate::support::device;
use crate::timing::time;

/// The reference's rule without a capacity.
pub fn rule(experts: usize, top_k: usize, tile_m: usize) -> DispatchRule {
    DispatchRule { experts, top_k, capacity: None, tile_m }
}

/// The reference's rule of a descriptor.
pub fn rule_of(desc: &DispatchDesc) -> DispatchRule {
    DispatchRule { capacity: desc.capacity, ..rule(desc.experts, desc.top_k, desc.tile_m) }
}

/// What dispatch writes, between guards.
pub struct Outputs {
    counts: Guarded<i32>,
    offsets: Guarded<i32>,
    slot_token: Guarded<i32>,
    token_slot: Guarded<i32>,
    slot_weight: Guarded<f32>,
    tiles: Guarded<TileEntry>,
    num_tiles: Guarded<i32>,
    pub workspace: Workspace,
}

impl Outputs {
    pub fn new(stream: &Arc<CudaStream>, desc: &DispatchDesc) -> Outputs {
        let bytes = dispatch::workspace_bytes(desc, device::kernels().device()).unwrap();
        Outputs {
            counts: Guarded::output(stream, "counts", desc.experts),
            offsets: Guarded::output(stream, "offsets", desc.experts + 1),
            slot_token: Guarded::output(stream, "slot_token", desc.slots()),
            token_slot: Guarded::output(stream, "token_slot", desc.tokens * desc.top_k),
            slot_weight: Guarded::output(stream, "slot_weight", desc.slots()),
            tiles: Guarded::output(stream, "tiles", desc.max_tiles()),
            num_tiles: Guarded::output(stream, "num_tiles", 1),
            workspace: Workspace::new(stream, bytes).unwrap(),
        }
    }

    /// Junk in all outputs; the workspace stays as the last launch left it.
    pub fn reset(&mut self, stream: &Arc<CudaStream>) {
        let ints =
            [&mut self.counts, &mut self.offsets, &mut self.slot_token, &mut self.token_slot, &mut self.num_tiles];
        ints.into_iter().for_each(|buffer| buffer.reset(stream));
        self.slot_weight.reset(stream);
        self.tiles.reset(stream);
    }

    /// Views of all outputs, and the workspace.
    pub fn views(&mut self) -> (Views<'_>, &mut Workspace) {
        let views = Views {
            counts: self.counts.view_mut(),
            offsets: self.offsets.view_mut(),
            slot_token: self.slot_token.view_mut(),
            token_slot: self.token_slot.view_mut(),
            slot_weight: self.slot_weight.view_mut(),
            tiles: self.tiles.view_mut(),
            num_tiles: self.num_tiles.view_mut(),
        };
        (views, &mut self.workspace)
    }

    /// Everything equals the reference bit for bit, and nothing else was written.
    pub fn assert_equal(&self, stream: &Arc<CudaStream>, name: &str, want: &Dispatched, weights: &[f32]) {
        assert_eq!(self.counts.read(stream), want.counts, "{name}: counts");
        assert_eq!(self.offsets.read(stream), want.offsets, "{name}: offsets");
        assert_eq!(self.token_slot.read(stream), want.token_slot, "{name}: token_slot");
        let live = want.slot_token.len();
        let slot_token = self.slot_token.read(stream);
        assert_eq!(slot_token[..live], want.slot_token, "{name}: slot_token");
        assert!(
            slot_token[live..].iter().all(|&junk| junk == -1),
            "{name}: slot_token beyond the last slot was written"
        );
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let slot_weight = self.slot_weight.read(stream);
        assert_eq!(bits(&slot_weight[..live]), bits(&want.slot_weight(weights)), "{name}: slot_weight");
        let count = self.num_tiles.read(stream)[0];
        assert_eq!(count as usize, want.tiles.len(), "{name}: num_tiles");
        assert_eq!(self.tiles.read(stream)[..want.tiles.len()], want.tiles, "{name}: tiles");
    }
}

/// See [`Outputs::views`].
pub struct Views<'a> {
    counts: CudaViewMut<'a, i32>,
    offsets: CudaViewMut<'a, i32>,
    slot_token: CudaViewMut<'a, i32>,
    token_slot: CudaViewMut<'a, i32>,
    slot_weight: CudaViewMut<'a, f32>,
    tiles: CudaViewMut<'a, TileEntry>,
    num_tiles: CudaViewMut<'a, i32>,
}

impl<'a> Views<'a> {
    pub fn outputs(&'a mut self) -> DispatchOutputs<'a> {
        DispatchOutputs {
            counts: &mut self.counts,
            offsets: &mut self.offsets,
            slot_token: &mut self.slot_token,
            token_slot: &mut self.token_slot,
            slot_weight: Some(&mut self.slot_weight),
            tiles: Some(TileList { tiles: &mut self.tiles, num_tiles: &mut self.num_tiles }),
        }
    }
}

pub fn check(variant: Dispatch, rng: &mut fastrand::Rng) {
    let most = variant.max_experts as usize;
    let least = Dispatch::MAX_EXPERTS.iter().map(|&e| e as usize).filter(|&e| e < most).max().unwrap_or(0) + 1;
    let expert_counts = if least == 1 { vec![1, 3, 60, 64, 257, most] } else { vec![least, 3001, most] };
    for experts in expert_counts {
        for (tokens, top_k) in [(1, 1), (5, 3), (129, 2), (700, 8), (61, 32)] {
            let top_k = top_k.min(experts);
            let capacities = [
                None,
                Some(Capacity { per_expert: 2, tokens_per_sequence: 17, padded: false }),
                Some(Capacity { per_expert: 3, tokens_per_sequence: tokens, padded: true }),
                Some(Capacity { per_expert: 1, tokens_per_sequence: 1, padded: false }),
            ];
            for capacity in capacities {
                let tile_m = [16, 64, 128][rng.usize(..3)];
                let desc = DispatchDesc { tokens, experts, top_k, capacity, tile_m };
                case(variant, rng, &desc);
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
            (_, 2) => (favourite + rng.i32(..3)) % desc.experts as i32,
            _ => rng.usize(..desc.experts) as i32,
        })
        .collect();
    let weights: Vec<f32> = ids.iter().map(|_| rng.f32()).collect();
    let want = reference::dispatch::dispatch(&ids, &rule_of(desc)).unwrap();

    assert_eq!(dispatch::select(desc, kernels.device()).unwrap().kernel, Kernel::Dispatch(variant));
    let ids = Guarded::input(&stream, "ids", &ids);
    let device_weights = Guarded::input(&stream, "weights", &weights);
    let mut outputs = Outputs::new(&stream, desc);
    let launch = |outputs: &mut Outputs| {
        let (ids, weights) = (ids.view(), device_weights.view());
        let (mut views, workspace) = outputs.views();
        let args = DispatchArgs { ids: &ids, weights: Some(&weights), outputs: views.outputs(), workspace };
        dispatch::forward(kernels, &stream, desc, args).unwrap()
    };
    launch(&mut outputs);
    outputs.assert_equal(&stream, &name, &want, &weights);
    // The second launch finds the grid barrier as the first left it.
    outputs.reset(&stream);
    launch(&mut outputs);
    outputs.assert_equal(&stream, &name, &want, &weights);
    ids.assert_unchanged(&stream);
    time(&stream, &name, || launch(&mut outputs));
}
