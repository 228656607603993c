//! Experts of one hidden unit: `y[t] = addend[t] + sum_j weights[t,j] act(input[e_j] . x[t]) output[e_j]`, `e_j = ids[t,j]` (PEER: He, *Mixture of A
//! Million Experts*, 2024; Doge).
//!
//! With so many experts hardly two tokens of a batch share one, so that nothing is gained by sorting slots: each token gathers its
//! `k` rows of either matrix. Their ids come from [`crate::routers::product_keys`], as a rule. The way back is
//! [`crate::experts::unit_experts_backward`].

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{Kernel, MAX_UNIT_TOP_K};
use crate::rules::{Activation, Dtype};
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{SCALAR, Scope, VECTOR, optional};
use crate::runtime::params::UnitExpertsParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "unit_experts";

/// Shapes and type of experts of one unit.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct UnitExpertsDesc {
    /// Type of all matrices.
    pub dtype: Dtype,
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Hidden size `H`, a multiple of 8.
    pub hidden: usize,
    /// Experts `E`, any number.
    pub experts: usize,
    /// Experts per token `k`, 1 to 64.
    pub top_k: usize,
    /// Applied to the unit: [`Activation::Identity`], `Relu`, `Gelu`, `GeluTanh` or `Silu`.
    pub activation: Activation,
}

impl UnitExpertsDesc {
    /// `top_k` of `experts` experts for each of `tokens` tokens of `hidden` elements, with SiLU (Doge).
    pub const fn new(dtype: Dtype, tokens: usize, hidden: usize, experts: usize, top_k: usize) -> UnitExpertsDesc {
        UnitExpertsDesc { dtype, tokens, hidden, experts, top_k, activation: Activation::Silu }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::positive(OPERATION, "hidden", self.hidden)?;
        if !self.hidden.is_multiple_of(8) {
            return Err(Error::unsupported(OPERATION, "hidden", "a multiple of 8", self.hidden));
        }
        shape::positive(OPERATION, "experts", self.experts)?;
        shape::positive(OPERATION, "top_k", self.top_k)?;
        if self.top_k > MAX_UNIT_TOP_K as usize {
            return Err(Error::unsupported(OPERATION, "top_k", format!("at most {MAX_UNIT_TOP_K}"), self.top_k));
        }
        shape::product_i32(OPERATION, "ids", &[self.tokens, self.top_k])?;
        shape::product(OPERATION, "x", &[self.tokens, self.hidden])?;
        shape::product(OPERATION, "input", &[self.experts, self.hidden])?;
        code(self.activation).map(drop)
    }
}

settings!(UnitExpertsDesc { activation: Activation });

/// The kernel's number of an activation.
fn code(activation: Activation) -> Result<u32, Error> {
    match activation {
        Activation::Identity => Ok(0),
        Activation::Relu => Ok(1),
        Activation::Gelu => Ok(2),
        Activation::GeluTanh => Ok(3),
        Activation::Silu => Ok(4),
        other => {
            let supported = "Identity, Relu, Gelu, GeluTanh or Silu";
            Err(Error::unsupported(OPERATION, "activation", supported, format!("{other:?}")))
        }
    }
}

/// Buffers of experts of one unit, matrices 16-byte aligned.
#[non_exhaustive]
pub struct UnitExpertsArgs<'a, T> {
    /// `[T, H]`.
    pub x: In<'a, T>,
    /// `[E, H]`: what each expert multiplies its input with (Doge's `down_embed`).
    pub input: In<'a, T>,
    /// `[E, H]`: what each expert's unit multiplies (Doge's `up_embed`).
    pub output: In<'a, T>,
    /// `[T, k]`. One that is no expert adds nothing.
    pub ids: In<'a, i32>,
    /// `[T, k]`.
    pub weights: In<'a, f32>,
    /// `[T, H]`, added first: the output of a dense MLP beside them.
    pub addend: Option<In<'a, T>>,
    /// `[T, H]`, written.
    pub y: Out<'a, T>,
}

impl<'a, T> UnitExpertsArgs<'a, T> {
    /// The experts `ids` of `x`, weighted by `weights`, to `y`.
    pub fn new(
        x: impl Into<In<'a, T>>,
        [input, output]: [In<'a, T>; 2],
        ids: impl Into<In<'a, i32>>,
        weights: impl Into<In<'a, f32>>,
        y: impl Into<Out<'a, T>>,
    ) -> UnitExpertsArgs<'a, T> {
        UnitExpertsArgs {
            x: x.into(),
            input,
            output,
            ids: ids.into(),
            weights: weights.into(),
            addend: None,
            y: y.into(),
        }
    }
}

buffers!(UnitExpertsArgs<'a, T> { addend: In<T> });

/// Chooses kernel and grid: a block a token.
///
/// # Errors
/// Those of [`UnitExpertsDesc::validate`].
pub fn select(desc: &UnitExpertsDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    Ok(Selection::new(Kernel::UnitExperts(desc.dtype), [(desc.tokens as u32).max(1), 1, 1]))
}

/// Computes `y`.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`UnitExpertsDesc::validate`]; those of a buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`]; and those of the driver.
pub fn forward<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &UnitExpertsDesc,
    args: UnitExpertsArgs<'_, T>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    scope.check_dtype::<T>("x", desc.dtype)?;
    if desc.tokens == 0 {
        return Ok(());
    }
    let &UnitExpertsDesc { tokens, hidden, experts, top_k, activation, .. } = desc;
    let x = scope.read("x", args.x, tokens * hidden, VECTOR)?;
    let input = scope.read("input", args.input, experts * hidden, VECTOR)?;
    let output = scope.read("output", args.output, experts * hidden, VECTOR)?;
    let ids = scope.read("ids", args.ids, tokens * top_k, SCALAR)?;
    let weights = scope.read("weights", args.weights, tokens * top_k, SCALAR)?;
    let addend = scope.read_some("addend", args.addend, tokens * hidden, VECTOR)?;
    let y = scope.write("y", args.y, tokens * hidden, VECTOR)?;
    scope.launch(
        &selection,
        UnitExpertsParams {
            x: x.address().into(),
            in_rows: input.address().into(),
            out_rows: output.address().into(),
            ids: ids.address().into(),
            weights: weights.address().into(),
            addend: optional(&addend).into(),
            y: y.address().into(),
            experts: experts as u32,
            top_k: top_k as u32,
            hidden: hidden as u32,
            activation: code(activation)?,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_field() {
        let desc = UnitExpertsDesc::new(Dtype::Bf16, 10, 64, 16384, 64);
        let fault = |desc: UnitExpertsDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(desc.validate(), Ok(()));
        assert_eq!(fault(UnitExpertsDesc { hidden: 36, ..desc }), "hidden");
        assert_eq!(fault(UnitExpertsDesc { top_k: 65, ..desc }), "top_k");
        assert_eq!(fault(UnitExpertsDesc { experts: 0, ..desc }), "experts");
        assert_eq!(fault(UnitExpertsDesc { tokens: 1 << 30, ..desc }), "ids");
        assert_eq!(fault(desc.activation(crate::rules::Swiglu::new().into())), "activation");
    }
}
