//! Mbarrier objects (PTX ISA 9.7.13.15): phases, counts, transactions, remote arrivals, misuse.

use softcuda::exec::FaultKind;

use crate::device::Buffer;
use crate::hopper::{Hopper, SEEDS, refused};

const MAX: u32 = (1 << 20) - 1;

/// One thread initialises the object `b` for `$count` arrivals.
fn init(count: &str) -> String {
    format!(
        ".shared .align 8 .b64 b; .shared .align 1024 .b8 s[1024]; mov.u32 %r20, b; mov.u32 %r21, s; setp.eq.u32 %p7, %thread, 0;
         @%p7 mbarrier.init.shared::cta.b64 [b], {count}; bar.sync 0;\n"
    )
}

#[test]
fn phases_hand_data_on() {
    // In every phase each thread writes, arrives, waits for the phase, and reads its neighbour's word.
    for wait in [
        "mbarrier.arrive.shared.b64 %rd1, [b]; WAIT: mbarrier.test_wait.shared.b64 %p, [b], %rd1; @!%p bra WAIT;",
        "mbarrier.arrive.release.cta.shared::cta.b64 %rd1, [%r20]; WAIT: mbarrier.try_wait.acquire.cta.shared::cta.b64 %p, [%r20], %rd1, 100; @!%p bra WAIT;",
        "mbarrier.arrive.shared::cta.b64 _, [b]; and.b32 %r9, %r4, 1; WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p, [b], %r9; @!%p bra WAIT;",
        "mbarrier.arrive.shared::cta.b64 _, [b], 1; and.b32 %r9, %r4, 1; WAIT: mbarrier.test_wait.parity.shared.b64 %p, [%r20+0], %r9; @!%p bra WAIT;",
        // Generic addresses.
        "cvt.u64.u32 %rd3, %r20; cvta.shared.u64 %rd3, %rd3; mbarrier.arrive.b64 %rd1, [%rd3]; WAIT: mbarrier.try_wait.b64 %p, [%rd3], %rd1; @!%p bra WAIT;",
    ] {
        let body = format!(
            "{} mov.u32 %r4, 0; mov.u32 %r5, 0; mad.lo.u32 %r6, %thread, 4, %r21;
             LOOP: mad.lo.u32 %r7, %r4, 1000, %thread; and.b32 %r9, %r4, 1; mad.lo.u32 %r8, %r9, 512, %r6; st.shared.u32 [%r8], %r7;
             {wait}
             xor.b32 %r10, %r8, 128; ld.shared.u32 %r10, [%r10]; add.u32 %r5, %r5, %r10;
             add.u32 %r4, %r4, 1; setp.lt.u32 %q, %r4, 5; @%q bra LOOP; st.global.u32 [%out], %r5;",
            init("64")
        );
        let want: Vec<u32> = (0..64).map(|t| 5 * (t ^ 32) + 10000).collect();
        Hopper::row(1, 64, 1).under_seeds(&body, &[], &want);
    }
}

#[test]
fn counts_drops_and_states() {
    // One thread: six arrivals in the first phase, four after two have been dropped.
    let body = format!(
        "{} setp.ne.u32 %p, %thread, 0; @%p exit;
         mbarrier.arrive.noComplete.shared.b64 %rd1, [b], 2; mbarrier.pending_count.b64 %r2, %rd1;
         mbarrier.arrive_drop.shared.b64 %rd2, [b], 2; mbarrier.pending_count.b64 %r3, %rd2;
         mbarrier.test_wait.shared.b64 %p1, [b], %rd1; mbarrier.arrive.shared.b64 %rd3, [b], 2; mbarrier.test_wait.shared.b64 %p2, [b], %rd1;
         mbarrier.test_wait.shared.b64 %p3, [b], %rd3;
         mbarrier.arrive.noComplete.release.cta.b64 %rd4, [%rd9], 1;
         mbarrier.pending_count.b64 %r4, %rd4; mbarrier.test_wait.parity.shared.b64 %p4, [b], 1; mbarrier.test_wait.parity.shared.b64 %p5, [b], 0;
         mbarrier.arrive.shared.b64 _, [b], 3; mbarrier.test_wait.parity.shared.b64 %p6, [b], 1;
         mov.u32 %r5, 0; @%p1 or.b32 %r5, %r5, 1; @%p2 or.b32 %r5, %r5, 2; @%p3 or.b32 %r5, %r5, 4; @%p4 or.b32 %r5, %r5, 8;
         @%p5 or.b32 %r5, %r5, 16; @%p6 or.b32 %r5, %r5, 32;
         mad.lo.u32 %r2, %r2, 10, %r3; mad.lo.u32 %r2, %r2, 10, %r4; mad.lo.u32 %r2, %r2, 1000, %r5; st.global.u32 [%out], %r2;",
        init("6") + "cvt.u64.u32 %rd9, %r20; cvta.shared.u64 %rd9, %rd9;"
    );
    let got = Hopper::default().per_thread(&body, &[]).unwrap();
    // Pending before the arrivals: 6, 4, and in the next phase 4. The first test finds the phase incomplete.
    assert_eq!(got[0], 644_000 + (2 | 4 | 16 | 32));
}

