//! The first part: which experts each token goes to, and the rows that follow.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::desc::LayerDesc;
use super::experts::check_device;
use super::weights::{HeldRouter, RouterWeights};
use super::{OPERATION, Stage, Step};
use crate::capacity::Ids;
use crate::capacity::admission::{self, AdmissionArgs, AdmissionDesc};
use crate::capacity::dispatch::{self, DispatchDesc};
use crate::capacity::expert_map::{self, ExpertMapArgs, ExpertMapDesc};
use crate::experts::dispatched::{Dispatched, ListAddresses, SlotShape};
use crate::experts::tiles::{lowest_tile, max_tiles, select_tile};
use crate::registry;
use crate::routers::gating::{self, GatingArgs, GatingDesc, Routing};
use crate::routers::gating_dispatch::{self, GatingDispatchDesc};
use crate::routers::measured_gating::{self, MeasuredGatingArgs, MeasuredGatingDesc, RouterStats, Totals};
use crate::routers::router::{self, RouterDesc};
use crate::rules::IdFormat;
use crate::runtime::builder::buffers;
use crate::runtime::launch::{Address, Held, SCALAR, Scope, VECTOR, optional};
use crate::runtime::workspace::{Arena, Region};
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection, Workspace};

/// A layer's way from tokens to rows: kernels, grids, and places in the workspace.
#[derive(Clone, Copy, Debug)]
pub struct RoutePlan {
    pub(super) desc: LayerDesc,
    device: DeviceInfo,
    tokens: usize,
    router: Step<RouterDesc>,
    /// The same with a shared expert's gate, in a whole layer that has one.
    gated_router: Step<RouterDesc>,
    choice: Choice,
    admission: Option<Step<AdmissionDesc>>,
    map: Option<Step<ExpertMapDesc>>,
    dispatch: Step<DispatchDesc>,
    pub(super) regions: Regions,
    workspace_bytes: usize,
}

/// How experts are chosen.
#[derive(Clone, Copy, Debug)]
enum Choice {
    /// In one launch with the dispatch.
    WithDispatch(Step<GatingDispatchDesc>),
    /// In a launch of its own.
    Gating(Step<GatingDesc>),
    /// In a launch of its own that measures the batch.
    Measured(Step<MeasuredGatingDesc>),
}

/// Places in the workspace.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Regions {
    /// First, at 0: the grid barrier, and what kernels that meet at it or work alone keep behind it.
    scratch: Region,
    logits: Region,
    /// Candidates and their weights, where admission has a say.
    candidates: Region,
    candidate_weights: Region,
    ids: Region,
    weights: Region,
    /// Ids as this device knows them, where there is a map.
    local_ids: Region,
    identity_weight: Region,
    counts: Region,
    offsets: Region,
    slot_token: Region,
    token_slot: Region,
    slot_weight: Region,
    tiles: Region,
    num_tiles: Region,
}

