//! The way back through a router's network and state.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::{NetworkDesc, NetworkPlan, NetworkWeights};
use crate::experts::Weight;
use crate::experts::activation_backward::{self, ActivationBackwardArgs, ActivationBackwardDesc};
use crate::experts::column_products::{self, ColumnProductsDesc};
use crate::experts::gemm::{self, GemmArgs, GemmDesc, Rows};
use crate::experts::rms_norm::{self, RmsNormArgs};
use crate::experts::rms_norm_backward::{self, Gradient, RmsNormBackwardArgs, RmsNormBackwardDesc};
use crate::routers::router_backward::{self, RouterBackwardDesc, WeightArgs};
use crate::rules::{Dtype, Glu, Layout, WeightDesc};
use crate::runtime::builder::buffers;
use crate::runtime::launch::{Address, Held, SCALAR, Scope, optional};
use crate::runtime::shape;
use crate::runtime::workspace::{Arena, BARRIER_HEADER, Region};
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Tensor, Workspace};

const OPERATION: &str = "network_backward";

/// What the way back reads.
#[non_exhaustive]
pub struct NetworkBackwardArgs<'a, T> {
    /// `[T, H]`: the forward pass's.
    pub x: In<'a, T>,
    /// `[T, D]`: the forward pass's, exactly where it had one.
    pub previous: Option<In<'a, f32>>,
    /// `[T, E]`: the gradient of the logits.
    pub d_logits: In<'a, f32>,
    /// `[T, D]`: the gradient of the state, from the next layer's router ([`NetworkGradients::previous`] of its way back).
    pub d_state: Option<In<'a, f32>>,
    /// What is asked for.
    pub gradients: NetworkGradients<'a, T>,
}

impl<'a, T> NetworkBackwardArgs<'a, T> {
    /// From `d_logits` to `gradients`, as of a first layer.
    pub fn new(
        x: impl Into<In<'a, T>>,
        d_logits: impl Into<In<'a, f32>>,
        gradients: NetworkGradients<'a, T>,
    ) -> NetworkBackwardArgs<'a, T> {
        NetworkBackwardArgs { x: x.into(), previous: None, d_logits: d_logits.into(), d_state: None, gradients }
    }
}

buffers!(NetworkBackwardArgs<'a, T> { previous: In<f32>, d_state: In<f32> });

/// Where gradients go, all written. One that no buffer is given for is not computed, but as far as others need it.
#[non_exhaustive]
pub struct NetworkGradients<'a, T> {
    /// `[T, H]`.
    pub x: Option<Out<'a, T>>,
    /// `[T, D]`, where there is a previous state.
    pub previous: Option<Out<'a, f32>>,
    /// `[D, H]`.
    pub down: Option<Out<'a, f32>>,
    /// `[D]`, where the projection has a bias; with `down`.
    pub down_bias: Option<Out<'a, f32>>,
    /// `[D]`: of the previous state's factors, where these are given.
    pub state_scale: Option<Out<'a, f32>>,
    /// `[D]`: of the norm's weight, where it has one.
    pub norm: Option<Out<'a, f32>>,
    /// `[D, D]` each.
    pub layers: [Option<Out<'a, f32>>; 2],
    /// `[D]` each, where the layer has a bias; with its matrix.
    pub layer_biases: [Option<Out<'a, f32>>; 2],
    /// `[E, D]`.
    pub output: Option<Out<'a, f32>>,
}

impl<T> Default for NetworkGradients<'_, T> {
    fn default() -> Self {
        NetworkGradients::new()
    }
}

impl<'a, T> NetworkGradients<'a, T> {
    /// None.
    pub const fn new() -> NetworkGradients<'a, T> {
        NetworkGradients {
            x: None,
            previous: None,
            down: None,
            down_bias: None,
            state_scale: None,
            norm: None,
            layers: [None, None],
            layer_biases: [None, None],
            output: None,
        }
    }
}

buffers!(NetworkGradients<'a, T> {
    x: Out<T>,
    previous: Out<f32>,
    down: Out<f32>,
    down_bias: Out<f32>,
    state_scale: Out<f32>,
    norm: Out<f32>,
    output: Out<f32>,
});

/// Every choice for the way back through a router's network: 17 launches where all gradients are asked for, of which four compute what stands between once
/// more, so that the forward pass keeps nothing.
#[derive(Clone, Copy, Debug)]
pub struct NetworkBackwardPlan {
    forward: NetworkPlan,
    /// Adds `x`'s gradient to what its buffer holds: that of the experts.
    add_to_x: bool,
    /// Memory of the operations that add up over tokens.
    sums: Region,
    /// `[T, D]`: the projection, the state, what the norm and either layer yield, what stands in front of both activations, two gradients.
    rows: [Region; 8],
    /// `[T, 2]`.
    factors: Region,
    workspace_bytes: usize,
}

