//! f16 and bf16, alone and in pairs. Conversions are branch-free so that loops over lanes vectorise.

/// IEEE binary16, by its bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct F16(pub u16);

/// bfloat16, by its bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct BF16(pub u16);

/// Two f16, the first in the low half.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct F16x2(pub u32);

/// Two bf16, the first in the low half.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct BF16x2(pub u32);

impl F16 {
    /// Exact; a NaN keeps its payload.
    #[inline(always)]
    pub fn to_f32(self) -> f32 {
        let h = u32::from(self.0);
        let magnitude = h & 0x7fff;
        // Scaling by 2^112 moves the exponent bias from 15 to 127, and normalises subnormals on the way.
        let scaled = (f32::from_bits(magnitude << 13) * f32::from_bits(0x7780_0000)).to_bits();
        let special = if magnitude >= 0x7c00 { 0x7f80_0000 } else { 0 };
        f32::from_bits(scaled | special | (h & 0x8000) << 16)
    }

    /// Nearest, ties to even; a NaN becomes 0x7fff.
    #[inline(always)]
    pub fn from_f32(x: f32) -> Self {
        let bits = x.to_bits();
        let sign = bits >> 16 & 0x8000;
        let a = bits & 0x7fff_ffff;
        // Adding 0.5 puts the last bit kept at 2^-24, the f16 subnormal unit, and rounds there.
        let subnormal = (f32::from_bits(a) + 0.5).to_bits().wrapping_sub(0x3f00_0000);
        let normal = a.wrapping_add(0xfff).wrapping_add(a >> 13 & 1).wrapping_sub(112 << 23) >> 13;
        let finite = if a < 0x3880_0000 { subnormal } else { normal };
        let clamped = if a >= 0x477f_f000 { 0x7c00 } else { finite };
        Self((if a > 0x7f80_0000 { 0x7fff } else { clamped | sign }) as u16)
    }

    #[inline(always)]
    pub fn ftz(self) -> Self {
        if self.0 & 0x7c00 == 0 { Self(self.0 & 0x8000) } else { self }
    }
}

impl BF16 {
    #[inline(always)]
    pub fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }

    /// Nearest, ties to even; a NaN becomes 0x7fff.
    #[inline(always)]
    pub fn from_f32(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff).wrapping_add(bits >> 16 & 1) >> 16;
        Self((if bits & 0x7fff_ffff > 0x7f80_0000 { 0x7fff } else { rounded }) as u16)
    }
}

macro_rules! pair {
    ($pair:ident, $one:ident) => {
        impl $pair {
            #[inline(always)]
            pub fn new(low: $one, high: $one) -> Self {
                Self(u32::from(low.0) | u32::from(high.0) << 16)
            }

            #[inline(always)]
            pub fn low(self) -> $one {
                $one(self.0 as u16)
            }

            #[inline(always)]
            pub fn high(self) -> $one {
                $one((self.0 >> 16) as u16)
            }

            /// Applies an f32 function to both and rounds.
            pub fn map(self, f: impl Fn($one) -> f32) -> Self {
                Self::new($one::from_f32(f(self.low())), $one::from_f32(f(self.high())))
            }
        }
    };
}
pair!(F16x2, F16);
pair!(BF16x2, BF16);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::numeric::rounding::{Format, Round, round};

    #[test]
    fn f16_agrees_with_the_half_crate() {
        for bits in 0..=u16::MAX {
            let want = half::f16::from_bits(bits);
            let got = F16(bits).to_f32();
            assert!(got.to_bits() == want.to_f32().to_bits() || want.is_nan() && got.is_nan(), "{bits:#06x}");
        }
        for i in 0..2_000_000u32 {
            let x = f32::from_bits(i.wrapping_mul(2_654_435_769));
            if !x.is_nan() {
                assert_eq!(F16::from_f32(x).0, half::f16::from_f32(x).to_bits(), "{x:e}");
                assert_eq!(
                    round(x.into(), Format::F16, Round::Nearest),
                    u32::from(half::f16::from_f32(x).to_bits()),
                    "{x:e}"
                );
                assert_eq!(BF16::from_f32(x).0, half::bf16::from_f32(x).to_bits(), "{x:e}");
                let want = half::bf16::from_f32(x).to_bits();
                assert_eq!(round(x.into(), Format::BF16, Round::Nearest), u32::from(want), "{x:e}");
            }
        }
        assert_eq!(F16::from_f32(f32::NAN).0, 0x7fff);
        assert_eq!(BF16::from_f32(f32::NAN).0, 0x7fff);
    }

    #[test]
    fn f16_rounds_ties_to_even_at_every_edge() {
        let ulp = f32::from_bits(0x3380_0000);
        for (x, want) in
            [(65519.0, 0x7bff), (65520.0, 0x7c00), (ulp / 2.0, 0), (ulp * 1.5, 2), (ulp * 2.5, 2), (-0.0, 0x8000)]
        {
            assert_eq!(F16::from_f32(x).0, want, "{x:e}");
        }
    }
}
