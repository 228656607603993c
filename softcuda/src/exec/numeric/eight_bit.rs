//! The values of fp8.

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::numeric::rounding::{Format, Round, round};

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
