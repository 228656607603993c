//! What kernels are made for, and the tiles of products.

use super::Constant;

/// Oldest architecture a variant runs on. `sm_80` PTX is compiled forward by the driver for every later GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Arch {
    /// Ampere and later.
    Sm80,
    /// Hopper alone: architecture-specific code runs on no other compute capability than 9.0.
    Sm90a,
    /// Blackwell of data centres alone: 10.0.
    Sm100a,
}

impl Arch {
    /// Whether a device of this compute capability runs it.
    pub const fn runs_on(self, (major, minor): (u32, u32)) -> bool {
        match self {
            Arch::Sm80 => major >= 8,
            Arch::Sm90a => major == 9 && minor == 0,
            Arch::Sm100a => major == 10 && minor == 0,
        }
    }

    /// The `.target` of the PTX.
    pub const fn target(self) -> &'static str {
        match self {
            Arch::Sm80 => "sm_80",
            Arch::Sm90a => "sm_90a",
            Arch::Sm100a => "sm_100a",
        }
    }
}

/// A thread block's share of a GEMM: `bm x bn` accumulators, `bk` deep stages, `warps_m x warps_n` warps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tile {
    /// Rows.
    pub bm: u32,
    /// Weight outputs: columns, or gate and up of half as many.
    pub bn: u32,
    /// Depth of a stage.
    pub bk: u32,
    /// Warps side by side over the rows.
    pub warps_m: u32,
    /// Warps side by side over the weight outputs.
    pub warps_n: u32,
    /// Stages in flight.
    pub stages: u32,
}

impl Tile {
    pub(super) const fn new(bm: u32, bn: u32, bk: u32, warps_m: u32, warps_n: u32, stages: u32) -> Tile {
        Tile { bm, bn, bk, warps_m, warps_n, stages }
    }

    /// Threads of a block.
    pub const fn threads(&self) -> u32 {
        self.warps_m * self.warps_n * 32
    }

    pub(super) fn constants(&self) -> [(&'static str, Constant); 6] {
        let Tile { bm, bn, bk, warps_m, warps_n, stages } = *self;
        [("bm", bm), ("bn", bn), ("bk", bk), ("warps_m", warps_m), ("warps_n", warps_n), ("stages", stages)]
            .map(|(name, value)| (name, Constant::Int(value)))
    }

    /// `bm x bn x bk`, the word in kernel names.
    pub fn name(&self) -> String {
        format!("{}x{}x{}", self.bm, self.bn, self.bk)
    }
}

/// Warps of the kernels that work by whole blocks of 256 threads.
pub const BLOCK_WARPS: u32 = 8;
