//! The values of fp8.

use super::F16;

/// By its bits: 4 bits of exponent, 3 of mantissa, no infinity.
pub static E4M3: [f32; 256] = table(3, 7);
/// By its bits: 5 bits of exponent, 2 of mantissa.
pub static E5M2: [f32; 256] = table(2, 15);

const fn table(mantissa_bits: u32, bias: u32) -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut bits = 0;
    while bits < 256 {
        values[bits] = value(bits as u32, mantissa_bits, bias);
        bits += 1;
    }
    values
}

const fn value(bits: u32, mantissa_bits: u32, bias: u32) -> f32 {
    let sign = (bits & 0x80) << 24;
    let exponent = (bits & 0x7f) >> mantissa_bits;
    let mantissa = bits & ((1 << mantissa_bits) - 1);
    let top = 0x7f >> mantissa_bits;
    let magnitude =
        if mantissa_bits == 3 && bits & 0x7f == 0x7f || mantissa_bits == 2 && exponent == top && mantissa != 0 {
            0x7fff_ffff
        } else if mantissa_bits == 2 && exponent == top {
            0x7f80_0000
        } else if exponent == 0 {
            // The subnormal unit is 2^(1 - bias - mantissa_bits).
            (mantissa as f32 * f32::from_bits((128 - bias - mantissa_bits) << 23)).to_bits()
        } else {
            (exponent + 127 - bias) << 23 | mantissa << (23 - mantissa_bits)
        };
    f32::from_bits(magnitude | sign)
}

/// The same without a table, for loops over vectors.
#[inline(always)]
pub fn e4m3(bits: u8) -> f32 {
    let magnitude = u32::from(bits & 0x7f);
    // Scaling by 2^120 moves the exponent's bias from 7 to 127, and normalises subnormals on the way.
    let scaled = (f32::from_bits(magnitude << 20) * f32::from_bits(0x7b80_0000)).to_bits();
    let value = if magnitude == 0x7f { 0x7fff_ffff } else { scaled };
    f32::from_bits(value | u32::from(bits & 0x80) << 24)
}

/// As [`e4m3`]: the upper half of an f16.
#[inline(always)]
pub fn e5m2(bits: u8) -> f32 {
    F16(u16::from(bits) << 8).to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::numeric::rounding::{Format, Round, round};

    #[test]
    fn tables_and_formulas_agree() {
        for bits in 0..=255u8 {
            for (table, formula) in [(&E4M3, e4m3(bits)), (&E5M2, e5m2(bits))] {
                let value = table[usize::from(bits)];
                assert!(value.to_bits() == formula.to_bits() || value.is_nan() && formula.is_nan(), "{bits:#x}");
            }
        }
    }

    #[test]
    fn rounding_every_value_gives_its_bits_back() {
        for (values, format, finite) in [(&E4M3, Format::E4M3, 0x7e), (&E5M2, Format::E5M2, 0x7c)] {
            for (bits, &x) in values.iter().enumerate() {
                if bits & 0x7f <= finite {
                    assert_eq!(round(x.into(), format, Round::Nearest) as usize, bits, "{x}");
                } else {
                    assert!(x.is_nan(), "{bits:#x}");
                }
            }
        }
        assert_eq!((E4M3[0x7e], E4M3[1], E5M2[0x7b], E5M2[1]), (448.0, 2f32.powi(-9), 57344.0, 2f32.powi(-16)));
    }
}
