//! DeepSeek-V3 (DeepSeek-AI 2024, sections 2.1.2 and 4.2). `deepseek-ai/DeepSeek-V3`.
//!
//! transformers' own block fills the choice values of experts outside the kept groups with 0 in some versions, and with -Inf
//! in others and in DeepSeek's code. They differ where a biased score is negative; here such experts are never chosen.

use super::*;

pub const FAMILY: Family = Family {
    model_types: &["deepseek_v3"],
    stacks: &[decoder(after_the_first_dense)],
    block: |config, _| {
        let intermediate = config.size("moe_intermediate_size")?;
        let (experts, top_k) = experts_and_top_k(config, &["n_routed_experts"], &["num_experts_per_tok"])?;
        let layer = gated_layer(config, intermediate, experts, top_k, grouped_sigmoid(config, 8, 4, 2.5)?)?;
        with_shared_experts(config, intermediate, "n_shared_experts", biased(layer))
    },
};
