//! Dispatch: sorts slots by expert, so that each expert's rows are contiguous.
//!
//! A slot is one token sent to one expert. Slots keep token order within an expert, so the layout depends on the ids only:
//! `token_slot[t,j] = offsets[e] + rank` with `e = ids[t,j]`, `slot_token` is its inverse, `offsets` the exclusive sum of
//! `counts`. An id outside `0..E` (-1 by convention) skips the slot: `token_slot = -1`.
//!
//! With a [`Capacity`], each expert takes at most so many slots of a sequence, in token order, and drops the others (Fedus
//! et al., *Switch Transformers*, 2021, section 2.2; Lepikhin et al., *GShard*, 2020, section 2.2).
//!
//! The list of tiles `{expert, first row, last row + 1, 0}` is what the grouped GEMM walks: no count returns to the host.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::experts::tiles::max_tiles;
use crate::registry::{Dispatch, Kernel};
use crate::rules::Capacity;
use crate::runtime::launch::{Address, Held, SCALAR, Scope, VECTOR, optional};
use crate::runtime::params::DispatchParams;
use crate::runtime::shape;
use crate::runtime::workspace::BARRIER_HEADER;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection, Workspace};

const OPERATION: &str = "dispatch";

/// One entry of the tile list: `[expert, first row, last row + 1, 0]`.
pub type TileEntry = [i32; 4];

/// Shapes of a dispatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DispatchDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// Experts per token `k`, 1 to 32. More than `E` where ids were mapped to the experts of one device.
    pub top_k: usize,
    /// Limit per expert; none is dropless.
    pub capacity: Option<Capacity>,
    /// Rows of a tile in the tile list, at least 1; the GEMM must use tiles of that height
    /// ([`crate::experts::tiles::select_tile`]).
    pub tile_m: usize,
}

impl DispatchDesc {
    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::experts(OPERATION, self.experts)?;
        shape::top_k(OPERATION, self.top_k, usize::MAX)?;
        shape::positive(OPERATION, "tile_m", self.tile_m)?;
        shape::product_i32(OPERATION, "token_slot", &[self.tokens, self.top_k])?;
        if let Some(capacity) = self.capacity {
            shape::positive(OPERATION, "capacity.per_expert", capacity.per_expert)?;
            shape::positive(OPERATION, "capacity.tokens_per_sequence", capacity.tokens_per_sequence)?;
            if capacity.padded {
                let rows = [capacity.per_expert, self.sequences(), self.experts];
                shape::product_i32(OPERATION, "capacity.per_expert", &rows)?;
            }
        }
        // A tile may end past the last row.
        if self.slots() + self.tile_m > shape::MAX {
            let value = format!("{} slots + tile_m {}", self.slots(), self.tile_m);
            return Err(Error::Overflow { operation: OPERATION, argument: "tile_m", value, limit: shape::MAX as u64 });
        }
        Ok(())
    }

    /// Rows of the slot-ordered buffers: `T * k`, or `E * per_expert * sequences` in the padded layout.
    ///
    /// Meaningful for a valid descriptor.
    pub fn slots(&self) -> usize {
        match self.padded_rows() {
            0 => self.tokens * self.top_k,
            rows => rows * self.experts,
        }
    }

    /// Entries that the tile list may get.
    ///
    /// Meaningful for a valid descriptor.
    pub fn max_tiles(&self) -> usize {
        let by_slots = max_tiles(self.tokens * self.top_k, self.experts, self.tile_m);
        match self.capacity {
            None => by_slots,
            Some(capacity) => {
                let rows = capacity.per_expert.saturating_mul(self.sequences());
                by_slots.min(rows.div_ceil(self.tile_m).saturating_mul(self.experts))
            }
        }
    }

    /// Rows kept for each expert in the padded layout, else 0.
    fn padded_rows(&self) -> usize {
        self.capacity.filter(|capacity| capacity.padded).map_or(0, |capacity| capacity.per_expert * self.sequences())
    }

    /// Capacity, tokens of a sequence and rows kept for each expert, as kernels take them: 0 where there is no limit.
    pub(crate) fn capacity_words(&self) -> [u32; 3] {
        let (capacity, sequence) =
            self.capacity.map_or((0, 0), |capacity| (capacity.per_expert, capacity.tokens_per_sequence));
        [capacity, sequence, self.padded_rows()].map(|value| value as u32)
    }

    fn sequences(&self) -> usize {
        self.capacity.map_or(0, |capacity| self.tokens.div_ceil(capacity.tokens_per_sequence))
    }
}

