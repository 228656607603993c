//! Expert choice: the experts choose their tokens (Zhou et al., *Mixture-of-Experts with Expert Choice Routing*, 2022).
//!
//! 1. [`affinity`]: what each expert thinks of each token, `S^T [E, T]`.
//! 2. [`choose`]: each expert takes exactly its `c` best tokens; ties go to the lower token, NaN comes last. Slots
//!    `e * c` to `(e + 1) * c` are expert `e`'s, its tokens ascending: what a grouped GEMM gathers by, without a dispatch.
//! 3. [`token_slots`]: a token has no expert, or many: the slots of each, ascending.
//! 4. [`combine`]: each token's weighted sum over its slots, in that order: the same input gives the same bits.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{AFFINITY_TOKENS, Combine, CombineRagged, Kernel};
use crate::rules::Affinity;
use crate::rules::Dtype;
use crate::runtime::launch::{SCALAR, Scope, VECTOR, optional};
use crate::runtime::params::{AffinityParams, CombineRaggedParams, ExpertChoiceParams, TokenSlotsParams};
use crate::runtime::shape;
use crate::runtime::workspace::BARRIER_HEADER;
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection, Workspace};

const AFFINITY: &str = "affinity";
const CHOICE: &str = "expert choice";
const SLOTS: &str = "token slots";
const COMBINE: &str = "combine ragged";

/// Shapes of an expert choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertChoiceDesc {
    /// Tokens `T`, at least 1.
    pub tokens: usize,
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// Tokens of each expert `c`, 1 to `T`: the paper's `T * capacity factor / E` ([`crate::capacity::admission::capacity`]).
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
        },
    )
}

/// Shapes of [`token_slots`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenSlotsDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Slots `S`.
    pub slots: usize,
}

impl TokenSlotsDesc {
    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(SLOTS, "tokens", self.tokens)?;
        shape::size(SLOTS, "slots", self.slots).map(drop)
    }
}

/// Buffers of [`token_slots`].
pub struct TokenSlotsArgs<'a> {
    /// `[S]`: the token of each slot; one outside `0..T` is a slot of no token.
    pub slot_token: In<'a, i32>,
    /// `[T + 1]`, written: where each token's slots begin in `slots`.
    pub offsets: Out<'a, i32>,
    /// `[S]`, written as far as `offsets[T]`: slots by token, ascending within one.
    pub slots: Out<'a, i32>,
    /// At least [`token_slots_workspace_bytes`].
    pub workspace: &'a mut Workspace,
}

/// Workspace of [`token_slots`] in bytes.
///
/// # Errors
/// Those of [`TokenSlotsDesc::validate`].
pub fn token_slots_workspace_bytes(desc: &TokenSlotsDesc, device: &DeviceInfo) -> Result<usize, Error> {
    let blocks = select_token_slots(desc, device)?.grid[0] as usize;
    Ok(BARRIER_HEADER + (blocks + desc.tokens + desc.slots) * size_of::<u32>())
}

/// Chooses kernel and grid of [`token_slots`]: four slots and a quarter of a token's warp a thread, as far as all blocks are
/// resident.
///
/// # Errors
/// Those of [`TokenSlotsDesc::validate`].
pub fn select_token_slots(desc: &TokenSlotsDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let kernel = Kernel::TokenSlots;
    let wanted = (desc.slots.div_ceil(4 * kernel.threads() as usize)).max(desc.tokens.div_ceil(32)) as u32;
    let blocks = if device.cooperative_launch { wanted.clamp(1, device.multiprocessors) } else { 1 };
    Ok(Selection::cooperative(kernel, blocks))
}

/// Lists the slots of every token.
///
/// With no tokens `offsets` is set to zero, and nothing is launched.
///
/// # Errors
/// Those of [`TokenSlotsDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those of the driver.
pub fn token_slots(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &TokenSlotsDesc,
    args: TokenSlotsArgs<'_>,
) -> Result<(), Error> {
    let selection = select_token_slots(desc, kernels.device())?;
    let scope = Scope::begin(SLOTS, kernels, stream)?;
    let offsets = scope.write("offsets", args.offsets, desc.tokens + 1, SCALAR)?;
    if desc.tokens == 0 {
        return scope.zero(offsets.address(), size_of::<i32>());
    }
    let slot_token = scope.read("slot_token", args.slot_token, desc.slots, SCALAR)?;
    let slots = scope.write("slots", args.slots, desc.slots, SCALAR)?;
    let workspace = args.workspace.open(&scope, token_slots_workspace_bytes(desc, kernels.device())?)?;
    scope.launch(
        &selection,
        TokenSlotsParams {
            slot_token: slot_token.address().into(),
            token_offsets: offsets.address().into(),
            token_slots: slots.address().into(),
            tokens: desc.tokens as u32,
            num_slots: desc.slots as u32,
            workspace: workspace.address().into(),
        },
    )
}

