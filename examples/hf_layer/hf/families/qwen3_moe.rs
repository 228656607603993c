//! Qwen3-MoE (Yang et al. 2025). `Qwen/Qwen3-30B-A3B`.

use super::*;

pub const FAMILY: Family = Family {
    model_types: &["qwen3_moe"],
    stacks: &[decoder(sparse)],
    block: |config, _| {
        let (experts, top_k) =
            experts_and_top_k(config, &["num_experts", "num_local_experts"], &["num_experts_per_tok"])?;
        let gating = softmax(config.flag("norm_topk_prob", false)?);
        let layer = gated_layer(config, config.size("moe_intermediate_size")?, experts, top_k, gating)?;
        Ok(plain_block(layer, PROJECTIONS))
    },
};

fn sparse(config: &Config, layer: usize) -> Result<bool, HfError> {
    let step = config.count("decoder_sparse_step")?.unwrap_or(1);
    Ok(step > 0 && (layer + 1).is_multiple_of(step) && !config.counts("mlp_only_layers")?.contains(&layer))
}
