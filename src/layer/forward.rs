//! The whole layer: its three parts, one behind the other, with everything between them in the workspace.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::around::{KeptSums, Tail};
use super::experts::{ExpertsPlan, Products};
use super::intermediates::Intermediates;
use super::route::{ChoiceAddresses, HeldRoute, RouteAddresses, RouteArgs, RoutePlan};
use super::weights::LayerWeights;
use super::{Choices, LayerDesc, OPERATION, Stage};
use crate::experts::dispatched::{Dispatched, Filling};
use crate::experts::gemm::swapped::Scratch;
use crate::experts::{combine, gemm};
use crate::rules::{Dropout, IdFormat, NullOutput};
use crate::runtime::builder::buffers;
use crate::runtime::launch::{Held, SCALAR, Scope, optional};
use crate::runtime::shape;
use crate::{DeviceInfo, Element, Error, In, Kernel, Kernels, Out, Selection, TokenMask, Workspace};

/// Every choice for a layer and a number of tokens: kernels, grids, and where each intermediate lies in the workspace.
#[derive(Clone, Copy, Debug)]
pub struct LayerPlan {
    tokens: usize,
    route: RoutePlan,
    experts: ExpertsPlan,
}

impl LayerPlan {
    /// See [`LayerDesc::plan`].
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn new(desc: &LayerDesc, tokens: usize, device: &DeviceInfo) -> Result<LayerPlan, Error> {
        let (route, arena) = RoutePlan::new(desc, tokens, device)?;
        let experts = ExpertsPlan::behind(arena, desc, &route.rows(), device)?;
        Ok(LayerPlan { tokens, route, experts })
    }

    /// The layer that was planned.
    pub fn desc(&self) -> &LayerDesc {
        &self.route.desc
    }

    /// Tokens of a batch.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Rows of a tile of both products.
    pub fn tile_m(&self) -> usize {
        self.experts.rows().tile_m
    }

    /// The first part alone.
    pub fn route(&self) -> &RoutePlan {
        &self.route
    }

    /// The second and third part alone.
    pub fn experts(&self) -> &ExpertsPlan {
        &self.experts
    }

    /// Size of the workspace in bytes. It never falls as the number of tokens grows, so that a workspace for the largest batch serves all; one
    /// for several layers is as large as the largest of theirs.
    pub fn workspace_bytes(&self) -> usize {
        self.experts.workspace_bytes()
    }

    /// The stages of a forward pass with their launches, in order. None with no tokens.
    pub fn stages(&self) -> impl Iterator<Item = (Stage, Selection)> + use<> {
        self.route.stages_with_gate().chain(self.experts.stages_of_layer_after_gate())
    }

    /// The stages with their launches where the choices come from elsewhere ([`LayerArgs::choices`]).
    pub fn stages_of_choices(&self) -> impl Iterator<Item = (Stage, Selection)> + use<> {
        self.route.stages_of_choices().chain(self.experts.stages_of_layer())
    }

    /// The stages with their launches where the logits come from elsewhere ([`RouteArgs::given_logits`]).
    pub fn stages_of_logits(&self) -> impl Iterator<Item = (Stage, Selection)> + use<> {
        self.route.stages_of_logits().chain(self.experts.stages_of_layer())
    }

    /// Kernel launches of a forward pass.
    pub fn launches(&self) -> usize {
        self.stages().count()
    }

    /// The kernels of a forward pass, for [`crate::Kernels::preload`].
    pub fn kernels(&self) -> impl Iterator<Item = Kernel> + use<> {
        self.stages().map(|(_, selection)| selection.kernel)
    }

