//! What a warp knows of other warps: up to which moment their accesses come before its own.
//!
//! A *home* is a cluster of blocks (a single block where there are no clusters), which one host thread runs, so that its events
//! are totally ordered: `now` counts its synchronising operations. An access is stamped with the home's `now`, and warp `w`
//! knows of warp `u` up to the time `known[u]`.

/// Stands for every warp of a home.
const ALL: u16 = u16::MAX;
/// Entries above which knowledge of other homes is coarsened.
const MOST: usize = 128;
/// Homes are told apart by their remainder once knowledge has been coarsened.
const SLOTS: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    home: u32,
    warp: u16,
    time: u32,
}

impl Entry {
    fn key(&self) -> (u32, u16) {
        (self.home, self.warp)
    }
}

/// Knowledge of warps by home and index. Exact for up to [`MOST`] entries; beyond, that of a home's latest moment is taken for
/// all of its warps, and homes share slots: more is then known than should be, so that a race may be missed but none invented.
#[derive(Debug, Clone, Default)]
pub struct Away {
    /// Sorted by home and warp.
    entries: Vec<Entry>,
    coarse: Option<Box<[u32; SLOTS]>>,
}

impl Away {
    /// Of nothing.
    pub const NONE: Away = Away { entries: Vec::new(), coarse: None };

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.coarse.is_none()
    }

    pub fn clear(&mut self) {
        self.entries.clear();
        self.coarse = None;
    }

    /// The time up to which a warp is known.
    pub fn time(&self, home: u32, warp: u32) -> u32 {
        let coarse = self.coarse.as_ref().map_or(0, |c| c[home as usize % SLOTS]);
        let at = |warp: u16| {
            let found = self.entries.binary_search_by_key(&(home, warp), Entry::key);
            found.map_or(0, |i| self.entries[i].time)
        };
        if self.entries.is_empty() { coarse } else { coarse.max(at(warp as u16)).max(at(ALL)) }
    }

    /// Adds what is known of a home's warps: of all up to the least time, and of each up to its own. Not all indices are of
    /// `warps`; the others matter only if something is known of them.
    pub fn publish(&mut self, home: u32, times: &[u32], warps: impl Fn(usize) -> bool) {
        let real = times.iter().enumerate().filter(|&(i, _)| warps(i));
        let least = real.map(|(_, &t)| t).min().unwrap_or(0);
        if least > 0 {
            self.raise(home, ALL, least);
        }
        for (warp, &time) in times.iter().enumerate().filter(|&(_, &t)| t > least) {
            self.raise(home, warp as u16, time);
        }
        self.limit();
    }

    /// What is known of one home.
    pub fn only(&self, home: u32) -> Away {
        let entries = self.entries.iter().filter(|e| e.home == home).copied().collect();
        let coarse = self.coarse.as_ref().map(|c| {
            let mut one = Box::new([0; SLOTS]);
            one[home as usize % SLOTS] = c[home as usize % SLOTS];
            one
        });
        Away { entries, coarse }
    }

    fn raise(&mut self, home: u32, warp: u16, time: u32) {
        match self.entries.binary_search_by_key(&(home, warp), Entry::key) {
            Ok(i) => self.entries[i].time = self.entries[i].time.max(time),
            Err(i) => self.entries.insert(i, Entry { home, warp, time }),
        }
    }

    fn limit(&mut self) {
        if self.entries.len() <= MOST {
            return;
        }
        let coarse = self.coarse.get_or_insert_with(|| Box::new([0; SLOTS]));
        for e in self.entries.drain(..) {
            let slot = &mut coarse[e.home as usize % SLOTS];
            *slot = (*slot).max(e.time);
        }
    }

    pub fn join(&mut self, other: &Away) {
        if let Some(theirs) = &other.coarse {
            let ours = self.coarse.get_or_insert_with(|| Box::new([0; SLOTS]));
            for (a, b) in ours.iter_mut().zip(theirs.iter()) {
                *a = (*a).max(*b);
            }
        }
        if self.entries.is_empty() {
            self.entries.extend_from_slice(&other.entries);
        } else {
            other.entries.iter().for_each(|e| self.raise(e.home, e.warp, e.time));
        }
        self.limit();
    }
}

/// Raises every element to the other's.
pub fn join(to: &mut [u32], from: &[u32]) {
    for (a, b) in to.iter_mut().zip(from) {
        *a = (*a).max(*b);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knowledge_is_exact_while_it_is_small() {
        let mut a = Away::default();
        a.publish(3, &[5, 2, 2, 0], |i| i < 3);
        assert_eq!((a.time(3, 0), a.time(3, 1), a.time(3, 2), a.time(4, 0)), (5, 2, 2, 0));
        let mut b = Away::default();
        b.publish(3, &[1, 9, 1], |_| true);
        b.publish(259, &[7], |_| true);
        a.join(&b);
        assert_eq!((a.time(3, 0), a.time(3, 1), a.time(3, 2), a.time(259, 0)), (5, 9, 2, 7));
    }

    #[test]
    fn coarse_knowledge_is_never_less() {
        let mut a = Away::default();
        (0..300).for_each(|home| a.publish(home, &[home + 1, 1], |_| true));
        assert!((0..300).all(|home| a.time(home, 0) > home && a.time(home, 1) >= 1));
    }
}
