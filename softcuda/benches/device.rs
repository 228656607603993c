//! Speed of the device on one core: `cargo bench -p softcuda --bench device [NAME]`. Each line is the best of several runs,
//! in processor time of the one thread that runs the launch, so that other load on the machine matters little.

use std::time::Duration;

use softcuda::exec::{Config, Launch, launch};
use softcuda::lower::{Environment, lower_module};
use softcuda::memory::Memory;

/// One kernel: its body, grid, block, and what to divide by the time.
struct Bench {
    name: &'static str,
    body: String,
    grid: u32,
    block: u32,
    /// Work of one launch in `unit`s.
    work: f64,
    unit: &'static str,
}

const RUNS: usize = 7;

fn benches() -> Vec<Bench> {
    let mut list = Vec::new();
    let prologue = ".reg .pred %p; .reg .b32 %r<32>, %i, %t; .reg .f32 %f<16>; .reg .b64 %a, %b;
        ld.param.u64 %a, [p0]; mov.u32 %t, %tid.x; mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ntid.x; mad.lo.u32 %t, %r0, %r1, %t;
        mov.u32 %i, 0; cvt.rn.f32.u32 %f1, %t; mov.f32 %f0, 0f3F7FFFF0; mov.u32 %r2, %t; mov.u32 %r3, 12345;";
    // Ten instructions to a turn, the loop's own three included.
    let alu =
        "LOOP: add.u32 %r2, %r2, %r3; xor.b32 %r3, %r3, %r2; mad.lo.u32 %r4, %r2, 1664525, %r3; shl.b32 %r5, %r4, 3;
        and.b32 %r3, %r5, %r2; fma.rn.f32 %f1, %f1, %f0, %f0; max.u32 %r2, %r3, %r4;
        add.u32 %i, %i, 1; setp.lt.u32 %p, %i, 20000; @%p bra LOOP; add.u32 %r2, %r2, %r3; st.global.u32 [%a], %r2;";
    list.push(Bench {
        name: "alu",
        body: format!("{prologue}{alu}"),
        grid: 1,
        block: 256,
        work: 10.0 * 20000.0 * 256.0 / 1e9,
        unit: "G thread-instructions/s",
    });
    for (name, types, a, b, k) in [
        ("mma_bf16", "f32.bf16.bf16.f32", "%r8, %r9, %r10, %r11", "%r12, %r13", 16.0),
        ("mma_f16", "f32.f16.f16.f32", "%r8, %r9, %r10, %r11", "%r12, %r13", 16.0),
        ("mma_tf32", "f32.tf32.tf32.f32", "%r8, %r9, %r10, %r11", "%r12, %r13", 8.0),
    ] {
        let mma: String = (0..4)
            .map(|i| {
                let c = format!("{{%f{}, %f{}, %f{}, %f{}}}", 4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3);
                format!("mma.sync.aligned.m16n8k{k}.row.col.{types} {c}, {{{a}}}, {{{b}}}, {c};")
            })
            .collect();
        list.push(Bench {
            name,
            body: format!("{prologue} LOOP: {mma} add.u32 %i, %i, 1; setp.lt.u32 %p, %i, 4000; @%p bra LOOP; st.global.f32 [%a], %f3;"),
            grid: 1,
            block: 128,
            work: 4.0 * 4000.0 * 4.0 * 2.0 * 16.0 * 8.0 * k / 1e9,
            unit: "GFLOP/s",
        });
    }
    list.push(Bench {
        name: "copy",
        body: format!(
            "{prologue} mul.wide.u32 %b, %t, 16; add.s64 %a, %a, %b; LOOP: ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%a];
             st.global.v4.b32 [%a+16777216], {{%r4, %r5, %r6, %r7}}; add.s64 %a, %a, 1048576; add.u32 %i, %i, 1;
             setp.lt.u32 %p, %i, 16; @%p bra LOOP;"
        ),
        grid: 256,
        block: 256,
        work: 2.0 * 16.0 * 1048576.0 / 1e9,
        unit: "GB/s",
    });
    list.push(Bench {
        name: "shared_reduction",
        body: format!(
            "{prologue} .shared .align 4 .b8 s[1024]; mov.u32 %r5, s; mov.u32 %r6, %tid.x; mad.lo.u32 %r5, %r6, 4, %r5;
             AGAIN: st.shared.u32 [%r5], %t; mov.u32 %r7, 128; LOOP: bar.sync 0; setp.ge.u32 %p, %r6, %r7; @%p bra SKIP;
             mad.lo.u32 %r8, %r7, 4, %r5; ld.shared.u32 %r9, [%r8]; ld.shared.u32 %r10, [%r5]; add.u32 %r9, %r9, %r10;
             st.shared.u32 [%r5], %r9; SKIP: shr.u32 %r7, %r7, 1; setp.ne.u32 %p, %r7, 0; @%p bra LOOP;
             add.u32 %i, %i, 1; bar.sync 0; setp.lt.u32 %p, %i, 100; @%p bra AGAIN;"
        ),
        grid: 8,
        block: 256,
        work: 800.0 * 256.0 / 1e6,
        unit: "M elements/s",
    });
    list.push(Bench {
        name: "atomics",
        body: format!(
            "{prologue} LOOP: red.global.add.u32 [%a], 1; add.u32 %i, %i, 1; setp.lt.u32 %p, %i, 100; @%p bra LOOP;"
        ),
        grid: 16,
        block: 256,
        work: 16.0 * 256.0 * 100.0 / 1e6,
        unit: "M atomics/s",
    });
    list.push(Bench {
        name: "empty_launch",
        body: String::new(),
        grid: 1,
        block: 32,
        work: 1e-3,
        unit: "k launches/s",
    });
    list
}

/// Processor time of this thread so far.
fn thread_time() -> Duration {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is valid for the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) };
    Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}

fn main() {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with("--"));
    let memory = Memory::new(1 << 30).expect("address space for the device");
    let data = memory.alloc(64 << 20).expect("64 MiB");
    let config = Config { threads: 1, ..Config::default() };
    for b in benches().iter().filter(|b| filter.as_ref().is_none_or(|f| b.name.contains(f.as_str()))) {
        let text = format!(
            ".version 8.3\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 p0) {{ {} ret; }}\n",
            b.body
        );
        let module = softcuda::ptx::parse(&text).unwrap_or_else(|e| panic!("{}: {e}", b.name));
        let env = Environment { compute_capability: (8, 0), ..Environment::default() };
        let program = lower_module(&module, &env).unwrap_or_else(|e| panic!("{}: {e}", b.name));
        let one = || {
            let start = thread_time();
            launch(&Launch {
                kernel: &program.kernels[0],
                grid: [b.grid, 1, 1],
                block: [b.block, 1, 1],
                cluster: [1, 1, 1],
                dynamic_shared_bytes: 0,
                params: &data.to_le_bytes(),
                cooperative: false,
                memory: &memory,
                config: &config,
            })
            .unwrap_or_else(|e| panic!("{}: {e}", b.name));
            thread_time() - start
        };
        let best = (0..RUNS).map(|_| one()).min().unwrap_or(Duration::MAX);
        println!("{:18} {:10.3} {:24} ({best:.1?})", b.name, b.work / best.as_secs_f64(), b.unit);
    }
}