    /// Opens a buffer for the logits of the shared expert's gate.
    fn open_gate<'b, 'c: 'b>(
        &self,
        scope: &Scope<'b>,
        logits: Option<Out<'c, f32>>,
    ) -> Result<Option<Held<'b>>, Error> {
        if logits.is_some() && !self.desc().has_shared_gate() {
            let reason = "the descriptor has no gated shared expert";
            return Err(Error::Unexpected { operation: OPERATION, argument: "shared_gate", reason });
        }
        scope.write_some("shared_gate", logits, self.tokens, SCALAR)
    }

    /// Enqueues the layer on `stream`.
    ///
    /// With no tokens, counts and statistics are set to zero where given, and nothing is launched.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Unexpected`] for weights and buffers against the descriptor; [`Error::Invalid`] for a plan made
    /// for another device; those of a buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`], [`Error::Misaligned`],
    /// [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those of the driver.
    pub fn forward<T: Element>(
        &self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        weights: &LayerWeights<'_>,
        args: LayerArgs<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        self.forward_observed(kernels, stream, weights, args, workspace, &mut |_| ())
    }

    /// [`LayerPlan::forward`], calling `observer` after each stage has been enqueued: to record an event on the stream, say.
    ///
    /// # Errors
    /// Those of [`LayerPlan::forward`].
    pub fn forward_observed<T: Element>(
        &self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        weights: &LayerWeights<'_>,
        args: LayerArgs<'_, T>,
        workspace: &mut Workspace,
        observer: &mut dyn FnMut(Stage),
    ) -> Result<(), Error> {
        self.run(kernels, stream, weights, args, None, workspace, observer)
    }

    /// [`LayerPlan::forward_observed`] with the rows in `keep`, else in the workspace.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn run<T: Element>(
        &self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        weights: &LayerWeights<'_>,
        args: LayerArgs<'_, T>,
        keep: Option<&mut Dispatched>,
        workspace: &mut Workspace,
        observer: &mut dyn FnMut(Stage),
    ) -> Result<(), Error> {
        let scope = Scope::begin(OPERATION, kernels, stream)?;
        let desc = self.desc();
        scope.check_dtype::<T>("x", desc.dtype)?;
        self.experts.check_device(&scope)?;
        if let Some(dropout) = &args.dropout {
            gemm::check_dropout(OPERATION, dropout)?;
        } else if args.noise_state.is_some() && !desc.draws() {
            let reason = "neither dropout nor the admission draws anything";
            return Err(Error::Unexpected { operation: OPERATION, argument: "noise_state", reason });
        }
        if args.accumulate && args.residual.is_some() {
            let reason = "y accumulates";
            return Err(Error::Unexpected { operation: OPERATION, argument: "residual", reason });
        }
        let mut route = args.route;
        if desc.draws() {
            route.noise_state = route.noise_state.or(args.noise_state);
        }
        let elements = self.tokens * desc.hidden;
        let router = match args.choices {
            None => Some(weights.router.open(&scope, desc)?),
            Some(_) => {
                self.route.check_mask_of_choices(&route.mask)?;
                None
            }
        };
        let given_logits = route.given_logits.is_some();
        if args.router_x.is_some() && (args.choices.is_some() || given_logits) {
            let reason = "the layer's router is not asked";
            return Err(Error::Unexpected { operation: OPERATION, argument: "router_x", reason });
        }
        if given_logits && args.choices.is_some() {
            let reason = "the choices are given";
            return Err(Error::Unexpected { operation: OPERATION, argument: "given_logits", reason });
        }
        let experts = weights.experts.open(&scope, desc)?;
        let filling = keep.map(|dispatched| dispatched.fill(&scope, &self.route.rows())).transpose()?;
        if self.tokens == 0 {
            if let Some(filling) = filling {
                filling.zero(&scope)?;
                filling.filled();
            }
            return self.route.without_tokens(&scope, route);
        }
        let alignment = shape::row_alignment(desc.dtype, desc.hidden);
        let x = scope.read("x", args.x, elements, alignment)?;
        let router_x = scope.read_some("router_x", args.router_x, elements, alignment)?;
        let given = self.tokens * self.route.candidates();
        let (ids, choice_weights) = args.choices.map(|choices| (choices.ids, choices.weights)).unzip();
        let given_ids = ids.map(|ids| self.route.open_ids(&scope, ids)).transpose()?;
        let given_weights = scope.read_some("choices.weights", choice_weights, given, SCALAR)?;
        let residual = scope.read_some("residual", args.residual, elements, alignment)?;
        let y = scope.write("y", args.y, elements, alignment)?;
        let wanted = Intermediates {
            hidden: args.hidden,
            pre_activation: args.pre_activation,
            shared_hidden: args.shared_hidden,
            shared_pre_activation: args.shared_pre_activation,
        };
        let kept = wanted.open(&scope, desc, self.experts.rows())?;
        for (argument, there, given) in [
            ("slot_outputs", desc.norms.slots.is_some(), args.slot_outputs.is_some()),
            ("latent_sum", desc.latent.is_some(), args.latent_sum.is_some()),
            ("sum", desc.norms.output.is_some(), args.sum.is_some()),
        ] {
            if given && !there {
                let reason = "nothing stands behind it";
                return Err(Error::Unexpected { operation: OPERATION, argument, reason });
            }
        }
        let (slots, width) = (self.experts.rows().slots, desc.expert_width());
        let narrow = shape::row_alignment(desc.dtype, width);
        let slot_outputs = scope.write_some("slot_outputs", args.slot_outputs, slots * width, narrow)?;
        let latent_sum = scope.write_some("latent_sum", args.latent_sum, self.tokens * width, narrow)?;
        let sum = scope.write_some("sum", args.sum, elements, alignment)?;
        let sums = KeptSums { latent_sum: optional(&latent_sum), sum: optional(&sum) };
        let noise_state = scope.read_noise_state(args.noise_state)?;
        let workspace = workspace.open(&scope, self.workspace_bytes())?;
        let shared_gate = self.open_gate(&scope, args.shared_gate)?;
        let (held, mut extras) = HeldRoute::open(&scope, &self.route, router.is_some(), route)?;

        let lists = match &filling {
            Some(filling) => filling.addresses(),
            None => self.route.regions.lists(&workspace),
        };
        let at = RouteAddresses::new(&self.route, &workspace, &held, lists);
        let regions = self.experts.regions;
        let gate_logits = optional(&shared_gate).unwrap_or_else(|| workspace.at(regions.shared_gate));
        let given_choices = optional(&given_ids).zip(optional(&given_weights));
        match (&router, given_choices) {
            (Some(router), _) if given_logits => {
                self.route.enqueue_choice(&scope, router, &workspace, &mut extras, &at, observer)?;
                self.experts.enqueue_gate(&scope, &experts, x.address(), gate_logits, observer)?;
            }
            (Some(router), _) => {
                let gate = experts.shared_gate().map(|weight| (weight, gate_logits));
                let seen = optional(&router_x).unwrap_or_else(|| x.address());
                self.route.enqueue_all(&scope, router, seen, gate, &workspace, &mut extras, &at, observer)?;
            }
            (None, Some((ids, weights))) => {
                let choices = ChoiceAddresses { format: desc.choices, ids, weights };
                self.route.enqueue_rows(&scope, &workspace, &mut extras, &at, choices, observer)?;
                self.experts.enqueue_gate(&scope, &experts, x.address(), gate_logits, observer)?;
            }
            (None, None) => {}
        }
        let input = self.experts.around.enqueue_before(&scope, &experts.around, &workspace, x.address(), observer)?;
        let products = Products {
            x: x.address(),
            input,
            live: at.lists.live(desc.local_experts()),
            rows: at.lists.rows(),
            kept: kept.addresses(&workspace, regions),
            outputs: optional(&slot_outputs).unwrap_or_else(|| workspace.at(regions.y_slots)),
            y_slots: workspace.at(regions.y_slots),
            addend: desc.shared.map(|_| workspace.at(regions.addend)),
            dropout: args.dropout,
            noise_state: optional(&noise_state),
            scratch: Scratch { partials: workspace.at(regions.partials), counters: workspace.counters() },
            sum: None,
            adds_to_sums: self.experts.adds_to_sums(),
        };
        // What comes after the sum takes the residual, and where the sum has a width of its own, the shared expert too.
        let around = &self.experts.around;
        let residual = if args.accumulate { Some(y.address()) } else { optional(&residual) };
        let shared_gate = desc.has_shared_gate().then_some(gate_logits);
        let elsewhere = around.sum_place(&workspace, sums);
        let sums_shared = around.sums_shared();
        let sum = combine::Addresses {
            y_slots: products.y_slots,
            rows: products.rows,
            weights: None,
            residual: residual.filter(|_| elsewhere.is_none()),
            bias: experts.bias(),
            addend: products.addend.filter(|_| sums_shared),
            addend_gate: shared_gate.filter(|_| sums_shared),
            identity: match (desc.map, desc.null.map(|null| null.output)) {
                (Some(_), _) => {
                    Some(combine::IdentityAddresses { x: input, weight: at.identity_weight, choices: None })
                }
                (None, Some(NullOutput::Input)) => {
                    let (format, ids, weight) = match given_choices {
                        Some((ids, weights)) => (desc.choices, ids, weights),
                        None => (IdFormat::I32, at.ids, at.weights),
                    };
                    let identities = (desc.local_experts() as u32, desc.experts as u32);
                    Some(combine::IdentityAddresses { x: input, weight, choices: Some((ids, format, identities)) })
                }
                _ => None,
            },
            y: elsewhere.unwrap_or_else(|| y.address()),
        };
        let products = Products { sum: self.experts.combines().then_some(sum), ..products };
        self.experts.enqueue(&scope, &experts, &products, observer)?;
        if products.sum.is_none() {
            self.experts.enqueue_combine(&scope, sum)?;
            observer(Stage::Combine);
        }
        if elsewhere.is_some() {
            let shared = products.addend.filter(|_| !sums_shared).map(|addend| (addend, shared_gate));
            let tail = Tail {
                rows: products.rows,
                shared,
                shared_scale: desc.shared_scale(),
                residual,
                kept: sums,
                y: y.address(),
            };
            around.enqueue_after(&scope, &experts.around, &workspace, tail, observer)?;
        }
        filling.into_iter().for_each(Filling::filled);
        Ok(())
    }
}

