//! Whatever instructions the host executes a program with, the results are the same to the bit: see `softcuda::exec::Isa`.

use softcuda::exec::{Config, Isa};

use crate::device::{Buffer, Run};
use crate::warpgroup::{Program64, descriptor, list};

/// A generator of words that are often special: zeros, infinities, NaNs, subnormals and small integers of every type.
struct Words(u64);

impl Words {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let x = (self.0 >> 32) as u32;
        match x % 11 {
            0 => [0, 0x8000_0000, 0x7f80_0000, 0xff80_0000, 0x7fc0_0000, 1, 0x007f_ffff, 0x3f80_0000]
                [x as usize / 16 % 8],
            1 => x / 16 % 64,
            2 => 0x7c00_fc00 ^ (x & 0x0101_8001),
            _ => x.rotate_left(13),
        }
    }

    fn many(&mut self, n: usize) -> Vec<u32> {
        (0..n).map(|_| self.next()).collect()
    }
}

/// Instructions with their number of sources, by the type of their registers.
const LANE_WISE: &[(&str, &str, usize)] = &[
    ("b32", "add.u32", 2),
    ("b32", "sub.s32", 2),
    ("b32", "mul.lo.u32", 2),
    ("b32", "mul.hi.u32", 2),
    ("b32", "mul.hi.s32", 2),
    ("b32", "mad.lo.s32", 3),
    ("b32", "min.s32", 2),
    ("b32", "max.u32", 2),
    ("b32", "shl.b32", 2),
    ("b32", "shr.u32", 2),
    ("b32", "shr.s32", 2),
    ("b32", "and.b32", 2),
    ("b32", "xor.b32", 2),
    ("b32", "popc.b32", 1),
    ("b32", "clz.b32", 1),
    ("b32", "brev.b32", 1),
    ("b32", "prmt.b32", 3),
    ("b32", "add.rn.f32", 2),
    ("b32", "mul.rn.f32", 2),
    ("b32", "mul.rn.ftz.f32", 2),
    ("b32", "fma.rn.f32", 3),
    ("b32", "fma.rn.ftz.f32", 3),
    ("b32", "min.f32", 2),
    ("b32", "max.NaN.f32", 2),
    ("b32", "abs.f32", 1),
    ("b32", "rcp.rn.f32", 1),
    ("b32", "sqrt.rn.f32", 1),
    ("b32", "div.rn.f32", 2),
    ("b32", "ex2.approx.f32", 1),
    ("b32", "lg2.approx.f32", 1),
    ("b32", "rsqrt.approx.f32", 1),
    ("b32", "add.rn.f16x2", 2),
    ("b32", "fma.rn.f16x2", 3),
    ("b32", "fma.rn.bf16x2", 3),
    ("b32", "max.f16x2", 2),
    ("b32", "cvt.rn.f32.s32", 1),
    ("b32", "cvt.rn.f32.u32", 1),
    ("b32", "cvt.rzi.s32.f32", 1),
    ("b32", "cvt.rni.u32.f32", 1),
    ("b32", "cvt.rn.f16x2.f32", 2),
    ("b32", "cvt.rn.bf16x2.f32", 2),
    ("b64", "add.u64", 2),
    ("b64", "mul.lo.u64", 2),
    ("b64", "mul.hi.s64", 2),
    ("b64", "min.s64", 2),
    ("b64", "add.rn.f64", 2),
    ("b64", "fma.rn.f64", 3),
    ("b64", "max.f64", 2),
];

