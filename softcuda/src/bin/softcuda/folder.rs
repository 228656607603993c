//! The private folder in which a program finds the driver, and who removes it.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::{fs, io};

/// Names under which programs load the CUDA driver.
const NAMES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// A folder of this process's own in which the driver has the names that programs load it under, removed when dropped, or when
/// this process is killed.
///
/// Never below `target/`: cargo puts that on the library path of all that it runs, and a `libcuda.so` there would shadow a
/// real driver.
pub struct PrivateFolder {
    pub path: PathBuf,
    guard: Option<Guard>,
}

impl PrivateFolder {
    /// To be called while this process has one thread.
    pub fn with_driver(library: &Path) -> io::Result<PrivateFolder> {
        let library = library.canonicalize()?;
        let path = fresh_folder(&std::env::temp_dir().join("softcuda-run-XXXXXX"))?;
        let mut folder = PrivateFolder { path, guard: None };
        folder.guard = Some(Guard::over(&folder.path)?);
        for name in NAMES {
            std::os::unix::fs::symlink(&library, folder.path.join(name))?;
        }
        Ok(folder)
    }

    /// The folder in front of what the library path holds already.
    pub fn library_path(&self) -> OsString {
        let mut path = self.path.clone().into_os_string();
        if let Some(rest) = std::env::var_os("LD_LIBRARY_PATH").filter(|rest| !rest.is_empty()) {
            path.push(":");
            path.push(rest);
        }
        path
    }
}

impl Drop for PrivateFolder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("softcuda: {} remains: {error}", self.path.display());
        }
        // Only now: it removes what is left.
        self.guard = None;
    }
}

/// Makes a folder that only this user can enter, its name's last six letters chosen anew.
fn fresh_folder(pattern: &Path) -> io::Result<PathBuf> {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut name = pattern.as_os_str().as_bytes().to_vec();
    name.push(0);
    // SAFETY: a NUL-terminated, writable text.
    if unsafe { libc::mkdtemp(name.as_mut_ptr().cast()) }.is_null() {
        return Err(io::Error::last_os_error());
    }
    name.pop();
    Ok(PathBuf::from(OsString::from_vec(name)))
}

/// A process that removes a folder once this one is gone, however it went: it sees the end of a pipe whose other end nobody else
/// holds.
struct Guard {
    process: libc::pid_t,
    pipe: Option<OwnedFd>,
}

impl Guard {
    fn over(folder: &Path) -> io::Result<Guard> {
        let mut ends = [0; 2];
        // SAFETY: room for two descriptors, which are then owned. The program does not inherit them.
        let [reader, writer] = unsafe {
            if libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) != 0 {
                return Err(io::Error::last_os_error());
            }
            ends.map(|end| OwnedFd::from_raw_fd(end))
        };
        // SAFETY: this process has one thread, so that its child may do whatever it could.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                wait_for_end(&reader);
                let _ = fs::remove_dir_all(folder);
                // SAFETY: ends the process without exit handlers.
                unsafe { libc::_exit(0) }
            }
            process => Ok(Guard { process, pipe: Some(writer) }),
        }
    }
}

/// Waits for the end of the pipe, out of reach of the terminal's signals, with nothing else open that others wait to be closed.
fn wait_for_end(reader: &OwnedFd) {
    // SAFETY: calls of the system on descriptors of this process, which uses no others from here on.
    unsafe {
        libc::setsid();
        libc::dup2(reader.as_raw_fd(), 0);
        if libc::syscall(libc::SYS_close_range, 1u32, u32::MAX, 0u32) != 0 {
            (1..1024).for_each(|fd| {
                libc::close(fd);
            });
        }
        let mut byte = 0u8;
        while libc::read(0, (&raw mut byte).cast(), 1) < 0 && *libc::__errno_location() == libc::EINTR {}
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.pipe = None;
        // SAFETY: a child of this process that nothing else waits for.
        unsafe { libc::waitpid(self.process, std::ptr::null_mut(), 0) };
    }
}
