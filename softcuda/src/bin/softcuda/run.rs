//! Starting a program with the software device as its CUDA driver.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::sync::atomic::{AtomicI32, Ordering};
use std::{fs, io};

use crate::NOT_SET_UP;

/// A program that ends well but whose checkers found something ends with this.
const FINDINGS: u8 = 97;

/// Names under which programs load the CUDA driver.
const NAMES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// Where the driver appends its findings, one after another.
const FINDINGS_VARIABLE: &str = "SOFTCUDA_FINDINGS";

/// A program to run, and what the driver is told in its environment.
#[derive(Debug)]
pub struct Run {
    pub program: OsString,
    pub arguments: Vec<OsString>,
    pub settings: Vec<(&'static str, OsString)>,
}

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("{0}")]
    Library(#[from] softcuda::InstallError),
    #[error("{0}")]
    Setting(#[from] softcuda::device::SettingError),
    #[error("no private folder for the driver: {0}")]
    Folder(io::Error),
    #[error("cannot run `{program}`: {error}")]
    Program { program: String, error: io::Error },
}

impl RunError {
    /// As shells and `env` have it: 127 for a program that is not there, 126 for one that cannot be run.
    pub fn exit_code(&self) -> u8 {
        match self {
            RunError::Program { error, .. } if error.kind() == io::ErrorKind::NotFound => 127,
            RunError::Program { .. } => 126,
            _ => NOT_SET_UP,
        }
    }
}

impl Run {
    /// Runs the program to its end and returns the exit code that stands for it.
    pub fn execute(&self) -> Result<u8, RunError> {
        self.check_settings()?;
        let folder = PrivateFolder::with_driver(&softcuda::library()?).map_err(RunError::Folder)?;
        let findings = folder.path.join("findings");
        let mut command = std::process::Command::new(&self.program);
        command.args(&self.arguments).env("LD_LIBRARY_PATH", folder.library_path());
        command.env(FINDINGS_VARIABLE, &findings);
        command.envs(self.settings.iter().map(|(variable, value)| (variable, value)));
        forward_signals();
        let child = command
            .spawn()
            .map_err(|error| RunError::Program { program: self.program.to_string_lossy().into_owned(), error })?;
        let status = wait(child).map_err(RunError::Folder)?;
        Ok(exit_code(status, fs::metadata(&findings).is_ok_and(|file| file.len() > 0)))
    }

    /// Has the driver's own reading of the settings look at them before anything is started.
    fn check_settings(&self) -> Result<(), RunError> {
        for (variable, value) in &self.settings {
            // SAFETY: this process has no other thread.
            unsafe { std::env::set_var(variable, value) };
        }
        softcuda::device::Description::all_from_environment()?;
        Ok(())
    }
}

fn exit_code(status: ExitStatus, findings: bool) -> u8 {
    let code = match (status.code(), status.signal()) {
        (Some(code), _) => code as u8,
        (None, Some(signal)) => 128 | signal as u8,
        (None, None) => NOT_SET_UP,
    };
    if code == 0 && findings { FINDINGS } else { code }
}

/// A folder of this process's own in which the driver has the names that programs load it under, removed when dropped.
///
/// Never below `target/`: cargo puts that on the library path of all that it runs, and a `libcuda.so` there would shadow a
/// real driver.
struct PrivateFolder {
    path: PathBuf,
}

impl PrivateFolder {
    fn with_driver(library: &Path) -> io::Result<PrivateFolder> {
        let library = library.canonicalize()?;
        let folder = PrivateFolder { path: fresh_folder(&std::env::temp_dir().join("softcuda-run-XXXXXX"))? };
        for name in NAMES {
            std::os::unix::fs::symlink(&library, folder.path.join(name))?;
        }
        Ok(folder)
    }

    /// The folder in front of what the library path holds already.
    fn library_path(&self) -> OsString {
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

/// The program that signals go on to, 0 before there is one.
static CHILD: AtomicI32 = AtomicI32::new(0);

/// A signal that came before the program was known, 0 for none.
static EARLY: AtomicI32 = AtomicI32::new(0);

extern "C" fn forward(signal: libc::c_int) {
    let child = CHILD.load(Ordering::SeqCst);
    if child > 0 {
        // SAFETY: sends a signal, which is allowed inside a handler.
        unsafe { libc::kill(child, signal) };
    } else {
        EARLY.store(signal, Ordering::SeqCst);
    }
}

/// Outlives signals, so that the folder is removed: those to this process alone are sent on; those of the terminal reach
/// the program anyway.
fn forward_signals() {
    extern "C" fn nothing(_: libc::c_int) {}
    let handlers: [(libc::c_int, extern "C" fn(libc::c_int)); 4] =
        [(libc::SIGTERM, forward), (libc::SIGHUP, forward), (libc::SIGINT, nothing), (libc::SIGQUIT, nothing)];
    for (signal, handler) in handlers {
        // SAFETY: the handlers do nothing that a handler may not do. A handler, unlike ignoring the signal, is not
        // inherited by the program.
        unsafe { libc::signal(signal, handler as *const () as libc::sighandler_t) };
    }
}

fn wait(mut child: Child) -> io::Result<ExitStatus> {
    CHILD.store(child.id() as i32, Ordering::SeqCst);
    // The program may have run for a while by now.
    let early = EARLY.swap(0, Ordering::SeqCst);
    if early != 0 {
        forward(early);
    }
    let status = child.wait();
    CHILD.store(0, Ordering::SeqCst);
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_tell_what_happened() {
        let exited = |code: i32| ExitStatus::from_raw(code << 8);
        assert_eq!(exit_code(exited(0), false), 0);
        assert_eq!(exit_code(exited(0), true), FINDINGS);
        assert_eq!(exit_code(exited(3), true), 3);
        assert_eq!(exit_code(ExitStatus::from_raw(libc::SIGSEGV), false), 139);
    }
}
