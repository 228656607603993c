//! Lists of a dispatch that a test made.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr};
use moe_kernels::experts::{Dispatched, Lists, SlotShape, TileEntry};
use moe_kernels::reference::dispatch::Dispatched as Plan;

use crate::support::device;

/// Lists on the host. What is shorter than its buffer is followed by numbers that are no row, token or expert.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    pub counts: Vec<i32>,
    pub offsets: Vec<i32>,
    pub slot_token: Vec<i32>,
    pub token_slot: Vec<i32>,
    pub token_offsets: Vec<i32>,
    pub tiles: Vec<TileEntry>,
    pub num_tiles: i32,
}

impl Rows {
    /// What the reference's dispatch lists.
    pub fn of(plan: &Plan) -> Rows {
        Rows {
            counts: vec![],
            offsets: vec![],
            slot_token: plan.slot_token.clone(),
            token_slot: plan.token_slot.clone(),
            token_offsets: vec![],
            tiles: plan.tiles.clone(),
            num_tiles: plan.tiles.len() as i32,
        }
    }

    /// On the device, in buffers of `shape` that end where their allocations do.
    pub fn lists(&self, stream: &Arc<CudaStream>, shape: &SlotShape) -> Lists {
        let token_slots = shape.top_k.map_or(shape.slots, |top_k| shape.tokens * top_k);
        let token_offsets = if shape.top_k.is_some() { 0 } else { shape.tokens + 1 };
        Lists {
            counts: filled(stream, &self.counts, shape.experts, i32::MAX),
            offsets: filled(stream, &self.offsets, shape.experts + 1, i32::MAX),
            slot_token: filled(stream, &self.slot_token, shape.slots, i32::MAX),
            token_slot: filled(stream, &self.token_slot, token_slots, i32::MAX),
            token_offsets: filled(stream, &self.token_offsets, token_offsets, i32::MAX),
            slot_weight: filled(stream, &[], shape.slots, f32::NAN),
            tiles: filled(stream, &self.tiles, shape.max_tiles, [i32::MAX; 4]),
            num_tiles: filled(stream, &[self.num_tiles], 1, i32::MAX),
        }
    }

    /// As a dispatch. What the lists say must be right for `shape`.
    pub fn dispatched(&self, stream: &Arc<CudaStream>, shape: &SlotShape) -> Dispatched {
        // SAFETY: tests give lists of the reference, or of rows and tokens drawn within `shape`; what follows them is covered by no tile.
        unsafe { Dispatched::from_lists(shape, self.lists(stream, shape)) }.unwrap()
    }
}

/// `len` elements, `values` first. A buffer has at least one.
fn filled<T: DeviceRepr + Copy>(stream: &Arc<CudaStream>, values: &[T], len: usize, rest: T) -> CudaSlice<T> {
    let mut all = values.to_vec();
    all.resize(len.max(1), rest);
    stream.clone_htod(&all).expect("the device takes a test's lists")
}

/// Entries behind a list that a kernel writes, where nothing else would notice a write past its end.
pub fn behind() -> usize {
    if device::control().is_some() { 0 } else { 256 }
}

/// Lists of nothing but bits that are one, for a dispatch to fill.
pub fn junk(stream: &Arc<CudaStream>, shape: &SlotShape) -> Dispatched {
    let list = |len: usize| filled(stream, &[], len + behind(), -1);
    let token_slots = shape.top_k.map_or(shape.slots, |top_k| shape.tokens * top_k);
    let lists = Lists {
        counts: list(shape.experts),
        offsets: list(shape.experts + 1),
        slot_token: list(shape.slots),
        token_slot: list(token_slots),
        token_offsets: list(if shape.top_k.is_some() { 0 } else { shape.tokens + 1 }),
        slot_weight: filled(stream, &[], shape.slots + behind(), f32::from_bits(u32::MAX)),
        tiles: filled(stream, &[], shape.max_tiles + behind(), [-1; 4]),
        num_tiles: list(1),
    };
    // SAFETY: no product or sum goes by these lists before a dispatch has filled them.
    unsafe { Dispatched::from_lists(shape, lists) }.unwrap()
}

/// The first `len` entries of a list, after a look at those behind them.
pub fn read<T: DeviceRepr + bytemuck::Pod>(
    stream: &Arc<CudaStream>,
    name: &str,
    list: &CudaSlice<T>,
    len: usize,
) -> Vec<T> {
    let mut all = stream.clone_dtoh(list).expect("the device gives back a test's lists");
    let past = bytemuck::cast_slice::<T, u8>(&all[len..]);
    assert!(past.iter().all(|&byte| byte == 0xff), "{name}: written past its last element");
    all.truncate(len);
    all
}
