//! Buffers of a measured gating.

use super::RouterStats;
use crate::routers::gating::RuleInputs;
use crate::runtime::builder::buffers;
use crate::{In, Out, Tensor, TokenMask, Workspace};

/// Sums over tokens, by expert.
#[non_exhaustive]
pub struct Totals<'a> {
    /// `[E]`, written: slots that chose the expert.
    pub counts: Out<'a, i32>,
    /// `[E]`, written or added to: slots that count for the loss: all, first choices, or those of largest score.
    pub loss_counts: Out<'a, i32>,
    /// `[E]`, written or added to: sums of probabilities.
    pub probability: Out<'a, f32>,
    /// `[E]`, written: sums of weights.
    pub importance: Out<'a, f32>,
    /// `[1]`, written or added to: tokens that the loss's totals are of. Without, those of the call and
    /// [`super::MeasuredGatingDesc::earlier_tokens`], which must then be those that counted.
    pub tokens: Option<Out<'a, u32>>,
}

impl<'a> Totals<'a> {
    /// All four sums.
    pub fn new(
        counts: impl Into<Out<'a, i32>>,
        loss_counts: impl Into<Out<'a, i32>>,
        probability: impl Into<Out<'a, f32>>,
        importance: impl Into<Out<'a, f32>>,
    ) -> Totals<'a> {
        Totals {
            counts: counts.into(),
            loss_counts: loss_counts.into(),
            probability: probability.into(),
            importance: importance.into(),
            tokens: None,
        }
    }

    /// The same for a shorter time.
    pub fn reborrow(&mut self) -> Totals<'_> {
        Totals {
            counts: self.counts.reborrow(),
            loss_counts: self.loss_counts.reborrow(),
            probability: self.probability.reborrow(),
            importance: self.importance.reborrow(),
            tokens: self.tokens.as_mut().map(Out::reborrow),
        }
    }
}

buffers!(Totals<'a> { tokens: Out<u32> });

/// Buffers of a measured gating.
#[non_exhaustive]
pub struct MeasuredGatingArgs<'a> {
    /// `[T, E]`, of any [`crate::Element`].
    pub logits: Tensor<'a>,
    /// `[E]`; see [`crate::routers::gating::GatingArgs`].
    pub correction_bias: Option<In<'a, f32>>,
    /// Which tokens count: the others are in no sum, loss or mean.
    pub mask: TokenMask<'a>,
    /// What else the rule asks for.
    pub rule: RuleInputs<'a>,
    /// `[T, k]`, written.
    pub ids: Out<'a, i32>,
    /// `[T, k]`, written.
    pub weights: Out<'a, f32>,
    /// `[T]`, written: `ln sum exp` of the token's logits; 0 for a token that does not count.
    pub log_sum_exp: Option<Out<'a, f32>>,
    /// `[T, E]`, written: the probabilities that enter the losses; 0 for a token that does not count.
    pub probabilities: Option<Out<'a, f32>>,
    /// Sums by expert.
    pub totals: Totals<'a>,
    /// `[1]`, written.
    pub stats: Out<'a, RouterStats>,
    /// At least [`super::workspace_bytes`].
    pub workspace: &'a mut Workspace,
}

impl<'a> MeasuredGatingArgs<'a> {
    /// `logits` to `ids`, `weights`, `totals` and `stats`, without a correction bias.
    pub fn new(
        logits: impl Into<Tensor<'a>>,
        ids: impl Into<Out<'a, i32>>,
        weights: impl Into<Out<'a, f32>>,
        totals: Totals<'a>,
        stats: impl Into<Out<'a, RouterStats>>,
        workspace: &'a mut Workspace,
    ) -> MeasuredGatingArgs<'a> {
        MeasuredGatingArgs {
            logits: logits.into(),
            correction_bias: None,
            mask: TokenMask::all(),
            rule: RuleInputs::new(),
            ids: ids.into(),
            weights: weights.into(),
            log_sum_exp: None,
            probabilities: None,
            totals,
            stats: stats.into(),
            workspace,
        }
    }

    /// With padding among the tokens.
    #[must_use]
    pub fn mask(self, mask: TokenMask<'a>) -> MeasuredGatingArgs<'a> {
        MeasuredGatingArgs { mask, ..self }
    }

    /// With what else the rule asks for.
    #[must_use]
    pub fn rule(self, rule: RuleInputs<'a>) -> MeasuredGatingArgs<'a> {
        MeasuredGatingArgs { rule, ..self }
    }
}

buffers!(MeasuredGatingArgs<'a> { correction_bias: In<f32>, log_sum_exp: Out<f32>, probabilities: Out<f32> });
