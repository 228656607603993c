//! Admission: which of its chosen experts a token gets, where experts have a capacity.
//!
//! It stands between [`crate::routers::gating`] and [`crate::capacity::dispatch`]: choices that are not granted become -1, which dispatch skips.
//! Within a group of tokens, each expert grants its first `capacity` requests, in an order that the rule names:
//!
//! - token by token (Fedus et al., *Switch Transformers*, 2021), or all first choices before all second ones (Lepikhin et
//!   al., *GShard*, 2020, algorithm 1; Du et al., *GLaM*, 2021);
//! - groups of tokens that follow each other (`[B, S]`), or whose tokens alternate (`[S, B]`: Megatron-LM's order);
//! - tokens as they come, or the most confident first (batch-prioritised: Riquelme et al., *V-MoE*, 2021, section 4.1).
//!
//! A choice that finds its expert full is dropped, or, with more candidates than `top_k`, passed on to the token's next one
//! (*Switch Transformers*, appendix B). A second expert may be asked for at random, by its weight (*GShard*).
//!
//! ```
//! use moe_kernels::Workspace;
//! use moe_kernels::capacity::admission::{self, AdmissionArgs, AdmissionDesc};
//! use moe_kernels::rules::AdmissionRule;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = moe_kernels::Kernels::new(stream.context())?;
//! // Three tokens want expert 0, which takes one; the second comes first, as it is the most confident.
//! let (tokens, experts, capacity) = (3, 2, 1);
//! let desc = AdmissionDesc::new(tokens, AdmissionRule::new(experts, 1, capacity, tokens).prioritised(true));
//! let ids = stream.clone_htod(&[0, 0, 0])?;
//! let weights = stream.clone_htod(&[0.5_f32, 0.75, 0.5])?;
//! let mut admitted = stream.alloc_zeros(tokens)?;
//! let mut admitted_weights = stream.alloc_zeros(tokens)?;
//! let mut workspace = Workspace::new(&stream, admission::workspace_bytes(&desc)?)?;
//! let args = AdmissionArgs::new(&ids, &weights, &mut admitted, &mut admitted_weights, &mut workspace);
//! admission::forward(&kernels, &stream, &desc, args)?;
//! assert_eq!(stream.clone_dtoh(&admitted)?, [-1, 0, -1]);
//! assert_eq!(stream.clone_dtoh(&admitted_weights)?, [0.0, 0.75, 0.0]);
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{Admission, Kernel};
use crate::rules::{AdmissionRule, NoiseSource, Order, Renormalise, SecondExpert, Sequences};
use crate::runtime::builder::buffers;
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::AdmissionParams;
use crate::runtime::shape;
use crate::runtime::workspace::BARRIER_HEADER;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection, Workspace};

const OPERATION: &str = "admission";

/// Shapes and rule of an admission.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct AdmissionDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// The rule. Experts are 1 to 4096.
    pub rule: AdmissionRule,
}

impl AdmissionDesc {
    /// The choices of `tokens` tokens, admitted by `rule`.
    pub const fn new(tokens: usize, rule: AdmissionRule) -> AdmissionDesc {
        AdmissionDesc { tokens, rule }
    }
}

/// Buffers of an admission.
#[non_exhaustive]
pub struct AdmissionArgs<'a> {
    /// `[T, K]`: choices, best first, as gating wrote them. One outside `0..E` asks for nothing.
    pub ids: In<'a, i32>,
    /// `[T, K]`.
    pub weights: In<'a, f32>,
    /// `[T]`: who comes first, if the rule is prioritised; absent, `weights[t, 0]`.
    pub priority: Option<In<'a, f32>>,
    /// `[2]`, 8-byte aligned, where a second expert is drawn: see [`crate::routers::noise_state`]. Absent, the rule's seed and offset are all
    /// there is.
    pub noise_state: Option<In<'a, u64>>,
    /// `[T, n]` with `n = top_k`, written: experts got, -1 where none. With `n = K` place `j` is choice `j`.
    pub admitted: Out<'a, i32>,
    /// `[T, n]`, written: their weights, 0 where none.
    pub admitted_weights: Out<'a, f32>,
    /// At least [`workspace_bytes`].
    pub workspace: &'a mut Workspace,
}

impl<'a> AdmissionArgs<'a> {
    /// `ids` and `weights` to `admitted` and `admitted_weights`; where the rule is prioritised, by the first weight.
    pub fn new(
        ids: impl Into<In<'a, i32>>,
        weights: impl Into<In<'a, f32>>,
        admitted: impl Into<Out<'a, i32>>,
        admitted_weights: impl Into<Out<'a, f32>>,
        workspace: &'a mut Workspace,
    ) -> AdmissionArgs<'a> {
        AdmissionArgs {
            ids: ids.into(),
            weights: weights.into(),
            priority: None,
            noise_state: None,
            admitted: admitted.into(),
            admitted_weights: admitted_weights.into(),
            workspace,
        }
    }
}

