//! `cp.async` (PTX ISA 9.7.9.25), done as late as the program allows.
//!
//! At issue the addresses are checked and the destination is poisoned, which the manual allows since its content is
//! undefined until the copy is waited for: code that still reads the old content, or reads the new one too early, finds
//! poison. The source is read when the wait that requires the copy is reached; copies that nothing waits for never land.

use std::collections::VecDeque;

use super::access::{addresses, get};
use super::fault::FaultKind;
use super::lanes::{File, LANES, active};
use super::observe::{AccessKind, Engine, Touch};
use super::policy::Policy;
use super::state::{Machine, Outcome, Raw};
use crate::lower::ir::{CopyAsync, Reg};
use crate::ptx::ast::Space;

/// What an asynchronous write looks like before it lands: NaN in every floating-point format.
const POISON: u8 = 0xff;

/// One instruction's copies.
#[derive(Debug)]
struct Copy {
    /// Lanes whose copy has not landed.
    mask: u32,
    bytes: u32,
    to: [u64; LANES],
    from: [u64; LANES],
    /// Bytes to read; the rest is zero.
    length: [u8; LANES],
    /// Its number among the warp's copies.
    serial: u64,
    /// Group that the copy belongs to, counted per lane.
    group: [u32; LANES],
}

/// A warp's copies in flight.
#[derive(Debug, Default)]
pub struct Copies {
    pending: VecDeque<Box<Copy>>,
    /// Groups committed so far by each lane.
    committed: [u32; LANES],
    issued: u64,
    /// Boxed because they move between the two lists.
    #[allow(clippy::vec_box)]
    spare: Vec<Box<Copy>>,
}

impl Copies {
    pub fn clear(&mut self) {
        self.spare.extend(self.pending.drain(..));
        self.committed = [0; LANES];
    }

    pub fn commit(&mut self, mask: u32) {
        active(mask).for_each(|i| self.committed[i] += 1);
    }

    /// Number of the next copy.
    pub fn issued(&self) -> u64 {
        self.issued
    }
}

/// What a policy's register holds; a warp's lanes are taken to agree.
pub fn policy_of(file: File, policy: Option<Reg>, lane: usize) -> Policy {
    policy.map_or(Policy::default(), |r| Policy(get(file, r)[lane]))
}

pub fn issue(m: &mut Machine, file: File, x: &CopyAsync, mask: u32, pc: u32) -> Outcome<()> {
    let (to, from) = (addresses(file, &x.to), addresses(file, &x.from));
    let mut length = [x.bytes as u8; LANES];
    if let Some(r) = x.source_bytes {
        let sizes = get(file, r);
        for i in active(mask) {
            if sizes[i] > u64::from(x.bytes) {
                let message = format!("`cp.async` of {} bytes with a source of {} bytes", x.bytes, sizes[i]);
                return Err(Raw::new(FaultKind::IllegalInstruction, 1 << i, message));
            }
            length[i] = sizes[i] as u8;
        }
    }
    if let Some((p, negated)) = x.ignore {
        // SAFETY: the slot is a predicate of this kernel.
        let ignored = unsafe { file.predicate(p.slot) } ^ u32::from(negated).wrapping_neg();
        active(mask & ignored).for_each(|i| length[i] = 0);
    }
    let places = m.resolve(Some(Space::Shared), &to, mask, x.bytes)?;
    // A source of which nothing is read need not exist.
    let reading = active(mask).filter(|&i| length[i] != 0).fold(0, |m, i| m | 1 << i);
    let partial = active(reading).any(|i| u32::from(length[i]) != x.bytes);
    if reading != 0 && !partial {
        m.resolve(Some(Space::Global), &from, reading, x.bytes)?;
    } else {
        check_partial(m, &from, &length, reading, x.bytes)?;
    }
    let touch = |kind, space, addresses, mask| Touch {
        engine: Engine::CopyAsync,
        ..Touch::weak(kind, Some(space), addresses, mask, x.bytes)
    };
    if reading != 0 {
        m.warp.policy = policy_of(file, x.policy, reading.trailing_zeros() as usize);
        m.observe(&touch(AccessKind::Read, Space::Global, &from, reading), pc);
        m.warp.policy = Policy::default();
    }
    m.observe(&touch(AccessKind::Write, Space::Shared, &to, mask), pc);
    let copies = &mut m.warp.copies;
    let serial = copies.issued;
    copies.issued += 1;
    let fresh = Copy { mask, bytes: x.bytes, to: places, from, length, serial, group: copies.committed };
    for i in active(mask) {
        // SAFETY: `resolve` has checked the destination.
        unsafe { std::ptr::write_bytes(places[i] as *mut u8, POISON, x.bytes as usize) };
    }
    let copy = match copies.spare.pop() {
        Some(mut old) => {
            *old = fresh;
            old
        }
        None => Box::new(fresh),
    };
    copies.pending.push_back(copy);
    Ok(())
}

/// Sources of which only the first bytes are read: aligned as a whole, in bounds as far as they are read.
fn check_partial(m: &mut Machine, from: &[u64; LANES], length: &[u8; LANES], mask: u32, bytes: u32) -> Outcome<()> {
    for lane in active(mask) {
        if !from[lane].is_multiple_of(u64::from(bytes)) {
            m.resolve(Some(Space::Global), from, 1 << lane, bytes)?;
        }
        let mut at = *from;
        for offset in 0..u64::from(length[lane]) {
            at[lane] = from[lane] + offset;
            m.resolve(Some(Space::Global), &at, 1 << lane, 1)?;
        }
    }
    Ok(())
}

/// Lands the copies of all but each lane's last `keep` groups.
pub fn wait(m: &mut Machine, keep: u32, mask: u32) {
    let committed = m.warp.copies.committed;
    land(&mut m.warp.copies, |copy| {
        mask & (0..LANES).fold(0, |due, i| due | u32::from(copy.group[i].saturating_add(keep) < committed[i]) << i)
    });
}

/// Lands the lanes' copies that were issued before one of this number.
pub fn land_issued_before(m: &mut Machine, serial: u64, lanes: u32) {
    land(&mut m.warp.copies, |copy| if copy.serial < serial { lanes } else { 0 });
}

/// Lands the copies of the lanes that `due` says.
fn land(copies: &mut Copies, due: impl Fn(&Copy) -> u32) {
    for copy in &mut copies.pending {
        let due = due(copy);
        for i in active(due & copy.mask) {
            let (bytes, length) = (copy.bytes as usize, usize::from(copy.length[i]));
            // SAFETY: `issue` has checked both ends.
            unsafe {
                let to = copy.to[i] as *mut u8;
                if length == 16 {
                    to.cast::<[u8; 16]>().write(*(copy.from[i] as *const [u8; 16]));
                } else {
                    std::ptr::copy_nonoverlapping(copy.from[i] as *const u8, to, length);
                    std::ptr::write_bytes(to.add(length), 0, bytes - length);
                }
            }
        }
        copy.mask &= !due;
    }
    while copies.pending.front().is_some_and(|c| c.mask == 0) {
        copies.spare.extend(copies.pending.pop_front());
    }
    if copies.pending.iter().any(|c| c.mask == 0) {
        copies.pending.retain(|c| c.mask != 0);
    }
}
