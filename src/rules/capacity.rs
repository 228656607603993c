//! How many slots an expert takes, and whose.

use super::balance::Sequences;
use super::gating::Renormalise;
use super::noise::NoiseSource;
use super::settings::settings;

/// A limit on the slots of an expert, of each sequence; sequences follow each other (`[B, S]`). Where their tokens alternate (`[S, B]`) the same limit is
/// an [`AdmissionRule`]'s: see [`crate::capacity::dispatch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capacity {
    /// Slots that an expert takes of each sequence, at least 1.
    pub per_expert: usize,
    /// Tokens of a sequence, at least 1; the last sequence may be shorter. The number of tokens for one sequence.
    pub tokens_per_sequence: usize,
    /// Keep `per_expert * sequences` rows for every expert, filled or not: `offsets[e] = e * per_expert * sequences`.
    pub padded: bool,
}

impl Capacity {
    /// At most `per_expert` slots of each `tokens_per_sequence` tokens, rows side by side without gaps.
    pub const fn new(per_expert: usize, tokens_per_sequence: usize) -> Capacity {
        Capacity { per_expert, tokens_per_sequence, padded: false }
    }
}

settings!(Capacity { padded: bool });

/// Whose turn it is when an expert's places are given away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Order {
    /// Token by token, all choices of one before the next token (Switch Transformers: Fedus et al. 2021).
    ByToken,
    /// All first choices before all second choices (GShard: Lepikhin et al. 2020, algorithm 1).
    ByChoice,
}

/// Whether a token is sent to its second expert, whose weight is `g2`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum SecondExpert {
    /// Always.
    Always,
    /// If `g2 > threshold`.
    Above(f32),
    /// With probability `min(1, g2 / threshold)`: if `g2 > threshold u`, `u` uniform in [0,1). GShard's policy has threshold
    /// 1/2 ("proportional to its weight", `2 g2 > u`).
    Random {
        /// Weight from which on the second expert is certain.
        threshold: f32,
        /// Where u comes from: the gate word of stream 2 and expert 0.
        noise: NoiseSource,
    },
}

impl SecondExpert {
    /// GShard's policy: a second expert of weight 1/2 or more is certain.
    pub const fn gshard(noise: NoiseSource) -> SecondExpert {
        SecondExpert::Random { threshold: 0.5, noise }
    }
}

/// Who is admitted.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct AdmissionRule {
    /// Experts, `E`.
    pub experts: usize,
    /// Choices of a token, `K`, best first; at most [`AdmissionRule::MAX_CANDIDATES`].
    pub candidates: usize,
    /// Experts that a token gets at most, `n <= K`. If fewer, a choice whose expert is full is passed on to the next one
    /// (Switch Transformers, appendix B, "no token left behind": with [`Order::ByChoice`]); if equal, it is dropped.
    pub top_k: usize,
    /// Tokens that an expert takes of each group.
    pub capacity: usize,
    /// Tokens of a group; the last may be shorter.
    pub tokens_per_group: usize,
    /// Which tokens make a group; those that alternate are of whole groups.
    pub groups: Sequences,
    /// Whose turn it is.
    pub order: Order,
    /// Take the tokens of a group by falling priority, equal ones by token (batch-prioritised routing: Riquelme et al. 2021,
    /// "Scaling Vision with Sparse Mixture of Experts", section 4.1: with [`Order::ByChoice`]).
    pub prioritised: bool,
    /// The second expert's chance; needs `top_k` of 2 unless it is [`SecondExpert::Always`].
    pub second: SecondExpert,
    /// Divide each weight by the sum of what the token got: normalised after tokens were dropped (lingvo's GShard; NLLB with
    /// `normalize_router_prob_before_dropping` off). Absent, weights stay as they were given. Not by a p-norm.
    pub renormalise: Option<Renormalise>,
}

impl AdmissionRule {
    /// Most choices of a token, `K`: a lane of a warp has one.
    pub const MAX_CANDIDATES: usize = 32;

    /// Token by token, as they come, a choice whose expert is full dropped (Switch Transformers).
    pub const fn new(experts: usize, top_k: usize, capacity: usize, tokens_per_group: usize) -> AdmissionRule {
        AdmissionRule {
            experts,
            candidates: top_k,
            top_k,
            capacity,
            tokens_per_group,
            groups: Sequences::Following,
            order: Order::ByToken,
            prioritised: false,
            second: SecondExpert::Always,
            renormalise: None,
        }
    }

    /// Two experts a token, all first choices before all second ones, these at random by their weight (GShard, algorithm 1).
    pub const fn gshard(experts: usize, capacity: usize, tokens_per_group: usize, noise: NoiseSource) -> AdmissionRule {
        AdmissionRule {
            order: Order::ByChoice,
            second: SecondExpert::gshard(noise),
            ..AdmissionRule::new(experts, 2, capacity, tokens_per_group)
        }
    }
}

impl AdmissionRule {
    /// Whether the weights of what tokens get are others than those of their choices: of choices that were passed on, or divided by what is left of them. Their
    /// gradients then go back by [`crate::capacity::admission_backward`].
    pub const fn regrades(&self) -> bool {
        self.candidates != self.top_k || self.renormalise.is_some()
    }

    /// What a token's weights are divided by, as `max(sum + plus, least)`.
    pub(crate) fn divisor(&self) -> (f32, f32) {
        match self.renormalise {
            Some(Renormalise::AtLeast(least)) => (0.0, least),
            Some(Renormalise::Plus(plus)) => (plus, f32::NEG_INFINITY),
            _ => (0.0, 0.0),
        }
    }
}

settings!(AdmissionRule {
    candidates: usize,
    groups: Sequences,
    order: Order,
    prioritised: bool,
    second: SecondExpert,
    renormalise: Option<Renormalise>,
});

/// Tokens that an expert takes of a group of `tokens`: `max(1, ceil(top_k * tokens * factor / experts))` (GShard's `2N/E`
/// with factor 1; Switch and GLaM call the factor "capacity factor"). Rounding up is ours: V-MoE rounds to nearest, Mesh TensorFlow down, but
/// to at least 4.
pub fn capacity(tokens: usize, experts: usize, top_k: usize, factor: f64) -> usize {
    let wanted = (top_k as f64 * tokens as f64 * factor / experts as f64).ceil();
    // A float that is not a number or negative becomes 0.
    (wanted as usize).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capacity_rounds_up_and_is_never_zero() {
        assert_eq!(capacity(1024, 64, 2, 1.25), 40);
        assert_eq!(capacity(100, 64, 1, 1.0), 2);
        assert_eq!(capacity(1, 64, 1, 0.0), 1);
        assert_eq!(capacity(1, 64, 1, f64::NAN), 1);
    }
}
