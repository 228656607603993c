//! A router with a network and a state (Zaya), forth and back, in f32: [`crate::routers::network`].

use cudarc::driver::CudaSlice;

use super::OPERATION;
use super::parts::Queue;
use crate::checkpoint::kind::Network;
use crate::checkpoint::store::DeviceBuffer;
use crate::checkpoint::weights::{tensor, weight};
use crate::layer::LayerDesc;
use crate::routers::network::{
    NetworkArgs, NetworkBackwardArgs, NetworkBackwardPlan, NetworkDesc, NetworkGradients, NetworkPlan, NetworkWeights,
};
use crate::{Dtype, Element, Error, In, Out, Workspace};

/// Both passes.
pub(super) struct NetworkPass {
    plan: NetworkPlan,
    back: NetworkBackwardPlan,
    workspace: Workspace,
}

fn weights(network: &Network<DeviceBuffer>) -> Result<NetworkWeights<'_>, Error> {
    let [first, second] = &network.layers;
    let layers = [weight(first)?, weight(second)?];
    let mut weights = NetworkWeights::new(weight(&network.down)?, layers, tensor(&network.output)?);
    weights.norm = Some(tensor(&network.gain)?);
    weights.state_scale = network.state_scale.as_ref().map(tensor).transpose()?;
    Ok(weights)
}

impl NetworkPass {
    pub(super) fn new(
        network: &Network<DeviceBuffer>,
        desc: &LayerDesc,
        tokens: usize,
        queue: Queue<'_>,
    ) -> Result<NetworkPass, Error> {
        let of = NetworkDesc::new(desc.dtype, tokens, desc.hidden, network.width, desc.experts, network.norm);
        let of = of.state(Dtype::F32);
        let device = queue.kernels.device();
        let plan = of.plan(device)?;
        let back = NetworkBackwardPlan::new(&of, device)?.add_to_x(true);
        let bytes = plan.workspace_bytes().max(back.workspace_bytes());
        let workspace = Workspace::new(queue.stream, bytes).map_err(|error| error.within(OPERATION))?;
        Ok(NetworkPass { plan, back, workspace })
    }

    pub(super) fn forward<T: Element>(
        &mut self,
        queue: Queue<'_>,
        network: &Network<DeviceBuffer>,
        x: In<'_, T>,
        previous: Option<In<'_, f32>>,
        logits: &mut CudaSlice<f32>,
    ) -> Result<(), Error> {
        let mut args = NetworkArgs::<T, f32>::new(x, logits);
        args.previous = previous;
        self.plan.forward(queue.kernels, queue.stream, &weights(network)?, args, &mut self.workspace)
    }

    /// From the gradients of logits to those of the network, and to that of `x`, added to what is there.
    pub(super) fn backward<T: Element>(
        &mut self,
        queue: Queue<'_>,
        network: &Network<DeviceBuffer>,
        (x, d_logits): (In<'_, T>, In<'_, f32>),
        previous: Option<In<'_, f32>>,
        of: &mut Network<CudaSlice<f32>>,
        (dx, d_previous): (Out<'_, T>, Option<&mut CudaSlice<f32>>),
    ) -> Result<(), Error> {
        let mut gradients = NetworkGradients::new();
        gradients.x = Some(dx);
        gradients.down = Some((&mut of.down.matrix).into());
        gradients.down_bias = of.down.bias.as_mut().map(Into::into);
        gradients.norm = Some((&mut of.gain).into());
        let [first, second] = &mut of.layers;
        gradients.layers = [Some((&mut first.matrix).into()), Some((&mut second.matrix).into())];
        gradients.layer_biases = [first.bias.as_mut().map(Into::into), second.bias.as_mut().map(Into::into)];
        gradients.output = Some((&mut of.output).into());
        if previous.is_some() {
            gradients.previous = d_previous.map(Into::into);
            gradients.state_scale = of.state_scale.as_mut().map(Into::into);
        }
        let mut args = NetworkBackwardArgs::new(x, d_logits, gradients);
        args.previous = previous;
        self.back.backward(queue.kernels, queue.stream, &weights(network)?, args, &mut self.workspace)
    }
}
