//! Which lanes of a warp run next, and how they meet.
//!
//! Lanes are scheduled independently (as on sm_70 and later): those at the same operation form a group. The group at the
//! lowest operation runs, so that the others are caught up with; a warp whose lanes spin on one another gives every group a
//! slice of its own in turn. Instructions with `.sync` wait for the lanes that they name.

use super::fault::FaultKind;
use super::lanes::{FULL, active};
use super::state::{Group, GroupState, Machine, Outcome, Raw, Warp};

impl Warp {
    fn is_ready(&self, i: usize) -> bool {
        self.groups[i].state == GroupState::Ready
    }

    /// Joins ready groups that stand at the same operation.
    fn merge(&mut self) {
        let mut i = 0;
        while i < self.groups.len() {
            let mut j = i + 1;
            while j < self.groups.len() {
                if self.is_ready(i) && self.is_ready(j) && self.groups[i].pc == self.groups[j].pc {
                    self.groups[i].mask |= self.groups[j].mask;
                    self.remove(j, i);
                } else {
                    j += 1;
                }
            }
            i += 1;
        }
    }

    /// Removes group `i`, whose lanes went to group `into`.
    fn remove(&mut self, i: usize, into: usize) {
        let last = self.groups.len() - 1;
        self.groups.swap_remove(i);
        if self.current == i {
            self.current = into;
        } else if self.current == last {
            self.current = i;
        }
    }

    fn lowest(&self) -> Option<usize> {
        (0..self.groups.len()).filter(|&i| self.is_ready(i)).min_by_key(|&i| self.groups[i].pc)
    }

    /// Lanes at a `.sync` instruction look again whether all they wait for have come.
    fn wake(&mut self) {
        for g in self.groups.iter_mut().filter(|g| g.state == GroupState::AtSync) {
            g.state = GroupState::Ready;
        }
    }
}

impl Machine<'_, '_> {
    /// Picks the group to start with; `false` if none is ready.
    pub fn begin_slice(&mut self) -> bool {
        let w = &mut *self.warp;
        w.merge();
        let ready: Vec<usize> =
            if w.groups.len() == 1 { Vec::new() } else { (0..w.groups.len()).filter(|&i| w.is_ready(i)).collect() };
        w.pinned = w.rotate && ready.len() > 1;
        w.rotate = false;
        if w.pinned {
            w.turn += 1;
            w.current = ready[w.turn % ready.len()];
            return true;
        }
        match w.lowest() {
            Some(i) => {
                w.current = i;
                true
            }
            None => false,
        }
    }

    /// Notes where the running group is.
    #[inline(always)]
    pub fn save(&mut self, pc: u32, mask: u32) {
        let current = self.warp.current;
        self.warp.groups[current] = Group { pc, mask, state: GroupState::Ready };
    }

    /// The running group goes on to the next operation.
    pub fn step(&mut self) {
        let current = self.warp.current;
        self.warp.groups[current].pc += 1;
    }

    /// At a place where groups may meet: merges them and picks the one to run. At least one is ready.
    #[inline(never)]
    pub fn choose(&mut self) {
        let w = &mut *self.warp;
        w.merge();
        if w.pinned && w.groups.len() > 1 {
            return;
        }
        w.current = w.lowest().unwrap_or(w.current);
    }

    /// After the running group may have stopped: picks another, or says why there is none.
    pub fn next_group(&mut self) -> Option<super::interpreter::Stop> {
        let w = &mut *self.warp;
        if w.groups.is_empty() {
            return Some(super::interpreter::Stop::Finished);
        }
        if w.pinned && w.current < w.groups.len() && w.is_ready(w.current) {
            return None;
        }
        match w.lowest() {
            Some(i) => {
                w.current = i;
                None
            }
            None => Some(super::interpreter::Stop::Blocked),
        }
    }

