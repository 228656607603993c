//! Loops that only wait for somebody else: how often they run depends on who runs when, and says nothing of the kernel.
//!
//! A poll is a loop of at most [`NODES`] blocks and [`INSTRUCTIONS`] instructions that tries an mbarrier, or loads with an
//! order or `.volatile` from an address that the loop does not change, and that neither stores nor synchronises otherwise.

use super::flow::Node;
use super::ir::{Body, Extra, Use, visit_registers};
use super::isa::Code;

/// Blocks of a poll, at most.
const NODES: usize = 3;
/// Instructions of a poll, at most.
const INSTRUCTIONS: usize = 16;

/// For each block the poll that it belongs to, by its first block.
pub fn polls(nodes: &[Node], body: &mut Body) -> Vec<Option<u32>> {
    let mut found = vec![None; nodes.len()];
    for start in 0..nodes.len() {
        let mut path = vec![start];
        cycles(nodes, &mut path, &mut |cycle| {
            if is_poll(nodes, cycle, body) {
                let first = cycle.iter().filter_map(|&n| found[n]).min().unwrap_or(start as u32);
                cycle.iter().for_each(|&n| found[n] = Some(first));
            }
        });
    }
    found
}

/// Ways from the path's first block back to it, no longer than a poll.
fn cycles(nodes: &[Node], path: &mut Vec<usize>, f: &mut dyn FnMut(&[usize])) {
    for &next in &nodes[path[path.len() - 1]].successors {
        if next == path[0] {
            f(path);
        } else if path.len() < NODES && !path.contains(&next) {
            path.push(next);
            cycles(nodes, path, f);
            path.pop();
        }
    }
}

fn is_poll(nodes: &[Node], cycle: &[usize], body: &mut Body) -> bool {
    let micros = || cycle.iter().flat_map(|&n| &nodes[n].micros);
    let mut written = Vec::new();
    let (mut tries, mut addresses, mut instructions) = (false, Vec::new(), 0);
    for micro in micros() {
        let mut op = micro.op;
        visit_registers(&mut op, &mut body.extras, &mut |reg, direction| {
            if direction == Use::Write {
                written.push((reg.width, reg.slot));
            }
        });
        if micro.class.is_none() {
            continue;
        }
        instructions += 1;
        let name = &body.names[micro.name as usize];
        let mut parts = name.split('.');
        let opcode = parts.next().unwrap_or("");
        match opcode {
            "ld" => {
                if let (Code::Load, Some(Extra::Access(x))) = (micro.op.code, body.extras.get(micro.op.a as usize))
                    && name.split('.').any(|part| matches!(part, "acquire" | "relaxed" | "volatile"))
                {
                    addresses.push((x.address.base.width, x.address.base.slot));
                }
            }
            "mbarrier" if parts.any(|part| matches!(part, "try_wait" | "test_wait")) => tries = true,
            "st" | "red" | "atom" | "bar" | "barrier" | "mbarrier" | "cp" | "call" | "mma" | "wgmma" | "wmma" => {
                return false;
            }
            _ => {}
        }
    }
    let fixed = !addresses.is_empty() && addresses.iter().all(|address| !written.contains(address));
    instructions <= INSTRUCTIONS && (tries || fixed)
}
