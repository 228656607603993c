//! Gating that measures the batch: balancing losses and router statistics from the logits that it reads anyway.
//!
//! [`forward`] is [`gating::forward`] that also says what the batch tells of the router:
//!
//! - for each expert, how many slots chose it, the sum of their weights ([`Totals::importance`]), and the sum of its
//!   probabilities over all tokens;
//! - from these the load-balancing loss of GShard, Switch and Mixtral, the squared coefficients of variation of Shazeer et al.,
//!   and the load's skew; from the logits ST-MoE's z-loss and the entropy; by sequences, DeepSeek-V3's sequence-wise loss and what
//!   a capacity drops. They end as one [`RouterStats`], a small struct on the device.
//!
//! [`crate::reference::balance`] has every formula with its source. A loss comes without its factor (alpha, c_z). Tokens with a
//! NaN logit make the sums that they enter NaN; ids and counts stay right.
//!
//! # Many layers, many devices
//!
//! The load-balancing loss is not a sum over layers in Mixtral's form: counts and probabilities add up first. Say so with
//! [`MeasuredGatingDesc::earlier_tokens`]: the totals that are there already are added to, and the last layer's
//! [`RouterStats::balance_loss`] is the loss of all. The same serves micro-batches. Totals of several devices are plain arrays:
//! add them up by whatever means, and let [`crate::routers::balance_loss`] take the loss. [`crate::routers::update_bias`] is the balancing without a loss.
//!
//! # Reading statistics
//!
//! Nothing here waits. Give each layer its place in one buffer of [`RouterStats`] (`stats.slice_mut(layer..layer + 1)`), and once a
//! step copy the whole buffer to pinned host memory on the stream (`memcpy_dtoh`), record an event, and look at it when
//! [`cudarc::driver::CudaEvent::is_complete`] says so: the device is never waited for, and the numbers are at most a step late.
//!
//! # Gradients
//!
//! [`MeasuredGatingArgs::log_sum_exp`] and [`MeasuredGatingArgs::probabilities`] keep what they need: the gradient of the load-balancing loss by
//! a logit is `p (f - sum f p)` times constants, that of the z-loss `2 lse p / T`, with `p = exp(l - lse)`.
//!
//! ```
//! use moe_kernels::Workspace;
//! use moe_kernels::routers::balance_loss::{self, BalanceLossArgs, BalanceLossDesc};
//! use moe_kernels::routers::gating::GatingDesc;
//! use moe_kernels::routers::measured_gating::{self, MeasuredGatingArgs, MeasuredGatingDesc, RouterStats, Totals};
//! use moe_kernels::routers::update_bias::{self, UpdateBiasArgs, UpdateBiasDesc};
//! use moe_kernels::rules::{Gating, Score};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = moe_kernels::Kernels::new(stream.context())?;
//! // Two tokens, both for expert 0 of two.
//! let logits = stream.clone_htod(&[1.0_f32, 0.0, 1.0, 0.0])?;
//! let desc = MeasuredGatingDesc::new(GatingDesc::new(2, 2, 1, Gating::new(Score::Sigmoid)));
//! let mut ids = stream.alloc_zeros(2)?;
//! let mut weights = stream.alloc_zeros(2)?;
//! let mut counts = stream.alloc_zeros(2)?;
//! let mut loss_counts = stream.alloc_zeros(2)?;
//! let mut probability = stream.alloc_zeros(2)?;
//! let mut importance = stream.alloc_zeros(2)?;
//! let mut stats = stream.alloc_zeros::<RouterStats>(1)?;
//! let mut workspace = Workspace::new(&stream, measured_gating::workspace_bytes(&desc, kernels.device())?)?;
//! let totals = Totals::new(&mut counts, &mut loss_counts, &mut probability, &mut importance);
//! let args = MeasuredGatingArgs::new(&logits, &mut ids, &mut weights, totals, &mut stats, &mut workspace);
//! measured_gating::forward(&kernels, &stream, &desc, args)?;
//! let measured = stream.clone_dtoh(&stats)?[0];
//! assert_eq!((measured.tokens, measured.max_load), (2, 2));
//! assert!(measured.balance_loss > 1.0);
//!
//! let mut stats = stream.alloc_zeros::<RouterStats>(1)?;
//! let args = BalanceLossArgs::new(&counts, &loss_counts, &probability, &importance, &mut stats);
//! balance_loss::forward(&kernels, &stream, &BalanceLossDesc::new(2, 2), args)?;
//! assert_eq!(stream.clone_dtoh(&stats)?[0].balance_loss, measured.balance_loss);
//!
//! let mut bias = stream.clone_htod(&[0.0_f32, 0.0])?;
//! let desc = UpdateBiasDesc::new(2, 0.25);
//! update_bias::forward(&kernels, &stream, &desc, UpdateBiasArgs::new(&counts, &mut bias))?;
//! assert_eq!(stream.clone_dtoh(&bias)?, [-0.25, 0.25]);
//! # Ok(())
//! # }
//! ```

