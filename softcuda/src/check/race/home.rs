//! A cluster of blocks while it runs: what its warps know of one another through barriers, fences and strong accesses.

use rustc_hash::FxHashMap;

use super::cell::Cell;
use super::clock::{Away, join};
use super::variable::Variable;
use crate::exec::observe::{AccessKind, ObjectPlace, Order, Scope};
use crate::ptx::ast::Space;

/// Readers of shared memory that are remembered.
pub const SHARED_READERS: usize = 3;
/// Bytes of a cell of shared memory.
pub const SHARED_CELL: u32 = 16;

/// Scopes that make a difference: the block, the cluster, the device and beyond.
pub const LEVELS: usize = 3;

pub fn level(scope: Scope) -> usize {
    match scope {
        Scope::Cta => 0,
        Scope::Cluster => 1,
        Scope::Gpu | Scope::Sys => 2,
    }
}

/// What a fence has made ready to be released, or what a warp releases.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// By warp of the home.
    pub times: Vec<u32>,
    pub away: Away,
}

impl Known {
    fn join(&mut self, times: &[u32], away: &Away) {
        self.times.resize(times.len(), 0);
        join(&mut self.times, times);
        if !away.is_empty() {
            self.away.join(away);
        }
    }

    fn is_empty(&self) -> bool {
        self.times.is_empty()
    }

    fn clear(&mut self) {
        self.times.clear();
        self.away.clear();
    }
}

/// One warp.
#[derive(Debug, Clone, Default)]
pub struct Warp {
    /// For each warp of the home: up to when it is known.
    pub known: Vec<u32>,
    pub away: Away,
    /// Up to when all lanes know one another.
    pub lanes: u32,
    pub pairs: Option<Box<[[u32; 32]; 32]>>,
    pub present: u32,
    /// By level: what a fence of that level lets strong writes after it release. The fences of those who came to a barrier
    /// count for those who leave it, which is more than the manual says, but how many programs do it: all threads fence, then
    /// one of them speaks for the block.
    pub fenced: [Known; LEVELS],
    /// By level: what a fence of that level or a wider one would acquire, through strong reads before it. Carried through
    /// barriers likewise.
    pub pending: [Away; LEVELS],
    /// Up to when each warp's initialisations of mbarrier objects are known, where `fence.mbarrier_init` and a barrier handed
    /// them on without its other accesses; empty for none.
    pub inits: Vec<u32>,
    /// The warp's latest `fence.mbarrier_init`.
    pub init_fence: u32,
    /// Asynchronous copies that have not been waited for.
    pub copies: Vec<Copy>,
    /// Groups of copies committed by each lane.
    pub committed: [u32; 32],
    /// Phases of the cluster's barrier that each lane has arrived at, and has left.
    pub cluster_arrived: [u64; 32],
    pub cluster_left: [u64; 32],
    /// Has waited for the launches in front of this one, or met a warp at a barrier that had.
    pub waited: bool,
}

/// A `cp.async`.
#[derive(Debug, Clone)]
pub struct Copy {
    pub mask: u32,
    pub to: [u64; 32],
    pub bytes: u32,
    pub line: u32,
    pub group: [u32; 32],
    pub number: u64,
    pub owner: u64,
}

/// What arrivals at a barrier bring along.
#[derive(Debug, Clone, Default)]
pub struct Barrier {
    known: Vec<u32>,
    away: Away,
    fenced: [Known; LEVELS],
    pending: [Away; LEVELS],
    /// By warp: the lanes that have arrived.
    lanes: Vec<u32>,
    /// As [`Warp::inits`].
    inits: Vec<u32>,
}

/// Joins knowledge of initialisations, which is empty nearly always.
fn join_inits(to: &mut Vec<u32>, from: &[u32]) {
    if !from.is_empty() {
        to.resize(to.len().max(from.len()), 0);
        join(to, from);
    }
}

impl Barrier {
    fn arrive(&mut self, w: &mut Warp, index: usize, mask: u32, now: u32) {
        self.known.resize(w.known.len(), 0);
        self.lanes.resize(w.known.len(), 0);
        w.known[index] = now;
        join(&mut self.known, &w.known);
        if !w.away.is_empty() {
            self.away.join(&w.away);
        }
        carry(&mut self.fenced, &mut self.pending, &w.fenced, &w.pending);
        join_inits(&mut self.inits, &w.inits);
        self.lanes[index] |= mask;
    }

