//! What one host thread sees: its blocks' accesses against the shadows, its synchronisation as knowledge.

use rustc_hash::FxHashMap;

use super::cell::{Accessor, Conflict, MANY, Stamp, What};
use super::global::{CELL, PAGE, Pages};
use super::home::{Block, Copy, CopyArrival, Home, Product, SHARED_CELL, Transfer, Write};
use super::{Race, lanes_of, report};
use crate::exec::Launch;
use crate::exec::observe::{
    AccessKind, BlockEvent, BlockSite, Engine, MemoryEvent, ObjectPlace, Observer, Order, ProxyFence, Scope, Site,
    SyncEvent,
};
use crate::ptx::ast::Space;

/// Products of a warpgroup that are remembered.
const PRODUCTS: usize = 63;

pub struct RaceObserver<'a> {
    race: &'a Race,
    launch: &'a Launch<'a>,
    grid: u64,
    pages: Pages<'a>,
    homes: Vec<Home>,
    /// A block's home, by position in launch order.
    of_block: FxHashMap<u64, usize>,
    /// The block last asked for: its home and its rank there.
    last: (u64, usize, usize),
    /// The launch last found to come before this one.
    ordered: std::cell::Cell<Option<u32>>,
    /// Parts of finished blocks, and places of finished homes.
    spare: Vec<Block>,
    free: Vec<usize>,
}

/// Lanes that touch adjacent pieces in order.
pub(super) struct Run {
    pub lane: u32,
    pub from: u64,
    pub to: u64,
    pub shift: u32,
}

impl<'a> RaceObserver<'a> {
    pub fn new(race: &'a Race, launch: &'a Launch<'a>, grid: u64) -> Self {
        RaceObserver {
            race,
            launch,
            grid,
            pages: Pages::new(&race.global),
            homes: Vec::new(),
            of_block: FxHashMap::default(),
            last: (u64::MAX, 0, 0),
            ordered: std::cell::Cell::new(None),
            spare: Vec::new(),
            free: Vec::new(),
        }
    }

    /// Home, the block's rank there and the warp's index there.
    fn find(&mut self, block: u64, warp: u32) -> (usize, usize, usize) {
        if self.last.0 != block {
            let home = self.of_block.get(&block).copied().unwrap_or(0);
            self.last = (block, home, self.homes[home].rank(block));
        }
        let (_, home, rank) = self.last;
        (home, rank, rank * self.homes[home].stride as usize + warp as usize)
    }

    /// Checks an access by one warp and remembers it.
    fn check(&mut self, site: &Site, event: &MemoryEvent) {
        if let Some((home, conflict, stamp)) = self.enter(site, event) {
            self.report(home, site, event, &conflict, stamp);
        }
    }

