//! Basic blocks and their order.
//!
//! The executor always runs the lanes of a warp that stand at the lowest operation, and merges lanes that meet. For that to
//! bring divergent lanes together at the end of an `if` or a loop, blocks are laid out in a reverse post order in which
//! every loop is contiguous: what follows a loop stands after all of it.

use std::collections::HashMap;

use super::LowerErrorKind;
use super::builder::{Item, Label, Micro, Result};
use super::ir::{Block, Body, Counted, Extra, Op};
use super::isa::Code;

/// A block of the control-flow graph.
#[derive(Debug, Default)]
pub struct Node {
    pub micros: Vec<Micro>,
    /// Jump targets, then the block that follows where control can fall through.
    pub successors: Vec<usize>,
    pub falls_to: Option<usize>,
}

/// Splits a function into blocks, in source order.
pub fn split(items: Vec<Item>) -> Result<(Vec<Node>, HashMap<Label, usize>)> {
    let mut nodes = vec![Node::default()];
    let mut at = HashMap::new();
    // Whether control can run from the last block into a new one.
    let mut open = true;
    for item in items {
        match item {
            Item::Label(label) => {
                if !nodes.last().expect("one block at least").micros.is_empty() || !open {
                    let next = nodes.len();
                    if open {
                        nodes[next - 1].falls_to = Some(next);
                    }
                    nodes.push(Node::default());
                    open = true;
                }
                at.insert(label, nodes.len() - 1);
            }
            Item::Micro(micro) => {
                if !open {
                    nodes.push(Node::default());
                }
                let ends = match micro.op.code {
                    Code::Bra | Code::BrxIdx => true,
                    // With a guard too: what follows counts only for the lanes that are left.
                    Code::Exit | Code::Return | Code::Trap | Code::InvalidPc => true,
                    // Lanes come back to the start of a block, where they meet.
                    Code::Call => true,
                    _ => false,
                };
                let conditional = micro.guard.is_some() || micro.op.code == Code::Call;
                let last = nodes.len() - 1;
                nodes[last].micros.push(*micro);
                open = true;
                if ends && conditional {
                    nodes[last].falls_to = Some(last + 1);
                    nodes.push(Node::default());
                } else if ends {
                    open = false;
                }
            }
        }
    }
    for node in &mut nodes {
        let mut successors = Vec::new();
        for micro in &node.micros {
            for label in micro.target.iter().chain(&micro.targets) {
                let target = at.get(label).copied();
                successors.push(target.ok_or_else(|| LowerErrorKind::Invalid("a label has no place".into()))?);
            }
        }
        successors.extend(node.falls_to);
        node.successors = successors;
    }
    Ok((nodes, at))
}

/// For each block, in how many loops it lies.
fn loop_depths(nodes: &[Node]) -> Vec<usize> {
    let mut predecessors = vec![Vec::new(); nodes.len()];
    for (i, n) in nodes.iter().enumerate() {
        for &s in &n.successors {
            predecessors[s].push(i);
        }
    }
    // Back edges of a depth-first walk, by header.
    let mut state = vec![0u8; nodes.len()];
    let mut latches: HashMap<usize, Vec<usize>> = HashMap::new();
    let mut stack = vec![(0, 0)];
    state[0] = 1;
    while let Some((node, next)) = stack.last_mut() {
        let Some(&s) = nodes[*node].successors.get(*next) else {
            state[*node] = 2;
            stack.pop();
            continue;
        };
        *next += 1;
        match state[s] {
            0 => {
                state[s] = 1;
                stack.push((s, 0));
            }
            1 => latches.entry(s).or_default().push(*node),
            _ => {}
        }
    }
    let mut depths = vec![0; nodes.len()];
    for (header, latches) in latches {
        let mut inside = vec![false; nodes.len()];
        inside[header] = true;
        let mut work = latches;
        while let Some(n) = work.pop() {
            if !inside[n] && state[n] != 0 {
                inside[n] = true;
                work.extend(&predecessors[n]);
            }
        }
        for (depth, inside) in depths.iter_mut().zip(inside) {
            *depth += usize::from(inside);
        }
    }
    depths
}

/// The reachable blocks in the order in which they are to stand.
pub fn order(nodes: &[Node]) -> Vec<usize> {
    let depths = loop_depths(nodes);
    // What is visited first stands last: ways out of loops, then what is later in the source.
    let visit = |n: usize| {
        let mut s = nodes[n].successors.clone();
        s.sort_by_key(|&s| (depths[s], std::cmp::Reverse(s)));
        s
    };
    let mut seen = vec![false; nodes.len()];
    let mut post = Vec::with_capacity(nodes.len());
    let mut stack = vec![(0, visit(0), 0)];
    seen[0] = true;
    while let Some((node, successors, next)) = stack.last_mut() {
        match successors.get(*next).copied() {
            Some(s) => {
                *next += 1;
                if !seen[s] {
                    seen[s] = true;
                    stack.push((s, visit(s), 0));
                }
            }
            None => {
                post.push(*node);
                stack.pop();
            }
        }
    }
    post.reverse();
    post
}

/// Writes the blocks out in order. Registers have been assigned.
pub fn emit(nodes: &[Node], order: &[usize], labels: &HashMap<Label, usize>, body: &mut Body) {
    let mut start = HashMap::new();
    let mut jumps = Vec::new();
    let polls = super::polls::polls(nodes, body);
    let blocks_before = body.blocks.len() as u32;
    for (position, &n) in order.iter().enumerate() {
        let node = &nodes[n];
        start.insert(n, body.ops.len() as u32);
        let counted = |m: &Micro| m.class.map(|class| Counted { line: m.line, class, name: m.name });
        let instructions: Vec<_> = node.micros.iter().filter_map(counted).collect();
        let line = node.micros.first().map_or(0, |m| m.line);
        let body_blocks = body.blocks.len() as u32;
        let mut push = |op: Op, line: u32| {
            body.ops.push(op);
            body.lines.push(line);
            body.ops.len() - 1
        };
        let plain = |code, a, x| Op { code, guard: 0, d: 0, a, b: 0, c: 0, x };
        push(plain(Code::Enter, body_blocks, instructions.len().max(1) as u32), line);
        let next = order.get(position + 1).copied();
        for m in &node.micros {
            let target = m.target.map(|l| labels[&l]);
            if m.op.code == Code::Bra && m.guard.is_none() && target == next {
                continue;
            }
            let at = push(m.op, m.line);
            if let Some(target) = target {
                jumps.push((at, target));
            }
        }
        if let Some(to) = node.falls_to
            && Some(to) != next
        {
            let at = push(plain(Code::Bra, 0, 0), node.micros.last().map_or(line, |m| m.line));
            jumps.push((at, to));
        }
        body.blocks.push(Block { instructions, poll: polls[n].map(|poll| blocks_before + poll) });
    }
    for (at, target) in jumps {
        body.ops[at].x = start[&target];
    }
    for m in order.iter().flat_map(|&n| &nodes[n].micros).filter(|m| m.op.code == Code::BrxIdx) {
        if let Extra::Brx(_, targets) = &mut body.extras[m.op.a as usize] {
            *targets = m.targets.iter().map(|l| start[&labels[l]]).collect();
        }
    }
}