mod args;
mod parts;
#[allow(unsafe_code)]
mod stats;

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{Kernel, MeasuredGate};
use crate::routers::gating::{self, GatingDesc, HeldInputs, Routing, RuleWords, launch_rule};
use crate::rules::{BalanceRule, LossScore, Score};
use crate::runtime::builder::settings;
use crate::runtime::launch::{Address, Held, SCALAR, Scope, optional};
use crate::runtime::params::{MeasuredGatingAnyParams, MeasuredGatingParams};
use crate::runtime::shape;
use crate::runtime::workspace::BARRIER_HEADER;
use crate::{DeviceInfo, Error, Kernels, Selection};
pub use args::{MeasuredGatingArgs, Totals};
use parts::Parts;
pub use stats::RouterStats;

const OPERATION: &str = "measured_gating";

/// Shapes and rules of a measured gating.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct MeasuredGatingDesc {
    /// Tokens, experts, choices and their rule.
    pub gating: GatingDesc,
    /// What is measured. [`LossScore::Sigmoid`] needs [`Score::Sigmoid`].
    pub rule: BalanceRule,
    /// Tokens that [`Totals::loss_counts`] and [`Totals::probability`] are already of, and that the call adds to: those of earlier
    /// layers or batches. 0: the call sets them.
    pub earlier_tokens: usize,
}

settings!(MeasuredGatingDesc { rule: BalanceRule, earlier_tokens: usize });

impl MeasuredGatingDesc {
    /// Gating that is measured over the whole batch: all choices count, nothing is dropped.
    pub const fn new(gating: GatingDesc) -> MeasuredGatingDesc {
        let score = match gating.gating.score {
            Score::Sigmoid => LossScore::Sigmoid,
            Score::Softmax | Score::TopkSoftmax | Score::SqrtSoftplus | Score::SparseMixer => LossScore::Softmax,
        };
        let tokens_per_sequence = if gating.tokens > 0 { gating.tokens } else { 1 };
        let rule = BalanceRule::new(score, tokens_per_sequence);
        MeasuredGatingDesc { gating, rule, earlier_tokens: 0 }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        self.gating.validate()?;
        shape::positive(OPERATION, "rule.tokens_per_sequence", self.rule.tokens_per_sequence)?;
        if let Some(capacity) = self.rule.capacity {
            shape::positive(OPERATION, "rule.capacity", capacity)?;
        }
        if self.rule.score == LossScore::Sigmoid && self.gating.gating.score != Score::Sigmoid {
            let supported = "LossScore::Softmax, or Score::Sigmoid for the gating too";
            return Err(Error::unsupported(OPERATION, "rule.score", supported, "LossScore::Sigmoid"));
        }
        if self.rule.unbiased && self.rule.first_choice_only {
            let supported = "one of it and first_choice_only";
            return Err(Error::unsupported(OPERATION, "rule.unbiased", supported, true));
        }
        let tokens = self.earlier_tokens.saturating_add(self.gating.tokens);
        shape::size(OPERATION, "earlier_tokens", tokens).map(drop)
    }

    fn kernel(&self) -> MeasuredGate {
        let gate = gating::kernel(&self.gating.gating, self.gating.experts, false);
        MeasuredGate { score: gate.score, values: gate.values }
    }
}

/// Workspace of [`forward`] in bytes.
///
/// # Errors
/// Those of [`MeasuredGatingDesc::validate`].
pub fn workspace_bytes(desc: &MeasuredGatingDesc, device: &DeviceInfo) -> Result<usize, Error> {
    desc.validate()?;
    let parts = Parts::new(desc, device);
    let partials = shape::product(OPERATION, "workspace", &[4, parts.parts, desc.gating.experts, 4])?;
    Ok(BARRIER_HEADER + 16 * parts.parts + 8 * parts.cut_sequences() + partials)
}

