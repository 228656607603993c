//! The best logits, and the softmax over these alone.

use super::*;
use crate::checkpoint::facts::{Act, Experts, SHARED_EXPERTS};
use crate::checkpoint::spec::{BlockSpec, Scene};
use crate::rules::{Glu, Layout, Score};

/// gpt-oss (OpenAI 2025): biases everywhere, interleaved gate and up, transposed experts. The hub's own files hold the experts in MXFP4
/// (`gate_up_proj_blocks`), which is not read.
const GPT_OSS: Family = Family::new(&["gpt_oss"], Score::TopkSoftmax)
    .router("router.weight")
    .router_bias("router.bias")
    .width(&["intermediate_size"])
    .experts(biased(Glu::Interleaved))
    .activation(Act::Oai);

const fn biased(glu: Glu) -> Experts {
    Experts::Together {
        gate_up: "experts.gate_up_proj",
        gate_up_bias: Some("experts.gate_up_proj_bias"),
        down: "experts.down_proj",
        down_bias: Some("experts.down_proj_bias"),
        glu,
        layout: Some(Layout::Kn),
    }
}

/// Granite MoE (IBM 2024). The multipliers of residual and embedding are applied outside the block, and a shared MLP stands beside it.
const GRANITEMOE: Family = Family::new(&["granitemoe", "granitemoeshared", "granitemoehybrid"], Score::TopkSoftmax)
    .at(&["*.#.block_sparse_moe"])
    .router("router.layer.weight")
    .width(&["intermediate_size"])
    .experts(Experts::packed("input_linear.weight", "output_linear.weight"))
    .disregards(&["shared_intermediate_size"]);

pub(super) const KIN: &[Family] = &[
    GPT_OSS,
    // The weights are divided by k, and the sum multiplied by it.
    GPT_OSS.kin(&["openai_privacy_filter"]).experts(biased(Glu::Split)),
    GRANITEMOE,
    GRANITEMOE.kin(&["granitemoe_swa"]).router("router.weight").experts(crate::checkpoint::facts::MODULE),
    // JetMoE (Shen et al. 2024).
    Family::new(&["jetmoe"], Score::TopkSoftmax)
        .router("router.layer.weight")
        .width(&["intermediate_size"])
        .experts(Experts::packed("input_linear.weight", "output_linear.weight"))
        .activation(Act::Named(&["activation_function"], "silu"))
        .output_bias("bias"),
    COHERE2_MOE,
    Family::new(&["aria"], Score::TopkSoftmax)
        .router("router.weight")
        .width(&["intermediate_size"])
        .experts(Experts::transposed("experts.fc1.weight", "experts.fc2.weight"))
        .shared(SHARED_EXPERTS, &["moe_num_shared_experts"], 2),
];

/// Command A (Cohere 2026): the mean of the routed and the shared experts, or their sum.
const COHERE2_MOE: Family = Family::new(&["cohere2_moe"], Score::TopkSoftmax)
    .score_named("expert_selection_fn", &[("softmax", Score::TopkSoftmax), ("sigmoid", Score::Sigmoid)])
    .width(&["intermediate_size"])
    .shared(SHARED_EXPERTS, &["num_shared_experts"], 0)
    .refine("sigmoids / sum if `norm_topk_prob` (true); mean with the shared expert if `shared_expert_combination_strategy` is \"average\"", cohere);

fn cohere(scene: &Scene<'_>, spec: &mut BlockSpec) -> Result<(), CheckpointError> {
    const STRATEGY: &str = "shared_expert_combination_strategy";
    let divided = scene.config.flag("norm_topk_prob", true)? && spec.layer.gating.score == Score::Sigmoid;
    spec.layer.gating.renormalise = divided.then_some(SUM);
    match scene.config.text(STRATEGY, "average")? {
        "sum" => {}
        "average" => {
            if let Some(shared) = &mut spec.layer.shared {
                shared.scale = 0.5;
                spec.layer.routed_scale = 0.5;
            }
        }
        other => {
            return Err(CheckpointError::config(STRATEGY, format!("is {other:?}, expected \"sum\" or \"average\"")));
        }
    }
    Ok(())
}
