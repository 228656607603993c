//! `ldmatrix`, `stmatrix` and `mma.sync` (PTX ISA 9.7.14), against plain matrix products through the manual's layouts.

use half::{bf16, f16};
use softcuda::exec::FaultKind;

use crate::device::{Buffer, Run};

/// Runs `instruction` on registers loaded word by word: `%a<i>` are words 0.. of each lane's input, results `%d<i>`.
fn on_words(instruction: &str, words: &[Vec<u32>], results: usize, wide: bool) -> Vec<Vec<u32>> {
    let n = words[0].len();
    let input: Vec<u32> = words.iter().flatten().copied().collect();
    let (i, o) = (Buffer::new(&input), Buffer::new(&vec![0u32; 32 * results * if wide { 2 } else { 1 }]));
    let ty = if wide { "b64" } else { "b32" };
    let step = if wide { 8 } else { 4 };
    let count = n * 4 / step;
    let loads: String = (0..count).map(|k| format!("ld.global.{ty} %a{k}, [%i+{}];", step * k)).collect();
    let stores: String = (0..results).map(|k| format!("st.global.{ty} [%o+{}], %d{k};", step * k)).collect();
    Run::default()
        .run(
            &format!(
                ".reg .b64 %i, %o; .reg .b32 %t; .reg .{ty} %a<16>, %d<8>; ld.param.u64 %i, [p0]; ld.param.u64 %o, [p1];
                 mov.u32 %t, %tid.x; mad.wide.u32 %i, %t, {}, %i; mad.wide.u32 %o, %t, {}, %o; {loads} {instruction} {stores} ret;",
                4 * n,
                step * results
            ),
            &[i.address, o.address],
        )
        .unwrap_or_else(|e| panic!("{instruction}: {e}"));
    o.read::<u32>().chunks(results * step / 4).map(<[u32]>::to_vec).collect()
}

/// A number for a matrix element, exact in every type.
fn element(seed: usize, row: usize, column: usize) -> f32 {
    ((row * 7 + column * 3 + seed * 5) % 13) as f32 - 6.0
}

struct Shape {
    name: &'static str,
    k: usize,
    /// Elements in a 32-bit register.
    pack: usize,
    types: &'static str,
    encode: fn(f32) -> u32,
    half_sum: bool,
}