/// Chooses kernel and grid: a block for each part of the tokens, as far as all blocks are resident.
///
/// # Errors
/// Those of [`MeasuredGatingDesc::validate`]; [`Error::Unsupported`] where the device has too little shared memory.
pub fn select(desc: &MeasuredGatingDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let gate = desc.kernel();
    if gate.shared_bytes() > device.shared_bytes_per_block {
        let supported = format!("a device with {} bytes of shared memory per block", gate.shared_bytes());
        let got = format!("{} on one with {}", desc.gating.experts, device.shared_bytes_per_block);
        return Err(Error::unsupported(OPERATION, "experts", supported, got));
    }
    let parts = Parts::new(desc, device).parts as u32;
    let blocks = parts.min(parts::resident_blocks(desc, device)).max(1);
    Ok(Selection::cooperative(Kernel::MeasuredGating(gate), blocks))
}

/// Chooses experts and weights, and measures the batch, in one launch.
///
/// With no tokens nothing is launched: counts, importance and statistics become zero, and so do the loss's totals unless they add
/// to earlier ones. For losses of totals that do, call [`crate::routers::balance_loss`].
///
/// # Errors
/// Those of [`select`]; [`Error::Unexpected`] for a correction bias with [`Score::TopkSoftmax`]; those of a buffer:
/// [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those of
/// the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &MeasuredGatingDesc,
    args: MeasuredGatingArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let GatingDesc { tokens, experts, top_k, .. } = desc.gating;
    let stats = scope.write("stats", args.stats, 1, SCALAR)?;
    let totals = HeldTotals::open(&scope, experts, args.totals)?;
    if tokens == 0 {
        scope.zero(stats.address(), size_of::<RouterStats>())?;
        return totals.zero(&scope, experts, desc.earlier_tokens > 0);
    }
    let choices = tokens * desc.gating.all_choices();
    let logits = scope.read("logits", args.logits, tokens * desc.gating.columns(), SCALAR)?;
    gating::check_correction_bias(OPERATION, &desc.gating.gating, args.correction_bias.is_some())?;
    let bias = scope.read_some("correction_bias", args.correction_bias, experts, SCALAR)?;
    let inputs = HeldInputs::open(&scope, &desc.gating.gating, [tokens, experts, top_k], args.rule)?;
    let ids = scope.write("ids", args.ids, choices, SCALAR)?;
    let weights = scope.write("weights", args.weights, choices, SCALAR)?;
    let log_sum_exp = scope.write_some("log_sum_exp", args.log_sum_exp, tokens, SCALAR)?;
    let probabilities = scope.write_some("probabilities", args.probabilities, tokens * experts, SCALAR)?;
    let workspace = args.workspace.open(&scope, workspace_bytes(desc, kernels.device())?)?;
    let routing = Routing {
        logits: logits.address(),
        correction_bias: optional(&bias),
        inputs: inputs.addresses(),
        ids: ids.address(),
        weights: weights.address(),
    };
    let at = Addresses {
        log_sum_exp: optional(&log_sum_exp),
        probabilities: optional(&probabilities),
        totals: totals.addresses(),
        stats: stats.address(),
        workspace: workspace.address(),
    };
    enqueue(&scope, desc, &selection, routing, at)
}

struct HeldTotals<'a> {
    counts: Held<'a>,
    loss_counts: Held<'a>,
    probability: Held<'a>,
    importance: Held<'a>,
}

impl<'b> HeldTotals<'b> {
    fn open<'c: 'b>(scope: &Scope<'b>, experts: usize, totals: Totals<'c>) -> Result<HeldTotals<'b>, Error> {
        Ok(HeldTotals {
            counts: scope.write("totals.counts", totals.counts, experts, SCALAR)?,
            loss_counts: scope.write("totals.loss_counts", totals.loss_counts, experts, SCALAR)?,
            probability: scope.write("totals.probability", totals.probability, experts, SCALAR)?,
            importance: scope.write("totals.importance", totals.importance, experts, SCALAR)?,
        })
    }

    fn zero(&self, scope: &Scope<'_>, experts: usize, adds: bool) -> Result<(), Error> {
        let bytes = experts * size_of::<f32>();
        scope.zero(self.counts.address(), bytes)?;
        scope.zero(self.importance.address(), bytes)?;
        if adds {
            return Ok(());
        }
        scope.zero(self.loss_counts.address(), bytes)?;
        scope.zero(self.probability.address(), bytes)
    }

    fn addresses(&self) -> [Address<'_>; 4] {
        [&self.counts, &self.loss_counts, &self.probability, &self.importance].map(Held::address)
    }
}

