//! The rules by which gating chooses experts and weighs them.

pub use super::kinds::Score;
use super::settings::settings;

/// The rule by which experts are chosen and weighted.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Gating {
    /// Score of each expert.
    pub score: Score,
    /// Divide each weight by the sum of the token's weights.
    pub renormalise: Option<Renormalise>,
    /// Factor of every weight, after renormalisation (DeepSeek's `routed_scaling_factor`).
    pub scale: f32,
    /// Choose among the experts of the best groups only.
    pub groups: Option<Groups>,
    /// What becomes of weights that are no numbers.
    pub garbage: Garbage,
}

impl Gating {
    /// `score`, not renormalised, not scaled, no groups.
    pub const fn new(score: Score) -> Gating {
        Gating { score, renormalise: None, scale: 1.0, groups: None, garbage: Garbage::Zero }
    }

    /// The same, renormalised without an epsilon (Mixtral).
    pub const fn renormalised(self) -> Gating {
        Gating { renormalise: Some(Renormalise::Plus(0.0)), ..self }
    }
}

settings!(Gating { renormalise: Option<Renormalise>, scale: f32, groups: Option<Groups>, garbage: Garbage });

/// What becomes of a token whose logits are garbage, as the rows behind a batch in a CUDA graph may be. Its ids are in range and distinct
/// in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Garbage {
    /// A weight whose formula gives NaN is 0 (vLLM). A token counts in no loss and no statistic where the log-sum-exp of its logits is not finite
    /// (NaN or +Inf among them, nothing but -Inf), or where the losses' probabilities are not.
    Zero,
    /// As the arithmetic of the formula has it: NaN is seen, in the weights and in whatever they and the probabilities enter (torch).
    Propagate,
}

/// What a token's weights are divided by, of which `sum` is the sum.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Renormalise {
    /// `sum + epsilon`: 1e-20 (DeepSeek-V3 and its kin), 1e-15 (Muse Spark), 1e-6 (LFM2), 0 (Mixtral, Qwen3, MiniMax-M2).
    Plus(f32),
    /// `max(sum, epsilon)`: 1e-12 (ERNIE 4.5).
    AtLeast(f32),
}

/// Group-limited choice (DeepSeek-V3's node-limited routing, section 2.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Groups {
    /// Number of groups of `E / count` consecutive experts; divides `E`.
    pub count: usize,
    /// Groups whose experts stay eligible, 1 to `count`. Ties keep the lower group.
    pub kept: usize,
    /// What ranks a group.
    pub score: GroupScore,
    /// What becomes of the experts of other groups.
    pub masked: Masked,
}

impl Groups {
    /// The best `kept` of `count` groups, each ranked by its two largest choice values, the others out of the running (DeepSeek-V3).
    pub const fn new(count: usize, kept: usize) -> Groups {
        Groups { count, kept, score: GroupScore::TOP_TWO, masked: Masked::Out }
    }
}

settings!(Groups { score: GroupScore, masked: Masked });

/// What ranks a group of experts. Choice values are scores plus the correction bias, whether there is one or not; logits with
/// [`Score::TopkSoftmax`], which has no scores before the choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GroupScore {
    /// Its largest choice value (DeepSeek-V2).
    Max,
    /// The sum of so many of its largest choice values, added from the largest on: 2 (DeepSeek-V3), `topk / group_topk` (Megatron-LM). Groups
    /// need so many experts.
    TopSum(usize),
}

impl GroupScore {
    /// The sum of the two largest (DeepSeek-V3).
    pub const TOP_TWO: GroupScore = GroupScore::TopSum(2);

    /// How many of a group's choice values are added.
    pub(crate) const fn terms(self) -> usize {
        match self {
            GroupScore::Max => 1,
            GroupScore::TopSum(terms) => terms,
        }
    }
}

/// What becomes of the experts of groups that are not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Masked {
    /// They cannot be chosen: their choice value is -Inf (DeepSeek-V3's own code, most others).
    Out,
    /// Their choice value is 0, which a kept expert with a negative one loses against (DeepSeek-V2, Mistral 4, A.X K2; transformers' older
    /// DeepSeek-V3).
    Zero,
}

impl Gating {
    /// Whether experts are compared by scores even without a correction bias: because groups add them up, or are masked with 0. Without, logits
    /// have the same order.
    pub(crate) fn compares_scores(&self) -> bool {
        let by_groups =
            |groups: Groups| groups.count > 1 && (groups.score.terms() != 1 || groups.masked == Masked::Zero);
        self.score != Score::TopkSoftmax && self.groups.is_some_and(by_groups)
    }
}
