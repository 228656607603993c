//! From a layer's descriptor to kernels, grids and places.

use super::regions::Regions;
use crate::capacity::admission::{self, AdmissionDesc};
use crate::capacity::dispatch::{self, DispatchDesc};
use crate::capacity::expert_map::{self, ExpertMapDesc};
use crate::experts::dispatched::SlotShape;
use crate::experts::gemm::choice::height;
use crate::experts::rms_norm::{self, RmsNormDesc};
use crate::experts::tiles::{lowest_tile, max_tiles, select_tile_of};
use crate::layer::desc::LayerDesc;
use crate::layer::experts::{check_widths, joined_products};
use crate::layer::{OPERATION, Stage, Step};
use crate::routers::gating::{self, GatingDesc};
use crate::routers::gating_dispatch::{self, GatingDispatchDesc};
use crate::routers::measured_gating::{self, MeasuredGatingDesc};
use crate::routers::route;
use crate::routers::router::{self, RouterDesc};
use crate::rules::{Dtype, IdFormat};
use crate::runtime::shape;
use crate::runtime::workspace::Arena;
use crate::{DeviceInfo, Error, Selection, registry};

/// A layer's way from tokens to rows: kernels, grids, and places in the workspace.
#[derive(Clone, Copy, Debug)]
pub struct RoutePlan {
    pub(in crate::layer) desc: LayerDesc,
    pub(super) device: DeviceInfo,
    pub(super) tokens: usize,
    /// Norm of what the router sees.
    pub(super) norm: Option<Step<RmsNormDesc>>,
    pub(super) router: Step<RouterDesc>,
    /// The same with a shared expert's gate, in a whole layer that has one.
    pub(super) gated_router: Step<RouterDesc>,
    pub(super) choice: Choice,
    /// Router and choice in one launch, of few tokens.
    pub(super) together: Option<registry::Route>,
    pub(super) admission: Option<Step<AdmissionDesc>>,
    pub(super) map: Option<Step<ExpertMapDesc>>,
    pub(super) dispatch: Step<DispatchDesc>,
    pub(in crate::layer) regions: Regions,
    pub(super) workspace_bytes: usize,
}

/// How experts are chosen.
#[derive(Clone, Copy, Debug)]
pub(super) enum Choice {
    /// In one launch with the dispatch.
    WithDispatch(Step<GatingDispatchDesc>),
    /// In a launch of its own.
    Gating(Step<GatingDesc>),
    /// In a launch of its own that measures the batch.
    Measured(Step<MeasuredGatingDesc>),
}

