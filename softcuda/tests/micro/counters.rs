//! Counters of a launch.

use softcuda::exec::{Config, Counters, InstructionClass};

use crate::device::{Buffer, PROLOGUE, Run};
use crate::hopper::Hopper;
use crate::warpgroup::{descriptor, list};

fn count(block: u32, body: &str) -> Counters {
    let out = Buffer::new(&vec![0u32; 64 * block as usize]);
    let config = Config { count: true, ..Run::default().config };
    Run { block, config, ..Run::default() }.run(&format!("{PROLOGUE}{body}\nret;"), &[out.address]).unwrap()
}

#[test]
fn nothing_is_counted_unless_asked() {
    let out = Buffer::new(&[0u32; 32]);
    let c = Run::default().run("ret;", &[out.address]).unwrap();
    assert_eq!(c, Counters { launches: 1, ..Counters::default() });
}

#[test]
fn instructions_by_class() {
    let base = count(64, "");
    let c = count(
        64,
        "add.u32 %r2, %r3, %r4; add.f32 %f0, %f1, %f2; fma.rn.f32 %f0, %f1, %f2, %f0; setp.lt.or.u32 %p|%q, %r2, %r3, %p0;",
    );
    let more = |class| c.class(class) - base.class(class);
    assert_eq!(more(InstructionClass::Integer), 4);
    assert_eq!(more(InstructionClass::Float), 4);
    assert_eq!(c.thread_instructions - base.thread_instructions, 4 * 64);
    assert_eq!((c.launches, c.blocks, c.warps), (1, 1, 2));
    // Divergent code counts once for each group of lanes that runs it.
    let c = count(
        32,
        "setp.lt.u32 %p, %lane, 4; @%p bra A; add.f32 %f0, %f0, %f0; bra B; A: add.f32 %f1, %f1, %f1; B: mov.u32 %r2, 1;",
    );
    assert_eq!(c.class(InstructionClass::Float), 2);
}

#[test]
fn global_sectors() {
    let c = count(32, "st.global.u32 [%out], %t;");
    assert_eq!((c.global.requests, c.global.sectors, c.global.ideal_sectors), (1, 4, 4));
    // Every lane 64 bytes on.
    let c = count(32, "mad.wide.u32 %rd0, %t, 60, %out; ld.global.u32 %r2, [%rd0];");
    assert_eq!((c.global.sectors, c.global.ideal_sectors), (32, 4));
}

#[test]
fn shared_wavefronts_by_line() {
    let body = ".shared .align 16 .b8 s[4096]; mov.u32 %r2, s; mad.lo.u32 %r3, %lane, 4, %r2; mad.lo.u32 %r4, %lane, 128, %r2; mad.lo.u32 %r5, %lane, 16, %r2;
        st.shared.u32 [%r3], %t;\nld.shared.u32 %r6, [%r4];\nld.shared.v4.u32 {%r6, %r7, %r8, %r9}, [%r5];\n
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r6, %r7, %r8, %r9}, [%r5];\nldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r6, %r7, %r8, %r9}, [%r4];\n
        cp.async.cg.shared.global [%r5], [%rd9], 16, 0;";
    let c = count(32, body);
    let lines: Vec<_> = c
        .lines
        .iter()
        .filter(|l| l.shared.requests > 0)
        .map(|l| (l.shared.wavefronts, l.shared.ideal_wavefronts))
        .collect();
    assert_eq!(lines, [(1, 1), (32, 1), (4, 4), (4, 4), (32, 4), (4, 4)]);
    assert_eq!((c.shared.requests, c.shared.wavefronts), (6, 77));
}

#[test]
fn matrix_operations() {
    let c = count(
        64,
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f0, %f1, %f2, %f3}, {%r2, %r3}, {%r4}, {%f0, %f1, %f2, %f3};",
    );
    assert_eq!(c.matrix.iter().collect::<Vec<_>>(), [(&"m16n8k8.f32.f16.f16.f32".to_string(), &2)]);
}

