//! SparseMixer in training: one or two experts drawn from what is near the largest logit (Liu et al., *Sparse Backpropagation for MoE Training*, 2023;
//! *GRIN*, 2024; PhiMoE).
//!
//! Each expert is drawn from the softmax over the near ones that are left, and weighed with its probability; but one that has not the largest logit
//! with only a third of it in three of four cases. So the mean of the weights' gradients is that of the choice too, to third order: a router
//! learns as if all near experts had been computed. [`crate::reference::sparse_mixer::sparse_mixer`] has the formulas.
//!
//! Outside training the largest are taken: [`Score::SparseMixer`](crate::rules::Score::SparseMixer) of [`crate::routers::gating`]. The way back is that
//! score's, with the same jitter, these ids and the same padding, which has no gradient: [`crate::routers::gating_backward`].
//!
//! ```
//! use moe_kernels::routers::gating_backward::{self, GatingBackwardArgs, GatingBackwardDesc};
//! use moe_kernels::routers::sparse_mixer::{self, SparseMixerArgs, SparseMixerDesc};
//! use moe_kernels::rules::{Gating, MixerRule, NoiseSource, Score};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = moe_kernels::Kernels::new(stream.context())?;
//! let (tokens, experts, top_k, jitter) = (2, 4, 2, 0.1);
//! let logits = stream.clone_htod(&[1.0_f32, 0.95, -1.0, 0.9, 0.0, 3.0, 2.9, 1.0])?;
//! let (mut ids, mut weights) = (stream.alloc_zeros(tokens * top_k)?, stream.alloc_zeros(tokens * top_k)?);
//! let step = 0;
//! let desc = SparseMixerDesc::new(tokens, experts, MixerRule::new(top_k, jitter, NoiseSource::new(1, step)));
//! sparse_mixer::forward(&kernels, &stream, &desc, SparseMixerArgs::new(&logits, &mut ids, &mut weights))?;
//!
//! // Of whatever follows, the gradients of the weights.
//! let d_weights = stream.clone_htod(&[0.5_f32, -1.0, 2.0, 0.25])?;
//! let mut d_logits = stream.alloc_zeros(tokens * experts)?;
//! let back = GatingBackwardDesc::new(tokens, experts, top_k, Gating::new(Score::SparseMixer).jitter(jitter));
//! let args = GatingBackwardArgs::new(&logits, &ids, &d_weights, &mut d_logits);
//! gating_backward::forward(&kernels, &stream, &back, args)?;
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{BLOCK_WARPS, Kernel};
use crate::rules::MixerRule;
use crate::runtime::builder::buffers;
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::SparseMixerParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection, TokenMask};

const OPERATION: &str = "sparse_mixer";

/// Shapes and rule of SparseMixer in training.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct SparseMixerDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// The rule.
    pub rule: MixerRule,
}

impl SparseMixerDesc {
    /// Experts drawn by `rule` for each of `tokens` tokens among `experts`.
    pub const fn new(tokens: usize, experts: usize, rule: MixerRule) -> SparseMixerDesc {
        SparseMixerDesc { tokens, experts, rule }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::experts(OPERATION, self.experts)?;
        shape::top_k_up_to(OPERATION, self.rule.top_k, self.experts, 2)?;
        shape::product(OPERATION, "logits", &[self.tokens, self.experts])?;
        shape::product_i32(OPERATION, "ids", &[self.tokens, self.rule.top_k])?;
        let jitter = self.rule.jitter;
        if !jitter.is_finite() || jitter < 0.0 {
            return Err(Error::invalid(OPERATION, "jitter", "a finite number of at least 0", jitter));
        }
        Ok(())
    }
}

