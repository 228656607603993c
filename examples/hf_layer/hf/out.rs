//! Writes a run's tensors for other programs.

use std::path::Path;

use moe_kernels::layer::LayerDesc;
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, TensorView, serialize};

use super::device::Outputs;
use super::error::HfError;
use super::whole_file;

/// Writes `x [T,H]`, `logits [T,E]`, `ids [T,k]` (I32), `weights [T,k]` and `y [T,H]`, all else in F32: every value of x and y
/// fits.
pub fn write(path: &Path, layer: &LayerDesc, x: &[f32], outputs: &Outputs) -> Result<(), HfError> {
    let tokens = x.len() / layer.hidden.max(1);
    let floats = |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|value| value.to_le_bytes()).collect() };
    let ids: Vec<u8> = outputs.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let tensors = [
        ("x", Dtype::F32, layer.hidden, floats(x)),
        ("logits", Dtype::F32, layer.experts, floats(&outputs.logits)),
        ("ids", Dtype::I32, layer.top_k, ids),
        ("weights", Dtype::F32, layer.top_k, floats(&outputs.weights)),
        ("y", Dtype::F32, layer.hidden, floats(&outputs.y)),
    ];
    let invalid = |error: SafeTensorError| HfError::Write { path: path.to_owned(), reason: error.to_string() };
    let mut views = Vec::new();
    for (name, dtype, columns, bytes) in &tensors {
        views.push((*name, TensorView::new(*dtype, vec![tokens, *columns], bytes).map_err(invalid)?));
    }
    whole_file::write(path, &serialize(views, None).map_err(invalid)?).map_err(HfError::io(path))
}
