//! Traffic through the caches of the device: recorded while a kernel runs, replayed when it has ended.
//!
//! Host threads run blocks in an order that no GPU would and that differs from run to run, so caches cannot be simulated
//! while they do. Instead the global requests of each block are recorded, and replayed in an order that depends on the
//! launch alone:
//!
//! - Warps of a block take turns, one request each; a barrier of the block that completes ends a round of turns, and so does a phase of
//!   an mbarrier that does: warps that fill a pipeline's stages together are at most its depth apart. Where another block of the cluster
//!   has completed the phase, what the mbarrier's block did after it comes after what that one did before.
//! - Blocks are given to multiprocessors in launch order, one to each, as many times as the occupancy says; whenever a block
//!   has no requests left, its place takes the next. All places take turns, one request each; one of more than 512 bytes, a box of the
//!   copy engine, takes a turn for each of them.
//!
//! Every multiprocessor has an L1 cache of what shared memory leaves of its SRAM; weak loads and `cp.async.ca` look it up,
//! unless a cache operator keeps them out. Stores go through it, and update what it holds; atomic operations drop what it
//! holds. Everything else goes to the one L2 cache, which is written back: to device memory go the sectors that it misses
//! and dirty sectors that make room for others. What L2 holds when a launch begins is chosen: [`Caches`]. L1 caches are empty then.
//!
//! Loads of loops that only wait for others are recorded once for each time that a warp is run.
//!
//! Not modelled: replacement other than least recently used; the two partitions of the L2 and what crosses between them;
//! prefetches and fetches of more than a sector; eviction priorities and cache policies but of `cp.async`, bulk and tensor copies, whose lines make
//! room in the order of their priorities; sectors that a write covers only in
//! part (as if memory took any bytes); compression; copies and fills by the driver, which on a GPU go through L2 too; caches of constants and instructions; local memory. Memory pages are
//! numbered in the order in which the replay first touches them, 2 MiB each, so that results do not depend on where the host
//! put the device's memory.

use crate::device::{Description, SECTOR_BYTES};

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

/// What L2 holds when a launch begins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Caches {
    /// Nothing, as under Nsight Compute's cache control; dirty sectors that are left at the end count as written, so that a
    /// launch's numbers are its own.
    #[default]
    Cold,
    /// What the same launch, run once before, has left: the steady state of a benchmark that repeats it on the same data.
    Warm,
    /// What earlier launches on the device have left: a stream of launches. Dirty sectors are written when they make room, be it
    /// in a later launch; those in L2 after the last one are not written.
    Carried,
}

impl Caches {
    pub const ALL: [Caches; 3] = [Caches::Cold, Caches::Warm, Caches::Carried];

    /// As `SOFTCUDA_PROFILE_CACHES` spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Caches::Cold => "cold",
            Caches::Warm => "warm",
            Caches::Carried => "carried",
        }
    }

    pub fn parse(name: &str) -> Option<Caches> {
        Caches::ALL.into_iter().find(|caches| caches.name() == name)
    }

    /// In a sentence of a report.
    pub const fn words(self) -> &'static str {
        match self {
            Caches::Cold => "empty at the start of each launch, dirty data written back at its end",
            Caches::Warm => "at the start of each launch L2 holds what the same launch, run once before, has left",
            Caches::Carried => "L2 carried from one launch to the next; dirty data is written when it makes room",
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
    /// Written back; with cold caches those sectors included that were dirty when the launch ended.
    pub dram_write_bytes: u64,
    /// Dirty in L2 when the launch ended.
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
