//! Noisy top-k gating (Shazeer et al., *Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer*, 2017, section
//! 2.1 and appendix A).
//!
//! Two products of a token, `clean = x Wg` and `raw = x Wnoise`, give `H = clean + n * (softplus(raw) + noise_epsilon)` with standard
//! normal `n`; the `k` experts of largest `H` are kept, and their weights are the softmax of the kept `H`. The same launch can sum up over
//! all tokens each expert's weights (*importance*), tokens (*counts*) and chance of being kept (*load*), and take both balancing losses,
//! `CV(importance)^2` and `CV(load)^2`, before their factors. See [`crate::reference::noisy`].
//!
//! The noise of a token and expert follows from seed, offset, token and expert alone ([`NoiseSource`]), in f32 arithmetic that the host
//! repeats: `H` and the ids are those of the reference bit for bit, also on another device. Weights and sums are f32 arithmetic. What
//! gradients need is written where a buffer is given: `H` ([`NoisyArgs::noisy`]; the noise itself is [`noise`] of the same arguments) and
//! the numbers that `load` compares with ([`NoisyArgs::thresholds`]).
//!
//! Logits that are NaN or +Inf, as rows behind a batch may hold, spoil nothing: ids are in range and distinct, a weight or a chance of being kept that
//! would be no number is 0, and sums and losses are finite.
//!
//! For evaluation, without noise, use [`crate::routers::gating`] with [`crate::rules::Score::TopkSoftmax`] on `clean`.
//!
//! The way back is [`crate::routers::noisy_backward`].
//!
//! ```
//! use moe_kernels::Workspace;
//! use moe_kernels::routers::noisy::{self, NoisyArgs, NoisyDesc, NoisyLogits, NoisySums};
//! use moe_kernels::rules::{NoiseSource, NoisyRule};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = moe_kernels::Kernels::new(stream.context())?;
//! let (tokens, experts, top_k) = (3, 4, 2);
//! let desc = NoisyDesc::new(tokens, experts, NoisyRule::new(top_k, NoiseSource::new(1, 0)));
//! let products = stream.clone_htod(&[0.5_f32; 3 * 2 * 4])?;
//! let mut ids = stream.alloc_zeros(tokens * top_k)?;
//! let mut weights = stream.alloc_zeros(tokens * top_k)?;
//! let mut counts = stream.alloc_zeros(experts)?;
//! let mut importance = stream.alloc_zeros(experts)?;
//! let mut load = stream.alloc_zeros(experts)?;
//! let mut losses = stream.alloc_zeros(2)?;
//! let mut workspace = Workspace::new(&stream, noisy::workspace_bytes(&desc, kernels.device())?)?;
//! let sums = NoisySums::new(&mut counts, &mut importance, &mut load, &mut losses);
//! let args = NoisyArgs::new(NoisyLogits::together(&products), &mut ids, &mut weights).sums(sums, &mut workspace);
//! noisy::forward(&kernels, &stream, &desc, args)?;
//! assert_eq!(stream.clone_dtoh(&counts)?.iter().sum::<i32>(), 6);
//! assert!((stream.clone_dtoh(&importance)?.iter().sum::<f32>() - 3.0).abs() < 1e-5);
//! # Ok(())
//! # }
//! ```

mod args;

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{Kernel, Noisy, Spread};
use crate::rules::{NoiseSource, NoisyRule};
use crate::runtime::launch::{Address, Held, SCALAR, Scope, optional};
use crate::runtime::params::NoisyParams;
use crate::runtime::shape;
use crate::runtime::token_mask::MaskAddresses;
use crate::runtime::workspace::BARRIER_HEADER;
use crate::{DeviceInfo, Error, Kernels, Selection, Workspace};

pub use args::{NoisyArgs, NoisyLogits, NoisySums};

const OPERATION: &str = "noisy";

/// Shapes and rule of a noisy gating.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct NoisyDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// The rule. `top_k` is 1 to 32 and at most `E`.
    pub rule: NoisyRule,
}

impl NoisyDesc {
    /// Choices by `rule` for `tokens` tokens among `experts` experts.
    pub const fn new(tokens: usize, experts: usize, rule: NoisyRule) -> NoisyDesc {
        NoisyDesc { tokens, experts, rule }
    }
}

