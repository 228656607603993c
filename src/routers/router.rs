//! Router: the scores of every expert for every token, before gating.
//!
//! `logits[t,e] = rule(sum_h x[t,h] * weight[e,h] + bias[e])`, with a factor and a soft cap where a model has them ([`LogitRule`]), in f32 arithmetic whatever the type of `x` (selective precision of
//! Fedus et al., *Switch Transformers*, 2021, section 2.4), summed in a fixed order.
//!
//! Tensor cores make the products of 16-bit numbers, and of bf16 with an f32 weight, which are exact there; parts of 32 depths are joined by f32 additions.
//! Products of f32, and of f16 with an f32 weight, are fused multiply-adds.
//!
//! A shared expert's gate is one more row of the same product, `gate[t] = sum_h x[t,h] * gate_weight[h]`: the layer multiplies the shared
//! expert's output by its sigmoid (Qwen2-MoE). Its bits do not depend on the kernel.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{Kernel, Router, RouterShape};
use crate::rules::{Dtype, LogitRule};
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{Address, SCALAR, Scope, optional};
use crate::runtime::params::RouterParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, OutTensor, Selection};

const OPERATION: &str = "router";

/// Shapes and types of a router.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct RouterDesc {
    /// Type of `x`.
    pub x: Dtype,
    /// Type of the weight: that of `x`, or f32.
    pub weight: Dtype,
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts `E`, 1 to 4096; 0 with a shared gate: that alone.
    pub experts: usize,
    /// Hidden size `H`. Of a multiple of 8 `x` and the weights begin on 16 bytes, else on any element, and it takes longer.
    pub hidden: usize,
    /// One order of sums for any number of tokens, so that a token's logits have the same bits in every batch. On tensor cores they do in any case; else a
    /// kernel for few tokens, which reads the weight with more multiprocessors, is left out.
    pub batch_invariant: bool,
    /// Whether there is a shared expert's gate ([`RouterArgs::shared_gate`]).
    pub shared_gate: bool,
    /// What is done to the product; not to a shared expert's gate.
    pub logits: LogitRule,
}

impl RouterDesc {
    /// Logits of `experts` experts for `tokens` rows of `hidden` elements of type `x`, with a weight of the same type.
    pub const fn new(x: Dtype, tokens: usize, experts: usize, hidden: usize) -> RouterDesc {
        let logits = LogitRule::PLAIN;
        RouterDesc { x, weight: x, tokens, experts, hidden, batch_invariant: false, shared_gate: false, logits }
    }
}

settings!(RouterDesc { weight: Dtype, batch_invariant: bool, shared_gate: bool, logits: LogitRule });

/// Buffers of a router.
#[non_exhaustive]
pub struct RouterArgs<'a, X, W> {
    /// `[T, H]`.
    pub x: In<'a, X>,
    /// `[E, H]`.
    pub weight: In<'a, W>,
    /// `[E]`, added to the logits.
    pub bias: Option<In<'a, f32>>,
    /// `[T, E]`, written: of any [`Element`], rounded from f32 once.
    pub logits: OutTensor<'a>,
    /// Exactly with [`RouterDesc::shared_gate`].
    pub shared_gate: Option<SharedGate<'a, W>>,
}

/// The gate of a shared expert.
#[non_exhaustive]
pub struct SharedGate<'a, W> {
    /// `[H]`.
    pub weight: In<'a, W>,
    /// `[T]`, written: before the sigmoid.
    pub logits: Out<'a, f32>,
}

impl<'a, W> SharedGate<'a, W> {
    /// The products of `x` with `weight` to `logits`.
    pub fn new(weight: impl Into<In<'a, W>>, logits: impl Into<Out<'a, f32>>) -> SharedGate<'a, W> {
        SharedGate { weight: weight.into(), logits: logits.into() }
    }
}

impl<'a, X, W> RouterArgs<'a, X, W> {
    /// `x` to `logits`, without a bias.
    pub fn new(
        x: impl Into<In<'a, X>>,
        weight: impl Into<In<'a, W>>,
        logits: impl Into<OutTensor<'a>>,
    ) -> RouterArgs<'a, X, W> {
        RouterArgs { x: x.into(), weight: weight.into(), bias: None, logits: logits.into(), shared_gate: None }
    }

    /// With a shared expert's gate.
    #[must_use]
    pub fn shared_gate(self, gate: SharedGate<'a, W>) -> RouterArgs<'a, X, W> {
        RouterArgs { shared_gate: Some(gate), ..self }
    }
}

