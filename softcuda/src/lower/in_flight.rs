//! Registers that asynchronous matrix products still read and write.
//!
//! A `wgmma` reads its registers of A, and writes its accumulators, some time between its issue and the wait that covers it.
//! Until then nothing else may be put in their places, although no instruction names them. A forward walk finds the
//! registers that may be in flight at each `wgmma.fence`, `commit_group` and `wait_group`, which are then taken to read
//! them: products land at no other instruction.

use std::collections::BTreeMap;

use super::flow::Node;
use super::ir::{Body, Extra, Reg, WgmmaA, WgmmaSyncKind};

/// Registers of products that are committed to a group, and of those that are not, by virtual register.
#[derive(Debug, Clone, Default, PartialEq)]
struct Flight {
    loose: BTreeMap<u32, Reg>,
    committed: BTreeMap<u32, Reg>,
}

impl Flight {
    fn join(&mut self, other: &Self) {
        self.loose.extend(other.loose.iter().map(|(k, v)| (*k, *v)));
        self.committed.extend(other.committed.iter().map(|(k, v)| (*k, *v)));
    }

    /// Passes one operation.
    fn pass(&mut self, extra: &Extra, guarded: bool) {
        match extra {
            Extra::Wgmma(x) => {
                let a: &[Reg] = match &x.a {
                    WgmmaA::Registers(regs) => regs,
                    WgmmaA::Descriptor { .. } => &[],
                };
                self.loose.extend(x.d.iter().chain(a).map(|r| (r.slot, *r)));
            }
            Extra::WgmmaSync(x) => match x.kind {
                WgmmaSyncKind::Commit => {
                    let loose = self.loose.clone();
                    self.committed.extend(loose);
                    if !guarded {
                        self.loose.clear();
                    }
                }
                WgmmaSyncKind::Wait(0) if !guarded => self.committed.clear(),
                WgmmaSyncKind::Wait(_) | WgmmaSyncKind::Fence => {}
            },
            _ => {}
        }
    }
}

/// Notes at every operation that products may land at which registers they may touch.
pub fn note(nodes: &[Node], order: &[usize], body: &mut Body) {
    if !body.extras.iter().any(|x| matches!(x, Extra::Wgmma(_))) {
        return;
    }
    let mut before = vec![Flight::default(); nodes.len()];
    let mut changed = true;
    while changed {
        changed = false;
        for &n in order {
            let mut flight = before[n].clone();
            for micro in nodes[n].micros.iter().filter(|m| m.op.code.has_extra()) {
                let extra = &mut body.extras[micro.op.a as usize];
                if let Extra::WgmmaSync(x) = extra {
                    x.in_flight = flight.loose.iter().chain(&flight.committed).map(|(_, r)| *r).collect();
                    x.in_flight.sort_unstable_by_key(|r| r.slot);
                    x.in_flight.dedup();
                }
                flight.pass(extra, micro.guard.is_some());
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
}
