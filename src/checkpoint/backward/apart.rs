//! A layer whose router is gone back through by itself: one with a network, or one of a bank of two. Its experts go back as those of choices from elsewhere.

use cudarc::driver::CudaSlice;

use super::core::{Core, of_layer, without_map};
use super::gradients::To;
use super::network::NetworkPass;
use super::parts::{Product, Queue, Tokens};
use super::{OPERATION, no_way_back, zeros};
use crate::checkpoint::kind::Kind;
use crate::checkpoint::run::BlockInputs;
use crate::checkpoint::store::DeviceBuffer;
use crate::checkpoint::weights::{BlockWeights, tensor};
use crate::layer::{Choices, LayerDesc, RouteArgs, RouterGradients};
use crate::routers::gating::{self, GatingArgs, GatingDesc, RuleInputs};
use crate::routers::gating_backward::{self, GatingBackwardArgs, GatingBackwardDesc};
use crate::routers::router::{self, RouterArgs, RouterDesc};
use crate::{Element, Error, In, Out, Tensor, TokenMask, Workspace};

/// Both passes.
pub(super) struct Apart<T> {
    desc: LayerDesc,
    tokens: Tokens,
    /// Where logits are from, if not from the layer's own router.
    network: Option<Box<NetworkPass>>,
    gating: GatingDesc,
    gating_back: GatingBackwardDesc,
    sums: Workspace,
    choices: Buffers,
    /// The experts, by choices from elsewhere.
    experts: Core<T>,
}

/// `[T, columns]` each, or `[T, k + appended]`.
struct Buffers {
    logits: CudaSlice<f32>,
    d_logits: CudaSlice<f32>,
    ids: CudaSlice<i32>,
    weights: CudaSlice<f32>,
    d_weights: CudaSlice<f32>,
}

impl<T: Element> Apart<T> {
    pub(super) fn new(
        kind: &Kind<DeviceBuffer>,
        weights: &BlockWeights<DeviceBuffer>,
        desc: &LayerDesc,
        count: usize,
        queue: Queue<'_>,
    ) -> Result<Apart<T>, Error> {
        let stream = queue.stream;
        if desc.norms.router.is_some() || desc.admission.is_some() {
            return Err(no_way_back("a norm or an admission at a router that is gone back through by itself"));
        }
        let desc = without_map(desc, weights);
        let network = match kind {
            Kind::Network(network) => Some(Box::new(NetworkPass::new(network, &desc, count, queue)?)),
            _ => None,
        };
        let gating = GatingDesc::new(count, desc.experts, desc.top_k, desc.gating);
        let gating_back = GatingBackwardDesc::new(count, desc.experts, desc.top_k, desc.gating).logit_rule(desc.logits);
        let all = count * desc.all_choices();
        let columns = count * desc.logit_columns();
        Ok(Apart {
            tokens: Tokens::new(count, queue)?,
            network,
            gating,
            sums: Workspace::new(stream, gating_backward::workspace_bytes(&gating_back)?)?,
            gating_back,
            choices: Buffers {
                logits: zeros(stream, columns)?,
                d_logits: zeros(stream, columns)?,
                ids: zeros(stream, all)?,
                weights: zeros(stream, all)?,
                d_weights: zeros(stream, all)?,
            },
            experts: Core::chosen(&desc, count, queue)?,
            desc,
        })
    }

