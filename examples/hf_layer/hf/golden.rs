//! What the block should compute: recorded outputs of the model's own code, or the reference.

use std::path::Path;

use moe_kernels::checkpoint::{CheckpointError, HostBlock, HostBuffer, MatrixWeight, TensorFile};
use moe_kernels::layer::{LayerDesc, Weighting};
use moe_kernels::reference;
use moe_kernels::reference::gating::{Gated, gate};
use moe_kernels::reference::gemm::ExpertMatrix;
use moe_kernels::reference::layer::{Layer, forward, forward_gated};
use moe_kernels::rules::{Glu, Layout};

use super::device::{Inputs, Outputs, drop_full};
use super::error::HfError;

/// Outputs to compare with; none where the model's block does not give them.
pub struct Expected {
    /// `[T,E]`.
    pub logits: Option<Vec<f64>>,
    /// `[T,k]`.
    pub ids: Option<Vec<i32>>,
    /// `[T,k]`.
    pub weights: Option<Vec<f64>>,
    /// What some blocks yield beside that, by name.
    pub extras: Vec<(&'static str, Vec<f64>)>,
    /// `[T,H]`.
    pub y: Vec<f64>,
}

/// Names of what some blocks yield beside the rest.
const EXTRAS: [&str; 2] = ["shared_weights", "probs"];

/// `golden.safetensors` of a checkpoint folder.
pub struct Golden {
    file: TensorFile,
}

impl Golden {
    pub const NAME: &str = "golden.safetensors";

    pub fn open(folder: &Path) -> Result<Golden, HfError> {
        Ok(Golden { file: TensorFile::open(&folder.join(Self::NAME))? })
    }

    /// Module path of the block that it records.
    pub fn block(&self) -> Option<&str> {
        self.file.note("block")
    }

    /// `x [T,H]`.
    pub fn x(&self, hidden: usize) -> Result<Vec<f32>, HfError> {
        match *self.file.shape("x")? {
            [_, columns] if columns == hidden => Ok(self.file.read("x")?.values()?.into_owned()),
            ref found => Err(CheckpointError::TensorShape {
                path: self.file.path().to_owned(),
                name: "x".into(),
                expected: format!("[tokens, {hidden}]"),
                found: found.to_vec(),
            }
            .into()),
        }
    }

    /// What the block takes beside rows.
    pub fn inputs(&self) -> Result<Inputs, HfError> {
        let integers = |name: &str| {
            if self.file.contains(name) { Ok::<_, HfError>(Some(self.file.read(name)?.integers()?)) } else { Ok(None) }
        };
        Ok(Inputs { words: integers("input_ids")? })
    }

    /// The recorded outputs.
    pub fn expected(&self, layer: &LayerDesc, tokens: usize) -> Result<Expected, HfError> {
        let floats = |name: &str, columns: usize| -> Result<Vec<f64>, HfError> {
            let tensor = self.file.read_shaped(name, &[tokens, columns])?;
            Ok(tensor.values::<f32>()?.iter().map(|&value| value.into()).collect())
        };
        let some = |name: &str, columns: usize| {
            if self.file.contains(name) { floats(name, columns).map(Some) } else { Ok(None) }
        };
        let ids = if self.file.contains("ids") {
            Some(self.file.read_shaped("ids", &[tokens, layer.top_k])?.integers()?)
        } else {
            None
        };
        Ok(Expected {
            logits: some("logits", layer.experts)?,
            ids,
            weights: some("weights", layer.top_k)?,
            extras: self.extras()?,
            y: floats("y", layer.hidden)?,
        })
    }