#[test]
fn transactions_complete_phases_in_any_order() {
    // The phase needs one arrival and 3 x 100 transactions, which other threads complete before or after it, each after it has
    // written a word.
    let body = format!(
        "{} setp.eq.u32 %p, %thread, 0; setp.eq.u32 %p1, %thread, 32; setp.eq.u32 %p2, %thread, 64; setp.eq.u32 %p3, %thread, 96;
         @%p mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [b], 200; @%p mbarrier.arrive.expect_tx.shared::cta.b64 %rd1, [b], 100;
         @%p1 st.shared.u32 [s], 1; @%p2 st.shared.u32 [s+4], 20; @%p3 st.shared.u32 [s+8], 300; fence.acq_rel.cta;
         @%p1 mbarrier.complete_tx.shared::cta.b64 [b], 150; @%p2 mbarrier.complete_tx.relaxed.cluster.shared::cluster.b64 [%r20], 50;
         @%p3 mbarrier.complete_tx.shared.b64 [b], 100;
         WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p, [b], 0; @!%p bra WAIT;
         ld.shared.u32 %r2, [s]; ld.shared.u32 %r3, [s+4]; ld.shared.u32 %r4, [s+8]; add.u32 %r2, %r2, %r3; add.u32 %r2, %r2, %r4;
         st.global.u32 [%out], %r2;",
        init("1")
    );
    Hopper::row(1, 128, 1).under_seeds(&body, &[], &[321; 128]);
}

#[test]
fn peers_arrive_and_expect() {
    // Every thread of every other block arrives at block 0's object; block 0 waits and reads what they wrote before.
    for arrive in [
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r6];",
        "mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%r6], 12; mbarrier.complete_tx.shared::cluster.b64 [%r6], 12;",
        "mbarrier.expect_tx.relaxed.cluster.shared::cluster.b64 [%r6], 8; mbarrier.arrive_drop.release.cluster.shared::cluster.b64 _, [%r6], 1; mbarrier.complete_tx.shared::cluster.b64 [%r6], 8;",
    ] {
        let body = format!(
            "{} barrier.cluster.arrive; barrier.cluster.wait; mov.u32 %r5, 0; setp.eq.u32 %p, %rank, 0; @%p bra CONSUMER;
             mapa.shared::cluster.u32 %r6, %r20, 0; mapa.shared::cluster.u32 %r7, %r21, 0; mad.lo.u32 %r8, %rank, 128, %r7;
             mad.lo.u32 %r8, %thread, 4, %r8; st.shared::cluster.u32 [%r8], %t; {arrive} bra END;
             CONSUMER: WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %q, [b], 0; @!%q bra WAIT;
             mad.lo.u32 %r8, %thread, 4, %r21; ld.shared.u32 %r2, [%r8+128]; ld.shared.u32 %r3, [%r8+256]; add.u32 %r5, %r2, %r3;
             END: st.global.u32 [%out], %r5; barrier.cluster.arrive; barrier.cluster.wait;",
            init("64")
        );
        let want: Vec<u32> = (0..96).map(|t| if t < 32 { (32 + t) + (64 + t) } else { 0 }).collect();
        Hopper::row(3, 32, 3).under_seeds(&body, &[], &want);
    }
}

