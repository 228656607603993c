//! The model: a decoder of blocks of attention and feed-forward.

use super::attention::Attention;
use super::embedding::{BYTES, Embedding};
use super::linear::Linear;
use super::norm::RmsNorm;
use super::parameter::Parameter;
use super::{Outcome, Real};

/// What a block has behind its attention.
pub trait FeedForward {
    /// `[T, H]` of `x [T, H]`, keeping what the way back needs.
    fn forward(&mut self, x: Vec<Real>) -> Outcome<Vec<Real>>;

    /// The gradient of `x` from that of the last forward pass's result; gradients of parameters are added to.
    fn backward(&mut self, dy: &[Real]) -> Outcome<Vec<Real>>;

    fn parameters(&mut self) -> Vec<&mut Parameter>;

    /// What became of the last forward pass's tokens, where there are experts.
    fn routed(&self) -> Option<&Routed> {
        None
    }
}

/// What an MoE layer made of a batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routed {
    /// Tokens of each expert.
    pub load: Vec<i32>,
    /// `E sum_e f_e P_e` (Switch Transformers, eq. 4), without its factor: the number of a token's experts where all is balanced.
    pub balance: f32,
    /// Mean of the squared log-sum-exp of the logits (ST-MoE, eq. 5), without its factor.
    pub z: f32,
}

/// Sizes of what is no feed-forward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sizes {
    /// Width of a token's row.
    pub hidden: usize,
    /// Heads of the attention.
    pub heads: usize,
    /// Most bytes of a sequence.
    pub context: usize,
}

/// `x + attention(norm(x))`, then `x + feed_forward(norm(x))`.
struct Block {
    norms: [RmsNorm; 2],
    attention: Attention,
    feed_forward: Box<dyn FeedForward>,
}

/// Bytes to logits of the bytes that follow.
pub struct Model {
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Linear,
}

impl Model {
    /// With a block for each of `feed_forwards`.
    pub fn new(sizes: &Sizes, feed_forwards: Vec<Box<dyn FeedForward>>, rng: &mut fastrand::Rng) -> Model {
        let &Sizes { hidden, heads, context } = sizes;
        let block = |(index, feed_forward)| Block {
            norms: [1, 2].map(|which| RmsNorm::new(format!("blocks.{index}.norm_{which}"), hidden)),
            attention: Attention::new(&format!("blocks.{index}.attention"), hidden, heads, rng),
            feed_forward,
        };
        let blocks = feed_forwards.into_iter().enumerate().map(block).collect();
        Model {
            blocks,
            embedding: Embedding::new([context, hidden], rng),
            norm: RmsNorm::new("norm".into(), hidden),
            head: Linear::new("head".into(), [BYTES, hidden], 0.1, rng),
        }
    }

    /// Logits `[T, 256]` of sequences of `length` bytes.
    pub fn forward(&mut self, bytes: &[u8], length: usize) -> Outcome<Vec<Real>> {
        let mut x = self.embedding.forward(bytes, length);
        for Block { norms, attention, feed_forward } in &mut self.blocks {
            let mixed = attention.forward(norms[0].forward(&x), length);
            add(&mut x, &mixed);
            let fed = feed_forward.forward(norms[1].forward(&x))?;
            add(&mut x, &fed);
        }
        Ok(self.head.forward(self.norm.forward(&x)))
    }

    /// Adds to the gradients of all parameters, from that of the logits of the last forward pass.
    pub fn backward(&mut self, d_logits: &[Real]) -> Outcome<()> {
        let mut dx = self.norm.backward(&self.head.backward(d_logits));
        for Block { norms, attention, feed_forward } in self.blocks.iter_mut().rev() {
            let through = feed_forward.backward(&dx)?;
            add(&mut dx, &norms[1].backward(&through));
            let through = attention.backward(&dx);
            add(&mut dx, &norms[0].backward(&through));
        }
        self.embedding.backward(&dx);
        Ok(())
    }

    /// All that is learned, in an order that does not change.
    pub fn parameters(&mut self) -> Vec<&mut Parameter> {
        let mut all = vec![&mut self.embedding.table, &mut self.embedding.position];
        for Block { norms: [first, second], attention, feed_forward } in &mut self.blocks {
            all.push(&mut first.gain);
            all.extend(attention.parameters());
            all.push(&mut second.gain);
            all.extend(feed_forward.parameters());
        }
        all.extend([&mut self.norm.gain, &mut self.head.weight]);
        all
    }

    /// Of the last forward pass, for each block that has experts.
    pub fn routed(&self) -> impl Iterator<Item = &Routed> {
        self.blocks.iter().filter_map(|block| block.feed_forward.routed())
    }
}

fn add(sum: &mut [Real], values: &[Real]) {
    sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}
