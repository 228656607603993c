//! Expert dropout: which outputs become zero, and what keeps the mean.

use super::noise::NoiseSource;

/// Dropout inside experts (Fedus et al., *Switch Transformers*, 2021, section 2.4: 0.4 where other layers have 0.1).
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Dropout {
    /// Chance of each output to become 0, from 0 to 1 (excluded); what is kept is divided by the rest.
    pub probability: f32,
    /// Where the random words come from: output `r * N + c` has the word [`NoiseSource::dropout_word`] of that index, so that the
    /// gradient's pass, and the host, know the mask. Give each layer and step its own.
    pub noise: NoiseSource,
}

impl Dropout {
    /// Each output is 0 with chance `probability`, by the random words of `noise`.
    pub const fn new(probability: f32, noise: NoiseSource) -> Dropout {
        Dropout { probability, noise }
    }
}

/// Random words below this drop: `2^32 p`, rounded to nearest, at most `2^32 - 1`.
pub fn drop_below(probability: f32) -> u32 {
    (f64::from(probability) * 2f64.powi(32)).round() as u32
}

/// What keeps the mean: `1 / (1 - p)` in f32.
pub fn keep_scale(probability: f32) -> f32 {
    (1.0 / (1.0 - f64::from(probability))) as f32
}