    /// A relaxed arrival hands on what fences before it have made ready, those of a level below `least` excepted, and with
    /// `fence.mbarrier_init` the objects that the warp has initialised (PTX ISA 8.8, 9.7.13.4).
    fn arrive_relaxed(&mut self, w: &Warp, index: usize, mask: u32, least: usize) {
        self.known.resize(w.known.len(), 0);
        self.lanes.resize(w.known.len(), 0);
        for fenced in w.fenced[least..].iter().filter(|f| !f.is_empty()) {
            join(&mut self.known, &fenced.times);
            self.away.join(&fenced.away);
            self.lanes[index] |= mask;
        }
        if w.init_fence != 0 {
            self.inits.resize(w.known.len(), 0);
            self.inits[index] = self.inits[index].max(w.init_fence);
        }
    }

    fn complete(&mut self, transfers: usize, total: usize, now: u32) {
        self.known.resize(total, 0);
        self.lanes.resize(total, 0);
        self.known[transfers] = self.known[transfers].max(now);
    }

    fn leave(&self, w: &mut Warp, index: usize, mask: u32) {
        if self.known.is_empty() {
            return;
        }
        join(&mut w.known, &self.known);
        if !self.away.is_empty() {
            w.away.join(&self.away);
        }
        carry(&mut w.fenced, &mut w.pending, &self.fenced, &self.pending);
        join_inits(&mut w.inits, &self.inits);
        w.meet(mask, self.lanes[index], self.known[index]);
    }

    pub fn clear(&mut self) {
        self.known.fill(0);
        self.lanes.fill(0);
        self.inits.clear();
        self.away.clear();
        self.fenced.iter_mut().for_each(Known::clear);
        self.pending.iter_mut().for_each(Away::clear);
    }
}

/// An mbarrier object, or the cluster's barrier: what arrivals of its latest phases bring along.
#[derive(Debug, Default)]
pub struct Object {
    phases: Vec<(u64, Barrier)>,
    /// The phase that is not complete.
    pub current: u64,
}

/// Phases of an object that can still be waited for.
const PHASES: usize = 3;

impl Object {
    /// A phase's arrivals; whoever learns of a phase knows of those before.
    fn phase(&mut self, number: u64) -> &mut Barrier {
        if let Some(i) = self.phases.iter().position(|(n, _)| *n == number) {
            return &mut self.phases[i].1;
        }
        if self.phases.len() == PHASES {
            self.phases.remove(0);
        }
        let before = self.phases.last().map(|(_, b)| b.clone()).unwrap_or_default();
        self.phases.push((number, before));
        let last = self.phases.len() - 1;
        &mut self.phases[last].1
    }
}

/// A bulk copy in flight.
#[derive(Debug)]
pub struct Transfer {
    pub line: u32,
    /// What it writes.
    pub writes: Vec<Write>,
}

/// Pieces that a bulk copy writes.
#[derive(Debug, Clone, Copy)]
pub struct Write {
    pub kind: AccessKind,
    pub space: Space,
    pub addresses: [u64; 32],
    pub mask: u32,
    pub bytes: u32,
    pub owner: u64,
}

/// Arrivals that come when copies have landed.
#[derive(Debug)]
pub struct CopyArrival {
    pub at: ObjectPlace,
    pub lanes: u32,
    /// Number of the first copy that is not among them.
    pub before: u64,
}

#[derive(Debug, Default)]
pub struct Block {
    pub linear: u64,
    pub barriers: Vec<Barrier>,
    pub shadow: Vec<Cell<SHARED_READERS>>,
}

/// A product in flight.
#[derive(Debug, Clone, Copy)]
pub struct Product {
    pub number: u64,
    /// When it began to read.
    pub time: u32,
}

/// All that is known of a cluster.
#[derive(Debug, Default)]
pub struct Home {
    pub id: u32,
    /// Synchronising operations so far.
    pub now: u32,
    pub warps_per_block: u32,
    /// Indices of a block: its warps, its warpgroups' products, its bulk copies.
    pub stride: u32,
    pub warps: Vec<Warp>,
    pub blocks: Vec<Block>,
    /// The cluster's barrier.
    pub cluster: Object,
    pub objects: FxHashMap<ObjectPlace, Object>,
    /// Which warp initialised an object, and when.
    pub inits: FxHashMap<ObjectPlace, (usize, u32)>,
    /// Bulk copies and arrivals of copies in flight, by their number.
    pub transfers: FxHashMap<u64, Transfer>,
    pub arrivals: FxHashMap<u64, CopyArrival>,
    /// The bulk copy whose accesses are being told.
    pub current: u64,
    /// `cp.async` issued so far.
    pub issued: u64,
    /// Products in flight, by the index of their warpgroup.
    pub products: FxHashMap<usize, Vec<Product>>,
    /// Places in shared memory that strong accesses synchronise through, by block and offset.
    pub variables: FxHashMap<(u64, u64), Variable>,
}

impl Home {
    /// Indices of a block: its warps, the products of its warpgroups, its transfers.
    pub fn stride_of(warps_per_block: u32) -> u32 {
        warps_per_block + warps_per_block.div_ceil(4) + 1
    }

