//! The launches of a planned layer.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::plan::Step;
use super::{LayerArgs, LayerDesc, LayerPlan, LayerWeights, Linear, OPERATION, SharedWeights, Stage, Weighting};
use crate::capacity::dispatch;
use crate::experts::combine;
use crate::experts::gemm;
use crate::experts::gemm::GemmDesc;
use crate::routers::gating;
use crate::routers::gating_dispatch::{self, GatingDispatchDesc};
use crate::routers::router;
use crate::runtime::launch::{Address, Held, SCALAR, Scope, VECTOR, optional};
use crate::runtime::workspace::Region;
use crate::{Element, Error, Kernels, Workspace};

impl LayerPlan {
    /// Enqueues the layer on `stream`.
    ///
    /// With no tokens, `counts` is set to zero where given, and nothing is launched.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Unexpected`] for weights against the descriptor; [`Error::Invalid`] for a plan made
    /// for another device; those of a buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`], [`Error::Misaligned`],
    /// [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those of the driver.
    pub fn forward<T: Element, W: Element>(
        &self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        weights: &LayerWeights<'_, T, W>,
        args: LayerArgs<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        self.forward_observed(kernels, stream, weights, args, workspace, &mut |_| ())
    }

    /// [`LayerPlan::forward`], calling `observer` after each stage has been enqueued: to record an event on the stream, say.
    ///
    /// # Errors
    /// Those of [`LayerPlan::forward`].
    pub fn forward_observed<T: Element, W: Element>(
        &self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        weights: &LayerWeights<'_, T, W>,
        args: LayerArgs<'_, T>,
        workspace: &mut Workspace,
        observer: &mut dyn FnMut(Stage),
    ) -> Result<(), Error> {
        let scope = Scope::begin(OPERATION, kernels, stream)?;
        scope.check_dtype::<T>("x", self.desc.dtype)?;
        scope.check_dtype::<W>("router", self.desc.router_dtype)?;
        if self.device != *kernels.device() {
            let expected = format!("a plan for {:?}", kernels.device());
            return Err(Error::invalid(OPERATION, "plan", expected, format!("one for {:?}", self.device)));
        }
        let LayerDesc { hidden, experts, top_k, .. } = self.desc;
        let (elements, choices) = (self.tokens * hidden, self.tokens * top_k);
        let weights = HeldWeights::open(&scope, self, weights)?;
        let counts = scope.write_some("counts", args.counts, experts, SCALAR)?;
        if self.tokens == 0 {
            return counts.map_or(Ok(()), |counts| scope.zero(counts.address(), experts * size_of::<i32>()));
        }
        let x = scope.read("x", args.x, elements, VECTOR)?;
        let residual = scope.read_some("residual", args.residual, elements, VECTOR)?;
        let y = scope.write("y", args.y, elements, VECTOR)?;
        let logits = scope.write_some("logits", args.logits, self.tokens * experts, SCALAR)?;
        let ids = scope.write_some("ids", args.ids, choices, SCALAR)?;
        let choice_weights = scope.write_some("weights", args.weights, choices, SCALAR)?;
        let workspace = workspace.open(&scope, self.workspace_bytes)?;

        let regions = &self.regions;
        let place = Places { workspace: &workspace };
        let launch = Launch {
            scope: &scope,
            plan: self,
            weights: &weights,
            x: x.address(),
            residual: optional(&residual),
            y: y.address(),
            logits: place.given(&logits, regions.logits),
            ids: place.given(&ids, regions.ids),
            choice_weights: place.given(&choice_weights, regions.weights),
            counts: place.given(&counts, regions.counts),
            place,
        };
        launch.all(observer)
    }
}

/// The weights of a layer, opened for reading.
struct HeldWeights<'a> {
    router: Held<'a>,
    router_bias: Option<Held<'a>>,
    correction_bias: Option<Held<'a>>,
    gate_up: HeldLinear<'a>,
    down: HeldLinear<'a>,
    shared: Option<(HeldLinear<'a>, HeldLinear<'a>)>,
}

struct HeldLinear<'a> {
    weight: Held<'a>,
    bias: Option<Held<'a>>,
}