#[test]
fn loops_that_only_wait_count_once() {
    // Warp 1 waits for warp 0, which goes to sleep over and over first.
    let body = |load: &str| {
        format!(
            "ld.param.u64 %rd5, [p0]; mov.u32 %r2, 0; setp.ge.u32 %p, %t, 32; bar.sync 0; @%p bra WAIT;
             SLEEP: nanosleep.u32 100; add.u32 %r2, %r2, 1; setp.lt.u32 %p, %r2, 50; @%p bra SLEEP;
             st.release.gpu.global.u32 [%rd5], 7; bra DONE;
             WAIT: {load} %r3, [%rd5]; setp.ne.u32 %q, %r3, 7; @%q bra WAIT;
             DONE: mov.u32 %r4, 1;"
        )
    };
    let c = count(64, &body("ld.acquire.gpu.global.u32"));
    assert!(c.repeated_polls > 0, "{c:?}");
    assert!(c.opcodes["ld.acquire.gpu.global.u32"] < 100, "once for each turn of the other warp: {:?}", c.opcodes);
    assert_eq!(c.opcodes["nanosleep.u32"], 50);
    // A loop over memory is no poll, whatever its order.
    let c = count(
        32,
        "mov.u32 %r2, 0; mov.u64 %rd0, %out; SUM: ld.volatile.global.u32 %r3, [%rd0]; add.u64 %rd0, %rd0, 4;
        add.u32 %r2, %r2, 1; setp.lt.u32 %p, %r2, 50; @%p bra SUM;",
    );
    assert_eq!((c.opcodes["ld.volatile.global.u32"], c.repeated_polls), (50, 0));
    // Nor is one that stores.
    let c = count(
        32,
        "mov.u32 %r2, 0; SUM: ld.volatile.global.u32 %r3, [%out]; st.global.u32 [%out], %r2;
        add.u32 %r2, %r2, 1; setp.lt.u32 %p, %r2, 50; @%p bra SUM;",
    );
    assert_eq!((c.opcodes["ld.volatile.global.u32"], c.repeated_polls), (50, 0));
}

/// Counters of one product in bf16 of a warpgroup, on 32 KiB of shared memory.
fn product(n: usize, a: &str, b: u64, b_turned: bool) -> Counters {
    let from_registers = a.starts_with('{');
    let turned =
        if from_registers { format!("{}", u32::from(b_turned)) } else { format!("0, {}", u32::from(b_turned)) };
    let registers = n / 2;
    let d = list("d", registers);
    let body = format!(
        ".reg .pred %p; .reg .b32 %r<4>; .reg .f32 %d<{registers}>; .reg .b64 %a, %b, %out; .shared .align 1024 .b8 s[32768];
         ld.param.u64 %out, [p0]; mov.u32 %r0, %tid.x; setp.ne.u32 %p, %r0, %r0; mov.b32 %r1, %r0; mov.b32 %r2, %r0; mov.b32 %r3, %r0;
         mov.b64 %a, {a_bits}; mov.b64 %b, {b}; wgmma.fence.sync.aligned;
         wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {d}, {a}, %b, %p, 1, 1, {turned};
         wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; st.global.f32 [%out], %d0; ret;",
        a_bits = descriptor(0, 0, 1024, 0, 1),
    );
    let out = Buffer::new(&[0u32; 4]);
    let mut run = Hopper::row(1, 128, 1);
    run.config.count = true;
    run.counters(&body, &[out.address]).unwrap()
}

