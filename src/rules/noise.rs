//! Noise of the stochastic routers: Philox words, and from them uniform, normal and Gumbel numbers in f32.
//!
//! The f32 arithmetic here (single roundings, `mul_add` where it stands, in this order) is the definition: kernels repeat it
//! instruction by instruction, so that a host that knows seed and offset has every noise of the device bit for bit, and
//! knows without a tolerance which experts it leads to. None of it uses an approximate instruction.

/// Philox4x32-10: four random words from a counter and a key.
///
/// Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", section 3.3.
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut a, mut b, mut c, mut d], [mut k0, mut k1]) = (counter, key);
    for _ in 0..10 {
        let first = u64::from(a) * 0xD251_1F53;
        let second = u64::from(c) * 0xCD9E_8D57;
        (a, b, c, d) = ((second >> 32) as u32 ^ b ^ k0, second as u32, (first >> 32) as u32 ^ d ^ k1, first as u32);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [a, b, c, d]
}

/// Which random words a launch uses. Launches that must be independent differ in `seed` or `offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct NoiseSource {
    /// The key.
    pub seed: u64,
    /// Upper half of the counter: a training step's number, say.
    pub offset: u64,
}

impl NoiseSource {
    /// The words of `seed` at `offset`.
    pub const fn new(seed: u64, offset: u64) -> NoiseSource {
        NoiseSource { seed, offset }
    }

    /// The words of this source where a launch is also given a noise state `{seed, offset}` on the device: the state's seed, the sum of
    /// both offsets modulo 2^64.
    pub const fn with_state(self, [seed, offset]: [u64; 2]) -> NoiseSource {
        NoiseSource { seed, offset: offset.wrapping_add(self.offset) }
    }

    /// Low and high halves of seed and offset, as kernels take them.
    pub(crate) const fn words_of_source(self) -> [u32; 4] {
        [self.seed as u32, (self.seed >> 32) as u32, self.offset as u32, (self.offset >> 32) as u32]
    }

    fn words(self, low: u32, high: u32) -> [u32; 4] {
        let halves = |wide: u64| [wide as u32, (wide >> 32) as u32];
        let [offset_low, offset_high] = halves(self.offset);
        philox4x32([low, high, offset_low, offset_high], halves(self.seed))
    }

    /// The random word of one token and expert: experts that differ by 32, 64 or 96 within a block of 128 share a counter.
    ///
    /// `stream` is 0 for a gate, 2 for the choice of a second expert, 4 and 5 for what share of SparseMixer's first and second weight counts,
    /// `16 + group` for a group's gate in a hierarchy.
    pub fn gate_word(self, stream: u32, token: u32, expert: u32) -> u32 {
        self.words((expert / 128 * 32 + expert % 32) | stream << 16, token)[expert as usize % 128 / 32]
    }

    /// The random word of element `index` of an expert's inner activations.
    pub fn dropout_word(self, index: u64) -> u32 {
        let counter = index / 4;
        // Both upper bits: fewer elements than 2^62 leave jitter's counters without the second.
        self.words(counter as u32, (counter >> 32) as u32 | 3 << 30)[index as usize % 4]
    }

    /// The random word of element `index` of the router's input.
    pub fn jitter_word(self, index: u64) -> u32 {
        let counter = index / 4;
        // No token has the upper bit, so that gates and jitter never share a word.
        self.words(counter as u32, (counter >> 32) as u32 | 1 << 31)[index as usize % 4]
    }
}

/// The middle of one of 2^23 equal parts of (0, 1), exact in f32: never 0, never 1.
pub fn uniform(word: u32) -> f32 {
    ((word >> 9) as f32 + 0.5) * 2f32.powi(-23)
}

/// `Phi^-1(uniform(word))`: a standard normal number, within 5.3 of 0.
///
/// With x = 2u - 1 and w = -ln(1 - x^2), `Phi^-1(u) / x` is smooth in w; the polynomial is its Chebyshev fit for all w that a
/// 23-bit uniform number yields, in `w / 7.8 - 1`, to 2.2e-7.
pub fn standard_normal(word: u32) -> f32 {
    const FIT: [f32; 15] = [
        0.008_291_205,
        -0.011_383_282,
        -0.022_159_541,
        0.044_260_84,
        -0.005_968_636,
        -0.032_690_447,
        0.042_004_05,
        -0.055_526_603,
        0.061_402_313,
        -0.029_647_395,
        -0.043_530_47,
        0.169_547_41,
        -0.447_831_5,
        1.968_005,
        3.713_672_4,
    ];
    let u = uniform(word);
    let w = -ln((4.0 * u) * (1.0 - u));
    let v = w.mul_add(1.0 / 7.8, -1.0);
    horner(v, &FIT) * (u + u - 1.0)
}

/// A standard Gumbel number, `-ln(-ln u)`.
pub fn gumbel(word: u32) -> f32 {
    -ln(-ln(uniform(word)))
}

/// `ln x` for positive normal x, to 1.5 units in the last place of the larger of 1 and the result.
///
/// x = m 2^n with m in [sqrt(1/2), sqrt(2)), f = m - 1 (exact), and `ln m = f - f^2/2 + f^3 P(f)`.
pub fn ln(x: f32) -> f32 {
    const FIT: [f32; 9] = [
        0.069_716_12,
        -0.114_797_34,
        0.116_854_2,
        -0.124_256_87,
        0.142_490_58,
        -0.166_678_03,
        0.200_007_16,
        -0.249_999_97,
        0.333_333_3,
    ];
    let shifted = x.to_bits().wrapping_sub(SQRT_HALF_BITS);
    let n = (shifted as i32 >> 23) as f32;
    let f = f32::from_bits((shifted & 0x007f_ffff) + SQRT_HALF_BITS) - 1.0;
    let square = f * f;
    let mut y = (horner(f, &FIT) * f) * square;
    y = n.mul_add(LN_2_LOW, y);
    y = square.mul_add(-0.5, y);
    n.mul_add(LN_2_HIGH, f + y)
}