impl<'a> HeldWeights<'a> {
    fn open<T, W>(
        scope: &Scope<'a>,
        plan: &LayerPlan,
        weights: &LayerWeights<'a, T, W>,
    ) -> Result<HeldWeights<'a>, Error> {
        let LayerDesc { hidden, experts, gating, .. } = plan.desc;
        gating::check_correction_bias(scope.operation, &gating, weights.correction_bias.is_some())?;
        Ok(HeldWeights {
            router: scope.read("router", weights.router, experts * hidden, VECTOR)?,
            router_bias: scope.read_some("router_bias", weights.router_bias, experts, VECTOR)?,
            correction_bias: scope.read_some("correction_bias", weights.correction_bias, experts, VECTOR)?,
            gate_up: HeldLinear::open(scope, ["gate_up.weight", "gate_up.bias"], &plan.gate_up, weights.gate_up)?,
            down: HeldLinear::open(scope, ["down.weight", "down.bias"], &plan.down, weights.down)?,
            shared: Self::open_shared(scope, plan, weights.shared)?,
        })
    }

    fn open_shared<T>(
        scope: &Scope<'a>,
        plan: &LayerPlan,
        weights: Option<SharedWeights<'a, T>>,
    ) -> Result<Option<(HeldLinear<'a>, HeldLinear<'a>)>, Error> {
        let (operation, argument) = (OPERATION, "shared");
        match (&plan.shared, weights) {
            (None, None) => Ok(None),
            (Some(_), None) => {
                Err(Error::Missing { operation, argument, reason: "the descriptor has a shared expert" })
            }
            (None, Some(_)) => {
                Err(Error::Unexpected { operation, argument, reason: "the descriptor has no shared expert" })
            }
            (Some((gate_up, down)), Some(weights)) => Ok(Some((
                HeldLinear::open(scope, ["shared.gate_up.weight", "shared.gate_up.bias"], gate_up, weights.gate_up)?,
                HeldLinear::open(scope, ["shared.down.weight", "shared.down.bias"], down, weights.down)?,
            ))),
        }
    }
}

impl<'a> HeldLinear<'a> {
    fn open<T>(
        scope: &Scope<'a>,
        [weight, bias]: [&'static str; 2],
        step: &Step<GemmDesc>,
        linear: Linear<'a, T>,
    ) -> Result<HeldLinear<'a>, Error> {
        let columns = step.desc.experts * step.desc.b_columns();
        Ok(HeldLinear {
            weight: scope.read(weight, linear.weight, columns * step.desc.k, VECTOR)?,
            bias: scope.read_some(bias, linear.bias, columns, VECTOR)?,
        })
    }
}

/// The workspace of one pass.
#[derive(Clone, Copy)]
struct Places<'a> {
    workspace: &'a Held<'a>,
}

impl<'a> Places<'a> {
    fn at(&self, region: Region) -> Address<'a> {
        self.workspace.address().offset(region.offset)
    }

    /// The caller's buffer, else the workspace's region.
    fn given(&self, buffer: &'a Option<Held<'a>>, region: Region) -> Address<'a> {
        optional(buffer).unwrap_or_else(|| self.at(region))
    }
}

/// All addresses of one pass.
struct Launch<'a> {
    scope: &'a Scope<'a>,
    plan: &'a LayerPlan,
    weights: &'a HeldWeights<'a>,
    place: Places<'a>,
    x: Address<'a>,
    residual: Option<Address<'a>>,
    y: Address<'a>,
    logits: Address<'a>,
    ids: Address<'a>,
    choice_weights: Address<'a>,
    counts: Address<'a>,
}

