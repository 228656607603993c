//! Barriers and what else threads meet at: divergent or mismatched ones, misuse of barriers and mbarrier objects, wrong member
//! masks, deadlock with who waits on what.
//!
//! The executor refuses what the PTX ISA leaves undefined whether or not this checker is on, and a launch in which nobody can
//! go on ends: the checker makes findings of these faults. Beside that it looks at what is left when a cluster ends:
//! transactions that an mbarrier object expects and that never came.
//!
//! Not seen:
//! - whether a barrier is met at different places of the program by different warps, which the manual allows.
//! - Arrivals at a barrier that nobody waits for before the block ends.
//! - `shfl` that reads a lane which does not take part: its result is only unpredictable.
//! - A wait for a parity that has come and gone twice: which phase the program means cannot be known.

use rustc_hash::FxHashMap;
use std::sync::Arc;

use super::memory::of_fault;
use super::{Checker, Finding, Findings, Place};
use crate::exec::observe::{BlockEvent, BlockSite, ObjectPlace, Observer, Site, SyncEvent, Watch};
use crate::exec::{Fault, FaultKind, Launch};

/// The checker.
#[derive(Debug)]
pub struct Sync {
    findings: Arc<Findings>,
}

impl Sync {
    pub fn new(findings: Arc<Findings>) -> Sync {
        Sync { findings }
    }
}

/// Instructions at which threads meet, as they begin after their guard.
const MEETINGS: [&str; 11] = [
    "bar.",
    "barrier.",
    "mbarrier.",
    "shfl.",
    "vote.",
    "match.",
    "redux.",
    "elect.",
    "setmaxnreg.",
    "wgmma.",
    "cp.async.",
];

/// The instruction of a line, without its guard and what stands before it.
fn meets(text: &str) -> bool {
    let statements = text.split(['{', ';']).map(str::trim);
    statements.map(|s| s.strip_prefix('@').and_then(|s| s.split_once(' ')).map_or(s, |(_, s)| s.trim())).any(|s| {
        let s = s.rsplit_once(": ").map_or(s, |(_, s)| s);
        MEETINGS.iter().any(|m| s.starts_with(m)) || s.contains(".sync.aligned")
    })
}

impl Watch for Sync {
    fn observer<'a>(&'a self, launch: &'a Launch<'a>, _grid: u64) -> Option<Box<dyn Observer + 'a>> {
        let any = launch.kernel.lines.iter().any(|line| line.contains("mbarrier"));
        let observer =
            SyncObserver { findings: &self.findings, blocks: FxHashMap::default(), expected: FxHashMap::default() };
        any.then(|| Box::new(observer) as Box<dyn Observer>)
    }

    fn fault(&self, fault: &Fault) {
        let class = match fault.kind {
            FaultKind::Deadlock => "deadlock",
            FaultKind::IllegalInstruction if meets(&fault.text) => "misuse",
            _ => return,
        };
        self.findings.report(class, of_fault(Checker::Sync, fault));
    }
}

/// Transactions expected of an object's phase.
struct Expected {
    phase: u64,
    bytes: u64,
    place: Place,
}

struct SyncObserver<'a> {
    findings: &'a Findings,
    /// Blocks that run, by cluster.
    blocks: FxHashMap<u64, Vec<u64>>,
    expected: FxHashMap<ObjectPlace, Vec<Expected>>,
}

impl Observer for SyncObserver<'_> {
    fn block(&mut self, b: &BlockSite, event: BlockEvent) {
        if event == BlockEvent::Begin {
            self.blocks.entry(b.cluster).or_default().push(b.block);
            return;
        }
        let left: Vec<_> = self.expected.extract_if(|at, _| at.owner == b.block).collect();
        for e in left.into_iter().flat_map(|(_, list)| list) {
            let message = format!(
                "the block ends, and phase {} of an mbarrier object, which expects {} bytes here, never completed",
                e.phase, e.bytes
            );
            let finding = Finding { checker: Checker::Sync, message, place: Some(e.place), other: None, times: 1 };
            self.findings.report("unfulfilled", finding);
        }
    }

    fn sync(&mut self, site: &Site, event: &SyncEvent) {
        match *event {
            SyncEvent::MbarrierExpect { at, lane, phase, bytes } => {
                let place = Place::new(site, lane as usize);
                self.expected.entry(at).or_default().push(Expected { phase, bytes, place });
            }
            SyncEvent::MbarrierPhase { at, phase } => {
                if let Some(list) = self.expected.get_mut(&at) {
                    list.retain(|e| e.phase > phase);
                }
            }
            SyncEvent::MbarrierInit { at, .. } | SyncEvent::MbarrierInval { at, .. } => {
                self.expected.remove(&at);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::meets;

    #[test]
    fn meetings_are_told_from_other_instructions() {
        assert!(
            meets("@%p bar.sync 0;")
                && meets("L: barrier.cta.sync 1;")
                && meets("{ mbarrier.arrive.shared.b64 %rd1, [%r1]; }")
        );
        assert!(meets("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r2];") && !meets("ld.shared.u32 %r1, [bar];"));
    }
}