    /// Adds a block that starts; returns its rank.
    pub fn begin(&mut self, linear: u64, threads: u32, shared_bytes: u32, mut block: Block) {
        self.warps_per_block = threads.div_ceil(32);
        self.now = self.now.max(1);
        self.stride = Self::stride_of(self.warps_per_block);
        for i in 0..self.stride {
            let lanes = threads.saturating_sub(32 * i).clamp(1, 32);
            self.warps.push(Warp { present: u32::MAX >> (32 - lanes), ..Warp::default() });
        }
        let total = self.warps.len();
        self.warps.iter_mut().for_each(|w| w.known.resize(total, 0));
        block.linear = linear;
        block.barriers.resize_with(16, Barrier::default);
        block.barriers.iter_mut().for_each(Barrier::clear);
        block.shadow.resize_with(shared_bytes.div_ceil(SHARED_CELL) as usize, Cell::default);
        self.blocks.push(block);
    }

    /// The index of a warpgroup's products.
    pub fn products(&self, rank: usize, warp: u32) -> usize {
        rank * self.stride as usize + (self.warps_per_block + warp / 4) as usize
    }

    /// The index of a block's bulk copies.
    pub fn transfers(&self, rank: usize) -> usize {
        (rank + 1) * self.stride as usize - 1
    }

    pub fn rank(&self, block: u64) -> usize {
        self.blocks.iter().position(|b| b.linear == block).unwrap_or(0)
    }

    /// Ends the moment: later accesses are told apart from earlier ones.
    pub fn tick(&mut self) -> u32 {
        let now = self.now;
        self.now += 1;
        now
    }

    pub fn arrive(&mut self, rank: usize, id: usize, warp: usize, mask: u32) {
        let now = self.tick();
        self.blocks[rank].barriers[id].arrive(&mut self.warps[warp], warp, mask, now);
    }

    pub fn leave(&mut self, rank: usize, id: usize, warp: usize, mask: u32) {
        self.blocks[rank].barriers[id].leave(&mut self.warps[warp], warp, mask);
        let first = rank * self.stride as usize;
        self.warps[warp].waited |= self.warps[first..first + self.warps_per_block as usize].iter().any(|w| w.waited);
    }

    /// At the cluster's barrier; a relaxed arrival brings along what was fenced for the cluster or more widely.
    pub fn arrive_cluster(&mut self, warp: usize, mask: u32, release: bool) {
        let now = self.tick();
        let w = &mut self.warps[warp];
        let phase = w.cluster_arrived[mask.trailing_zeros() as usize & 31];
        super::lanes_of(mask).for_each(|i| w.cluster_arrived[i] += 1);
        let barrier = self.cluster.phase(phase);
        if release {
            barrier.arrive(w, warp, mask, now);
        } else {
            barrier.arrive_relaxed(w, warp, mask, level(Scope::Cluster));
        }
    }

    pub fn leave_cluster(&mut self, warp: usize, mask: u32) {
        let w = &mut self.warps[warp];
        let phase = w.cluster_left[mask.trailing_zeros() as usize & 31];
        super::lanes_of(mask).for_each(|i| w.cluster_left[i] += 1);
        if let Some((_, barrier)) = self.cluster.phases.iter().find(|(n, _)| *n == phase) {
            barrier.leave(w, warp, mask);
        }
    }

    /// The warp waits for all products of its warpgroup before this number.
    pub fn wait_products(&mut self, rank: usize, warp: u32, index: usize, before: u64) {
        let engine = self.products(rank, warp);
        let Some(list) = self.products.get(&engine) else { return };
        let time = list.iter().filter(|p| p.number < before).map(|p| p.time).max().unwrap_or(0);
        let known = &mut self.warps[index].known[engine];
        *known = time.max(*known);
    }

    /// A thread's arrival at an object, with release semantics.
    pub fn arrive_object(&mut self, at: ObjectPlace, phase: u64, warp: usize, lane: u32) {
        let now = self.tick();
        self.objects.entry(at).or_default().phase(phase).arrive(&mut self.warps[warp], warp, 1 << lane, now);
    }

    /// A thread's relaxed arrival at an object, by a thread of its own block or of another one.
    pub fn arrive_object_relaxed(&mut self, at: ObjectPlace, phase: u64, (warp, lane): (usize, u32), own: bool) {
        let least = if own { 0 } else { level(Scope::Cluster) };
        self.objects.entry(at).or_default().phase(phase).arrive_relaxed(&self.warps[warp], warp, 1 << lane, least);
    }