/// The results of all of these on one block, half of the lanes masked in a second pass.
fn lane_wise(isa: Isa, seed: u64) -> Vec<u32> {
    let width = |ty: &str| if ty == "b64" { 8 } else { 4 };
    let total: usize = LANE_WISE.iter().map(|(ty, ..)| width(ty)).sum();
    let mut body = String::from(
        ".reg .pred %p; .reg .b64 %i, %o; .reg .b32 %t; .reg .b32 %a<4>; .reg .b64 %b<4>; ld.param.u64 %i, [p0];
         ld.param.u64 %o, [p1]; mov.u32 %t, %tid.x; mad.wide.u32 %i, %t, 24, %i;",
    );
    body += &format!("mad.wide.u32 %o, %t, {}, %o; and.b32 %a0, %t, 1; setp.ne.u32 %p, %a0, 0;", 2 * total);
    for i in 0..3 {
        body += &format!("ld.global.b32 %a{}, [%i+{}]; ld.global.b64 %b{}, [%i+{}];", i + 1, 8 * i, i + 1, 8 * i);
    }
    let mut at = 0;
    for guard in ["", "@%p "] {
        for (ty, name, sources) in LANE_WISE {
            let letter = if *ty == "b64" { 'b' } else { 'a' };
            let operands: Vec<_> = (1..=*sources).map(|i| format!("%{letter}{i}")).collect();
            body += &format!("mov.{ty} %{letter}0, 7; {guard}{name} %{letter}0, {};\n", operands.join(", "));
            // Rows of bytes are not aligned to 8.
            if *ty == "b64" {
                body += &format!(
                    "mov.b64 {{%t, %a0}}, %b0; st.global.b32 [%o+{at}], %t; st.global.b32 [%o+{}], %a0;",
                    at + 4
                );
            } else {
                body += &format!("st.global.b32 [%o+{at}], %a0;");
            }
            at += width(ty);
        }
    }
    body += "ret;";
    let mut words = Words(seed);
    let (input, output) = (Buffer::new(&words.many(6 * 256)), Buffer::new(&vec![0u32; 2 * total / 4 * 256]));
    let run = Run { block: 256, config: Config { isa: Some(isa), ..Run::default().config }, ..Run::default() };
    run.run(&body, &[input.address, output.address]).unwrap();
    output.read()
}

fn warp_products(isa: Isa, seed: u64) -> Vec<u32> {
    let shapes = [
        "m16n8k16.row.col.f32.bf16.bf16.f32",
        "m16n8k8.row.col.f32.bf16.bf16.f32",
        "m16n8k16.row.col.f32.f16.f16.f32",
        "m16n8k8.row.col.f32.f16.f16.f32",
        "m16n8k8.row.col.f32.tf32.tf32.f32",
        "m16n8k4.row.col.f32.tf32.tf32.f32",
        "m16n8k32.row.col.s32.s8.u8.s32",
    ];
    let mut body = String::from(
        ".reg .b64 %i, %o; .reg .b32 %t, %a<10>, %d<4>; ld.param.u64 %i, [p0]; ld.param.u64 %o, [p1]; mov.u32 %t, %tid.x;
         mad.wide.u32 %i, %t, 40, %i;",
    );
    body += &format!("mad.wide.u32 %o, %t, {}, %o;", 16 * shapes.len());
    (0..10).for_each(|i| body += &format!("ld.global.b32 %a{i}, [%i+{}];", 4 * i));
    for (s, shape) in shapes.iter().enumerate() {
        let small = ["k8.row.col.f32.b", "k8.row.col.f32.f16", "k4."].iter().any(|k| shape.contains(k));
        let (a, b) = if small { ("{%a0, %a1}", "{%a4}") } else { ("{%a0, %a1, %a2, %a3}", "{%a4, %a5}") };
        body += &format!("mma.sync.aligned.{shape} {{%d0, %d1, %d2, %d3}}, {a}, {b}, {{%a6, %a7, %a8, %a9}};");
        (0..4).for_each(|i| body += &format!("st.global.b32 [%o+{}], %d{i};", 16 * s + 4 * i));
    }
    body += "ret;";
    let (input, output) = (Buffer::new(&Words(seed).many(320)), Buffer::new(&vec![0u32; 128 * shapes.len()]));
    let run = Run { config: Config { isa: Some(isa), ..Run::default().config }, ..Run::default() };
    run.run(&body, &[input.address, output.address]).unwrap();
    output.read()
}

