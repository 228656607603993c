//! The checkers that are on, and what the driver does to memory that they should know of.

use std::ffi::{CStr, c_char};
use std::fs::OpenOptions;
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::control::give;
use super::status::{CUresult, Outcome};
use super::{driver, lock};
use crate::check::{Checks, Selection};
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
        eprintln!("softcuda: {text}");
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

/// The driver wrote device memory.
pub(super) fn wrote(address: u64, bytes: u64) {
    if let Some(checks) = checks() {
        checks.host_wrote(address, bytes);
    }
}

/// The driver copied; either end may be the host's.
pub(super) fn copied(from: u64, to: u64, bytes: u64) {
    let (Some(checks), Ok(driver)) = (checks(), driver()) else { return };
    if driver.memory.contains(to) {
        if driver.memory.contains(from) {
            checks.copied(from, to, bytes);
        } else {
            checks.host_wrote(to, bytes);
        }
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
    let file = std::env::var_os("SOFTCUDA_FINDINGS").filter(|path| !path.is_empty());
    let mut file = file.and_then(|path| OpenOptions::new().create(true).append(true).open(path).ok());
    for finding in new {
        eprintln!("softcuda: {finding}");
        if let Some(file) = &mut file {
            let _ = writeln!(file, "{finding}");
        }
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
