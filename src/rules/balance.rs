//! What a measured gating measures.

use super::settings::settings;

/// The distribution over experts that a balancing loss takes from a token's logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LossScore {
    /// `softmax(l)` (Switch, GShard, Mixtral, OLMoE).
    Softmax,
    /// `sigmoid(l_e) / sum_j sigmoid(l_j)` (DeepSeek-V3, eq. 19).
    Sigmoid,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct BalanceRule {
    /// Where probabilities come from.
    pub score: LossScore,
    /// Tokens of a sequence; the last may be shorter.
    pub tokens_per_sequence: usize,
    /// The loss counts each token's first choice only (GShard, algorithm 1, whose loss this is times `E^2`).
    pub first_choice_only: bool,
    /// Losses count each token's k experts of largest score, whatever a correction bias and groups chose (DeepSeek-V3, eq. 18). Counts,
    /// importance and what is dropped remain those of the choice. Not with `first_choice_only`.
    pub unbiased: bool,
    /// Slots that an expert takes of each sequence; others are dropped.
    pub capacity: Option<usize>,
}

impl BalanceRule {
    /// Probabilities by `score`, all choices of sequences of `tokens_per_sequence`, of which none is dropped.
    pub const fn new(score: LossScore, tokens_per_sequence: usize) -> BalanceRule {
        BalanceRule { score, tokens_per_sequence, first_choice_only: false, unbiased: false, capacity: None }
    }
}

settings!(BalanceRule { first_choice_only: bool, unbiased: bool, capacity: Option<usize> });

/// Losses whose gradient joins that of a gating's weights.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct LossGradient {
    /// Where the balancing loss's probabilities come from.
    pub score: LossScore,
    /// Factor of `E sum_e f_e P_e` (Switch Transformers' alpha), 0 for none. Counts are constant.
    pub balance: f32,
    /// Factor of the mean squared log-sum-exp (ST-MoE's z-loss), 0 for none.
    pub z: f32,
}

impl LossGradient {
    /// No loss yet.
    pub const fn new(score: LossScore) -> LossGradient {
        LossGradient { score, balance: 0.0, z: 0.0 }
    }
}

settings!(LossGradient { balance: f32, z: f32 });
