//! Token slots: the slots of every token, where a token has no expert or many.
//!
//! `slots[offsets[t]..offsets[t + 1]]` are the slots whose `slot_token` is `t`, ascending: the inverse of what experts that choose
//! their tokens yield ([`crate::routers::expert_choice`]), and what [`crate::experts::combine`] sums over.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::Kernel;
use crate::runtime::launch::{SCALAR, Scope};
use crate::runtime::params::TokenSlotsParams;
use crate::runtime::shape;
use crate::runtime::workspace::BARRIER_HEADER;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection, Workspace};

const OPERATION: &str = "token_slots";

/// Sizes of a listing of slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TokenSlotsDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Slots `S`.
    pub slots: usize,
}

impl TokenSlotsDesc {
    /// Which of `slots` slots are those of each of `tokens` tokens.
    pub const fn new(tokens: usize, slots: usize) -> TokenSlotsDesc {
        TokenSlotsDesc { tokens, slots }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::size(OPERATION, "slots", self.slots).map(drop)
    }
}

/// Buffers of a listing of slots.
#[non_exhaustive]
pub struct TokenSlotsArgs<'a> {
    /// `[S]`: the token of each slot; one outside `0..T` is a slot of no token.
    pub slot_token: In<'a, i32>,
    /// `[T + 1]`, written: where each token's slots begin in `slots`.
    pub offsets: Out<'a, i32>,
    /// `[S]`, written as far as `offsets[T]`: slots by token, ascending within one.
    pub slots: Out<'a, i32>,
    /// At least [`workspace_bytes`].
    pub workspace: &'a mut Workspace,
}

impl<'a> TokenSlotsArgs<'a> {
    /// `slot_token` to `offsets` and `slots`.
    pub fn new(
        slot_token: impl Into<In<'a, i32>>,
        offsets: impl Into<Out<'a, i32>>,
        slots: impl Into<Out<'a, i32>>,
        workspace: &'a mut Workspace,
    ) -> TokenSlotsArgs<'a> {
        TokenSlotsArgs { slot_token: slot_token.into(), offsets: offsets.into(), slots: slots.into(), workspace }
    }
}

/// Workspace of [`forward`] in bytes.
///
/// # Errors
/// Those of [`TokenSlotsDesc::validate`].
pub fn workspace_bytes(desc: &TokenSlotsDesc, device: &DeviceInfo) -> Result<usize, Error> {
    let blocks = select(desc, device)?.grid[0] as usize;
    Ok(BARRIER_HEADER + (blocks + desc.tokens + desc.slots) * size_of::<u32>())
}

/// Chooses kernel and grid of [`forward`]: four slots and a quarter of a token's warp a thread, as far as all blocks are
/// resident.
///
/// # Errors
/// Those of [`TokenSlotsDesc::validate`].
pub fn select(desc: &TokenSlotsDesc, device: &DeviceInfo) -> Result<Selection, Error> {
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
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &TokenSlotsDesc,
    args: TokenSlotsArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let offsets = scope.write("offsets", args.offsets, desc.tokens + 1, SCALAR)?;
    if desc.tokens == 0 {
        return scope.zero(offsets.address(), size_of::<i32>());
    }
    let slot_token = scope.read("slot_token", args.slot_token, desc.slots, SCALAR)?;
    let slots = scope.write("slots", args.slots, desc.slots, SCALAR)?;
    let workspace = args.workspace.open(&scope, workspace_bytes(desc, kernels.device())?)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_field() {
        let fault = |desc: TokenSlotsDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(TokenSlotsDesc::new(0, 0).validate(), Ok(()));
        assert_eq!(fault(TokenSlotsDesc::new(1 << 40, 1)), "tokens");
        assert_eq!(fault(TokenSlotsDesc::new(1, 1 << 40)), "slots");
    }

    #[test]
    fn blocks_are_resident() {
        let device = crate::runtime::device::A100;
        let desc = TokenSlotsDesc::new(100, 5000);
        assert_eq!(select(&desc, &device).unwrap().grid, [5, 1, 1]);
        assert_eq!(select(&TokenSlotsDesc::new(1 << 20, 5000), &device).unwrap().grid, [108, 1, 1]);
        assert_eq!(workspace_bytes(&desc, &device).unwrap(), 32 + 4 * (5 + 100 + 5000));
    }
}