    /// Remembers an access; the home, the first conflict and the access as remembered, if there is a conflict.
    #[inline(always)]
    fn enter(&mut self, site: &Site, event: &MemoryEvent) -> Option<(usize, Conflict, Stamp)> {
        let (h, rank, warp) = self.find(site.block, site.warp);
        let home = &mut self.homes[h];
        let engine = matches!(event.engine, Engine::Wgmma | Engine::Bulk);
        let index = if engine {
            // Whatever the warp did before, what it sets off comes after.
            home.warps[warp].known[warp] = home.now;
            if event.engine == Engine::Wgmma { home.products(rank, site.warp) } else { home.transfers(rank) }
        } else {
            warp
        };
        // Shadows of the home's shared memory are taken out while its clocks are read.
        let rank = if event.space == Space::Shared { home.rank(event.owner) } else { 0 };
        let mut shadow = std::mem::take(&mut home.blocks[rank].shadow);
        let w = &home.warps[warp];
        let what = What {
            line: site.line,
            warp: index as u32,
            strong: event.order != Order::Weak || event.kind == AccessKind::Atomic,
            // Reductions by the bulk engine are relaxed, for the whole device (PTX ISA 9.7.9.25.5.2).
            scope: if event.engine == Engine::Bulk { Scope::Gpu } else { event.scope },
            kind: match event.kind {
                AccessKind::Read => 0,
                AccessKind::Write => 1,
                AccessKind::Atomic => 2,
            },
            launch: self.grid,
        };
        let stamp = Stamp::new(home.now, home.id, &what);
        // The same value from several lanes of one store, or the one that is there already.
        let benign = |c: &Conflict, lane: u32| {
            let Some(stored) = &event.stored else { return false };
            let (lane, other) = (lane as usize & 31, c.other_lane as usize & 31);
            if same_store(event, stamp, c) {
                event.addresses[lane] == event.addresses[other] && stored.value(lane) == stored.value(other)
            } else {
                stored.leaves(lane)
            }
        };
        let by = Accessor {
            stamp,
            benign: &benign,
            beside: &|number| {
                // What comes before the whole launch comes before what a warp does once it has waited.
                let order = self.launch.config.order.as_deref();
                let waited = w.waited || order.is_none_or(|order| order.before_wait.is_none());
                if waited && self.ordered.get() == Some(number) {
                    return false;
                }
                let beside = self.race.launches.beside(number, order, waited).is_some();
                if !beside && waited {
                    self.ordered.set(Some(number));
                }
                beside
            },
            write: event.kind != AccessKind::Read,
            known: &w.known,
            away: &w.away,
            lanes: w.lanes,
            pairs: w.pairs.as_deref(),
            stride: home.stride,
            engine,
            shared: event.space == Space::Shared,
        };
        let mut found = None;
        let pages = &mut self.pages;
        runs(event, |run| {
            if event.space == Space::Shared {
                each_cell(&run, SHARED_CELL, |cell, part, lane| {
                    if let Some(cell) = shadow.get_mut(cell as usize) {
                        cell.access(SHARED_CELL, part, lane, run.shift, &by, &mut found);
                    }
                });
            } else {
                global(pages, &run, &by, &mut found);
            }
        });
        home.blocks[rank].shadow = shadow;
        found.map(|conflict| (h, conflict, stamp))
    }

    #[cold]
    fn report(&self, h: usize, site: &Site, event: &MemoryEvent, c: &Conflict, me: Stamp) {
        let findings = &self.race.findings;
        if same_store(event, me, c) {
            report::same_store(findings, site, event, c);
        } else {
            let order = self.launch.config.order.as_deref();
            let home = &self.homes[h];
            let waited = home.warps[home.rank(site.block) * home.stride as usize + site.warp as usize].waited;
            let earlier =
                if c.other.same_launch(me) { None } else { self.race.launches.beside(c.other.launch(), order, waited) };
            report::conflict(findings, (self.launch, earlier.as_deref()), site, event, &self.homes[h], (c, me));
        }
    }

    /// Addresses at which the lanes of a strong access synchronise, each once.
    fn places(event: &MemoryEvent) -> impl Iterator<Item = u64> {
        let first = |i: usize| !lanes_of(event.mask & ((1 << i) - 1)).any(|j| event.addresses[j] == event.addresses[i]);
        lanes_of(event.mask).filter(move |&i| first(i)).map(|i| event.addresses[i])
    }

    fn release(&mut self, site: &Site, event: &MemoryEvent) {
        let (h, _, warp) = self.find(site.block, site.warp);
        let grid = self.grid;
        let home = &mut self.homes[h];
        let what = home.released(warp, event.order, event.scope);
        if what.is_empty() {
            return;
        }
        let (id, stride, warps) = (home.id, home.stride, home.warps_per_block);
        let is_warp = move |i: usize| (i as u32 % stride) < warps;
        let by: (u32, &dyn Fn(usize) -> bool) = (id, &is_warp);
        for address in Self::places(event) {
            if event.space == Space::Shared {
                home.variables.entry((event.owner, address)).or_default().release(by, site.block, &what);
            } else {
                self.race.variables.with(address, |all| {
                    all.entry((grid, address)).or_default().release(by, site.block, &what);
                });
            }
        }
    }

    fn acquire(&mut self, site: &Site, event: &MemoryEvent) {
        let (h, _, warp) = self.find(site.block, site.warp);
        let grid = self.grid;
        let home = &mut self.homes[h];
        for address in Self::places(event) {
            if event.space == Space::Shared {
                if let Some(v) = home.variables.remove(&(event.owner, address)) {
                    v.acquire(home, warp, site.block, event.order, event.scope);
                    home.variables.insert((event.owner, address), v);
                }
            } else {
                self.race.variables.with(address, |all| {
                    if let Some(v) = all.get(&(grid, address)) {
                        v.acquire(home, warp, site.block, event.order, event.scope);
                    }
                });
            }
        }
    }

