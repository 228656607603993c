//! The launches of a backward pass.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::gradients::{HeldGradients, LayerGradients, WeightGradients};
use super::mlp::{self, Inputs, Wanted};
use super::plan::RouterSteps;
use super::{BackwardPlan, BackwardStage, OPERATION, Origin, Saved};
use crate::experts::Weight;
use crate::experts::choice_backward::{self, ChoiceBackwardArgs, Identities};
use crate::experts::combine::{self, CombineArgs, Identity};
use crate::experts::gemm::{self, GemmArgs, SwigluByExpert};
use crate::experts::sigmoid_gate::{self, SigmoidGateArgs};
use crate::layer::experts::check_device;
use crate::layer::weights::LayerWeights;
use crate::layer::{Choices, MapTable};
use crate::routers::gating_backward::{self, GatingBackwardArgs};
use crate::routers::router_backward::{self, RouterBackwardDesc};
use crate::rules::Weighting;
use crate::runtime::builder::buffers;
use crate::runtime::launch::{Address, Held, SCALAR, Scope, optional};
use crate::runtime::shape;
use crate::{Dtype, Element, Error, In, Kernels, Tensor, Workspace};

/// Inputs and outputs of a backward pass.
#[non_exhaustive]
pub struct BackwardArgs<'a, T> {
    /// `[T, H]`: the forward pass's.
    pub x: In<'a, T>,
    /// `[T, H]`: the forward pass's, exactly where it had one.
    pub router_x: Option<In<'a, T>>,
    /// `[T, E]`: the logits that the forward pass was given, exactly with [`Origin::Logits`].
    pub given_logits: Option<In<'a, f32>>,
    /// The choices that the forward pass was given, exactly with [`Origin::Choices`] where there are experts whose output is their input, or a map.
    pub choices: Option<Choices<'a>>,
    /// The expert map; exactly where the descriptor has one.
    pub map: Option<MapTable<'a>>,
    /// `[T, H]`: the gradient of `y`.
    pub dy: In<'a, T>,
    /// `[E]`: the slots that the balancing loss counts, exactly where it has a factor ([`crate::routers::measured_gating::Totals`]).
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

/// Buffers of a pass, opened, but for those of weights.
struct Opened<'a> {
    x: Held<'a>,
    router_x: Option<Held<'a>>,
    logits: Option<Held<'a>>,
    dy: Held<'a>,
    ids: Option<Held<'a>>,
    weights: Option<Held<'a>>,
    map: Option<Held<'a>>,
    loss_counts: Option<Held<'a>>,
    counted: Option<Held<'a>>,
    importance: Option<Held<'a>>,
    sequence_counts: Option<Held<'a>>,
    sequence_tokens: Option<Held<'a>>,
    frozen: Option<Held<'a>>,
    gradients: HeldGradients<'a>,
}

impl BackwardPlan {
    /// Enqueues the backward pass of what `saved` was filled by.
    ///
    /// With no tokens nothing is launched, and the parameters' gradients become zero where they are written.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a `saved` of another layer, number of tokens or origin, or one that no pass has filled, and for a plan made for
    /// another device; [`Error::Missing`] or [`Error::Unexpected`] for weights and buffers against the descriptors; those of a buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`], [`Error::Misaligned`],
    /// [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those of the driver.
    pub fn backward<T: Element>(
        &self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        weights: &LayerWeights<'_>,
        saved: &Saved<T>,
        args: BackwardArgs<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        self.backward_observed(kernels, stream, weights, saved, args, workspace, &mut |_| ())
    }

