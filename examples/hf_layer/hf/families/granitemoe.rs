//! Granite MoE (IBM 2024): softmax over the chosen logits; gate and up packed. `ibm-granite/granite-3.0-1b-a400m-base`.
//!
//! The model's `residual_multiplier` is applied outside the block.

use super::*;

pub const FAMILY: Family = Family {
    model_types: &["granitemoe"],
    stacks: &[Stack { tensors: &["model.layers.#.block_sparse_moe"], ..decoder(every_layer) }],
    block: |config, _| {
        let (experts, top_k) =
            experts_and_top_k(config, &["num_local_experts", "num_experts"], &["num_experts_per_tok"])?;
        let gating = Gating::new(Score::TopkSoftmax);
        let layer = gated_layer(config, config.size("intermediate_size")?, experts, top_k, gating)?;
        Ok(BlockSpec {
            router: "router.layer.weight",
            experts: Experts::Packed {
                gate_up: "input_linear.weight",
                gate_up_bias: None,
                down: "output_linear.weight",
                down_bias: None,
            },
            ..plain_block(layer, PROJECTIONS)
        })
    },
};
