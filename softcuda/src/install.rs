//! Finding and loading the driver, so that `dlopen` of `libcuda.so` and of `libcuda.so.1` in this process mean it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW};

use crate::control::Control;

/// File name of this crate's dynamic library.
const FILE: &str = "libsoftcuda.so";

/// Names under which programs load the CUDA driver; the driver calls itself by the first.
const NAMES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// Where cargo puts dynamic libraries of the build that compiled this; for doctests, whose executables lie elsewhere.
const BUILD_OUT_DIR: &str = env!("OUT_DIR");

/// The software device, loaded as this process's CUDA driver. It stays loaded for the life of the process.
#[derive(Debug, Clone)]
pub struct Installed {
    path: PathBuf,
    control: Control,
}

impl Installed {
    /// The library that was loaded.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The loaded driver's controls.
    pub fn control(&self) -> &Control {
        &self.control
    }
}

/// Why the software device is not this process's CUDA driver.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum InstallError {
    #[error("the software device works on Linux only")]
    Platform,
    #[error("{FILE} is in none of: {}", list(.0))]
    NotFound(Vec<PathBuf>),
    #[error("cannot load {}: {reason}", .path.display())]
    Load { path: PathBuf, reason: String },
    #[error("{} is version {found}, this program was built with {expected}", .path.display())]
    Version { path: PathBuf, found: String, expected: &'static str },
    #[error("another CUDA driver was loaded first; install the software device before anything uses CUDA")]
    Occupied,
    #[error("MOE_DEVICE must be `soft`, `cuda` or unset, not `{0}`")]
    Choice(String),
    #[error("MOE_DEVICE=cuda, but there is no usable CUDA device: {0}")]
    NoDevice(String),
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Which driver this process uses, see [`install_if_no_gpu`].
#[derive(Debug, Clone)]
pub enum Choice {
    /// NVIDIA's driver, with at least one device.
    Cuda,
    /// The software device.
    Soft(Installed),
}

impl Choice {
    /// The software device's controls, `None` on a real driver.
    pub fn control(&self) -> Option<&Control> {
        match self {
            Choice::Cuda => None,
            Choice::Soft(installed) => Some(installed.control()),
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Choice::Cuda => "CUDA driver",
            Choice::Soft(_) => "softcuda, the software device",
        })
    }
}

/// Loads the software device and makes it this process's CUDA driver, once; later calls return the same.
///
/// Must come before the first use of CUDA: cudarc opens `libcuda.so` once and keeps what it got. The library is sought as
/// `$SOFTCUDA_LIBRARY`, then as `libsoftcuda.so` in `deps/` below the executable's folder, in that folder, in the same two
/// places of its parent, and in the `deps/` of the build that compiled this crate.
///
/// # Errors
/// No library, one that does not load or is of another version, or a real driver that was loaded before.
pub fn install() -> Result<Installed, InstallError> {
    install_as(&NAMES)
}

static INSTALLED: Mutex<Option<Installed>> = Mutex::new(None);

/// [`install`], by names that must not be another driver's.
fn install_as(names: &[&str]) -> Result<Installed, InstallError> {
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(done) = &*installed {
        return Ok(done.clone());
    }
    let new = load(library()?, names)?;
    Ok(installed.insert(new).clone())
}

/// The driver's file, sought as [`install`] says.
///
/// # Errors
/// There is none, or the platform has none.
pub fn library() -> Result<PathBuf, InstallError> {
    if !cfg!(target_os = "linux") {
        return Err(InstallError::Platform);
    }
    let candidates = candidates();
    candidates.iter().find(|path| path.is_file()).cloned().ok_or(InstallError::NotFound(candidates))
}

fn candidates() -> Vec<PathBuf> {
    if let Some(path) = std::env::var_os("SOFTCUDA_LIBRARY").filter(|path| !path.is_empty()) {
        return vec![path.into()];
    }
    let executable = std::env::current_exe().unwrap_or_default();
    let folders = executable.ancestors().skip(1).take(2).filter(|folder| !folder.as_os_str().is_empty());
    // `deps/` first: the copy beside it is only refreshed when the library itself was asked for.
    let mut candidates: Vec<PathBuf> =
        folders.flat_map(|folder| [folder.join("deps").join(FILE), folder.join(FILE)]).collect();
    if let Some(profile) = Path::new(BUILD_OUT_DIR).ancestors().nth(3) {
        candidates.push(profile.join("deps").join(FILE));
    }
    candidates
}

