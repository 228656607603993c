//! Packs virtual registers into as small a file as their lifetimes allow: compilers emit a new register for every value, and
//! a file that fits the host's cache is worth more than anything else the lowering could do.
//!
//! Lifetimes are those of one thread. A register written under a predicate keeps its other lanes, so that such a write does
//! not end the previous lifetime. A result may take the place of an operand of the same operation: the executor reads all
//! operands of an operation before it writes.

use std::ops::Range;

use super::flow::Node;
use super::ir::{Body, CONSTANT, Use, visit_registers};
use super::isa::Width;

/// Where one body's registers lie: byte offsets in the file, and indices of predicates.
pub struct Placed {
    pub narrow: Range<u32>,
    pub wide: Range<u32>,
    pub predicates: Range<u32>,
    /// Registers of 32 bits per thread.
    pub count: u32,
}

/// Assigns places behind those of the bodies before, and rewrites all operations.
pub fn assign(nodes: &mut [Node], order: &[usize], widths: &[Width], temporaries: &[bool], body: &mut Body) -> Placed {
    let intervals = intervals(nodes, order, widths.len(), temporaries, body);
    let mut places = vec![0u32; widths.len()];
    let mut used = [0u32; 3];
    for width in [Width::Pred, Width::W32, Width::W64] {
        let mut mine: Vec<_> = (0..widths.len())
            .filter(|&r| widths[r] == width)
            .filter_map(|r| intervals[r].map(|(from, to)| (from, to, r)))
            .collect();
        mine.sort_unstable();
        let mut active = std::collections::BinaryHeap::new();
        let mut free = std::collections::BinaryHeap::new();
        let count = &mut used[width as usize];
        for (from, to, register) in mine {
            while let Some(&std::cmp::Reverse((end, place))) = active.peek()
                && end < from
            {
                active.pop();
                free.push(std::cmp::Reverse(place));
            }
            let place = free.pop().map_or_else(
                || {
                    *count += 1;
                    *count - 1
                },
                |std::cmp::Reverse(place)| place,
            );
            places[register] = place;
            active.push(std::cmp::Reverse((to, place)));
        }
    }
    let [predicates, w32, w64] = used;
    // The 64-bit registers stand after the 32-bit ones.
    let (first, first_predicate) = (body.file_bytes, body.predicates);
    let wide_base = first + w32 * Width::W32.file_bytes();
    let slot = |register: usize| match widths[register] {
        Width::Pred => first_predicate + places[register],
        Width::W32 => first + places[register] * Width::W32.file_bytes(),
        Width::W64 => wide_base + places[register] * Width::W64.file_bytes(),
    };
    for node in order {
        for micro in &mut nodes[*node].micros {
            visit_registers(&mut micro.op, &mut body.extras, &mut |reg, _| {
                if reg.slot & CONSTANT == 0 {
                    reg.slot = slot(reg.slot as usize);
                } else if reg.width == Width::Pred {
                    reg.slot &= !CONSTANT;
                }
            });
            if let Some((predicate, negated)) = micro.guard {
                let index = if predicate & CONSTANT == 0 { slot(predicate as usize) } else { predicate & !CONSTANT };
                micro.op.guard = (index << 1 | u32::from(negated)) as u16;
            }
        }
    }
    body.predicates += predicates;
    body.file_bytes = wide_base + w64 * Width::W64.file_bytes();
    Placed {
        narrow: first..wide_base,
        wide: wide_base..body.file_bytes,
        predicates: first_predicate..body.predicates,
        count: w32 + 2 * w64,
    }
}

type Bits = Vec<u64>;

fn set(bits: &mut Bits, i: u32) {
    bits[i as usize / 64] |= 1 << (i % 64);
}

fn get(bits: &Bits, i: u32) -> bool {
    bits[i as usize / 64] >> (i % 64) & 1 == 1
}

/// First and last position at which each register's value is needed: reads at even positions, writes at odd ones.
fn intervals(
    nodes: &mut [Node],
    order: &[usize],
    registers: usize,
    temporaries: &[bool],
    body: &mut Body,
) -> Vec<Option<(u32, u32)>> {
    let words = registers.div_ceil(64);
    let empty = vec![0u64; words];
    let (mut reads, mut kills) = (vec![empty.clone(); nodes.len()], vec![empty.clone(); nodes.len()]);
    let mut spans: Vec<Option<(u32, u32)>> = vec![None; registers];
    let widen = |spans: &mut Vec<Option<(u32, u32)>>, r: usize, at: u32| {
        let (from, to) = spans[r].unwrap_or((at, at));
        spans[r] = Some((from.min(at), to.max(at)));
    };
    let mut position = 0u32;
    let mut bounds = vec![(0, 0); nodes.len()];
    for &n in order {
        let begin = position;
        for micro in &mut nodes[n].micros {
            let guarded = micro.guard.is_some();
            let mut read = |r: u32, spans: &mut Vec<_>| {
                if r & CONSTANT == 0 {
                    if !get(&kills[n], r) {
                        set(&mut reads[n], r);
                    }
                    widen(spans, r as usize, position * 2);
                }
            };
            if let Some((p, _)) = micro.guard {
                read(p, &mut spans);
            }
            visit_registers(&mut micro.op, &mut body.extras, &mut |reg, direction| {
                if direction == Use::Read {
                    read(reg.slot, &mut spans);
                }
            });
            visit_registers(&mut micro.op, &mut body.extras, &mut |reg, direction| {
                if direction == Use::Write && reg.slot & CONSTANT == 0 {
                    if !guarded || temporaries[reg.slot as usize] {
                        set(&mut kills[n], reg.slot);
                    }
                    widen(&mut spans, reg.slot as usize, position * 2 + 1);
                }
            });
            position += 1;
        }
        position += 1;
        bounds[n] = (begin * 2, position * 2 - 1);
    }
    let mut live_in = reads;
    let mut live_out = vec![empty; nodes.len()];
    let mut changed = true;
    while changed {
        changed = false;
        for &n in order.iter().rev() {
            for w in 0..words {
                let out = nodes[n].successors.iter().fold(0, |bits, &s| bits | live_in[s][w]);
                let input = live_in[n][w] | out & !kills[n][w];
                changed |= input != live_in[n][w];
                live_out[n][w] = out;
                live_in[n][w] = input;
            }
        }
    }
    for &n in order {
        for (bits, at) in [(&live_in[n], bounds[n].0), (&live_out[n], bounds[n].1)] {
            for (w, &word) in bits.iter().enumerate() {
                let mut word = word;
                while word != 0 {
                    widen(&mut spans, w * 64 + word.trailing_zeros() as usize, at);
                    word &= word - 1;
                }
            }
        }
    }
    spans
}
