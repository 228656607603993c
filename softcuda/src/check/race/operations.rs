//! What the driver does with memory in streams: copies, sets and releases against the accesses of launches, and of one another.

use std::sync::Arc;

use super::cell::{Accessor, Conflict, MANY, Stamp, What};
use super::clock::Away;
use super::global::{CELL, PAGE, Pages};
use super::launches::Operation;
use super::observer::{Run, global};
use super::{Race, report};
use crate::exec::LaunchOrder;
use crate::exec::observe::Scope;

impl Race {
    /// Checks an access to `bytes` from an address on, and remembers it. Returns whether there was something to report.
    pub fn operation(
        &self,
        order: &Arc<LaunchOrder>,
        operation: Operation,
        address: u64,
        bytes: u64,
        writes: bool,
    ) -> bool {
        let number = self.launches.operation(operation, order);
        let mut found = None;
        let beside = |number| self.launches.beside(number, Some(order), true).is_some();
        let by = accessor(number, writes, &beside);
        if operation == Operation::Free {
            // Of memory that nobody has touched there is nothing to see, and after its release nothing to remember.
            let cells = address / u64::from(CELL)..(address + bytes).div_ceil(u64::from(CELL));
            let per_page = PAGE / u64::from(CELL);
            for (page, touched) in self.global.touched(address, bytes) {
                for (cell, place) in touched.cells().iter_mut().zip(page * per_page..) {
                    if cells.contains(&place) {
                        cell.access(CELL, (0, CELL), 0, MANY, &by, &mut found);
                    }
                }
            }
        } else {
            let run = Run { lane: 0, from: address, to: address + bytes, shift: MANY };
            global(&mut Pages::new(&self.global), &run, &by, &mut found);
        }
        let Some(conflict): Option<Conflict> = found else { return false };
        let earlier = self.launches.beside(conflict.other.launch(), Some(order), true);
        if let Some(earlier) = &earlier {
            report::of_operation(&self.findings, (operation, writes), (address, bytes), earlier, &conflict);
        }
        earlier.is_some()
    }
}

/// One that knows all of itself.
fn accessor<'a>(number: u32, write: bool, beside: &'a dyn Fn(u32) -> bool) -> Accessor<'a> {
    static NOTHING: Away = Away::NONE;
    let what =
        What { line: 0, warp: 0, strong: false, scope: Scope::Sys, kind: write.into(), launch: u64::from(number) };
    Accessor {
        stamp: Stamp::new(1, 0, &what),
        write,
        known: &[u32::MAX],
        away: &NOTHING,
        lanes: u32::MAX,
        pairs: None,
        stride: 1,
        engine: true,
        benign: &|_, _| false,
        beside,
        shared: false,
    }
}
