//! Control flow (PTX ISA 9.7.12): divergence, loops, indexed branches, calls, spinning, faults.

use softcuda::exec::{Config, FaultKind};

use crate::device::{Buffer, Run};

#[test]
fn nested_divergence_in_loops() {
    // Collatz steps: every lane leaves the loop at another time, and both branches of its body are taken.
    let got = Run { block: 64, ..Run::default() }.per_thread(
        "add.u32 %r2, %t, 1; mov.u32 %r3, 0;
         LOOP: setp.eq.u32 %p, %r2, 1; @%p bra DONE; and.b32 %r4, %r2, 1; setp.eq.u32 %q, %r4, 1; @%q bra ODD;
         shr.u32 %r2, %r2, 1; bra NEXT;
         ODD: mad.lo.u32 %r2, %r2, 3, 1;
         NEXT: add.u32 %r3, %r3, 1; bra LOOP;
         DONE: st.global.u32 [%out], %r3;",
    );
    let steps = |mut n: u64| {
        let mut s = 0;
        while n != 1 {
            n = if n % 2 == 1 { 3 * n + 1 } else { n / 2 };
            s += 1;
        }
        s
    };
    assert_eq!(got, (1..=64).map(steps).collect::<Vec<u32>>());
}

#[test]
fn lanes_meet_again_after_branches_and_loops() {
    // After any divergence the warp is whole again: activemask says so.
    let got = Run::default().per_thread(
        "and.b32 %r2, %lane, 3; setp.eq.u32 %p, %r2, 0; @%p bra A; setp.eq.u32 %q, %r2, 1; @%q bra B; bra C;
         A: add.u32 %r2, %r2, 5; B: add.u32 %r2, %r2, 7;
         C: activemask.b32 %r3; mov.u32 %r4, %lane;
         LOOP: setp.eq.u32 %p, %r4, 0; @%p bra OUT; sub.u32 %r4, %r4, 1; bra LOOP;
         OUT: activemask.b32 %r5; and.b32 %r3, %r3, %r5; st.global.u32 [%out], %r3;",
    );
    assert_eq!(got, [u32::MAX; 32]);
}

#[test]
fn indexed_branches() {
    let got = Run::default().per_thread(
        "and.b32 %r2, %lane, 3; TABLE: .branchtargets A, B, A, C; brx.idx %r2, TABLE;
         A: mov.u32 %r3, 10; bra END; B: mov.u32 %r3, 20; bra END; C: mov.u32 %r3, 30;
         END: st.global.u32 [%out], %r3;",
    );
    assert_eq!(got, (0..32).map(|l| [10, 20, 10, 30][l % 4]).collect::<Vec<_>>());
    let fault = Run::default().try_per_thread("TABLE: .branchtargets A; brx.idx %lane, TABLE; A: ret;").unwrap_err();
    assert_eq!(fault.kind, FaultKind::InvalidPc);
    assert!(fault.message.contains("index 1 of 1"), "{fault}");
}

#[test]
fn predicated_instructions_and_exits() {
    let got = Run::default().per_thread(
        "setp.lt.u32 %p, %lane, 8; mov.u32 %r2, 1; @%p mov.u32 %r2, 2; @!%p add.u32 %r2, %r2, 10;
         st.global.u32 [%out], %r2; setp.ge.u32 %q, %lane, 30; @%q ret; st.global.u32 [%out], %lane; @%p exit;
         st.global.u32 [%out], 99;",
    );
    let want = |l: u32| {
        if l >= 30 {
            11
        } else if l < 8 {
            l
        } else {
            99
        }
    };
    assert_eq!(got, (0..32).map(want).collect::<Vec<_>>());
}

#[test]
fn calls_are_expanded() {
    let run = Run {
        outside: "
            .func (.param .b32 result) square(.param .b32 x) {
                .reg .b32 %a; ld.param.b32 %a, [x]; mul.lo.u32 %a, %a, %a; st.param.b32 [result], %a; ret;
            }
            .func (.reg .u32 result) twice(.reg .u32 x) {
                .reg .pred %p; setp.gt.u32 %p, x, 15; @%p bra BIG; add.u32 result, x, x; ret;
                BIG: mov.u32 result, 1; ret;
            }
            .func (.param .b32 result) both(.param .b32 x) {
                .reg .b32 %a, %b; ld.param.b32 %a, [x];
                { .param .b32 arg; .param .b32 back; st.param.b32 [arg], %a; call.uni (back), square, (arg); ld.param.b32 %b, [back]; }
                call (%a), twice, (%a); add.u32 %a, %a, %b; st.param.b32 [result], %a;
            }"
        .into(),
        ..Run::default()
    };
    // `both` ends without `ret`: what follows its body is the call's end.
    let got = run.per_thread(
        "mov.u32 %r3, 0; setp.ne.u32 %p, %lane, 4;
         { .param .b32 arg; .param .b32 back; st.param.b32 [arg], %lane; @%p call.uni (back), both, (arg); ld.param.b32 %r4, [back]; selp.b32 %r3, %r4, 0, %p; }
         st.global.u32 [%out], %r3;",
    );
    let want = |l: u32| if l == 4 { 0 } else { l * l + if l > 15 { 1 } else { 2 * l } };
    assert_eq!(got, (0..32).map(want).collect::<Vec<_>>());
}

