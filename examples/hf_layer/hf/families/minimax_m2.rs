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
        let experts = config.size_of(&["num_local_experts", "num_experts"])?;
        let top_k = config.size("num_experts_per_tok")?;
        let gating = Gating::new(scoring(config)?).renormalised();
        let layer = gated_layer(config, config.size("intermediate_size")?, experts, top_k, gating)?;
        Ok(BlockSpec { correction_bias: Some("e_score_correction_bias"), unordered: true, ..plain_block(layer, W123) })
    },
};