impl NoisyDesc {
    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::experts(OPERATION, self.experts)?;
        check_rule(OPERATION, &self.rule, self.experts)?;
        shape::product(OPERATION, "logits", &[self.tokens, 2, self.experts])?;
        shape::product_i32(OPERATION, "ids", &[self.tokens, self.rule.top_k])?;
        Ok(())
    }
}

pub(crate) fn check_rule(operation: &'static str, rule: &NoisyRule, experts: usize) -> Result<(), Error> {
    shape::top_k(operation, rule.top_k, experts)?;
    let epsilon = rule.noise_epsilon;
    if !epsilon.is_finite() || epsilon < 0.0 {
        return Err(Error::invalid(operation, "noise_epsilon", "a finite number of at least 0", epsilon));
    }
    Ok(())
}

/// The least spread that holds `experts`.
pub(crate) fn spread(experts: usize) -> Spread {
    let fits = |spread: &Spread| spread.max_experts() as usize >= experts;
    Spread::ALL.into_iter().find(fits).unwrap_or(Spread::ALL[Spread::ALL.len() - 1])
}

/// The noise `n` of `token` and `expert`: what `H` was made with, bit for bit.
pub fn noise(source: NoiseSource, token: u32, expert: u32) -> f32 {
    crate::rules::noise::standard_normal(source.gate_word(0, token, expert))
}

/// Workspace of [`forward`] with sums, in bytes.
///
/// # Errors
/// Those of [`NoisyDesc::validate`].
pub fn workspace_bytes(desc: &NoisyDesc, device: &DeviceInfo) -> Result<usize, Error> {
    let parts = select(desc, device, true)?.grid[0] as usize;
    Ok(partial_bytes(parts, desc.experts))
}

/// A barrier, and importance, counts and load of each part of the work.
pub(crate) fn partial_bytes(items: usize, experts: usize) -> usize {
    BARRIER_HEADER + items * 3 * experts * size_of::<f32>()
}

/// Tokens that a warp (or a block that holds one token) takes at least where it sums up: its sums cost as much traffic as three.
pub(crate) const TOKENS_OF_SUMS: u32 = 4;

/// Blocks that may meet at a barrier.
pub(crate) fn most_blocks(spread: &Spread, device: &DeviceInfo) -> u32 {
    if device.cooperative_launch { spread.resident_blocks() * device.multiprocessors } else { 1 }
}

/// Chooses kernel and grid: the fewest registers that hold a token's experts; with `sums` as many blocks as are resident at once, as they
/// meet at a barrier.
///
/// # Errors
/// Those of [`NoisyDesc::validate`].
pub fn select(desc: &NoisyDesc, device: &DeviceInfo, sums: bool) -> Result<Selection, Error> {
    desc.validate()?;
    let spread = spread(desc.experts);
    let most = if sums { most_blocks(&spread, device) } else { 4 * spread.resident_blocks() * device.multiprocessors };
    let each = if sums { TOKENS_OF_SUMS } else { 1 };
    let blocks = (desc.tokens as u32).div_ceil(each * spread.tokens()).clamp(1, most);
    let kernel = Kernel::Noisy(Noisy { spread, grouped: false });
    Ok(if sums { Selection::cooperative(kernel, blocks) } else { Selection::new(kernel, [blocks, 1, 1]) })
}

/// Chooses experts by noisy logits, and sums up who gets how much.
///
/// With no tokens nothing is launched, and sums and losses become zero.
///
/// # Errors
/// Those of [`NoisyDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &NoisyDesc,
    args: NoisyArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device(), args.sums.is_some())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let NoisyDesc { tokens, experts, .. } = *desc;
    let sums = args.sums.map(|(sums, workspace)| HeldSums::open(&scope, desc, sums, workspace)).transpose()?;
    if tokens == 0 {
        return sums.map_or(Ok(()), |sums| sums.zero(&scope, experts));
    }
    let logits = HeldLogits::open(&scope, args.logits, ["clean", "raw", "logits"], tokens, experts)?;
    let choices = tokens * desc.rule.top_k;
    let ids = scope.write("ids", args.ids, choices, SCALAR)?;
    let weights = scope.write("weights", args.weights, choices, SCALAR)?;
    let noisy = scope.write_some("noisy", args.noisy, tokens * experts, SCALAR)?;
    let thresholds = scope.write_some("thresholds", args.thresholds, tokens * 2, SCALAR)?;
    let noise_state = scope.read_noise_state(args.noise_state)?;
    let mask = args.mask.open(&scope, tokens)?;
    let at = Addresses {
        logits: logits.addresses(),
        ids: ids.address(),
        weights: weights.address(),
        noisy: optional(&noisy),
        thresholds: optional(&thresholds),
        noise_state: optional(&noise_state),
        mask: mask.addresses(),
        sums: sums.as_ref().map(HeldSums::addresses),
    };
    enqueue(&scope, desc, &selection, at)
}

