//! Dispatch: sorts slots by expert, so that each expert's rows are contiguous.
//!
//! A slot is one token sent to one expert. Slots keep token order within an expert, so the layout depends on the ids only:
//! `token_slot[t,j] = offsets[e] + rank` with `e = ids[t,j]`, `slot_token` is its inverse, `offsets` the exclusive sum of
//! `counts`. An id outside `0..E` (-1 by convention) skips the slot: `token_slot = -1`.
//!
//! With a [`Capacity`], each expert takes at most so many slots of a sequence, in token order, and drops the others (Fedus
//! et al., *Switch Transformers*, 2021, section 2.2; Lepikhin et al., *GShard*, 2020, section 2.2).
//!
//! Sequences follow each other there (`[B, S]`), as the dispatch counts in the order of tokens. Where their tokens alternate (`[S, B]`, time first), an
//! [admission](crate::capacity::admission) in front of it has the same limit, in a launch of its own, and what it drops the dispatch skips. In a layer it
//! is [`LayerDesc::admission`](crate::layer::LayerDesc::admission) in place of [`LayerDesc::capacity`](crate::layer::LayerDesc::capacity); for the padded
//! layout beside `Capacity::new(per_expert * sequences, tokens).padded(true)`, which drops nothing more.
//!
//! ```
//! use moe_kernels::Workspace;
//! use moe_kernels::capacity::admission::{self, AdmissionArgs, AdmissionDesc};
//! use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
//! use moe_kernels::experts::Dispatched;
//! use moe_kernels::rules::{AdmissionRule, Capacity, Sequences};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = moe_kernels::Kernels::new(stream.context())?;
//! // Two sequences of three tokens, all of which want expert 0 but one; it takes two of each sequence.
//! let (tokens, experts, per_expert, per_sequence) = (6, 2, 2, 3);
//! let [following, alternating] = [[0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0]];
//! let desc = DispatchDesc::new(tokens, experts, 1, 16);
//! # let device = kernels.device();
//! let mut kept = |desc: &DispatchDesc, ids: &[i32]| -> Result<Vec<bool>, Box<dyn std::error::Error>> {
//!     let mut dispatched = Dispatched::new(&stream, &desc.shape())?;
//!     let mut workspace = Workspace::new(&stream, dispatch::workspace_bytes(desc, device)?)?;
//!     let ids = stream.clone_htod(ids)?;
//!     dispatch::forward(&kernels, &stream, desc, DispatchArgs::new(&ids, &mut dispatched, &mut workspace))?;
//!     Ok(stream.clone_dtoh(dispatched.token_slot())?.iter().map(|&slot| slot >= 0).collect())
//! };
//! let limited = desc.capacity(Some(Capacity::new(per_expert, per_sequence)));
//! assert_eq!(kept(&limited, &following)?, [true, true, false, true, true, true]);
//!
//! // The same tokens, those of both sequences in turns.
//! let rule = AdmissionRule::new(experts, 1, per_expert, per_sequence).groups(Sequences::Alternating);
//! let admitting = AdmissionDesc::new(tokens, rule);
//! let (ids, weights) = (stream.clone_htod(&alternating)?, stream.clone_htod(&[1.0_f32; 6])?);
//! let (mut admitted, mut admitted_weights) = (stream.alloc_zeros(tokens)?, stream.alloc_zeros(tokens)?);
//! let mut workspace = Workspace::new(&stream, admission::workspace_bytes(&admitting)?)?;
//! let args = AdmissionArgs::new(&ids, &weights, &mut admitted, &mut admitted_weights, &mut workspace);
//! admission::forward(&kernels, &stream, &admitting, args)?;
//! assert_eq!(kept(&desc, &stream.clone_dtoh(&admitted)?)?, [true, true, true, true, false, true]);
//! # Ok(())
//! # }
//! ```
//!
//! [`DispatchDesc::row_multiple`] rounds every expert's rows up, and [`DispatchDesc::max_rows`] ends all rows: the slots of the last experts that would
//! stand past it are dropped, and [`DispatchArgs::dropped`] says how many.
//!
//! The lists are one value, [`Dispatched`], which products and sums take: no count returns to the host.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::experts::dispatched::{Dispatched, ListAddresses, SlotShape};
use crate::experts::tiles::max_tiles;
use crate::registry::{Dispatch, Kernel};
use crate::rules::{Capacity, IdFormat};
use crate::runtime::builder::{buffers, settings};
use crate::runtime::ids::Ids;
use crate::runtime::launch::{Address, SCALAR, Scope, optional};
use crate::runtime::params::{DispatchParams, DispatchRowsParams};
use crate::runtime::shape;
use crate::runtime::token_mask::MaskAddresses;
use crate::runtime::workspace::BARRIER_HEADER;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection, TokenMask, Workspace};