    /// A relaxed wait: what the arrivals brought along is there for a fence that follows.
    pub fn wait_object_relaxed(&mut self, at: ObjectPlace, phase: u64, warp: usize, scope: Scope) {
        let Some((_, barrier)) = self.objects.get(&at).and_then(|o| o.phases.iter().find(|(n, _)| *n == phase)) else {
            return;
        };
        let (stride, warps) = (self.stride, self.warps_per_block);
        let pending = &mut self.warps[warp].pending[level(scope)];
        pending.publish(self.id, &barrier.known, |i| (i as u32 % stride) < warps);
        pending.join(&barrier.away);
    }

    /// `fence.mbarrier_init.release.cluster`
    pub fn fence_inits(&mut self, warp: usize) {
        self.warps[warp].init_fence = self.tick();
    }

    /// Whether a warp knows of an object's initialisation, made at a time by the warp of an index, through such a fence.
    pub fn knows_init(&self, at: ObjectPlace, warp: usize, by: (usize, u32)) -> bool {
        let known = self.warps[warp].inits.get(by.0).copied().unwrap_or(0);
        self.inits.get(&at) == Some(&by) && known >= by.1
    }

    /// A bulk copy's transactions: whoever learns of the phase knows what the copy has written.
    pub fn complete_object(&mut self, at: ObjectPlace, phase: u64, transfers: usize) {
        let (now, total) = (self.tick(), self.warps.len());
        self.objects.entry(at).or_default().phase(phase).complete(transfers, total, now);
    }

    pub fn wait_object(&mut self, at: ObjectPlace, phase: u64, warp: usize, lane: u32) {
        if let Some((_, barrier)) = self.objects.get(&at).and_then(|o| o.phases.iter().find(|(n, _)| *n == phase)) {
            barrier.leave(&mut self.warps[warp], warp, 1 << lane);
        }
    }

    /// `bar.warp.sync`.
    pub fn warp_barrier(&mut self, warp: usize, mask: u32) {
        let now = self.tick();
        self.warps[warp].meet(mask, mask, now);
    }

    /// A fence by some lanes of a warp.
    pub fn fence(&mut self, warp: usize, order: Order, scope: Scope) {
        let now = self.tick();
        let (home, w) = (self.id, &mut self.warps[warp]);
        if order != Order::Release {
            for l in 0..=level(scope) {
                let pending = std::mem::take(&mut w.pending[l]);
                if !pending.is_empty() {
                    w.acquire(home, warp, &pending);
                }
            }
            for l in level(scope) + 1..LEVELS {
                if !w.pending[l].is_empty() {
                    let own = w.pending[l].only(home);
                    w.acquire(home, warp, &own);
                }
            }
        }
        if order != Order::Acquire {
            w.known[warp] = now;
            let (known, away) = (&w.known, &w.away);
            w.fenced[level(scope)].join(known, away);
        }
    }

    /// What a strong write by a warp, now, releases, and at which levels.
    pub fn released(&mut self, warp: usize, order: Order, scope: Scope) -> Vec<(usize, Known)> {
        let widest = level(scope);
        let mut all = Vec::new();
        if matches!(order, Order::Release | Order::AcqRel | Order::SeqCst) {
            let now = self.tick();
            let w = &mut self.warps[warp];
            w.known[warp] = now;
            all.push((widest, Known { times: w.known.clone(), away: w.away.clone() }));
            return all;
        }
        let fenced = self.warps[warp].fenced.iter().enumerate().filter(|(_, f)| !f.is_empty());
        all.extend(fenced.map(|(l, f)| (l.min(widest), f.clone())));
        all
    }
}

/// Takes what fences have made ready through a barrier.
fn carry(fenced: &mut [Known; LEVELS], pending: &mut [Away; LEVELS], f: &[Known; LEVELS], p: &[Away; LEVELS]) {
    for (to, from) in fenced.iter_mut().zip(f).filter(|(_, from)| !from.is_empty()) {
        to.join(&from.times, &from.away);
    }
    for (to, from) in pending.iter_mut().zip(p).filter(|(_, from)| !from.is_empty()) {
        to.join(from);
    }
}

impl Warp {
    /// Lanes of `mask` come to know the others of `among` up to a time.
    fn meet(&mut self, mask: u32, among: u32, time: u32) {
        if among == 0 {
            return;
        }
        if mask & among == self.present {
            self.lanes = self.lanes.max(time);
            return;
        }
        let pairs = self.pairs.get_or_insert_with(|| Box::new([[0; 32]; 32]));
        for m in super::lanes_of(mask) {
            for l in super::lanes_of(among) {
                pairs[m][l] = pairs[m][l].max(time);
            }
        }
    }

    /// Takes over what others have released.
    pub fn acquire(&mut self, home: u32, index: usize, from: &Away) {
        for (u, known) in self.known.iter_mut().enumerate() {
            *known = (*known).max(from.time(home, u as u32));
        }
        // Lanes of one warp synchronise this way too.
        self.lanes = self.lanes.max(from.time(home, index as u32));
        self.away.join(from);
    }
}
