//! Bounds, alignment, address spaces and use after free, as findings; and leaks.
//!
//! The executor refuses a bad access whether or not this checker is on: the launch ends there, as it would on a GPU. The
//! checker makes a [`Finding`](super::Finding) of it. Leaks are allocations that live on when their context is destroyed or
//! reset; a program that ends without either has its memory taken back unasked and is not reported.
//!
//! Not seen: an access that strays from one live allocation into another (they lie at least 64 KiB apart, and further for large ones),
//! or from one variable of a block's shared memory into the next.

use std::sync::Arc;

use super::{Checker, Finding, Findings, Place};
use crate::exec::observe::{Observer, Watch};
use crate::exec::{Fault, FaultKind, Launch};

/// The checker.
#[derive(Debug)]
pub struct Memory {
    findings: Arc<Findings>,
}

impl Memory {
    pub fn new(findings: Arc<Findings>) -> Memory {
        Memory { findings }
    }

    /// An allocation outlives its context.
    pub fn leaked(&self, address: u64, bytes: u64, serial: u64) {
        let message = format!("{bytes} bytes at {address:#x}, allocation number {serial}, are never freed");
        let finding = Finding { checker: Checker::Memory, message, place: None, other: None, times: 1 };
        self.findings.report("leak", finding);
    }
}

impl Watch for Memory {
    fn observer<'a>(&'a self, _launch: &'a Launch<'a>, _grid: u64) -> Option<Box<dyn Observer + 'a>> {
        None
    }

    fn fault(&self, fault: &Fault) {
        use FaultKind::*;
        if matches!(fault.kind, IllegalAddress | MisalignedAddress | InvalidAddressSpace) {
            self.findings.report(fault.kind.text(), of_fault(Checker::Memory, fault));
        }
    }
}

/// A fault as a finding.
pub(super) fn of_fault(checker: Checker, fault: &Fault) -> Finding {
    let [tx, ty, tz] = fault.thread;
    let [sx, sy, _] = fault.shape;
    let thread = tx + sx * (ty + sy * tz);
    let place = Place {
        kernel: fault.kernel.clone(),
        line: fault.line,
        text: fault.text.clone(),
        block: fault.block,
        warp: thread / 32,
        lane: thread % 32,
    };
    let message = match (fault.address, fault.space, fault.bytes) {
        (Some(address), Some(space), Some(bytes)) => {
            format!("{}: {bytes} bytes of {space} memory at {address:#x}: {}", fault.kind.text(), fault.message)
        }
        _ => format!("{}: {}", fault.kind.text(), fault.message),
    };
    Finding { checker, message, place: Some(place), other: None, times: 1 }
}
