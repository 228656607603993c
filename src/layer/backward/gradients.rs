//! Where gradients go.

use crate::runtime::builder::buffers;
use crate::{Out, OutTensor};

/// Gradients of a layer's input and parameters. One that no buffer is given for is not computed: what is frozen costs nothing.
#[non_exhaustive]
pub struct LayerGradients<'a, T> {
    /// `[T, H]`, written: of `x`.
    pub x: Option<Out<'a, T>>,
    /// `[T, H]`, written: of what the router saw in place of `x` ([`crate::layer::LayerArgs::router_x`]), only with that.
    pub router_x: Option<Out<'a, T>>,
    /// `[T, E]`, written: of the logits; where the descriptor does something to the router's product ([`crate::layer::LayerDesc::logits`]), of that product.
    pub logits: Option<Out<'a, f32>>,
    /// `[T, k]`, with an admission `[T, candidates]`, written: of the choices' weights, from which any router's way back goes on. 0 of a choice that nothing came of.
    pub weights: Option<Out<'a, f32>>,
    /// The router's.
    pub router: RouterGradients<'a>,
    /// Of the first product's weight.
    pub gate_up: WeightGradients<'a>,
    /// Of the second product's.
    pub down: WeightGradients<'a>,
    /// The shared expert's.
    pub shared: SharedGradients<'a>,
    /// `[H]`, of f32: of the vector that is added to every token's sum.
    pub bias: Option<Out<'a, f32>>,
    /// Of norms' weights.
    pub norms: NormGradients<'a>,
    /// Of the projections round experts of a latent width.
    pub latent: LatentGradients<'a>,
}

impl<T> Default for LayerGradients<'_, T> {
    fn default() -> Self {
        LayerGradients::new()
    }
}