#[test]
fn a_lock_between_lanes_of_a_warp_makes_progress() {
    // Every lane takes the lock in turn; the holder is in the same warp as those that spin.
    let lock = Buffer::new(&[0u32, 0]);
    for seed in 0..4 {
        let lock_body = format!(
            ".reg .pred %p; .reg .b64 %l; .reg .b32 %r, %v; ld.param.u64 %l, [p0];
             SPIN: atom.acquire.gpu.global.cas.b32 %r, [%l], 0, 1; setp.ne.u32 %p, %r, 0; @%p bra SPIN;
             ld.global.u32 %v, [%l+4]; add.u32 %v, %v, {}; st.global.u32 [%l+4], %v; membar.gl;
             atom.release.gpu.global.exch.b32 %r, [%l], 0; ret;",
            1
        );
        let run = Run { block: 96, config: Config { seed, ..Run::default().config }, ..Run::default() };
        run.run(&lock_body, &[lock.address]).unwrap();
    }
    assert_eq!(lock.read::<u32>(), [0, 4 * 96]);
}

#[test]
fn a_grid_barrier_makes_progress() {
    for threads in [1, 3] {
        let cells = Buffer::new(&[0u32; 2]);
        let out = Buffer::new(&[0u32; 40]);
        let run =
            Run { grid: 40, cooperative: true, config: Config { threads, ..Run::default().config }, ..Run::default() };
        run.run(
            ".reg .pred %p, %q; .reg .b64 %c, %o; .reg .b32 %r, %t, %b, %n;
             ld.param.u64 %c, [p0]; ld.param.u64 %o, [p1]; mov.u32 %t, %tid.x; mov.u32 %b, %ctaid.x; mov.u32 %n, %nctaid.x;
             setp.ne.u32 %p, %t, 0; @%p bra SYNC; red.global.add.u32 [%c+4], %b; membar.gl; red.release.gpu.global.add.u32 [%c], 1;
             WAIT: ld.acquire.gpu.global.u32 %r, [%c]; setp.lt.u32 %q, %r, %n; @%q bra WAIT;
             SYNC: bar.sync 0; ld.relaxed.gpu.global.u32 %r, [%c+4]; mad.wide.u32 %o, %b, 4, %o; @!%p st.global.u32 [%o], %r; ret;",
            &[cells.address, out.address],
        )
        .unwrap();
        assert_eq!(out.read::<u32>(), [780; 40]);
    }
}

#[test]
fn later_blocks_may_be_waited_for() {
    // Block 0 spins until the last of 200 blocks has run, with a small resident set.
    let cell = Buffer::new(&[0u32]);
    let config = Config { max_resident_blocks: 4, ..Run::default().config };
    Run { grid: 200, config, ..Run::default() }
        .run(
            ".reg .pred %p; .reg .b64 %c; .reg .b32 %b, %r; ld.param.u64 %c, [p0]; mov.u32 %b, %ctaid.x; setp.eq.u32 %p, %b, 0; @%p bra WAIT;
             setp.eq.u32 %p, %b, 199; @%p st.release.gpu.global.u32 [%c], 1; ret;
             WAIT: ld.acquire.gpu.global.u32 %r, [%c]; setp.eq.u32 %p, %r, 0; nanosleep.u32 100; @%p bra WAIT; ret;",
            &[cell.address],
        )
        .unwrap();
}

