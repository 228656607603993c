//! The second and third part: both products over a dispatch's rows, and the sum of each token's.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::around::AroundPlan;
use super::desc::{LayerDesc, Mlp, SharedDesc, TokenSums};
use super::intermediates::{IntermediateAddresses, Intermediates, Regions};
use super::weights::{ExpertWeights, HeldExperts};
use super::{OPERATION, Stage, Step};
use crate::experts::combine::{self, CombineDesc};
use crate::experts::dispatched::{Dispatched, RowAddresses, SlotShape};
use crate::experts::gemm::swapped::{Scratch, Sum};
use crate::experts::gemm::{self, ByExpertAddresses, GemmDesc, Rows};
use crate::experts::gemm_combine;
use crate::experts::weight::HeldWeight;
use crate::registry::Kernel;
use crate::routers::router::{self, RouterDesc};
use crate::rules::{Dropout, Weighting};
use crate::runtime::builder::buffers;
use crate::runtime::launch::{Address, SCALAR, Scope, optional};
use crate::runtime::shape;
use crate::runtime::workspace::Arena;
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection, Workspace};

/// The products of a layer's experts over the rows of a dispatch, and the sum for each token: kernels, grids, and places in the workspace.
#[derive(Clone, Copy, Debug)]
pub struct ExpertsPlan {
    pub(super) desc: LayerDesc,
    device: DeviceInfo,
    rows: SlotShape,
    gate_up: Step<GemmDesc>,
    down: Step<GemmDesc>,
    /// The shared expert's products, where its form is not that of the others: in launches of its own. Else it has tiles in theirs.
    apart: Option<[Step<GemmDesc>; 2]>,
    /// The shared expert's gate, where no router of the layer computes it.
    gate: Option<Step<RouterDesc>>,
    combine: Step<CombineDesc>,
    /// The second product and the sum in one launch, in a whole layer of few tokens.
    down_combine: Option<Selection>,
    /// The same in a whole layer whose second product adds onto each token's sum, and what is left of the combine.
    sums: Option<(Step<GemmDesc>, Step<CombineDesc>)>,
    /// Norms and projections.
    pub(super) around: AroundPlan,
    pub(super) regions: Regions,
    workspace_bytes: usize,
}

/// Both products of an expert's rows.
fn products(desc: &LayerDesc, mlp: &Mlp, rows: Rows, [intermediate, width]: [usize; 2]) -> [GemmDesc; 2] {
    let of = |n, k| GemmDesc::new(desc.dtype, rows, n, k).kernels(desc.kernels()).split(!desc.batch_invariant);
    let gate_up =
        of(intermediate, width).gather(matches!(rows, Rows::Grouped(_))).weight(mlp.gate_up).activation(mlp.activation);
    [gate_up, of(width, intermediate).weight(mlp.down)]
}

/// Widths that products can be cut into, gate and up side by side included.
pub(super) fn check_widths(desc: &LayerDesc) -> Result<(), Error> {
    shape::positive(OPERATION, "hidden", desc.hidden)?;
    desc.latent.map(|latent| shape::positive(OPERATION, "latent.width", latent.width)).transpose()?;
    let shared = desc.shared.map(|shared| ("shared.intermediate", shared.intermediate));
    for (argument, intermediate) in [("intermediate", desc.intermediate)].into_iter().chain(shared) {
        shape::positive(OPERATION, argument, intermediate)?;
        shape::product_i32(OPERATION, argument, &[2, intermediate])?;
    }
    Ok(())
}

/// Both products of the routed experts, and of a shared one that has their form.
pub(super) fn joined_products(desc: &LayerDesc, rows: &SlotShape) -> [GemmDesc; 2] {
    let shared = desc.shared.filter(|shared| shared.joins(desc) && rows.tokens > 0);
    let shared_rows = if shared.is_some() { rows.tokens } else { 0 };
    let widths = [desc.intermediate, desc.expert_width()];
    let [gate_up, down] = products(desc, &desc.mlp, Rows::Grouped(*rows), widths).map(|it| it.shared_rows(shared_rows));
    [gate_up.shared_activation(shared.map(|shared| shared.mlp.activation)), down]
}