    /// Both passes for the tokens of a mask; the gradient of `x` is written.
    pub(super) fn run(
        &mut self,
        queue: Queue<'_>,
        weights: &BlockWeights<DeviceBuffer>,
        kind: &Kind<DeviceBuffer>,
        (x, dy): (In<'_, T>, In<'_, T>),
        (inputs, mask): (BlockInputs<'_>, TokenMask<'_>),
        to: &mut To<'_, T>,
    ) -> Result<(), Error> {
        self.choose(queue, weights, kind, x, (inputs, mask))?;
        self.experts(queue, weights, (x, dy), to)?;
        self.back_to_logits(queue, weights, mask, to)?;
        let (dx, of, of_kind, previous) = (&mut *to.x, &mut *to.weights, &mut *to.kind, to.previous.as_deref_mut());
        let (tokens, d_logits) = (&self.tokens, (&self.choices.d_logits).into());
        if let (Some(pass), Kind::Network(network), Kind::Network(of)) = (&mut self.network, kind, of_kind) {
            let to: (Out<'_, T>, _) = (dx.into(), previous);
            return pass.backward(queue, network, (x, d_logits), inputs.previous, of, to);
        }
        let Some(matrix) = &weights.router else { return Ok(()) };
        let columns = self.desc.logit_columns();
        if let Some(bias) = &mut of.router_bias {
            tokens.columns(queue, d_logits, columns, bias)?;
        }
        let product = Product::new(T::DTYPE, columns, self.desc.hidden);
        if let Some(d_matrix) = of.router.as_mut() {
            product.back_to_weight(queue, tokens, (d_logits, x), d_matrix)?;
        }
        product.back_to_input(queue, tokens, (d_logits, tensor(matrix)?), true, dx.into())
    }

    /// Logits, and choices by them.
    fn choose(
        &mut self,
        queue: Queue<'_>,
        weights: &BlockWeights<DeviceBuffer>,
        kind: &Kind<DeviceBuffer>,
        x: In<'_, T>,
        (inputs, mask): (BlockInputs<'_>, TokenMask<'_>),
    ) -> Result<(), Error> {
        let Queue { kernels, stream } = queue;
        let Buffers { logits, ids, weights: shares, .. } = &mut self.choices;
        match (&mut self.network, kind) {
            (Some(pass), Kind::Network(network)) => {
                pass.forward(queue, network, x, inputs.previous, logits)?;
            }
            _ => {
                let missing =
                    Error::Missing { operation: OPERATION, argument: "router", reason: "logits are a router's" };
                let matrix = tensor(weights.router.as_ref().ok_or(missing)?)?;
                let bias = weights.router_bias.as_ref().and_then(DeviceBuffer::f32);
                let desc = RouterDesc::new(T::DTYPE, self.tokens.count, self.desc.logit_columns(), self.desc.hidden)
                    .weight(self.desc.router_dtype)
                    .logits(self.desc.logits);
                product(queue, &desc, x, matrix, bias, logits)?;
            }
        }
        let RouteArgs { given, .. } = weights.route(inputs.words)?;
        let mut rule = RuleInputs::new();
        rule.given = given;
        rule.expert_scale = weights.expert_scale.as_ref().and_then(DeviceBuffer::f32);
        rule.global_scale = weights.global_scale.as_ref().and_then(DeviceBuffer::f32);
        let mut args = GatingArgs::new(&*logits, &mut *ids, &mut *shares).rule(rule).mask(mask);
        args.correction_bias = weights.correction_bias.as_ref().and_then(DeviceBuffer::f32);
        gating::forward(kernels, stream, &self.gating, args)
    }

    /// The experts, forth and back: to the gradients of choices' weights, and to that of `x`, written.
    fn experts(
        &mut self,
        queue: Queue<'_>,
        weights: &BlockWeights<DeviceBuffer>,
        (x, dy): (In<'_, T>, In<'_, T>),
        to: &mut To<'_, T>,
    ) -> Result<(), Error> {
        let (ids, shares) = (&self.choices.ids, &self.choices.weights);
        let weights = weights.layer()?;
        self.experts.forward_chosen(queue, &weights, x, Choices::new(ids, shares))?;
        let mut gradients = of_layer(to.weights).router(RouterGradients::new()).x(&mut *to.x);
        gradients.weights = Some((&mut self.choices.d_weights).into());
        self.experts.backward(queue, &weights, (x, dy), gradients)
    }

    /// From the gradients of choices' weights to those of logits and of learned factors.
    fn back_to_logits(
        &mut self,
        queue: Queue<'_>,
        weights: &BlockWeights<DeviceBuffer>,
        mask: TokenMask<'_>,
        to: &mut To<'_, T>,
    ) -> Result<(), Error> {
        let of = &mut *to.weights;
        let Buffers { logits, d_logits, ids, d_weights, .. } = &mut self.choices;
        let mut args = GatingBackwardArgs::new(&*logits, &*ids, &*d_weights, d_logits).mask(mask);
        args.expert_scale = weights.expert_scale.as_ref().and_then(DeviceBuffer::f32);
        args.global_scale = weights.global_scale.as_ref().and_then(DeviceBuffer::f32);
        args.d_expert_scale = of.expert_scale.as_mut().map(Into::into);
        args.d_global_scale = of.global_scale.as_mut().map(Into::into);
        if args.d_expert_scale.is_some() || args.d_global_scale.is_some() {
            args.workspace = Some(&mut self.sums);
        }
        gating_backward::forward(queue.kernels, queue.stream, &self.gating_back, args)
    }
}

/// Logits of rows of type `X`.
pub(super) fn product<X: Element>(
    queue: Queue<'_>,
    desc: &RouterDesc,
    x: In<'_, X>,
    matrix: Tensor<'_>,
    bias: Option<In<'_, f32>>,
    logits: &mut CudaSlice<f32>,
) -> Result<(), Error> {
    fn typed<'a, X: Element, W: Element>(
        queue: Queue<'_>,
        desc: &RouterDesc,
        mut args: RouterArgs<'a, X, W>,
        bias: Option<In<'a, f32>>,
    ) -> Result<(), Error> {
        args.bias = bias;
        router::forward(queue.kernels, queue.stream, desc, args)
    }
    match matrix {
        Tensor::Bf16(matrix) => typed(queue, desc, RouterArgs::new(x, matrix, logits), bias),
        Tensor::F16(matrix) => typed(queue, desc, RouterArgs::new(x, matrix, logits), bias),
        Tensor::F32(matrix) => typed(queue, desc, RouterArgs::new(x, matrix, logits), bias),
    }
}
