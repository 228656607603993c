//! What lanes of a warp do together: `shfl`, `vote`, `match`, `redux`, `elect`, `bar.warp.sync` (PTX ISA 9.7.9.6, 9.7.13).

use super::fault::FaultKind;
use super::lanes::{File, LANES, active};
use super::observe::SyncEvent;
use super::state::{Group, GroupState, Machine, Outcome, Raw};
use crate::lower::ir::{AtomOp, Exchange, ExchangeKind, Extra, ShflMode, VoteMode};
use crate::lower::isa::{Code, Width};
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
            } else if self.meet_elsewhere(file, x, pc, set, value & live, value) {
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

    /// Lanes may meet at different instructions, as in the two branches of an `if`: the manual asks for the same operation
    /// with the same qualifiers and member mask, not for the same place (9.7.9.6 and 9.7.13: "until all non-exited threads
    /// corresponding to membermask have executed" it).
    fn meet_elsewhere(&mut self, file: File, x: &Exchange, pc: u32, set: u32, needed: u32, value: u32) -> bool {
        let body = self.worker.body;
        let exchange_at = |pc: u32| {
            let op = &body.ops[pc as usize];
            match body.extras.get(op.a as usize) {
                Some(Extra::Exchange(other)) if op.code == Code::Exchange => Some(other),
                _ => None,
            }
        };
        // Lanes of other groups that wait with this mask: one group may hold several masks.
        let mut parts = vec![(x, pc, set)];
        for g in self.warp.groups.iter().filter(|g| g.state == GroupState::AtSync && g.pc != pc) {
            let Some(other) = exchange_at(g.pc).filter(|o| alike(o.kind, x.kind)) else { continue };
            // SAFETY: the slot is a 32-bit one of this kernel.
            let members = unsafe { file.lanes32(other.members.slot) };
            let lanes = active(g.mask).filter(|&i| members[i] == value).fold(0, |m, i| m | 1 << i);
            if lanes != 0 {
                parts.push((other, g.pc, lanes));
            }
        }
        if parts.iter().fold(0, |m, p| m | p.2) != needed {
            return false;
        }
        let mut all = inputs(file, x);
        for &(other, _, lanes) in &parts[1..] {
            let theirs = inputs(file, other);
            all.votes = all.votes & !lanes | theirs.votes & lanes;
            for i in active(lanes) {
                (all.a[i], all.high[i], all.b[i], all.c[i]) = (theirs.a[i], theirs.high[i], theirs.b[i], theirs.c[i]);
            }
        }
        let (values, bits) = compute(x.kind, &all, needed);
        for &(other, _, lanes) in &parts {
            deliver(file, other, lanes, &values, bits);
        }
        // This group's own lanes go on as the caller says.
        for &(_, at, lanes) in &parts[1..] {
            let groups = &mut self.warp.groups;
            let waiting = |g: &Group| g.pc == at && g.state == GroupState::AtSync && g.mask & lanes != 0;
            if let Some(g) = groups.iter_mut().find(|g| waiting(g)) {
                g.mask &= !lanes;
                if g.mask == 0 {
                    *g = Group { pc: at + 1, mask: lanes, state: GroupState::Ready };
                } else {
                    groups.push(Group { pc: at + 1, mask: lanes, state: GroupState::Ready });
                }
            }
        }
        true
    }
}

/// What lanes bring to an exchange.
struct Inputs {
    /// Low and, for 64-bit sources, high words; for votes one bit a lane.
    a: [u32; LANES],
    high: [u32; LANES],
    votes: u32,
    b: [u32; LANES],
    c: [u32; LANES],
}