impl NetworkBackwardPlan {
    /// Of the network `desc`, whose state is of f32.
    ///
    /// # Errors
    /// Those of [`NetworkDesc::plan`]; [`Error::Unsupported`] for a state of another type.
    pub fn new(desc: &NetworkDesc, device: &DeviceInfo) -> Result<NetworkBackwardPlan, Error> {
        if desc.state != Dtype::F32 {
            return Err(Error::unsupported(OPERATION, "state", "f32", desc.state));
        }
        let forward = desc.plan(device).map_err(|error| error.within(OPERATION))?;
        let mut plan = NetworkBackwardPlan {
            forward,
            add_to_x: false,
            sums: Region::default(),
            rows: [Region::default(); 8],
            factors: Region::default(),
            workspace_bytes: 0,
        };
        let products = [plan.output(), plan.layer(), plan.down()];
        let bytes =
            products.map(|desc| router_backward::workspace_bytes(&desc).map_err(|error| error.within(OPERATION)));
        let [output, layer, down] = bytes;
        let mut arena = Arena::new(OPERATION);
        plan.sums = arena.region("workspace", output?.max(layer?).max(down?).max(BARRIER_HEADER), 1)?;
        let elements = shape::product(OPERATION, "width", &[desc.tokens, desc.width])?;
        for region in &mut plan.rows {
            *region = arena.region("width", elements, size_of::<f32>())?;
        }
        plan.factors = arena.region("tokens", 2 * desc.tokens, size_of::<f32>())?;
        plan.workspace_bytes = arena.bytes();
        Ok(plan)
    }

    /// Adds `x`'s gradient to what its buffer holds.
    #[must_use]
    pub fn add_to_x(self, add_to_x: bool) -> NetworkBackwardPlan {
        NetworkBackwardPlan { add_to_x, ..self }
    }

