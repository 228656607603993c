//! DeepSeek-V2 (DeepSeek-AI 2024) and what scores like it: softmax over all experts, by groups where there are some, those of other groups at 0;
//! a scale.

use super::*;
use crate::checkpoint::facts::{Experts, MODULE, Matrices, SHARED_EXPERTS};
use crate::rules::{GroupScore, Masked, Score};

/// Groups by their largest score. The model's own code never divides the weights by their sum.
const DEEPSEEK_V2: Family = Family::new(&["deepseek_v2", "deepseek_ocr2", "unlimited_ocr"], Score::Softmax)
    .requires(&[("scoring_func", "softmax")])
    .groups(1, 1, GroupScore::Max, Masked::Zero)
    .groups_if("topk_method", "group_limited_greedy")
    .scale(&["routed_scaling_factor"], 1.0)
    .shared(SHARED_EXPERTS, &["n_shared_experts"], 2)
    .unordered()
    .disregards(&["norm_topk_prob"]);

/// Mistral 4: groups by the sum of their two largest.
const MISTRAL4: Family = Family::new(&["mistral4"], Score::Softmax)
    .groups(1, 1, GroupScore::TOP_TWO, Masked::Zero)
    .renormalised_if(&["norm_topk_prob"], true, SUM_PLUS)
    .scale(&["routed_scaling_factor"], 1.0)
    .experts(MODULE)
    .shared(SHARED_EXPERTS, &["n_shared_experts"], 1)
    .unordered();

const W123: Matrices = Matrices::gated("^experts.#.w1.weight", "^experts.#.w3.weight", "^experts.#.w2.weight");
const SHARED_W123: Matrices =
    Matrices::gated("^shared_experts.w1.weight", "^shared_experts.w3.weight", "^shared_experts.w2.weight");

pub(super) const KIN: &[Family] = &[
    DEEPSEEK_V2,
    MISTRAL4,
    // Its tensors are in the layer itself, of which the block is `gate`.
    MISTRAL4
        .kin(&["mistral_large4"])
        .renormalised(SUM_PLUS)
        .at(&["*.#.gate"])
        .router("weight")
        .experts(Experts::Each(W123))
        .shared(SHARED_W123, &["n_shared_experts"], 1),
];
