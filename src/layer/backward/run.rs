//! The launches of a backward pass.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::gradients::{HeldGradients, LayerGradients};
use super::mlp::{self, Inputs};
use super::{BackwardPlan, BackwardStage, OPERATION, Origin, Saved};
use crate::experts::combine::{self, CombineArgs};
use crate::experts::gemm::{self, GemmArgs};
use crate::layer::experts::check_device;
use crate::layer::weights::LayerWeights;
use crate::routers::gating_backward::{self, GatingBackwardArgs};
use crate::routers::router_backward::{self, RouterBackwardDesc};
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
    /// `[T, H]`: the gradient of `y`.
    pub dy: In<'a, T>,
    /// `[E]`: the slots that the balancing loss counts, exactly where it has a factor ([`crate::routers::measured_gating::Totals`]).
    pub loss_counts: Option<In<'a, i32>>,
    /// `[1]`: tokens of which the losses are means, T if absent.
    pub counted: Option<In<'a, u32>>,
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
            dy: dy.into(),
            loss_counts: None,
            counted: None,
            gradients,
        }
    }
}

buffers!(BackwardArgs<'a, T> { router_x: In<T>, given_logits: In<f32>, loss_counts: In<i32>, counted: In<u32> });

/// Buffers of a pass, opened, but for those of weights.
struct Opened<'a> {
    x: Held<'a>,
    router_x: Option<Held<'a>>,
    logits: Option<Held<'a>>,
    dy: Held<'a>,
    loss_counts: Option<Held<'a>>,
    counted: Option<Held<'a>>,
    gradients: HeldGradients<'a>,
}

