//! Softmax over all experts, then the best of them; their weights divided by their sum always, never, or where a key says so.

use super::*;
use crate::checkpoint::facts::{Act, Experts, MODULE, Matrices, SHARED_EXPERT, SHARED_EXPERTS, SHARED_MLP, W123};
use crate::checkpoint::spec::{BlockSpec, Scene};
use crate::layer::{MapDesc, Norms};
use crate::rules::{IDENTITY, RmsNorm, Score};

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
    .refine("the bound is `moe_norm_min`", ernie);

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
    .refine("/ p-norm, p = `moe_normalize_expert_weights` (1; null: not divided)", dbrx);

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
    ERNIE4_5_MOE.kin(&["ernie4_5_vl_moe"]).second_bank("gate.weight_1"),
    // LongCat-Flash (Meituan 2025): some experts yield their input.
    Family::new(&["longcat_flash"], Score::Softmax)
        .router("router.classifier.weight")
        .correction("router.e_score_correction_bias")
        .width(&["expert_ffn_hidden_size"])
        .scale(&["routed_scaling_factor"], 6.0)
        .unordered()
        .refine("`zero_expert_num` more experts yield their input", longcat),
    // Phi-3.5-MoE (Microsoft 2024): SparseMixer, its masks in evaluation too.
    MIXTRAL.kin(&["phimoe"]).sparse_mixer().refine("masks by `router_jitter_noise` (0.01)", |scene, spec| {
        spec.layer.gating.jitter = scene.config.number("router_jitter_noise", 0.01)? as f32;
        Ok(())
    }),
    GEMMA4,
];

/// Gemma 4 (Google 2026): the block is the layer. The router sees the layer's input through a norm and a scale, the experts through another norm.
const GEMMA4: Family = Family::new(&["gemma4", "diffusion_gemma"], Score::Softmax)
    .at(&["*.#"])
    .router("router.proj.weight")
    .counts(&["num_experts"], &["top_k_experts"])
    .renormalised(SUM)
    .expert_scale("router.per_expert_scale")
    .experts(MODULE)
    .activation(Act::Named(&["hidden_activation"], "gelu_pytorch_tanh"))
    .refine("router and experts see norms of x", |scene, spec| {
        let epsilon = scene.config.number("rms_norm_eps", 1e-6)? as f32;
        // What is not read belongs to attention and to the dense part beside the experts.
        let factor = (spec.layer.hidden as f32).sqrt().recip();
        let router = RmsNorm::new(epsilon).factor(factor);
        spec.layer.norms = Norms::new().router(Some(router)).experts(Some(RmsNorm::new(epsilon)));
        spec.norms.router = Some("router.scale");
        spec.norms.experts = Some("pre_feedforward_layernorm_2.weight");
        Ok(())
    });

fn ernie(scene: &Scene<'_>, spec: &mut BlockSpec) -> Result<(), CheckpointError> {
    scene.config.require_flag("use_bias", false, "biases of separate experts are not read")?;
    let least = scene.config.number("moe_norm_min", 1e-12)? as f32;
    spec.layer.gating.renormalise = Some(Renormalise::AtLeast(least));
    Ok(())
}

fn hunyuan(scene: &Scene<'_>, spec: &mut BlockSpec) -> Result<(), CheckpointError> {
    scene.config.require_flag("group_limited_greedy", false, "groups of this family are not read")?;
    if !scene.config.flag("use_mixed_mlp_moe", true)? {
        (spec.layer.shared, spec.shared) = (None, None);
    }
    Ok(())
}

fn dbrx(scene: &Scene<'_>, spec: &mut BlockSpec) -> Result<(), CheckpointError> {
    const KEY: &str = "ffn_config.moe_normalize_expert_weights";
    let norm = scene.config.null_or_number(KEY, 1.0)?;
    spec.layer.gating.renormalise = match norm {
        None => None,
        Some(1.0) => Some(SUM),
        Some(p) if p > 0.0 => Some(Renormalise::PNorm(p as f32)),
        Some(other) => return Err(CheckpointError::config(KEY, format!("is {other}, expected a number above 0"))),
    };
    scene.config.require_text("ffn_config.ffn_act_fn.name", "silu")
}

/// Experts without weights yield their input.
fn longcat(scene: &Scene<'_>, spec: &mut BlockSpec) -> Result<(), CheckpointError> {
    let (config, experts) = (scene.config, spec.layer.experts);
    // The model's own code never adds it.
    config.disregard(&["router_bias"]);
    spec.idle = vec!["router.classifier.bias".into()];
    config.require_text("zero_expert_type", "identity")?;
    let zeros = config.count("zero_expert_num")?.unwrap_or(0);
    spec.weightless = (zeros > 0).then_some((zeros, IDENTITY));
    spec.layer.experts = experts + zeros;
    spec.layer.map = (zeros > 0).then_some(MapDesc::new(experts));
    // Some programs write matrices of experts that have none.
    let names = ["gate_proj", "up_proj", "down_proj"];
    let of = |expert| names.map(|name| format!("experts.{expert}.{name}.weight"));
    spec.idle.extend((experts..experts + zeros).flat_map(of));
    Ok(())
}
