//! Registers that asynchronous matrix products still read and write.
//!
//! A `wgmma` reads its registers of A, and writes its accumulators, some time between its issue and the wait that covers it.
//! Until then nothing else may be put in their places, although no instruction names them. A forward walk finds the
//! registers that may be in flight at each `wgmma.fence`, `commit_group` and `wait_group`, which are then taken to read
//! them: products land at no other instruction.
//!
//! The same walk finds the instructions that may break the rules of PTX ISA 9.7.15.5.2 and 9.7.15.7.1 on some way through the
//! program: those that touch a register in flight, and those after which no `wgmma.fence` comes before a product that uses
//! the register. A mark is put before each, so that whoever watches learns of it when it really happens; there is none in a
//! program that keeps the rules on every way.

use std::collections::{BTreeMap, BTreeSet};

use super::builder::Micro;
use super::flow::Node;
use super::ir::{Body, CONSTANT, Extra, Op, Reg, Wgmma, WgmmaA, WgmmaSyncKind, visit_registers};
use super::isa::Code;

type Registers = BTreeMap<u32, Reg>;
/// Block and operation in it.
type Place = (usize, usize);

/// What may be in flight.
#[derive(Debug, Clone, Default, PartialEq)]
struct Flight {
    /// Registers of products that are not committed to a group.
    loose: Registers,
    /// Of the groups, the last one committed first.
    groups: Vec<Registers>,
    /// Where each register was touched since the last fence.
    touched: BTreeMap<u32, BTreeSet<Place>>,
}

/// Groups that are told apart; what is older counts as of the oldest.
const GROUPS: usize = 32;

impl Flight {
    fn join(&mut self, other: &Self) {
        self.loose.extend(&other.loose);
        if self.groups.len() < other.groups.len() {
            self.groups.resize(other.groups.len(), Registers::new());
        }
        self.groups.iter_mut().zip(&other.groups).for_each(|(a, b)| a.extend(b));
        for (register, places) in &other.touched {
            self.touched.entry(*register).or_default().extend(places);
        }
    }

    fn all(&self) -> impl Iterator<Item = &Reg> {
        self.loose.values().chain(self.groups.iter().flat_map(BTreeMap::values))
    }

    fn holds(&self, register: u32) -> bool {
        self.loose.contains_key(&register) || self.groups.iter().any(|g| g.contains_key(&register))
    }

    fn commit(&mut self, guarded: bool) {
        self.groups.insert(0, self.loose.clone());
        if !guarded {
            self.loose.clear();
        }
        while self.groups.len() > GROUPS {
            let oldest = self.groups.pop().unwrap_or_default();
            self.groups[GROUPS - 1].extend(oldest);
        }
    }
}

/// Registers whose use has rules.
fn registers_of(x: &Wgmma) -> impl Iterator<Item = &Reg> {
    let a: &[Reg] = match &x.a {
        WgmmaA::Registers(regs) => regs,
        WgmmaA::Descriptor { .. } => &[],
    };
    x.d.iter().chain(a).filter(|r| r.slot & CONSTANT == 0)
}

/// Notes at every operation that products may land at which registers they may touch, and marks what may break the rules.
pub fn note(nodes: &mut [Node], order: &[usize], body: &mut Body) {
    let mut ruled = Registers::new();
    for extra in &body.extras {
        if let Extra::Wgmma(x) = extra {
            ruled.extend(registers_of(x).map(|r| (r.slot, *r)));
        }
    }
    if ruled.is_empty() {
        return;
    }
    let mut before = vec![Flight::default(); nodes.len()];
    let mut marks: BTreeMap<Place, Registers> = BTreeMap::new();
    let mut changed = true;
    while changed {
        changed = false;
        for &n in order {
            let mut flight = before[n].clone();
            for i in 0..nodes[n].micros.len() {
                pass(&mut flight, &mut nodes[n].micros[i], (n, i), &ruled, &mut marks, body);
            }
            for &s in &nodes[n].successors {
                let mut joined = before[s].clone();
                joined.join(&flight);
                if joined != before[s] {
                    before[s] = joined;
                    changed = true;
                }
            }
        }
    }
    // From the last on, so that places stay what they are.
    for ((n, i), registers) in marks.into_iter().rev() {
        let a = body.extras.len() as u32;
        body.extras.push(Extra::WgmmaTouch(registers.into_values().collect()));
        let at = &nodes[n].micros[i];
        let op = Op { code: Code::WgmmaTouch, guard: 0, d: 0, a, b: 0, c: 0, x: 0 };
        let mark =
            Micro { op, guard: at.guard, line: at.line, class: None, name: at.name, target: None, targets: Vec::new() };
        nodes[n].micros.insert(i, mark);
    }
}

/// Passes one operation.
fn pass(
    flight: &mut Flight,
    micro: &mut Micro,
    place: Place,
    ruled: &Registers,
    marks: &mut BTreeMap<Place, Registers>,
    body: &mut Body,
) {
    let guarded = micro.guard.is_some();
    let extra = micro.op.code.has_extra().then(|| &mut body.extras[micro.op.a as usize]);
    match extra {
        Some(Extra::Wgmma(x)) => {
            for r in registers_of(x) {
                for &place in flight.touched.get(&r.slot).into_iter().flatten() {
                    marks.entry(place).or_default().insert(r.slot, *r);
                }
            }
            flight.loose.extend(registers_of(x).map(|r| (r.slot, *r)));
        }
        Some(Extra::WgmmaSync(x)) => {
            x.in_flight = flight.all().copied().collect();
            x.in_flight.sort_unstable_by_key(|r| r.slot);
            x.in_flight.dedup();
            match x.kind {
                WgmmaSyncKind::Commit => flight.commit(guarded),
                WgmmaSyncKind::Wait(keep) if !guarded => {
                    flight.groups.truncate(if keep as usize >= GROUPS { GROUPS } else { keep as usize })
                }
                WgmmaSyncKind::Fence if !guarded => flight.touched.clear(),
                WgmmaSyncKind::Wait(_) | WgmmaSyncKind::Fence => {}
            }
        }
        _ => visit_registers(&mut micro.op, &mut body.extras, &mut |r, _| {
            if r.slot & CONSTANT == 0 && ruled.contains_key(&r.slot) && *r == ruled[&r.slot] {
                if flight.holds(r.slot) {
                    marks.entry(place).or_default().insert(r.slot, *r);
                }
                flight.touched.entry(r.slot).or_default().insert(place);
            }
        }),
    }
}
