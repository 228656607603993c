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
//!    bias, which adds to scores before the choice, is refused there, unless the rule says [`crate::rules::ChoiceBy::Logit`].
//!
//! [`Gating`] has more: other scores, choice by logits or of given ids, other norms, learned factors, experts that every token goes to.
//! The rules of the common models have kernels of their own, the rest others, for up to 1024 experts.
//!
//! Ids are always in range and distinct, whatever the logits; weights are numbers, unless [`crate::rules::Garbage::Propagate`] lets NaN through.
//!
//! A token that a [`crate::TokenMask`] calls padding has ids -1 and weights 0, and its logits are not read.
//!
//! Sources: softmax top-k of Shazeer et al., *Outrageously Large Neural Networks* (2017) and Mixtral; sigmoid scores with
//! correction bias, groups and scale of DeepSeek-V3 (2024), sections 2.1.2; softmax over the chosen of gpt-oss.

mod inputs;
mod words;

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{Gate, Kernel, WideGate};
use crate::rules::{Appended, AppendedWeight, ChoiceBy, Garbage, Gating, Groups, Masked, Renormalise, Score};
use crate::runtime::builder::buffers;
use crate::runtime::launch::{Address, SCALAR, Scope, optional};
use crate::runtime::params::{GatingAnyParams, GatingParams};
use crate::runtime::shape;
use crate::runtime::token_mask::MaskAddresses;
use crate::{DeviceInfo, Dtype, Error, In, Kernels, Out, Selection, Tensor, TokenMask};

pub use inputs::{Given, RuleInputs, TableRows};
pub(crate) use inputs::{GivenAddress, HeldGiven, HeldInputs, InputAddresses, check_given, check_scales};
pub(crate) use words::{AnyWords, RuleWords};

const OPERATION: &str = "gating";

/// Launches a gating: the parameters of the kernels for common rules, and for the others those with the rest of the rule.
macro_rules! launch_rule {
    ($scope:expr, $selection:expr, $gating:expr, $inputs:expr, $common:ident or $any:ident { $($field:ident: $value:expr),* $(,)? }) => {
        if $gating.is_common() {
            $scope.launch($selection, $common { $($field: $value),* })
        } else {
            let rest = $crate::routers::gating::AnyWords::new($gating, $inputs);
            $scope.launch(
                $selection,
                $any {
                    $($field: $value,)*
                    rules: rest.rules,
                    appended: rest.appended,
                    appended_weight: rest.appended_weight,
                    power: rest.power,
                    mixer_limit: rest.mixer_limit,
                    expert_scale: rest.expert_scale,
                    global_scale: rest.global_scale,
                    given: rest.given,
                    words: rest.words,
                    vocabulary: rest.vocabulary,
                },
            )
        }
    };
}
pub(crate) use launch_rule;