const OPERATION: &str = "dispatch";

/// Shapes of a dispatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DispatchDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts `E`, 1 to 8192; to 4096 with a capacity.
    pub experts: usize,
    /// Experts per token `k`, 1 to 64. More than `E` where ids were mapped to the experts of one device.
    pub top_k: usize,
    /// How ids are stored.
    pub ids: IdFormat,
    /// Limit per expert; none is dropless.
    pub capacity: Option<Capacity>,
    /// Rows of a tile in the tile list, at least 1; the GEMM must use tiles of that height
    /// ([`crate::experts::tiles::select_tile`]).
    pub tile_m: usize,
    /// Each expert's rows are rounded up to a multiple of this; 1 unless set. Rows in between have no token (`slot_token` -1) and are in no
    /// tile. Not in the padded layout.
    pub row_multiple: usize,
    /// Rows from this number on do not exist; none unless set. Not in the padded layout.
    pub max_rows: Option<usize>,
}

impl DispatchDesc {
    /// Dropless: `top_k` of `experts` experts for each of `tokens` tokens, in tiles of `tile_m` rows.
    pub const fn new(tokens: usize, experts: usize, top_k: usize, tile_m: usize) -> DispatchDesc {
        let ids = IdFormat::I32;
        DispatchDesc { tokens, experts, top_k, ids, capacity: None, tile_m, row_multiple: 1, max_rows: None }
    }

    /// Sizes of the lists.
    ///
    /// Meaningful for a valid descriptor.
    pub fn shape(&self) -> SlotShape {
        SlotShape::new(self.tokens, self.experts, Some(self.top_k), self.slots(), self.tile_m, self.max_tiles())
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::experts_up_to(OPERATION, self.experts, crate::MAX_COUNTED_EXPERTS)?;
        shape::top_k_up_to(OPERATION, self.top_k, usize::MAX, crate::MAX_TOP_K)?;
        shape::positive(OPERATION, "tile_m", self.tile_m)?;
        shape::product_i32(OPERATION, "token_slot", &[self.tokens, self.top_k])?;
        if let Some(capacity) = self.capacity {
            let most = Dispatch::MAX_LIMITED_EXPERTS as usize;
            if self.experts > most {
                let supported = format!("at most {most} with a capacity");
                return Err(Error::unsupported(OPERATION, "experts", supported, self.experts));
            }
            shape::positive(OPERATION, "capacity.per_expert", capacity.per_expert)?;
            shape::positive(OPERATION, "capacity.tokens_per_sequence", capacity.tokens_per_sequence)?;
            if capacity.padded {
                let rows = [capacity.per_expert, self.sequences(), self.experts];
                shape::product_i32(OPERATION, "capacity.per_expert", &rows)?;
            }
        }
        shape::positive(OPERATION, "row_multiple", self.row_multiple)?;
        if self.lays_rows() && self.padded_rows() > 0 {
            let argument = if self.row_multiple > 1 { "row_multiple" } else { "max_rows" };
            let reason = "in the padded layout every expert has the same rows";
            return Err(Error::Unexpected { operation: OPERATION, argument, reason });
        }
        if let Some(rows) = self.max_rows {
            shape::size(OPERATION, "max_rows", rows)?;
        }
        let multiples = max_tiles(self.tokens * self.top_k, self.experts, self.row_multiple);
        shape::product_i32(OPERATION, "row_multiple", &[self.row_multiple, multiples])?;
        // A tile may end past the last row.
        if self.slots() + self.tile_m > shape::MAX {
            let value = format!("{} slots + tile_m {}", self.slots(), self.tile_m);
            return Err(Error::Overflow { operation: OPERATION, argument: "tile_m", value, limit: shape::MAX as u64 });
        }
        Ok(())
    }

