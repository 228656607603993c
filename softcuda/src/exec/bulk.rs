//! Transfers of the bulk engine (PTX ISA 9.7.9.25.4): what a copy in flight is made of, and how it happens.
//!
//! At issue all addresses are checked and the destination is poisoned, for its content is undefined until the transfer is
//! known to be complete. The source is read when the transfer happens.

use super::lanes::LANES;
use super::mbarrier_ops::{Place, misuse};
use super::observe::{AccessKind, Engine, MemoryEvent, SyncEvent};
use super::reduce;
use super::state::{Machine, Outcome};
use crate::lower::ir::{AtomOp, Order, Scope};
use crate::ptx::ast::{Space, Type};

/// What an asynchronous write looks like before it lands: NaN in every floating-point format.
const POISON: u8 = 0xff;

/// Rank that stands for global memory.
pub const GLOBAL: u32 = u32::MAX;

/// Bytes that move as one.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    /// Where the destination is: a block's rank, or [`GLOBAL`].
    pub rank: u32,
    pub to: u64,
    /// 0 for bytes that are filled.
    pub from: u64,
    pub bytes: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    Copy,
    Reduce(AtomOp, Type),
}

/// Transactions of an mbarrier object that complete with the transfer.
#[derive(Debug, Clone, Copy)]
pub struct Signal {
    pub place: Place,
    pub bytes: u32,
}

/// What tensor maps do to elements on their way to shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Convert {
    /// f32: subnormal numbers become zero.
    FlushF32,
    /// f32 rounded to tf32, and with subnormal numbers flushed.
    Tf32,
    Tf32Flush,
}

#[derive(Debug)]
pub struct Transfer {
    pub pieces: Vec<Piece>,
    pub effect: Effect,
    /// What filled bytes hold, from the start of each piece on.
    pub fill: [u8; 8],
    pub convert: Option<Convert>,
    pub signals: Vec<Signal>,
    /// The lane's bulk group that waits for it.
    pub group: Option<u32>,
    /// The source where it has been read already, all pieces one after another.
    pub data: Option<Vec<u8>>,
    /// State space of the source.
    pub from_shared: bool,
}

impl Transfer {
    pub fn new(pieces: Vec<Piece>, effect: Effect) -> Self {
        let (fill, signals) = ([0; 8], Vec::new());
        Self { pieces, effect, fill, convert: None, signals, group: None, data: None, from_shared: false }
    }

    /// Reads the source now.
    pub fn read(&mut self) {
        if self.data.is_some() {
            return;
        }
        let mut data = Vec::with_capacity(self.pieces.iter().map(|p| p.bytes as usize).sum());
        for p in &self.pieces {
            if p.from == 0 {
                data.extend((0..p.bytes as usize).map(|i| self.fill[i % 8]));
            } else {
                // SAFETY: checked at issue; a cluster's memory and allocations outlive its transfers.
                data.extend_from_slice(unsafe { std::slice::from_raw_parts(p.from as *const u8, p.bytes as usize) });
            }
        }
        self.data = Some(data);
    }

    fn poison(&self) {
        if self.effect != Effect::Copy {
            return;
        }
        for p in &self.pieces {
            // SAFETY: checked at issue.
            unsafe { std::ptr::write_bytes(p.to as *mut u8, POISON, p.bytes as usize) };
        }
    }

