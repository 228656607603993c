//! A set-associative cache of lines of four sectors.
//!
//! Lines are replaced by eviction priority, the latest access's, and among those of one priority least recently used first; a sector is
//! filled on its own when it is missed. What NVIDIA's caches do instead is not published.

use crate::exec::policy::Priority;

/// Sectors of a line.
pub const SECTORS: u32 = 4;

/// Groups of this many lines are permuted by the bits above them before they are spread over the sets, so that strides of a
/// power of two do not all meet in a few sets, while whole groups of consecutive lines still fill every set alike.
const GROUP_BITS: u32 = 10;

#[derive(Debug, Clone, Copy, Default)]
struct Line {
    line: u64,
    priority: Priority,
    /// When it was last used.
    used: u32,
    /// The cache's epoch in which it was filled: of another one, it is empty.
    epoch: u32,
    /// Bit s: sector s is there; is newer than memory.
    valid: u8,
    dirty: u8,
}

/// What a look-up did, in sectors as bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    pub hits: u8,
    /// Dirty sectors of a line that had to make room.
    pub written_back: u8,
}

/// A cache. Its contents are forgotten at no cost by [`Cache::clear`], so that one can serve many launches.
#[derive(Debug)]
pub struct Cache {
    ways: usize,
    sets: u64,
    lines: Vec<Line>,
    clock: u32,
    epoch: u32,
    /// Dirty sectors in the whole cache.
    dirty: u64,
}

impl Cache {
    /// A cache of at least one set of `ways` lines of 128 bytes.
    pub fn new(bytes: u64, ways: usize) -> Cache {
        let sets = (bytes / u64::from(crate::device::LINE_BYTES) / ways as u64).max(1);
        Cache { ways, sets, lines: vec![Line::default(); sets as usize * ways], clock: 0, epoch: 1, dirty: 0 }
    }

    /// Sectors that are newer than memory.
    pub fn dirty(&self) -> u64 {
        self.dirty
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
        if self.epoch == 0 {
            self.lines.fill(Line::default());
            self.epoch = 1;
        }
        self.clock = 0;
        self.dirty = 0;
    }

    fn set(&self, line: u64) -> usize {
        let mask = (1 << GROUP_BITS) - 1;
        let folded = line ^ (line >> GROUP_BITS ^ line >> (2 * GROUP_BITS)) & mask;
        (folded % self.sets) as usize * self.ways
    }

    /// Looks sectors of a line up, and has them there afterwards, dirty if asked.
    pub fn access(&mut self, line: u64, sectors: u8, dirty: bool, priority: Priority) -> Outcome {
        self.clock += 1;
        let start = self.set(line);
        let (epoch, clock) = (self.epoch, self.clock);
        let set = &mut self.lines[start..start + self.ways];
        let new_dirty = if dirty { sectors } else { 0 };
        if let Some(found) = set.iter_mut().find(|l| l.line == line && l.epoch == epoch) {
            let hits = found.valid & sectors;
            found.valid |= sectors;
            self.dirty += u64::from((new_dirty & !found.dirty).count_ones());
            found.dirty |= new_dirty;
            found.used = clock;
            if priority != Priority::Unchanged {
                found.priority = priority;
            }
            return Outcome { hits, written_back: 0 };
        }
        let priority = if priority == Priority::Unchanged { Priority::Normal } else { priority };
        let age = |l: &Line| if l.epoch == epoch { (l.priority, l.used) } else { (Priority::First, 0) };
        let victim = set.iter_mut().min_by_key(|l| age(l)).expect("a set has ways");
        let written_back = if victim.epoch == epoch { victim.dirty } else { 0 };
        *victim = Line { line, priority, used: clock, epoch, valid: sectors, dirty: new_dirty };
        self.dirty += u64::from(new_dirty.count_ones());
        self.dirty -= u64::from(written_back.count_ones());
        Outcome { hits: 0, written_back }
    }

