//! Expert choice: the experts choose their tokens (Zhou et al., *Mixture-of-Experts with Expert Choice Routing*, 2022).
//!
//! 1. [`affinity`]: what each expert thinks of each token, `S^T [E, T]`.
//! 2. [`choose`]: each expert takes exactly its `c` best tokens; ties go to the lower token, NaN comes last. Slots
//!    `e * c` to `(e + 1) * c` are expert `e`'s, its tokens ascending: what a grouped GEMM gathers by, without a dispatch.
//! 3. [`token_slots`]: a token has no expert, or many: the slots of each, ascending.
//! 4. [`combine`]: each token's weighted sum over its slots, in that order: the same input gives the same bits.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::launch::{In, Out, Param, SCALAR, Scope, VECTOR, optional};
pub use crate::reference::expert_choice::Affinity;
use crate::registry::{AFFINITY_TOKENS, Combine, CombineRagged, Dtype, Kernel};
use crate::workspace::BARRIER_HEADER;
use crate::{DeviceInfo, Element, Error, Kernels, Selection, Workspace, shape};

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
    /// Tokens of each expert `c`, 1 to `T`: the paper's `T * capacity factor / E` ([`crate::admission::capacity`]).
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
    let selection = Selection { kernel: Kernel::Affinity, grid: [blocks, 1, 1], cooperative: false };
    scope.launch(&selection, affinity_params(desc, mode, [logits.address().into(), affinities.address().into()]))
}

fn affinity_params(desc: &ExpertChoiceDesc, mode: u32, [logits, affinities]: [Param; 2]) -> [Param; 5] {
    [logits, affinities, (desc.tokens as u32).into(), (desc.experts as u32).into(), mode.into()]
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
    let selection = Selection { kernel: Kernel::ExpertChoice, grid, cooperative: false };
    scope.launch(
        &selection,
        choice_params(desc, [affinities.address().into(), slot_token.address().into(), optional(&slot_weight).into()]),
    )
}

fn choice_params(desc: &ExpertChoiceDesc, [affinities, slot_token, slot_weight]: [Param; 3]) -> [Param; 5] {
    [affinities, slot_token, slot_weight, (desc.tokens as u32).into(), (desc.capacity as u32).into()]
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
    Ok(Selection { kernel, grid: [blocks, 1, 1], cooperative: blocks > 1 })
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
        slots_params(
            desc,
            [slot_token.address().into(), offsets.address().into(), slots.address().into(), workspace.address().into()],
        ),
    )
}

fn slots_params(desc: &TokenSlotsDesc, [slot_token, offsets, slots, workspace]: [Param; 4]) -> [Param; 6] {
    [slot_token, offsets, slots, (desc.tokens as u32).into(), (desc.slots as u32).into(), workspace]
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
    let at = [
        y_slots.address().into(),
        offsets.address().into(),
        token_slots.address().into(),
        optional(&slot_weight).into(),
        optional(&residual).into(),
        optional(&addend).into(),
        y.address().into(),
    ];
    scope.launch(&Selection { kernel, grid, cooperative: false }, combine_params(desc, at))
}

fn combine_params(desc: &CombineRaggedDesc, at: [Param; 7]) -> [Param; 9] {
    let [y_slots, offsets, token_slots, slot_weight, residual, addend, y] = at;
    [
        y_slots,
        offsets,
        token_slots,
        slot_weight,
        residual,
        addend,
        y,
        (desc.tokens as u32).into(),
        (desc.hidden as u32).into(),
    ]
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
    fn params_are_those_of_the_entries() {
        let null = Param::Address(0);
        let desc = ExpertChoiceDesc { tokens: 100, experts: 8, capacity: 25 };
        crate::embedded::assert_takes(Kernel::Affinity, &affinity_params(&desc, 0, [null; 2]));
        crate::embedded::assert_takes(Kernel::ExpertChoice, &choice_params(&desc, [null; 3]));
        let slots = slots_params(&TokenSlotsDesc { tokens: 1, slots: 1 }, [null; 4]);
        crate::embedded::assert_takes(Kernel::TokenSlots, &slots);
        for dtype in Dtype::ALL {
            let desc = CombineRaggedDesc { dtype, tokens: 1, slots: 1, hidden: 8 };
            let kernel = Kernel::CombineRagged(CombineRagged { dtype });
            crate::embedded::assert_takes(kernel, &combine_params(&desc, [null; 7]));
        }
    }

    #[test]
    fn blocks_are_resident() {
        let device = crate::device::A100;
        let desc = TokenSlotsDesc { tokens: 100, slots: 5000 };
        assert_eq!(select_token_slots(&desc, &device).unwrap().grid, [5, 1, 1]);
        assert_eq!(token_slots_workspace_bytes(&desc, &device).unwrap(), BARRIER_HEADER + 4 * (5 + 100 + 5000));
    }
}
