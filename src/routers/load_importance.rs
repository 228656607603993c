//! The loss of importance and of loads under noise of one deviation for all experts (Tutel's `load_importance_loss`; Shazeer et al. 2017, appendix A,
//! where each expert has a deviation of its own: [`crate::routers::noisy`]).
//!
//! ```text
//! importance[e] = sum_t S[t,e]
//! load[e]       = sum_t Phi((S[t,e] - l[t]) / d),  l[t] = the smallest logit that token t chose by
//! loss          = (cv(importance) + cv(load)) / 2,  cv(v) = var(v) / (mean(v)^2 + 1e-10),  var over E - 1
//! ```
//!
//! `S` are scores without noise ([`measured_gating`]'s `probabilities`), `l` is of the logits with noise, as Tutel has it, and `d` its
//! `gate_noise / E`. Logits with such noise come from [`noisy`] with that deviation as [`NoisyRule::noise_epsilon`] and raw deviations of -200, whose
//! softplus is 0.
//!
//! The way back is [`crate::routers::load_importance_backward`].
//!
//! [`measured_gating`]: crate::routers::measured_gating
//! [`noisy`]: crate::routers::noisy
//! [`NoisyRule::noise_epsilon`]: crate::rules::NoisyRule::noise_epsilon

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{Kernel, LOAD_IMPORTANCE_TOKENS};
use crate::runtime::launch::{SCALAR, Scope};
use crate::runtime::params::LoadImportanceParams;
use crate::runtime::shape;
use crate::runtime::workspace::BARRIER_HEADER;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection, TokenMask, Workspace};

const OPERATION: &str = "load_importance";

/// Shapes and noise of a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct LoadImportanceDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts `E`, 2 to 4096: the variance of one number is none.
    pub experts: usize,
    /// Experts that a token goes to, `k`: 1 to 64.
    pub top_k: usize,
    /// Deviation of the noise `d`: above 0, finite, with a finite inverse in f32. Tutel's `gate_noise / E`.
    pub deviation: f32,
}

impl LoadImportanceDesc {
    /// `top_k` of `experts` experts for each of `tokens` tokens.
    pub const fn new(tokens: usize, experts: usize, top_k: usize, deviation: f32) -> LoadImportanceDesc {
        LoadImportanceDesc { tokens, experts, top_k, deviation }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::experts(OPERATION, self.experts)?;
        if self.experts == 1 {
            return Err(Error::invalid(OPERATION, "experts", "at least 2", self.experts));
        }
        shape::top_k_up_to(OPERATION, self.top_k, self.experts, crate::MAX_TOP_K)?;
        if !(self.deviation > 0.0 && self.deviation.is_finite() && self.deviation.recip().is_finite()) {
            let expected = "a finite number above 0 with a finite inverse";
            return Err(Error::invalid(OPERATION, "deviation", expected, self.deviation));
        }
        shape::product_i32(OPERATION, "ids", &[self.tokens, self.top_k])?;
        shape::product(OPERATION, "scores", &[self.tokens, self.experts]).map(drop)
    }
}

/// Buffers of a batch.
#[non_exhaustive]
pub struct LoadImportanceArgs<'a> {
    /// `[T, E]`: without noise.
    pub scores: In<'a, f32>,
    /// `[T, E]`: with the noise that chose.
    pub logits: In<'a, f32>,
    /// `[T, k]`: choices. Others than 0 to `E - 1` are none.
    pub ids: In<'a, i32>,
    /// `[E]`, written: sums of scores.
    pub importance: Out<'a, f32>,
    /// `[E]`, written: expected tokens.
    pub load: Out<'a, f32>,
    /// `[3]`, written: the loss, that of importance, that of load.
    pub losses: Out<'a, f32>,
    /// Which tokens count.
    pub mask: TokenMask<'a>,
    /// At least [`workspace_bytes`].
    pub workspace: &'a mut Workspace,
}