    /// Size of the workspace in bytes.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    fn desc(&self) -> &NetworkDesc {
        self.forward.desc()
    }

    /// The products as routers of so many experts and columns: their gradients are sums over tokens, in f32.
    fn output(&self) -> RouterBackwardDesc {
        let &NetworkDesc { tokens, experts, width, .. } = self.desc();
        RouterBackwardDesc::new(Dtype::F32, tokens, experts, width)
    }

    fn layer(&self) -> RouterBackwardDesc {
        let &NetworkDesc { tokens, width, .. } = self.desc();
        RouterBackwardDesc::new(Dtype::F32, tokens, width, width)
    }

    fn down(&self) -> RouterBackwardDesc {
        let &NetworkDesc { dtype, tokens, width, hidden, .. } = self.desc();
        RouterBackwardDesc::new(dtype, tokens, width, hidden).weight(dtype)
    }

    /// Computes the gradients of `sum d_logits logits + sum d_state state`: [`crate::reference::network::network_backward`].
    ///
    /// With no tokens nothing is launched, and gradients of weights become 0.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Unexpected`] for a norm's weight or a gradient against the network, and for a bias's gradient without its matrix's; those of
    /// a buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those
    /// of the driver.
    pub fn backward<T: Element>(
        &self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        weights: &NetworkWeights<'_>,
        args: NetworkBackwardArgs<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        let scope = Scope::begin(OPERATION, kernels, stream)?;
        let &NetworkDesc { dtype, tokens, hidden, width, experts, norm, activation, .. } = self.desc();
        scope.check_dtype::<T>("x", dtype)?;
        check_asked(weights, &args, norm.gain.has_weight())?;
        let within = |error: Error| error.within(OPERATION);
        let NetworkBackwardArgs { x, previous, d_logits, d_state, gradients: of } = args;
        let row = shape::row_alignment;
        let narrow = row(Dtype::F32, width);
        let (square, elements) = (width * width, tokens * width);
        let x = scope.read("x", x, tokens * hidden, row(dtype, hidden))?;
        let previous = scope.read_some("previous", previous, elements, narrow)?;
        let d_logits = scope.read("d_logits", d_logits, tokens * experts, SCALAR)?;
        let d_state = scope.read_some("d_state", d_state, elements, narrow)?;
        let dx = scope.write_some("gradients.x", of.x, tokens * hidden, row(dtype, hidden))?;
        let d_previous = scope.write_some("gradients.previous", of.previous, elements, narrow)?;
        let some = |argument, out, len| scope.write_some::<f32>(argument, out, len, SCALAR);
        let [first, second] = of.layers;
        let [first_bias, second_bias] = of.layer_biases;
        let d_down =
            [some("gradients.down", of.down, width * hidden)?, some("gradients.down_bias", of.down_bias, width)?];
        let d_first = [some("gradients.layers", first, square)?, some("gradients.layer_biases", first_bias, width)?];
        let d_second = [some("gradients.layers", second, square)?, some("gradients.layer_biases", second_bias, width)?];
        let d_output = some("gradients.output", of.output, experts * width)?;
        let d_scale = some("gradients.state_scale", of.state_scale, width)?;
        let d_norm = some("gradients.norm", of.norm, width)?;
        if tokens == 0 {
            let [[down, down_bias], [first, first_bias], [second, second_bias]] = [&d_down, &d_first, &d_second];
            return [
                (down, width * hidden),
                (down_bias, width),
                (first, square),
                (first_bias, width),
                (second, square),
                (second_bias, width),
                (&d_output, experts * width),
                (&d_scale, width),
                (&d_norm, width),
            ]
            .into_iter()
            .try_for_each(|(to, len)| optional(to).map_or(Ok(()), |to| scope.zero(to, len * size_of::<f32>())));
        }
        let held = workspace.open(&scope, self.workspace_bytes)?;
        let [projected, sum, normed, behind, last, first, second, d] = self.rows.map(|region| held.at(region));
        let (rows, out) = (rows_at(elements), out_at(elements));
        let x = x.address();

        // What the forward pass had.
        let seen = x.input::<T>(tokens * hidden);
        let args = match T::DTYPE {
            Dtype::F32 => GemmArgs::new(seen, weights.down, projected.out::<T>(elements)),
            _ => GemmArgs::to_f32(seen, weights.down, out(projected)),
        };
        gemm::forward(kernels, stream, &self.forward.down.0, args).map_err(within)?;
        let mut args = RmsNormArgs::new(rows(projected), out(normed));
        args.weight = weights.norm;
        let state = match optional(&previous) {
            Some(previous) => {
                args.addend = Some(rows(previous));
                args.addend_scale = weights.state_scale;
                args.sum = Some(out(sum));
                sum
            }
            None => projected,
        };
        rms_norm::forward(kernels, stream, &self.forward.norm.0, args).map_err(within)?;
        for (layer, [from, pre, to]) in
            weights.layers.into_iter().zip([[normed, first, behind], [behind, second, last]])
        {
            let mut args = GemmArgs::new(rows(from), layer, out(to));
            args.pre_activation = Some(out(pre));
            gemm::forward(kernels, stream, &self.forward.layer.0, args).map_err(within)?;
        }

        // The output, and either layer; `d` is the gradient of what was seen, and takes the place of what is done with.
        let sums = |desc: &RouterBackwardDesc, d: Address<'_>, seen: Address<'_>, to: &[Option<Held<'_>>; 2]| {
            self.sums::<f32>(&scope, &held, desc, [d, seen], to)
        };
        let output = self.output();
        let d_output = [d_output, None];
        sums(&output, d_logits.address(), last, &d_output)?;
        let matrix = typed::<f32>("output", weights.output)?;
        let d_of_logits = d_logits.address().input::<f32>(tokens * experts);
        router_backward::into_x::<f32, f32>(kernels, stream, &output, d_of_logits, matrix, out(d)).map_err(within)?;
        let through = ActivationBackwardDesc::new(Dtype::F32, tokens, width, activation).glu(Glu::None);
        let turned = WeightDesc::new(Dtype::F32).layout(Layout::Kn);
        let to_input = GemmDesc::new(Dtype::F32, Rows::Dense(tokens), width, width).weight(turned);
        for (layer, [seen, pre], to) in [(1, [behind, second], &d_second), (0, [normed, first], &d_first)] {
            // `last` is done with.
            let args = ActivationBackwardArgs::new(rows(pre), rows(d), out(last));
            activation_backward::forward(kernels, stream, &through, args).map_err(within)?;
            sums(&self.layer(), last, seen, to)?;
            let args = GemmArgs::new(rows(last), Weight::new(weights.layers[layer].matrix), out(d));
            gemm::forward(kernels, stream, &to_input, args).map_err(within)?;
        }

        // Through the norm to the state, onto the next layer's part of its gradient.
        if let Some(given) = optional(&d_state) {
            scope.copy(given, last, elements * size_of::<f32>())?;
        }
        let desc = RmsNormBackwardDesc::new(Dtype::F32, tokens, width, norm).accumulate(d_state.is_some());
        let mut args = RmsNormBackwardArgs::new(rows(state), Gradient::Rounded(rows(d)), out(last));
        args.weight = weights.norm;
        if let Some(to) = optional(&d_norm) {
            (args.d_weight, args.factors) = (Some(to.out(width)), Some(held.at(self.factors).out(2 * tokens)));
        }
        if let Some(to) = optional(&d_previous) {
            (args.addend_scale, args.d_addend) = (weights.state_scale, Some(out(to)));
        }
        rms_norm_backward::backward(kernels, stream, &desc, args).map_err(within)?;
        if let Some((to, previous)) = optional(&d_scale).zip(optional(&previous)) {
            let desc = ColumnProductsDesc::new(Dtype::F32, tokens, width);
            let d = Gradient::Rounded(rows(last));
            column_products::sum::<f32>(kernels, stream, &desc, rows(previous), d, to.out(width)).map_err(within)?;
        }
        let down = self.down();
        self.sums::<T>(&scope, &held, &down, [last, x], &d_down)?;
        let Some(dx) = optional(&dx) else { return Ok(()) };
        let matrix = typed::<T>("down", weights.down.matrix)?;
        let (down, dx) = (down.accumulate(self.add_to_x), dx.out::<T>(tokens * hidden));
        router_backward::into_x::<T, T>(kernels, stream, &down, rows(last), matrix, dx).map_err(within)
    }

    /// The gradients of a matrix and of its bias: `d^T seen`, and the sums of `d`.
    fn sums<X: Element>(
        &self,
        scope: &Scope<'_>,
        workspace: &Held<'_>,
        desc: &RouterBackwardDesc,
        [d, seen]: [Address<'_>; 2],
        [matrix, bias]: &[Option<Held<'_>>; 2],
    ) -> Result<(), Error> {
        let Some(to) = optional(matrix) else { return Ok(()) };
        let &RouterBackwardDesc { tokens, experts, hidden, .. } = desc;
        let mut lent = workspace.part(self.sums);
        let rows = d.input::<f32>(tokens * experts);
        let mut args = WeightArgs::new(rows, seen.input::<X>(tokens * hidden), to.out(experts * hidden));
        args.d_bias = optional(bias).map(|bias| bias.out(experts));
        router_backward::weight::<X>(scope.kernels, scope.stream, desc, args.workspace(&mut lent))
            .map_err(|error| error.within(OPERATION))
    }
}

/// So many elements at an address, to read.
fn rows_at<'a>(elements: usize) -> impl Fn(Address<'a>) -> In<'a, f32> {
    move |at| at.input(elements)
}

