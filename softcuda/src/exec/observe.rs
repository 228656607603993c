//! Hooks on what a running kernel does, for checkers and profiles. Nothing here changes what a program computes, and with no
//! watch in [`Config::watches`](super::Config::watches) an access costs one test of a flag.
//!
//! A [`Watch`] lives as long as its owner wants and sees launch after launch; for each host thread of a launch it makes an
//! [`Observer`], which sees the events of the blocks that this thread runs, each block's in the order of execution. Blocks of
//! one cluster are always run by one thread. What threads of the host have to share, the watch shares.

use std::fmt::Debug;

use super::lanes::LANES;
use super::policy::Policy;
use super::{Fault, Launch};
use crate::lower::Kernel;
use crate::ptx::ast::Space;

pub use crate::lower::ir::{Order, ProxyFence, Scope};

/// Sees launches.
pub trait Watch: Send + Sync + Debug {
    /// Before the first block of a launch.
    fn begin(&self, _launch: &Launch, _grid: u64) {}
    /// One for each host thread of the launch; `None` to see nothing of it.
    fn observer<'a>(&'a self, launch: &'a Launch<'a>, grid: u64) -> Option<Box<dyn Observer + 'a>>;
    /// The launch ends in a fault.
    fn fault(&self, _fault: &Fault) {}
    /// After the last block, whether or not the launch ended in a fault.
    fn end(&self, _launch: &Launch, _grid: u64) {}
}

/// Sees the events of one host thread.
pub trait Observer {
    /// A warp instruction touches memory. Comes before the access itself, after its addresses have been checked.
    fn memory(&mut self, _site: &Site, _event: &MemoryEvent) {}
    /// A strong access ([`MemoryEvent::order`] is not weak, or it is atomic) has been done: what a read took is known to it.
    fn performed(&mut self, _site: &Site, _event: &MemoryEvent) {}
    /// A warp synchronises, or an asynchronous operation goes a step further.
    fn sync(&mut self, _site: &Site, _event: &SyncEvent) {}
    /// A block starts or ends.
    fn block(&mut self, _block: &BlockSite, _event: BlockEvent) {}
}

/// Where in the launch an event happens.
#[derive(Debug, Clone, Copy)]
pub struct Site<'e> {
    pub kernel: &'e Kernel,
    /// The block's position in launch order.
    pub block: u64,
    pub block_id: [u32; 3],
    /// Extents of a block.
    pub shape: [u32; 3],
    /// Index in the block.
    pub warp: u32,
    /// One-based line of the PTX.
    pub line: u32,
    /// Whether an access to global memory passes the L1 cache by, by its cache operator or its order.
    pub uncached: bool,
    /// The warp is in a loop that only waits for others, and not for the first time (`lower::polls`). Known where launches are
    /// counted, else false.
    pub repeated: bool,
    /// The L2 cache policy of the accesses: told of `cp.async`, bulk and tensor copies alone.
    pub policy: Policy,
}

/// A block that starts or ends.
#[derive(Debug, Clone, Copy)]
pub struct BlockSite {
    /// Position in launch order.
    pub block: u64,
    /// First block of its cluster, in launch order.
    pub cluster: u64,
    pub threads: u32,
    pub shared_bytes: u32,
    pub local_bytes: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockEvent {
    Begin,
    End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AccessKind {
    Read,
    Write,
    /// A read and a write that nothing comes between.
    Atomic,
}

/// Who carries an access out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Engine {
    /// The thread itself.
    Thread,
    /// `cp.async`.
    CopyAsync,
    /// `cp.async.bulk` and `cp.async.bulk.tensor`: the asynchronous proxy.
    Bulk,
    /// `wgmma`: the asynchronous proxy.
    Wgmma,
    /// Tensor maps are read through a proxy of their own.
    Tensormap,
}

/// One warp instruction's access to one state space.
#[derive(Debug, Clone, Copy)]
pub struct MemoryEvent<'e> {
    pub kind: AccessKind,
    pub engine: Engine,
    /// `Global`, `Shared` or `Local`. Constants and parameters are not reported.
    pub space: Space,
    /// Device addresses, or offsets into the owner's shared or the thread's local memory.
    pub addresses: &'e [u64; LANES],
    pub mask: u32,
    /// Bytes that one lane touches.
    pub bytes: u32,
    pub order: Order,
    pub scope: Scope,
    /// For shared memory: the block that it belongs to, by position in launch order.
    pub owner: u64,
    /// For stores: what is written.
    pub stored: Option<Stored<'e>>,
}

/// What a store writes, looked at on demand.
#[derive(Clone, Copy)]
pub struct Stored<'e> {
    /// For a lane: its new bytes, then those that are there now.
    pub(super) look: &'e dyn Fn(usize) -> [[u64; 4]; 2],
}

impl Stored<'_> {
    /// A lane's bytes, a word for each element.
    pub fn value(&self, lane: usize) -> [u64; 4] {
        (self.look)(lane)[0]
    }

    /// The lane's bytes are there already.
    pub fn leaves(&self, lane: usize) -> bool {
        let [new, old] = (self.look)(lane);
        new == old
    }
}

impl Debug for Stored<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Stored")
    }
}