    /// Copies of the lanes that `due` says are there now: for their thread, they are written.
    fn land_copies(&mut self, site: &Site, due: impl Fn(&Copy, &[u32; 32]) -> u32) {
        let (h, _, warp) = self.find(site.block, site.warp);
        self.homes[h].tick();
        let w = &mut self.homes[h].warps[warp];
        let committed = w.committed;
        let mut copies = std::mem::take(&mut w.copies);
        copies.retain_mut(|c| {
            let landed = due(c, &committed) & c.mask;
            if landed != 0 {
                let site = Site { line: c.line, ..*site };
                self.check(&site, &c.event(landed));
            }
            c.mask &= !landed;
            c.mask != 0
        });
        self.homes[h].warps[warp].copies = copies;
    }

    /// An mbarrier object is used like a word by atomic accesses, and initialised like one by a write.
    fn touch_object(&mut self, site: &Site, at: ObjectPlace, lane: u32, kind: AccessKind) {
        let event = MemoryEvent {
            kind,
            engine: Engine::Thread,
            space: Space::Shared,
            addresses: &[u64::from(at.offset); 32],
            mask: 1 << lane,
            bytes: 8,
            order: Order::Weak,
            scope: Scope::Cluster,
            owner: at.owner,
            stored: None,
        };
        let (h, _, warp) = self.find(site.block, site.warp);
        if let Some((home, conflict, stamp)) = self.enter(site, &event) {
            let other = conflict.other;
            let init = (other.warp() as usize, other.time);
            let known = kind == AccessKind::Atomic && other.kind() == 1 && other.same_launch(stamp);
            if !(known && other.home == stamp.home && self.homes[h].knows_init(at, warp, init)) {
                self.report(home, site, &event, &conflict, stamp);
            }
        }
    }

    /// A bulk copy has landed: its writes happen now.
    fn land_transfer(&mut self, site: &Site, id: u64) {
        let (h, _, warp) = self.find(site.block, site.warp);
        if let Some(a) = self.homes[h].arrivals.remove(&id) {
            self.land_copies(site, |c, _| if c.number < a.before { a.lanes } else { 0 });
            let home = &mut self.homes[h];
            let phase = home.objects.get(&a.at).map_or(0, |o| o.current);
            lanes_of(a.lanes).for_each(|lane| home.arrive_object(a.at, phase, warp, lane as u32));
        }
        if let Some(t) = self.homes[h].transfers.remove(&id) {
            self.homes[h].tick();
            let site = Site { line: t.line, ..*site };
            for w in &t.writes {
                // Who touched these bytes since the issue is the asynchrony checker's business.
                let event = MemoryEvent {
                    kind: w.kind,
                    engine: Engine::Bulk,
                    space: w.space,
                    addresses: &w.addresses,
                    mask: w.mask,
                    bytes: w.bytes,
                    order: Order::Weak,
                    scope: Scope::Gpu,
                    owner: w.owner,
                    stored: None,
                };
                let _ = self.enter(&site, &event);
            }
            self.homes[h].tick();
        }
    }
}

impl Copy {
    fn event(&self, mask: u32) -> MemoryEvent<'_> {
        MemoryEvent {
            kind: AccessKind::Write,
            engine: Engine::CopyAsync,
            space: Space::Shared,
            addresses: &self.to,
            mask,
            bytes: self.bytes,
            order: Order::Weak,
            scope: Scope::Cta,
            owner: self.owner,
            stored: None,
        }
    }
}

/// Both accesses are those of two lanes of one store.
fn same_store(event: &MemoryEvent, me: Stamp, c: &Conflict) -> bool {
    let (lane, other) = (c.lane as usize & 31, c.other_lane as usize & 31);
    let overlap = event.addresses[lane].abs_diff(event.addresses[other]) < u64::from(event.bytes);
    let one = |s: Stamp| (s.home, s.warp(), s.line(), s.time);
    let writes = event.kind == AccessKind::Write && c.other.kind() == 1;
    writes && one(c.other) == one(me) && event.mask >> other & 1 != 0 && overlap
}