impl RoutePlan {
    pub(super) fn new(desc: &LayerDesc, tokens: usize, device: &DeviceInfo) -> Result<(RoutePlan, Arena), Error> {
        let within = |error: Error| error.within(OPERATION);
        let &LayerDesc { dtype, router_dtype, hidden, experts, top_k, gating, .. } = desc;
        let router =
            RouterDesc::new(dtype, tokens, experts, hidden).weight(router_dtype).batch_invariant(desc.batch_invariant);
        let step = |desc| Ok::<_, Error>(Step { desc, selection: router::select(&desc, device).map_err(within)? });
        let (router, gated_router) = (step(router)?, step(router.shared_gate(desc.has_shared_gate()))?);

        // The height of a tile follows from the number of slots, which is checked by `validate` below.
        let (slots, local_experts) = (tokens.saturating_mul(top_k), desc.local_experts());
        let tile_m = select_tile(dtype, slots, local_experts, device).map_err(within)?.bm as usize;
        let dispatch = DispatchDesc::new(tokens, local_experts, top_k, tile_m).capacity(desc.capacity);
        let dispatch = Step { desc: dispatch, selection: dispatch::select(&dispatch, device).map_err(within)? };

        let candidates = desc.admission.map_or(top_k, |rule| rule.candidates);
        let gating = GatingDesc::new(tokens, experts, candidates, gating);
        let alone = desc.measure.is_none() && desc.admission.is_none() && desc.map.is_none();
        let choice = match desc.measure {
            // Without blocks that are all resident, one block would do all of the gating: two launches take many for it.
            None if alone && device.cooperative_launch => {
                let both = GatingDispatchDesc::new(gating.gating, dispatch.desc);
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
        let admission = desc.admission.map(|rule| {
            if (rule.experts, rule.top_k) != (experts, top_k) {
                let expected = format!("a rule for {experts} experts and top_k {top_k}");
                let got = format!("one for {} and {}", rule.experts, rule.top_k);
                return Err(Error::invalid(OPERATION, "admission", expected, got));
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
            let desc = ExpertMapDesc::new(tokens, experts, top_k).max_replicas(map.max_replicas).seed(map.seed);
            Ok::<_, Error>(Step { desc, selection: expert_map::select(&desc, device).map_err(within)? })
        });
        let map = map.transpose()?;

        // Monotone in the number of tokens, so that a workspace for the largest batch serves all: tiles are bounded as if they were of
        // the least height, whichever they are.
        let scratch = [
            dispatch::workspace_bytes(&dispatch.desc, device).map_err(within)?,
            gating_dispatch::workspace_bytes(&GatingDispatchDesc::new(gating.gating, dispatch.desc), device)
                .unwrap_or(0),
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
        let most_tiles = max_tiles(tokens * top_k, local_experts, lowest_tile(dtype, device));
        let (choices, all) = (tokens * top_k, if admission.is_some() { tokens * candidates } else { 0 });
        let mut arena = Arena::new(OPERATION);
        let regions = Regions {
            scratch: arena.region("workspace", scratch.into_iter().max().unwrap_or(0), 1)?,
            logits: arena.region("logits", tokens * experts, 4)?,
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
            router,
            gated_router,
            choice,
            admission,
            map,
            dispatch,
            regions,
            workspace_bytes,
        };
        Ok((plan, arena))
    }

    /// The shape of the dispatch: what a [`Dispatched`] is made for.
    pub fn rows(&self) -> SlotShape {
        self.dispatch.desc.shape()
    }

    /// Size of the workspace in bytes.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    /// The stages with their launches, in order. None with no tokens.
    pub fn stages(&self) -> impl Iterator<Item = (Stage, Selection)> + use<> {
        self.stages_after(self.router)
    }

    /// [`RoutePlan::stages`] in a whole layer, where the router has a shared expert's gate too.
    pub(super) fn stages_with_gate(&self) -> impl Iterator<Item = (Stage, Selection)> + use<> {
        self.stages_after(self.gated_router)
    }

    fn stages_after(&self, router: Step<RouterDesc>) -> impl Iterator<Item = (Stage, Selection)> + use<> {
        let choice = match self.choice {
            Choice::WithDispatch(step) => (Stage::GateDispatch, step.selection),
            Choice::Gating(step) => (Stage::Gate, step.selection),
            Choice::Measured(step) => (Stage::Gate, step.selection),
        };
        let dispatch = (choice.0 == Stage::Gate).then_some((Stage::Dispatch, self.dispatch.selection));
        let tokens = self.tokens;
        [(Stage::Router, router.selection), choice]
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

    /// Chooses experts for `x` and lays out their rows.
    ///
    /// With no tokens nothing is launched, and the dispatch has no rows.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Unexpected`] for weights and buffers against the descriptor; [`Error::Invalid`] for a plan made for
    /// another device; those of a buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`], [`Error::Misaligned`],
    /// [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those of the driver.
    #[allow(clippy::too_many_arguments)]
    pub fn forward<'x, T: Element>(
        &self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        weights: &RouterWeights<'_>,
        x: impl Into<In<'x, T>>,
        args: RouteArgs<'_>,
        dispatched: &mut Dispatched,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        let scope = Scope::begin(OPERATION, kernels, stream)?;
        check_device(&scope, &self.device)?;
        scope.check_dtype::<T>("x", self.desc.dtype)?;
        let weights = weights.open(&scope, &self.desc)?;
        let lists = dispatched.fill(&scope, &self.rows())?;
        if self.tokens == 0 {
            lists.zero(&scope)?;
            lists.filled();
            return self.without_tokens(&scope, args);
        }
        let x = scope.read("x", x.into(), self.tokens * self.desc.hidden, VECTOR)?;
        let workspace = workspace.open(&scope, self.workspace_bytes)?;
        let (held, mut extras) = HeldRoute::open(&scope, self, args)?;
        let at = RouteAddresses::new(self, &workspace, &held, lists.addresses());
        self.enqueue_router(&scope, &weights, x.address(), None, &at, &mut |_| ())?;
        self.enqueue_choice(&scope, &weights, &workspace, &mut extras, &at, &mut |_| ())?;
        lists.filled();
        Ok(())
    }

    /// Lays out the rows of choices that another router made, after admission and map as the descriptor says.
    ///
    /// `choices` are `[T, K]` with the admission's `candidates`, else `[T, k]`; ids outside `0..E` are choices of nothing.
    ///
    /// # Errors
    /// Those of [`RoutePlan::forward`].
    pub fn forward_choices(
        &self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        choices: Choices<'_>,
        args: RouteArgs<'_>,
        dispatched: &mut Dispatched,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        let scope = Scope::begin(OPERATION, kernels, stream)?;
        check_device(&scope, &self.device)?;
        let lists = dispatched.fill(&scope, &self.rows())?;
        if self.tokens == 0 {
            lists.zero(&scope)?;
            lists.filled();
            return self.without_tokens(&scope, args);
        }
        let given = self.tokens * self.candidates();
        let ids = self.open_ids(&scope, choices.ids)?;
        let weights = scope.read("choices.weights", choices.weights, given, SCALAR)?;
        let workspace = workspace.open(&scope, self.workspace_bytes)?;
        let (held, mut extras) = HeldRoute::open(&scope, self, args)?;
        let at = RouteAddresses::new(self, &workspace, &held, lists.addresses());
        let choices = ChoiceAddresses { format: self.desc.choices, ids: ids.address(), weights: weights.address() };
        self.enqueue_rows(&scope, &workspace, &mut extras, &at, choices, &mut |_| ())?;
        lists.filled();
        Ok(())
    }

    /// Opens the ids of choices from elsewhere.
    pub(super) fn open_ids<'b, 'c: 'b>(&self, scope: &Scope<'b>, ids: Ids<'c>) -> Result<Held<'b>, Error> {
        ids.open(scope, "choices.ids", self.desc.choices, self.tokens * self.candidates())
    }

    pub(super) fn candidates(&self) -> usize {
        self.desc.admission.map_or(self.desc.top_k, |rule| rule.candidates)
    }

    /// The result for no tokens: what is summed up over tokens is zero.
    pub(super) fn without_tokens(&self, scope: &Scope<'_>, args: RouteArgs<'_>) -> Result<(), Error> {
        let (local, experts) = (self.desc.local_experts(), self.desc.experts);
        if let Some(counts) = scope.write_some("counts", args.counts, local, SCALAR)? {
            scope.zero(counts.address(), local * size_of::<i32>())?;
        }
        let Some(measured) = args.measured else { return Ok(()) };
        let bytes = experts * size_of::<i32>();
        let Totals { counts, loss_counts, probability, importance, .. } = measured.totals;
        scope.zero(scope.write("totals.counts", counts, experts, SCALAR)?.address(), bytes)?;
        scope.zero(scope.write("totals.loss_counts", loss_counts, experts, SCALAR)?.address(), bytes)?;
        scope.zero(scope.write("totals.probability", probability, experts, SCALAR)?.address(), bytes)?;
        scope.zero(scope.write("totals.importance", importance, experts, SCALAR)?.address(), bytes)?;
        scope.zero(scope.write("stats", measured.stats, 1, SCALAR)?.address(), size_of::<RouterStats>())
    }

    /// The logits; with `gate`, weight and logits of a shared expert's gate, those too.
    pub(super) fn enqueue_router(
        &self,
        scope: &Scope<'_>,
        weights: &HeldRouter<'_>,
        x: Address<'_>,
        gate: Option<(Address<'_>, Address<'_>)>,
        at: &RouteAddresses<'_>,
        observer: &mut dyn FnMut(Stage),
    ) -> Result<(), Error> {
        let addresses = router::Addresses {
            x,
            weight: Some(weights.matrix.address()),
            bias: optional(&weights.bias),
            logits: Some(at.logits),
            gate,
        };
        let step = if gate.is_some() { &self.gated_router } else { &self.router };
        router::enqueue(scope, &step.desc, &step.selection, addresses)?;
        observer(Stage::Router);
        Ok(())
    }

    /// From logits to rows.
    pub(super) fn enqueue_choice(
        &self,
        scope: &Scope<'_>,
        weights: &HeldRouter<'_>,
        workspace: &Held<'_>,
        extras: &mut Extras<'_>,
        at: &RouteAddresses<'_>,
        observer: &mut dyn FnMut(Stage),
    ) -> Result<(), Error> {
        let correction_bias = optional(&weights.correction_bias);
        if let Choice::WithDispatch(step) = &self.choice {
            let routing = Routing { logits: at.logits, correction_bias, ids: at.ids, weights: at.weights };
            let lists = dispatch::Outputs::of(at.lists, true);
            let scratch = workspace.at(self.regions.scratch);
            gating_dispatch::enqueue(scope, &step.desc, &step.selection, routing, lists, scratch)?;
            observer(Stage::GateDispatch);
            return Ok(());
        }
        let given = self.tokens * self.candidates();
        let [ids, chosen_weights] = if self.admission.is_some() {
            [self.regions.candidates, self.regions.candidate_weights].map(|region| workspace.at(region))
        } else {
            [at.ids, at.weights]
        };
        let logits = at.logits.input(self.tokens * self.desc.experts);
        let bias = correction_bias.map(|bias| bias.input(self.desc.experts));
        let (kernels, stream) = (scope.kernels, scope.stream);
        match &self.choice {
            Choice::Measured(step) => {
                let Some(measured) = extras.measured.as_mut() else {
                    let reason = "the descriptor measures the batch";
                    return Err(Error::Missing { operation: OPERATION, argument: "measured", reason });
                };
                let mut scratch = workspace.part(self.regions.scratch);
                let totals = Totals {
                    counts: measured.totals.counts.reborrow(),
                    loss_counts: measured.totals.loss_counts.reborrow(),
                    probability: measured.totals.probability.reborrow(),
                    importance: measured.totals.importance.reborrow(),
                };
                let (ids, weights) = (ids.out(given), chosen_weights.out(given));
                let mut args =
                    MeasuredGatingArgs::new(logits, ids, weights, totals, measured.stats.reborrow(), &mut scratch);
                args.correction_bias = bias;
                args.log_sum_exp = measured.log_sum_exp.as_mut().map(Out::reborrow);
                args.probabilities = measured.probabilities.as_mut().map(Out::reborrow);
                measured_gating::forward(kernels, stream, &step.desc, args).map_err(|error| error.within(OPERATION))?;
            }
            Choice::Gating(step) => {
                let mut args = GatingArgs::new(logits, ids.out(given), chosen_weights.out(given));
                args.correction_bias = bias;
                gating::forward(kernels, stream, &step.desc, args).map_err(|error| error.within(OPERATION))?;
            }
            Choice::WithDispatch(_) => {}
        }
        observer(Stage::Gate);
        let choices = ChoiceAddresses { format: IdFormat::I32, ids, weights: chosen_weights };
        self.enqueue_rows(scope, workspace, extras, at, choices, observer)
    }

    /// From choices `[T, candidates]` to rows: admission, map, dispatch.
    pub(super) fn enqueue_rows(
        &self,
        scope: &Scope<'_>,
        workspace: &Held<'_>,
        extras: &mut Extras<'_>,
        at: &RouteAddresses<'_>,
        choices: ChoiceAddresses<'_>,
        observer: &mut dyn FnMut(Stage),
    ) -> Result<(), Error> {
        let within = |error: Error| error.within(OPERATION);
        let (kernels, stream) = (scope.kernels, scope.stream);
        let ChoiceAddresses { mut format, mut ids, mut weights } = choices;
        let (choices, given) = (self.tokens * self.desc.top_k, self.tokens * self.candidates());
        if let Some(step) = &self.admission {
            let mut scratch = workspace.part(self.regions.scratch);
            let mut args = AdmissionArgs::new(
                ids.input(given),
                weights.input(given),
                at.ids.out(choices),
                at.weights.out(choices),
                &mut scratch,
            );
            args.priority = extras.priority.take();
            args.noise_state = extras.noise_state.take();
            admission::forward(kernels, stream, &step.desc, args).map_err(within)?;
            observer(Stage::Admission);
            (format, ids, weights) = (IdFormat::I32, at.ids, at.weights);
        }
        if let Some(step) = &self.map {
            let Some(map) = extras.map.take() else {
                let reason = "the descriptor maps experts";
                return Err(Error::Missing { operation: OPERATION, argument: "map", reason });
            };
            let (global, local) = (format_of(ids, format, choices), at.local_ids.out(choices));
            let mut args = ExpertMapArgs::new(global, map.map, local);
            args.weights = Some(weights.input(choices));
            args.replicas = map.replicas;
            args.identity_weight = Some(at.identity_weight.out(self.tokens));
            expert_map::forward(kernels, stream, &step.desc.ids(format), args).map_err(within)?;
            observer(Stage::Map);
            (format, ids) = (IdFormat::I32, at.local_ids);
        }
        let (desc, scratch) = (self.dispatch.desc.ids(format), workspace.at(self.regions.scratch));
        let selection = dispatch::select(&desc, kernels.device()).map_err(within)?;
        let lists = dispatch::Outputs::of(at.lists, true);
        dispatch::enqueue(scope, &desc, &selection, ids, Some(weights), lists, scratch)?;
        observer(Stage::Dispatch);
        Ok(())
    }
}

/// What the choice of experts reads and writes beside `x`; what no buffer is given for stays in the workspace.
#[derive(Default)]
#[non_exhaustive]
pub struct RouteArgs<'a> {
    /// `[T, E]`, written: the router's logits.
    pub logits: Option<Out<'a, f32>>,
    /// `[T, k]`, written: chosen experts, after admission.
    pub ids: Option<Out<'a, i32>>,
    /// `[T, k]`, written: their weights.
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
}

impl<'a> RouteArgs<'a> {
    /// Nothing beside the rows.
    pub fn new() -> RouteArgs<'a> {
        RouteArgs::default()
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
}

buffers!(RouteArgs<'a> {
    logits: Out<f32>,
    ids: Out<i32>,
    weights: Out<f32>,
    counts: Out<i32>,
    priority: In<f32>,
    noise_state: In<u64>,
    identity_weight: Out<f32>,
});

/// What a measured gating writes: see [`measured_gating`].
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
    /// `[T, k]`: experts, stored as the descriptor says; one outside `0..E` is a choice of nothing.
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

/// Choices `[T, candidates]` and how their ids are stored.
#[derive(Clone, Copy)]
pub(super) struct ChoiceAddresses<'a> {
    pub(super) format: IdFormat,
    pub(super) ids: Address<'a>,
    pub(super) weights: Address<'a>,
}

/// Ids at an address as the buffer that they are.
fn format_of(ids: Address<'_>, format: IdFormat, len: usize) -> Ids<'_> {
    match format {
        IdFormat::I32 => Ids::I32(ids.input(len)),
        IdFormat::U32 => Ids::U32(ids.input(len)),
        IdFormat::I64 => Ids::I64(ids.input(len)),
    }
}

/// What is handed on to an operation as it came.
pub(super) struct Extras<'a> {
    priority: Option<In<'a, f32>>,
    noise_state: Option<In<'a, u64>>,
    measured: Option<Measured<'a>>,
    map: Option<MapTable<'a>>,
}

/// A route's own buffers, opened.
pub(super) struct HeldRoute<'a> {
    logits: Option<Held<'a>>,
    ids: Option<Held<'a>>,
    weights: Option<Held<'a>>,
    counts: Option<Held<'a>>,
    identity_weight: Option<Held<'a>>,
}

