//! The bulk engine's instructions, lane by lane.

use super::access::{addresses, get, space_name};
use super::bulk::{Effect, GLOBAL, Piece, Signal, Transfer};
use super::copies::policy_of;
use super::fault::FaultKind;
use super::lanes::{File, LANES, active};
use super::mbarrier_ops::Place;
use super::observe::SyncEvent;
use super::policy::Policy;
use super::state::{Machine, Outcome, Raw};
use super::{SHARED_WINDOW, access};
use crate::lower::ir::{Address, ProxyFence};
use crate::lower::ir_bulk::{AsyncStore, BulkCopy, BulkOp};
use crate::ptx::ast::Space;

/// Alignment of both ends of a bulk copy, and what its size is a multiple of.
const UNIT: u64 = 16;

fn illegal<T>(lane: usize, text: String) -> Outcome<T> {
    Err(Raw::new(FaultKind::IllegalInstruction, 1 << lane, text))
}

impl Machine<'_, '_> {
    pub fn bulk_op(&mut self, file: File, x: &BulkOp, pc: u32, mask: u32) -> Outcome<()> {
        match x {
            BulkOp::Copy(x) => active(mask).try_for_each(|lane| self.bulk_copy(file, x, lane, pc)),
            BulkOp::Tensor(x) => active(mask).try_for_each(|lane| self.tensor_copy(file, x, lane, pc)),
            BulkOp::Store(x) => active(mask).try_for_each(|lane| self.store_async(file, x, lane, pc)),
            BulkOp::Commit => {
                active(mask).for_each(|i| self.warp.bulk_committed[i] += 1);
                self.observe_sync(SyncEvent::BulkCommit { mask }, pc);
                Ok(())
            }
            BulkOp::Wait { keep, read } => self.wait_bulk_groups(*keep, *read, mask, pc),
            BulkOp::Prefetch { from, bytes } => {
                let (from, bytes) = (addresses(file, from), get(file, *bytes));
                for lane in active(mask) {
                    check_unit("source", from[lane], lane)?;
                    if !bytes[lane].is_multiple_of(UNIT) {
                        return illegal(
                            lane,
                            format!("a bulk prefetch of {} bytes, no multiple of {UNIT}", bytes[lane]),
                        );
                    }
                }
                Ok(())
            }
        }
    }

