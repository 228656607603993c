//! Runs lowered kernels: warps of 32 lanes executed together, blocks in parallel over the host's cores.

// A launch has one fault at most, and lane loops index several arrays at once.
#![allow(clippy::result_large_err, clippy::needless_range_loop)]

mod access;
mod access_x86;
mod atomic;
mod barrier;
mod bulk;
mod bulk_ops;
mod call;
mod cluster;
mod copies;
mod counters;
mod counting;
mod engine;
mod exchange;
mod fault;
mod groups;
mod heap;
mod interpreter;
mod lanes;
mod matrix;
mod mbarrier;
mod mbarrier_ops;
mod mma;
mod mma_x86;
pub(crate) mod numeric;
pub mod observe;
pub mod policy;
mod print;
mod reduce;
mod reporting;
mod rows;
mod scalar;
mod schedule;
mod specials;
mod start;
mod state;
mod tally;
mod tensor;
mod wgmma;

pub use counters::{Counters, LineCounters, MatrixOps, MemoryCounters, SharedCounters};
pub use fault::{Fault, FaultKind};
pub use heap::{DEFAULT_HEAP, Heap};
pub use interpreter::Isa;
pub use print::Output;

pub(crate) use schedule::fresh_grid;

pub use crate::lower::{InstructionClass, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW};

use crate::lower::Kernel;

/// The device's global memory as the executor sees it. A device address is the host address of the same byte.
pub trait GlobalMemory: Sync {
    /// Start and end of the live allocation that contains `addr`.
    fn find(&self, addr: u64) -> Option<(u64, u64)>;
    /// What there is to say about an address that no live allocation contains.
    fn describe(&self, addr: u64) -> String;
    /// A new allocation for the heap of a device's kernels; `None` where there is no memory.
    fn heap_block(&self, _device: u32, _bytes: u64) -> Option<u64> {
        None
    }
    /// Takes back what [`GlobalMemory::heap_block`] returned.
    fn release_heap_block(&self, _addr: u64) {}
}

/// What comes before a launch, as far as streams and events order it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LaunchOrder {
    pub stream: u64,
    /// Counted in the stream.
    pub position: u64,
    /// For each stream, up to which position its launches come before this one; of its own, this one included.
    pub known: std::collections::HashMap<u64, u64>,
    /// Of a programmatic dependent launch: up to which position its own stream's launches come before what it does ahead of
    /// `griddepcontrol.wait`.
    pub before_wait: Option<u64>,
}

impl LaunchOrder {
    /// Whether another launch comes before this one, or is the same.
    pub fn after(&self, other: &LaunchOrder) -> bool {
        self.known.get(&other.stream).is_some_and(|&position| position >= other.position)
    }

    /// Whether another launch comes before what this one does, by whether it has executed `griddepcontrol.wait`.
    pub fn after_when(&self, waited: bool, other: &LaunchOrder) -> bool {
        match self.before_wait.filter(|_| !waited && other.stream == self.stream) {
            Some(position) => other.position <= position,
            None => self.after(other),
        }
    }
}

/// How `mma` and `wgmma` add products in floating point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Products {
    /// One after another, each with one rounding to nearest.
    #[default]
    Fused,
    /// As studies of the hardware of the launch's compute capability say: aligned and truncated, see
    /// `exec/numeric/truncated.rs` for algorithm and sources. Many times slower.
    Truncated,
}

/// How to execute, apart from what the program says.
#[derive(Debug, Clone)]
pub struct Config {
    /// Chooses the order of warps, when a host thread turns from a block to another, the poison of shared memory and every other freedom
    /// the device has. 0: a block runs until it waits for another one.
    pub seed: u64,
    /// Host threads to run blocks on; 0 means one for each core.
    pub threads: usize,
    /// Streaming multiprocessors that the device reports (`%nsmid`).
    pub sm_count: u32,
    pub compute_capability: (u32, u32),
    /// Most blocks that one host thread keeps in flight at once. Cooperative launches keep all of theirs.
    pub max_resident_blocks: usize,
    /// The host's instructions to use; `None` for the best that it has.
    pub isa: Option<Isa>,
    pub products: Products,
    /// Fill [`Counters`]; slower.
    pub count: bool,
    /// Who sees what the launch does; slower.
    pub watches: Vec<std::sync::Arc<dyn observe::Watch>>,
    /// What comes before; `None` where launches are ordered as they were called.
    pub order: Option<std::sync::Arc<LaunchOrder>>,
    /// Stack of a thread in kernels whose calls may nest without bound, in bytes.
    pub stack_bytes: u32,
    /// Where `malloc` of device code allocates.
    pub heap: std::sync::Arc<Heap>,
    /// Where `vprintf` writes.
    pub output: Output,
    /// A launch that runs longer is a fault ([`FaultKind::LaunchTimeout`]).
    pub timeout: Option<std::time::Duration>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            seed: 0,
            threads: 0,
            sm_count: 108,
            compute_capability: (8, 0),
            max_resident_blocks: 64,
            isa: None,
            products: Products::default(),
            count: false,
            watches: Vec::new(),
            order: None,
            stack_bytes: 8 << 10,
            heap: std::sync::Arc::new(Heap::new(0, DEFAULT_HEAP)),
            output: Output::default(),
            timeout: None,
        }
    }
}

/// A kernel launch.
pub struct Launch<'a> {
    pub kernel: &'a Kernel,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Blocks per cluster; `[1, 1, 1]` without clusters.
    pub cluster: [u32; 3],
    pub dynamic_shared_bytes: u32,
    /// The parameter buffer, laid out as [`Kernel::params`] says.
    pub params: &'a [u8],
    /// All blocks must be able to wait for one another.
    pub cooperative: bool,
    pub memory: &'a dyn GlobalMemory,
    pub config: &'a Config,
}

/// Runs a kernel to its end.
///
/// # Errors
/// The first fault that any thread of the launch met; memory is then in an unspecified state, as on a GPU.
pub fn launch(l: &Launch) -> Result<Counters, Fault> {
    schedule::run(l)
}
