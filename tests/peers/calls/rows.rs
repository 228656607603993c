//! Rows of experts, and their numbers.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use moe_kernels::capacity::admission::{self, AdmissionArgs, AdmissionDesc};
use moe_kernels::capacity::chunks::{self, ChunksArgs, ChunksDesc};
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use moe_kernels::capacity::expert_counts::{self, ExpertCountsArgs, ExpertCountsDesc};
use moe_kernels::capacity::expert_map::{self, ExpertMapArgs, ExpertMapDesc};
use moe_kernels::capacity::keep_largest::{self, KeepLargestArgs, KeepLargestDesc};
use moe_kernels::capacity::routing_map::{self, FromIdsArgs, RoutingMapDesc, ToIdsArgs};
use moe_kernels::experts::combine::{self, CombineArgs, CombineDesc};
use moe_kernels::experts::permute::{self, PermuteArgs, PermuteDesc, Unfilled};
use moe_kernels::experts::{Dispatched, SlotShape};
use moe_kernels::rules::{AdmissionRule, IdFormat};
use moe_kernels::{In, Workspace};

use super::{Chosen, down, gpu, junk, up};
use crate::support::compare::Storage;
use crate::support::device;

/// Slots sorted by expert.
pub struct Sorted {
    pub stream: Arc<CudaStream>,
    pub dispatched: Dispatched,
    pub dropped: i32,
    pub shape: SlotShape,
}

