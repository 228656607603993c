//! Profiles of launches: when they are taken, and where they go.
//!
//! `SOFTCUDA_PROFILE=FILE` profiles the whole process and writes `FILE.txt`, `FILE.json` and `FILE.html` when it ends, and
//! the text to standard error; an ending `.json`, `.html` or `.txt` of FILE is dropped first. The files appear whole or not at
//! all: a process that is killed, or ends by `_exit`, writes nothing, and what earlier ones hold stays.
//! `SOFTCUDA_PROFILE_CACHES=cold|warm|carried` says what L2 holds when a launch begins ([`Caches`]). `SOFTCUDA_REGISTERS=FILE` reads
//! registers from the output of `ptxas -v`.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use super::control::give;
use super::function::Function;
use super::{lock, tally};
use crate::device::{Description, SettingError, occupancy};
use crate::exec::{Config, Counters, Launch};
use crate::profile::{
    Caches, CarriedCaches, Collector, Hierarchy, Launched, RegisterSource, Registers, Start, TrafficWatch,
    parse_registers,
};

/// Who wants launches profiled: bits of [`PROCESS`] and [`SECTION`].
static ON: AtomicU8 = AtomicU8::new(0);
/// The whole process, for `SOFTCUDA_PROFILE`.
const PROCESS: usize = 0;
/// What [`softcuda_set_profiling`] started.
const SECTION: usize = 1;
static COLLECTORS: [Mutex<Option<Collector>>; 2] = [const { Mutex::new(None) }; 2];
static REGISTERS: Mutex<BTreeMap<String, u32>> = Mutex::new(BTreeMap::new());
/// What L2 holds when a launch begins.
static CACHES: Mutex<Caches> = Mutex::new(Caches::Cold);
/// L2 of each device, by the address of its description.
static CARRIED: Mutex<BTreeMap<usize, CarriedCaches>> = Mutex::new(BTreeMap::new());
/// Where the profile of the whole process goes.
static FILE: OnceLock<PathBuf> = OnceLock::new();

/// Takes `SOFTCUDA_PROFILE`, `SOFTCUDA_PROFILE_CACHES` and `SOFTCUDA_REGISTERS`.
pub(super) fn read_environment() -> Result<(), SettingError> {
    let read = |variable| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(path) = read("SOFTCUDA_REGISTERS") {
        let text = std::fs::read_to_string(&path).map_err(|error| SettingError {
            variable: "SOFTCUDA_REGISTERS",
            expected: "a file with the output of `ptxas -v`",
            found: format!("{} ({error})", path.display()),
        })?;
        lock(&REGISTERS).extend(parse_registers(&text));
    }
    if let Some(name) = std::env::var_os("SOFTCUDA_PROFILE_CACHES").filter(|value| !value.is_empty()) {
        let name = name.to_string_lossy();
        *lock(&CACHES) = Caches::parse(&name).ok_or_else(|| SettingError {
            variable: "SOFTCUDA_PROFILE_CACHES",
            expected: "`cold`, `warm` or `carried`",
            found: name.clone().into_owned(),
        })?;
    }
    if let Some(path) = read("SOFTCUDA_PROFILE") {
        let stem = match path.extension().and_then(|extension| extension.to_str()) {
            Some("json" | "html" | "txt") => path.with_extension(""),
            _ => path,
        };
        // What cannot be written at the end is better known at the start.
        let mut file = stem.as_os_str().to_owned();
        file.push(".json");
        let file = PathBuf::from(file);
        crate::whole::probe(&file).map_err(|error| SettingError {
            variable: "SOFTCUDA_PROFILE",
            expected: "a file that can be written",
            found: format!("{} ({error})", file.display()),
        })?;
        if FILE.set(stem).is_ok() {
            *lock(&COLLECTORS[PROCESS]) = Some(Collector::default());
            ON.fetch_or(1 << PROCESS, Ordering::Relaxed);
            // SAFETY: the library is never unloaded, and the function takes no arguments.
            unsafe { libc::atexit(at_exit) };
            tally::add(tally::Place::ProfilesDue, 1);
        }
    }
    Ok(())
}

extern "C" fn at_exit() {
    // The profile is that of the parent, which writes it itself.
    if !super::life::is_forked() {
        super::guarded(write_profile);
    }
}

