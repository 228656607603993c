//! Floating-point arithmetic and conversions in all their modes, lane by lane.

use super::access::{get, put};
use super::lanes::{File, LANES, active};
use super::numeric::exact::f64_op;
use super::numeric::float;
use super::numeric::rounding::{self, Format, Round, add_odd, div_odd, fma_odd, round, sqrt_odd};
use super::numeric::{BF16, F16, F16x2};
use crate::lower::ir::{Arith, ArithOp, Cvt};
use crate::ptx::ast::Type;

/// f32, f16 and bf16 arithmetic: formed in f64 rounded to odd, then rounded once. f64: from exact values.
pub fn arith(file: File, x: &Arith, mask: u32) {
    let sources: Vec<[u64; LANES]> = x.sources.iter().map(|r| get(file, *r)).collect();
    let mut out = [0; LANES];
    if x.ty == Type::F64 {
        for i in active(mask) {
            let operand = |n: usize| sources.get(n).map_or(0.0, |s| f64::from_bits(s[i]));
            out[i] = f64_op(x.op, operand(0), operand(1), operand(2), x.round).to_bits();
        }
        return put(file, x.d, mask, &out);
    }
    for i in active(mask) {
        let operand = |n: usize| sources.get(n).map_or(0, |s| s[i] as u32);
        let (a, b, c) = (operand(0), operand(1), operand(2));
        out[i] = u64::from(match x.ty {
            Type::F32 => one(x, Format::F32, a, b, c),
            Type::F16 => one(x, Format::F16, a, b, c),
            Type::BF16 => one(x, Format::BF16, a, b, c),
            ty => {
                let format = if ty == Type::F16x2 { Format::F16 } else { Format::BF16 };
                let low = one(x, format, a & 0xffff, b & 0xffff, c & 0xffff);
                low | one(x, format, a >> 16, b >> 16, c >> 16) << 16
            }
        });
    }
    put(file, x.d, mask, &out);
}

fn is_nan(bits: u32, f: Format) -> bool {
    bits & !(1 << f.sign) > f.infinity.unwrap_or(f.nan - 1)
}

fn value(bits: u32, f: Format) -> f64 {
    match f {
        Format::F32 => f32::from_bits(bits).into(),
        Format::F16 => F16(bits as u16).to_f32().into(),
        _ => BF16(bits as u16).to_f32().into(),
    }
}

fn flush(bits: u32, f: Format) -> u32 {
    let subnormal = bits >> f.mantissa & ((1 << (f.sign - f.mantissa)) - 1) == 0;
    if subnormal { bits & 1 << f.sign } else { bits }
}

fn one(x: &Arith, f: Format, a: u32, b: u32, c: u32) -> u32 {
    let flush_if = |v: u32| if x.ftz { flush(v, f) } else { v };
    let (a, b, c) = (flush_if(a), flush_if(b), flush_if(c));
    let sign = 1 << f.sign;
    match x.op {
        ArithOp::Abs => return a & !sign,
        ArithOp::Neg => return a ^ sign,
        ArithOp::Min | ArithOp::Max => return extremum(x, f, a, b),
        _ => {}
    }
    // PTX ISA 5.5: what lies outside a tensor may be filled with this NaN.
    if x.oob && [a, b, c].contains(&0xffff) {
        return 0;
    }
    let (va, vb, vc) = (value(a, f), value(b, f), value(c, f));
    let exact = match x.op {
        ArithOp::Add => add_odd(va, vb),
        ArithOp::Sub => add_odd(va, -vb),
        ArithOp::Mul => va * vb,
        ArithOp::Fma => fma_odd(va, vb, vc),
        ArithOp::Div => div_odd(va, vb),
        ArithOp::Rcp => div_odd(1.0, va),
        _ => sqrt_odd(va),
    };
    // An exact zero sum of opposite signs is −0 only when rounding down.
    let cancelled = match x.op {
        ArithOp::Add => exact == 0.0 && va != 0.0,
        ArithOp::Sub => exact == 0.0 && va != 0.0,
        ArithOp::Fma => exact == 0.0 && vc != 0.0,
        _ => false,
    };
    let opposite_zeros = match x.op {
        ArithOp::Add => va == 0.0 && vb == 0.0 && va.is_sign_negative() != vb.is_sign_negative(),
        ArithOp::Sub => va == 0.0 && vb == 0.0 && va.is_sign_negative() == vb.is_sign_negative(),
        ArithOp::Fma => va * vb == 0.0 && vc == 0.0 && (va * vb).is_sign_negative() != vc.is_sign_negative(),
        _ => false,
    };
    let exact = if (cancelled || opposite_zeros) && x.round == Round::Down { -0.0 } else { exact };
    let rounded = flush_if(round(exact, f, x.round));
    if x.sat {
        return saturate(rounded, f);
    }
    if x.relu && !is_nan(rounded, f) && rounded & sign != 0 {
        return 0;
    }
    rounded
}