/// Shapes and type of a ragged combine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CombineRaggedDesc {
    /// Type of `y_slots`, `residual`, `addend` and `y`.
    pub dtype: Dtype,
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Rows of `y_slots`, `S`.
    pub slots: usize,
    /// Hidden size `H`, a multiple of 8.
    pub hidden: usize,
}

impl CombineRaggedDesc {
    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(COMBINE, "tokens", self.tokens)?;
        shape::size(COMBINE, "slots", self.slots)?;
        shape::multiple_of_8(COMBINE, "hidden", self.hidden)?;
        shape::product(COMBINE, "y", &[self.tokens, self.hidden])?;
        shape::product(COMBINE, "y_slots", &[self.slots, self.hidden])?;
        Ok(())
    }
}

/// Buffers of a ragged combine.
pub struct CombineRaggedArgs<'a, T> {
    /// `[S, H]`: the experts' outputs by slot.
    pub y_slots: In<'a, T>,
    /// `[T + 1]`, from [`token_slots`].
    pub offsets: In<'a, i32>,
    /// `[S]`, from [`token_slots`].
    pub token_slots: In<'a, i32>,
    /// `[S]`; absent, every weight is 1.
    pub slot_weight: Option<In<'a, f32>>,
    /// `[T, H]`, added first: what a token without experts keeps.
    pub residual: Option<In<'a, T>>,
    /// `[T, H]`, added second: the shared expert's output.
    pub addend: Option<In<'a, T>>,
    /// `[T, H]`, written.
    pub y: Out<'a, T>,
}

/// `y[t] = residual[t] + addend[t] + sum of slot_weight[s] * y_slots[s]` over the token's slots, in f32, rounded once.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`CombineRaggedDesc::validate`]; those of a buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`],
/// [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn combine<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &CombineRaggedDesc,
    args: CombineRaggedArgs<'_, T>,
) -> Result<(), Error> {
    desc.validate()?;
    let scope = Scope::begin(COMBINE, kernels, stream)?;
    scope.check_dtype::<T>("y_slots", desc.dtype)?;
    if desc.tokens == 0 {
        return Ok(());
    }
    let elements = desc.tokens * desc.hidden;
    let y_slots = scope.read("y_slots", args.y_slots, desc.slots * desc.hidden, VECTOR)?;
    let offsets = scope.read("offsets", args.offsets, desc.tokens + 1, SCALAR)?;
    let token_slots = scope.read("token_slots", args.token_slots, desc.slots, SCALAR)?;
    let slot_weight = scope.read_some("slot_weight", args.slot_weight, desc.slots, SCALAR)?;
    let residual = scope.read_some("residual", args.residual, elements, VECTOR)?;
    let addend = scope.read_some("addend", args.addend, elements, VECTOR)?;
    let y = scope.write("y", args.y, elements, VECTOR)?;
    let grid = Combine { dtype: desc.dtype }.grid(desc.tokens as u32, desc.hidden as u32);
    let kernel = Kernel::CombineRagged(CombineRagged { dtype: desc.dtype });
    scope.launch(
        &Selection::new(kernel, grid),
        CombineRaggedParams {
            y_slots: y_slots.address().into(),
            token_offsets: offsets.address().into(),
            token_slots: token_slots.address().into(),
            slot_weight: optional(&slot_weight).into(),
            residual: optional(&residual).into(),
            addend: optional(&addend).into(),
            y: y.address().into(),
            tokens: desc.tokens as u32,
            hidden: desc.hidden as u32,
        },
    )
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
        let ragged = CombineRaggedDesc { dtype: Dtype::F32, tokens: 1, slots: 1, hidden: 12 };
        assert_eq!(ragged.validate().unwrap_err().argument(), Some("hidden"));
    }

    #[test]
    fn blocks_are_resident() {
        let device = crate::runtime::device::A100;
        let desc = TokenSlotsDesc { tokens: 100, slots: 5000 };
        assert_eq!(select_token_slots(&desc, &device).unwrap().grid, [5, 1, 1]);
        assert_eq!(token_slots_workspace_bytes(&desc, &device).unwrap(), 16 + 4 * (5 + 100 + 5000));
    }
}
