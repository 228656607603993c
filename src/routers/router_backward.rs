//! The router product's way back: from gradients of logits to those of its input, its weight and its bias, with f32 sums whatever the types.
//!
//! With `logits = x W^T + b`: [`into_x`] is `dx = d_logits W`, [`into_weight`] is `dW = d_logits^T x`, a sum over all tokens in a fixed order, and
//! [`weight`] the same with `db`, cut into parts where a workspace is lent: so few outputs and so many tokens would leave most of a GPU idle. Products are of
//! TF32 on tensor cores, with an f32 gradient cut in two, so that they lose 2^-22 of it. A token whose gradients are all 0 (padding) is not
//! multiplied by them: its row of `x` may hold anything.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{Kernel, RouterBackward};
use crate::rules::Dtype;
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{Address, SCALAR, Scope, optional};
use crate::runtime::params::{Pointer, RouterBackwardParams};
use crate::runtime::shape;
use crate::runtime::workspace::BARRIER_HEADER;
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection, Workspace};

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

    /// Tiles of outputs, of `rows` rows.
    fn tiles(&self, rows: usize) -> u64 {
        let blocks = |count: usize, tile: u32| count.div_ceil(tile as usize).max(1) as u64;
        blocks(rows, RouterBackward::ROWS) * blocks(self.hidden, RouterBackward::COLUMNS)
    }

    fn select(&self, kernel: RouterBackward, rows: usize) -> Result<Selection, Error> {
        self.validate()?;
        let blocks = shape::grid_x(OPERATION, "tokens", self.tiles(rows))?;
        Ok(Selection::new(Kernel::RouterBackward(kernel), [blocks, 1, 1]))
    }

    /// In how many parts [`weight`] adds up the tokens where it has a workspace: as many as make 256 tiles, of at least eight stages each. It follows from
    /// the shapes alone, so that every device has the same bits.
    fn parts(&self) -> usize {
        let stages = self.tokens.div_ceil(RouterBackward::DEPTH as usize);
        let wanted = 256 / self.tiles(self.experts).min(256) as usize;
        wanted.min(stages / 8).max(1)
    }
}

settings!(RouterBackwardDesc { weight: Dtype, accumulate: bool });

/// Chooses kernel and grid of [`into_x`]: a block for 64 tokens and 128 columns.
///
/// # Errors
/// Those of [`RouterBackwardDesc::validate`], and a grid past the device's limit.
pub fn select_into_x(desc: &RouterBackwardDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.select(RouterBackward { b: desc.weight, out: desc.x }, desc.tokens)
}

/// Chooses kernel and grid of [`into_weight`]: a block for 64 experts and 128 columns.
///
/// # Errors
/// Those of [`select_into_x`].
pub fn select_into_weight(desc: &RouterBackwardDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.select(RouterBackward { b: desc.x, out: Dtype::F32 }, desc.experts)
}

/// Chooses kernel, grid and parts of [`weight`] with a workspace: a block for a tile of a part, as many as are resident at once.
///
/// # Errors
/// Those of [`select_into_weight`].
pub fn select_weight(desc: &RouterBackwardDesc, device: &DeviceInfo) -> Result<(Selection, usize), Error> {
    let alone = select_into_weight(desc, device)?;
    let parts = desc.parts();
    if parts == 1 || !device.cooperative_launch {
        return Ok((alone, 1));
    }
    let kernel = RouterBackward { b: desc.x, out: Dtype::F32 };
    let items = desc.tiles(desc.experts) as usize * parts;
    let blocks = items.min((kernel.resident_blocks() * device.multiprocessors) as usize);
    Ok((Selection::cooperative(Kernel::RouterBackward(kernel), blocks as u32), parts))
}

/// Workspace of [`weight`] in bytes: sums of each part.
///
/// # Errors
/// Those of [`RouterBackwardDesc::validate`].
pub fn workspace_bytes(desc: &RouterBackwardDesc) -> Result<usize, Error> {
    desc.validate()?;
    let parts = desc.parts();
    if parts == 1 {
        return Ok(BARRIER_HEADER);
    }
    let words = shape::product(OPERATION, "weight", &[parts, desc.experts, desc.hidden + 1])?;
    Ok(BARRIER_HEADER + words * size_of::<f32>())
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
    let to = Results { out: dx.address(), d_bias: None, workspace: None, parts: 1 };
    launch(&scope, desc, &selection, a, weight.address(), [tokens, experts], to)
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
    weight(kernels, stream, desc, WeightArgs::new(d_logits, x, d_weight))
}

/// Buffers of the gradients of a router's weight and bias.
#[non_exhaustive]
pub struct WeightArgs<'a, X> {
    /// `[T, E]`.
    pub d_logits: In<'a, f32>,
    /// `[T, H]`: what the router saw.
    pub x: In<'a, X>,
    /// `[E, H]`, written, or added to.
    pub d_weight: Out<'a, f32>,
    /// `[E]`, written, or added to: sums of the gradients of logits.
    pub d_bias: Option<Out<'a, f32>>,
    /// At least [`workspace_bytes`]: the tokens are added up in parts side by side. Without, one behind the other.
    pub workspace: Option<&'a mut Workspace>,
}

