//! f16, bf16 and their pairs (PTX ISA 9.7.4): one rounding, `.ftz`, `.sat`, `.relu`, NaN rules.

use half::{bf16, f16};

use crate::device::{evaluate, sweep, table};

const NAN: u64 = 0x7fff;
const F16: &[u64] = &[
    0, 0x8000, 1, 0x8001, 0x03ff, 0x0400, 0x3c00, 0x3c01, 0xbc00, 0x4248, 0x7bff, 0xfbff, 0x7c00, 0xfc00, 0x7e01,
    0x1234,
];
const BF16: &[u64] = &[
    0, 0x8000, 1, 0x8001, 0x007f, 0x0080, 0x3f80, 0x3f81, 0xbf80, 0x4049, 0x7f7f, 0xff7f, 0x7f80, 0xff80, 0x7fc1,
    0x0a23,
];

fn h(bits: u64) -> f64 {
    f16::from_bits(bits as u16).to_f64()
}

fn b(bits: u64) -> f64 {
    bf16::from_bits(bits as u16).to_f64()
}

/// f64 holds sums and products of two f16 or bf16 exactly, or close enough that one rounding follows.
fn to_h(x: f64) -> u64 {
    if x.is_nan() { NAN } else { f16::from_f64(x).to_bits().into() }
}

fn to_b(x: f64) -> u64 {
    if x.is_nan() { NAN } else { bf16::from_f64(x).to_bits().into() }
}

#[test]
fn f16_arithmetic() {
    let two = &["b16", "b16"];
    sweep("add.f16 %d, %a, %b;", "b16", two, &[F16, F16], |x| to_h(h(x[0]) + h(x[1])));
    sweep("sub.rn.f16 %d, %a, %b;", "b16", two, &[F16, F16], |x| to_h(h(x[0]) - h(x[1])));
    sweep("mul.f16 %d, %a, %b;", "b16", two, &[F16, F16], |x| to_h(h(x[0]) * h(x[1])));
    sweep("fma.rn.f16 %d, %a, %b, %c;", "b16", &["b16"; 3], &[F16, F16, F16], |x| to_h(h(x[0]) * h(x[1]) + h(x[2])));
    sweep("fma.rn.relu.f16 %d, %a, %b, %c;", "b16", &["b16"; 3], &[F16, F16, &[0, 0xbc00]], |x| {
        let r = h(x[0]) * h(x[1]) + h(x[2]);
        if r.is_nan() {
            NAN
        } else if r.is_sign_negative() {
            0
        } else {
            to_h(r)
        }
    });
    sweep("add.sat.f16 %d, %a, %b;", "b16", two, &[F16, F16], |x| {
        let r = h(x[0]) + h(x[1]);
        if r.is_nan() || r <= 0.0 { 0 } else { to_h(r.min(1.0)) }
    });
    let flush = |x: f64| if x.abs() < 2f64.powi(-14) { 0f64.copysign(x) } else { x };
    sweep("mul.ftz.f16 %d, %a, %b;", "b16", two, &[F16, F16], |x| {
        let r = f16::from_f64(flush(h(x[0])) * flush(h(x[1]))).to_f64();
        to_h(flush(r))
    });
}

#[test]
fn pairs_are_two_lanes() {
    let rows: Vec<Vec<u64>> =
        F16.windows(2).flat_map(|a| F16.windows(2).map(|b| vec![a[0] | a[1] << 16, b[0] | b[1] << 16])).collect();
    for op in ["add", "mul"] {
        let whole = evaluate(&format!("{op}.f16x2 %d, %a, %b;"), "b32", &["b32", "b32"], &rows);
        let half = |shift: u32| {
            let rows: Vec<Vec<u64>> = rows.iter().map(|r| r.iter().map(|x| x >> shift & 0xffff).collect()).collect();
            evaluate(&format!("{op}.f16 %d, %a, %b;"), "b16", &["b16", "b16"], &rows)
        };
        let (low, high) = (half(0), half(16));
        for (i, w) in whole.iter().enumerate() {
            assert_eq!(*w, low[i] | high[i] << 16, "{op}.f16x2 of {:x?}", rows[i]);
        }
    }
}

