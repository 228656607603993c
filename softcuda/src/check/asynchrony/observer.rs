//! What one host thread sees.

use rustc_hash::FxHashMap;

use super::flight::{Arrival, Flight, Kind, Operation, Spot, Unwaited, WORD};
use crate::check::{Checker, Finding, Findings};
use crate::exec::observe::{
    AccessKind, BlockEvent, BlockSite, Engine, MemoryEvent, Observer, ProxyFence, Site, SyncEvent,
};
use crate::lower::Kernel;
use crate::ptx::ast::Space;

pub struct AsyncObserver<'a> {
    findings: &'a Findings,
    kernel: &'a Kernel,
    /// The kernel uses the asynchronous proxy.
    proxied: bool,
    flights: FxHashMap<u64, Flight>,
    cluster_of: FxHashMap<u64, u64>,
}

fn lanes_of(mask: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |i| mask >> i & 1 != 0)
}

impl<'a> AsyncObserver<'a> {
    pub fn new(findings: &'a Findings, kernel: &'a Kernel, proxied: bool) -> Self {
        AsyncObserver { findings, kernel, proxied, flights: FxHashMap::default(), cluster_of: FxHashMap::default() }
    }

    fn report(&self, class: &'static str, message: String, place: Spot, other: Option<Spot>) {
        let (place, other) = (Some(place.place(self.kernel)), other.map(|spot| spot.place(self.kernel)));
        let finding = Finding { checker: Checker::Async, message, place, other, times: 1 };
        self.findings.report(class, finding);
    }

    fn flight(&mut self, block: u64) -> &mut Flight {
        let cluster = self.cluster_of.get(&block).copied().unwrap_or(block);
        self.flights.entry(cluster).or_default()
    }