impl<'a, X> WeightArgs<'a, X> {
    /// `d_logits` and `x` to `d_weight`.
    pub fn new(
        d_logits: impl Into<In<'a, f32>>,
        x: impl Into<In<'a, X>>,
        d_weight: impl Into<Out<'a, f32>>,
    ) -> WeightArgs<'a, X> {
        WeightArgs { d_logits: d_logits.into(), x: x.into(), d_weight: d_weight.into(), d_bias: None, workspace: None }
    }

    /// With memory for sums of parts.
    #[must_use]
    pub fn workspace(self, workspace: &'a mut Workspace) -> WeightArgs<'a, X> {
        WeightArgs { workspace: Some(workspace), ..self }
    }
}

buffers!(WeightArgs<'a, X> { d_bias: Out<f32> });

/// [`into_weight`] with the bias's gradient, in parts where a workspace is lent: one launch.
///
/// # Errors
/// Those of [`select_weight`]; those of a buffer as for [`into_x`], and [`Error::WorkspaceTooSmall`]; and those of the driver.
pub fn weight<X: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &RouterBackwardDesc,
    args: WeightArgs<'_, X>,
) -> Result<(), Error> {
    let (selection, parts) = match args.workspace {
        Some(_) => select_weight(desc, kernels.device())?,
        None => (select_into_weight(desc, kernels.device())?, 1),
    };
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    scope.check_dtype::<X>("x", desc.x)?;
    let &RouterBackwardDesc { tokens, experts, hidden, .. } = desc;
    let d_logits = scope.read("d_logits", args.d_logits, tokens * experts, SCALAR)?;
    let x = scope.read("x", args.x, tokens * hidden, SCALAR)?;
    let d_weight = scope.write("d_weight", args.d_weight, experts * hidden, SCALAR)?;
    let d_bias = scope.write_some("d_bias", args.d_bias, experts, SCALAR)?;
    let bytes = workspace_bytes(desc)?;
    let workspace = args.workspace.filter(|_| parts > 1).map(|workspace| workspace.open(&scope, bytes)).transpose()?;
    let a = Gradients { at: d_logits.address(), strides: [1, experts] };
    let to = Results { out: d_weight.address(), d_bias: optional(&d_bias), workspace: optional(&workspace), parts };
    launch(&scope, desc, &selection, a, x.address(), [experts, tokens], to)
}

/// Gradients of logits as one side of a product: element `(m, k)` at `m strides[0] + k strides[1]`.
struct Gradients<'a> {
    at: Address<'a>,
    strides: [usize; 2],
}

/// Where results go.
struct Results<'a> {
    out: Address<'a>,
    d_bias: Option<Address<'a>>,
    workspace: Option<Address<'a>>,
    parts: usize,
}

fn launch(
    scope: &Scope<'_>,
    desc: &RouterBackwardDesc,
    selection: &Selection,
    a: Gradients<'_>,
    b: Address<'_>,
    [m, k]: [usize; 2],
    to: Results<'_>,
) -> Result<(), Error> {
    scope.launch(
        selection,
        RouterBackwardParams {
            a: a.at.into(),
            b: b.into(),
            out: to.out.into(),
            m: m as u32,
            n: desc.hidden as u32,
            k: k as u32,
            a_row: a.strides[0] as u32,
            a_column: a.strides[1] as u32,
            accumulate: u32::from(desc.accumulate),
            parts: to.parts as u32,
            d_bias: to.d_bias.map_or(Pointer::NULL, Pointer::from),
            workspace: to.workspace.map_or(Pointer::NULL, Pointer::from),
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
    }

    #[test]
    fn blocks_cover_the_result() {
        let desc = RouterBackwardDesc::new(Dtype::F16, 65, 8, 129).weight(Dtype::F32);
        assert_eq!(select_into_x(&desc, &A100).unwrap().grid, [4, 1, 1]);
        assert_eq!(select_into_weight(&desc, &A100).unwrap().grid, [2, 1, 1]);
        assert_eq!(select_into_x(&desc, &A100).unwrap().kernel.name(), "router_backward_f32_f16");
        assert_eq!(select_into_weight(&desc, &A100).unwrap().kernel.name(), "router_backward_f16_f32");
    }

    #[test]
    fn many_tokens_are_added_up_in_parts() {
        let desc = RouterBackwardDesc::new(Dtype::Bf16, 32768, 128, 2048);
        let (selection, parts) = select_weight(&desc, &A100).unwrap();
        assert_eq!((parts, selection.grid, selection.cooperative), (8, [216, 1, 1], true));
        assert_eq!(workspace_bytes(&desc).unwrap(), 32 + 4 * 8 * 128 * 2049);
        let alone = DeviceInfo { cooperative_launch: false, ..A100 };
        assert_eq!(select_weight(&desc, &alone).unwrap().1, 1);
        // Few tokens, and tiles enough.
        for few in
            [RouterBackwardDesc { tokens: 300, ..desc }, RouterBackwardDesc { experts: 1024, hidden: 4096, ..desc }]
        {
            assert_eq!(select_weight(&few, &A100).unwrap(), (select_into_weight(&few, &A100).unwrap(), 1));
        }
    }
}