impl<'a> HeldRoute<'a> {
    /// What is opened here, and what is handed on.
    pub(super) fn open<'c: 'a>(
        scope: &Scope<'a>,
        plan: &RoutePlan,
        args: RouteArgs<'c>,
    ) -> Result<(HeldRoute<'a>, Extras<'c>), Error> {
        let (tokens, desc) = (plan.tokens, &plan.desc);
        let choices = tokens * desc.top_k;
        let unexpected = |argument, reason| Err(Error::Unexpected { operation: OPERATION, argument, reason });
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
        let held = HeldRoute {
            logits: scope.write_some("logits", args.logits, tokens * desc.experts, SCALAR)?,
            ids: scope.write_some("ids", args.ids, choices, SCALAR)?,
            weights: scope.write_some("weights", args.weights, choices, SCALAR)?,
            counts: scope.write_some("counts", args.counts, desc.local_experts(), SCALAR)?,
            identity_weight: scope.write_some("identity_weight", args.identity_weight, tokens, SCALAR)?,
        };
        let RouteArgs { priority, noise_state, measured, map, .. } = args;
        Ok((held, Extras { priority, noise_state, measured, map }))
    }
}

/// Where everything lies: the caller's buffers, else the workspace's regions.
#[derive(Clone, Copy)]
pub(super) struct RouteAddresses<'a> {
    pub(super) logits: Address<'a>,
    pub(super) ids: Address<'a>,
    pub(super) weights: Address<'a>,
    local_ids: Address<'a>,
    pub(super) identity_weight: Address<'a>,
    pub(super) lists: ListAddresses<'a>,
}

impl<'a> RouteAddresses<'a> {
    pub(super) fn new(
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
            weights: optional(&held.weights).unwrap_or_else(|| at(regions.weights)),
            local_ids: at(regions.local_ids),
            identity_weight: optional(&held.identity_weight).unwrap_or_else(|| at(regions.identity_weight)),
            lists: ListAddresses { counts: optional(&held.counts).unwrap_or(lists.counts), ..lists },
        }
    }
}

impl Regions {
    /// A dispatch's lists inside the workspace.
    pub(super) fn lists<'a>(&self, workspace: &'a Held<'_>) -> ListAddresses<'a> {
        ListAddresses {
            counts: workspace.at(self.counts),
            offsets: workspace.at(self.offsets),
            slot_token: workspace.at(self.slot_token),
            token_slot: workspace.at(self.token_slot),
            token_offsets: workspace.at(self.offsets),
            slot_weight: workspace.at(self.slot_weight),
            tiles: workspace.at(self.tiles),
            num_tiles: workspace.at(self.num_tiles),
        }
    }
}
