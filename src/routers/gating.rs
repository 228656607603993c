//! Gating: which experts each token goes to, and with what weight.
//!
//! For each token, with logits `l[E]`:
//!
//! 1. a score `p` for each expert: softmax over all, or the sigmoid of each logit;
//! 2. the experts of the best groups are eligible (all of them without groups);
//! 3. the `k` eligible experts of largest choice value `p + correction_bias` are chosen, larger first; among equals the
//!    lower id, NaN after everything else. With no bias the logits themselves are compared: the same order, exactly;
//! 4. the weight of a choice is its `p`, divided as [`crate::rules::Renormalise`] says, times `scale`.
//!    With [`Score::TopkSoftmax`] the choice value is the logit, and `p` the softmax over the chosen logits only: a correction
//!    bias, which adds to scores before the choice, is refused there.
//!
//! Ids are always in range and distinct, whatever the logits; weights are numbers, unless [`crate::rules::Garbage::Propagate`] lets NaN through.
//!
//! A token that a [`crate::TokenMask`] calls padding has ids -1 and weights 0, and its logits are not read.
//!
//! Sources: softmax top-k of Shazeer et al., *Outrageously Large Neural Networks* (2017) and Mixtral; sigmoid scores with
//! correction bias, groups and scale of DeepSeek-V3 (2024), sections 2.1.2; softmax over the chosen of gpt-oss.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{Gate, Kernel};
use crate::rules::{Garbage, Gating, Groups, Masked, Renormalise, Score};
use crate::runtime::builder::buffers;
use crate::runtime::launch::{Address, SCALAR, Scope, optional};
use crate::runtime::params::GatingParams;
use crate::runtime::shape;
use crate::runtime::token_mask::MaskAddresses;
use crate::{DeviceInfo, Dtype, Error, In, Kernels, Out, Selection, Tensor, TokenMask};

const OPERATION: &str = "gating";

/// Shapes and rule of a gating.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct GatingDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// Experts per token `k`, 1 to 32 and at most the number of eligible experts.
    pub top_k: usize,
    /// The rule.
    pub gating: Gating,
}

impl GatingDesc {
    /// `top_k` of `experts` experts for each of `tokens` tokens.
    pub const fn new(tokens: usize, experts: usize, top_k: usize, gating: Gating) -> GatingDesc {
        GatingDesc { tokens, experts, top_k, gating }
    }
}

/// Buffers of a gating.
#[non_exhaustive]
pub struct GatingArgs<'a> {
    /// `[T, E]`, of any [`crate::Element`]; all arithmetic is in f32.
    pub logits: Tensor<'a>,
    /// `[E]`, added to the scores for the choice only, not for the weights (DeepSeek-V3's auxiliary-loss-free balancing).
    pub correction_bias: Option<In<'a, f32>>,
    /// Which tokens count.
    pub mask: TokenMask<'a>,
    /// `[T, k]`, written: chosen experts by falling choice value.
    pub ids: Out<'a, i32>,
    /// `[T, k]`, written.
    pub weights: Out<'a, f32>,
}

impl<'a> GatingArgs<'a> {
    /// `logits` to `ids` and `weights`, without a correction bias.
    pub fn new(
        logits: impl Into<Tensor<'a>>,
        ids: impl Into<Out<'a, i32>>,
        weights: impl Into<Out<'a, f32>>,
    ) -> GatingArgs<'a> {
        GatingArgs {
            logits: logits.into(),
            correction_bias: None,
            mask: TokenMask::all(),
            ids: ids.into(),
            weights: weights.into(),
        }
    }

    /// With padding among the tokens.
    #[must_use]
    pub fn mask(self, mask: TokenMask<'a>) -> GatingArgs<'a> {
        GatingArgs { mask, ..self }
    }
}

