//! Who touches registers of `wgmma` in flight, or before one without a `wgmma.fence`, is told to those that watch (PTX ISA
//! 9.7.15.5.2, 9.7.15.7.1); programs that keep the rules hear nothing.

use std::sync::{Arc, Mutex};

use softcuda::exec::Launch;
use softcuda::exec::observe::{Observer, Site, SyncEvent, Watch};

use crate::warpgroup::{Program64, descriptor};

/// What was told, with the text of its line.
#[derive(Debug, Default)]
struct Ear(Mutex<Vec<(SyncEvent, String)>>);

struct Listener<'a>(&'a Ear);

impl Watch for Ear {
    fn observer<'a>(&'a self, _: &'a Launch<'a>, _: u64) -> Option<Box<dyn Observer + 'a>> {
        Some(Box::new(Listener(self)))
    }
}

impl Observer for Listener<'_> {
    fn sync(&mut self, site: &Site, event: &SyncEvent) {
        if matches!(event, SyncEvent::WgmmaTouch { .. } | SyncEvent::WgmmaUnfenced { .. }) {
            self.0.0.lock().unwrap().push((*event, site.kernel.lines[site.line as usize - 1].trim().to_string()));
        }
    }
}

/// Events of warp 0's like, once each.
fn told(body: &str) -> Vec<(SyncEvent, String)> {
    let ear = Arc::new(Ear::default());
    let program = Program64 {
        threads: 128,
        image: vec![0; 4096],
        registers: 8,
        accumulators: vec![],
        a_words: vec![],
        a: descriptor(0, 128, 256, 0, 0),
        b: descriptor(2048, 128, 256, 0, 0),
        scale: true,
        seed: 0,
        isa: None,
        body: body.replace("; ", ";\n"),
    };
    program.watched(&program.text(), vec![ear.clone()]).unwrap_or_else(|e| panic!("{e}\n{body}"));
    let mut events = std::mem::take(&mut *ear.0.lock().unwrap());
    events.dedup();
    let mut once: Vec<(SyncEvent, String)> = Vec::new();
    for e in events {
        if !once.contains(&e) {
            once.push(e);
        }
    }
    once
}

const FIRST: &str =
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, %da, %db, %scale, 1, 1, 0, 0;";
const SECOND: &str = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d4, %d5, %d6, %d7}, {%a0, %a1, %a2, %a3}, %db, %scale, 1, 1, 0;";
const FENCE: &str = "wgmma.fence.sync.aligned;";
const COMMIT: &str = "wgmma.commit_group.sync.aligned;";
const WAIT: &str = "wgmma.wait_group.sync.aligned 0;";

#[test]
fn programs_that_keep_the_rules_hear_nothing() {
    for body in [
        format!("{FENCE} {FIRST} {SECOND} {COMMIT} {WAIT} mov.b32 %d0, 0;"),
        // Two sets of accumulators in turn: the older one may be used while the newer one is in flight.
        format!(
            "mov.b32 %i, 0; {FENCE} {FIRST} {COMMIT}
             AGAIN: {FENCE} {SECOND} {COMMIT} wgmma.wait_group.sync.aligned 1; add.u32 %d0, %d0, %d1; {FENCE} {FIRST} {COMMIT}
             wgmma.wait_group.sync.aligned 1; add.u32 %d4, %d4, %d5; add.u32 %i, %i, 1; setp.lt.u32 %p, %i, 3; @%p bra AGAIN;
             {WAIT}"
        ),
        // Touched on a way that no product follows.
        format!("{FENCE} {FIRST} {COMMIT} setp.eq.u32 %p, %t, 1000; @%p bra SKIP; {WAIT} add.u32 %d0, %d0, 1; SKIP: {WAIT}"),
    ] {
        assert_eq!(told(&body), [], "{body}");
    }
}

#[test]
fn registers_in_flight() {
    let touch = |number| SyncEvent::WgmmaTouch { number };
    let body = |between: &str| format!("{FENCE} {FIRST} {SECOND} {COMMIT} {between} {WAIT}");
    for (between, number) in [
        ("add.u32 %r0, %d1, 1;", 0),
        ("mov.b32 %d2, 0;", 0),
        ("mov.b32 %a3, 0;", 1),
        ("add.u32 %r0, %a0, 1;", 1),
        ("st.shared.b32 [%s], %d5;", 1),
    ] {
        assert_eq!(told(&body(between)), [(touch(number), between.to_string())], "{between}");
    }
    // Only where it really happens: the branch is not taken.
    let untaken = body("setp.eq.u32 %p, %t, 1000; @%p mov.b32 %d2, 0;");
    assert_eq!(told(&untaken), []);
    // The group that a wait leaves in flight.
    let kept =
        format!("{FENCE} {FIRST} {COMMIT} {SECOND} {COMMIT} wgmma.wait_group.sync.aligned 1; mov.b32 %d0, %d4; {WAIT}");
    assert_eq!(told(&kept), [(touch(1), "mov.b32 %d0, %d4;".to_string())]);
}

#[test]
fn fences_that_are_missing() {
    let lines = |body: &str| {
        let events = told(body);
        assert!(events.iter().all(|(e, _)| matches!(e, SyncEvent::WgmmaUnfenced { .. })), "{events:?}");
        events.into_iter().map(|(_, line)| line).collect::<Vec<_>>()
    };
    let none: [String; 0] = [];
    // The loads of the accumulators come before.
    assert_eq!(lines(&format!("{FIRST} {COMMIT} {WAIT}")), [FIRST]);
    assert_eq!(lines(&format!("{FENCE} mov.b32 %d0, 0; {FIRST} {COMMIT} {WAIT}")), [FIRST]);
    assert_eq!(lines(&format!("{FENCE} mov.b32 %a0, 0; {FIRST} {COMMIT} {WAIT}")), none);
    assert_eq!(lines(&format!("{FENCE} mov.b32 %a0, 0; {SECOND} {COMMIT} {WAIT}")), [SECOND]);
    // Products of one shape follow one another without a fence.
    assert_eq!(lines(&format!("{FENCE} {FIRST} {COMMIT} {FIRST} {COMMIT} {WAIT}")), none);
    let used = format!("{FENCE} {FIRST} {COMMIT} {WAIT} add.u32 %d0, %d0, 1; {FIRST} {COMMIT} {WAIT}");
    assert_eq!(lines(&used), [FIRST]);
}
