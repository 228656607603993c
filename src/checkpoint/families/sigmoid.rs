//! Sigmoid scores without groups.

use super::*;
use crate::Dtype;
use crate::checkpoint::facts::{Act, Experts, MODULE, Matrices, SHARED_EXPERT, SHARED_EXPERTS, SHARED_MLP, W123};
use crate::checkpoint::spec::{BlockSpec, Scene};
use crate::layer::{LatentDesc, Norms, Weighting};
use crate::rules::{Appended, AppendedWeight, Gain, Glu, Layout, RmsNorm, Score};

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

const STACKED: Matrices = Matrices::gated("gate_proj.weight", "up_proj.weight", "down_proj.weight");

const SHARE_EXPERT: Matrices =
    Matrices::gated("^share_expert.gate_proj.weight", "^share_expert.up_proj.weight", "^share_expert.down_proj.weight");

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
    MINIMAX_M2
        .kin(&["minimax_m3_vl"])
        .activation(Act::Oai)
        .sum_scale(&["routed_scaling_factor"], 2.0)
        .shared_wide(SHARED_EXPERTS, &["shared_intermediate_size"]),
    // Step-3.7 (StepFun 2026): the clamp comes after the SiLU, by layer.
    Family::new(&["step3p7", "step3p5"], Score::Sigmoid)
        .at(&["*.#.moe"])
        .correction("router_bias")
        .renormalised(SUM)
        .sum_scale(&["moe_router_scaling_factor"], 1.0)
        .experts(Experts::Stacked(STACKED))
        .activation(Act::ClampedAfter("swiglu_limits"))
        .shared_wide(SHARE_EXPERT, &["share_expert_dim"])
        .shared_activation(Act::ClampedAfter("swiglu_limits_shared"))
        .unordered(),
    // Laguna (Poolside 2026).
    Family::new(&["laguna"], Score::Sigmoid)
        .logit_softcap("moe_router_logit_softcapping")
        .correction("experts.e_score_correction_bias")
        .renormalised(SUM)
        .sum_scale(&["moe_routed_scaling_factor"], 1.0)
        .shared_wide(SHARED_EXPERT, &["shared_expert_intermediate_size"]),
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
    // Chosen by logit + bias.
    Family::new(&["kolibri1"], Score::Sigmoid)
        .chosen_by_logit()
        .correction("^moe.router.expert_bias")
        .renormalised_if(&["norm_topk_prob"], false, SUM)
        .shared_wide(SHARED_EXPERTS, &["shared_expert_intermediate_size"])
        .unordered(),
    INKLING,
    // Muse Spark (Meta 2026): narrower experts between projections, each one's output through a norm.
    Family::new(&["muse_spark"], Score::Sigmoid)
        .logit_factor("output_multiplier", 0.1767766952966369)
        .correction("gate.e_score_correction_bias")
        .renormalised(Renormalise::Plus(1e-15))
        .scale(&["routed_scaling_factor"], 1.0)
        .experts(MODULE)
        .unordered()
        .refine("experts of `moe_hidden_size` columns between projections, norms before and after each", muse_spark),
];

/// Inkling (Thinking Machines 2026): the weights of the chosen and of the shared experts are divided by their common sum.
const INKLING: Family = Family::new(&["inkling", "inkling_mm_model"], Score::Sigmoid)
    .correction("gate.bias")
    .renormalised(SUM)
    .scale(&["route_scale"], 8.0)
    .global_scale("gate.global_scale")
    .experts(W13)
    .unordered()
    .disregards(&["n_shared_experts"])
    .refine("with those of `n_shared_experts` (2) in the sum", |scene, spec| {
        let count = scene.config.count("n_shared_experts")?.unwrap_or(2);
        spec.layer.gating.appended = Some(Appended::new(count, AppendedWeight::Column));
        spec.appended = Some(["shared_experts.shared_w13_weight", "shared_experts.shared_w2_weight"]);
        Ok(())
    });

fn muse_spark(scene: &Scene<'_>, spec: &mut BlockSpec) -> Result<(), CheckpointError> {
    let config = scene.config;
    let norm =
        |key, default, gain| Ok::<_, CheckpointError>(RmsNorm::new(config.number(key, default)? as f32).gain(gain));
    let width = config.size_of_layer(&["moe_hidden_size"], scene.layer)?;
    let before = norm("rms_norm_eps", 1e-5, Gain::OnePlus)?;
    spec.layer.latent = Some(LatentDesc::new(Dtype::F32, width).norm(Some(before)));
    spec.layer.norms = Norms::new().slots(Some(norm("post_norm_eps", 1e-8, Gain::OnePlusFirst)?));
    spec.latent = Some(["pre_expert_proj.weight", "post_expert_proj.weight"]);
    spec.norms.latent = Some("pre_expert_norm.weight");
    spec.norms.slots = Some("experts.post_expert_norm.weight");
    Ok(())
}

fn weigh_input(_: &Scene<'_>, spec: &mut BlockSpec) -> Result<(), CheckpointError> {
    spec.layer.weighting = Weighting::Input;
    Ok(())
}
