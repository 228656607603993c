//! The rules by which gating chooses experts and weighs them.

pub use super::kinds::Score;
use super::settings::settings;

/// The rule by which experts are chosen and weighted.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Gating {
    /// Score of each expert.
    pub score: Score,
    /// What the choice compares, or that the ids are given.
    pub choice: ChoiceBy,
    /// Divide each weight by the sum of the token's weights.
    pub renormalise: Option<Renormalise>,
    /// Factor of every weight, after renormalisation (DeepSeek's `routed_scaling_factor`; `1 / k`: OpenAI's privacy filter).
    pub scale: f32,
    /// Choose among the experts of the best groups only.
    pub groups: Option<Groups>,
    /// [`Score::SparseMixer`] masks experts whose logit is relatively more than twice this below the largest
    /// (PhiMoE's `router_jitter_noise`).
    pub jitter: f32,
    /// Whether each expert has a factor of its weight, `expert_scale [E]` (Gemma 4's `per_expert_scale`).
    pub expert_scale: bool,
    /// Whether all weights have a learned factor, `global_scale [1]` (Inkling).
    pub global_scale: bool,
    /// Experts behind the `E`, which every token goes to.
    pub appended: Option<Appended>,
}

impl Gating {
    /// `score`, not renormalised, not scaled, no groups.
    pub const fn new(score: Score) -> Gating {
        Gating {
            score,
            choice: ChoiceBy::Score,
            renormalise: None,
            scale: 1.0,
            groups: None,
            jitter: 0.01,
            expert_scale: false,
            global_scale: false,
            appended: None,
        }
    }

    /// The same, renormalised without an epsilon (Mixtral).
    pub const fn renormalised(self) -> Gating {
        Gating { renormalise: Some(Renormalise::Plus(0.0)), ..self }
    }
}

settings!(Gating {
    choice: ChoiceBy,
    renormalise: Option<Renormalise>,
    scale: f32,
    groups: Option<Groups>,
    jitter: f32,
    expert_scale: bool,
    global_scale: bool,
    appended: Option<Appended>,
});

/// Where a token's ids come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChoiceBy {
    /// The largest scores, with the correction bias if there is one: almost every model. [`Score::TopkSoftmax`] and [`Score::SparseMixer`] have no
    /// score before the choice: the largest logits, without a bias.
    Score,
    /// The largest logits, with the correction bias if there is one; weights are still the scores of the chosen (Kolibri 1).
    Logit,
    /// Nothing is chosen: the caller gives ids, from a rollout (router replay) or from a table by token id (hash layers of DeepSeek-V4), and
    /// scores only weigh. Correction bias and groups have no say. An id that is no expert's becomes -1, with weight 0; one may occur twice.
    Given,
}

/// Experts `E .. E + count` that every token goes to (shared experts computed as the others are). Their ids and weights stand behind a
/// token's `k` choices: rows of `k + count`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Appended {
    /// How many; `k + count` is at most 32.
    pub count: usize,
    /// What weighs them.
    pub weight: AppendedWeight,
}

impl Appended {
    /// `count` experts of this weight.
    pub const fn new(count: usize, weight: AppendedWeight) -> Appended {
        Appended { count, weight }
    }

    /// Whether the logits have columns for them.
    pub const fn has_columns(&self) -> bool {
        matches!(self.weight, AppendedWeight::Column)
    }
}

/// What weighs an appended expert.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum AppendedWeight {
    /// The score of a column of its own: logits are `[T, E + count]`. It is treated as a choice is, and so where the rule renormalises, the sum
    /// is that of `k + count` scores (Inkling). Not with [`Score::Softmax`] and [`Score::SparseMixer`], which share 1 among the `E`.
    Column,
    /// This number, to which no scale is applied.
    Fixed(f32),
}

/// What is done to the router's product before anything else sees it, `cap(factor (x W^T + bias))`: the logits that are returned, measured
/// and chosen by.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct LogitRule {
    /// Factor of every logit (Muse Spark's `output_multiplier`).
    pub factor: f32,
    /// `cap(l) = c tanh(l / c)`, c > 0 (Laguna's `moe_router_logit_softcapping`).
    pub softcap: Option<f32>,
}

impl LogitRule {
    /// Logits as the product has them.
    pub const PLAIN: LogitRule = LogitRule { factor: 1.0, softcap: None };
}

settings!(LogitRule { factor: f32, softcap: Option<f32> });

/// What a token's weights are divided by, of which `sum` is the sum.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Renormalise {
    /// `sum + epsilon`: 1e-20 (DeepSeek-V3 and its kin), 1e-15 (Muse Spark), 1e-6 (LFM2), 0 (Mixtral, Qwen3, MiniMax-M2).
    Plus(f32),
    /// `max(sum, epsilon)`: 1e-12 (ERNIE 4.5).
    AtLeast(f32),
    /// The p-norm `(sum w^p)^(1/p)`, p > 0 (DBRX's `moe_normalize_expert_weights`); infinity is the largest weight.
    PNorm(f32),
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
/// [`ChoiceBy::Logit`] and [`Score::TopkSoftmax`], which has no scores before the choice.
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
        !self.chooses_logits() && self.groups.is_some_and(by_groups)
    }

    /// Whether choice values are logits, with a bias or without.
    pub(crate) fn chooses_logits(&self) -> bool {
        self.choice == ChoiceBy::Logit || !self.score.precedes_choice()
    }

    /// Whether it is one of the common models' rules, which kernels are made for: beside scores, their biased choice, groups, sums and a scale
    /// there is nothing.
    pub(crate) fn is_common(&self) -> bool {
        let common = matches!(self.score, Score::Softmax | Score::TopkSoftmax | Score::Sigmoid);
        let by_sum = match self.renormalise {
            Some(Renormalise::PNorm(p)) => p == 1.0,
            _ => true,
        };
        let learned = self.expert_scale || self.global_scale;
        common && self.choice == ChoiceBy::Score && by_sum && !learned && self.appended.is_none()
    }

    /// How many experts are appended to a token's choices.
    pub fn appended_experts(&self) -> usize {
        self.appended.map_or(0, |appended| appended.count)
    }

    /// Columns of the logits behind those of the experts that a choice is among.
    pub fn appended_columns(&self) -> usize {
        self.appended.filter(Appended::has_columns).map_or(0, |appended| appended.count)
    }
}