impl BackwardPlan {
    /// Enqueues the backward pass of what `saved` was filled by.
    ///
    /// With no tokens nothing is launched, and the parameters' gradients become zero where they are written.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a `saved` of another layer, number of tokens or origin, or one that no pass has filled, and for a plan made for
    /// another device; [`Error::Missing`] or [`Error::Unexpected`] for weights and buffers against the descriptors; [`Error::Unsupported`] for a bias of the second
    /// product and numbers of the activation by expert; those of a buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`], [`Error::Misaligned`],
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
            Origin::Router => Some(weights.router.open(&scope, desc)?),
            _ => None,
        };
        let _experts = weights.experts.open(&scope, desc)?;
        if tokens == 0 {
            let gradients = args.gradients.open(&scope, desc, 0)?;
            return match self.desc().accumulate {
                true => Ok(()),
                false => gradients.without_tokens(&scope, desc, self.desc().keep_empty),
            };
        }
        let (elements, logits) = (tokens * desc.hidden, tokens * desc.logit_columns());
        let alignment = shape::row_alignment(desc.dtype, desc.hidden);
        let opened = Opened {
            x: scope.read("x", args.x, elements, alignment)?,
            router_x: scope.read_some("router_x", args.router_x, elements, alignment)?,
            logits: scope.read_some("given_logits", args.given_logits, logits, SCALAR)?,
            dy: scope.read("dy", args.dy, elements, alignment)?,
            loss_counts: scope.read_some("loss_counts", args.loss_counts, desc.experts, SCALAR)?,
            counted: scope.read_some("counted", args.counted, 1, SCALAR)?,
            gradients: args.gradients.open(&scope, desc, tokens)?,
        };
        let workspace = workspace.open(&scope, self.workspace_bytes())?;
        self.enqueue(&scope, weights, saved, &opened, &workspace, observer)
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
        let balances = self.desc().losses.is_some_and(|losses| losses.balance != 0.0);
        let reasons = ["the balancing loss has a factor", "no balancing loss has a factor"];
        exactly("loss_counts", balances, args.loss_counts.is_some(), reasons)?;
        if args.counted.is_some() && self.desc().losses.is_none() {
            return Err(Error::Unexpected { operation, argument: "counted", reason: "there are no losses" });
        }
        if origin == Origin::Choices && args.gradients.logits.is_some() {
            let reason = "the choices come from elsewhere";
            return Err(Error::Unexpected { operation, argument: "gradients.logits", reason });
        }
        if origin != Origin::Router && args.gradients.router.matrix.is_some() {
            let reason = "the layer's router was not asked";
            return Err(Error::Unexpected { operation, argument: "gradients.router.matrix", reason });
        }
        let unsupported = |argument, supported: &str| Err(Error::unsupported(operation, argument, supported, "some"));
        if weights.experts.down.bias.is_some() {
            return unsupported("down.bias", "no bias of the second product");
        }
        if weights.experts.shared.is_some_and(|shared| shared.down.bias.is_some()) {
            return unsupported("shared.down.bias", "no bias of the second product");
        }
        if weights.experts.swiglu.is_some() {
            return unsupported("swiglu", "numbers of the activation that all experts share");
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
        let router_input = router_input.as_ref().filter(|_| self.router.is_some());
        let of_logits = self.gating.is_some()
            && (router_input.is_some() || gradients.router.is_some() || gradients.logits.is_some());
        let of_rows = gradients.x.is_some();

        if of_logits || of_rows || gradients.routed.is_some() {
            let experts = &weights.experts;
            let pre_activation = match &saved.pre_activation {
                Some(kept) => kept.into(),
                None => self.recompute(scope, weights, saved, x, workspace, observer)?,
            };
            let inputs =
                Inputs { x, dy, gate_up: experts.gate_up, down: experts.down, pre_activation, rows: &saved.dispatched };
            self.routed.enqueue(scope, mlp::ROUTED, &inputs, workspace, &gradients.routed, of_rows, observer)?;
        }
        if let Some(step) = self.gating.as_ref().filter(|_| of_logits) {
            let d_logits = optional(&gradients.logits).unwrap_or_else(|| workspace.at(self.regions.d_logits));
            let columns = desc.logit_columns();
            let logits = match optional(&at.logits) {
                Some(given) => given.input::<f32>(tokens * columns),
                None => (&saved.logits).into(),
            };
            let d_weights = workspace.at(self.routed.regions.d_slot_weight).input(rows.slots);
            let mut args = GatingBackwardArgs::new(logits, &saved.ids, d_weights, d_logits.out(tokens * columns))
                .dispatched(&saved.dispatched);
            args.counts = optional(&at.loss_counts).map(|counts| counts.input(desc.experts));
            args.counted = optional(&at.counted).map(|counted| counted.input(1));
            gating_backward::forward(kernels, stream, &step.desc, args).map_err(within)?;
            observer(BackwardStage::Gating);
            self.enqueue_router::<T>(scope, weights, at, d_logits, router_input, observer)?;
        }
        let Some(dx) = optional(&gradients.x) else {
            return self.enqueue_shared(scope, weights, saved, at, workspace, false, observer);
        };
        self.enqueue_shared(scope, weights, saved, at, workspace, true, observer)?;
        let d_rows = workspace.at(self.routed.regions.d_rows).input::<T>(rows.slots * desc.hidden);
        let mut args = CombineArgs::new(d_rows, &saved.dispatched, dx.out::<T>(elements));
        // What came through the router lies there already.
        args.accumulate = router_input.is_some() && at.router_x.is_none();
        args.addend = self.shared.map(|shared| workspace.at(shared.regions.d_rows).input::<T>(elements));
        combine::forward(kernels, stream, &self.sum.desc, args).map_err(within)?;
        observer(BackwardStage::Sum);
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
        let mut args = GemmArgs::new(x, weights.experts.gate_up, hidden).dispatched(&saved.dispatched);
        args.pre_activation = Some(place.out(elements));
        gemm::forward(scope.kernels, scope.stream, &desc, args).map_err(|error| error.within(OPERATION))?;
        observer(BackwardStage::GateUp);
        Ok(place.input(elements))
    }

    /// Both gradients of the router's product, each where it is asked for.
    fn enqueue_router<T: Element>(
        &self,
        scope: &Scope<'_>,
        weights: &LayerWeights<'_>,
        at: &Opened<'_>,
        d_logits: Address<'_>,
        input: Option<&Held<'_>>,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<(), Error> {
        let Some(steps) = &self.router else { return Ok(()) };
        let within = |error: Error| error.within(OPERATION);
        let (kernels, stream) = (scope.kernels, scope.stream);
        let RouterBackwardDesc { tokens, experts, hidden, .. } = steps.desc;
        let d_logits = d_logits.input::<f32>(tokens * experts);
        if let Some(gradient) = optional(&at.gradients.router) {
            let desc = steps.desc.accumulate(self.desc().accumulate);
            let seen = optional(&at.router_x).unwrap_or_else(|| at.x.address()).input::<T>(tokens * hidden);
            let gradient = gradient.out(experts * hidden);
            router_backward::into_weight::<T>(kernels, stream, &desc, d_logits, seen, gradient).map_err(within)?;
            observer(BackwardStage::RouterWeight);
        }
        if let (Some(gradient), Some(matrix)) = (input, weights.router.matrix) {
            let out = gradient.address().out::<T>(tokens * hidden);
            match (matrix, T::of_tensor(matrix)) {
                (_, Some(matrix)) => {
                    router_backward::into_x::<T, T>(kernels, stream, &steps.desc, d_logits, matrix, out)
                }
                (Tensor::F32(matrix), None) => {
                    router_backward::into_x::<T, f32>(kernels, stream, &steps.desc, d_logits, matrix, out)
                }
                (other, None) => {
                    let (argument, expected, got) = ("router.matrix", Dtype::F32, other.dtype());
                    Err(Error::WrongDtype { operation: OPERATION, argument, expected, got })
                }
            }
            .map_err(within)?;
            observer(BackwardStage::RouterInput);
        }
        Ok(())
    }

    /// The shared expert, where there is one and something is asked of it.
    #[allow(clippy::too_many_arguments)]
    fn enqueue_shared<T: Element>(
        &self,
        scope: &Scope<'_>,
        weights: &LayerWeights<'_>,
        saved: &Saved<T>,
        at: &Opened<'_>,
        workspace: &Held<'_>,
        input: bool,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<(), Error> {
        let Some((plan, gradients)) = self.shared.as_ref().zip(at.gradients.shared.as_ref()) else { return Ok(()) };
        let held = saved.shared_pre_activation.as_ref().zip(saved.all_tokens.as_ref());
        let Some((shared, (pre_activation, rows))) = weights.experts.shared.zip(held) else { return Ok(()) };
        if !input && !gradients.is_some() {
            return Ok(());
        }
        let elements = self.layer().tokens() * self.layer().desc().hidden;
        let inputs = Inputs {
            x: at.x.address().input::<T>(elements),
            dy: at.dy.address().input::<T>(elements),
            gate_up: shared.gate_up,
            down: shared.down,
            pre_activation: pre_activation.into(),
            rows,
        };
        plan.enqueue(scope, mlp::SHARED, &inputs, workspace, gradients, input, observer)
    }
}
