//! Buffers of a gating's backward pass.

use crate::experts::Dispatched;
use crate::experts::choice_backward::Admitted;
use crate::runtime::builder::buffers;
use crate::{In, Out, Tensor, TokenMask, Workspace};

/// Buffers of a gating's backward pass.
#[non_exhaustive]
pub struct GatingBackwardArgs<'a> {
    /// `[T, E]`, those of the forward pass, of any [`crate::Element`]; `[T, E + appended]` where appended experts have columns.
    pub logits: Tensor<'a>,
    /// `[T, k + appended]`: what was chosen. One that is no expert's is no choice; without a mask, a token of which none is an expert's is padding,
    /// without a gradient.
    pub ids: In<'a, i32>,
    /// `[parts, T, k + appended]`: gradients of the weights, parts added up in order; those of no choice are not used. With `dispatched`
    /// `[parts, slots]`, by slot.
    pub d_weights: In<'a, f32>,
    /// The dispatch that `ids` went through, whose slots `d_weights` are of
    /// ([`crate::experts::activation_backward::ActivationBackwardArgs::d_slot_weight`]). A choice without a slot has no gradient of its own; its score
    /// is in the sums that others were divided by.
    pub dispatched: Option<&'a Dispatched>,
    /// What an admission made of `ids` before they were dispatched: `dispatched` is of that, of `n` choices a token, and the gradients go back through it
    /// ([`crate::capacity::admission_backward`]).
    pub admitted: Option<Admitted<'a>>,
    /// Experts whose output is their input among what was dispatched; with `dispatched`.
    pub identities: Option<IdentityRows<'a>>,
    /// `[T, k + appended]`, written: the gradients of the choices' weights, without what losses add.
    pub d_choices: Option<Out<'a, f32>>,
    /// Which tokens count. Without, those that have a choice.
    pub mask: TokenMask<'a>,
    /// `[E]`, with [`crate::rules::Gating::expert_scale`].
    pub expert_scale: Option<In<'a, f32>>,
    /// `[1]`, with [`crate::rules::Gating::global_scale`].
    pub global_scale: Option<In<'a, f32>>,
    /// `[E]`: the slots that the balancing loss counts, exactly where it has a factor.
    pub counts: Option<In<'a, i32>>,
    /// `[1]`: tokens of which balancing loss and z-loss are means, T if absent. The first word of
    /// [`crate::routers::measured_gating::RouterStats`].
    pub counted: Option<In<'a, u32>>,
    /// `[E]`: sums of weights, exactly where their loss has a factor.
    pub importance: Option<In<'a, f32>>,
    /// `[B, E]`: the slots of each sequence that the loss by sequence counts, exactly where it has a factor
    /// ([`crate::routers::sequence_counts`]).
    pub sequence_counts: Option<In<'a, i32>>,
    /// `[B]`: tokens of each sequence that count; all of them if absent.
    pub sequence_tokens: Option<In<'a, u32>>,
    /// `[T, E]`, written, or added to: as wide as `logits`.
    pub d_logits: Out<'a, f32>,
    /// `[E]`, written, or added to: the gradient of `expert_scale`.
    pub d_expert_scale: Option<Out<'a, f32>>,
    /// `[1]`, written, or added to: the gradient of `global_scale`.
    pub d_global_scale: Option<Out<'a, f32>>,
    /// At least [`super::workspace_bytes`], where gradients of factors are asked for.
    pub workspace: Option<&'a mut Workspace>,
}

