//! Back through [`combine`](crate::experts::combine): from the gradient of each token's sum to those of its rows and of their weights.
//!
//! With `y[t] = scale * sum of w[r] * y_slots[r]` over the token's rows `r`:
//!
//! - `d_y_slots[r] = scale w[r] dy[t]`: what experts that another library computes go back from;
//! - `d_slot_weight[r] = scale <dy[t], y_slots[r]>`: for [`crate::routers::gating_backward`].
//!
//! A residual and an addend have the gradient `dy`. The layer's own backward pass ([`crate::layer::BackwardPlan`]) needs neither: its products gather
//! `dy` themselves, and weights' gradients come from the activation ([`crate::experts::activation_backward`]) without the experts' outputs.
//!
//! Without weights and with [`permute`](crate::experts::permute) before the experts, this is the way back through TransformerEngine's
//! `moe_unpermute` and Megatron-LM's `unpermute`; that of `permute` is [`combine`](crate::experts::combine).

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::dispatched::{Dispatched, SlotShape};
use crate::registry::{BLOCK_WARPS, Combine, Kernel};
use crate::rules::Dtype;
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::CombineBackwardParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "combine_backward";

/// Blocks a multiprocessor that rows are shared among.
const BLOCKS_PER_MULTIPROCESSOR: u32 = 8;

/// Shapes and type of a combine's way back.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct CombineBackwardDesc {
    /// Type of all matrices.
    pub dtype: Dtype,
    /// The rows of the dispatch; tokens may be ragged.
    pub rows: SlotShape,
    /// Hidden size `H`. Of a multiple of 8 all matrices begin on 16 bytes, else on any element, and it takes longer.
    pub hidden: usize,
    /// Factor of the sum over the experts.
    pub scale: f32,
}

impl CombineBackwardDesc {
    /// Rows of `hidden` elements of type `dtype`.
    pub const fn new(dtype: Dtype, rows: SlotShape, hidden: usize) -> CombineBackwardDesc {
        CombineBackwardDesc { dtype, rows, hidden, scale: 1.0 }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        self.rows.validate(OPERATION)?;
        shape::size(OPERATION, "hidden", self.hidden)?;
        shape::positive(OPERATION, "hidden", self.hidden)?;
        if !self.scale.is_finite() {
            return Err(Error::invalid(OPERATION, "scale", "a finite number", self.scale));
        }
        shape::product(OPERATION, "dy", &[self.rows.tokens, self.hidden])?;
        shape::product(OPERATION, "y_slots", &[self.rows.slots, self.hidden]).map(drop)
    }
}

settings!(CombineBackwardDesc { scale: f32 });

/// Buffers of a combine's way back. At least one of `d_y_slots` and `d_slot_weight` is asked for.
#[non_exhaustive]
pub struct CombineBackwardArgs<'a, T> {
    /// `[T, H]`.
    pub dy: In<'a, T>,
    /// The dispatch whose rows these are, of the descriptor's shape.
    pub dispatched: &'a Dispatched,
    /// `[slots]`: what the sum multiplied each row by; absent, 1. A dispatch with weights has them:
    /// [`Dispatched::slot_weight`].
    pub slot_weight: Option<In<'a, f32>>,
    /// `[slots, H]`, the rows that were summed; exactly with `d_slot_weight`.
    pub y_slots: Option<In<'a, T>>,
    /// `[slots, H]`, written; rows of nobody become zero.
    pub d_y_slots: Option<Out<'a, T>>,
    /// `[slots]`, written; 0 for rows of nobody.
    pub d_slot_weight: Option<Out<'a, f32>>,
}

impl<'a, T> CombineBackwardArgs<'a, T> {
    /// From `dy`, of the rows of `dispatched`.
    pub fn new(dy: impl Into<In<'a, T>>, dispatched: &'a Dispatched) -> CombineBackwardArgs<'a, T> {
        CombineBackwardArgs {
            dy: dy.into(),
            dispatched,
            slot_weight: None,
            y_slots: None,
            d_y_slots: None,
            d_slot_weight: None,
        }
    }
}

buffers!(CombineBackwardArgs<'a, T> {
    slot_weight: In<f32>,
    y_slots: In<T>,
    d_y_slots: Out<T>,
    d_slot_weight: Out<f32>,
});

