//! Sums of products as the tensor cores make them, by published studies of the hardware: no two of its generations add alike, and
//! none as IEEE 754 does.
//!
//! The products of a step of K and the accumulator are aligned to the largest exponent among them, all bits below F fraction bits are
//! cut off, and what is left is added exactly. The sum is cut to the accumulator's format (f16 alone is rounded to nearest). That is
//! algorithm and numbers of P. Xie et al., "MMA-Sim: Bit-Accurate Reference Model of Tensor Cores and Matrix Cores"
//! (arXiv:2511.10909), whose models agree bit by bit with GPUs on their tests; F. Khattak and M. Mikaitis, "Accurate Models of NVIDIA
//! Tensor Cores" (arXiv:2512.07004), and for the first ones M. Fasi et al., "Numerical behavior of NVIDIA tensor cores" (PeerJ
//! Computer Science 7:e330, 2021), find the same alignment and truncation.
//!
//! | | F | products of a step |
//! |---|---|---|
//! | `mma`, sm_70 | 23 | all of the instruction's |
//! | `mma`, sm_75 | 24 | all |
//! | `mma`, sm_80 to sm_89 | 24 | at most 8 of 16 bits, 4 of tf32, 16 of fp8 |
//! | `mma` of fp8, sm_89 | 13 | 16; an f32 sum keeps 13 fraction bits |
//! | `mma`, sm_90 and later | 25 | all |
//! | `wgmma` | 25 | all |
//! | `wgmma` of fp8 | 13 | all; an f32 sum keeps 13 fraction bits |
//!
//! Products that are zero take no part in the alignment. A result that is not a number is the canonical NaN.

use super::rounding::{Format, Round, round};
use crate::lower::ir::MmaType;

/// How one instruction of a device adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Adder {
    /// Bits kept below the largest exponent.
    fraction: i32,
    /// Products of a step.
    step: usize,
    /// Fraction bits of an f32 result.
    kept: u32,
    /// Least exponents of the factors' formats.
    least: [i32; 2],
    /// The accumulator is f16.
    half: bool,
}

fn least_exponent(ty: MmaType) -> i32 {
    match ty {
        MmaType::F16 | MmaType::E5M2 => -14,
        MmaType::E4M3 => -6,
        _ => -126,
    }
}

impl Adder {
    /// `mma.sync` with these factors on a device of a compute capability.
    pub fn mma((major, minor): (u32, u32), a: MmaType, b: MmaType, half: bool) -> Self {
        let eight = matches!(a, MmaType::E4M3 | MmaType::E5M2);
        let (fraction, kept) = match major * 10 + minor {
            ..75 => (23, 23),
            89 if eight => (13, 13),
            75..90 => (24, 23),
            _ => (25, 23),
        };
        let step = match (major, a) {
            (8, MmaType::TF32) => 4,
            (8, _) if eight => 16,
            (8, _) => 8,
            _ => usize::MAX,
        };
        Self { fraction, step, kept, least: [least_exponent(a), least_exponent(b)], half }
    }

    /// `wgmma.mma_async` with these factors.
    pub fn wgmma(a: MmaType, b: MmaType, half: bool) -> Self {
        let eight = matches!(a, MmaType::E4M3 | MmaType::E5M2);
        let (fraction, kept) = if eight { (13, 13) } else { (25, 23) };
        Self { fraction, step: usize::MAX, kept, least: [least_exponent(a), least_exponent(b)], half }
    }

    /// `sum` and the products of factors in order of K, which are exact in the formats that the adder is for.
    pub fn dot(&self, factors: &[(f32, f32)], sum: f32) -> f32 {
        factors.chunks(self.step.min(factors.len().max(1))).fold(sum, |sum, part| self.add(part, sum))
    }

    fn add(&self, factors: &[(f32, f32)], sum: f32) -> f32 {
        let product = |&(a, b): &(f32, f32)| f64::from(a) * f64::from(b);
        let plain: f64 = factors.iter().map(product).sum::<f64>() + f64::from(sum);
        if !plain.is_finite() {
            return plain as f32;
        }
        let [least_a, least_b] = self.least;
        let of_product =
            |&(a, b): &(f32, f32)| (a != 0.0 && b != 0.0).then(|| exponent(a).max(least_a) + exponent(b).max(least_b));
        let of_sum = (sum != 0.0).then(|| exponent(sum).max(if self.half { -14 } else { -126 }));
        let Some(largest) = factors.iter().filter_map(of_product).chain(of_sum).max() else { return 0.0 };
        // Powers of two and what is cut stay within f64: every step here is exact.
        let scale = 2f64.powi(self.fraction - largest);
        let cut = |x: f64| (x * scale).trunc();
        let total = factors.iter().map(|f| cut(product(f))).sum::<f64>() + cut(f64::from(sum));
        self.deliver(total / scale)
    }