#[test]
fn bf16_fma_rounds_once() {
    sweep(
        "fma.rn.bf16 %d, %a, %b, %c;",
        "b16",
        &["b16"; 3],
        &[BF16, BF16, &[0, 0x8000, 0x3f80, 0xbf80, 0x7f80]],
        |x| to_b(b(x[0]) * b(x[1]) + b(x[2])),
    );
    // (1 + 2^-7)(1 + 2^-1) = 1.5 + 1.5·2^-7 is half-way between bf16 numbers; the smallest addend decides, though f32 and f64
    // sums would lose it.
    table(
        "fma.rn.bf16 %d, %a, %b, %c;",
        "b16",
        &["b16"; 3],
        &[
            (&[0x3f81, 0x3fc0, 0x0001], 0x3fc2),
            (&[0x3f81, 0x3fc0, 0x8001], 0x3fc1),
            (&[0x3f81, 0x3fc0, 0x0000], 0x3fc2),
        ],
    );
    table("fma.rn.relu.bf16x2 %d, %a, %b, %c;", "b32", &["b32"; 3], &[(&[0xbf80_3f80, 0x3f80_3f80, 0], 0x0000_3f80)]);
    table(
        "fma.rn.bf16x2 %d, %a, %b, %c;",
        "b32",
        &["b32"; 3],
        &[(&[0x4000_3f80, 0x4040_4000, 0x3f80_3f80], 0x40e0_4040)],
    );
}

#[test]
fn minimum_maximum_signs() {
    let two = &["b16", "b16"];
    table(
        "min.f16 %d, %a, %b;",
        "b16",
        two,
        &[(&[0x8000, 0], 0x8000), (&[0x7e01, 0x3c00], 0x3c00), (&[0x7e01, 0xfe00], NAN), (&[0xbc00, 0x3c00], 0xbc00)],
    );
    table("max.NaN.bf16 %d, %a, %b;", "b16", two, &[(&[0x7fc1, 0x3f80], NAN), (&[0xbf80, 0x3f80], 0x3f80)]);
    table("max.f16x2 %d, %a, %b;", "b32", &["b32", "b32"], &[(&[0x3c00_bc00, 0x4000_8000], 0x4000_8000)]);
    table("min.xorsign.abs.f16 %d, %a, %b;", "b16", two, &[(&[0xbc00, 0x4000], 0xbc00)]);
    table("neg.bf16 %d, %a;", "b16", &["b16"], &[(&[0x3f80], 0xbf80)]);
    table("abs.f16x2 %d, %a;", "b32", &["b32"], &[(&[0xbc00_8000], 0x3c00_0000)]);
    table("abs.ftz.f16 %d, %a;", "b16", &["b16"], &[(&[0x8001], 0), (&[0xbc00], 0x3c00)]);
}

#[test]
fn functions() {
    table("ex2.approx.f16 %d, %a;", "b16", &["b16"], &[(&[0x4000], 0x4400), (&[0xfc00], 0), (&[0x7c00], 0x7c00)]);
    table("ex2.approx.f16x2 %d, %a;", "b32", &["b32"], &[(&[0x4000_0000], 0x4400_3c00)]);
    table("ex2.approx.ftz.bf16 %d, %a;", "b16", &["b16"], &[(&[0x4000], 0x4080)]);
    table("tanh.approx.f16 %d, %a;", "b16", &["b16"], &[(&[0x7c00], 0x3c00), (&[0x8000], 0x8000)]);
    table("tanh.approx.bf16x2 %d, %a;", "b32", &["b32"], &[(&[0xff80_0000], 0xbf80_0000)]);
}

/// PTX ISA 9.7.4.4: `.oob` gives zero where an operand is the NaN that fills what lies outside a tensor, and no other NaN.
#[test]
fn fma_outside_of_tensors() {
    let (one, two) = (0x3c00u64, 0x4000u64);
    crate::device::table(
        "fma.rn.oob.f16 %d, %a, %b, %c;",
        "b16",
        &["b16"; 3],
        &[
            (&[one, two, one], 0x4200),
            (&[0xffff, two, one], 0),
            (&[one, 0xffff, one], 0),
            (&[0x7e00, two, one], 0x7fff),
        ],
    );
    crate::device::table(
        "fma.rn.oob.relu.f16x2 %d, %a, %b, %c;",
        "b32",
        &["b32"; 3],
        &[(&[0xffff_3c00, 0x4000_c000, 0x3c00_3c00], 0), (&[0x3c00_3c00, 0x4000_4000, 0x3c00_ffff], 0x4200_0000)],
    );
    crate::device::table("fma.rn.oob.bf16 %d, %a, %b, %c;", "b16", &["b16"; 3], &[(&[0x3f80, 0xffff, 0x3f80], 0)]);
}