buffers!(AdmissionArgs<'a> { priority: In<f32>, noise_state: In<u64> });

impl AdmissionDesc {
    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        let rule = &self.rule;
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::experts(OPERATION, rule.experts)?;
        let candidates = rule.candidates;
        if candidates > AdmissionRule::MAX_CANDIDATES {
            let supported = format!("at most {}", AdmissionRule::MAX_CANDIDATES);
            return Err(Error::unsupported(OPERATION, "candidates", supported, candidates));
        }
        shape::positive(OPERATION, "candidates", candidates)?;
        if rule.top_k == 0 || rule.top_k > candidates {
            return Err(Error::invalid(OPERATION, "top_k", format!("1 to candidates = {candidates}"), rule.top_k));
        }
        shape::positive(OPERATION, "capacity", rule.capacity)?;
        shape::positive(OPERATION, "tokens_per_group", rule.tokens_per_group)?;
        if rule.groups == Sequences::Alternating && !self.tokens.is_multiple_of(rule.tokens_per_group) {
            let expected = format!("a divisor of the number of tokens, {}, where groups alternate", self.tokens);
            return Err(Error::invalid(OPERATION, "tokens_per_group", expected, rule.tokens_per_group));
        }
        match rule.renormalise {
            Some(Renormalise::Plus(epsilon) | Renormalise::AtLeast(epsilon)) if epsilon < 0.0 || epsilon.is_nan() => {
                return Err(Error::invalid(OPERATION, "renormalise", "an epsilon of at least 0", epsilon));
            }
            Some(Renormalise::PNorm(p)) => {
                return Err(Error::unsupported(OPERATION, "renormalise", "a sum", format!("the {p}-norm")));
            }
            _ => {}
        }
        let threshold = match rule.second {
            SecondExpert::Always => return self.sizes(),
            SecondExpert::Above(threshold) | SecondExpert::Random { threshold, .. } => threshold,
        };
        if rule.top_k != 2 {
            return Err(Error::invalid(OPERATION, "top_k", "2 with a policy for the second expert", rule.top_k));
        }
        if threshold.is_nan() {
            return Err(Error::invalid(OPERATION, "second.threshold", "a number", threshold));
        }
        self.sizes()
    }

    fn sizes(&self) -> Result<(), Error> {
        shape::product_i32(OPERATION, "ids", &[self.tokens, self.rule.candidates]).map(drop)
    }
}

/// Workspace of [`forward`] in bytes.
///
/// # Errors
/// Those of [`AdmissionDesc::validate`].
pub fn workspace_bytes(desc: &AdmissionDesc) -> Result<usize, Error> {
    desc.validate()?;
    // What each token wants and has; sorted, two orders of the tokens; passed on by token, who has refused it, before and in a round.
    let passes_by_token = desc.rule.order == Order::ByToken && desc.rule.top_k < desc.rule.candidates;
    let words = 1 + if desc.rule.prioritised { 2 } else { 0 } + if passes_by_token { 2 } else { 0 };
    Ok(BARRIER_HEADER + words * desc.tokens * size_of::<u32>())
}

/// Chooses kernel and grid: a block a group.
///
/// # Errors
/// Those of [`AdmissionDesc::validate`].
pub fn select(desc: &AdmissionDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let max_experts = if desc.rule.experts <= 1024 { Admission::MAX_EXPERTS[0] } else { Admission::MAX_EXPERTS[1] };
    let blocks = desc.tokens.div_ceil(desc.rule.tokens_per_group).max(1) as u32;
    Ok(Selection::new(Kernel::Admission(Admission { max_experts }), [blocks, 1, 1]))
}

const BY_CHOICE: u32 = 1;
const PRIORITISED: u32 = 2;
const POLICY: u32 = 4;
const RANDOM: u32 = 8;
const RENORMALISED: u32 = 16;
const ALTERNATES: u32 = 32;

