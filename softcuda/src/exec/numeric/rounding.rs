//! Rounding of exact or odd-rounded f64 values to any smaller format and mode.
//!
//! Results of f32, f16 and bf16 arithmetic are formed in f64 rounded to odd (the last bit is set when anything was lost),
//! which keeps a second rounding to 24 bits or fewer correct in every mode.

pub(crate) use crate::lower::Round;

/// A binary floating-point format of at most 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format {
    /// Bits after the leading one.
    pub mantissa: u32,
    /// Exponent of the smallest normal number.
    pub min_exponent: i32,
    /// Bit pattern of the largest finite number.
    pub max_finite: u32,
    /// Bit pattern of infinity, where there is one.
    pub infinity: Option<u32>,
    /// The canonical NaN.
    pub nan: u32,
    /// Position of the sign bit.
    pub sign: u32,
}

impl Format {
    pub const F32: Self = Self {
        mantissa: 23,
        min_exponent: -126,
        max_finite: 0x7f7f_ffff,
        infinity: Some(0x7f80_0000),
        nan: 0x7fff_ffff,
        sign: 31,
    };
    pub const F16: Self =
        Self { mantissa: 10, min_exponent: -14, max_finite: 0x7bff, infinity: Some(0x7c00), nan: 0x7fff, sign: 15 };
    pub const BF16: Self =
        Self { mantissa: 7, min_exponent: -126, max_finite: 0x7f7f, infinity: Some(0x7f80), nan: 0x7fff, sign: 15 };
    /// tf32 before its 13 low zero bits are appended.
    pub const TF32: Self =
        Self { mantissa: 10, min_exponent: -126, max_finite: 0x3fbff, infinity: Some(0x3fc00), nan: 0x3ffff, sign: 18 };
    pub const E4M3: Self = Self { mantissa: 3, min_exponent: -6, max_finite: 0x7e, infinity: None, nan: 0x7f, sign: 7 };
    pub const E5M2: Self =
        Self { mantissa: 2, min_exponent: -14, max_finite: 0x7b, infinity: Some(0x7c), nan: 0x7f, sign: 7 };
}

/// `x` rounded to the format, by its bits; overflow gives infinity or the largest finite number as the mode says.
pub fn round(x: f64, format: Format, mode: Round) -> u32 {
    let negative = x.is_sign_negative();
    let sign = u32::from(negative) << format.sign;
    if x.is_nan() {
        return format.nan;
    }
    let overflow = match (mode, negative) {
        (Round::Zero, _) | (Round::Down, false) | (Round::Up, true) => format.max_finite,
        _ => format.infinity.unwrap_or(format.nan),
    };
    if x.is_infinite() {
        return format.infinity.unwrap_or(format.nan) | sign;
    }
    let magnitude = x.abs();
    if magnitude == 0.0 {
        return sign;
    }
    // The unit in the last place kept, as a power of two; f64 subnormals are far below every format's unit.
    let exponent = ((magnitude.to_bits() >> 52) as i32 - 1023).max(format.min_exponent);
    let unit = exponent - format.mantissa as i32;
    let scaled = scale(magnitude, -unit);
    let down = scaled.floor();
    let rest = scaled - down;
    let up = match mode {
        Round::Nearest => rest > 0.5 || rest == 0.5 && down % 2.0 == 1.0,
        Round::NearestAway => rest >= 0.5,
        Round::Zero => false,
        Round::Down => negative && rest > 0.0,
        Round::Up => !negative && rest > 0.0,
    };
    let significand = down as u64 + u64::from(up);
    // A carry out of the significand lands in the exponent field, which is what is wanted.
    let bits = (((exponent - format.min_exponent) as u64) << format.mantissa) + significand;
    if bits > u64::from(format.max_finite) { overflow | sign } else { bits as u32 | sign }
}

/// `x · 2^n`, exact as long as the result is a normal f64 or zero.
fn scale(x: f64, n: i32) -> f64 {
    let power = |n: i32| f64::from_bits(((n + 1023) as u64) << 52);
    let half = n / 2;
    x * power(half) * power(n - half)
}

/// `x` moved to the odd neighbour in the direction of the lost part `error`.
pub fn to_odd(x: f64, error: f64) -> f64 {
    if error == 0.0 || !x.is_finite() || x.to_bits() & 1 == 1 {
        x
    } else if x == 0.0 {
        // Only an underflowed product comes here; any tiny value of the right sign rounds alike.
        f64::from_bits(1).copysign(error)
    } else if (error > 0.0) == (x > 0.0) {
        f64::from_bits(x.to_bits() + 1)
    } else {
        f64::from_bits(x.to_bits() - 1)
    }
}

/// `a + b` rounded to odd.
pub fn add_odd(a: f64, b: f64) -> f64 {
    let sum = a + b;
    let bb = sum - a;
    to_odd(sum, if sum.is_finite() { (a - (sum - bb)) + (b - bb) } else { 0.0 })
}

/// `a · b + c` rounded to odd, for factors of at most 24 bits, whose product is exact.
pub fn fma_odd(a: f64, b: f64, c: f64) -> f64 {
    add_odd(a * b, c)
}

/// `a / b` rounded to odd, for operands of at most 24 bits.
pub fn div_odd(a: f64, b: f64) -> f64 {
    let q = a / b;
    if !q.is_finite() || q == 0.0 || b.is_infinite() {
        return q;
    }
    let rest = (-q).mul_add(b, a);
    to_odd(q, if b > 0.0 { rest } else { -rest })
}

/// The square root rounded to odd.
pub fn sqrt_odd(a: f64) -> f64 {
    let s = a.sqrt();
    if !s.is_finite() || s == 0.0 { s } else { to_odd(s, (-s).mul_add(s, a)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_agrees_with_the_host() {
        for i in 0..500_000u64 {
            let x = f64::from_bits(0x3000_0000_0000_0000 + i.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (0x2000 << 48));
            assert_eq!(round(x, Format::F32, Round::Nearest), (x as f32).to_bits(), "{x:e}");
        }
    }

    #[test]
    fn directed_modes_bracket_the_value() {
        for x in [1.0 + f64::EPSILON, -1.0 - f64::EPSILON, 1e-46, -1e-46, 1e39, -1e39, 0.1, -0.1, 3e-39] {
            let [z, d, u] = [Round::Zero, Round::Down, Round::Up].map(|m| f32::from_bits(round(x, Format::F32, m)));
            assert!(f64::from(d) < x && x < f64::from(u), "{x:e}: {d:e} {u:e}");
            assert_eq!(z, if x > 0.0 { d } else { u });
            assert_eq!(d.next_up(), u);
        }
    }

    #[test]
    fn small_formats_have_their_edges() {
        assert_eq!(round(448.0, Format::E4M3, Round::Nearest), 0x7e);
        assert_eq!(round(464.0, Format::E4M3, Round::Nearest), 0x7e);
        assert_eq!(round(465.0, Format::E4M3, Round::Nearest), 0x7f);
        assert_eq!(round(57344.0, Format::E5M2, Round::Nearest), 0x7b);
        assert_eq!(round(61440.0, Format::E5M2, Round::Nearest), 0x7c);
        assert_eq!(round(2f64.powi(-10), Format::E4M3, Round::Nearest), 0);
        assert_eq!(round(2f64.powi(-9), Format::E4M3, Round::Nearest), 1);
    }
}
