//! What can be wrong with a run: one line each.

use std::path::PathBuf;

use moe_kernels::checkpoint::CheckpointError;

/// Why a layer could not be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum HfError {
    /// Several lines, as clap words them; also where help was asked for.
    #[error(transparent)]
    CommandLine(#[from] clap::Error),
    #[error("{} has no {}: give --tokens", folder.display(), super::golden::Golden::NAME)]
    NoRows { folder: PathBuf },
    #[error("gradient `{name}` is recorded, and the block has no such tensor")]
    NoGradient { name: String },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: {reason}", path.display())]
    Write { path: PathBuf, reason: String },
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
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
}