/// m16n8k*: with g = lane / 4, t = lane % 4, register r of A holds row g + 8 (r % 2), columns pack·t + 4·pack·(r / 2) and on;
/// of B column g, rows likewise; of C rows g, g, g + 8, g + 8, columns 2t, 2t + 1.
#[test]
fn products() {
    let shapes = [
        Shape {
            name: "m16n8k16",
            k: 16,
            pack: 2,
            types: "f32.bf16.bf16.f32",
            encode: |x| bf16::from_f32(x).to_bits().into(),
            half_sum: false,
        },
        Shape {
            name: "m16n8k8",
            k: 8,
            pack: 2,
            types: "f32.bf16.bf16.f32",
            encode: |x| bf16::from_f32(x).to_bits().into(),
            half_sum: false,
        },
        Shape {
            name: "m16n8k16",
            k: 16,
            pack: 2,
            types: "f32.f16.f16.f32",
            encode: |x| f16::from_f32(x).to_bits().into(),
            half_sum: false,
        },
        Shape {
            name: "m16n8k8",
            k: 8,
            pack: 2,
            types: "f32.f16.f16.f32",
            encode: |x| f16::from_f32(x).to_bits().into(),
            half_sum: false,
        },
        Shape {
            name: "m16n8k16",
            k: 16,
            pack: 2,
            types: "f16.f16.f16.f16",
            encode: |x| f16::from_f32(x).to_bits().into(),
            half_sum: true,
        },
        Shape { name: "m16n8k8", k: 8, pack: 1, types: "f32.tf32.tf32.f32", encode: f32::to_bits, half_sum: false },
        Shape { name: "m16n8k4", k: 4, pack: 1, types: "f32.tf32.tf32.f32", encode: f32::to_bits, half_sum: false },
        Shape {
            name: "m16n8k32",
            k: 32,
            pack: 4,
            types: "s32.s8.s8.s32",
            encode: |x| u32::from(x as i8 as u8),
            half_sum: false,
        },
        Shape {
            name: "m16n8k16",
            k: 16,
            pack: 4,
            types: "s32.u8.s8.s32",
            encode: |x| u32::from(x as i8 as u8),
            half_sum: false,
        },
    ];
    for s in shapes {
        let integer = s.types.starts_with("s32");
        let unsigned_a = s.types.contains("u8");
        let bits = 32 / s.pack;
        let groups = s.k / (4 * s.pack);
        let a_value = |row, column| if unsigned_a { element(1, row, column).abs() } else { element(1, row, column) };
        let mut words = Vec::new();
        for lane in 0..32 {
            let (g, t) = (lane / 4, lane % 4);
            let pack = |value: &dyn Fn(usize) -> f32, group: usize| {
                (0..s.pack).map(|i| (s.encode)(value((group * 4 + t) * s.pack + i)) << (bits * i)).sum::<u32>()
            };
            let mut lane_words = Vec::new();
            for group in 0..groups {
                for upper in 0..2 {
                    lane_words.push(pack(&|column| a_value(g + 8 * upper, column), group));
                }
            }
            for group in 0..groups {
                lane_words.push(pack(&|row| element(2, row, g), group));
            }
            let c = |i: usize| element(3, g + 8 * (i / 2), 2 * t + i % 2);
            if s.half_sum {
                let h = |i| u32::from(f16::from_f32(c(i)).to_bits());
                lane_words.extend([h(0) | h(1) << 16, h(2) | h(3) << 16]);
            } else {
                lane_words.extend((0..4).map(|i| if integer { c(i) as i32 as u32 } else { c(i).to_bits() }));
            }
            words.push(lane_words);
        }
        let results = if s.half_sum { 2 } else { 4 };
        let list = |name: &str, from: usize, n: usize| {
            (from..from + n).map(|i| format!("%{name}{i}")).collect::<Vec<_>>().join(", ")
        };
        let instruction = format!(
            "mma.sync.aligned.{}.row.col.{} {{{}}}, {{{}}}, {{{}}}, {{{}}};",
            s.name,
            s.types,
            list("d", 0, results),
            list("a", 0, 2 * groups),
            list("a", 2 * groups, groups),
            list("a", 3 * groups, results)
        );
        let got = on_words(&instruction, &words, results, false);
        for lane in 0..32 {
            for i in 0..4 {
                let (row, column) = (lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2);
                let want =
                    element(3, row, column) + (0..s.k).map(|k| a_value(row, k) * element(2, k, column)).sum::<f32>();
                let got = if s.half_sum {
                    f16::from_bits((got[lane][i / 2] >> (16 * (i % 2))) as u16).to_f32()
                } else if integer {
                    got[lane][i] as i32 as f32
                } else {
                    f32::from_bits(got[lane][i])
                };
                assert_eq!(got, want, "{instruction} row {row} column {column}");
            }
        }
    }
}

#[test]
fn double_precision_product() {
    let mut words = Vec::new();
    for lane in 0..32 {
        let (g, t) = (lane / 4, lane % 4);
        let values = [element(1, g, t), element(2, t, g), element(3, g, 2 * t), element(3, g, 2 * t + 1)];
        words.push(
            values
                .iter()
                .flat_map(|v| {
                    let b = f64::from(*v).to_bits();
                    [b as u32, (b >> 32) as u32]
                })
                .collect(),
        );
    }
    let got = on_words(
        "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%d0, %d1}, {%a0}, {%a1}, {%a2, %a3};",
        &words,
        2,
        true,
    );
    for lane in 0..32 {
        for i in 0..2 {
            let (row, column) = (lane / 4, 2 * (lane % 4) + i);
            let want =
                element(3, row, column) + (0..4).map(|k| element(1, row, k) * element(2, k, column)).sum::<f32>();
            let bits = u64::from(got[lane][2 * i]) | u64::from(got[lane][2 * i + 1]) << 32;
            assert_eq!(f64::from_bits(bits), f64::from(want));
        }
    }
}

