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

mod core;
mod gradients;

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr, ValidAsZeroBits};

use super::kind::Kind;
use super::run::BlockInputs;
use super::weights::DeviceBlock;
use crate::{Element, Error, In, Kernels};
use core::Core;

pub use gradients::BlockGradients;

const OPERATION: &str = "a checkpoint's block, backward";

/// Everything that a block's way back needs for so many tokens, allocated once.
pub struct BlockBackward<T> {
    steps: Steps<T>,
    gradients: BlockGradients<T>,
}

enum Steps<T> {
    Layer(Box<Core<T>>),
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
        let steps = match &block.kind {
            Kind::Layer => Steps::Layer(Box::new(Core::of_block(block, &desc, tokens, kernels, stream)?)),
            Kind::Network(_) => return Err(no_way_back("a router's network")),
            Kind::Banks(_) => return Err(no_way_back("banks of experts")),
            Kind::UnitExperts { .. } => return Err(no_way_back("experts of one unit")),
            Kind::BySequence { .. } => return Err(no_way_back("an expert by sequence")),
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
        let gradients = &mut self.gradients;
        match &mut self.steps {
            Steps::Layer(core) => core.run(kernels, stream, block, (x, dy), inputs, gradients),
        }
    }

    /// What the last run yielded.
    pub fn gradients(&self) -> &BlockGradients<T> {
        &self.gradients
    }
}

fn no_way_back(part: &str) -> Error {
    Error::unsupported(OPERATION, "block", "layers, and what they are made of", part)
}
