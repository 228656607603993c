//! Host memory that is page-locked after the fact: `cuMemHostRegister`.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Once, PoisonError, RwLock};

use super::context::{CONTEXTS, check_caller, current};
use super::handles::{Closer, Handle, when_a_context_goes};
use super::status::CUresult;
use super::{api, capture, driver, out};

struct Registration {
    end: u64,
    flags: u32,
    context: Handle,
}

/// By start.
static RANGES: RwLock<BTreeMap<u64, Registration>> = RwLock::new(BTreeMap::new());

fn found(addr: u64) -> Option<(Range<u64>, u32)> {
    let ranges = RANGES.read().unwrap_or_else(PoisonError::into_inner);
    let (start, found) = ranges.range(..=addr).next_back()?;
    (addr < found.end).then_some((*start..found.end, found.flags))
}

/// What was registered in a context is the host's pageable memory again when that goes.
struct Registrations;

impl Closer for Registrations {
    fn close(&self, context: Handle) {
        RANGES.write().unwrap_or_else(PoisonError::into_inner).retain(|_, range| range.context != context);
    }
}

/// The registered range that contains `addr`.
pub(super) fn containing(addr: u64) -> Option<Range<u64>> {
    found(addr).map(|(range, _)| range)
}

/// Flags of the registration that contains `addr`.
pub(super) fn flags(addr: u64) -> Option<u32> {
    found(addr).map(|(_, flags)| flags)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostRegister_v2(start: u64, bytes: usize, flags: u32) -> CUresult {
    api("cuMemHostRegister_v2", || {
        let context = current()?.handle;
        capture::forbid_unsafe("cuMemHostRegister_v2")?;
        // PORTABLE, DEVICEMAP, IOMEMORY, READ_ONLY
        if flags > 15 || bytes == 0 || start == 0 {
            let text = format!("{bytes} bytes at {start:#x} with flags {flags:#x}");
            return Err(CUresult::ERROR_INVALID_VALUE.with(text));
        }
        if flags & 4 != 0 {
            return Err(super::unsupported("registration of I/O memory"));
        }
        let end = start.checked_add(bytes as u64).ok_or(CUresult::ERROR_INVALID_VALUE)?;
        let mut ranges = RANGES.write().unwrap_or_else(PoisonError::into_inner);
        let before = ranges.range(..end).next_back().is_some_and(|(_, other)| other.end > start);
        if before || driver()?.memory.contains(start) || driver()?.memory.contains(end - 1) {
            return Err(CUresult::ERROR_HOST_MEMORY_ALREADY_REGISTERED
                .with(format!("{bytes} bytes at {start:#x} are registered or page-locked already")));
        }
        static LISTED: Once = Once::new();
        when_a_context_goes(&LISTED, &Registrations);
        ranges.insert(start, Registration { end, flags, context });
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostUnregister(start: u64) -> CUresult {
    api("cuMemHostUnregister", || {
        check_caller()?;
        capture::forbid_unsafe("cuMemHostUnregister")?;
        let unknown = || {
            let text = format!("{start:#x} is not the start of a registered range");
            CUresult::ERROR_HOST_MEMORY_NOT_REGISTERED.with(text)
        };
        let owner = RANGES.read().unwrap_or_else(PoisonError::into_inner).get(&start).map(|range| range.context);
        let state = CONTEXTS.get(owner.ok_or_else(unknown)?)?.drain();
        RANGES.write().unwrap_or_else(PoisonError::into_inner).remove(&start).ok_or_else(unknown)?;
        state
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostGetFlags(to: *mut u32, addr: u64) -> CUresult {
    api("cuMemHostGetFlags", || {
        current()?;
        let allocated = driver()?.memory.find(addr).filter(|it| it.kind == crate::memory::Kind::Host);
        // All page-locked memory is portable and mapped where addresses are unified; write-combining is not kept.
        let flags = flags(addr).or(allocated.map(|_| 3));
        let flags = flags
            .ok_or_else(|| CUresult::ERROR_INVALID_VALUE.with(format!("{addr:#x} is not page-locked host memory")))?;
        unsafe { out(to, "pFlags", flags | 3) }
    })
}