/// Grants choices.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`AdmissionDesc::validate`]; [`Error::Unexpected`] for a priority without `prioritised`, or a noise state where nothing is drawn; those of a buffer:
/// [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those of
/// the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &AdmissionDesc,
    args: AdmissionArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let rule = &desc.rule;
    if args.priority.is_some() && !rule.prioritised {
        let reason = "the rule takes tokens as they come";
        return Err(Error::Unexpected { operation: OPERATION, argument: "priority", reason });
    }
    let draws = matches!(rule.second, SecondExpert::Random { .. });
    if args.noise_state.is_some() && !draws {
        let reason = "the rule draws nothing";
        return Err(Error::Unexpected { operation: OPERATION, argument: "noise_state", reason });
    }
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    if desc.tokens == 0 {
        return Ok(());
    }
    let (choices, places) = (desc.tokens * rule.candidates, desc.tokens * rule.top_k);
    let ids = scope.read("ids", args.ids, choices, SCALAR)?;
    let weights = scope.read("weights", args.weights, choices, SCALAR)?;
    let priority = scope.read_some("priority", args.priority, desc.tokens, SCALAR)?;
    let noise_state = scope.read_noise_state(args.noise_state)?;
    let admitted = scope.write("admitted", args.admitted, places, SCALAR)?;
    let admitted_weights = scope.write("admitted_weights", args.admitted_weights, places, SCALAR)?;
    let workspace = args.workspace.open(&scope, workspace_bytes(desc)?)?;
    let mut flags = 0;
    if rule.order == Order::ByChoice {
        flags |= BY_CHOICE;
    }
    if rule.prioritised {
        flags |= PRIORITISED;
    }
    let (threshold, noise) = match rule.second {
        SecondExpert::Always => (0.0, NoiseSource::default()),
        SecondExpert::Above(threshold) => {
            flags |= POLICY;
            (threshold, NoiseSource::default())
        }
        SecondExpert::Random { threshold, noise } => {
            flags |= POLICY | RANDOM;
            (threshold, noise)
        }
    };
    let (plus, least) = rule.divisor();
    if rule.renormalise.is_some() {
        flags |= RENORMALISED;
    }
    if rule.groups == Sequences::Alternating {
        flags |= ALTERNATES;
    }
    let [seed_lo, seed_hi, offset_lo, offset_hi] = noise.words_of_source();
    scope.launch(
        &selection,
        AdmissionParams {
            ids: ids.address().into(),
            weights: weights.address().into(),
            priority: optional(&priority).into(),
            admitted_ids: admitted.address().into(),
            admitted_weights: admitted_weights.address().into(),
            tokens: desc.tokens as u32,
            experts: rule.experts as u32,
            candidates: rule.candidates as u32,
            top_k: rule.top_k as u32,
            capacity: rule.capacity as u32,
            tokens_per_group: rule.tokens_per_group as u32,
            flags,
            threshold,
            seed_lo,
            seed_hi,
            offset_lo,
            offset_hi,
            noise_state: optional(&noise_state).into(),
            // The header stays zero for kernels with a barrier that share the workspace.
            token_state: workspace.address().offset(BARRIER_HEADER).into(),
            renormalise_plus: plus,
            renormalise_least: least,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn desc() -> AdmissionDesc {
        let rule = AdmissionRule {
            experts: 8,
            candidates: 2,
            top_k: 2,
            capacity: 4,
            tokens_per_group: 16,
            groups: Sequences::Following,
            order: Order::ByChoice,
            prioritised: false,
            second: SecondExpert::Above(0.5),
            renormalise: None,
        };
        AdmissionDesc { tokens: 100, rule }
    }

    fn fault(change: impl FnOnce(&mut AdmissionDesc)) -> &'static str {
        let mut desc = desc();
        change(&mut desc);
        desc.validate().unwrap_err().argument().unwrap()
    }

    #[test]
    fn faults_name_their_field() {
        assert_eq!(desc().validate(), Ok(()));
        let gshard = AdmissionRule::gshard(8, 4, 16, NoiseSource::new(1, 0));
        assert_eq!(AdmissionDesc::new(100, gshard).validate(), Ok(()));
        assert_eq!(AdmissionDesc::new(100, AdmissionRule::new(8, 1, 4, 16)).validate(), Ok(()));
        assert_eq!(fault(|d| d.rule.experts = 5000), "experts");
        assert_eq!(fault(|d| d.rule.candidates = 33), "candidates");
        assert_eq!(fault(|d| d.rule.top_k = 3), "top_k");
        assert_eq!(fault(|d| d.rule.top_k = 1), "top_k");
        assert_eq!(fault(|d| d.rule.capacity = 0), "capacity");
        assert_eq!(fault(|d| d.rule.tokens_per_group = 0), "tokens_per_group");
        assert_eq!(fault(|d| d.rule.groups = Sequences::Alternating), "tokens_per_group");
        assert_eq!(fault(|d| d.rule.second = SecondExpert::Above(f32::NAN)), "second.threshold");
        assert_eq!(fault(|d| d.tokens = 1 << 30), "ids");
        assert_eq!(fault(|d| d.rule.renormalise = Some(Renormalise::PNorm(2.0))), "renormalise");
        assert_eq!(fault(|d| d.rule.renormalise = Some(Renormalise::Plus(f32::NAN))), "renormalise");
    }

    #[test]
    fn words_of_a_token() {
        let bytes = |order: Order, candidates: usize, prioritised: bool| {
            let rule = AdmissionRule { order, candidates, prioritised, ..desc().rule };
            workspace_bytes(&AdmissionDesc { rule, ..desc() }).unwrap() - BARRIER_HEADER
        };
        assert_eq!(bytes(Order::ByChoice, 3, false), 400);
        assert_eq!(bytes(Order::ByToken, 2, true), 1200);
        assert_eq!(bytes(Order::ByToken, 3, true), 2000);
    }

    #[test]
    fn a_block_a_group() {
        let selection = select(&desc(), &crate::runtime::device::A100).unwrap();
        assert_eq!(selection.grid, [7, 1, 1]);
    }
}