    /// [`BackwardPlan::backward`], calling `observer` after each stage has been enqueued.
    ///
    /// # Errors
    /// Those of [`BackwardPlan::backward`].
    #[allow(clippy::too_many_arguments)]
    pub fn backward_observed<T: Element>(
        &self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        weights: &LayerWeights<'_>,
        saved: &Saved<T>,
        args: BackwardArgs<'_, T>,
        workspace: &mut Workspace,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<(), Error> {
        let scope = Scope::begin(OPERATION, kernels, stream)?;
        let (desc, tokens) = (self.layer().desc(), self.layer().tokens());
        scope.check_dtype::<T>("x", desc.dtype)?;
        check_device(&scope, self.layer().experts().device()).map_err(|error| error.within(OPERATION))?;
        let other_rows = saved.check(self)?;
        self.check_args(&args, weights, other_rows)?;
        // The weights' buffers are looked at before anything is launched.
        let _router = match self.desc().origin {
            Origin::Choices => None,
            _ => Some(weights.router.open(&scope, desc)?),
        };
        let _experts = weights.experts.open(&scope, desc)?;
        if tokens == 0 {
            let gradients = args.gradients.open(&scope, desc, 0)?;
            if args.frozen.is_some() {
                let supported = "no mask where there are no tokens: leave the gradients alone";
                return Err(Error::unsupported(OPERATION, "frozen", supported, "some"));
            }
            return match self.desc().accumulate {
                true => Ok(()),
                false => gradients.without_tokens(&scope, desc, self.desc().keep_empty),
            };
        }
        let (elements, logits) = (tokens * desc.hidden, tokens * desc.logit_columns());
        let alignment = shape::row_alignment(desc.dtype, desc.hidden);
        let choices = tokens * desc.all_choices();
        let (ids, given_weights) = args.choices.map(|choices| (choices.ids, choices.weights)).unzip();
        let opened = Opened {
            x: scope.read("x", args.x, elements, alignment)?,
            router_x: scope.read_some("router_x", args.router_x, elements, alignment)?,
            logits: scope.read_some("given_logits", args.given_logits, logits, SCALAR)?,
            ids: ids.map(|ids| ids.open(&scope, "choices.ids", desc.choices, choices)).transpose()?,
            weights: scope.read_some("choices.weights", given_weights, choices, SCALAR)?,
            map: scope.read_some("map", args.map.map(|table| table.map), self.map_entries(), SCALAR)?,
            dy: scope.read("dy", args.dy, elements, alignment)?,
            loss_counts: scope.read_some("loss_counts", args.loss_counts, desc.experts, SCALAR)?,
            counted: scope.read_some("counted", args.counted, 1, SCALAR)?,
            importance: scope.read_some("importance", args.importance, desc.experts, SCALAR)?,
            sequence_counts: scope.read_some(
                "sequence_counts",
                args.sequence_counts,
                self.sequences() * desc.experts,
                SCALAR,
            )?,
            sequence_tokens: scope.read_some("sequence_tokens", args.sequence_tokens, self.sequences(), SCALAR)?,
            frozen: scope.read_some("frozen", args.frozen, desc.local_experts(), SCALAR)?,
            gradients: args.gradients.open(&scope, desc, tokens)?,
        };
        let workspace = workspace.open(&scope, self.workspace_bytes())?;
        self.enqueue(&scope, weights, saved, &opened, &workspace, observer)
    }

    /// Entries of the expert map.
    fn map_entries(&self) -> usize {
        let desc = self.layer().desc();
        desc.map.map_or(0, |map| desc.all_experts() * map.max_replicas)
    }

    fn check_args<T>(
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
        let identities = self.identities() && origin == Origin::Choices;
        let reasons = ["choices of identities are read off them", "the forward pass's are not needed"];
        exactly("choices", identities, args.choices.is_some(), reasons)?;
        let reasons = ["the descriptor maps experts", "the descriptor has no map"];
        exactly("map", self.layer().desc().map.is_some(), args.map.is_some(), reasons)?;
        let balances = self.desc().losses.is_some_and(|losses| losses.balance != 0.0);
        let reasons = ["the balancing loss has a factor", "no balancing loss has a factor"];
        exactly("loss_counts", balances, args.loss_counts.is_some(), reasons)?;
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
        let (experts, of) = (&weights.experts, &args.gradients);
        let shared = experts.shared.as_ref();
        let has = |weight: Option<&Weight<'_>>| {
            let up = weight.and_then(|weight| weight.up).and_then(|(_, bias)| bias);
            [weight.and_then(|weight| weight.bias).is_some(), up.is_some()]
        };
        let asks = |gradients: &WeightGradients<'_>| [gradients.bias.is_some(), gradients.up_bias.is_some()];
        for ([bias, up_bias], there, given) in [
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

    fn enqueue<T: Element>(
        &self,
        scope: &Scope<'_>,
        weights: &LayerWeights<'_>,
        saved: &Saved<T>,
        at: &Opened<'_>,
        workspace: &Held<'_>,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<(), Error> {
        let within = |error: Error| error.within(OPERATION);
        let (kernels, stream) = (scope.kernels, scope.stream);
        let (desc, tokens) = (self.layer().desc(), self.layer().tokens());
        let (rows, elements) = (self.rows(), tokens * desc.hidden);
        let (x, dy) = (at.x.address().input::<T>(elements), at.dy.address().input::<T>(elements));
        let gradients = &at.gradients;
        // Through the router's product to x, or to what the router saw instead.
        let router_input = if at.router_x.is_some() { &gradients.router_x } else { &gradients.x };
        let none = None;
        let router_input = if self.router.is_some() { router_input } else { &none };
        let of_logits = self.gating.is_some()
            && [
                &gradients.router,
                &gradients.router_bias,
                &gradients.logits,
                &gradients.expert_scale,
                &gradients.global_scale,
                router_input,
            ]
            .into_iter()
            .any(Option::is_some);
        let wanted = Wanted { weights: of_logits || gradients.weights.is_some(), input: gradients.x.is_some() };

        if wanted.weights || wanted.input || gradients.routed.is_some() {
            let pre_activation = match &saved.pre_activation {
                Some(kept) => kept.into(),
                None => self.recompute(scope, weights, saved, x, workspace, observer)?,
            };
            let experts = &weights.experts;
            let inputs = Inputs {
                x,
                dy,
                gate_up: experts.gate_up,
                down: experts.down,
                swiglu: experts.swiglu,
                pre_activation,
                rows: &saved.dispatched,
                row_weight: Some(saved.dispatched.slot_weight().into()),
                dropout: saved.dropout,
                noise_state: saved.drew_by_state.then(|| (&saved.noise_state).into()),
                frozen: optional(&at.frozen).map(|frozen| frozen.input(desc.local_experts())),
            };
            self.routed.enqueue(scope, mlp::ROUTED, &inputs, workspace, &gradients.routed, wanted, observer)?;
        }
        let by_choice = self.enqueue_choices(scope, saved, at, workspace, of_logits, observer)?;
        // What comes through router and gate to x is written there first.
        let mut written = false;
        if let Some(step) = self.gating.as_ref().filter(|_| of_logits) {
            let d_logits = optional(&gradients.logits).unwrap_or_else(|| workspace.at(self.regions.d_logits));
            let columns = desc.logit_columns();
            let logits = match optional(&at.logits) {
                Some(given) => given.input::<f32>(tokens * columns),
                None => (&saved.logits).into(),
            };
            let d_weights = match by_choice {
                Some(by_choice) => by_choice.input(tokens * desc.all_choices()),
                None => self.routed.d_row_weight(workspace).input(rows.slots),
            };
            let mut args = GatingBackwardArgs::new(logits, &saved.ids, d_weights, d_logits.out(tokens * columns));
            args.dispatched = by_choice.is_none().then_some(&saved.dispatched);
            args.counts = optional(&at.loss_counts).map(|counts| counts.input(desc.experts));
            args.counted = optional(&at.counted).map(|counted| counted.input(1));
            args.importance = optional(&at.importance).map(|sums| sums.input(desc.experts));
            args.sequence_counts =
                optional(&at.sequence_counts).map(|counts| counts.input(self.sequences() * desc.experts));
            args.sequence_tokens = optional(&at.sequence_tokens).map(|tokens| tokens.input(self.sequences()));
            (args.expert_scale, args.global_scale) = (weights.router.expert_scale, weights.router.global_scale);
            args.d_expert_scale = optional(&gradients.expert_scale).map(|gradient| gradient.out(desc.experts));
            args.d_global_scale = optional(&gradients.global_scale).map(|gradient| gradient.out(1));
            let mut part = workspace.part(self.regions.scratch);
            args.workspace = Some(&mut part);
            gating_backward::forward(kernels, stream, &step.desc, args).map_err(within)?;
            observer(BackwardStage::Gating);
            if let Some(steps) = &self.router {
                let back = RouterBack {
                    steps,
                    d_logits,
                    seen: optional(&at.router_x).unwrap_or_else(|| at.x.address()),
                    matrix: weights.router.matrix,
                    d_matrix: optional(&gradients.router),
                    d_input: optional(router_input),
                    added: false,
                    accumulate: self.desc().accumulate,
                };
                let stages = [BackwardStage::RouterWeight, BackwardStage::RouterInput];
                back.enqueue::<T>(scope, stages, observer)?;
                written = router_input.is_some();
                if let Some(gradient) = optional(&gradients.router_bias) {
                    let d_logits = d_logits.input::<f32>(tokens * columns);
                    self.column_sums::<f32>(scope, workspace, d_logits, [columns, 1], gradient)?;
                    observer(BackwardStage::RouterBias);
                }
            }
        }
        written |= self.enqueue_shared(scope, weights, saved, at, workspace, written, observer)?;
        if let Some(gradient) = optional(&gradients.bias) {
            self.column_sums::<T>(scope, workspace, dy, [1, desc.hidden], gradient)?;
            observer(BackwardStage::Bias);
        }
        let Some(dx) = optional(&gradients.x) else { return Ok(()) };
        let d_rows = workspace.at(self.routed.regions.d_rows).input::<T>(rows.slots * desc.hidden);
        let mut args = CombineArgs::new(d_rows, &saved.dispatched, dx.out::<T>(elements));
        args.accumulate = written && at.router_x.is_none();
        args.addend = self.shared.map(|shared| workspace.at(shared.regions.d_rows).input::<T>(elements));
        args.identity = self.identity(saved, at, dy);
        combine::forward(kernels, stream, &self.sum.desc, args).map_err(within)?;
        observer(BackwardStage::Sum);
        Ok(())
    }

    /// Sums over all tokens, as a router's product with ones: of `rows [T, columns]` of gradients of logits with one column of ones (`[columns, 1]`), or of rows
    /// of any type with gradients of 1 (`[1, columns]`).
    fn column_sums<R: Element>(
        &self,
        scope: &Scope<'_>,
        workspace: &Held<'_>,
        rows: In<'_, R>,
        [experts, hidden]: [usize; 2],
        sums: Address<'_>,
    ) -> Result<(), Error> {
        let tokens = self.layer().tokens();
        let ones = workspace.at(self.regions.ones);
        scope.fill(ones, 1.0, tokens)?;
        let desc = RouterBackwardDesc::new(R::DTYPE, tokens, experts, hidden).accumulate(self.desc().accumulate);
        let (kernels, stream, sums) = (scope.kernels, scope.stream, sums.out::<f32>(experts * hidden));
        match f32::of_tensor(R::tensor(rows)).filter(|_| hidden == 1) {
            Some(logits) => {
                router_backward::into_weight::<f32>(kernels, stream, &desc, logits, ones.input::<f32>(tokens), sums)
            }
            None => router_backward::into_weight::<R>(kernels, stream, &desc, ones.input::<f32>(tokens), rows, sums),
        }
        .map_err(|error| error.within(OPERATION))
    }

    /// Sequences of the loss by sequence.
    fn sequences(&self) -> usize {
        self.gating.as_ref().map_or(1, |step| step.desc.sequences())
    }

    /// The part of `dx` that comes through experts whose output is their input.
    fn identity<'a, T: Element>(
        &self,
        saved: &'a Saved<T>,
        at: &'a Opened<'_>,
        dy: In<'a, T>,
    ) -> Option<Identity<'a, T>> {
        if let Some(weight) = &saved.identity_weight {
            return Some(Identity::new(dy, weight));
        }
        let choices = self.layer().tokens() * self.layer().desc().all_choices();
        let (ids, weights) = match (&saved.weights, optional(&at.ids), optional(&at.weights)) {
            (_, Some(ids), Some(weights)) => (ids.input(choices), weights.input(choices)),
            (Some(weights), ..) => ((&saved.ids).into(), weights.into()),
            _ => return None,
        };
        self.identities().then(|| Identity::of_choices(dy, ids, weights, self.null_experts()))
    }

