//! What can be wrong with a checkpoint or a command line: one line each.

use std::path::PathBuf;

/// Why a layer could not be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum HfError {
    /// Several lines, as clap words them; also where help was asked for.
    #[error(transparent)]
    CommandLine(#[from] clap::Error),
    #[error("{} has no {}: give --tokens", folder.display(), super::golden::Golden::NAME)]
    NoRows { folder: PathBuf },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: is {found}, expected a regular file", path.display())]
    NoFile { path: PathBuf, found: &'static str },
    #[error("{}: has {length} bytes, expected at most {}", path.display(), super::files::MAX_JSON)]
    TooLong { path: PathBuf, length: u64 },
    #[error("{}: not valid JSON: {source}", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("{}: not a usable safetensors file: {reason}", path.display())]
    Safetensors { path: PathBuf, reason: String },
    #[error("{}: not a usable index: {reason}", path.display())]
    Index { path: PathBuf, reason: String },
    #[error("{}: neither {single} nor {index} is there", folder.display())]
    NoTensors { folder: PathBuf, single: &'static str, index: &'static str },
    #[error("{}: {lost}, and by {index} it holds tensor `{name}`", shard.display())]
    Shard { shard: PathBuf, index: &'static str, name: String, lost: Lost },
    #[error("experts of `{block}`: expected {expected}, found {found}")]
    ExpertLayout { block: String, expected: String, found: String },
    #[error("tensor `{name}` is part of the block, but what config.json describes has no such tensor")]
    UnreadTensor { name: String },
    #[error("{}: tensor `{name}` is missing", path.display())]
    MissingTensor { path: PathBuf, name: String },
    #[error("tensor `{name}` is {found}: only BF16, F16 and F32 are read, quantised checkpoints are not supported")]
    TensorDtype { name: String, found: String },
    #[error("{}: tensor `{name}` has shape {found:?}, expected {expected}", path.display())]
    TensorShape { path: PathBuf, name: String, expected: String, found: Vec<usize> },
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

/// Why a tensor that the index names cannot be read.
#[derive(Debug, Clone, Copy, thiserror::Error)]
pub enum Lost {
    #[error("the file is missing")]
    NoShard,
    #[error("is a link to a file that is missing")]
    LinkToNothing,
    #[error("does not hold what it should")]
    NotInShard,
}

impl HfError {
    pub fn io(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> HfError {
        move |source| HfError::Io { path: path.to_owned(), source }
    }

    pub fn config(key: &str, reason: impl Into<String>) -> HfError {
        HfError::Config { key: key.to_owned(), reason: reason.into() }
    }
}
