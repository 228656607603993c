//! Sampled routing: experts drawn from the router's distribution, with what policy gradients need.
//!
//! The policy is `softmax(inverse_temperature * logits)`. `k` experts are drawn from it without replacement by adding Gumbel noise to the
//! logits and taking the largest (Kool et al., *Stochastic Beams and Where to Find Them*, 2019); with `k = 1` that is the router of
//! Rosenbaum et al., *Routing Networks*, 2018. Beside the ids come the policy's probability of each, the logarithm of the chance of each draw
//! given the token's earlier ones (REINFORCE takes the gradient of their sum), and the policy's entropy. See
//! [`crate::reference::sampled`].
//!
//! The noise follows from seed, offset, token and expert alone ([`NoiseSource`]), in f32 arithmetic that the host repeats ([`noise`]):
//! perturbed logits and ids are those of the reference bit for bit, also on another device.
//!
//! The way back is [`crate::routers::sampled_backward`].
//!
//! ```
//! use moe_kernels::routers::sampled::{self, SampledArgs, SampledDesc};
//! use moe_kernels::rules::{NoiseSource, SamplingRule};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = moe_kernels::Kernels::new(stream.context())?;
//! // Four experts alike: whichever is drawn first has probability 1/4, and the entropy is ln 4.
//! let logits = stream.clone_htod(&[1.0_f32; 4])?;
//! let desc = SampledDesc::new(1, 4, SamplingRule::new(2, NoiseSource::new(1, 0)));
//! let mut ids = stream.alloc_zeros(2)?;
//! let mut weights = stream.alloc_zeros(2)?;
//! let mut entropy = stream.alloc_zeros(1)?;
//! let args = SampledArgs::new(&logits, &mut ids, &mut weights).entropy(&mut entropy);
//! sampled::forward(&kernels, &stream, &desc, args)?;
//! assert!(stream.clone_dtoh(&weights)?.iter().all(|weight| (weight - 0.25).abs() < 1e-6));
//! assert!((stream.clone_dtoh(&entropy)?[0] - 4_f32.ln()).abs() < 1e-5);
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::Kernel;
use crate::routers::noisy;
use crate::rules::{NoiseSource, SamplingRule};
use crate::runtime::builder::buffers;
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::SampledParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection, TokenMask};

const OPERATION: &str = "sampled";

/// Shapes and rule of a sampled routing.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct SampledDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// The rule. `top_k` is 1 to 32 and at most `E`.
    pub rule: SamplingRule,
}

impl SampledDesc {
    /// Experts drawn by `rule` for each of `tokens` tokens among `experts`.
    pub const fn new(tokens: usize, experts: usize, rule: SamplingRule) -> SampledDesc {
        SampledDesc { tokens, experts, rule }
    }
}

/// Buffers of a sampled routing.
#[non_exhaustive]
pub struct SampledArgs<'a> {
    /// `[T, E]`.
    pub logits: In<'a, f32>,
    /// `[T, k]`, written: experts in the order in which they are drawn.
    pub ids: Out<'a, i32>,
    /// `[T, k]`, written: the policy's probability of each.
    pub weights: Out<'a, f32>,
    /// `[T, k]`, written: logarithm of the chance of each draw, given the token's earlier ones.
    pub log_probabilities: Option<Out<'a, f32>>,
    /// `[T]`, written: entropy of the policy, in nats.
    pub entropy: Option<Out<'a, f32>>,
    /// `[T, E]`, written: the numbers that experts are chosen by.
    pub perturbed: Option<Out<'a, f32>>,
    /// `[2]`, 8-byte aligned: see [`crate::routers::noise_state`]. Absent, the rule's seed and offset are all there is.
    pub noise_state: Option<In<'a, u64>>,
    /// Which tokens count: the others have ids -1, and weights, logarithms and entropy of 0. Their row of `perturbed` is not written.
    pub mask: TokenMask<'a>,
}

impl<'a> SampledArgs<'a> {
    /// `logits` to `ids` and `weights`, nothing else.
    pub fn new(
        logits: impl Into<In<'a, f32>>,
        ids: impl Into<Out<'a, i32>>,
        weights: impl Into<Out<'a, f32>>,
    ) -> SampledArgs<'a> {
        SampledArgs {
            logits: logits.into(),
            ids: ids.into(),
            weights: weights.into(),
            log_probabilities: None,
            entropy: None,
            perturbed: None,
            noise_state: None,
            mask: TokenMask::all(),
        }
    }

    /// With padding among the tokens.
    #[must_use]
    pub fn mask(self, mask: TokenMask<'a>) -> SampledArgs<'a> {
        SampledArgs { mask, ..self }
    }
}

