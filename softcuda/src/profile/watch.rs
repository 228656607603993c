//! Records a launch's requests to global memory and replays them through the modelled caches: see [`super::traffic`].

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::replay::Model;
use super::trace::{Path, Run, Trace};
use super::traffic::{Hierarchy, Traffic};
use crate::device::{LINE_BYTES, SECTOR_BYTES};
use crate::exec::Launch;
use crate::exec::observe::{AccessKind, BlockEvent, BlockSite, Engine, MemoryEvent, Observer, Site, SyncEvent, Watch};
use crate::ptx::ast::Space;

/// Runs of a block that are kept before they are handed over unfinished.
const MOST_OF_BLOCK: usize = 4 << 20;
/// Runs of a launch that are kept before what there is is replayed: 256 MiB.
const MOST_OF_LAUNCH: usize = 32 << 20;

/// L2 of a device from one launch to the next, for [`Start::Carried`].
#[derive(Debug, Clone)]
pub struct CarriedCaches(Arc<Mutex<Model>>);

impl Default for CarriedCaches {
    fn default() -> CarriedCaches {
        CarriedCaches(Arc::new(Mutex::new(Model::empty())))
    }
}

impl CarriedCaches {
    /// As at the beginning.
    pub fn clear(&self) {
        lock(&self.0).forget();
    }
}

/// What L2 holds when a launch begins: [`super::Caches`], with those that are carried.
#[derive(Debug, Clone, Default)]
pub enum Start {
    #[default]
    Cold,
    Warm,
    Carried(CarriedCaches),
}

/// Records one launch and replays it. Made for each launch; read after it with [`TrafficWatch::finish`].
#[derive(Debug)]
pub struct TrafficWatch {
    state: Mutex<State>,
    numbers: AtomicU64,
}

#[derive(Debug)]
struct State {
    hierarchy: Hierarchy,
    start: Start,
    /// Blocks that have ended, or parts of such that have not, in order of arrival.
    blocks: Vec<(u64, Vec<Run>)>,
    runs: usize,
    model: CarriedCaches,
    in_pieces: bool,
    /// Of the pieces that were replayed already.
    traffic: Traffic,
}

/// Models that wait for their next launch: they are large, and empty at no cost.
static SPARE: Mutex<Vec<Model>> = Mutex::new(Vec::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TrafficWatch {
    /// With cold caches.
    pub fn new(hierarchy: Hierarchy) -> Arc<TrafficWatch> {
        TrafficWatch::starting(hierarchy, Start::Cold)
    }

    pub fn starting(hierarchy: Hierarchy, start: Start) -> Arc<TrafficWatch> {
        let model = match &start {
            Start::Carried(model) => model.clone(),
            Start::Cold | Start::Warm => {
                let mut spare = lock(&SPARE);
                let fits = spare.iter().position(|model| model.fits(&hierarchy));
                let model = fits.map(|at| spare.swap_remove(at)).unwrap_or_else(|| Model::new(&hierarchy));
                CarriedCaches(Arc::new(Mutex::new(model)))
            }
        };
        let (blocks, runs, in_pieces, traffic) = (Vec::new(), 0, false, Traffic::default());
        let state = State { hierarchy, start, blocks, runs, model, in_pieces, traffic };
        Arc::new(TrafficWatch { state: Mutex::new(state), numbers: AtomicU64::new(0) })
    }

    /// Replays what was recorded.
    pub fn finish(&self) -> Traffic {
        let mut state = lock(&self.state);
        // Of a launch in pieces the earlier ones are gone, but for its size what L2 held at the start matters little.
        if matches!(state.start, Start::Warm) && !state.in_pieces {
            state.replay();
            state.traffic = Traffic::default();
        }
        state.replay();
        state.blocks.clear();
        let mut traffic = std::mem::take(&mut state.traffic);
        traffic.in_pieces = state.in_pieces;
        let mut model = lock(&state.model.0);
        traffic.dirty_at_end_bytes = model.dirty_bytes();
        match state.start {
            Start::Carried(_) => {}
            Start::Warm => model.forget(),
            Start::Cold => {
                traffic.dram_write_bytes += traffic.dirty_at_end_bytes;
                model.forget();
            }
        }
        traffic
    }
}

impl Drop for TrafficWatch {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if matches!(state.start, Start::Carried(_)) {
            return;
        }
        let mut model = std::mem::replace(&mut *lock(&state.model.0), Model::empty());
        model.forget();
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
            self.in_pieces = true;
            self.replay();
            self.blocks.clear();
            self.runs = 0;
        }
    }

    /// Sends what there is through the caches.
    fn replay(&mut self) {
        // Stable: parts of one block stay in order.
        self.blocks.sort_by_key(|(block, _)| *block);
        let mut model = lock(&self.model.0);
        model.adopt(&self.hierarchy);
        model.replay(&self.hierarchy, self.blocks.iter().map(|(_, runs)| runs.as_slice()));
        model.forget_l1();
        self.traffic.add(&model.take_traffic());
    }
}

impl Watch for TrafficWatch {
    fn observer<'a>(&'a self, _: &'a Launch<'a>, _: u64) -> Option<Box<dyn Observer + 'a>> {
        Some(Box::new(Recorder {
            state: &self.state,
            numbers: &self.numbers,
            blocks: HashMap::new(),
            sectors: Vec::new(),
        }))
    }
}

/// What one host thread records.
struct Recorder<'w> {
    state: &'w Mutex<State>,
    /// How many phases of a block's objects another one has completed.
    numbers: &'w AtomicU64,
    /// Blocks in flight.
    blocks: HashMap<u64, Trace>,
    sectors: Vec<u64>,
}

impl Recorder<'_> {
    fn interleave(&mut self, block: u64) {
        if let Some(trace) = self.blocks.get_mut(&block) {
            trace.interleave();
        }
    }

    fn hand_over(&mut self, block: u64, end: bool) {
        let Some(trace) = self.blocks.get_mut(&block) else { return };
        trace.interleave();
        let runs = std::mem::take(&mut trace.done);
        if end {
            self.blocks.remove(&block);
        }
        let mut state = lock(self.state);
        if !end {
            state.in_pieces = true;
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
            let (first, priority) = (runs.len() == before, site.policy.of_line(line));
            if first || !runs.last_mut().is_some_and(|run| run.extend(line, sectors, priority)) {
                runs.push(Run::new(line, sectors, path, priority, first));
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
        let owner = match event {
            SyncEvent::BarrierComplete { .. } => site.block,
            SyncEvent::MbarrierPhase { at, .. } => at.owner,
            _ => return,
        };
        self.interleave(owner);
        if owner != site.block {
            self.interleave(site.block);
            let number = self.numbers.fetch_add(1, Ordering::Relaxed);
            self.blocks.entry(site.block).or_default().done.push(Run::says(number));
            self.blocks.entry(owner).or_default().done.push(Run::awaits(number));
        }
    }

    fn block(&mut self, block: &BlockSite, event: BlockEvent) {
        if event == BlockEvent::End {
            self.hand_over(block.block, true);
        }
    }
}
