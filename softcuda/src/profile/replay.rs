//! The caches of a device, and requests that go through them.

use std::collections::{HashMap, HashSet};

use super::cache::{Cache, SECTORS};
use super::trace::{Entry, Path, Run};
use super::traffic::{Hierarchy, Traffic};
use crate::device::SECTOR_BYTES;
use crate::exec::policy::Priority;

/// Lines to a set of either cache. What hardware has is not published.
const WAYS: usize = 16;

/// Lines in a page of 2 MiB.
const PAGE_BITS: u32 = 14;

/// L1 caches, the L2 cache, and what has gone through them.
#[derive(Debug)]
pub struct Model {
    l1_bytes: u32,
    l2_bytes: u32,
    l1: Vec<Cache>,
    l2: Cache,
    pages: Pages,
    traffic: Traffic,
}

/// Numbers pages in the order in which they are first touched.
#[derive(Debug, Default)]
struct Pages {
    numbers: HashMap<u64, u64>,
    /// Page and number of the latest look-up.
    latest: Option<(u64, u64)>,
}

impl Pages {
    fn place(&mut self, line: u64) -> u64 {
        let page = line >> PAGE_BITS;
        let number = match self.latest {
            Some((latest, number)) if latest == page => number,
            _ => {
                let next = self.numbers.len() as u64;
                let number = *self.numbers.entry(page).or_insert(next);
                self.latest = Some((page, number));
                number
            }
        };
        number << PAGE_BITS | line & ((1 << PAGE_BITS) - 1)
    }
}

/// Sectors of a request that take a place's turn: 16 bytes for each lane of a warp. A larger one, a box of the copy engine, takes as many
/// turns as there are such in it: what lies between a multiprocessor and L2 passes bytes at a rate.
const SECTORS_OF_A_TURN: u64 = 16;

/// A place for a block: which multiprocessor it is on, and what is left of the block there.
struct Place<'r> {
    sm: usize,
    rest: &'r [Run],
    /// Turns that the latest request still takes.
    busy: u64,
}

impl Place<'_> {
    /// Past what the block says and awaits, up to its next request: whether it need not wait. A block that is not `patient` does not.
    fn goes_on(&mut self, said: &mut HashSet<u64>, patient: bool) -> bool {
        while let [run, rest @ ..] = self.rest {
            match run.entry() {
                Entry::Access(_) => break,
                Entry::Says(number) => {
                    said.insert(number);
                }
                Entry::Awaits(number) if patient && !said.remove(&number) => return false,
                Entry::Awaits(_) => {}
            }
            self.rest = rest;
        }
        true
    }
}

impl Model {
    pub fn new(h: &Hierarchy) -> Model {
        let l1 = || Cache::new(h.l1_bytes.into(), WAYS);
        Model {
            l1_bytes: h.l1_bytes,
            l2_bytes: h.l2_bytes,
            l1: (0..h.sm_count).map(|_| l1()).collect(),
            l2: Cache::new(h.l2_bytes.into(), WAYS),
            pages: Pages::default(),
            traffic: Traffic::default(),
        }
    }

    /// A stand-in without caches.
    pub fn empty() -> Model {
        Model::new(&Hierarchy { sm_count: 0, blocks_per_sm: 1, l1_bytes: 0, l2_bytes: 0 })
    }

    /// Whether the caches are those of `h`.
    pub fn fits(&self, h: &Hierarchy) -> bool {
        (self.l1_bytes, self.l2_bytes, self.l1.len()) == (h.l1_bytes, h.l2_bytes, h.sm_count as usize)
    }