#[test]
fn copies_arrive() {
    let source = Buffer::new(&(0..256u32).map(|i| 7 * i).collect::<Vec<_>>());
    for (count, arrive) in [
        // The arrival of the copy is one more that is expected, so that the thread's own completes the phase with it.
        ("64", "cp.async.mbarrier.arrive.shared::cta.b64 [b]; mbarrier.arrive.shared.b64 %rd2, [b];"),
        ("128", "cp.async.mbarrier.arrive.noinc.shared.b64 [b]; mbarrier.arrive.shared.b64 %rd2, [b];"),
        ("64", "mov.b64 %rd2, 0; cp.async.mbarrier.arrive.noinc.shared.b64 [%r20];"),
    ] {
        let body = format!(
            "{} ld.param.u64 %rd1, [p1]; mul.wide.u32 %rd3, %thread, 16; add.s64 %rd1, %rd1, %rd3; mad.lo.u32 %r4, %thread, 16, %r21;
             cp.async.cg.shared.global [%r4], [%rd1], 16; {arrive}
             WAIT: mbarrier.try_wait.parity.shared.b64 %p, [b], 0; @!%p bra WAIT;
             xor.b32 %r5, %thread, 33; mad.lo.u32 %r5, %r5, 16, %r21; ld.shared.u32 %r6, [%r5+4]; st.global.u32 [%out], %r6;",
            init(count)
        );
        let want: Vec<u32> = (0..64).map(|t| 7 * (4 * (t ^ 33) + 1)).collect();
        Hopper::row(1, 64, 1).under_seeds(&body, &[source.address], &want);
    }
}

#[test]
fn a_wait_ends_without_success_where_nothing_completes_the_phase() {
    let body = format!(
        "{} mov.u32 %r2, 0; WAIT: mbarrier.try_wait.shared.b64 %p, [b], 0, 1000; @%p trap; add.u32 %r2, %r2, 1; setp.lt.u32 %q, %r2, 5;
         @%q bra WAIT; mbarrier.test_wait.shared.b64 %p, [b], 0; @%p add.u32 %r2, %r2, 100; st.global.u32 [%out], %r2;",
        init("1")
    );
    assert_eq!(Hopper::default().per_thread(&body, &[]).unwrap(), [5; 32]);
}

#[test]
fn a_wait_may_end_without_success_before_the_phase_does() {
    // Warp 0 tries once what warp 1 completes later. By the time limit, which is the system's, or by the phase: both are right.
    let body = format!(
        "{} setp.lt.u32 %p, %thread, 32; @%p bra WAITS; mov.u32 %r2, 2; mov.u32 %r3, 0;
         SPIN: add.u32 %r3, %r3, 1; setp.lt.u32 %q, %r3, 20000; @%q bra SPIN; mbarrier.arrive.shared::cta.b64 _, [b]; bra END;
         WAITS: mbarrier.try_wait.parity.shared::cta.b64 %p, [b], 0; selp.u32 %r2, 1, 0, %p; END: st.global.u32 [%out], %r2;",
        init("32")
    );
    let outcome = |seed| Hopper::row(1, 64, 1).seed(seed).per_thread(&body, &[]).unwrap()[0];
    assert_eq!(outcome(0), 1, "seed 0 is patient");
    let outcomes: Vec<u32> = (1..=64).map(outcome).collect();
    assert!(outcomes.contains(&0) && outcomes.contains(&1), "{outcomes:?}");
}

#[test]
fn lanes_wait_for_objects_of_their_own() {
    // Lane l waits for object l % 4, which lane l + 4 ... completes in an order of its own: the warp is apart.
    let body = ".shared .align 8 .b64 b[4]; mov.u32 %r20, b; and.b32 %r2, %thread, 3; mad.lo.u32 %r3, %r2, 8, %r20;
        setp.lt.u32 %p, %thread, 4; @%p mbarrier.init.shared.b64 [%r3], 8; bar.sync 0; mov.u32 %r5, 0;
        setp.eq.u32 %p1, %r2, 0; @%p1 bra FIRST; setp.eq.u32 %p1, %r2, 1; @%p1 bra SECOND; mbarrier.arrive.shared.b64 _, [%r3];
        WAIT: mbarrier.try_wait.parity.shared.b64 %p, [%r3], 0; @!%p bra WAIT; add.u32 %r5, %r5, 1; bra END;
        SECOND: xor.b32 %r4, %r3, 8; mbarrier.arrive.shared.b64 _, [%r4];
        WAIT2: mbarrier.test_wait.parity.shared.b64 %p, [%r3], 0; @!%p bra WAIT2; add.u32 %r5, %r5, 2; bra END;
        FIRST: add.u32 %r4, %r3, 8; mbarrier.arrive.shared.b64 _, [%r4]; add.u32 %r5, %r5, 3;
        WAIT3: mbarrier.try_wait.parity.shared.b64 %p, [%r3], 0; @!%p bra WAIT3; END: add.u32 %r5, %r5, 10; st.global.u32 [%out], %r5;";
    let want: Vec<u32> = (0..32).map(|t| [13, 12, 11, 11][t % 4]).collect();
    Hopper::default().under_seeds(&body.replace("xor.b32 %r4, %r3, 8", "sub.u32 %r4, %r3, 8"), &[], &want);
}

