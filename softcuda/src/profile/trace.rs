//! Requests to global memory as they are recorded: of each block, in the order in which the replay takes them.

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

/// Part of a request: up to [`Run::MOST`] consecutive lines of which the same sectors are accessed. From the low end: 41
/// bits of the first line, 4 of its sectors, 2 of the path, 1 that says whether it begins a request, 16 of the count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run(u64);

impl Run {
    const MOST: u64 = 0xffff;

    pub fn new(line: u64, sectors: u8, path: Path, first: bool) -> Run {
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
    pub fn extend(&mut self, line: u64, sectors: u8) -> bool {
        let fits = line == self.line() + self.count() && sectors == self.sectors() && self.count() < Self::MOST;
        if fits {
            self.0 += 1 << 48;
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
