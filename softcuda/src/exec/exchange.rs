//! What lanes of a warp do together: `shfl`, `vote`, `match`, `redux`, `elect`, `bar.warp.sync` (PTX ISA 9.7.9.6, 9.7.13).

use super::fault::FaultKind;
use super::lanes::{File, LANES, active};
use super::observe::SyncEvent;
use super::state::{Group, GroupState, Machine, Outcome, Raw};
use crate::lower::ir::{AtomOp, Exchange, ExchangeKind, Extra, ShflMode, VoteMode};
use crate::lower::isa::Width;
use crate::ptx::ast::Type;

impl Machine<'_, '_> {
    /// Runs an exchange if all the lanes it names have come, `true` if the running group simply goes on.
    pub fn exchange(&mut self, file: File, x: &Exchange, pc: u32, mask: u32) -> Outcome<bool> {
        // SAFETY: the slot is a 32-bit one of this kernel.
        let members = unsafe { file.lanes32(x.members.slot) };
        let first = members[mask.trailing_zeros() as usize];
        let live = self.warp.live();
        if first & live == mask && active(mask).all(|i| members[i] == first) {
            perform(file, x, mask);
            self.met(x.kind, mask, pc);
            return Ok(true);
        }
        self.gather(file, x, pc, mask, &members)?;
        Ok(false)
    }

    /// Lanes are apart: those whose partners have all come go on, the others wait.
    fn gather(&mut self, file: File, x: &Exchange, pc: u32, mask: u32, members: &[u32; LANES]) -> Outcome<()> {
        let skipping = self.warp.groups[self.warp.current].mask & !mask;
        if skipping != 0 {
            self.warp.groups.push(Group { pc: pc + 1, mask: skipping, state: GroupState::Ready });
            let current = self.warp.current;
            self.warp.groups[current].mask = mask;
        }
        let arrived = self.absorb(pc);
        let live = self.warp.live();
        let (mut rest, mut done) = (arrived, 0);
        while rest != 0 {
            let value = members[rest.trailing_zeros() as usize];
            let set = active(rest).filter(|&i| members[i] == value).fold(0, |m, i| m | 1 << i);
            let strangers = set & !value;
            if strangers != 0 {
                let lane = strangers.trailing_zeros();
                let message = format!("lane {lane} is not in its own member mask {value:#010x}");
                return Err(Raw::new(FaultKind::IllegalInstruction, strangers, message));
            }
            rest &= !set;
            if set == value & live {
                perform(file, x, set);
                self.met(x.kind, set, pc);
                done |= set;
            } else if x.kind == ExchangeKind::Barrier && self.meet_elsewhere(file, pc, set, value & live, value) {
                self.met(x.kind, value & live, pc);
                done |= set;
            }
        }
        let current = self.warp.current;
        if done == arrived {
            self.warp.groups[current].pc = pc + 1;
        } else {
            self.warp.groups[current].mask = arrived & !done;
            self.wait(GroupState::AtSync);
            if done != 0 {
                self.warp.groups.push(Group { pc: pc + 1, mask: done, state: GroupState::Ready });
            }
        }
        Ok(())
    }

    fn met(&mut self, kind: ExchangeKind, mask: u32, pc: u32) {
        let event = match kind {
            ExchangeKind::Barrier => SyncEvent::WarpBarrier { mask },
            _ => SyncEvent::Exchange { mask },
        };
        self.observe_sync(event, pc);
    }

    /// `bar.warp.sync` may be met at another one with the same mask, as in the two branches of an `if`.
    fn meet_elsewhere(&mut self, file: File, pc: u32, set: u32, needed: u32, value: u32) -> bool {
        let body = self.worker.body;
        let same = |g: &Group| {
            let op = &body.ops[g.pc as usize];
            let Some(Extra::Exchange(other)) = body.extras.get(op.a as usize) else { return false };
            // SAFETY: the slot is a 32-bit one of this kernel.
            let members = unsafe { file.lanes32(other.members.slot) };
            g.pc != pc
                && g.state == GroupState::AtSync
                && op.code == crate::lower::isa::Code::Exchange
                && other.kind == ExchangeKind::Barrier
                && active(g.mask).all(|i| members[i] == value)
        };
        let there = self.warp.groups.iter().filter(|g| same(g)).fold(set, |m, g| m | g.mask);
        if there != needed {
            return false;
        }
        for g in self.warp.groups.iter_mut().filter(|g| same(g)) {
            g.state = GroupState::Ready;
            g.pc += 1;
        }
        true
    }
}

