//! Address space: a large reserve, committed in chunks of poison.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

/// What fresh memory reads as: a NaN in f16, bf16, f32 and f64, an index far out of range in i32 and i64.
///
/// A NaN rather than a large number, so that unwritten values multiplied by zero still show.
pub const POISON: u16 = 0x7ffd;

/// Unit of commitment. Each costs one kernel mapping of a per-process budget of 65530, and the poison file has this size.
pub(super) const CHUNK: u64 = 16 << 20;

/// Chunks that may be readable without being in use.
const RETIRED: usize = 4096;

/// Address space to ask for first; halved until the system grants it.
const RESERVE: u64 = 16 << 40;

pub(super) struct Arena {
    base: u64,
    chunks: u64,
    poison: OwnedFd,
    /// Committed chunks by index, with the number of allocations in each.
    live: BTreeMap<u64, u32>,
    /// Chunks given back, still readable: a kernel that runs in another thread and wrongly uses the memory reads poison
    /// rather than crash the process.
    retired: VecDeque<u64>,
    /// Where the search for free chunks goes on, so that addresses come back as late as possible.
    cursor: u64,
}

impl Arena {
    pub fn new() -> io::Result<Arena> {
        let poison = poison_file()?;
        let mut size = RESERVE;
        let base = loop {
            match map(ptr::null_mut(), size, libc::PROT_NONE, 0, -1) {
                Ok(base) => break base,
                Err(error) if size <= 4 * CHUNK => return Err(error),
                Err(_) => size /= 2,
            }
        };
        let start = base.next_multiple_of(CHUNK);
        let chunks = (base + size - start) / CHUNK;
        Ok(Arena { base: start, chunks, poison, live: BTreeMap::new(), retired: VecDeque::new(), cursor: 0 })
    }

    /// All addresses that allocations may get.
    pub fn range(&self) -> Range<u64> {
        self.base..self.base + self.chunks * CHUNK
    }

    pub fn address(&self, chunk: u64) -> u64 {
        self.base + chunk * CHUNK
    }

    /// Commits `count` chunks in a row, with no allocation in them yet, and returns the first one's index.
    pub fn commit(&mut self, count: u64) -> io::Result<u64> {
        let first = self.find(count).ok_or(io::ErrorKind::OutOfMemory)?;
        for chunk in first..first + count {
            let flags = libc::MAP_FIXED;
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let mapped =
                map(self.address(chunk) as *mut libc::c_void, CHUNK, protection, flags, self.poison.as_raw_fd());
            if let Err(error) = mapped {
                for done in first..chunk {
                    self.live.remove(&done);
                    self.decommit(done);
                }
                return Err(error);
            }
            self.live.insert(chunk, 0);
        }
        self.cursor = first + count;
        Ok(first)
    }

    /// Counts one more allocation in the chunks that `start..end` touches.
    pub fn occupy(&mut self, start: u64, end: u64) {
        for chunk in self.indices(start, end) {
            *self.live.entry(chunk).or_insert(0) += 1;
        }
    }

    /// Takes back the pages of `start..end`, which belong to one allocation, and chunks that are then unused; `keep` is the
    /// chunk that small allocations are still being carved from.
    pub fn vacate(&mut self, start: u64, end: u64, keep: Option<u64>) {
        for chunk in self.indices(start, end) {
            let Some(count) = self.live.get_mut(&chunk) else { continue };
            *count -= 1;
            let unused = *count == 0 && keep != Some(chunk);
            let from = start.max(self.address(chunk)) & !4095;
            let to = end.min(self.address(chunk) + CHUNK).next_multiple_of(4096);
            // SAFETY: whole pages of this arena that hold nothing but the freed allocation. Dropping the private copies
            // makes the pages read as poison again.
            unsafe { libc::madvise(from as *mut libc::c_void, (to - from) as usize, libc::MADV_DONTNEED) };
            if unused {
                self.retire(chunk);
            }
        }
    }

    /// Takes back a chunk that no allocation is in.
    pub fn retire(&mut self, chunk: u64) {
        if self.live.get(&chunk) != Some(&0) {
            return;
        }
        self.live.remove(&chunk);
        self.retired.push_back(chunk);
        if self.retired.len() > RETIRED
            && let Some(oldest) = self.retired.pop_front()
            && !self.live.contains_key(&oldest)
        {
            self.decommit(oldest);
        }
    }

    fn indices(&self, start: u64, end: u64) -> Range<u64> {
        (start - self.base) / CHUNK..(end - self.base).div_ceil(CHUNK)
    }

    fn decommit(&self, chunk: u64) {
        // Failure leaves the pages readable, which only makes stray host reads quieter.
        let _ = map(self.address(chunk) as *mut libc::c_void, CHUNK, libc::PROT_NONE, libc::MAP_FIXED, -1);
    }

    /// The first free run of `count` chunks from the cursor on, then from the start.
    fn find(&self, count: u64) -> Option<u64> {
        let search = |mut from: u64, to: u64| {
            for (&used, _) in self.live.range(from..) {
                if used >= from + count {
                    break;
                }
                from = used + 1;
            }
            (from + count <= to).then_some(from)
        };
        search(self.cursor, self.chunks).or_else(|| search(0, self.chunks))
    }
}

/// A private mapping of `size` bytes, of the file `fd` or of nothing.
fn map(at: *mut libc::c_void, size: u64, protection: i32, flags: i32, fd: i32) -> io::Result<u64> {
    let anonymous = if fd < 0 { libc::MAP_ANONYMOUS } else { 0 };
    let flags = flags | anonymous | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    // SAFETY: without MAP_FIXED the kernel chooses unused addresses; with it, callers name chunks of their own reserve.
    let mapped = unsafe { libc::mmap(at, size as usize, protection, flags, fd, 0) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(mapped as u64) }
}

/// An anonymous file of one chunk of poison: mapped privately it costs nothing until written, and then only the pages
/// written.
fn poison_file() -> io::Result<OwnedFd> {
    // SAFETY: the name is a NUL-terminated literal; a non-negative result is a descriptor that nobody else owns.
    let file = unsafe {
        let fd = libc::memfd_create(c"softcuda-poison".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    let page: Vec<u8> = POISON.to_ne_bytes().repeat(1 << 19);
    let mut file = std::fs::File::from(file);
    for _ in 0..CHUNK / page.len() as u64 {
        io::Write::write_all(&mut file, &page)?;
    }
    Ok(file.into())
}
