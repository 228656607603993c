//! What a launch did, counted the way a profiler counts.

use std::collections::BTreeMap;

use crate::lower::InstructionClass;

/// Traffic of one state space.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MemoryCounters {
    /// Warp instructions that accessed memory.
    pub requests: u64,
    /// Distinct 32-byte sectors, summed over requests.
    pub sectors: u64,
    /// Sectors that the same bytes would need if they lay together.
    pub ideal_sectors: u64,
}

/// Traffic of shared memory, in wavefronts: passes over the 32 banks of 4 bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SharedCounters {
    pub requests: u64,
    pub wavefronts: u64,
    /// Wavefronts of the same accesses without bank conflicts.
    pub ideal_wavefronts: u64,
}

/// Executions of one line of the PTX.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LineCounters {
    pub warp_instructions: u64,
    pub thread_instructions: u64,
    pub global: MemoryCounters,
    pub shared: SharedCounters,
}

/// Matrix instructions by shape and type, e.g. `m16n8k16.f32.bf16.bf16.f32`, counted per warp; those of `wgmma`,
/// e.g. `wgmma.m64n128k16.f32.bf16.bf16.ss`, per warpgroup, `rs` where A is in registers and `ss` where it is in shared memory.
pub type MatrixOps = BTreeMap<String, u64>;

/// Counters of one launch, or of several added up. All but `launches` stay zero unless
/// [`Config::count`](super::Config::count) is on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    pub launches: u64,
    pub blocks: u64,
    /// Blocks that wrote to global memory or to another block's shared memory: the others left without effect.
    pub working_blocks: u64,
    pub warps: u64,
    /// Instructions times active lanes.
    pub thread_instructions: u64,
    /// Warp instructions by class, indexed by [`InstructionClass`].
    pub warp_instructions: [u64; InstructionClass::COUNT],
    pub global: MemoryCounters,
    pub shared: SharedCounters,
    pub matrix: MatrixOps,
    /// Warp instructions by spelling without operands, e.g. `fma.rn.f32`.
    pub opcodes: BTreeMap<String, u64>,
    /// Bytes that asynchronous copies write to shared memory, zero fill included.
    pub async_bytes: u64,
    /// Of the sectors of `global`, those that asynchronous copies move between global and shared memory themselves: they pass the
    /// multiprocessor's SRAM once, as wavefronts of `shared`.
    pub async_sectors: u64,
    /// Rounds of loops that only wait for others, beyond each warp's first: nothing else counts them, for their number depends on
    /// who runs when.
    pub repeated_polls: u64,
    /// By PTX line: `lines[0]` is line 1.
    pub lines: Vec<LineCounters>,
}

impl Counters {
    /// Warp instructions of one class.
    pub fn class(&self, class: InstructionClass) -> u64 {
        self.warp_instructions[class as usize]
    }

    /// Adds another launch's counters; line counters are added only where both count the same module.
    pub fn add(&mut self, other: &Counters) {
        self.launches += other.launches;
        self.blocks += other.blocks;
        self.working_blocks += other.working_blocks;
        self.warps += other.warps;
        self.thread_instructions += other.thread_instructions;
        for (a, b) in self.warp_instructions.iter_mut().zip(other.warp_instructions) {
            *a += b;
        }
        self.global.add(&other.global);
        self.shared.add(&other.shared);
        for (k, v) in &other.matrix {
            *self.matrix.entry(k.clone()).or_default() += v;
        }
        for (k, v) in &other.opcodes {
            *self.opcodes.entry(k.clone()).or_default() += v;
        }
        self.async_bytes += other.async_bytes;
        self.async_sectors += other.async_sectors;
        self.repeated_polls += other.repeated_polls;
        if self.lines.is_empty() {
            self.lines = other.lines.clone();
        } else {
            for (a, b) in self.lines.iter_mut().zip(&other.lines) {
                a.add(b);
            }
        }
    }
}

impl MemoryCounters {
    pub(crate) fn add(&mut self, o: &Self) {
        self.requests += o.requests;
        self.sectors += o.sectors;
        self.ideal_sectors += o.ideal_sectors;
    }
}

impl SharedCounters {
    pub(crate) fn add(&mut self, o: &Self) {
        self.requests += o.requests;
        self.wavefronts += o.wavefronts;
        self.ideal_wavefronts += o.ideal_wavefronts;
    }
}

impl LineCounters {
    pub(crate) fn add(&mut self, o: &Self) {
        self.warp_instructions += o.warp_instructions;
        self.thread_instructions += o.thread_instructions;
        self.global.add(&o.global);
        self.shared.add(&o.shared);
    }
}