fn warpgroup_products(isa: Isa, seed: u64) -> Vec<u32> {
    let mut all = Vec::new();
    for (types, k, n, tail) in [
        ("f32.bf16.bf16", 16, 88, ", 1, 1, 0, 0"),
        ("f32.f16.f16", 16, 32, ", 1, -1, 1, 0"),
        ("f16.f16.f16", 16, 24, ", 1, 1, 0, 1"),
        ("f32.tf32.tf32", 8, 40, ", -1, 1"),
        ("f32.e4m3.e5m2", 32, 16, ", 1, 1"),
        ("f16.e5m2.e4m3", 32, 64, ", 1, 1"),
        ("s32.s8.u8", 32, 48, ""),
    ] {
        let registers = if types.starts_with("f16") { n / 4 } else { n / 2 };
        let mut words = Words(seed);
        let bytes = |w: Vec<u32>| w.into_iter().flat_map(u32::to_le_bytes).collect::<Vec<_>>();
        let body = format!(
            "wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.m64n{n}k{k}.{types} {}, %da, %db, %scale{tail};
             wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;",
            list("d", registers)
        );
        let got = Program64 {
            threads: 128,
            image: bytes(words.many(16384)),
            registers,
            accumulators: words.many(128 * registers),
            a_words: vec![],
            a: descriptor(0, 2048, 1024, 0, 1),
            b: descriptor(16384, 2048, 1024, 0, 1),
            scale: true,
            seed: 0,
            isa: Some(isa),
            body,
        }
        .run()
        .unwrap();
        all.extend(got);
    }
    all
}

/// Vector loads and stores of lanes that lie side by side, apart, and half of which are masked.
fn accesses(isa: Isa, seed: u64) -> Vec<u32> {
    let mut body = String::from(
        ".reg .pred %p; .reg .b64 %i, %o, %x, %w<4>; .reg .b32 %t, %a<4>; ld.param.u64 %i, [p0]; ld.param.u64 %o, [p1];
         mov.u32 %t, %tid.x; and.b32 %a0, %t, 1; setp.ne.u32 %p, %a0, 0;",
    );
    let mut at = 0;
    for guard in ["", "@%p "] {
        for (vector, regs, step) in [
            (".b32", "%a0", 4),
            (".b32", "%a0", 12),
            (".v2.b32", "{%a0, %a1}", 8),
            (".v2.b32", "{%a1, %a0}", 24),
            (".v4.b32", "{%a0, %a1, %a2, %a3}", 16),
            (".v4.b32", "{%a3, %a0, %a2, %a1}", 48),
            (".v2.b64", "{%w0, %w1}", 16),
            (".u16", "%a0", 2),
            (".s8", "%a0", 1),
        ] {
            body += &format!(
                "mad.wide.u32 %x, %t, {step}, %i; {guard}ld.global{vector} {regs}, [%x];
                 mad.wide.u32 %x, %t, {step}, %o; {guard}st.global{vector} [%x+{at}], {regs};"
            );
            at += 128 * 48;
        }
    }
    body += "ret;";
    let (input, output) = (Buffer::new(&Words(seed).many(128 * 12)), Buffer::new(&vec![0u32; at / 4]));
    let run = Run { block: 128, config: Config { isa: Some(isa), ..Run::default().config }, ..Run::default() };
    run.run(&body, &[input.address, output.address]).unwrap();
    output.read()
}

#[test]
fn all_compute_the_same_bits() {
    let sets = Isa::available();
    println!("{sets:?}");
    for seed in 0..8 {
        for (name, f) in [
            ("lane-wise", lane_wise as fn(Isa, u64) -> Vec<u32>),
            ("accesses", accesses),
            ("warp products", warp_products),
            ("warpgroup products", warpgroup_products),
        ] {
            let plain = f(Isa::Baseline, seed);
            for isa in &sets[1..] {
                let got = f(*isa, seed);
                let differ = plain.iter().zip(&got).position(|(a, b)| a != b);
                assert_eq!(differ, None, "{name}, {isa:?}, seed {seed}: first of {} words that differ", plain.len());
            }
        }
    }
}
