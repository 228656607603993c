//! A second product and the combine in one launch: what [`crate::experts::gemm`] followed by [`crate::experts::combine`] writes, with the same bits.
//!
//! For a few tokens, where a launch takes as long as the sums: the last block of a column tile adds up each token's rows in it. It is the kernels for few
//! rows ([`crate::experts::gemm::KernelSet::Fastest`]) that do so.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::combine::CombineDesc;
use super::dispatched::RowAddresses;
use super::gemm::swapped::{Plan, Sum};
use super::gemm::{self, GemmArgs, GemmDesc, Output, Rows};
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{Address, Held, SCALAR, Scope, VECTOR, optional};
use crate::runtime::workspace::Arena;
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "gemm_combine";

/// A product and the sums of its rows.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct GemmCombineDesc {
    /// The product, of the rows of a dispatch: no activation's gate, a rounded result, columns side by side.
    pub gemm: GemmDesc,
    /// Factor of the sum over the experts.
    pub scale: f32,
    /// Factor of the addend, beside its gate.
    pub addend_scale: f32,
}

impl GemmCombineDesc {
    /// The sums of `gemm`'s rows.
    pub const fn new(gemm: GemmDesc) -> GemmCombineDesc {
        GemmCombineDesc { gemm, scale: 1.0, addend_scale: 1.0 }
    }

    /// The combine alone.
    fn combine(&self, operation: &'static str) -> Result<CombineDesc, Error> {
        let Rows::Grouped(rows) = self.gemm.rows else {
            return Err(Error::invalid(
                operation,
                "gemm.rows",
                "the rows of a dispatch",
                format!("{:?}", self.gemm.rows),
            ));
        };
        let desc =
            CombineDesc::new(self.gemm.dtype, rows, self.gemm.n).scale(self.scale).addend_scale(self.addend_scale);
        if ![0, rows.tokens].contains(&self.gemm.shared_rows) {
            let expected = format!("none or one of each of {} tokens", rows.tokens);
            return Err(Error::invalid(operation, "gemm.shared_rows", expected, self.gemm.shared_rows));
        }
        desc.validate().map_err(|error| error.within(operation)).map(|()| desc)
    }
}

settings!(GemmCombineDesc { scale: f32, addend_scale: f32 });

/// The plan of such a launch, if there is one for `desc`.
fn plan(desc: &GemmCombineDesc, device: &DeviceInfo) -> Result<Plan, Error> {
    desc.combine(OPERATION)?;
    desc.gemm.validate().map_err(|error| error.within(OPERATION))?;
    plan_of(OPERATION, &desc.gemm, device)?.ok_or_else(|| {
        let expected = "16-bit products without a gate, to rounded packed rows, of tiles of 16 rows on 16 bytes, each token with as many, and few columns";
        Error::unsupported(OPERATION, "gemm", expected, format!("{:?}", desc.gemm))
    })
}

/// [`plan`] of a product that has been checked, on behalf of `operation`.
pub(crate) fn plan_of(operation: &'static str, desc: &GemmDesc, device: &DeviceInfo) -> Result<Option<Plan>, Error> {
    let packed = desc.strides.is_none_or(|strides| strides.out == [desc.n, 1]);
    let each = matches!(desc.rows, Rows::Grouped(shape) if shape.top_k.is_some());
    if desc.output != Output::Rounded || !packed || !each {
        return Ok(None);
    }
    Ok(gemm::swapped_plan(operation, desc, device)?.and_then(Plan::combining))
}

/// Whether the sums take no longer behind the product than a launch of their own: a block has 128 threads for 8 vectors of each token, and
/// fetches four rows of each together. A batch of these takes about a microsecond, a launch of a combine three to four.
pub(crate) fn is_short(tokens: usize, top_k: usize) -> bool {
    (8 * tokens).div_ceil(128) * top_k.div_ceil(4) <= 4
}

/// Chooses kernel and grid.
///
/// # Errors
/// Those of [`GemmDesc::validate`] and [`CombineDesc::validate`]; [`Error::Unsupported`] where no kernel does both.
pub fn select(desc: &GemmCombineDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    Ok(plan(desc, device)?.selection())
}

/// Workspace of [`forward`] in bytes.
///
/// # Errors
/// Those of [`select`].
pub fn workspace_bytes(desc: &GemmCombineDesc, device: &DeviceInfo) -> Result<usize, Error> {
    let partials = plan(desc, device)?.partial_bytes();
    let mut arena = Arena::new(OPERATION);
    arena.barrier()?;
    arena.region("workspace", partials, 1)?;
    Ok(arena.bytes())
}

