//! Expert choice: the experts choose their tokens (Zhou et al., *Mixture-of-Experts with Expert Choice Routing*, 2022).
//!
//! 1. [`crate::routers::affinity`]: what each expert thinks of each token, `S^T [E, T]`.
//! 2. [`forward`]: each expert takes exactly its `c` best tokens; ties go to the lower token, NaN comes last. Slots
//!    `e * c` to `(e + 1) * c` are expert `e`'s, its tokens ascending.
//!
//! [`dispatch`] is the choice with the rows of experts and tokens laid out: a token has no expert, or many
//! ([`crate::capacity::token_slots`]). Products and [`crate::experts::combine`] take it as any other dispatch.
//!
//! The way back of the slots' weights is [`crate::routers::affinity_backward`].
//!
//! ```
//! use moe_kernels::experts::combine::{self, CombineArgs, CombineDesc};
//! use moe_kernels::experts::Dispatched;
//! use moe_kernels::routers::affinity::{self, AffinityArgs, AffinityDesc};
//! use moe_kernels::routers::expert_choice::{self, ExpertChoiceDesc};
//! use moe_kernels::rules::Affinity;
//! use moe_kernels::{Dtype, Workspace};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = moe_kernels::Kernels::new(stream.context())?;
//! let (tokens, experts, hidden) = (3, 2, 8);
//! let logits = stream.clone_htod(&[3.0, 0.0, 2.0, 5.0, 1.0, 4.0])?;
//! let mut affinities = stream.alloc_zeros(experts * tokens)?;
//! let desc = AffinityDesc::new(tokens, experts, Affinity::Logit);
//! affinity::forward(&kernels, &stream, &desc, AffinityArgs::new(&logits, &mut affinities))?;
//!
//! let desc = ExpertChoiceDesc::new(tokens, experts, 2);
//! let rows = expert_choice::rows(&desc, 16);
//! let mut dispatched = Dispatched::new(&stream, &rows)?;
//! let mut workspace = Workspace::new(&stream, expert_choice::workspace_bytes(&desc, kernels.device())?)?;
//! let affinities = (&affinities).into();
//! expert_choice::dispatch(&kernels, &stream, &desc, 16, affinities, &mut dispatched, &mut workspace)?;
//! assert_eq!(stream.clone_dtoh(dispatched.slot_token())?, [0, 1, 1, 2]);
//! // Token 1 has two experts, the others have one.
//! assert_eq!(stream.clone_dtoh(dispatched.token_offsets())?, [0, 1, 3, 4]);
//!
//! // Here the experts would come, from the rows of `dispatched` to `y_slots`.
//! let y_slots = stream.clone_htod(&vec![1.0_f32; desc.slots() * hidden])?;
//! let mut y = stream.alloc_zeros(tokens * hidden)?;
//! let desc = CombineDesc::new(Dtype::F32, rows, hidden);
//! let args = CombineArgs::new(&y_slots, &dispatched, &mut y).weights(dispatched.slot_weight());
//! combine::forward(&kernels, &stream, &desc, args)?;
//! assert_eq!(stream.clone_dtoh(&y)?, [[3.0; 8], [7.0; 8], [4.0; 8]].concat());
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::capacity::token_slots::{self, TokenSlotsArgs, TokenSlotsDesc};
use crate::experts::{Dispatched, SlotShape};
use crate::registry::Kernel;
use crate::runtime::builder::buffers;
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::{ExpertChoiceParams, Pointer};
use crate::runtime::shape;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection, TokenMask, Workspace};

const OPERATION: &str = "expert_choice";
const DISPATCH: &str = "expert_choice::dispatch";

/// Shapes of an expert choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExpertChoiceDesc {
    /// Tokens `T`, at least 1.
    pub tokens: usize,
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// Tokens of each expert `c`, 1 to `T`: the paper's `T * capacity factor / E` ([`crate::rules::capacity`]).
    pub capacity: usize,
}

