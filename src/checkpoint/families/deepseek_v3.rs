//! DeepSeek-V3 (DeepSeek-AI 2024, sections 2.1.2 and 4.2) and what routes like it: sigmoid scores, chosen with a correction bias, by groups where
//! there are some, the weights divided by their sum + 1e-20 and scaled; a shared expert of some widths.

use super::*;
use crate::Dtype;
use crate::checkpoint::facts::{Act, Experts, MODULE, Matrices, SCORING, SHARED_EXPERTS, W123};
use crate::checkpoint::spec::{BlockSpec, Scene};
use crate::layer::{LatentDesc, Norms};
use crate::rules::{ChoiceBy, GroupScore, Masked, RmsNorm, Score};

const DEEPSEEK_V3: Family = Family::new(&["deepseek_v3", "deepseek_v32", "kimi_k2", "sarvam_mla"], Score::Sigmoid)
    .score_named("scoring_func", SCORING)
    .correction("gate.e_score_correction_bias")
    .groups(8, 4, GroupScore::TOP_TWO, Masked::Out)
    .requires(&[("topk_method", "noaux_tc")])
    .renormalised_if(&["norm_topk_prob", "moe_renormalize"], true, SUM_PLUS)
    .scale(&["routed_scaling_factor"], 2.5)
    .shared(SHARED_EXPERTS, &["n_shared_experts", "num_shared_experts"], 1)
    .unordered();

/// GLM-4.5 (Zeng et al. 2025): groups only where the configuration has more than one.
const GLM4_MOE: Family =
    DEEPSEEK_V3.kin(&["glm4_moe", "glm4v_moe"]).groups(1, 1, GroupScore::TOP_TWO, Masked::Out).scaled_by(1.0);

const DOTS1: Family = GLM4_MOE.kin(&["dots1", "solar_open"]);

const SHARED_LINEAR: Matrices = Matrices::gated(
    "shared_experts.linear_gate.weight",
    "shared_experts.up_proj.weight",
    "shared_experts.down_proj.weight",
);

const SHARED_UNGATED: Matrices = Matrices::plain("shared_experts.up_proj.weight", "shared_experts.down_proj.weight");

pub(super) const KIN: &[Family] = &[
    DEEPSEEK_V3,
    // Experts of groups that are not kept get 0, which a kept one with a negative biased score loses against.
    DEEPSEEK_V3.kin(&["axk2"]).groups(1, 1, GroupScore::TOP_TWO, Masked::Zero),
    DEEPSEEK_V3.kin(&["bailing_hybrid"]).correction("gate.expert_bias"),
    DEEPSEEK_V3.kin(&["beam"]).ordered().sum_scale(&["routed_scaling_factor"], 2.5).without_shared(),
    GLM4_MOE,
    GLM4_MOE.kin(&["glm4_moe_lite"]).scaled_by(1.8),
    GLM4_MOE.kin(&["glm_moe_dsa", "sarvam_moe"]).scaled_by(2.5),
    DOTS1,
    DOTS1
        .kin(&["dots3_note"])
        .shared_wide(SHARED_EXPERTS, &["shared_experts_intermediate_size"])
        .disregards(&["n_shared_experts"]),
    DOTS1.kin(&["mimo_v2_flash"]).without_shared(),
    GLM4_MOE.kin(&["exaone_moe"]).correction("e_score_correction_bias").scaled_by(2.5),
    // Hunyuan 4 (Tencent 2026): experts clamp, the shared one does not.
    GLM4_MOE
        .kin(&["hy_v4", "hy_v4_vl"])
        .scaled_by(2.827)
        .experts(MODULE)
        .activation(Act::Clamped("swiglu_limit", 10.0))
        .shared(SHARED_LINEAR, &["n_shared_experts"], 1)
        .shared_activation(Act::Named(&["hidden_act"], "silu")),
    GLM4_MOE.kin(&["glm5_next"]).scaled_by(2.5).activation(Act::Clamped("swiglu_limit", 10.0)),
    // Nemotron-H (NVIDIA 2025): squared ReLU without a gate.
    GLM4_MOE
        .kin(&["nemotron_h"])
        .at(&["*.#.mixer"])
        .experts(Experts::Each(Matrices::plain("experts.#.up_proj.weight", "experts.#.down_proj.weight")))
        .activation(Act::Named(&["mlp_hidden_act"], "relu2"))
        .shared_wide(SHARED_UNGATED, &["moe_shared_expert_intermediate_size"])
        .disregards(&["n_shared_experts"])
        .refine("experts of `moe_latent_size` columns, between projections, if it is there", nemotron),
    // A.X K1 (SKT 2026): a norm of the whole sum, which the files have beside the block.
    DEEPSEEK_V3.kin(&["axk1"]).refine("the sum goes through a norm", |scene, spec| {
        let epsilon = scene.config.number("rms_norm_eps", 1e-6)? as f32;
        spec.layer.norms = Norms::new().output(Some(RmsNorm::new(epsilon)));
        spec.norms.output = Some("^post_mlp_layernorm.weight");
        Ok(())
    }),
    DEEPSEEK_V4,
    GLM4_MOE.kin(&["kimi_linear"]).at(&["*.#.block_sparse_moe"]).experts(Experts::Each(W123)).scaled_by(2.446),
];

/// DeepSeek-V4 (2026): the square root of softplus; the first layers look their experts up in a table by word.
const DEEPSEEK_V4: Family = Family::new(&["deepseek_v4"], Score::SqrtSoftplus)
    .at(&["*.#.ffn"])
    .score_named(
        "scoring_func",
        &[("sqrtsoftplus", Score::SqrtSoftplus), ("sigmoid", Score::Sigmoid), ("softmax", Score::Softmax)],
    )
    .correction("gate.bias")
    .renormalised(SUM_PLUS)
    .scale(&["routed_scaling_factor"], 1.5)
    .experts(Experts::Each(W123))
    .activation(Act::Clamped("swiglu_limit", 10.0))
    .shared(SHARED_W123, &["n_shared_experts"], 1)
    .disregards(&["norm_topk_prob"])
    .unordered()
    .refine("experts by word where the layer has a table `gate.tid2eid`", |scene, spec| {
        if scene.has("gate.tid2eid") {
            spec.layer.gating.choice = ChoiceBy::Given;
            (spec.table, spec.correction_bias) = (Some("gate.tid2eid"), None);
        }
        Ok(())
    });

const SHARED_W123: Matrices =
    Matrices::gated("shared_experts.w1.weight", "shared_experts.w3.weight", "shared_experts.w2.weight");

/// Experts of a width of their own between two projections.
fn nemotron(scene: &Scene<'_>, spec: &mut BlockSpec) -> Result<(), CheckpointError> {
    scene.config.require_flag("mlp_bias", false, "biases are not read")?;
    if let Some(width) = scene.config.count("moe_latent_size")?.filter(|&width| width > 0) {
        spec.layer.latent = Some(LatentDesc::new(Dtype::F32, width));
        spec.latent = Some(["fc1_latent_proj.weight", "fc2_latent_proj.weight"]);
    }
    Ok(())
}