    /// Numbers of the experts that compute nothing.
    fn null_experts(&self) -> std::ops::Range<u32> {
        let desc = self.layer().desc();
        desc.local_experts() as u32..desc.experts as u32
    }

    /// The gradients of weights by choice, where somebody asks for these or there are identities; where they lie.
    fn enqueue_choices<'a, T: Element>(
        &self,
        scope: &Scope<'_>,
        saved: &Saved<T>,
        at: &'a Opened<'_>,
        workspace: &'a Held<'_>,
        of_logits: bool,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<Option<Address<'a>>, Error> {
        let asked = optional(&at.gradients.weights);
        if asked.is_none() && !(of_logits && self.identities()) {
            return Ok(None);
        }
        let (desc, tokens) = (self.layer().desc(), self.layer().tokens());
        let (choices, elements) = (tokens * desc.all_choices(), tokens * desc.hidden);
        let to = asked.unwrap_or_else(|| workspace.at(self.regions.d_weights));
        let by_row = self.routed.d_row_weight(workspace).input::<f32>(self.rows().slots);
        let mut args = ChoiceBackwardArgs::<T>::new(by_row, &saved.dispatched, to.out(choices));
        if self.identities() {
            let ids = optional(&at.ids).map_or_else(|| (&saved.ids).into(), |ids| ids.input::<i32>(choices));
            let (x, dy) = (at.x.address().input::<T>(elements), at.dy.address().input::<T>(elements));
            args.identities = Some(match (optional(&at.map), desc.map) {
                (Some(map), Some(of)) => {
                    Identities::of_map(ids, map.input::<i32>(self.map_entries()), of.max_replicas, x, dy)
                }
                _ => Identities::new(ids, self.null_experts(), x, dy),
            });
        }
        let (kernels, stream) = (scope.kernels, scope.stream);
        choice_backward::forward(kernels, stream, &self.choices.desc, args).map_err(|error| error.within(OPERATION))?;
        observer(BackwardStage::Choices);
        Ok(Some(to))
    }

    /// The pre-activations, by the forward pass's launch.
    fn recompute<'w, T: Element>(
        &self,
        scope: &Scope<'_>,
        weights: &LayerWeights<'_>,
        saved: &Saved<T>,
        x: In<'_, T>,
        workspace: &'w Held<'_>,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<In<'w, T>, Error> {
        let desc = self.layer().experts().gate_up_alone();
        let (rows, regions) = (self.rows().slots, &self.routed.regions);
        let place = workspace.at(self.regions.pre_activation);
        let elements = rows * desc.pre_activation_columns();
        let hidden = workspace.at(regions.hidden).out::<T>(rows * desc.n);
        let experts = &weights.experts;
        let mut args = GemmArgs::new(x, experts.gate_up, hidden).dispatched(&saved.dispatched).swiglu(experts.swiglu);
        args.pre_activation = Some(place.out(elements));
        let weighs = self.layer().desc().weighting == Weighting::Input;
        args.row_scale = weighs.then(|| saved.dispatched.slot_weight().into());
        gemm::forward(scope.kernels, scope.stream, &desc, args).map_err(|error| error.within(OPERATION))?;
        observer(BackwardStage::GateUp);
        Ok(place.input(elements))
    }

    /// The shared expert, where there is one and something is asked of it; whether its gate has `written` to the gradient of what it saw, or added
    /// where something was `written`.
    #[allow(clippy::too_many_arguments)]
    fn enqueue_shared<T: Element>(
        &self,
        scope: &Scope<'_>,
        weights: &LayerWeights<'_>,
        saved: &Saved<T>,
        at: &Opened<'_>,
        workspace: &Held<'_>,
        written: bool,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<bool, Error> {
        let gradients = &at.gradients;
        let Some((plan, of_mlp)) = self.shared.as_ref().zip(gradients.shared.as_ref()) else { return Ok(false) };
        let held = saved.shared_pre_activation.as_ref().zip(saved.all_tokens.as_ref());
        let Some((shared, (pre_activation, rows))) = weights.experts.shared.zip(held) else { return Ok(false) };
        let input = if at.router_x.is_some() { &gradients.router_x } else { &gradients.x };
        let input = input.as_ref().map(Held::address);
        let gate = self.gate.as_ref().zip(saved.shared_gate.as_ref());
        let of_gate = gate.is_some() && (input.is_some() || gradients.shared_gate.is_some());
        let wanted = Wanted { weights: of_gate, input: gradients.x.is_some() };
        if !wanted.weights && !wanted.input && !of_mlp.is_some() {
            return Ok(false);
        }
        let within = |error: Error| error.within(OPERATION);
        let (kernels, stream) = (scope.kernels, scope.stream);
        let (tokens, hidden) = (self.layer().tokens(), self.layer().desc().hidden);
        let elements = tokens * hidden;
        let values = workspace.at(self.regions.shared_gate);
        if let Some((_, logits)) = gate {
            let args = SigmoidGateArgs::new(logits, values.out(tokens));
            sigmoid_gate::forward(kernels, stream, tokens, args).map_err(within)?;
            observer(BackwardStage::SharedGate);
        }
        let inputs = Inputs {
            x: at.x.address().input::<T>(elements),
            dy: at.dy.address().input::<T>(elements),
            gate_up: shared.gate_up,
            down: shared.down,
            swiglu: SwigluByExpert::new(),
            pre_activation: pre_activation.into(),
            rows,
            row_weight: gate.map(|_| values.input(tokens)),
            dropout: None,
            noise_state: None,
            frozen: None,
        };
        plan.enqueue(scope, mlp::SHARED, &inputs, workspace, of_mlp, wanted, observer)?;
        let Some((steps, logits)) = gate.filter(|_| of_gate) else { return Ok(false) };
        let d_logits = workspace.at(self.regions.d_shared_gate);
        let d = plan.d_row_weight(workspace).input(tokens);
        let args = SigmoidGateArgs::new(logits, d_logits.out(tokens)).d(d);
        sigmoid_gate::forward(kernels, stream, tokens, args).map_err(within)?;
        observer(BackwardStage::SharedGateLogit);
        let back = RouterBack {
            steps: &steps.router,
            d_logits,
            seen: optional(&at.router_x).unwrap_or_else(|| at.x.address()),
            matrix: shared.gate,
            d_matrix: optional(&gradients.shared_gate),
            d_input: input,
            added: written,
            accumulate: self.desc().accumulate,
        };
        let stages = [BackwardStage::SharedGateWeight, BackwardStage::SharedGateInput];
        back.enqueue::<T>(scope, stages, observer)?;
        Ok(input.is_some())
    }
}

