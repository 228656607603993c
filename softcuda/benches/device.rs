//! Speed of the device: `cargo bench -p softcuda --bench device [NAME]`. On one core each figure is the best of several runs,
//! in processor time of the one thread that runs the launch, so that other load on the machine matters little; on all cores
//! it is in elapsed time, with as many times the blocks. `DEVICE_ISA=Baseline|Avx2|Avx512` takes other instructions than the
//! host's best. `-- --profile` also says how much longer a launch takes while its counters are kept and a trace for the model of
//! the caches is recorded and replayed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use softcuda::device::H100;
use softcuda::exec::observe::Watch;
use softcuda::exec::{Config, Isa, Launch, launch};
use softcuda::lower::{Environment, lower_module};
use softcuda::memory::Memory;
use softcuda::profile::{Hierarchy, TrafficWatch};

/// One kernel: its body, grid, block, and what to divide by the time.
struct Bench {
    name: &'static str,
    body: String,
    target: &'static str,
    shared: u32,
    grid: u32,
    block: u32,
    /// Work of one launch in `unit`s.
    work: f64,
    unit: &'static str,
}

const RUNS: usize = 9;

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
        target: "sm_80",
        shared: 0,
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
            target: "sm_80",
        shared: 0,
        grid: 1,
            block: 128,
            work: 4.0 * 4000.0 * 4.0 * 2.0 * 16.0 * 8.0 * k / 1e9,
            unit: "GFLOP/s",
        });
    }
    // Four products a turn into one accumulator, as in the main loop of a kernel: 64 K in rows of 128 bytes, for `wait`
    // turns in flight. Each warpgroup computes 64 rows.
    for (name, types, n, k, registers) in [
        ("wgmma_bf16", "f32.bf16.bf16", 128, 16, false),
        ("wgmma_bf16_wide", "f32.bf16.bf16", 256, 16, false),
        ("wgmma_bf16_rs", "f32.bf16.bf16", 128, 16, true),
        ("wgmma_f16", "f16.f16.f16", 128, 16, false),
        ("wgmma_tf32", "f32.tf32.tf32", 128, 8, false),
        ("wgmma_e4m3", "f32.e4m3.e4m3", 128, 32, false),
        ("wgmma_s8", "s32.s8.s8", 128, 32, false),
    ] {
        let d: Vec<_> = (0..if types.starts_with("f16") { n / 4 } else { n / 2 }).map(|i| format!("%d{i}")).collect();
        let a = if registers { "{%r8, %r9, %r10, %r11}" } else { "%a" };
        let tail = match (types.starts_with("s32"), k == 16, registers) {
            (true, ..) => "",
            (_, true, true) => ", 1, 1, 0",
            (_, true, false) => ", 1, 1, 0, 0",
            _ => ", 1, 1",
        };
        let product = format!(
            "wgmma.mma_async.sync.aligned.m64n{n}k{k}.{types} {{{}}}, {a}, %b, %p{tail}; add.s64 %a, %a, 2; add.s64 %b, %b, 2;",
            d.join(", ")
        );
        // Descriptors: 128-byte swizzle, 1024 bytes from 8 rows to the next, A at 0 and B at 8192.
        list.push(Bench {
            name,
            body: format!(
                "{prologue} .reg .b32 %d<{}>; ld.param.u64 %a, [p0]; setp.eq.u32 %p, 0, 0;
                 LOOP: mov.u64 %a, {}; mov.u64 %b, {}; wgmma.fence.sync.aligned; {product} {product} {product} {product}
                 wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1;
                 add.u32 %i, %i, 1; setp.lt.u32 %p, %i, 400; @!%p bra END; bra LOOP;
                 END: wgmma.wait_group.sync.aligned 0; ld.param.u64 %a, [p0]; st.global.b32 [%a], %d3;",
                d.len(),
                (1u64 << 62 | 64 << 32) as i64,
                (1u64 << 62 | 64 << 32 | 8192 >> 4) as i64,
            ),
            target: "sm_90a",
            shared: 8192 + 32768 + 1024,
            grid: 1,
            block: 128,
            work: 400.0 * 4.0 * 2.0 * 64.0 * f64::from(n * k) / 1e9,
            unit: if types.starts_with("s32") { "Gop/s" } else { "GFLOP/s" },
        });
    }
    list.push(Bench {
        name: "copy",
        body: format!(
            "{prologue} mul.wide.u32 %b, %t, 16; add.s64 %a, %a, %b; LOOP: ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%a];
             st.global.v4.b32 [%a+16777216], {{%r4, %r5, %r6, %r7}}; add.s64 %a, %a, 1048576; add.u32 %i, %i, 1;
             setp.lt.u32 %p, %i, 16; @%p bra LOOP;"
        ),
        target: "sm_80",
        shared: 0,
        grid: 256,
        block: 256,
        work: 2.0 * 16.0 * 1048576.0 / 1e9,
        unit: "GB/s",
    });
    list.push(Bench {
        name: "copy_in_cache",
        body: format!(
            "{prologue} mul.wide.u32 %b, %t, 16; add.s64 %a, %a, %b; LOOP: ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%a];
             st.global.v4.b32 [%a+131072], {{%r4, %r5, %r6, %r7}};  add.u32 %i, %i, 1;
             setp.lt.u32 %p, %i, 256; @%p bra LOOP;"
        ),
        target: "sm_80",
        shared: 0,
        grid: 16,
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
        target: "sm_80",
        shared: 0,
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
        target: "sm_80",
        shared: 0,
        grid: 16,
        block: 256,
        work: 16.0 * 256.0 * 100.0 / 1e6,
        unit: "M atomics/s",
    });
    list.push(Bench {
        name: "empty_launch",
        body: String::new(),
        target: "sm_80",
        shared: 0,
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

/// Thread-instructions per second of public PTX emulators, at most.
const OTHERS: f64 = 60e6;

fn main() {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with("--"));
    let memory = Memory::new(1 << 30).expect("address space for the device");
    let data = memory.alloc(64 << 20).expect("64 MiB");
    let wanted = std::env::var("DEVICE_ISA").ok();
    let isa = match wanted {
        None => Isa::detect(),
        Some(name) => {
            *Isa::available().iter().find(|i| format!("{i:?}") == name).expect("an instruction set of this host")
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    println!("instructions of the host: {isa:?}; {cores} cores\n");
    println!("{:18} {:>12} {:>12} {:8} {:24} {:>12}", "", "one core", "all cores", "scaling", "", "one launch");
    for b in benches().iter().filter(|b| filter.as_ref().is_none_or(|f| b.name.contains(f.as_str()))) {
        let text = format!(
            ".version 8.3\n.target {}\n.address_size 64\n.extern .shared .align 1024 .b8 dynamic[];\n
             .visible .entry k(.param .u64 p0) {{ {} ret; }}\n",
            b.target, b.body
        );
        let capability = if b.target == "sm_90a" { (9, 0) } else { (8, 0) };
        let module = softcuda::ptx::parse(&text).unwrap_or_else(|e| panic!("{}: {e}", b.name));
        let env = Environment { compute_capability: capability, ..Environment::default() };
        let program = lower_module(&module, &env).unwrap_or_else(|e| panic!("{}: {e}", b.name));
        let best = |threads: usize, profiled: bool| {
            let one = || {
                let watch = profiled.then(|| TrafficWatch::new(Hierarchy::new(&H100, 8, b.shared.into())));
                let watches = watch.iter().map(|watch| Arc::clone(watch) as Arc<dyn Watch>).collect();
                let config = Config {
                    threads,
                    isa: Some(isa),
                    compute_capability: capability,
                    count: profiled,
                    watches,
                    ..Config::default()
                };
                let (start, elapsed) = (thread_time(), Instant::now());
                launch(&Launch {
                    kernel: &program.kernels[0],
                    grid: [b.grid * threads as u32, 1, 1],
                    block: [b.block, 1, 1],
                    cluster: [1, 1, 1],
                    dynamic_shared_bytes: b.shared,
                    params: &data.to_le_bytes(),
                    cooperative: false,
                    memory: &memory,
                    config: &config,
                })
                .unwrap_or_else(|e| panic!("{}: {e}", b.name));
                let _ = watch.map(|watch| watch.finish());
                if threads == 1 { thread_time() - start } else { elapsed.elapsed() }
            };
            (0..RUNS).map(|_| one()).min().unwrap_or(Duration::MAX)
        };
        let one = best(1, false);
        let speed = b.work / one.as_secs_f64();
        let all = if cores == 1 { one } else { best(cores, false) };
        let many = b.work * cores as f64 / all.as_secs_f64();
        println!("{:18} {speed:12.2} {many:12.2} {:7.2}x {:24} {one:>12.1?}", b.name, many / speed, b.unit);
        if std::env::args().any(|a| a == "--profile") {
            println!("{:18} {:12.2} times as long when profiled", "", best(1, true).as_secs_f64() / one.as_secs_f64());
        }
        if b.name == "alu" {
            let times = speed * 1e9 / OTHERS;
            println!("{:18} {times:12.0} times the {:.0} M/s of the fastest public emulators", "", OTHERS / 1e6);
        }
    }
}
