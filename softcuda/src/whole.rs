//! Files that appear whole or not at all: written beside their place, and renamed when nothing can fail any more.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A name beside `path` that no other process writes to.
fn beside(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?;
    let mut part = std::ffi::OsString::from(".");
    part.push(name);
    part.push(format!(".{}.part", std::process::id()));
    Ok(path.with_file_name(part))
}

/// A part that goes unless it is renamed.
struct Part(PathBuf);

impl Drop for Part {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn part(path: &Path, bytes: &[u8]) -> io::Result<Part> {
    let part = Part(beside(path)?);
    let mut file = File::create(&part.0)?;
    file.write_all(bytes)?;
    // A disk that is full may say so only now.
    file.sync_data()?;
    Ok(part)
}

/// Whether files can be made beside `path`.
///
/// # Errors
/// The host's, for making one.
pub(crate) fn probe(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    part(path, &[]).map(drop)
}

/// Writes all of some files, in the place of earlier ones.
///
/// # Errors
/// The host's. What failed to be written leaves earlier files as they were; only a rename that fails after others did not leaves
/// some of them new.
pub(crate) fn write(files: &[(&Path, &[u8])]) -> io::Result<()> {
    let parts = files.iter().map(|(path, bytes)| part(path, bytes)).collect::<io::Result<Vec<Part>>>()?;
    parts.iter().zip(files).try_for_each(|(part, (path, _))| fs::rename(&part.0, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_fails_leaves_all_as_they_were() {
        let folder = std::env::temp_dir().join(format!("softcuda-whole-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (a, b) = (folder.join("a"), folder.join("missing").join("b"));
        write(&[(&a, b"old")]).unwrap();
        assert!(write(&[(&a, b"new"), (&b, b"new")]).is_err());
        assert!(probe(&b).is_err() && probe(&folder).is_err());
        probe(&a).unwrap();
        assert_eq!(fs::read(&a).unwrap(), b"old");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        fs::remove_dir_all(&folder).unwrap();
    }
}
