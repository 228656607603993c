//! Registers per thread that a kernel with `setmaxnreg` is launched with: what `ptxas` gives it, found by assembling kernels of
//! 32 to 1024 threads for sm_90a with its version 13.5.
//!
//! - The count at entry is known from `.maxnreg`, or from `.minnctapersm` together with `.maxntid` or `.reqntid`; otherwise
//!   `ptxas` drops every `setmaxnreg` (its message C7508), as the manual lets it (PTX ISA 9.7.19.5).
//! - The warps of all blocks that `.minnctapersm` asks for share the 65536 registers of a multiprocessor, a quarter of them on each
//!   of its four partitions, in units of 8 a thread. More than 64 warps fit no multiprocessor: the directive is ignored.
//! - No thread has more than 255, which are allocated as 256, nor more than the largest count that a `setmaxnreg.inc` asks for, so
//!   that the increase is one.

use super::Kernel;
use super::isa::Code;

const REGISTERS: u32 = 65536;
const PARTITIONS: u32 = 4;
const MOST_WARPS: u32 = 64;
/// Registers of a thread, at most, and the units in which they are allocated.
const MOST: u32 = 255;
const UNIT: u32 = 8;
/// The least that a bound may be.
const LEAST: u32 = 24;

/// The count as allocated; `None` where `setmaxnreg` has no effect.
pub fn entry_registers(k: &Kernel) -> Option<u32> {
    let by_blocks = k.max_threads.zip(k.min_ctas_per_sm).and_then(|(threads, blocks)| {
        let warps = blocks.max(1).checked_mul(threads.div_ceil(32)).filter(|&w| w <= MOST_WARPS)?;
        Some(REGISTERS / 32 / warps.next_multiple_of(PARTITIONS) / UNIT * UNIT)
    });
    let bound = match (k.max_registers.filter(|&n| n <= MOST).map(|n| n.max(LEAST)), by_blocks) {
        (Some(a), Some(b)) => a.min(b),
        (a, b) => a.or(b)?,
    };
    let increases = k.body.ops.iter().filter(|op| op.code == Code::SetMaxRegisters && op.x >> 31 == 1);
    let largest = increases.map(|op| op.x & 0xffff).max().unwrap_or(u32::MAX);
    Some(bound.min(MOST).min(largest).next_multiple_of(UNIT))
}
