//! The launches of a backward pass.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::args::BackwardArgs;
use super::held::HeldGradients;
use super::mlp;
use super::norms;
use super::pass::{Inputs, Pass, Wanted};
use super::router::{Matrix, RouterBack, gate_alone};
use super::shared::seen_gradient;
use super::{BackwardPlan, BackwardStage, OPERATION, Origin, Saved};
use crate::experts::choice_backward::{self, Admitted, ChoiceBackwardArgs, Identities};
use crate::experts::combine::{self, CombineArgs, Identity};
use crate::experts::gemm::{self, GemmArgs};
use crate::layer::experts::check_device;
use crate::layer::route::format_of;
use crate::layer::weights::LayerWeights;
use crate::routers::gating_backward::{self, GatingBackwardArgs, IdentityRows};
use crate::rules::Weighting;
use crate::runtime::launch::{Held, SCALAR, Scope, optional};
use crate::runtime::shape;
use crate::{Dtype, Element, Error, In, Kernels, Tensor, Workspace};

/// Buffers of a pass, opened, but for those of weights.
pub(super) struct Opened<'a> {
    pub(super) x: Held<'a>,
    pub(super) router_x: Option<Held<'a>>,
    pub(super) logits: Option<Held<'a>>,
    pub(super) dy: Held<'a>,
    pub(super) ids: Option<Held<'a>>,
    pub(super) weights: Option<Held<'a>>,
    pub(super) map: Option<Held<'a>>,
    pub(super) loss_counts: Option<Held<'a>>,
    pub(super) counted: Option<Held<'a>>,
    pub(super) importance: Option<Held<'a>>,
    pub(super) sequence_counts: Option<Held<'a>>,
    pub(super) sequence_tokens: Option<Held<'a>>,
    pub(super) frozen: Option<Held<'a>>,
    pub(super) gradients: HeldGradients<'a>,
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
        if self.desc().origin == Origin::Router && weights.router.matrix.is_none() {
            let reason = "the logits were the layer's own";
            return Err(Error::Missing { operation: OPERATION, argument: "router.matrix", reason });
        }
        let _experts = weights.experts.open(&scope, desc)?;
        if tokens == 0 {
            let gradients = args.gradients.open(&scope, desc, 0)?;
            if self.desc().accumulate {
                return Ok(());
            }
            // Nobody is launched who could read the mask.
            if args.frozen.is_some() && !self.desc().keep_empty && gradients.routed.is_some() {
                let supported = "no mask without tokens, but with accumulate or keep_empty: leave the gradients alone";
                return Err(Error::unsupported(OPERATION, "frozen", supported, "a mask, and 0 tokens"));
            }
            return gradients.without_tokens(&scope, desc, self.desc().keep_empty);
        }
        let (elements, logits) = (tokens * desc.hidden, tokens * desc.logit_columns());
        let alignment = shape::row_alignment(desc.dtype, desc.hidden);
        let choices = tokens * desc.candidates();
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

    fn enqueue<'a, T: Element>(
        &'a self,
        scope: &Scope<'_>,
        weights: &LayerWeights<'a>,
        saved: &'a Saved<T>,
        at: &'a Opened<'a>,
        workspace: &'a Held<'a>,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<(), Error> {
        let within = |error: Error| error.within(OPERATION);
        let (kernels, stream) = (scope.kernels, scope.stream);
        let (desc, tokens) = (self.layer().desc(), self.layer().tokens());
        let (rows, elements) = (self.rows(), tokens * desc.hidden);
        let experts_elements = tokens * desc.expert_width();
        let (x, dy) = (at.x.address().input::<T>(elements), at.dy.address().input::<T>(elements));
        let gradients = &at.gradients;
        // Through the router's product to x, or to what the router saw instead.
        let router_input = if at.router_x.is_some() { &gradients.router_x } else { &gradients.x };
        let none = None;
        let router_input = if self.router.is_some() { router_input } else { &none };
        let norm_weights = [&gradients.router_norm, &gradients.expert_norm];
        let of_logits = self.gating.is_some()
            && [
                &gradients.router,
                &gradients.router_bias,
                &gradients.logits,
                &gradients.expert_scale,
                &gradients.global_scale,
                router_input,
                norm_weights[0],
            ]
            .into_iter()
            .any(Option::is_some);
        let wanted = Wanted {
            weights: of_logits || gradients.weights.is_some(),
            input: gradients.x.is_some()
                || gradients.expert_norm.is_some()
                || gradients.latent_norm.is_some()
                || gradients.latent[0].matrix.is_some(),
        };

        let wants_routed = wanted.any() || gradients.routed.is_some() || gradients.slot_norm.is_some();
        // Behind the experts.
        let around = &self.around;
        let dy = around.sum_gradient(scope, weights, saved, (at, dy), workspace, observer)?;
        let d_sum = around.experts_sum_gradient(scope, weights, saved, (at, dy), wants_routed, workspace, observer)?;
        // What the routed experts saw.
        let norm_weight = weights.experts.norms.experts;
        let behind_norm = match self.expert_norm.as_ref().filter(|_| wants_routed) {
            Some(norm) => {
                let of = (x, norm_weight);
                norm.again(scope, of, workspace, norms::EXPERTS, observer)?.input::<T>(elements)
            }
            None => x,
        };
        let seen_by_experts = match wants_routed {
            true => around.again(scope, weights, behind_norm, workspace, observer)?,
            false => behind_norm,
        };
        let pre_activation = match (&saved.pre_activation, wants_routed) {
            (_, false) => None,
            (Some(kept), true) => Some(kept.into()),
            (None, true) => Some(self.recompute(scope, weights, saved, seen_by_experts, workspace, observer)?),
        };
        let experts = &weights.experts;
        let outputs = match wants_routed {
            true => {
                let d_row_weight = wanted.weights.then(|| self.routed.d_row_weight(workspace));
                around.outputs_gradient(scope, weights, saved, (at, d_sum), d_row_weight, workspace, observer)?
            }
            false => None,
        };
        // A norm of the experts' outputs has the rows' weights behind it, and their gradients.
        let weighed = around.weighs_slots();
        let routed = pre_activation.map(|pre_activation| {
            let row_weight = (!weighed).then(|| saved.dispatched.slot_weight().into());
            let inputs = Inputs {
                x: seen_by_experts,
                dy: outputs.unwrap_or(d_sum),
                gate_up: experts.gate_up,
                down: experts.down,
                swiglu: experts.swiglu,
                pre_activation,
                rows: &saved.dispatched,
                row_weight,
                bias_weight: row_weight,
                dropout: saved.dropout,
                noise_state: saved.drew_by_state.then(|| (&saved.noise_state).into()),
                frozen: optional(&at.frozen).map(|frozen| frozen.input(desc.local_experts())),
            };
            let gradients = &gradients.routed;
            let wanted = Wanted { weights: wanted.weights && !weighed, ..wanted };
            Pass { plan: &self.routed, names: mlp::ROUTED, at: inputs, gradients, wanted, workspace }
        });
        let shared = self.shared_pass(scope, weights, saved, (at, dy), workspace, observer)?;
        match (&routed, &shared) {
            (Some(routed), shared) if shared.is_none() || self.joins() => {
                routed.enqueue(scope, shared.as_ref(), observer)?
            }
            (routed, shared) => {
                for pass in [routed, shared].into_iter().flatten() {
                    pass.enqueue(scope, None, observer)?;
                }
            }
        }
        let mut gate = self.gate_matrix(weights, at, shared.as_ref());
        if !of_logits {
            self.enqueue_choices(scope, saved, at, (seen_by_experts, d_sum), workspace, observer)?;
        }
        // What comes through router and gate to x is written there first.
        let mut written = false;
        let (seen, accumulate) = (optional(&at.router_x).unwrap_or_else(|| at.x.address()), self.desc().accumulate);
        if let Some(step) = self.gating.as_ref().filter(|_| of_logits) {
            let d_logits = optional(&gradients.logits).unwrap_or_else(|| workspace.at(self.regions.d_logits));
            let columns = desc.logit_columns();
            let logits = match optional(&at.logits) {
                Some(given) => given.input::<f32>(tokens * columns),
                None => (&saved.logits).into(),
            };
            let d_weights = self.routed.d_row_weight(workspace).input(rows.slots);
            let mut args = GatingBackwardArgs::new(logits, &saved.ids, d_weights, d_logits.out(tokens * columns));
            args.dispatched = Some(&saved.dispatched);
            args.admitted = self.admitted(saved, at);
            args.identities = self.identity_rows(at, (T::tensor(seen_by_experts), T::tensor(d_sum)));
            args.d_choices = optional(&gradients.weights).map(|to| to.out(tokens * desc.candidates()));
            let balances = self.desc().losses.is_some_and(|losses| losses.balance != 0.0);
            args.counts = optional(&at.loss_counts).map(|counts| counts.input(desc.experts));
            args.counts = args.counts.or_else(|| balances.then(|| saved.counts().into()));
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
            let sums_up = args.d_expert_scale.is_some() || args.d_global_scale.is_some();
            gating_backward::forward(kernels, stream, &step.desc, args).map_err(within)?;
            observer(BackwardStage::Gating);
            if sums_up && self.factors.is_some() {
                observer(BackwardStage::Factors);
            }
            if let Some(steps) = &self.router {
                let of = Matrix { d_logits, matrix: weights.router.matrix, d_matrix: optional(&gradients.router) };
                let of_bias = optional(&gradients.router_bias);
                let (beside, alone) = if of.d_matrix.is_some() { (of_bias, None) } else { (None, of_bias) };
                let rows = seen.input::<T>(elements);
                let norm = self.router_norm.as_ref();
                let of_norm = (rows, weights.router.norm);
                let normed = norm.map(|norm| norm.again(scope, of_norm, workspace, norms::ROUTER, observer));
                let to = optional(router_input);
                let d_gain = optional(norm_weights[0]);
                let back_wanted = to.is_some() || d_gain.is_some();
                let back = RouterBack {
                    steps,
                    seen: normed.transpose()?.unwrap_or(seen),
                    of,
                    d_bias: beside,
                    gate: gate.take(),
                    d_input: match norm {
                        Some(norm) => back_wanted.then(|| norm.d_normed(workspace)),
                        None => to,
                    },
                    accumulate,
                };
                match norm {
                    Some(norm) if norm.seen() == Dtype::F32 => back.enqueue::<f32>(scope, workspace, observer)?,
                    _ => back.enqueue::<T>(scope, workspace, observer)?,
                }
                if let Some(norm) = norm.filter(|_| back_wanted) {
                    norm.back(scope, of_norm, workspace, (to, false, d_gain), norms::ROUTER, observer)?;
                }
                written = router_input.is_some();
                if let Some(gradient) = alone {
                    let d_logits = d_logits.input::<f32>(tokens * columns);
                    self.column_sums::<f32>(scope, workspace, d_logits, [columns, 1], gradient)?;
                    observer(BackwardStage::RouterBias);
                }
            }
        }
        if let Some((steps, gate)) = &gate {
            let d_input = seen_gradient(gradients, at);
            gate_alone::<T>(scope, workspace, (steps, gate), (seen, d_input, written), accumulate, observer)?;
            written |= d_input.is_some();
        }
        if let Some(gradient) = optional(&gradients.bias) {
            self.column_sums::<T>(scope, workspace, dy, [1, desc.hidden], gradient)?;
            observer(BackwardStage::Bias);
        }
        let dx = optional(&gradients.x);
        let behind = self.expert_norm.as_ref().map(|norm| norm.d_normed(workspace));
        let seen_behind = around.d_seen(workspace).or(behind);
        if !wanted.input {
            return Ok(());
        }
        let Some(to) = seen_behind.or(dx) else { return Ok(()) };
        let d_rows = workspace.at(self.routed.regions.d_rows).input::<T>(rows.slots * desc.expert_width());
        let mut args = CombineArgs::new(d_rows, &saved.dispatched, to.out::<T>(experts_elements));
        let lies_there = written && at.router_x.is_none();
        let addend = self.shared.map(|shared| workspace.at(shared.regions.d_rows));
        args.accumulate = lies_there && seen_behind.is_none();
        args.addend = addend.filter(|_| seen_behind.is_none()).map(|addend| addend.input::<T>(elements));
        args.identity = self.identity(saved, at, d_sum);
        combine::forward(kernels, stream, &self.sum.desc, args).map_err(within)?;
        observer(BackwardStage::Sum);
        let to_input = behind.map(|behind| (behind, false)).or(dx.map(|dx| (dx, lies_there)));
        around.input_gradient(scope, weights, saved, (at, behind_norm), to_input, workspace, observer)?;
        if let Some(norm) = self.expert_norm.as_ref().filter(|_| dx.is_some() || norm_weights[1].is_some()) {
            let to = (dx, lies_there, optional(norm_weights[1]));
            norm.back(scope, (x, norm_weight), workspace, to, norms::EXPERTS, observer)?;
        }
        // The shared expert has seen x itself.
        if let (Some(step), Some(addend), Some(dx)) = (&self.shared_sum, addend, dx) {
            let lists = saved.dispatched.read(scope)?;
            let at = combine::Addresses {
                y_slots: addend,
                rows: lists.addresses(),
                weights: None,
                residual: Some(dx),
                bias: None,
                addend: Some(addend),
                addend_gate: None,
                identity: None,
                y: dx,
            };
            combine::enqueue(scope, &step.desc, &step.selection, at)?;
            observer(BackwardStage::SharedSum);
        }
        Ok(())
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
            (_, Some(ids), Some(weights)) => {
                (format_of(ids, self.layer().desc().choices, choices), weights.input(choices))
            }
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

    /// What an admission made of the candidates, where their weights are others.
    fn admitted<'a, T: Element>(&self, saved: &'a Saved<T>, at: &'a Opened<'_>) -> Option<Admitted<'a>> {
        let (rule, ids) = self.admission.zip(saved.admitted.as_ref())?;
        let given = self.layer().tokens() * rule.candidates;
        let weights = match optional(&at.weights) {
            Some(weights) => Some(weights.input(given)),
            None => saved.candidate_weights.as_ref().map(Into::into),
        };
        let mut admitted = Admitted::new(ids, rule);
        admitted.weights = weights.filter(|_| rule.renormalise.is_some());
        Some(admitted)
    }

    /// Experts whose output is their input, for a gating's way back; `x` is what they saw, `dy` the gradient of the sum.
    fn identity_rows<'a>(&self, at: &'a Opened<'_>, (x, dy): (Tensor<'a>, Tensor<'a>)) -> Option<IdentityRows<'a>> {
        let desc = self.layer().desc();
        let width = desc.expert_width();
        let rows = match (optional(&at.map), desc.map) {
            (Some(map), Some(of)) => {
                IdentityRows::of_map(map.input::<i32>(self.map_entries()), of.max_replicas, width, x, dy)
            }
            _ => IdentityRows::new(self.null_experts(), width, x, dy),
        };
        self.identities().then(|| rows.scale(desc.routed_scale))
    }

    /// The gradients of weights by choice, where somebody asks for these and no gating's way back has them.
    fn enqueue_choices<T: Element>(
        &self,
        scope: &Scope<'_>,
        saved: &Saved<T>,
        at: &Opened<'_>,
        (seen, d_sum): (In<'_, T>, In<'_, T>),
        workspace: &Held<'_>,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<(), Error> {
        let Some(to) = optional(&at.gradients.weights) else { return Ok(()) };
        let (desc, tokens) = (self.layer().desc(), self.layer().tokens());
        let by_row = self.routed.d_row_weight(workspace).input::<f32>(self.rows().slots);
        let given = tokens * desc.candidates();
        let ids = optional(&at.ids).map_or_else(|| (&saved.ids).into(), |ids| format_of(ids, desc.choices, given));
        let mut args = ChoiceBackwardArgs::<T>::new(by_row, &saved.dispatched, to.out(given));
        if let Some(admitted) = self.admitted(saved, at) {
            // An admission takes ids of 32 bits alone.
            let candidates = optional(&at.ids).map_or_else(|| (&saved.ids).into(), |ids| ids.input::<i32>(given));
            args = args.admitted(candidates, admitted);
        }
        if self.identities() {
            let ids = saved.admitted.as_ref().map_or(ids, Into::into);
            args.identities = Some(match (optional(&at.map), desc.map) {
                (Some(map), Some(of)) => {
                    Identities::of_map(ids, map.input::<i32>(self.map_entries()), of.max_replicas, seen, d_sum)
                }
                _ => Identities::new(ids, self.null_experts(), seen, d_sum),
            });
        }
        choice_backward::forward(scope.kernels, scope.stream, &self.choices.desc, args)
            .map_err(|error| error.within(OPERATION))?;
        observer(BackwardStage::Choices);
        Ok(())
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
}
