//! `setmaxnreg` (PTX ISA 9.7.19.5): the warps' shares of the block's registers.
//!
//! A block's registers are those it was launched with, as many for each thread (`lower/entry_registers.rs`); a warp that decreases its count gives the
//! difference to the block's pool, and one that increases it takes it from there, or waits until there are enough. The pool
//! is empty at the start, and what an exited warp held stays with it. Whatever the manual leaves undefined is a fault.

use super::WARPS;
use crate::exec::fault::FaultKind;
use crate::exec::lanes::FULL;
use crate::exec::state::{GroupState, Machine, Outcome, Raw, Shared, Warp};

/// What a block's warps share.
#[derive(Debug, Default)]
pub struct Pool {
    /// Registers per thread of one warp.
    free: u32,
    /// For each warpgroup, the adjustments so far.
    adjustments: Vec<Vec<u32>>,
}

impl Pool {
    pub fn clear(&mut self) {
        self.free = 0;
        self.adjustments.iter_mut().for_each(Vec::clear);
    }
}

/// One warp's share.
#[derive(Debug, Default, Clone, Copy)]
pub struct Share {
    /// Registers per thread; `None` before the first adjustment.
    count: Option<u32>,
    /// Adjustments so far.
    made: usize,
    /// Registers that it waits for.
    wanted: u32,
}

/// `true` if the warp goes on, `false` if it waits.
pub fn adjust(m: &mut Machine, count: u32, increase: bool) -> Outcome<bool> {
    let illegal = |message: String| Err(Raw::new(FaultKind::IllegalInstruction, FULL, message));
    let group = m.warp.index / WARPS;
    if (group + 1) * WARPS * 32 > m.shared.threads.next_multiple_of(32) {
        return illegal(format!(
            "`setmaxnreg` needs warpgroups of four warps; the block has {} threads",
            m.shared.threads
        ));
    }
    // Without a bound at launch the manual lets the instruction have no effect.
    let Some(launched) = m.worker.kernel.entry_registers else { return Ok(true) };
    let share = &mut m.warp.registers;
    let held = share.count.unwrap_or(launched);
    let action = if increase { "inc" } else { "dec" };
    if increase && held > count || !increase && held < count {
        return illegal(format!("`setmaxnreg.{action}` to {count} by a warp that has {held} registers a thread"));
    }
    let pool = &mut m.shared.registers;
    if pool.adjustments.len() <= group as usize {
        pool.adjustments.resize(group as usize + 1, Vec::new());
    }
    let made = &mut pool.adjustments[group as usize];
    match made.get(share.made) {
        None => made.push(count),
        Some(&other) if other != count => {
            return illegal(format!(
                "`setmaxnreg` to {count}; another warp of its warpgroup set {other}, without a barrier between"
            ));
        }
        Some(_) => {}
    }
    if increase && count - held > pool.free {
        share.wanted = count - held;
        m.wait(GroupState::AtRegisters);
        return Ok(false);
    }
    pool.free = if increase { pool.free - (count - held) } else { pool.free + (held - count) };
    share.count = Some(count);
    share.made += 1;
    Ok(true)
}

/// Wakes the warps for which there are enough registers now; `true` if there is one.
pub fn release(shared: &Shared, warps: &mut [Warp]) -> bool {
    let mut any = false;
    for warp in warps {
        let enough = warp.registers.wanted <= shared.registers.free;
        for g in warp.groups.iter_mut().filter(|g| g.state == GroupState::AtRegisters && enough) {
            g.state = GroupState::Ready;
            any = true;
        }
    }
    any
}
