//! Conflicts as findings.

use super::cell::{Conflict, Stamp};
use super::home::Home;
use super::launches::{Earlier, Operation};
use crate::check::{Checker, Finding, Findings, Place};
use crate::exec::Launch;
use crate::exec::observe::{AccessKind, Engine, MemoryEvent, Site};
use crate::ptx::ast::Space;

/// Two lanes of one instruction write different values to one place.
pub fn same_store(findings: &Findings, site: &Site, event: &MemoryEvent, c: &Conflict) {
    let at = place(event, c.lane);
    let message = format!("two lanes of one store write different values {at}");
    let (here, other) = (Place::new(site, c.lane as usize), Place::new(site, c.other_lane as usize));
    note(findings, "lanes", message, Some(here), Some(other));
}

pub fn conflict(
    findings: &Findings,
    (launch, earlier): (&Launch, Option<&Earlier>),
    site: &Site,
    event: &MemoryEvent,
    home: &Home,
    (c, me): (&Conflict, Stamp),
) {
    let here = Place::new(site, c.lane as usize);
    let warps_per_block = earlier.map_or(home.warps_per_block, |e| e.warps_per_block);
    let stride = if earlier.is_some() { Home::stride_of(warps_per_block) } else { home.stride.max(1) };
    let rank = (c.other.warp() / stride) as usize;
    let index = c.other.warp() % stride;
    let own = earlier.is_none() && c.other.home == home.id;
    let block = if own { home.blocks.get(rank).map_or(0, |b| b.linear) } else { u64::from(c.other.home) + rank as u64 };
    let (lines, grid) = earlier.map_or((&site.kernel.lines, launch.grid), |e| (&e.lines, e.grid));
    let [gx, gy, _] = grid.map(u64::from);
    let by_driver = earlier.and_then(|e| e.operation);
    let other = Place {
        kernel: earlier.map_or_else(|| here.kernel.clone(), |e| e.kernel.clone()),
        line: c.other.line(),
        text: lines.get((c.other.line() as usize).wrapping_sub(1)).map_or("", |l| l.trim()).to_owned(),
        block: [(block % gx) as u32, (block / gx % gy) as u32, (block / gx / gy) as u32],
        warp: index_of_warp(index, warps_per_block),
        lane: c.other_lane,
    };
    let who = if let Some(operation) = by_driver {
        match operation {
            Operation::Copy => "a copy, which no stream and no event orders before this launch",
            Operation::Set => "a `cuMemset`, which no stream and no event orders before this launch",
            Operation::Free => "a release of the memory, which no stream and no event orders before this launch",
        }
    } else if earlier.is_some() {
        "another launch, which no stream and no event orders before this one"
    } else if !own {
        "another block"
    } else if block != site.block {
        "another block of the cluster"
    } else if index >= home.warps_per_block {
        if index + 1 == stride { "a bulk copy" } else { "a `wgmma`" }
    } else if c.other.warp() != me.warp() {
        "another warp"
    } else {
        "another lane of the warp"
    };
    let kind = match event.kind {
        AccessKind::Read => NAMES[0],
        AccessKind::Write => NAMES[1],
        AccessKind::Atomic => NAMES[2],
    };
    let (earlier, at) = (NAMES[c.other.kind() as usize], place(event, c.lane));
    let scope = if me.strong() && c.other.strong() { ": their scopes do not include each other" } else { "" };
    let message = format!("{kind} {at} is not ordered after the {earlier} by {who}{scope}");
    let message =
        if matches!(event.engine, Engine::Wgmma | Engine::Bulk) { format!("asynchronous {message}") } else { message };
    let class = match (event.kind, c.other.kind()) {
        (AccessKind::Read, _) => "read after write",
        (_, 0) => "write after read",
        _ => "write after write",
    };
    note(findings, class, message, Some(here), by_driver.is_none().then_some(other));
}

/// A conflict of the driver's own: of `operation` in a stream, of `bytes` from an address on.
pub fn of_operation(
    findings: &Findings,
    (operation, writes): (Operation, bool),
    (address, bytes): (u64, u64),
    earlier: &Earlier,
    c: &Conflict,
) {
    let what = match operation {
        Operation::Copy if writes => "copy to",
        Operation::Copy => "copy from",
        Operation::Set => "`cuMemset` of",
        Operation::Free => "release of",
    };
    let kind = NAMES[c.other.kind() as usize];
    let by = match earlier.operation {
        None => "launch",
        Some(Operation::Copy) => "copy",
        Some(Operation::Set) => "`cuMemset`",
        Some(Operation::Free) => "release of the memory",
    };
    let message = format!(
        "{what} {bytes} bytes of global memory at {address:#x} is not ordered after the {kind} by a {by}, which no stream and \
         no event orders before it"
    );
    let class = match (operation, writes, c.other.kind()) {
        (Operation::Free, ..) => "release",
        (_, false, _) => "copy after write",
        (_, true, 0) => "copy after read",
        _ => "copy over write",
    };
    note(findings, class, message, None, earlier.operation.is_none().then(|| place_in(earlier, c)));
}

/// Where an access of an earlier launch was made.
fn place_in(earlier: &Earlier, c: &Conflict) -> Place {
    let stride = Home::stride_of(earlier.warps_per_block);
    let (rank, index) = (c.other.warp() / stride, c.other.warp() % stride);
    let block = u64::from(c.other.home) + u64::from(rank);
    let [gx, gy, _] = earlier.grid.map(u64::from);
    Place {
        kernel: earlier.kernel.clone(),
        line: c.other.line(),
        text: earlier.lines.get((c.other.line() as usize).wrapping_sub(1)).map_or("", |l| l.trim()).to_owned(),
        block: [(block % gx) as u32, (block / gx % gy) as u32, (block / gx / gy) as u32],
        warp: index_of_warp(index, earlier.warps_per_block),
        lane: c.other_lane,
    }
}

/// Of what stands for a warp: products are told by the first warp of their warpgroup.
fn index_of_warp(index: u32, warps_per_block: u32) -> u32 {
    if index < warps_per_block { index } else { (index - warps_per_block) * 4 % warps_per_block }
}

/// By a stamp's kind.
const NAMES: [&str; 3] = ["read", "write", "atomic access"];

fn place(event: &MemoryEvent, lane: u32) -> String {
    let (bytes, address) = (event.bytes, event.addresses[lane as usize & 31]);
    let space = if event.space == Space::Shared { "shared" } else { "global" };
    format!("of {bytes} bytes of {space} memory at {address:#x}")
}

fn note(findings: &Findings, class: &'static str, message: String, here: Option<Place>, other: Option<Place>) {
    let finding = Finding { checker: Checker::Race, message, place: here, other, times: 1 };
    findings.report(class, finding);
}