/// Buffers that a dispatch writes.
pub struct DispatchOutputs<'a> {
    /// `[E]`: slots that each expert keeps.
    pub counts: Out<'a, i32>,
    /// `[E + 1]`: first row of each expert, then the number of rows.
    pub offsets: Out<'a, i32>,
    /// `[slots]`: token of each row. In the padded layout -1 for an unfilled row; in the other, entries from `offsets[E]` on
    /// are left as they are.
    pub slot_token: Out<'a, i32>,
    /// `[T, k]`: row of each slot; -1 for one that was skipped or dropped.
    pub token_slot: Out<'a, i32>,
    /// `[slots]`: weight of each row, for a GEMM that scales its rows. Needs weights.
    pub slot_weight: Option<Out<'a, f32>>,
    /// The tile list.
    pub tiles: Option<TileList<'a>>,
}

/// The tile list of a grouped GEMM.
pub struct TileList<'a> {
    /// `[max_tiles]` ([`DispatchDesc::max_tiles`]).
    pub tiles: Out<'a, TileEntry>,
    /// `[1]`: entries written.
    pub num_tiles: Out<'a, i32>,
}

/// Buffers of a dispatch.
pub struct DispatchArgs<'a> {
    /// `[T, k]`.
    pub ids: In<'a, i32>,
    /// `[T, k]`, for `slot_weight`.
    pub weights: Option<In<'a, f32>>,
    /// What is written.
    pub outputs: DispatchOutputs<'a>,
    /// At least [`workspace_bytes`].
    pub workspace: &'a mut Workspace,
}

/// Workspace of [`forward`] in bytes.
///
/// # Errors
/// Those of [`DispatchDesc::validate`].
pub fn workspace_bytes(desc: &DispatchDesc, device: &DeviceInfo) -> Result<usize, Error> {
    desc.validate()?;
    Ok(barrier_bytes(desc, dispatch_blocks(desc, device)))
}

/// A barrier, and the counters of each block.
pub(crate) fn barrier_bytes(desc: &DispatchDesc, blocks: u32) -> usize {
    BARRIER_HEADER + blocks as usize * desc.experts * size_of::<i32>()
}

/// The dispatch kernel for the number of experts.
fn kernel(desc: &DispatchDesc) -> Dispatch {
    let fits = |max_experts: &u32| *max_experts as usize >= desc.experts;
    let largest = Dispatch::MAX_EXPERTS[Dispatch::MAX_EXPERTS.len() - 1];
    Dispatch { max_experts: Dispatch::MAX_EXPERTS.into_iter().find(fits).unwrap_or(largest) }
}

/// Blocks of dispatch: about 105 instructions for 32 slots.
fn dispatch_blocks(desc: &DispatchDesc, device: &DeviceInfo) -> u32 {
    blocks(desc, kernel(desc).warps(), 105 * desc.top_k as u64 / 32, device)
}

/// Blocks of `warps` warps that share the tokens, `work` instructions each.
///
/// All must be resident at once, as they meet at a barrier: at most one a multiprocessor. A warp gets at least four
/// tokens, and no more warps work than there are sequences where a capacity counts by sequence (the kernel then uses
/// half of a block's warps). More blocks shorten the first pass, of `work T / (P warps)` instructions, and lengthen the
/// second, where each block adds up the counters of all blocks, `4 P E` bytes at about 64 a clock: the sum is least at
/// `P = sqrt(16 work T / (warps E))`.
pub(crate) fn blocks(desc: &DispatchDesc, warps: u32, work: u64, device: &DeviceInfo) -> u32 {
    if !device.cooperative_launch {
        return 1;
    }
    let tokens = desc.tokens as u32;
    let balanced = (16 * work * u64::from(tokens) / (u64::from(warps) * desc.experts as u64)).isqrt();
    let by_sequence = match desc.capacity {
        Some(_) => (desc.sequences() as u32).div_ceil((warps / 2).max(1)),
        None => u32::MAX,
    };
    let most = tokens.div_ceil(4 * warps).min(by_sequence).min(device.multiprocessors);
    (balanced.min(most.into()) as u32).max(1)
}

