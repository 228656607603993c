//! OLMoE (Muennighoff et al. 2024). `allenai/OLMoE-1B-7B-0924`.

use super::*;

pub const FAMILY: Family = Family {
    model_types: &["olmoe"],
    stacks: &[decoder(every_layer)],
    block: |config, _| {
        let (experts, top_k) =
            experts_and_top_k(config, &["num_experts", "num_local_experts"], &["num_experts_per_tok"])?;
        let gating = softmax(config.flag("norm_topk_prob", false)?);
        let layer = gated_layer(config, config.size("intermediate_size")?, experts, top_k, gating)?;
        Ok(plain_block(layer, PROJECTIONS))
    },
};
