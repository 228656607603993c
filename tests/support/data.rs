//! Where recorded data lie.

use std::path::{Path, PathBuf};

/// `tests/data/<name>`; `MOE_DATA` names another place for `tests/data`, for programs that run where their sources are not.
pub fn path(name: &str) -> PathBuf {
    let data = std::env::var_os("MOE_DATA").filter(|folder| !folder.is_empty());
    let data = data.map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data"), PathBuf::from);
    data.join(name)
}