    /// Rows of the slot-ordered buffers: `T * k`, or `E * per_expert * sequences` in the padded layout; with a row multiple as many as all experts
    /// may need at most, and no more than `max_rows`.
    ///
    /// Meaningful for a valid descriptor.
    pub fn slots(&self) -> usize {
        match self.padded_rows() {
            0 => {
                let slots = self.tokens * self.top_k;
                let rows = self.row_multiple * max_tiles(slots, self.experts, self.row_multiple);
                rows.min(self.max_rows.unwrap_or(usize::MAX))
            }
            rows => rows * self.experts,
        }
    }

    /// Whether rows are rounded up, or end.
    pub(crate) fn lays_rows(&self) -> bool {
        self.row_multiple > 1 || self.max_rows.is_some()
    }

    /// Entries that the tile list may get.
    ///
    /// Meaningful for a valid descriptor.
    pub fn max_tiles(&self) -> usize {
        let slots = (self.tokens * self.top_k).min(self.max_rows.unwrap_or(usize::MAX));
        let by_slots = max_tiles(slots, self.experts, self.tile_m);
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

settings!(DispatchDesc { ids: IdFormat, capacity: Option<Capacity>, row_multiple: usize, max_rows: Option<usize> });

/// Buffers of a dispatch.
#[non_exhaustive]
pub struct DispatchArgs<'a> {
    /// `[T, k]`.
    pub ids: Ids<'a>,
    /// `[T, k]`: become [`Dispatched::slot_weight`].
    pub weights: Option<In<'a, f32>>,
    /// Which tokens count: the others take no slot, whatever their ids.
    pub mask: TokenMask<'a>,
    /// Filled; made for at least [`DispatchDesc::shape`].
    pub dispatched: &'a mut Dispatched,
    /// `[1]`, written: slots that stand past [`DispatchDesc::max_rows`]; with it only.
    pub dropped: Option<Out<'a, i32>>,
    /// At least [`workspace_bytes`].
    pub workspace: &'a mut Workspace,
}

impl<'a> DispatchArgs<'a> {
    /// The rows of `ids`, without weights.
    pub fn new(
        ids: impl Into<Ids<'a>>,
        dispatched: &'a mut Dispatched,
        workspace: &'a mut Workspace,
    ) -> DispatchArgs<'a> {
        DispatchArgs { ids: ids.into(), weights: None, mask: TokenMask::all(), dispatched, dropped: None, workspace }
    }

