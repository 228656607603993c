//! Tells counters and observers what a warp does.

use super::access::space_of;
use super::cluster::OFFSET_BITS;
use super::lanes::{LANES, active};
use super::observe::{AccessKind, MemoryEvent, Site, Stored, SyncEvent, Touch};
use super::state::Machine;
use crate::ptx::ast::Space;

impl<'a> Machine<'_, 'a> {
    /// Tells whoever watches of an access whose addresses have been checked.
    #[inline(always)]
    pub(super) fn observe(&mut self, touch: &Touch, pc: u32) {
        if self.worker.watched {
            self.count_access(touch, pc);
            self.report_access(touch, None, false, pc);
        }
    }

    /// As [`Machine::observe`], for a store of values that can be told.
    #[inline(always)]
    pub(super) fn observe_store(&mut self, touch: &Touch, stored: Stored, pc: u32) {
        if self.worker.watched {
            self.count_access(touch, pc);
            self.report_access(touch, Some(stored), false, pc);
        }
    }

    /// Tells whoever watches that a strong access has been done.
    #[inline(always)]
    pub(super) fn observe_performed(&mut self, touch: &Touch, pc: u32) {
        if self.worker.watched {
            self.report_access(touch, None, true, pc);
        }
    }

    /// Tells whoever watches of anything else.
    #[inline(always)]
    pub(super) fn observe_sync(&mut self, event: SyncEvent, pc: u32) {
        if self.worker.watched {
            self.report_sync(event, pc);
        }
    }

    fn site(&self, pc: u32) -> Site<'a> {
        Site {
            kernel: self.worker.kernel,
            block: self.shared.linear,
            block_id: self.shared.block,
            shape: self.worker.block,
            warp: self.warp.index,
            line: self.line(pc),
            repeated: self.worker.tally.as_ref().is_some_and(|tally| tally.repeating()),
            uncached: self.worker.body.ops[pc as usize].x != 0,
            policy: self.warp.policy,
        }
    }

    #[inline(never)]
    fn report_sync(&mut self, event: SyncEvent, pc: u32) {
        let site = self.site(pc);
        for observer in &mut self.worker.observers {
            observer.sync(&site, &event);
        }
    }

    /// Tells observers of an access by an engine beside the threads.
    pub(super) fn report_memory(&mut self, event: &MemoryEvent, pc: u32) {
        let &MemoryEvent { kind, engine, space, addresses, mask, bytes, order, scope, .. } = event;
        self.count_access(&Touch { kind, engine, space: Some(space), addresses, mask, bytes, order, scope }, pc);
        self.shared.worked |= kind != AccessKind::Read && space == Space::Shared && event.owner != self.shared.linear;
        let site = self.site(pc);
        for observer in &mut self.worker.observers {
            observer.memory(&site, event);
        }
    }

    #[inline(never)]
    fn report_access(&mut self, t: &Touch, stored: Option<Stored>, performed: bool, pc: u32) {
        if self.worker.observers.is_empty() {
            return;
        }
        let site = self.site(pc);
        let (lower, higher) = (&*self.peers.lower, &*self.peers.higher);
        let owner_of = |field: usize| match field.checked_sub(1).map(|rank| (rank, rank.checked_sub(lower.len()))) {
            None | Some((_, Some(0))) => site.block,
            Some((rank, None)) => lower[rank].linear,
            Some((_, Some(above))) => higher[above - 1].linear,
        };
        let mut split = |space: Space, addresses: &[u64; LANES], mask: u32, owner: u64| {
            let event = MemoryEvent {
                kind: t.kind,
                engine: t.engine,
                space,
                addresses,
                mask,
                bytes: t.bytes,
                order: t.order,
                scope: t.scope,
                owner,
                stored,
            };
            for observer in &mut self.worker.observers {
                if performed {
                    observer.performed(&site, &event);
                } else {
                    observer.memory(&site, &event);
                }
            }
        };
        match t.space {
            Some(space @ (Space::Global | Space::Local)) => split(space, t.addresses, t.mask, site.block),
            Some(Space::Shared | Space::SharedCluster) => {
                each_block(t.addresses, t.mask, |field, at, mask| split(Space::Shared, at, mask, owner_of(field)))
            }
            Some(_) => {}
            None => {
                for space in [Space::Global, Space::Shared, Space::Local] {
                    let inside = |&i: &usize| space_of(t.addresses[i]) == space;
                    let mask = active(t.mask).filter(inside).fold(0, |m, i| m | 1 << i);
                    if mask == 0 {
                    } else if space == Space::Global {
                        split(space, t.addresses, mask, site.block);
                    } else if space == Space::Shared {
                        each_block(t.addresses, mask, |field, at, mask| {
                            split(Space::Shared, at, mask, owner_of(field))
                        });
                    } else {
                        split(space, &t.addresses.map(|a| a & 0x00ff_ffff_ffff_ffff), mask, site.block);
                    }
                }
            }
        }
    }
}

/// Calls `f` with the offsets of the lanes whose shared addresses are in the same block's memory, for each block in turn: see
/// [`super::cluster`] for the field that names it.
fn each_block(addresses: &[u64; LANES], mask: u32, mut f: impl FnMut(usize, &[u64; LANES], u32)) {
    if addresses.iter().fold(0, |all, a| all | a) >> OFFSET_BITS == 0 {
        return f(0, addresses, mask);
    }
    let field = |i: usize| (addresses[i] >> OFFSET_BITS & 0xff) as usize;
    let offsets = addresses.map(|a| a & ((1 << OFFSET_BITS) - 1));
    let mut rest = mask;
    while rest != 0 {
        let first = field(rest.trailing_zeros() as usize);
        let mine = active(rest).filter(|&i| field(i) == first).fold(0, |m, i| m | 1 << i);
        rest &= !mine;
        f(first, &offsets, mine);
    }
}