#[test]
fn tf32_ignores_low_bits_and_saturation_clamps() {
    let one = |bits: u32| vec![vec![bits, bits, 0x3f80_0000, 0, 0, 0, 0]; 32];
    let text = "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%d0, %d1, %d2, %d3}, {%a0, %a1}, {%a2}, {%a3, %a4, %a5, %a6};";
    assert_eq!(on_words(text, &one(0x3f80_1fff), 4, false)[0][0], 4f32.to_bits());
    let words = vec![vec![0x7f7f_7f7f, 0x7f7f_7f7f, 0x7fff_ff00]; 32];
    let text = "mma.sync.aligned.m8n8k16.row.col.satfinite.s32.s8.s8.s32 {%d0, %d1}, {%a0}, {%a1}, {%a2, %a2};";
    assert_eq!(on_words(text, &words, 2, false)[0], [0x7fff_ffff; 2]);
    let text = "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%d0, %d1}, {%a0}, {%a1}, {%a2, %a2};";
    assert_eq!(on_words(text, &words, 2, false)[0], [0x7fff_ff00u32.wrapping_add(16 * 127 * 127); 2]);
}

/// Matrix i, row r, column c.
fn cell(i: usize, r: usize, c: usize) -> u32 {
    (i * 64 + r * 8 + c) as u32
}

#[test]
fn ldmatrix_and_stmatrix() {
    for (count, trans) in [(1, false), (2, true), (4, false), (4, true)] {
        let t = if trans { ".trans" } else { "" };
        let regs = |name: &str| (0..count).map(|i| format!("%{name}{i}")).collect::<Vec<_>>().join(", ");
        // Rows lie 16 bytes apart; lane l gives the address of row l.
        let load = format!(
            ".shared .align 16 .b8 s[512]; .reg .b32 %s, %w; .reg .b64 %g; mov.u32 %s, s; mad.lo.u32 %s, %t, 16, %s;
             st.shared.v4.b32 [%s], {{%a0, %a1, %a2, %a3}}; bar.warp.sync -1;
             ldmatrix.sync.aligned.m8n8.x{count}{t}.shared.b16 {{{}}}, [%s];",
            regs("d")
        );
        let words: Vec<Vec<u32>> = (0..32)
            .map(|l| (0..4).map(|w| cell(l / 8, l % 8, 2 * w) | cell(l / 8, l % 8, 2 * w + 1) << 16).collect())
            .collect();
        for (lane, got) in on_words(&load, &words, count, false).iter().enumerate() {
            for (i, got) in got.iter().enumerate() {
                let (r, c) = (lane / 4, 2 * (lane % 4));
                let want = if trans {
                    cell(i, c, r) | cell(i, c + 1, r) << 16
                } else {
                    cell(i, r, c) | cell(i, r, c + 1) << 16
                };
                assert_eq!(*got, want, "x{count}{t} lane {lane} matrix {i}");
            }
        }
        // Storing what was loaded brings the rows back, through a generic address here.
        let back = load
            + &format!(
                "st.shared.v4.b32 [%s], {{0, 0, 0, 0}}; bar.warp.sync -1; cvt.u64.u32 %g, %s; cvta.shared.u64 %g, %g;
                 stmatrix.sync.aligned.m8n8.x{count}{t}.b16 [%g], {{{}}}; bar.warp.sync -1;
                 ld.shared.v4.b32 {{%d0, %d1, %d2, %d3}}, [%s];",
                regs("d")
            );
        for (lane, got) in on_words(&back, &words, 4, false).iter().enumerate() {
            assert_eq!(
                *got,
                if lane / 8 < count { words[lane].clone() } else { vec![0; 4] },
                "x{count}{t} lane {lane}"
            );
        }
    }
}

#[test]
fn matrix_instructions_need_the_whole_warp() {
    let mma = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f0, %f1, %f2, %f3}, {%r2, %r3}, {%r4}, {%f0, %f1, %f2, %f3};";
    let fault = Run::default().try_per_thread(&format!("setp.lt.u32 %p, %lane, 16; @%p {mma}")).unwrap_err();
    assert_eq!(fault.kind, FaultKind::IllegalInstruction, "{fault}");
    let fault = Run { block: 16, ..Run::default() }.try_per_thread(mma).unwrap_err();
    assert!(fault.message.contains("all 32 lanes"), "{fault}");
    let fault = Run::default()
        .try_per_thread(".shared .align 16 .b8 s[128]; setp.eq.u32 %p, %lane, 9; @%p bra END; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [s]; END: bar.sync 0;")
        .unwrap_err();
    assert_eq!(fault.kind, FaultKind::Deadlock, "{fault}");
}
