//! A rule as the kernels' parameters.

use super::inputs::InputAddresses;
use crate::rules::{AppendedWeight, ChoiceBy, Gating, IdFormat, Masked, Renormalise, Score};
use crate::runtime::params::Pointer;

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
            // The 1-norm of weights, none of which is negative, is their sum.
            Some(Renormalise::PNorm(_)) => (RENORMALISE, 0.0),
        };
        let (mut groups, mut groups_kept) = (1, 1);
        if let Some(of) = gating.groups.filter(|groups| groups.count > 1 && gating.choice != ChoiceBy::Given) {
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

/// Where the score's number ends.
const BY_LOGIT: u32 = 8;
const P_NORM: u32 = 16;
const JOINTLY: u32 = 32;
const WIDE_IDS: u32 = 64;
const WIDE_WORDS: u32 = 128;
const COLUMNS: u32 = 256;

/// The rest of a rule, as the kernels take it that know every rule.
pub(crate) struct AnyWords<'a> {
    pub(crate) rules: u32,
    pub(crate) appended: u32,
    pub(crate) appended_weight: f32,
    /// The p of a p-norm.
    pub(crate) power: f32,
    /// Twice SparseMixer's jitter.
    pub(crate) mixer_limit: f32,
    pub(crate) expert_scale: Pointer<'a>,
    pub(crate) global_scale: Pointer<'a>,
    pub(crate) given: Pointer<'a>,
    pub(crate) words: Pointer<'a>,
    pub(crate) vocabulary: u32,
}

impl<'a> AnyWords<'a> {
    pub(crate) fn new(gating: &Gating, inputs: InputAddresses<'a>) -> AnyWords<'a> {
        let mut rules = match gating.score {
            Score::Softmax => 0,
            Score::TopkSoftmax => 1,
            Score::Sigmoid => 2,
            Score::SqrtSoftplus => 3,
            Score::SparseMixer => 4,
        };
        if gating.chooses_logits() {
            rules |= BY_LOGIT;
        }
        let mut power = 1.0;
        if let Some(Renormalise::PNorm(p)) = gating.renormalise.filter(|rule| *rule != Renormalise::PNorm(1.0)) {
            rules |= P_NORM;
            // The kernel multiplies logarithms by it, of which that of 1 is 0.
            power = p.min(f32::MAX);
        }
        let (mut appended, mut appended_weight) = (0, 0.0);
        if let Some(more) = gating.appended {
            appended = more.count as u32;
            match more.weight {
                AppendedWeight::Column => rules |= COLUMNS,
                AppendedWeight::Fixed(weight) => appended_weight = weight,
            }
            let sum_alone = matches!(gating.renormalise, Some(Renormalise::Plus(0.0) | Renormalise::PNorm(1.0)));
            if more.has_columns() && gating.score == Score::Sigmoid && sum_alone {
                rules |= JOINTLY;
            }
        }
        let (mut given, mut words, mut vocabulary) = (Pointer::NULL, Pointer::NULL, 0);
        if let Some(ids) = inputs.given {
            given = ids.ids.into();
            if ids.format == IdFormat::I64 {
                rules |= WIDE_IDS;
            }
            if let Some((at, format, of)) = ids.rows {
                (words, vocabulary) = (at.into(), of as u32);
                if format == IdFormat::I64 {
                    rules |= WIDE_WORDS;
                }
            }
        }
        AnyWords {
            rules,
            appended,
            appended_weight,
            power,
            mixer_limit: 2.0 * gating.jitter,
            expert_scale: inputs.expert_scale.into(),
            global_scale: inputs.global_scale.into(),
            given,
            words,
            vocabulary,
        }
    }
}