buffers!(GatingArgs<'a> { correction_bias: In<f32> });

impl GatingDesc {
    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::experts(OPERATION, self.experts)?;
        shape::top_k(OPERATION, self.top_k, self.experts)?;
        shape::product_i32(OPERATION, "ids", &[self.tokens, self.top_k])?;
        shape::product(OPERATION, "logits", &[self.tokens, self.experts])?;
        if let Some(Renormalise::Plus(epsilon) | Renormalise::AtLeast(epsilon)) = self.gating.renormalise
            && !(epsilon.is_finite() && epsilon >= 0.0)
        {
            return Err(Error::invalid(OPERATION, "renormalise", "an epsilon of at least 0", epsilon));
        }
        if !self.gating.scale.is_finite() {
            return Err(Error::invalid(OPERATION, "scale", "a finite number", self.gating.scale));
        }
        self.gating.groups.map_or(Ok(()), |groups| self.validate_groups(groups))
    }

    fn validate_groups(&self, groups: Groups) -> Result<(), Error> {
        let Groups { count, kept, score, masked } = groups;
        shape::positive(OPERATION, "groups.count", count)?;
        if count > Gate::MAX_GROUPS as usize {
            return Err(Error::unsupported(OPERATION, "groups.count", format!("at most {}", Gate::MAX_GROUPS), count));
        }
        if !self.experts.is_multiple_of(count) {
            let expected = format!("a divisor of the number of experts, {}", self.experts);
            return Err(Error::invalid(OPERATION, "groups.count", expected, count));
        }
        if kept == 0 || kept > count {
            return Err(Error::invalid(OPERATION, "groups.kept", format!("1 to groups.count = {count}"), kept));
        }
        let size = self.experts / count;
        if masked == Masked::Zero && self.gating.score == Score::TopkSoftmax && count > 1 {
            let supported = "Masked::Out with Score::TopkSoftmax, which chooses by logits: 0 is no score there";
            return Err(Error::unsupported(OPERATION, "groups.masked", supported, "Masked::Zero"));
        }
        let terms = score.terms();
        if terms == 0 || (terms > size && count > 1) {
            let expected = format!("the sum of 1 to {size} choice values, as groups have {size} experts");
            return Err(Error::invalid(OPERATION, "groups.score", expected, format!("{score:?}")));
        }
        if kept * size < self.top_k && masked == Masked::Out {
            let expected = format!("at most {kept} groups kept * {size} experts = {}", kept * size);
            return Err(Error::invalid(OPERATION, "top_k", expected, self.top_k));
        }
        Ok(())
    }
}

/// The kernel for `experts` experts.
pub(crate) fn kernel(score: Score, experts: usize, dispatch: bool) -> Gate {
    let fits = |values: &u32| 32 * *values as usize >= experts;
    let values = Gate::VALUES.into_iter().find(fits).unwrap_or(Gate::VALUES[Gate::VALUES.len() - 1]);
    Gate { score, values, dispatch }
}

/// Chooses kernel and grid: the fewest registers that hold a token's logits, a warp for each token up to eight blocks a
/// multiprocessor.
///
/// # Errors
/// Those of [`GatingDesc::validate`].
pub fn select(desc: &GatingDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let gate = kernel(desc.gating.score, desc.experts, false);
    let blocks = (desc.tokens as u32).div_ceil(gate.warps()).min(8 * device.multiprocessors).max(1);
    Ok(Selection::new(Kernel::Gating(gate), [blocks, 1, 1]))
}

/// Chooses experts and weights.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`GatingDesc::validate`]; [`Error::Unexpected`] for a correction bias with [`Score::TopkSoftmax`]; those of a
/// buffer: [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &GatingDesc,
    args: GatingArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    if desc.tokens == 0 {
        return Ok(());
    }
    let choices = desc.tokens * desc.top_k;
    let dtype = args.logits.dtype();
    let logits = scope.read_any("logits", args.logits, desc.tokens * desc.experts, dtype.bytes().into())?;
    check_correction_bias(OPERATION, &desc.gating, args.correction_bias.is_some())?;
    let bias = scope.read_some("correction_bias", args.correction_bias, desc.experts, SCALAR)?;
    let mask = args.mask.open(&scope, desc.tokens)?;
    let ids = scope.write("ids", args.ids, choices, SCALAR)?;
    let weights = scope.write("weights", args.weights, choices, SCALAR)?;
    let routing = Routing {
        logits: logits.address(),
        dtype,
        correction_bias: optional(&bias),
        mask: mask.addresses(),
        ids: ids.address(),
        weights: weights.address(),
    };
    let RuleWords { flags, groups, groups_kept, scale, epsilon } = RuleWords::new(&desc.gating);
    scope.launch(
        &selection,
        GatingParams {
            logits: routing.logits.into(),
            correction_bias: routing.correction_bias.into(),
            ids: routing.ids.into(),
            weights: routing.weights.into(),
            tokens: desc.tokens as u32,
            experts: desc.experts as u32,
            top_k: desc.top_k as u32,
            groups,
            groups_kept,
            flags,
            scale,
            epsilon,
            mask: routing.mask.mask.into(),
            valid_tokens: routing.mask.valid_tokens.into(),
            token_flags: routing.token_flags(desc.gating.garbage),
        },
    )
}

/// The kernels of [`Score::TopkSoftmax`] have no score before the choice that a bias could correct.
pub(crate) fn check_correction_bias(operation: &'static str, gating: &Gating, given: bool) -> Result<(), Error> {
    if given && gating.score == Score::TopkSoftmax {
        let reason = "the score is TopkSoftmax, which has no scores before the choice";
        return Err(Error::Unexpected { operation, argument: "correction_bias", reason });
    }
    Ok(())
}

/// What gating reads and writes.
pub(crate) struct Routing<'a> {
    pub(crate) logits: Address<'a>,
    /// Type of the logits.
    pub(crate) dtype: Dtype,
    pub(crate) correction_bias: Option<Address<'a>>,
    pub(crate) mask: MaskAddresses<'a>,
    pub(crate) ids: Address<'a>,
    pub(crate) weights: Address<'a>,
}