/// Splits an access into runs of lanes with adjacent addresses.
#[inline(always)]
fn runs(event: &MemoryEvent, mut each: impl FnMut(Run)) {
    let (a, bytes, mask) = (event.addresses, u64::from(event.bytes), event.mask);
    if mask == 0 {
        return;
    }
    let shift = event.bytes.trailing_zeros();
    let first = mask.trailing_zeros() as usize;
    if event.kind == AccessKind::Read && mask.count_ones() > 1 && lanes_of(mask).all(|i| a[i] == a[first]) {
        return each(Run { lane: first as u32, from: a[first], to: a[first] + bytes, shift: MANY });
    }
    let mut rest = mask;
    while rest != 0 {
        let lane = rest.trailing_zeros() as usize;
        let mut end = lane + 1;
        while end < 32 && rest >> end & 1 != 0 && a[end] == a[end - 1] + bytes {
            end += 1;
        }
        each(Run { lane: lane as u32, from: a[lane], to: a[end - 1] + bytes, shift });
        rest &= u32::MAX.checked_shl(end as u32).unwrap_or(0);
    }
}

/// The cells that a run touches: index, part of the cell and the part's first lane.
#[inline(always)]
fn each_cell(run: &Run, size: u32, mut each: impl FnMut(u64, (u32, u32), u32)) {
    let bytes = u64::from(size);
    let mut at = run.from;
    while at < run.to {
        let cell = at / bytes;
        let start = cell * bytes;
        let end = run.to.min(start + bytes);
        let lane = if run.shift == MANY { run.lane } else { run.lane + ((at - run.from) >> run.shift) as u32 };
        each(cell, ((at - start) as u32, (end - start) as u32), lane);
        at = end;
    }
}

pub(super) fn global(pages: &mut Pages, run: &Run, by: &Accessor, found: &mut Option<Conflict>) {
    let mut at = run.from;
    while at < run.to {
        let end = run.to.min((at / PAGE + 1) * PAGE);
        let lane = if run.shift == MANY { run.lane } else { run.lane + ((at - run.from) >> run.shift) as u32 };
        let part = Run { lane, from: at, to: end, shift: run.shift };
        let mut cells = pages.get(at).cells();
        each_cell(&part, CELL, |cell, part, lane| {
            cells[(cell % (PAGE / u64::from(CELL))) as usize].access(CELL, part, lane, run.shift, by, found);
        });
        at = end;
    }
}