    /// With padding among the tokens.
    #[must_use]
    pub fn mask(self, mask: TokenMask<'a>) -> DispatchArgs<'a> {
        DispatchArgs { mask, ..self }
    }
}

buffers!(DispatchArgs<'a> { weights: In<f32>, dropped: Out<i32> });

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
    let max_experts = Dispatch::MAX_EXPERTS.into_iter().find(fits).unwrap_or(largest);
    Dispatch { max_experts, ids_bytes: desc.ids.bytes() }
}

/// Blocks of dispatch: about 105 instructions for 32 slots.
fn dispatch_blocks(desc: &DispatchDesc, device: &DeviceInfo) -> u32 {
    blocks(desc, kernel(desc).warps(), 105 * desc.top_k as u64 / 32, 1, device)
}

/// Blocks of `warps` warps that share the tokens, `work` instructions each.
///
/// All must be resident at once, as they meet at a barrier: at most `of_multiprocessor` for each. A warp gets at least four
/// tokens, and no more warps work than there are sequences where a capacity counts by sequence (the kernel then uses
/// half of a block's warps). More blocks shorten the first pass, of `work T / (P warps)` instructions, and lengthen the
/// second, where each block adds up the counters of all blocks, `4 P E` bytes at about 64 a clock: the sum is least at
/// `P = sqrt(16 work T / (warps E))`.
pub(crate) fn blocks(desc: &DispatchDesc, warps: u32, work: u64, of_multiprocessor: u32, device: &DeviceInfo) -> u32 {
    if !device.cooperative_launch {
        return 1;
    }
    let tokens = desc.tokens as u32;
    let balanced = (16 * work * u64::from(tokens) / (u64::from(warps) * desc.experts as u64)).isqrt();
    let by_sequence = match desc.capacity {
        Some(_) => (desc.sequences() as u32).div_ceil((warps / 2).max(1)),
        None => u32::MAX,
    };
    let most = tokens.div_ceil(4 * warps).min(by_sequence).min(of_multiprocessor * device.multiprocessors);
    (balanced.min(most.into()) as u32).max(1)
}

/// Chooses kernel and grid.
///
/// # Errors
/// Those of [`DispatchDesc::validate`].
pub fn select(desc: &DispatchDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let blocks = dispatch_blocks(desc, device);
    let kernel = kernel(desc);
    let kernel = if desc.lays_rows() { Kernel::DispatchRows(kernel) } else { Kernel::Dispatch(kernel) };
    Ok(Selection::cooperative(kernel, blocks))
}

/// Sorts the slots of given ids.
///
/// With no tokens counts, offsets and the number of tiles are set to zero, and nothing is launched.
///
/// # Errors
/// Those of [`DispatchDesc::validate`]; [`Error::Unexpected`] for `dropped` without `max_rows`; those of a buffer, [`Error::BufferTooShort`] also for `dispatched`:
/// [`Error::Misaligned`], [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &DispatchDesc,
    args: DispatchArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    if args.dropped.is_some() && desc.max_rows.is_none() {
        let reason = "without max_rows nothing is dropped";
        return Err(Error::Unexpected { operation: OPERATION, argument: "dropped", reason });
    }
    let dropped = scope.write_some("dropped", args.dropped, 1, SCALAR)?;
    let lists = args.dispatched.fill(&scope, &desc.shape())?;
    if desc.tokens == 0 {
        lists.zero(&scope)?;
        if let Some(dropped) = optional(&dropped) {
            scope.zero(dropped, size_of::<i32>())?;
        }
        lists.filled();
        return Ok(());
    }
    let choices = desc.tokens * desc.top_k;
    let ids = args.ids.open(&scope, "ids", desc.ids, choices)?;
    let weights = scope.read_some("weights", args.weights, choices, SCALAR)?;
    let mask = args.mask.open(&scope, desc.tokens)?;
    let workspace = args.workspace.open(&scope, workspace_bytes(desc, kernels.device())?)?;
    let to = Outputs::of(lists.addresses(), weights.is_some());
    let from = Choices { ids: ids.address(), weights: optional(&weights), mask: mask.addresses() };
    if desc.lays_rows() {
        enqueue_rows(&scope, desc, &selection, from, to, optional(&dropped), workspace.address())?;
    } else {
        enqueue(&scope, desc, &selection, from, to, workspace.address())?;
    }
    lists.filled();
    Ok(())
}

