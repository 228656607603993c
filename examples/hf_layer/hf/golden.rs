//! What the block should compute: recorded outputs of the model's own code, or the reference.

use std::path::Path;

use moe_kernels::gemm::Glu;
use moe_kernels::layer::{LayerDesc, Weighting};
use moe_kernels::reference::layer::{Layer, forward};
use moe_kernels::{Element, reference};

use super::checkpoint::TensorFile;
use super::error::HfError;
use super::load::Weights;

/// Outputs to compare with; none where the model's block does not give them.
pub struct Expected {
    /// Where they come from.
    pub source: &'static str,
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
        let tensor = self.file.read("x")?;
        match *tensor.shape() {
            [_, columns] if columns == hidden => tensor.to_vec(),
            _ => Err(HfError::TensorShape {
                name: "x".into(),
                expected: format!("[tokens, {hidden}]"),
                found: tensor.shape().to_vec(),
            }),
        }
    }

    /// The recorded outputs.
    pub fn expected(&self, layer: &LayerDesc, tokens: usize) -> Result<Expected, HfError> {
        let floats = |name: &str, columns: usize| -> Result<Vec<f64>, HfError> {
            let tensor = self.file.read(name)?;
            tensor.require_shape(&[tokens, columns])?;
            Ok(tensor.to_vec::<f32>()?.into_iter().map(f64::from).collect())
        };
        let some = |name: &str, columns: usize| {
            if self.file.contains(name) { floats(name, columns).map(Some) } else { Ok(None) }
        };
        let ids = if self.file.contains("ids") {
            let tensor = self.file.read("ids")?;
            tensor.require_shape(&[tokens, layer.top_k])?;
            Some(tensor.to_i32()?)
        } else {
            None
        };
        Ok(Expected {
            source: "golden.safetensors",
            logits: some("logits", layer.experts)?,
            ids,
            weights: some("weights", layer.top_k)?,
            y: floats("y", layer.hidden)?,
        })
    }
}

/// What the reference computes from the same rounded inputs.
pub fn from_reference<T: Element + reference::Real>(
    layer: &LayerDesc,
    weights: &Weights<T>,
    x: &[T],
) -> Result<Expected, HfError> {
    let result = run_reference(layer, weights, x)?;
    Ok(Expected {
        source: "reference",
        logits: Some(result.logits),
        ids: Some(result.ids),
        weights: Some(result.weights),
        y: result.y,
    })
}

/// The reference on a loaded layer.
pub fn run_reference<T: Element + reference::Real, X: reference::Real>(
    layer: &LayerDesc,
    weights: &Weights<T>,
    x: &[X],
) -> Result<reference::layer::Forward, HfError> {
    let router = weights.router.to_f32();
    let (hidden, mlp) = (layer.hidden, &layer.mlp);
    let shared = match (&weights.shared, &layer.shared) {
        (Some((up, down)), Some(desc)) => Some((
            up.reference(desc.intermediate, hidden, desc.mlp.glu, desc.mlp.gate_up_layout),
            down.reference(hidden, desc.intermediate, Glu::None, desc.mlp.down_layout),
        )),
        _ => None,
    };
    let reference = Layer {
        hidden,
        router_weight: &router,
        router_bias: weights.router_bias.as_deref(),
        correction_bias: weights.correction_bias.as_deref(),
        top_k: layer.top_k,
        gating: layer.gating,
        weigh_input: layer.weighting == Weighting::Input,
        capacity: layer.capacity,
        up: weights.gate_up.reference(layer.intermediate, hidden, mlp.glu, mlp.gate_up_layout),
        activation: mlp.activation,
        down: weights.down.reference(hidden, layer.intermediate, Glu::None, mlp.down_layout),
        shared,
    };
    Ok(forward(x, &reference)?)
}