#[track_caller]
fn misuse(body: &str, kind: FaultKind, parts: &[&str]) {
    let f = Hopper::row(2, 32, 2).fault(body, &[]);
    assert_eq!(f.kind, kind, "{f}");
    for part in parts {
        assert!(f.message.contains(part), "{part:?} is not in {f}");
    }
}

#[test]
fn misuse_is_a_fault() {
    use FaultKind::*;
    let one = |text: &str| format!("{} setp.eq.u32 %p, %thread, 0; {text}", init("2"));
    misuse(".shared .b64 b; mbarrier.arrive.shared.b64 _, [b];", IllegalInstruction, &["no mbarrier object at 0x0"]);
    // Bytes that something else has written, a copy of an object, an object twice.
    misuse(
        &one("@%p st.shared.u8 [b+2], 1; @%p mbarrier.arrive.shared.b64 _, [b];"),
        IllegalInstruction,
        &["were overwritten"],
    );
    misuse(
        &one("@%p ld.shared.b64 %rd1, [b]; @%p st.shared.b64 [s], %rd1; @%p mbarrier.arrive.shared.b64 _, [s];"),
        IllegalInstruction,
        &["no mbarrier object"],
    );
    misuse(&one("@%p mbarrier.init.shared.b64 [b], 2;"), IllegalInstruction, &["valid mbarrier object already"]);
    misuse(
        &one("@%p mbarrier.inval.shared.b64 [b]; @%p mbarrier.arrive.shared.b64 _, [b];"),
        IllegalInstruction,
        &["no mbarrier object"],
    );
    // Counts.
    misuse(&one("mov.u32 %r2, 0; @%p mbarrier.init.shared.b64 [s], %r2;"), IllegalInstruction, &["for 0 arrivals"]);
    misuse(
        &one(&format!("mov.u32 %r2, {}; @%p mbarrier.init.shared.b64 [s], %r2;", MAX + 1)),
        IllegalInstruction,
        &["1048576 arrivals"],
    );
    misuse(
        &one("@%p mbarrier.arrive.shared.b64 _, [b], 3;"),
        IllegalInstruction,
        &["3 arrivals, but mbarrier at 0x0, phase 0", "2 of 2 arrivals pending"],
    );
    misuse(
        &one("@%p mbarrier.arrive.noComplete.shared.b64 %rd1, [b], 2;"),
        IllegalInstruction,
        &["`.noComplete` completes the phase"],
    );
    misuse(
        &format!("{} setp.eq.u32 %p, %thread, 0; @%p cp.async.mbarrier.arrive.shared.b64 [b];", init(&MAX.to_string())),
        IllegalInstruction,
        &["one more arrival is expected"],
    );
    misuse(
        &one(&format!("@%p mbarrier.expect_tx.shared.b64 [b], {MAX}; @%p mbarrier.expect_tx.shared.b64 [b], 1;")),
        IllegalInstruction,
        &["the tx-count becomes 1048576"],
    );
    misuse(
        &one(&format!("@%p mbarrier.complete_tx.shared.b64 [b], {MAX}; @%p mbarrier.complete_tx.shared.b64 [b], 1;")),
        IllegalInstruction,
        &["the tx-count becomes -1048576"],
    );
    // Phases.
    misuse(
        &one("mov.u32 %r2, 2; mbarrier.test_wait.parity.shared.b64 %p, [b], %r2;"),
        IllegalInstruction,
        &["parity 2"],
    );
    misuse(
        &one(
            "@!%p exit; mbarrier.arrive.shared.b64 %rd1, [b], 2; mbarrier.arrive.shared.b64 _, [b], 2; mbarrier.test_wait.shared.b64 %q, [b], %rd1;",
        ),
        IllegalInstruction,
        &["a wait for phase 0, which is neither"],
    );
    // Places.
    misuse(&one("mbarrier.arrive.shared.b64 _, [b+4];"), MisalignedAddress, &["not a multiple of 8"]);
    misuse(&one("mbarrier.arrive.shared.b64 _, [b+4096];"), IllegalAddress, &["outside the block's shared memory"]);
    misuse(&one("mbarrier.arrive.b64 _, [%out];"), InvalidAddressSpace, &["not in shared memory"]);
    let peer = "xor.b32 %r2, %rank, 1; mapa.shared::cluster.u32 %r3, %r20, %r2;";
    misuse(
        &one(&format!("{peer} mbarrier.arrive.shared::cta.b64 _, [%r3];")),
        InvalidAddressSpace,
        &["in the shared memory of block"],
    );
    misuse(
        &one(&format!(
            "{peer} cvt.u64.u32 %rd1, %r3; cvta.shared::cluster.u64 %rd1, %rd1; mbarrier.test_wait.parity.b64 %q, [%rd1], 0;"
        )),
        InvalidAddressSpace,
        &["a wait for the mbarrier object", "peer"],
    );
}

