//! What a backward pass reads, and whether it is what the descriptors ask for.

use super::gradients::{LayerGradients, WeightGradients};
use super::{BackwardPlan, OPERATION, Origin};
use crate::experts::Weight;
use crate::layer::weights::LayerWeights;
use crate::layer::{Choices, MapTable};
use crate::rules::RmsNorm;
use crate::runtime::builder::buffers;
use crate::{Error, In};

/// Inputs and outputs of a backward pass.
#[non_exhaustive]
pub struct BackwardArgs<'a, T> {
    /// `[T, H]`: the forward pass's.
    pub x: In<'a, T>,
    /// `[T, H]`: the forward pass's, exactly where it had one.
    pub router_x: Option<In<'a, T>>,
    /// `[T, E]`: the logits that the forward pass was given, exactly with [`Origin::Logits`].
    pub given_logits: Option<In<'a, f32>>,
    /// The choices that the forward pass was given, exactly with [`Origin::Choices`] where there are experts whose output is their input, a map, or an
    /// admission that passes choices on or divides weights by what is left of them.
    pub choices: Option<Choices<'a>>,
    /// The expert map; exactly where the descriptor has one.
    pub map: Option<MapTable<'a>>,
    /// `[T, H]`: the gradient of `y`.
    pub dy: In<'a, T>,
    /// `[E]`: the slots that the balancing loss counts, only where it has a factor ([`crate::routers::measured_gating::Totals`]). If absent, this pass's
    /// ([`Saved::counts`](super::Saved::counts)), where these are all choices: without a capacity, an admission, a map, null or appended experts.
    pub loss_counts: Option<In<'a, i32>>,
    /// `[1]`: tokens of which the losses are means, T if absent.
    pub counted: Option<In<'a, u32>>,
    /// `[E]`: sums of weights, exactly where their loss has a factor ([`crate::routers::measured_gating::Totals`]).
    pub importance: Option<In<'a, f32>>,
    /// `[B, E]`: the slots that the loss by sequence counts, exactly where it has a factor.
    pub sequence_counts: Option<In<'a, i32>>,
    /// `[B]`: tokens of each sequence that count, all of them if absent.
    pub sequence_tokens: Option<In<'a, u32>>,
    /// `[E]` of the experts that are here: those with another number than 0 are frozen. Nothing is computed of their weights' gradients, whose memory is left alone; what
    /// comes through them is as ever.
    pub frozen: Option<In<'a, i32>>,
    /// What is asked for.
    pub gradients: LayerGradients<'a, T>,
}

impl<'a, T> BackwardArgs<'a, T> {
    /// From `dy` to `gradients`.
    pub fn new(
        x: impl Into<In<'a, T>>,
        dy: impl Into<In<'a, T>>,
        gradients: LayerGradients<'a, T>,
    ) -> BackwardArgs<'a, T> {
        BackwardArgs {
            x: x.into(),
            router_x: None,
            given_logits: None,
            choices: None,
            map: None,
            dy: dy.into(),
            loss_counts: None,
            counted: None,
            importance: None,
            sequence_counts: None,
            sequence_tokens: None,
            frozen: None,
            gradients,
        }
    }
}

impl<'a, T> BackwardArgs<'a, T> {
    /// By choices that another router made.
    #[must_use]
    pub fn choices(self, choices: Choices<'a>) -> BackwardArgs<'a, T> {
        BackwardArgs { choices: Some(choices), ..self }
    }

    /// With an expert map.
    #[must_use]
    pub fn map(self, map: MapTable<'a>) -> BackwardArgs<'a, T> {
        BackwardArgs { map: Some(map), ..self }
    }
}

buffers!(BackwardArgs<'a, T> {
    router_x: In<T>,
    given_logits: In<f32>,
    loss_counts: In<i32>,
    counted: In<u32>,
    importance: In<f32>,
    sequence_counts: In<i32>,
    sequence_tokens: In<u32>,
    frozen: In<i32>,
});
impl BackwardPlan {
    /// Entries of the expert map.
    pub(super) fn map_entries(&self) -> usize {
        let desc = self.layer().desc();
        desc.map.map_or(0, |map| desc.all_experts() * map.max_replicas)
    }

