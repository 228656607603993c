//! The router product's way back: from gradients of logits to those of its input, its weight and its bias, with f32 sums whatever the types.
//!
//! With `logits = x W^T + b`: [`into_x`] is `dx = d_logits W`, [`into_weight`] is `dW = d_logits^T x`, a sum over all tokens in a fixed order, and
//! [`weight`] the same with `db`, cut into parts where a workspace is lent: so few outputs and so many tokens would leave most of a GPU idle. Products are of
//! TF32 on tensor cores, with an f32 gradient cut in two, so that they lose 2^-22 of it. A token whose gradients are all 0 (padding) is not
//! multiplied by them: its row of `x` may hold anything.
//!
//! [`both`] is [`input`] and [`weight`] in one launch, where a step counts its launches.
//!
//! The gate of a shared expert, whose logit is one more column of the router's product ([`super::router::SharedGate`]), goes along: [`RouterBackwardDesc::gate`].

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{Kernel, RouterBackward, RouterBackwardBoth};
use crate::rules::Dtype;
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{Address, Held, SCALAR, Scope, optional};
use crate::runtime::params::{RouterBackwardBothParams, RouterBackwardParams};
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
    /// Whether a shared expert's gate `w [H]` of the router's type goes along: `d_gate w^T` into the gradient of `x`, `d_gate^T x` beside that of the weight.
    pub gate: bool,
}

impl RouterBackwardDesc {
    /// Of `tokens` rows of `hidden` columns of type `x`, with a weight of the same type.
    pub const fn new(x: Dtype, tokens: usize, experts: usize, hidden: usize) -> RouterBackwardDesc {
        RouterBackwardDesc { x, weight: x, tokens, experts, hidden, accumulate: false, gate: false }
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

    /// Tiles of a weight's gradient, and of a gate's.
    fn weight_tiles(&self) -> u64 {
        self.tiles(self.experts) + if self.gate { self.tiles(1) } else { 0 }
    }

    fn select(&self, kernel: RouterBackward, tiles: u64) -> Result<Selection, Error> {
        self.validate()?;
        let blocks = shape::grid_x(OPERATION, "tokens", tiles)?;
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

settings!(RouterBackwardDesc { weight: Dtype, accumulate: bool, gate: bool });

/// Chooses kernel and grid of [`into_x`]: a block for 64 tokens and 128 columns.
///
/// # Errors
/// Those of [`RouterBackwardDesc::validate`], and a grid past the device's limit.
pub fn select_into_x(desc: &RouterBackwardDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.select(RouterBackward { b: desc.weight, out: desc.x }, desc.tiles(desc.tokens))
}

/// Chooses kernel and grid of [`into_weight`]: a block for 64 experts and 128 columns.
///
/// # Errors
/// Those of [`select_into_x`].
pub fn select_into_weight(desc: &RouterBackwardDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.select(RouterBackward { b: desc.x, out: Dtype::F32 }, desc.weight_tiles())
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
    let items = desc.weight_tiles() as usize * parts;
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
    let of_gate = if desc.gate { parts * desc.hidden } else { 0 };
    Ok(BARRIER_HEADER + (words + of_gate) * size_of::<f32>())
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
    input(kernels, stream, desc, InputArgs::new(d_logits, weight, dx))
}

/// Buffers of the gradient of what a router has seen.
#[non_exhaustive]
pub struct InputArgs<'a, X, W> {
    /// `[T, E]`.
    pub d_logits: In<'a, f32>,
    /// `[E, H]`.
    pub weight: In<'a, W>,
    /// `[T, H]`, written, or added to.
    pub dx: Out<'a, X>,
    /// `[T]` of the logits of a shared expert's gate, and its weight `[H]`: exactly with [`RouterBackwardDesc::gate`].
    pub gate: Option<(In<'a, f32>, In<'a, W>)>,
}

impl<'a, X, W> InputArgs<'a, X, W> {
    /// `d_logits` and `weight` to `dx`.
    pub fn new(
        d_logits: impl Into<In<'a, f32>>,
        weight: impl Into<In<'a, W>>,
        dx: impl Into<Out<'a, X>>,
    ) -> InputArgs<'a, X, W> {
        InputArgs { d_logits: d_logits.into(), weight: weight.into(), dx: dx.into(), gate: None }
    }

    /// With a shared expert's gate.
    #[must_use]
    pub fn gate(self, d_logits: impl Into<In<'a, f32>>, weight: impl Into<In<'a, W>>) -> InputArgs<'a, X, W> {
        InputArgs { gate: Some((d_logits.into(), weight.into())), ..self }
    }
}