/// `exp x` for x of at most 0, relative error 1e-7; 0 below -104, NaN for NaN.
///
/// `2^n e^r` with n = round(x / ln 2): the arithmetic of `kernels/common/math/exp.ptx.jinja`.
pub fn exp_nonpositive(x: f32) -> f32 {
    const FIT: [f32; 7] = [0.001_455_618_5, 0.008_363_293, 0.041_657_06, 0.166_665_76, 0.500_000_3, 1.0, 1.0];
    // 1.5 * 2^23: adding it leaves the rounded exponent in the low bits.
    const ROUNDER: f32 = 12_582_912.0;
    // A comparison that NaN fails.
    let x = if x < -104.0 { -104.0 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUNDER);
    let n = shifted - ROUNDER;
    let r = n.mul_add(-std::f32::consts::LN_2, x);
    let r = n.mul_add(1.904_654_2e-9, r);
    // In two factors, so that a subnormal result is rounded once.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x5f80_0000));
    horner(r, &FIT) * power * 2f32.powi(-64)
}

/// `softplus(x) = ln(1 + exp x)`, relative error 3e-7; NaN for NaN.
///
/// `max(x, 0) + ln(1 + y)` with y = exp(-|x|), and a polynomial for `ln(1 + y) / y` on 0 to 1.
pub fn softplus(x: f32) -> f32 {
    const FIT: [f32; 10] = [
        -0.003_176_057,
        0.019_542_526,
        -0.056_373_61,
        0.105_436_236,
        -0.152_696_67,
        0.196_632_74,
        -0.249_516_16,
        0.333_297_1,
        -0.499_998_93,
        1.0,
    ];
    let y = exp_nonpositive(-x.abs());
    // A comparison that NaN fails.
    let positive = if x < 0.0 { 0.0 } else { x };
    horner(y, &FIT).mul_add(y, positive)
}

const SQRT_HALF_BITS: u32 = 0x3f35_04f3;
/// ln 2 in two parts, the first of so few bits that its product with an exponent is exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;

/// The polynomial with these coefficients, highest power first.
fn horner(x: f32, coefficients: &[f32]) -> f32 {
    coefficients[1..].iter().fold(coefficients[0], |sum, &next| sum.mul_add(x, next))
}

#[cfg(test)]
mod tests {
    use super::*;

    // Known answers of the authors' Random123 distribution (kat_vectors, philox4x32 10).
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn words_differ_between_experts_tokens_streams_and_offsets() {
        let source = NoiseSource { seed: 1, offset: 2 };
        let mut words = std::collections::HashSet::new();
        for token in 0..4 {
            for expert in 0..4096 {
                words.insert(source.gate_word(0, token, expert));
                words.insert(source.gate_word(16, token, expert));
            }
        }
        // 32768 words out of 2^32 collide 0.125 times on average; four collisions have a chance below 1e-5.
        assert!(words.len() >= 32768 - 3, "{}", words.len());
    }

    #[test]
    fn uniform_is_inside() {
        assert_eq!(uniform(0), 2f32.powi(-24));
        assert_eq!(uniform(u32::MAX), 1.0 - 2f32.powi(-24));
    }

    fn samples() -> impl Iterator<Item = u32> {
        // Both ends, where functions are steep, and the middle.
        let ends = (0..64).flat_map(|i| [i << 9, u32::MAX - (i << 9), (1 << 31) + (i << 9), (1 << 31) - (i << 9) - 1]);
        ends.chain((0..20_000u32).map(|i| i.wrapping_mul(0x9E37_79B9)))
    }

    #[test]
    fn logarithm_exponential_softplus_against_f64() {
        for word in samples() {
            let u = uniform(word);
            let want = f64::from(u).ln();
            let error = (f64::from(ln(u)) - want).abs();
            assert!(error <= 2e-7 * want.abs().max(2e-8), "ln {u}: {} is not {want}", ln(u));

            let x = -86.0 * u;
            let want = f64::from(x).exp();
            let got = exp_nonpositive(x);
            assert!((f64::from(got) / want - 1.0).abs() < 2e-7, "exp {x}: {got} is not {want}");

            for x in [x, -x, x / 20.0, -x / 20.0] {
                let want = f64::from(x).max(0.0) + (-f64::from(x).abs()).exp().ln_1p();
                assert!((f64::from(softplus(x)) / want - 1.0).abs() < 3e-7, "{x}: {} is not {want}", softplus(x));
            }
        }
        assert_eq!((softplus(-1e30), softplus(f32::NEG_INFINITY)), (0.0, 0.0));
        assert_eq!((softplus(1e30), softplus(f32::INFINITY)), (1e30, f32::INFINITY));
        assert!(softplus(f32::NAN).is_nan());
    }

    #[test]
    fn gumbel_is_the_inverse_of_its_distribution() {
        for word in samples() {
            let (u, g) = (f64::from(uniform(word)), f64::from(gumbel(word)));
            let want = -(-u.ln()).ln();
            assert!((g - want).abs() <= 1e-6 * want.abs().max(1.0), "{u}: {g} is not {want}");
        }
    }
}
