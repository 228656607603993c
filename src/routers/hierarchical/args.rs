//! Buffers of a hierarchical gating.

use crate::routers::noisy::{NoisyLogits, NoisySums};
use crate::runtime::builder::buffers;
use crate::{In, Out, TokenMask, Workspace};

/// Which groups tokens go to, and the sums of it.
#[non_exhaustive]
pub struct PrimaryOutputs<'a> {
    /// `[T, K]`, written: groups by falling noisy logit.
    pub ids: Out<'a, i32>,
    /// `[T, K]`, written: `G_primary`.
    pub weights: Out<'a, f32>,
    /// `[G]` each, and `[2]`, written: tokens, importance and load of each group, and the losses over groups.
    pub sums: NoisySums<'a>,
    /// `[T, G]`, written: noisy logits.
    pub noisy: Option<Out<'a, f32>>,
    /// `[T, 2]`, written; see [`crate::routers::noisy::NoisyArgs::thresholds`].
    pub thresholds: Option<Out<'a, f32>>,
}

impl<'a> PrimaryOutputs<'a> {
    /// Groups, their weights and sums, nothing else.
    pub fn new(
        ids: impl Into<Out<'a, i32>>,
        weights: impl Into<Out<'a, f32>>,
        sums: NoisySums<'a>,
    ) -> PrimaryOutputs<'a> {
        PrimaryOutputs { ids: ids.into(), weights: weights.into(), sums, noisy: None, thresholds: None }
    }
}

buffers!(PrimaryOutputs<'a> { noisy: Out<f32>, thresholds: Out<f32> });

/// Buffers of a hierarchical gating.
#[non_exhaustive]
pub struct HierarchicalArgs<'a> {
    /// `[T, G]` twice, or `[T, 2G]`.
    pub primary_logits: NoisyLogits<'a>,
    /// `[T, G, E]` twice, or `[T, G, 2E]`. Rows of groups that a token did not choose are not read.
    pub logits: NoisyLogits<'a>,
    /// What the first level writes.
    pub primary: PrimaryOutputs<'a>,
    /// `[T, K, k]`, written: `g E + e`; those of a token's first group come first.
    pub ids: Out<'a, i32>,
    /// `[T, K, k]`, written.
    pub weights: Out<'a, f32>,
    /// `[T, K, E]`, written: noisy logits of the experts of each chosen group.
    pub noisy: Option<Out<'a, f32>>,
    /// `[T, K, 2]`, written; see [`crate::routers::noisy::NoisyArgs::thresholds`].
    pub thresholds: Option<Out<'a, f32>>,
    /// `[G, E]` each, and `[2]`, written: slots of each expert, `Importance_H(X)`, `Load_H(X)`, and the squares of their coefficients of
    /// variation.
    pub sums: NoisySums<'a>,
    /// `[2]`, 8-byte aligned: see [`crate::routers::noise_state`]. Both levels take it. Absent, seed and offset of the two rules are all there is.
    pub noise_state: Option<In<'a, u64>>,
    /// Which tokens count; all by default. The others get ids -1 and weights 0 on both levels and are in no sum; their noisy logits and thresholds
    /// are not written.
    pub mask: TokenMask<'a>,
    /// At least [`super::workspace_bytes`].
    pub workspace: &'a mut Workspace,
}

impl<'a> HierarchicalArgs<'a> {
    /// Logits of both levels to what the first writes, `ids`, `weights` and `sums`.
    pub fn new(
        primary_logits: NoisyLogits<'a>,
        logits: NoisyLogits<'a>,
        primary: PrimaryOutputs<'a>,
        ids: impl Into<Out<'a, i32>>,
        weights: impl Into<Out<'a, f32>>,
        sums: NoisySums<'a>,
        workspace: &'a mut Workspace,
    ) -> HierarchicalArgs<'a> {
        HierarchicalArgs {
            primary_logits,
            logits,
            primary,
            ids: ids.into(),
            weights: weights.into(),
            noisy: None,
            thresholds: None,
            sums,
            noise_state: None,
            mask: TokenMask::all(),
            workspace,
        }
    }

    /// With padding among the tokens.
    #[must_use]
    pub fn mask(self, mask: TokenMask<'a>) -> HierarchicalArgs<'a> {
        HierarchicalArgs { mask, ..self }
    }
}

buffers!(HierarchicalArgs<'a> { noisy: Out<f32>, thresholds: Out<f32>, noise_state: In<u64> });