    fn perform(&self) {
        let mut at = 0;
        for p in &self.pieces {
            let bytes = p.bytes as usize;
            let from = match &self.data {
                Some(data) => data[at..].as_ptr(),
                None => p.from as *const u8,
            };
            at += bytes;
            // SAFETY: both ends were checked at issue; the captured source has all pieces' bytes.
            unsafe {
                match self.effect {
                    Effect::Copy if from.is_null() => {
                        (0..bytes).for_each(|i| *(p.to as *mut u8).add(i) = self.fill[i % 8]);
                    }
                    Effect::Copy => std::ptr::copy_nonoverlapping(from, p.to as *mut u8, bytes),
                    Effect::Reduce(op, ty) => {
                        let size = ty.bytes() as usize;
                        for i in (0..bytes).step_by(size) {
                            let mut value = [0; 8];
                            std::ptr::copy_nonoverlapping(from.add(i), value.as_mut_ptr(), size);
                            reduce::element(op, ty, p.to + i as u64, u64::from_le_bytes(value));
                        }
                    }
                }
                if let Some(convert) = self.convert {
                    for i in (0..bytes).step_by(4) {
                        let place = (p.to as *mut u8).add(i).cast::<u32>();
                        place.write_unaligned(converted(convert, place.read_unaligned()));
                    }
                }
            }
        }
    }

    /// Takes out what goes to the block of this rank; `true` if there was anything.
    pub fn abandon(&mut self, rank: u32) -> bool {
        let before = self.pieces.len();
        if self.pieces.iter().any(|p| p.rank == rank) {
            // Captured bytes belong to pieces by position.
            self.read();
            let data = self.data.take().unwrap_or_default();
            let mut kept = Vec::new();
            let mut at = 0;
            self.pieces.retain(|p| {
                let keep = p.rank != rank;
                if keep {
                    kept.extend_from_slice(&data[at..at + p.bytes as usize]);
                }
                at += p.bytes as usize;
                keep
            });
            self.data = Some(kept);
        }
        self.signals.retain(|s| s.place.0 != rank);
        self.pieces.len() != before
    }

    pub fn is_void(&self) -> bool {
        self.pieces.is_empty() && self.signals.is_empty()
    }
}

fn converted(convert: Convert, bits: u32) -> u32 {
    let flush = |bits: u32| if bits & 0x7f80_0000 == 0 { bits & 0x8000_0000 } else { bits };
    let round = |bits: u32| {
        if bits & 0x7f80_0000 == 0x7f80_0000 {
            // Infinity stays, NaN stays one.
            bits & !0x1fff | if bits & 0x7f_ffff != 0 { 0x2000 } else { 0 }
        } else {
            bits.wrapping_add(0x1000) & !0x1fff
        }
    };
    match convert {
        Convert::FlushF32 => flush(bits),
        Convert::Tf32 => round(bits),
        Convert::Tf32Flush => flush(round(flush(bits))),
    }
}

impl Machine<'_, '_> {
    /// Sets a transfer off that one lane has issued.
    pub fn issue(&mut self, transfer: Transfer, lane: usize, pc: u32) {
        let id = self.cluster.engine.next_id();
        if self.worker.watched {
            let (mbarrier, bulk_group) = (!transfer.signals.is_empty(), transfer.group.is_some());
            self.observe_sync(SyncEvent::BulkIssue { id, lane: lane as u32, mbarrier, bulk_group }, pc);
            self.report_transfer(&transfer, pc);
        }
        transfer.poison();
        let (rank, warp) = (self.shared.rank, self.warp.index);
        let work = super::engine::Work::Transfer(Box::new(transfer));
        self.cluster.engine.push(super::engine::Pending { id, rank, warp, lanes: 1 << lane, pc, work });
    }

    /// A transfer happens.
    pub fn land_transfer(&mut self, id: u64, transfer: Transfer, lane: usize, pc: u32) -> Outcome<()> {
        if transfer.data.is_none() {
            self.observe_sync(SyncEvent::BulkRead { id, lane: lane as u32 }, pc);
        }
        transfer.perform();
        self.observe_sync(SyncEvent::BulkLand { id, lane: lane as u32 }, pc);
        for signal in &transfer.signals {
            let (rank, offset) = signal.place;
            let bytes = -i64::from(signal.bytes);
            let at = self.object_place(signal.place);
            let complete = self.block_of(rank).mbarrier_transact(offset, bytes);
            let (before, done) = complete.map_err(|text| misuse(lane, text))?;
            self.observe_sync(SyncEvent::BulkComplete { id, at, phase: before.phase }, pc);
            self.observe_phase(at, before, done, pc);
        }
        Ok(())
    }

