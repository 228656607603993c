//! A route's launches.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::args::{Choices, RouteArgs};
use super::places::{ChoiceAddresses, Extras, HeldRoute, RouteAddresses, format_of};
use super::plan::{Choice, RoutePlan};
use crate::capacity::admission::{self, AdmissionArgs};
use crate::capacity::expert_map::{self, ExpertMapArgs};
use crate::capacity::{Ids, dispatch};
use crate::experts::dispatched::Dispatched;
use crate::experts::rms_norm;
use crate::layer::experts::check_device;
use crate::layer::weights::{HeldRouter, RouterWeights};
use crate::layer::{OPERATION, Stage};
use crate::routers::gating::{self, GatingArgs, InputAddresses, Routing};
use crate::routers::measured_gating::{self, MeasuredGatingArgs, RouterStats, Totals};
use crate::routers::route::{self, RouteDesc};
use crate::routers::{gating_dispatch, router};
use crate::rules::IdFormat;
use crate::runtime::launch::{Address, Held, SCALAR, Scope, optional};
use crate::runtime::shape;
use crate::{Dtype, Element, Error, In, Kernels, Out, TokenMask, Workspace};

impl RoutePlan {
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
        let given_logits = args.given_logits.is_some();
        let lists = dispatched.fill(&scope, &self.rows())?;
        if self.tokens == 0 {
            lists.zero(&scope)?;
            lists.filled();
            return self.without_tokens(&scope, args);
        }
        let alignment = shape::row_alignment(self.desc.dtype, self.desc.hidden);
        let x = scope.read("x", x.into(), self.tokens * self.desc.hidden, alignment)?;
        let workspace = workspace.open(&scope, self.workspace_bytes)?;
        let (held, mut extras) = HeldRoute::open(&scope, self, true, args)?;
        let at = RouteAddresses::new(self, &workspace, &held, lists.addresses());
        if given_logits {
            self.enqueue_choice(&scope, &weights, &workspace, &mut extras, &at, &mut |_| ())?;
        } else {
            self.enqueue_all(&scope, &weights, x.address(), None, &workspace, &mut extras, &at, &mut |_| ())?;
        }
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
        self.check_mask_of_choices(&args.mask)?;
        let given = self.tokens * self.candidates();
        let ids = self.open_ids(&scope, choices.ids)?;
        let weights = scope.read("choices.weights", choices.weights, given, SCALAR)?;
        let workspace = workspace.open(&scope, self.workspace_bytes)?;
        let (held, mut extras) = HeldRoute::open(&scope, self, false, args)?;
        let at = RouteAddresses::new(self, &workspace, &held, lists.addresses());
        let choices = ChoiceAddresses { format: self.desc.choices, ids: ids.address(), weights: weights.address() };
        self.enqueue_rows(&scope, &workspace, &mut extras, &at, choices, &mut |_| ())?;
        lists.filled();
        Ok(())
    }

    /// The dispatch asks the mask itself, where choices come from elsewhere; what stands before it does not.
    pub(in crate::layer) fn check_mask_of_choices(&self, mask: &TokenMask<'_>) -> Result<(), Error> {
        if !mask.is_all() && (self.desc.admission.is_some() || self.desc.map.is_some()) {
            let supported = "no mask where an admission or a map takes choices from elsewhere: give padding ids of -1";
            return Err(Error::unsupported(OPERATION, "mask", supported, "one"));
        }
        Ok(())
    }

    /// Opens the ids of choices from elsewhere.
    pub(in crate::layer) fn open_ids<'b, 'c: 'b>(&self, scope: &Scope<'b>, ids: Ids<'c>) -> Result<Held<'b>, Error> {
        ids.open(scope, "choices.ids", self.desc.choices, self.tokens * self.candidates())
    }

    /// Ids of a token before admission.
    pub(in crate::layer) fn candidates(&self) -> usize {
        self.desc.candidates()
    }

    /// The same without those of appended experts.
    pub(super) fn chosen(&self) -> usize {
        self.candidates() - self.desc.gating.appended_experts()
    }

    /// The result for no tokens: what is summed up over tokens is zero.
    pub(in crate::layer) fn without_tokens(&self, scope: &Scope<'_>, args: RouteArgs<'_>) -> Result<(), Error> {
        let (local, experts) = (self.desc.local_experts(), self.desc.experts);
        if let Some(counts) = scope.write_some("counts", args.counts, local, SCALAR)? {
            scope.zero(counts.address(), local * size_of::<i32>())?;
        }
        let Some(measured) = args.measured else { return Ok(()) };
        let bytes = experts * size_of::<i32>();
        let Totals { counts, loss_counts, probability, importance, tokens, .. } = measured.totals;
        if let Some(tokens) = scope.write_some("totals.tokens", tokens, 1, SCALAR)? {
            scope.zero(tokens.address(), size_of::<u32>())?;
        }
        scope.zero(scope.write("totals.counts", counts, experts, SCALAR)?.address(), bytes)?;
        scope.zero(scope.write("totals.loss_counts", loss_counts, experts, SCALAR)?.address(), bytes)?;
        scope.zero(scope.write("totals.probability", probability, experts, SCALAR)?.address(), bytes)?;
        scope.zero(scope.write("totals.importance", importance, experts, SCALAR)?.address(), bytes)?;
        scope.zero(scope.write("stats", measured.stats, 1, SCALAR)?.address(), size_of::<RouterStats>())
    }

    /// From rows of `x` to rows of experts; with `gate`, weight and logits of a shared expert's gate, those logits too.
    #[allow(clippy::too_many_arguments)]
    pub(in crate::layer) fn enqueue_all(
        &self,
        scope: &Scope<'_>,
        weights: &HeldRouter<'_>,
        x: Address<'_>,
        gate: Option<(Address<'_>, Address<'_>)>,
        workspace: &Held<'_>,
        extras: &mut Extras<'_>,
        at: &RouteAddresses<'_>,
        observer: &mut dyn FnMut(Stage),
    ) -> Result<(), Error> {
        let product = self.product(scope, weights, x, gate, workspace, at, observer)?;
        let step = if gate.is_some() { &self.gated_router } else { &self.router };
        if let (Some(kernel), Choice::WithDispatch(choice)) = (self.together, &self.choice) {
            let desc = RouteDesc::new(step.desc, choice.desc);
            let selection = route::selection(kernel, &step.desc, &self.device);
            let lists = dispatch::Outputs::of(at.lists, true);
            let scratch = workspace.at(self.regions.scratch);
            route::enqueue(scope, &desc, &selection, product, self.routing(weights, at), lists, scratch)?;
            observer(Stage::Route);
            return Ok(());
        }
        router::enqueue(scope, &step.desc, &step.selection, product)?;
        observer(Stage::Router);
        self.enqueue_choice(scope, weights, workspace, extras, at, observer)
    }

    /// What a router's launch reads and writes, after the norm before it.
    #[allow(clippy::too_many_arguments)]
    fn product<'b>(
        &self,
        scope: &Scope<'_>,
        weights: &'b HeldRouter<'_>,
        x: Address<'b>,
        gate: Option<(Address<'b>, Address<'b>)>,
        workspace: &'b Held<'_>,
        at: &RouteAddresses<'b>,
        observer: &mut dyn FnMut(Stage),
    ) -> Result<router::Addresses<'b>, Error> {
        let Some(matrix) = optional(&weights.matrix) else {
            let reason = "the logits are not given";
            return Err(Error::Missing { operation: OPERATION, argument: "router.matrix", reason });
        };
        let mut seen = x;
        if let Some(step) = &self.norm {
            seen = workspace.at(self.regions.router_x);
            let at = rms_norm::Addresses { weight: optional(&weights.norm), ..rms_norm::Addresses::new(x, seen) };
            rms_norm::enqueue(scope, &step.desc, &step.selection, at)?;
            observer(Stage::RouterNorm);
        }
        Ok(router::Addresses {
            x: seen,
            weight: Some(matrix),
            bias: optional(&weights.bias),
            logits: Some(at.logits),
            logits_dtype: Dtype::F32,
            gate,
        })
    }

    /// What a choice reads and writes in one launch with the dispatch.
    fn routing<'b>(&self, weights: &'b HeldRouter<'_>, at: &RouteAddresses<'b>) -> Routing<'b> {
        let (expert_scale, global_scale) = (optional(&weights.expert_scale), optional(&weights.global_scale));
        Routing {
            logits: at.logits,
            dtype: Dtype::F32,
            correction_bias: optional(&weights.correction_bias),
            mask: at.mask,
            inputs: InputAddresses { expert_scale, global_scale, given: at.given },
            ids: at.ids,
            weights: at.weights,
        }
    }

    /// From logits to rows.
    pub(in crate::layer) fn enqueue_choice(
        &self,
        scope: &Scope<'_>,
        weights: &HeldRouter<'_>,
        workspace: &Held<'_>,
        extras: &mut Extras<'_>,
        at: &RouteAddresses<'_>,
        observer: &mut dyn FnMut(Stage),
    ) -> Result<(), Error> {
        let correction_bias = optional(&weights.correction_bias);
        let (expert_scale, global_scale) = (optional(&weights.expert_scale), optional(&weights.global_scale));
        let inputs = InputAddresses { expert_scale, global_scale, given: at.given };
        if let Choice::WithDispatch(step) = &self.choice {
            let routing = self.routing(weights, at);
            let lists = dispatch::Outputs::of(at.lists, true);
            let scratch = workspace.at(self.regions.scratch);
            gating_dispatch::enqueue(scope, &step.desc, &step.selection, routing, lists, scratch)?;
            observer(Stage::GateDispatch);
            return Ok(());
        }
        let given = self.tokens * self.candidates();
        let [ids, chosen_weights] =
            if self.admission.is_some() { [at.candidates, at.candidate_weights] } else { [at.ids, at.weights] };
        let logits = at.logits.input::<f32>(self.tokens * self.desc.logit_columns());
        let mask = at.mask.input(self.tokens);
        let rule = inputs.inputs([self.tokens, self.desc.experts, self.chosen()]);
        let bias = correction_bias.map(|bias| bias.input(self.desc.experts));
        let (kernels, stream) = (scope.kernels, scope.stream);
        match &self.choice {
            Choice::Measured(step) => {
                let Some(measured) = extras.measured.as_mut() else {
                    let reason = "the descriptor measures the batch";
                    return Err(Error::Missing { operation: OPERATION, argument: "measured", reason });
                };
                let mut scratch = workspace.part(self.regions.scratch);
                let totals = measured.totals.reborrow();
                let (ids, weights) = (ids.out(given), chosen_weights.out(given));
                let mut args =
                    MeasuredGatingArgs::new(logits, ids, weights, totals, measured.stats.reborrow(), &mut scratch)
                        .mask(mask);
                args.correction_bias = bias;
                args.rule = rule;
                args.log_sum_exp = measured.log_sum_exp.as_mut().map(Out::reborrow);
                args.probabilities = measured.probabilities.as_mut().map(Out::reborrow);
                measured_gating::forward(kernels, stream, &step.desc, args).map_err(|error| error.within(OPERATION))?;
            }
            Choice::Gating(step) => {
                let mut args = GatingArgs::new(logits, ids.out(given), chosen_weights.out(given)).mask(mask);
                args.correction_bias = bias;
                args.rule = rule;
                gating::forward(kernels, stream, &step.desc, args).map_err(|error| error.within(OPERATION))?;
            }
            Choice::WithDispatch(_) => {}
        }
        observer(Stage::Gate);
        let choices = ChoiceAddresses { format: IdFormat::I32, ids, weights: chosen_weights };
        self.enqueue_rows(scope, workspace, extras, at, choices, observer)
    }

    /// From choices `[T, candidates]` to rows: admission, map, dispatch.
    pub(in crate::layer) fn enqueue_rows(
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
        let (choices, given) = (self.tokens * self.desc.all_choices(), self.tokens * self.candidates());
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
        let from = dispatch::Choices { ids, weights: Some(weights), mask: at.mask };
        dispatch::enqueue(scope, &desc, &selection, from, lists, scratch)?;
        observer(Stage::Dispatch);
        Ok(())
    }
}
