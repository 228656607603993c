//! RMS normalisation.

use super::settings::settings;

/// `y = factor g v / sqrt(max(mean(v^2) + epsilon, least))` over a row `v` (Zhang and Sennrich 2019, eq. 4, with `least` 0).
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct RmsNorm {
    /// Added to the mean of squares; finite, at least 0.
    pub epsilon: f32,
    /// What is under the root at least; finite, at least 0, which it is in norms of models. With `epsilon` 0 a row is divided by a length of at least
    /// `sqrt(least)` (torch's `F.normalize`), a constant for rows below that.
    pub least: f32,
    /// What `g` is.
    pub gain: Gain,
    /// Factor of every element; `H^-0.5` before Gemma 4's router.
    pub factor: f32,
}

/// The gain of each column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Gain {
    /// 1: no weight (Gemma 4's router).
    One,
    /// The weight (LLaMA, A.X K1, Zaya).
    Weight,
    /// 1 + weight (Gemma, Muse Spark's norm before its experts).
    OnePlus,
    /// 1 + weight, on the row before its mean of squares is taken: `u = g v` rounded to the storage type, `y = factor u / sqrt(mean(u^2) +
    /// epsilon)` (Muse Spark's norm of each expert's output).
    OnePlusFirst,
}

impl Gain {
    /// Whether there is a weight.
    pub const fn has_weight(self) -> bool {
        !matches!(self, Gain::One)
    }
}

impl RmsNorm {
    /// With a weight, factor 1.
    pub const fn new(epsilon: f32) -> RmsNorm {
        RmsNorm { epsilon, least: 0.0, gain: Gain::Weight, factor: 1.0 }
    }
}

settings!(RmsNorm { least: f32, gain: Gain, factor: f32 });
