//! The safe face of the controls that the loaded driver exports.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char};

use libloading::os::unix::Library;

use crate::exec::Counters;
use crate::profile::{Caches, Profile};
use crate::report;

/// Controls of the loaded software device, beyond CUDA's API. Obtained from [`crate::Installed::control`].
///
/// They act on the library that [`crate::install`] loaded, the one that CUDA calls go to, and on the whole process.
#[derive(Debug, Clone, Copy)]
pub struct Control {
    version: unsafe extern "C" fn() -> *const c_char,
    set_seed: unsafe extern "C" fn(u64),
    set_threads: unsafe extern "C" fn(u64),
    set_timeout_ms: unsafe extern "C" fn(u64),
    set_truncated_products: unsafe extern "C" fn(bool),
    launch_count: unsafe extern "C" fn() -> u64,
    log_launches: unsafe extern "C" fn(bool),
    launches: unsafe extern "C" fn(*mut c_char, usize) -> usize,
    set_counting: unsafe extern "C" fn(bool),
    counters: unsafe extern "C" fn(*mut c_char, usize) -> usize,
    set_executing: unsafe extern "C" fn(bool),
    set_profiling: unsafe extern "C" fn(bool),
    set_profile_caches: unsafe extern "C" fn(*const c_char) -> bool,
    profile: unsafe extern "C" fn(*mut c_char, usize) -> usize,
    record_registers: unsafe extern "C" fn(*const c_char),
    last_fault: unsafe extern "C" fn(*mut c_char, usize) -> usize,
    set_checks: unsafe extern "C" fn(*const c_char) -> bool,
    findings: unsafe extern "C" fn(*mut c_char, usize) -> usize,
}

/// One line of the launch log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchRecord {
    pub kernel: String,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads.
    pub block: [u32; 3],
    pub dynamic_shared_bytes: u32,
}

impl PartialEq for Control {
    fn eq(&self, other: &Self) -> bool {
        self.version as usize == other.version as usize
    }
}

impl Eq for Control {}

impl Control {
    pub(crate) fn from_library(library: &Library) -> Result<Control, libloading::Error> {
        // SAFETY: the functions of `driver::control`, with the signatures they have there.
        unsafe {
            Ok(Control {
                version: *library.get(b"softcuda_version\0")?,
                set_seed: *library.get(b"softcuda_set_seed\0")?,
                set_threads: *library.get(b"softcuda_set_threads\0")?,
                set_timeout_ms: *library.get(b"softcuda_set_timeout_ms\0")?,
                set_truncated_products: *library.get(b"softcuda_set_truncated_products\0")?,
                launch_count: *library.get(b"softcuda_launch_count\0")?,
                log_launches: *library.get(b"softcuda_log_launches\0")?,
                launches: *library.get(b"softcuda_launches\0")?,
                set_counting: *library.get(b"softcuda_set_counting\0")?,
                counters: *library.get(b"softcuda_counters\0")?,
                set_executing: *library.get(b"softcuda_set_executing\0")?,
                set_profiling: *library.get(b"softcuda_set_profiling\0")?,
                set_profile_caches: *library.get(b"softcuda_set_profile_caches\0")?,
                profile: *library.get(b"softcuda_profile\0")?,
                record_registers: *library.get(b"softcuda_record_registers\0")?,
                last_fault: *library.get(b"softcuda_last_fault\0")?,
                set_checks: *library.get(b"softcuda_set_checks\0")?,
                findings: *library.get(b"softcuda_findings\0")?,
            })
        }
    }

    /// Version of the loaded driver's crate.
    pub fn version(&self) -> String {
        // SAFETY: returns a static NUL-terminated text.
        unsafe { CStr::from_ptr((self.version)()) }.to_string_lossy().into_owned()
    }

    /// Sets the seed of every order that the device is free to choose: warps, blocks, nodes of graphs. 0 is the plain order.
    pub fn set_seed(&self, seed: u64) {
        // SAFETY: takes any value.
        unsafe { (self.set_seed)(seed) }
    }

    /// Sets how many host threads run a launch's blocks; 0 for one a core.
    pub fn set_threads(&self, threads: usize) {
        // SAFETY: takes any value.
        unsafe { (self.set_threads)(threads as u64) }
    }

    /// Switches checkers on, and forgets findings: names as [`crate::check::Selection::parse`] reads them. `false` if one is unknown.
    ///
    /// Memory that is allocated already counts as written.
    pub fn set_checks(&self, names: &str) -> bool {
        let Ok(names) = CString::new(names) else { return false };
        // SAFETY: a NUL-terminated text.
        unsafe { (self.set_checks)(names.as_ptr()) }
    }

    /// What the checkers have found since they were switched on, a line each.
    pub fn findings(&self) -> Vec<String> {
        read(self.findings).lines().map(str::to_owned).collect()
    }

    /// Sets after how many milliseconds a launch fails with `CUDA_ERROR_LAUNCH_TIMEOUT`; 0 for never.
    pub fn set_timeout_ms(&self, milliseconds: u64) {
        // SAFETY: takes any value.
        unsafe { (self.set_timeout_ms)(milliseconds) }
    }

