//! A router with a network and a state of its own (Zaya).
//!
//! ```text
//! state  = W_down x + b_down + state_scale previous              [T, D]: the state of this layer's router, for the next layer's
//! logits = W_out act(W_2 act(W_1 norm(state) + b_1) + b_2)       [T, E]
//! ```
//!
//! State and network are in the type of `x`, as the model keeps them, or in f32, where rounding does not move a choice
//! ([`NetworkDesc::state`]). The logits go to a gating, or a layer ([`crate::layer::RouteArgs::given_logits`]).
//!
//! # The way back
//!
//! [`NetworkBackwardPlan`], of a state of f32, goes from the gradient of the logits ([`crate::routers::gating_backward`], or
//! [`LayerGradients::logits`](crate::layer::LayerGradients::logits)) and that of the state from the next layer's router to those of `x`, of the previous state and of
//! every weight. The forward pass keeps nothing for it but `x` and the state before. It is made of (`d` is a gradient)
//!
//! | forth | back |
//! |---|---|
//! | `W_down x + b_down`: [`gemm`] to f32 | `d W_down`, `d b_down` (of a column of ones), `dx`, added: [`router_backward`](crate::routers::router_backward) |
//! | `+ state_scale previous`, the norm: [`rms_norm`] with `addend`, `sum` | `d` of the state, of the gain and of `previous`: [`rms_norm_backward`](crate::experts::rms_norm_backward); of `state_scale`: [`column_products`](crate::experts::column_products) |
//! | each layer: [`gemm`] with `pre_activation` | [`activation_backward`](crate::experts::activation_backward); `d W`: [`router_backward`](crate::routers::router_backward); `d` of its input: [`gemm`] with [`Layout::Kn`](crate::rules::Layout::Kn) |
//! | `W_out`: [`router`] | `d W_out` and `d` of its input: [`router_backward`](crate::routers::router_backward) |
//!
//! [`crate::reference::network`] has the formulas.

mod backward;

use std::sync::Arc;

use cudarc::driver::CudaStream;

pub use backward::{NetworkBackwardArgs, NetworkBackwardPlan, NetworkGradients};

use super::router::{self, RouterDesc};
use crate::experts::Weight;
use crate::experts::gemm::{self, GemmDesc, KernelSet, Output, Rows};
use crate::experts::rms_norm::{self, RmsNormDesc, check_weight};
use crate::experts::weight::{HeldWeight, WeightNames, WeightPlace};
use crate::rules::{Activation, Dtype, RmsNorm, WeightDesc};
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{Address, SCALAR, Scope, optional};
use crate::runtime::shape;
use crate::runtime::workspace::{Arena, Region};
use crate::{DeviceInfo, Element, Error, In, Kernel, Kernels, Out, Selection, Tensor, Workspace};

const OPERATION: &str = "network";

/// Shapes, type and rules of a router's network.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct NetworkDesc {
    /// Type of `x` and of the projection of it.
    pub dtype: Dtype,
    /// Type of the state and of all other weights: `dtype`, or f32.
    pub state: Dtype,
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Hidden size `H`.
    pub hidden: usize,
    /// Width of the state and of the network `D`.
    pub width: usize,
    /// Logits of a token `E`; one that stands for no expert among them.
    pub experts: usize,
    /// The norm of the state.
    pub norm: RmsNorm,
    /// What follows either layer.
    pub activation: Activation,
    /// One kernel for any number of tokens: see [`RouterDesc::batch_invariant`].
    pub batch_invariant: bool,
}

impl NetworkDesc {
    /// `experts` logits for `tokens` rows of `hidden` elements, by a network of `width` with GELU (Zaya).
    pub const fn new(
        dtype: Dtype,
        tokens: usize,
        hidden: usize,
        width: usize,
        experts: usize,
        norm: RmsNorm,
    ) -> NetworkDesc {
        let activation = Activation::Gelu;
        NetworkDesc { dtype, state: dtype, tokens, hidden, width, experts, norm, activation, batch_invariant: false }
    }

    /// Chooses kernels and places.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn plan(&self, device: &DeviceInfo) -> Result<NetworkPlan, Error> {
        NetworkPlan::new(self, device)
    }
}

settings!(NetworkDesc { state: Dtype, activation: Activation, batch_invariant: bool });

/// Weights of a router's network.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct NetworkWeights<'a> {
    /// `[D, H]`, with its bias `[D]`, of the type of `x`.
    pub down: Weight<'a>,
    /// `[D]`: factors of the previous layer's state; 1 where absent.
    pub state_scale: Option<Tensor<'a>>,
    /// `[D]`, where the norm's gain has a weight.
    pub norm: Option<Tensor<'a>>,
    /// `[D, D]` each, with their biases `[D]`.
    pub layers: [Weight<'a>; 2],
    /// `[E, D]`.
    pub output: Tensor<'a>,
}

