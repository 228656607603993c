//! What the block should compute: recorded outputs of the model's own code, or the reference.

use std::path::Path;

use moe_kernels::layer::LayerDesc;
use moe_kernels::reference::gating::{Gated, gate};
use moe_kernels::reference::layer::{Layer, forward, forward_gated};
use moe_kernels::rules::Glu;
use moe_kernels::{Element, reference};

use super::checkpoint::TensorFile;
use super::device::Outputs;
use super::error::HfError;
use super::load::Weights;

/// Outputs to compare with; none where the model's block does not give them.
pub struct Expected {
    /// `[T,E]`.
    pub logits: Option<Vec<f64>>,
    /// `[T,k]`.
    pub ids: Option<Vec<i32>>,
    /// `[T,k]`.
    pub weights: Option<Vec<f64>>,
    /// `[T,H]`.
    pub y: Vec<f64>,
}

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
            [_, columns] if columns == hidden => self.file.read("x")?.to_vec(),
            ref found => Err(HfError::TensorShape {
                path: self.file.path().to_owned(),
                name: "x".into(),
                expected: format!("[tokens, {hidden}]"),
                found: found.to_vec(),
            }),
        }
    }

    /// The recorded outputs.
    pub fn expected(&self, layer: &LayerDesc, tokens: usize) -> Result<Expected, HfError> {
        let floats = |name: &str, columns: usize| -> Result<Vec<f64>, HfError> {
            let tensor = self.file.read_shaped(name, &[tokens, columns])?;
            Ok(tensor.to_vec::<f32>()?.into_iter().map(f64::from).collect())
        };
        let some = |name: &str, columns: usize| {
            if self.file.contains(name) { floats(name, columns).map(Some) } else { Ok(None) }
        };
        let ids = if self.file.contains("ids") {
            Some(self.file.read_shaped("ids", &[tokens, layer.top_k])?.to_i32()?)
        } else {
            None
        };
        Ok(Expected {
            logits: some("logits", layer.experts)?,
            ids,
            weights: some("weights", layer.top_k)?,
            y: floats("y", layer.hidden)?,
        })
    }
}

/// What the reference computes from the same rounded inputs, for the experts that the device chose where its choice is right.
///
/// Two experts can be closer than the rounding of f32. So the reference chooses from the device's own logits, which are compared
/// separately, and where there is a correction bias, from what is left of the device's choice after [`settle`].
pub fn from_reference<T: Element + reference::Real>(
    layer: &LayerDesc,
    weights: &Weights<T>,
    x: &[T],
    got: &Outputs,
) -> Result<Expected, HfError> {
    let router = weights.router.to_f32();
    let reference = reference_layer(layer, weights, &router);
    let logits = reference::router::router(x, &router, weights.router_bias.as_deref(), layer.hidden)?;
    let mut gated = gate(&got.logits, weights.correction_bias.as_deref(), layer.experts, layer.top_k, &layer.gating)?;
    if let Some(bias) = &weights.correction_bias {
        settle(&mut gated, bias, layer, got)?;
    }
    let result = forward_gated(x, &reference, logits, gated)?;
    Ok(Expected { logits: Some(result.logits), ids: Some(result.ids), weights: Some(result.weights), y: result.y })
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
pub fn run_reference<T: Element + reference::Real, X: reference::Real>(
    layer: &LayerDesc,
    weights: &Weights<T>,
    x: &[X],
) -> Result<reference::layer::Forward, HfError> {
    let router = weights.router.to_f32();
    Ok(forward(x, &reference_layer(layer, weights, &router))?)
}

/// A loaded layer as the reference takes it.
fn reference_layer<'a, T: Element + reference::Real>(
    layer: &LayerDesc,
    weights: &'a Weights<T>,
    router: &'a [f32],
) -> Layer<'a, f32, T> {
    let (hidden, mlp) = (layer.hidden, &layer.mlp);
    let shared = match (&weights.shared, &layer.shared) {
        (Some((up, down)), Some(desc)) => Some((
            up.reference(desc.intermediate, hidden, desc.mlp.gate_up.glu, desc.mlp.gate_up.layout),
            down.reference(hidden, desc.intermediate, Glu::None, desc.mlp.down.layout),
        )),
        _ => None,
    };
    Layer {
        hidden,
        router_weight: router,
        router_bias: weights.router_bias.as_deref(),
        correction_bias: weights.correction_bias.as_deref(),
        top_k: layer.top_k,
        gating: layer.gating,
        weighting: layer.weighting,
        capacity: layer.capacity,
        up: weights.gate_up.reference(layer.intermediate, hidden, mlp.gate_up.glu, mlp.gate_up.layout),
        activation: mlp.activation,
        down: weights.down.reference(hidden, layer.intermediate, Glu::None, mlp.down.layout),
        shared,
        shared_activation: None,
        shared_gate: None,
        scales: [1.0; 2],
        bias: None,
        null: None,
    }
}
