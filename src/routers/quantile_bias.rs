//! Quantile balancing: the correction bias that gives every expert its share of a batch, by one step of dual coordinate descent
//! (Megatron-LM's `qb_dual_update`, whose `beta` is minus the bias). It takes the place of a balancing loss, and of
//! [`crate::routers::update_bias`].
//!
//! One step, in two launches: [`crate::routers::measured_gating`] or [`crate::routers::gating`] with `k + 1` choices and the present bias, whose last
//! choice is the one that just fails; then [`forward`]. `scores` are what the bias is added to, [`measured_gating`]'s `probabilities` say.
//! Experts go by the first `k` of the choices. Over micro-batches or devices, average the biases that they give.
//!
//! [`measured_gating`]: crate::routers::measured_gating

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::Kernel;
use crate::runtime::launch::{SCALAR, Scope};
use crate::runtime::params::QuantileBiasParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection, TokenMask};

const OPERATION: &str = "quantile_bias";

/// Shapes of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct QuantileBiasDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts `E`, 2 to 4096.
    pub experts: usize,
    /// Experts that a token goes to, `k`: 1 to 63, less than `E`.
    pub top_k: usize,
}

impl QuantileBiasDesc {
    /// `top_k` of `experts` experts for each of `tokens` tokens.
    pub const fn new(tokens: usize, experts: usize, top_k: usize) -> QuantileBiasDesc {
        QuantileBiasDesc { tokens, experts, top_k }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::experts(OPERATION, self.experts)?;
        shape::top_k_up_to(OPERATION, self.top_k, self.experts, crate::MAX_TOP_K - 1)?;
        if self.top_k == self.experts {
            let expected = format!("less than the number of experts, {}", self.experts);
            return Err(Error::invalid(OPERATION, "top_k", expected, self.top_k));
        }
        shape::product_i32(OPERATION, "ids", &[self.tokens, self.top_k + 1])?;
        shape::product(OPERATION, "scores", &[self.tokens, self.experts]).map(drop)
    }
}

/// Buffers of a step.
#[non_exhaustive]
pub struct QuantileBiasArgs<'a> {
    /// `[T, E]`: what the bias is added to.
    pub scores: In<'a, f32>,
    /// `[T, k + 1]`: choices by falling score plus bias. A token whose last is no expert's does not count.
    pub ids: In<'a, i32>,
    /// `[E]`: the bias that chose them.
    pub bias: In<'a, f32>,
    /// `[E]`, written.
    pub updated: Out<'a, f32>,
    /// Which tokens count.
    pub mask: TokenMask<'a>,
}

impl<'a> QuantileBiasArgs<'a> {
    /// From `bias` to `updated`.
    pub fn new(
        scores: impl Into<In<'a, f32>>,
        ids: impl Into<In<'a, i32>>,
        bias: impl Into<In<'a, f32>>,
        updated: impl Into<Out<'a, f32>>,
    ) -> QuantileBiasArgs<'a> {
        QuantileBiasArgs {
            scores: scores.into(),
            ids: ids.into(),
            bias: bias.into(),
            updated: updated.into(),
            mask: TokenMask::all(),
        }
    }

    /// With padding among the tokens.
    #[must_use]
    pub fn mask(self, mask: TokenMask<'a>) -> QuantileBiasArgs<'a> {
        QuantileBiasArgs { mask, ..self }
    }
}

/// Chooses kernel and grid: a block an expert.
///
/// # Errors
/// Those of [`QuantileBiasDesc::validate`].
pub fn select(desc: &QuantileBiasDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    Ok(Selection::new(Kernel::QuantileBias, [desc.experts as u32, 1, 1]))
}

/// Writes the bias that [`crate::reference::quantile_bias`] defines. Where no token counts, or the quantile is no finite number, it is the old one.
///
/// # Errors
/// Those of [`QuantileBiasDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &QuantileBiasDesc,
    args: QuantileBiasArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let scores = scope.read("scores", args.scores, desc.tokens * desc.experts, SCALAR)?;
    let ids = scope.read("ids", args.ids, desc.tokens * (desc.top_k + 1), SCALAR)?;
    let bias = scope.read("bias", args.bias, desc.experts, SCALAR)?;
    let updated = scope.write("updated", args.updated, desc.experts, SCALAR)?;
    let mask = args.mask.open(&scope, desc.tokens)?;
    scope.launch(
        &selection,
        QuantileBiasParams {
            scores: scores.address().into(),
            ids: ids.address().into(),
            bias: bias.address().into(),
            updated: updated.address().into(),
            mask: mask.addresses().mask.into(),
            valid_tokens: mask.addresses().valid_tokens.into(),
            token_flags: mask.addresses().flags(),
            tokens: desc.tokens as u32,
            experts: desc.experts as u32,
            top_k: desc.top_k as u32,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_field() {
        let desc = QuantileBiasDesc::new(10, 8, 2);
        let fault = |desc: QuantileBiasDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(desc.validate(), Ok(()));
        assert_eq!(fault(QuantileBiasDesc { experts: 4097, ..desc }), "experts");
        assert_eq!(fault(QuantileBiasDesc { top_k: 8, ..desc }), "top_k");
        assert_eq!(fault(QuantileBiasDesc { top_k: 0, ..desc }), "top_k");
        assert_eq!(fault(QuantileBiasDesc { tokens: 1 << 30, ..desc }), "ids");
    }
}
