//! Clusters of blocks (PTX ISA 2.2.1, 9.7.13.3): their shape, their barrier, and addresses in the shared memory of peers.
//!
//! A 32-bit address in `.shared::cluster` holds the offset into a block's shared memory in its low 24 bits and that block's
//! rank plus one above; with zero above it is the executing block's own, so that every address in `.shared::cta` is one in
//! `.shared::cluster` too. A generic address adds the shared window.

use super::fault::FaultKind;
use super::lanes::{File, active};
use super::observe::SyncEvent;
use super::state::{Cluster, GroupState, Machine, Outcome, Raw, Worker};
use super::{Launch, SHARED_WINDOW};
use crate::lower::ir_cluster::{ClusterOp, Mapa};
use crate::ptx::ast::Space;

/// Bits of an offset into one block's shared memory.
pub const OFFSET_BITS: u32 = 24;
/// Blocks of a cluster, at most.
const MAX_BLOCKS: u64 = 16;

/// Shapes of a launch: blocks of the grid, and blocks of a cluster.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub grid: [u32; 3],
    pub cluster: [u32; 3],
}

impl Shape {
    pub fn clusters(self) -> u64 {
        (0..3).map(|i| u64::from(self.grid[i] / self.cluster[i])).product()
    }
}

/// The shapes of a launch, if they fit each other, the kernel's directives (PTX ISA 11.4.5) and the device.
pub fn shape(l: &Launch) -> Result<Shape, String> {
    let k = l.kernel;
    let cluster = match k.required_cluster {
        Some(required) if l.cluster == [1, 1, 1] => required,
        Some(required) if required != l.cluster => {
            return Err(format!("clusters of {:?} blocks; the kernel requires {required:?}", l.cluster));
        }
        _ => l.cluster,
    };
    let blocks = cluster.iter().try_fold(1u64, |n, &x| n.checked_mul(x.into())).unwrap_or(u64::MAX);
    if !(1..=MAX_BLOCKS).contains(&blocks) {
        return Err(format!("clusters of {cluster:?} blocks; 1 to {MAX_BLOCKS} are possible"));
    }
    if blocks != 1 && l.config.compute_capability < (9, 0) {
        return Err(format!("clusters of {cluster:?} blocks need compute capability 9.0"));
    }
    if let Some(max) = k.max_cluster_rank
        && blocks > max.into()
    {
        return Err(format!("clusters of {blocks} blocks; `.maxclusterrank` allows {max}"));
    }
    let mut grid = l.grid;
    if k.blocks_are_clusters {
        // The grid counts clusters.
        for (blocks, &per_cluster) in grid.iter_mut().zip(&cluster) {
            *blocks = blocks.checked_mul(per_cluster).ok_or_else(|| format!("a grid of {:?} clusters", l.grid))?;
        }
    }
    if grid.iter().zip(cluster).any(|(&blocks, per_cluster)| !blocks.is_multiple_of(per_cluster)) {
        return Err(format!("a grid of {grid:?} blocks is no multiple of clusters of {cluster:?}"));
    }
    Ok(Shape { grid, cluster })
}

/// A cluster's state that its blocks share.
#[derive(Debug, Default)]
pub struct ClusterState {
    /// Position among the grid's clusters.
    pub id: [u32; 3],
    /// Seed of the cluster's own choices.
    pub seed: u64,
    /// Chooses waits for mbarriers that reach their time limit; 0: none does.
    pub waits: u64,
    /// Phases of the cluster's barrier completed so far.
    phase: u32,
    /// Threads that have arrived in this phase, those that have exited included.
    arrived: u32,
    exited: u32,
    threads: u32,
    /// A phase completed since waiting lanes were last let go.
    opened: bool,
    /// What runs beside the threads.
    pub engine: super::engine::Engine,
}

impl ClusterState {
    /// As new, for the cluster at this place in launch order.
    pub fn reset(&mut self, index: u64, grid: [u32; 3], cluster: [u32; 3], threads_per_block: u32) {
        let [nx, ny, _] = [0, 1, 2].map(|i| u64::from(grid[i] / cluster[i]));
        let id = [index % nx, index / nx % ny, index / nx / ny].map(|x| x as u32);
        let threads = threads_per_block * cluster.iter().product::<u32>();
        *self = Self { id, threads, ..Self::default() };
    }

    /// The block of this rank, by its position in the grid.
    pub fn block(&self, rank: u32, cluster: [u32; 3]) -> [u32; 3] {
        let inner = position(rank, cluster);
        std::array::from_fn(|i| self.id[i] * cluster[i] + inner[i])
    }