/// Inputs and outputs of a forward pass. Intermediate results that no buffer is given for stay in the workspace.
#[non_exhaustive]
pub struct LayerArgs<'a, T> {
    /// `[T, H]`.
    pub x: In<'a, T>,
    /// `[T, H]`: what the router sees (with the gate of a shared expert) in place of `x`: jittered rows, say.
    pub router_x: Option<In<'a, T>>,
    /// `[T, H]`, added to `y`.
    pub residual: Option<In<'a, T>>,
    /// Adds to what `y` holds: the residual is `y` itself. Not with `residual`.
    pub accumulate: bool,
    /// `[T, H]`, written.
    pub y: Out<'a, T>,
    /// Choices that another router made: the layer's own is not asked then, nor its weights looked at.
    pub choices: Option<Choices<'a>>,
    /// What the choice of experts reads and writes.
    pub route: RouteArgs<'a>,
    /// `[slots, I]`, written: what stands between the products, for a backward pass.
    pub hidden: Option<Out<'a, T>>,
    /// `[slots, 2I]` (`[slots, I]` without a gate), written: what stands before the activation, gates before ups whatever the weight's
    /// order.
    pub pre_activation: Option<Out<'a, T>>,
    /// `[T, I_shared]`, written: [`LayerArgs::hidden`] of the shared expert.
    pub shared_hidden: Option<Out<'a, T>>,
    /// `[T, 2 I_shared]` (`[T, I_shared]`), written: [`LayerArgs::pre_activation`] of the shared expert.
    pub shared_pre_activation: Option<Out<'a, T>>,
    /// `[T]`, written: logits of the shared expert's gate, where it has one.
    pub shared_gate: Option<Out<'a, f32>>,
    /// `[slots, H]`, with a latent width `[slots, L]`, written: the experts' outputs in front of their norm, where they have one.
    pub slot_outputs: Option<Out<'a, T>>,
    /// `[T, L]`, written: the experts' sum in front of its projection, where there is a latent width.
    pub latent_sum: Option<Out<'a, T>>,
    /// `[T, H]`, written: the sum in front of its norm, where it has one.
    pub sum: Option<Out<'a, T>>,
    /// Drops some of what stands between the products.
    pub dropout: Option<Dropout>,
    /// `[2]`, 8-byte aligned, of all that the layer draws: dropout, and an admission's second experts (unless
    /// [`RouteArgs::noise_state`] is given for these). See [`crate::routers::noise_state`].
    pub noise_state: Option<In<'a, u64>>,
}

