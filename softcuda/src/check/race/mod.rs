//! Races: two accesses to the same byte, at least one of them a write, that nothing orders and that are not morally strong
//! together (PTX ISA 8.6 to 8.10). Shared and global memory, across lanes, warps, blocks and clusters.
//!
//! After FastTrack (Flanagan and Freund, 2009): a shadow remembers the last write of each byte and some of the reads after it,
//! with the time at which they happened; every warp keeps up to which time it knows every other warp's accesses.
//! It is raised by
//! - `bar`, `barrier`: those who leave know what those who arrived knew. `bar.arrive` does not learn.
//! - `bar.warp.sync`, among its lanes. `shfl`, `vote`, `match`, `redux`, `elect` do **not** order memory, nor does it that lanes
//!   happen to execute together: lanes of a warp that exchange data through memory need `bar.warp.sync`.
//! - release and acquire patterns: a release, or a fence and then a strong write, and a strong read of that place that is an
//!   acquire or is followed by a fence. Scopes must include each other's threads: a release of scope `.cta` says nothing to
//!   other blocks, and atomic accesses of scope `.cta` by two blocks race.
//! - `cp.async` writes twice: when it is issued, against what others did before, and for its thread when that waits for it.
//! - mbarrier objects: who waits for a phase knows what those who arrived in it, or before, with release semantics knew, and what
//!   bulk copies that completed transactions of it have written. Initialising an object is a write, using it an atomic access.
//! - `cp.async.bulk.wait_group`: the thread's warp knows what bulk copies have read and written so far.
//! - `barrier.cluster`, unless the arrival is relaxed.
//! - `wgmma` reads at any time from its issue to the end of a wait for it by a warp of its warpgroup.
//! - copies, sets and releases of memory in streams are accesses too, by an operation of its own that is ordered as a launch is.
//! - `griddepcontrol.wait`, in a programmatic dependent launch: before it the launch in front in the stream may still run, and what
//!   that one writes or reads is not ordered before. Launches further in front are.
//! - the order of launches: by their streams, by events that a stream or the host waits for, and by the legacy stream. Where
//!   the order is not told ([`Config::order`](crate::exec::Config::order)), launches are ordered as they were called.
//!
//! Several lanes of one store that write the same value to one place, and a write that leaves the bytes as they are, are
//! benign and not reported.
//!
//! Not seen:
//! - a race that did not come near: the two accesses have to happen in this execution, though in any order.
//! - Fences, releases and acquires count for the whole warp though one lane may have executed them, so that a
//!   `bar.warp.sync` that is missing before or after them is not missed.
//! - A launch that lets its dependents begin before it has waited for its own predecessors: their order is taken to be kept. Which
//!   lane of a warp executed `griddepcontrol.wait`, and whether before or after its block's barrier. Launches inside a graph.
//! - Which write a strong read takes its value from is not known: it acquires all that was released at that place before. A
//!   release that this read did not see hides a race that another seed may show.
//! - The fence of a thread counts for those that a barrier orders after it, as in the idiom by which all threads fence and one
//!   of them then speaks for the block; the manual asks for a fence by the thread that speaks.
//! - Two `fence.sc` with no access to a common place between them do not order anything here, as `fence.acq_rel` does not.
//! - The scope of an acquiring wait at an mbarrier. Compiled kernels wait for the cluster's other blocks without one, which is `.cta` (PTX ISA,
//!   `mbarrier.try_wait`) and by the model too narrow.
//! - Of the readers since the last write, three are remembered for shared memory and two for global memory.
//! - With more than about 60 blocks that synchronise through one place, knowledge is coarsened: see [`clock`].
//! - Accesses by the host, and values that streams write and wait for. Launches that run beside one another and synchronise
//!   through memory: what orders them is not seen, so that such a program is reported though it may be correct. Of launches that
//!   nothing orders, a read of each of 16 is remembered for the same bytes, and all is forgotten some thousand launches later.
//! - Strong accesses of different sizes that overlap, which the manual does not call morally strong, count as such.

mod cell;
mod clock;
mod global;
mod home;
mod launches;
mod observer;
mod operations;
mod report;
mod variable;

use std::sync::Arc;

pub use launches::Operation;

use super::Findings;
use crate::exec::Launch;
use crate::exec::observe::{Observer, Watch};

/// The lanes of a mask, in order.
fn lanes_of(mask: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |i| mask >> i & 1 != 0)
}

/// The checker.
#[derive(Debug)]
pub struct Race {
    findings: Arc<Findings>,
    global: global::Global,
    variables: variable::Variables,
    launches: launches::Launches,
}

impl Race {
    pub fn new(findings: Arc<Findings>) -> Race {
        Race {
            findings,
            global: global::Global::default(),
            variables: variable::Variables::default(),
            launches: launches::Launches::default(),
        }
    }

    /// Nobody has touched an allocation that is new.
    pub fn allocated(&self, address: u64, bytes: u64) {
        self.global.forget(address, bytes);
    }
}

impl Watch for Race {
    fn begin(&self, launch: &Launch, grid: u64) {
        self.launches.begin(cell::launch_number(grid), launch);
    }

    fn end(&self, _launch: &Launch, grid: u64) {
        self.variables.forget(grid);
    }

    fn observer<'a>(&'a self, launch: &'a Launch<'a>, grid: u64) -> Option<Box<dyn Observer + 'a>> {
        Some(Box::new(observer::RaceObserver::new(self, launch, grid)))
    }
}