/// [`InputArgs`], opened.
struct HeldInput<'a> {
    d_logits: Held<'a>,
    weight: Held<'a>,
    d_gate: Option<Held<'a>>,
    gate: Option<Held<'a>>,
    dx: Held<'a>,
}

impl<'a, X: Element, W: Element> InputArgs<'a, X, W> {
    fn check(&self, scope: &Scope<'_>, desc: &RouterBackwardDesc) -> Result<(), Error> {
        scope.check_dtype::<X>("dx", desc.x)?;
        scope.check_dtype::<W>("weight", desc.weight)?;
        check_gate(desc, self.gate.is_some())
    }

    fn open<'b>(self, scope: &Scope<'b>, desc: &RouterBackwardDesc) -> Result<HeldInput<'b>, Error>
    where
        'a: 'b,
    {
        let &RouterBackwardDesc { tokens, experts, hidden, .. } = desc;
        let (d_gate, gate) = self.gate.unzip();
        Ok(HeldInput {
            d_logits: scope.read("d_logits", self.d_logits, tokens * experts, SCALAR)?,
            weight: scope.read("weight", self.weight, experts * hidden, SCALAR)?,
            d_gate: scope.read_some("gate.d_logits", d_gate, tokens, SCALAR)?,
            gate: scope.read_some("gate.weight", gate, hidden, desc.weight.bytes().into())?,
            dx: scope.write("dx", self.dx, tokens * hidden, SCALAR)?,
        })
    }
}

/// [`into_x`], with a shared expert's gate where there is one: one launch.
///
/// # Errors
/// Those of [`into_x`]; [`Error::Missing`] or [`Error::Unexpected`] for a gate against the descriptor.
pub fn input<X: Element, W: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &RouterBackwardDesc,
    args: InputArgs<'_, X, W>,
) -> Result<(), Error> {
    let selection = select_into_x(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    args.check(&scope, desc)?;
    if desc.tokens == 0 {
        return Ok(());
    }
    let held = args.open(&scope, desc)?;
    let a = Gradients { at: held.d_logits.address(), strides: [desc.experts, 1], of_gate: optional(&held.d_gate) };
    let b = Rows { at: held.weight.address(), of_gate: optional(&held.gate) };
    let to = Results { out: held.dx.address(), d_bias: None, of_gate: None, workspace: None, parts: 1 };
    launch(&scope, desc, &selection, a, b, [desc.tokens, desc.experts], to)
}

fn check_gate(desc: &RouterBackwardDesc, given: bool) -> Result<(), Error> {
    let (operation, argument) = (OPERATION, "gate");
    match (desc.gate, given) {
        (true, false) => Err(Error::Missing { operation, argument, reason: "the descriptor has a gate" }),
        (false, true) => Err(Error::Unexpected { operation, argument, reason: "the descriptor has no gate" }),
        _ => Ok(()),
    }
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
    /// `[T]` of the logits of a shared expert's gate, and `[H]`, written, or added to: of its weight. Exactly with [`RouterBackwardDesc::gate`].
    pub gate: Option<(In<'a, f32>, Out<'a, f32>)>,
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
        let (d_logits, x, d_weight) = (d_logits.into(), x.into(), d_weight.into());
        WeightArgs { d_logits, x, d_weight, d_bias: None, gate: None, workspace: None }
    }

    /// With a shared expert's gate.
    #[must_use]
    pub fn gate(self, d_logits: impl Into<In<'a, f32>>, d_weight: impl Into<Out<'a, f32>>) -> WeightArgs<'a, X> {
        WeightArgs { gate: Some((d_logits.into(), d_weight.into())), ..self }
    }

    /// With memory for sums of parts.
    #[must_use]
    pub fn workspace(self, workspace: &'a mut Workspace) -> WeightArgs<'a, X> {
        WeightArgs { workspace: Some(workspace), ..self }
    }
}