#[test]
fn canonical_layouts_of_wgmma_have_no_conflicts() {
    let wavefronts = |c: Counters| (c.shared.wavefronts, c.shared.ideal_wavefronts);
    // 64 and 128 rows of 32 bytes, 128 bytes at once: 16 and 32.
    let b = 8192;
    for (leading, stride, mode, turned) in [
        // K-major: rows of the swizzle's width, 8 rows apart; without swizzle core matrices one after another.
        (0, 1024, 1, false),
        (0, 512, 2, false),
        (0, 256, 3, false),
        (128, 256, 0, false),
        // N-major: 16 steps of K of 128 columns, as many at a time as the swizzle is wide.
        (2048, 1024, 1, true),
        (1024, 512, 2, true),
        (512, 256, 3, true),
        (2048, 128, 0, true),
    ] {
        let c = product(128, "%a", descriptor(b, leading, stride, 0, mode), turned);
        assert_eq!(c.matrix.iter().collect::<Vec<_>>(), [(&"wgmma.m64n128k16.f32.bf16.bf16.ss".to_string(), &1)]);
        assert_eq!(wavefronts(c), (48, 48), "mode {mode}, turned {turned}");
    }
    // 8 rows of 32 bytes, and A in registers.
    let c = product(8, "{%r0, %r1, %r2, %r3}", descriptor(b, 0, 1024, 0, 1), false);
    assert_eq!(c.matrix.iter().collect::<Vec<_>>(), [(&"wgmma.m64n8k16.f32.bf16.bf16.rs".to_string(), &1)]);
    assert_eq!(wavefronts(c), (2, 2));
}

#[test]
fn what_asynchronous_copies_move_is_told_apart() {
    // Two copies of 16 bytes a lane: 512 bytes each, of which the second begins in the middle of a sector; one load of 128.
    let body = ".shared .align 16 .b8 s[1024]; mov.u32 %r2, s; mad.lo.u32 %r2, %lane, 16, %r2; ld.param.u64 %rd2, [p0];
        mad.wide.u32 %rd0, %lane, 16, %rd2; cp.async.cg.shared.global [%r2], [%rd0], 16; cp.async.cg.shared.global [%r2+512], [%rd0+16], 16; cp.async.wait_all;
        mad.wide.u32 %rd1, %lane, 4, %rd2; ld.global.u32 %r3, [%rd1];";
    let out = Buffer::new(&[0u32; 256]);
    let config = Config { count: true, ..Run::default().config };
    let c = Run { config, ..Run::default() }.run(&format!("{PROLOGUE}{body}\nret;"), &[out.address]).unwrap();
    assert_eq!((c.async_bytes, c.shared.wavefronts), (1024, 8));
    assert_eq!((c.global.sectors, c.async_sectors), (16 + 17 + 4, 16 + 17));
}

#[test]
fn blocks_that_leave_at_once_do_not_work() {
    let out = Buffer::new(&[3u32; 32 * 40]);
    let config = Config { count: true, threads: 3, ..Run::default().config };
    // As many blocks as a number in memory says go on; the others have read it and leave.
    let body = "ld.param.u64 %rd0, [p0]; ld.global.u32 %r2, [%rd0+1024]; mov.u32 %r3, %ctaid.x; setp.ge.u32 %p, %r3, %r2; @%p ret;";
    let run = |rest: &str| {
        let run = Run { grid: 40, config: config.clone(), ..Run::default() };
        let c = run.run(&format!("{PROLOGUE}{body}{rest}\nret;"), &[out.address]).unwrap();
        (c.blocks, c.working_blocks)
    };
    assert_eq!(run("add.u64 %rd0, %rd0, 1028; st.global.u32 [%rd0], %t;"), (40, 3));
    assert_eq!(run("red.global.add.u32 [%rd0], 1;"), (40, 3));
    assert_eq!(run(".shared .b32 s; st.shared.u32 [s], %t;"), (40, 0));
    // In a cluster, what is written to another block's shared memory counts.
    let mut cluster = Hopper::row(4, 32, 2);
    cluster.config.count = true;
    let body = ".reg .pred %p; .reg .b32 %r<4>; .shared .b32 s; mov.u32 %r0, %ctaid.x; mov.u32 %r1, s;
        setp.ne.u32 %p, %r0, 2; barrier.cluster.arrive; barrier.cluster.wait; mapa.shared::cluster.u32 %r2, %r1, 1;
        @!%p st.shared::cluster.u32 [%r2], %r0; barrier.cluster.arrive; barrier.cluster.wait; ret;";
    let c = cluster.counters(body, &[]).unwrap();
    assert_eq!((c.blocks, c.working_blocks), (4, 1));
}