/// A router's product on its way back, or that of a shared expert's gate.
struct RouterBack<'a> {
    steps: &'a RouterSteps,
    d_logits: Address<'a>,
    /// What the router saw.
    seen: Address<'a>,
    matrix: Option<Tensor<'a>>,
    d_matrix: Option<Address<'a>>,
    d_input: Option<Address<'a>>,
    /// Whether the input's gradient is added to what lies there.
    added: bool,
    /// Whether the matrix's is.
    accumulate: bool,
}

impl RouterBack<'_> {
    /// Both gradients, each where it is asked for.
    fn enqueue<T: Element>(
        self,
        scope: &Scope<'_>,
        [of_matrix, of_input]: [BackwardStage; 2],
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<(), Error> {
        let within = |error: Error| error.within(OPERATION);
        let (kernels, stream) = (scope.kernels, scope.stream);
        let RouterBackwardDesc { tokens, experts, hidden, .. } = self.steps.desc;
        let d_logits = self.d_logits.input::<f32>(tokens * experts);
        if let Some(gradient) = self.d_matrix {
            let desc = self.steps.desc.accumulate(self.accumulate);
            let seen = self.seen.input::<T>(tokens * hidden);
            let gradient = gradient.out(experts * hidden);
            router_backward::into_weight::<T>(kernels, stream, &desc, d_logits, seen, gradient).map_err(within)?;
            observer(of_matrix);
        }
        if let (Some(gradient), Some(matrix)) = (self.d_input, self.matrix) {
            let desc = self.steps.desc.accumulate(self.added);
            let out = gradient.out::<T>(tokens * hidden);
            match (matrix, T::of_tensor(matrix)) {
                (_, Some(matrix)) => router_backward::into_x::<T, T>(kernels, stream, &desc, d_logits, matrix, out),
                (Tensor::F32(matrix), None) => {
                    router_backward::into_x::<T, f32>(kernels, stream, &desc, d_logits, matrix, out)
                }
                (other, None) => {
                    let (argument, expected, got) = ("router.matrix", Dtype::F32, other.dtype());
                    Err(Error::WrongDtype { operation: OPERATION, argument, expected, got })
                }
            }
            .map_err(within)?;
            observer(of_input);
        }
        Ok(())
    }
}