struct Addresses<'a> {
    log_sum_exp: Option<Address<'a>>,
    probabilities: Option<Address<'a>>,
    totals: [Address<'a>; 4],
    stats: Address<'a>,
    workspace: Address<'a>,
}

const FIRST_CHOICE_ONLY: u32 = 4;
const SIGMOID: u32 = 8;
const ADDS: u32 = 16;
const UNBIASED: u32 = 128;

fn enqueue(
    scope: &Scope<'_>,
    desc: &MeasuredGatingDesc,
    selection: &Selection,
    routing: Routing<'_>,
    at: Addresses<'_>,
) -> Result<(), Error> {
    let gating = &desc.gating;
    let parts = Parts::new(desc, scope.kernels.device());
    let RuleWords { mut flags, groups, groups_kept, scale, epsilon } = RuleWords::new(&gating.gating);
    if desc.rule.first_choice_only {
        flags |= FIRST_CHOICE_ONLY;
    }
    if desc.rule.unbiased {
        flags |= UNBIASED;
    }
    if desc.rule.score == LossScore::Sigmoid {
        flags |= SIGMOID;
    }
    if desc.earlier_tokens > 0 {
        flags |= ADDS;
    }
    let [counts, loss_counts, probability, importance] = at.totals;
    launch_rule!(
        scope,
        selection,
        &gating.gating,
        routing.inputs,
        MeasuredGatingParams or MeasuredGatingAnyParams {
            logits: routing.logits.into(),
            correction_bias: routing.correction_bias.into(),
            ids: routing.ids.into(),
            weights: routing.weights.into(),
            tokens: gating.tokens as u32,
            experts: gating.experts as u32,
            top_k: gating.top_k as u32,
            groups: groups,
            groups_kept: groups_kept,
            flags: flags,
            scale: scale,
            epsilon: epsilon,
            log_sum_exp: at.log_sum_exp.into(),
            probabilities: at.probabilities.into(),
            tokens_per_sequence: parts.sequence as u32,
            part_tokens: parts.tokens as u32,
            sequence_parts: parts.per_sequence as u32,
            part_pieces: parts.pieces_each as u32,
            parts: parts.parts as u32,
            pieces: parts.pieces as u32,
            // Without a limit nothing is above it.
            capacity: desc.rule.capacity.map_or(u32::MAX, |capacity| capacity as u32),
            loss_tokens: (desc.earlier_tokens + gating.tokens) as u32,
            counts: counts.into(),
            loss_counts: loss_counts.into(),
            probability: probability.into(),
            importance: importance.into(),
            stats: at.stats.into(),
            workspace: at.workspace.into(),
        }
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Gate;
    use crate::rules::Gating;
    use crate::runtime::device::A100;

    fn desc() -> MeasuredGatingDesc {
        MeasuredGatingDesc::new(GatingDesc { tokens: 100, experts: 64, top_k: 8, gating: Gating::new(Score::Softmax) })
    }

    #[test]
    fn faults_name_their_field() {
        let fault = |change: &dyn Fn(&mut MeasuredGatingDesc)| {
            let mut desc = desc();
            change(&mut desc);
            desc.validate().unwrap_err().argument().unwrap()
        };
        assert_eq!(desc().validate(), Ok(()));
        assert_eq!(fault(&|d| d.gating.top_k = 65), "top_k");
        assert_eq!(fault(&|d| d.rule.tokens_per_sequence = 0), "rule.tokens_per_sequence");
        assert_eq!(fault(&|d| d.rule.capacity = Some(0)), "rule.capacity");
        assert_eq!(fault(&|d| d.rule.score = LossScore::Sigmoid), "rule.score");
        assert_eq!(fault(&|d| d.rule = d.rule.unbiased(true).first_choice_only(true)), "rule.unbiased");
        assert_eq!(fault(&|d| d.earlier_tokens = i32::MAX as usize), "earlier_tokens");
        let small = DeviceInfo { shared_bytes_per_block: 64 << 10, ..A100 };
        let wide = MeasuredGatingDesc { gating: GatingDesc { experts: 4096, ..desc().gating }, ..desc() };
        assert_eq!(select(&wide, &small).unwrap_err().argument(), Some("experts"));
    }

    #[test]
    fn every_variant_fits_the_smallest_multiprocessor_that_runs_it() {
        // 99 KiB for one block of compute capability 8.6, 8.9 and 12.0.
        for values in Gate::VALUES {
            assert!(MeasuredGate { score: Some(Score::Softmax), values }.shared_bytes() <= 99 << 10);
        }
    }
}
