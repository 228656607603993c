//! The rules by which gating chooses experts and weighs them.

pub use super::kinds::Score;
use super::settings::settings;

/// The rule by which experts are chosen and weighted.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Gating {
    /// Score of each expert.
    pub score: Score,
    /// Divide each weight by the sum of the token's weights plus 1e-20.
    pub renormalise: bool,
    /// Factor of every weight, after renormalisation (DeepSeek's `routed_scaling_factor`).
    pub scale: f32,
    /// Choose among the experts of the best groups only.
    pub groups: Option<Groups>,
}

impl Gating {
    /// `score`, not renormalised, not scaled, no groups.
    pub const fn new(score: Score) -> Gating {
        Gating { score, renormalise: false, scale: 1.0, groups: None }
    }

    /// The same, renormalised.
    pub const fn renormalised(self) -> Gating {
        Gating { renormalise: true, ..self }
    }
}

settings!(Gating { renormalise: bool, scale: f32, groups: Option<Groups> });

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
}

impl Groups {
    /// The best `kept` of `count` groups, each ranked by its two largest choice values (DeepSeek-V3).
    pub const fn new(count: usize, kept: usize) -> Groups {
        Groups { count, kept, score: GroupScore::TopTwo }
    }
}

settings!(Groups { score: GroupScore });

/// What ranks a group of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GroupScore {
    /// Sum of its two largest choice values (DeepSeek-V3). Groups need two experts or more.
    TopTwo,
    /// Its largest choice value (DeepSeek-V2).
    Max,
}
