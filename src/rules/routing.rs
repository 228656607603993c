//! Rules of the routers beside gating: noisy, sampled, BASE, expert choice.

use super::noise::NoiseSource;
use super::settings::settings;

/// How noise is added and how many experts are kept.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct NoisyRule {
    /// Experts of a token, `k`.
    pub top_k: usize,
    /// Added to every noise deviation (1e-2 in the authors' published code; 0 in the paper).
    pub noise_epsilon: f32,
    /// The random words.
    pub noise: NoiseSource,
}

impl NoisyRule {
    /// `top_k` experts a token, with the noise epsilon of the authors' published code, 1e-2.
    pub const fn new(top_k: usize, noise: NoiseSource) -> NoisyRule {
        NoisyRule { top_k, noise_epsilon: 1e-2, noise }
    }
}

settings!(NoisyRule { noise_epsilon: f32 });

/// How experts are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct SamplingRule {
    /// Experts of a token, `k`; all different.
    pub top_k: usize,
    /// Factor of the logits: 0 draws evenly, a large one the best.
    pub inverse_temperature: f32,
    /// The random words.
    pub noise: NoiseSource,
}

impl SamplingRule {
    /// `top_k` experts a token from the router's own distribution, at temperature 1.
    pub const fn new(top_k: usize, noise: NoiseSource) -> SamplingRule {
        SamplingRule { top_k, inverse_temperature: 1.0, noise }
    }
}

settings!(SamplingRule { inverse_temperature: f32 });

/// How SparseMixer draws in training.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct MixerRule {
    /// Experts of a token, `k`: 1 or 2, and different.
    pub top_k: usize,
    /// Experts whose logit is relatively more than twice this below the largest are never drawn (PhiMoE's `router_jitter_noise`).
    pub jitter: f32,
    /// The random words.
    pub noise: NoiseSource,
}

impl MixerRule {
    /// `top_k` experts a token among those near the largest logit.
    pub const fn new(top_k: usize, jitter: f32, noise: NoiseSource) -> MixerRule {
        MixerRule { top_k, jitter, noise }
    }
}

/// An auction's accuracy and limit.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct AuctionRule {
    /// Experts, `E`.
    pub experts: usize,
    /// The sum of scores is less than `tokens * epsilon` below the optimum.
    pub epsilon: f32,
    /// Rounds of bidding after which the tokens that are left go to the experts that have places left, in order.
    pub max_rounds: u32,
}

impl AuctionRule {
    /// Tokens for `experts` experts, within `epsilon` a token of the optimum, in at most `max_rounds` rounds.
    pub const fn new(experts: usize, epsilon: f32, max_rounds: u32) -> AuctionRule {
        AuctionRule { experts, epsilon, max_rounds }
    }
}

/// Units per 1.0: the power of two that makes a unit at most `epsilon / 2`, so that a score's scaling is exact and only
/// its rounding, by half a unit, is not. Scores are thus exact to `epsilon / 4`, and the auction over units ends within one unit a
/// token of the optimum: together within `epsilon` a token.
pub fn units(epsilon: f32) -> f32 {
    // The exponent of 2/epsilon, rounded up; both ends stay normal numbers.
    let exponent = (2.0 / f64::from(epsilon)).log2().ceil().clamp(-100.0, 100.0);
    exponent.exp2() as f32
}

/// What an expert thinks of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Affinity {
    /// Softmax of the token's logits over the experts (the paper's S).
    Softmax,
    /// Sigmoid of each logit.
    Sigmoid,
    /// The logit itself.
    Logit,
}

/// `[T, k]`: ids that load all experts alike, whatever the router thinks, in turn: `(t k + j) % E` (torchtitan's
/// `debug_moe_force_load_balance`, MegaBlocks' uniform assignment). With [`super::ChoiceBy::Given`] the weights are still those of the
/// router's scores. At random (Megatron-LM's `moe_router_force_load_balancing`): [`crate::routers::sampled`] with an inverse temperature of 0.
///
/// A token's experts differ where `k <= E`. Empty for no experts.
pub fn round_robin(tokens: usize, top_k: usize, experts: usize) -> Vec<i32> {
    if experts == 0 {
        return Vec::new();
    }
    (0..tokens * top_k).map(|slot| (slot % experts) as i32).collect()
}

#[cfg(test)]
mod tests {
    use super::round_robin;

    #[test]
    fn every_expert_in_turn() {
        assert_eq!(round_robin(3, 2, 4), [0, 1, 2, 3, 0, 1]);
        assert!(round_robin(3, 2, 0).is_empty());
    }
}