buffers!(RouterArgs<'a, X, W> { bias: In<f32> });

impl RouterDesc {
    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        if self.experts > 0 || !self.shared_gate {
            shape::experts(OPERATION, self.experts)?;
        }
        shape::positive(OPERATION, "hidden", self.hidden)?;
        if self.weight != self.x && self.weight != Dtype::F32 {
            let supported = format!("the type of x ({}) or f32", self.x);
            return Err(Error::unsupported(OPERATION, "weight", supported, self.weight));
        }
        let LogitRule { factor, softcap, .. } = self.logits;
        if !factor.is_finite() {
            return Err(Error::invalid(OPERATION, "logits.factor", "a finite number", factor));
        }
        if let Some(cap) = softcap.filter(|cap| !(1e-30..=1e30).contains(cap)) {
            return Err(Error::invalid(OPERATION, "logits.softcap", "a number from 1e-30 to 1e30", cap));
        }
        shape::product(OPERATION, "x", &[self.tokens, self.hidden])?;
        shape::product(OPERATION, "weight", &[self.experts, self.hidden])?;
        shape::product(OPERATION, "logits", &[self.tokens, self.experts])?;
        Ok(())
    }
}

/// Chooses kernel and grid.
///
/// The kernel that takes the least time by a closed formula: what the busiest multiprocessor's blocks cost it. A shared gate has no say in it, so that the logits have the same bits with and without.
///
/// # Errors
/// Those of [`RouterDesc::validate`].
pub fn select(desc: &RouterDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let gates = usize::from(desc.shared_gate);
    let router = |shape| Router { x: desc.x, weight: desc.weight, shape };
    let blocks = |shape: RouterShape, gates: usize| {
        let (tokens, columns) = shape.block();
        let (tokens, columns) = (desc.tokens.div_ceil(tokens as usize), columns as usize);
        match shape {
            // The gate has blocks of its own.
            RouterShape::Tile | RouterShape::Any => [tokens, desc.experts.div_ceil(columns) + gates],
            RouterShape::Warp => [tokens, (desc.experts + gates).div_ceil(columns)],
            _ => [tokens * (desc.experts + gates).div_ceil(columns), 1],
        }
    };
    let cycles = |shape: RouterShape| {
        let [x, y] = blocks(shape, if desc.experts == 0 { gates } else { 0 });
        (x * y).div_ceil(device.multiprocessors.max(1) as usize) as u64 * block_cycles(&router(shape), desc.hidden)
    };
    // Offsets in a row of tensor cores' kernels have 32 bits, and so has their grid.
    let narrow = desc.hidden < 1 << 28 && desc.tokens.saturating_mul(desc.experts + gates) < 1 << 36;
    let candidates: &[RouterShape] =
        if !desc.hidden.is_multiple_of(8) || (Router::is_exact(desc.x, desc.weight) && !narrow) {
            &[RouterShape::Any]
        } else if Router::is_exact(desc.x, desc.weight) {
            // One sum for all: batch-invariant in any case.
            &RouterShape::TENSOR
        } else if desc.batch_invariant {
            &[RouterShape::Tile]
        } else {
            &[RouterShape::Warp, RouterShape::Tile]
        };
    let fits =
        |shape: &RouterShape| router(*shape).exists() && router(*shape).shared_bytes() <= device.shared_bytes_per_block;
    let shape = candidates.iter().copied().filter(fits).min_by_key(|&shape| cycles(shape)).unwrap_or(RouterShape::Any);
    let [x, y] = blocks(shape, gates);
    Ok(Selection::new(Kernel::Router(router(shape)), [x as u32, y as u32, 1]))
}