/// Shapes and rule of a gating.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct GatingDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts `E` that the choice is among, 1 to 4096.
    pub experts: usize,
    /// Experts per token `k`, 1 to 64 (to 32 with rules that are more than a score, groups and a bias) and at most the number of eligible experts.
    pub top_k: usize,
    /// The rule. With [`Gating::appended`] ids and weights are `[T, k + appended]`.
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
    /// `[T, E]`, `[T, E + appended]` where appended experts have columns; of any [`crate::Element`]: all arithmetic is in f32.
    pub logits: Tensor<'a>,
    /// `[E]`, added to the scores for the choice only, not for the weights (DeepSeek-V3's auxiliary-loss-free balancing).
    pub correction_bias: Option<In<'a, f32>>,
    /// Which tokens count.
    pub mask: TokenMask<'a>,
    /// What else the rule asks for.
    pub rule: RuleInputs<'a>,
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
            rule: RuleInputs::new(),
            ids: ids.into(),
            weights: weights.into(),
        }
    }

    /// With padding among the tokens.
    #[must_use]
    pub fn mask(self, mask: TokenMask<'a>) -> GatingArgs<'a> {
        GatingArgs { mask, ..self }
    }

    /// With what else the rule asks for.
    #[must_use]
    pub fn rule(self, rule: RuleInputs<'a>) -> GatingArgs<'a> {
        GatingArgs { rule, ..self }
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
        shape::top_k_up_to(OPERATION, self.top_k, self.experts, crate::MAX_TOP_K)?;
        shape::product_i32(OPERATION, "ids", &[self.tokens, self.all_choices()])?;
        shape::product(OPERATION, "logits", &[self.tokens, self.columns()])?;
        match self.gating.renormalise {
            Some(Renormalise::Plus(epsilon) | Renormalise::AtLeast(epsilon))
                if !(epsilon.is_finite() && epsilon >= 0.0) =>
            {
                return Err(Error::invalid(OPERATION, "renormalise", "an epsilon of at least 0", epsilon));
            }
            Some(Renormalise::PNorm(p)) if p.is_nan() || p <= 0.0 => {
                return Err(Error::invalid(OPERATION, "renormalise", "a p above 0", p));
            }
            _ => {}
        }
        if !self.gating.scale.is_finite() {
            return Err(Error::invalid(OPERATION, "scale", "a finite number", self.gating.scale));
        }
        if !self.gating.is_common() {
            self.validate_any()?;
        }
        self.gating.groups.map_or(Ok(()), |groups| self.validate_groups(groups))
    }

    /// More than one choice a lane is for a gating alone, by a score and nothing else.
    pub(crate) fn validate_lanes(&self, operation: &'static str, of: &str) -> Result<(), Error> {
        if self.top_k > shape::LANES {
            let supported = format!("at most {} {of}", shape::LANES);
            return Err(Error::unsupported(operation, "top_k", supported, self.top_k));
        }
        Ok(())
    }

    /// Ids of a token, with those of appended experts.
    pub(crate) fn all_choices(&self) -> usize {
        self.top_k.saturating_add(self.gating.appended_experts())
    }

    /// Logits of a token.
    pub(crate) fn columns(&self) -> usize {
        self.experts.saturating_add(self.gating.appended_columns())
    }

    /// Limits of the kernels for all rules.
    fn validate_any(&self) -> Result<(), Error> {
        let Gating { score, groups, jitter, appended, .. } = self.gating;
        let most = 32 * Gate::ANY_VALUES[Gate::ANY_VALUES.len() - 1] as usize;
        if self.experts > most {
            return Err(Error::unsupported(
                OPERATION,
                "experts",
                format!("at most {most} with this rule"),
                self.experts,
            ));
        }
        self.validate_lanes(OPERATION, "with this rule")?;
        if score == Score::SparseMixer {
            if self.top_k > 2 {
                return Err(Error::unsupported(OPERATION, "top_k", "1 or 2 with Score::SparseMixer", self.top_k));
            }
            if groups.is_some() {
                return Err(Error::unsupported(OPERATION, "groups", "none with Score::SparseMixer", "Some"));
            }
            if !(jitter.is_finite() && jitter >= 0.0) {
                return Err(Error::invalid(OPERATION, "jitter", "a finite number of at least 0", jitter));
            }
        }
        let Some(Appended { count, weight, .. }) = appended else { return Ok(()) };
        shape::positive(OPERATION, "appended.count", count)?;
        if self.all_choices() > shape::LANES {
            let supported = format!("at most {} with top_k", shape::LANES);
            return Err(Error::unsupported(OPERATION, "appended.count", supported, count));
        }
        match weight {
            AppendedWeight::Column if matches!(score, Score::Softmax | Score::SparseMixer) => {
                let supported =
                    format!("AppendedWeight::Fixed with Score::{score:?}, which shares 1 among the experts");
                Err(Error::unsupported(OPERATION, "appended.weight", supported, "AppendedWeight::Column"))
            }
            AppendedWeight::Fixed(weight) if !weight.is_finite() => {
                Err(Error::invalid(OPERATION, "appended.weight", "a finite number", weight))
            }
            _ => Ok(()),
        }
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
        if masked == Masked::Zero && self.gating.chooses_logits() && count > 1 {
            let supported = "Masked::Out where the choice is by logits: 0 is no score there";
            return Err(Error::unsupported(OPERATION, "groups.masked", supported, "Masked::Zero"));
        }
        let terms = score.terms();
        if terms == 0 || (terms > size && count > 1) {
            let expected = format!("the sum of 1 to {size} choice values, as groups have {size} experts");
            return Err(Error::invalid(OPERATION, "groups.score", expected, format!("{score:?}")));
        }
        let chooses = self.gating.choice != ChoiceBy::Given;
        if kept * size < self.top_k && masked == Masked::Out && chooses {
            let expected = format!("at most {kept} groups kept * {size} experts = {}", kept * size);
            return Err(Error::invalid(OPERATION, "top_k", expected, self.top_k));
        }
        Ok(())
    }
}

/// The kernel of a rule for `experts` experts: the rule's own, else the one for all rules.
pub(crate) fn kernel(gating: &Gating, experts: usize, dispatch: bool) -> Gate {
    let (score, widths) = match gating.is_common() {
        true => (Some(gating.score), &Gate::VALUES[..]),
        false => (None, &Gate::ANY_VALUES[..]),
    };
    let fits = |values: &&u32| 32 * **values as usize >= experts;
    let values = *widths.iter().find(fits).unwrap_or(&widths[widths.len() - 1]);
    Gate { score, values, dispatch }
}

/// Chooses kernel and grid: the fewest registers that hold a token's logits, a warp for each token up to eight blocks a
/// multiprocessor.
///
/// # Errors
/// Those of [`GatingDesc::validate`].
pub fn select(desc: &GatingDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let gate = kernel(&desc.gating, desc.experts, false);
    if desc.top_k > shape::LANES {
        let fits = |values: &u32| 32 * *values as usize >= desc.experts;
        let values = WideGate::VALUES.into_iter().find(fits).unwrap_or(WideGate::VALUES[WideGate::VALUES.len() - 1]);
        let wide = WideGate { score: desc.gating.score, values };
        let blocks = (desc.tokens as u32).div_ceil(wide.gate().warps()).min(8 * device.multiprocessors).max(1);
        return Ok(Selection::new(Kernel::GatingWide(wide), [blocks, 1, 1]));
    }
    let blocks = (desc.tokens as u32).div_ceil(gate.warps()).min(8 * device.multiprocessors).max(1);
    Ok(Selection::new(Kernel::Gating(gate), [blocks, 1, 1]))
}

/// Chooses experts and weights.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`GatingDesc::validate`]; [`Error::Unexpected`] or [`Error::Missing`] for inputs against the rule, a correction bias with
/// [`Score::TopkSoftmax`] among them; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
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
    let choices = desc.tokens * desc.all_choices();
    let dtype = args.logits.dtype();
    let logits = scope.read_any("logits", args.logits, desc.tokens * desc.columns(), dtype.bytes().into())?;
    check_correction_bias(OPERATION, &desc.gating, args.correction_bias.is_some())?;
    let bias = scope.read_some("correction_bias", args.correction_bias, desc.experts, SCALAR)?;
    let mask = args.mask.open(&scope, desc.tokens)?;
    let inputs = HeldInputs::open(&scope, &desc.gating, [desc.tokens, desc.experts, desc.top_k], args.rule)?;
    let ids = scope.write("ids", args.ids, choices, SCALAR)?;
    let weights = scope.write("weights", args.weights, choices, SCALAR)?;
    let routing = Routing {
        logits: logits.address(),
        dtype,
        correction_bias: optional(&bias),
        mask: mask.addresses(),
        inputs: inputs.addresses(),
        ids: ids.address(),
        weights: weights.address(),
    };
    let RuleWords { flags, groups, groups_kept, scale, epsilon } = RuleWords::new(&desc.gating);
    launch_rule!(
        scope,
        &selection,
        &desc.gating,
        routing.inputs,
        GatingParams or GatingAnyParams {
            logits: routing.logits.into(),
            correction_bias: routing.correction_bias.into(),
            ids: routing.ids.into(),
            weights: routing.weights.into(),
            tokens: desc.tokens as u32,
            experts: desc.experts as u32,
            top_k: desc.top_k as u32,
            groups: groups,
            groups_kept: groups_kept,
            flags: flags,
            scale: scale,
            epsilon: epsilon,
            mask: routing.mask.mask.into(),
            valid_tokens: routing.mask.valid_tokens.into(),
            token_flags: routing.token_flags(desc.gating.garbage),
        }
    )
}