    /// Checks an access to shared memory, and takes hold of its words where it is an operation's.
    fn access(&mut self, site: &Site, e: &MemoryEvent) {
        let proxied = self.proxied;
        let flight = self.flight(site.block);
        if e.engine == Engine::Thread && e.kind == AccessKind::Read && flight.operations.is_empty() {
            return;
        }
        if e.engine == Engine::CopyAsync {
            let group = flight.warps.entry((site.block, site.warp)).or_default().committed;
            let kind = Kind::Copy { mask: e.mask, to: *e.addresses, bytes: e.bytes, group };
            let place = Spot::new(site, e.mask.trailing_zeros() as usize);
            flight.issue(Operation { kind, block: site.block, warp: site.warp, place, read: true });
        }
        let own = if e.engine == Engine::Thread { 0 } else { flight.current };
        let Some(mut words) = flight.words.remove(&e.owner) else { return };
        let asynchronous = matches!(e.engine, Engine::Wgmma | Engine::Bulk);
        let (writes, reads) = (e.kind != AccessKind::Read, e.kind != AccessKind::Write);
        let reduces = e.engine == Engine::Bulk && e.kind == AccessKind::Atomic;
        if e.engine == Engine::Thread && writes && proxied {
            flight.now += 1;
        }
        let (now, oldest) = (flight.now, flight.oldest());
        let mut found: Option<(&'static str, String, usize, Option<Spot>)> = None;
        for lane in lanes_of(e.mask) {
            let at = e.addresses[lane];
            for word in at / WORD..(at + u64::from(e.bytes)).div_ceil(WORD) {
                let i = word as usize;
                if i >= words.written_by.len() {
                    continue;
                }
                if found.is_none() {
                    if let Some(o) = flight.alive(words.written_by[i], own, oldest)
                        && o.writes(word)
                        && !(reduces && matches!(o.kind, Kind::Bulk { atomic: true }))
                    {
                        let (class, verb) =
                            if reads && !writes { ("early", "read") } else { ("overwritten", "written") };
                        let message =
                            format!("shared memory at {at:#x} is {verb} while a {} to it is in flight", o.name());
                        found = Some((class, message, lane, Some(o.place)));
                    } else if writes
                        && let Some(o) = flight.alive(words.read_by[i], own, oldest)
                        && !o.read
                    {
                        let message =
                            format!("shared memory at {at:#x} is written while a {} may still read it", o.name());
                        found = Some(("reused", message, lane, Some(o.place)));
                    } else if asynchronous && reads && words.generic[i].1 != 0 {
                        let (writer, time) = words.generic[i];
                        let fenced = |warp: u32| flight.warps.get(&(site.block, warp)).is_some_and(|w| w.fenced > time);
                        let group = site.warp & !3;
                        let mut readers =
                            if e.engine == Engine::Wgmma { group..group + 4 } else { site.warp..site.warp + 1 };
                        if !fenced(writer) && !readers.any(fenced) {
                            let who = if e.engine == Engine::Wgmma { "`wgmma`" } else { "a bulk copy" };
                            let message = format!(
                                "{who} reads shared memory at {at:#x} that warp {writer} wrote without a `fence.proxy.async` since"
                            );
                            found = Some(("proxy", message, lane, None));
                        }
                    }
                }
                if e.engine == Engine::Thread {
                    if writes && proxied {
                        words.generic[i] = (site.warp, now);
                    }
                } else {
                    if writes {
                        words.written_by[i] = own;
                        if asynchronous {
                            words.generic[i] = (0, 0);
                        }
                    }
                    if reads && !reduces {
                        words.read_by[i] = own;
                    }
                }
            }
        }
        flight.words.insert(e.owner, words);
        if e.engine == Engine::Bulk
            && reads
            && !reduces
            && let Some(u) = flight.unwaited.last_mut()
            && u.block == site.block
        {
            u.reads_shared = true;
        }
        if let Some((class, message, lane, other)) = found {
            let lane = if e.engine == Engine::Thread || e.engine == Engine::CopyAsync { lane } else { 0 };
            self.report(class, message, Spot::new(site, lane), other);
        }
    }

    fn end(&mut self, block: u64) {
        let Some(cluster) = self.cluster_of.remove(&block) else { return };
        let Some(flight) = self.flights.get_mut(&cluster) else { return };
        flight.blocks -= 1;
        if flight.blocks != 0 {
            return;
        }
        let Some(flight) = self.flights.remove(&cluster) else { return };
        for o in flight.operations.into_values() {
            let name = o.name();
            match o.kind {
                Kind::Copy { .. } => {
                    self.report(
                        "unwaited",
                        format!("the block ends, and nobody has waited for this {name}"),
                        o.place,
                        None,
                    );
                }
                Kind::Product { .. } => {
                    self.report(
                        "unwaited",
                        format!("the block ends, and nobody has waited for this {name}"),
                        o.place,
                        None,
                    );
                }
                Kind::Bulk { .. } => {}
            }
        }
        for u in flight.unwaited.into_iter().filter(|u| u.reads_shared) {
            let message = "the block ends, and its thread has not waited for this bulk copy to have read shared memory";
            self.report("unwaited", message.to_owned(), u.place, None);
        }
    }
}

impl Observer for AsyncObserver<'_> {
    fn block(&mut self, b: &BlockSite, event: BlockEvent) {
        match event {
            BlockEvent::Begin => {
                self.cluster_of.insert(b.block, b.cluster);
                self.flight(b.block).begin(b.block, b.shared_bytes);
            }
            BlockEvent::End => self.end(b.block),
        }
    }

    fn memory(&mut self, site: &Site, event: &MemoryEvent) {
        if event.space == Space::Shared {
            self.access(site, event);
        }
    }