impl<'a> GatingBackwardArgs<'a> {
    /// `d_weights` of `ids` to `d_logits`.
    pub fn new(
        logits: impl Into<Tensor<'a>>,
        ids: impl Into<In<'a, i32>>,
        d_weights: impl Into<In<'a, f32>>,
        d_logits: impl Into<Out<'a, f32>>,
    ) -> GatingBackwardArgs<'a> {
        GatingBackwardArgs {
            logits: logits.into(),
            ids: ids.into(),
            d_weights: d_weights.into(),
            dispatched: None,
            admitted: None,
            identities: None,
            d_choices: None,
            mask: TokenMask::all(),
            expert_scale: None,
            global_scale: None,
            counts: None,
            counted: None,
            importance: None,
            sequence_counts: None,
            sequence_tokens: None,
            d_logits: d_logits.into(),
            d_expert_scale: None,
            d_global_scale: None,
            workspace: None,
        }
    }

    /// With `d_weights` by the slots of `dispatched`.
    #[must_use]
    pub fn dispatched(self, dispatched: &'a Dispatched) -> GatingBackwardArgs<'a> {
        GatingBackwardArgs { dispatched: Some(dispatched), ..self }
    }

    /// Back through an admission.
    #[must_use]
    pub fn admitted(self, admitted: Admitted<'a>) -> GatingBackwardArgs<'a> {
        GatingBackwardArgs { admitted: Some(admitted), ..self }
    }

    /// With experts whose output is their input.
    #[must_use]
    pub fn identities(self, identities: IdentityRows<'a>) -> GatingBackwardArgs<'a> {
        GatingBackwardArgs { identities: Some(identities), ..self }
    }

    /// With padding among the tokens.
    #[must_use]
    pub fn mask(self, mask: TokenMask<'a>) -> GatingBackwardArgs<'a> {
        GatingBackwardArgs { mask, ..self }
    }

    /// With memory for the sums of factors' gradients.
    #[must_use]
    pub fn workspace(self, workspace: &'a mut Workspace) -> GatingBackwardArgs<'a> {
        GatingBackwardArgs { workspace: Some(workspace), ..self }
    }
}

buffers!(GatingBackwardArgs<'a> {
    expert_scale: In<f32>,
    global_scale: In<f32>,
    counts: In<i32>,
    counted: In<u32>,
    importance: In<f32>,
    sequence_counts: In<i32>,
    sequence_tokens: In<u32>,
    d_choices: Out<f32>,
    d_expert_scale: Out<f32>,
    d_global_scale: Out<f32>,
});

/// Experts whose output is their input: the gradient of such a choice's weight is `scale <dy[t], x[t]>`.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct IdentityRows<'a> {
    /// Which numbers are such experts, where there is no map; at most `i32::MAX`.
    pub experts: (u32, u32),
    /// `[E, R]`: an expert map, in which the row of an identity begins with [`crate::rules::IDENTITY`]; and R.
    pub map: Option<(In<'a, i32>, usize)>,
    /// Columns `H` of the rows.
    pub hidden: usize,
    /// `[T, H]`: the experts' input.
    pub x: Tensor<'a>,
    /// `[T, H]`, of the type of `x`: the gradient of the sum.
    pub dy: Tensor<'a>,
    /// Factor of the sum over the experts.
    pub scale: f32,
}

impl<'a> IdentityRows<'a> {
    /// Those of the rows' choices that are one of `experts`.
    pub fn new(
        experts: std::ops::Range<u32>,
        hidden: usize,
        x: impl Into<Tensor<'a>>,
        dy: impl Into<Tensor<'a>>,
    ) -> IdentityRows<'a> {
        let experts = (experts.start, experts.end);
        IdentityRows { experts, map: None, hidden, x: x.into(), dy: dy.into(), scale: 1.0 }
    }

    /// Those whose row of `map [E, columns]` begins with an identity.
    pub fn of_map(
        map: impl Into<In<'a, i32>>,
        columns: usize,
        hidden: usize,
        x: impl Into<Tensor<'a>>,
        dy: impl Into<Tensor<'a>>,
    ) -> IdentityRows<'a> {
        IdentityRows { map: Some((map.into(), columns)), ..IdentityRows::new(0..0, hidden, x, dy) }
    }

    /// With a factor of the sum over the experts.
    #[must_use]
    pub fn scale(self, scale: f32) -> IdentityRows<'a> {
        IdentityRows { scale, ..self }
    }
}
