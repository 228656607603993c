//! Reproducible inputs, biased to edges.

use moe_kernels::{Dtype, Element};

/// SplitMix64 (Steele et al. 2014).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.bits() % bound as u64) as usize
    }

    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal, as a sum of twelve uniforms.
    pub fn normal(&mut self) -> f32 {
        ((0..12).map(|_| self.unit()).sum::<f64>() - 6.0) as f32
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    pub fn normals<T: Element>(&mut self, count: usize) -> Vec<T> {
        (0..count).map(|_| T::from_f32(self.normal())).collect()
    }
}

/// Kinds of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Logits {
    Normal,
    /// Three different values.
    Ties,
    Equal,
    /// NaN, infinities, zeros of both signs, denormals and large values.
    Wild,
    AllNan,
    AllNegativeInfinity,
    /// Mostly -Inf, some NaN, few numbers.
    Masked,
}

impl Logits {
    pub const ALL: [Logits; 7] = [
        Logits::Normal,
        Logits::Ties,
        Logits::Equal,
        Logits::Wild,
        Logits::AllNan,
        Logits::AllNegativeInfinity,
        Logits::Masked,
    ];

    pub fn draw(self, random: &mut Random, count: usize) -> Vec<f32> {
        const WILD: [f32; 9] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1.0, -1.0, 1e-40, -30.0];
        (0..count)
            .map(|_| match self {
                Logits::Normal => 2.0 * random.normal(),
                Logits::Ties => random.below(3) as f32,
                Logits::Equal => 1.5,
                Logits::Wild => random.pick(&WILD),
                Logits::AllNan => f32::NAN,
                Logits::AllNegativeInfinity => f32::NEG_INFINITY,
                Logits::Masked => match random.below(8) {
                    0 => f32::NAN,
                    1 => random.normal(),
                    _ => f32::NEG_INFINITY,
                },
            })
            .collect()
    }
}

/// The dtype's unit roundoff.
pub fn roundoff(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::Bf16 => 1.0 / 256.0,
        Dtype::F16 => 1.0 / 2048.0,
        Dtype::F32 => 1.0 / (1 << 24) as f64,
        other => unreachable!("no kernel has {other}"),
    }
}