/// Some scores follow the choice: there is none before it that a bias could correct, only the logit, which the rule must name.
pub(crate) fn check_correction_bias(operation: &'static str, gating: &Gating, given: bool) -> Result<(), Error> {
    if given && gating.choice == ChoiceBy::Score && !gating.score.precedes_choice() {
        let reason = "the rule has no scores before the choice; ChoiceBy::Logit adds it to logits";
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
    pub(crate) inputs: InputAddresses<'a>,
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
        self.mask.flags() | garbage | logit_flags(self.dtype)
    }
}

/// The type of logits as bits of `token_flags`.
pub(crate) fn logit_flags(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::Bf16 => 4,
        Dtype::F16 => 4 | 8,
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
        assert_eq!(fault(GatingDesc { top_k: 65, ..desc() }), "top_k");
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
    fn faults_of_rules_without_kernels_of_their_own() {
        let of = |gating: Gating| GatingDesc { gating, ..desc() };
        let sigmoid = Gating::new(Score::Sigmoid);
        for p in [0.0, -1.0, f32::NAN] {
            assert_eq!(fault(of(sigmoid.renormalise(Some(Renormalise::PNorm(p))))), "renormalise");
        }
        assert_eq!(of(sigmoid.renormalise(Some(Renormalise::PNorm(f32::INFINITY)))).validate(), Ok(()));
        assert_eq!(fault(of(Gating::new(Score::SparseMixer))), "top_k");
        let mixer = |gating| GatingDesc { top_k: 2, ..of(gating) };
        assert_eq!(mixer(Gating::new(Score::SparseMixer)).validate(), Ok(()));
        assert_eq!(fault(mixer(Gating::new(Score::SparseMixer).jitter(-0.1))), "jitter");
        assert_eq!(fault(mixer(Gating::new(Score::SparseMixer).groups(Some(Groups::new(8, 4))))), "groups");
        let column = |score, count| of(Gating::new(score).appended(Some(Appended::new(count, AppendedWeight::Column))));
        assert_eq!(column(Score::Sigmoid, 24).validate(), Ok(()));
        assert_eq!(fault(column(Score::Sigmoid, 0)), "appended.count");
        assert_eq!(fault(column(Score::Sigmoid, 25)), "appended.count");
        assert_eq!(fault(column(Score::Softmax, 1)), "appended.weight");
        let fixed = |weight| of(sigmoid.appended(Some(Appended::new(1, AppendedWeight::Fixed(weight)))));
        assert_eq!(fixed(1.0).validate(), Ok(()));
        assert_eq!(fault(fixed(f32::INFINITY)), "appended.weight");
        assert_eq!(fault(GatingDesc { experts: 1025, ..of(sigmoid.expert_scale(true)) }), "experts");
        let by_logit = sigmoid.choice(ChoiceBy::Logit).groups(Some(Groups::new(8, 4).masked(Masked::Zero)));
        assert_eq!(fault(of(by_logit)), "groups.masked");
        // Nothing is chosen: too few eligible experts are no matter.
        let few = Groups::new(32, 4).score(GroupScore::Max);
        let given = GatingDesc { experts: 32, ..of(sigmoid.groups(Some(few)).choice(ChoiceBy::Given)) };
        assert_eq!(given.validate(), Ok(()));
    }

    #[test]
    fn rules_of_common_models_have_kernels_of_their_own() {
        let score = |gating: Gating| kernel(&gating, 64, false).score;
        let softmax = Gating::new(Score::Softmax);
        assert_eq!(score(softmax), Some(Score::Softmax));
        assert_eq!(score(softmax.renormalise(Some(Renormalise::PNorm(1.0)))), Some(Score::Softmax));
        assert_eq!(score(softmax.renormalise(Some(Renormalise::PNorm(2.0)))), None);
        assert_eq!(score(softmax.choice(ChoiceBy::Given)), None);
        assert_eq!(score(Gating::new(Score::SqrtSoftplus)), None);
    }

    #[test]
    fn too_few_eligible_experts() {
        let desc = GatingDesc { experts: 32, ..grouped(32, 4, GroupScore::Max) };
        let error = desc.validate().unwrap_err().to_string();
        assert_eq!(error, "gating: `top_k` is 8, expected at most 4 groups kept * 1 experts = 4");
    }

    #[test]
    fn many_choices_have_kernels_of_their_own() {
        for (experts, top_k, values) in [(33, 33, 8), (256, 64, 8), (257, 40, 32), (4096, 64, 128)] {
            let desc = GatingDesc { experts, top_k, ..desc() };
            let Kernel::GatingWide(wide) = select(&desc, &A100).unwrap().kernel.variant() else { unreachable!() };
            assert_eq!(wide.values, values, "{top_k} of {experts}");
        }
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
