//! Switch Transformers (Fedus et al. 2021): top-1 with the probability as weight, a capacity for each expert. `google/switch-base-8`.

use moe_kernels::dispatch::Capacity;

use super::*;

pub const FAMILY: Family = Family {
    model_types: &["switch_transformers"],
    stacks: &[
        Stack {
            tensors: &["encoder.block.#.layer.1.mlp"],
            modules: &[],
            layers: &["num_layers"],
            sparse: |config, layer| sparse(config, layer, "encoder_sparse_step"),
        },
        Stack {
            tensors: &["decoder.block.#.layer.2.mlp"],
            modules: &[],
            layers: &["num_decoder_layers", "num_layers"],
            sparse: |config, layer| sparse(config, layer, "decoder_sparse_step"),
        },
    ],
    block: |config, _| {
        let (hidden, intermediate) = (config.size("d_model")?, config.size("d_ff")?);
        let capacity = Capacity { per_expert: config.size("expert_capacity")?, tokens_per_sequence: 1, padded: false };
        let layer = LayerDesc {
            gating: softmax(false),
            capacity: Some(capacity),
            mlp: Mlp { activation: activation(config, "dense_act_fn", "relu")?, ..Mlp::RELU },
            ..LayerDesc::new(Dtype::F32, hidden, intermediate, config.size("num_experts")?, 1)
        };
        Ok(BlockSpec {
            router: "router.classifier.weight",
            router_bias: config.flag("router_bias", false)?.then_some("router.classifier.bias"),
            ..plain_block(
                layer,
                Matrices { gate: None, up: "experts.expert_#.wi.weight", down: "experts.expert_#.wo.weight" },
            )
        })
    },
};

fn sparse(config: &Config, layer: usize, key: &str) -> Result<bool, HfError> {
    let step = config.size(key)?;
    Ok(step == 1 || layer % step == 1)
}