/// Cycles that a block keeps its multiprocessor busy, as far as the choice needs them: for each 64 depths the slower of the products, by 1024
/// multiplications a cycle on tensor cores or 64 in f32 (an A100's), and of the rows of x and weight, of which L2 gives it 32 bytes a
/// cycle. The kernels for few tokens load all at once instead of ahead of the products: their bytes come in half as fast.
fn block_cycles(router: &Router, hidden: usize) -> u64 {
    let (tokens, columns) = router.shape.block();
    let (tokens, columns) = (u64::from(tokens), u64::from(columns));
    let bytes = 64 * (tokens * u64::from(router.x.bytes()) + columns * u64::from(router.weight.bytes()));
    let parts = if router.weight == router.x { 1 } else { 3 };
    let (products, bytes) = match router.shape {
        RouterShape::Tile | RouterShape::Any => (tokens * columns, bytes),
        RouterShape::Warp => (tokens * columns, 2 * bytes),
        RouterShape::Few => (tokens * columns * parts / 16, 2 * bytes),
        _ => (tokens * columns * parts / 16, bytes),
    };
    hidden.div_ceil(64) as u64 * products.max(bytes / 32)
}

/// Computes the logits.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`RouterDesc::validate`]; [`Error::Missing`] or [`Error::Unexpected`] for a shared gate against the descriptor; those of a buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`],
/// [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn forward<X: Element, W: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &RouterDesc,
    args: RouterArgs<'_, X, W>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    scope.check_dtype::<X>("x", desc.x)?;
    scope.check_dtype::<W>("weight", desc.weight)?;
    check_gate(OPERATION, "shared_gate", desc.shared_gate, args.shared_gate.is_some())?;
    if desc.tokens == 0 {
        return Ok(());
    }
    let [x_alignment, alignment] = [desc.x, desc.weight].map(|dtype| shape::row_alignment(dtype, desc.hidden));
    let x = scope.read("x", args.x, desc.tokens * desc.hidden, x_alignment)?;
    let weight = scope.read("weight", args.weight, desc.experts * desc.hidden, alignment)?;
    let bias = scope.read_some("bias", args.bias, desc.experts, SCALAR)?;
    let logits_dtype = args.logits.dtype();
    let logits = scope.write_any("logits", args.logits, desc.tokens * desc.experts)?;
    let (gate_weight, gate_logits) = args.shared_gate.map(|gate| (gate.weight, gate.logits)).unzip();
    let gate_weight = scope.read_some("shared_gate.weight", gate_weight, desc.hidden, alignment)?;
    let gate_logits = scope.write_some("shared_gate.logits", gate_logits, desc.tokens, SCALAR)?;
    let addresses = Addresses {
        x: x.address(),
        weight: Some(weight.address()),
        bias: optional(&bias),
        logits: Some(logits.address()),
        logits_dtype,
        gate: optional(&gate_weight).zip(optional(&gate_logits)),
    };
    enqueue(&scope, desc, &selection, addresses)
}

/// Whether a shared expert's gate is given where there is one, and only there.
pub(crate) fn check_gate(
    operation: &'static str,
    argument: &'static str,
    described: bool,
    given: bool,
) -> Result<(), Error> {
    match (described, given) {
        (true, false) => Err(Error::Missing { operation, argument, reason: "the descriptor has a gate" }),
        (false, true) => Err(Error::Unexpected { operation, argument, reason: "the descriptor has no gate" }),
        _ => Ok(()),
    }
}

/// What a router reads and writes. Without experts there is the gate alone.
pub(crate) struct Addresses<'a> {
    pub(crate) x: Address<'a>,
    pub(crate) weight: Option<Address<'a>>,
    pub(crate) bias: Option<Address<'a>>,
    pub(crate) logits: Option<Address<'a>>,
    pub(crate) logits_dtype: Dtype,
    /// Weight and logits of a shared expert's gate.
    pub(crate) gate: Option<(Address<'a>, Address<'a>)>,
}

