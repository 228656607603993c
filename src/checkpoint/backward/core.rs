//! A layer's two passes, and where its gradients go.

use cudarc::driver::CudaSlice;

use super::parts::Queue;
use super::zeros;
use crate::checkpoint::store::DeviceBuffer;
use crate::checkpoint::weights::{BlockWeights, MatrixWeight, weight};
use crate::layer::{
    BackwardArgs, BackwardDesc, BackwardPlan, Choices, ExpertWeights, LatentGradients, LayerArgs, LayerDesc,
    LayerGradients, LayerPlan, LayerWeights, Origin, RouteArgs, RouterGradients, RouterWeights, Saved, SharedGradients,
    WeightGradients,
};
use crate::rules::NullExperts;
use crate::{Element, Error, In, Workspace};

/// Both passes of a layer.
pub(super) struct Core<T> {
    plan: LayerPlan,
    back: BackwardPlan,
    saved: Saved<T>,
    workspace: Workspace,
    y: CudaSlice<T>,
}

impl<T: Element> Core<T> {
    /// With its own router.
    pub(super) fn routed(desc: &LayerDesc, tokens: usize, queue: Queue<'_>) -> Result<Core<T>, Error> {
        Core::new(desc, tokens, &BackwardDesc::new(), queue)
    }

    /// Of choices from elsewhere.
    pub(super) fn chosen(desc: &LayerDesc, tokens: usize, queue: Queue<'_>) -> Result<Core<T>, Error> {
        Core::new(desc, tokens, &BackwardDesc::new().origin(Origin::Choices), queue)
    }

    fn new(desc: &LayerDesc, tokens: usize, back: &BackwardDesc, queue: Queue<'_>) -> Result<Core<T>, Error> {
        let Queue { kernels, stream } = queue;
        let plan = desc.plan(tokens, kernels.device())?;
        let back = plan.backward_plan(back)?;
        kernels.preload(plan.kernels().chain(back.kernels()))?;
        Ok(Core {
            saved: Saved::new(stream, &back)?,
            workspace: Workspace::new(stream, plan.workspace_bytes().max(back.workspace_bytes()))?,
            y: zeros(stream, tokens * desc.hidden)?,
            plan,
            back,
        })
    }

    /// Forth, by the layer's own router.
    pub(super) fn forward(
        &mut self,
        queue: Queue<'_>,
        weights: &LayerWeights<'_>,
        x: In<'_, T>,
        mut route: RouteArgs<'_>,
    ) -> Result<(), Error> {
        // Experts that a map sends nowhere are null experts here.
        route.map = None;
        let args = LayerArgs::new(x, &mut self.y).route(route.reborrow());
        self.plan.forward_saving(queue.kernels, queue.stream, weights, args, &mut self.saved, &mut self.workspace)
    }

    /// Forth, by these choices.
    pub(super) fn forward_chosen(
        &mut self,
        queue: Queue<'_>,
        weights: &LayerWeights<'_>,
        x: In<'_, T>,
        choices: Choices<'_>,
    ) -> Result<(), Error> {
        let args = LayerArgs::new(x, &mut self.y).choices(choices);
        self.plan.forward_saving(queue.kernels, queue.stream, weights, args, &mut self.saved, &mut self.workspace)
    }

    /// Back from `dy` to `gradients`.
    pub(super) fn backward(
        &mut self,
        queue: Queue<'_>,
        weights: &LayerWeights<'_>,
        (x, dy): (In<'_, T>, In<'_, T>),
        mut gradients: LayerGradients<'_, T>,
    ) -> Result<(), Error> {
        let args = BackwardArgs::new(x, dy, gradients.reborrow());
        self.back.backward(queue.kernels, queue.stream, weights, &self.saved, args, &mut self.workspace)
    }
}

/// The layer with experts that a map sends nowhere, or whose output is their input, as null experts.
pub(super) fn without_map<B>(desc: &LayerDesc, weights: &BlockWeights<B>) -> LayerDesc {
    let mut desc = *desc;
    if let (Some(map), Some(output)) = (desc.map.take(), weights.weightless) {
        desc.null = Some(NullExperts { count: desc.experts - map.local_experts, output });
    }
    desc
}

/// Experts alone.
pub(super) fn experts_alone<'a>(
    gate_up: &'a MatrixWeight<DeviceBuffer>,
    down: &'a MatrixWeight<DeviceBuffer>,
) -> Result<LayerWeights<'a>, Error> {
    let experts = ExpertWeights::new(weight(gate_up)?, weight(down)?);
    Ok(LayerWeights::new(RouterWeights::of_logits(), experts))
}

/// Where the gradients of a layer with its own router go.
pub(super) fn of_layer<T>(of: &mut BlockWeights<CudaSlice<f32>>) -> LayerGradients<'_, T> {
    let mut router = RouterGradients::new();
    router.matrix = of.router.as_mut().map(Into::into);
    router.bias = of.router_bias.as_mut().map(Into::into);
    router.expert_scale = of.expert_scale.as_mut().map(Into::into);
    router.global_scale = of.global_scale.as_mut().map(Into::into);
    router.norm = of.around.router.as_mut().map(Into::into);
    let mut gradients = of_products(&mut of.gate_up, &mut of.down).router(router);
    gradients.norms.experts = of.around.experts.as_mut().map(Into::into);
    gradients.norms.slots = of.around.slots.as_mut().map(Into::into);
    gradients.norms.output = of.around.output.as_mut().map(Into::into);
    if let Some([input, output]) = &mut of.around.latent {
        gradients.latent = LatentGradients::new().input(matrix(input)).output(matrix(output));
        gradients.latent.norm = of.around.latent_norm.as_mut().map(Into::into);
    }
    gradients.bias = of.output_bias.as_mut().map(Into::into);
    match &mut of.shared {
        None => gradients,
        Some((gate_up, down)) => {
            let mut shared = of_shared(gate_up, down);
            shared.gate = of.shared_gate.as_mut().map(Into::into);
            gradients.shared(shared)
        }
    }
}

/// Where those of experts' products go.
pub(super) fn of_products<'a, T>(
    gate_up: &'a mut MatrixWeight<CudaSlice<f32>>,
    down: &'a mut MatrixWeight<CudaSlice<f32>>,
) -> LayerGradients<'a, T> {
    LayerGradients::new().gate_up(matrix(gate_up)).down(matrix(down))
}

/// Where those of a shared expert's go.
pub(super) fn of_shared<'a>(
    gate_up: &'a mut MatrixWeight<CudaSlice<f32>>,
    down: &'a mut MatrixWeight<CudaSlice<f32>>,
) -> SharedGradients<'a> {
    SharedGradients::new().gate_up(matrix(gate_up)).down(matrix(down))
}

fn matrix(of: &mut MatrixWeight<CudaSlice<f32>>) -> WeightGradients<'_> {
    let gradients = WeightGradients::new(&mut of.matrix);
    match &mut of.bias {
        Some(bias) => gradients.bias(bias),
        None => gradients,
    }
}
