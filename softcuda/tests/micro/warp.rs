//! Exchanges within a warp (PTX ISA 9.7.9.6, 9.7.13): shfl, vote, match, redux, activemask, elect.

use softcuda::exec::FaultKind;

use crate::device::Run;

/// The manual's pseudo-code of `shfl`; `None` for the lane's own value.
fn shfl(mode: &str, lane: i32, b: i32, c: i32) -> (i32, bool) {
    let (bval, cval, segment) = (b & 31, c & 31, c >> 8 & 31);
    let max = (lane & segment) | (cval & !segment & 31);
    let min = lane & segment;
    let (j, p) = match mode {
        "up" => (lane - bval, lane - bval >= max),
        "down" => (lane + bval, lane + bval <= max),
        "bfly" => (lane ^ bval, lane ^ bval <= max),
        _ => {
            let j = min | (bval & !segment & 31);
            (j, j <= max)
        }
    };
    if p { (j, true) } else { (lane, false) }
}

#[test]
fn shfl_in_all_modes() {
    for mode in ["up", "down", "bfly", "idx"] {
        for b in [0, 1, 3, 16, 31, 33] {
            // Whole warps and segments of 8 and 16, with the clamps that compilers use.
            for c in [0x1f, 0, 0x181f, 0x1800, 0x1807, 0x101f] {
                let got = Run::default().per_thread(&format!(
                    "add.u32 %r2, %lane, 100; shfl.sync.{mode}.b32 %r3|%p, %r2, {b}, {c}, 0xffffffff;
                     selp.u32 %r4, 1000, 0, %p; add.u32 %r3, %r3, %r4; st.global.u32 [%out], %r3;"
                ));
                for (lane, got) in got.iter().enumerate() {
                    let (from, p) = shfl(mode, lane as i32, b, c);
                    assert_eq!(*got as i32, from + 100 + if p { 1000 } else { 0 }, "{mode} {b} {c:#x} lane {lane}");
                }
            }
        }
    }
}

#[test]
fn shfl_reads_before_it_writes() {
    let got = Run::default().per_thread(
        "mov.u32 %r2, %lane; shfl.sync.idx.b32 %r2, %r2, 5, 31, -1; xor.b32 %r3, %lane, 7;
         shfl.sync.idx.b32 %r3, %lane, %r3, 31, -1; mad.lo.u32 %r2, %r2, 100, %r3; st.global.u32 [%out], %r2;",
    );
    assert_eq!(got, (0..32).map(|l| 500 + (l ^ 7)).collect::<Vec<u32>>());
}

#[test]
fn votes() {
    let got = Run::default().per_thread(
        "setp.lt.u32 %p, %lane, 5; vote.sync.ballot.b32 %r2, %p, -1; vote.sync.ballot.b32 %r3, !%p, 0xffffffff;
         xor.b32 %r4, %r2, %r3; vote.sync.any.pred %p1, %p, -1; vote.sync.all.pred %p2, %p, -1; vote.sync.uni.pred %p3, %p, -1;
         setp.lt.u32 %q, %lane, 32; vote.sync.uni.pred %p4, %q, -1; vote.sync.all.pred %p5, %q, -1;
         selp.u32 %r5, 1, 0, %p1; selp.u32 %r6, 2, 0, %p2; selp.u32 %r7, 4, 0, %p3; selp.u32 %r8, 8, 0, %p4;
         selp.u32 %r9, 16, 0, %p5; add.u32 %r5, %r5, %r6; add.u32 %r5, %r5, %r7; add.u32 %r5, %r5, %r8;
         add.u32 %r5, %r5, %r9; shl.b32 %r2, %r2, 8; or.b32 %r5, %r5, %r2; and.b32 %r4, %r4, 0x10000; or.b32 %r5, %r5, %r4;
         st.global.u32 [%out], %r5;",
    );
    assert_eq!(got, [0x1f00 | 0x10000 | 25; 32]);
}