impl<'a> Launch<'a> {
    fn all(&self, observer: &mut dyn FnMut(Stage)) -> Result<(), Error> {
        self.router()?;
        observer(Stage::Router);
        self.gate_dispatch()?;
        observer(Stage::GateDispatch);

        let regions = &self.plan.regions;
        let (hidden, y_slots) = (self.place.at(regions.hidden), self.place.at(regions.y_slots));
        let slot_token = Some(self.place.at(regions.slot_token));
        let grouped = Some((self.place.at(regions.tiles), self.place.at(regions.num_tiles)));
        let gate_up = Rows { a: self.x, out: hidden, slot_token, row_scale: self.slot_weight(), tiles: grouped };
        self.gemm(&self.plan.gate_up, &self.weights.gate_up, gate_up)?;
        observer(Stage::GateUp);
        let down = Rows { a: hidden, out: y_slots, slot_token: None, row_scale: None, tiles: grouped };
        self.gemm(&self.plan.down, &self.weights.down, down)?;
        observer(Stage::Down);

        let mut addend = None;
        if let (Some((gate_up, down)), Some(weights)) = (&self.plan.shared, &self.weights.shared) {
            let out = self.place.at(regions.addend);
            let dense = Rows { a: self.x, out: hidden, slot_token: None, row_scale: None, tiles: None };
            self.gemm(gate_up, &weights.0, dense)?;
            observer(Stage::SharedGateUp);
            self.gemm(down, &weights.1, Rows { a: hidden, out, ..dense })?;
            observer(Stage::SharedDown);
            addend = Some(out);
        }

        self.combine(y_slots, addend)?;
        observer(Stage::Combine);
        Ok(())
    }

    /// Weights by slot, where they scale the experts' input.
    fn slot_weight(&self) -> Option<Address<'a>> {
        (self.plan.desc.weighting == Weighting::Input).then(|| self.place.at(self.plan.regions.slot_weight))
    }

    fn router(&self) -> Result<(), Error> {
        let step = &self.plan.router;
        let addresses = router::Addresses {
            x: self.x,
            weight: self.weights.router.address(),
            bias: optional(&self.weights.router_bias),
            logits: self.logits,
        };
        router::enqueue(self.scope, &step.desc, &step.selection, addresses)
    }

    fn gate_dispatch(&self) -> Result<(), Error> {
        let step = &self.plan.dispatch;
        let regions = &self.plan.regions;
        let routing = gating::Routing {
            logits: self.logits,
            correction_bias: optional(&self.weights.correction_bias),
            ids: self.ids,
            weights: self.choice_weights,
        };
        let outputs = dispatch::Outputs {
            counts: self.counts,
            offsets: self.place.at(regions.offsets),
            slot_token: self.place.at(regions.slot_token),
            token_slot: self.place.at(regions.token_slot),
            slot_weight: self.slot_weight(),
            tiles: Some(self.place.at(regions.tiles)),
            num_tiles: Some(self.place.at(regions.num_tiles)),
        };
        let workspace = self.place.at(regions.barrier);
        let desc = GatingDispatchDesc::new(self.plan.desc.gating, step.desc);
        gating_dispatch::enqueue(self.scope, &desc, &step.selection, routing, outputs, workspace)
    }

    fn gemm(&self, step: &Step<GemmDesc>, weights: &HeldLinear<'_>, rows: Rows<'_>) -> Result<(), Error> {
        let addresses = gemm::Addresses {
            a: rows.a,
            b: weights.weight.address(),
            bias: optional(&weights.bias),
            out: rows.out,
            slot_token: rows.slot_token,
            row_scale: rows.row_scale,
            tiles: rows.tiles.map(|(tiles, _)| tiles),
            num_tiles: rows.tiles.map(|(_, num_tiles)| num_tiles),
        };
        gemm::enqueue(self.scope, &step.desc, &step.selection, addresses)
    }

    fn combine(&self, y_slots: Address<'_>, addend: Option<Address<'_>>) -> Result<(), Error> {
        let step = &self.plan.combine;
        let addresses = combine::Addresses {
            y_slots,
            token_slot: self.place.at(self.plan.regions.token_slot),
            weights: (self.plan.desc.weighting == Weighting::Output).then_some(self.choice_weights),
            residual: self.residual,
            addend,
            identity: None,
            y: self.y,
        };
        combine::enqueue(self.scope, &step.desc, &step.selection, addresses)
    }
}

/// Rows in and out of a product.
#[derive(Clone, Copy)]
struct Rows<'a> {
    a: Address<'a>,
    out: Address<'a>,
    slot_token: Option<Address<'a>>,
    row_scale: Option<Address<'a>>,
    /// List and count.
    tiles: Option<(Address<'a>, Address<'a>)>,
}
