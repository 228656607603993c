//! One case in a process of its own.

use std::time::Duration;

use moe_kernels::registry;
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};

/// The case that the process runs.
pub const ALONE: &str = "MOE_CASE_ALONE";

/// After how many seconds of the processor the process is killed, if it is given.
pub const PROCESSOR_LIMIT: &str = "MOE_CASE_SECONDS";

/// The file that is told how many seconds of the processor the case took, if it is given and the case passed.
pub const PROCESSOR_TIME: &str = "MOE_CASE_TIME";

/// Runs the case `name` and panics where it fails.
pub fn run(name: &str) {
    if let Ok(seconds) = std::env::var(PROCESSOR_LIMIT) {
        let seconds =
            seconds.parse().unwrap_or_else(|_| panic!("{PROCESSOR_LIMIT}: expected seconds, got {seconds:?}"));
        let limit = Rlimit { current: Some(seconds), maximum: Some(seconds) };
        setrlimit(Resource::Cpu, limit).expect("a limit of the processor's time");
    }
    let kernel = registry::all().into_iter().find(|kernel| kernel.name() == name);
    super::check(kernel.unwrap_or_else(|| panic!("{ALONE}: no kernel is named {name:?}")));
    if let Some(file) = std::env::var_os(PROCESSOR_TIME) {
        let taken = Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).expect("a time that passed");
        std::fs::write(file, taken.as_secs_f64().to_string()).expect("a file for the time");
    }
}
