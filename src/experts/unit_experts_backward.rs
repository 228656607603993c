//! The way back through experts of one hidden unit ([`crate::experts::unit_experts`]).
//!
//! Of a choice with `p = input[e] . x[t]`, `a = act(p)`, `c = output[e] . dy[t]` and the weight `w`: its weight's gradient is `a c`, and with
//! `d = w act'(p) c` those of `x[t]`, `input[e]` and `output[e]` are `d input[e]`, `d x[t]` and `w a dy[t]`. An addend's is `dy`.
//!
//! One launch goes back to tokens and weights; a second one, which is left out where no expert learns, sums each expert's rows in the order of their
//! slots, so that both have the same bits at each launch.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::activation_backward::Numbered;
use super::unit_experts::UnitExpertsDesc;
use crate::registry::{Kernel, MAX_UNIT_SHARE};
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{SCALAR, Scope, VECTOR, optional};
use crate::runtime::params::{UnitExpertsBackwardParams, UnitExpertsRowsParams};
use crate::runtime::workspace::{Arena, Region};
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection, Workspace};

const OPERATION: &str = "unit_experts_backward";

/// Shapes of the way back through experts of one unit.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct UnitExpertsBackwardDesc {
    /// The forward pass.
    pub forward: UnitExpertsDesc,
    /// Adds to `dx` instead of writing it.
    pub accumulate: bool,
    /// Adds to `d_input` and `d_output` instead of writing them; experts that nobody chose are left alone.
    pub accumulate_experts: bool,
}

impl UnitExpertsBackwardDesc {
    /// Of `forward`, everything written.
    pub const fn new(forward: UnitExpertsDesc) -> UnitExpertsBackwardDesc {
        UnitExpertsBackwardDesc { forward, accumulate: false, accumulate_experts: false }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// Those of [`UnitExpertsDesc::validate`].
    pub fn validate(&self) -> Result<(), Error> {
        self.forward.validate().map_err(|error| error.within(OPERATION))
    }

    /// The factors of rows of `input`, those of rows of `output`, and slots by expert.
    fn regions(&self) -> Result<([Region; 3], usize), Error> {
        let slots = self.forward.tokens * self.forward.top_k;
        let mut arena = Arena::new(OPERATION);
        let regions =
            [arena.region("factors", slots, 4)?, arena.region("factors", slots, 4)?, arena.region("list", slots, 4)?];
        Ok((regions, arena.bytes()))
    }
}

settings!(UnitExpertsBackwardDesc { accumulate: bool, accumulate_experts: bool });

/// Buffers of the way back through experts of one unit, matrices 16-byte aligned. Gradients that are absent are not computed.
#[non_exhaustive]
pub struct UnitExpertsBackwardArgs<'a, T> {
    /// `[T, H]`.
    pub x: In<'a, T>,
    /// `[E, H]`.
    pub input: In<'a, T>,
    /// `[E, H]`.
    pub output: In<'a, T>,
    /// `[T, k]`; one that is no expert's passes nothing back.
    pub ids: In<'a, i32>,
    /// `[T, k]`.
    pub weights: In<'a, f32>,
    /// `[T, H]`: the gradient of `y`.
    pub dy: In<'a, T>,
    /// `[T, H]`, written, or added to.
    pub dx: Option<Out<'a, T>>,
    /// `[T, k]`, written; 0 for an id that is no expert's.
    pub d_weights: Option<Out<'a, f32>>,
    /// `[E, H]`, written, or added to; 0 for experts that nobody chose.
    pub d_input: Option<Out<'a, f32>>,
    /// `[E, H]`, likewise.
    pub d_output: Option<Out<'a, f32>>,
    /// For `d_input` and `d_output`: [`workspace_bytes`].
    pub workspace: Option<&'a mut Workspace>,
}

impl<'a, T> UnitExpertsBackwardArgs<'a, T> {
    /// From `dy`, with the forward pass's `x`, rows `[input, output]`, `ids` and `weights`; to nothing yet.
    pub fn new(
        x: impl Into<In<'a, T>>,
        [input, output]: [In<'a, T>; 2],
        ids: impl Into<In<'a, i32>>,
        weights: impl Into<In<'a, f32>>,
        dy: impl Into<In<'a, T>>,
    ) -> UnitExpertsBackwardArgs<'a, T> {
        UnitExpertsBackwardArgs {
            x: x.into(),
            input,
            output,
            ids: ids.into(),
            weights: weights.into(),
            dy: dy.into(),
            dx: None,
            d_weights: None,
            d_input: None,
            d_output: None,
            workspace: None,
        }
    }

    /// Space for the experts' gradients.
    #[must_use]
    pub fn workspace(self, workspace: &'a mut Workspace) -> UnitExpertsBackwardArgs<'a, T> {
        UnitExpertsBackwardArgs { workspace: Some(workspace), ..self }
    }
}

buffers!(UnitExpertsBackwardArgs<'a, T> {
    dx: Out<T>,
    d_weights: Out<f32>,
    d_input: Out<f32>,
    d_output: Out<f32>,
});

/// Bytes of the workspace that the experts' gradients need: 12 for each choice.
///
/// # Errors
/// Those of [`UnitExpertsBackwardDesc::validate`].
pub fn workspace_bytes(desc: &UnitExpertsBackwardDesc) -> Result<usize, Error> {
    desc.validate()?;
    Ok(desc.regions()?.1)
}

