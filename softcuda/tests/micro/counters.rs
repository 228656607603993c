//! Counters of a launch.

use softcuda::exec::{Config, Counters, InstructionClass};

use crate::device::{Buffer, PROLOGUE, Run};

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
