//! The way back through sampled routing ([`crate::routers::sampled`]): to gradients of logits from three that may come, each where it is given.
//!
//! - `d_weights`, of the policy's probabilities of what was drawn: the straight-through estimate, in which the draw is constant.
//! - `d_log_probabilities`, of the logarithms of the draws' chances: the score function (REINFORCE: Williams 1992; Rosenbaum et al. 2018). For a
//!   reward R to be raised it is `-(R - baseline)` for each draw of a token.
//! - `d_entropy`, of the policy's entropy.
//!
//! With all of the logits' way through the softmax, so every expert of a token has a gradient. See [`crate::reference::sampled::sampled_backward`].

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{BLOCK_WARPS, Kernel};
use crate::rules::SamplingRule;
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::SampledBackwardParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "sampled_backward";

/// Shapes and rule of a sampled routing's backward pass.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct SampledBackwardDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// The rule of the forward pass; its noise has no part in the gradient.
    pub rule: SamplingRule,
    /// Adds to `d_logits` instead of writing it.
    pub accumulate: bool,
}

impl SampledBackwardDesc {
    /// Of experts drawn by `rule` for each of `tokens` tokens among `experts`.
    pub const fn new(tokens: usize, experts: usize, rule: SamplingRule) -> SampledBackwardDesc {
        SampledBackwardDesc { tokens, experts, rule, accumulate: false }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::experts(OPERATION, self.experts)?;
        shape::top_k(OPERATION, self.rule.top_k, self.experts)?;
        let beta = self.rule.inverse_temperature;
        if !(beta.is_finite() && beta >= 0.0) {
            return Err(Error::invalid(OPERATION, "inverse_temperature", "a finite number of at least 0", beta));
        }
        shape::product_i32(OPERATION, "ids", &[self.tokens, self.rule.top_k])?;
        shape::product(OPERATION, "logits", &[self.tokens, self.experts]).map(drop)
    }
}

settings!(SampledBackwardDesc { accumulate: bool });

/// Buffers of a sampled routing's backward pass.
#[non_exhaustive]
pub struct SampledBackwardArgs<'a> {
    /// `[T, E]`: the forward pass's.
    pub logits: In<'a, f32>,
    /// `[T, k]`, as the forward pass wrote them: a token whose ids are -1 is padding, without a gradient.
    pub ids: In<'a, i32>,
    /// `[T, k]`: of the probabilities.
    pub d_weights: Option<In<'a, f32>>,
    /// `[T, k]`: of the logarithms of the draws.
    pub d_log_probabilities: Option<In<'a, f32>>,
    /// `[T]`: of the entropies.
    pub d_entropy: Option<In<'a, f32>>,
    /// `[T, E]`, written, or added to.
    pub d_logits: Out<'a, f32>,
}

impl<'a> SampledBackwardArgs<'a> {
    /// Of draws `ids`; gradients that come are set afterwards.
    pub fn new(
        logits: impl Into<In<'a, f32>>,
        ids: impl Into<In<'a, i32>>,
        d_logits: impl Into<Out<'a, f32>>,
    ) -> SampledBackwardArgs<'a> {
        SampledBackwardArgs {
            logits: logits.into(),
            ids: ids.into(),
            d_weights: None,
            d_log_probabilities: None,
            d_entropy: None,
            d_logits: d_logits.into(),
        }
    }
}

buffers!(SampledBackwardArgs<'a> { d_weights: In<f32>, d_log_probabilities: In<f32>, d_entropy: In<f32> });

/// Chooses kernel and grid: a warp for each token up to eight blocks a multiprocessor.
///
/// # Errors
/// Those of [`SampledBackwardDesc::validate`].
pub fn select(desc: &SampledBackwardDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let blocks = (desc.tokens as u32).div_ceil(BLOCK_WARPS).min(8 * device.multiprocessors).max(1);
    Ok(Selection::new(Kernel::SampledBackward, [blocks, 1, 1]))
}

/// Computes the gradient of the logits.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`SampledBackwardDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &SampledBackwardDesc,
    args: SampledBackwardArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let SampledBackwardDesc { tokens, experts, rule, .. } = *desc;
    if tokens == 0 {
        return Ok(());
    }
    let choices = tokens * rule.top_k;
    let logits = scope.read("logits", args.logits, tokens * experts, SCALAR)?;
    let ids = scope.read("ids", args.ids, choices, SCALAR)?;
    let d_weights = scope.read_some("d_weights", args.d_weights, choices, SCALAR)?;
    let d_logs = scope.read_some("d_log_probabilities", args.d_log_probabilities, choices, SCALAR)?;
    let d_entropy = scope.read_some("d_entropy", args.d_entropy, tokens, SCALAR)?;
    let d_logits = scope.write("d_logits", args.d_logits, tokens * experts, SCALAR)?;
    scope.launch(
        &selection,
        SampledBackwardParams {
            logits: logits.address().into(),
            ids: ids.address().into(),
            d_weights: optional(&d_weights).into(),
            d_logs: optional(&d_logs).into(),
            d_entropy: optional(&d_entropy).into(),
            d_logits: d_logits.address().into(),
            tokens: tokens as u32,
            experts: experts as u32,
            top_k: rule.top_k as u32,
            inverse_temperature: rule.inverse_temperature,
            accumulate: u32::from(desc.accumulate),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::NoiseSource;

    #[test]
    fn faults_name_their_field() {
        let desc = SampledBackwardDesc::new(10, 8, SamplingRule::new(2, NoiseSource::new(1, 0)));
        let fault = |desc: SampledBackwardDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(desc.validate(), Ok(()));
        assert_eq!(fault(SampledBackwardDesc { experts: 0, ..desc }), "experts");
        assert_eq!(fault(SampledBackwardDesc { tokens: 1 << 40, ..desc }), "tokens");
        assert_eq!(fault(SampledBackwardDesc { experts: 1, ..desc }), "top_k");
        let rule = SamplingRule { inverse_temperature: f32::NAN, ..desc.rule };
        assert_eq!(fault(SampledBackwardDesc { rule, ..desc }), "inverse_temperature");
    }
}