    pub(super) fn check_args<T>(
        &self,
        args: &BackwardArgs<'_, T>,
        weights: &LayerWeights<'_>,
        other_rows: bool,
    ) -> Result<(), Error> {
        let operation = OPERATION;
        let exactly =
            |argument, there: bool, given: bool, [missing, unexpected]: [&'static str; 2]| match (there, given) {
                (true, false) => Err(Error::Missing { operation, argument, reason: missing }),
                (false, true) => Err(Error::Unexpected { operation, argument, reason: unexpected }),
                _ => Ok(()),
            };
        let origin = self.desc().origin;
        let reasons = ["the forward pass had other rows for the router", "the forward pass had none"];
        exactly("router_x", other_rows, args.router_x.is_some(), reasons)?;
        if !other_rows && args.gradients.router_x.is_some() {
            let reason = "the router saw x";
            return Err(Error::Unexpected { operation, argument: "gradients.router_x", reason });
        }
        let reasons = ["the forward pass was given logits", "the logits were the layer's own"];
        exactly("given_logits", origin == Origin::Logits, args.given_logits.is_some(), reasons)?;
        let reasons = ["identities or an admission are read off them", "the forward pass's are not needed"];
        exactly("choices", self.asks_choices(), args.choices.is_some(), reasons)?;
        let reasons = ["the descriptor maps experts", "the descriptor has no map"];
        exactly("map", self.layer().desc().map.is_some(), args.map.is_some(), reasons)?;
        let balances = self.desc().losses.is_some_and(|losses| losses.balance != 0.0);
        let reasons = ["the balancing loss has a factor", "no balancing loss has a factor"];
        let given = args.loss_counts.is_some() || balances && self.counts_choices();
        exactly("loss_counts", balances, given, reasons)?;
        let losses = self.desc().losses;
        let of_weights = losses.is_some_and(|losses| losses.importance != 0.0);
        let reasons = ["the loss of importance has a factor", "no loss of importance has a factor"];
        exactly("importance", of_weights, args.importance.is_some(), reasons)?;
        let by_sequence = losses.is_some_and(|losses| losses.sequence != 0.0);
        let reasons = ["the loss by sequence has a factor", "no loss by sequence has a factor"];
        exactly("sequence_counts", by_sequence, args.sequence_counts.is_some(), reasons)?;
        if args.sequence_tokens.is_some() && !by_sequence {
            return Err(Error::Unexpected { operation, argument: "sequence_tokens", reason: reasons[1] });
        }
        if args.counted.is_some() && self.desc().losses.is_none() {
            return Err(Error::Unexpected { operation, argument: "counted", reason: "there are no losses" });
        }
        if origin == Origin::Choices && args.gradients.logits.is_some() {
            let reason = "the choices come from elsewhere";
            return Err(Error::Unexpected { operation, argument: "gradients.logits", reason });
        }
        let (of_router, gating) = (&args.gradients.router, &self.layer().desc().gating);
        let (asked, gates) = (origin == Origin::Router, origin != Origin::Choices);
        let unasked = "the layer's router was not asked";
        for (argument, there, given, reason) in [
            ("gradients.router.matrix", asked, of_router.matrix.is_some(), unasked),
            ("gradients.router.bias", asked, of_router.bias.is_some(), unasked),
            (
                "gradients.router.expert_scale",
                gates && gating.expert_scale,
                of_router.expert_scale.is_some(),
                "no rule multiplies by it",
            ),
            (
                "gradients.router.global_scale",
                gates && gating.global_scale,
                of_router.global_scale.is_some(),
                "no rule multiplies by it",
            ),
        ] {
            if given && !there {
                return Err(Error::Unexpected { operation, argument, reason });
            }
        }
        let weighs = |norm: Option<RmsNorm>| norm.is_some_and(|norm| norm.gain.has_weight());
        let (norms, latent) = (&self.layer().desc().norms, self.layer().desc().latent);
        for (argument, there, given) in [
            ("gradients.router.norm", asked && weighs(norms.router), of_router.norm.is_some()),
            ("gradients.norms.experts", weighs(norms.experts), args.gradients.norms.experts.is_some()),
            ("gradients.norms.slots", weighs(norms.slots), args.gradients.norms.slots.is_some()),
            ("gradients.norms.output", weighs(norms.output), args.gradients.norms.output.is_some()),
            (
                "gradients.latent.norm",
                weighs(latent.and_then(|latent| latent.norm)),
                args.gradients.latent.norm.is_some(),
            ),
        ] {
            if given && !there {
                let reason = "no norm with a weight stands there";
                return Err(Error::Unexpected { operation, argument, reason });
            }
        }
        let (experts, of) = (&weights.experts, &args.gradients);
        let shared = experts.shared.as_ref();
        let has = |weight: Option<&Weight<'_>>| {
            let up = weight.and_then(|weight| weight.up).and_then(|(_, bias)| bias);
            [weight.and_then(|weight| weight.bias).is_some(), up.is_some()]
        };
        let asks = |gradients: &WeightGradients<'_>| [gradients.bias.is_some(), gradients.up_bias.is_some()];
        let projections = experts.latent.as_ref();
        for ([bias, up_bias], there, given) in [
            (
                ["gradients.latent.input.bias", "gradients.latent.input.up_bias"],
                has(projections.map(|latent| &latent.input)),
                asks(&of.latent.input),
            ),
            (
                ["gradients.latent.output.bias", "gradients.latent.output.up_bias"],
                has(projections.map(|latent| &latent.output)),
                asks(&of.latent.output),
            ),
            (["gradients.gate_up.bias", "gradients.gate_up.up_bias"], has(Some(&experts.gate_up)), asks(&of.gate_up)),
            (["gradients.down.bias", "gradients.down.up_bias"], has(Some(&experts.down)), asks(&of.down)),
            (
                ["gradients.shared.gate_up.bias", "gradients.shared.gate_up.up_bias"],
                has(shared.map(|shared| &shared.gate_up)),
                asks(&of.shared.gate_up),
            ),
            (
                ["gradients.shared.down.bias", "gradients.shared.down.up_bias"],
                has(shared.map(|shared| &shared.down)),
                asks(&of.shared.down),
            ),
        ] {
            for (argument, there, given) in [(bias, there[0], given[0]), (up_bias, there[1], given[1])] {
                if given && !there {
                    let reason = "the weight has no bias";
                    return Err(Error::Unexpected { operation, argument, reason });
                }
            }
        }
        Ok(())
    }

    /// Whether every choice has a row among the experts that are here: counts of rows are counts of choices.
    pub(super) fn counts_choices(&self) -> bool {
        let desc = self.layer().desc();
        let elsewhere = desc.capacity.is_some() || desc.admission.is_some() || desc.map.is_some();
        !elsewhere && desc.null.is_none() && desc.gating.appended_experts() == 0
    }

    /// Sequences of the loss by sequence.
    pub(super) fn sequences(&self) -> usize {
        self.gating.as_ref().map_or(1, |step| step.desc.sequences())
    }
}