impl RoutePlan {
    pub(in crate::layer) fn new(
        desc: &LayerDesc,
        tokens: usize,
        device: &DeviceInfo,
    ) -> Result<(RoutePlan, Arena), Error> {
        let within = |error: Error| error.within(OPERATION);
        let &LayerDesc { dtype, router_dtype, hidden, experts, top_k, gating, .. } = desc;
        // What a norm hands to a router in f32 is not rounded in between.
        let router_x = if desc.norms.router.is_some() && router_dtype == Dtype::F32 { Dtype::F32 } else { dtype };
        let router = RouterDesc::new(router_x, tokens, desc.logit_columns(), hidden)
            .weight(router_dtype)
            .logits(desc.logits)
            .batch_invariant(desc.batch_invariant);
        let step = |desc| Ok::<_, Error>(Step { desc, selection: router::select(&desc, device).map_err(within)? });
        let (router, gated_router) = (step(router)?, step(router.shared_gate(desc.has_shared_gate()))?);

        if desc.norms.router.is_some() && desc.has_shared_gate() {
            let supported = "no norm of the router's input beside a gated shared expert";
            return Err(Error::unsupported(OPERATION, "norms.router", supported, "one"));
        }
        let norm = desc.norms.router.map(|norm| {
            let desc = RmsNormDesc::new(dtype, tokens, hidden, norm).output(router_x);
            Ok::<_, Error>(Step { desc, selection: rms_norm::select_for(OPERATION, &desc, device)? })
        });
        let norm = norm.transpose()?;

        check_null(desc)?;
        let (of_token, local_experts) = (desc.all_choices(), desc.local_experts());
        // The height of a tile follows from numbers of slots, experts and columns, whatever it is.
        check_widths(desc)?;
        DispatchDesc::new(tokens, local_experts, of_token, 1).validate().map_err(within)?;
        let slots = tokens * of_token;
        let tile = select_tile_of(desc.kernels(), dtype, slots, local_experts, device).map_err(within)?;
        let rows = SlotShape::new(tokens, local_experts, Some(of_token), slots, tile.bm as usize, 0);
        let tile_m = height(&joined_products(desc, &rows), tile.bm, device) as usize;
        let dispatch = DispatchDesc::new(tokens, local_experts, of_token, tile_m).capacity(desc.capacity);
        let dispatch = Step { desc: dispatch, selection: dispatch::select(&dispatch, device).map_err(within)? };

        let candidates = desc.admission.map_or(top_k, |rule| rule.candidates);
        let gating = GatingDesc::new(tokens, experts, candidates, gating);
        let alone = desc.measure.is_none() && desc.admission.is_none() && desc.map.is_none();
        let null_experts = desc.null.map_or(0, |null| null.count);
        let both = |gating, dispatch| GatingDispatchDesc::new(gating, dispatch).null_experts(null_experts);
        let choice = match desc.measure {
            // Without blocks that are all resident, one block would do all of the gating: two launches take many for it.
            None if alone && device.cooperative_launch && candidates <= shape::LANES => {
                let both = both(gating.gating, dispatch.desc);
                let selection = gating_dispatch::select(&both, device).map_err(within)?;
                Choice::WithDispatch(Step { desc: both, selection })
            }
            None => Choice::Gating(Step { desc: gating, selection: gating::select(&gating, device).map_err(within)? }),
            Some(rule) => {
                let mut measured = MeasuredGatingDesc::new(gating);
                measured.rule = rule;
                let selection = measured_gating::select(&measured, device).map_err(within)?;
                Choice::Measured(Step { desc: measured, selection })
            }
        };
        let together = match &choice {
            Choice::WithDispatch(step) => route::candidate(&router.desc, &step.desc),
            _ => None,
        };
        let admission = desc.admission.map(|rule| {
            if (rule.experts, rule.top_k) != (experts, top_k) {
                let expected = format!("a rule for {experts} experts and top_k {top_k}");
                let got = format!("one for {} and {}", rule.experts, rule.top_k);
                return Err(Error::invalid(OPERATION, "admission", expected, got));
            }
            if desc.gating.appended.is_some() {
                let supported = "no appended experts, where an admission drops choices";
                return Err(Error::unsupported(OPERATION, "gating.appended", supported, "Some"));
            }
            if desc.choices == IdFormat::I64 {
                let supported = "ids of 32 bits, where an admission looks at them";
                return Err(Error::unsupported(OPERATION, "choices", supported, "IdFormat::I64"));
            }
            let desc = AdmissionDesc::new(tokens, rule);
            Ok(Step { desc, selection: admission::select(&desc, device).map_err(within)? })
        });
        let admission = admission.transpose()?;
        let map = desc.map.map(|map| {
            let desc =
                ExpertMapDesc::new(tokens, desc.all_experts(), of_token).max_replicas(map.max_replicas).seed(map.seed);
            Ok::<_, Error>(Step { desc, selection: expert_map::select(&desc, device).map_err(within)? })
        });
        let map = map.transpose()?;

        // Monotone in the number of tokens, so that a workspace for the largest batch serves all: tiles are bounded as if they were of
        // the least height, whichever they are.
        let scratch = [
            dispatch::workspace_bytes(&dispatch.desc, device).map_err(within)?,
            gating_dispatch::workspace_bytes(&both(gating.gating, dispatch.desc), device).unwrap_or(0),
            route::scratch_bytes(&both(gating.gating, dispatch.desc)),
            match &choice {
                Choice::Measured(step) => measured_gating::workspace_bytes(&step.desc, device).map_err(within)?,
                _ => 0,
            },
            match &admission {
                Some(step) => admission::workspace_bytes(&step.desc).map_err(within)?,
                None => 0,
            },
        ];
        let slots = dispatch.desc.slots();
        let most_tiles = max_tiles(tokens * of_token, local_experts, lowest_tile(dtype, device));
        let (choices, all) = (tokens * of_token, if admission.is_some() { tokens * candidates } else { 0 });
        let mut arena = Arena::new(OPERATION);
        let regions = Regions {
            scratch: arena.region("workspace", scratch.into_iter().max().unwrap_or(0), 1)?,
            router_x: arena.region(
                "norms.router",
                if norm.is_some() { tokens * hidden } else { 0 },
                router_x.bytes() as usize,
            )?,
            logits: arena.region("logits", tokens * desc.logit_columns(), 4)?,
            candidates: arena.region("candidates", all, 4)?,
            candidate_weights: arena.region("candidates", all, 4)?,
            ids: arena.region("ids", choices, 4)?,
            weights: arena.region("weights", choices, 4)?,
            local_ids: arena.region("local_ids", if map.is_some() { choices } else { 0 }, 4)?,
            identity_weight: arena.region("identity_weight", if map.is_some() { tokens } else { 0 }, 4)?,
            counts: arena.region("counts", local_experts, 4)?,
            offsets: arena.region("offsets", local_experts + 1, 4)?,
            slot_token: arena.region("slot_token", slots, 4)?,
            token_slot: arena.region("token_slot", choices, 4)?,
            slot_weight: arena.region("slot_weight", slots, 4)?,
            tiles: arena.region("tiles", most_tiles, 16)?,
            num_tiles: arena.region("num_tiles", 1, 4)?,
        };
        let workspace_bytes = arena.bytes();
        let plan = RoutePlan {
            desc: *desc,
            device: *device,
            tokens,
            norm,
            router,
            gated_router,
            choice,
            together,
            admission,
            map,
            dispatch,
            regions,
            workspace_bytes,
        };
        Ok((plan, arena))
    }

