//! A loaded block's way back on a device: from the gradient of its output to those of its rows and of every tensor.
//!
//! ```no_run
//! use half::bf16;
//! use moe_kernels::checkpoint::{BlockBackward, BlockInputs, Model};
//! use moe_kernels::{Dtype, Kernels, device};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let stream = device::open(0)?.default_stream();
//! let kernels = Kernels::new(stream.context())?;
//! let model = Model::open("Qwen3-30B-A3B".as_ref())?;
//! let block = model.block(Some("model.layers.0.mlp"))?;
//! let loaded = block.load(&stream, Dtype::Bf16, &mut |_| ())?;
//!
//! let tokens = 64;
//! let rows = || stream.alloc_zeros::<bf16>(tokens * loaded.desc.hidden);
//! let (x, dy) = (rows()?, rows()?);
//! let mut back = BlockBackward::new(&loaded, tokens, &kernels, &stream)?;
//! back.run(&kernels, &stream, &loaded, ((&x).into(), (&dy).into()), BlockInputs::default())?;
//! for (name, gradient) in back.gradients().by_name(&stream, &block.places()?)? {
//!     println!("{name} {:?}", gradient.shape);
//! }
//! # Ok(())
//! # }
//! ```

mod apart;
mod banks;
mod core;
mod gradients;
mod network;
mod parts;
mod sequences;
mod unit_experts;

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr, ValidAsZeroBits};

use super::kind::Kind;
use super::run::BlockInputs;
use super::weights::DeviceBlock;
use crate::{Element, Error, In, Kernels, TokenMask};
use apart::Apart;
use banks::Banks;
use core::{Core, of_layer, without_map};
use parts::Queue;
use sequences::Sequences;
use unit_experts::UnitExperts;

pub use gradients::BlockGradients;

const OPERATION: &str = "a checkpoint's block, backward";

/// Everything that a block's way back needs for so many tokens, allocated once.
pub struct BlockBackward<T> {
    steps: Steps<T>,
    gradients: BlockGradients<T>,
}

enum Steps<T> {
    /// A layer with its own way back.
    Layer(Box<Core<T>>),
    Apart(Box<Apart<T>>),
    Banks(Box<Banks<T>>),
    Sequences(Box<Sequences<T>>),
    UnitExperts(Box<UnitExperts<T>>),
}

fn zeros<V: DeviceRepr + ValidAsZeroBits>(stream: &Arc<CudaStream>, length: usize) -> Result<CudaSlice<V>, Error> {
    stream.alloc_zeros(length.max(1)).map_err(Error::driver(OPERATION))
}

impl<T: Element> BlockBackward<T> {
    /// Plans a block's passes for `tokens` tokens, one sequence as far as capacities go, and allocates all that they need on `stream`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a block with a part that has no way back here, naming it; [`Error::WrongDtype`] for one of another type than `T`;
    /// those of planning, and those of the driver.
    pub fn new(
        block: &DeviceBlock,
        tokens: usize,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
    ) -> Result<BlockBackward<T>, Error> {
        let desc = block.for_sequence(tokens);
        if desc.dtype != T::DTYPE {
            let (operation, argument, expected) = (OPERATION, "x", desc.dtype);
            return Err(Error::WrongDtype { operation, argument, expected, got: T::DTYPE });
        }
        let queue = Queue { kernels, stream };
        let steps = match &block.kind {
            Kind::Layer => Steps::Layer(Box::new(Core::routed(&without_map(&desc, &block.weights), tokens, queue)?)),
            Kind::Network(_) => {
                let apart = Apart::new(&block.kind, &block.weights, &desc, tokens, queue)?;
                Steps::Apart(Box::new(apart))
            }
            Kind::Banks(bank) => Steps::Banks(Box::new(Banks::new(block, bank, &desc, tokens, queue)?)),
            Kind::UnitExperts { keys, .. } => {
                Steps::UnitExperts(Box::new(UnitExperts::new(&desc, *keys, tokens, queue)?))
            }
            Kind::BySequence { .. } => Steps::Sequences(Box::new(Sequences::new(&desc, tokens, queue)?)),
        };
        Ok(BlockBackward { steps, gradients: BlockGradients::new(block, tokens, stream)? })
    }

    /// Enqueues the block's forward pass, whose intermediates the way back needs, and its way back: from `x [T,H]` and the gradient `dy [T,H]` of its
    /// output to [`BlockBackward::gradients`], which are written. The choice of experts is constant.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Unexpected`] for inputs against the block's kind, and those of its operations.
    pub fn run(
        &mut self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        block: &DeviceBlock,
        (x, dy): (In<'_, T>, In<'_, T>),
        inputs: BlockInputs<'_>,
    ) -> Result<(), Error> {
        inputs.check(&block.kind)?;
        let queue = Queue { kernels, stream };
        let gradients = &mut self.gradients;
        match &mut self.steps {
            Steps::Layer(core) => {
                let weights = block.weights.layer()?;
                core.forward(queue, &weights, x, block.weights.route(inputs.words)?)?;
                let BlockGradients { x: dx, weights: of, .. } = gradients;
                core.backward(queue, &weights, (x, dy), of_layer(of).x(dx))
            }
            Steps::Apart(apart) => {
                apart.run(queue, &block.weights, &block.kind, (x, dy), (inputs, TokenMask::all()), &mut gradients.all())
            }
            Steps::Banks(banks) => banks.run(queue, block, (x, dy), inputs, gradients),
            Steps::Sequences(sequences) => sequences.run(queue, block, (x, dy), inputs, gradients),
            Steps::UnitExperts(steps) => {
                let BlockGradients { x: dx, weights: of, kind: of_kind, .. } = gradients;
                let (
                    Kind::UnitExperts { input, output, .. },
                    Kind::UnitExperts { input: of_input, output: of_output, .. },
                ) = (&block.kind, of_kind)
                else {
                    return Err(another_block());
                };
                let rows = ([input, output], [of_input, of_output]);
                steps.run(queue, &block.weights, rows, (x, dy), (dx, of))
            }
        }
    }

    /// What the last run yielded.
    pub fn gradients(&self) -> &BlockGradients<T> {
        &self.gradients
    }
}

fn another_block() -> Error {
    let expected = "the block that the passes were planned for".into();
    Error::Invalid { operation: OPERATION, argument: "block", expected, got: "another".into() }
}

fn no_way_back(part: &str) -> Error {
    Error::unsupported(OPERATION, "block", "layers, and what they are made of", part)
}
