//! What the caller hands to a route.

use crate::capacity::Ids;
use crate::routers::gating::Given;
use crate::routers::measured_gating::{RouterStats, Totals};
use crate::runtime::builder::buffers;
use crate::{In, Out, TokenMask};

/// What the choice of experts reads and writes beside `x`; what no buffer is given for stays in the workspace.
#[derive(Default)]
#[non_exhaustive]
pub struct RouteArgs<'a> {
    /// `[T, E]`, written: the router's logits, with a column for each appended expert that has one.
    pub logits: Option<Out<'a, f32>>,
    /// `[T, E]`: logits that a router of another form has made ([`crate::routers::network`]): the layer's own is not asked then. Not with `logits`.
    pub given_logits: Option<In<'a, f32>>,
    /// Ids of tokens or words, exactly with [`crate::rules::ChoiceBy::Given`].
    pub given: Option<Given<'a>>,
    /// `[T, k]`, written: chosen experts, after admission; `[T, k + appended]` where the rule appends experts.
    pub ids: Option<Out<'a, i32>>,
    /// Likewise, written: their weights.
    pub weights: Option<Out<'a, f32>>,
    /// `[local experts]`, written: rows of each expert. In parts, the dispatch has them.
    pub counts: Option<Out<'a, i32>>,
    /// `[T]`: who comes first, where the admission is prioritised.
    pub priority: Option<In<'a, f32>>,
    /// `[2]`, 8-byte aligned, where the admission draws second experts: see [`crate::routers::noise_state`].
    pub noise_state: Option<In<'a, u64>>,
    /// Losses and statistics; exactly where the descriptor measures.
    pub measured: Option<Measured<'a>>,
    /// The expert map; exactly where the descriptor has one.
    pub map: Option<MapTable<'a>>,
    /// `[T]`, written: the sum of the weights of experts whose output is their input, where there is a map.
    pub identity_weight: Option<Out<'a, f32>>,
    /// Which tokens count: the others go to no expert, and are in no loss or statistic.
    pub mask: TokenMask<'a>,
    /// `[T, candidates]`, written: what the gating chose, before an admission; only where there is one.
    pub(in crate::layer) candidates: Option<Out<'a, i32>>,
    /// Likewise, written: their weights.
    pub(in crate::layer) candidate_weights: Option<Out<'a, f32>>,
}

impl<'a> RouteArgs<'a> {
    /// Nothing beside the rows.
    pub fn new() -> RouteArgs<'a> {
        RouteArgs::default()
    }

    /// The same for a shorter time.
    pub fn reborrow(&mut self) -> RouteArgs<'_> {
        RouteArgs {
            logits: self.logits.as_mut().map(Out::reborrow),
            given_logits: self.given_logits,
            given: self.given,
            ids: self.ids.as_mut().map(Out::reborrow),
            candidates: self.candidates.as_mut().map(Out::reborrow),
            candidate_weights: self.candidate_weights.as_mut().map(Out::reborrow),
            weights: self.weights.as_mut().map(Out::reborrow),
            counts: self.counts.as_mut().map(Out::reborrow),
            priority: self.priority,
            noise_state: self.noise_state,
            measured: self.measured.as_mut().map(Measured::reborrow),
            map: self.map,
            identity_weight: self.identity_weight.as_mut().map(Out::reborrow),
            mask: self.mask,
        }
    }

    /// With ids that are given.
    #[must_use]
    pub fn given(self, given: Given<'a>) -> RouteArgs<'a> {
        RouteArgs { given: Some(given), ..self }
    }

    /// With losses and statistics.
    #[must_use]
    pub fn measured(self, measured: Measured<'a>) -> RouteArgs<'a> {
        RouteArgs { measured: Some(measured), ..self }
    }

    /// With an expert map.
    #[must_use]
    pub fn map(self, map: MapTable<'a>) -> RouteArgs<'a> {
        RouteArgs { map: Some(map), ..self }
    }

    /// With padding among the tokens.
    #[must_use]
    pub fn mask(self, mask: TokenMask<'a>) -> RouteArgs<'a> {
        RouteArgs { mask, ..self }
    }
}

buffers!(RouteArgs<'a> {
    logits: Out<f32>,
    given_logits: In<f32>,
    ids: Out<i32>,
    weights: Out<f32>,
    counts: Out<i32>,
    priority: In<f32>,
    noise_state: In<u64>,
    identity_weight: Out<f32>,
});

/// What a measured gating writes: see [`crate::routers::measured_gating`].
#[non_exhaustive]
pub struct Measured<'a> {
    /// Sums by expert.
    pub totals: Totals<'a>,
    /// `[1]`, written.
    pub stats: Out<'a, RouterStats>,
    /// `[T]`, written.
    pub log_sum_exp: Option<Out<'a, f32>>,
    /// `[T, E]`, written.
    pub probabilities: Option<Out<'a, f32>>,
}

impl<'a> Measured<'a> {
    /// Sums and losses.
    pub fn new(totals: Totals<'a>, stats: impl Into<Out<'a, RouterStats>>) -> Measured<'a> {
        Measured { totals, stats: stats.into(), log_sum_exp: None, probabilities: None }
    }

    fn reborrow(&mut self) -> Measured<'_> {
        Measured {
            totals: self.totals.reborrow(),
            stats: self.stats.reborrow(),
            log_sum_exp: self.log_sum_exp.as_mut().map(Out::reborrow),
            probabilities: self.probabilities.as_mut().map(Out::reborrow),
        }
    }
}

buffers!(Measured<'a> { log_sum_exp: Out<f32>, probabilities: Out<f32> });

/// An expert map on the device.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct MapTable<'a> {
    /// `[E, R]`: local numbers, [`crate::rules::NONE`] or [`crate::rules::IDENTITY`].
    pub map: In<'a, i32>,
    /// `[E]`: how many of an expert's row count; absent, the first alone.
    pub replicas: Option<In<'a, i32>>,
}

impl<'a> MapTable<'a> {
    /// One copy of each expert.
    pub fn new(map: impl Into<In<'a, i32>>) -> MapTable<'a> {
        MapTable { map: map.into(), replicas: None }
    }
}

buffers!(MapTable<'a> { replicas: In<i32> });

/// Choices that another router made.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Choices<'a> {
    /// `[T, k]` (`[T, k + appended]`): experts, stored as the descriptor says; one outside `0..E` (`0..E + appended`) is a choice of nothing.
    pub ids: Ids<'a>,
    /// `[T, k]`.
    pub weights: In<'a, f32>,
}

impl<'a> Choices<'a> {
    /// `ids` with `weights`.
    pub fn new(ids: impl Into<Ids<'a>>, weights: impl Into<In<'a, f32>>) -> Choices<'a> {
        Choices { ids: ids.into(), weights: weights.into() }
    }
}