pub(crate) fn enqueue(
    scope: &Scope<'_>,
    desc: &DispatchDesc,
    selection: &Selection,
    from: Choices<'_>,
    to: Outputs<'_>,
    workspace: Address<'_>,
) -> Result<(), Error> {
    let [capacity, tokens_per_sequence, padded_rows] = desc.capacity_words();
    scope.launch(
        selection,
        DispatchParams {
            ids: from.ids.into(),
            weights: from.weights.into(),
            tokens: desc.tokens as u32,
            experts: desc.experts as u32,
            top_k: desc.top_k as u32,
            mask: from.mask.mask.into(),
            valid_tokens: from.mask.valid_tokens.into(),
            token_flags: from.mask.flags(),
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

/// [`enqueue`] with rows rounded up, or ended.
fn enqueue_rows(
    scope: &Scope<'_>,
    desc: &DispatchDesc,
    selection: &Selection,
    from: Choices<'_>,
    to: Outputs<'_>,
    dropped: Option<Address<'_>>,
    workspace: Address<'_>,
) -> Result<(), Error> {
    let [capacity, tokens_per_sequence, padded_rows] = desc.capacity_words();
    scope.launch(
        selection,
        DispatchRowsParams {
            ids: from.ids.into(),
            weights: from.weights.into(),
            tokens: desc.tokens as u32,
            experts: desc.experts as u32,
            top_k: desc.top_k as u32,
            mask: from.mask.mask.into(),
            valid_tokens: from.mask.valid_tokens.into(),
            token_flags: from.mask.flags(),
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
            row_multiple: desc.row_multiple as u32,
            max_rows: desc.max_rows.map_or(u32::MAX, |rows| rows as u32),
            dropped: dropped.into(),
            workspace: workspace.into(),
        },
    )
}

/// What dispatch reads.
pub(crate) struct Choices<'a> {
    pub(crate) ids: Address<'a>,
    pub(crate) weights: Option<Address<'a>>,
    pub(crate) mask: MaskAddresses<'a>,
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

impl<'a> Outputs<'a> {
    /// All lists; the weights of rows where there are any.
    pub(crate) fn of(lists: ListAddresses<'a>, weighted: bool) -> Outputs<'a> {
        Outputs {
            counts: lists.counts,
            offsets: lists.offsets,
            slot_token: lists.slot_token,
            token_slot: lists.token_slot,
            slot_weight: weighted.then_some(lists.slot_weight),
            tiles: Some(lists.tiles),
            num_tiles: Some(lists.num_tiles),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::device::A100;

    fn desc() -> DispatchDesc {
        DispatchDesc::new(1000, 64, 4, 64)
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
        assert_eq!(fault(DispatchDesc { experts: 8193, ..desc() }), "experts");
        let limited = desc().capacity(Some(Capacity::new(1, 1)));
        assert_eq!(fault(DispatchDesc { experts: 4097, ..limited }), "experts");
        assert_eq!(fault(DispatchDesc { top_k: 65, ..desc() }), "top_k");
        assert_eq!(fault(DispatchDesc { tile_m: 0, ..desc() }), "tile_m");
        assert_eq!(fault(DispatchDesc { tokens: (1 << 29) - 1, tile_m: 128, ..desc() }), "tile_m");
        assert_eq!(fault(DispatchDesc { tokens: 1 << 30, ..desc() }), "token_slot");
        assert_eq!(fault(DispatchDesc { tokens: 1 << 40, ..desc() }), "tokens");
        assert_eq!(fault(capped(0, 100, false)), "capacity.per_expert");
        assert_eq!(fault(capped(1, 0, false)), "capacity.tokens_per_sequence");
        assert_eq!(fault(capped(1 << 25, 1000, true)), "capacity.per_expert");
        assert_eq!(capped(1 << 25, 1000, false).validate(), Ok(()), "unpadded, a capacity costs no rows");
        assert_eq!(fault(desc().row_multiple(0)), "row_multiple");
        assert_eq!(fault(desc().row_multiple(1 << 30)), "row_multiple");
        assert_eq!(fault(capped(10, 100, true).row_multiple(2)), "row_multiple");
        assert_eq!(fault(capped(10, 100, true).max_rows(Some(2))), "max_rows");
        assert_eq!(fault(desc().max_rows(Some(1 << 31))), "max_rows");
    }

    #[test]
    fn slots_and_tiles() {
        assert_eq!(desc().slots(), 4000);
        assert_eq!(capped(10, 300, false).slots(), 4000);
        assert_eq!(capped(10, 300, true).slots(), 64 * 10 * 4);
        assert_eq!(capped(10, 300, true).max_tiles(), 64, "40 rows each");
        assert_eq!(capped(100_000, 1000, false).max_tiles(), desc().max_tiles());
        assert_eq!(desc().row_multiple(16).slots(), 16 * ((4000 + 64 * 15) / 16));
        assert_eq!(desc().row_multiple(16).max_rows(Some(100)).slots(), 100);
        assert_eq!(desc().max_rows(Some(10)).max_tiles(), 10);
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
        assert_eq!(workspace_bytes(&desc, &A100).unwrap(), 32 + 108 * 64 * 4);
    }
}
