//! Combine over ragged slots: each token's sum of its experts' outputs, where a token has no expert or many.
//!
//! `y[t] = residual[t] + addend[t] + sum of slot_weight[s] * y_slots[s]` over the token's slots in the order of
//! [`crate::capacity::token_slots`], in f32, rounded once: the same input gives the same bits.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{Combine, CombineRagged, Kernel};
use crate::rules::Dtype;
use crate::runtime::builder::buffers;
use crate::runtime::launch::{SCALAR, Scope, VECTOR, optional};
use crate::runtime::params::CombineRaggedParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "combine_ragged";

/// Shapes and type of a ragged combine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
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
    /// The sums of `slots` rows of `hidden` elements of type `dtype` for `tokens` tokens.
    pub const fn new(dtype: Dtype, tokens: usize, slots: usize, hidden: usize) -> CombineRaggedDesc {
        CombineRaggedDesc { dtype, tokens, slots, hidden }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::size(OPERATION, "slots", self.slots)?;
        shape::multiple_of_8(OPERATION, "hidden", self.hidden)?;
        shape::product(OPERATION, "y", &[self.tokens, self.hidden])?;
        shape::product(OPERATION, "y_slots", &[self.slots, self.hidden])?;
        Ok(())
    }
}

/// Buffers of a ragged combine.
#[non_exhaustive]
pub struct CombineRaggedArgs<'a, T> {
    /// `[S, H]`: the experts' outputs by slot.
    pub y_slots: In<'a, T>,
    /// `[T + 1]`, from [`crate::capacity::token_slots`].
    pub offsets: In<'a, i32>,
    /// `[S]`, from [`crate::capacity::token_slots`].
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

impl<'a, T> CombineRaggedArgs<'a, T> {
    /// The sum of a token's rows of `y_slots`, all with weight 1, to `y`.
    pub fn new(
        y_slots: impl Into<In<'a, T>>,
        offsets: impl Into<In<'a, i32>>,
        token_slots: impl Into<In<'a, i32>>,
        y: impl Into<Out<'a, T>>,
    ) -> CombineRaggedArgs<'a, T> {
        CombineRaggedArgs {
            y_slots: y_slots.into(),
            offsets: offsets.into(),
            token_slots: token_slots.into(),
            slot_weight: None,
            residual: None,
            addend: None,
            y: y.into(),
        }
    }
}

buffers!(CombineRaggedArgs<'a, T> { slot_weight: In<f32>, residual: In<T>, addend: In<T> });

/// Chooses kernel and grid.
///
/// # Errors
/// Those of [`CombineRaggedDesc::validate`]; [`Error::Overflow`] where the grid would exceed the device's limit.
pub fn select(desc: &CombineRaggedDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let grid = Combine { dtype: desc.dtype }.grid(desc.tokens as u32, desc.hidden as u32);
    shape::grid_y(OPERATION, "hidden", grid[1])?;
    Ok(Selection::new(Kernel::CombineRagged(CombineRagged { dtype: desc.dtype }), grid))
}

/// Computes `y`.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`select`]; those of a buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`],
/// [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn forward<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &CombineRaggedDesc,
    args: CombineRaggedArgs<'_, T>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
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
    scope.launch(
        &selection,
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

    use crate::runtime::device::A100;

    #[test]
    fn faults_name_their_field() {
        let desc = CombineRaggedDesc::new(Dtype::F32, 1, 1, 16);
        let fault = |desc: CombineRaggedDesc| select(&desc, &A100).unwrap_err().argument().unwrap();
        assert!(select(&desc, &A100).is_ok());
        assert_eq!(fault(CombineRaggedDesc { hidden: 12, ..desc }), "hidden");
        assert_eq!(fault(CombineRaggedDesc { hidden: 1 << 30, ..desc }), "hidden");
        assert_eq!(fault(CombineRaggedDesc { tokens: 1 << 31, ..desc }), "tokens");
        assert_eq!(fault(CombineRaggedDesc { slots: 1 << 31, ..desc }), "slots");
    }
}