/// Both products of a router, or the gradients of both, opened: apart, or side by side in one row.
pub(crate) enum HeldLogits<'a> {
    Apart(Held<'a>, Held<'a>, usize),
    Together(Held<'a>, usize),
}

impl<'a> HeldLogits<'a> {
    pub(crate) fn open(
        scope: &Scope<'a>,
        logits: NoisyLogits<'a>,
        [clean_name, raw_name, both_name]: [&'static str; 3],
        rows: usize,
        experts: usize,
    ) -> Result<HeldLogits<'a>, Error> {
        Ok(match logits {
            NoisyLogits::Apart { clean, raw } => HeldLogits::Apart(
                scope.read(clean_name, clean, rows * experts, SCALAR)?,
                scope.read(raw_name, raw, rows * experts, SCALAR)?,
                experts,
            ),
            NoisyLogits::Together(both) => {
                HeldLogits::Together(scope.read(both_name, both, rows * 2 * experts, SCALAR)?, experts)
            }
        })
    }

    /// Of `clean` and `raw`, and from a row to the next in elements.
    pub(crate) fn addresses(&self) -> (Address<'_>, Address<'_>, u32) {
        match self {
            HeldLogits::Apart(clean, raw, experts) => (clean.address(), raw.address(), *experts as u32),
            HeldLogits::Together(both, experts) => {
                let clean = both.address();
                (clean, clean.offset(experts * size_of::<f32>()), 2 * *experts as u32)
            }
        }
    }
}

struct HeldSums<'a> {
    counts: Held<'a>,
    importance: Held<'a>,
    load: Held<'a>,
    losses: Held<'a>,
    workspace: Held<'a>,
}

impl<'a> HeldSums<'a> {
    fn open<'c: 'a>(
        scope: &Scope<'a>,
        desc: &NoisyDesc,
        sums: NoisySums<'c>,
        workspace: &'c mut Workspace,
    ) -> Result<HeldSums<'a>, Error> {
        let bytes = workspace_bytes(desc, scope.kernels.device())?;
        Ok(HeldSums {
            counts: scope.write("counts", sums.counts, desc.experts, SCALAR)?,
            importance: scope.write("importance", sums.importance, desc.experts, SCALAR)?,
            load: scope.write("load", sums.load, desc.experts, SCALAR)?,
            losses: scope.write("losses", sums.losses, 2, SCALAR)?,
            workspace: workspace.open(scope, bytes)?,
        })
    }

    fn zero(&self, scope: &Scope<'_>, experts: usize) -> Result<(), Error> {
        for vector in [&self.counts, &self.importance, &self.load] {
            scope.zero(vector.address(), experts * size_of::<f32>())?;
        }
        scope.zero(self.losses.address(), 2 * size_of::<f32>())
    }

    fn addresses(&self) -> SumAddresses<'_> {
        SumAddresses {
            counts: self.counts.address(),
            importance: self.importance.address(),
            load: self.load.address(),
            losses: self.losses.address(),
            workspace: self.workspace.address(),
        }
    }
}

/// What noisy gating reads and writes.
pub(crate) struct Addresses<'a> {
    pub(crate) logits: (Address<'a>, Address<'a>, u32),
    pub(crate) ids: Address<'a>,
    pub(crate) weights: Address<'a>,
    pub(crate) noisy: Option<Address<'a>>,
    pub(crate) thresholds: Option<Address<'a>>,
    pub(crate) noise_state: Option<Address<'a>>,
    pub(crate) mask: MaskAddresses<'a>,
    pub(crate) sums: Option<SumAddresses<'a>>,
}