impl<'a> LoadImportanceArgs<'a> {
    /// Of all tokens.
    pub fn new(
        [scores, logits]: [impl Into<In<'a, f32>>; 2],
        ids: impl Into<In<'a, i32>>,
        [importance, load]: [impl Into<Out<'a, f32>>; 2],
        losses: impl Into<Out<'a, f32>>,
        workspace: &'a mut Workspace,
    ) -> LoadImportanceArgs<'a> {
        LoadImportanceArgs {
            scores: scores.into(),
            logits: logits.into(),
            ids: ids.into(),
            importance: importance.into(),
            load: load.into(),
            losses: losses.into(),
            mask: TokenMask::all(),
            workspace,
        }
    }

    /// With padding among the tokens.
    #[must_use]
    pub fn mask(self, mask: TokenMask<'a>) -> LoadImportanceArgs<'a> {
        LoadImportanceArgs { mask, ..self }
    }
}

/// Workspace of [`forward`] in bytes: sums of each run of tokens.
///
/// # Errors
/// Those of [`LoadImportanceDesc::validate`].
pub fn workspace_bytes(desc: &LoadImportanceDesc, device: &DeviceInfo) -> Result<usize, Error> {
    let blocks = select(desc, device)?.grid[0] as usize;
    Ok(BARRIER_HEADER + blocks * 2 * desc.experts * size_of::<f32>())
}

/// Chooses kernel and grid: a block for a fixed number of tokens, so that results have the same bits on every device.
///
/// # Errors
/// Those of [`LoadImportanceDesc::validate`].
pub fn select(desc: &LoadImportanceDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let blocks = (desc.tokens as u32).div_ceil(LOAD_IMPORTANCE_TOKENS).max(1);
    Ok(Selection::new(Kernel::LoadImportance, [blocks, 1, 1]))
}

/// Writes what [`crate::reference::load_importance`] defines, in one launch. Without a token that counts, sums and losses are 0.
///
/// # Errors
/// Those of [`LoadImportanceDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &LoadImportanceDesc,
    args: LoadImportanceArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let scores = scope.read("scores", args.scores, desc.tokens * desc.experts, SCALAR)?;
    let logits = scope.read("logits", args.logits, desc.tokens * desc.experts, SCALAR)?;
    let ids = scope.read("ids", args.ids, desc.tokens * desc.top_k, SCALAR)?;
    let importance = scope.write("importance", args.importance, desc.experts, SCALAR)?;
    let load = scope.write("load", args.load, desc.experts, SCALAR)?;
    let losses = scope.write("losses", args.losses, 3, SCALAR)?;
    let mask = args.mask.open(&scope, desc.tokens)?;
    let workspace = args.workspace.open(&scope, workspace_bytes(desc, kernels.device())?)?;
    scope.launch(
        &selection,
        LoadImportanceParams {
            scores: scores.address().into(),
            logits: logits.address().into(),
            ids: ids.address().into(),
            importance: importance.address().into(),
            load: load.address().into(),
            losses: losses.address().into(),
            mask: mask.addresses().mask.into(),
            valid_tokens: mask.addresses().valid_tokens.into(),
            token_flags: mask.addresses().flags(),
            tokens: desc.tokens as u32,
            experts: desc.experts as u32,
            top_k: desc.top_k as u32,
            inverse: desc.deviation.recip(),
            workspace: workspace.address().into(),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::device::A100;

    #[test]
    fn faults_name_their_field() {
        let desc = LoadImportanceDesc::new(600, 8, 2, 0.125);
        let fault = |desc: LoadImportanceDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(desc.validate(), Ok(()));
        assert_eq!(fault(LoadImportanceDesc { experts: 4097, ..desc }), "experts");
        assert_eq!(fault(LoadImportanceDesc { experts: 1, top_k: 1, ..desc }), "experts");
        assert_eq!(fault(LoadImportanceDesc { top_k: 9, ..desc }), "top_k");
        assert_eq!(fault(LoadImportanceDesc { deviation: 0.0, ..desc }), "deviation");
        assert_eq!(fault(LoadImportanceDesc { deviation: 1e-40, ..desc }), "deviation");
        assert_eq!(fault(LoadImportanceDesc { deviation: f32::NAN, ..desc }), "deviation");
        assert_eq!(fault(LoadImportanceDesc { tokens: 1 << 30, ..desc }), "ids");
        assert_eq!(workspace_bytes(&desc, &A100).unwrap(), 32 + 3 * 2 * 8 * 4);
    }
}
