//! The CUDA driver API (`cu*`, C calling convention) over the software device.
//!
//! Work runs to its end inside the call that enqueues it, in stream order: one of the schedules that CUDA allows, and left only
//! where work may have to wait for the host (`queue`). A fault of a kernel does not fail its launch; it puts the context in
//! error, and every later call on that context returns it, until the context is destroyed.
//!
//! Handles are numbers that are never dereferenced and never reused, so a stale or foreign one is an error rather than
//! undefined behaviour. What is not implemented returns `CUDA_ERROR_NOT_SUPPORTED`, with a line on standard error that names
//! it.
//!
//! `cuGetErrorString` appends what the driver knows beyond the code. Environment:
//! - `SOFTCUDA_DEVICE`, `SOFTCUDA_DEVICES`, `SOFTCUDA_MEMORY_MIB`: see [`crate::device`]
//! - `SOFTCUDA_SEED`, `SOFTCUDA_THREADS`, `SOFTCUDA_TIMEOUT_MS`: how kernels run
//! - `SOFTCUDA_PRODUCTS=truncated`: `mma` and `wgmma` add products as hardware does, see [`crate::exec::Products`]
//! - `SOFTCUDA_STREAMS=concurrent`: work of streams overlaps the host's and each other's
//! - `SOFTCUDA_CHECKS`: see [`crate::check`]
//! - `SOFTCUDA_FINDINGS`: a file that gets a line for each finding
//! - `SOFTCUDA_TALLY`: what `softcuda run` counts findings in, see `driver::tally`
//! - `SOFTCUDA_PROFILE`, `SOFTCUDA_PROFILE_CACHES`, `SOFTCUDA_REGISTERS`: see `driver::profile`
//! - `SOFTCUDA_LOG=1`: every failure on standard error
//! - `SOFTCUDA_PATCH`: a file of lines to replace in kernels

// The names and the safety contracts are those of the CUDA driver API reference.
#![allow(non_snake_case, clippy::missing_safety_doc, clippy::too_many_arguments)]

mod absent;
mod capture;
mod capture_info;
mod checks;
mod context;
mod control;
mod copy;
mod event;
mod export_table;
mod function;
mod globals;
mod graph;
mod graph_nodes;
mod handles;
mod init;
mod launch;
mod library;
mod life;
mod link;
mod managed;
mod memops;
mod memory;
mod module;
mod occupancy;
mod order;
mod patch;
mod peer;
mod per_thread;
mod pitched;
mod pool;
mod proc_address;
mod profile;
mod queue;
mod registered;
mod share;
mod status;
mod stream;
mod tally;
mod tensormap;
mod work;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use crate::device::{Description, SettingError};
use crate::memory::Memory;
use status::Outcome;

pub use status::CUresult;

/// The devices and their memory; made by `cuInit`.
struct Driver {
    /// By ordinal.
    devices: Vec<Description>,
    memory: Memory,
}

static DRIVER: OnceLock<Driver> = OnceLock::new();

/// Settings of the environment that hold before `cuInit`.
struct Settings {
    log: bool,
}

fn settings() -> &'static Settings {
    static SETTINGS: OnceLock<Settings> = OnceLock::new();
    SETTINGS.get_or_init(|| Settings { log: std::env::var("SOFTCUDA_LOG").is_ok_and(|value| value == "1") })
}

fn initialize() -> Outcome {
    static ONCE: Mutex<()> = Mutex::new(());
    let _one = lock(&ONCE);
    if DRIVER.get().is_some() {
        return Ok(());
    }
    let complain = |error: SettingError| {
        say(&error);
        CUresult::ERROR_INVALID_VALUE.with(error.to_string())
    };
    life::watch_forks();
    let devices = Description::all_from_environment().map_err(complain)?;
    control::read_environment().map_err(complain)?;
    let memory = Memory::of_devices(devices.iter().map(|device| device.memory_bytes).collect())
        .map_err(|error| CUresult::ERROR_OPERATING_SYSTEM.with(format!("no address space: {error}")))?;
    tally::read_environment().map_err(complain)?;
    profile::read_environment().map_err(complain)?;
    let _ = DRIVER.set(Driver { devices, memory });
    checks::read_environment()
}

fn driver() -> Outcome<&'static Driver> {
    DRIVER.get().ok_or_else(|| CUresult::ERROR_NOT_INITIALIZED.into())
}

impl Driver {
    /// The device of an ordinal.
    fn device(&self, ordinal: i32) -> Outcome<&Description> {
        usize::try_from(ordinal).ok().and_then(|place| self.devices.get(place)).ok_or_else(|| {
            let count = self.devices.len();
            let those =
                if count == 1 { "the only device is 0".to_owned() } else { format!("there are {count} devices") };
            CUresult::ERROR_INVALID_DEVICE.with(format!("{ordinal}: {those}"))
        })
    }
}

/// Every entry point's frame: turns the outcome into a code, and a panic, which must not cross into C, into an error.
fn api(function: &'static str, body: impl FnOnce() -> Outcome) -> CUresult {
    api_always(function, || life::check().and_then(|()| body()))
}

/// [`api`] for what needs no state of the driver: answered at a thread's end and in the child of a fork too.
fn api_always(function: &'static str, body: impl FnOnce() -> Outcome) -> CUresult {
    let outcome = guarded(body).unwrap_or_else(|| {
        say(format_args!("{function} failed for a reason of its own; please report this"));
        Err(CUresult::ERROR_UNKNOWN.with("internal error of softcuda"))
    });
    let Err(failure) = outcome else { return CUresult::SUCCESS };
    guarded(|| status::note(function, &failure));
    failure.code
}

/// Runs what C called; `None` if it panicked.
fn guarded<T>(body: impl FnOnce() -> T) -> Option<T> {
    // What a panic carries is leaked: dropping it could panic again.
    catch_unwind(AssertUnwindSafe(body)).map_err(std::mem::forget).ok()
}

/// Writes a line to standard error, which may be closed or full: that is no reason to panic.
fn say(text: impl std::fmt::Display) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "softcuda: {text}");
}

/// The error for something that CUDA has and this driver has not; never silent.
fn unsupported(what: impl std::fmt::Display) -> status::Failure {
    let text = format!("{what} is not implemented by softcuda");
    say(&text);
    CUresult::ERROR_NOT_SUPPORTED.with(text)
}

/// Writes a result through a pointer of the caller.
///
/// # Safety
/// `to` is null or valid for a write.
unsafe fn out<T>(to: *mut T, what: &str, value: T) -> Outcome {
    if to.is_null() {
        return Err(CUresult::ERROR_INVALID_VALUE.with(format!("`{what}` is null")));
    }
    // SAFETY: not null, and the caller vouches for the rest. C callers may pass addresses less aligned than Rust asks for.
    unsafe { to.write_unaligned(value) };
    Ok(())
}

/// Locks regardless of a panic elsewhere: state is changed in single steps.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