impl ExpertsPlan {
    /// Plans products of `desc`'s experts over the rows of a dispatch of shape `rows`.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn new(desc: &LayerDesc, rows: &SlotShape, device: &DeviceInfo) -> Result<ExpertsPlan, Error> {
        ExpertsPlan::behind(Arena::new(OPERATION), desc, rows, device)
    }

    /// The same with its part of the workspace behind what `arena` holds.
    pub(super) fn behind(
        mut arena: Arena,
        desc: &LayerDesc,
        rows: &SlotShape,
        device: &DeviceInfo,
    ) -> Result<ExpertsPlan, Error> {
        let &LayerDesc { dtype, hidden, intermediate, .. } = desc;
        check_widths(desc)?;
        gemm::check_activation(OPERATION, "mlp.activation", desc.mlp.activation, desc.mlp.gate_up.glu)?;
        if let Some(shared) = &desc.shared {
            let (activation, glu) = (shared.mlp.activation, shared.mlp.gate_up.glu);
            gemm::check_activation(OPERATION, "shared.mlp.activation", activation, glu)?;
        }
        if rows.experts != desc.local_experts() {
            return Err(Error::invalid(OPERATION, "rows.experts", desc.local_experts().to_string(), rows.experts));
        }

        let width = desc.expert_width();
        let step = |product: GemmDesc| {
            let measured = desc.overrides.map_or(Ok(product), |measured| measured.apply(&product, device));
            let desc = measured.map_err(|error| error.within(OPERATION))?;
            Ok::<_, Error>(Step { desc, selection: gemm::select_for(OPERATION, &desc, device)? })
        };
        let steps = |[gate_up, down]: [GemmDesc; 2]| Ok::<_, Error>([step(gate_up)?, step(down)?]);
        let alone = desc.shared.filter(|shared| !shared.joins(desc));
        let apart = |shared: SharedDesc| {
            steps(products(desc, &shared.mlp, Rows::Dense(rows.tokens), [shared.intermediate, hidden]))
        };
        let apart = alone.map(apart).transpose()?;
        let joined = desc.shared.is_some() && alone.is_none();
        let [gate_up, down] = steps(joined_products(desc, rows))?;
        let gate = desc.has_shared_gate().then(|| {
            let desc = RouterDesc::new(dtype, rows.tokens, 0, hidden).weight(desc.router_dtype).shared_gate(true);
            let selection = router::select(&desc, device).map_err(|error| error.within(OPERATION))?;
            Ok::<_, Error>(Step { desc, selection })
        });
        let gate = gate.transpose()?;
        for (argument, factor) in [("routed_scale", desc.routed_scale), ("shared.scale", desc.shared_scale())] {
            if !factor.is_finite() {
                return Err(Error::invalid(OPERATION, argument, "a finite number", factor));
            }
        }
        let combine = CombineDesc::new(dtype, *rows, width).scale(desc.routed_scale).addend_scale(desc.shared_scale());
        let combine = Step { desc: combine, selection: combine::select_for(OPERATION, &combine, device)? };

        if desc.token_sums == TokenSums::Atomic && desc.batch_invariant {
            let expected = "TokenSums::Ordered with batch_invariant";
            return Err(Error::invalid(OPERATION, "token_sums", expected, format!("{:?}", desc.token_sums)));
        }

        let element = dtype.bytes() as usize;
        let h = shape::product(OPERATION, "intermediate", &[rows.slots, intermediate])?;
        let shared_intermediate = desc.shared.map_or(0, |shared| shared.intermediate);
        let shared_h = shape::product(OPERATION, "shared.intermediate", &[rows.tokens, shared_intermediate])?;
        let addend = if desc.shared.is_some() { rows.tokens * hidden } else { 0 };
        arena.barrier()?;
        let (intermediates, shared_intermediates) = if joined {
            (arena.region("intermediate", h, element)?, arena.region("shared.intermediate", shared_h, element)?)
        } else {
            let both = arena.region("intermediate", h.max(shared_h), element)?;
            (both, both)
        };
        // Few tokens keep their rows, of more there are sums of f32: as large as either, for any number of tokens.
        let y_slots = shape::product(OPERATION, "y_slots", &[rows.slots, width])?;
        let sums_fit = match desc.token_sums {
            TokenSums::Ordered => 0,
            TokenSums::Atomic => shape::product(OPERATION, "y", &[rows.tokens, width, size_of::<f32>() / element])?,
        };
        let regions = Regions {
            hidden: intermediates,
            shared_hidden: shared_intermediates,
            y_slots: arena.region("y_slots", y_slots.max(sums_fit), element)?,
            addend: arena.region("addend", addend, element)?,
            shared_gate: arena.region("shared_gate", if gate.is_some() { rows.tokens } else { 0 }, 4)?,
            // For any number of tokens: few have more blocks that share than many.
            partials: arena.region("partials", gemm::most_partial_bytes(desc.dtype, desc.kernels(), device), 1)?,
        };
        let around = AroundPlan::new(&mut arena, desc, rows, device)?;
        // Nothing comes between the product and the sum, and the sum is of experts' rows and what stands beside them.
        let alone = apart.is_none() && desc.map.is_none() && desc.null.is_none();
        let alone = alone && desc.latent.is_none() && desc.norms.slots.is_none() && desc.norms.output.is_none();
        let combines = |step: &Step<GemmDesc>| {
            let plan = if alone { gemm_combine::plan_of(OPERATION, &step.desc, device)? } else { None };
            let plan = plan.filter(|_| gemm_combine::is_short(rows.tokens, desc.all_choices()));
            Ok::<_, Error>(plan.map(|plan| plan.selection()))
        };
        let down_combine = combines(&down)?;
        let few_rows = matches!(down.selection.kernel.variant(), Kernel::GemmSwapped(_));
        let adds = desc.token_sums == TokenSums::Atomic && !few_rows && desc.norms.slots.is_none();
        let sums = adds.then(|| {
            let product =
                GemmDesc { tile_n: None, kernels: desc.kernels(), ..down.desc }.output(gemm::Output::TokenSums);
            let rest = combine.desc.sums(true);
            let selection = combine::select_for(OPERATION, &rest, device)?;
            Ok::<_, Error>((step(product)?, Step { desc: rest, selection }))
        });
        let sums = sums.transpose()?;
        Ok(ExpertsPlan {
            desc: *desc,
            device: *device,
            rows: *rows,
            gate_up,
            down,
            apart,
            gate,
            combine,
            down_combine,
            sums,
            around,
            regions,
            workspace_bytes: arena.bytes(),
        })
    }

    /// The device that was planned for.
    pub(super) fn device(&self) -> &DeviceInfo {
        &self.device
    }

    /// The first product of the routed experts, without rows of a shared one.
    pub(super) fn gate_up_alone(&self) -> GemmDesc {
        self.gate_up.desc.shared_rows(0).shared_activation(None)
    }

    /// The dispatch's shape that was planned for.
    pub fn rows(&self) -> &SlotShape {
        &self.rows
    }

    /// Size of the workspace in bytes.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    /// The stages with their launches, in order, of [`ExpertsPlan::forward`] and [`ExpertsPlan::combine`]. None with no tokens.
    pub fn stages(&self) -> impl Iterator<Item = (Stage, Selection)> + use<> {
        self.gate_stage().chain(self.stages_after_gate(false))
    }

    /// Those of a whole layer.
    pub(super) fn stages_of_layer(&self) -> impl Iterator<Item = (Stage, Selection)> + use<> {
        self.gate_stage().chain(self.stages_of_layer_after_gate())
    }

    /// Those of a whole layer whose router has computed the shared expert's gate.
    pub(super) fn stages_of_layer_after_gate(&self) -> impl Iterator<Item = (Stage, Selection)> + use<> {
        self.stages_after_gate(true)
    }

    fn gate_stage(&self) -> impl Iterator<Item = (Stage, Selection)> + use<> {
        let tokens = self.rows.tokens;
        self.gate.filter(|_| tokens > 0).map(|step| (Stage::SharedGate, step.selection)).into_iter()
    }

    /// `whole`: second product and sum as a whole layer has them, in one launch or the sums in the product.
    fn stages_after_gate(&self, whole: bool) -> impl Iterator<Item = (Stage, Selection)> + use<> {
        let together = self.down_combine.filter(|_| whole);
        let (down, combine) = match &self.sums {
            Some((down, combine)) if whole => (down.selection, combine.selection),
            _ => (self.down.selection, self.combine.selection),
        };
        let rows = self.rows;
        let shared = self.apart.into_iter().flat_map(|[gate_up, down]| {
            [(Stage::SharedGateUp, gate_up.selection), (Stage::SharedDown, down.selection)]
        });
        let second = together.map_or((Stage::Down, down), |together| (Stage::DownCombine, together));
        let combine = together.is_none().then_some((Stage::Combine, combine));
        let products = [(Stage::GateUp, self.gate_up.selection), second];
        self.around
            .stages_before()
            .chain(products)
            .chain(self.around.stages_between())
            .chain(shared)
            .chain(combine)
            .chain(self.around.stages_after())
            .filter(move |_| rows.tokens > 0)
    }

    pub(super) fn check_device(&self, scope: &Scope<'_>) -> Result<(), Error> {
        check_device(scope, &self.device)
    }

    fn check(&self, scope: &Scope<'_>, dispatched: &Dispatched) -> Result<(), Error> {
        self.check_device(scope)?;
        if *dispatched.shape() != self.rows {
            let got = format!("{:?}", dispatched.shape());
            return Err(Error::invalid(OPERATION, "dispatched", format!("a dispatch of {:?}", self.rows), got));
        }
        Ok(())
    }

    /// Computes the experts' outputs by row, weighted where the descriptor weighs outputs, and a shared expert's.
    ///
    /// With no tokens nothing is launched.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Unexpected`] for weights against the descriptor; [`Error::Invalid`] for a plan made for another device
    /// or a dispatch of another shape; those of a buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`], [`Error::Misaligned`],
    /// [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those of the driver.
    pub fn forward<T: Element>(
        &self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        weights: &ExpertWeights<'_>,
        args: ExpertsArgs<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        let scope = Scope::begin(OPERATION, kernels, stream)?;
        scope.check_dtype::<T>("x", self.desc.dtype)?;
        self.check(&scope, args.dispatched)?;
        if let Some(dropout) = &args.dropout {
            gemm::check_dropout(OPERATION, dropout)?;
        } else if args.noise_state.is_some() {
            let reason = "there is no dropout";
            return Err(Error::Unexpected { operation: OPERATION, argument: "noise_state", reason });
        }
        let SlotShape { tokens, slots, .. } = self.rows;
        let hidden = self.desc.hidden;
        let weights = weights.open(&scope, &self.desc)?;
        if tokens == 0 {
            return Ok(());
        }
        let alignment = shape::row_alignment(self.desc.dtype, hidden);
        let x = scope.read("x", args.x, tokens * hidden, alignment)?;
        let dispatched = args.dispatched.read(&scope)?;
        let width = self.desc.expert_width();
        let narrow = shape::row_alignment(self.desc.dtype, width);
        let y_slots = scope.write("y_slots", args.y_slots, slots * width, narrow)?;
        let wanted = Intermediates {
            hidden: args.hidden,
            pre_activation: args.pre_activation,
            shared_hidden: args.shared_hidden,
            shared_pre_activation: args.shared_pre_activation,
        };
        let kept = wanted.open(&scope, &self.desc, &self.rows)?;
        let noise_state = scope.read_noise_state(args.noise_state)?;
        let shared = scope.write_some("shared", args.shared, tokens * hidden, alignment)?;
        router::check_gate(OPERATION, "shared_gate", self.gate.is_some(), args.shared_gate.is_some())?;
        let shared_gate = scope.write_some("shared_gate", args.shared_gate, tokens, SCALAR)?;
        if shared.is_some() != self.desc.shared.is_some() {
            let (operation, argument) = (OPERATION, "shared");
            return Err(match self.desc.shared {
                Some(_) => Error::Missing { operation, argument, reason: "the descriptor has a shared expert" },
                None => Error::Unexpected { operation, argument, reason: "the descriptor has no shared expert" },
            });
        }
        let workspace = workspace.open(&scope, self.workspace_bytes)?;
        let input = self.around.enqueue_before(&scope, &weights.around, &workspace, x.address(), &mut |_| ())?;
        let at = Products {
            x: x.address(),
            input,
            live: dispatched.live(self.rows.experts),
            rows: dispatched.addresses(),
            kept: kept.addresses(&workspace, self.regions),
            outputs: y_slots.address(),
            y_slots: y_slots.address(),
            addend: optional(&shared),
            dropout: args.dropout,
            noise_state: optional(&noise_state),
            scratch: Scratch { partials: workspace.at(self.regions.partials), counters: workspace.counters() },
            sum: None,
            adds_to_sums: false,
        };
        if let Some(logits) = optional(&shared_gate) {
            self.enqueue_gate(&scope, &weights, at.x, logits, &mut |_| ())?;
        }
        self.enqueue(&scope, &weights, &at, &mut |_| ())
    }

    /// The shared expert's gate alone; nothing where there is none.
    pub(super) fn enqueue_gate(
        &self,
        scope: &Scope<'_>,
        weights: &HeldExperts<'_>,
        x: Address<'_>,
        logits: Address<'_>,
        observer: &mut dyn FnMut(Stage),
    ) -> Result<(), Error> {
        let Some((step, weight)) = self.gate.as_ref().zip(weights.shared_gate()) else { return Ok(()) };
        let at = router::Addresses {
            x,
            weight: None,
            bias: None,
            logits: None,
            logits_dtype: crate::Dtype::F32,
            gate: Some((weight, logits)),
        };
        router::enqueue(scope, &step.desc, &step.selection, at)?;
        observer(Stage::SharedGate);
        Ok(())
    }

    /// Adds up each token's rows. With a latent width these are `[T, L]`; their projection, and a norm of the sum, are operations of their own in
    /// parts ([`gemm::forward`], [`crate::experts::rms_norm`]).
    ///
    /// # Errors
    /// Those of [`combine::forward`].
    pub fn combine<T: Element>(
        &self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        args: combine::CombineArgs<'_, T>,
    ) -> Result<(), Error> {
        combine::forward(kernels, stream, &self.combine.desc, args)
    }

    /// Whether a whole layer's second product adds up each token's rows.
    pub(super) fn combines(&self) -> bool {
        self.down_combine.is_some()
    }

    /// Whether a whole layer's second product adds onto each token's sum.
    pub(super) fn adds_to_sums(&self) -> bool {
        self.sums.is_some()
    }

    /// Both products, and the shared expert's.
    pub(super) fn enqueue(
        &self,
        scope: &Scope<'_>,
        weights: &HeldExperts<'_>,
        at: &Products<'_>,
        observer: &mut dyn FnMut(Stage),
    ) -> Result<(), Error> {
        let weight = |weighting| (self.desc.weighting == weighting).then_some(at.rows.slot_weight);
        let [gate_up, down] = &weights.mlp;
        // The shared expert's weights, and where its outputs go.
        let shared = weights.shared.as_ref().map(|shared| &shared.mlp).zip(at.addend);
        let joined = shared.filter(|_| self.apart.is_none());
        let first = Product {
            a: at.input,
            out: at.kept.hidden,
            pre_activation: at.kept.pre_activation,
            rows: Some(at.rows),
            swiglu: weights.swiglu.addresses(),
            row_scale: weight(Weighting::Input),
            out_scale: weight(Weighting::Activation),
            dropout: at.dropout,
            shared: joined.map(|([weight, _], _)| gemm::SharedAddresses {
                a: at.x,
                weight: weight.addresses(),
                out: at.kept.shared_hidden,
                pre_activation: at.kept.shared_pre_activation,
            }),
            noise_state: at.noise_state,
            scratch: at.scratch,
            sum: None,
        };
        first.enqueue(scope, &self.gate_up, gate_up)?;
        observer(Stage::GateUp);
        let second = Product {
            a: at.kept.hidden,
            out: at.outputs,
            pre_activation: None,
            swiglu: ByExpertAddresses::default(),
            row_scale: None,
            out_scale: weight(Weighting::Output).filter(|_| self.around.product_weighs()),
            dropout: None,
            shared: joined.map(|([_, weight], out)| gemm::SharedAddresses {
                a: at.kept.shared_hidden,
                weight: weight.addresses(),
                out,
                pre_activation: None,
            }),
            noise_state: None,
            ..first
        };
        if let Some((sum, selection)) = at.sum.as_ref().zip(self.down_combine) {
            let together = Step { desc: self.down.desc, selection };
            // The first product is right in front, and waits for what made the lists.
            let early = self.gate_up.selection.programmatic;
            let sum = Some(combine::sum_of(&self.combine.desc, sum, early));
            Product { sum, ..second }.enqueue(scope, &together, down)?;
            observer(Stage::DownCombine);
            return Ok(());
        }
        let step = match &self.sums {
            Some((step, _)) if at.adds_to_sums => {
                scope.zero(at.y_slots, self.rows.tokens * self.combine.desc.hidden * size_of::<f32>())?;
                step
            }
            _ => &self.down,
        };
        second.enqueue(scope, step, down)?;
        observer(Stage::Down);
        let outputs = (at.outputs, at.y_slots);
        self.around.enqueue_between(scope, &weights.around, outputs, at.rows, at.live, observer)?;

        let Some((steps, ([gate_up, down], addend))) = self.apart.as_ref().zip(shared) else {
            return Ok(());
        };
        let dense = |a, out, pre_activation| Product {
            a,
            out,
            pre_activation,
            rows: None,
            swiglu: ByExpertAddresses::default(),
            row_scale: None,
            out_scale: None,
            dropout: None,
            noise_state: None,
            shared: None,
            scratch: at.scratch,
            sum: None,
        };
        let first = dense(at.x, at.kept.shared_hidden, at.kept.shared_pre_activation);
        first.enqueue(scope, &steps[0], gate_up)?;
        observer(Stage::SharedGateUp);
        dense(at.kept.shared_hidden, addend, None).enqueue(scope, &steps[1], down)?;
        observer(Stage::SharedDown);
        Ok(())
    }

    /// The sum of each token's rows in a whole layer, or what is left of it.
    pub(super) fn enqueue_combine(&self, scope: &Scope<'_>, at: combine::Addresses<'_>) -> Result<(), Error> {
        let step = self.sums.as_ref().map_or(&self.combine, |(_, combine)| combine);
        combine::enqueue(scope, &step.desc, &step.selection, at)
    }
}

