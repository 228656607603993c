//! Expert choice: the experts choose their tokens (Zhou et al., *Mixture-of-Experts with Expert Choice Routing*, 2022).
//!
//! 1. [`affinity`]: what each expert thinks of each token, `S^T [E, T]`.
//! 2. [`choose`]: each expert takes exactly its `c` best tokens; ties go to the lower token, NaN comes last. Slots
//!    `e * c` to `(e + 1) * c` are expert `e`'s, its tokens ascending.
//!
//! [`dispatch`] is the choice with the rows of experts and tokens laid out: a token has no expert, or many ([`crate::capacity::token_slots`]).
//! Products and [`crate::experts::combine`] take it as any other dispatch.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::capacity::token_slots::{self, TokenSlotsArgs, TokenSlotsDesc};
use crate::experts::{Dispatched, SlotShape};
use crate::registry::{AFFINITY_TOKENS, Kernel};
use crate::rules::Affinity;
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::{AffinityParams, ExpertChoiceParams, Pointer};
use crate::runtime::shape;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection, Workspace};

const AFFINITY: &str = "affinity";
const CHOICE: &str = "expert_choice";
const DISPATCH: &str = "expert_choice::dispatch";

/// Shapes of an expert choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertChoiceDesc {
    /// Tokens `T`, at least 1.
    pub tokens: usize,
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// Tokens of each expert `c`, 1 to `T`: the paper's `T * capacity factor / E` ([`crate::rules::capacity`]).
    pub capacity: usize,
}

impl ExpertChoiceDesc {
    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        self.check(CHOICE)
    }

    fn check(&self, operation: &'static str) -> Result<(), Error> {
        shape::positive(operation, "tokens", self.tokens)?;
        shape::experts(operation, self.experts)?;
        if self.capacity == 0 || self.capacity > self.tokens {
            let expected = format!("1 to the number of tokens, {}", self.tokens);
            return Err(Error::invalid(operation, "capacity", expected, self.capacity));
        }
        shape::product(operation, "affinity", &[self.experts, self.tokens])?;
        shape::product_i32(operation, "slot_token", &[self.experts, self.capacity]).map(drop)
    }

    /// Rows of the slot-ordered buffers, `E * c`.
    ///
    /// Meaningful for a valid descriptor.
    pub fn slots(&self) -> usize {
        self.experts * self.capacity
    }
}

/// Computes `affinities [E, T]` from `logits [T, E]`, in f32.
///
/// # Errors
/// Those of [`ExpertChoiceDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`]; and those of the driver.
pub fn affinity(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &ExpertChoiceDesc,
    affinity: Affinity,
    logits: In<'_, f32>,
    affinities: Out<'_, f32>,
) -> Result<(), Error> {
    desc.check(AFFINITY)?;
    let scope = Scope::begin(AFFINITY, kernels, stream)?;
    let elements = desc.tokens * desc.experts;
    let logits = scope.read("logits", logits, elements, SCALAR)?;
    let affinities = scope.write("affinities", affinities, elements, SCALAR)?;
    let mode: u32 = match affinity {
        Affinity::Softmax => 0,
        Affinity::Sigmoid => 1,
        Affinity::Logit => 2,
    };
    let blocks = (desc.tokens as u32).div_ceil(AFFINITY_TOKENS);
    let selection = Selection::new(Kernel::Affinity, [blocks, 1, 1]);
    scope.launch(
        &selection,
        AffinityParams {
            logits: logits.address().into(),
            affinity: affinities.address().into(),
            tokens: desc.tokens as u32,
            experts: desc.experts as u32,
            mode,
        },
    )
}

/// Buffers of a choice.
pub struct ChoiceArgs<'a> {
    /// `[E, T]`.
    pub affinities: In<'a, f32>,
    /// `[E, c]`, written: each expert's tokens, ascending.
    pub slot_token: Out<'a, i32>,
    /// `[E, c]`, written: their affinities.
    pub slot_weight: Option<Out<'a, f32>>,
}

/// Chooses each expert's tokens.
///
/// # Errors
/// Those of [`ExpertChoiceDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`]; and those of the driver.
pub fn choose(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &ExpertChoiceDesc,
    args: ChoiceArgs<'_>,
) -> Result<(), Error> {
    desc.check(CHOICE)?;
    let scope = Scope::begin(CHOICE, kernels, stream)?;
    let affinities = scope.read("affinities", args.affinities, desc.tokens * desc.experts, SCALAR)?;
    let slot_token = scope.write("slot_token", args.slot_token, desc.slots(), SCALAR)?;
    let slot_weight = scope.write_some("slot_weight", args.slot_weight, desc.slots(), SCALAR)?;
    let grid = [desc.experts as u32, 1, 1];
    let selection = Selection::new(Kernel::ExpertChoice, grid);
    scope.launch(
        &selection,
        ExpertChoiceParams {
            affinity: affinities.address().into(),
            slot_token: slot_token.address().into(),
            slot_weight: optional(&slot_weight).into(),
            tokens: desc.tokens as u32,
            capacity: desc.capacity as u32,
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
    desc.check(DISPATCH)?;
    let scope = Scope::begin(DISPATCH, kernels, stream)?;
    let lists = dispatched.fill(&scope, &rows(desc, tile_m))?;
    let to = lists.addresses();
    let affinities = scope.read("affinities", affinities, desc.tokens * desc.experts, SCALAR)?;
    scope.launch(
        &Selection::new(Kernel::ExpertChoice, [desc.experts as u32, 1, 1]),
        ExpertChoiceParams {
            affinity: affinities.address().into(),
            slot_token: to.slot_token.into(),
            slot_weight: to.slot_weight.into(),
            tokens: desc.tokens as u32,
            capacity: desc.capacity as u32,
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
