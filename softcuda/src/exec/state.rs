//! What a launch is made of while it runs: warps with their groups of lanes, blocks with their barriers, clusters of blocks.

use std::collections::VecDeque;

use super::call::Calls;
use super::cluster::ClusterState;
use super::copies::Copies;
use super::fault::{Fault, FaultKind};
use super::lanes::{Buffer, File};
use super::observe::Observer;
use super::policy::Policy;
use super::print::Printed;
use super::tally::Tally;
use super::{Config, GlobalMemory};
use crate::lower::Kernel;
use crate::lower::ir::Body;

/// Lanes of a warp that stand at the same operation.
#[derive(Debug, Clone, Copy)]
pub struct Group {
    pub pc: u32,
    pub mask: u32,
    pub state: GroupState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupState {
    Ready,
    /// At an instruction that other lanes of the warp must reach first.
    AtSync,
    AtBarrier(u8),
    AtClusterBarrier,
    /// At a `try_wait` whose phase is not complete.
    AtMbarrier,
    /// At a wait for products that its warpgroup has yet to issue.
    AtProduct,
    /// At a `setmaxnreg` for which the block has too few registers left.
    AtRegisters,
}

#[derive(Debug)]
pub struct Warp {
    pub file: Buffer,
    pub predicates: Vec<u32>,
    /// The group being run is `groups[current]`.
    pub groups: Vec<Group>,
    pub current: usize,
    /// Index in the block.
    pub index: u32,
    /// Lanes that have a thread.
    pub present: u32,
    pub exited: u32,
    pub local: Buffer,
    pub copies: Copies,
    pub wgmma: super::wgmma::Queue,
    pub registers: super::wgmma::Share,
    /// Lanes that arrived at the cluster's barrier and have not waited since, and the parity of the phase they arrived in.
    pub cluster_arrived: u32,
    pub cluster_parity: u32,
    pub calls: Calls,
    /// Lanes whose `try_wait` has reached its time limit.
    pub poll_expired: u32,
    /// The last slice ended in a poll that found nothing, at the operation `poll`.
    pub polled: bool,
    pub poll: u32,
    /// Bulk groups committed so far by each lane.
    pub bulk_committed: [u32; 32],
    /// The last slice ran out while lanes were apart: the next one runs another group, whatever its place.
    pub rotate: bool,
    /// The group chosen so keeps running to the end of the slice.
    pub pinned: bool,
    pub turn: usize,
    /// Of the accesses that are being reported.
    pub policy: Policy,
}

impl Warp {
    pub fn live(&self) -> u32 {
        self.present & !self.exited
    }

    pub fn finished(&self) -> bool {
        self.live() == 0
    }

    /// Some lanes could go on.
    pub fn runnable(&self) -> bool {
        self.groups.iter().any(|g| g.state == GroupState::Ready)
    }
}

/// One of a block's 16 barriers, in its current phase.
#[derive(Debug, Clone, Copy, Default)]
pub struct Barrier {
    /// Threads expected; `None` for all that have not exited.
    pub expected: Option<u32>,
    pub in_use: bool,
    /// Arrivals as counted against `expected`: aligned ones count whole warps.
    pub arrived: u32,
    /// Lanes that arrived.
    pub lanes: u32,
    pub sum: u32,
    pub and: bool,
    pub or: bool,
}

/// A block's state that its warps share.
#[derive(Debug)]
pub struct Shared {
    pub block: [u32; 3],
    /// Position in launch order.
    pub linear: u64,
    /// Rank in the cluster.
    pub rank: u32,
    pub memory: Buffer,
    /// Bytes of shared memory that the block may use.
    pub bytes: u32,
    pub barriers: [Barrier; 16],
    /// Valid mbarrier objects by offset.
    pub mbarriers: Vec<super::mbarrier::Object>,
    /// A phase has completed since waiting lanes last looked.
    pub phase_completed: bool,
    pub warpgroups: Vec<super::wgmma::Warpgroup>,
    pub registers: super::wgmma::Pool,
    pub exited_threads: u32,
    pub threads: u32,
    /// Has written to global memory or to another block's shared memory. Known where launches are counted.
    pub worked: bool,
}

impl Shared {
    /// All threads have ended: the block's shared memory is no longer there for its peers.
    pub fn exited(&self) -> bool {
        self.exited_threads == self.threads
    }
}

/// A cluster in flight: what a host thread takes and runs as a whole. A launch without clusters has clusters of one block.
#[derive(Debug)]
pub struct Cluster {
    pub state: ClusterState,
    /// Blocks by rank, and the warps of each.
    pub blocks: Vec<Shared>,
    pub warps: Vec<Vec<Warp>>,
}

/// The other blocks of the cluster, around one's own: those of lower rank, then those of higher.
pub struct Peers<'m> {
    pub lower: &'m mut [Shared],
    pub higher: &'m mut [Shared],
}