/// Inputs and outputs of the experts.
#[non_exhaustive]
pub struct ExpertsArgs<'a, T> {
    /// `[T, H]`.
    pub x: In<'a, T>,
    /// The rows, of the plan's shape.
    pub dispatched: &'a Dispatched,
    /// `[slots, H]`, written: the experts' outputs, weighted where the descriptor weighs outputs. With a latent width `[slots, L]`.
    pub y_slots: Out<'a, T>,
    /// `[slots, I]`, written: what stands between the products.
    pub hidden: Option<Out<'a, T>>,
    /// `[slots, 2I]` (`[slots, I]` without a gate), written: what stands before the activation, gates before ups whatever the weight's
    /// order.
    pub pre_activation: Option<Out<'a, T>>,
    /// `[T, I_shared]`, written: [`ExpertsArgs::hidden`] of the shared expert.
    pub shared_hidden: Option<Out<'a, T>>,
    /// `[T, 2 I_shared]` (`[T, I_shared]`), written: [`ExpertsArgs::pre_activation`] of the shared expert.
    pub shared_pre_activation: Option<Out<'a, T>>,
    /// `[T, H]`, written: the shared expert's output; exactly where there is one. [`combine::CombineArgs::addend`].
    pub shared: Option<Out<'a, T>>,
    /// `[T]`, written: logits of the shared expert's gate; exactly where there is one. [`combine::CombineArgs::addend_gate`].
    pub shared_gate: Option<Out<'a, f32>>,
    /// Drops some of what stands between the products.
    pub dropout: Option<Dropout>,
    /// `[2]`, 8-byte aligned, with `dropout` only: see [`crate::routers::noise_state`].
    pub noise_state: Option<In<'a, u64>>,
}