/// Computes the product's rows and each token's sum of them.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`select`], of [`gemm::forward`], and of [`crate::experts::combine::forward`] for the sum's buffers.
pub fn forward<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &GemmCombineDesc,
    product: GemmArgs<'_, T>,
    sum: SumArgs<'_, T>,
) -> Result<(), Error> {
    let combine = desc.combine(OPERATION)?;
    if combine.rows.tokens == 0 {
        return Ok(());
    }
    let plan = plan(desc, kernels.device())?;
    sum.check(&desc.gemm)?;
    gemm::run(kernels, stream, &desc.gemm, &plan.selection(), Some(plan), product, Some((&combine, sum)))
}

/// What stands beside the rows in each token's sum, and where it goes.
#[non_exhaustive]
pub struct SumArgs<'a, T> {
    /// `[T, H]`, written.
    pub y: Out<'a, T>,
    /// Adds to what `y` holds. Not with `residual`.
    pub accumulate: bool,
    /// `[T, H]`.
    pub residual: Option<In<'a, T>>,
    /// `[H]`.
    pub bias: Option<In<'a, T>>,
    /// `[T, H]`. Not with rows of a shared expert ([`GemmDesc::shared_rows`]), which are the addend then.
    pub addend: Option<In<'a, T>>,
    /// `[T]`: logits of the addend's gate.
    pub addend_gate: Option<In<'a, f32>>,
}

impl<'a, T> SumArgs<'a, T> {
    /// The rows alone, to `y`.
    pub fn new(y: impl Into<Out<'a, T>>) -> SumArgs<'a, T> {
        SumArgs { y: y.into(), accumulate: false, residual: None, bias: None, addend: None, addend_gate: None }
    }

    /// Adds to what `y` holds.
    #[must_use]
    pub fn accumulate(self) -> SumArgs<'a, T> {
        SumArgs { accumulate: true, ..self }
    }

    fn check(&self, desc: &GemmDesc) -> Result<(), Error> {
        let (operation, shares) = (OPERATION, desc.shared_rows > 0);
        if self.accumulate && self.residual.is_some() {
            return Err(Error::Unexpected { operation, argument: "residual", reason: "y accumulates" });
        }
        if self.addend.is_some() && shares {
            return Err(Error::Unexpected { operation, argument: "addend", reason: "the shared expert's rows are it" });
        }
        if self.addend_gate.is_some() && self.addend.is_none() && !shares {
            return Err(Error::Unexpected { operation, argument: "addend_gate", reason: "there is no addend" });
        }
        Ok(())
    }

    /// Opens everything for the tokens of `desc`.
    pub(super) fn open<'b>(self, scope: &Scope<'b>, desc: &CombineDesc) -> Result<HeldSum<'b>, Error>
    where
        'a: 'b,
    {
        let elements = desc.rows.tokens * desc.hidden;
        Ok(HeldSum {
            residual: scope.read_some("residual", self.residual, elements, VECTOR)?,
            bias: scope.read_some("bias", self.bias, desc.hidden, VECTOR)?,
            addend: scope.read_some("addend", self.addend, elements, VECTOR)?,
            addend_gate: scope.read_some("addend_gate", self.addend_gate, desc.rows.tokens, SCALAR)?,
            y: scope.write("y", self.y, elements, VECTOR)?,
            accumulate: self.accumulate,
        })
    }
}

buffers!(SumArgs<'a, T> { residual: In<T>, bias: In<T>, addend: In<T>, addend_gate: In<f32> });

/// [`SumArgs`] opened.
pub(super) struct HeldSum<'a> {
    y: Held<'a>,
    accumulate: bool,
    residual: Option<Held<'a>>,
    bias: Option<Held<'a>>,
    addend: Option<Held<'a>>,
    addend_gate: Option<Held<'a>>,
}

impl HeldSum<'_> {
    /// `shared`: where the launch writes the rows of a shared expert.
    pub(super) fn addresses<'a>(
        &'a self,
        desc: &CombineDesc,
        rows: RowAddresses<'a>,
        shared: Option<Address<'a>>,
    ) -> Sum<'a> {
        Sum {
            y: self.y.address(),
            token_slot: rows.token_slot,
            residual: if self.accumulate { Some(self.y.address()) } else { optional(&self.residual) },
            bias: optional(&self.bias),
            addend: optional(&self.addend).or(shared),
            addend_gate: optional(&self.addend_gate),
            addend_scale: desc.addend_scale,
            scale: desc.scale,
            tokens: desc.rows.tokens as u32,
            top_k: desc.rows.top_k.unwrap_or(0) as u32,
            early: false,
        }
    }
}