/// What is not an access to memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncEvent {
    /// Lanes arrive at barrier `id` of the block.
    BarrierArrive {
        id: u32,
        mask: u32,
    },
    /// Lanes go on from the barrier, for all have arrived.
    BarrierLeave {
        id: u32,
        mask: u32,
    },
    /// After the last leave: the barrier is as new.
    BarrierComplete {
        id: u32,
    },
    /// `bar.warp.sync` among these lanes.
    WarpBarrier {
        mask: u32,
    },
    /// `shfl`, `vote`, `match`, `redux`, `elect` among these lanes: they meet, but memory is not ordered.
    Exchange {
        mask: u32,
    },
    /// `griddepcontrol.wait`: what the launches in front of this one did has happened.
    GridWait,
    /// `fence` and `membar`.
    Fence {
        order: Order,
        scope: Scope,
        mask: u32,
    },
    /// Lanes arrive at the cluster's barrier, with release semantics or relaxed.
    ClusterArrive {
        mask: u32,
        release: bool,
    },
    /// Lanes go on from the cluster's barrier, with acquire semantics.
    ClusterLeave {
        mask: u32,
    },
    /// A lane initialises an mbarrier object.
    MbarrierInit {
        at: ObjectPlace,
        lane: u32,
        count: u32,
    },
    MbarrierInval {
        at: ObjectPlace,
        lane: u32,
    },
    /// A lane raises the transaction count of an object that is in this phase.
    MbarrierExpect {
        at: ObjectPlace,
        lane: u32,
        phase: u64,
        bytes: u64,
    },
    /// A lane arrives at an object that is in this phase.
    MbarrierArrive {
        at: ObjectPlace,
        lane: u32,
        phase: u64,
        count: u32,
        order: Order,
        scope: Scope,
    },
    /// The phase is complete: after the arrival or the transfer that completed it.
    MbarrierPhase {
        at: ObjectPlace,
        phase: u64,
    },
    /// A lane learns that the phase is complete.
    MbarrierWait {
        at: ObjectPlace,
        lane: u32,
        phase: u64,
        order: Order,
        scope: Scope,
    },
    /// `cp.async.mbarrier.arrive`: an arrival of each lane when its copies so far have landed, which [`SyncEvent::BulkLand`]
    /// of this number tells.
    CopyArrive {
        id: u64,
        at: ObjectPlace,
        mask: u32,
    },
    /// A lane sets a bulk transfer off. The accesses of [`Engine::Bulk`] that follow from the same site, up to any other
    /// event, are what it will read and write.
    BulkIssue {
        id: u64,
        lane: u32,
        mbarrier: bool,
        bulk_group: bool,
    },
    /// The transfer has read its source, which may be overwritten now.
    BulkRead {
        id: u64,
        lane: u32,
    },
    /// The transfer has written its destination.
    BulkLand {
        id: u64,
        lane: u32,
    },
    /// Its transactions on an object that is in this phase.
    BulkComplete {
        id: u64,
        at: ObjectPlace,
        phase: u64,
    },
    /// The block that it goes to has exited: it will not land there.
    BulkAbandon {
        id: u64,
    },
    /// `cp.async.bulk.commit_group`.
    BulkCommit {
        mask: u32,
    },
    /// `cp.async.bulk.wait_group`: all but each lane's last `keep` bulk groups have landed, or with `read` at least been read.
    BulkWait {
        keep: u32,
        read: bool,
        mask: u32,
    },
    /// `fence.proxy` and `fence.mbarrier_init`.
    ProxyFence {
        kind: ProxyFence,
        mask: u32,
    },
    /// `cp.async.commit_group`.
    CopyCommit {
        mask: u32,
    },
    /// `cp.async.wait_group`: all but each lane's last `keep` groups have landed.
    CopyWait {
        keep: u32,
        mask: u32,
    },
    /// The warp issues its warpgroup's `wgmma.mma_async` of this number, counted from 0. Where it is the first of the
    /// warpgroup, the product's reads of shared memory follow, as accesses of [`Engine::Wgmma`]; they may be carried out at any
    /// time until a warp of the warpgroup waits for the product.
    WgmmaIssue {
        number: u64,
        first: bool,
    },
    WgmmaFence,
    WgmmaCommit,
    /// `wgmma.wait_group`: the warpgroup's products below `complete` no longer read shared memory, and the warp's results of
    /// them are in its registers.
    WgmmaWait {
        keep: u32,
        complete: u64,
    },
    /// The instruction that follows reads or writes a register of A or an accumulator of this product, which is in flight.
    WgmmaTouch {
        number: u64,
    },
    /// The product that the warp issues next uses a register that was touched on the line given, with no `wgmma.fence` since.
    WgmmaUnfenced {
        touched: u32,
    },
}

/// An mbarrier object: the block whose shared memory it is in, by position in launch order, and its offset there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectPlace {
    pub owner: u64,
    pub offset: u32,
}

/// An access before it is split by state space.
#[derive(Debug, Clone, Copy)]
pub(super) struct Touch<'t> {
    pub kind: AccessKind,
    pub engine: Engine,
    /// `None` for generic addresses.
    pub space: Option<Space>,
    pub addresses: &'t [u64; LANES],
    pub mask: u32,
    pub bytes: u32,
    pub order: Order,
    pub scope: Scope,
}

impl<'t> Touch<'t> {
    /// A weak access by the threads themselves.
    pub fn weak(
        kind: AccessKind,
        space: Option<Space>,
        addresses: &'t [u64; LANES],
        mask: u32,
        bytes: u32,
    ) -> Touch<'t> {
        let (engine, order, scope) = (Engine::Thread, Order::Weak, Scope::Cta);
        Touch { kind, engine, space, addresses, mask, bytes, order, scope }
    }
}