    /// Kernels run since the process began, those of graphs included. Captured launches count when the graph runs.
    pub fn launch_count(&self) -> u64 {
        // SAFETY: no arguments.
        unsafe { (self.launch_count)() }
    }

    /// Starts an empty log of launches, or drops it.
    pub fn log_launches(&self, on: bool) {
        // SAFETY: takes any value.
        unsafe { (self.log_launches)(on) }
    }

    /// The launches since [`Control::log_launches`], in order.
    pub fn launches(&self) -> Vec<LaunchRecord> {
        read(self.launches).lines().filter_map(LaunchRecord::parse).collect()
    }

    /// Sets whether `mma` and `wgmma` add products as hardware does, aligned and truncated ([`crate::exec::Products`]), rather
    /// than one by one with one rounding each: what passes only thanks to good sums is seen then. Many times slower.
    pub fn set_truncated_products(&self, on: bool) {
        // SAFETY: takes any value.
        unsafe { (self.set_truncated_products)(on) }
    }

    /// Starts counting what kernels do, from zero, or stops and forgets. Kernels run slower while it is on.
    pub fn set_counting(&self, on: bool) {
        // SAFETY: takes any value.
        unsafe { (self.set_counting)(on) }
    }

    /// Counters since [`Control::set_counting`], by kernel name; several launches of a kernel are added up.
    pub fn counters(&self) -> BTreeMap<String, Counters> {
        report::read(&read(self.counters))
    }

    /// Starts an empty profile of every launch from now on, of the whole process: instructions, memory traffic through a
    /// model of the device's caches, and how long the device would need at least. Kernels run several times slower while it
    /// is on. Apart from a profile that `SOFTCUDA_PROFILE` asked for.
    pub fn start_profile(&self) {
        // SAFETY: takes any value.
        unsafe { (self.set_profiling)(true) }
    }

    /// Sets what the modelled L2 cache holds when a launch begins, from now on; cold at first. What it has been carrying is forgotten.
    pub fn set_profile_caches(&self, caches: Caches) {
        let name = CString::new(caches.name()).expect("names have no NUL");
        // SAFETY: the text is NUL-terminated. A driver of this version knows the name.
        unsafe { (self.set_profile_caches)(name.as_ptr()) };
    }

    /// Stops profiling and returns what was collected since [`Control::start_profile`]; `None` if that was never called.
    pub fn stop_profile(&self) -> Option<Profile> {
        // SAFETY: takes any value.
        unsafe { (self.set_profiling)(false) };
        // The versions of driver and program are the same, so the form is.
        Profile::from_json(&read(self.profile)).ok()
    }

    /// Profiles the launches that `section` makes. They must have been enqueued when it returns.
    ///
    /// # Panics
    /// The driver's profile cannot be read, which a driver of this version cannot cause.
    pub fn profiled<R>(&self, section: impl FnOnce() -> R) -> (R, Profile) {
        self.start_profile();
        let result = section();
        (result, self.stop_profile().expect("a profile was started"))
    }

    /// Records how many registers `ptxas` gave kernels, from what `ptxas -v` prints, or from lines of a kernel's name and a
    /// number; used for occupancy instead of an estimate. A text with a NUL byte in it is cut there.
    pub fn record_registers(&self, text: &str) {
        let text: Vec<u8> = text.bytes().take_while(|&byte| byte != 0).chain([0]).collect();
        // SAFETY: the text is NUL-terminated.
        unsafe { (self.record_registers)(text.as_ptr().cast()) }
    }

    /// Sets whether launches run their kernels (they do at first). Without that they are checked, counted and logged, and
    /// memory stays as it is: a device that takes no time, for measuring what the host's side costs.
    pub fn set_executing(&self, on: bool) {
        // SAFETY: takes any value.
        unsafe { (self.set_executing)(on) }
    }

    /// Kernel, PTX line, thread and address of the latest fault of any kernel; `None` if there was none.
    pub fn last_fault(&self) -> Option<String> {
        Some(read(self.last_fault)).filter(|text| !text.is_empty())
    }
}

/// Reads a text whose length can change between asking for it and copying it.
fn read(from: unsafe extern "C" fn(*mut c_char, usize) -> usize) -> String {
    let mut buffer: Vec<u8> = Vec::new();
    loop {
        // SAFETY: the buffer has the length given.
        let len = unsafe { from(buffer.as_mut_ptr().cast(), buffer.len()) };
        if len < buffer.len() {
            buffer.truncate(len);
            return String::from_utf8_lossy(&buffer).into_owned();
        }
        buffer.resize(len + 1, 0);
    }
}

impl LaunchRecord {
    fn parse(line: &str) -> Option<LaunchRecord> {
        let mut fields = line.split('\t');
        let kernel = fields.next()?.to_owned();
        let mut extents = || {
            let mut numbers = fields.next()?.trim_matches(['[', ']']).split(", ").map(str::parse);
            Some([numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?])
        };
        let (grid, block) = (extents()?, extents()?);
        Some(LaunchRecord { kernel, grid, block, dynamic_shared_bytes: fields.next()?.parse().ok()? })
    }
}