    /// Lands, or only reads, the transfers of all but each lane's last `keep` bulk groups.
    pub fn wait_bulk_groups(&mut self, keep: u32, read: bool, mask: u32, pc: u32) -> Outcome<()> {
        let (rank, warp) = (self.shared.rank, self.warp.index);
        for lane in super::lanes::active(mask) {
            let committed = self.warp.bulk_committed[lane];
            let due = |t: &Transfer| t.group.is_some_and(|g| g.saturating_add(keep) < committed);
            if read {
                let mut fresh = Vec::new();
                for (_, id, t) in self.cluster.engine.of_lane(rank, warp, lane) {
                    if due(t) && t.data.is_none() {
                        t.read();
                        fresh.push(id);
                    }
                }
                for id in fresh {
                    self.observe_sync(SyncEvent::BulkRead { id, lane: lane as u32 }, pc);
                }
            } else {
                loop {
                    let mine = self.cluster.engine.of_lane(rank, warp, lane);
                    let Some(i) = mine.filter(|(_, _, t)| due(t)).map(|(i, ..)| i).last() else { break };
                    let pending = self.cluster.engine.take(i);
                    self.land(pending)?;
                }
            }
        }
        self.observe_sync(SyncEvent::BulkWait { keep, read, mask }, pc);
        Ok(())
    }

    /// Tells observers what a transfer reads and writes, in chunks of up to 16 bytes.
    fn report_transfer(&mut self, t: &Transfer, pc: u32) {
        let source = if t.from_shared { self.shared.rank } else { GLOBAL };
        if t.data.is_none() {
            // What several blocks receive is read once.
            let reader = t.pieces.first().map(|p| p.rank);
            let read = |p: &&Piece| p.from != 0 && Some(p.rank) == reader;
            let reads: Vec<_> = t.pieces.iter().filter(read).map(|p| (source, p.from, p.bytes)).collect();
            self.report_ranges(AccessKind::Read, &reads, pc);
        }
        let write = if t.effect == Effect::Copy { AccessKind::Write } else { AccessKind::Atomic };
        let writes: Vec<_> = t.pieces.iter().map(|p| (p.rank, p.to, p.bytes)).collect();
        self.report_ranges(write, &writes, pc);
    }

    /// Ranges by rank, host address and length.
    fn report_ranges(&mut self, kind: AccessKind, ranges: &[(u32, u64, u32)], pc: u32) {
        let mut chunks: Vec<(u32, u32, u64)> = Vec::new();
        for &(rank, mut at, mut bytes) in ranges {
            if rank != GLOBAL {
                at -= self.block_of(rank).memory.as_ptr() as u64;
            }
            while bytes != 0 {
                let size =
                    [16, 8, 4, 2, 1].into_iter().find(|&s| s <= bytes && at.is_multiple_of(s.into())).unwrap_or(1);
                chunks.push((rank, size, at));
                at += u64::from(size);
                bytes -= size;
            }
        }
        for run in chunks.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1)) {
            for part in run.chunks(LANES) {
                let (rank, bytes, _) = part[0];
                let mut addresses = [0; LANES];
                part.iter().zip(&mut addresses).for_each(|(c, a)| *a = c.2);
                let owner = if rank == GLOBAL { self.shared.linear } else { self.block_of(rank).linear };
                let event = MemoryEvent {
                    kind,
                    engine: Engine::Bulk,
                    space: if rank == GLOBAL { Space::Global } else { Space::Shared },
                    addresses: &addresses,
                    mask: u32::MAX >> (LANES - part.len()),
                    bytes,
                    order: Order::Weak,
                    scope: Scope::Cta,
                    owner,
                    stored: None,
                };
                self.report_memory(&event, pc);
            }
        }
    }
}
