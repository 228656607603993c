//! Records a launch's requests to global memory and replays them through the modelled caches: see [`super::traffic`].

use std::collections::HashMap;
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
