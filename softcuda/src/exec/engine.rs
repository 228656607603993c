//! What runs beside the threads of a cluster: copies and arrivals that have been issued and have not happened yet.
//!
//! With seed 0 they happen as late as the program allows: when every thread waits, or polls, and nothing else can go on. Other
//! seeds let each happen at a time of its own before that. The order among them is free.

use super::bulk::Transfer;
use super::fault::Fault;
use super::mbarrier_ops::{Place, misuse};
use super::observe::SyncEvent;
use super::state::{Cluster, GroupState, Outcome, Worker, mix};

/// Rounds in which somebody waits and others spin, after which a copy lands: they may spin for what depends on it.
const STARVED: u32 = 64;
/// Rounds in which waits are given up in vain, after which the cluster will not go on any more: loops that count their polls
/// end before.
const FUTILE: u32 = 1024;

/// An operation in flight.
#[derive(Debug)]
pub struct Pending {
    pub id: u64,
    /// Who issued it, and where.
    pub rank: u32,
    pub warp: u32,
    pub lanes: u32,
    pub pc: u32,
    pub work: Work,
}

#[derive(Debug)]
pub enum Work {
    /// Arrivals of the lanes once their `cp.async` issued before this one have landed.
    CopyArrive {
        before: u64,
        place: Place,
    },
    Transfer(Box<Transfer>),
}

impl Pending {
    /// Happens on behalf of the object.
    fn serves(&self, place: Place) -> bool {
        match &self.work {
            Work::CopyArrive { place: own, .. } => *own == place,
            Work::Transfer(t) => t.signals.iter().any(|s| s.place == place),
        }
    }
}

/// A cluster's operations in flight.
#[derive(Debug, Default)]
pub struct Engine {
    pending: Vec<Pending>,
    issued: u64,
    /// Objects that somebody waits for, the first that was asked for first.
    wanted: Vec<Place>,
    idle: u32,
    starved: u32,
    futile: u32,
}

impl Engine {
    pub fn next_id(&mut self) -> u64 {
        self.issued += 1;
        self.issued
    }

    pub fn push(&mut self, pending: Pending) {
        self.pending.push(pending);
    }

    pub fn want(&mut self, place: Place) {
        if !self.wanted.contains(&place) {
            self.wanted.push(place);
        }
    }

    pub fn count_for(&self, place: Place) -> usize {
        self.pending.iter().filter(|p| p.serves(place)).count()
    }

    /// Waits have been given up, and nothing has come of it so far.
    pub fn is_futile(&self) -> bool {
        self.futile > 0
    }

    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// The transfers in flight of one lane's bulk groups.
    pub fn of_lane(&mut self, rank: u32, warp: u32, lane: usize) -> impl Iterator<Item = (usize, u64, &mut Transfer)> {
        self.pending.iter_mut().enumerate().filter_map(move |(i, p)| match &mut p.work {
            Work::Transfer(t) if p.rank == rank && p.warp == warp && p.lanes == 1 << lane => Some((i, p.id, &mut **t)),
            _ => None,
        })
    }

    pub fn take(&mut self, index: usize) -> Pending {
        self.pending.remove(index)
    }

    /// A block has exited: nothing lands in its memory any more. Returns what would have.
    pub fn abandon(&mut self, rank: u32) -> Vec<u64> {
        let mut gone = Vec::new();
        self.pending.retain_mut(|p| {
            let Work::Transfer(t) = &mut p.work else { return p.rank != rank };
            if t.abandon(rank) {
                gone.push(p.id);
            }
            !t.is_void()
        });
        gone
    }
}

impl Cluster {
    /// Lanes that wait for phases look again.
    fn wake_waiters(&mut self, rank: usize) -> bool {
        let mut any = false;
        for warp in &mut self.warps[rank] {
            for g in warp.groups.iter_mut().filter(|g| g.state == GroupState::AtMbarrier) {
                g.state = GroupState::Ready;
                any = true;
            }
        }
        any
    }

    /// Where phases have completed, those who wait for them look again; `true` if a phase has.
    pub fn wake(&mut self) -> bool {
        let mut any = false;
        for rank in 0..self.blocks.len() {
            if std::mem::take(&mut self.blocks[rank].phase_completed) {
                self.wake_waiters(rank);
                any = true;
            }
        }
        any
    }

    /// Before a block's turn: lets operations happen that the seed picks.
    pub fn land_early(&mut self, worker: &mut Worker, random: u64) -> Result<(), Fault> {
        if self.state.engine.pending.is_empty() || worker.config.seed == 0 {
            return Ok(());
        }
        let mut random = mix(random);
        for i in (0..self.state.engine.pending.len()).rev() {
            random = mix(random);
            if random.is_multiple_of(8) {
                self.land(worker, i)?;
            }
        }
        self.wake();
        Ok(())
    }

