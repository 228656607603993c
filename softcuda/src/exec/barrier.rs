//! Block-wide barriers (PTX ISA 9.7.13.1): `bar` and `barrier`, with arrivals counted per thread as on sm_70 and later.

use super::fault::FaultKind;
use super::lanes::{File, active};
use super::observe::SyncEvent;
use super::state::{Barrier, Cluster, Group, GroupState, Machine, Outcome, Raw, Shared, Worker};
use crate::lower::ir::{self, BarrierKind, Extra};
use crate::lower::isa::Width;

impl Machine<'_, '_> {
    /// Arrives at a barrier, `true` if the running group simply goes on.
    pub fn barrier(&mut self, file: File, x: &ir::Barrier, pc: u32, mask: u32) -> Outcome<bool> {
        let illegal = |message: String| Err(Raw::new(FaultKind::IllegalInstruction, mask, message));
        let mask = if x.aligned {
            if !self.converged(pc, mask)? {
                return Ok(false);
            }
            self.warp.live()
        } else {
            mask
        };
        let uniform = |slot: u32| {
            // SAFETY: the slot is a 32-bit one of this kernel.
            let values = unsafe { file.lanes32(slot) };
            let first = values[mask.trailing_zeros() as usize];
            active(mask).all(|i| values[i] == first).then_some(first)
        };
        let id = match uniform(x.id.slot) {
            Some(id @ 0..=15) => id as usize,
            Some(id) => return illegal(format!("barrier {id}: there are 16")),
            None => return illegal("lanes of one warp name different barriers".into()),
        };
        let expected = match x.count.map(|c| uniform(c.slot)) {
            None => None,
            Some(Some(n)) if n > 0 && n % 32 == 0 => Some(n),
            Some(Some(n)) => return illegal(format!("a barrier for {n} threads: not a multiple of 32")),
            Some(None) => return illegal("lanes of one warp expect different thread counts".into()),
        };
        let b = &mut self.shared.barriers[id];
        if !b.in_use {
            *b = Barrier { expected, in_use: true, and: true, ..Barrier::default() };
        } else if b.expected != expected {
            let name = |e: Option<u32>| e.map_or("all".to_string(), |n| n.to_string());
            let message = format!("barrier {id} expects {} threads, not {}", name(b.expected), name(expected));
            return illegal(message);
        }
        b.arrived += if x.aligned { 32 } else { mask.count_ones() };
        b.lanes += mask.count_ones();
        if let Some((p, negated)) = x.p {
            // SAFETY: the slot is a predicate of this kernel.
            let votes = unsafe { file.predicate(p.slot) } ^ u32::from(negated).wrapping_neg();
            b.sum += (votes & mask).count_ones();
            b.and &= votes & mask == mask;
            b.or |= votes & mask != 0;
        }
        if let Some(n) = b.expected
            && b.arrived > n
        {
            let arrived = b.arrived;
            return illegal(format!("{arrived} threads arrive at barrier {id}, which expects {n}"));
        }
        self.observe_sync(SyncEvent::BarrierArrive { id: id as u32, mask }, pc);
        if x.kind == BarrierKind::Arrive {
            // Merged lanes may have come with the running group.
            self.step();
            return Ok(false);
        }
        let current = self.warp.current;
        let lanes = self.warp.groups[current].mask;
        if lanes != mask {
            self.warp.groups.push(Group { pc: pc + 1, mask: lanes & !mask, state: GroupState::Ready });
            self.warp.groups[current].mask = mask;
        }
        self.wait(GroupState::AtBarrier(id as u8));
        Ok(false)
    }
}

impl Shared {
    /// How far a barrier is.
    pub fn describe_barrier(&self, id: u8) -> String {
        let b = &self.barriers[usize::from(id)];
        let (arrived, expected) = match b.expected {
            Some(n) => (b.arrived, n),
            None => (b.lanes, self.threads - self.exited_threads),
        };
        format!(" (barrier {id}: {arrived} of {expected} threads have arrived)")
    }
}

impl Cluster {
    /// Opens the barriers of a block at which all expected threads have arrived; `true` if any warp can go on.
    pub fn release_block(&mut self, worker: &mut Worker, rank: usize) -> bool {
        let mut any = super::wgmma::release(&self.blocks[rank], &mut self.warps[rank]);
        for id in 0..16 {
            let shared = &mut self.blocks[rank];
            let b = shared.barriers[id];
            let complete = match b.expected {
                Some(n) => b.arrived >= n,
                None => b.lanes + shared.exited_threads >= shared.threads,
            };
            if !b.in_use || !complete {
                continue;
            }
            shared.barriers[id] = Barrier::default();
            for i in 0..self.warps[rank].len() {
                let warp = &mut self.warps[rank][i];
                let mut left = 0;
                let file = File {
                    bases: [warp.file.as_mut_ptr(), worker.constants],
                    predicates: warp.predicates.as_mut_ptr(),
                };
                for g in warp.groups.iter_mut().filter(|g| g.state == GroupState::AtBarrier(id as u8)) {
                    let op = &worker.body.ops[g.pc as usize];
                    if let Extra::Barrier(x) = &worker.body.extras[op.a as usize]
                        && let Some(d) = x.d
                    {
                        deliver(file, x.kind, d, g.mask, &b);
                    }
                    g.pc += 1;
                    g.state = GroupState::Ready;
                    any = true;
                    left |= g.mask;
                }
                if left != 0 && worker.watched {
                    let mut m = self.machine(worker, rank, i);
                    m.observe_sync(SyncEvent::BarrierLeave { id: id as u32, mask: left }, 0);
                }
            }
            if worker.watched {
                self.machine(worker, rank, 0).observe_sync(SyncEvent::BarrierComplete { id: id as u32 }, 0);
            }
        }
        any
    }
}

/// Writes a reduction's result.
fn deliver(file: File, kind: BarrierKind, d: ir::Reg, mask: u32, b: &Barrier) {
    let yes = match kind {
        BarrierKind::RedAnd => b.and,
        _ => b.or,
    };
    // SAFETY: the slot is the kernel's, of this width.
    unsafe {
        match d.width {
            Width::Pred => file.set_predicate(d.slot, mask, u32::from(yes).wrapping_neg()),
            _ => file.store32(d.slot, mask, &[b.sum; 32]),
        }
    }
}