impl<'a, T> LayerArgs<'a, T> {
    /// `x` to `y`, nothing else.
    pub fn new(x: impl Into<In<'a, T>>, y: impl Into<Out<'a, T>>) -> LayerArgs<'a, T> {
        LayerArgs {
            x: x.into(),
            router_x: None,
            residual: None,
            accumulate: false,
            y: y.into(),
            choices: None,
            route: RouteArgs::new(),
            hidden: None,
            pre_activation: None,
            shared_hidden: None,
            shared_pre_activation: None,
            shared_gate: None,
            slot_outputs: None,
            latent_sum: None,
            sum: None,
            dropout: None,
            noise_state: None,
        }
    }

    /// The same for a shorter time.
    pub(super) fn reborrow(&mut self) -> LayerArgs<'_, T> {
        fn again<'b, U>(buffer: &'b mut Option<Out<'_, U>>) -> Option<Out<'b, U>> {
            buffer.as_mut().map(Out::reborrow)
        }
        LayerArgs {
            x: self.x,
            router_x: self.router_x,
            residual: self.residual,
            accumulate: self.accumulate,
            y: self.y.reborrow(),
            choices: self.choices,
            route: self.route.reborrow(),
            hidden: again(&mut self.hidden),
            pre_activation: again(&mut self.pre_activation),
            shared_hidden: again(&mut self.shared_hidden),
            shared_pre_activation: again(&mut self.shared_pre_activation),
            shared_gate: again(&mut self.shared_gate),
            slot_outputs: again(&mut self.slot_outputs),
            latent_sum: again(&mut self.latent_sum),
            sum: again(&mut self.sum),
            dropout: self.dropout,
            noise_state: self.noise_state,
        }
    }

    /// Adds to what `y` holds.
    #[must_use]
    pub fn accumulate(self) -> LayerArgs<'a, T> {
        LayerArgs { accumulate: true, ..self }
    }

    /// By choices that another router made.
    #[must_use]
    pub fn choices(self, choices: Choices<'a>) -> LayerArgs<'a, T> {
        LayerArgs { choices: Some(choices), ..self }
    }

    /// With what the choice of experts reads and writes.
    #[must_use]
    pub fn route(self, route: RouteArgs<'a>) -> LayerArgs<'a, T> {
        LayerArgs { route, ..self }
    }

    /// With padding among the tokens: its `y` is the residual, plus what shared experts make of its `x`.
    #[must_use]
    pub fn mask(mut self, mask: TokenMask<'a>) -> LayerArgs<'a, T> {
        self.route.mask = mask;
        self
    }

    /// With dropout inside the experts.
    #[must_use]
    pub fn dropout(self, dropout: Dropout) -> LayerArgs<'a, T> {
        LayerArgs { dropout: Some(dropout), ..self }
    }
}

buffers!(LayerArgs<'a, T> {
    router_x: In<T>,
    residual: In<T>,
    hidden: Out<T>,
    pre_activation: Out<T>,
    shared_hidden: Out<T>,
    shared_pre_activation: Out<T>,
    shared_gate: Out<f32>,
    slot_outputs: Out<T>,
    latent_sum: Out<T>,
    sum: Out<T>,
    noise_state: In<u64>,
});
