//! Block barriers (PTX ISA 9.7.13.1).

use softcuda::exec::{Config, FaultKind};

use crate::device::Run;

fn seeded(block: u32, seed: u64) -> Run {
    Run { block, config: Config { seed, ..Run::default().config }, ..Run::default() }
}

#[test]
fn all_warps_wait() {
    for seed in 0..8 {
        let got = seeded(256, seed).per_thread(
            ".shared .align 4 .b8 s[1024]; mov.u32 %r2, s; mad.lo.u32 %r3, %thread, 4, %r2; st.shared.u32 [%r3], %thread; bar.sync 0;
             xor.b32 %r4, %thread, 255; mad.lo.u32 %r4, %r4, 4, %r2; ld.shared.u32 %r5, [%r4]; barrier.sync 3; st.shared.u32 [%r3], %r5;
             bar.sync 0; ld.shared.u32 %r6, [%r4]; mad.lo.u32 %r5, %r5, 1000, %r6; st.global.u32 [%out], %r5;",
        );
        assert_eq!(got, (0..256).map(|t| (255 - t) * 1000 + t).collect::<Vec<u32>>());
    }
}

#[test]
fn reductions() {
    let got = seeded(128, 1).per_thread(
        "setp.lt.u32 %p, %thread, 70; bar.red.popc.u32 %r2, 0, %p; bar.red.and.pred %p1, 0, %p; bar.red.or.pred %p2, 0, %p;
         bar.red.popc.u32 %r3, 1, 128, !%p; barrier.red.and.pred %p3, 2, %p2; selp.u32 %r4, 1, 0, %p1; selp.u32 %r5, 2, 0, %p2;
         selp.u32 %r6, 4, 0, %p3; add.u32 %r4, %r4, %r5; add.u32 %r4, %r4, %r6; mad.lo.u32 %r2, %r2, 1000, %r3;
         mad.lo.u32 %r2, %r2, 10, %r4; st.global.u32 [%out], %r2;",
    );
    assert_eq!(got, [(70 * 1000 + 58) * 10 + 6; 128]);
}

#[test]
fn producers_arrive_and_consumers_wait() {
    for seed in 0..8 {
        let got = seeded(128, seed).per_thread(
            ".shared .align 4 .b8 s[256]; mov.u32 %r2, s; setp.lt.u32 %p, %thread, 64; @!%p bra CONSUMER;
             mad.lo.u32 %r3, %thread, 4, %r2; mul.lo.u32 %r4, %thread, 7; st.shared.u32 [%r3], %r4; bar.arrive 1, 128;
             st.global.u32 [%out], %thread; ret;
             CONSUMER: bar.sync 1, 128; sub.u32 %r3, %thread, 64; mad.lo.u32 %r3, %r3, 4, %r2; ld.shared.u32 %r4, [%r3];
             st.global.u32 [%out], %r4;",
        );
        assert_eq!(got, (0..64).chain((0..64).map(|t| 7 * t)).collect::<Vec<u32>>());
    }
}

#[test]
fn exited_threads_are_not_waited_for() {
    let got = seeded(128, 0).per_thread(
        "st.global.u32 [%out], 1; setp.ge.u32 %p, %thread, 40; @%p exit; bar.sync 0; st.global.u32 [%out], 2;",
    );
    assert_eq!(got, [vec![2; 40], vec![1; 88]].concat());
}

#[test]
fn unaligned_barriers_in_divergent_code() {
    // Two different `barrier.sync` instructions, one for each half of every warp, are one barrier.
    let got = seeded(64, 0).per_thread(
        ".shared .align 4 .b8 s[256]; mov.u32 %r2, s; mad.lo.u32 %r3, %thread, 4, %r2; xor.b32 %r4, %thread, 16; mad.lo.u32 %r4, %r4, 4, %r2;
         st.shared.u32 [%r3], %thread; setp.lt.u32 %p, %lane, 16; @%p bra LOW; barrier.sync 0; bra END; LOW: barrier.sync 0;
         END: ld.shared.u32 %r5, [%r4]; st.global.u32 [%out], %r5;",
    );
    assert_eq!(got, (0..64).map(|t| t ^ 16).collect::<Vec<u32>>());
}

#[test]
fn misuse_is_a_fault() {
    let fault = |body: &str| seeded(64, 0).try_per_thread(body).unwrap_err();
    // Aligned barriers in two branches of a divergent warp.
    let f = fault("setp.lt.u32 %p, %lane, 16; @%p bra LOW; bar.sync 0; bra END; LOW: bar.sync 0; END: ret;");
    assert_eq!(f.kind, FaultKind::Deadlock, "{f}");
    // One warp does not come.
    let f = fault("setp.lt.u32 %p, %thread, 32; @%p bra LOW; bar.sync 1; LOW: bar.sync 0;");
    assert_eq!(f.kind, FaultKind::Deadlock, "{f}");
    assert!(f.message.contains("warp 0") && f.message.contains("bar.sync 1"), "{f}");
    let f = fault("setp.lt.u32 %p, %thread, 16; @%p bar.sync 0; ret;");
    assert_eq!(f.kind, FaultKind::IllegalInstruction, "{f}");
    let f = fault("bar.sync 0, 96;");
    assert_eq!(f.kind, FaultKind::Deadlock, "{f}");
    let f = fault("mov.u32 %r2, 16; bar.sync %r2;");
    assert!(f.message.contains("barrier 16"), "{f}");
    let f = fault("setp.lt.u32 %p, %thread, 32; @%p bra LOW; bar.sync 0, 64; LOW: bar.sync 0;");
    assert_eq!(f.kind, FaultKind::IllegalInstruction, "{f}");
}
