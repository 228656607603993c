//! Device memory: allocations in one large address range, where a device address is the host address of the same byte.
//!
//! Built to make mistakes visible. Fresh memory reads as [`POISON`]; every allocation is 256-byte aligned and no better; at
//! least 64 KiB of nothing follow it; addresses of freed memory are not handed out again until the address space is
//! used up. Memory is committed page by page when first written, so large allocations are cheap.

mod arena;
mod history;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::exec::GlobalMemory;
use arena::{Arena, CHUNK};
use history::{Freed, History};

pub use arena::POISON;

/// Alignment of every allocation in bytes: what CUDA promises. Each starts this far into a page, so that code that assumes
/// more alignment is found out.
pub const ALIGNMENT: u64 = 256;

/// Least gap after an allocation, in bytes.
const RED_ZONE: u64 = 64 << 10;

/// Allocations from this size on have chunks of their own.
const LARGE: u64 = CHUNK / 4;

/// What an allocation is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Counts against the device's total.
    Device,
    /// Page-locked host memory, which kernels reach under the same address.
    Host,
    /// Managed memory, reachable from both sides; counts against the device's total.
    Managed,
    /// A module's `.global` or `.const` variable.
    Module,
    /// A block that device code has allocated with `malloc`, whose room is not counted here.
    Heap,
}

/// A live allocation: bytes `start .. end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocation {
    pub start: u64,
    pub end: u64,
    pub kind: Kind,
    /// Numbered from 1 in order of allocation.
    pub serial: u64,
    /// Device whose memory it is, or in whose context it was made.
    pub device: u32,
}

impl Allocation {
    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.end - self.start
    }
}

/// Why memory could not be had, released or accessed.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("out of device memory: {requested} bytes requested, {free} of {total} free")]
    OutOfMemory { requested: u64, free: u64, total: u64 },
    #[error("an allocation of zero bytes")]
    Empty,
    #[error("{0} is not the start of a live allocation")]
    NotAllocated(String),
    #[error("access to {bytes} bytes at {address:#x}: {reason}")]
    IllegalAddress { address: u64, bytes: u64, reason: String },
    #[error("the host cannot commit the memory: {0}")]
    Host(#[from] io::Error),
}

/// Sees allocations as they are made.
pub trait AllocationWatch: Send + Sync {
    fn allocated(&self, allocation: &Allocation);
}

/// The global memory of one or several devices. See the [module](self) for what it does to find mistakes.
pub struct Memory {
    /// By device.
    totals: Vec<u64>,
    range: Range<u64>,
    generation: AtomicU64,
    state: RwLock<State>,
    watch: RwLock<Option<Arc<dyn AllocationWatch>>>,
}

struct State {
    arena: Arena,
    live: BTreeMap<u64, Allocation>,
    history: History,
    /// By device.
    used: Vec<u64>,
    serial: u64,
    /// Chunk that small allocations are carved from, and the next free address in it.
    small: Option<(u64, u64)>,
}

/// What an allocation counts for against the total: drivers hand out memory in units of 512 bytes.
fn accounted(bytes: u64, kind: Kind) -> u64 {
    if matches!(kind, Kind::Host | Kind::Heap) { 0 } else { bytes.checked_next_multiple_of(512).unwrap_or(u64::MAX) }
}

impl Memory {
    /// A device with `total` bytes of memory; host memory is only taken as it is written.
    ///
    /// # Errors
    /// The host grants no address space.
    pub fn new(total: u64) -> io::Result<Memory> {
        Memory::of_devices(vec![total])
    }

    /// Devices with so many bytes each, which share one range of addresses (CUDA programming guide, "Unified Virtual Address
    /// Space").
    ///
    /// # Errors
    /// The host grants no address space.
    pub fn of_devices(totals: Vec<u64>) -> io::Result<Memory> {
        let arena = Arena::new()?;
        let range = arena.range();
        let state = State {
            arena,
            live: BTreeMap::new(),
            history: History::default(),
            used: vec![0; totals.len()],
            serial: 0,
            small: None,
        };
        Ok(Memory { totals, range, generation: AtomicU64::new(0), state: RwLock::new(state), watch: RwLock::default() })
    }

    /// [`Memory::alloc_kind`] of device memory.
    ///
    /// # Errors
    /// As [`Memory::alloc_kind`].
    pub fn alloc(&self, bytes: u64) -> Result<u64, MemoryError> {
        self.alloc_kind(bytes, Kind::Device)
    }

    /// Allocates `bytes` of poison, aligned to [`ALIGNMENT`], and returns the address.
    ///
    /// # Errors
    /// [`MemoryError::Empty`] for zero bytes, [`MemoryError::OutOfMemory`] past the device's total,
    /// [`MemoryError::Host`] if the host has no address space left.
    pub fn alloc_kind(&self, bytes: u64, kind: Kind) -> Result<u64, MemoryError> {
        self.alloc_on(0, bytes, kind)
    }

    /// [`Memory::alloc_kind`] on a device.
    ///
    /// # Errors
    /// As [`Memory::alloc_kind`].
    pub fn alloc_on(&self, device: u32, bytes: u64, kind: Kind) -> Result<u64, MemoryError> {
        if bytes == 0 {
            return Err(MemoryError::Empty);
        }
        let mut state = self.write();
        let (total, place) = (self.totals[device as usize], device as usize);
        let free = total - state.used[place];
        let counted = accounted(bytes, kind);
        if counted > free {
            return Err(MemoryError::OutOfMemory { requested: bytes, free, total });
        }
        let start = state.place(bytes)?;
        let end = start + bytes;
        state.arena.occupy(start, end);
        state.used[place] += counted;
        state.serial += 1;
        let serial = state.serial;
        let allocation = Allocation { start, end, kind, serial, device };
        state.live.insert(start, allocation);
        self.generation.fetch_add(1, Ordering::Release);
        drop(state);
        if let Some(watch) = &*self.watch.read().unwrap_or_else(PoisonError::into_inner) {
            watch.allocated(&allocation);
        }
        Ok(start)
    }

