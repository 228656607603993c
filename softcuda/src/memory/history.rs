//! What to say about addresses that are not allocated.

use std::collections::{BTreeMap, VecDeque};

use super::Allocation;

/// Freed allocations to remember.
const REMEMBERED: usize = 1 << 16;

/// Distance in bytes up to which an address is called near an allocation.
const NEAR: u64 = 1 << 20;

#[derive(Debug, Clone, Copy)]
pub(super) struct Freed {
    pub start: u64,
    pub end: u64,
    pub serial: u64,
}

#[derive(Default)]
pub(super) struct History {
    freed: BTreeMap<u64, Freed>,
    order: VecDeque<u64>,
}

/// How a live allocation is named in messages.
pub(super) fn live(allocation: &Allocation) -> String {
    named(allocation.start, allocation.end, allocation.serial)
}

fn named(start: u64, end: u64, serial: u64) -> String {
    format!("allocation #{serial} ({} bytes at {start:#x})", end - start)
}

impl History {
    pub fn push(&mut self, freed: Freed) {
        self.freed.insert(freed.start, freed);
        self.order.push_back(freed.start);
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.freed.remove(&oldest);
        }
    }

    /// `before` and `after` are the live allocations around `addr`.
    pub fn describe(&self, addr: u64, before: Option<Allocation>, after: Option<Allocation>) -> String {
        if addr < 4096 {
            return format!("{addr:#x} is a null pointer");
        }
        let freed = self.freed.range(..=addr).next_back().map(|(_, freed)| *freed);
        if let Some(freed) = freed
            && addr < freed.end
        {
            let into = addr - freed.start;
            let name = named(freed.start, freed.end, freed.serial);
            return format!("{addr:#x} is {into} bytes into {name}, which has been freed");
        }
        let past = before.map(|a| (addr - a.end, format!("{} bytes past the end of {}", addr - a.end, live(&a))));
        let ahead =
            after.map(|a| (a.start - addr, format!("{} bytes before the start of {}", a.start - addr, live(&a))));
        let past_freed = freed.map(|f| {
            let name = named(f.start, f.end, f.serial);
            (addr - f.end, format!("{} bytes past the end of {name}, which has been freed", addr - f.end))
        });
        let nearest = [past, ahead, past_freed].into_iter().flatten().min_by_key(|(distance, _)| *distance);
        match nearest {
            Some((distance, text)) if distance < NEAR => format!("{addr:#x} is {text}"),
            _ => format!("{addr:#x} is not near any allocation"),
        }
    }
}