#[test]
fn blocks_that_meet_barriers_while_they_wait_make_progress() {
    // Every block waits for the next one, all of its warps meeting at a barrier in each turn of the loop.
    let cell = Buffer::new(&[0u32; 30]);
    Run { grid: 30, block: 64, ..Run::default() }
        .run(
            ".reg .pred %p; .reg .b64 %c; .reg .b32 %b, %r, %t; ld.param.u64 %c, [p0]; mov.u32 %b, %ctaid.x; mov.u32 %t, %tid.x;
             mad.wide.u32 %c, %b, 4, %c; setp.eq.u32 %p, %b, 29; @%p bra DONE;
             WAIT: bar.sync 0; ld.volatile.global.u32 %r, [%c+4]; setp.eq.u32 %p, %r, 0; bar.red.or.pred %p, 0, %p; @%p bra WAIT;
             DONE: setp.eq.u32 %p, %t, 0; @%p st.release.gpu.global.u32 [%c], 1; ret;",
            &[cell.address],
        )
        .unwrap();
    assert_eq!(cell.read::<u32>(), [1; 30]);
}

#[test]
fn endless_loops_end_in_a_timeout() {
    let config = Config { timeout: Some(std::time::Duration::from_millis(100)), ..Run::default().config };
    let fault = Run { config, ..Run::default() }.try_per_thread("LOOP: bra LOOP;").unwrap_err();
    assert_eq!(fault.kind, FaultKind::LaunchTimeout, "{fault}");
    let config = Config { timeout: Some(std::time::Duration::from_millis(100)), ..Run::default().config };
    let fault = Run { config, ..Run::default() }.try_per_thread("LOOP: bar.sync 0; bra LOOP;").unwrap_err();
    assert_eq!(fault.kind, FaultKind::LaunchTimeout, "{fault}");
}

#[test]
fn assertions() {
    let run = Run {
        outside:
            ".extern .func __assertfail(.param .b64 a, .param .b64 b, .param .b32 c, .param .b64 d, .param .b64 e);
                  .global .align 1 .b8 text[4];"
                .into(),
        ..Run::default()
    };
    let fault = run
        .try_per_thread(
            "st.global.u8 [text], 120; st.global.u8 [text+1], 0; mov.u64 %rd0, text; cvta.global.u64 %rd0, %rd0; setp.eq.u32 %p, %lane, 6;
             { .param .b64 a; .param .b64 b; .param .b32 c; .param .b64 d; .param .b64 e; st.param.b64 [a], %rd0; st.param.b64 [b], %rd0;
               st.param.b32 [c], 42; st.param.b64 [d], %rd0; st.param.b64 [e], 1; @%p call.uni __assertfail, (a, b, c, d, e); }",
        )
        .unwrap_err();
    assert_eq!((fault.kind, fault.thread), (FaultKind::Assert, [6, 0, 0]));
    assert!(fault.message.contains("x:42: x: assertion `x` failed"), "{fault}");
}

#[test]
fn traps() {
    let fault = Run { grid: 3, ..Run::default() }.try_per_thread("setp.eq.u32 %p, %t, 69;\n@%p trap;").unwrap_err();
    assert_eq!((fault.kind, fault.block, fault.thread), (FaultKind::Trap, [2, 0, 0], [5, 0, 0]));
    assert!(fault.to_string().contains("@%p trap"), "{fault}");
}

#[test]
fn special_registers() {
    let got = Run { grid: 3, block: 70, ..Run::default() }.per_thread(
        "mov.u32 %r2, %warpid; mov.u32 %r3, %nwarpid; mov.u32 %r4, %lanemask_lt; popc.b32 %r4, %r4; mov.u32 %r5, %lanemask_ge;
         popc.b32 %r5, %r5; add.u32 %r5, %r4, %r5; mov.u32 %r6, %nctaid.x; mov.u32 %r7, %ntid.y; mov.u32 %r8, %ctaid.x;
         mad.lo.u32 %r2, %r2, 10, %r3; mad.lo.u32 %r2, %r2, 100, %r5; mad.lo.u32 %r2, %r2, 10, %r6;
         mad.lo.u32 %r2, %r2, 10, %r7; mad.lo.u32 %r2, %r2, 10, %r8; st.global.u32 [%out], %r2;",
    );
    for (t, got) in got.iter().enumerate() {
        let (block, warp) = (t as u32 / 70, t as u32 % 70 / 32);
        assert_eq!(*got, (((warp * 10 + 3) * 100 + 32) * 10 + 3) * 100 + 10 + block, "thread {t}");
    }
    let got = Run::default().per_thread(
        "mov.u64 %rd0, %clock64; LOOP: mov.u64 %rd1, %clock64; setp.eq.u64 %p, %rd0, %rd1; @%p bra LOOP;
         setp.gt.u64 %p, %rd1, %rd0; selp.u32 %r2, 1, 0, %p; st.global.u32 [%out], %r2;",
    );
    assert_eq!(got, [1; 32]);
}