    /// The shape of the dispatch: what a [`crate::experts::Dispatched`] is made for.
    pub fn rows(&self) -> SlotShape {
        self.dispatch.desc.shape()
    }

    /// Size of the workspace in bytes.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    /// The stages with their launches, in order. None with no tokens.
    pub fn stages(&self) -> impl Iterator<Item = (Stage, Selection)> + use<> {
        self.stages_of(self.router)
    }

    /// [`RoutePlan::stages`] in a whole layer, where the router has a shared expert's gate too.
    pub(in crate::layer) fn stages_with_gate(&self) -> impl Iterator<Item = (Stage, Selection)> + use<> {
        self.stages_of(self.gated_router)
    }

    fn stages_of(&self, router: Step<RouterDesc>) -> impl Iterator<Item = (Stage, Selection)> + use<> {
        let norm = self.norm.filter(|_| self.tokens > 0).map(|step| (Stage::RouterNorm, step.selection));
        let together = self.together.map(|kernel| (Stage::Route, route::selection(kernel, &router.desc, &self.device)));
        let apart = together.is_none();
        let product = Some((Stage::Router, router.selection)).filter(|_| apart && self.tokens > 0);
        let choice = self.stages_of_logits().filter(move |_| apart);
        norm.into_iter().chain(together).chain(product).chain(choice)
    }

    /// The stages with their launches where the logits come from elsewhere.
    pub(in crate::layer) fn stages_of_logits(&self) -> impl Iterator<Item = (Stage, Selection)> + use<> {
        let choice = match self.choice {
            Choice::WithDispatch(step) => (Stage::GateDispatch, step.selection),
            Choice::Gating(step) => (Stage::Gate, step.selection),
            Choice::Measured(step) => (Stage::Gate, step.selection),
        };
        let dispatch = (choice.0 == Stage::Gate).then_some((Stage::Dispatch, self.dispatch.selection));
        let tokens = self.tokens;
        [choice]
            .into_iter()
            .chain(self.admission.map(|step| (Stage::Admission, step.selection)))
            .chain(self.map.map(|step| (Stage::Map, step.selection)))
            .chain(dispatch)
            .filter(move |_| tokens > 0)
    }

    /// The stages with their launches where the choices come from elsewhere.
    pub fn stages_of_choices(&self) -> impl Iterator<Item = (Stage, Selection)> + use<> {
        let (mut map, mut dispatch) = (self.map.map(|step| step.selection), self.dispatch.selection);
        // What looks at ids first takes them as they are stored.
        if self.admission.is_none() {
            let ids_bytes = self.desc.choices.bytes();
            match (&mut map, dispatch.kernel.variant()) {
                (Some(map), _) => map.kernel = registry::Kernel::ExpertMap { ids_bytes }.into(),
                (None, registry::Kernel::Dispatch(kernel)) => {
                    dispatch.kernel = registry::Kernel::Dispatch(registry::Dispatch { ids_bytes, ..kernel }).into();
                }
                _ => {}
            }
        }
        let tokens = self.tokens;
        self.admission
            .map(|step| (Stage::Admission, step.selection))
            .into_iter()
            .chain(map.map(|selection| (Stage::Map, selection)))
            .chain([(Stage::Dispatch, dispatch)])
            .filter(move |_| tokens > 0)
    }
}

/// Experts that compute nothing leave some that do, and nothing else says what becomes of a choice.
fn check_null(desc: &LayerDesc) -> Result<(), Error> {
    let Some(null) = desc.null else { return Ok(()) };
    if null.count >= desc.experts {
        let expected = format!("less than all {} experts", desc.experts);
        return Err(Error::invalid(OPERATION, "null.count", expected, null.count));
    }
    let beside = [
        ("map", desc.map.is_some()),
        ("admission", desc.admission.is_some()),
        ("gating.appended", desc.gating.appended.is_some()),
    ];
    if let Some((argument, _)) = beside.into_iter().find(|(_, there)| *there) {
        return Err(Error::unsupported(OPERATION, argument, "none beside null experts", "Some"));
    }
    Ok(())
}