    /// An exact sum in the accumulator's format.
    fn deliver(&self, x: f64) -> f32 {
        if self.half {
            return crate::exec::numeric::F16(round(x, Format::F16, Round::Nearest) as u16).to_f32();
        }
        if x.abs() >= 2f64.powi(128) {
            return f32::INFINITY.copysign(x as f32);
        }
        let cut = f32::from_bits(round(x, Format::F32, Round::Zero));
        f32::from_bits(cut.to_bits() & !((1 << (23 - self.kept)) - 1))
    }
}

/// The exponent of a number that is not zero, as if its format had subnormals without end.
fn exponent(x: f32) -> i32 {
    let bits = x.to_bits() & 0x7fff_ffff;
    if bits >> 23 != 0 { (bits >> 23) as i32 - 127 } else { -118 - bits.leading_zeros() as i32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponents() {
        for (x, e) in
            [(1.0, 0), (1.99, 0), (2.0, 1), (0.5, -1), (f32::MIN_POSITIVE, -126), (f32::MIN_POSITIVE / 2.0, -127)]
        {
            assert_eq!(exponent(x), e, "{x}");
        }
        assert_eq!(exponent(f32::from_bits(1)), -149);
    }

    #[test]
    fn bits_below_the_alignment_are_cut() {
        let hopper = Adder::wgmma(MmaType::BF16, MmaType::BF16, false);
        let ulp = |n: i32| 2f32.powi(-n);
        // 2^-24 four times: each is kept to 25 bits, and their sum reaches the last bit of f32.
        assert_eq!(hopper.dot(&[(ulp(12), ulp(12)); 4], 1.0), 1.0 + ulp(22));
        // 2^-26 is below them, however often it comes.
        assert_eq!(hopper.dot(&[(ulp(13), ulp(13)); 16], 1.0), 1.0);
        // Volta keeps 23 bits, Ampere 24 in steps of 8.
        let volta = Adder::mma((7, 0), MmaType::F16, MmaType::F16, false);
        assert_eq!(volta.dot(&[(ulp(12), ulp(12)); 4], 1.0), 1.0);
        let ampere = Adder::mma((8, 0), MmaType::F16, MmaType::F16, false);
        assert_eq!(ampere.dot(&[(ulp(12), ulp(12)); 4], 1.0), 1.0 + ulp(22));
        // One in each step: cut to f32 between the steps.
        let mut apart = [(0.0, 0.0); 16];
        (apart[0], apart[8]) = ((ulp(12), ulp(12)), (ulp(12), ulp(12)));
        assert_eq!((ampere.dot(&apart, 1.0), hopper.dot(&apart, 1.0)), (1.0, 1.0 + ulp(23)));
        // The sum is cut towards zero, not rounded.
        assert_eq!(hopper.dot(&[(ulp(12), -ulp(12))], 1.0), 1.0 - ulp(24));
        assert_eq!(hopper.dot(&[(ulp(12), ulp(12))], -1.0), -1.0 + ulp(24));
        assert_eq!(hopper.dot(&[(ulp(12), 1.5 * ulp(12))], 1.0), 1.0);
        // fp8: 13 bits, of terms and of the sum.
        let eight = Adder::wgmma(MmaType::E4M3, MmaType::E4M3, false);
        assert_eq!(eight.dot(&[(ulp(6), ulp(6)); 2], 1.0), 1.0 + ulp(11));
        assert_eq!(eight.dot(&[(ulp(9), ulp(5)); 32], 1.0), 1.0);
        assert_eq!(eight.dot(&[(1.0, 1.0)], 1.0 + ulp(13)), 2.0);
        assert_eq!(eight.dot(&[], 1.0), 1.0);
    }

    #[test]
    fn infinities_and_subnormals() {
        let adder = Adder::wgmma(MmaType::BF16, MmaType::BF16, false);
        assert!(adder.dot(&[(f32::INFINITY, 0.0)], 1.0).is_nan());
        assert_eq!(adder.dot(&[(f32::INFINITY, -1.0)], 1.0), f32::NEG_INFINITY);
        assert_eq!(adder.dot(&[(2f32.powi(127), 2.0)], 0.0), f32::INFINITY);
        assert_eq!(adder.dot(&[(2f32.powi(-100), 2f32.powi(-40))], 0.0), 2f32.powi(-140));
        assert_eq!(adder.dot(&[(2f32.powi(-100), 2f32.powi(-60))], 0.0), 0.0);
        let half = Adder::wgmma(MmaType::F16, MmaType::F16, true);
        // f16 sums are rounded to nearest, ties to even.
        assert_eq!(half.dot(&[(2f32.powi(-5), 2f32.powi(-6))], 1.0), 1.0);
        assert_eq!(half.dot(&[(2f32.powi(-5), 3.0 * 2f32.powi(-6))], 1.0), 1.0 + 2f32.powi(-9));
    }
}
