//! Traffic through the caches of the device: recorded while a kernel runs, replayed when it has ended.
//!
//! Host threads run blocks in an order that no GPU would and that differs from run to run, so caches cannot be simulated
//! while they do. Instead the global requests of each block are recorded, and replayed in an order that depends on the
//! launch alone:
//!
//! - Warps of a block take turns, one request each; a barrier of the block that completes ends a round of turns.
//! - Blocks are given to multiprocessors in launch order, one to each, as many times as the occupancy says; whenever a block
//!   has no requests left, its place takes the next. All places take turns, one request each.
//!
//! Every multiprocessor has an L1 cache of what shared memory leaves of its SRAM; weak loads and `cp.async.ca` look it up,
//! unless a cache operator keeps them out. Stores go through it, and update what it holds; atomic operations drop what it
//! holds. Everything else goes to the one L2 cache, which is written back: to device memory go the sectors that it misses
//! and dirty sectors that make room for others. A launch begins with empty caches, as under Nsight Compute's cache control,
//! and dirty sectors that are left at its end count as written, so that a launch's numbers are its own.
//!
//! Loads of loops that only wait for others are recorded once for each time that a warp is run.
//!
//! Not modelled: replacement other than least recently used; the two partitions of the L2 and what crosses between them;
//! prefetches and fetches of more than a sector; eviction priorities and cache policies; sectors that a write covers only in
//! part (as if memory took any bytes); compression; caches of constants and instructions; local memory. Memory pages are
//! numbered in the order in which the replay first touches them, 2 MiB each, so that results do not depend on where the host
//! put the device's memory.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::replay::Model;
use crate::device::{Description, LINE_BYTES, SECTOR_BYTES};
use crate::exec::Launch;
use crate::exec::observe::{AccessKind, BlockEvent, BlockSite, Engine, MemoryEvent, Observer, Site, SyncEvent, Watch};
use crate::ptx::ast::Space;

/// The caches of a launch's device, and how many blocks share them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hierarchy {
    pub sm_count: u32,
    /// Blocks that a multiprocessor holds at once, at least 1.
    pub blocks_per_sm: u32,
    /// Bytes of each multiprocessor's L1 cache.
    pub l1_bytes: u32,
    pub l2_bytes: u32,
}

impl Hierarchy {
    /// The caches of `device` while each multiprocessor holds `blocks_per_sm` blocks of `shared` bytes.
    pub fn new(device: &Description, blocks_per_sm: u32, shared: u64) -> Hierarchy {
        let blocks_per_sm = blocks_per_sm.max(1);
        Hierarchy {
            sm_count: device.sm_count,
            blocks_per_sm,
            l1_bytes: device.l1_bytes(u64::from(blocks_per_sm) * shared),
            l2_bytes: device.l2_bytes,
        }
    }
}

/// What went through the modelled caches, in sectors of 32 bytes unless it says bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Traffic {
    /// Sectors that loads looked up in L1.
    pub l1_sectors: u64,
    pub l1_hits: u64,
    /// Sectors that L2 was asked for: by loads that missed L1 or passed it by.
    pub l2_read_sectors: u64,
    pub l2_read_hits: u64,
    pub l2_write_sectors: u64,
    /// Sectors of atomic operations, which read and write.
    pub l2_atomic_sectors: u64,
    pub dram_read_bytes: u64,
    /// Written back, those sectors included that were dirty when the launch ended.
    pub dram_write_bytes: u64,
    /// Of those, what was still in L2 when the launch ended: 0 for none.
    pub dirty_at_end_bytes: u64,
    /// The trace outgrew its memory, so that blocks were replayed in pieces, as they ended: numbers may vary a little.
    pub in_pieces: bool,
}

impl Traffic {
    /// Bytes that L2 moved to and from the multiprocessors.
    pub fn l2_bytes(&self) -> u64 {
        let sectors = self.l2_read_sectors + self.l2_write_sectors + 2 * self.l2_atomic_sectors;
        sectors * u64::from(SECTOR_BYTES)
    }

    pub fn dram_bytes(&self) -> u64 {
        self.dram_read_bytes + self.dram_write_bytes
    }

    pub fn add(&mut self, other: &Traffic) {
        self.l1_sectors += other.l1_sectors;
        self.l1_hits += other.l1_hits;
        self.l2_read_sectors += other.l2_read_sectors;
        self.l2_read_hits += other.l2_read_hits;
        self.l2_write_sectors += other.l2_write_sectors;
        self.l2_atomic_sectors += other.l2_atomic_sectors;
        self.dram_read_bytes += other.dram_read_bytes;
        self.dram_write_bytes += other.dram_write_bytes;
        self.dirty_at_end_bytes += other.dirty_at_end_bytes;
        self.in_pieces |= other.in_pieces;
    }
}