impl<'a, T> LayerGradients<'a, T> {
    /// None.
    pub const fn new() -> LayerGradients<'a, T> {
        LayerGradients {
            x: None,
            router_x: None,
            logits: None,
            weights: None,
            router: RouterGradients::new(),
            gate_up: WeightGradients::none(),
            down: WeightGradients::none(),
            shared: SharedGradients::new(),
            bias: None,
            norms: NormGradients::new(),
            latent: LatentGradients::new(),
        }
    }

    /// The same for a shorter time: for another micro-batch.
    pub fn reborrow(&mut self) -> LayerGradients<'_, T> {
        LayerGradients {
            x: self.x.as_mut().map(Out::reborrow),
            router_x: self.router_x.as_mut().map(Out::reborrow),
            logits: self.logits.as_mut().map(Out::reborrow),
            weights: self.weights.as_mut().map(Out::reborrow),
            router: self.router.reborrow(),
            bias: self.bias.as_mut().map(Out::reborrow),
            norms: NormGradients {
                experts: self.norms.experts.as_mut().map(Out::reborrow),
                slots: self.norms.slots.as_mut().map(Out::reborrow),
                output: self.norms.output.as_mut().map(Out::reborrow),
            },
            latent: LatentGradients {
                input: self.latent.input.reborrow(),
                norm: self.latent.norm.as_mut().map(Out::reborrow),
                output: self.latent.output.reborrow(),
            },
            gate_up: self.gate_up.reborrow(),
            down: self.down.reborrow(),
            shared: SharedGradients {
                gate_up: self.shared.gate_up.reborrow(),
                down: self.shared.down.reborrow(),
                gate: self.shared.gate.as_mut().map(Out::reborrow),
            },
        }
    }

    /// With the router's.
    #[must_use]
    pub fn router(self, router: RouterGradients<'a>) -> LayerGradients<'a, T> {
        LayerGradients { router, ..self }
    }

    /// With that of the first product's weight.
    #[must_use]
    pub fn gate_up(self, gate_up: WeightGradients<'a>) -> LayerGradients<'a, T> {
        LayerGradients { gate_up, ..self }
    }

    /// With that of the second product's weight.
    #[must_use]
    pub fn down(self, down: WeightGradients<'a>) -> LayerGradients<'a, T> {
        LayerGradients { down, ..self }
    }

    /// With those of norms' weights.
    #[must_use]
    pub fn norms(self, norms: NormGradients<'a>) -> LayerGradients<'a, T> {
        LayerGradients { norms, ..self }
    }

    /// With those of the projections round experts of a latent width.
    #[must_use]
    pub fn latent(self, latent: LatentGradients<'a>) -> LayerGradients<'a, T> {
        LayerGradients { latent, ..self }
    }

    /// With the shared expert's.
    #[must_use]
    pub fn shared(self, shared: SharedGradients<'a>) -> LayerGradients<'a, T> {
        LayerGradients { shared, ..self }
    }
}

buffers!(LayerGradients<'a, T> { x: Out<T>, router_x: Out<T>, logits: Out<f32>, weights: Out<f32>, bias: Out<f32> });

/// Gradients of a router's parameters.
#[derive(Default)]
#[non_exhaustive]
pub struct RouterGradients<'a> {
    /// `[E, H]`, of f32 whatever the matrix is of.
    pub matrix: Option<Out<'a, f32>>,
    /// `[E]`: of the bias of the logits.
    pub bias: Option<Out<'a, f32>>,
    /// `[E]`: of the factors of each expert's weight, where the rule has them.
    pub expert_scale: Option<Out<'a, f32>>,
    /// `[1]`: of the factor of all weights, where the rule has one.
    pub global_scale: Option<Out<'a, f32>>,
    /// `[H]`: of the weight of the norm of its input, where that has one.
    pub norm: Option<Out<'a, f32>>,
}

/// Gradients of the weights of norms round the experts.
#[derive(Default)]
#[non_exhaustive]
pub struct NormGradients<'a> {
    /// `[H]`: of the norm of the experts' input, where that has one.
    pub experts: Option<Out<'a, f32>>,
    /// `[H]`, with a latent width `[L]`: of the norm of each expert's output.
    pub slots: Option<Out<'a, f32>>,
    /// `[H]`: of the norm of the sum.
    pub output: Option<Out<'a, f32>>,
}

/// Gradients of the projections round experts of a latent width. A bias's goes along with its matrix's.
#[derive(Default)]
#[non_exhaustive]
pub struct LatentGradients<'a> {
    /// Of the projection before the experts.
    pub input: WeightGradients<'a>,
    /// `[L]`, of f32: of the weight of the norm between them.
    pub norm: Option<Out<'a, f32>>,
    /// Of the projection of their sum.
    pub output: WeightGradients<'a>,
}

impl<'a> LatentGradients<'a> {
    /// None.
    pub const fn new() -> Self {
        LatentGradients { input: WeightGradients::none(), norm: None, output: WeightGradients::none() }
    }

    /// With that of the projection before the experts.
    #[must_use]
    pub fn input(self, input: WeightGradients<'a>) -> Self {
        LatentGradients { input, ..self }
    }

    /// With that of the projection of their sum.
    #[must_use]
    pub fn output(self, output: WeightGradients<'a>) -> Self {
        LatentGradients { output, ..self }
    }
}

buffers!(LatentGradients<'a> { norm: Out<f32> });

impl NormGradients<'_> {
    /// None.
    pub const fn new() -> Self {
        NormGradients { experts: None, slots: None, output: None }
    }
}

buffers!(NormGradients<'a> { experts: Out<f32>, slots: Out<f32>, output: Out<f32> });

impl RouterGradients<'_> {
    /// None.
    pub const fn new() -> Self {
        RouterGradients { matrix: None, bias: None, expert_scale: None, global_scale: None, norm: None }
    }

    fn reborrow(&mut self) -> RouterGradients<'_> {
        RouterGradients {
            matrix: self.matrix.as_mut().map(Out::reborrow),
            bias: self.bias.as_mut().map(Out::reborrow),
            expert_scale: self.expert_scale.as_mut().map(Out::reborrow),
            global_scale: self.global_scale.as_mut().map(Out::reborrow),
            norm: self.norm.as_mut().map(Out::reborrow),
        }
    }
}

buffers!(RouterGradients<'a> {
    matrix: Out<f32>,
    bias: Out<f32>,
    expert_scale: Out<f32>,
    global_scale: Out<f32>,
    norm: Out<f32>,
});

/// Gradients of a product's weight, each in the order of its tensor, and of its type or f32.
#[derive(Default)]
#[non_exhaustive]
pub struct WeightGradients<'a> {
    /// Of [`crate::experts::Weight::matrix`].
    pub matrix: Option<OutTensor<'a>>,
    /// Of the matrix of [`crate::experts::Weight::up`].
    pub up: Option<OutTensor<'a>>,
    /// Of [`crate::experts::Weight::bias`], where there is one.
    pub bias: Option<OutTensor<'a>>,
    /// Of the bias of [`crate::experts::Weight::up`], where there is one.
    pub up_bias: Option<OutTensor<'a>>,
}

