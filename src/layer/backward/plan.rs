//! From a layer's plan to that of its way back.

use super::mlp::{self, MlpPlan, Sizes};
use super::saved::saved_bytes;
use super::{BackwardDesc, BackwardStage, OPERATION, Origin};
use crate::experts::combine::{self, CombineDesc};
use crate::experts::dispatched::SlotShape;
use crate::experts::gemm::Rows;
use crate::layer::desc::LayerDesc;
use crate::layer::forward::LayerPlan;
use crate::layer::{Stage, Step};
use crate::routers::gating_backward::{self, GatingBackwardDesc};
use crate::routers::router_backward::{self, RouterBackwardDesc};
use crate::rules::{LogitRule, NullOutput, Weighting};
use crate::runtime::workspace::{Arena, Region};
use crate::{DeviceInfo, Error, Kernel, Selection};

/// Every choice for a layer's backward pass and a number of tokens: kernels, grids, and places in the workspace.
#[derive(Clone, Copy, Debug)]
pub struct BackwardPlan {
    layer: LayerPlan,
    desc: BackwardDesc,
    pub(super) routed: MlpPlan,
    pub(super) shared: Option<MlpPlan>,
    /// The first product again.
    pub(super) again: Option<Selection>,
    pub(super) gating: Option<Step<GatingBackwardDesc>>,
    pub(super) router: Option<RouterSteps>,
    pub(super) sum: Step<CombineDesc>,
    pub(super) regions: Regions,
    workspace_bytes: usize,
}

/// Both gradients of the router's product.
#[derive(Clone, Copy, Debug)]
pub(super) struct RouterSteps {
    pub(super) desc: RouterBackwardDesc,
    weight: Selection,
    input: Selection,
}

/// Places in the workspace, beside those of the products.
#[derive(Clone, Copy, Debug)]
pub(super) struct Regions {
    pub(super) d_logits: Region,
    pub(super) pre_activation: Region,
}

impl LayerPlan {
    /// Plans the way back.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for what has no backward pass here, naming the field: norms, a latent width, an admission, a map;
    /// [`Error::Invalid`] or [`Error::Overflow`] for losses out of range or sizes past a limit.
    pub fn backward_plan(&self, desc: &BackwardDesc) -> Result<BackwardPlan, Error> {
        BackwardPlan::new(self, desc)
    }
}

impl BackwardPlan {
    fn new(layer: &LayerPlan, desc: &BackwardDesc) -> Result<BackwardPlan, Error> {
        let within = |error: Error| error.within(OPERATION);
        let (of, tokens, device) = (layer.desc(), layer.tokens(), layer.experts().device());
        check(of, desc)?;
        let rows = *layer.experts().rows();
        let mut arena = Arena::new(OPERATION);
        arena.barrier()?;
        let mut mlp = |mlp, rows, intermediate| {
            let sizes = Sizes { dtype: of.dtype, rows, width: of.hidden, intermediate, kernels: of.kernels() };
            MlpPlan::new(&mut arena, mlp, sizes, desc, device)
        };
        let routed = mlp(&of.mlp, Rows::Grouped(rows), of.intermediate)?;
        let shared =
            of.shared.as_ref().map(|shared| mlp(&shared.mlp, Rows::Dense(tokens), shared.intermediate)).transpose()?;

        let gating = (desc.origin != Origin::Choices).then(|| {
            let desc = GatingBackwardDesc::new(tokens, of.experts, of.top_k, of.gating).losses(desc.losses);
            Ok::<_, Error>(Step { desc, selection: gating_backward::select(&desc, device).map_err(within)? })
        });
        let router = (desc.origin == Origin::Router).then(|| RouterSteps::new(of, tokens, device));
        let again = layer.experts().stages().find(|(stage, _)| desc.recompute && *stage == Stage::GateUp);
        let sum = CombineDesc::new(of.dtype, rows, of.hidden);
        let sum = Step { desc: sum, selection: combine::select_for(OPERATION, &sum, device)? };
        let logits = if desc.origin == Origin::Choices { 0 } else { tokens * of.logit_columns() };
        let kept = if desc.recompute { rows.slots * routed.columns() } else { 0 };
        let regions = Regions {
            d_logits: arena.region("d_logits", logits, 4)?,
            pre_activation: arena.region("pre_activation", kept, of.dtype.bytes() as usize)?,
        };
        Ok(BackwardPlan {
            layer: *layer,
            desc: *desc,
            routed,
            shared,
            again: again.map(|(_, selection)| selection),
            gating: gating.transpose()?,
            router: router.transpose()?,
            sum,
            regions,
            workspace_bytes: arena.bytes(),
        })
    }

    /// The plan of the forward pass.
    pub fn layer(&self) -> &LayerPlan {
        &self.layer
    }

