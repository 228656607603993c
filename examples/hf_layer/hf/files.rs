//! Files of a checkpoint folder: only regular ones are read, and JSON only up to a size.

use std::fs::{File, Metadata};
use std::io::Read;
use std::path::Path;

use super::error::HfError;

/// Most bytes of JSON that are read, of a file or of a header: the limit of the safetensors format.
pub const MAX_JSON: u64 = 100_000_000;

/// Opens a regular file, and gives its length in bytes. Links are followed.
///
/// Opening a pipe waits for a writer, and a device need not end: both are refused, unopened.
pub fn open(path: &Path) -> Result<(File, u64), HfError> {
    regular(path, &path.metadata().map_err(HfError::io(path))?)?;
    let file = File::open(path).map_err(HfError::io(path))?;
    let length = regular(path, &file.metadata().map_err(HfError::io(path))?)?;
    Ok((file, length))
}

fn regular(path: &Path, metadata: &Metadata) -> Result<u64, HfError> {
    if metadata.is_file() {
        return Ok(metadata.len());
    }
    Err(HfError::NoFile {
        path: path.to_owned(),
        found: if metadata.is_dir() { "a folder" } else { "a pipe or a device" },
    })
}

/// Whether there is anything at `path`. A link to nothing is nothing; a loop of links or a closed folder is an error.
pub fn exists(path: &Path) -> Result<bool, HfError> {
    path.try_exists().map_err(HfError::io(path))
}

/// Reads and parses a JSON file.
pub fn read_json(path: &Path) -> Result<serde_json::Value, HfError> {
    let (file, length) = open(path)?;
    if length > MAX_JSON {
        return Err(HfError::TooLong { path: path.to_owned(), length });
    }
    let mut text = Vec::new();
    file.take(MAX_JSON).read_to_end(&mut text).map_err(HfError::io(path))?;
    serde_json::from_slice(&text).map_err(|source| HfError::Json { path: path.to_owned(), source })
}