impl<'a> WeightGradients<'a> {
    /// None.
    pub const fn none() -> WeightGradients<'a> {
        WeightGradients { matrix: None, up: None, bias: None, up_bias: None }
    }

    /// Of a weight in one tensor.
    pub fn new(matrix: impl Into<OutTensor<'a>>) -> WeightGradients<'a> {
        WeightGradients { matrix: Some(matrix.into()), ..WeightGradients::none() }
    }

    fn reborrow(&mut self) -> WeightGradients<'_> {
        WeightGradients {
            matrix: self.matrix.as_mut().map(OutTensor::reborrow),
            up: self.up.as_mut().map(OutTensor::reborrow),
            bias: self.bias.as_mut().map(OutTensor::reborrow),
            up_bias: self.up_bias.as_mut().map(OutTensor::reborrow),
        }
    }

    /// With that of a bias.
    #[must_use]
    pub fn bias(self, bias: impl Into<OutTensor<'a>>) -> WeightGradients<'a> {
        WeightGradients { bias: Some(bias.into()), ..self }
    }

    /// With that of up's bias, where gate and up are apart.
    #[must_use]
    pub fn up_bias(self, bias: impl Into<OutTensor<'a>>) -> WeightGradients<'a> {
        WeightGradients { up_bias: Some(bias.into()), ..self }
    }

    pub(super) fn is_some(&self) -> bool {
        [&self.matrix, &self.up, &self.bias, &self.up_bias].into_iter().any(Option::is_some)
    }

    /// Of gate and up in two tensors.
    pub fn apart(gate: impl Into<OutTensor<'a>>, up: impl Into<OutTensor<'a>>) -> WeightGradients<'a> {
        WeightGradients { matrix: Some(gate.into()), up: Some(up.into()), ..WeightGradients::none() }
    }
}

/// Gradients of a shared expert's parameters.
#[derive(Default)]
#[non_exhaustive]
pub struct SharedGradients<'a> {
    /// Of the first product's weight.
    pub gate_up: WeightGradients<'a>,
    /// Of the second product's.
    pub down: WeightGradients<'a>,
    /// `[1, H]`, of f32: of the gate's weight.
    pub gate: Option<Out<'a, f32>>,
}

buffers!(SharedGradients<'a> { gate: Out<f32> });

impl<'a> SharedGradients<'a> {
    /// None.
    pub const fn new() -> SharedGradients<'a> {
        SharedGradients { gate_up: WeightGradients::none(), down: WeightGradients::none(), gate: None }
    }

    /// With that of the first product's weight.
    #[must_use]
    pub fn gate_up(self, gate_up: WeightGradients<'a>) -> SharedGradients<'a> {
        SharedGradients { gate_up, ..self }
    }

    /// With that of the second product's weight.
    #[must_use]
    pub fn down(self, down: WeightGradients<'a>) -> SharedGradients<'a> {
        SharedGradients { down, ..self }
    }

    pub(super) fn is_some(&self) -> bool {
        let products = [&self.gate_up, &self.down];
        self.gate.is_some() || products.iter().any(|weight| weight.is_some())
    }
}
