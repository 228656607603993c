//! Files that are there whole or not at all.

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::Path;

use tempfile::{Builder, NamedTempFile};

/// Writes `contents` beside `path` and renames it once all of it is on the disk: whatever goes wrong, a file that was there
/// before stays as it was, and no part of a new one is left.
///
/// Links are followed, and the permissions of an earlier file stay; one that is read-only is not replaced. What is no regular
/// file (a pipe, a terminal) cannot be renamed and is written to as it is.
pub fn write(path: &Path, contents: &[u8]) -> io::Result<()> {
    let earlier = match fs::metadata(path) {
        Ok(found) if !found.is_file() => return fs::write(path, contents),
        Ok(found) if found.permissions().readonly() => return Err(ErrorKind::PermissionDenied.into()),
        Ok(found) => Some(found.permissions()),
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        Err(error) if path.is_symlink() => return Err(error),
        Err(_) => None,
    };
    let target = if earlier.is_some() { path.canonicalize()? } else { path.to_owned() };
    let file = beside(&target)?;
    file.as_file().write_all(contents)?;
    if let Some(permissions) = earlier {
        file.as_file().set_permissions(permissions)?;
    }
    // Some file systems notice only here that they are full.
    file.as_file().sync_all()?;
    file.persist(target).map_err(|error| error.error)?;
    Ok(())
}

/// A new file in the folder of `path`, removed again unless it is renamed.
fn beside(path: &Path) -> io::Result<NamedTempFile> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = Builder::new();
    builder.prefix(".writing-");
    // Readable by others as far as the umask allows, like any new file.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder)
}