impl Routing<'_> {
    /// What the tokens are, as every gating kernel takes it: `kernels/routers/parts/gating_input`.
    pub(crate) fn token_flags(&self, garbage: Garbage) -> u32 {
        let garbage = match garbage {
            Garbage::Zero => 0,
            Garbage::Propagate => 2,
        };
        let dtype = match self.dtype {
            Dtype::F32 => 0,
            Dtype::Bf16 => 4,
            Dtype::F16 => 4 | 8,
        };
        self.mask.flags() | garbage | dtype
    }
}

const RENORMALISE: u32 = 1;
const AT_LEAST: u32 = 2;
const BY_SCORE: u32 = 32;
const MASKED_ZERO: u32 = 64;
/// Where the number of choice values begins that make a group's score.
const GROUP_TERMS: u32 = 8;

/// A rule as every gating kernel takes it.
pub(crate) struct RuleWords {
    pub(crate) flags: u32,
    pub(crate) groups: u32,
    pub(crate) groups_kept: u32,
    pub(crate) scale: f32,
    pub(crate) epsilon: f32,
}

impl RuleWords {
    pub(crate) fn new(gating: &Gating) -> RuleWords {
        let (mut flags, epsilon) = match gating.renormalise {
            None => (0, 0.0),
            Some(Renormalise::Plus(epsilon)) => (RENORMALISE, epsilon),
            Some(Renormalise::AtLeast(epsilon)) => (RENORMALISE | AT_LEAST, epsilon),
        };
        let (mut groups, mut groups_kept) = (1, 1);
        if let Some(of) = gating.groups.filter(|groups| groups.count > 1) {
            (groups, groups_kept) = (of.count as u32, of.kept as u32);
            flags |= (of.score.terms() as u32) << GROUP_TERMS;
            if gating.compares_scores() {
                flags |= BY_SCORE;
            }
            if of.masked == Masked::Zero {
                flags |= MASKED_ZERO;
            }
        }
        RuleWords { flags, groups, groups_kept, scale: gating.scale, epsilon }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::GroupScore;
    use crate::runtime::device::A100;

    fn desc() -> GatingDesc {
        GatingDesc { tokens: 16, experts: 256, top_k: 8, gating: Gating::new(Score::Sigmoid) }
    }

    fn grouped(count: usize, kept: usize, score: GroupScore) -> GatingDesc {
        GatingDesc { gating: desc().gating.groups(Some(Groups::new(count, kept).score(score))), ..desc() }
    }

    fn fault(desc: GatingDesc) -> &'static str {
        desc.validate().unwrap_err().argument().unwrap()
    }

    #[test]
    fn faults_name_their_field() {
        assert_eq!(desc().validate(), Ok(()));
        assert_eq!(grouped(8, 4, GroupScore::TOP_TWO).validate(), Ok(()));
        assert_eq!(fault(GatingDesc { experts: 0, ..desc() }), "experts");
        assert_eq!(fault(GatingDesc { experts: 5000, ..desc() }), "experts");
        assert_eq!(fault(GatingDesc { experts: 4, ..desc() }), "top_k");
        assert_eq!(fault(GatingDesc { top_k: 33, ..desc() }), "top_k");
        assert_eq!(fault(GatingDesc { top_k: 0, ..desc() }), "top_k");
        assert_eq!(fault(GatingDesc { tokens: 1 << 29, ..desc() }), "ids");
        assert_eq!(fault(GatingDesc { tokens: usize::MAX, ..desc() }), "tokens");
        assert_eq!(fault(GatingDesc { gating: Gating { scale: f32::NAN, ..desc().gating }, ..desc() }), "scale");
        assert_eq!(fault(grouped(7, 4, GroupScore::Max)), "groups.count");
        assert_eq!(fault(grouped(0, 0, GroupScore::Max)), "groups.count");
        assert_eq!(fault(grouped(8, 9, GroupScore::Max)), "groups.kept");
        assert_eq!(fault(grouped(8, 0, GroupScore::Max)), "groups.kept");
        assert_eq!(fault(GatingDesc { experts: 16, top_k: 1, ..grouped(16, 16, GroupScore::TOP_TWO) }), "groups.score");
        assert_eq!(fault(grouped(256, 4, GroupScore::Max)), "groups.count");
    }

    #[test]
    fn too_few_eligible_experts() {
        let desc = GatingDesc { experts: 32, ..grouped(32, 4, GroupScore::Max) };
        let error = desc.validate().unwrap_err().to_string();
        assert_eq!(error, "gating: `top_k` is 8, expected at most 4 groups kept * 1 experts = 4");
    }

    #[test]
    fn registers_hold_the_logits() {
        for (experts, values) in [(1, 1), (32, 1), (33, 2), (60, 2), (512, 16), (4095, 128), (4096, 128)] {
            let desc = GatingDesc { experts, top_k: 1, ..desc() };
            let Kernel::Gating(gate) = select(&desc, &A100).unwrap().kernel.variant() else { unreachable!() };
            assert_eq!(gate.values, values, "{experts} experts");
        }
    }
}
