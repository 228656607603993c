//! The router product's way back: from gradients of logits to those of its input and its weight, in f32 arithmetic whatever the types.
//!
//! With `logits = x W^T`: [`into_x`] is `dx = d_logits W`, [`into_weight`] is `dW = d_logits^T x`, a sum over all tokens in a fixed order. A token
//! whose gradients are all 0 (padding) is not multiplied by them: its row of `x` may hold anything.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{Kernel, RouterBackward};
use crate::rules::Dtype;
use crate::runtime::builder::settings;
use crate::runtime::launch::{Address, SCALAR, Scope};
use crate::runtime::params::RouterBackwardParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "router_backward";

/// Shapes and types of a router's backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RouterBackwardDesc {
    /// Type of `x` and of its gradient.
    pub x: Dtype,
    /// Type of the router's weight: that of `x`, or f32. Its gradient is f32.
    pub weight: Dtype,
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts `E`: columns of the logits.
    pub experts: usize,
    /// Hidden size `H`.
    pub hidden: usize,
    /// Adds to what the result holds, once and before it is rounded.
    pub accumulate: bool,
}

impl RouterBackwardDesc {
    /// Of `tokens` rows of `hidden` columns of type `x`, with a weight of the same type.
    pub const fn new(x: Dtype, tokens: usize, experts: usize, hidden: usize) -> RouterBackwardDesc {
        RouterBackwardDesc { x, weight: x, tokens, experts, hidden, accumulate: false }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::positive(OPERATION, "experts", self.experts)?;
        shape::positive(OPERATION, "hidden", self.hidden)?;
        shape::product(OPERATION, "logits", &[self.tokens, self.experts])?;
        shape::product(OPERATION, "x", &[self.tokens, self.hidden])?;
        shape::product(OPERATION, "weight", &[self.experts, self.hidden])?;
        if self.weight != self.x && self.weight != Dtype::F32 {
            let supported = format!("{} or f32, with x of {}", self.x, self.x);
            return Err(Error::unsupported(OPERATION, "weight", supported, self.weight));
        }
        Ok(())
    }

    fn select(&self, kernel: RouterBackward, rows: usize) -> Result<Selection, Error> {
        self.validate()?;
        let tile = RouterBackward::TILE as usize;
        let blocks = |count: usize| count.div_ceil(tile).max(1) as u64;
        let across = blocks(self.hidden);
        if across > 65535 {
            let supported = format!("at most {}", 65535 * tile);
            return Err(Error::unsupported(OPERATION, "hidden", supported, self.hidden));
        }
        let along = shape::grid_x(OPERATION, "tokens", blocks(rows))?;
        Ok(Selection::new(Kernel::RouterBackward(kernel), [along, across as u32, 1]))
    }
}

settings!(RouterBackwardDesc { weight: Dtype, accumulate: bool });

/// Chooses kernel and grid of [`into_x`]: a block for 64 tokens and 64 columns.
///
/// # Errors
/// Those of [`RouterBackwardDesc::validate`], and a grid past the device's limit.
pub fn select_into_x(desc: &RouterBackwardDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.select(RouterBackward { b: desc.weight, out: desc.x }, desc.tokens)
}

/// Chooses kernel and grid of [`into_weight`]: a block for 64 experts and 64 columns.
///
/// # Errors
/// Those of [`select_into_x`].
pub fn select_into_weight(desc: &RouterBackwardDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.select(RouterBackward { b: desc.x, out: Dtype::F32 }, desc.experts)
}

