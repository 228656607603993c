//! What can be wrong with a checkpoint: one line each.

use std::path::{Path, PathBuf};

/// Why a block could not be read. Every message is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// A pipe, a device or a folder where a file is expected.
    #[error("{}: is {found}, expected a regular file", path.display())]
    NoFile {
        /// The path.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// JSON longer than any that is read.
    #[error("{}: has {length} bytes, expected at most {}", path.display(), super::files::MAX_JSON)]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        length: u64,
    },
    /// No JSON.
    #[error("{}: not valid JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where it ceases to be.
        source: serde_json::Error,
    },
    /// A file that is not what the safetensors format asks for.
    #[error("{}: not a usable safetensors file: {reason}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// An index without a map from tensors to files.
    #[error("{}: not a usable index: {reason}", path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A folder without tensors.
    #[error("{}: neither {single} nor {index} is there", folder.display())]
    NoTensors {
        /// The folder.
        folder: PathBuf,
        /// Name of a single file.
        single: &'static str,
        /// Name of an index of several.
        index: &'static str,
    },
    /// A tensor that the index names and that cannot be had.
    #[error("{}: {lost}, and by {index} it holds tensor `{name}`", shard.display())]
    Shard {
        /// The file.
        shard: PathBuf,
        /// Name of the index.
        index: &'static str,
        /// The tensor.
        name: String,
        /// What is wrong with the file.
        lost: Lost,
    },
    /// Experts that are stored in no way that is known.
    #[error("experts of `{block}`: expected {expected}, found {found}")]
    ExpertLayout {
        /// The block.
        block: String,
        /// Names of the family's own tensors.
        expected: String,
        /// Names and shapes of tensors that are there and that nothing reads.
        found: String,
    },
    /// The block has a tensor that nothing reads: it would compute something else.
    #[error("tensor `{name}` is part of the block, but what config.json describes has no such tensor")]
    UnreadTensor {
        /// Its name.
        name: String,
    },
    /// A tensor that is in no file.
    #[error("{}: tensor `{name}` is missing", path.display())]
    MissingTensor {
        /// File or folder.
        path: PathBuf,
        /// Its name.
        name: String,
    },
    /// A tensor of a type that is not read.
    #[error("tensor `{name}` is {found}, expected {expected}: quantised checkpoints are not supported")]
    TensorDtype {
        /// Its name.
        name: String,
        /// Its type.
        found: String,
        /// The types that are read.
        expected: &'static str,
    },
    /// A tensor of other extents than config.json implies.
    #[error("{}: tensor `{name}` has shape {found:?}, expected {expected}", path.display())]
    TensorShape {
        /// The file.
        path: PathBuf,
        /// Its name.
        name: String,
        /// Extents by config.json.
        expected: String,
        /// Its extents.
        found: Vec<usize>,
    },
    /// A finite value that becomes infinite in the type that was asked for.
    #[error("tensor `{name}` holds {value:e}, which {dtype} cannot hold")]
    Range {
        /// The tensor.
        name: String,
        /// The value.
        value: f32,
        /// The type that was asked for.
        dtype: crate::Dtype,
    },
    /// A key of config.json.
    #[error("config.json: `{key}` {reason}")]
    Config {
        /// The key.
        key: String,
        /// What is wrong with its value.
        reason: String,
    },
    /// A model that no family here describes.
    #[error("config.json: unknown family: `model_type` is {found:?}{nearest}; known are {known}")]
    UnknownFamily {
        /// Its `model_type`.
        found: String,
        /// The families whose rules are nearest to what config.json and tensors show, and what differs; empty where nothing shows.
        nearest: String,
        /// All that are known.
        known: String,
    },
    /// A block that is not there.
    #[error("no block {name:?}: {reason}")]
    Block {
        /// The name that was asked for.
        name: String,
        /// Why there is none.
        reason: String,
    },
    /// The device refused memory or a copy.
    #[error(transparent)]
    Device(#[from] crate::Error),
}

/// Why a tensor that the index names cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Lost {
    /// There is no such file.
    #[error("the file is missing")]
    NoShard,
    /// A link leads nowhere.
    #[error("is a link to a file that is missing")]
    LinkToNothing,
    /// The file has no such tensor.
    #[error("does not hold what it should")]
    NotInShard,
}

impl CheckpointError {
    pub(super) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> CheckpointError {
        move |source| CheckpointError::Io { path: path.to_owned(), source }
    }

    pub(super) fn config(key: &str, reason: impl Into<String>) -> CheckpointError {
        CheckpointError::Config { key: key.to_owned(), reason: reason.into() }
    }
}
