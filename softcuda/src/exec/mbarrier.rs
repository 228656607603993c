//! Mbarrier objects (PTX ISA 9.7.13.15).
//!
//! An object's eight bytes hold its state: bit 63 the phase's parity, bits 62 to 43 the arrivals that later phases expect,
//! bits 42 to 23 those still pending, bits 22 to 2 the transaction count in two's complement, bit 1 set. The block keeps the
//! same of every valid object, and every operation compares: bytes that anything but these operations has written, a copy
//! made elsewhere, or an object that was never initialised are noticed.

use super::fault::FaultKind;
use super::state::{Outcome, Raw, Shared};
use crate::ptx::ast::Space;

/// Greatest count of arrivals, and of transactions either way.
pub const MAX_COUNT: u32 = (1 << 20) - 1;
/// Bytes and alignment of an object.
pub const BYTES: u32 = 8;

/// A valid object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Object {
    /// Offset in the block's shared memory.
    pub offset: u32,
    /// Phases completed.
    pub phase: u64,
    /// Arrivals that the next phase will expect.
    pub expected: u32,
    pub pending: u32,
    pub transactions: i32,
}

impl Object {
    /// What its bytes hold.
    fn bits(&self) -> u64 {
        let transactions = u64::from(self.transactions as u32 & 0x1f_ffff);
        (self.phase & 1) << 63 | u64::from(self.expected) << 43 | u64::from(self.pending) << 23 | transactions << 2 | 2
    }

    /// What an arrival returns: the phase, and below it the pending count.
    pub fn token(&self) -> u64 {
        self.phase << 20 | u64::from(self.pending)
    }

    pub fn describe(&self) -> String {
        format!(
            "mbarrier at {:#x}, phase {} (parity {}), {} of {} arrivals pending, tx-count {}",
            self.offset,
            self.phase,
            self.phase & 1,
            self.pending,
            self.expected,
            self.transactions
        )
    }

    /// `true` if the phase is now complete and the next one has begun.
    fn turn(&mut self) -> bool {
        let done = self.pending == 0 && self.transactions == 0;
        if done {
            self.phase += 1;
            self.pending = self.expected;
        }
        done
    }
}

/// Why an operation is not one that the object allows.
pub type Misuse = String;

impl Shared {
    fn bytes_at(&mut self, offset: u32) -> *mut u64 {
        self.memory.as_mut_ptr().wrapping_add(offset as usize).cast()
    }

    fn index(&self, offset: u32) -> Result<usize, usize> {
        self.mbarriers.binary_search_by_key(&offset, |o| o.offset)
    }

    /// The object at an offset that [`check_place`] has checked.
    pub fn mbarrier(&mut self, offset: u32) -> Result<Object, Misuse> {
        let Ok(i) = self.index(offset) else {
            return Err(format!("no mbarrier object at {offset:#x} in shared memory"));
        };
        let object = self.mbarriers[i];
        // SAFETY: objects are within the block's memory and aligned.
        let found = unsafe { *self.bytes_at(offset) };
        if found != object.bits() {
            return Err(format!(
                "the bytes of the mbarrier object at {offset:#x} were overwritten: they hold {found:#018x} instead of {:#018x}",
                object.bits()
            ));
        }
        Ok(object)
    }

    fn put(&mut self, object: Object) {
        if let Ok(i) = self.index(object.offset) {
            self.mbarriers[i] = object;
            // SAFETY: objects are within the block's memory and aligned.
            unsafe { *self.bytes_at(object.offset) = object.bits() };
        }
    }

    pub fn mbarrier_init(&mut self, offset: u32, count: u32) -> Result<(), Misuse> {
        if count == 0 || count > MAX_COUNT {
            return Err(format!("an mbarrier object for {count} arrivals; 1 to {MAX_COUNT} are possible"));
        }
        let object = Object { offset, phase: 0, expected: count, pending: count, transactions: 0 };
        match self.index(offset) {
            Ok(_) => {
                return Err(format!("`mbarrier.init` at {offset:#x}, where there is a valid mbarrier object already"));
            }
            Err(i) => self.mbarriers.insert(i, object),
        }
        self.put(object);
        Ok(())
    }

    pub fn mbarrier_inval(&mut self, offset: u32) -> Result<(), Misuse> {
        self.mbarrier(offset)?;
        if let Ok(i) = self.index(offset) {
            self.mbarriers.remove(i);
        }
        Ok(())
    }

    /// `count` arrivals, of threads that will not come again where `drop` says so. Returns the object as it was before, and
    /// whether the phase is now complete.
    pub fn mbarrier_arrive(&mut self, offset: u32, count: u32, drop: bool) -> Result<(Object, bool), Misuse> {
        let before = self.mbarrier(offset)?;
        let mut object = before;
        if count == 0 || count > MAX_COUNT {
            return Err(format!("{count} arrivals; 1 to {MAX_COUNT} are possible"));
        }
        if count > object.pending {
            return Err(format!("{count} arrivals, but {}", object.describe()));
        }
        object.pending -= count;
        if drop {
            object.expected = object
                .expected
                .checked_sub(count)
                .ok_or_else(|| format!("{count} arrivals are dropped, but {}", before.describe()))?;
        }
        let done = object.turn();
        self.phase_completed |= done;
        self.put(object);
        Ok((before, done))
    }

    /// The arrival that a copy will make is expected in addition.
    pub fn mbarrier_increment(&mut self, offset: u32) -> Result<(), Misuse> {
        let mut object = self.mbarrier(offset)?;
        if object.pending == MAX_COUNT {
            return Err(format!("one more arrival is expected, but {}", object.describe()));
        }
        object.pending += 1;
        self.put(object);
        Ok(())
    }

    /// Raises the transaction count, or lowers it where `bytes` is negative; then the phase may be complete.
    pub fn mbarrier_transact(&mut self, offset: u32, bytes: i64) -> Result<(Object, bool), Misuse> {
        let before = self.mbarrier(offset)?;
        let mut object = before;
        let transactions = i64::from(object.transactions) + bytes;
        if transactions.unsigned_abs() > MAX_COUNT.into() {
            return Err(format!(
                "the tx-count becomes {transactions}, but at most {MAX_COUNT} are possible: {}",
                before.describe()
            ));
        }
        object.transactions = transactions as i32;
        let done = bytes != 0 && object.turn();
        self.phase_completed |= done;
        self.put(object);
        Ok((before, done))
    }
}

/// The offset of an mbarrier object within a block of `size` bytes of shared memory.
pub fn check_place(offset: u64, size: u32, lane: usize) -> Outcome<u32> {
    let kind = if !offset.is_multiple_of(BYTES.into()) {
        FaultKind::MisalignedAddress
    } else if offset + u64::from(BYTES) > size.into() {
        FaultKind::IllegalAddress
    } else {
        return Ok(offset as u32);
    };
    let what =
        if kind == FaultKind::MisalignedAddress { "not a multiple of 8" } else { "outside the block's shared memory" };
    let mut raw = Raw::new(kind, 1 << lane, format!("mbarrier object at {offset:#x}: {what}"));
    raw.address = Some(offset);
    raw.space = Some(super::access::space_name(Space::Shared));
    raw.bytes = Some(BYTES);
    Err(raw)
}