/// To [0, 1]; NaN becomes +0.
fn saturate(bits: u32, f: Format) -> u32 {
    let one = round(1.0, f, Round::Nearest);
    if is_nan(bits, f) || bits >> f.sign & 1 == 1 { 0 } else { bits.min(one) }
}

fn extremum(x: &Arith, f: Format, a: u32, b: u32) -> u32 {
    let sign = 1 << f.sign;
    let (nan_a, nan_b) = (is_nan(a, f), is_nan(b, f));
    if nan_a && nan_b || x.nan && (nan_a || nan_b) {
        return f.nan;
    }
    let (ma, mb) = if x.xorsign { (a & !sign, b & !sign) } else { (a, b) };
    let key = |v: u32| if v & sign != 0 { -i64::from(v & !sign) - 1 } else { i64::from(v) };
    let first = if x.op == ArithOp::Min { key(ma) < key(mb) } else { key(ma) > key(mb) };
    let picked = if nan_a {
        mb
    } else if nan_b || first {
        ma
    } else {
        mb
    };
    if x.xorsign { picked & !sign | (a ^ b) & sign } else { picked }
}

fn integer_bits(ty: Type) -> Option<(u32, bool)> {
    Some(match ty {
        Type::U8 => (8, false),
        Type::U16 => (16, false),
        Type::U32 => (32, false),
        Type::U64 => (64, false),
        Type::S8 => (8, true),
        Type::S16 => (16, true),
        Type::S32 => (32, true),
        Type::S64 => (64, true),
        _ => return None,
    })
}

pub fn cvt(file: File, x: &Cvt, mask: u32) {
    let a = get(file, x.a);
    let b = x.b.map(|b| get(file, b));
    let mut out = [0; LANES];
    for i in active(mask) {
        out[i] = convert(x, a[i], b.map_or(0, |b| b[i]));
    }
    // Results narrower than their register are extended by their sign.
    if let Some((bits, true)) = integer_bits(x.to) {
        out = out.map(|v| ((v << (64 - bits)) as i64 >> (64 - bits)) as u64);
    }
    put(file, x.d, mask, &out);
}

/// One lane; the result in the low bits.
fn convert(x: &Cvt, a: u64, b: u64) -> u64 {
    let small = |bits: u64| f64::from(f32::from_bits(bits as u32));
    match (x.to, x.from) {
        (Type::F16x2 | Type::BF16x2, Type::F32) => {
            let f = if x.to == Type::F16x2 { Format::F16 } else { Format::BF16 };
            let half = |bits: u64| finish(x, f, small(bits), x.round);
            u64::from(half(b) | half(a) << 16)
        }
        (Type::E4M3x2 | Type::E5M2x2, from) => {
            let f = if x.to == Type::E4M3x2 { Format::E4M3 } else { Format::E5M2 };
            let byte = |v: f64| finish(x, f, v, x.round);
            let (high, low) = match from {
                Type::F32 => (small(a), small(b)),
                _ => {
                    let pair = F16x2(a as u32);
                    (pair.high().to_f32().into(), pair.low().to_f32().into())
                }
            };
            u64::from(byte(low) | byte(high) << 8)
        }
        (Type::F16x2, from) => {
            let f = if from == Type::E4M3x2 { Format::E4M3 } else { Format::E5M2 };
            let half = |byte: u64| {
                let v = small_float(byte as u32 & 0xff, f);
                finish(x, Format::F16, v, Round::Nearest)
            };
            u64::from(half(a) | half(a >> 8) << 16)
        }
        (Type::TF32, _) => {
            if x.round == Round::NearestAway && !x.satfinite {
                return float::to_tf32_rna(f32::from_bits(a as u32)).into();
            }
            u64::from(finish(x, Format::TF32, small(a), x.round) << 13)
        }
        (to, from) => match (integer_bits(to), integer_bits(from)) {
            (Some(to), Some(from)) => integer_to_integer(a, from, to, x.sat),
            (Some(to), None) => float_to_integer(x, a, to),
            (None, Some(from)) => integer_to_float(x, a, from),
            (None, None) => float_to_float(x, a),
        },
    }
}

/// `v` rounded, with `.relu` and `.satfinite`.
fn finish(x: &Cvt, f: Format, v: f64, mode: Round) -> u32 {
    let sign = 1 << f.sign;
    if v.is_nan() {
        return f.nan;
    }
    if x.relu && v.is_sign_negative() {
        return 0;
    }
    let bits = round(v, f, mode);
    // A format without infinity overflows to NaN.
    if x.satfinite && bits & !sign > f.max_finite {
        return u32::from(v.is_sign_negative()) << f.sign | f.max_finite;
    }
    bits
}