/// The exchange itself, among the lanes of `mask`.
fn perform(file: File, x: &Exchange, mask: u32) {
    // SAFETY: slots are those of this kernel, of the widths that the lowering checked.
    unsafe {
        let d32 = |values: &[u32; LANES]| {
            if let Some(d) = x.d {
                file.store32(d.slot, mask, values);
            }
        };
        let set = |bits: u32| {
            if let Some(p) = x.p {
                file.set_predicate(p.slot, mask, bits);
            }
        };
        match x.kind {
            ExchangeKind::Barrier => {}
            ExchangeKind::Elect => {
                let leader = mask.trailing_zeros();
                d32(&[leader; LANES]);
                set(1 << leader);
            }
            ExchangeKind::Vote(mode, negated) => {
                let Some(a) = x.a else { return };
                let votes = (file.predicate(a.slot) ^ u32::from(negated).wrapping_neg()) & mask;
                let all = |yes: bool| u32::from(yes).wrapping_neg();
                match mode {
                    VoteMode::Ballot => d32(&[votes; LANES]),
                    VoteMode::All => set(all(votes == mask)),
                    VoteMode::Any => set(all(votes != 0)),
                    VoteMode::Uni => set(all(votes == mask || votes == 0)),
                }
            }
            ExchangeKind::Redux(op, ty) => {
                let Some(a) = x.a else { return };
                let values = file.lanes32(a.slot);
                let reduced = active(mask).map(|i| values[i]).reduce(|a, b| combine(op, ty, a, b));
                d32(&[reduced.unwrap_or(0); LANES]);
            }
            ExchangeKind::MatchAny | ExchangeKind::MatchAll => {
                let Some(a) = x.a else { return };
                let values: [u64; LANES] =
                    if a.width == Width::W64 { file.lanes64(a.slot) } else { file.lanes32(a.slot).map(u64::from) };
                let mut found = [0; LANES];
                for i in active(mask) {
                    found[i] = active(mask).filter(|&j| values[j] == values[i]).fold(0, |m, j| m | 1 << j);
                }
                if x.kind == ExchangeKind::MatchAny {
                    d32(&found);
                } else {
                    let equal = found[mask.trailing_zeros() as usize] == mask;
                    d32(&[if equal { mask } else { 0 }; LANES]);
                    set(u32::from(equal).wrapping_neg());
                }
            }
            ExchangeKind::Shfl(mode) => {
                let (Some(a), Some(b), Some(c)) = (x.a, x.b, x.c) else { return };
                let (a, b, c) = (file.lanes32(a.slot), file.lanes32(b.slot), file.lanes32(c.slot));
                let mut values = [0; LANES];
                let mut valid = 0;
                for lane in 0..LANES {
                    let (from, inside) = source_lane(mode, lane as u32, b[lane], c[lane]);
                    values[lane] = a[from as usize];
                    valid |= u32::from(inside) << lane;
                }
                d32(&values);
                set(valid);
            }
        }
    }
}

/// The lane that `shfl` reads from, and whether it is in range (PTX ISA 9.7.9.6).
fn source_lane(mode: ShflMode, lane: u32, b: u32, c: u32) -> (u32, bool) {
    let (offset, clamp, segment) = (b & 31, c & 31, c >> 8 & 31);
    let max = lane & segment | clamp & !segment;
    let min = lane & segment;
    let (from, inside) = match mode {
        ShflMode::Up => {
            let j = lane as i32 - offset as i32;
            (j as u32, j >= max as i32)
        }
        ShflMode::Down => (lane + offset, lane + offset <= max),
        ShflMode::Bfly => (lane ^ offset, lane ^ offset <= max),
        ShflMode::Idx => {
            let j = min | offset & !segment;
            (j, j <= max)
        }
    };
    (if inside { from & 31 } else { lane }, inside)
}

fn combine(op: AtomOp, ty: Type, a: u32, b: u32) -> u32 {
    let signed = ty == Type::S32;
    match op {
        AtomOp::Add => a.wrapping_add(b),
        AtomOp::Min if signed => (a as i32).min(b as i32) as u32,
        AtomOp::Max if signed => (a as i32).max(b as i32) as u32,
        AtomOp::Min => a.min(b),
        AtomOp::Max => a.max(b),
        AtomOp::And => a & b,
        AtomOp::Or => a | b,
        _ => a ^ b,
    }
}