/// The same, to write.
fn out_at<'a>(elements: usize) -> impl Fn(Address<'a>) -> Out<'a, f32> {
    move |at| at.out(elements)
}

/// A matrix whose type has been said.
fn typed<'a, T: Element>(argument: &'static str, tensor: Tensor<'a>) -> Result<In<'a, T>, Error> {
    let got = tensor.dtype();
    T::of_tensor(tensor).ok_or(Error::WrongDtype { operation: OPERATION, argument, expected: T::DTYPE, got })
}

fn check_asked<T>(weights: &NetworkWeights<'_>, args: &NetworkBackwardArgs<'_, T>, weighs: bool) -> Result<(), Error> {
    let of = &args.gradients;
    let operation = OPERATION;
    let [first, second] = &weights.layers;
    let first_layer = "the first layer has no previous state";
    for (argument, there, given, reason) in [
        ("gradients.previous", args.previous.is_some(), of.previous.is_some(), first_layer),
        (
            "gradients.state_scale",
            args.previous.is_some() && weights.state_scale.is_some(),
            of.state_scale.is_some(),
            "no previous state has factors",
        ),
        ("gradients.norm", weighs, of.norm.is_some(), "the norm's gain has no weight"),
        ("gradients.down_bias", weights.down.bias.is_some(), of.down_bias.is_some(), "the projection has no bias"),
        ("gradients.layer_biases", first.bias.is_some(), of.layer_biases[0].is_some(), "the layer has no bias"),
        ("gradients.layer_biases", second.bias.is_some(), of.layer_biases[1].is_some(), "the layer has no bias"),
    ] {
        if given && !there {
            return Err(Error::Unexpected { operation, argument, reason });
        }
    }
    for (argument, matrix, bias) in [
        ("gradients.down", &of.down, &of.down_bias),
        ("gradients.layers", &of.layers[0], &of.layer_biases[0]),
        ("gradients.layers", &of.layers[1], &of.layer_biases[1]),
    ] {
        if bias.is_some() && matrix.is_none() {
            return Err(Error::Missing { operation, argument, reason: "its bias's gradient is made with it" });
        }
    }
    Ok(())
}
