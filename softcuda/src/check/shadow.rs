//! One byte of shadow for each byte of device memory: address space beside the device's, committed by the host page by page
//! as it is first written, so that it costs what the program touches.

use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};

/// Shadow of an address range; all zero at first.
#[derive(Debug)]
pub(super) struct Shadow {
    range: Range<u64>,
    base: u64,
}

impl Shadow {
    /// # Errors
    /// The host grants no address space.
    pub fn new(range: Range<u64>) -> io::Result<Shadow> {
        if range.is_empty() {
            return Ok(Shadow { range, base: 0 });
        }
        let bytes = (range.end - range.start) as usize;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping, wherever there is room.
        let at = unsafe { libc::mmap(ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Shadow { range, base: at as u64 })
    }

    /// The shadow of `address .. address + bytes`; `None` outside the range.
    #[inline(always)]
    pub fn at(&self, address: u64, bytes: u64) -> Option<*mut u8> {
        let inside = address >= self.range.start && address.checked_add(bytes).is_some_and(|end| end <= self.range.end);
        inside.then(|| (address - self.range.start + self.base) as *mut u8)
    }

    /// Sets the shadow of a range to zero and gives whole pages back.
    pub fn clear(&self, address: u64, bytes: u64) {
        let Some(at) = self.at(address, bytes) else { return };
        let (start, end) = (at as u64, at as u64 + bytes);
        let pages = start.next_multiple_of(4096)..end / 4096 * 4096;
        if pages.start < pages.end {
            // SAFETY: whole pages of this mapping; they read as zero afterwards.
            unsafe {
                libc::madvise(pages.start as *mut _, (pages.end - pages.start) as usize, libc::MADV_DONTNEED);
                fill(start as *mut u8, (pages.start - start) as usize, 0);
                fill(pages.end as *mut u8, (end - pages.end) as usize, 0);
            }
        } else {
            // SAFETY: inside this mapping.
            unsafe { fill(at, bytes as usize, 0) };
        }
    }

    /// Sets the shadow of a range; what lies outside is left out.
    pub fn fill(&self, address: u64, bytes: u64, value: u8) {
        if let Some(at) = self.at(address, bytes) {
            // SAFETY: inside this mapping.
            unsafe { fill(at, bytes as usize, value) };
        }
    }

    /// Gives `to` the shadow that `from` has.
    pub fn copy(&self, from: u64, to: u64, bytes: u64) {
        if let (Some(from), Some(to)) = (self.at(from, bytes), self.at(to, bytes)) {
            // SAFETY: both inside this mapping.
            unsafe { ptr::copy(from, to, bytes as usize) };
        }
    }
}

impl Drop for Shadow {
    fn drop(&mut self) {
        if self.base != 0 {
            // SAFETY: the mapping made in `new`.
            unsafe { libc::munmap(self.base as *mut _, (self.range.end - self.range.start) as usize) };
        }
    }
}

/// # Safety
/// The range must be of a shadow. Host threads may write the same bytes at once, all to the same value.
#[inline(always)]
unsafe fn fill(at: *mut u8, bytes: usize, value: u8) {
    // SAFETY: passed on to the caller.
    unsafe { ptr::write_bytes(at, value, bytes) }
}

/// Marks one lane's bytes.
///
/// # Safety
/// The bytes must be of a shadow.
#[inline(always)]
pub(super) unsafe fn mark(at: *mut u8, bytes: u32) {
    // SAFETY: passed on to the caller.
    unsafe {
        match bytes {
            1 => AtomicU8::from_ptr(at).store(1, Ordering::Relaxed),
            2 => at.cast::<u16>().write_unaligned(0x0101),
            4 => at.cast::<u32>().write_unaligned(0x0101_0101),
            8 => at.cast::<u64>().write_unaligned(0x0101_0101_0101_0101),
            16 => at.cast::<[u64; 2]>().write_unaligned([0x0101_0101_0101_0101; 2]),
            n => fill(at, n as usize, 1),
        }
    }
}

/// Whether all of one lane's bytes are marked.
///
/// # Safety
/// The bytes must be of a shadow.
#[inline(always)]
pub(super) unsafe fn marked(at: *const u8, bytes: u32) -> bool {
    // SAFETY: passed on to the caller.
    unsafe {
        match bytes {
            1 => *at == 1,
            2 => at.cast::<u16>().read_unaligned() == 0x0101,
            4 => at.cast::<u32>().read_unaligned() == 0x0101_0101,
            8 => at.cast::<u64>().read_unaligned() == 0x0101_0101_0101_0101,
            16 => at.cast::<[u64; 2]>().read_unaligned() == [0x0101_0101_0101_0101; 2],
            n => std::slice::from_raw_parts(at, n as usize).iter().all(|&b| b == 1),
        }
    }
}
