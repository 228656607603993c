//! Files of a checkpoint folder: only regular ones are read, and JSON only up to a size.

use std::fs::{File, Metadata};
use std::io::Read;
use std::path::Path;

use super::error::CheckpointError;

/// Most bytes of JSON that are read, of a file or of a header: the limit of the safetensors format.
pub(super) const MAX_JSON: u64 = 100_000_000;

/// Opens a regular file, and gives its length in bytes. Links are followed.
///
/// Opening a pipe waits for a writer, and a device need not end: both are refused, unopened.
pub(super) fn open(path: &Path) -> Result<(File, u64), CheckpointError> {
    regular(path, &path.metadata().map_err(CheckpointError::io(path))?)?;
    let file = File::open(path).map_err(CheckpointError::io(path))?;
    let length = regular(path, &file.metadata().map_err(CheckpointError::io(path))?)?;
    Ok((file, length))
}

fn regular(path: &Path, metadata: &Metadata) -> Result<u64, CheckpointError> {
    if metadata.is_file() {
        return Ok(metadata.len());
    }
    Err(CheckpointError::NoFile {
        path: path.to_owned(),
        found: if metadata.is_dir() { "a folder" } else { "a pipe or a device" },
    })
}

/// Whether there is anything at `path`. A link to nothing is nothing; a loop of links or a closed folder is an error.
pub(super) fn exists(path: &Path) -> Result<bool, CheckpointError> {
    path.try_exists().map_err(CheckpointError::io(path))
}

/// Reads and parses a JSON file.
pub(super) fn read_json(path: &Path) -> Result<serde_json::Value, CheckpointError> {
    let (file, length) = open(path)?;
    if length > MAX_JSON {
        return Err(CheckpointError::TooLong { path: path.to_owned(), length });
    }
    let mut text = Vec::new();
    file.take(MAX_JSON).read_to_end(&mut text).map_err(CheckpointError::io(path))?;
    serde_json::from_slice(&text).map_err(|source| CheckpointError::Json { path: path.to_owned(), source })
}