    /// After a round in which threads went on, or in which none did: `busy` says that some used up their slice. Returns
    /// whether anybody can go on now.
    pub fn engine_round(&mut self, worker: &mut Worker, progress: bool, busy: bool) -> Result<bool, Fault> {
        if progress || busy {
            self.state.engine.idle = 0;
            self.state.engine.futile = 0;
            let engine = &mut self.state.engine;
            if progress || engine.wanted.is_empty() || engine.pending.is_empty() {
                engine.starved = 0;
                return Ok(true);
            }
            engine.starved += 1;
            if engine.starved > STARVED {
                self.land_late(worker)?;
            }
            return Ok(true);
        }
        // A warp whose lanes are apart polls with one group after another.
        let apart = self.warps.iter().flatten().any(|w| w.polled && w.groups.len() > 1);
        let engine = &mut self.state.engine;
        engine.idle += 1;
        if apart && engine.idle <= 33 {
            return Ok(true);
        }
        engine.idle = 0;
        if self.land_late(worker)? {
            return Ok(true);
        }
        // Nothing is in flight: waits end without success, as after their time limit.
        let engine = &mut self.state.engine;
        engine.futile += 1;
        if engine.futile > FUTILE {
            return Ok(false);
        }
        engine.wanted.clear();
        let mut any = false;
        for warp in self.warps.iter_mut().flatten() {
            any |= warp.polled;
            for g in warp.groups.iter_mut().filter(|g| g.state == GroupState::AtMbarrier) {
                g.state = GroupState::Ready;
                warp.poll_expired |= g.mask;
                any = true;
            }
        }
        Ok(any)
    }

    /// Lets happen what somebody waits for; `false` if nothing is in flight.
    fn land_late(&mut self, worker: &mut Worker) -> Result<bool, Fault> {
        let engine = &mut self.state.engine;
        engine.starved = 0;
        let Some(last) = engine.pending.len().checked_sub(1) else { return Ok(false) };
        let wanted = std::mem::take(&mut engine.wanted);
        let served = |engine: &Engine| wanted.iter().find(|w| engine.count_for(**w) != 0).copied();
        if worker.config.seed == 0 {
            // All of one object, the newest first.
            match served(engine) {
                Some(place) => {
                    for i in (0..=last).rev() {
                        if self.state.engine.pending.get(i).is_some_and(|p| p.serves(place)) {
                            self.land(worker, i)?;
                        }
                    }
                }
                None => self.land(worker, last)?,
            }
        } else {
            let mine: Vec<usize> =
                (0..=last).filter(|&i| wanted.iter().any(|w| engine.pending[i].serves(*w))).collect();
            let random = mix(self.state.seed ^ engine.issued);
            let i = if mine.is_empty() { random as usize % (last + 1) } else { mine[random as usize % mine.len()] };
            self.land(worker, i)?;
        }
        self.wake();
        for rank in 0..self.blocks.len() {
            self.wake_waiters(rank);
        }
        Ok(true)
    }

    /// One operation happens.
    fn land(&mut self, worker: &mut Worker, index: usize) -> Result<(), Fault> {
        let pending = self.state.engine.take(index);
        let (rank, warp, pc) = (pending.rank as usize, pending.warp as usize, pending.pc);
        let mut machine = self.machine(worker, rank, warp);
        machine.land(pending).map_err(|raw| machine.fault(*raw, pc))
    }

    /// After the last thread: what was issued and goes to global memory still happens.
    pub fn finish(&mut self, worker: &mut Worker) -> Result<(), Fault> {
        while let Some(last) = self.state.engine.pending.len().checked_sub(1) {
            self.land(worker, last)?;
        }
        Ok(())
    }
}

impl super::state::Machine<'_, '_> {
    /// An operation that this warp issued happens.
    pub fn land(&mut self, pending: Pending) -> Outcome<()> {
        let Pending { id, lanes, pc, work, .. } = pending;
        match work {
            Work::CopyArrive { before, place } => {
                super::copies::land_issued_before(self, before, lanes);
                let at = self.object_place(place);
                self.observe_sync(SyncEvent::BulkLand { id, lane: lanes.trailing_zeros() }, pc);
                for lane in super::lanes::active(lanes) {
                    let (object, done) =
                        self.block_of(place.0).mbarrier_arrive(place.1, 1, false).map_err(|text| misuse(lane, text))?;
                    self.observe_phase(at, object, done, pc);
                }
                Ok(())
            }
            Work::Transfer(transfer) => self.land_transfer(id, *transfer, lanes.trailing_zeros() as usize, pc),
        }
    }
}
