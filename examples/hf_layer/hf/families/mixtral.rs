//! Mixtral (Jiang et al. 2024). `mistralai/Mixtral-8x7B-v0.1`.

use super::*;

pub const FAMILY: Family = Family {
    model_types: &["mixtral"],
    stacks: &[Stack {
        tensors: &["model.layers.#.block_sparse_moe"],
        modules: &["model.layers.#.mlp"],
        layers: LAYERS,
        sparse: every_layer,
    }],
    block: |config, _| {
        let (experts, top_k) =
            experts_and_top_k(config, &["num_local_experts", "num_experts"], &["num_experts_per_tok"])?;
        let layer = gated_layer(config, config.size("intermediate_size")?, experts, top_k, softmax(true))?;
        Ok(plain_block(layer, W123))
    },
};
