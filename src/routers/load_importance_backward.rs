//! The gradient of the loss of importance and of loads under noise of one deviation ([`crate::routers::load_importance`], Tutel's
//! `load_importance_loss`): of scores, and of the logit that is a token's threshold, which is not detached.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::load_importance::LoadImportanceDesc;
use crate::registry::{BLOCK_WARPS, Kernel};
use crate::runtime::builder::settings;
use crate::runtime::launch::{SCALAR, Scope};
use crate::runtime::params::LoadImportanceBackwardParams;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection, TokenMask};

const OPERATION: &str = "load_importance_backward";

/// Shapes, noise and factor of the loss's backward pass.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct LoadImportanceBackwardDesc {
    /// The forward pass.
    pub forward: LoadImportanceDesc,
    /// Factor of the loss, the mean of both squared coefficients of variation.
    pub factor: f32,
    /// Adds to the gradients instead of writing them.
    pub accumulate: bool,
}

impl LoadImportanceBackwardDesc {
    /// Of `factor` times the loss of `forward`.
    pub const fn new(forward: LoadImportanceDesc, factor: f32) -> LoadImportanceBackwardDesc {
        LoadImportanceBackwardDesc { forward, factor, accumulate: false }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// Those of [`LoadImportanceDesc::validate`], and [`Error::Invalid`] for the factor.
    pub fn validate(&self) -> Result<(), Error> {
        self.forward.validate().map_err(|error| error.within(OPERATION))?;
        if !self.factor.is_finite() {
            return Err(Error::invalid(OPERATION, "factor", "a finite number", self.factor));
        }
        Ok(())
    }
}

settings!(LoadImportanceBackwardDesc { accumulate: bool });

/// Buffers of the loss's backward pass.
#[non_exhaustive]
pub struct LoadImportanceBackwardArgs<'a> {
    /// `[T, E]`: without noise.
    pub scores: In<'a, f32>,
    /// `[T, E]`: with the noise that chose.
    pub logits: In<'a, f32>,
    /// `[T, k]`: choices.
    pub ids: In<'a, i32>,
    /// `[E]`: what the forward pass wrote.
    pub importance: In<'a, f32>,
    /// `[E]`: what the forward pass wrote.
    pub load: In<'a, f32>,
    /// `[T, E]`, written, or added to: of the scores.
    pub d_scores: Out<'a, f32>,
    /// `[T, E]`, written, or added to: of the logits, one of a token's.
    pub d_logits: Out<'a, f32>,
    /// Which tokens count.
    pub mask: TokenMask<'a>,
}

impl<'a> LoadImportanceBackwardArgs<'a> {
    /// Of all tokens.
    pub fn new(
        [scores, logits]: [impl Into<In<'a, f32>>; 2],
        ids: impl Into<In<'a, i32>>,
        [importance, load]: [impl Into<In<'a, f32>>; 2],
        [d_scores, d_logits]: [impl Into<Out<'a, f32>>; 2],
    ) -> LoadImportanceBackwardArgs<'a> {
        LoadImportanceBackwardArgs {
            scores: scores.into(),
            logits: logits.into(),
            ids: ids.into(),
            importance: importance.into(),
            load: load.into(),
            d_scores: d_scores.into(),
            d_logits: d_logits.into(),
            mask: TokenMask::all(),
        }
    }

    /// With padding among the tokens.
    #[must_use]
    pub fn mask(self, mask: TokenMask<'a>) -> LoadImportanceBackwardArgs<'a> {
        LoadImportanceBackwardArgs { mask, ..self }
    }
}

/// Chooses kernel and grid: a warp for each token up to eight blocks a multiprocessor.
///
/// # Errors
/// Those of [`LoadImportanceBackwardDesc::validate`].
pub fn select(desc: &LoadImportanceBackwardDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let blocks = (desc.forward.tokens as u32).div_ceil(BLOCK_WARPS).min(8 * device.multiprocessors).max(1);
    Ok(Selection::new(Kernel::LoadImportanceBackward, [blocks, 1, 1]))
}

/// Computes the gradients of scores and logits.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`LoadImportanceBackwardDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &LoadImportanceBackwardDesc,
    args: LoadImportanceBackwardArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let LoadImportanceDesc { tokens, experts, top_k, deviation, .. } = desc.forward;
    if tokens == 0 {
        return Ok(());
    }
    let scores = scope.read("scores", args.scores, tokens * experts, SCALAR)?;
    let logits = scope.read("logits", args.logits, tokens * experts, SCALAR)?;
    let ids = scope.read("ids", args.ids, tokens * top_k, SCALAR)?;
    let importance = scope.read("importance", args.importance, experts, SCALAR)?;
    let load = scope.read("load", args.load, experts, SCALAR)?;
    let d_scores = scope.write("d_scores", args.d_scores, tokens * experts, SCALAR)?;
    let d_logits = scope.write("d_logits", args.d_logits, tokens * experts, SCALAR)?;
    let mask = args.mask.open(&scope, tokens)?;
    scope.launch(
        &selection,
        LoadImportanceBackwardParams {
            scores: scores.address().into(),
            logits: logits.address().into(),
            ids: ids.address().into(),
            importance: importance.address().into(),
            load: load.address().into(),
            mask: mask.addresses().mask.into(),
            valid_tokens: mask.addresses().valid_tokens.into(),
            token_flags: mask.addresses().flags(),
            tokens: tokens as u32,
            experts: experts as u32,
            top_k: top_k as u32,
            inverse: deviation.recip(),
            factor: 0.5 * desc.factor,
            d_scores: d_scores.address().into(),
            d_logits: d_logits.address().into(),
            accumulate: u32::from(desc.accumulate),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_field() {
        let desc = LoadImportanceBackwardDesc::new(LoadImportanceDesc::new(10, 4, 2, 0.25), 1.0);
        let fault = |desc: LoadImportanceBackwardDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(desc.validate(), Ok(()));
        assert_eq!(fault(LoadImportanceBackwardDesc { factor: f32::NAN, ..desc }), "factor");
        let forward = LoadImportanceDesc { deviation: 0.0, ..desc.forward };
        assert_eq!(fault(LoadImportanceBackwardDesc { forward, ..desc }), "deviation");
    }
}