fn small_float(bits: u32, f: Format) -> f64 {
    let magnitude = bits & !(1 << f.sign);
    let sign = if bits >> f.sign & 1 == 1 { -1.0 } else { 1.0 };
    if is_nan(bits, f) {
        return f64::NAN;
    }
    if f.infinity == Some(magnitude) {
        return sign * f64::INFINITY;
    }
    let exponent = (magnitude >> f.mantissa) as i32;
    let fraction = f64::from(magnitude & ((1 << f.mantissa) - 1)) / f64::from(1u32 << f.mantissa);
    let (lead, e) = if exponent == 0 { (0.0, f.min_exponent) } else { (1.0, exponent - 1 + f.min_exponent) };
    sign * (lead + fraction) * 2f64.powi(e)
}

/// The value of the low bits of a register as an integer.
fn integer(a: u64, (bits, signed): (u32, bool)) -> i128 {
    let drop = 64 - bits;
    if signed { i128::from((a << drop) as i64 >> drop) } else { i128::from(a << drop >> drop) }
}

fn limits((bits, signed): (u32, bool)) -> (i128, i128) {
    if signed { (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1) } else { (0, (1i128 << bits) - 1) }
}

fn low_bits(v: i128, bits: u32) -> u64 {
    let v = v as u64;
    if bits == 64 { v } else { v & ((1 << bits) - 1) }
}

fn integer_to_integer(a: u64, from: (u32, bool), to: (u32, bool), sat: bool) -> u64 {
    let v = integer(a, from);
    let (min, max) = limits(to);
    low_bits(if sat { v.clamp(min, max) } else { v }, to.0)
}

/// The source of a conversion from a floating-point type, flushed where asked.
fn float_source(x: &Cvt, a: u64) -> f64 {
    match x.from {
        Type::F64 => f64::from_bits(a),
        Type::F32 => {
            let v = f32::from_bits(a as u32);
            f64::from(if x.ftz { float::ftz(v) } else { v })
        }
        Type::F16 => F16(a as u16).to_f32().into(),
        _ => BF16(a as u16).to_f32().into(),
    }
}

fn to_integral(v: f64, mode: Round) -> f64 {
    match mode {
        Round::Nearest | Round::NearestAway => v.round_ties_even(),
        Round::Zero => v.trunc(),
        Round::Down => v.floor(),
        Round::Up => v.ceil(),
    }
}

/// Clamped to the result's range. NaN becomes 0, or 2^(n-1) where either side has 64 bits.
fn float_to_integer(x: &Cvt, a: u64, to: (u32, bool)) -> u64 {
    let v = float_source(x, a);
    if v.is_nan() {
        return if x.from == Type::F64 || to.0 == 64 { 1 << (to.0 - 1) } else { 0 };
    }
    let (min, max) = limits(to);
    // The cast saturates at the limits of i128, far outside any result's.
    low_bits((to_integral(v, x.round) as i128).clamp(min, max), to.0)
}

fn integer_to_float(x: &Cvt, a: u64, from: (u32, bool)) -> u64 {
    let v = integer(a, from);
    // 64-bit integers do not fit f64: what is lost makes the last bit odd.
    let near = v as f64;
    let odd = rounding::to_odd(near, (v - near as i128) as f64);
    match x.to {
        Type::F64 => match x.round {
            Round::Nearest => near.to_bits(),
            mode => directed_f64(near, v - near as i128, mode).to_bits(),
        },
        Type::F32 => saturated(x, round(odd, Format::F32, x.round), Format::F32),
        Type::F16 => saturated(x, round(odd, Format::F16, x.round), Format::F16),
        _ => saturated(x, round(odd, Format::BF16, x.round), Format::BF16),
    }
}

/// Moves the nearest value to the side that the mode asks for.
fn directed_f64(near: f64, error: i128, mode: Round) -> f64 {
    let down = match mode {
        Round::Zero => near > 0.0,
        Round::Down => true,
        _ => false,
    };
    if error < 0 && down {
        near.next_down()
    } else if error > 0 && !down {
        near.next_up()
    } else {
        near
    }
}

fn saturated(x: &Cvt, bits: u32, f: Format) -> u64 {
    u64::from(if x.sat { saturate(bits, f) } else { bits })
}

fn float_to_float(x: &Cvt, a: u64) -> u64 {
    let mut v = float_source(x, a);
    if x.integral {
        v = to_integral(v, x.round);
    }
    let mode = if x.integral { Round::Nearest } else { x.round };
    match x.to {
        Type::F64 => {
            if x.sat {
                return if v > 0.0 { v.min(1.0) } else { 0.0 }.to_bits();
            }
            v.to_bits()
        }
        Type::F32 => {
            let bits = round(v, Format::F32, mode);
            saturated(x, if x.ftz { flush(bits, Format::F32) } else { bits }, Format::F32)
        }
        Type::F16 => saturated(x, finish(x, Format::F16, v, mode), Format::F16),
        _ => saturated(x, finish(x, Format::BF16, v, mode), Format::BF16),
    }
}
