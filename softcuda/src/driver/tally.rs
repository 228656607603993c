//! What a process owes to `softcuda run`, counted where nothing can fail any more: in a mapped file that `SOFTCUDA_TALLY` names.
//!
//! Texts go to files and to standard error, and a disk can be full or no file descriptor be left. That there is something to
//! tell reaches the command all the same.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::device::SettingError;

/// Places of the file, each a `u64` in the host's byte order.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place {
    /// Findings of checkers.
    Findings,
    /// Profiles that are to be written when the process ends.
    ProfilesDue,
    ProfilesWritten,
}

const PLACES: usize = 3;

static MAPPED: OnceLock<&'static [AtomicU64; PLACES]> = OnceLock::new();

/// Takes `SOFTCUDA_TALLY`.
pub(super) fn read_environment() -> Result<(), SettingError> {
    let variable = "SOFTCUDA_TALLY";
    let Some(path) = std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from) else {
        return Ok(());
    };
    let mapped = map(&path).map_err(|error| SettingError {
        variable,
        expected: "the file that `softcuda run` has made",
        found: format!("{} ({error})", path.display()),
    })?;
    let _ = MAPPED.set(mapped);
    Ok(())
}

fn map(path: &std::path::Path) -> std::io::Result<&'static [AtomicU64; PLACES]> {
    use std::os::fd::AsRawFd;
    let file = std::fs::File::options().read(true).write(true).open(path)?;
    let bytes = PLACES * size_of::<AtomicU64>();
    if file.metadata()?.len() < bytes as u64 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    // SAFETY: a new mapping of a file that is open; it outlives the descriptor.
    let start = unsafe {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_SHARED, file.as_raw_fd(), 0)
    };
    if start == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: page-aligned, of this size, never unmapped; all processes that share it use it atomically.
    Ok(unsafe { &*start.cast() })
}

/// Counts.
pub(super) fn add(place: Place, count: usize) {
    if let Some(mapped) = MAPPED.get() {
        mapped[place as usize].fetch_add(count as u64, Ordering::Relaxed);
    }
}
