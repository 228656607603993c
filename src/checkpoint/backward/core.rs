//! A block that is a layer.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};

use super::gradients::BlockGradients;
use super::{OPERATION, zeros};
use crate::checkpoint::run::BlockInputs;
use crate::checkpoint::weights::{BlockWeights, DeviceBlock, MatrixWeight};
use crate::layer::{
    BackwardArgs, BackwardDesc, BackwardPlan, LayerArgs, LayerDesc, LayerGradients, LayerPlan, RouterGradients, Saved,
    SharedGradients, WeightGradients,
};
use crate::routers::router_backward::{self, RouterBackwardDesc};
use crate::rules::NullExperts;
use crate::{Element, Error, In, Kernels, Workspace};

/// Both passes of a layer.
pub(super) struct Core<T> {
    plan: LayerPlan,
    back: BackwardPlan,
    saved: Saved<T>,
    workspace: Workspace,
    y: CudaSlice<T>,
    /// `[T]`, where a vector is added to every token's sum: its gradient is their product with `dy`.
    ones: Option<CudaSlice<f32>>,
}

impl<T: Element> Core<T> {
    /// Of a whole block.
    pub(super) fn of_block(
        block: &DeviceBlock,
        desc: &LayerDesc,
        tokens: usize,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
    ) -> Result<Core<T>, Error> {
        let mut core = Core::new(&without_map(desc, &block.weights), tokens, kernels, stream)?;
        if block.weights.output_bias.is_some() {
            core.ones = Some(stream.clone_htod(&vec![1.0; tokens.max(1)]).map_err(Error::driver(OPERATION))?);
        }
        Ok(core)
    }

    fn new(desc: &LayerDesc, tokens: usize, kernels: &Kernels, stream: &Arc<CudaStream>) -> Result<Core<T>, Error> {
        let plan = desc.plan(tokens, kernels.device())?;
        let back = plan.backward_plan(&BackwardDesc::new())?;
        kernels.preload(plan.kernels().chain(back.kernels()))?;
        Ok(Core {
            saved: Saved::new(stream, &back)?,
            workspace: Workspace::new(stream, plan.workspace_bytes().max(back.workspace_bytes()))?,
            y: zeros(stream, tokens * desc.hidden)?,
            plan,
            back,
            ones: None,
        })
    }

    pub(super) fn run(
        &mut self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        block: &DeviceBlock,
        (x, dy): (In<'_, T>, In<'_, T>),
        inputs: BlockInputs<'_>,
        gradients: &mut BlockGradients<T>,
    ) -> Result<(), Error> {
        let weights = block.weights.layer()?;
        let mut route = block.weights.route(inputs.words)?;
        route.map = None;
        let args = LayerArgs::new(x, &mut self.y).route(route);
        self.plan.forward_saving(kernels, stream, &weights, args, &mut self.saved, &mut self.workspace)?;
        let BlockGradients { x: dx, weights: of, .. } = gradients;
        let args = BackwardArgs::new(x, dy, layer(of)?.x(dx));
        self.back.backward(kernels, stream, &weights, &self.saved, args, &mut self.workspace)?;
        if let Some((ones, bias)) = self.ones.as_ref().zip(of.output_bias.as_mut()) {
            let sums = RouterBackwardDesc::new(T::DTYPE, self.plan.tokens(), 1, self.plan.desc().hidden);
            router_backward::into_weight::<T>(kernels, stream, &sums, ones, dy, bias)?;
        }
        Ok(())
    }
}

/// Experts that a map sends nowhere, or whose output is their input, as null experts.
fn without_map<B>(desc: &LayerDesc, weights: &BlockWeights<B>) -> LayerDesc {
    let mut desc = *desc;
    if let (Some(map), Some(output)) = (desc.map.take(), weights.weightless) {
        desc.null = Some(NullExperts { count: desc.experts - map.local_experts, output });
    }
    desc
}

/// Where a layer's gradients go.
fn layer<T>(of: &mut BlockWeights<CudaSlice<f32>>) -> Result<LayerGradients<'_, T>, Error> {
    let mut router = RouterGradients::new();
    router.matrix = of.router.as_mut().map(Into::into);
    router.bias = of.router_bias.as_mut().map(Into::into);
    router.expert_scale = of.expert_scale.as_mut().map(Into::into);
    router.global_scale = of.global_scale.as_mut().map(Into::into);
    let mut gradients =
        LayerGradients::new().router(router).gate_up(matrix(&mut of.gate_up)).down(matrix(&mut of.down));
    if let Some((gate_up, down)) = &mut of.shared {
        let mut shared = SharedGradients::new().gate_up(matrix(gate_up)).down(matrix(down));
        shared.gate = of.shared_gate.as_mut().map(Into::into);
        gradients = gradients.shared(shared);
    }
    Ok(gradients)
}

fn matrix(of: &mut MatrixWeight<CudaSlice<f32>>) -> WeightGradients<'_> {
    WeightGradients::new(&mut of.matrix)
}