impl<'a, T> ExpertsArgs<'a, T> {
    /// `x` to `y_slots` by the rows of `dispatched`.
    pub fn new(
        x: impl Into<In<'a, T>>,
        dispatched: &'a Dispatched,
        y_slots: impl Into<Out<'a, T>>,
    ) -> ExpertsArgs<'a, T> {
        ExpertsArgs {
            x: x.into(),
            dispatched,
            y_slots: y_slots.into(),
            hidden: None,
            pre_activation: None,
            shared_hidden: None,
            shared_pre_activation: None,
            shared: None,
            shared_gate: None,
            dropout: None,
            noise_state: None,
        }
    }

    /// With dropout inside the experts.
    #[must_use]
    pub fn dropout(self, dropout: Dropout) -> ExpertsArgs<'a, T> {
        ExpertsArgs { dropout: Some(dropout), ..self }
    }
}

buffers!(ExpertsArgs<'a, T> {
    hidden: Out<T>,
    pre_activation: Out<T>,
    shared_hidden: Out<T>,
    shared_pre_activation: Out<T>,
    shared: Out<T>,
    shared_gate: Out<f32>,
    noise_state: In<u64>,
});

/// Addresses of all products.
pub(super) struct Products<'a> {
    pub(super) x: Address<'a>,
    /// What the routed experts see.
    pub(super) input: Address<'a>,
    pub(super) rows: RowAddresses<'a>,
    /// Number of the rows, and each one's token.
    pub(super) live: (Address<'a>, Address<'a>),
    pub(super) kept: IntermediateAddresses<'a>,
    /// What the second product yields: in `y_slots`, where no norm has a place of its own for it.
    pub(super) outputs: Address<'a>,
    pub(super) y_slots: Address<'a>,
    /// The shared expert's output.
    pub(super) addend: Option<Address<'a>>,
    pub(super) dropout: Option<Dropout>,
    pub(super) noise_state: Option<Address<'a>>,
    pub(super) scratch: Scratch<'a>,
    /// Each token's sum, where [`ExpertsPlan::combines`].
    pub(super) sum: Option<combine::Addresses<'a>>,
    /// Whether this is a whole layer where [`ExpertsPlan::adds_to_sums`]: `y_slots` is the sums then.
    pub(super) adds_to_sums: bool,
}

