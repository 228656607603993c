//! Controls beyond CUDA's API: what tests and tools set and ask. [`crate::Control`] is their safe face.

use std::ffi::c_char;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::lock;
use crate::device::{Description, SettingError};
use crate::exec::{Config, Counters, Products};
use crate::report::{self, Report};

static SEED: AtomicU64 = AtomicU64::new(0);
static THREADS: AtomicU64 = AtomicU64::new(0);
/// Milliseconds, 0 for no limit.
static TIMEOUT: AtomicU64 = AtomicU64::new(0);
static LAUNCHES: AtomicU64 = AtomicU64::new(0);
static LOGGING: AtomicBool = AtomicBool::new(false);
static LOG: Mutex<String> = Mutex::new(String::new());
static COUNTING: AtomicBool = AtomicBool::new(false);
static COUNTERS: Mutex<Report> = Mutex::new(Report::new());
/// Whether work of streams is left to threads of theirs.
static CONCURRENT: AtomicBool = AtomicBool::new(false);
static EXECUTING: AtomicBool = AtomicBool::new(true);
static LAST_FAULT: Mutex<String> = Mutex::new(String::new());

/// Whether products are added as hardware does.
static TRUNCATED: AtomicBool = AtomicBool::new(false);

/// Takes `SOFTCUDA_SEED`, `SOFTCUDA_THREADS`, `SOFTCUDA_TIMEOUT_MS`, `SOFTCUDA_PRODUCTS` and `SOFTCUDA_STREAMS`.
pub(super) fn read_environment() -> Result<(), SettingError> {
    let settings = [("SOFTCUDA_SEED", &SEED), ("SOFTCUDA_THREADS", &THREADS), ("SOFTCUDA_TIMEOUT_MS", &TIMEOUT)];
    for (variable, setting) in settings {
        if let Some(found) = std::env::var(variable).ok().filter(|value| !value.is_empty()) {
            let Ok(value) = found.parse() else {
                return Err(SettingError { variable, expected: "a whole number", found });
            };
            setting.store(value, Ordering::Relaxed);
        }
    }
    let variable = "SOFTCUDA_PRODUCTS";
    match std::env::var(variable).unwrap_or_default().as_str() {
        "" | "fused" => {}
        "truncated" => TRUNCATED.store(true, Ordering::Relaxed),
        found => {
            let expected = "`fused` or `truncated`";
            return Err(SettingError { variable, expected, found: found.to_owned() });
        }
    }
    let variable = "SOFTCUDA_STREAMS";
    match std::env::var(variable).unwrap_or_default().as_str() {
        "" | "inline" => {}
        "concurrent" => CONCURRENT.store(true, Ordering::Relaxed),
        found => {
            let expected = "`inline` or `concurrent`";
            return Err(SettingError { variable, expected, found: found.to_owned() });
        }
    }
    Ok(())
}

pub(super) fn concurrent_streams() -> bool {
    CONCURRENT.load(Ordering::Relaxed)
}

pub(super) fn seed() -> u64 {
    SEED.load(Ordering::Relaxed)
}

pub(super) fn config(device: &Description) -> Config {
    let timeout = TIMEOUT.load(Ordering::Relaxed);
    Config {
        seed: seed(),
        threads: THREADS.load(Ordering::Relaxed) as usize,
        sm_count: device.sm_count,
        compute_capability: device.compute_capability,
        products: if TRUNCATED.load(Ordering::Relaxed) { Products::Truncated } else { Products::Fused },
        count: COUNTING.load(Ordering::Relaxed),
        watches: super::checks::watches(),
        order: super::order::current(),
        timeout: (timeout > 0).then(|| Duration::from_millis(timeout)),
        ..Config::default()
    }
}

pub(super) fn record_launch(line: impl FnOnce() -> String) {
    LAUNCHES.fetch_add(1, Ordering::Relaxed);
    if LOGGING.load(Ordering::Relaxed) {
        let mut log = lock(&LOG);
        log.push_str(&line());
        log.push('\n');
    }
}

/// Whether kernels run, rather than only be checked and counted.
pub(super) fn executes() -> bool {
    EXECUTING.load(Ordering::Relaxed)
}