buffers!(WeightArgs<'a, X> { d_bias: Out<f32> });

/// [`WeightArgs`], opened.
struct HeldWeight<'a> {
    d_logits: Held<'a>,
    x: Held<'a>,
    d_weight: Held<'a>,
    d_bias: Option<Held<'a>>,
    d_gate: Option<Held<'a>>,
    d_gate_weight: Option<Held<'a>>,
    /// Where there are parts.
    workspace: Option<Held<'a>>,
}

impl<'a, X: Element> WeightArgs<'a, X> {
    fn check(&self, scope: &Scope<'_>, desc: &RouterBackwardDesc) -> Result<(), Error> {
        scope.check_dtype::<X>("x", desc.x)?;
        check_gate(desc, self.gate.is_some())
    }

    fn open<'b>(self, scope: &Scope<'b>, desc: &RouterBackwardDesc, parts: usize) -> Result<HeldWeight<'b>, Error>
    where
        'a: 'b,
    {
        let &RouterBackwardDesc { tokens, experts, hidden, .. } = desc;
        let (d_gate, d_gate_weight) = self.gate.unzip();
        let (bytes, workspace) = (workspace_bytes(desc)?, self.workspace.filter(|_| parts > 1));
        Ok(HeldWeight {
            d_logits: scope.read("d_logits", self.d_logits, tokens * experts, SCALAR)?,
            x: scope.read("x", self.x, tokens * hidden, SCALAR)?,
            d_weight: scope.write("d_weight", self.d_weight, experts * hidden, SCALAR)?,
            d_bias: scope.write_some("d_bias", self.d_bias, experts, SCALAR)?,
            d_gate: scope.read_some("gate.d_logits", d_gate, tokens, SCALAR)?,
            d_gate_weight: scope.write_some("gate.d_weight", d_gate_weight, hidden, SCALAR)?,
            workspace: workspace.map(|workspace| workspace.open(scope, bytes)).transpose()?,
        })
    }
}

/// [`into_weight`] with the bias's gradient and a shared expert's gate's, in parts where a workspace is lent: one launch.
///
/// # Errors
/// Those of [`select_weight`]; [`Error::Missing`] or [`Error::Unexpected`] for a gate against the descriptor; those of a buffer as for [`into_x`], and [`Error::WorkspaceTooSmall`]; and those of the driver.
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
    args.check(&scope, desc)?;
    let held = args.open(&scope, desc, parts)?;
    let a = Gradients { at: held.d_logits.address(), strides: [1, desc.experts], of_gate: optional(&held.d_gate) };
    let to = Results {
        out: held.d_weight.address(),
        d_bias: optional(&held.d_bias),
        of_gate: optional(&held.d_gate_weight),
        workspace: optional(&held.workspace),
        parts,
    };
    let b = Rows { at: held.x.address(), of_gate: None };
    launch(&scope, desc, &selection, a, b, [desc.experts, desc.tokens], to)
}

/// Chooses kernel, grid and parts of [`both`] with a workspace: as many blocks as are resident at once.
///
/// # Errors
/// Those of [`select_into_x`] and [`select_weight`].
pub fn select_both(desc: &RouterBackwardDesc, device: &DeviceInfo) -> Result<(Selection, usize), Error> {
    let (of_weight, parts) = select_weight(desc, device)?;
    let kernel = RouterBackwardBoth { x: desc.x, weight: desc.weight };
    let resident = u64::from(kernel.resident_blocks() * device.multiprocessors);
    let items = desc.tiles(desc.tokens) + desc.weight_tiles() * parts as u64;
    let blocks = items.min(resident) as u32;
    let kernel = Kernel::RouterBackwardBoth(kernel);
    let selection = match of_weight.cooperative {
        true => Selection::cooperative(kernel, blocks),
        false => Selection::new(kernel, [blocks, 1, 1]),
    };
    Ok((selection, parts))
}

