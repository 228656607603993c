//! Counting, for launches that ask for it.

use std::collections::BTreeMap;

use super::access::space_of;
use super::counters::{Counters, LineCounters, MemoryCounters, SharedCounters};
use super::lanes::{LANES, active};
use super::state::{Machine, Worker};
use crate::ptx::ast::Space;

/// What one host thread has counted.
#[derive(Debug, Default)]
pub struct Tally {
    /// Warps and threads that ran each block.
    blocks: Vec<(u64, u64)>,
    lines: Vec<LineCounters>,
    matrix: BTreeMap<String, u64>,
    pub finished_blocks: u64,
    pub finished_warps: u64,
}

/// Bytes of a sector of global memory.
const SECTOR: u64 = 32;
/// Bytes that shared memory delivers at once: 32 banks of 4 bytes.
const WAVEFRONT: u64 = 128;

impl Tally {
    pub fn new(blocks: usize, lines: usize) -> Self {
        Self { blocks: vec![(0, 0); blocks], lines: vec![LineCounters::default(); lines], ..Self::default() }
    }

    /// Adds up by instruction class and line.
    pub fn finish(self, worker: &Worker) -> Counters {
        let mut c = Counters {
            lines: self.lines,
            matrix: self.matrix,
            blocks: self.finished_blocks,
            warps: self.finished_warps,
            ..Counters::default()
        };
        for (block, (warps, threads)) in worker.body.blocks.iter().zip(self.blocks) {
            for &(line, class) in &block.instructions {
                c.warp_instructions[class as usize] += warps;
                c.thread_instructions += threads;
                if let Some(l) = c.lines.get_mut((line as usize).wrapping_sub(1)) {
                    l.warp_instructions += warps;
                    l.thread_instructions += threads;
                }
            }
        }
        for l in &c.lines {
            c.global.add(&l.global);
            c.shared.add(&l.shared);
        }
        c
    }
}

impl Machine<'_, '_> {
    #[inline(never)]
    pub fn count_block(&mut self, block: u32, lanes: u32) {
        if let Some(t) = &mut self.worker.tally {
            let (warps, threads) = &mut t.blocks[block as usize];
            *warps += 1;
            *threads += u64::from(lanes.count_ones());
        }
    }

    #[inline(never)]
    pub fn count_matrix(&mut self, name: &str) {
        if let Some(t) = &mut self.worker.tally {
            match t.matrix.get_mut(name) {
                Some(n) => *n += 1,
                None => {
                    t.matrix.insert(name.to_string(), 1);
                }
            }
        }
    }

    #[inline(never)]
    pub fn count_access(&mut self, space: Option<Space>, addresses: &[u64; LANES], mask: u32, bytes: u32, pc: u32) {
        let line = self.line(pc) as usize;
        let Some(t) = &mut self.worker.tally else { return };
        let Some(l) = t.lines.get_mut(line.wrapping_sub(1)) else { return };
        let of = |i: usize| space.unwrap_or_else(|| space_of(addresses[i]));
        let shared =
            active(mask).filter(|&i| matches!(of(i), Space::Shared | Space::SharedCluster)).fold(0, |m, i| m | 1 << i);
        let global = active(mask).filter(|&i| of(i) == Space::Global).fold(0, |m, i| m | 1 << i);
        if shared != 0 {
            l.shared.add(&wavefronts(addresses, shared, bytes));
        }
        if global != 0 {
            l.global.add(&sectors(addresses, global, bytes));
        }
    }
}

fn sectors(addresses: &[u64; LANES], mask: u32, bytes: u32) -> MemoryCounters {
    let mut touched: Vec<u64> =
        active(mask).flat_map(|i| addresses[i] / SECTOR..=(addresses[i] + u64::from(bytes) - 1) / SECTOR).collect();
    touched.sort_unstable();
    touched.dedup();
    let mut starts: Vec<u64> = active(mask).map(|i| addresses[i]).collect();
    starts.sort_unstable();
    starts.dedup();
    let ideal = (starts.len() as u64 * u64::from(bytes)).div_ceil(SECTOR);
    MemoryCounters { requests: 1, sectors: touched.len() as u64, ideal_sectors: ideal }
}

/// Accesses of 8 and 16 bytes take the lanes by halves and quarters. Within such a part each bank delivers one word at a
/// time; lanes that read the same word share it.
fn wavefronts(addresses: &[u64; LANES], mask: u32, bytes: u32) -> SharedCounters {
    let lanes = (WAVEFRONT / u64::from(bytes.max(4))).min(32) as usize;
    let mut c = SharedCounters { requests: 1, ..SharedCounters::default() };
    for part in 0..LANES / lanes {
        let mut words: Vec<u64> = active(mask)
            .filter(|i| i / lanes == part)
            .flat_map(|i| addresses[i] / 4..=(addresses[i] + u64::from(bytes) - 1) / 4)
            .collect();
        if words.is_empty() {
            continue;
        }
        words.sort_unstable();
        words.dedup();
        let mut banks = [0u64; 32];
        for w in words {
            banks[(w % 32) as usize] += 1;
        }
        c.wavefronts += banks.iter().max().copied().unwrap_or(0);
        c.ideal_wavefronts += 1;
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    fn each(f: impl Fn(u64) -> u64) -> [u64; LANES] {
        std::array::from_fn(|i| f(i as u64))
    }

    #[test]
    fn bank_conflicts() {
        let count = |a: &[u64; LANES], bytes| {
            let c = wavefronts(a, u32::MAX, bytes);
            (c.wavefronts, c.ideal_wavefronts)
        };
        assert_eq!(count(&each(|i| 4 * i), 4), (1, 1));
        assert_eq!(count(&each(|_| 64), 4), (1, 1));
        assert_eq!(count(&each(|i| 8 * i), 4), (2, 1));
        assert_eq!(count(&each(|i| 128 * i), 4), (32, 1));
        assert_eq!(count(&each(|i| 16 * i), 16), (4, 4));
        assert_eq!(count(&each(|i| 32 * i), 16), (8, 4));
        assert_eq!(count(&each(|i| 2 * i), 2), (1, 1));
    }

    #[test]
    fn global_sectors() {
        let count = |a: &[u64; LANES], bytes| {
            let c = sectors(a, u32::MAX, bytes);
            (c.sectors, c.ideal_sectors)
        };
        assert_eq!(count(&each(|i| 4 * i), 4), (4, 4));
        assert_eq!(count(&each(|i| 4 * i + 16), 4), (5, 4));
        assert_eq!(count(&each(|i| 64 * i), 4), (32, 4));
        assert_eq!(count(&each(|_| 0), 4), (1, 1));
    }
}