impl<'a> NetworkWeights<'a> {
    /// Without factors of the state and without a weight of the norm.
    pub fn new(down: Weight<'a>, layers: [Weight<'a>; 2], output: impl Into<Tensor<'a>>) -> NetworkWeights<'a> {
        NetworkWeights { down, state_scale: None, norm: None, layers, output: output.into() }
    }

    /// With factors of the previous layer's state.
    #[must_use]
    pub fn state_scale(self, scale: impl Into<Tensor<'a>>) -> NetworkWeights<'a> {
        NetworkWeights { state_scale: Some(scale.into()), ..self }
    }

    /// With a weight of the norm.
    #[must_use]
    pub fn norm(self, weight: impl Into<Tensor<'a>>) -> NetworkWeights<'a> {
        NetworkWeights { norm: Some(weight.into()), ..self }
    }
}

/// Inputs and outputs of a router's network.
#[non_exhaustive]
pub struct NetworkArgs<'a, T, S> {
    /// `[T, H]`.
    pub x: In<'a, T>,
    /// `[T, D]`: the state of the previous layer's router. Absent in the first layer.
    pub previous: Option<In<'a, S>>,
    /// `[T, D]`, written: this layer's state.
    pub state: Option<Out<'a, S>>,
    /// `[T, E]`, written.
    pub logits: Out<'a, f32>,
}

impl<'a, T, S> NetworkArgs<'a, T, S> {
    /// `x` to `logits`, as a first layer does.
    pub fn new(x: impl Into<In<'a, T>>, logits: impl Into<Out<'a, f32>>) -> NetworkArgs<'a, T, S> {
        NetworkArgs { x: x.into(), previous: None, state: None, logits: logits.into() }
    }
}

