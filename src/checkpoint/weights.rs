//! The weights of a block, and the block itself.

use super::store::{DeviceBuffer, HostBuffer};
use crate::experts::Weight;
use crate::layer::{ExpertWeights, LayerDesc, LayerWeights, RouterWeights, SharedWeights};
use crate::{Error, Tensor};

/// Weights of a block in the shapes of [`LayerWeights`], each in a buffer `B`.
#[non_exhaustive]
pub struct BlockWeights<B> {
    /// `[E,H]`.
    pub router: B,
    /// `[E]`, f32.
    pub router_bias: Option<B>,
    /// `[E]`, f32.
    pub correction_bias: Option<B>,
    /// First product of every expert.
    pub gate_up: MatrixWeight<B>,
    /// Second product.
    pub down: MatrixWeight<B>,
    /// Both products of the shared expert.
    pub shared: Option<(MatrixWeight<B>, MatrixWeight<B>)>,
    /// `[1,H]`, of the router's type.
    pub shared_gate: Option<B>,
}

/// Weights of one product.
#[non_exhaustive]
pub struct MatrixWeight<B> {
    /// As [`Weight::matrix`].
    pub matrix: B,
    /// As [`Weight::bias`].
    pub bias: Option<B>,
}

impl<B> MatrixWeight<B> {
    pub(super) fn new(matrix: B) -> MatrixWeight<B> {
        MatrixWeight { matrix, bias: None }
    }
}

/// A block in memory.
#[non_exhaustive]
pub struct Loaded<B> {
    /// The layer, with the types and layouts that its weights have. A capacity's length of a sequence is the caller's to set.
    pub desc: LayerDesc,
    /// Its weights.
    pub weights: BlockWeights<B>,
}

/// A block on a device.
pub type DeviceBlock = Loaded<DeviceBuffer>;

/// A block in the host's memory: to look at, or for the reference.
pub type HostBlock = Loaded<HostBuffer>;

const OPERATION: &str = "a checkpoint's weights";

fn tensor(buffer: &DeviceBuffer) -> Result<Tensor<'_>, Error> {
    let (argument, expected) = ("weight", "numbers with a fraction".into());
    buffer.tensor().ok_or_else(|| Error::Invalid { operation: OPERATION, argument, expected, got: "integers".into() })
}

fn weight(weight: &MatrixWeight<DeviceBuffer>) -> Result<Weight<'_>, Error> {
    let matrix = Weight::new(tensor(&weight.matrix)?);
    Ok(match &weight.bias {
        Some(bias) => matrix.bias(tensor(bias)?),
        None => matrix,
    })
}

impl BlockWeights<DeviceBuffer> {
    /// What a layer's plan takes.
    ///
    /// # Errors
    /// [`Error::Invalid`] for weights that are whole numbers, which a loaded block has none of.
    pub fn layer(&self) -> Result<LayerWeights<'_>, Error> {
        let mut router = RouterWeights::new(tensor(&self.router)?);
        router.bias = self.router_bias.as_ref().and_then(DeviceBuffer::f32);
        router.correction_bias = self.correction_bias.as_ref().and_then(DeviceBuffer::f32);
        let mut experts = ExpertWeights::new(weight(&self.gate_up)?, weight(&self.down)?);
        if let Some((gate_up, down)) = &self.shared {
            let mut shared = SharedWeights::new(weight(gate_up)?, weight(down)?);
            if let Some(gate) = &self.shared_gate {
                shared = shared.gate(tensor(gate)?);
            }
            experts = experts.shared(shared);
        }
        Ok(LayerWeights::new(router, experts))
    }
}
