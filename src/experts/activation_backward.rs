//! Back through what stands between an expert's two products.
//!
//! With the pre-activations of a row, `A` what the activation makes of them, `s` the row's weight and `d` the gradient of the row of
//! `W_down`'s input (the output's gradient, gathered by token, times `W_down`: a product of [`crate::experts::gemm`] with the weight's other layout):
//!
//! - `d_pre_activation = s d act'`, what goes back through the first product;
//! - `hidden = s A`, recomputed, what the gradient of `W_down` is made with: only the pre-activations need to be kept from the forward pass;
//! - `d_slot_weight = <d, A>`: the gradient of the row's weight, without the experts' outputs (SonicMoE, arXiv:2512.14080).
//!
//! That holds where the weight scales the expert's output or what the activation yields. Where it scales the input (Llama 4), leave it out here.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::Kernel;
use crate::rules::{Activation, Bound, Dtype, Glu, Swiglu};
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::ActivationBackwardParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection};

use super::gemm::check_activation;

const OPERATION: &str = "activation_backward";

/// Blocks a multiprocessor that rows are shared among.
const BLOCKS_PER_MULTIPROCESSOR: u32 = 8;

/// Shapes and function of an activation's backward pass.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct ActivationBackwardDesc {
    /// Type of rows.
    pub dtype: Dtype,
    /// Rows `S`; 0 is allowed.
    pub rows: usize,
    /// Columns `I` of `hidden`.
    pub width: usize,
    /// The function.
    pub activation: Activation,
    /// Whether there is a gate, and in which order the weight's outputs and so `d_pre_activation` are. With [`Glu::Apart`] gates come first, as
    /// with [`Glu::Split`].
    pub glu: Glu,
}

impl ActivationBackwardDesc {
    /// `rows` rows of `width` gated outputs, gates first.
    pub const fn new(dtype: Dtype, rows: usize, width: usize, activation: Activation) -> ActivationBackwardDesc {
        ActivationBackwardDesc { dtype, rows, width, activation, glu: Glu::Split }
    }

    /// Columns of the pre-activations.
    pub const fn columns(&self) -> usize {
        if self.glu.is_gated() { 2 * self.width } else { self.width }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "rows", self.rows)?;
        shape::positive(OPERATION, "width", self.width)?;
        if self.width >= 1 << 30 {
            return Err(Error::unsupported(OPERATION, "width", "below 2^30".to_owned(), self.width));
        }
        shape::product(OPERATION, "pre_activation", &[self.rows, self.columns()])?;
        check_activation(OPERATION, "activation", self.activation, self.glu)
    }
}

settings!(ActivationBackwardDesc { glu: Glu });

/// Buffers of an activation's backward pass.
#[non_exhaustive]
pub struct ActivationBackwardArgs<'a, T> {
    /// `[S, 2I]`, gates before ups whatever the weight's order, or `[S, I]` without a gate: as the forward pass leaves them.
    pub pre_activation: In<'a, T>,
    /// `[S, I]`: the gradient of what the second product reads, before weights.
    pub d_hidden: In<'a, T>,
    /// `[S]`; 1 if absent.
    pub slot_weight: Option<In<'a, f32>>,
    /// `[1]`: rows that there are, at most S; all if absent. The last of a dispatch's offsets.
    pub live: Option<In<'a, i32>>,
    /// `[S, 2I]` or `[S, I]`, written: columns in the order of the weight's outputs.
    pub d_pre_activation: Out<'a, T>,
    /// `[S, I]`, written: `slot_weight` times what the activation yields.
    pub hidden: Option<Out<'a, T>>,
    /// `[S]`, written.
    pub d_slot_weight: Option<Out<'a, f32>>,
}

impl<'a, T> ActivationBackwardArgs<'a, T> {
    /// `d_hidden` to `d_pre_activation`.
    pub fn new(
        pre_activation: impl Into<In<'a, T>>,
        d_hidden: impl Into<In<'a, T>>,
        d_pre_activation: impl Into<Out<'a, T>>,
    ) -> ActivationBackwardArgs<'a, T> {
        ActivationBackwardArgs {
            pre_activation: pre_activation.into(),
            d_hidden: d_hidden.into(),
            slot_weight: None,
            live: None,
            d_pre_activation: d_pre_activation.into(),
            hidden: None,
            d_slot_weight: None,
        }
    }
}

buffers!(ActivationBackwardArgs<'a, T> {
    slot_weight: In<f32>,
    live: In<i32>,
    hidden: Out<T>,
    d_slot_weight: Out<f32>,
});

/// Chooses kernel and grid: a block for each row up to eight a multiprocessor, which then take further ones.
///
/// # Errors
/// Those of [`ActivationBackwardDesc::validate`].
pub fn select(desc: &ActivationBackwardDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let blocks = (desc.rows as u32).min(BLOCKS_PER_MULTIPROCESSOR * device.multiprocessors).max(1);
    Ok(Selection::new(Kernel::ActivationBackward(desc.dtype), [blocks, 1, 1]))
}