    /// Sends the requests of blocks, given in launch order, through the caches.
    pub fn replay<'r>(&mut self, h: &Hierarchy, blocks: impl Iterator<Item = &'r [Run]>) {
        let mut blocks = blocks.filter(|block| !block.is_empty());
        let places = h.sm_count as usize * h.blocks_per_sm as usize;
        let mut places: Vec<Place> = (0..places)
            .map_while(|place| blocks.next().map(|rest| Place { sm: place % h.sm_count as usize, rest, busy: 0 }))
            .collect();
        let mut said = HashSet::new();
        // Where all wait, what they wait for is not here: it was replayed before, or its block has no place yet.
        let mut patient = true;
        while !places.is_empty() {
            let mut moved = false;
            places.retain_mut(|place| {
                if place.busy > 0 {
                    place.busy -= 1;
                    moved = true;
                    return true;
                }
                if !place.goes_on(&mut said, patient) {
                    return true;
                }
                moved = true;
                self.request(place);
                // What it says at its end nobody must miss.
                place.goes_on(&mut said, true);
                if place.rest.is_empty()
                    && let Some(next) = blocks.next()
                {
                    place.rest = next;
                }
                !place.rest.is_empty()
            });
            patient = moved;
        }
    }

    /// The next request of a block.
    fn request(&mut self, place: &mut Place) {
        let mut sectors = 0;
        while let [run, rest @ ..] = place.rest {
            sectors += run.count() * u64::from(run.sectors().count_ones());
            for line in run.line()..run.line() + run.count() {
                let line = self.pages.place(line);
                self.line(place.sm, line, *run);
            }
            place.rest = rest;
            if rest.first().is_some_and(|run| run.first()) {
                break;
            }
        }
        place.busy = sectors.div_ceil(SECTORS_OF_A_TURN).saturating_sub(1);
    }

    fn line(&mut self, sm: usize, line: u64, run: Run) {
        let (sectors, path, priority) = (run.sectors(), run.path(), run.priority());
        let count = |sectors: u8| u64::from(sectors.count_ones());
        let bytes = |sectors: u8| count(sectors) * u64::from(SECTOR_BYTES);
        debug_assert!(sectors < 1 << SECTORS);
        let t = &mut self.traffic;
        let mut wanted = sectors;
        match path {
            Path::Cached => {
                let hits = self.l1[sm].access(line, sectors, false, Priority::Normal).hits;
                t.l1_sectors += count(sectors);
                t.l1_hits += count(hits);
                wanted &= !hits;
            }
            Path::Atomic => self.l1[sm].invalidate(line, sectors),
            Path::Uncached | Path::Store => {}
        }
        if wanted == 0 {
            return;
        }
        let outcome = self.l2.access(line, wanted, matches!(path, Path::Store | Path::Atomic), priority);
        let missed = wanted & !outcome.hits;
        match path {
            Path::Cached | Path::Uncached => {
                t.l2_read_sectors += count(wanted);
                t.l2_read_hits += count(outcome.hits);
                t.dram_read_bytes += bytes(missed);
            }
            Path::Store => t.l2_write_sectors += count(wanted),
            Path::Atomic => {
                t.l2_atomic_sectors += count(wanted);
                t.dram_read_bytes += bytes(missed);
            }
        }
        t.dram_write_bytes += bytes(outcome.written_back);
    }

    /// What has gone through the caches since this was last asked.
    pub fn take_traffic(&mut self) -> Traffic {
        std::mem::take(&mut self.traffic)
    }

    /// Bytes of L2 that are newer than memory.
    pub fn dirty_bytes(&self) -> u64 {
        self.l2.dirty() * u64::from(SECTOR_BYTES)
    }

    /// Empties the L1 caches, as at the end of a launch.
    pub fn forget_l1(&mut self) {
        self.l1.iter_mut().for_each(Cache::clear);
    }

    /// Empties all caches.
    pub fn forget(&mut self) {
        self.forget_l1();
        self.l2.clear();
        self.pages = Pages::default();
        self.traffic = Traffic::default();
    }

    /// Takes the caches' sizes from `h`; what L2 holds stays if its size does.
    pub fn adopt(&mut self, h: &Hierarchy) {
        if self.fits(h) {
            return;
        }
        let fresh = Model::new(h);
        if self.l2_bytes == h.l2_bytes {
            (self.l1_bytes, self.l1) = (fresh.l1_bytes, fresh.l1);
        } else {
            *self = fresh;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two multiprocessors of one block each, and an L2 cache of one set.
    const PAIR: Hierarchy = Hierarchy { sm_count: 2, blocks_per_sm: 1, l1_bytes: 2048, l2_bytes: 128 * WAYS as u32 };

    /// A request of a sector of each of these lines, one after the other.
    fn reads(lines: impl Iterator<Item = u64>) -> Vec<Run> {
        lines.map(|line| Run::new(line, 1, Path::Uncached, Priority::Normal, true)).collect()
    }

    /// Sectors that L2 fetches for these blocks.
    fn fetched(blocks: &[Vec<Run>]) -> u64 {
        fetched_by(&PAIR, blocks)
    }

    fn fetched_by(h: &Hierarchy, blocks: &[Vec<Run>]) -> u64 {
        let mut model = Model::new(h);
        model.replay(h, blocks.iter().map(Vec::as_slice));
        model.take_traffic().dram_read_bytes / u64::from(SECTOR_BYTES)
    }

    #[test]
    fn a_block_goes_on_when_another_has_got_to_where_it_waits_for() {
        // Line 0, and as many others as L2 holds, so that it is gone.
        let all = reads(0..WAYS as u64 + 1);
        let says = [all.clone(), vec![Run::says(7)]].concat();
        let early = [&all[..1], &[Run::says(7)], &all[1..]].concat();
        let awaits = [vec![Run::awaits(7)], reads(0..1)].concat();
        let each_once = WAYS as u64 + 1;
        // Side by side they share it; the second time it is fetched again.
        assert_eq!(fetched(&[reads(0..1), all]), each_once);
        assert_eq!(fetched(&[awaits.clone(), says.clone()]), each_once + 1);
        assert_eq!(fetched(&[says, awaits.clone()]), each_once + 1);
        assert_eq!(fetched(&[awaits, early]), each_once);
    }

    #[test]
    fn what_a_block_says_at_its_end_is_heard_in_the_same_turn() {
        let trio = Hierarchy { sm_count: 3, ..PAIR };
        let ways = WAYS as u64;
        let says = [reads(0..ways), vec![Run::says(7)]].concat();
        // In the turn after its last one line 0 would be gone.
        let goes_on = reads(0..ways + 1);
        let awaits = [vec![Run::awaits(7)], reads(0..1)].concat();
        assert_eq!(fetched_by(&trio, &[says, goes_on, awaits]), ways + 1);
    }

    #[test]
    fn each_that_waits_takes_a_word_of_its_own() {
        // The first wait takes what is said; the second, which nobody answers, ends when all that is left waits.
        let awaits = [vec![Run::awaits(7)], reads(100..101), vec![Run::awaits(7)], reads(0..1)].concat();
        let says = [reads(0..1), vec![Run::says(7)], reads(1..WAYS as u64 + 1)].concat();
        assert_eq!(fetched(&[awaits, says]), WAYS as u64 + 3);
    }
}
