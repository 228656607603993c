//! f32 and f64 instructions (PTX ISA 9.7.3). Approximate functions are computed in f64 and rounded once: hardware may
//! differ from them within the error bound that the manual states for each.

/// The NaN that every f32 instruction produces (PTX ISA 9.7.3: payloads are not preserved).
#[inline(always)]
pub fn canon(x: f32) -> f32 {
    // On bits, for the compiler takes all NaNs for alike and would leave this out.
    let bits = x.to_bits();
    f32::from_bits(if bits & 0x7fff_ffff > 0x7f80_0000 { 0x7fff_ffff } else { bits })
}

/// Subnormals to zero of the same sign.
#[inline(always)]
pub fn ftz(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(if bits & 0x7f80_0000 == 0 { bits & 0x8000_0000 } else { bits })
}

/// Bits ordered as the numbers are, −0 below +0.
#[inline(always)]
fn order(x: f32) -> i32 {
    let bits = x.to_bits() as i32;
    bits ^ ((bits >> 31) & 0x7fff_ffff)
}

/// The other operand where one is NaN, −0 < +0.
#[inline(always)]
pub fn min(a: f32, b: f32) -> f32 {
    let m = if order(a) < order(b) { a } else { b };
    let m = if b.is_nan() { a } else { m };
    canon(if a.is_nan() { b } else { m })
}

/// See [`min`].
#[inline(always)]
pub fn max(a: f32, b: f32) -> f32 {
    let m = if order(a) > order(b) { a } else { b };
    let m = if b.is_nan() { a } else { m };
    canon(if a.is_nan() { b } else { m })
}

/// `.NaN`: canonical NaN where either operand is one.
#[inline(always)]
pub fn nan_if(a: f32, b: f32, x: f32) -> f32 {
    f32::from_bits(if a.is_nan() | b.is_nan() { 0x7fff_ffff } else { x.to_bits() })
}

/// `.xorsign.abs`: the sign is the exclusive or of the operands' signs.
pub fn xorsign(a: f32, b: f32, magnitude: f32) -> f32 {
    if magnitude.is_nan() {
        return canon(magnitude);
    }
    f32::from_bits(magnitude.to_bits() & 0x7fff_ffff | (a.to_bits() ^ b.to_bits()) & 0x8000_0000)
}

pub fn min_f64(a: f64, b: f64) -> f64 {
    match (a.is_nan(), b.is_nan()) {
        (true, true) => a,
        (true, false) => b,
        (false, true) => a,
        _ => {
            if a.total_cmp(&b).is_lt() {
                a
            } else {
                b
            }
        }
    }
}

pub fn max_f64(a: f64, b: f64) -> f64 {
    match (a.is_nan(), b.is_nan()) {
        (true, true) => a,
        (true, false) => b,
        (false, true) => a,
        _ => {
            if a.total_cmp(&b).is_gt() {
                a
            } else {
                b
            }
        }
    }
}

/// `a · (1/b)`: for |b| above 2^126 the reciprocal underflows to zero, as the manual says.
pub fn div_approx(a: f32, b: f32) -> f32 {
    let huge = b.abs() > f32::from_bits(0x7e80_0000) && b.is_finite();
    if huge {
        return if a.is_infinite() || a.is_nan() { canon(f32::NAN) } else { 0f32.copysign(a * b.signum()) };
    }
    canon(a / b)
}

pub fn rcp(x: f32) -> f32 {
    canon(1.0 / x)
}

pub fn rsqrt(x: f32) -> f32 {
    canon((1.0 / f64::from(x).sqrt()) as f32)
}

pub fn sin(x: f32) -> f32 {
    canon(f64::from(x).sin() as f32)
}

pub fn cos(x: f32) -> f32 {
    canon(f64::from(x).cos() as f32)
}

pub fn lg2(x: f32) -> f32 {
    canon(f64::from(x).log2() as f32)
}

pub fn ex2(x: f32) -> f32 {
    canon(f64::from(x).exp2() as f32)
}

pub fn tanh(x: f32) -> f32 {
    canon(f64::from(x).tanh() as f32)
}

/// Works on the upper 32 bits of the operand and delivers zeros in the lower 32 (PTX ISA 9.7.3, `rcp.approx.ftz.f64`).
pub fn rcp_approx_f64(x: f64) -> f64 {
    upper(ftz_f64(1.0 / ftz_f64(upper(x))))
}

/// See [`rcp_approx_f64`].
pub fn rsqrt_approx_f64(x: f64) -> f64 {
    upper(1.0 / ftz_f64(upper(x)).sqrt())
}

fn upper(x: f64) -> f64 {
    f64::from_bits(x.to_bits() & 0xffff_ffff_0000_0000)
}

fn ftz_f64(x: f64) -> f64 {
    if x.is_subnormal() { 0f64.copysign(x) } else { x }
}

/// Towards zero, clamped; NaN becomes 0.
#[inline(always)]
pub fn to_s32(x: f32) -> i32 {
    x as i32
}

/// Ties away from zero at 10 mantissa bits; the 13 bits below are zero.
#[inline(always)]
pub fn to_tf32_rna(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x1000) & 0xffff_e000;
    let special = bits & 0x7f80_0000 == 0x7f80_0000;
    let nan = bits & 0x7fff_ffff > 0x7f80_0000;
    if nan {
        0x7fff_ffff
    } else if special {
        bits
    } else {
        rounded
    }
}
