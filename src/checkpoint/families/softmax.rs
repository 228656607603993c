//! Softmax over all experts, then the best of them; their weights divided by their sum always, never, or where a key says so.

use super::*;
use crate::checkpoint::family::{Experts, MODULE, Matrices, SHARED_EXPERT, SHARED_EXPERTS, SHARED_MLP, W123};
use crate::checkpoint::spec::BlockSpec;
use crate::rules::Score;

/// Mixtral (Jiang et al. 2024). MiniMax's factors of the residual are applied outside the block.
const MIXTRAL: Family = Family::new(&["mixtral", "minimax"], Score::Softmax)
    .at(&["*.#.block_sparse_moe"])
    .renormalised(SUM)
    .width(&["intermediate_size"])
    .experts(Experts::Each(W123));

/// Qwen2-MoE (Yang et al. 2024).
const QWEN2_MOE: Family = Family::new(&["qwen2_moe"], Score::Softmax)
    .renormalised_if(&["norm_topk_prob"], false, SUM)
    .shared_wide(SHARED_EXPERT, &["shared_expert_intermediate_size"])
    .shared_gate("shared_expert_gate.weight");

/// Qwen3-MoE (Yang et al. 2025).
const QWEN3_MOE: Family = QWEN2_MOE.kin(&["qwen3_moe"]).without_shared();

/// OLMoE (Muennighoff et al. 2024).
const OLMOE: Family = QWEN3_MOE.kin(&["olmoe", "flex_olmo"]).width(&["intermediate_size"]);

/// Qwen3-VL: transformers' saved files have matrices as `nn.Linear`, the hub's their transposes.
const QWEN3_VL_MOE: Experts = match MODULE {
    Experts::Together { gate_up, gate_up_bias, down, down_bias, glu, .. } => {
        Experts::Together { gate_up, gate_up_bias, down, down_bias, glu, layout: None }
    }
    other => other,
};

/// ERNIE 4.5 (Baidu 2025): chosen with a correction bias, the divisor bounded from below.
const ERNIE4_5_MOE: Family = Family::new(&["ernie4_5_moe"], Score::Softmax)
    .correction_if("moe_statics.e_score_correction_bias", "moe_use_aux_free", true)
    .requires(&[("moe_gate", "topk")])
    .renormalised(Renormalise::AtLeast(1e-12))
    .shared(SHARED_EXPERTS, &["moe_num_shared_experts"], 2)
    .refine("divided by at least moe_norm_min (1e-12)", ernie);

/// Hunyuan-A13B (Tencent 2025). Several counts may be lists with a number for each layer.
const HUNYUAN_V1_MOE: Family = Family::new(&["hunyuan_v1_moe"], Score::Softmax)
    .router("gate.wg.weight")
    .renormalised_if(&["norm_topk_prob"], true, SUM)
    .width(&["moe_intermediate_size", "intermediate_size"])
    .shared(SHARED_MLP, &["num_shared_expert"], 1)
    // They act only with `group_limited_greedy`.
    .disregards(&["n_group", "topk_group", "routed_scaling_factor"])
    .refine("", hunyuan);

/// DBRX (Databricks 2024), whose sizes are in an object of their own.
const DBRX: Family = Family::new(&["dbrx"], Score::Softmax)
    .at(&["transformer.blocks.#.ffn"])
    .router("router.layer.weight")
    .hidden(&["d_model"])
    .width(&["ffn_config.ffn_hidden_size"])
    .counts(&["ffn_config.moe_num_experts"], &["ffn_config.moe_top_k"])
    .experts(Experts::Rows(Matrices::gated("experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2")))
    .refine("divided by the sum, where moe_normalize_expert_weights is 1, or not, where it is null", dbrx);

pub(super) const KIN: &[Family] = &[
    MIXTRAL,
    QWEN2_MOE,
    QWEN2_MOE.kin(&["qwen3_next", "qwen4_exp"]).renormalised_if(&["norm_topk_prob"], true, SUM),
    QWEN2_MOE.kin(&["qwen3_5_moe"]).renormalised(SUM),
    QWEN3_MOE,
    QWEN3_MOE.kin(&["qwen3_omni_moe", "mellum"]).renormalised_if(&["norm_topk_prob"], true, SUM),
    QWEN3_MOE.kin(&["qwen3_vl_moe"]).renormalised(SUM).experts(QWEN3_VL_MOE),
    OLMOE,
    QWEN3_MOE
        .kin(&["lara_mini"])
        .renormalised_if(&["norm_topk_prob"], true, SUM)
        .experts(MODULE)
        .shared_wide(SHARED_EXPERT, &["shared_expert_intermediate_size"]),
    HUNYUAN_V1_MOE,
    DBRX,
    // Jamba (AI21 2024).
    Family::new(&["jamba"], Score::Softmax)
        .at(&["*.#.feed_forward"])
        .router("router.weight")
        .width(&["intermediate_size"]),
    ERNIE4_5_MOE,
];

fn ernie(config: &Config, _: usize, spec: &mut BlockSpec) -> Result<(), CheckpointError> {
    config.require_flag("use_bias", false, "biases of separate experts are not read")?;
    let least = config.number("moe_norm_min", 1e-12)? as f32;
    spec.layer.gating.renormalise = Some(Renormalise::AtLeast(least));
    Ok(())
}

fn hunyuan(config: &Config, _: usize, spec: &mut BlockSpec) -> Result<(), CheckpointError> {
    config.require_flag("group_limited_greedy", false, "groups of this family are not read")?;
    if !config.flag("use_mixed_mlp_moe", true)? {
        (spec.layer.shared, spec.shared) = (None, None);
    }
    Ok(())
}

fn dbrx(config: &Config, _: usize, spec: &mut BlockSpec) -> Result<(), CheckpointError> {
    let norm = config.null_or_number("ffn_config.moe_normalize_expert_weights", 1.0)?;
    spec.layer.gating.renormalise = match norm {
        None => None,
        Some(1.0) => Some(SUM),
        Some(other) => {
            let reason = format!("is {other}, expected 1 or null: other norms are not computed");
            return Err(CheckpointError::config("ffn_config.moe_normalize_expert_weights", reason));
        }
    };
    config.require_text("ffn_config.ffn_act_fn.name", "silu")
}
