//! What modelled times leave out, in words for every form of a profile.

use super::record::Profile;

/// Launches of less modelled time than this, in seconds, are told apart: starting and ending a launch alone takes a GPU some
/// microseconds.
pub const SHORT_SECONDS: f64 = 5e-6;

/// What is not modelled, and what it costs.
pub const LEFT_OUT: [(&str, &str); 6] = [
    (
        "Latency",
        "an instruction that needs the result of another waits for it: chains of dependent loads, the first tile of a pipeline, \
         reductions through shuffles. Here they cost only their throughput, as if other warps always filled the gap. Where few warps \
         are resident, or few loads are in flight for each, no unit comes near its bound.",
    ),
    (
        "Start and end of a launch",
        "some microseconds, and the time in which blocks fill their pipelines and the last ones run alone.",
    ),
    (
        "Waiting for others",
        "barriers, mbarriers, barriers of the grid, polling, and atomic operations that queue on one address.",
    ),
    (
        "Units that wait for one another",
        "the modelled time is that of the busiest unit, as if all others were hidden behind it.",
    ),
    (
        "Clocks",
        "those at which peaks are published. Under load a GPU lowers them: products of random data were measured to run at 88 % of \
         the tensor rate where zeros reach 96 %.",
    ),
    ("Machine code", "`ptxas` makes several instructions of some and none of others, and spills registers."),
];

/// The number of launches whose time is decided by what is left out, in a sentence.
pub fn short_launches(profile: &Profile) -> String {
    let short = profile.launches.iter().filter(|launch| launch.modelled_seconds < SHORT_SECONDS).count();
    let (all, micros) = (profile.launches.len(), SHORT_SECONDS * 1e6);
    format!(
        "{short} of {all} listed launches have a modelled time below {micros} µs: what is left out decides how long these take, \
         and the model says little about them."
    )
}