pub(super) fn record_counters(kernel: &str, counters: &Counters) {
    if COUNTING.load(Ordering::Relaxed) {
        let mut report = lock(&COUNTERS);
        match report.get_mut(kernel) {
            Some(sum) => sum.add(counters),
            None => {
                report.insert(kernel.to_owned(), counters.clone());
            }
        }
    }
}

/// Keeps a fault's full text and prints it.
pub(super) fn record_fault(text: &str) {
    super::say(text);
    *lock(&LAST_FAULT) = text.to_owned();
}

/// Copies as much of `text` as fits, NUL-terminated, and returns its whole length in bytes without the NUL.
pub(super) unsafe fn give(text: &str, to: *mut c_char, len: usize) -> usize {
    if !to.is_null() && len > 0 {
        let fits = text.len().min(len - 1);
        // SAFETY: the caller's buffer has `len` bytes, of which `fits + 1` are written.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr(), to.cast(), fits);
            to.add(fits).write(0);
        }
    }
    text.len()
}

/// The crate's version, NUL-terminated: its presence tells this driver from NVIDIA's.
#[unsafe(no_mangle)]
pub extern "C" fn softcuda_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// Sets the seed of every order that the device is free to choose; 0 is the plain order.
#[unsafe(no_mangle)]
pub extern "C" fn softcuda_set_seed(seed: u64) {
    SEED.store(seed, Ordering::Relaxed);
}

/// Sets how many host threads run blocks; 0 for one a core.
#[unsafe(no_mangle)]
pub extern "C" fn softcuda_set_threads(threads: u64) {
    THREADS.store(threads, Ordering::Relaxed);
}

/// Sets after how many milliseconds a launch fails with `CUDA_ERROR_LAUNCH_TIMEOUT`; 0 for never.
#[unsafe(no_mangle)]
pub extern "C" fn softcuda_set_timeout_ms(milliseconds: u64) {
    TIMEOUT.store(milliseconds, Ordering::Relaxed);
}

/// Sets whether `mma` and `wgmma` add products as hardware does ([`Products::Truncated`]) or one by one.
#[unsafe(no_mangle)]
pub extern "C" fn softcuda_set_truncated_products(on: bool) {
    TRUNCATED.store(on, Ordering::Relaxed);
}

/// Kernels run since the process began, those of graphs included.
#[unsafe(no_mangle)]
pub extern "C" fn softcuda_launch_count() -> u64 {
    LAUNCHES.load(Ordering::Relaxed)
}

/// Starts an empty log of launches, or drops it.
#[unsafe(no_mangle)]
pub extern "C" fn softcuda_log_launches(on: bool) {
    LOGGING.store(on, Ordering::Relaxed);
    lock(&LOG).clear();
}

/// The log, one line a launch: name, grid, block and dynamic shared bytes, separated by tabs. Returns its length.
///
/// # Safety
/// `to` is null or has room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softcuda_launches(to: *mut c_char, len: usize) -> usize {
    unsafe { give(&lock(&LOG), to, len) }
}

/// Starts counting from zero, or stops and forgets.
#[unsafe(no_mangle)]
pub extern "C" fn softcuda_set_counting(on: bool) {
    COUNTING.store(on, Ordering::Relaxed);
    lock(&COUNTERS).clear();
}

/// The counters by kernel, as [`crate::report`] writes them. Returns the text's length.
///
/// # Safety
/// `to` is null or has room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softcuda_counters(to: *mut c_char, len: usize) -> usize {
    unsafe { give(&report::write(&lock(&COUNTERS)), to, len) }
}

/// Sets whether launches run their kernels. Without that they are checked, counted and logged, and memory stays as it is: an
/// infinitely fast device, for measuring what the host's side costs.
#[unsafe(no_mangle)]
pub extern "C" fn softcuda_set_executing(on: bool) {
    EXECUTING.store(on, Ordering::Relaxed);
}

/// The text of the latest fault of any kernel, empty if there was none. Returns its length.
///
/// # Safety
/// `to` is null or has room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softcuda_last_fault(to: *mut c_char, len: usize) -> usize {
    unsafe { give(&lock(&LAST_FAULT), to, len) }
}
