//! Reads of bytes that nothing has written: in global memory since the allocation, in shared and local memory since the
//! block's start.
//!
//! A byte counts as written by any store, atomic operation or asynchronous copy of a kernel, by a copy or a memset of the
//! host, and by the driver (a module's variables). Copies within the device carry the state of every byte along, so that
//! moving a buffer with unwritten padding is no mistake; reading the padding is.
//!
//! Not seen: whether a value that was read matters (every read counts, as in compute-sanitizer's initcheck); writes of the
//! host to page-locked and managed memory, which therefore always counts as written; what an asynchronous copy brings counts
//! as written from its issue on (reading it too early is the asynchrony checker's). Registers: `ptxas` warns of those.
//! After a finding its bytes count as written, so that one mistake is one finding.

use rustc_hash::FxHashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::shadow::{Shadow, mark, marked};
use super::{Checker, Finding, Findings, Place};
use crate::exec::Launch;
use crate::exec::observe::{AccessKind, BlockEvent, BlockSite, MemoryEvent, Observer, Site, Watch};
use crate::ptx::ast::Space;

/// The checker. Its shadow of global memory lives across launches.
#[derive(Debug)]
pub struct Init {
    findings: Arc<Findings>,
    global: Shadow,
}

impl Init {
    /// For global memory in this range of addresses.
    ///
    /// # Errors
    /// The host grants no address space for the shadow.
    pub fn new(findings: Arc<Findings>, range: Range<u64>) -> io::Result<Init> {
        Ok(Init { findings, global: Shadow::new(range)? })
    }

    /// Fresh memory.
    pub fn allocated(&self, address: u64, bytes: u64, written: bool) {
        self.global.clear(address, bytes);
        if written {
            self.global.fill(address, bytes, 1);
        }
    }

    /// The host or the driver wrote.
    pub fn written(&self, address: u64, bytes: u64) {
        self.global.fill(address, bytes, 1);
    }

    /// The device copied.
    pub fn copied(&self, from: u64, to: u64, bytes: u64) {
        self.global.copy(from, to, bytes);
    }
}

impl Watch for Init {
    fn observer<'a>(&'a self, _launch: &'a Launch<'a>, _grid: u64) -> Option<Box<dyn Observer + 'a>> {
        Some(Box::new(View { init: self, blocks: FxHashMap::default(), spare: Vec::new() }))
    }
}

/// Which bytes of a block's memories are written, one byte each.
#[derive(Debug, Default)]
struct BlockShadow {
    shared: Vec<u8>,
    /// By thread.
    local: Vec<u8>,
    local_bytes: usize,
}

/// One host thread's view.
struct View<'a> {
    init: &'a Init,
    blocks: FxHashMap<u64, BlockShadow>,
    spare: Vec<BlockShadow>,
}

impl Observer for View<'_> {
    fn block(&mut self, block: &BlockSite, event: BlockEvent) {
        match event {
            BlockEvent::Begin => {
                let mut shadow = self.spare.pop().unwrap_or_default();
                shadow.shared.clear();
                shadow.shared.resize(block.shared_bytes as usize, 0);
                shadow.local.clear();
                shadow.local.resize(block.local_bytes as usize * block.threads.next_multiple_of(32) as usize, 0);
                shadow.local_bytes = block.local_bytes as usize;
                self.blocks.insert(block.block, shadow);
            }
            BlockEvent::End => self.spare.extend(self.blocks.remove(&block.block)),
        }
    }

    fn memory(&mut self, site: &Site, e: &MemoryEvent) {
        let bytes = e.bytes as usize;
        match e.space {
            Space::Global => {
                let global = &self.init.global;
                self.init.visit(site, e, |_, address| global.at(address, bytes as u64));
            }
            Space::Shared => {
                let Some(shadow) = self.blocks.get_mut(&e.owner) else { return };
                self.init.visit(site, e, |_, offset| place(&mut shadow.shared, offset as usize, bytes));
            }
            Space::Local => {
                let Some(shadow) = self.blocks.get_mut(&e.owner) else { return };
                let (size, warp) = (shadow.local_bytes, site.warp as usize);
                self.init.visit(site, e, |lane, offset| {
                    place(&mut shadow.local, (warp * 32 + lane) * size + offset as usize, bytes)
                });
            }
            _ => {}
        }
    }
}

fn place(shadow: &mut [u8], offset: usize, bytes: usize) -> Option<*mut u8> {
    shadow.get_mut(offset..offset.checked_add(bytes)?).map(<[u8]>::as_mut_ptr)
}

impl Init {
    /// Checks reads and marks writes; `place` gives the shadow of one lane's bytes.
    #[inline(always)]
    fn visit(&self, site: &Site, e: &MemoryEvent, mut place: impl FnMut(usize, u64) -> Option<*mut u8>) {
        let mut unwritten = 0u32;
        for lane in 0..32 {
            if e.mask >> lane & 1 == 0 {
                continue;
            }
            let Some(at) = place(lane, e.addresses[lane]) else { continue };
            // SAFETY: `place` gives the shadow of as many bytes as the access has.
            unsafe {
                if e.kind != AccessKind::Write && !marked(at, e.bytes) {
                    unwritten |= 1 << lane;
                }
                if e.kind != AccessKind::Read {
                    mark(at, e.bytes);
                }
            }
        }
        if unwritten != 0 {
            self.report(site, e, unwritten, place);
        }
    }

    #[cold]
    fn report(
        &self,
        site: &Site,
        e: &MemoryEvent,
        unwritten: u32,
        mut place: impl FnMut(usize, u64) -> Option<*mut u8>,
    ) {
        let first = unwritten.trailing_zeros() as usize;
        let space = match e.space {
            Space::Shared => "shared",
            Space::Local => "local",
            _ => "global",
        };
        let lanes = match unwritten.count_ones() {
            1 => String::new(),
            n => format!(", and so do {} more lanes", n - 1),
        };
        let message = format!(
            "{space} memory at {:#x} ({} bytes) is read, but not all of it was ever written{lanes}",
            e.addresses[first], e.bytes
        );
        let finding =
            Finding { checker: Checker::Init, message, place: Some(Place::new(site, first)), other: None, times: 1 };
        self.findings.report(space, finding);
        for lane in (0..32).filter(|lane| unwritten >> lane & 1 == 1) {
            if let Some(at) = place(lane, e.addresses[lane]) {
                // SAFETY: as in `visit`.
                unsafe { mark(at, e.bytes) };
            }
        }
    }
}
