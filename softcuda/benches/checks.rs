//! What each checker costs: `cargo bench -p softcuda --bench checks [KERNEL]`. Times of one host thread, in its own processor
//! time, the best of several runs, as multiples of the time without checkers.

use std::time::Duration;

use softcuda::check::{Checker, Checks, Selection};
use softcuda::exec::{Config, Launch, launch};
use softcuda::lower::{Environment, lower_module};
use softcuda::memory::Memory;

struct Bench {
    name: &'static str,
    body: String,
    grid: u32,
    block: u32,
}

const RUNS: usize = 5;

const PROLOGUE: &str = ".reg .pred %p; .reg .b32 %r<64>, %i, %t; .reg .f32 %f<64>; .reg .b64 %a, %b;
    ld.param.u64 %a, [p0]; mov.u32 %t, %tid.x; mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ntid.x; mad.lo.u32 %t, %r0, %r1, %t;
    mov.u32 %i, 0; mov.u32 %r2, %t; mov.u32 %r3, 12345;";

fn benches() -> Vec<Bench> {
    let alu =
        "LOOP: add.u32 %r2, %r2, %r3; xor.b32 %r3, %r3, %r2; mad.lo.u32 %r4, %r2, 1664525, %r3; shl.b32 %r5, %r4, 3;
        and.b32 %r3, %r5, %r2; max.u32 %r2, %r3, %r4; add.u32 %i, %i, 1; setp.lt.u32 %p, %i, 4000; @%p bra LOOP;
        mul.wide.u32 %b, %t, 4; add.s64 %a, %a, %b; st.global.u32 [%a], %r2;";
    let copy = "mul.wide.u32 %b, %t, 16; add.s64 %a, %a, %b; LOOP: ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%a];
        st.global.v4.b32 [%a+16777216], {%r4, %r5, %r6, %r7}; add.s64 %a, %a, 1048576; add.u32 %i, %i, 1;
        setp.lt.u32 %p, %i, 16; @%p bra LOOP;";
    let reduction = ".shared .align 4 .b8 s[1024]; mov.u32 %r5, s; mov.u32 %r6, %tid.x; mad.lo.u32 %r5, %r6, 4, %r5;
        AGAIN: st.shared.u32 [%r5], %t; mov.u32 %r7, 128; LOOP: bar.sync 0; setp.ge.u32 %p, %r6, %r7; @%p bra SKIP;
        mad.lo.u32 %r8, %r7, 4, %r5; ld.shared.u32 %r9, [%r8]; ld.shared.u32 %r10, [%r5]; add.u32 %r9, %r9, %r10;
        st.shared.u32 [%r5], %r9; SKIP: shr.u32 %r7, %r7, 1; setp.ne.u32 %p, %r7, 0; @%p bra LOOP;
        add.u32 %i, %i, 1; bar.sync 0; setp.lt.u32 %p, %i, 100; @%p bra AGAIN;";
    let bench = |name, body: &str, grid, block| Bench { name, body: format!("{PROLOGUE}{body}"), grid, block };
    vec![
        bench("ALU loop", alu, 4, 256),
        bench("copy", copy, 256, 256),
        bench("shared reduction", reduction, 8, 256),
        bench("mma main loop", &main_loop(), 4, 128),
    ]
}

