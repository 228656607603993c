//! Calls of functions with a body of their own: see [`crate::lower::calls`].

use super::access::get;
use super::fault::FaultKind;
use super::lanes::{File, LANES, active};
use super::state::{Group, GroupState, Machine, Outcome, Raw};
use crate::lower::calls::{Call, Entry, Target};
use crate::lower::ir::Reg;

/// One activation of a function in one lane.
#[derive(Debug)]
struct Activation {
    function: u32,
    /// Where `ret` goes.
    back: u32,
    frame: u64,
    arguments: u64,
    /// The lane's registers of an earlier activation of the same function, empty if there is none.
    saved: Vec<u32>,
}

/// The activations of every lane of a warp, innermost last.
#[derive(Debug, Default)]
pub struct Calls {
    lanes: [Vec<Activation>; LANES],
}

impl Calls {
    pub fn clear(&mut self) {
        self.lanes.iter_mut().for_each(Vec::clear);
    }
}

impl Machine<'_, '_> {
    /// Lanes enter the function that each names; the rest of the group goes on.
    pub fn call(&mut self, file: File, x: &Call, pc: u32, mask: u32) -> Outcome<()> {
        let body = self.worker.body;
        let frames = get(file, x.fp);
        let addresses = match &x.target {
            Target::Direct(_) => [0; LANES],
            Target::Indirect(r, _) => get(file, *r),
        };
        self.leave_group(mask, pc + 1);
        for lane in active(mask) {
            let function = match &x.target {
                Target::Direct(f) => *f,
                Target::Indirect(_, candidates) => {
                    let found = candidates.iter().find(|(address, _)| *address == addresses[lane]);
                    let Some((_, f)) = found else { return Err(not_callable(addresses[lane], lane, candidates)) };
                    *f
                }
            };
            let entry = &body.functions[&function];
            let frame = frames[lane] + x.frame;
            let available = u64::from(self.worker.local_bytes);
            if frame + entry.frame > available {
                let depth = self.warp.calls.lanes[lane].len() + 1;
                let message = format!(
                    "call {depth} deep of `{}` needs {} bytes of local memory; the thread has {available}",
                    entry.name,
                    frame + entry.frame
                );
                return Err(Raw::new(FaultKind::StackOverflow, 1 << lane, message));
            }
            let activations = &mut self.warp.calls.lanes[lane];
            let again = activations.iter().any(|a| a.function == function);
            // SAFETY: the ranges are those of this kernel's file.
            let saved = if again { unsafe { save(file, entry, lane) } } else { Vec::new() };
            let arguments = frames[lane] + x.block;
            activations.push(Activation { function, back: pc + 1, frame, arguments, saved });
            self.join_at(entry.pc, lane);
        }
        Ok(())
    }

    /// First operation of a function: sets its frame and argument pointers.
    pub fn enter_function(&mut self, file: File, frame: Reg, arguments: Reg, mask: u32) {
        let (mut frames, mut blocks) = ([0; LANES], [0; LANES]);
        for lane in active(mask) {
            if let Some(a) = self.warp.calls.lanes[lane].last() {
                (frames[lane], blocks[lane]) = (a.frame, a.arguments);
            }
        }
        // SAFETY: the slots are 64-bit ones of this kernel.
        unsafe {
            file.store64(frame.slot, mask, &frames);
            file.store64(arguments.slot, mask, &blocks);
        }
    }

    /// Lanes go back to where each was called from.
    pub fn return_from_function(&mut self, file: File, pc: u32, mask: u32) -> Outcome<()> {
        let body = self.worker.body;
        self.leave_group(mask, pc + 1);
        for lane in active(mask) {
            let Some(a) = self.warp.calls.lanes[lane].pop() else {
                return Err(Raw::new(FaultKind::InvalidPc, 1 << lane, "a return without a call"));
            };
            if !a.saved.is_empty() {
                // SAFETY: the ranges are those of this kernel's file.
                unsafe { restore(file, &body.functions[&a.function], lane, &a.saved) };
            }
            self.join_at(a.back, lane);
        }
        Ok(())
    }

    /// Takes lanes out of the running group, which goes on at `rest` if any are left.
    fn leave_group(&mut self, mask: u32, rest: u32) {
        let w = &mut *self.warp;
        let current = w.current;
        w.groups[current].mask &= !mask;
        w.groups[current].pc = rest;
        if w.groups[current].mask == 0 {
            w.groups.swap_remove(current);
            w.current = 0;
        }
    }

    /// Puts a lane at an operation, with others that are ready there.
    fn join_at(&mut self, pc: u32, lane: usize) {
        let groups = &mut self.warp.groups;
        match groups.iter_mut().find(|g| g.pc == pc && g.state == GroupState::Ready) {
            Some(g) => g.mask |= 1 << lane,
            None => groups.push(Group { pc, mask: 1 << lane, state: GroupState::Ready }),
        }
    }
}

fn not_callable(address: u64, lane: usize, candidates: &[(u64, u32)]) -> Box<Raw> {
    let message = format!(
        "an indirect call of {address:#x}, which is none of the {} functions of this module that the call admits",
        candidates.len()
    );
    let mut raw = Raw::new(FaultKind::InvalidPc, 1 << lane, message);
    raw.address = Some(address);
    raw
}

/// One lane's registers of a function, then its predicates as bits of words.
///
/// # Safety
/// As [`File::at`], for the entry's ranges.
unsafe fn save(file: File, entry: &Entry, lane: usize) -> Vec<u32> {
    let mut words = Vec::new();
    // SAFETY: passed on to the caller.
    unsafe {
        for slot in entry.narrow.clone().step_by(128) {
            words.push(*file.at(slot).cast::<u32>().add(lane));
        }
        for slot in entry.wide.clone().step_by(256) {
            let value = *file.at(slot).cast::<u64>().add(lane);
            words.extend([value as u32, (value >> 32) as u32]);
        }
        let predicates: Vec<u32> = entry.predicates.clone().map(|p| file.predicate(p) >> lane & 1).collect();
        words.extend(predicates.chunks(32).map(|c| c.iter().rev().fold(0, |word, bit| word << 1 | bit)));
    }
    words
}

/// Undoes [`save`].
///
/// # Safety
/// As [`File::at`], for the entry's ranges.
unsafe fn restore(file: File, entry: &Entry, lane: usize, words: &[u32]) {
    let mut words = words.iter().copied();
    let mut next = || words.next().unwrap_or(0);
    // SAFETY: passed on to the caller.
    unsafe {
        for slot in entry.narrow.clone().step_by(128) {
            *file.at(slot).cast::<u32>().add(lane) = next();
        }
        for slot in entry.wide.clone().step_by(256) {
            *file.at(slot).cast::<u64>().add(lane) = u64::from(next()) | u64::from(next()) << 32;
        }
        let mut word = 0;
        for (i, p) in entry.predicates.clone().enumerate() {
            if i % 32 == 0 {
                word = next();
            }
            file.set_predicate(p, 1 << lane, (word >> (i % 32) & 1) << lane);
        }
    }
}
