//! Saved models: safetensors with the configuration in the metadata.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::assemble::{Experts, assemble};
use super::config::Config;
use super::plain::model::Model;
use super::{Outcome, whole_file};

/// The one key of the metadata: with several, their order would not be the same in each file.
const KEY: &str = "byte_model";

/// Writes all parameters as f32.
pub fn save(path: &Path, config: &Config, model: &mut Model) -> Outcome<()> {
    let parameters: Vec<(String, Vec<usize>, Vec<u8>)> = model
        .parameters()
        .into_iter()
        .map(|p| (p.name.clone(), p.shape.clone(), p.value.iter().flat_map(|value| value.to_le_bytes()).collect()))
        .collect();
    let views =
        parameters.iter().map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)));
    let views = views.collect::<Outcome<Vec<_>>>()?;
    let metadata = HashMap::from([(KEY.to_owned(), config.to_json().to_string())]);
    let bytes = safetensors::serialize(views, Some(metadata))?;
    whole_file::write(path, &bytes).map_err(|error| format!("{}: {error}", path.display()).into())
}

/// The configuration of a saved model, and its bytes for [`load`].
pub fn open(path: &Path) -> Outcome<(Config, Vec<u8>)> {
    let named = |error: String| format!("{}: {error}", path.display());
    let bytes = fs::read(path).map_err(|error| named(error.to_string()))?;
    let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|error| named(error.to_string()))?;
    let text = metadata.metadata().as_ref().and_then(|metadata| metadata.get(KEY));
    let text = text.ok_or_else(|| named(format!("no model of these programs: its metadata has no {KEY}")))?;
    let json = serde_json::from_str(text).map_err(|error| named(error.to_string()))?;
    Ok((Config::from_json(&json).map_err(named)?, bytes))
}

/// The model of a file's bytes.
pub fn load(config: &Config, bytes: &[u8], experts: Option<&Experts>) -> Outcome<Model> {
    let file = SafeTensors::deserialize(bytes)?;
    let mut model = assemble(config, experts, &mut fastrand::Rng::with_seed(0))?;
    for parameter in model.parameters() {
        let name = &parameter.name;
        let tensor = file.tensor(name).map_err(|error| format!("{name}: {error}"))?;
        if tensor.dtype() != Dtype::F32 || tensor.shape() != parameter.shape {
            let found = (tensor.dtype(), tensor.shape());
            return Err(format!("{name}: expected F32 of {:?}, found {found:?}", parameter.shape).into());
        }
        let words = tensor.data().as_chunks().0;
        parameter.value.iter_mut().zip(words).for_each(|(value, &word)| *value = f32::from_le_bytes(word));
    }
    Ok(model)
}
