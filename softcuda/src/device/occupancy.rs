//! How many blocks a multiprocessor holds at once, as the CUDA occupancy calculator computes it (`cuda_occupancy.h`).

use std::fmt;

use super::{Description, MAX_THREADS_PER_BLOCK, REGISTERS, SHARED_RESERVED, WARP_SIZE};

/// Registers are allocated to warps in units of this many.
const REGISTER_UNIT: u32 = 256;
/// Warps of a multiprocessor are spread over this many partitions.
const PARTITIONS: u32 = 4;
/// Shared memory is allocated in units of this many bytes.
pub const SHARED_UNIT: u64 = 128;

/// What keeps further blocks off a multiprocessor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limiter {
    /// Warps, that is threads.
    Warps,
    Registers,
    SharedMemory,
    Blocks,
    /// There are no more blocks in the grid.
    Grid,
}

impl fmt::Display for Limiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Warps => "warps",
            Self::Registers => "registers",
            Self::SharedMemory => "shared memory",
            Self::Blocks => "blocks",
            Self::Grid => "grid",
        })
    }
}

/// Blocks that fit a multiprocessor, and what limits them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Occupancy {
    pub blocks: u32,
    /// `blocks` times the warps of a block.
    pub warps: u32,
    pub limiter: Limiter,
}

/// The occupancy of a kernel whose threads have `registers` registers and whose blocks have `threads` threads and
/// `shared` bytes of shared memory, static and dynamic together. No blocks if one alone does not fit.
pub fn occupancy(device: &Description, registers: u32, threads: u32, shared: u64) -> Occupancy {
    let none = |limiter| Occupancy { blocks: 0, warps: 0, limiter };
    if threads == 0 || threads > MAX_THREADS_PER_BLOCK {
        return none(Limiter::Warps);
    }
    if shared > device.shared_per_block_optin.into() {
        return none(Limiter::SharedMemory);
    }
    let warps = threads.div_ceil(WARP_SIZE);
    let by_warps = device.threads_per_sm / WARP_SIZE / warps;
    let per_warp = (registers.max(1) * WARP_SIZE).next_multiple_of(REGISTER_UNIT);
    let by_registers = REGISTERS / per_warp / PARTITIONS * PARTITIONS / warps;
    let taken = (shared + u64::from(SHARED_RESERVED)).next_multiple_of(SHARED_UNIT);
    let by_shared = u32::try_from(u64::from(device.shared_per_sm) / taken).unwrap_or(u32::MAX);
    // Of equal limits the first is named.
    let limits = [
        (by_warps, Limiter::Warps),
        (by_registers, Limiter::Registers),
        (by_shared, Limiter::SharedMemory),
        (device.blocks_per_sm, Limiter::Blocks),
    ];
    let (blocks, limiter) = limits.into_iter().min_by_key(|(blocks, _)| *blocks).unwrap_or((0, Limiter::Warps));
    Occupancy { blocks, warps: blocks * warps, limiter }
}

#[cfg(test)]
mod tests {
    use super::super::{A100, H100, L4};
    use super::*;

    /// The first two are the examples of the CUDA C++ Best Practices Guide, "Calculating Occupancy" (its 7.0 has the
    /// registers and warps of 8.0); the rest is worked by hand.
    #[test]
    fn as_the_occupancy_calculator() {
        let cases = [
            // device, registers, threads, shared, blocks, limiter
            (A100, 37, 128, 0, 12, Limiter::Registers),
            (A100, 37, 320, 0, 4, Limiter::Registers),
            (A100, 32, 256, 0, 8, Limiter::Warps),
            // 64 registers: 32 warps fit, four blocks of eight.
            (A100, 64, 256, 0, 4, Limiter::Registers),
            // 48 KiB and the system's 1 KiB: three times in 164 KiB.
            (A100, 32, 128, 48 << 10, 3, Limiter::SharedMemory),
            (A100, 16, 32, 0, 32, Limiter::Blocks),
            // 255 registers round up to 256: 8 warps.
            (A100, 255, 256, 0, 1, Limiter::Registers),
            // 40 registers are 1280 a warp: 51 warps, 48 in whole rows of four.
            (H100, 40, 128, 0, 12, Limiter::Registers),
            (H100, 168, 384, 0, 1, Limiter::Registers),
            (H100, 128, 128, 100 << 10, 2, Limiter::SharedMemory),
            (H100, 32, 128, 227 << 10, 1, Limiter::SharedMemory),
            (L4, 32, 256, 0, 6, Limiter::Warps),
            (L4, 32, 32, 0, 24, Limiter::Blocks),
            (L4, 32, 1024, 0, 1, Limiter::Warps),
        ];
        for (device, registers, threads, shared, blocks, limiter) in cases {
            let found = occupancy(&device, registers, threads, shared);
            let warps = blocks * threads.div_ceil(32);
            assert_eq!(
                found,
                Occupancy { blocks, warps, limiter },
                "{registers} registers, {threads} threads, {shared} bytes"
            );
        }
        assert_eq!(occupancy(&H100, 32, 128, (227 << 10) + 1).blocks, 0);
        assert_eq!(occupancy(&H100, 255, 1024, 0).blocks, 0);
    }
}
