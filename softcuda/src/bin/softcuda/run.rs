//! Starting a program with the software device as its CUDA driver.

use std::ffi::OsString;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ExitStatus};
use std::sync::atomic::{AtomicI32, Ordering};
use std::{fs, io};

use crate::NOT_SET_UP;
use crate::folder::PrivateFolder;

/// A program that ends well but whose checkers found something ends with this.
const FINDINGS: u8 = 97;

/// A program that ends well but whose profile could not be written ends with this.
const NO_PROFILE: u8 = 98;

/// Where the driver appends its findings, one after another.
const FINDINGS_VARIABLE: &str = "SOFTCUDA_FINDINGS";

/// Where it counts findings, profiles to be written and profiles written: three `u64`.
const TALLY_VARIABLE: &str = "SOFTCUDA_TALLY";
const TALLY_BYTES: usize = 24;

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
        let tally = folder.path.join("tally");
        // Its room is taken now: counting needs none later.
        fs::write(&tally, [0; TALLY_BYTES]).map_err(RunError::Folder)?;
        let mut command = std::process::Command::new(&self.program);
        command.args(&self.arguments).env("LD_LIBRARY_PATH", folder.library_path());
        command.env(FINDINGS_VARIABLE, &findings).env(TALLY_VARIABLE, &tally);
        end_with_this_process(&mut command);
        command.envs(self.settings.iter().map(|(variable, value)| (variable, value)));
        forward_signals();
        let child = command
            .spawn()
            .map_err(|error| RunError::Program { program: self.program.to_string_lossy().into_owned(), error })?;
        let status = wait(child).map_err(RunError::Folder)?;
        let told = fs::metadata(&findings).is_ok_and(|file| file.len() > 0);
        let [found, due, written] = read_tally(&tally).map_err(RunError::Folder)?;
        Ok(exit_code(status, told || found > 0, due > written))
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

fn read_tally(path: &Path) -> io::Result<[u64; 3]> {
    let bytes: [u8; TALLY_BYTES] = fs::read(path)?.try_into().map_err(|_| io::ErrorKind::UnexpectedEof)?;
    Ok([0, 8, 16].map(|at| u64::from_ne_bytes(std::array::from_fn(|byte| bytes[at + byte]))))
}

/// The program is killed when this process is, which then cannot send the signal on.
fn end_with_this_process(command: &mut std::process::Command) {
    let parent = std::process::id() as libc::pid_t;
    // SAFETY: calls of the system that are allowed between fork and exec.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // It may be gone already.
            if libc::getppid() != parent {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            Ok(())
        });
    }
}

fn exit_code(status: ExitStatus, findings: bool, no_profile: bool) -> u8 {
    let code = match (status.code(), status.signal()) {
        (Some(code), _) => code as u8,
        (None, Some(signal)) => 128 | signal as u8,
        (None, None) => NOT_SET_UP,
    };
    match code {
        0 if findings => FINDINGS,
        0 if no_profile => {
            eprintln!("softcuda: the program ended without its profile being written");
            NO_PROFILE
        }
        code => code,
    }
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
        assert_eq!(exit_code(exited(0), false, false), 0);
        assert_eq!(exit_code(exited(0), true, true), FINDINGS);
        assert_eq!(exit_code(exited(0), false, true), NO_PROFILE);
        assert_eq!(exit_code(exited(3), true, true), 3);
        assert_eq!(exit_code(ExitStatus::from_raw(libc::SIGSEGV), false, false), 139);
    }
}