buffers!(SampledArgs<'a> {
    log_probabilities: Out<f32>,
    entropy: Out<f32>,
    perturbed: Out<f32>,
    noise_state: In<u64>,
});

impl SampledDesc {
    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::experts(OPERATION, self.experts)?;
        shape::top_k(OPERATION, self.rule.top_k, self.experts)?;
        shape::product(OPERATION, "logits", &[self.tokens, self.experts])?;
        shape::product_i32(OPERATION, "ids", &[self.tokens, self.rule.top_k])?;
        let factor = self.rule.inverse_temperature;
        if !factor.is_finite() || factor < 0.0 {
            return Err(Error::invalid(OPERATION, "inverse_temperature", "a finite number of at least 0", factor));
        }
        Ok(())
    }
}

/// The Gumbel noise of `token` and `expert`, bit for bit.
pub fn noise(source: NoiseSource, token: u32, expert: u32) -> f32 {
    crate::rules::noise::gumbel(source.gate_word(0, token, expert))
}

/// Chooses kernel and grid: the fewest registers that hold a token's experts, a warp or block for each token.
///
/// # Errors
/// Those of [`SampledDesc::validate`].
pub fn select(desc: &SampledDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let spread = noisy::spread(desc.experts);
    let most = 4 * spread.resident_blocks() * device.multiprocessors;
    let blocks = (desc.tokens as u32).div_ceil(spread.tokens()).clamp(1, most);
    Ok(Selection::new(Kernel::Sampled(spread), [blocks, 1, 1]))
}

/// Draws experts.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`SampledDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &SampledDesc,
    args: SampledArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let SampledDesc { tokens, experts, rule } = *desc;
    if tokens == 0 {
        return Ok(());
    }
    let choices = tokens * rule.top_k;
    let logits = scope.read("logits", args.logits, tokens * experts, SCALAR)?;
    let ids = scope.write("ids", args.ids, choices, SCALAR)?;
    let weights = scope.write("weights", args.weights, choices, SCALAR)?;
    let log_probabilities = scope.write_some("log_probabilities", args.log_probabilities, choices, SCALAR)?;
    let entropy = scope.write_some("entropy", args.entropy, tokens, SCALAR)?;
    let perturbed = scope.write_some("perturbed", args.perturbed, tokens * experts, SCALAR)?;
    let noise_state = scope.read_noise_state(args.noise_state)?;
    let mask = args.mask.open(&scope, tokens)?;
    let [seed_lo, seed_hi, offset_lo, offset_hi] = rule.noise.words_of_source();
    scope.launch(
        &selection,
        SampledParams {
            logits: logits.address().into(),
            ids: ids.address().into(),
            weights: weights.address().into(),
            log_probabilities: optional(&log_probabilities).into(),
            entropy: optional(&entropy).into(),
            perturbed: optional(&perturbed).into(),
            mask: mask.addresses().mask.into(),
            valid_tokens: mask.addresses().valid_tokens.into(),
            token_flags: mask.addresses().flags(),
            tokens: tokens as u32,
            experts: experts as u32,
            top_k: rule.top_k as u32,
            beta: rule.inverse_temperature,
            seed_lo,
            seed_hi,
            offset_lo,
            offset_hi,
            noise_state: optional(&noise_state).into(),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn desc() -> SampledDesc {
        let rule = SamplingRule { top_k: 4, inverse_temperature: 1.0, noise: NoiseSource::default() };
        SampledDesc { tokens: 100, experts: 64, rule }
    }

    fn fault(change: impl FnOnce(&mut SampledDesc)) -> &'static str {
        let mut desc = desc();
        change(&mut desc);
        desc.validate().unwrap_err().argument().unwrap()
    }

    #[test]
    fn faults_name_their_field() {
        assert_eq!(desc().validate(), Ok(()));
        assert_eq!(fault(|d| d.experts = 4097), "experts");
        assert_eq!(fault(|d| d.rule.top_k = 33), "top_k");
        assert_eq!(fault(|d| d.rule.top_k = 0), "top_k");
        assert_eq!(fault(|d| d.rule.inverse_temperature = -1.0), "inverse_temperature");
        assert_eq!(fault(|d| d.rule.inverse_temperature = f32::INFINITY), "inverse_temperature");
        assert_eq!(fault(|d| d.tokens = 1 << 29), "ids");
    }
}