#[test]
fn matches() {
    let got = Run::default().per_thread(
        "and.b32 %r2, %lane, 3; match.any.sync.b32 %r3, %r2, -1; match.all.sync.b32 %r4|%p, %r2, -1;
         cvt.u64.u32 %rd0, %r2; shl.b64 %rd0, %rd0, 40; match.any.sync.b64 %r5, %rd0, -1; xor.b32 %r5, %r5, %r3;
         mov.u32 %r6, 9; match.all.sync.b32 %r7|%q, %r6, -1; not.b32 %r7, %r7; or.b32 %r5, %r5, %r7; or.b32 %r5, %r5, %r4;
         @%p mov.u32 %r5, 77; @!%q mov.u32 %r5, 78; add.u32 %r3, %r3, %r5; st.global.u32 [%out], %r3;",
    );
    assert_eq!(got, (0..32).map(|l| 0x1111_1111u32 << (l & 3)).collect::<Vec<_>>());
}

#[test]
fn reductions() {
    let v: Vec<u32> = (0..32u32).map(|l| l.wrapping_mul(0x9e37_79b9)).collect();
    let cases: [(&str, u32); 8] = [
        ("add.u32", v.iter().fold(0, |a, b| a.wrapping_add(*b))),
        ("add.s32", v.iter().fold(0, |a, b| a.wrapping_add(*b))),
        ("min.u32", *v.iter().min().unwrap()),
        ("max.u32", *v.iter().max().unwrap()),
        ("min.s32", v.iter().map(|&x| x as i32).min().unwrap() as u32),
        ("max.s32", v.iter().map(|&x| x as i32).max().unwrap() as u32),
        ("xor.b32", v.iter().fold(0, |a, b| a ^ b)),
        ("or.b32", v.iter().fold(0, |a, b| a | b)),
    ];
    for (op, want) in cases {
        let got = Run::default().per_thread(&format!(
            "mul.lo.u32 %r2, %lane, 0x9e3779b9; redux.sync.{op} %r3, %r2, 0xffffffff; st.global.u32 [%out], %r3;"
        ));
        assert_eq!(got, vec![want; 32], "{op}");
    }
}

#[test]
fn subsets_take_part_apart() {
    // Both halves of the warp run the same instruction with masks of their own.
    let got = Run::default().per_thread(
        "setp.lt.u32 %p, %lane, 16; selp.b32 %r2, 0x0000ffff, 0xffff0000, %p; redux.sync.add.u32 %r3, %lane, %r2;
         st.global.u32 [%out], %r3;",
    );
    assert_eq!(got, [[120; 16], [376; 16]].concat());
    // In a branch only its lanes are active; elect names the lowest.
    let got = Run::default().per_thread(
        "setp.ge.u32 %p, %lane, 20; mov.u32 %r3, 0; @!%p bra DONE; activemask.b32 %r2; elect.sync %r4|%q, %r2;
         selp.u32 %r5, 1000, 0, %q; add.u32 %r3, %r4, %r5; popc.b32 %r6, %r2; mad.lo.u32 %r3, %r6, 10000, %r3;
         DONE: st.global.u32 [%out], %r3;",
    );
    let want = |l: u32| if l < 20 { 0 } else { 120_020 + if l == 20 { 1000 } else { 0 } };
    assert_eq!(got, (0..32).map(want).collect::<Vec<_>>());
}

#[test]
fn lanes_that_arrive_late_are_waited_for() {
    // The odd lanes take a loop before they come to the same shuffle.
    let got = Run::default().per_thread(
        "and.b32 %r2, %lane, 1; setp.eq.u32 %p, %r2, 0; mov.u32 %r3, %lane; @%p bra MEET; mov.u32 %r4, 0;
         LOOP: add.u32 %r4, %r4, 1; add.u32 %r3, %r3, 100; setp.lt.u32 %q, %r4, 3; @%q bra LOOP;
         MEET: shfl.sync.bfly.b32 %r5, %r3, 1, 31, -1; st.global.u32 [%out], %r5;",
    );
    let want = |l: u32| (l ^ 1) + if l % 2 == 0 { 300 } else { 0 };
    assert_eq!(got, (0..32).map(want).collect::<Vec<_>>());
    // `bar.warp.sync` may be met in both branches.
    let got = Run::default().per_thread(
        ".shared .align 4 .b8 s[128]; mov.u32 %r2, s; mad.lo.u32 %r3, %lane, 4, %r2; setp.lt.u32 %p, %lane, 16;
         xor.b32 %r4, %lane, 16; mad.lo.u32 %r4, %r4, 4, %r2; @%p bra LOW;
         st.shared.u32 [%r3], %lane; bar.warp.sync 0xffffffff; ld.shared.u32 %r5, [%r4]; bra END;
         LOW: st.shared.u32 [%r3], %lane; bar.warp.sync 0xffffffff; ld.shared.u32 %r5, [%r4];
         END: st.global.u32 [%out], %r5;",
    );
    assert_eq!(got, (0..32).map(|l| l ^ 16).collect::<Vec<u32>>());
}