fn write_profile() {
    let (Some(stem), Some(collector)) = (FILE.get(), &*lock(&COLLECTORS[PROCESS])) else { return };
    let profile = collector.profile();
    let _ = std::io::stderr().write_all(profile.to_text().as_bytes());
    match profile.write(stem) {
        Ok([txt, json, html]) => {
            tally::add(tally::Place::ProfilesWritten, 1);
            super::say(format_args!("profile in {}, {} and {}", txt.display(), json.display(), html.display()));
        }
        Err(error) => super::say(format_args!("the profile cannot be written: {error}")),
    }
}

/// Registers of a kernel as recorded from `ptxas`.
pub(super) fn recorded_registers(kernel: &str) -> Option<u32> {
    lock(&REGISTERS).get(kernel).copied()
}

/// A launch that is being recorded.
pub(super) struct Recording {
    watch: Arc<TrafficWatch>,
    caches: Caches,
}

/// Has a launch recorded, if launches are profiled.
pub(super) fn begin(
    config: &mut Config,
    device: &'static Description,
    function: &Function,
    threads: u32,
    dynamic_shared: u32,
) -> Option<Recording> {
    if ON.load(Ordering::Relaxed) == 0 {
        return None;
    }
    let shared = u64::from(function.kernel.static_shared_bytes) + u64::from(dynamic_shared);
    let resident = occupancy(device, function.registers(), threads, shared).blocks;
    let reserved = u64::from(crate::device::SHARED_RESERVED);
    let caches = *lock(&CACHES);
    let start = match caches {
        Caches::Cold => Start::Cold,
        Caches::Warm => Start::Warm,
        Caches::Carried => {
            let key = std::ptr::from_ref(device) as usize;
            Start::Carried(lock(&CARRIED).entry(key).or_default().clone())
        }
    };
    let watch = TrafficWatch::starting(Hierarchy::new(device, resident, shared + reserved), start);
    config.count = true;
    config.watches.push(watch.clone());
    Some(Recording { watch, caches })
}

/// Takes in a launch that has ended.
pub(super) fn end(recording: &Recording, function: &Function, launch: &Launch, counters: &Counters) {
    let kernel = &function.kernel;
    let source =
        if recorded_registers(&kernel.name).is_some() { RegisterSource::Ptxas } else { RegisterSource::Estimate };
    let launched = Launched {
        device: function.device,
        kernel: &kernel.name,
        grid: launch.grid,
        block: launch.block,
        cluster: launch.cluster,
        static_shared_bytes: kernel.static_shared_bytes,
        dynamic_shared_bytes: launch.dynamic_shared_bytes,
        registers: Registers { count: function.registers(), source },
        lines: &kernel.lines,
        counters,
        traffic: recording.watch.finish(),
        caches: recording.caches,
    };
    let on = ON.load(Ordering::Relaxed);
    for (_, collector) in COLLECTORS.iter().enumerate().filter(|(bit, _)| on >> bit & 1 == 1) {
        if let Some(collector) = lock(collector).as_mut() {
            collector.add(&launched);
        }
    }
}

/// Starts a profile, empty, of all launches from now on; or stops it. What was collected stays until the next start.
#[unsafe(no_mangle)]
pub extern "C" fn softcuda_set_profiling(on: bool) {
    if on {
        *lock(&COLLECTORS[SECTION]) = Some(Collector::default());
        // A section's numbers do not depend on what was profiled before it, unless the process is profiled as a whole.
        if ON.load(Ordering::Relaxed) >> PROCESS & 1 == 0 {
            lock(&CARRIED).clear();
        }
        ON.fetch_or(1 << SECTION, Ordering::Relaxed);
    } else {
        ON.fetch_and(!(1 << SECTION), Ordering::Relaxed);
    }
}

/// Sets what L2 holds when a launch begins: a name of [`Caches`]. `false` if there is none such. Forgets what L2 has been carrying.
///
/// # Safety
/// `name` is NUL-terminated or null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softcuda_set_profile_caches(name: *const c_char) -> bool {
    if name.is_null() {
        return false;
    }
    // SAFETY: passed on to the caller.
    let Some(caches) = Caches::parse(&unsafe { CStr::from_ptr(name) }.to_string_lossy()) else { return false };
    *lock(&CACHES) = caches;
    lock(&CARRIED).clear();
    true
}

/// What has been collected since the latest start, as JSON; empty if there was none. Returns its length.
///
/// # Safety
/// `to` is null or has room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softcuda_profile(to: *mut c_char, len: usize) -> usize {
    let json = lock(&COLLECTORS[SECTION]).as_ref().map_or(String::new(), |collector| collector.profile().to_json());
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
