//! A block's gradients on the device, and by the names of the checkpoint's tensors.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};

use super::{OPERATION, zeros};
use crate::checkpoint::kind::Kind;
use crate::checkpoint::places::{ByName, Places};
use crate::checkpoint::store::DeviceBuffer;
use crate::checkpoint::weights::{BlockWeights, DeviceBlock, Loaded};
use crate::{Element, Error};

/// Gradients of a block, each in f32 and as its weight lies; that of `x` in the type of `x`.
#[non_exhaustive]
pub struct BlockGradients<T> {
    /// `[T,H]`.
    pub x: CudaSlice<T>,
    /// `[T,D]`, of the state of the previous layer's router, where the block took one.
    pub previous: Option<CudaSlice<f32>>,
    /// Of the weights.
    pub weights: BlockWeights<CudaSlice<f32>>,
    /// Of what a block is beside a layer.
    pub kind: Kind<CudaSlice<f32>>,
}

/// Where those of a layer go.
pub(super) struct To<'a, T> {
    pub(super) x: &'a mut CudaSlice<T>,
    pub(super) previous: Option<&'a mut CudaSlice<f32>>,
    pub(super) weights: &'a mut BlockWeights<CudaSlice<f32>>,
    pub(super) kind: &'a mut Kind<CudaSlice<f32>>,
}

impl<T> BlockGradients<T> {
    pub(super) fn all(&mut self) -> To<'_, T> {
        let BlockGradients { x, previous, weights, kind } = self;
        To { x, previous: previous.as_mut(), weights, kind }
    }
}

impl<T: Element> BlockGradients<T> {
    /// Zeros, for `tokens` tokens.
    pub(super) fn new(
        block: &DeviceBlock,
        tokens: usize,
        stream: &Arc<CudaStream>,
    ) -> Result<BlockGradients<T>, Error> {
        let like = |buffer: &DeviceBuffer| zeros::<f32>(stream, buffer.length());
        let previous = match &block.kind {
            Kind::Network(network) if network.state_scale.is_some() => Some(zeros(stream, tokens * network.width)?),
            _ => None,
        };
        Ok(BlockGradients {
            x: zeros(stream, tokens * block.desc.hidden)?,
            previous,
            weights: block.weights.parameters(like)?,
            kind: block.kind.parameters(like)?,
        })
    }

    /// Copies them to the host, whole tensors under the names that the checkpoint has. `places` are those of the same block
    /// ([`super::super::Block::places`]).
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn by_name(&self, stream: &Arc<CudaStream>, places: &Loaded<Places>) -> Result<ByName<f32>, Error> {
        let mut tensors = ByName::new();
        let own = self.weights.buffers().into_iter().chain(self.kind.buffers());
        let theirs = places.weights.buffers().into_iter().chain(places.kind.buffers());
        for (buffer, places) in own.zip(theirs) {
            let Some((buffer, places)) = buffer.zip(places) else { continue };
            let values = stream.clone_dtoh(buffer).map_err(Error::driver(OPERATION))?;
            places.put_back(&values, &mut tensors);
        }
        Ok(tensors)
    }
}
