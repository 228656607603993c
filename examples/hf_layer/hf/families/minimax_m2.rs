//! MiniMax-M2: Mixtral's experts under sigmoid scores with a correction bias. `MiniMaxAI/MiniMax-M2`.

use super::*;

pub const FAMILY: Family = Family {
    model_types: &["minimax_m2"],
    stacks: &[Stack {
        tensors: &["model.layers.#.block_sparse_moe"],
        modules: &["model.layers.#.mlp"],
        layers: LAYERS,
        sparse: every_layer,
    }],
    block: |config, _| {
        let (experts, top_k) =
            experts_and_top_k(config, &["num_local_experts", "num_experts"], &["num_experts_per_tok"])?;
        let gating = Gating::new(scoring(config)?).renormalised();
        let layer = gated_layer(config, config.size("intermediate_size")?, experts, top_k, gating)?;
        let corrected = config.flag("use_routing_bias", true)?;
        let correction_bias = corrected.then_some("e_score_correction_bias");
        Ok(BlockSpec { correction_bias, unordered: true, ..plain_block(layer, W123) })
    },
};