    /// Threads arrive at the barrier, or exit without having arrived: one that will never come is not waited for.
    fn arrive(&mut self, threads: u32) {
        self.arrived += threads;
        if self.arrived >= self.threads && self.exited < self.threads {
            self.phase += 1;
            self.arrived = self.exited;
            self.opened = true;
        }
    }

    /// How far the barrier is.
    pub fn describe(&self) -> String {
        let (live, arrived) = (self.threads - self.exited, self.arrived - self.exited);
        format!(" (phase {} of the cluster's barrier: {arrived} of {live} threads have arrived)", self.phase)
    }

    fn parity(&self) -> u32 {
        (self.phase & 1).wrapping_neg()
    }
}

/// Position of a block in its cluster.
pub fn position(rank: u32, cluster: [u32; 3]) -> [u32; 3] {
    [rank % cluster[0], rank / cluster[0] % cluster[1], rank / cluster[0] / cluster[1]]
}

/// The address in `.shared::cluster` of an offset into the shared memory of the block of this rank.
pub fn address(rank: u32, offset: u64) -> u64 {
    u64::from(rank + 1) << OFFSET_BITS | offset
}

impl Cluster {
    /// Lets lanes go that wait at the cluster's barrier for a phase that has completed; `true` if there are any.
    pub fn release_all(&mut self, worker: &mut Worker) -> bool {
        if !std::mem::take(&mut self.state.opened) {
            return false;
        }
        let mut any = false;
        for rank in 0..self.warps.len() {
            for i in 0..self.warps[rank].len() {
                any |= self.machine(worker, rank, i).leave_cluster_barrier();
            }
        }
        any
    }
}

impl Machine<'_, '_> {
    /// Whether a generic address lies in a space; the memory of peers is in `.shared::cluster` only.
    pub fn is_in(&self, address: u64, space: Space) -> bool {
        let window = super::access::space_of(address);
        match space {
            Space::SharedCluster => window == Space::Shared,
            Space::Shared => window == Space::Shared && self.locate(space, address - SHARED_WINDOW, 0).is_ok(),
            _ => window == space,
        }
    }

    /// Rank and offset that an address in `.shared::cta` or `.shared::cluster` names.
    ///
    /// # Errors
    /// The address names a block that the cluster does not have, or, in `.shared::cta`, a peer's memory.
    pub fn locate(&self, space: Space, address: u64, lane: usize) -> Outcome<(u32, u64)> {
        let (field, offset) = (address >> OFFSET_BITS, address & ((1 << OFFSET_BITS) - 1));
        let own = self.shared.rank;
        if field == 0 || field == u64::from(own) + 1 {
            return Ok((own, offset));
        }
        let size = self.worker.cluster.iter().product::<u32>();
        let rank = field - 1;
        let wrong = if rank >= size.into() {
            (FaultKind::IllegalAddress, format!("names block {rank} of a cluster of {size}"))
        } else if space == Space::Shared {
            (
                FaultKind::InvalidAddressSpace,
                format!("lies in the shared memory of block {rank} of the cluster, not in the block's own"),
            )
        } else {
            return Ok((rank as u32, offset));
        };
        let mut raw = Raw::new(wrong.0, 1 << lane, format!("the shared address {address:#x} {}", wrong.1));
        raw.address = Some(address);
        raw.space = Some(super::access::space_name(space));
        Err(raw)
    }

    /// The shared memory of the block of this rank, which must not have exited.
    pub fn shared_of(&mut self, rank: u32, address: u64, lane: usize) -> Outcome<(u64, u32)> {
        let own = self.shared.rank;
        let block = self.block_of(rank);
        if rank != own && block.exited() {
            let message = format!(
                "the shared address {address:#x} lies in block {:?}, rank {rank} of the cluster, which has exited",
                block.block
            );
            let mut raw = Raw::new(FaultKind::IllegalAddress, 1 << lane, message);
            raw.address = Some(address);
            raw.space = Some("shared::cluster");
            return Err(raw);
        }
        Ok((block.memory.as_mut_ptr() as u64, block.bytes))
    }

    /// Runs an instruction on clusters, `true` if the running group simply goes on.
    pub fn cluster_op(&mut self, file: File, x: &ClusterOp, pc: u32, mask: u32) -> Outcome<bool> {
        match x {
            ClusterOp::Mapa(x) => self.mapa(file, x, mask).map(|()| true),
            ClusterOp::GetRank { d, a, generic } => {
                let at = super::access::get(file, *a);
                let mut ranks = [0; 32];
                for i in active(mask) {
                    ranks[i] = self.locate_pointer(at[i], *generic, i)?.0;
                }
                // SAFETY: the slot is a 32-bit one of this kernel.
                unsafe { file.store32(d.slot, mask, &ranks) };
                Ok(true)
            }
            ClusterOp::Arrive { aligned, release } => {
                if *aligned && !self.converged(pc, mask)? {
                    return Ok(false);
                }
                self.arrive_at_cluster(mask, *release, pc)?;
                if *aligned {
                    self.step();
                }
                Ok(!*aligned)
            }
            ClusterOp::Wait { aligned } => {
                if *aligned && !self.converged(pc, mask)? {
                    return Ok(false);
                }
                self.wait_for_cluster(mask, pc)
            }
        }
    }

