//! A router with a network and a state (Zaya), forth and back, in f32: see [`crate::routers::network`].

use cudarc::driver::CudaSlice;

use super::parts::{Dense, Product, Queue, Tokens};
use super::zeros;
use crate::checkpoint::kind::Network;
use crate::checkpoint::store::DeviceBuffer;
use crate::checkpoint::weights::{tensor, weight};
use crate::experts::activation_backward::{self, ActivationBackwardArgs, ActivationBackwardDesc};
use crate::experts::column_products::{self, ColumnProductsDesc};
use crate::experts::gemm::{self, GemmArgs, GemmDesc, Output, Rows};
use crate::experts::rms_norm::{self, RmsNormArgs, RmsNormDesc};
use crate::experts::rms_norm_backward::{self, Gradient, RmsNormBackwardArgs, RmsNormBackwardDesc};
use crate::layer::LayerDesc;
use crate::routers::router::{self, RouterArgs, RouterDesc};
use crate::rules::Activation;
use crate::{Dtype, Element, Error, In, Out};

/// What follows either layer.
const ACTIVATION: Activation = Activation::Gelu;

/// Both passes. Buffers are `[T,D]`.
pub(super) struct NetworkPass {
    hidden: usize,
    experts: usize,
    width: usize,
    layer: Dense,
    /// `[T, 2]`, for the sums of the norm's gain.
    factors: CudaSlice<f32>,
    projected: CudaSlice<f32>,
    /// With the previous layer's.
    state: CudaSlice<f32>,
    /// Behind the norm, and behind either layer.
    values: [CudaSlice<f32>; 3],
    pre_activations: [CudaSlice<f32>; 2],
    /// Gradients, by turns.
    d: [CudaSlice<f32>; 2],
}

impl NetworkPass {
    pub(super) fn new(
        network: &Network<DeviceBuffer>,
        desc: &LayerDesc,
        tokens: usize,
        queue: Queue<'_>,
    ) -> Result<NetworkPass, Error> {
        let width = network.width;
        let rows = || zeros::<f32>(queue.stream, tokens * width);
        Ok(NetworkPass {
            hidden: desc.hidden,
            experts: desc.experts,
            width,
            layer: Dense::new(Dtype::F32, width, width),
            factors: zeros(queue.stream, 2 * tokens)?,
            projected: rows()?,
            state: rows()?,
            values: [rows()?, rows()?, rows()?],
            pre_activations: [rows()?, rows()?],
            d: [rows()?, rows()?],
        })
    }

    pub(super) fn forward<T: Element>(
        &mut self,
        queue: Queue<'_>,
        tokens: &Tokens,
        network: &Network<DeviceBuffer>,
        x: In<'_, T>,
        previous: Option<In<'_, f32>>,
        logits: &mut CudaSlice<f32>,
    ) -> Result<(), Error> {
        let (count, width) = (tokens.count, self.width);
        let down = GemmDesc::new(T::DTYPE, Rows::Dense(count), width, self.hidden).output(Output::F32);
        let args = GemmArgs::to_f32(x, weight(&network.down)?, &mut self.projected);
        gemm::forward(queue.kernels, queue.stream, &down, args)?;
        let [normed, first, second] = &mut self.values;
        let norm = RmsNormDesc::new(Dtype::F32, count, width, network.norm);
        let mut args = RmsNormArgs::new(&self.projected, &mut *normed).weight(tensor(&network.gain)?);
        if let Some((scale, previous)) = network.state_scale.as_ref().zip(previous) {
            args = args.addend_scale(tensor(scale)?);
            args.addend = Some(previous);
            args.sum = Some((&mut self.state).into());
        }
        rms_norm::forward(queue.kernels, queue.stream, &norm, args)?;
        let [pre_first, pre_second] = &mut self.pre_activations;
        let [of_first, of_second] = &network.layers;
        let layer = &self.layer;
        layer.forward(queue, tokens, ((&*normed).into(), of_first), ACTIVATION, first, Some(pre_first))?;
        layer.forward(queue, tokens, ((&*first).into(), of_second), ACTIVATION, second, Some(pre_second))?;
        let desc = RouterDesc::new(Dtype::F32, count, self.experts, width);
        let missing = Error::WrongDtype {
            operation: super::OPERATION,
            argument: "output",
            expected: Dtype::F32,
            got: tensor(&network.output)?.dtype(),
        };
        let output = network.output.f32().ok_or(missing)?;
        router::forward(queue.kernels, queue.stream, &desc, RouterArgs::<f32, f32>::new(&*second, output, logits))
    }

