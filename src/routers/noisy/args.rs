//! Buffers of a noisy gating.

use crate::runtime::builder::buffers;
use crate::{In, Out, TokenMask, Workspace};

/// The router's two products.
#[non_exhaustive]
pub enum NoisyLogits<'a> {
    /// Two matrices.
    Apart {
        /// `[T, E]`, `x Wg`.
        clean: In<'a, f32>,
        /// `[T, E]`, `x Wnoise`.
        raw: In<'a, f32>,
    },
    /// `[T, 2E]`, a token's `x Wg` and then its `x Wnoise`: one router product with the weights one below the other.
    Together(In<'a, f32>),
}

impl<'a> NoisyLogits<'a> {
    /// Two matrices.
    pub fn apart(clean: impl Into<In<'a, f32>>, raw: impl Into<In<'a, f32>>) -> NoisyLogits<'a> {
        NoisyLogits::Apart { clean: clean.into(), raw: raw.into() }
    }

    /// One matrix, of which a row holds both.
    pub fn together(logits: impl Into<In<'a, f32>>) -> NoisyLogits<'a> {
        NoisyLogits::Together(logits.into())
    }
}

/// Sums over tokens, and the losses that follow from them.
#[non_exhaustive]
pub struct NoisySums<'a> {
    /// `[E]`, written: tokens of each expert.
    pub counts: Out<'a, i32>,
    /// `[E]`, written: `Importance(X)`, sums of weights (eq. 6).
    pub importance: Out<'a, f32>,
    /// `[E]`, written: `Load(X)`, the smooth estimate of `counts` (eq. 10).
    pub load: Out<'a, f32>,
    /// `[2]`, written: `CV(importance)^2` and `CV(load)^2` (eq. 7 and 11).
    pub losses: Out<'a, f32>,
}

impl<'a> NoisySums<'a> {
    /// All four.
    pub fn new(
        counts: impl Into<Out<'a, i32>>,
        importance: impl Into<Out<'a, f32>>,
        load: impl Into<Out<'a, f32>>,
        losses: impl Into<Out<'a, f32>>,
    ) -> NoisySums<'a> {
        NoisySums { counts: counts.into(), importance: importance.into(), load: load.into(), losses: losses.into() }
    }
}

/// Buffers of a noisy gating.
#[non_exhaustive]
pub struct NoisyArgs<'a> {
    /// The router's products.
    pub logits: NoisyLogits<'a>,
    /// `[T, k]`, written: experts by falling `H`.
    pub ids: Out<'a, i32>,
    /// `[T, k]`, written: softmax of the kept `H`.
    pub weights: Out<'a, f32>,
    /// `[T, E]`, written: `H`.
    pub noisy: Option<Out<'a, f32>>,
    /// `[T, 2]`, written: the k-th and the k+1-th largest `H`, -Inf where there is none; a kept expert's load compares with the second,
    /// another's with the first.
    pub thresholds: Option<Out<'a, f32>>,
    /// `[2]`, 8-byte aligned: see [`crate::routers::noise_state`]. Absent, the rule's seed and offset are all there is.
    pub noise_state: Option<In<'a, u64>>,
    /// Which tokens count: the others have ids -1 and weights 0, and are in no sum. Their rows of `noisy` and `thresholds` are not written.
    pub mask: TokenMask<'a>,
    /// Sums and losses, with a workspace of at least [`super::workspace_bytes`]. Without them nothing is summed, and more blocks run at once.
    pub sums: Option<(NoisySums<'a>, &'a mut Workspace)>,
}

impl<'a> NoisyArgs<'a> {
    /// `logits` to `ids` and `weights`, nothing else.
    pub fn new(
        logits: NoisyLogits<'a>,
        ids: impl Into<Out<'a, i32>>,
        weights: impl Into<Out<'a, f32>>,
    ) -> NoisyArgs<'a> {
        NoisyArgs {
            logits,
            ids: ids.into(),
            weights: weights.into(),
            noisy: None,
            thresholds: None,
            noise_state: None,
            mask: TokenMask::all(),
            sums: None,
        }
    }

    /// With padding among the tokens.
    #[must_use]
    pub fn mask(self, mask: TokenMask<'a>) -> NoisyArgs<'a> {
        NoisyArgs { mask, ..self }
    }

    /// With [`sums`](Self#structfield.sums).
    #[must_use]
    pub fn sums(mut self, sums: NoisySums<'a>, workspace: &'a mut Workspace) -> Self {
        self.sums = Some((sums, workspace));
        self
    }
}

buffers!(NoisyArgs<'a> { noisy: Out<f32>, thresholds: Out<f32>, noise_state: In<u64> });