    /// Rank and offset of a pointer into the cluster's shared memory.
    fn locate_pointer(&self, address: u64, generic: bool, lane: usize) -> Outcome<(u32, u64)> {
        if generic && super::access::space_of(address) != Space::Shared {
            let message = format!("the generic address {address:#x} is not in shared memory");
            return Err(Raw::new(FaultKind::InvalidAddressSpace, 1 << lane, message));
        }
        self.locate(Space::SharedCluster, if generic { address - SHARED_WINDOW } else { address }, lane)
    }

    /// `mapa` (PTX ISA 9.7.9.24).
    fn mapa(&mut self, file: File, x: &Mapa, mask: u32) -> Outcome<()> {
        let (at, ranks) = (super::access::get(file, x.a), super::access::get(file, x.rank));
        let size = self.worker.cluster.iter().product::<u32>();
        let mut mapped = [0; 32];
        for i in active(mask) {
            let (_, offset) = self.locate_pointer(at[i], x.generic, i)?;
            if ranks[i] >= size.into() {
                let message = format!("`mapa` to block {} of a cluster of {size}", ranks[i]);
                return Err(Raw::new(FaultKind::IllegalInstruction, 1 << i, message));
            }
            mapped[i] = address(ranks[i] as u32, offset) + if x.generic { SHARED_WINDOW } else { 0 };
        }
        super::access::put(file, x.d, mask, &mapped);
        Ok(())
    }

    fn arrive_at_cluster(&mut self, mask: u32, release: bool, pc: u32) -> Outcome<()> {
        let again = self.warp.cluster_arrived & mask;
        if again != 0 {
            let message = "`barrier.cluster.arrive` twice without `barrier.cluster.wait` between";
            return Err(Raw::new(FaultKind::IllegalInstruction, again, message));
        }
        self.warp.cluster_arrived |= mask;
        self.warp.cluster_parity = self.warp.cluster_parity & !mask | self.cluster.parity() & mask;
        self.observe_sync(SyncEvent::ClusterArrive { mask, release }, pc);
        self.cluster.arrive(mask.count_ones());
        Ok(())
    }

    /// `true` if the running group simply goes on.
    fn wait_for_cluster(&mut self, mask: u32, pc: u32) -> Outcome<bool> {
        let stray = mask & !self.warp.cluster_arrived;
        if stray != 0 {
            let message = "`barrier.cluster.wait` without `barrier.cluster.arrive` before";
            return Err(Raw::new(FaultKind::IllegalInstruction, stray, message));
        }
        let passed = (self.warp.cluster_parity ^ self.cluster.parity()) & mask;
        // Lanes of a group arrived one after another, but the phase is the same for all that have not been let go.
        let current = self.warp.current;
        let lanes = self.warp.groups[current].mask;
        self.warp.cluster_arrived &= !passed;
        if passed != 0 {
            self.observe_sync(SyncEvent::ClusterLeave { mask: passed }, pc);
        }
        let on = lanes & !mask | passed;
        if on == lanes {
            self.step();
            return Ok(false);
        }
        if on != 0 {
            self.split(on, pc + 1);
        }
        self.wait(GroupState::AtClusterBarrier);
        Ok(false)
    }

    /// The lanes that wait at the cluster's barrier go on; `true` if there are any.
    fn leave_cluster_barrier(&mut self) -> bool {
        // Some may wait for the next phase already: all lanes of a group wait for the same.
        let passed = self.warp.cluster_parity ^ self.cluster.parity();
        let mut left = 0;
        let mut at = 0;
        for g in self.warp.groups.iter_mut() {
            if g.state == GroupState::AtClusterBarrier && passed & g.mask != 0 {
                left |= g.mask;
                at = g.pc;
                g.pc += 1;
                g.state = GroupState::Ready;
            }
        }
        self.warp.cluster_arrived &= !left;
        if left != 0 {
            self.observe_sync(SyncEvent::ClusterLeave { mask: left }, at);
        }
        left != 0
    }

    /// Lanes end: for the cluster's barrier they count as having arrived.
    pub fn leave_cluster(&mut self, mask: u32) {
        let here = self.warp.cluster_arrived & !(self.warp.cluster_parity ^ self.cluster.parity());
        self.warp.cluster_arrived &= !mask;
        self.cluster.exited += mask.count_ones();
        self.cluster.arrive((mask & !here).count_ones());
    }
}