    /// What was asked for.
    pub fn desc(&self) -> &BackwardDesc {
        &self.desc
    }

    pub(super) fn rows(&self) -> &SlotShape {
        self.layer.experts().rows()
    }

    /// Size of the workspace in bytes; it may be the forward pass's.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    /// Bytes of [`super::Saved`]. With `S = k T` slots (more with a padded capacity) and elements of `b` bytes
    ///
    /// `4 E T + 4 k T + (4 k T + 8 S + lists of E and of tiles) + b S c I + b T c_s I_s`
    ///
    /// of logits, ids, rows and pre-activations; `c` is 2 with a gate, else 1, `s` the shared expert's. Without the logits, or logits and ids, where these
    /// came from elsewhere, and without `b S c I` where they are computed again.
    pub fn saved_bytes(&self) -> usize {
        saved_bytes(self)
    }

    /// The stages with their launches, in order, where all gradients are asked for. One that no buffer is given for leaves its launches out.
    pub fn stages(&self) -> impl Iterator<Item = (BackwardStage, Selection)> + use<> {
        let tokens = self.layer.tokens();
        let [hidden, activation, down, gate_up, gate_up_of_up, input, input_of_up] = self.routed.stages(mlp::ROUTED);
        let shared = self.shared.map(|shared| shared.stages(mlp::SHARED));
        let gating = self.gating.map(|step| (BackwardStage::Gating, step.selection));
        let router = self
            .router
            .map(|steps| [(BackwardStage::RouterWeight, steps.weight), (BackwardStage::RouterInput, steps.input)]);
        let again = self.again.map(|selection| (BackwardStage::GateUp, selection));
        let routed = [again, hidden, activation, down, gate_up, gate_up_of_up, input, input_of_up, gating];
        routed
            .into_iter()
            .chain(router.into_iter().flatten().map(Some))
            .chain(shared.into_iter().flatten())
            .flatten()
            .chain([(BackwardStage::Sum, self.sum.selection)])
            .filter(move |_| tokens > 0)
    }

    /// Kernel launches where all gradients are asked for.
    pub fn launches(&self) -> usize {
        self.stages().count()
    }

    /// The kernels, for [`crate::Kernels::preload`].
    pub fn kernels(&self) -> impl Iterator<Item = Kernel> + use<> {
        self.stages().map(|(_, selection)| selection.kernel)
    }
}

impl RouterSteps {
    fn new(of: &LayerDesc, tokens: usize, device: &DeviceInfo) -> Result<RouterSteps, Error> {
        let within = |error: Error| error.within(OPERATION);
        let desc = RouterBackwardDesc::new(of.dtype, tokens, of.logit_columns(), of.hidden).weight(of.router_dtype);
        Ok(RouterSteps {
            desc,
            weight: router_backward::select_into_weight(&desc, device).map_err(within)?,
            input: router_backward::select_into_x(&desc, device).map_err(within)?,
        })
    }
}

/// What has no way back here.
fn check(of: &LayerDesc, desc: &BackwardDesc) -> Result<(), Error> {
    let routed = desc.origin != Origin::Choices;
    let asked = desc.origin == Origin::Router;
    let identity = of.null.is_some_and(|null| null.output == NullOutput::Input);
    let shared = of.shared.as_ref();
    let refused: [(&'static str, bool, &'static str); 13] = [
        ("norms.router", asked && of.norms.router.is_some(), "no norm of the router's input"),
        ("norms.experts", of.norms.experts.is_some(), "no norm of the experts' input"),
        ("norms.slots", of.norms.slots.is_some(), "no norm of an expert's output"),
        ("norms.output", of.norms.output.is_some(), "no norm of the sum"),
        ("latent", of.latent.is_some(), "experts of the layer's width"),
        ("admission", of.admission.is_some(), "no admission"),
        ("map", of.map.is_some(), "no map"),
        ("null.output", identity, "NullOutput::Zero"),
        ("weighting", of.weighting != Weighting::Output, "Weighting::Output"),
        ("routed_scale", of.routed_scale != 1.0, "1"),
        ("logits", asked && of.logits != LogitRule::PLAIN, "LogitRule::PLAIN"),
        ("shared.gated", shared.is_some_and(|shared| shared.gated), "false"),
        ("shared.scale", shared.is_some_and(|shared| shared.scale != 1.0), "1"),
    ];
    if let Some((argument, _, supported)) = refused.into_iter().find(|(_, there, _)| *there) {
        return Err(Error::unsupported(OPERATION, argument, supported, "another"));
    }
    if !routed && desc.losses.is_some() {
        let reason = "the choices come from elsewhere, with their losses";
        return Err(Error::Unexpected { operation: OPERATION, argument: "losses", reason });
    }
    Ok(())
}