    fn sync(&mut self, site: &Site, event: &SyncEvent) {
        let proxied = self.proxied;
        let (block, warp) = (site.block, site.warp);
        let flight = self.flight(block);
        let me = (block, warp);
        match *event {
            SyncEvent::CopyCommit { mask } => {
                let w = flight.warps.entry(me).or_default();
                lanes_of(mask).for_each(|i| w.committed[i] += 1);
            }
            SyncEvent::CopyWait { keep, mask } => {
                let committed = flight.warps.entry(me).or_default().committed;
                flight.land(block, warp, proxied, |_, group| {
                    let due = |i: &usize| group[*i].saturating_add(keep) < committed[*i];
                    lanes_of(mask).filter(due).fold(0, |m, i| m | 1 << i)
                });
            }
            SyncEvent::CopyArrive { id, mask, .. } => {
                let before = flight.issued() + 1;
                flight.arrivals.insert(id, Arrival { block, warp, lanes: mask, before });
            }
            SyncEvent::WgmmaFence => flight.warps.entry(me).or_default().wgmma_fenced = true,
            SyncEvent::WgmmaIssue { number, first } => {
                let fenced = flight.warps.entry(me).or_default().wgmma_fenced;
                flight.current = 0;
                if first {
                    let (kind, place) = (Kind::Product { number }, Spot::new(site, 0));
                    flight.issue(Operation { kind, block, warp, place, read: false });
                }
                if !fenced {
                    let message = "a warp's first `wgmma` without a `wgmma.fence` before it".to_owned();
                    self.report("fence", message, Spot::new(site, 0), None);
                }
            }
            SyncEvent::WgmmaUnfenced { touched } => {
                let other = Spot::new(&Site { line: touched, ..*site }, 0);
                let message = "`wgmma` on a register that was touched without a `wgmma.fence` since".to_owned();
                self.report("fence", message, Spot::new(site, 0), Some(other));
            }
            SyncEvent::WgmmaTouch { .. } => {
                let message =
                    "a register that a `wgmma` in flight reads or writes is touched before the wait".to_owned();
                self.report("register", message, Spot::new(site, 0), None);
            }
            SyncEvent::WgmmaWait { complete, .. } => {
                let done = |o: &Operation| {
                    matches!(o.kind, Kind::Product { number } if number < complete)
                        && (o.block, o.warp / 4) == (block, warp / 4)
                };
                flight.operations.retain(|_, o| !done(o));
            }
            SyncEvent::BulkIssue { id, lane, bulk_group, .. } => {
                let place = Spot::new(site, lane as usize);
                if bulk_group {
                    let group = flight.warps.entry(me).or_default().bulk_committed[lane as usize & 31];
                    flight.unwaited.push(Unwaited { block, warp, lane, group, reads_shared: false, place });
                }
                let kind = Kind::Bulk {
                    atomic: site
                        .kernel
                        .lines
                        .get(site.line as usize - 1)
                        .is_some_and(|l| l.contains("cp.reduce") || l.contains("red.async")),
                };
                let number = flight.issue(Operation { kind, block, warp, place, read: false });
                flight.bulk.insert(id, number);
            }
            SyncEvent::BulkRead { id, .. } => {
                if let Some(o) = flight.bulk.get(&id).and_then(|n| flight.operations.get_mut(n)) {
                    o.read = true;
                }
            }
            SyncEvent::BulkLand { id, .. } | SyncEvent::BulkAbandon { id } => {
                if let Some(n) = flight.bulk.remove(&id) {
                    flight.operations.remove(&n);
                }
                if let Some(a) = flight.arrivals.remove(&id) {
                    flight.land(a.block, a.warp, proxied, |number, _| if number < a.before { a.lanes } else { 0 });
                }
            }
            SyncEvent::BulkCommit { mask } => {
                let w = flight.warps.entry(me).or_default();
                lanes_of(mask).for_each(|i| w.bulk_committed[i] += 1);
            }
            SyncEvent::BulkWait { keep, mask, .. } => {
                let committed = flight.warps.entry(me).or_default().bulk_committed;
                flight.unwaited.retain(|u| {
                    let lane = u.lane as usize & 31;
                    let mine = (u.block, u.warp) == me && mask >> lane & 1 != 0;
                    !(mine && u.group.saturating_add(keep) < committed[lane])
                });
            }
            SyncEvent::ProxyFence {
                kind: ProxyFence::Async(None | Some(Space::Shared | Space::SharedCluster)),
                ..
            } => {
                flight.now += 1;
                let now = flight.now;
                // Generic writes of the fence's own moment come before it.
                flight.warps.entry(me).or_default().fenced = now;
            }
            _ => {}
        }
    }
}