/// Chooses kernel and grid.
///
/// # Errors
/// Those of [`DispatchDesc::validate`].
pub fn select(desc: &DispatchDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let blocks = dispatch_blocks(desc, device);
    Ok(Selection::cooperative(Kernel::Dispatch(kernel(desc)), blocks))
}

/// Sorts the slots of given ids.
///
/// With no tokens counts, offsets and the number of tiles are set to zero, and nothing is launched.
///
/// # Errors
/// Those of [`DispatchDesc::validate`]; [`Error::Missing`] for `slot_weight` without `weights`; those of a buffer:
/// [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those of
/// the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &DispatchDesc,
    args: DispatchArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    if args.outputs.slot_weight.is_some() && args.weights.is_none() {
        let reason = "slot_weight is asked for";
        return Err(Error::Missing { operation: OPERATION, argument: "weights", reason });
    }
    let outputs = HeldOutputs::open(&scope, desc, args.outputs)?;
    if desc.tokens == 0 {
        return outputs.zero(&scope, desc);
    }
    let choices = desc.tokens * desc.top_k;
    let ids = scope.read("ids", args.ids, choices, SCALAR)?;
    let weights = scope.read_some("weights", args.weights, choices, SCALAR)?;
    let workspace = args.workspace.open(&scope, workspace_bytes(desc, kernels.device())?)?;
    enqueue(&scope, desc, &selection, ids.address(), optional(&weights), outputs.addresses(), workspace.address())
}

pub(crate) fn enqueue(
    scope: &Scope<'_>,
    desc: &DispatchDesc,
    selection: &Selection,
    ids: Address<'_>,
    weights: Option<Address<'_>>,
    to: Outputs<'_>,
    workspace: Address<'_>,
) -> Result<(), Error> {
    let [capacity, tokens_per_sequence, padded_rows] = desc.capacity_words();
    scope.launch(
        selection,
        DispatchParams {
            ids: ids.into(),
            weights: weights.into(),
            tokens: desc.tokens as u32,
            experts: desc.experts as u32,
            top_k: desc.top_k as u32,
            capacity,
            tokens_per_sequence,
            padded_rows,
            tile_m: desc.tile_m as u32,
            counts: to.counts.into(),
            offsets: to.offsets.into(),
            slot_token: to.slot_token.into(),
            token_slot: to.token_slot.into(),
            slot_weight: to.slot_weight.into(),
            tiles: to.tiles.into(),
            num_tiles: to.num_tiles.into(),
            workspace: workspace.into(),
        },
    )
}

/// What dispatch writes.
pub(crate) struct Outputs<'a> {
    pub(crate) counts: Address<'a>,
    pub(crate) offsets: Address<'a>,
    pub(crate) slot_token: Address<'a>,
    pub(crate) token_slot: Address<'a>,
    pub(crate) slot_weight: Option<Address<'a>>,
    pub(crate) tiles: Option<Address<'a>>,
    pub(crate) num_tiles: Option<Address<'a>>,
}

/// Where dispatch writes, held for a launch.
pub(crate) struct HeldOutputs<'a> {
    counts: Held<'a>,
    offsets: Held<'a>,
    slot_token: Held<'a>,
    token_slot: Held<'a>,
    slot_weight: Option<Held<'a>>,
    tiles: Option<(Held<'a>, Held<'a>)>,
}

