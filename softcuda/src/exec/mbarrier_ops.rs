//! The instructions on mbarrier objects, lane by lane (PTX ISA 9.7.13.15). A wait for a phase that is not complete suspends
//! (`try_wait`) or ends the slice (`test_wait`), so that whoever completes the phase can run.

use super::SHARED_WINDOW;
use super::access::{addresses, get, put, space_of};
use super::engine::{Pending, Work};
use super::fault::FaultKind;
use super::interpreter::{Next, Stop};
use super::lanes::{File, LANES, active};
use super::mbarrier::{Misuse, Object, check_place};
use super::observe::{ObjectPlace, SyncEvent};
use super::state::{GroupState, Machine, Outcome, Raw, mix};
use crate::lower::ir_mbarrier::{Mbarrier, MbarrierKind};
use crate::ptx::ast::Space;

/// An object of the cluster: rank of its block and offset.
pub type Place = (u32, u32);

pub fn misuse(lane: usize, text: Misuse) -> Box<Raw> {
    Raw::new(FaultKind::IllegalInstruction, 1 << lane, text)
}

impl Machine<'_, '_> {
    /// The object that an address names, which need not be valid.
    pub fn mbarrier_place(&mut self, space: Option<Space>, address: u64, lane: usize) -> Outcome<Place> {
        let (space, in_space) = match space {
            Some(space) => (space, address),
            None if space_of(address) == Space::Shared => (Space::SharedCluster, address - SHARED_WINDOW),
            None => {
                let message = format!("an mbarrier object at {address:#x}, which is not in shared memory");
                return Err(Raw::new(FaultKind::InvalidAddressSpace, 1 << lane, message));
            }
        };
        let (rank, offset) = self.locate(space, in_space, lane)?;
        let (_, size) = self.shared_of(rank, address, lane)?;
        Ok((rank, check_place(offset, size, lane)?))
    }

    pub fn object_place(&mut self, (rank, offset): Place) -> ObjectPlace {
        ObjectPlace { owner: self.block_of(rank).linear, offset }
    }

    pub fn mbarrier_op(&mut self, file: File, x: &Mbarrier, pc: u32, mask: u32) -> Outcome<Next> {
        if let MbarrierKind::Wait { suspends, parity } = x.kind {
            return self.mbarrier_wait(file, x, suspends, parity, pc, mask);
        }
        let at = addresses(file, &x.address);
        let a = x.a.map_or([1; LANES], |a| get(file, a));
        let mut states = [0; LANES];
        for lane in active(mask) {
            let place = self.mbarrier_place(x.space, at[lane], lane)?;
            let remote = place.0 != self.shared.rank;
            let may_be_remote = matches!(
                x.kind,
                MbarrierKind::Arrive { no_complete: false, .. } | MbarrierKind::ExpectTx | MbarrierKind::CompleteTx
            ) && x.d.is_none();
            if remote && !may_be_remote {
                let message = format!("the mbarrier object at {:#x} is in a peer's shared memory", at[lane]);
                return Err(Raw::new(FaultKind::InvalidAddressSpace, 1 << lane, message));
            }
            states[lane] = self.mbarrier_lane(x, place, a[lane] as u32, lane, pc)?;
        }
        if let MbarrierKind::CopyArrive { .. } = x.kind {
            self.track_copies(&at, x.space, mask, pc)?;
        }
        if let Some(d) = x.d {
            put(file, d, mask, &states);
        }
        Ok(Next::Step)
    }

    /// One lane's operation; what it returns.
    fn mbarrier_lane(&mut self, x: &Mbarrier, place: Place, a: u32, lane: usize, pc: u32) -> Outcome<u64> {
        let (rank, offset) = place;
        let at = self.object_place(place);
        let wrong = |text| misuse(lane, text);
        let block = self.block_of(rank);
        match x.kind {
            MbarrierKind::Init => {
                block.mbarrier_init(offset, a).map_err(wrong)?;
                self.observe_sync(SyncEvent::MbarrierInit { at, lane: lane as u32, count: a }, pc);
            }
            MbarrierKind::Inval => {
                block.mbarrier_inval(offset).map_err(wrong)?;
                self.observe_sync(SyncEvent::MbarrierInval { at, lane: lane as u32 }, pc);
            }
            MbarrierKind::Arrive { drop, no_complete, expect } => {
                if expect {
                    block.mbarrier_transact(offset, a.into()).map_err(wrong)?;
                }
                let count = if expect { 1 } else { a };
                let (before, done) = block.mbarrier_arrive(offset, count, drop).map_err(wrong)?;
                if done && no_complete {
                    let text = format!("an arrival with `.noComplete` completes the phase: {}", before.describe());
                    return Err(wrong(text));
                }
                if expect {
                    let bytes = a.into();
                    self.observe_sync(
                        SyncEvent::MbarrierExpect { at, lane: lane as u32, phase: before.phase, bytes },
                        pc,
                    );
                }
                let (phase, order, scope) = (before.phase, x.order, x.scope);
                self.observe_sync(SyncEvent::MbarrierArrive { at, lane: lane as u32, phase, count, order, scope }, pc);
                self.observe_phase(at, before, done, pc);
                return Ok(before.token());
            }
            MbarrierKind::ExpectTx => {
                let (before, done) = block.mbarrier_transact(offset, a.into()).map_err(wrong)?;
                let bytes = a.into();
                self.observe_sync(SyncEvent::MbarrierExpect { at, lane: lane as u32, phase: before.phase, bytes }, pc);
                self.observe_phase(at, before, done, pc);
            }
            MbarrierKind::CompleteTx => {
                let (before, done) = block.mbarrier_transact(offset, -i64::from(a)).map_err(wrong)?;
                self.observe_phase(at, before, done, pc);
            }
            MbarrierKind::CopyArrive { increment } => {
                if increment {
                    block.mbarrier_increment(offset).map_err(wrong)?;
                } else {
                    block.mbarrier(offset).map_err(wrong)?;
                }
            }
            MbarrierKind::Wait { .. } => {}
        }
        Ok(0)
    }