/// Rows in and out of one product.
#[derive(Clone, Copy)]
struct Product<'a> {
    a: Address<'a>,
    out: Address<'a>,
    pre_activation: Option<Address<'a>>,
    rows: Option<RowAddresses<'a>>,
    swiglu: ByExpertAddresses<'a>,
    row_scale: Option<Address<'a>>,
    out_scale: Option<Address<'a>>,
    dropout: Option<Dropout>,
    shared: Option<gemm::SharedAddresses<'a>>,
    noise_state: Option<Address<'a>>,
    scratch: Scratch<'a>,
    sum: Option<Sum<'a>>,
}

impl Product<'_> {
    fn enqueue(self, scope: &Scope<'_>, step: &Step<GemmDesc>, weight: &HeldWeight<'_>) -> Result<(), Error> {
        let at = gemm::Addresses {
            a: self.a,
            weight: weight.addresses(),
            out: self.out,
            pre_activation: self.pre_activation,
            rows: self.rows,
            row_scale: self.row_scale,
            out_scale: self.out_scale,
            shared: self.shared,
            noise_state: self.noise_state,
            swiglu: self.swiglu,
            scratch: Some(self.scratch),
            sum: self.sum,
        };
        gemm::enqueue(scope, &step.desc, &step.selection, at, self.dropout)
    }
}

/// A plan runs on the device that it was made for.
pub(super) fn check_device(scope: &Scope<'_>, planned: &DeviceInfo) -> Result<(), Error> {
    let here = scope.kernels.device();
    if planned != here {
        let expected = format!("a plan for {here:?}");
        return Err(Error::invalid(OPERATION, "plan", expected, format!("one for {planned:?}")));
    }
    Ok(())
}
