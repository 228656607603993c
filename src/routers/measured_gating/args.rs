//! Buffers of a measured gating.

use super::RouterStats;
use crate::routers::gating::RuleInputs;
use crate::runtime::builder::buffers;
use crate::{In, Out, Workspace};

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
}

impl<'a> Totals<'a> {
    /// All four.
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
        }
    }
}

/// Buffers of a measured gating.
#[non_exhaustive]
pub struct MeasuredGatingArgs<'a> {
    /// `[T, E]`.
    pub logits: In<'a, f32>,
    /// `[E]`; see [`crate::routers::gating::GatingArgs`].
    pub correction_bias: Option<In<'a, f32>>,
    /// What else the rule asks for.
    pub rule: RuleInputs<'a>,
    /// `[T, k]`, written.
    pub ids: Out<'a, i32>,
    /// `[T, k]`, written.
    pub weights: Out<'a, f32>,
    /// `[T]`, written: `ln sum exp` of the token's logits.
    pub log_sum_exp: Option<Out<'a, f32>>,
    /// `[T, E]`, written: the probabilities that enter the losses.
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
        logits: impl Into<In<'a, f32>>,
        ids: impl Into<Out<'a, i32>>,
        weights: impl Into<Out<'a, f32>>,
        totals: Totals<'a>,
        stats: impl Into<Out<'a, RouterStats>>,
        workspace: &'a mut Workspace,
    ) -> MeasuredGatingArgs<'a> {
        MeasuredGatingArgs {
            logits: logits.into(),
            correction_bias: None,
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

    /// With what else the rule asks for.
    #[must_use]
    pub fn rule(self, rule: RuleInputs<'a>) -> MeasuredGatingArgs<'a> {
        MeasuredGatingArgs { rule, ..self }
    }
}

buffers!(MeasuredGatingArgs<'a> { correction_bias: In<f32>, log_sum_exp: Out<f32>, probabilities: Out<f32> });