    pub fn observe_phase(&mut self, at: ObjectPlace, before: Object, done: bool, pc: u32) {
        if done {
            self.observe_sync(SyncEvent::MbarrierPhase { at, phase: before.phase }, pc);
        }
    }

    /// Arrivals that will come when the lanes' `cp.async` so far have landed.
    fn track_copies(&mut self, at: &[u64; LANES], space: Option<Space>, mask: u32, pc: u32) -> Outcome<()> {
        let before = self.warp.copies.issued();
        let mut rest = mask;
        while rest != 0 {
            let first = rest.trailing_zeros() as usize;
            let lanes = active(rest).filter(|&i| at[i] == at[first]).fold(0, |m, i| m | 1 << i);
            rest &= !lanes;
            let place = self.mbarrier_place(space, at[first], first)?;
            let id = self.cluster.engine.next_id();
            let at = self.object_place(place);
            self.observe_sync(SyncEvent::CopyArrive { id, at, mask: lanes }, pc);
            let work = Work::CopyArrive { before, place };
            let (rank, warp) = (self.shared.rank, self.warp.index);
            self.cluster.engine.push(Pending { id, rank, warp, lanes, pc, work });
        }
        Ok(())
    }

    fn mbarrier_wait(
        &mut self,
        file: File,
        x: &Mbarrier,
        suspends: bool,
        parity: bool,
        pc: u32,
        mask: u32,
    ) -> Outcome<Next> {
        let at = addresses(file, &x.address);
        let (Some(a), Some(d)) = (x.a, x.d) else { unreachable!("a wait has a phase and a result") };
        let phases = get(file, a);
        let mut done = 0;
        for lane in active(mask) {
            let place = self.mbarrier_place(x.space, at[lane], lane)?;
            if place.0 != self.shared.rank {
                let message = format!("a wait for the mbarrier object at {:#x}, in a peer's shared memory", at[lane]);
                return Err(Raw::new(FaultKind::InvalidAddressSpace, 1 << lane, message));
            }
            let object = self.shared.mbarrier(place.1).map_err(|text| misuse(lane, text))?;
            let phase = waited_phase(&object, phases[lane], parity).map_err(|text| misuse(lane, text))?;
            if phase == object.phase {
                self.cluster.engine.want(place);
                continue;
            }
            done |= 1 << lane;
            let (at, order, scope) = (self.object_place(place), x.order, x.scope);
            self.observe_sync(SyncEvent::MbarrierWait { at, lane: lane as u32, phase, order, scope }, pc);
        }
        if done == 0 && suspends && self.warp.poll_expired & mask == 0 && !self.reaches_time_limit() {
            let skipping = self.warp.groups[self.warp.current].mask & !mask;
            if skipping != 0 {
                self.split(skipping, pc + 1);
            }
            self.wait(GroupState::AtMbarrier);
            return Ok(Next::Reload);
        }
        self.warp.poll_expired &= !mask;
        // SAFETY: the slot is a predicate of this kernel.
        unsafe { file.set_predicate(d.slot, mask, done) };
        if done != 0 {
            return Ok(Next::Step);
        }
        self.warp.poll = pc;
        self.step();
        self.warp.rotate = self.warp.groups.len() > 1;
        Ok(Next::Stop(Stop::Polled))
    }

    /// Whether a wait that is not over ends without success at once: the manual leaves the time limit to the system. One in eight does,
    /// by the seed; with seed 0 none.
    fn reaches_time_limit(&mut self) -> bool {
        let random = &mut self.cluster.waits;
        if *random == 0 || self.cluster.engine.is_futile() {
            return false;
        }
        *random = mix(*random);
        random.is_multiple_of(8)
    }

    /// What the running group's wait is for, where it is one.
    pub fn describe_wait(&mut self, file: File, x: &Mbarrier, mask: u32) -> Option<String> {
        let lane = active(mask).next()?;
        let place = self.mbarrier_place(x.space, addresses(file, &x.address)[lane], lane).ok()?;
        let object = self.block_of(place.0).mbarrier(place.1).ok()?;
        let flying = self.cluster.engine.count_for(place);
        let copies = if flying == 0 { "no copies" } else { "copies" };
        Some(format!(" ({}, {copies} in flight for it)", object.describe()))
    }
}

/// The phase that a wait asks for: the object's current one, which is not complete, or the one before, which is.
fn waited_phase(object: &Object, asked: u64, parity: bool) -> Result<u64, Misuse> {
    if parity {
        return match asked {
            0 | 1 => Ok(if object.phase & 1 == asked { object.phase } else { object.phase.wrapping_sub(1) }),
            _ => Err(format!("a wait for phase parity {asked}; it is 0 or 1")),
        };
    }
    let phase = asked >> 20;
    if phase == object.phase || phase + 1 == object.phase {
        return Ok(phase);
    }
    Err(format!("a wait for phase {phase}, which is neither the current nor the one before: {}", object.describe()))
}