buffers!(NetworkArgs<'a, T, S> { previous: In<S>, state: Out<S> });

/// Every choice for a router's network and a number of tokens: five launches.
#[derive(Clone, Copy, Debug)]
pub struct NetworkPlan {
    desc: NetworkDesc,
    down: (GemmDesc, Selection),
    norm: (RmsNormDesc, Selection),
    layer: (GemmDesc, Selection),
    output: (RouterDesc, Selection),
    /// `[T, D]`, three times: what the projection yields, and two that the network goes back and forth between.
    regions: [Region; 3],
    workspace_bytes: usize,
}

impl NetworkPlan {
    /// See [`NetworkDesc::plan`].
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn new(desc: &NetworkDesc, device: &DeviceInfo) -> Result<NetworkPlan, Error> {
        let &NetworkDesc { dtype, state, tokens, hidden, width, experts, norm, activation, batch_invariant } = desc;
        shape::positive(OPERATION, "hidden", hidden)?;
        shape::positive(OPERATION, "width", width)?;
        if state != dtype && state != Dtype::F32 {
            let supported = format!("the type of x ({dtype}) or f32");
            return Err(Error::unsupported(OPERATION, "state", supported, state));
        }
        gemm::check_activation(OPERATION, "activation", activation, WeightDesc::new(dtype).glu)?;
        let kernels = if batch_invariant { KernelSet::Sm80 } else { KernelSet::Fastest };
        let product = |desc: GemmDesc| {
            let desc = desc.kernels(kernels);
            Ok::<_, Error>((desc, gemm::select_for(OPERATION, &desc, device)?))
        };
        let rows = Rows::Dense(tokens);
        let form = if state == dtype { Output::Rounded } else { Output::F32 };
        let norm = RmsNormDesc::new(state, tokens, width, norm);
        let output = RouterDesc::new(state, tokens, experts, width).batch_invariant(batch_invariant);
        let within = |error: Error| error.within(OPERATION);
        let mut arena = Arena::new(OPERATION);
        arena.barrier()?;
        let elements = shape::product(OPERATION, "width", &[tokens, width])?;
        let mut region = || arena.region("width", elements, state.bytes() as usize);
        let regions = [region()?, region()?, region()?];
        Ok(NetworkPlan {
            desc: *desc,
            down: product(GemmDesc::new(dtype, rows, width, hidden).output(form))?,
            norm: (norm, rms_norm::select_for(OPERATION, &norm, device)?),
            layer: product(GemmDesc::new(state, rows, width, width).activation(activation))?,
            output: (output, router::select(&output, device).map_err(within)?),
            regions,
            workspace_bytes: arena.bytes(),
        })
    }

    /// The network that was planned.
    pub fn desc(&self) -> &NetworkDesc {
        &self.desc
    }

    /// Size of the workspace in bytes.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    /// The kernels, for [`crate::Kernels::preload`].
    pub fn kernels(&self) -> impl Iterator<Item = Kernel> + use<> {
        [self.down.1, self.norm.1, self.layer.1, self.output.1].into_iter().map(|selection| selection.kernel)
    }

    /// Computes the logits and, where it is wanted, the state.
    ///
    /// With no tokens nothing is launched.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Unexpected`] for a norm's weight against the descriptor; those of a buffer: [`Error::WrongDtype`],
    /// [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those of the driver.
    pub fn forward<T: Element, S: Element>(
        &self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        weights: &NetworkWeights<'_>,
        args: NetworkArgs<'_, T, S>,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        let scope = Scope::begin(OPERATION, kernels, stream)?;
        let NetworkDesc { dtype, state: kept, tokens, hidden, width, experts, norm, .. } = self.desc;
        scope.check_dtype::<T>("x", dtype)?;
        scope.check_dtype::<S>("state", kept)?;
        check_weight(OPERATION, "norm", norm.gain, weights.norm.is_some())?;
        if tokens == 0 {
            return Ok(());
        }
        let [wide, narrow] = [(dtype, hidden), (kept, width)].map(|(dtype, width)| shape::row_alignment(dtype, width));
        let down = open(&scope, "down", "down.bias", weights.down, &self.down.0)?;
        let [first, second] = weights.layers;
        let first = open(&scope, "layers[0]", "layers[0].bias", first, &self.layer.0)?;
        let second = open(&scope, "layers[1]", "layers[1].bias", second, &self.layer.0)?;
        let list = |argument| move |list| scope.read_tensor(argument, list, kept, width, narrow);
        let state_scale = weights.state_scale.map(list("state_scale")).transpose()?;
        let gain = weights.norm.map(list("norm")).transpose()?;
        let output = scope.read_tensor("output", weights.output, kept, experts * width, narrow)?;
        let x = scope.read("x", args.x, tokens * hidden, wide)?;
        let previous = scope.read_some("previous", args.previous, tokens * width, narrow)?;
        let state = scope.write_some("state", args.state, tokens * width, narrow)?;
        let logits = scope.write("logits", args.logits, tokens * experts, SCALAR)?;
        let workspace = workspace.open(&scope, self.workspace_bytes)?;

        let [projected, ping, pong] = self.regions.map(|region| workspace.at(region));
        // Without a previous state the projection is the state.
        let projected = match previous {
            Some(_) => projected,
            None => optional(&state).unwrap_or(projected),
        };
        product(&scope, &self.down, &down, x.address(), projected)?;
        let at = rms_norm::Addresses {
            weight: optional(&gain),
            addend: optional(&previous),
            addend_scale: optional(&state_scale),
            sum: optional(&state).filter(|_| previous.is_some()),
            ..rms_norm::Addresses::new(projected, ping)
        };
        rms_norm::enqueue(&scope, &self.norm.0, &self.norm.1, at)?;
        product(&scope, &self.layer, &first, ping, pong)?;
        product(&scope, &self.layer, &second, pong, ping)?;
        let at = router::Addresses {
            x: ping,
            weight: Some(output.address()),
            bias: None,
            logits: Some(logits.address()),
            logits_dtype: Dtype::F32,
            gate: None,
        };
        router::enqueue(&scope, &self.output.0, &self.output.1, at)
    }
}

fn open<'a, 'b>(
    scope: &Scope<'b>,
    matrix: &'static str,
    bias: &'static str,
    weight: Weight<'a>,
    desc: &GemmDesc,
) -> Result<HeldWeight<'b>, Error>
where
    'a: 'b,
{
    let names = WeightNames { matrix, bias, up: matrix, up_bias: bias };
    weight.open(scope, names, &desc.weight, WeightPlace::packed(&desc.weight, [1, desc.n, desc.k]))
}

/// A dense product.
fn product(
    scope: &Scope<'_>,
    (desc, selection): &(GemmDesc, Selection),
    weight: &HeldWeight<'_>,
    a: Address<'_>,
    out: Address<'_>,
) -> Result<(), Error> {
    gemm::enqueue(scope, desc, selection, gemm::Addresses::dense(a, weight.addresses(), out), None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::device::A100;

    #[test]
    fn faults_name_their_field() {
        let desc = NetworkDesc::new(Dtype::Bf16, 10, 64, 16, 11, RmsNorm::new(1e-5));
        let fault = |desc: NetworkDesc| desc.plan(&A100).unwrap_err().argument().unwrap();
        assert_eq!(desc.plan(&A100).unwrap().kernels().count(), 4);
        assert_eq!(fault(NetworkDesc { hidden: 0, ..desc }), "hidden");
        assert_eq!(fault(NetworkDesc { width: 0, ..desc }), "width");
        assert_eq!(fault(NetworkDesc { experts: 0, ..desc }), "experts");
        assert_eq!(fault(NetworkDesc { norm: RmsNorm::new(-1.0), ..desc }), "norm.epsilon");
    }
}