/// Chooses kernel and grid: a warp for each row up to eight blocks a multiprocessor, which then take further ones.
///
/// # Errors
/// Those of [`CombineBackwardDesc::validate`].
pub fn select(desc: &CombineBackwardDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let most = BLOCKS_PER_MULTIPROCESSOR * device.multiprocessors;
    let blocks = (desc.rows.slots as u32).div_ceil(BLOCK_WARPS).clamp(1, most);
    let kernel = Kernel::CombineBackward(Combine { dtype: desc.dtype, any: !desc.hidden.is_multiple_of(8) });
    Ok(Selection::new(kernel, [blocks, 1, 1]))
}

/// Computes gradients by row.
///
/// With no rows, or nothing asked for, nothing is launched. Rows behind the dispatch's last are left alone.
///
/// # Errors
/// Those of [`select`]; [`Error::Invalid`] for a dispatch of another shape; [`Error::Missing`] and [`Error::Unexpected`] for `y_slots` against
/// `d_slot_weight`; those of a buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`]; and those of the driver.
pub fn forward<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &CombineBackwardDesc,
    args: CombineBackwardArgs<'_, T>,
) -> Result<(), Error> {
    let (operation, rows) = (OPERATION, &desc.rows);
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(operation, kernels, stream)?;
    scope.check_dtype::<T>("dy", desc.dtype)?;
    if args.dispatched.shape() != rows {
        let got = format!("{:?}", args.dispatched.shape());
        return Err(Error::invalid(operation, "dispatched", format!("a dispatch of {rows:?}"), got));
    }
    match (args.y_slots.is_some(), args.d_slot_weight.is_some()) {
        (false, true) => {
            return Err(Error::Missing { operation, argument: "y_slots", reason: "weights' gradients are asked for" });
        }
        (true, false) => {
            let reason = "no gradient of weights is asked for";
            return Err(Error::Unexpected { operation, argument: "y_slots", reason });
        }
        _ => {}
    }
    if rows.slots == 0 || (args.d_y_slots.is_none() && args.d_slot_weight.is_none()) {
        return Ok(());
    }
    let alignment = shape::row_alignment(desc.dtype, desc.hidden);
    let elements = rows.slots * desc.hidden;
    let dy = scope.read("dy", args.dy, rows.tokens * desc.hidden, alignment)?;
    let dispatched = args.dispatched.read(&scope)?;
    let slot_weight = scope.read_some("slot_weight", args.slot_weight, rows.slots, SCALAR)?;
    let y_slots = scope.read_some("y_slots", args.y_slots, elements, alignment)?;
    let d_y_slots = scope.write_some("d_y_slots", args.d_y_slots, elements, alignment)?;
    let d_slot_weight = scope.write_some("d_slot_weight", args.d_slot_weight, rows.slots, SCALAR)?;
    let (live, slot_token) = dispatched.live(rows.experts);
    scope.launch(
        &selection,
        CombineBackwardParams {
            dy: dy.address().into(),
            y_slots: optional(&y_slots).into(),
            slot_token: slot_token.into(),
            slot_weight: optional(&slot_weight).into(),
            live: live.into(),
            d_y_slots: optional(&d_y_slots).into(),
            d_slot_weight: optional(&d_slot_weight).into(),
            slots: rows.slots as u32,
            tokens: rows.tokens as u32,
            hidden: desc.hidden as u32,
            scale: desc.scale,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_field() {
        let desc = CombineBackwardDesc::new(Dtype::Bf16, SlotShape::new(64, 8, Some(2), 128, 64, 10), 2048);
        let fault = |desc: CombineBackwardDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(desc.validate(), Ok(()));
        assert_eq!(fault(desc.scale(f32::NAN)), "scale");
        assert_eq!(fault(CombineBackwardDesc { hidden: 0, ..desc }), "hidden");
        assert_eq!(fault(CombineBackwardDesc { hidden: 1 << 40, ..desc }), "hidden");
        let rows = SlotShape { slots: 1 << 31, ..desc.rows };
        assert_eq!(fault(CombineBackwardDesc { rows, ..desc }), "rows.slots");
    }
}