    pub fn proxy_fence(&mut self, kind: ProxyFence, pc: u32, mask: u32) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.observe_sync(SyncEvent::ProxyFence { kind, mask }, pc);
    }

    /// Checks that a range of global memory is live.
    pub fn global_range(&mut self, address: u64, bytes: u64, lane: usize) -> Outcome<()> {
        let end = address.checked_add(bytes);
        let inside = |&(from, to): &(u64, u64)| address >= from && end.is_some_and(|end| end <= to);
        if bytes == 0 || self.worker.allocations.first().is_some_and(inside) {
            return Ok(());
        }
        let seen = &mut self.worker.allocations;
        if let Some(i) = seen.iter().position(inside) {
            seen.swap(0, i);
            return Ok(());
        }
        let text = match self.worker.memory.find(address) {
            Some(found) if inside(&found) => {
                seen.insert(0, found);
                seen.truncate(32);
                return Ok(());
            }
            Some((from, to)) => {
                format!("crosses the end of an allocation of {} bytes at {from:#x}", to.wrapping_sub(from))
            }
            None => self.worker.memory.describe(address),
        };
        let mut raw = Raw::new(
            FaultKind::IllegalAddress,
            1 << lane,
            format!("bulk access of {bytes} global bytes at {address:#x}: {text}"),
        );
        (raw.address, raw.space, raw.bytes) = (Some(address), Some("global"), u32::try_from(bytes).ok());
        Err(raw)
    }

    /// Rank, offset and host address of a range of shared memory, which must be there.
    pub fn shared_range(
        &mut self,
        space: Option<Space>,
        address: u64,
        bytes: u64,
        lane: usize,
    ) -> Outcome<(Place, u64)> {
        let (space, inner) = match space {
            Some(space) => (space, address),
            None if access::space_of(address) == Space::Shared => (Space::SharedCluster, address - SHARED_WINDOW),
            None => {
                let text = format!("the generic address {address:#x} is not in shared memory");
                return Err(Raw::new(FaultKind::InvalidAddressSpace, 1 << lane, text));
            }
        };
        let (rank, offset) = self.locate(space, inner, lane)?;
        let (memory, size) = self.shared_of(rank, address, lane)?;
        if offset + bytes > size.into() {
            let text = format!(
                "asynchronous access of {bytes} shared bytes at {address:#x}: the block's shared memory is {size} bytes"
            );
            let mut raw = Raw::new(FaultKind::IllegalAddress, 1 << lane, text);
            (raw.address, raw.space, raw.bytes) = (Some(address), Some(space_name(space)), u32::try_from(bytes).ok());
            return Err(raw);
        }
        Ok(((rank, offset as u32), memory + offset))
    }

    /// The blocks that a mask names.
    pub fn receivers(&self, mask: u32, lane: usize) -> Outcome<Vec<u32>> {
        let size = self.worker.cluster.iter().product::<u32>();
        if mask == 0 || mask >> size != 0 {
            return illegal(lane, format!("a multicast to blocks {mask:#06x} of a cluster of {size}"));
        }
        Ok(active(mask).map(|rank| rank as u32).collect())
    }

    /// The object that an operand names and that must be in the same block as the destination; where there are receivers, the
    /// same one of each of them.
    pub fn signals(
        &mut self,
        at: u64,
        to: Place,
        space: Option<Space>,
        receivers: Option<&[u32]>,
        bytes: u32,
        lane: usize,
    ) -> Outcome<Vec<Signal>> {
        let (rank, offset) = self.mbarrier_place(space, at, lane)?;
        if rank != to.0 {
            let text =
                format!("the destination is in block {} of the cluster, its mbarrier object in block {rank}", to.0);
            return illegal(lane, text);
        }
        let mut signals = Vec::new();
        for &rank in receivers.unwrap_or(&[to.0]) {
            let place = (rank, offset);
            self.shared_of(rank, super::cluster::address(rank, offset.into()), lane)?;
            self.block_of(rank).mbarrier(offset).map_err(|text| super::mbarrier_ops::misuse(lane, text))?;
            signals.push(Signal { place, bytes });
        }
        Ok(signals)
    }

    fn bulk_copy(&mut self, file: File, x: &BulkCopy, lane: usize, pc: u32) -> Outcome<()> {
        let one = |a: &Address| addresses(file, a)[lane];
        let (to, from, bytes) = (one(&x.to), one(&x.from), get(file, x.bytes)[lane]);
        check_unit("destination", to, lane)?;
        check_unit("source", from, lane)?;
        if !bytes.is_multiple_of(UNIT) {
            return illegal(lane, format!("a bulk copy of {bytes} bytes, no multiple of {UNIT}"));
        }
        let source = match x.from_space {
            Space::Global => {
                self.global_range(from, bytes, lane)?;
                from
            }
            space => self.shared_range(Some(space), from, bytes, lane)?.1,
        };
        let size = bytes as u32;
        let effect = x.reduce.map_or(Effect::Copy, |(op, ty)| Effect::Reduce(op, ty));
        let mut transfer = Transfer::new(Vec::new(), effect);
        transfer.from_shared = x.from_space == Space::Shared;
        if x.to_space == Space::Global {
            self.global_range(to, bytes, lane)?;
            transfer.pieces.push(Piece { rank: GLOBAL, to, from: source, bytes: size });
            transfer.group = Some(self.warp.bulk_committed[lane]);
        } else {
            let (place, host) = self.shared_range(Some(x.to_space), to, bytes, lane)?;
            if x.from_space == Space::Shared && place.0 == self.shared.rank {
                return illegal(lane, "a bulk copy from shared memory to that of the same block".into());
            }
            let receivers = match x.multicast {
                Some(mask) => Some(self.receivers(get(file, mask)[lane] as u32 & 0xffff, lane)?),
                None => None,
            };
            let mbarrier = x.mbarrier.as_ref().map_or(0, one);
            transfer.signals = self.signals(mbarrier, place, Some(x.to_space), receivers.as_deref(), size, lane)?;
            for rank in receivers.unwrap_or_else(|| vec![place.0]) {
                let to = self.same_place(rank, place, host, bytes, lane)?;
                transfer.pieces.push(Piece { rank, to, from: source, bytes: size });
            }
        }
        self.warp.policy = policy_of(file, x.policy, lane);
        self.issue(transfer, lane, pc);
        self.warp.policy = Policy::default();
        Ok(())
    }

    /// Host address in the block of a rank of what `place`, at `host`, is in its own.
    pub fn same_place(&mut self, rank: u32, place: Place, host: u64, bytes: u64, lane: usize) -> Outcome<u64> {
        if rank == place.0 {
            return Ok(host);
        }
        let address = super::cluster::address(rank, place.1.into());
        Ok(self.shared_range(Some(Space::SharedCluster), address, bytes, lane)?.1)
    }

    fn store_async(&mut self, file: File, x: &AsyncStore, lane: usize, pc: u32) -> Outcome<()> {
        if self.worker.cluster == [1, 1, 1] {
            return illegal(lane, "`st.async` and `red.async` need a cluster of more than one block".into());
        }
        let bytes = x.bytes * x.values.len() as u32;
        let to = addresses(file, &x.to)[lane];
        if !to.is_multiple_of(bytes.into()) {
            let text = format!("asynchronous store of {bytes} bytes at {to:#x}: not a multiple of {bytes}");
            return Err(Raw::new(FaultKind::MisalignedAddress, 1 << lane, text));
        }
        let (place, host) = self.shared_range(x.space, to, bytes.into(), lane)?;
        let at = addresses(file, &x.mbarrier)[lane];
        let effect = x.reduce.map_or(Effect::Copy, |(op, ty)| Effect::Reduce(op, ty));
        let mut transfer = Transfer::new(vec![Piece { rank: place.0, to: host, from: 0, bytes }], effect);
        transfer.signals = self.signals(at, place, x.space, None, bytes, lane)?;
        let values: Vec<[u64; LANES]> = x.values.iter().map(|v| get(file, *v)).collect();
        let data = values.iter().flat_map(|v| v[lane].to_le_bytes()[..x.bytes as usize].to_vec());
        transfer.data = Some(data.collect());
        self.issue(transfer, lane, pc);
        Ok(())
    }
}

/// Both ends of a bulk copy are aligned.
pub fn check_unit(what: &str, address: u64, lane: usize) -> Outcome<()> {
    if address.is_multiple_of(UNIT) {
        return Ok(());
    }
    let text = format!("the {what} {address:#x} of a bulk copy is not a multiple of {UNIT}");
    let mut raw = Raw::new(FaultKind::MisalignedAddress, 1 << lane, text);
    raw.address = Some(address);
    Err(raw)
}
