//! Counting, for launches that ask for it.
//!
//! Rules, where NVIDIA states them:
//! - A request to global memory moves whole sectors of 32 bytes, each once however many lanes want it (Nsight Compute
//!   documentation, "Metrics Decoder").
//! - Shared memory has 32 banks, each 32 bits wide, to which successive words map in turn; lanes that want the same word
//!   share it, lanes that want different words of one bank wait for one another (CUDA C++ Programming Guide, "Compute
//!   Capability 5.x", "Shared Memory", to which all later ones refer).
//! - Accesses of 8 and 16 bytes take the lanes by halves and quarters: not in the guide, but what Nsight Compute shows, 4
//!   wavefronts for 16 bytes a lane without conflicts
//!   (forums.developer.nvidia.com, "Clarification: bank conflicts metric vs. wavefronts", 359822).
//!
//! Loops that only wait for others ([`crate::lower`]'s polls) count once for each time that a warp comes to them or is run again:
//! how often a GPU would try is not known.
//!
//! Not known and not modelled: whether parts in which few lanes are active are joined, and what atomic operations on one
//! word of shared memory cost beyond their wavefronts.

use std::collections::BTreeMap;

use super::counters::{Counters, LineCounters, MemoryCounters, SharedCounters};
use super::lanes::{LANES, active};
use crate::lower::ir::Body;

/// What one host thread has counted.
#[derive(Debug, Default)]
pub struct Tally {
    /// Warps and threads that ran each block.
    pub blocks: Vec<(u64, u64)>,
    pub lines: Vec<LineCounters>,
    pub matrix: BTreeMap<String, u64>,
    pub async_bytes: u64,
    pub async_sectors: u64,
    /// The poll that the warp counted last is in.
    poll: Option<Poll>,
    repeating: bool,
    repeated_polls: u64,
    pub finished_blocks: u64,
    /// Of those, the ones that wrote outside themselves.
    pub working_blocks: u64,
    pub finished_warps: u64,
}

/// A warp in a poll: it counts once, however often it is run before others are.
#[derive(Debug, PartialEq, Eq)]
struct Poll {
    /// Position of the block in launch order, and the warp in it.
    warp: (u64, u32),
    poll: u32,
    /// Basic blocks that have been counted.
    counted: Vec<u32>,
}

/// Bytes of a sector of global memory.
const SECTOR: u64 = crate::device::SECTOR_BYTES as u64;
/// Bytes that shared memory delivers at once: 32 banks of 4 bytes.
const WAVEFRONT: u64 = 128;

impl Tally {
    pub fn new(blocks: usize, lines: usize) -> Self {
        Self { blocks: vec![(0, 0); blocks], lines: vec![LineCounters::default(); lines], ..Self::default() }
    }

    /// Whether the warp counted last is in a poll again.
    pub fn repeating(&self) -> bool {
        self.repeating
    }

    /// Whether a basic block counts: not if it is one of a poll that the warp has been through.
    pub fn first_round(&mut self, block: u32, poll: Option<u32>, warp: (u64, u32)) -> bool {
        self.repeating = false;
        let Some(poll) = poll else {
            self.poll = None;
            return true;
        };
        match &mut self.poll {
            Some(p) if p.warp == warp && p.poll == poll => {
                self.repeating = p.counted.contains(&block);
                if self.repeating {
                    self.repeated_polls += 1;
                } else {
                    p.counted.push(block);
                }
            }
            other => *other = Some(Poll { warp, poll, counted: vec![block] }),
        }
        !self.repeating
    }

    /// Adds up by instruction class and line.
    pub fn finish(self, body: &Body) -> Counters {
        let mut c = Counters {
            lines: self.lines,
            matrix: self.matrix,
            blocks: self.finished_blocks,
            working_blocks: self.working_blocks,
            warps: self.finished_warps,
            async_bytes: self.async_bytes,
            async_sectors: self.async_sectors,
            repeated_polls: self.repeated_polls,
            ..Counters::default()
        };
        let mut opcodes = vec![0; body.names.len()];
        for (block, (warps, threads)) in body.blocks.iter().zip(self.blocks) {
            for instruction in &block.instructions {
                c.warp_instructions[instruction.class as usize] += warps;
                c.thread_instructions += threads;
                opcodes[instruction.name as usize] += warps;
                if let Some(l) = c.lines.get_mut((instruction.line as usize).wrapping_sub(1)) {
                    l.warp_instructions += warps;
                    l.thread_instructions += threads;
                }
            }
        }
        let named = body.names.iter().zip(opcodes).filter(|(_, count)| *count != 0);
        c.opcodes = named.map(|(name, count)| (name.clone(), count)).collect();
        for l in &c.lines {
            c.global.add(&l.global);
            c.shared.add(&l.shared);
        }
        c
    }
}

/// Sorts and drops what occurs twice; most accesses are sorted already.
fn distinct(values: &mut Vec<u64>) -> &[u64] {
    if !values.is_sorted() {
        values.sort_unstable();
    }
    values.dedup();
    values
}

pub fn sectors(addresses: &[u64; LANES], mask: u32, bytes: u32) -> MemoryCounters {
    let bytes = u64::from(bytes);
    let mut list = Vec::with_capacity(LANES);
    list.extend(active(mask).flat_map(|i| addresses[i] / SECTOR..=(addresses[i] + bytes - 1) / SECTOR));
    let touched = distinct(&mut list).len() as u64;
    list.clear();
    list.extend(active(mask).map(|i| addresses[i]));
    let starts = distinct(&mut list).len() as u64;
    MemoryCounters { requests: 1, sectors: touched, ideal_sectors: (starts * bytes).div_ceil(SECTOR) }
}

/// Within a half or quarter, each bank delivers one word at a time; lanes that read the same word share it.
pub fn wavefronts(addresses: &[u64; LANES], mask: u32, bytes: u32) -> SharedCounters {
    // More than 16 bytes a lane are the rows of bulk copies, each as many whole passes.
    let lanes = (WAVEFRONT / u64::from(bytes.clamp(4, 128))) as usize;
    let ideal = u64::from(bytes).div_ceil(WAVEFRONT);
    let mut c = SharedCounters { requests: 1, ..SharedCounters::default() };
    let mut words = Vec::with_capacity(LANES);
    for part in 0..LANES / lanes {
        let part_mask = ((1u64 << lanes) - 1) << (part * lanes);
        words.clear();
        words.extend(
            active(mask & part_mask as u32).flat_map(|i| addresses[i] / 4..=(addresses[i] + u64::from(bytes) - 1) / 4),
        );
        if words.is_empty() {
            continue;
        }
        let mut banks = [0u16; 32];
        let mut most = 0;
        for &word in distinct(&mut words) {
            let bank = &mut banks[(word % 32) as usize];
            *bank += 1;
            most = most.max(*bank);
        }
        c.wavefronts += u64::from(most);
        c.ideal_wavefronts += ideal;
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