impl Cluster {
    /// The machine of one warp.
    pub fn machine<'m, 'a>(&'m mut self, worker: &'m mut Worker<'a>, rank: usize, warp: usize) -> Machine<'m, 'a> {
        let (lower, rest) = self.blocks.split_at_mut(rank);
        let (shared, higher) = rest.split_first_mut().expect("the cluster has a block of this rank");
        let warp = &mut self.warps[rank][warp];
        Machine { worker, shared, warp, cluster: &mut self.state, peers: Peers { lower, higher } }
    }
}

/// What one host thread keeps during a launch.
pub struct Worker<'a> {
    pub kernel: &'a Kernel,
    pub body: &'a Body,
    pub constants: *mut u8,
    pub params: &'a [u8],
    pub memory: &'a dyn GlobalMemory,
    pub config: &'a Config,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Blocks per cluster.
    pub cluster: [u32; 3],
    pub dynamic_shared: u32,
    /// Local memory per thread, the stack of calls included.
    pub local_bytes: u32,
    pub printed: Printed,
    pub started: std::time::Instant,
    /// Operations run so far, which the clocks read.
    pub clock: u64,
    /// Allocations seen so far, the one used last first.
    pub allocations: Vec<(u64, u64)>,
    pub tally: Option<Box<Tally>>,
    pub observers: Vec<Box<dyn Observer + 'a>>,
    /// Somebody counts or observes.
    pub watched: bool,
    pub isa: super::interpreter::Isa,
    pub grid_id: u64,
    /// Parts of finished clusters for new ones.
    pub spare: VecDeque<Cluster>,
}

/// A fault before the place where it happened is added.
#[derive(Debug)]
pub struct Raw {
    pub kind: FaultKind,
    pub lane: usize,
    pub message: String,
    pub address: Option<u64>,
    pub space: Option<&'static str>,
    pub bytes: Option<u32>,
}

impl Raw {
    pub fn new(kind: FaultKind, mask: u32, message: impl Into<String>) -> Box<Self> {
        let lane = mask.trailing_zeros() as usize % 32;
        Box::new(Self { kind, lane, message: message.into(), address: None, space: None, bytes: None })
    }
}

pub type Outcome<T> = Result<T, Box<Raw>>;

/// One warp with everything it can reach.
pub struct Machine<'m, 'a> {
    pub worker: &'m mut Worker<'a>,
    pub shared: &'m mut Shared,
    pub warp: &'m mut Warp,
    pub cluster: &'m mut ClusterState,
    pub peers: Peers<'m>,
}

impl Machine<'_, '_> {
    pub fn file(&mut self) -> File {
        File {
            bases: [self.warp.file.as_mut_ptr(), self.worker.constants],
            predicates: self.warp.predicates.as_mut_ptr(),
        }
    }

    /// The block of this rank in the cluster, which must have one.
    pub fn block_of(&mut self, rank: u32) -> &mut Shared {
        let own = self.peers.lower.len();
        let rank = rank as usize;
        match rank.cmp(&own) {
            std::cmp::Ordering::Less => &mut self.peers.lower[rank],
            std::cmp::Ordering::Equal => self.shared,
            std::cmp::Ordering::Greater => &mut self.peers.higher[rank - own - 1],
        }
    }

    /// Thread index of a lane.
    pub fn thread(&self, lane: usize) -> [u32; 3] {
        thread_of(self.worker.block, self.warp.index, lane)
    }

    pub fn line(&self, pc: u32) -> u32 {
        self.worker.body.lines.get(pc as usize).copied().unwrap_or(0)
    }

    pub fn text(&self, line: u32) -> &str {
        self.worker.kernel.lines.get((line as usize).wrapping_sub(1)).map_or("", |l| l.trim())
    }

    pub fn fault(&self, raw: Raw, pc: u32) -> Fault {
        let line = self.line(pc);
        Fault {
            kind: raw.kind,
            kernel: self.worker.kernel.name.clone(),
            line,
            text: self.text(line).to_string(),
            block: self.shared.block,
            thread: self.thread(raw.lane),
            shape: self.worker.block,
            address: raw.address,
            space: raw.space,
            bytes: raw.bytes,
            message: raw.message,
        }
    }
}

pub fn thread_of(block: [u32; 3], warp: u32, lane: usize) -> [u32; 3] {
    let t = warp * 32 + lane as u32;
    [t % block[0], t / block[0] % block[1], t / block[0] / block[1]]
}

/// A mixing step for choices that the seed makes (the finaliser of SplitMix64).
pub fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}