/// [`input`] and [`weight`] in one launch, with the bits of both. The descriptor's `accumulate` is that of the weight's gradient, `added` says that
/// the gradient of what the router has seen is added to what lies there.
///
/// With no tokens nothing is launched, and gradients of weights are as [`weight`] leaves them.
///
/// # Errors
/// Those of [`input`] and [`weight`]; [`Error::Missing`] without a workspace.
pub fn both<X: Element, W: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &RouterBackwardDesc,
    into_x: InputArgs<'_, X, W>,
    added: bool,
    into_weight: WeightArgs<'_, X>,
) -> Result<(), Error> {
    let (selection, parts) = select_both(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    into_x.check(&scope, desc)?;
    if desc.tokens == 0 {
        return weight(kernels, stream, desc, into_weight);
    }
    into_weight.check(&scope, desc)?;
    if into_weight.workspace.is_none() {
        let reason = "tokens are added up in parts (router_backward::workspace_bytes)";
        return Err(Error::Missing { operation: OPERATION, argument: "workspace", reason });
    }
    let &RouterBackwardDesc { tokens, experts, hidden, .. } = desc;
    let (input, weight) = (into_x.open(&scope, desc)?, into_weight.open(&scope, desc, parts)?);
    scope.launch(
        &selection,
        RouterBackwardBothParams {
            into_a: input.d_logits.address().into(),
            into_b: input.weight.address().into(),
            into_out: input.dx.address().into(),
            into_m: tokens as u32,
            into_n: hidden as u32,
            into_k: experts as u32,
            into_a_row: experts as u32,
            into_a_column: 1,
            into_accumulate: u32::from(added),
            into_gate_a: optional(&input.d_gate).into(),
            into_gate_b: optional(&input.gate).into(),
            weight_a: weight.d_logits.address().into(),
            weight_b: weight.x.address().into(),
            weight_out: weight.d_weight.address().into(),
            weight_m: experts as u32,
            weight_n: hidden as u32,
            weight_k: tokens as u32,
            weight_a_row: 1,
            weight_a_column: experts as u32,
            weight_accumulate: u32::from(desc.accumulate),
            weight_parts: parts as u32,
            weight_d_bias: optional(&weight.d_bias).into(),
            weight_gate_a: optional(&weight.d_gate).into(),
            weight_gate_out: optional(&weight.d_gate_weight).into(),
            weight_workspace: optional(&weight.workspace).into(),
        },
    )
}

/// Gradients of logits as one side of a product: element `(m, k)` at `m strides[0] + k strides[1]`.
struct Gradients<'a> {
    at: Address<'a>,
    strides: [usize; 2],
    /// `[T]`.
    of_gate: Option<Address<'a>>,
}

/// The other side: rows by `k`, and a gate's.
struct Rows<'a> {
    at: Address<'a>,
    of_gate: Option<Address<'a>>,
}

/// Where results go.
struct Results<'a> {
    out: Address<'a>,
    d_bias: Option<Address<'a>>,
    of_gate: Option<Address<'a>>,
    workspace: Option<Address<'a>>,
    parts: usize,
}

fn launch(
    scope: &Scope<'_>,
    desc: &RouterBackwardDesc,
    selection: &Selection,
    a: Gradients<'_>,
    b: Rows<'_>,
    [m, k]: [usize; 2],
    to: Results<'_>,
) -> Result<(), Error> {
    scope.launch(
        selection,
        RouterBackwardParams {
            a: a.at.into(),
            b: b.at.into(),
            out: to.out.into(),
            m: m as u32,
            n: desc.hidden as u32,
            k: k as u32,
            a_row: a.strides[0] as u32,
            a_column: a.strides[1] as u32,
            accumulate: u32::from(desc.accumulate),
            parts: to.parts as u32,
            d_bias: to.d_bias.into(),
            gate_a: a.of_gate.into(),
            gate_b: b.of_gate.into(),
            gate_out: to.of_gate.into(),
            workspace: to.workspace.into(),
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
        assert_eq!(select_weight(&desc.gate(true), &A100).unwrap().1, 8);
        assert_eq!(workspace_bytes(&desc.gate(true)).unwrap(), 32 + 4 * 8 * (128 * 2049 + 2048));
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
