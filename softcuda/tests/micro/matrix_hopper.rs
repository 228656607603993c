//! `mma.sync` of sm_89 and sm_90, and `movmatrix` (PTX ISA 9.7.14.5), against plain products through the manual's layouts.

use half::f16;

use crate::device::Buffer;
use crate::hopper::{Hopper, lower};

/// Runs `instruction` on a warp; `%a<i>` are words 0.. of each lane's input, results `%d<i>`.
fn on_words(instruction: &str, words: &[Vec<u64>], results: usize) -> Vec<Vec<u64>> {
    let n = words[0].len();
    let input: Vec<u64> = words.iter().flatten().copied().collect();
    let (i, o) = (Buffer::new(&input), Buffer::new(&vec![0u64; 32 * results]));
    let wide = instruction.contains(".f64");
    let ty = if wide { "b64" } else { "b32" };
    let loads: String = (0..n).map(|k| format!("ld.global.{ty} %a{k}, [%i+{}];", 8 * k)).collect();
    let stores: String = (0..results).map(|k| format!("st.global.{ty} [%o+{}], %d{k};", 8 * k)).collect();
    Hopper::default()
        .run(
            &format!(
                ".reg .b64 %i, %o; .reg .b32 %t; .reg .{ty} %a<16>, %d<8>; ld.param.u64 %i, [p0]; ld.param.u64 %o, [p1];
                 mov.u32 %t, %tid.x; mad.wide.u32 %i, %t, {}, %i; mad.wide.u32 %o, %t, {}, %o; {loads} {instruction} {stores} ret;",
                8 * n,
                8 * results
            ),
            &[i.address, o.address],
        )
        .unwrap_or_else(|e| panic!("{instruction}: {e}"));
    o.read::<u64>().chunks(results).map(<[u64]>::to_vec).collect()
}

fn list(name: &str, from: usize, n: usize) -> String {
    let regs: Vec<_> = (from..from + n).map(|i| format!("%{name}{i}")).collect();
    format!("{{{}}}", regs.join(", "))
}

fn element(seed: usize, row: usize, column: usize) -> f64 {
    ((row * 7 + column * 3 + seed * 5) % 13) as f64 - 6.0
}

/// A number of up to 4 significant bits in fp8: bits of mantissa, bias.
fn eight_bit(x: f64, mantissa: i32, bias: i32) -> u64 {
    if x == 0.0 {
        return 0;
    }
    let e = x.abs().log2().floor() as i32;
    let rest = (x.abs() / 2f64.powi(e) - 1.0) * 2f64.powi(mantissa);
    assert_eq!(rest.fract(), 0.0, "{x} is exact");
    u64::from(x < 0.0) << 7 | (((e + bias) << mantissa) + rest as i32) as u64
}

/// Each element in its lane, register and byte: A's register r holds row g + 8 (r % 2) and columns 16 (r / 2) + 4t on.
#[test]
fn products_of_fp8() {
    let encodings = [("e4m3", 3, 7), ("e5m2", 2, 15)];
    // Numbers that both have exactly: two significant bits after the leading one.
    let value =
        |seed, row, column| [0.0, 1.0, -1.5, 1.75, -2.0, 0.5, 6.0][((element(seed, row, column) + 6.0) as usize) % 7];
    for k in [16, 32] {
        for (a_name, a_m, a_bias) in encodings {
            for (b_name, b_m, b_bias) in encodings {
                for half in [false, true] {
                    let (a_count, b_count, c_count) = (k / 8, k / 16, if half { 2 } else { 4 });
                    let words: Vec<Vec<u64>> = (0..32)
                        .map(|lane| {
                            let (g, t) = (lane / 4, lane % 4);
                            let a = (0..a_count).map(|r| {
                                let at = |i| value(1, g + 8 * (r % 2), 16 * (r / 2) + 4 * t + i);
                                (0..4).map(|i| eight_bit(at(i), a_m, a_bias) << (8 * i)).sum()
                            });
                            let b = (0..b_count).map(|r| {
                                let at = |i| value(2, 16 * r + 4 * t + i, g);
                                (0..4).map(|i| eight_bit(at(i), b_m, b_bias) << (8 * i)).sum()
                            });
                            let c = |r: usize, i: usize| element(3, g + 8 * r, 2 * t + i);
                            let c = (0..c_count).map(|r| match half {
                                true => (0..2).map(|i| u64::from(f16::from_f64(c(r, i)).to_bits()) << (16 * i)).sum(),
                                false => u64::from((c(r / 2, r % 2) as f32).to_bits()),
                            });
                            a.chain(b).chain(c).collect()
                        })
                        .collect();
                    let ty = if half { "f16" } else { "f32" };
                    let instruction = format!(
                        "mma.sync.aligned.m16n8k{k}.row.col.{ty}.{a_name}.{b_name}.{ty} {}, {}, {}, {};",
                        list("d", 0, c_count),
                        list("a", 0, a_count),
                        list("a", a_count, b_count),
                        list("a", a_count + b_count, c_count)
                    );
                    for (lane, got) in on_words(&instruction, &words, c_count).iter().enumerate() {
                        for i in 0..4 {
                            let (row, column) = (lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2);
                            let sum = (0..k).map(|k| value(1, row, k) * value(2, k, column)).sum::<f64>();
                            let want = element(3, row, column) + sum;
                            let got = match half {
                                true => f16::from_bits((got[i / 2] >> (16 * (i % 2))) as u16).to_f64(),
                                false => f32::from_bits(got[i] as u32).into(),
                            };
                            assert_eq!(got, want, "{instruction} row {row} column {column}");
                        }
                    }
                }
            }
        }
    }
}