    /// From the gradients of logits to those of the network, and to that of `x`, added to what is there.
    #[allow(clippy::too_many_arguments)] // a network's inputs and outputs
    pub(super) fn backward<T: Element>(
        &mut self,
        queue: Queue<'_>,
        tokens: &Tokens,
        network: &Network<DeviceBuffer>,
        (x, d_logits): (In<'_, T>, In<'_, f32>),
        previous: Option<In<'_, f32>>,
        of: &mut Network<CudaSlice<f32>>,
        (dx, d_previous): (Out<'_, T>, Option<&mut CudaSlice<f32>>),
    ) -> Result<(), Error> {
        let (kernels, stream) = (queue.kernels, queue.stream);
        let (count, width) = (tokens.count, self.width);
        let [normed, first, second] = &self.values;
        let [d, other] = &mut self.d;
        let output = Product::new(Dtype::F32, self.experts, width);
        output.back_to_weight::<f32>(queue, tokens, (d_logits, second.into()), &mut of.output)?;
        output.back_to_input::<f32>(queue, tokens, (d_logits, tensor(&network.output)?), false, (&mut *d).into())?;
        let seen = [normed, first];
        for i in [1, 0] {
            // `other` is the gradient before the activation, `d` becomes that of what the layer has seen.
            let through =
                ActivationBackwardDesc::new(Dtype::F32, count, width, ACTIVATION).glu(crate::rules::Glu::None);
            let args = ActivationBackwardArgs::new(&self.pre_activations[i], &*d, &mut *other);
            activation_backward::forward(kernels, stream, &through, args)?;
            self.layer.back_to_weight(queue, tokens, ((&*other).into(), seen[i].into()), &mut of.layers[i])?;
            self.layer.back_to_input(queue, tokens, ((&*other).into(), &network.layers[i]), false, (&mut *d).into())?;
        }

        // Back through the norm to the state.
        let scaled = network.state_scale.as_ref().zip(previous);
        let state = if scaled.is_some() { &self.state } else { &self.projected };
        let desc = RmsNormBackwardDesc::new(Dtype::F32, count, width, network.norm);
        let mut args = RmsNormBackwardArgs::new(state, Gradient::from(&*d), &mut *other).weight(tensor(&network.gain)?);
        (args.d_weight, args.factors) = (Some((&mut of.gain).into()), Some((&mut self.factors).into()));
        if let Some(((scale, _), to)) = scaled.zip(d_previous) {
            args.addend_scale = Some(tensor(scale)?);
            args.d_addend = Some(to.into());
        }
        rms_norm_backward::backward(kernels, stream, &desc, args)?;
        let d_state = &*other;
        if let Some(((_, previous), to)) = scaled.zip(of.state_scale.as_mut()) {
            let desc = ColumnProductsDesc::new(Dtype::F32, count, width);
            column_products::sum::<f32>(kernels, stream, &desc, previous, Gradient::from(d_state), to)?;
        }
        let down = Product::new(T::DTYPE, width, self.hidden);
        down.back_to_weight(queue, tokens, (d_state.into(), x), &mut of.down.matrix)?;
        if let Some(bias) = &mut of.down.bias {
            tokens.columns::<f32>(queue, d_state.into(), width, bias)?;
        }
        down.back_to_input(queue, tokens, (d_state.into(), tensor(&network.down.matrix)?), true, dx)
    }
}
