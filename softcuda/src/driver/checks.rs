//! The checkers that are on, and what the driver does to memory that they should know of.

use std::ffi::{CStr, c_char};
use std::fs::OpenOptions;
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::control::give;
use super::status::{CUresult, Outcome};
use super::{driver, lock, order, tally};
use crate::check::{Checks, Operation, Selection};
use crate::exec::LaunchOrder;
use crate::exec::observe::Watch;
use crate::memory::{Allocation, AllocationWatch, Kind};

static CHECKS: RwLock<Option<Arc<Checks>>> = RwLock::new(None);
/// Findings that have been printed.
static PRINTED: AtomicUsize = AtomicUsize::new(0);

fn checks() -> Option<Arc<Checks>> {
    CHECKS.read().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Whether any checker is on.
pub(super) fn on() -> bool {
    CHECKS.read().unwrap_or_else(PoisonError::into_inner).is_some()
}

/// Takes `SOFTCUDA_CHECKS`.
pub(super) fn read_environment() -> Outcome {
    let names = std::env::var("SOFTCUDA_CHECKS").unwrap_or_default();
    switch(&names)
}

fn switch(names: &str) -> Outcome {
    let selection = Selection::parse(names).map_err(|word| {
        let text =
            format!("SOFTCUDA_CHECKS: `{word}` is no checker; there are memory, init, race, sync, async and all");
        super::say(&text);
        CUresult::ERROR_INVALID_VALUE.with(text)
    })?;
    let memory = &driver()?.memory;
    let new = if selection == Selection::NONE {
        None
    } else {
        let made = Checks::new(selection, memory.range());
        let failed = |e| CUresult::ERROR_OPERATING_SYSTEM.with(format!("no address space for the checkers: {e}"));
        Some(Arc::new(made.map_err(failed)?))
    };
    // What was allocated unseen counts as written.
    let watch = new.clone().map(|checks| Arc::new(Allocations(checks)) as Arc<dyn AllocationWatch>);
    let live = memory.watch(watch);
    if let Some(checks) = &new {
        live.iter().for_each(|a| checks.allocated(a.start, a.bytes(), true));
    }
    *CHECKS.write().unwrap_or_else(PoisonError::into_inner) = new;
    PRINTED.store(0, Ordering::Relaxed);
    Ok(())
}

struct Allocations(Arc<Checks>);

impl AllocationWatch for Allocations {
    fn allocated(&self, a: &Allocation) {
        // The host writes page-locked and managed memory, and the driver a module's variables, without a call.
        self.0.allocated(a.start, a.bytes(), !matches!(a.kind, Kind::Device | Kind::Heap));
    }
}

pub(super) fn watches() -> Vec<Arc<dyn Watch>> {
    checks().map_or_else(Vec::new, |checks| checks.watches())
}

/// The driver wrote a value that kernels may be polling.
pub(super) fn signalled(address: u64, bytes: u64) {
    if let Some(checks) = checks() {
        checks.host_wrote(address, bytes);
    }
}

/// The driver set device memory.
pub(super) fn set(address: u64, bytes: u64) {
    let Some(checks) = checks() else { return };
    checks.host_wrote(address, bytes);
    if let Some(order) = order::current()
        && checks.operation(&order, Operation::Set, address, bytes, true)
    {
        print_new();
    }
}

/// The driver copied; either end may be the host's, or a place of its own (0).
pub(super) fn copied(from: u64, to: u64, bytes: u64) {
    let (Some(checks), Ok(driver)) = (checks(), driver()) else { return };
    let [reads, writes] = [from, to].map(|address| driver.memory.contains(address));
    match (reads, writes) {
        (true, true) => checks.copied(from, to, bytes),
        (false, true) => checks.host_wrote(to, bytes),
        _ => {}
    }
    let Some(order) = order::current() else { return };
    let read = reads && checks.operation(&order, Operation::Copy, from, bytes, false);
    let written = writes && checks.operation(&order, Operation::Copy, to, bytes, true);
    if read || written {
        print_new();
    }
}

/// The driver is about to free an allocation, in a stream's order or in the host's.
pub(super) fn freed(address: u64, order: Option<Arc<LaunchOrder>>) {
    let (Some(checks), Ok(driver), Some(order)) = (checks(), driver(), order) else { return };
    if let Some(a) = driver.memory.find(address)
        && checks.operation(&order, Operation::Free, a.start, a.bytes(), true)
    {
        print_new();
    }
}

/// An allocation is about to be taken back from a context that is destroyed.
pub(super) fn leaked(address: u64) {
    let (Some(checks), Ok(driver)) = (checks(), driver()) else { return };
    if let Some(a) = driver.memory.find(address) {
        checks.leaked(a.start, a.bytes(), a.serial);
    }
    print_new();
}

/// Prints findings that have not been printed, on standard error and into the file that `SOFTCUDA_FINDINGS` names.
pub(super) fn print_new() {
    let Some(checks) = checks() else { return };
    static PRINTING: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one = lock(&PRINTING);
    let all = checks.findings().all();
    let done = PRINTED.swap(all.len(), Ordering::Relaxed);
    let Some(new) = all.get(done..).filter(|new| !new.is_empty()) else { return };
    tally::add(tally::Place::Findings, new.len());
    new.iter().for_each(super::say);
    let Some(path) = std::env::var_os("SOFTCUDA_FINDINGS").filter(|path| !path.is_empty()) else { return };
    // In one write: lines of several processes do not mix.
    let lines: String = new.iter().map(|finding| format!("{finding}\n")).collect();
    let file = OpenOptions::new().create(true).append(true).open(&path);
    if let Err(error) = file.and_then(|mut file| file.write_all(lines.as_bytes())) {
        let path = std::path::Path::new(&path).display();
        super::say(format_args!("SOFTCUDA_FINDINGS: {} findings are not in {path}: {error}", new.len()));
    }
}

/// Switches checkers on, by the names of `SOFTCUDA_CHECKS`; forgets what was found. Starts the device if need be.
///
/// # Safety
/// `names` is NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softcuda_set_checks(names: *const c_char) -> bool {
    // SAFETY: by the contract above.
    let names = unsafe { CStr::from_ptr(names) }.to_string_lossy();
    super::initialize().is_ok() && switch(&names).is_ok()
}

/// The findings, a line each. Returns the text's length.
///
/// # Safety
/// `to` is null or has room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softcuda_findings(to: *mut c_char, len: usize) -> usize {
    let all = checks().map_or_else(Vec::new, |checks| checks.findings().all());
    let text: String = all.iter().map(|finding| format!("{}\n", finding.to_string().replace('\n', " "))).collect();
    unsafe { give(&text, to, len) }
}
