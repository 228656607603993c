//! Writes a run's tensors for other programs.

use std::path::Path;

use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, TensorView, serialize};

use super::backward::Gradient;
use super::device::Outputs;
use super::error::HfError;
use super::whole_file;

/// Writes `x [T,H]`, `logits [T,E]`, `ids [T,k]` (I32), `weights [T,k]`, `y [T,H]` and what the block yields beside these, all else in F32:
/// every value of x and y fits. With the gradients that there are.
pub fn write(path: &Path, hidden: usize, x: &[f32], outputs: &Outputs, gradients: &[Gradient]) -> Result<(), HfError> {
    let tokens = x.len() / hidden.max(1);
    let floats = |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|value| value.to_le_bytes()).collect() };
    let ids: Vec<u8> = outputs.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let mut tensors = vec![("ids", Dtype::I32, ids)];
    let always = [("x", x), ("logits", &outputs.logits), ("weights", &outputs.weights), ("y", &outputs.y)];
    let extras = outputs.extras.iter().map(|(name, values)| (*name, values.as_slice()));
    for (name, values) in always.into_iter().chain(extras.filter(|(_, values)| !values.is_empty())) {
        tensors.push((name, Dtype::F32, floats(values)));
    }
    let invalid = |error: SafeTensorError| HfError::Write { path: path.to_owned(), reason: error.to_string() };
    let mut views = Vec::new();
    for (name, dtype, bytes) in &tensors {
        let columns = (bytes.len() / 4).checked_div(tokens).unwrap_or(0);
        views.push((*name, TensorView::new(*dtype, vec![tokens, columns], bytes).map_err(invalid)?));
    }
    let gradients: Vec<_> = gradients.iter().map(|g| (&g.name, &g.shape, floats(&g.values))).collect();
    for (name, shape, bytes) in &gradients {
        views.push((name.as_str(), TensorView::new(Dtype::F32, (*shape).clone(), bytes).map_err(invalid)?));
    }
    whole_file::write(path, &serialize(views, None).map_err(invalid)?).map_err(HfError::io(path))
}