/// The manual asks for the same instruction with the same qualifiers and mask, not for the same place.
#[test]
fn exchanges_meet_at_different_places() {
    let branches = |low: &str, high: &str| {
        Run::default().per_thread(&format!(
            "setp.lt.u32 %p, %lane, 16; mul.lo.u32 %r2, %lane, 3; setp.eq.u32 %q, %lane, 20; @%p bra LOW;
             {high} bra END; LOW: {low} END: st.global.u32 [%out], %r3;"
        ))
    };
    let got = branches("shfl.sync.bfly.b32 %r3, %r2, 16, 31, -1;", "shfl.sync.bfly.b32 %r3, %lane, 16, 31, -1;");
    assert_eq!(got, (0..32).map(|l| if l < 16 { l + 16 } else { (l - 16) * 3 }).collect::<Vec<u32>>());
    let got = branches("vote.sync.ballot.b32 %r3, !%q, -1;", "vote.sync.ballot.b32 %r3, %q, -1;");
    assert_eq!(got, [0x0010_ffff; 32]);
    let got = branches("redux.sync.add.u32 %r3, 1, -1;", "redux.sync.add.u32 %r3, %lane, -1;");
    assert_eq!(got, [16 + (16..32).sum::<u32>(); 32]);
    let got = branches("match.any.sync.b32 %r3, 16, -1;", "match.any.sync.b32 %r3, %lane, -1;");
    assert_eq!(got, (0..32).map(|l: u32| if l <= 16 { 0x0001_ffff } else { 1 << l }).collect::<Vec<u32>>());
    // Another operation or another mask is not met.
    for (low, high) in [
        ("shfl.sync.bfly.b32 %r3, %r2, 16, 31, -1;", "shfl.sync.idx.b32 %r3, %r2, 16, 31, -1;"),
        ("redux.sync.add.u32 %r3, 1, -1;", "redux.sync.add.s32 %r3, 1, -1;"),
        ("redux.sync.add.u32 %r3, 1, -1;", "redux.sync.add.u32 %r3, 1, 0xfffffffe;"),
    ] {
        let fault = Run::default()
            .try_per_thread(&format!("setp.lt.u32 %p, %lane, 16; @%p bra LOW; {high} bra END; LOW: {low} END: ret;"))
            .unwrap_err();
        assert_eq!(fault.kind, FaultKind::Deadlock, "{low} {high}: {fault}");
    }
}

#[test]
fn exited_lanes_are_not_waited_for() {
    let got = Run::default().per_thread(
        "setp.ge.u32 %p, %lane, 24; st.global.u32 [%out], 1; @%p exit; redux.sync.add.u32 %r2, %lane, -1; st.global.u32 [%out], %r2;",
    );
    assert_eq!(got, [vec![276; 24], vec![1; 8]].concat());
}

#[test]
fn what_can_never_be_met_is_a_fault() {
    let run = Run::default();
    let fault = run
        .try_per_thread(
            "setp.eq.u32 %p, %lane, 3; @%p bra SKIP; shfl.sync.idx.b32 %r2, %lane, 0, 31, -1; SKIP: bar.sync 0;",
        )
        .unwrap_err();
    assert_eq!(fault.kind, FaultKind::Deadlock, "{fault}");
    assert!(fault.message.contains("0xfffffff7") && fault.message.contains("shfl.sync"), "{fault}");
    let fault = run.try_per_thread("shfl.sync.idx.b32 %r2, %lane, 0, 31, 0xffff;").unwrap_err();
    assert_eq!(fault.kind, FaultKind::IllegalInstruction, "{fault}");
    assert!(fault.message.contains("lane 16 is not in its own member mask"), "{fault}");
}