/// A's register r holds row g + 8 (r % 2) and column 4 (r / 2) + t.
#[test]
fn products_of_f64() {
    for k in [4, 8, 16] {
        let (a_count, b_count) = (k / 2, k / 4);
        // Sums that f32 could not hold.
        let value = |seed, row, column| element(seed, row, column) + 2f64.powi(-30);
        let words: Vec<Vec<u64>> = (0..32)
            .map(|lane| {
                let (g, t) = (lane / 4, lane % 4);
                let a = (0..a_count).map(|r| value(1, g + 8 * (r % 2), 4 * (r / 2) + t));
                let b = (0..b_count).map(|r| value(2, 4 * r + t, g));
                let c = (0..4).map(|r| value(3, g + 8 * (r / 2), 2 * t + r % 2));
                a.chain(b).chain(c).map(f64::to_bits).collect()
            })
            .collect();
        let instruction = format!(
            "mma.sync.aligned.m16n8k{k}.row.col.f64.f64.f64.f64 {}, {}, {}, {};",
            list("d", 0, 4),
            list("a", 0, a_count),
            list("a", a_count, b_count),
            list("a", a_count + b_count, 4)
        );
        for (lane, got) in on_words(&instruction, &words, 4).iter().enumerate() {
            for i in 0..4 {
                let (row, column) = (lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2);
                let want = (0..k).fold(value(3, row, column), |s, k| value(1, row, k).mul_add(value(2, k, column), s));
                assert_eq!(f64::from_bits(got[i]), want, "{instruction} row {row} column {column}");
            }
        }
    }
}

#[test]
fn movmatrix_transposes() {
    let cell = |row: usize, column: usize| (row * 8 + column + 1) as u64;
    let words: Vec<Vec<u64>> =
        (0..32).map(|l| vec![cell(l / 4, l % 4 * 2) | cell(l / 4, l % 4 * 2 + 1) << 16]).collect();
    for (lane, got) in on_words("movmatrix.sync.aligned.m8n8.trans.b16 %d0, %a0;", &words, 1).iter().enumerate() {
        let (row, column) = (lane / 4, lane % 4 * 2);
        assert_eq!(got[0], cell(column, row) | cell(column + 1, row) << 16, "lane {lane}");
    }
}

#[test]
fn refusals_name_the_instruction() {
    for (instruction, says) in [
        (
            "mma.sp.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%f0,%f1,%f2,%f3}, {%r0,%r1}, {%r2,%r3}, {%f0,%f1,%f2,%f3}, %r4, 0;",
            "sparse",
        ),
        (
            "mma.sync.aligned.m16n8k32.row.col.s32.s4.s4.s32 {%r0,%r1,%r2,%r3}, {%r4,%r5}, {%r6}, {%r0,%r1,%r2,%r3};",
            "4-bit",
        ),
        (
            "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%r0,%r1,%r2,%r3}, {%r4,%r5,%r6,%r7}, {%r8,%r9}, {%r0,%r1,%r2,%r3};",
            "single bits",
        ),
        (
            "mma.sync.aligned.m8n8k4.row.col.f16.f16.f16.f16 {%r0,%r1,%r2,%r3}, {%r4,%r5}, {%r6,%r7}, {%r0,%r1,%r2,%r3};",
            "sm_70",
        ),
        (
            "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f16 {%f0,%f1,%f2,%f3}, {%r0,%r1,%r2,%r3}, {%r4,%r5}, {%r6,%r7};",
            "unknown",
        ),
        ("ldmatrix.sync.aligned.m8n16.x1.shared.b8x16.b4x16_p64 {%r0}, [%r1];", "unknown"),
        ("movmatrix.sync.aligned.m8n8.b16 %r0, %r1;", "unknown"),
    ] {
        let text = Hopper::default().text(0, &format!(".reg .b32 %r<16>; .reg .f32 %f<8>; {instruction} ret;"));
        let error = lower(&text).err().unwrap_or_else(|| panic!("{instruction} is accepted")).to_string();
        assert!(error.contains(says), "{instruction}: {error}");
    }
    let fp8 = "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%f0,%f1,%f2,%f3}, {%r0,%r1,%r2,%r3}, {%r4,%r5}, {%f0,%f1,%f2,%f3};";
    let text = Hopper::default().text(0, &format!(".reg .b32 %r<16>; .reg .f32 %f<8>; {fp8} ret;"));
    assert!(lower(&text.replace("sm_90a", "sm_80")).unwrap_err().to_string().contains("sm_89"));
}