/// Buffers of SparseMixer in training.
#[non_exhaustive]
pub struct SparseMixerArgs<'a> {
    /// `[T, E]`.
    pub logits: In<'a, f32>,
    /// `[T, k]`, written: experts in the order in which they are drawn.
    pub ids: Out<'a, i32>,
    /// `[T, k]`, written: their probabilities, or a third of them.
    pub weights: Out<'a, f32>,
    /// `[2]`, 8-byte aligned: see [`crate::routers::noise_state`]. Absent, the rule's seed and offset are all there is.
    pub noise_state: Option<In<'a, u64>>,
    /// Which tokens count: the others draw nothing.
    pub mask: TokenMask<'a>,
}

impl<'a> SparseMixerArgs<'a> {
    /// `logits` to `ids` and `weights`.
    pub fn new(
        logits: impl Into<In<'a, f32>>,
        ids: impl Into<Out<'a, i32>>,
        weights: impl Into<Out<'a, f32>>,
    ) -> SparseMixerArgs<'a> {
        SparseMixerArgs {
            logits: logits.into(),
            ids: ids.into(),
            weights: weights.into(),
            noise_state: None,
            mask: TokenMask::all(),
        }
    }

    /// With padding among the tokens.
    #[must_use]
    pub fn mask(self, mask: TokenMask<'a>) -> SparseMixerArgs<'a> {
        SparseMixerArgs { mask, ..self }
    }
}

buffers!(SparseMixerArgs<'a> { noise_state: In<u64> });

/// Chooses kernel and grid: a warp for each token up to eight blocks a multiprocessor.
///
/// # Errors
/// Those of [`SparseMixerDesc::validate`].
pub fn select(desc: &SparseMixerDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let blocks = (desc.tokens as u32).div_ceil(BLOCK_WARPS).clamp(1, 8 * device.multiprocessors);
    Ok(Selection::new(Kernel::SparseMixer, [blocks, 1, 1]))
}

/// Draws experts.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`SparseMixerDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`]; and those
/// of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &SparseMixerDesc,
    args: SparseMixerArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let SparseMixerDesc { tokens, experts, rule } = *desc;
    if tokens == 0 {
        return Ok(());
    }
    let logits = scope.read("logits", args.logits, tokens * experts, SCALAR)?;
    let ids = scope.write("ids", args.ids, tokens * rule.top_k, SCALAR)?;
    let weights = scope.write("weights", args.weights, tokens * rule.top_k, SCALAR)?;
    let noise_state = scope.read_noise_state(args.noise_state)?;
    let mask = args.mask.open(&scope, tokens)?;
    let [seed_lo, seed_hi, offset_lo, offset_hi] = rule.noise.words_of_source();
    scope.launch(
        &selection,
        SparseMixerParams {
            logits: logits.address().into(),
            ids: ids.address().into(),
            weights: weights.address().into(),
            tokens: tokens as u32,
            experts: experts as u32,
            top_k: rule.top_k as u32,
            limit: 2.0 * rule.jitter,
            seed_lo,
            seed_hi,
            offset_lo,
            offset_hi,
            noise_state: optional(&noise_state).into(),
            mask: mask.addresses().mask.into(),
            valid_tokens: mask.addresses().valid_tokens.into(),
            token_flags: mask.addresses().flags(),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::NoiseSource;

    #[test]
    fn faults_name_their_field() {
        let desc = SparseMixerDesc::new(100, 16, MixerRule::new(2, 0.01, NoiseSource::default()));
        let fault = |change: &dyn Fn(&mut SparseMixerDesc)| {
            let mut desc = desc;
            change(&mut desc);
            desc.validate().unwrap_err().argument().unwrap()
        };
        assert_eq!(desc.validate(), Ok(()));
        assert_eq!(fault(&|d| d.experts = 4097), "experts");
        assert_eq!(fault(&|d| d.rule.top_k = 3), "top_k");
        assert_eq!(fault(&|d| d.experts = 1), "top_k");
        assert_eq!(fault(&|d| d.rule.jitter = -0.1), "jitter");
        assert_eq!(fault(&|d| d.rule.jitter = f32::NAN), "jitter");
        assert_eq!(fault(&|d| d.tokens = 1 << 30), "ids");
    }
}