/// How a run of lines is accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// A load that looks up L1.
    Cached,
    /// A load that does not.
    Uncached,
    Store,
    Atomic,
}

/// Part of a request: up to [`Run::MOST`] consecutive lines of which the same sectors are accessed. From the low end: 41
/// bits of the first line, 4 of its sectors, 2 of the path, 1 that says whether it begins a request, 16 of the count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run(u64);

impl Run {
    const MOST: u64 = 0xffff;

    fn new(line: u64, sectors: u8, path: Path, first: bool) -> Run {
        debug_assert!(line < 1 << 41);
        Run(line | u64::from(sectors) << 41 | (path as u64) << 45 | u64::from(first) << 47 | 1 << 48)
    }

    pub fn line(self) -> u64 {
        self.0 & ((1 << 41) - 1)
    }

    pub fn sectors(self) -> u8 {
        (self.0 >> 41 & 15) as u8
    }

    pub fn path(self) -> Path {
        [Path::Cached, Path::Uncached, Path::Store, Path::Atomic][(self.0 >> 45 & 3) as usize]
    }

    pub fn first(self) -> bool {
        self.0 >> 47 & 1 == 1
    }

    pub fn count(self) -> u64 {
        self.0 >> 48
    }

    /// Takes one more line into the run, if it is the next one and is accessed alike.
    fn extend(&mut self, line: u64, sectors: u8) -> bool {
        let fits = line == self.line() + self.count() && sectors == self.sectors() && self.count() < Self::MOST;
        if fits {
            self.0 += 1 << 48;
        }
        fits
    }
}

/// Runs of a block that are kept before they are handed over unfinished.
const MOST_OF_BLOCK: usize = 4 << 20;
/// Runs of a launch that are kept before what there is is replayed: 256 MiB.
const MOST_OF_LAUNCH: usize = 32 << 20;

/// Records one launch and replays it. Made for each launch; read after it with [`TrafficWatch::finish`].
#[derive(Debug)]
pub struct TrafficWatch {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    hierarchy: Hierarchy,
    /// Blocks that have ended, or parts of such that have not, in order of arrival.
    blocks: Vec<(u64, Vec<Run>)>,
    runs: usize,
    model: Model,
}

/// Models that wait for their next launch: they are large, and empty at no cost.
static SPARE: Mutex<Vec<Model>> = Mutex::new(Vec::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TrafficWatch {
    pub fn new(hierarchy: Hierarchy) -> Arc<TrafficWatch> {
        let mut spare = lock(&SPARE);
        let fits = spare.iter().position(|model| model.fits(&hierarchy));
        let model = fits.map(|at| spare.swap_remove(at)).unwrap_or_else(|| Model::new(&hierarchy));
        let state = State { hierarchy, blocks: Vec::new(), runs: 0, model };
        Arc::new(TrafficWatch { state: Mutex::new(state) })
    }

    /// Replays what was recorded.
    pub fn finish(&self) -> Traffic {
        let mut state = lock(&self.state);
        state.replay();
        state.model.end()
    }
}

impl Drop for TrafficWatch {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut model = std::mem::replace(&mut state.model, Model::empty());
        model.end();
        let mut spare = lock(&SPARE);
        if spare.len() < 2 {
            spare.push(model);
        }
    }
}

impl State {
    fn take(&mut self, block: u64, runs: Vec<Run>) {
        self.runs += runs.len();
        self.blocks.push((block, runs));
        if self.runs > MOST_OF_LAUNCH {
            self.model.note_pieces();
            self.replay();
        }
    }

    fn replay(&mut self) {
        let mut blocks = std::mem::take(&mut self.blocks);
        self.runs = 0;
        // Stable: parts of one block stay in order.
        blocks.sort_by_key(|(block, _)| *block);
        self.model.replay(&self.hierarchy, blocks.iter().map(|(_, runs)| runs.as_slice()));
    }
}

impl Watch for TrafficWatch {
    fn observer<'a>(&'a self, _: &'a Launch<'a>, _: u64) -> Option<Box<dyn Observer + 'a>> {
        Some(Box::new(Recorder { state: &self.state, blocks: HashMap::new(), sectors: Vec::new() }))
    }
}

/// What one host thread records.
struct Recorder<'w> {
    state: &'w Mutex<State>,
    /// Blocks in flight.
    blocks: HashMap<u64, Trace>,
    sectors: Vec<u64>,
}

/// The requests of a block so far.
#[derive(Debug, Default)]
struct Trace {
    /// In their final order.
    done: Vec<Run>,
    /// Since the last barrier, by warp.
    warps: Vec<Vec<Run>>,
    /// Runs in `warps`.
    pending: usize,
}