#[test]
fn deadlocks_say_who_waits_for_what() {
    for (wait, line) in [
        ("try_wait", "mbarrier.try_wait.parity.shared::cta.b64 %p, [b], 0;"),
        ("test_wait", "mbarrier.test_wait.parity.shared::cta.b64 %p, [b], 0;"),
    ] {
        for seed in 0..SEEDS {
            // Warp 1 never arrives.
            let body = format!(
                "{} setp.gt.u32 %q, %thread, 31; @%q bra OTHER; mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 48;
                 WAIT:
                 mbarrier.{wait}.parity.shared::cta.b64 %p, [b], 0;
                 @!%p bra WAIT;
                 OTHER: bar.sync 1;",
                init("64")
            );
            let f = Hopper::row(1, 64, 1).seed(seed).fault(&body, &[]);
            assert_eq!(f.kind, FaultKind::Deadlock, "{f}");
            for part in [
                line,
                "phase 0 (parity 0)",
                "32 of 64 arrivals pending",
                "tx-count 1536",
                "no copies in flight",
                "warp 1 lanes 0xffffffff",
                "bar.sync 1",
            ] {
                assert!(f.message.contains(part), "{part:?} is not in {f}");
            }
        }
    }
}

#[test]
fn spellings() {
    for text in [
        "mbarrier.arrive.shared::cluster.b64 %rd1, [%r2];",
        "mbarrier.arrive.noComplete.shared::cluster.b64 _, [%r2], 1;",
        "mbarrier.arrive.noComplete.shared.b64 %rd1, [%r2];",
        "mbarrier.arrive.acquire.cta.shared.b64 %rd1, [%r2];",
        "mbarrier.arrive.release.shared.b64 %rd1, [%r2];",
        "mbarrier.arrive.release.gpu.shared.b64 %rd1, [%r2];",
        "mbarrier.init.shared::cluster.b64 [%r2], 1;",
        "mbarrier.init.shared.b64 [%r2], 0;",
        "mbarrier.init.shared.b32 [%r2], 1;",
        "mbarrier.test_wait.shared.b64 %p, [%r2], %rd1, 5;",
        "mbarrier.try_wait.release.cta.shared.b64 %p, [%r2], %rd1;",
        "mbarrier.try_wait.shared::cluster.b64 %p, [%r2], %rd1;",
        "mbarrier.expect_tx.release.cta.shared.b64 [%r2], 1;",
        "cp.async.mbarrier.arrive.shared::cluster.b64 [%r2];",
        "mbarrier.arrive.global.b64 %rd1, [%rd2];",
        "fence.proxy.tensormap::generic.gpu;",
        "fence.proxy.tensormap::generic.acquire.gpu [%rd1], 64;",
        "fence.mbarrier_init.acquire.cluster;",
        "fence.proxy.async.local;",
        "griddepcontrol.launch;",
    ] {
        refused(text);
    }
}

#[test]
fn fences_and_grid_dependencies_are_accepted() {
    let map = Buffer::new(&[0u64; 16]);
    let body = "ld.param.u64 %rd1, [p1]; fence.proxy.async; fence.proxy.async.global; fence.proxy.async.shared::cta; fence.proxy.async.shared::cluster;
        fence.proxy.alias; fence.mbarrier_init.release.cluster; fence.proxy.tensormap::generic.release.gpu;
        fence.proxy.tensormap::generic.acquire.sys [%rd1], 128; fence.acquire.sync_restrict::shared::cluster.cluster;
        fence.release.sync_restrict::shared::cta.cluster; fence.proxy.async::generic.acquire.sync_restrict::shared::cluster.cluster;
        fence.proxy.async::generic.release.sync_restrict::shared::cta.cluster; membar.proxy.alias;
        griddepcontrol.launch_dependents; griddepcontrol.wait; st.global.u32 [%out], 1;";
    assert_eq!(Hopper::default().per_thread(body, &[map.address]).unwrap(), [1; 32]);
    // No memory is touched at the address.
    let body = "fence.proxy.tensormap::generic.acquire.gpu [%out+4096], 128; st.global.u32 [%out], 1;";
    assert_eq!(Hopper::default().per_thread(body, &[]).unwrap(), [1; 32]);
}
