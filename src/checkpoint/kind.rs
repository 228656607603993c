//! What a block is beside a layer, in tensors.

use super::weights::{BlockWeights, MatrixWeight};
use crate::layer::LayerDesc;
use crate::rules::RmsNorm;

/// What a block is. `B` is a buffer.
#[non_exhaustive]
pub enum Kind<B> {
    /// A layer, and nothing else.
    Layer,
    /// A layer whose logits come from a network with a state of its own (Zaya): [`crate::routers::network`].
    Network(Network<B>),
    /// Two layers side by side, each for the tokens of its types (ERNIE 4.5 VL): [`crate::layer::BanksPlan`]. This is the second; the first, which has
    /// the shared expert, is the block's own.
    Banks(Box<Bank<B>>),
    /// Experts of one hidden unit, chosen by product keys, beside a dense MLP (Doge): [`crate::experts::unit_experts`]. The router `[2n, H]` and
    /// the MLP, as those of one expert, are among the block's weights.
    UnitExperts {
        /// `[E,H]`: what each expert multiplies its input with.
        input: B,
        /// `[E,H]`: what each expert's unit multiplies.
        output: B,
        /// Keys of a list, `n`.
        keys: usize,
    },
    /// A common first product, of which a common second one makes the first columns of the output, and that of the expert of a sequence the last
    /// (ViTPose+): [`crate::routers::by_sequence`]. The experts' matrices `[E,H,I]` are among the block's weights, without rows for the first
    /// columns: zeros.
    BySequence {
        /// `[I,H]`.
        first: MatrixWeight<B>,
        /// `[H,I]`, with zeros for the last columns.
        second: MatrixWeight<B>,
    },
}

/// A second layer beside a block's own.
#[non_exhaustive]
pub struct Bank<B> {
    /// Its descriptor.
    pub desc: LayerDesc,
    /// Its weights.
    pub weights: BlockWeights<B>,
}

/// A router's network.
#[non_exhaustive]
pub struct Network<B> {
    /// Width of the state.
    pub width: usize,
    /// The norm of the state.
    pub norm: RmsNorm,
    /// `[D,H]`.
    pub down: MatrixWeight<B>,
    /// `[D]`, f32: factors of the previous layer's state; none in a first layer.
    pub state_scale: Option<B>,
    /// `[D]`, f32.
    pub gain: B,
    /// `[D,D]` each, f32.
    pub layers: [MatrixWeight<B>; 2],
    /// `[E,D]`, f32.
    pub output: B,
}

impl<B> Kind<B> {
    /// What `of` makes of every buffer: each has a gradient.
    pub(super) fn parameters<C, E>(&self, mut of: impl FnMut(&B) -> Result<C, E>) -> Result<Kind<C>, E> {
        Ok(match self {
            Kind::Layer => Kind::Layer,
            Kind::Network(network) => Kind::Network(Network {
                width: network.width,
                norm: network.norm,
                down: network.down.map(&mut of)?,
                state_scale: network.state_scale.as_ref().map(&mut of).transpose()?,
                gain: of(&network.gain)?,
                layers: [network.layers[0].map(&mut of)?, network.layers[1].map(&mut of)?],
                output: of(&network.output)?,
            }),
            Kind::Banks(bank) => Kind::Banks(Box::new(Bank { desc: bank.desc, weights: bank.weights.parameters(of)? })),
            Kind::UnitExperts { input, output, keys } => {
                Kind::UnitExperts { input: of(input)?, output: of(output)?, keys: *keys }
            }
            Kind::BySequence { first, second } => {
                Kind::BySequence { first: first.map(&mut of)?, second: second.map(of)? }
            }
        })
    }

    /// Every buffer, where it is there, in an order that is the same for all of a block's.
    pub(super) fn buffers(&self) -> Vec<Option<&B>> {
        fn matrix<B>(weight: &MatrixWeight<B>) -> [Option<&B>; 2] {
            [Some(&weight.matrix), weight.bias.as_ref()]
        }
        match self {
            Kind::Layer => Vec::new(),
            Kind::Network(network) => {
                let matrices = [&network.down, &network.layers[0], &network.layers[1]].map(matrix);
                let others = [network.state_scale.as_ref(), Some(&network.gain), Some(&network.output)];
                matrices.into_iter().flatten().chain(others).collect()
            }
            Kind::Banks(bank) => bank.weights.buffers(),
            Kind::UnitExperts { input, output, .. } => vec![Some(input), Some(output)],
            Kind::BySequence { first, second } => [first, second].map(matrix).into_iter().flatten().collect(),
        }
    }
}

/// The names of these tensors, and the sizes that only they have.
#[derive(Clone, Copy)]
pub(super) enum KindSpec {
    Layer,
    Network {
        width: usize,
        norm: RmsNorm,
    },
    UnitExperts {
        keys: usize,
    },
    /// Columns that the experts make.
    BySequence {
        part: usize,
    },
}