impl Trace {
    /// Lets the warps take turns, one request each.
    fn interleave(&mut self) {
        self.done.reserve(self.pending);
        let mut at = vec![0; self.warps.len()];
        while self.pending > 0 {
            for (warp, at) in self.warps.iter().zip(&mut at) {
                let from = *at;
                if from == warp.len() {
                    continue;
                }
                *at = warp[from + 1..].iter().position(|run| run.first()).map_or(warp.len(), |next| from + 1 + next);
                self.done.extend_from_slice(&warp[from..*at]);
                self.pending -= *at - from;
            }
        }
        self.warps.iter_mut().for_each(Vec::clear);
    }
}

impl Recorder<'_> {
    fn hand_over(&mut self, block: u64, end: bool) {
        let Some(trace) = self.blocks.get_mut(&block) else { return };
        trace.interleave();
        let runs = std::mem::take(&mut trace.done);
        if end {
            self.blocks.remove(&block);
        }
        let mut state = lock(self.state);
        if !end {
            state.model.note_pieces();
        }
        state.take(block, runs);
    }
}

impl Observer for Recorder<'_> {
    fn memory(&mut self, site: &Site, event: &MemoryEvent) {
        if event.space != Space::Global || site.repeated {
            return;
        }
        let path = match (event.kind, event.engine) {
            (AccessKind::Atomic, _) => Path::Atomic,
            (AccessKind::Write, _) => Path::Store,
            (AccessKind::Read, Engine::Thread | Engine::CopyAsync) if !site.uncached => Path::Cached,
            (AccessKind::Read, _) => Path::Uncached,
        };
        let sector = u64::from(SECTOR_BYTES);
        let list = &mut self.sectors;
        list.clear();
        let mut mask = event.mask;
        while mask != 0 {
            let from = event.addresses[mask.trailing_zeros() as usize];
            list.extend(from / sector..=(from + u64::from(event.bytes) - 1) / sector);
            mask &= mask - 1;
        }
        if !list.is_sorted() {
            list.sort_unstable();
        }
        let trace = self.blocks.entry(site.block).or_default();
        let warp = site.warp as usize;
        if trace.warps.len() <= warp {
            trace.warps.resize_with(warp + 1, Vec::new);
        }
        let runs = &mut trace.warps[warp];
        let before = runs.len();
        let per_line = u64::from(LINE_BYTES / SECTOR_BYTES);
        let mut push = |line: u64, sectors: u8| {
            let first = runs.len() == before;
            if first || !runs.last_mut().is_some_and(|run| run.extend(line, sectors)) {
                runs.push(Run::new(line, sectors, path, first));
            }
        };
        let mut current = (u64::MAX, 0);
        for &mut sector in list {
            let (line, bit) = (sector / per_line, 1 << (sector % per_line));
            if line == current.0 {
                current.1 |= bit;
                continue;
            }
            if current.1 != 0 {
                push(current.0, current.1);
            }
            current = (line, bit);
        }
        if current.1 != 0 {
            push(current.0, current.1);
        }
        trace.pending += runs.len() - before;
        if trace.pending + trace.done.len() > MOST_OF_BLOCK {
            self.hand_over(site.block, false);
        }
    }

    fn sync(&mut self, site: &Site, event: &SyncEvent) {
        if let SyncEvent::BarrierComplete { .. } = event
            && let Some(trace) = self.blocks.get_mut(&site.block)
        {
            trace.interleave();
        }
    }

    fn block(&mut self, block: &BlockSite, event: BlockEvent) {
        if event == BlockEvent::End {
            self.hand_over(block.block, true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warps_take_turns() {
        let run = |line, first| Run::new(line, 15, Path::Cached, first);
        let mut trace = Trace {
            done: vec![run(0, true)],
            warps: vec![vec![run(1, true), run(2, false), run(3, true)], vec![], vec![run(4, true)]],
            pending: 4,
        };
        trace.interleave();
        let order: Vec<u64> = trace.done.iter().map(|run| run.line()).collect();
        assert_eq!((order, trace.pending), (vec![0, 1, 2, 4, 3], 0));
    }

    #[test]
    fn runs_hold_what_they_are_made_of() {
        for path in [Path::Cached, Path::Uncached, Path::Store, Path::Atomic] {
            let line = (1 << 41) - 10;
            let mut run = Run::new(line, 0b1010, path, true);
            assert!(run.extend(line + 1, 0b1010) && !run.extend(line + 1, 0b1010) && !run.extend(line + 2, 0b1011));
            let parts = (run.line(), run.sectors(), run.path(), run.first(), run.count());
            assert_eq!(parts, (line, 0b1010, path, true, 2));
        }
    }
}
