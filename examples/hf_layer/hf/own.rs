//! A checkpoint of our own, for a machine without any.

use std::path::Path;

use half::bf16;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::json;

use super::error::HfError;
use super::random::Random;

/// What the layer is, for the report.
pub const STATED: &str = "Mixtral 8x7B scaled down: H and I by 8, 8 experts, 2 per token";

/// Tokens of its batch.
pub const TOKENS: usize = 128;

const HIDDEN: usize = 4096 / 8;
const INTERMEDIATE: usize = 14336 / 8;
const EXPERTS: usize = 8;

/// Writes the checkpoint, with weights of the size that keeps activations near 1.
pub fn write(folder: &Path, random: &mut Random) -> Result<(), HfError> {
    let config = json!({"model_type": "mixtral", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
        "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "num_hidden_layers": 1, "hidden_act": "silu"});
    let path = folder.join("config.json");
    std::fs::write(&path, config.to_string()).map_err(HfError::io(&path))?;

    let block = "model.layers.0.block_sparse_moe";
    let mut tensors = vec![(format!("{block}.gate.weight"), [EXPERTS, HIDDEN])];
    for expert in 0..EXPERTS {
        let shapes = [("w1", [INTERMEDIATE, HIDDEN]), ("w3", [INTERMEDIATE, HIDDEN]), ("w2", [HIDDEN, INTERMEDIATE])];
        tensors.extend(shapes.map(|(matrix, shape)| (format!("{block}.experts.{expert}.{matrix}.weight"), shape)));
    }
    let path = folder.join("model.safetensors");
    let invalid =
        |error: safetensors::SafeTensorError| HfError::Write { path: path.clone(), reason: error.to_string() };
    let mut bytes = Vec::new();
    for (_, [rows, columns]) in &tensors {
        let values = random.normals(rows * columns, (*columns as f32).sqrt().recip());
        bytes.push(values.into_iter().flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect::<Vec<u8>>());
    }
    let mut views = Vec::new();
    for ((name, shape), bytes) in tensors.iter().zip(&bytes) {
        views.push((name, TensorView::new(Dtype::BF16, shape.to_vec(), bytes).map_err(invalid)?));
    }
    serialize_to_file(views, None, &path).map_err(invalid)
}