/// The operands of an instruction on all lanes.
#[inline(always)]
fn inputs(file: File, x: &Exchange) -> Inputs {
    let zero = [0; LANES];
    let mut all = Inputs { a: zero, high: zero, votes: 0, b: zero, c: zero };
    // SAFETY: slots are those of this kernel, of the widths that the lowering checked.
    unsafe {
        match (x.kind, x.a) {
            (ExchangeKind::Vote(_, negated), Some(a)) => {
                all.votes = file.predicate(a.slot) ^ u32::from(negated).wrapping_neg();
            }
            (_, Some(a)) if a.width == Width::W64 => {
                let wide = file.lanes64(a.slot);
                all.a = wide.map(|v| v as u32);
                all.high = wide.map(|v| (v >> 32) as u32);
            }
            (_, Some(a)) => all.a = file.lanes32(a.slot),
            _ => {}
        }
        if let Some(b) = x.b {
            all.b = file.lanes32(b.slot);
        }
        if let Some(c) = x.c {
            all.c = file.lanes32(c.slot);
        }
    }
    all
}

/// The exchange itself, among the lanes of `mask`: a word and a bit for each.
#[inline(always)]
fn compute(kind: ExchangeKind, x: &Inputs, mask: u32) -> ([u32; LANES], u32) {
    let all = |yes: bool| u32::from(yes).wrapping_neg();
    let votes = x.votes & mask;
    match kind {
        ExchangeKind::Barrier => ([0; LANES], 0),
        ExchangeKind::Elect => {
            let leader = mask.trailing_zeros();
            ([leader; LANES], 1 << leader)
        }
        ExchangeKind::Vote(VoteMode::Ballot, _) => ([votes; LANES], 0),
        ExchangeKind::Vote(VoteMode::All, _) => ([0; LANES], all(votes == mask)),
        ExchangeKind::Vote(VoteMode::Any, _) => ([0; LANES], all(votes != 0)),
        ExchangeKind::Vote(VoteMode::Uni, _) => ([0; LANES], all(votes == mask || votes == 0)),
        ExchangeKind::Redux(op, ty) => {
            let reduced = active(mask).map(|i| x.a[i]).reduce(|a, b| combine(op, ty, a, b));
            ([reduced.unwrap_or(0); LANES], 0)
        }
        ExchangeKind::MatchAny | ExchangeKind::MatchAll => {
            let value = |i: usize| (x.a[i], x.high[i]);
            let mut found = [0; LANES];
            for i in active(mask) {
                found[i] = active(mask).filter(|&j| value(j) == value(i)).fold(0, |m, j| m | 1 << j);
            }
            if kind == ExchangeKind::MatchAny {
                return (found, 0);
            }
            let equal = found[mask.trailing_zeros() as usize] == mask;
            ([if equal { mask } else { 0 }; LANES], all(equal))
        }
        ExchangeKind::Shfl(mode) => {
            let mut values = [0; LANES];
            let mut valid = 0;
            for lane in 0..LANES {
                let (from, inside) = source_lane(mode, lane as u32, x.b[lane], x.c[lane]);
                values[lane] = x.a[from as usize];
                valid |= u32::from(inside) << lane;
            }
            (values, valid)
        }
    }
}

/// Writes what came of an exchange to the instruction's destinations.
#[inline(always)]
fn deliver(file: File, x: &Exchange, mask: u32, values: &[u32; LANES], bits: u32) {
    // SAFETY: slots are those of this kernel, of the widths that the lowering checked.
    unsafe {
        // A vote's predicate is its destination.
        if let Some(d) = x.d {
            file.store32(d.slot, mask, values);
        }
        if let Some(p) = x.p {
            file.set_predicate(p.slot, mask, bits);
        }
    }
}

fn perform(file: File, x: &Exchange, mask: u32) {
    let (values, bits) = compute(x.kind, &inputs(file, x), mask);
    deliver(file, x, mask, &values, bits);
}

/// Whether two instructions meet: the same operation with the same qualifiers.
fn alike(a: ExchangeKind, b: ExchangeKind) -> bool {
    match (a, b) {
        // A negated source is an operand, not a qualifier.
        (ExchangeKind::Vote(a, _), ExchangeKind::Vote(b, _)) => a == b,
        _ => a == b,
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
