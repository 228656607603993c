//! Where a route's values lie: the caller's buffers, else the workspace.

use super::args::{MapTable, Measured, RouteArgs};
use super::plan::RoutePlan;
use crate::capacity::Ids;
use crate::experts::dispatched::ListAddresses;
use crate::layer::OPERATION;
use crate::routers::gating::{self, GivenAddress, HeldGiven};
use crate::rules::IdFormat;
use crate::runtime::launch::{Address, Held, SCALAR, Scope, optional};
use crate::runtime::token_mask::{HeldMask, MaskAddresses};
use crate::runtime::workspace::Region;
use crate::{Error, In};

/// Choices `[T, candidates]` and how their ids are stored.
#[derive(Clone, Copy)]
pub(in crate::layer) struct ChoiceAddresses<'a> {
    pub(in crate::layer) format: IdFormat,
    pub(in crate::layer) ids: Address<'a>,
    pub(in crate::layer) weights: Address<'a>,
}

/// Ids at an address as the buffer that they are.
pub(in crate::layer) fn format_of(ids: Address<'_>, format: IdFormat, len: usize) -> Ids<'_> {
    match format {
        IdFormat::I32 => Ids::I32(ids.input(len)),
        IdFormat::U32 => Ids::U32(ids.input(len)),
        IdFormat::I64 => Ids::I64(ids.input(len)),
    }
}

/// What is handed on to an operation as it came.
pub(in crate::layer) struct Extras<'a> {
    pub(super) priority: Option<In<'a, f32>>,
    pub(super) noise_state: Option<In<'a, u64>>,
    pub(super) measured: Option<Measured<'a>>,
    pub(super) map: Option<MapTable<'a>>,
}

/// A route's own buffers, opened.
pub(in crate::layer) struct HeldRoute<'a> {
    /// The caller's, written or given.
    logits: Option<Held<'a>>,
    ids: Option<Held<'a>>,
    candidates: Option<Held<'a>>,
    candidate_weights: Option<Held<'a>>,
    weights: Option<Held<'a>>,
    counts: Option<Held<'a>>,
    identity_weight: Option<Held<'a>>,
    mask: HeldMask<'a>,
    given: Option<HeldGiven<'a>>,
}

impl<'a> HeldRoute<'a> {
    /// What is opened here, and what is handed on. `routes`: whether the route's own router and gating are asked.
    pub(in crate::layer) fn open<'c: 'a>(
        scope: &Scope<'a>,
        plan: &RoutePlan,
        routes: bool,
        args: RouteArgs<'c>,
    ) -> Result<(HeldRoute<'a>, Extras<'c>), Error> {
        let (tokens, desc) = (plan.tokens, &plan.desc);
        let choices = tokens * desc.all_choices();
        if routes {
            gating::check_given(OPERATION, &desc.gating, args.given.is_some())?;
        }
        let unexpected = |argument, reason| Err(Error::Unexpected { operation: OPERATION, argument, reason });
        if !routes && args.given.is_some() {
            return unexpected("given", "the choices come from elsewhere");
        }
        if args.measured.is_some() && desc.measure.is_none() {
            return unexpected("measured", "the descriptor does not measure the batch");
        }
        if desc.map.is_none() {
            if args.map.is_some() {
                return unexpected("map", "the descriptor has no map");
            }
            if args.identity_weight.is_some() {
                return unexpected("identity_weight", "the descriptor has no map");
            }
        }
        if args.priority.is_some() && desc.admission.is_none() {
            return unexpected("priority", "the descriptor has no admission");
        }
        if args.noise_state.is_some() && !desc.draws() {
            return unexpected("noise_state", "the descriptor's admission draws nothing");
        }
        if args.given_logits.is_some() && args.logits.is_some() {
            return unexpected("logits", "they are given");
        }
        let logits = tokens * desc.logit_columns();
        let given_logits = scope.read_some("given_logits", args.given_logits, logits, SCALAR)?;
        let held = HeldRoute {
            given: args.given.map(|given| given.open(scope, tokens, plan.chosen())).transpose()?,
            logits: match given_logits {
                Some(given) => Some(given),
                None => scope.write_some("logits", args.logits, logits, SCALAR)?,
            },
            ids: scope.write_some("ids", args.ids, choices, SCALAR)?,
            candidates: scope.write_some("candidates", args.candidates, tokens * plan.candidates(), SCALAR)?,
            candidate_weights: scope.write_some(
                "candidates",
                args.candidate_weights,
                tokens * plan.candidates(),
                SCALAR,
            )?,
            weights: scope.write_some("weights", args.weights, choices, SCALAR)?,
            counts: scope.write_some("counts", args.counts, desc.local_experts(), SCALAR)?,
            identity_weight: scope.write_some("identity_weight", args.identity_weight, tokens, SCALAR)?,
            mask: args.mask.open(scope, tokens)?,
        };
        let RouteArgs { priority, noise_state, measured, map, .. } = args;
        Ok((held, Extras { priority, noise_state, measured, map }))
    }
}

/// Where everything lies: the caller's buffers, else the workspace's regions.
#[derive(Clone, Copy)]
pub(in crate::layer) struct RouteAddresses<'a> {
    pub(in crate::layer) logits: Address<'a>,
    pub(in crate::layer) ids: Address<'a>,
    /// What the gating chose, before an admission, and with which weights.
    pub(super) candidates: Address<'a>,
    pub(super) candidate_weights: Address<'a>,
    pub(in crate::layer) weights: Address<'a>,
    pub(super) given: Option<GivenAddress<'a>>,
    pub(super) local_ids: Address<'a>,
    pub(in crate::layer) identity_weight: Address<'a>,
    pub(super) mask: MaskAddresses<'a>,
    pub(in crate::layer) lists: ListAddresses<'a>,
}

impl<'a> RouteAddresses<'a> {
    pub(in crate::layer) fn new(
        plan: &RoutePlan,
        workspace: &'a Held<'_>,
        held: &'a HeldRoute<'_>,
        lists: ListAddresses<'a>,
    ) -> RouteAddresses<'a> {
        let at = |region: Region| workspace.at(region);
        let regions = &plan.regions;
        RouteAddresses {
            logits: optional(&held.logits).unwrap_or_else(|| at(regions.logits)),
            ids: optional(&held.ids).unwrap_or_else(|| at(regions.ids)),
            candidates: optional(&held.candidates).unwrap_or_else(|| at(regions.candidates)),
            candidate_weights: optional(&held.candidate_weights).unwrap_or_else(|| at(regions.candidate_weights)),
            weights: optional(&held.weights).unwrap_or_else(|| at(regions.weights)),
            given: held.given.as_ref().map(HeldGiven::address),
            local_ids: at(regions.local_ids),
            identity_weight: optional(&held.identity_weight).unwrap_or_else(|| at(regions.identity_weight)),
            mask: held.mask.addresses(),
            lists: ListAddresses { counts: optional(&held.counts).unwrap_or(lists.counts), ..lists },
        }
    }
}