    /// Lanes end; the rest of the group goes on.
    pub fn exit(&mut self, mask: u32) {
        self.leave_cluster(mask);
        let w = &mut *self.warp;
        w.exited |= mask;
        self.shared.exited_threads += mask.count_ones();
        let current = w.current;
        w.groups[current].mask &= !mask;
        w.groups[current].pc += 1;
        if w.groups[current].mask == 0 {
            w.groups.swap_remove(current);
            w.current = 0;
        }
        w.wake();
        if self.shared.exited() && !self.cluster.engine.is_empty() {
            for id in self.cluster.engine.abandon(self.shared.rank) {
                self.observe_sync(super::observe::SyncEvent::BulkAbandon { id }, 0);
            }
        }
    }

    /// Some lanes of the running group go on at `pc`, in a group of their own.
    pub fn split(&mut self, lanes: u32, pc: u32) {
        let w = &mut *self.warp;
        w.groups[w.current].mask &= !lanes;
        w.groups.push(Group { pc, mask: lanes, state: GroupState::Ready });
    }

    pub fn indexed_branch(&mut self, index: [u32; 32], targets: &[u32], mask: u32, pc: u32) -> Outcome<()> {
        let w = &mut *self.warp;
        let current = w.current;
        let rest = w.groups[current].mask & !mask;
        w.groups.swap_remove(current);
        w.current = 0;
        if rest != 0 {
            w.groups.push(Group { pc: pc + 1, mask: rest, state: GroupState::Ready });
        }
        for lane in active(mask) {
            let Some(&target) = targets.get(index[lane] as usize) else {
                let message = format!("`brx.idx` with index {} of {} targets", index[lane], targets.len());
                return Err(Raw::new(FaultKind::InvalidPc, 1 << lane, message));
            };
            match w.groups.iter_mut().find(|g| g.pc == target && g.state == GroupState::Ready) {
                Some(g) => g.mask |= 1 << lane,
                None => w.groups.push(Group { pc: target, mask: 1 << lane, state: GroupState::Ready }),
            }
        }
        Ok(())
    }

    /// Joins the lanes that already wait at `pc` to the running group; returns all of its lanes.
    pub fn absorb(&mut self, pc: u32) -> u32 {
        let w = &mut *self.warp;
        while let Some(i) = (0..w.groups.len())
            .find(|&i| i != w.current && w.groups[i].pc == pc && w.groups[i].state == GroupState::AtSync)
        {
            let mask = w.groups[i].mask;
            let current = w.current;
            w.groups[current].mask |= mask;
            w.remove(i, current);
        }
        w.groups[w.current].mask
    }

    /// The running group waits at its operation.
    pub fn wait(&mut self, state: GroupState) {
        let current = self.warp.current;
        self.warp.groups[current].state = state;
    }

    /// For an `.aligned` instruction: whether all lanes that have not exited have come to it. If not, the group waits.
    pub fn converged(&mut self, pc: u32, mask: u32) -> Outcome<bool> {
        let lanes = self.warp.groups[self.warp.current].mask;
        if mask != lanes {
            let message = format!(
                "an `.aligned` instruction is executed by lanes {mask:#010x} and skipped by {:#010x} of the same warp",
                lanes & !mask
            );
            return Err(Raw::new(FaultKind::IllegalInstruction, mask, message));
        }
        let lanes = self.absorb(pc);
        if lanes == self.warp.live() {
            return Ok(true);
        }
        self.wait(GroupState::AtSync);
        Ok(false)
    }

    /// As [`Machine::converged`], for an instruction that needs all 32 lanes.
    pub fn whole_warp(&mut self, pc: u32, mask: u32) -> Outcome<bool> {
        let whole = self.converged(pc, mask)?;
        if whole && self.warp.live() != FULL {
            let message = format!("all 32 lanes must take part; only {:#010x} are there", self.warp.live());
            return Err(Raw::new(FaultKind::IllegalInstruction, mask, message));
        }
        Ok(whole)
    }
}