/// An activation as `kernels/common/epilogue/slopes` numbers it.
pub(super) struct Numbered {
    pub(super) activation: u32,
    /// 0 none, 1 clamped, 2 clamped behind the SiLU, 3 capped.
    pub(super) gate_bound: u32,
    pub(super) up_bound: u32,
    pub(super) alpha: f32,
    /// Infinite where there is none.
    pub(super) gate_limit: f32,
    pub(super) up_limit: f32,
    pub(super) factor: f32,
    pub(super) offset: f32,
}

impl Numbered {
    pub(super) fn new(activation: Activation) -> Numbered {
        let (activation, unit) = match activation {
            Activation::Identity => (0, Swiglu::new()),
            Activation::Relu => (1, Swiglu::new()),
            Activation::Gelu => (2, Swiglu::new()),
            Activation::GeluTanh => (3, Swiglu::new()),
            Activation::Silu => (4, Swiglu::new()),
            Activation::Swiglu(unit) => (5, unit),
            Activation::ReluSquared => (6, Swiglu::new()),
        };
        let bound = |bound: Bound, after: bool| match bound {
            Bound::None => (0, f32::INFINITY),
            Bound::Clamp(limit) => (if after { 2 } else { 1 }, limit),
            Bound::Softcap(cap) => (3, cap),
        };
        let ((gate_bound, gate_limit), (up_bound, up_limit)) =
            (bound(unit.gate, unit.clamp_after), bound(unit.up, false));
        let Swiglu { alpha, factor, offset, .. } = unit;
        Numbered { activation, gate_bound, up_bound, alpha, gate_limit, up_limit, factor, offset }
    }
}

/// Where the gradients of a gate and an up value go in a row of `2 * width`: the first of each, and the distance to the next.
pub(super) fn columns_of(glu: Glu, width: u32) -> (u32, u32, u32) {
    match glu {
        Glu::None | Glu::Split | Glu::Apart => (0, width, 1),
        Glu::UpFirst => (width, 0, 1),
        Glu::Interleaved => (0, 1, 2),
    }
}

/// Computes gradients by row.
///
/// With no rows nothing is launched. Rows from `live` on are left alone.
///
/// # Errors
/// Those of [`ActivationBackwardDesc::validate`]; those of a buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`],
/// [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn forward<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &ActivationBackwardDesc,
    args: ActivationBackwardArgs<'_, T>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    scope.check_dtype::<T>("pre_activation", desc.dtype)?;
    let &ActivationBackwardDesc { rows, width, .. } = desc;
    if rows == 0 {
        return Ok(());
    }
    let elements = rows * desc.columns();
    let pre_activation = scope.read("pre_activation", args.pre_activation, elements, SCALAR)?;
    let d_hidden = scope.read("d_hidden", args.d_hidden, rows * width, SCALAR)?;
    let slot_weight = scope.read_some("slot_weight", args.slot_weight, rows, SCALAR)?;
    let live = scope.read_some("live", args.live, 1, SCALAR)?;
    let d_pre_activation = scope.write("d_pre_activation", args.d_pre_activation, elements, SCALAR)?;
    let hidden = scope.write_some("hidden", args.hidden, rows * width, SCALAR)?;
    let d_slot_weight = scope.write_some("d_slot_weight", args.d_slot_weight, rows, SCALAR)?;
    let Numbered { activation, gate_bound, up_bound, alpha, gate_limit, up_limit, factor, offset } =
        Numbered::new(desc.activation);
    let width = width as u32;
    let (gate_first, up_first, stride) = columns_of(desc.glu, width);
    scope.launch(
        &selection,
        ActivationBackwardParams {
            pre_activation: pre_activation.address().into(),
            d_hidden: d_hidden.address().into(),
            slot_weight: optional(&slot_weight).into(),
            live: optional(&live).into(),
            d_pre_activation: d_pre_activation.address().into(),
            hidden: optional(&hidden).into(),
            d_slot_weight: optional(&d_slot_weight).into(),
            rows: rows as u32,
            width,
            gated: u32::from(desc.glu.is_gated()),
            gate_first,
            up_first,
            stride,
            activation,
            gate_bound,
            up_bound,
            alpha,
            gate_limit,
            up_limit,
            factor,
            offset,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_field() {
        let desc = ActivationBackwardDesc::new(Dtype::Bf16, 10, 24, Activation::Silu);
        let fault = |desc: ActivationBackwardDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(desc.validate(), Ok(()));
        assert_eq!(fault(ActivationBackwardDesc { rows: 1 << 40, ..desc }), "rows");
        assert_eq!(fault(ActivationBackwardDesc { width: 0, ..desc }), "width");
        assert_eq!(fault(ActivationBackwardDesc { width: 1 << 30, ..desc }), "width");
        assert_eq!(fault(ActivationBackwardDesc { activation: Activation::Identity, ..desc }), "activation");
        let unit = Swiglu::GPT_OSS.into();
        assert_eq!(fault(ActivationBackwardDesc { activation: unit, glu: Glu::None, ..desc }), "activation");
    }
}
