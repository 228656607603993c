//! Profiles of launches: when they are taken, and where they go.
//!
//! `SOFTCUDA_PROFILE=FILE` profiles the whole process and writes `FILE.txt`, `FILE.json` and `FILE.html` when it ends, and
//! the text to standard error; an ending `.json`, `.html` or `.txt` of FILE is dropped first. A process that is killed, or
//! ends by `_exit`, writes nothing. `SOFTCUDA_REGISTERS=FILE` reads registers from the output of `ptxas -v`.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use super::control::give;
use super::function::Function;
use super::{driver, lock};
use crate::device::{Description, SettingError, occupancy};
use crate::exec::{Config, Counters, Launch};
use crate::profile::{Collector, Hierarchy, Launched, RegisterSource, Registers, TrafficWatch, parse_registers};

static ON: AtomicBool = AtomicBool::new(false);
static COLLECTOR: Mutex<Option<Collector>> = Mutex::new(None);
static REGISTERS: Mutex<BTreeMap<String, u32>> = Mutex::new(BTreeMap::new());
/// Where the profile of the whole process goes.
static FILE: OnceLock<PathBuf> = OnceLock::new();

/// Takes `SOFTCUDA_PROFILE` and `SOFTCUDA_REGISTERS`.
pub(super) fn read_environment(device: &Description) -> Result<(), SettingError> {
    let read = |variable| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(path) = read("SOFTCUDA_REGISTERS") {
        let text = std::fs::read_to_string(&path).map_err(|error| SettingError {
            variable: "SOFTCUDA_REGISTERS",
            expected: "a file with the output of `ptxas -v`",
            found: format!("{} ({error})", path.display()),
        })?;
        lock(&REGISTERS).extend(parse_registers(&text));
    }
    if let Some(path) = read("SOFTCUDA_PROFILE") {
        let stem = match path.extension().and_then(|extension| extension.to_str()) {
            Some("json" | "html" | "txt") => path.with_extension(""),
            _ => path,
        };
        // What cannot be written at the end is better known at the start.
        let file = with_ending(&stem, "json");
        std::fs::File::create(&file).map_err(|error| SettingError {
            variable: "SOFTCUDA_PROFILE",
            expected: "a file that can be written",
            found: format!("{} ({error})", file.display()),
        })?;
        if FILE.set(stem).is_ok() {
            *lock(&COLLECTOR) = Some(Collector::new(*device));
            ON.store(true, Ordering::Relaxed);
            // SAFETY: the library is never unloaded, and the function takes no arguments.
            unsafe { libc::atexit(at_exit) };
        }
    }
    Ok(())
}

fn with_ending(stem: &Path, ending: &str) -> PathBuf {
    let mut path = stem.as_os_str().to_owned();
    path.push(".");
    path.push(ending);
    path.into()
}

extern "C" fn at_exit() {
    let Some(stem) = FILE.get() else { return };
    if let Err(error) = write(stem, true) {
        eprintln!("softcuda: the profile cannot be written: {error}");
    }
}

/// Writes what has been collected in all three forms.
fn write(stem: &Path, print: bool) -> std::io::Result<()> {
    let Some(profile) = lock(&COLLECTOR).as_ref().map(Collector::profile) else { return Ok(()) };
    let text = profile.to_text();
    let (txt, json, html) = (with_ending(stem, "txt"), with_ending(stem, "json"), with_ending(stem, "html"));
    std::fs::write(&txt, &text)?;
    std::fs::write(&json, profile.to_json())?;
    std::fs::write(&html, profile.to_html())?;
    if print {
        eprint!("{text}");
        eprintln!("softcuda: profile in {}, {} and {}", txt.display(), json.display(), html.display());
    }
    Ok(())
}

/// Registers of a kernel as recorded from `ptxas`.
pub(super) fn recorded_registers(kernel: &str) -> Option<u32> {
    lock(&REGISTERS).get(kernel).copied()
}

/// Has a launch recorded, if launches are profiled.
pub(super) fn begin(
    config: &mut Config,
    device: &Description,
    function: &Function,
    threads: u32,
    dynamic_shared: u32,
) -> Option<Arc<TrafficWatch>> {
    if !ON.load(Ordering::Relaxed) {
        return None;
    }
    let shared = u64::from(function.kernel.static_shared_bytes) + u64::from(dynamic_shared);
    let resident = occupancy(device, function.registers(), threads, shared).blocks;
    let reserved = u64::from(crate::device::SHARED_RESERVED);
    let watch = TrafficWatch::new(Hierarchy::new(device, resident, shared + reserved));
    config.count = true;
    config.watches.push(watch.clone());
    Some(watch)
}

/// Takes in a launch that has ended.
pub(super) fn end(watch: &TrafficWatch, function: &Function, launch: &Launch, counters: &Counters) {
    let kernel = &function.kernel;
    let source =
        if recorded_registers(&kernel.name).is_some() { RegisterSource::Ptxas } else { RegisterSource::Estimate };
    let launched = Launched {
        kernel: &kernel.name,
        grid: launch.grid,
        block: launch.block,
        cluster: launch.cluster,
        static_shared_bytes: kernel.static_shared_bytes,
        dynamic_shared_bytes: launch.dynamic_shared_bytes,
        registers: Registers { count: function.registers(), source },
        lines: &kernel.lines,
        counters,
        traffic: watch.finish(),
    };
    if let Some(collector) = lock(&COLLECTOR).as_mut() {
        collector.add(&launched);
    }
}

/// Starts a profile, empty, of all launches from now on; or stops it. What was collected stays until the next start.
#[unsafe(no_mangle)]
pub extern "C" fn softcuda_set_profiling(on: bool) {
    if on {
        // Before `cuInit` the device is what the environment says it will be.
        let device = driver().map(|driver| driver.devices[0]).ok().or_else(|| Description::from_environment().ok());
        *lock(&COLLECTOR) = device.map(Collector::new);
    }
    ON.store(on, Ordering::Relaxed);
}

/// What has been collected, as JSON; empty if nothing was started. Returns its length.
///
/// # Safety
/// `to` is null or has room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softcuda_profile(to: *mut c_char, len: usize) -> usize {
    let json = lock(&COLLECTOR).as_ref().map_or(String::new(), |collector| collector.profile().to_json());
    unsafe { give(&json, to, len) }
}

/// Records registers from the output of `ptxas -v`, or lines of a kernel's name and a number.
///
/// # Safety
/// `text` is NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softcuda_record_registers(text: *const c_char) {
    if !text.is_null() {
        // SAFETY: passed on to the caller.
        let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
        lock(&REGISTERS).extend(parse_registers(&text));
    }
}