impl<'a> HeldOutputs<'a> {
    pub(crate) fn open<'c: 'a>(
        scope: &Scope<'a>,
        desc: &DispatchDesc,
        outputs: DispatchOutputs<'c>,
    ) -> Result<HeldOutputs<'a>, Error> {
        let slots = desc.slots();
        Ok(HeldOutputs {
            counts: scope.write("counts", outputs.counts, desc.experts, SCALAR)?,
            offsets: scope.write("offsets", outputs.offsets, desc.experts + 1, SCALAR)?,
            slot_token: scope.write("slot_token", outputs.slot_token, slots, SCALAR)?,
            token_slot: scope.write("token_slot", outputs.token_slot, desc.tokens * desc.top_k, SCALAR)?,
            slot_weight: scope.write_some("slot_weight", outputs.slot_weight, slots, SCALAR)?,
            tiles: match outputs.tiles {
                Some(list) => Some((
                    scope.write("tiles", list.tiles, desc.max_tiles(), VECTOR)?,
                    scope.write("num_tiles", list.num_tiles, 1, SCALAR)?,
                )),
                None => None,
            },
        })
    }

    pub(crate) fn addresses(&self) -> Outputs<'_> {
        Outputs {
            counts: self.counts.address(),
            offsets: self.offsets.address(),
            slot_token: self.slot_token.address(),
            token_slot: self.token_slot.address(),
            slot_weight: optional(&self.slot_weight),
            tiles: self.tiles.as_ref().map(|(tiles, _)| tiles.address()),
            num_tiles: self.tiles.as_ref().map(|(_, num_tiles)| num_tiles.address()),
        }
    }

    /// The result for no tokens.
    pub(crate) fn zero(&self, scope: &Scope<'_>, desc: &DispatchDesc) -> Result<(), Error> {
        scope.zero(self.counts.address(), desc.experts * size_of::<i32>())?;
        scope.zero(self.offsets.address(), (desc.experts + 1) * size_of::<i32>())?;
        match &self.tiles {
            Some((_, num_tiles)) => scope.zero(num_tiles.address(), size_of::<i32>()),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::device::A100;

    fn desc() -> DispatchDesc {
        DispatchDesc { tokens: 1000, experts: 64, top_k: 4, capacity: None, tile_m: 64 }
    }

    fn capped(per_expert: usize, tokens_per_sequence: usize, padded: bool) -> DispatchDesc {
        DispatchDesc { capacity: Some(Capacity { per_expert, tokens_per_sequence, padded }), ..desc() }
    }

    fn fault(desc: DispatchDesc) -> &'static str {
        desc.validate().unwrap_err().argument().unwrap()
    }

    #[test]
    fn faults_name_their_field() {
        assert_eq!(desc().validate(), Ok(()));
        assert_eq!(capped(10, 100, true).validate(), Ok(()));
        assert_eq!(fault(DispatchDesc { experts: 4097, ..desc() }), "experts");
        assert_eq!(fault(DispatchDesc { top_k: 65, ..desc() }), "top_k");
        assert_eq!(fault(DispatchDesc { tile_m: 0, ..desc() }), "tile_m");
        assert_eq!(fault(DispatchDesc { tokens: (1 << 29) - 1, tile_m: 128, ..desc() }), "tile_m");
        assert_eq!(fault(DispatchDesc { tokens: 1 << 30, ..desc() }), "token_slot");
        assert_eq!(fault(DispatchDesc { tokens: 1 << 40, ..desc() }), "tokens");
        assert_eq!(fault(capped(0, 100, false)), "capacity.per_expert");
        assert_eq!(fault(capped(1, 0, false)), "capacity.tokens_per_sequence");
        assert_eq!(fault(capped(1 << 25, 1000, true)), "capacity.per_expert");
        assert_eq!(capped(1 << 25, 1000, false).validate(), Ok(()), "unpadded, a capacity costs no rows");
    }

    #[test]
    fn slots_and_tiles() {
        assert_eq!(desc().slots(), 4000);
        assert_eq!(capped(10, 300, false).slots(), 4000);
        assert_eq!(capped(10, 300, true).slots(), 64 * 10 * 4);
        assert_eq!(capped(10, 300, true).max_tiles(), 64, "40 rows each");
        assert_eq!(capped(100_000, 1000, false).max_tiles(), desc().max_tiles());
    }

    #[test]
    fn blocks_are_resident_and_busy() {
        let blocks = |desc: &DispatchDesc, device: &DeviceInfo| select(desc, device).unwrap().grid[0];
        assert_eq!(blocks(&DispatchDesc { tokens: 1, ..desc() }, &A100), 1);
        assert_eq!(blocks(&DispatchDesc { tokens: 1 << 20, ..desc() }, &A100), A100.multiprocessors);
        assert_eq!(blocks(&DispatchDesc { tokens: 1 << 20, ..capped(9, 1 << 15, false) }, &A100), 8, "32 sequences");
        let sparse = DispatchDesc { tokens: 4096, experts: 4096, top_k: 1, ..desc() };
        assert!(blocks(&sparse, &A100) < 16, "each block reads the counters of all");
        let plain = DeviceInfo { cooperative_launch: false, ..A100 };
        assert_eq!(blocks(&DispatchDesc { tokens: 1 << 20, ..desc() }, &plain), 1);
    }
    #[test]
    fn workspace_holds_the_counters_of_all_blocks() {
        let desc = DispatchDesc { tokens: 1 << 20, ..desc() };
        assert_eq!(workspace_bytes(&desc, &A100).unwrap(), 16 + 108 * 64 * 4);
    }
}