/// Tiles of 64 x 32 and 64 x 32 of bf16 through two stages of shared memory: 4 `cp.async`, 12 `ldmatrix.x4` and 32 `mma` for a
/// warp and stage.
fn main_loop() -> String {
    let mut s = String::from(
        ".shared .align 128 .b8 s[16384]; mov.u32 %r4, s; mov.u32 %r5, %tid.x; mad.lo.u32 %r6, %r5, 16, %r4;
         mul.wide.u32 %b, %r5, 16; add.s64 %a, %a, %b; and.b32 %r7, %r5, 15; mad.lo.u32 %r7, %r7, 64, %r4; and.b32 %r8, %r5, 16;
         add.u32 %r7, %r7, %r8;",
    );
    let load = |stage: &str| {
        let copies: String = (0..4)
            .map(|i| format!("cp.async.cg.shared.global [{stage}+{}], [%a+{}], 16;", 2048 * i, 2048 * i))
            .collect();
        format!("{copies} cp.async.commit_group; add.s64 %a, %a, 8192;")
    };
    s += &load("%r6");
    s += "LOOP: add.u32 %i, %i, 1; and.b32 %r9, %i, 1; mad.lo.u32 %r10, %r9, 8192, %r6;";
    s += &load("%r10");
    s += "cp.async.wait_group 1; bar.sync 0; xor.b32 %r9, %r9, 1; mad.lo.u32 %r11, %r9, 8192, %r7;";
    for k in 0..2 {
        let at = |base: u32, tile: u32| format!("[%r11+{}]", base + 1024 * tile + 32 * k);
        for m in 0..2 {
            let r = 16 + 4 * m;
            let d = format!("{{%r{r}, %r{}, %r{}, %r{}}}", r + 1, r + 2, r + 3);
            s += &format!("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {d}, {};", at(0, m));
        }
        for n in 0..4 {
            let r = 24 + 4 * n;
            let d = format!("{{%r{r}, %r{}, %r{}, %r{}}}", r + 1, r + 2, r + 3);
            s += &format!("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {d}, {};", at(4096, n));
        }
        for (m, n) in (0..2).flat_map(|m| (0..8).map(move |n| (m, n))) {
            let c = 4 * (m * 8 + n) % 64;
            let c = format!("{{%f{c}, %f{}, %f{}, %f{}}}", c + 1, c + 2, c + 3);
            let (a, b) = (16 + 4 * m, 24 + 2 * n);
            s += &format!(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {c}, {{%r{a}, %r{}, %r{}, %r{}}}, {{%r{b}, %r{}}}, {c};",
                a + 1,
                a + 2,
                a + 3,
                b + 1
            );
        }
    }
    s + "bar.sync 0; setp.lt.u32 %p, %i, 200; @%p bra LOOP; cp.async.wait_all;"
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
    // SAFETY: the allocation has this many bytes.
    unsafe { std::ptr::write_bytes(data as *mut u8, 0, 64 << 20) };
    print!("{:18} {:>12}", "kernel", "none");
    Checker::ALL.iter().for_each(|c| print!(" {:>8}", c.name()));
    println!(" {:>8}", "all");
    for b in benches().iter().filter(|b| filter.as_ref().is_none_or(|f| b.name.contains(f.as_str()))) {
        let text = format!(
            ".version 8.3\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 p0) {{ {} ret; }}\n",
            b.body
        );
        let module = softcuda::ptx::parse(&text).unwrap_or_else(|e| panic!("{}: {e}", b.name));
        let env = Environment { compute_capability: (8, 0), ..Environment::default() };
        let program = lower_module(&module, &env).unwrap_or_else(|e| panic!("{}: {e}", b.name));
        let time = |selection: Selection| {
            let one = || {
                let checks = Checks::new(selection, memory.range()).expect("address space for shadows");
                checks.allocated(data, 64 << 20, true);
                let config = Config { threads: 1, watches: checks.watches(), ..Config::default() };
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
                let time = thread_time() - start;
                if let Some(finding) = checks.findings().all().first() {
                    panic!("{}: {finding}", b.name);
                }
                time
            };
            (0..RUNS).map(|_| one()).min().unwrap_or(Duration::MAX)
        };
        let plain = time(Selection::NONE);
        print!("{:18} {:>12}", b.name, format!("{plain:.1?}"));
        let sets = Checker::ALL.iter().map(|&c| Selection::of(&[c])).chain([Selection::ALL]);
        for set in sets {
            print!(" {:>7.2}x", time(set).as_secs_f64() / plain.as_secs_f64());
        }
        println!();
    }
}