pub(crate) fn enqueue(
    scope: &Scope<'_>,
    desc: &RouterDesc,
    selection: &Selection,
    at: Addresses<'_>,
) -> Result<(), Error> {
    let (gate_weight, gate_logits) = at.gate.unzip();
    scope.launch(
        selection,
        RouterParams {
            x: at.x.into(),
            weight: at.weight.into(),
            bias: at.bias.into(),
            logits: at.logits.into(),
            gate_weight: gate_weight.into(),
            gate_logits: gate_logits.into(),
            tokens: desc.tokens as u32,
            experts: desc.experts as u32,
            hidden: desc.hidden as u32,
            factor: desc.logits.factor,
            softcap: desc.logits.softcap.unwrap_or(0.0),
            logits_kind: match at.logits_dtype {
                Dtype::F32 => 0,
                Dtype::Bf16 => 1,
                Dtype::F16 => 2,
            },
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::runtime::device::A100;

    fn desc() -> RouterDesc {
        RouterDesc::new(Dtype::Bf16, 64, 128, 2048)
    }

    #[test]
    fn faults_name_their_field() {
        let fault = |desc: RouterDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(desc().validate(), Ok(()));
        assert_eq!(fault(RouterDesc { weight: Dtype::F16, ..desc() }), "weight");
        assert_eq!(fault(RouterDesc { x: Dtype::F32, ..desc() }), "weight");
        assert_eq!(fault(RouterDesc { hidden: 0, ..desc() }), "hidden");
        assert_eq!(fault(RouterDesc { experts: 0, ..desc() }), "experts");
        assert_eq!(RouterDesc { experts: 0, ..desc() }.shared_gate(true).validate(), Ok(()));
        assert_eq!(fault(RouterDesc { tokens: 1 << 31, ..desc() }), "tokens");
        assert_eq!(fault(RouterDesc { tokens: i32::MAX as usize, hidden: 1 << 30, ..desc() }), "x");
    }

    fn shape(desc: RouterDesc, device: &DeviceInfo) -> RouterShape {
        match select(&desc, device).unwrap().kernel.variant() {
            Kernel::Router(router) => router.shape,
            _ => unreachable!(),
        }
    }

    #[test]
    fn grids_cover_the_logits() {
        for (tokens, experts) in [(0, 1), (1, 1), (5, 9), (64, 64), (65, 65), (100_000, 4096)] {
            for dtype in [Dtype::Bf16, Dtype::F32] {
                let desc = RouterDesc { x: dtype, weight: dtype, tokens, experts, ..desc() };
                let selection = select(&desc, &A100).unwrap();
                let (block_tokens, block_experts) = shape(desc, &A100).block();
                let want = tokens.div_ceil(block_tokens as usize) * experts.div_ceil(block_experts as usize);
                assert_eq!(selection.grid.iter().product::<u32>() as usize, want);
            }
        }
        let blocks = |tokens, experts| {
            let selection = select(&RouterDesc { tokens, experts, ..desc() }.shared_gate(true), &A100).unwrap();
            selection.grid.iter().product::<u32>()
        };
        // The gate shares the experts' blocks where there is a column left.
        assert_eq!(
            [blocks(1, 0), blocks(1, 7), blocks(1, 8), blocks(16384, 127), blocks(16384, 128)],
            [1, 1, 2, 128, 256]
        );
    }

    #[test]
    fn more_tokens_take_larger_blocks() {
        let at = |tokens| shape(RouterDesc { tokens, ..desc() }, &A100);
        assert_eq!([1, 64, 1024, 2048, 32768].map(at), {
            use RouterShape::*;
            [Few, Few, Mma32, Mma64, Mma128]
        });
        let small = DeviceInfo { shared_bytes_per_block: 60 << 10, ..A100 };
        assert_eq!(shape(RouterDesc { tokens: 32768, ..desc() }, &small), RouterShape::Mma32);
    }

    #[test]
    fn what_is_not_exact_on_tensor_cores_stays_off_them() {
        let at = |x, weight, tokens| shape(RouterDesc { x, weight, tokens, ..desc() }, &A100);
        assert_eq!(at(Dtype::F32, Dtype::F32, 1), RouterShape::Warp);
        assert_eq!(at(Dtype::F32, Dtype::F32, 8192), RouterShape::Tile);
        assert_eq!(at(Dtype::F16, Dtype::F32, 8192), RouterShape::Tile);
        assert!(at(Dtype::Bf16, Dtype::F32, 8192).is_tensor());
        let desc = RouterDesc::new(Dtype::F32, 1, 128, 2048).batch_invariant(true);
        assert_eq!(shape(desc, &A100), RouterShape::Tile);
        assert_eq!(shape(RouterDesc { hidden: 2052, ..desc }, &A100), RouterShape::Any);
    }
}
