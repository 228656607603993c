//! Lists of a dispatch that hold junk until a dispatch fills them: an entry that it leaves out is noticed.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use moe_kernels::experts::{Dispatched, Lists, SlotShape};

const JUNK: i32 = -7;

/// Lists of `shape`, to be filled before anything goes by them.
pub fn junk(stream: &Arc<CudaStream>, shape: &SlotShape) -> Dispatched {
    let ints = |len: usize| stream.clone_htod(&vec![JUNK; len.max(1)]).expect("device memory");
    let choices = shape.top_k.map_or(shape.slots, |top_k| shape.tokens * top_k);
    let lists = Lists {
        counts: ints(shape.experts),
        offsets: ints(shape.experts + 1),
        slot_token: ints(shape.slots),
        token_slot: ints(choices),
        token_offsets: ints(shape.tokens + 1),
        slot_weight: stream.clone_htod(&vec![f32::NAN; shape.slots.max(1)]).expect("device memory"),
        tiles: stream.clone_htod(&vec![[JUNK; 4]; shape.max_tiles.max(1)]).expect("device memory"),
        num_tiles: ints(1),
    };
    // SAFETY: every test that calls this dispatches into the lists before it uses them, on the same stream.
    unsafe { Dispatched::from_lists(shape, lists) }.expect("lists of that shape")
}
