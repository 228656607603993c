//! `malloc` and `free` of device code (CUDA programming guide, "Dynamic Global Memory Allocation and Operations").
//!
//! A context's heap has a size that is fixed once a kernel has used it; `malloc` returns null where it has no room. Blocks live until
//! `free`, from launch to launch, and are as strict as other allocations: they end where they end, start poisoned, and an address is
//! not handed out again soon. `free` of what `malloc` did not return, or for the second time, is a fault.
//!
//! Not seen: an access to a freed block by a thread of another host thread that had touched the block before in the same launch.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::GlobalMemory;
use super::access::{get, put};
use super::fault::FaultKind;
use super::lanes::{File, LANES, active};
use super::state::{Machine, Outcome, Raw};
use crate::lower::ir::HeapOp;

/// The heap of one context.
#[derive(Debug)]
pub struct Heap {
    device: u32,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    limit: u64,
    used: u64,
    /// A kernel has used it: its size is fixed.
    fixed: bool,
    /// Bytes of the live blocks, by address.
    live: BTreeMap<u64, u64>,
}

/// The size that a heap has at first (`CU_LIMIT_MALLOC_HEAP_SIZE`).
pub const DEFAULT_HEAP: u64 = 8 << 20;

/// Blocks are multiples of this many bytes.
const UNIT: u64 = 16;

impl Heap {
    /// A heap of so many bytes in a device's memory.
    pub fn new(device: u32, limit: u64) -> Self {
        Self { device, state: Mutex::new(State { limit, used: 0, fixed: false, live: BTreeMap::new() }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the size; `false` where a kernel has used the heap already.
    pub fn set_limit(&self, bytes: u64) -> bool {
        let mut state = self.state();
        if !state.fixed {
            state.limit = bytes;
        }
        !state.fixed
    }

    /// The blocks that are live, which the heap forgets.
    pub fn take_live(&self) -> Vec<u64> {
        let mut state = self.state();
        state.used = 0;
        std::mem::take(&mut state.live).into_keys().collect()
    }

    /// A block's address; 0 where there is no room, and for no bytes.
    fn allocate(&self, memory: &dyn GlobalMemory, bytes: u64) -> u64 {
        let mut state = self.state();
        state.fixed = true;
        let Some(counted) = bytes.checked_next_multiple_of(UNIT).filter(|&n| n != 0 && n <= state.limit - state.used)
        else {
            return 0;
        };
        let Some(address) = memory.heap_block(self.device, bytes) else { return 0 };
        state.used += counted;
        state.live.insert(address, counted);
        address
    }

    fn release(&self, memory: &dyn GlobalMemory, address: u64) -> Result<(), String> {
        let mut state = self.state();
        let Some(counted) = state.live.remove(&address) else {
            return Err(memory.describe(address));
        };
        state.used -= counted;
        memory.release_heap_block(address);
        Ok(())
    }
}

impl Machine<'_, '_> {
    pub fn heap(&mut self, file: File, x: &HeapOp, mask: u32) -> Outcome<()> {
        let (heap, memory) = (&self.worker.config.heap, self.worker.memory);
        let values = get(file, x.value);
        // What was known of allocations may be no more.
        self.worker.allocations.clear();
        match x.d {
            Some(d) => {
                let mut blocks = [0; LANES];
                active(mask).for_each(|i| blocks[i] = heap.allocate(memory, values[i]));
                put(file, d, mask, &blocks);
            }
            None => {
                for lane in active(mask).filter(|&i| values[i] != 0) {
                    let address = values[lane];
                    if let Err(what) = heap.release(memory, address) {
                        let text = format!("`free` of {address:#x}, which is no block that `malloc` returned: {what}");
                        let mut raw = Raw::new(FaultKind::IllegalAddress, 1 << lane, text);
                        raw.address = Some(address);
                        return Err(raw);
                    }
                }
            }
        }
        Ok(())
    }
}