/// Where sums and losses go.
#[derive(Clone, Copy)]
pub(crate) struct SumAddresses<'a> {
    pub(crate) counts: Address<'a>,
    pub(crate) importance: Address<'a>,
    pub(crate) load: Address<'a>,
    pub(crate) losses: Address<'a>,
    pub(crate) workspace: Address<'a>,
}

fn params<'a>(desc: &NoisyDesc, parts: u32, at: Addresses<'a>) -> NoisyParams<'a> {
    let NoisyRule { top_k, noise_epsilon, noise } = desc.rule;
    let (clean, raw, row_stride) = at.logits;
    let [seed_lo, seed_hi, offset_lo, offset_hi] = noise.words_of_source();
    NoisyParams {
        clean_logits: clean.into(),
        noise_logits: raw.into(),
        row_stride,
        ids: at.ids.into(),
        weights: at.weights.into(),
        noisy: at.noisy.into(),
        thresholds: at.thresholds.into(),
        tokens: desc.tokens as u32,
        experts: desc.experts as u32,
        top_k: top_k as u32,
        parts,
        epsilon: noise_epsilon,
        seed_lo,
        seed_hi,
        offset_lo,
        offset_hi,
        noise_state: at.noise_state.into(),
        mask: at.mask.mask.into(),
        valid_tokens: at.mask.valid_tokens.into(),
        token_flags: at.mask.flags(),
        counts: at.sums.map(|sums| sums.counts).into(),
        importance: at.sums.map(|sums| sums.importance).into(),
        load: at.sums.map(|sums| sums.load).into(),
        losses: at.sums.map(|sums| sums.losses).into(),
        workspace: at.sums.map(|sums| sums.workspace).into(),
    }
}

/// Enqueues the first level, or the only one.
pub(crate) fn enqueue(
    scope: &Scope<'_>,
    desc: &NoisyDesc,
    selection: &Selection,
    at: Addresses<'_>,
) -> Result<(), Error> {
    scope.launch(selection, params(desc, selection.grid[0], at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::device::A100;

    fn desc() -> NoisyDesc {
        let rule = NoisyRule { top_k: 4, noise_epsilon: 1e-2, noise: NoiseSource::default() };
        NoisyDesc { tokens: 100, experts: 64, rule }
    }

    fn fault(change: impl FnOnce(&mut NoisyDesc)) -> &'static str {
        let mut desc = desc();
        change(&mut desc);
        desc.validate().unwrap_err().argument().unwrap()
    }

    #[test]
    fn faults_name_their_field() {
        assert_eq!(desc().validate(), Ok(()));
        assert_eq!(fault(|d| d.experts = 4097), "experts");
        assert_eq!(fault(|d| d.experts = 0), "experts");
        assert_eq!(fault(|d| d.rule.top_k = 33), "top_k");
        assert_eq!(fault(|d| d.rule.top_k = 65), "top_k");
        assert_eq!(fault(|d| d.rule.top_k = 0), "top_k");
        assert_eq!(fault(|d| d.rule.noise_epsilon = -1e-9), "noise_epsilon");
        assert_eq!(fault(|d| d.rule.noise_epsilon = f32::NAN), "noise_epsilon");
        assert_eq!(fault(|d| d.tokens = 1 << 29), "ids");
        assert_eq!(fault(|d| d.tokens = 1 << 40), "tokens");
    }

    #[test]
    fn a_warp_a_token_up_to_512_experts_then_a_block() {
        for (experts, tokens, blocks) in
            [(8, 100, 4), (512, 100, 4), (513, 100, 25), (4096, 1000, 216), (8, 1 << 20, 216)]
        {
            let desc = NoisyDesc { experts, tokens, ..desc() };
            let got = select(&desc, &A100, true).unwrap();
            assert_eq!((got.grid, got.cooperative), ([blocks, 1, 1], true), "{experts} experts, {tokens} tokens");
            assert_eq!(select(&desc, &DeviceInfo { cooperative_launch: false, ..A100 }, true).unwrap().grid, [1, 1, 1]);
            assert!(!select(&desc, &A100, false).unwrap().cooperative);
        }
        assert_eq!(workspace_bytes(&desc(), &A100).unwrap(), 32 + 4 * 3 * 64 * 4);
    }
}