    /// Drops sectors of a line, if it is there, without writing them back.
    pub fn invalidate(&mut self, line: u64, sectors: u8) {
        let start = self.set(line);
        let epoch = self.epoch;
        let set = &mut self.lines[start..start + self.ways];
        if let Some(found) = set.iter_mut().find(|l| l.line == line && l.epoch == epoch) {
            found.valid &= !sectors;
            self.dirty -= u64::from((found.dirty & sectors).count_ones());
            found.dirty &= !sectors;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_are_filled_one_by_one_and_the_oldest_line_makes_room() {
        // One set of two lines.
        let mut cache = Cache::new(256, 2);
        let mut hits = |line, sectors, dirty| {
            let Outcome { hits, written_back } = cache.access(line, sectors, dirty, Priority::Normal);
            (hits, written_back)
        };
        assert_eq!(hits(1, 0b0011, false), (0, 0));
        assert_eq!(hits(1, 0b0110, true), (0b0010, 0));
        assert_eq!(hits(2, 0b1111, false), (0, 0));
        // Line 1 is older than line 2, though it was first.
        assert_eq!(hits(1, 0b0001, false), (0b0001, 0));
        assert_eq!(hits(3, 0b0001, false), (0, 0));
        assert_eq!(hits(1, 0b0111, false), (0b0111, 0));
        assert_eq!(hits(2, 0b0001, false), (0, 0));
        assert_eq!(hits(3, 0b0001, false), (0, 0b0110), "line 1 goes, and two sectors of it are dirty");
        assert_eq!(cache.dirty(), 0);
        cache.clear();
        assert_eq!(cache.access(3, 1, true, Priority::Normal), Outcome { hits: 0, written_back: 0 });
        cache.access(3, 0b10, true, Priority::Normal);
        cache.invalidate(3, 0b10);
        assert_eq!(cache.dirty(), 1);
    }

    #[test]
    fn lines_make_room_by_priority_and_then_by_age() {
        // One set of three lines.
        let mut cache = Cache::new(384, 3);
        let mut is_there = |line, priority| cache.access(line, 15, false, priority).hits == 15;
        use Priority::{First, Last, Normal, Unchanged};
        assert!(!is_there(1, Last) && !is_there(2, Normal) && !is_there(3, First));
        assert!(!is_there(4, Normal), "in 3's place, though 1 and 2 are older");
        assert!(is_there(1, Unchanged) && is_there(2, Normal) && !is_there(5, Normal), "in 4's place");
        assert!(is_there(1, Normal) && is_there(2, Last) && is_there(5, Last));
        assert!(!is_there(6, Normal) && !is_there(1, Normal), "1 was the last's no more");
        assert!(is_there(2, Last) && is_there(5, First) && !is_there(7, Normal) && !is_there(5, Normal));
    }

    #[test]
    fn a_range_of_the_cache_s_size_fits_whatever_its_start() {
        // The sets of an H100's, an A100's, an H200's and an L4's L2.
        for mib in [50, 40, 60, 48] {
            let mut cache = Cache::new(mib << 20, 16);
            let lines = (mib << 20) / 128;
            for start in [0, 1 << 20, 7 << 14] {
                for pass in 0..2 {
                    let hits = (start..start + lines)
                        .filter(|&line| cache.access(line, 15, false, Priority::Normal).hits == 15)
                        .count();
                    assert_eq!(hits as u64, pass * lines, "{mib} MiB from {start}");
                }
                cache.clear();
            }
        }
    }

    #[test]
    fn powers_of_two_do_not_meet_in_one_set() {
        let mut cache = Cache::new(50 << 20, 16);
        let columns = || (0..4096).map(|row| row * 1024);
        columns().for_each(|line| assert_eq!(cache.access(line, 1, false, Priority::Normal).hits, 0));
        assert!(columns().all(|line| cache.access(line, 1, false, Priority::Normal).hits == 1));
    }
}
