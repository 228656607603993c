//! What can be wrong with a checkpoint or a command line: one line each.

use std::path::PathBuf;

/// Why a layer could not be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum HfError {
    #[error("{0} (usage: {usage})", usage = super::cli::USAGE)]
    Usage(String),
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: not valid JSON: {source}", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("{}: not a usable safetensors file: {reason}", path.display())]
    Safetensors { path: PathBuf, reason: String },
    #[error("{}: tensor `{name}` is missing", path.display())]
    MissingTensor { path: PathBuf, name: String },
    #[error("tensor `{name}` is {found}: only BF16, F16 and F32 are read, quantised checkpoints are not supported")]
    TensorDtype { name: String, found: String },
    #[error("tensor `{name}` has shape {found:?}, expected {expected}")]
    TensorShape { name: String, expected: String, found: Vec<usize> },
    #[error("config.json: `{key}` {reason}")]
    Config { key: String, reason: String },
    #[error("config.json: unknown family: `model_type` is {found:?}, known are {known}")]
    UnknownFamily { found: String, known: String },
    #[error("no block {name:?}: {reason}")]
    Block { name: String, reason: String },
    #[error("no device: {0}")]
    Device(String),
    #[error("writing the report: {0}")]
    Report(std::io::Error),
    #[error(transparent)]
    Kernels(#[from] moe_kernels::Error),
    #[error(transparent)]
    Reference(#[from] moe_kernels::reference::ReferenceError),
}

impl HfError {
    pub fn io(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> HfError {
        move |source| HfError::Io { path: path.to_owned(), source }
    }

    pub fn config(key: &str, reason: impl Into<String>) -> HfError {
        HfError::Config { key: key.to_owned(), reason: reason.into() }
    }
}
