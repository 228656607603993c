//! What a measured gating measures.

use super::settings::settings;

/// The distribution over experts that a balancing loss takes from a token's logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LossScore {
    /// `softmax(l)` (Switch, GShard, Mixtral, OLMoE).
    Softmax,
    /// `sigmoid(l_e) / sum_j sigmoid(l_j)` (DeepSeek-V3, eq. 19; Megatron-LM; TransformerEngine for k > 1).
    Sigmoid,
    /// `sigmoid(l_e)`, not divided by their sum (TransformerEngine's fused router for k = 1). The entropy is that of [`LossScore::Sigmoid`].
    PlainSigmoid,
}

/// Which slots of a token a balancing loss counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LossCounts {
    /// Those that were chosen, with correction bias and groups (Switch, Mixtral, GLaM).
    Choice,
    /// The first of those (GShard, algorithm 1, whose loss this is times `E^2`).
    FirstChoice,
    /// The k of largest score, whatever bias and groups chose (DeepSeek-V3, eq. 18; Megatron-LM's `compute_routing_scores_for_aux_loss`;
    /// TransformerEngine's `fused_compute_score_for_moe_aux_loss`).
    Scores,
}

/// Which tokens make a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Sequences {
    /// `[B, S]`: token t is of sequence `t / S`. The last may be shorter.
    Following,
    /// `[S, B]`: token t is of sequence `t % B` (Megatron-LM). All have S tokens.
    Alternating,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct BalanceRule {
    /// Where probabilities come from.
    pub score: LossScore,
    /// Tokens of a sequence, S.
    pub tokens_per_sequence: usize,
    /// Which tokens these are.
    pub sequences: Sequences,
    /// What both losses count. Counts, importance and what is dropped remain those of the choice.
    pub counts: LossCounts,
    /// Slots that an expert takes of each sequence; others are dropped.
    pub capacity: Option<usize>,
}

impl BalanceRule {
    /// Probabilities by `score`, all choices of sequences of `tokens_per_sequence`, of which none is dropped.
    pub const fn new(score: LossScore, tokens_per_sequence: usize) -> BalanceRule {
        BalanceRule {
            score,
            tokens_per_sequence,
            sequences: Sequences::Following,
            counts: LossCounts::Choice,
            capacity: None,
        }
    }
}

settings!(BalanceRule { sequences: Sequences, counts: LossCounts, capacity: Option<usize> });

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
    /// Factor of the squared coefficient of variation of the sums of weights (Shazeer et al. 2017, eq. 7), 0 for none. The load of a gating
    /// without noise is counts, which have no gradient.
    pub importance: f32,
    /// Factor of the mean over sequences of `sum_e f_e P_e` (DeepSeek-V3, eq. 17), 0 for none. Counts are constant.
    pub sequence: f32,
    /// Tokens of a sequence, for [`LossGradient::sequence`].
    pub tokens_per_sequence: usize,
    /// Which tokens these are.
    pub sequences: Sequences,
}

impl LossGradient {
    /// No loss yet.
    pub const fn new(score: LossScore) -> LossGradient {
        LossGradient {
            score,
            balance: 0.0,
            z: 0.0,
            importance: 0.0,
            sequence: 0.0,
            tokens_per_sequence: 1,
            sequences: Sequences::Following,
        }
    }
}

settings!(LossGradient {
    balance: f32,
    z: f32,
    importance: f32,
    sequence: f32,
    tokens_per_sequence: usize,
    sequences: Sequences,
});
