//! From tensors of a checkpoint to the packed weights of a layer.

mod experts;
mod kind;
mod reader;

use super::error::CheckpointError;
use super::folder::Checkpoint;
use super::kind::{Bank, Kind, KindSpec};
use super::spec::BlockSpec;
use super::store::Store;
use super::tensors::FileTensor;
use super::weights::{AroundWeights, BlockWeights, Loaded, MatrixWeight};
use crate::Dtype;
use crate::layer::LayerDesc;
use crate::rules::{IDENTITY, NullOutput};
use reader::Reader;

/// How far a load has come.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Progress<'a> {
    /// Bytes of the files that have been read.
    pub bytes: u64,
    /// Bytes that will have been read at the end.
    pub of: u64,
    /// The tensor that was read last.
    pub tensor: &'a str,
}

/// Reads the weights of a block into `store`, rounding each value to `dtype`; biases and corrections of the router stay in f32, and so does its
/// matrix where `dtype` cannot hold it exactly. Sets the types and the layouts that were found in `layer`.
///
/// Fails where the block has a tensor that is not read: it would compute something else.
pub(super) fn load<S: Store>(
    checkpoint: &Checkpoint,
    prefix: &str,
    spec: &BlockSpec,
    dtype: Dtype,
    store: &mut S,
    total: u64,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Loaded<S::Buffer>, CheckpointError> {
    let mut reader = Reader::new(checkpoint, prefix, store, progress, total);
    let (desc, weights) = reader.bank(spec, dtype)?;
    let kind = match &spec.bank {
        Some(bank) => {
            let (desc, weights) = reader.bank(bank, dtype)?;
            Kind::Banks(Box::new(Bank { desc, weights }))
        }
        None => reader.kind(spec, &desc)?,
    };
    reader.require_all_read(&spec.idle)?;
    Ok(Loaded { desc, weights, kind, capacity: spec.capacity })
}

/// The layer with activations and experts' weights of type `dtype`.
fn stored_as(layer: &LayerDesc, dtype: Dtype) -> LayerDesc {
    let mut layer = *layer;
    layer.dtype = dtype;
    let shared = layer.shared.as_mut().map(|shared| &mut shared.mlp);
    let latent = layer.latent.as_mut();
    for weight in latent.into_iter().flat_map(|latent| [&mut latent.input, &mut latent.output]) {
        weight.format = dtype.into();
    }
    for mlp in [&mut layer.mlp].into_iter().chain(shared) {
        mlp.gate_up.format = dtype.into();
        mlp.down.format = dtype.into();
    }
    layer
}

/// `dtype` where it holds all values exactly, else f32.
fn exact(tensor: &FileTensor<'_>, dtype: Dtype) -> Result<Dtype, CheckpointError> {
    fn holds<T: crate::Element + bytemuck::Pod>(tensor: &FileTensor<'_>) -> Result<bool, CheckpointError> {
        let values = tensor.values::<f32>()?;
        Ok(values.iter().all(|&value| T::from_f32(value).to_f32() == value))
    }
    let same = match dtype {
        Dtype::Bf16 => holds::<half::bf16>(tensor)?,
        Dtype::F16 => holds::<half::f16>(tensor)?,
        _ => true,
    };
    Ok(if same { dtype } else { Dtype::F32 })
}

impl<S: Store> Reader<'_, S> {
    /// A layer's weights, but for what it is beside a layer.
    fn bank(
        &mut self,
        spec: &BlockSpec,
        dtype: Dtype,
    ) -> Result<(LayerDesc, BlockWeights<S::Buffer>), CheckpointError> {
        self.first_expert = spec.first_expert;
        let mut layer = stored_as(&spec.layer, dtype);
        let router = match spec.router {
            None => None,
            Some(name) => {
                let (rows, columns) = (spec.logit_columns(), layer.hidden);
                let shape = if spec.router_transposed { [columns, rows] } else { [rows, columns] };
                let router = self.tensor(name, &shape)?;
                // A norm of the router's input is not rounded before an f32 router sees it.
                layer.router_dtype = if layer.norms.router.is_some() { Dtype::F32 } else { exact(&router, dtype)? };
                if let Some(name) = spec.shared_gate {
                    let gate = exact(&self.tensor(name, &[1, layer.hidden])?, dtype)?;
                    layer.router_dtype = layer.router_dtype.max(gate);
                }
                match spec.router_transposed {
                    true => Some(self.turned(&router, shape, layer.router_dtype)?),
                    false => Some(self.whole(&router, layer.router_dtype)?),
                }
            }
        };
        let (gate_up, down) = match spec.kind {
            KindSpec::BySequence { part } => self.parts(spec, &layer, part)?,
            KindSpec::UnitExperts { .. } => self.dense(spec, &layer)?,
            _ => self.experts(spec, &mut layer)?,
        };
        let shared = match (&spec.shared, &layer.shared) {
            (Some(matrices), Some(desc)) => Some(self.each(matrices, [1, desc.intermediate, layer.hidden], dtype)?),
            _ => None,
        };
        let shared_gate = match spec.shared_gate {
            Some(name) => {
                let gate = self.tensor(name, &[1, layer.hidden])?;
                Some(self.whole(&gate, layer.router_dtype)?)
            }
            None => None,
        };
        let (experts, columns) = (layer.experts, layer.logit_columns());
        let mut vector = |name: Option<&str>, length| name.map(|name| self.vector(name, length)).transpose();
        let router_bias = vector(spec.router_bias, columns)?;
        let expert_scale = vector(spec.expert_scale, experts)?;
        let global_scale = vector(spec.global_scale, 1)?;
        let correction_bias = match (spec.correction_bias, spec.correction_row) {
            (None, _) => None,
            (Some(name), None) => Some(self.vector(name, experts)?),
            (Some(name), Some(row)) => {
                // A row for each of two banks.
                let tensor = self.tensor(name, &[2, experts])?;
                Some(self.whole(&tensor.part(row * experts, experts), Dtype::F32)?)
            }
        };
        let output_bias = match spec.output_bias {
            Some(name) => {
                let bias = self.tensor(name, &[layer.hidden])?;
                Some(self.whole(&bias, dtype)?)
            }
            None => None,
        };
        let around = self.around(spec, &layer)?;
        let (table, vocabulary) = self.table(spec, &layer)?;
        let map = match spec.weightless {
            None => None,
            Some((count, target)) => {
                let here = experts - count;
                let map: Vec<i32> = (0..experts).map(|e| if e < here { e as i32 } else { target }).collect();
                Some(self.store.numbers(&map)?)
            }
        };
        let weights = BlockWeights {
            router,
            router_bias,
            correction_bias,
            gate_up,
            down,
            shared,
            shared_gate,
            expert_scale,
            global_scale,
            output_bias,
            around,
            table,
            vocabulary,
            map,
            weightless: spec.weightless.map(|(_, target)| match target {
                IDENTITY => NullOutput::Input,
                _ => NullOutput::Zero,
            }),
        };
        Ok((layer, weights))
    }

    /// Weights of norms and of projections round the experts.
    fn around(&mut self, spec: &BlockSpec, layer: &LayerDesc) -> Result<AroundWeights<S::Buffer>, CheckpointError> {
        let (dtype, hidden, width) = (layer.dtype, layer.hidden, layer.expert_width());
        let norms = spec.norms;
        let mut vector = |name: Option<&str>, length: usize| {
            let vector = |name| {
                let tensor = self.tensor(name, &[length])?;
                self.whole(&tensor, dtype)
            };
            name.map(vector).transpose()
        };
        let (router, experts) = (vector(norms.router, hidden)?, vector(norms.experts, hidden)?);
        let (slots, output) = (vector(norms.slots, width)?, vector(norms.output, hidden)?);
        let latent_norm = vector(norms.latent, width)?;
        let latent = match spec.latent {
            None => None,
            Some([input, output]) => {
                let (input, output) = (self.tensor(input, &[width, hidden])?, self.tensor(output, &[hidden, width])?);
                let input = MatrixWeight::new(self.whole(&input, dtype)?);
                Some([input, MatrixWeight::new(self.whole(&output, dtype)?)])
            }
        };
        Ok(AroundWeights { router, experts, slots, output, latent, latent_norm })
    }

    /// The table of experts by word, and how many words it has.
    fn table(&mut self, spec: &BlockSpec, layer: &LayerDesc) -> Result<(Option<S::Buffer>, usize), CheckpointError> {
        let Some(name) = spec.table else { return Ok((None, 0)) };
        let rows = self.checkpoint.shape(&self.full(name)).and_then(|shape| shape.first()).copied().unwrap_or(0);
        let tensor = self.tensor(name, &[rows, layer.top_k])?;
        self.bytes += tensor.bytes() as u64;
        Ok((Some(self.store.integers(&tensor)?), rows))
    }
}