impl ExpertChoiceDesc {
    /// `capacity` of `tokens` tokens for each of `experts` experts.
    pub const fn new(tokens: usize, experts: usize, capacity: usize) -> ExpertChoiceDesc {
        ExpertChoiceDesc { tokens, experts, capacity }
    }
}

impl ExpertChoiceDesc {
    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::positive(OPERATION, "tokens", self.tokens)?;
        shape::experts(OPERATION, self.experts)?;
        if self.capacity == 0 || self.capacity > self.tokens {
            let expected = format!("1 to the number of tokens, {}", self.tokens);
            return Err(Error::invalid(OPERATION, "capacity", expected, self.capacity));
        }
        shape::product(OPERATION, "affinity", &[self.experts, self.tokens])?;
        shape::product_i32(OPERATION, "slot_token", &[self.experts, self.capacity]).map(drop)
    }

    /// Rows of the slot-ordered buffers, `E * c`.
    ///
    /// Meaningful for a valid descriptor.
    pub fn slots(&self) -> usize {
        self.experts * self.capacity
    }
}

/// Buffers of an expert choice.
#[non_exhaustive]
pub struct ExpertChoiceArgs<'a> {
    /// `[E, T]`.
    pub affinities: In<'a, f32>,
    /// `[E, c]`, written: each expert's tokens, ascending.
    pub slot_token: Out<'a, i32>,
    /// `[E, c]`, written: their affinities.
    pub slot_weight: Option<Out<'a, f32>>,
    /// Which tokens count: no expert chooses another. Places that are left have token -1 and weight 0, behind an expert's tokens.
    pub mask: TokenMask<'a>,
}

impl<'a> ExpertChoiceArgs<'a> {
    /// `affinities` to `slot_token`, without weights.
    pub fn new(affinities: impl Into<In<'a, f32>>, slot_token: impl Into<Out<'a, i32>>) -> ExpertChoiceArgs<'a> {
        ExpertChoiceArgs {
            affinities: affinities.into(),
            slot_token: slot_token.into(),
            slot_weight: None,
            mask: TokenMask::all(),
        }
    }

    /// With padding among the tokens.
    #[must_use]
    pub fn mask(self, mask: TokenMask<'a>) -> ExpertChoiceArgs<'a> {
        ExpertChoiceArgs { mask, ..self }
    }
}

buffers!(ExpertChoiceArgs<'a> { slot_weight: Out<f32> });

/// Chooses kernel and grid: a block an expert.
///
/// # Errors
/// Those of [`ExpertChoiceDesc::validate`].
pub fn select(desc: &ExpertChoiceDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    Ok(Selection::new(Kernel::ExpertChoice, [desc.experts as u32, 1, 1]))
}

/// Chooses each expert's tokens.
///
/// # Errors
/// Those of [`ExpertChoiceDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &ExpertChoiceDesc,
    args: ExpertChoiceArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let affinities = scope.read("affinities", args.affinities, desc.tokens * desc.experts, SCALAR)?;
    let slot_token = scope.write("slot_token", args.slot_token, desc.slots(), SCALAR)?;
    let slot_weight = scope.write_some("slot_weight", args.slot_weight, desc.slots(), SCALAR)?;
    let mask = args.mask.open(&scope, desc.tokens)?;
    scope.launch(
        &selection,
        ExpertChoiceParams {
            affinity: affinities.address().into(),
            slot_token: slot_token.address().into(),
            slot_weight: optional(&slot_weight).into(),
            tokens: desc.tokens as u32,
            capacity: desc.capacity as u32,
            mask: mask.addresses().mask.into(),
            valid_tokens: mask.addresses().valid_tokens.into(),
            token_flags: mask.addresses().flags(),
            counts: Pointer::NULL,
            offsets: Pointer::NULL,
            tiles: Pointer::NULL,
            num_tiles: Pointer::NULL,
            tile_m: 1,
        },
    )
}

/// Shapes of [`dispatch`]: the lists of a dispatch in which every expert has `c` rows, and a token any number.
///
/// `tile_m` as [`crate::experts::tiles::select_tile`] has it. Meaningful for a valid descriptor.
pub fn rows(desc: &ExpertChoiceDesc, tile_m: usize) -> SlotShape {
    let tiles = desc.experts * desc.capacity.div_ceil(tile_m.max(1));
    SlotShape::new(desc.tokens, desc.experts, None, desc.slots(), tile_m, tiles)
}

