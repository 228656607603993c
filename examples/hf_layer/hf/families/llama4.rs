//! Llama 4 (Meta 2025): the sigmoid of the chosen logits multiplies the expert's input; transposed experts, a shared one.
//! `meta-llama/Llama-4-Scout-17B-16E`.

use moe_kernels::layer::Weighting;
use moe_kernels::rules::Layout;

use super::*;

pub const FAMILY: Family = Family {
    model_types: &["llama4", "llama4_text"],
    stacks: &[Stack {
        tensors: &["language_model.model.layers.#.feed_forward", "model.layers.#.feed_forward"],
        modules: &["model.language_model.layers.#.feed_forward"],
        layers: LAYERS,
        sparse,
    }],
    block: |config, _| {
        let intermediate = config.size("intermediate_size")?;
        let (experts, top_k) =
            experts_and_top_k(config, &["num_local_experts", "num_experts"], &["num_experts_per_tok"])?;
        let mut layer = gated_layer(config, intermediate, experts, top_k, Gating::new(Score::Sigmoid))?;
        layer.weighting = Weighting::Input;
        layer.shared = shared_expert(intermediate, layer.mlp);
        layer.mlp.gate_up.layout = Layout::Kn;
        layer.mlp.down.layout = Layout::Kn;
        Ok(BlockSpec {
            router: "router.weight",
            experts: Experts::Packed {
                gate_up: "experts.gate_up_proj",
                gate_up_bias: None,
                down: "experts.down_proj",
                down_bias: None,
            },
            shared: Some(Matrices {
                gate: Some("shared_expert.gate_proj.weight"),
                up: "shared_expert.up_proj.weight",
                down: "shared_expert.down_proj.weight",
            }),
            ..plain_block(layer, PROJECTIONS)
        })
    },
};

fn sparse(config: &Config, layer: usize) -> Result<bool, HfError> {
    if config.has("moe_layers") {
        return Ok(config.counts("moe_layers")?.contains(&layer));
    }
    let step = config.count("interleave_moe_layer_step")?.unwrap_or(1);
    Ok(step > 0 && (layer + 1).is_multiple_of(step))
}