    /// Sets who sees allocations from now on, and returns those that are live already.
    pub fn watch(&self, watch: Option<Arc<dyn AllocationWatch>>) -> Vec<Allocation> {
        *self.watch.write().unwrap_or_else(PoisonError::into_inner) = watch;
        self.read().live.values().copied().collect()
    }

    /// All addresses that allocations may have.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Frees the allocation that starts at `addr`.
    ///
    /// # Errors
    /// [`MemoryError::NotAllocated`] if there is none, saying what is there instead.
    pub fn free(&self, addr: u64) -> Result<(), MemoryError> {
        let mut state = self.write();
        let Some(allocation) = state.live.remove(&addr) else {
            let message = state.describe(addr);
            return Err(MemoryError::NotAllocated(message));
        };
        state.used[allocation.device as usize] -= accounted(allocation.bytes(), allocation.kind);
        let keep = state.small.map(|(chunk, _)| chunk);
        state.arena.vacate(allocation.start, allocation.end, keep);
        state.history.push(Freed { start: allocation.start, end: allocation.end, serial: allocation.serial });
        self.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// The live allocation that contains `addr`.
    pub fn find(&self, addr: u64) -> Option<Allocation> {
        self.read().find(addr)
    }

    /// What there is to say about an address that no live allocation contains: which it is near, or was part of.
    pub fn describe(&self, addr: u64) -> String {
        self.read().describe(addr)
    }

    /// Changes at every allocation and release, so that what was cached from [`Memory::find`] can be dropped.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Whether `addr` is of the range that allocations come from, allocated or not.
    pub fn contains(&self, addr: u64) -> bool {
        self.range.contains(&addr)
    }

    /// The first device's memory in bytes.
    pub fn total(&self) -> u64 {
        self.total_of(0)
    }

    /// Bytes of it that are not allocated.
    pub fn available(&self) -> u64 {
        self.available_of(0)
    }

    /// A device's memory in bytes.
    pub fn total_of(&self, device: u32) -> u64 {
        self.totals[device as usize]
    }

    /// Bytes of a device's memory that are not allocated.
    pub fn available_of(&self, device: u32) -> u64 {
        self.totals[device as usize] - self.read().used[device as usize]
    }

    /// The allocation that contains all of `addr .. addr + bytes`.
    ///
    /// # Errors
    /// [`MemoryError::IllegalAddress`] where there is none.
    pub fn check(&self, addr: u64, bytes: u64) -> Result<Allocation, MemoryError> {
        let state = self.read();
        let illegal = |reason| MemoryError::IllegalAddress { address: addr, bytes, reason };
        let allocation = state.find(addr).ok_or_else(|| illegal(state.describe(addr)))?;
        if bytes > allocation.end - addr {
            let past = bytes - (allocation.end - addr);
            let text = format!("it ends {past} bytes past the end of {}", history::live(&allocation));
            return Err(illegal(text));
        }
        Ok(allocation)
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl GlobalMemory for Memory {
    fn find(&self, addr: u64) -> Option<(u64, u64)> {
        Memory::find(self, addr).map(|allocation| (allocation.start, allocation.end))
    }

    fn describe(&self, addr: u64) -> String {
        Memory::describe(self, addr)
    }

    fn heap_block(&self, device: u32, bytes: u64) -> Option<u64> {
        self.alloc_on(device, bytes, Kind::Heap).ok()
    }

    fn release_heap_block(&self, addr: u64) {
        let _ = self.free(addr);
    }
}

impl State {
    fn find(&self, addr: u64) -> Option<Allocation> {
        let (_, allocation) = self.live.range(..=addr).next_back()?;
        (addr < allocation.end).then_some(*allocation)
    }

    fn describe(&self, addr: u64) -> String {
        if let Some(allocation) = self.find(addr) {
            return format!("{addr:#x} is {} bytes into {}", addr - allocation.start, history::live(&allocation));
        }
        let before = self.live.range(..=addr).next_back().map(|(_, allocation)| *allocation);
        let after = self.live.range(addr..).next().map(|(_, allocation)| *allocation);
        self.history.describe(addr, before, after)
    }

    /// Finds room for an allocation and the gap after it; the pages it gets are its own.
    fn place(&mut self, bytes: u64) -> io::Result<u64> {
        // The gap grows with the size: overruns are by rows, and rows grow with the size too.
        let span = ALIGNMENT
            .checked_add(bytes)
            .and_then(|span| span.checked_add(RED_ZONE.max((bytes / 2).min(LARGE))))
            .and_then(|span| span.checked_next_multiple_of(4096))
            .ok_or(io::ErrorKind::OutOfMemory)?;
        if span >= LARGE {
            let first = self.arena.commit(span.div_ceil(CHUNK))?;
            return Ok(self.arena.address(first) + ALIGNMENT);
        }
        let (chunk, next) = match self.small {
            Some((chunk, next)) if next + span <= self.arena.address(chunk) + CHUNK => (chunk, next),
            full => {
                let chunk = self.arena.commit(1)?;
                if let Some((full, _)) = full {
                    self.arena.retire(full);
                }
                (chunk, self.arena.address(chunk))
            }
        };
        self.small = Some((chunk, next + span));
        Ok(next + ALIGNMENT)
    }
}

#[cfg(test)]
mod tests;