/// Workspace of [`dispatch`] in bytes.
///
/// # Errors
/// Those of [`ExpertChoiceDesc::validate`].
pub fn workspace_bytes(desc: &ExpertChoiceDesc, device: &DeviceInfo) -> Result<usize, Error> {
    desc.validate()?;
    token_slots::workspace_bytes(&TokenSlotsDesc::new(desc.tokens, desc.slots()), device)
}

/// Chooses each expert's tokens and lays out their rows, with the affinities as weights: what products and sums go by. Two launches.
///
/// # Errors
/// Those of [`ExpertChoiceDesc::validate`]; those of a buffer, [`Error::BufferTooShort`] also for `dispatched`: [`Error::Misaligned`],
/// [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those of the driver.
pub fn dispatch(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &ExpertChoiceDesc,
    tile_m: usize,
    affinities: In<'_, f32>,
    dispatched: &mut Dispatched,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    dispatch_masked(kernels, stream, desc, tile_m, affinities, TokenMask::all(), dispatched, workspace)
}

/// [`dispatch`] of a batch with padding, which no expert chooses: an expert has fewer rows than `c` where fewer tokens count.
///
/// # Errors
/// Those of [`dispatch`].
#[allow(clippy::too_many_arguments)]
pub fn dispatch_masked(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &ExpertChoiceDesc,
    tile_m: usize,
    affinities: In<'_, f32>,
    mask: TokenMask<'_>,
    dispatched: &mut Dispatched,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    desc.validate().map_err(|error| error.within(DISPATCH))?;
    let scope = Scope::begin(DISPATCH, kernels, stream)?;
    let lists = dispatched.fill(&scope, &rows(desc, tile_m))?;
    let to = lists.addresses();
    let affinities = scope.read("affinities", affinities, desc.tokens * desc.experts, SCALAR)?;
    let mask = mask.open(&scope, desc.tokens)?;
    scope.launch(
        &Selection::new(Kernel::ExpertChoice, [desc.experts as u32, 1, 1]),
        ExpertChoiceParams {
            affinity: affinities.address().into(),
            slot_token: to.slot_token.into(),
            slot_weight: to.slot_weight.into(),
            tokens: desc.tokens as u32,
            capacity: desc.capacity as u32,
            mask: mask.addresses().mask.into(),
            valid_tokens: mask.addresses().valid_tokens.into(),
            token_flags: mask.addresses().flags(),
            counts: to.counts.into(),
            offsets: to.offsets.into(),
            tiles: to.tiles.into(),
            num_tiles: to.num_tiles.into(),
            tile_m: tile_m as u32,
        },
    )?;
    let of_tokens = TokenSlotsDesc::new(desc.tokens, desc.slots());
    let args = TokenSlotsArgs::new(
        to.slot_token.input(desc.slots()),
        to.token_offsets.out(desc.tokens + 1),
        to.token_slot.out(desc.slots()),
        workspace,
    );
    token_slots::forward(kernels, stream, &of_tokens, args).map_err(|error| error.within(DISPATCH))?;
    lists.filled();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_field() {
        let desc = ExpertChoiceDesc { tokens: 100, experts: 8, capacity: 25 };
        let fault = |desc: ExpertChoiceDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(desc.validate(), Ok(()));
        assert_eq!(fault(ExpertChoiceDesc { tokens: 0, ..desc }), "tokens");
        assert_eq!(fault(ExpertChoiceDesc { experts: 4097, ..desc }), "experts");
        assert_eq!(fault(ExpertChoiceDesc { capacity: 101, ..desc }), "capacity");
        assert_eq!(fault(ExpertChoiceDesc { capacity: 0, ..desc }), "capacity");
        assert_eq!(fault(ExpertChoiceDesc { tokens: 1 << 30, capacity: 1 << 29, ..desc }), "slot_token");
    }
}
