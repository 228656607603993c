//! Conflicts as findings.

use super::cell::{Conflict, Stamp};
use super::home::Home;
use super::launches::Earlier;
use crate::check::{Checker, Finding, Findings, Place};
use crate::exec::Launch;
use crate::exec::observe::{AccessKind, Engine, MemoryEvent, Site};
use crate::ptx::ast::Space;

/// Two lanes of one instruction write different values to one place.
pub fn same_store(findings: &Findings, site: &Site, event: &MemoryEvent, c: &Conflict) {
    let at = place(event, c.lane);
    let message = format!("two lanes of one store write different values {at}");
    let (here, other) = (Place::new(site, c.lane as usize), Place::new(site, c.other_lane as usize));
    note(findings, "lanes", message, here, other);
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
    let other = Place {
        kernel: earlier.map_or_else(|| here.kernel.clone(), |e| e.kernel.clone()),
        line: c.other.line(),
        text: lines.get((c.other.line() as usize).wrapping_sub(1)).map_or("", |l| l.trim()).to_owned(),
        block: [(block % gx) as u32, (block / gx % gy) as u32, (block / gx / gy) as u32],
        // Products are told by the first warp of their warpgroup.
        warp: if index < warps_per_block { index } else { (index - warps_per_block) * 4 % warps_per_block },
        lane: c.other_lane,
    };
    let who = if earlier.is_some() {
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
    let names = ["read", "write", "atomic access"];
    let kind = match event.kind {
        AccessKind::Read => names[0],
        AccessKind::Write => names[1],
        AccessKind::Atomic => names[2],
    };
    let (earlier, at) = (names[c.other.kind() as usize], place(event, c.lane));
    let scope = if me.strong() && c.other.strong() { ": their scopes do not include each other" } else { "" };
    let message = format!("{kind} {at} is not ordered after the {earlier} by {who}{scope}");
    let message =
        if matches!(event.engine, Engine::Wgmma | Engine::Bulk) { format!("asynchronous {message}") } else { message };
    let class = match (event.kind, c.other.kind()) {
        (AccessKind::Read, _) => "read after write",
        (_, 0) => "write after read",
        _ => "write after write",
    };
    note(findings, class, message, here, other);
}

fn place(event: &MemoryEvent, lane: u32) -> String {
    let (bytes, address) = (event.bytes, event.addresses[lane as usize & 31]);
    let space = if event.space == Space::Shared { "shared" } else { "global" };
    format!("of {bytes} bytes of {space} memory at {address:#x}")
}

fn note(findings: &Findings, class: &'static str, message: String, here: Place, other: Place) {
    let finding = Finding { checker: Checker::Race, message, place: Some(here), other: Some(other), times: 1 };
    findings.report(class, finding);
}