fn load(path: PathBuf, names: &[&str]) -> Result<Installed, InstallError> {
    let failed = |error: libloading::Error| InstallError::Load { path: path.clone(), reason: error.to_string() };
    // SAFETY: the library's initialisers only set up Rust's runtime.
    let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) }.map_err(failed)?;
    let control = Control::from_library(&library).map_err(failed)?;
    let expected = env!("CARGO_PKG_VERSION");
    let found = control.version();
    if found != expected {
        return Err(InstallError::Version { path, found, expected });
    }
    // Never unloaded: callers keep its functions for ever.
    std::mem::forget(library);
    // What everyone else gets must be this library, by each of its names. Only what is loaded is asked for: by looking for a file,
    // a real driver could be found.
    // SAFETY: nothing is loaded by this.
    let loaded = |name: &str| unsafe { Library::open(Some(name), RTLD_NOW | RTLD_LOCAL | libc::RTLD_NOLOAD) };
    #[cfg(target_os = "linux")]
    for name in NAMES {
        if loaded(name).is_err() {
            let failed = |error: std::io::Error| InstallError::Load { path: path.clone(), reason: error.to_string() };
            crate::alias::load(name, &path).map_err(failed)?;
        }
    }
    let is_ours =
        |name: &&str| loaded(name).is_ok_and(|seen| Control::from_library(&seen).is_ok_and(|same| same == control));
    if names.iter().all(is_ours) { Ok(Installed { path, control }) } else { Err(InstallError::Occupied) }
}

/// Uses NVIDIA's driver where one loads and has a device, else installs the software device.
///
/// `MOE_DEVICE=soft` always installs it, `MOE_DEVICE=cuda` never. Like [`install`], this must come before the first use of
/// CUDA.
///
/// # Errors
/// `MOE_DEVICE` has another value, or asks for a GPU that is not there; and all of [`install`]'s.
pub fn install_if_no_gpu() -> Result<Choice, InstallError> {
    let choice = std::env::var("MOE_DEVICE").unwrap_or_default();
    match choice.as_str() {
        "soft" => install().map(Choice::Soft),
        "cuda" => probe().map(|()| Choice::Cuda).map_err(InstallError::NoDevice),
        // What is installed answers to the name that the probe would ask for.
        "" if INSTALLED.lock().unwrap_or_else(PoisonError::into_inner).is_some() => install().map(Choice::Soft),
        "" => match probe() {
            Ok(()) => Ok(Choice::Cuda),
            // A driver that proved useless may stay loaded by the name that it was asked for by.
            Err(_) => install_as(&["libcuda.so"]).map(Choice::Soft),
        },
        _ => Err(InstallError::Choice(choice)),
    }
}

/// Whether a real driver has a device; else why not.
fn probe() -> Result<(), String> {
    type Init = unsafe extern "C" fn(u32) -> u32;
    type Count = unsafe extern "C" fn(*mut i32) -> u32;
    // By this name and no other: a driver that turns out to be useless must not be what `libcuda.so` means afterwards.
    // SAFETY: NVIDIA's library is made to be loaded so.
    let library = unsafe { Library::open(Some("libcuda.so.1"), RTLD_NOW | RTLD_LOCAL) }.map_err(|e| e.to_string())?;
    // SAFETY: the signatures of the CUDA driver API.
    let (init, count) = unsafe {
        let init = *library.get::<Init>(b"cuInit\0").map_err(|e| e.to_string())?;
        let count = *library.get::<Count>(b"cuDeviceGetCount\0").map_err(|e| e.to_string())?;
        (init, count)
    };
    // SAFETY: as above.
    let status = unsafe { init(0) };
    if status != 0 {
        return Err(format!("cuInit returned {status}"));
    }
    let mut devices = 0;
    // SAFETY: as above.
    let status = unsafe { count(&mut devices) };
    if status != 0 || devices < 1 {
        return Err(format!("cuDeviceGetCount returned {status}, {devices} devices"));
    }
    // It will be used: unloading it in between would only cost time.
    std::mem::forget(library);
    Ok(())
}