/// `dx [T,H]` of `d_logits [T,E]` and the router's `weight [E,H]`.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`select_into_x`]; those of a buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`]; and those of the driver.
pub fn into_x<'a, X: Element, W: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &RouterBackwardDesc,
    d_logits: impl Into<In<'a, f32>>,
    weight: impl Into<In<'a, W>>,
    dx: impl Into<Out<'a, X>>,
) -> Result<(), Error> {
    let selection = select_into_x(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    scope.check_dtype::<X>("dx", desc.x)?;
    scope.check_dtype::<W>("weight", desc.weight)?;
    let &RouterBackwardDesc { tokens, experts, hidden, .. } = desc;
    if tokens == 0 {
        return Ok(());
    }
    let d_logits = scope.read("d_logits", d_logits.into(), tokens * experts, SCALAR)?;
    let weight = scope.read("weight", weight.into(), experts * hidden, SCALAR)?;
    let dx = scope.write("dx", dx.into(), tokens * hidden, SCALAR)?;
    let a = Gradients { at: d_logits.address(), strides: [experts, 1] };
    launch(&scope, desc, &selection, a, weight.address(), dx.address(), [tokens, experts])
}

/// `d_weight [E,H]` of `d_logits [T,E]` and `x [T,H]`.
///
/// With no tokens the gradient is 0: `d_weight` becomes 0, or with `accumulate` stays.
///
/// # Errors
/// Those of [`select_into_weight`]; those of a buffer as for [`into_x`]; and those of the driver.
pub fn into_weight<'a, X: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &RouterBackwardDesc,
    d_logits: impl Into<In<'a, f32>>,
    x: impl Into<In<'a, X>>,
    d_weight: impl Into<Out<'a, f32>>,
) -> Result<(), Error> {
    let selection = select_into_weight(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    scope.check_dtype::<X>("x", desc.x)?;
    let &RouterBackwardDesc { tokens, experts, hidden, .. } = desc;
    let d_logits = scope.read("d_logits", d_logits.into(), tokens * experts, SCALAR)?;
    let x = scope.read("x", x.into(), tokens * hidden, SCALAR)?;
    let d_weight = scope.write("d_weight", d_weight.into(), experts * hidden, SCALAR)?;
    let a = Gradients { at: d_logits.address(), strides: [1, experts] };
    launch(&scope, desc, &selection, a, x.address(), d_weight.address(), [experts, tokens])
}

/// Gradients of logits as one side of a product: element `(m, k)` at `m strides[0] + k strides[1]`.
struct Gradients<'a> {
    at: Address<'a>,
    strides: [usize; 2],
}

fn launch(
    scope: &Scope<'_>,
    desc: &RouterBackwardDesc,
    selection: &Selection,
    a: Gradients<'_>,
    b: Address<'_>,
    out: Address<'_>,
    [m, k]: [usize; 2],
) -> Result<(), Error> {
    scope.launch(
        selection,
        RouterBackwardParams {
            a: a.at.into(),
            b: b.into(),
            out: out.into(),
            m: m as u32,
            n: desc.hidden as u32,
            k: k as u32,
            a_row: a.strides[0] as u32,
            a_column: a.strides[1] as u32,
            accumulate: u32::from(desc.accumulate),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::device::A100;

    #[test]
    fn faults_name_their_field() {
        let desc = RouterBackwardDesc::new(Dtype::Bf16, 100, 8, 512);
        let fault = |desc: RouterBackwardDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(desc.validate(), Ok(()));
        assert_eq!(fault(RouterBackwardDesc { tokens: 1 << 40, ..desc }), "tokens");
        assert_eq!(fault(RouterBackwardDesc { experts: 0, ..desc }), "experts");
        assert_eq!(fault(RouterBackwardDesc { hidden: 0, ..desc }), "hidden");
        assert_eq!(fault(desc.weight(Dtype::F16)), "weight");
        let wide = RouterBackwardDesc { hidden: 65535 * 64 + 1, tokens: 1, experts: 1, ..desc };
        assert_eq!(select_into_x(&wide, &A100).unwrap_err().argument(), Some("hidden"));
    }

    #[test]
    fn blocks_cover_the_result() {
        let desc = RouterBackwardDesc::new(Dtype::F16, 65, 8, 129).weight(Dtype::F32);
        assert_eq!(select_into_x(&desc, &A100).unwrap().grid, [2, 3, 1]);
        assert_eq!(select_into_weight(&desc, &A100).unwrap().grid, [1, 3, 1]);
        assert_eq!(select_into_x(&desc, &A100).unwrap().kernel.name(), "router_backward_f32_f16");
        assert_eq!(select_into_weight(&desc, &A100).unwrap().kernel.name(), "router_backward_f16_f32");
    }
}