impl Observer for RaceObserver<'_> {
    fn block(&mut self, b: &BlockSite, event: BlockEvent) {
        match event {
            BlockEvent::Begin => {
                let h = match self.of_block.get(&b.cluster) {
                    Some(&h) => h,
                    None => {
                        let h = self.free.pop().unwrap_or_else(|| {
                            self.homes.push(Home::default());
                            self.homes.len() - 1
                        });
                        self.homes[h].id = b.cluster as u32;
                        h
                    }
                };
                let parts = self.spare.pop().unwrap_or_default();
                self.homes[h].begin(b.block, b.threads, b.shared_bytes, parts);
                self.of_block.insert(b.block, h);
            }
            BlockEvent::End => {
                self.last.0 = u64::MAX;
                let Some(h) = self.of_block.remove(&b.block) else { return };
                if !self.of_block.values().any(|&other| other == h) {
                    self.spare.extend(std::mem::take(&mut self.homes[h]).blocks);
                    self.free.push(h);
                }
            }
        }
    }

    fn memory(&mut self, site: &Site, event: &MemoryEvent) {
        if event.space == Space::Local {
            return;
        }
        self.check(site, event);
        let strong = event.order != Order::Weak || event.kind == AccessKind::Atomic;
        if strong && event.kind != AccessKind::Read {
            self.release(site, event);
        }
        let (h, _, warp) = self.find(site.block, site.warp);
        let home = &mut self.homes[h];
        if event.engine == Engine::Bulk && event.kind != AccessKind::Read {
            let current = home.current;
            if let Some(t) = home.transfers.get_mut(&current) {
                let &MemoryEvent { kind, space, addresses, mask, bytes, owner, .. } = event;
                t.writes.push(Write { kind, space, addresses: *addresses, mask, bytes, owner });
            }
        }
        if event.engine == Engine::CopyAsync && event.kind == AccessKind::Write {
            home.issued += 1;
            let number = home.issued;
            let w = &mut home.warps[warp];
            w.copies.push(Copy {
                mask: event.mask,
                to: *event.addresses,
                bytes: event.bytes,
                line: site.line,
                group: w.committed,
                number,
                owner: event.owner,
            });
        }
    }

    fn performed(&mut self, site: &Site, event: &MemoryEvent) {
        if event.kind != AccessKind::Write && event.space != Space::Local {
            self.acquire(site, event);
        }
    }

    fn sync(&mut self, site: &Site, event: &SyncEvent) {
        let (h, rank, warp) = self.find(site.block, site.warp);
        let home = &mut self.homes[h];
        match *event {
            SyncEvent::BarrierArrive { id, mask } => home.arrive(rank, id as usize, warp, mask),
            SyncEvent::BarrierLeave { id, mask } => home.leave(rank, id as usize, warp, mask),
            SyncEvent::BarrierComplete { id } => home.blocks[rank].barriers[id as usize].clear(),
            SyncEvent::WarpBarrier { mask } => home.warp_barrier(warp, mask),
            SyncEvent::GridWait => home.warps[warp].waited = true,
            SyncEvent::Fence { order, scope, .. } => home.fence(warp, order, scope),
            SyncEvent::CopyCommit { mask } => {
                let committed = &mut home.warps[warp].committed;
                lanes_of(mask).for_each(|i| committed[i] += 1);
            }
            SyncEvent::CopyWait { keep, mask } => self.land_copies(site, |c, committed| {
                let due = |i: &usize| c.group[*i].saturating_add(keep) < committed[*i];
                lanes_of(c.mask & mask).filter(due).fold(0, |m, i| m | 1 << i)
            }),
            SyncEvent::CopyArrive { id, at, mask } => {
                let before = home.issued + 1;
                home.arrivals.insert(id, CopyArrival { at, lanes: mask, before });
            }
            SyncEvent::MbarrierInit { at, lane, .. } => {
                home.objects.remove(&at);
                home.inits.insert(at, (warp, home.now));
                self.touch_object(site, at, lane, AccessKind::Write);
            }
            SyncEvent::ProxyFence { kind: ProxyFence::MbarrierInit, .. } => home.fence_inits(warp),
            SyncEvent::MbarrierInval { at, lane } => self.touch_object(site, at, lane, AccessKind::Write),
            SyncEvent::MbarrierArrive { at, lane, phase, order, scope, .. } => {
                if order != Order::Relaxed && (scope != Scope::Cta || at.owner == site.block) {
                    home.arrive_object(at, phase, warp, lane);
                } else if order == Order::Relaxed {
                    home.arrive_object_relaxed(at, phase, (warp, lane), at.owner == site.block);
                }
                self.touch_object(site, at, lane, AccessKind::Atomic);
            }
            SyncEvent::MbarrierPhase { at, phase } => home.objects.entry(at).or_default().current = phase + 1,
            SyncEvent::MbarrierWait { at, lane, phase, order, scope } => {
                self.touch_object(site, at, lane, AccessKind::Atomic);
                if order == Order::Relaxed {
                    self.homes[h].wait_object_relaxed(at, phase, warp, scope);
                } else {
                    self.homes[h].wait_object(at, phase, warp, lane);
                }
            }
            SyncEvent::BulkIssue { id, .. } => {
                home.tick();
                home.current = id;
                home.transfers.insert(id, Transfer { line: site.line, writes: Vec::new() });
            }
            SyncEvent::BulkLand { id, .. } => self.land_transfer(site, id),
            SyncEvent::BulkAbandon { id } => {
                home.transfers.remove(&id);
            }
            SyncEvent::BulkComplete { at, phase, .. } => home.complete_object(at, phase, home.transfers(rank)),
            SyncEvent::BulkWait { .. } => {
                let (now, index) = (home.tick(), home.transfers(rank));
                home.warps[warp].known[index] = now;
            }
            SyncEvent::ClusterArrive { mask, release } => home.arrive_cluster(warp, mask, release),
            SyncEvent::ClusterLeave { mask } => home.leave_cluster(warp, mask),
            SyncEvent::WgmmaIssue { number, first: true } => {
                home.tick();
                let (engine, time) = (home.products(rank, site.warp), home.now);
                let list = home.products.entry(engine).or_default();
                list.truncate(PRODUCTS);
                list.insert(0, Product { number, time });
            }
            SyncEvent::WgmmaWait { complete, .. } => {
                home.tick();
                home.wait_products(rank, site.warp, warp, complete);
            }
            _ => {}
        }
    }
}
