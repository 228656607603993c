//! Requests to global memory as they are recorded: of each block, in the order in which the replay takes them.

use crate::exec::policy::Priority;

/// How a run of lines is accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// A load that looks up L1.
    Cached,
    /// A load that does not.
    Uncached,
    Store,
    Atomic,
}

/// What is in a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    Access(Run),
    /// The block has got here: others that wait for this number may go on.
    Says(u64),
    /// The block goes on when another has got to where it says this number.
    Awaits(u64),
}

/// Part of a request: up to [`Run::MOST`] consecutive lines of which the same sectors are accessed. From the low end: 41
/// bits of the first line, 4 of its sectors, 2 of the path, 1 that says whether it begins a request, 2 of the priority, 14 of the
/// count. Without a count it is a number that a block says or awaits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run(u64);

impl Run {
    const MOST: u64 = 0x3fff;

    pub fn new(line: u64, sectors: u8, path: Path, priority: Priority, first: bool) -> Run {
        debug_assert!(line < 1 << 41);
        let flags = (path as u64) << 45 | u64::from(first) << 47 | (priority as u64) << 48;
        Run(line | u64::from(sectors) << 41 | flags | 1 << 50)
    }

    pub fn says(number: u64) -> Run {
        Run(number | 1 << 47)
    }

    pub fn awaits(number: u64) -> Run {
        Run(number | 1 << 47 | 1 << 45)
    }

    pub fn entry(self) -> Entry {
        match (self.count(), self.0 >> 45 & 1) {
            (0, 0) => Entry::Says(self.line()),
            (0, _) => Entry::Awaits(self.line()),
            _ => Entry::Access(self),
        }
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

    pub fn priority(self) -> Priority {
        [Priority::First, Priority::Normal, Priority::Last, Priority::Unchanged][(self.0 >> 48 & 3) as usize]
    }

    pub fn first(self) -> bool {
        self.0 >> 47 & 1 == 1
    }

    pub fn count(self) -> u64 {
        self.0 >> 50
    }

    /// Takes one more line into the run, if it is the next one and is accessed alike.
    pub fn extend(&mut self, line: u64, sectors: u8, priority: Priority) -> bool {
        let fits = line == self.line() + self.count()
            && (sectors, priority) == (self.sectors(), self.priority())
            && self.count() < Self::MOST;
        if fits {
            self.0 += 1 << 50;
        }
        fits
    }
}

/// The requests of a block so far.
#[derive(Debug, Default)]
pub struct Trace {
    /// In their final order.
    pub done: Vec<Run>,
    /// Since the last barrier or phase, by warp.
    pub warps: Vec<Vec<Run>>,
    /// Runs in `warps`.
    pub pending: usize,
}

impl Trace {
    /// Lets the warps take turns, one request each.
    pub fn interleave(&mut self) {
        if self.pending == 0 {
            return;
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warps_take_turns() {
        let run = |line, first| Run::new(line, 15, Path::Cached, Priority::Normal, first);
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
        let priorities = [Priority::First, Priority::Normal, Priority::Last, Priority::Unchanged];
        for (path, priority) in [Path::Cached, Path::Uncached, Path::Store, Path::Atomic].into_iter().zip(priorities) {
            let line = (1 << 41) - 10;
            let mut run = Run::new(line, 0b1010, path, priority, true);
            assert!(run.extend(line + 1, 0b1010, priority) && !run.extend(line + 1, 0b1010, priority));
            assert!(!run.extend(line + 2, 0b1011, priority));
            assert!(!run.extend(line + 2, 0b1010, priorities[usize::from(priority == Priority::First)]));
            let parts = (run.line(), run.sectors(), run.path(), run.priority(), run.first(), run.count());
            assert_eq!(parts, (line, 0b1010, path, priority, true, 2));
            assert_eq!(run.entry(), Entry::Access(run));
        }
        assert_eq!((Run::says(7).entry(), Run::awaits(1 << 40).entry()), (Entry::Says(7), Entry::Awaits(1 << 40)));
    }
}