/// Sorts the slots of `ids [T, k]`.
pub fn sort(ids: &[i32], weights: Option<&[f32]>, desc: &DispatchDesc) -> Sorted {
    let (kernels, stream) = gpu();
    let mut dispatched = Dispatched::new(&stream, &desc.shape()).unwrap();
    let bytes = dispatch::workspace_bytes(desc, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    let (on_device, weights) = (up(&stream, ids), weights.map(|weights| up(&stream, weights)));
    let mut dropped = up(&stream, &[0i32]);
    let mut args = DispatchArgs::new(&on_device, &mut dispatched, &mut workspace);
    args.weights = weights.as_ref().map(In::from);
    if desc.max_rows.is_some() {
        args = args.dropped(&mut dropped);
    }
    dispatch::forward(kernels, &stream, desc, args).unwrap();
    let dropped = down(&stream, &dropped, 1)[0];
    Sorted { dispatched, dropped, shape: desc.shape(), stream }
}

impl Sorted {
    pub fn counts(&self) -> Vec<i32> {
        down(&self.stream, self.dispatched.counts(), self.shape.experts)
    }

    pub fn offsets(&self) -> Vec<i32> {
        down(&self.stream, self.dispatched.offsets(), self.shape.experts + 1)
    }

    /// Of the rows that there are.
    pub fn slot_token(&self) -> Vec<i32> {
        down(&self.stream, self.dispatched.slot_token(), self.rows())
    }

    pub fn token_slot(&self) -> Vec<i32> {
        down(&self.stream, self.dispatched.token_slot(), self.shape.tokens * self.shape.top_k.unwrap())
    }

    /// Of the rows that there are.
    pub fn slot_weight(&self) -> Vec<f32> {
        down(&self.stream, self.dispatched.slot_weight(), self.rows())
    }

    pub fn rows(&self) -> usize {
        self.offsets()[self.shape.experts] as usize
    }

    /// Rows of `x [T, width]` in the order of the slots; as many as there are.
    pub fn permute<T: Storage>(&self, x: &[T], width: usize, unfilled: Unfilled) -> Vec<T> {
        let mut all = self.permute_all(x, width, unfilled);
        all.truncate(self.rows() * width);
        all
    }

    /// The same, of as many rows as there may be.
    pub fn permute_all<T: Storage>(&self, x: &[T], width: usize, unfilled: Unfilled) -> Vec<T> {
        let desc = PermuteDesc::of(T::DTYPE, &self.shape, width).unfilled(unfilled);
        let x = up(&self.stream, x);
        let mut out = junk::<T>(&self.stream, self.shape.slots * width);
        let args = PermuteArgs::new(&x, &self.dispatched, &mut out);
        permute::forward(device::kernels(), &self.stream, &desc, args).unwrap();
        down(&self.stream, &out, self.shape.slots * width)
    }

    /// Each token's sum of its rows of `rows [slots, width]`, weighted by `weights [T, k]`.
    pub fn unpermute<T: Storage>(&self, rows: &[T], weights: Option<&[f32]>, width: usize) -> Vec<T> {
        let desc = CombineDesc::new(T::DTYPE, self.shape, width);
        let mut padded = rows.to_vec();
        padded.resize(self.shape.slots * width, T::from_f64(f64::NAN));
        let rows = up(&self.stream, &padded);
        let weights = weights.map(|weights| up(&self.stream, weights));
        let elements = self.shape.tokens * width;
        let mut y = junk::<T>(&self.stream, elements);
        let mut args = CombineArgs::new(&rows, &self.dispatched, &mut y);
        args.weights = weights.as_ref().map(In::from);
        combine::forward(device::kernels(), &self.stream, &desc, args).unwrap();
        down(&self.stream, &y, elements)
    }
}

/// Ids of all experts to those of a device: -1 where it has none.
pub fn map_ids(ids: &[i64], top_k: usize, map: &[i32]) -> Vec<i32> {
    let (kernels, stream) = gpu();
    let desc = ExpertMapDesc::new(ids.len() / top_k, map.len(), top_k).ids(IdFormat::I64);
    let (on_device, map) = (up(&stream, ids), up(&stream, map));
    let mut local = junk::<i32>(&stream, ids.len());
    expert_map::forward(kernels, &stream, &desc, ExpertMapArgs::new(&on_device, &map, &mut local)).unwrap();
    down(&stream, &local, ids.len())
}

/// Slots of each expert, and where its rows would begin.
pub fn count(ids: &[i32], experts: usize, row_multiple: usize) -> (Vec<i32>, Vec<i32>) {
    let (kernels, stream) = gpu();
    let desc = ExpertCountsDesc::new(ids.len(), experts).row_multiple(row_multiple);
    let on_device = up(&stream, ids);
    let (mut counts, mut offsets) = (junk::<i32>(&stream, experts), junk::<i32>(&stream, experts + 1));
    let mut workspace = Workspace::new(&stream, expert_counts::workspace_bytes()).unwrap();
    let args = ExpertCountsArgs::new(&on_device, &mut counts, &mut workspace).offsets(&mut offsets);
    expert_counts::forward(kernels, &stream, &desc, args).unwrap();
    (down(&stream, &counts, experts), down(&stream, &offsets, experts + 1))
}

/// [`count`] of ids of 64 bits.
pub fn count_wide(ids: &[i64], experts: usize) -> Vec<i32> {
    let (kernels, stream) = gpu();
    let desc = ExpertCountsDesc::new(ids.len(), experts).ids(IdFormat::I64);
    let on_device = up(&stream, ids);
    let mut counts = junk::<i32>(&stream, experts);
    let mut workspace = Workspace::new(&stream, expert_counts::workspace_bytes()).unwrap();
    let args = ExpertCountsArgs::new(&on_device, &mut counts, &mut workspace);
    expert_counts::forward(kernels, &stream, &desc, args).unwrap();
    down(&stream, &counts, experts)
}

/// A routing map's experts as ids, with their probabilities, and how many had no place.
pub fn map_to_ids(map: &[u8], probs: &[f32], experts: usize, top_k: usize) -> (Chosen, i32) {
    let (kernels, stream) = gpu();
    let tokens = map.len() / experts;
    let desc = RoutingMapDesc::new(tokens, experts, top_k);
    let (map, probs) = (up(&stream, map), up(&stream, probs));
    let (mut ids, mut weights) = (junk::<i32>(&stream, tokens * top_k), junk::<f32>(&stream, tokens * top_k));
    let mut over = junk::<i32>(&stream, 1);
    let args = ToIdsArgs::new(&map, &mut ids).probs(&probs).weights(&mut weights).over(&mut over);
    routing_map::to_ids(kernels, &stream, &desc, args).unwrap();
    let chosen = Chosen { ids: down(&stream, &ids, tokens * top_k), weights: down(&stream, &weights, tokens * top_k) };
    (chosen, down(&stream, &over, 1)[0])
}

/// Ids and weights as a routing map and its probabilities.
pub fn ids_to_map(ids: &[i32], weights: &[f32], experts: usize, top_k: usize) -> (Vec<u8>, Vec<f32>) {
    let (kernels, stream) = gpu();
    let tokens = ids.len() / top_k;
    let desc = RoutingMapDesc::new(tokens, experts, top_k);
    let (ids, weights) = (up(&stream, ids), up(&stream, weights));
    let (mut map, mut probs) = (junk::<u8>(&stream, tokens * experts), junk::<f32>(&stream, tokens * experts));
    let args = FromIdsArgs::new(&ids, &mut map).weights(&weights).probs(&mut probs);
    routing_map::from_ids(kernels, &stream, &desc, args).unwrap();
    (down(&stream, &map, tokens * experts), down(&stream, &probs, tokens * experts))
}

/// Rows of `x` with chunks of `sizes` rows in another `order`.
pub fn sort_chunks<T: Storage>(x: &[T], width: usize, sizes: &[i32], order: &[i32]) -> (Vec<T>, Vec<i32>) {
    let (kernels, stream) = gpu();
    let rows = x.len() / width;
    let desc = ChunksDesc::new(sizes.len(), rows);
    let (on_device, sizes_up, order_up) = (up(&stream, x), up(&stream, sizes), up(&stream, order));
    let (mut source, mut new_sizes) = (junk::<i32>(&stream, rows), junk::<i32>(&stream, sizes.len()));
    let args = ChunksArgs::new(&sizes_up, &order_up, &mut source).new_sizes(&mut new_sizes);
    chunks::forward(kernels, &stream, &desc, args).unwrap();
    let mut out = junk::<T>(&stream, rows * width);
    let desc = PermuteDesc::new(T::DTYPE, rows, rows, width);
    permute::forward(kernels, &stream, &desc, PermuteArgs::new(&on_device, &source, &mut out)).unwrap();
    (down(&stream, &out, rows * width), down(&stream, &new_sizes, sizes.len()))
}

/// Each expert's `capacity` slots of largest weight; the others -1.
pub fn keep_largest(chosen: &Chosen, experts: usize, top_k: usize, capacity: usize) -> Chosen {
    let (kernels, stream) = gpu();
    let slots = chosen.ids.len();
    let desc = KeepLargestDesc::new(slots / top_k, experts, top_k, capacity);
    let (ids, weights) = (up(&stream, &chosen.ids), up(&stream, &chosen.weights));
    let (mut to, mut to_weights) = (junk::<i32>(&stream, slots), junk::<f32>(&stream, slots));
    let args = KeepLargestArgs::new(&ids, &weights, &mut to).kept_weights(&mut to_weights);
    keep_largest::forward(kernels, &stream, &desc, args).unwrap();
    Chosen { ids: down(&stream, &to, slots), weights: down(&stream, &to_weights, slots) }
}

/// Who of `chosen` is admitted by `rule`.
pub fn admit(chosen: &Chosen, rule: AdmissionRule) -> Chosen {
    admit_by(chosen, rule, None)
}

/// The same, tokens by their `priority`.
pub fn admit_by(chosen: &Chosen, rule: AdmissionRule, priority: Option<&[f32]>) -> Chosen {
    let (kernels, stream) = gpu();
    let desc = AdmissionDesc::new(chosen.ids.len() / rule.candidates, rule);
    let admitted = desc.tokens * rule.top_k;
    let (ids, weights) = (up(&stream, &chosen.ids), up(&stream, &chosen.weights));
    let (mut to, mut to_weights) = (junk::<i32>(&stream, admitted), junk::<f32>(&stream, admitted));
    let mut workspace = Workspace::new(&stream, admission::workspace_bytes(&desc).unwrap()).unwrap();
    let priority = priority.map(|priority| up(&stream, priority));
    let mut args = AdmissionArgs::new(&ids, &weights, &mut to, &mut to_weights, &mut workspace);
    args.priority = priority.as_ref().map(In::from);
    admission::forward(kernels, &stream, &desc, args).unwrap();
    Chosen { ids: down(&stream, &to, admitted), weights: down(&stream, &to_weights, admitted) }
}
