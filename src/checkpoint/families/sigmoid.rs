//! Sigmoid scores without groups.

use super::*;
use crate::checkpoint::family::{Act, Experts, SHARED_EXPERT, SHARED_EXPERTS, SHARED_MLP, W123};
use crate::checkpoint::spec::BlockSpec;
use crate::layer::Weighting;
use crate::rules::{Glu, Layout, Score};

/// MiniMax-M2 (2025): Mixtral's experts, chosen with a correction bias.
const MINIMAX_M2: Family = Family::new(&["minimax_m2"], Score::Sigmoid)
    .at(&["*.#.block_sparse_moe"])
    .correction_if("e_score_correction_bias", "use_routing_bias", true)
    .requires(&[("scoring_func", "sigmoid")])
    .renormalised(SUM)
    .width(&["intermediate_size"])
    .experts(Experts::Each(W123))
    .unordered();

/// Trinity (Arcee 2025).
const AFMOE: Family = Family::new(&["afmoe"], Score::Sigmoid)
    .router("router.gate.weight")
    .correction("expert_bias")
    .renormalised(SUM_PLUS)
    .scale(&["route_scale"], 1.0)
    .shared(SHARED_EXPERTS, &["num_shared_experts"], 2)
    .unordered();

/// Llama 4 (Meta 2025): the sigmoid of the chosen logit multiplies the expert's input; transposed experts.
const LLAMA4: Family = Family::new(&["llama4"], Score::Sigmoid)
    .at(&["*.#.feed_forward"])
    .router("router.weight")
    .width(&["intermediate_size"])
    .experts(Experts::transposed("experts.gate_up_proj", "experts.down_proj"))
    .shared(SHARED_EXPERT, &[], 1)
    .refine("weights on the experts' input", weigh_input);

/// Inkling's names: rows of gate and up alternate.
const W13: Experts = Experts::Together {
    gate_up: "experts.w13_weight",
    gate_up_bias: None,
    down: "experts.w2_weight",
    down_bias: None,
    glu: Glu::Interleaved,
    layout: Some(Layout::Nk),
};

pub(super) const KIN: &[Family] = &[
    MINIMAX_M2,
    AFMOE,
    AFMOE.kin(&["hy_v3"]).scale(&["router_scaling_factor"], 2.826).shared(SHARED_MLP, &["num_shared_experts"], 1),
    AFMOE
        .kin(&["inkling2", "inkling2_loop"])
        .router("gate.weight")
        .correction("gate.bias")
        .requires(&[("scoring_func", "sigmoid")])
        .scale(&["route_scale"], 8.0)
        .experts(W13)
        .activation(Act::Softcapped)
        .without_shared(),
    // Liquid's LFM2 (2025).
    Family::new(&["lfm2_moe"], Score::Sigmoid)
        .at(&["*.#.feed_forward"])
        .correction_if("expert_bias", "use_expert_bias", true)
        .renormalised_if(&["norm_topk_prob"], true, Renormalise::Plus(1e-6))
        .scale(&["routed_scaling_factor"], 1.0)
        .experts(Experts::Each(W123))
        .unordered(),
    Family::new(&["flint"], Score::Sigmoid)
        .renormalised_if(&["norm_topk_prob"], true, SUM)
        .shared_wide(SHARED_EXPERT, &["shared_expert_intermediate_size"]),
    LLAMA4,
];

fn weigh_input(_: &Config, _: usize, spec: &mut BlockSpec) -> Result<(), CheckpointError> {
    spec.layer.weighting = Weighting::Input;
    Ok(())
}