    fn extras(&self) -> Result<Vec<(&'static str, Vec<f64>)>, HfError> {
        let recorded = EXTRAS.into_iter().filter(|name| self.file.contains(name));
        let read = recorded.map(|name| {
            let values = self.file.read(name)?.values::<f32>()?.iter().map(|&value| value.into()).collect();
            Ok::<_, HfError>((name, values))
        });
        read.collect()
    }
}

/// The layer for a batch that is one sequence of `tokens` tokens.
pub fn for_tokens(layer: &LayerDesc, tokens: usize) -> LayerDesc {
    let mut layer = *layer;
    if let Some(capacity) = &mut layer.capacity {
        capacity.tokens_per_sequence = tokens.max(1);
    }
    layer
}

/// What the reference computes from the same rounded inputs, for the experts that the device chose where its choice is right.
///
/// Two experts can be closer than the rounding of f32. So the reference chooses from the device's own logits, which are compared
/// separately, and where there is a correction bias, from what is left of the device's choice after [`settle`].
pub fn from_reference(block: &HostBlock, x: &[f32], got: &Outputs) -> Result<Expected, HfError> {
    let layer = for_tokens(&block.desc, x.len() / block.desc.hidden.max(1));
    let values = Values::of(block);
    let reference = values.layer(&layer);
    let logits = reference::router::router(x, reference.router_weight, values.router_bias.as_deref(), layer.hidden)?;
    let gated = settled(&layer, values.correction_bias.as_deref(), got)?;
    let mut result = forward_gated(x, &reference, logits, gated)?;
    drop_full(&mut result.ids, &result.plan.token_slot);
    Ok(Expected {
        logits: Some(result.logits),
        ids: Some(result.ids),
        weights: Some(result.weights),
        extras: Vec::new(),
        y: result.y,
    })
}

/// What the formula chooses from the device's logits, or where that is as good what the device chose.
pub fn settled(layer: &LayerDesc, bias: Option<&[f32]>, got: &Outputs) -> Result<Gated, HfError> {
    let mut gated = gate(&got.logits, bias, layer.experts, layer.top_k, &layer.gating)?;
    if let Some(bias) = bias {
        settle(&mut gated, bias, layer, got)?;
    }
    Ok(gated)
}

/// Takes over a row of the device's ids if it is what the formula chooses once these experts' choice values are raised by a few
/// roundings.
fn settle(gated: &mut Gated, bias: &[f32], layer: &LayerDesc, got: &Outputs) -> Result<(), HfError> {
    const ROUNDINGS: f64 = 1e-6;
    let (k, experts) = (layer.top_k, layer.experts);
    for token in 0..gated.ids.len() / k {
        let slots = token * k..(token + 1) * k;
        let ids = &got.ids[slots.clone()];
        if gated.ids[slots.clone()] == *ids {
            continue;
        }
        let mut raised: Vec<f64> = bias.iter().map(|&bias| bias.into()).collect();
        for (place, &id) in ids.iter().enumerate() {
            if let Some(bias) = usize::try_from(id).ok().and_then(|id| raised.get_mut(id)) {
                *bias += ROUNDINGS * (1.0 + (k - place) as f64 / k as f64);
            }
        }
        let logits: Vec<f64> = got.logits[token * experts..][..experts].iter().map(|&logit| logit.into()).collect();
        let again = gate(&logits, Some(&raised), experts, k, &layer.gating)?;
        if again.ids == *ids {
            gated.ids[slots.clone()].copy_from_slice(&again.ids);
            gated.weights[slots].copy_from_slice(&again.weights);
        }
    }
    Ok(())
}

/// The reference alone.
pub fn run_reference(block: &HostBlock, x: &[f32]) -> Result<reference::layer::Forward, HfError> {
    let layer = for_tokens(&block.desc, x.len() / block.desc.hidden.max(1));
    let mut result = forward(x, &Values::of(block).layer(&layer))?;
    drop_full(&mut result.ids, &result.plan.token_slot);
    Ok(result)
}

/// A block's weights widened to f32, which holds them exactly.
struct Values {
    router: Vec<f32>,
    router_bias: Option<Vec<f32>>,
    correction_bias: Option<Vec<f32>>,
    gate_up: Matrix,
    down: Matrix,
    shared: Option<(Matrix, Matrix)>,
    shared_gate: Option<Vec<f32>>,
}

struct Matrix {
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
}

impl Matrix {
    fn of(weight: &MatrixWeight<HostBuffer>) -> Matrix {
        Matrix { weight: weight.matrix.to_f32(), bias: some(&weight.bias) }
    }

    fn reference(&self, n: usize, k: usize, glu: Glu, layout: Layout) -> ExpertMatrix<'_, f32> {
        ExpertMatrix { weight: &self.weight, bias: self.bias.as_deref(), n, k, glu, layout }
    }
}

fn some(buffer: &Option<HostBuffer>) -> Option<Vec<f32>> {
    buffer.as_ref().map(HostBuffer::to_f32)
}

impl Values {
    fn of(block: &HostBlock) -> Values {
        let weights = &block.weights;
        Values {
            router: weights.router.to_f32(),
            router_bias: some(&weights.router_bias),
            correction_bias: some(&weights.correction_bias),
            gate_up: Matrix::of(&weights.gate_up),
            down: Matrix::of(&weights.down),
            shared: weights.shared.as_ref().map(|(gate_up, down)| (Matrix::of(gate_up), Matrix::of(down))),
            shared_gate: some(&weights.shared_gate),
        }
    }

    /// A loaded layer as the reference takes it.
    fn layer(&self, layer: &LayerDesc) -> Layer<'_, f32, f32> {
        let (hidden, mlp) = (layer.hidden, &layer.mlp);
        let shared = match (&self.shared, &layer.shared) {
            (Some((up, down)), Some(desc)) => Some((
                up.reference(desc.intermediate, hidden, desc.mlp.gate_up.glu, desc.mlp.gate_up.layout),
                down.reference(hidden, desc.intermediate, Glu::None, desc.mlp.down.layout),
            )),
            _ => None,
        };
        Layer {
            hidden,
            router_weight: &self.router,
            router_bias: self.router_bias.as_deref(),
            correction_bias: self.correction_bias.as_deref(),
            top_k: layer.top_k,
            gating: layer.gating,
            weigh_input: layer.weighting == Weighting::Input,
            capacity: layer.capacity,
            up: self.gate_up.reference(layer.intermediate, hidden, mlp.gate_up.glu, mlp.gate_up.layout),
            activation: mlp.activation,
            down: self.down.reference(hidden, layer.intermediate, Glu::None, mlp.down.layout),
            shared,
            shared_gate: self.shared_gate.as_deref(),
        }
    }
}