/// Chooses kernels and grids: a block a token; for the experts' gradients two blocks a multiprocessor, or as many as have 64 experts each.
///
/// # Errors
/// Those of [`UnitExpertsBackwardDesc::validate`].
pub fn select(desc: &UnitExpertsBackwardDesc, device: &DeviceInfo) -> Result<[Selection; 2], Error> {
    desc.validate()?;
    let UnitExpertsDesc { dtype, tokens, experts, .. } = desc.forward;
    let blocks = (experts as u32).div_ceil(share(experts as u32, device));
    Ok([
        Selection::new(Kernel::UnitExpertsBackward(dtype), [(tokens as u32).max(1), 1, 1]),
        Selection::new(Kernel::UnitExpertsRows(dtype), [blocks, 1, 1]),
    ])
}

/// Experts of a block.
fn share(experts: u32, device: &DeviceInfo) -> u32 {
    experts.div_ceil(2 * device.multiprocessors).clamp(1, MAX_UNIT_SHARE)
}

/// Computes the gradients.
///
/// With no tokens the experts' gradients are written with zeros, or left alone where they accumulate.
///
/// # Errors
/// Those of [`UnitExpertsBackwardDesc::validate`]; [`Error::Missing`] without a workspace for the experts' gradients; those of a buffer:
/// [`Error::WrongDtype`], [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::WorkspaceTooSmall`], [`Error::DifferentContext`]; and those of
/// the driver.
pub fn backward<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &UnitExpertsBackwardDesc,
    args: UnitExpertsBackwardArgs<'_, T>,
) -> Result<(), Error> {
    let [to_tokens, to_rows] = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    scope.check_dtype::<T>("x", desc.forward.dtype)?;
    let UnitExpertsDesc { tokens, hidden, experts, top_k, activation, .. } = desc.forward;
    let slots = tokens * top_k;
    let x = scope.read("x", args.x, tokens * hidden, VECTOR)?;
    let input = scope.read("input", args.input, experts * hidden, VECTOR)?;
    let output = scope.read("output", args.output, experts * hidden, VECTOR)?;
    let ids = scope.read("ids", args.ids, slots, SCALAR)?;
    let weights = scope.read("weights", args.weights, slots, SCALAR)?;
    let dy = scope.read("dy", args.dy, tokens * hidden, VECTOR)?;
    let dx = scope.write_some("dx", args.dx, tokens * hidden, VECTOR)?;
    let d_weights = scope.write_some("d_weights", args.d_weights, slots, SCALAR)?;
    let d_input = scope.write_some("d_input", args.d_input, experts * hidden, VECTOR)?;
    let d_output = scope.write_some("d_output", args.d_output, experts * hidden, VECTOR)?;
    let learns = d_input.is_some() || d_output.is_some();
    let (regions, bytes) = desc.regions()?;
    let workspace = match args.workspace.filter(|_| learns) {
        Some(workspace) => Some(workspace.open(&scope, bytes)?),
        None if learns => {
            let reason = "the experts' gradients are summed by lists of slots";
            return Err(Error::Missing { operation: OPERATION, argument: "workspace", reason });
        }
        None => None,
    };
    let [in_factors, out_factors, list] =
        regions.map(|region| workspace.as_ref().map(|workspace| workspace.at(region)));
    if tokens > 0 {
        scope.launch(
            &to_tokens,
            UnitExpertsBackwardParams {
                x: x.address().into(),
                in_rows: input.address().into(),
                out_rows: output.address().into(),
                ids: ids.address().into(),
                weights: weights.address().into(),
                dy: dy.address().into(),
                dx: optional(&dx).into(),
                d_weights: optional(&d_weights).into(),
                in_factors: in_factors.into(),
                out_factors: out_factors.into(),
                experts: experts as u32,
                top_k: top_k as u32,
                hidden: hidden as u32,
                activation: Numbered::new(activation).activation,
                accumulate: u32::from(desc.accumulate),
            },
        )?;
    }
    if !learns {
        return Ok(());
    }
    scope.launch(
        &to_rows,
        UnitExpertsRowsParams {
            x: x.address().into(),
            dy: dy.address().into(),
            ids: ids.address().into(),
            in_factors: in_factors.into(),
            out_factors: out_factors.into(),
            list: list.into(),
            d_in: optional(&d_input).into(),
            d_out: optional(&d_output).into(),
            slots: slots as u32,
            top_k: top_k as u32,
            experts: experts as u32,
            hidden: hidden as u32,
            share: share(experts as u32, kernels.device()),
            accumulate: u32::from(desc.accumulate_experts),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    #[test]
    fn faults_name_their_field() {
        let desc = UnitExpertsDesc::new(Dtype::Bf16, 10, 64, 16384, 64);
        let fault = |desc| UnitExpertsBackwardDesc::new(desc).validate().unwrap_err().argument().unwrap();
        assert_eq!(UnitExpertsBackwardDesc::new(desc).validate(), Ok(()));
        assert_eq!(fault(UnitExpertsDesc { hidden: 36, ..desc }), "hidden");
        assert_eq!(fault(UnitExpertsDesc { top_k: 65, ..desc }), "top_k");
    }

    #[test]
    fn bytes_of_a_choice() {
        let desc = UnitExpertsBackwardDesc::new(UnitExpertsDesc::new(Dtype::Bf16, 256, 64, 16384, 64));
        assert_eq!(workspace_bytes(&desc), Ok(12 * 256 * 64));
    }
}
