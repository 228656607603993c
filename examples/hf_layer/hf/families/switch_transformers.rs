//! Switch Transformers (Fedus et al. 2021): top-1 with the probability as weight, a capacity for each expert. `google/switch-base-8`.

use moe_kernels::rules::Capacity;

use super::*;

const ENCODER_LAYERS: &[&str] = &["num_layers"];
const DECODER_LAYERS: &[&str] = &["num_decoder_layers", "num_layers"];

pub const FAMILY: Family = Family {
    model_types: &["switch_transformers"],
    stacks: &[
        Stack {
            tensors: &["encoder.block.#.layer.1.mlp"],
            modules: &[],
            layers: ENCODER_LAYERS,
            sparse: |config, layer| sparse(config, layer, "encoder", ENCODER_LAYERS),
        },
        Stack {
            tensors: &["decoder.block.#.layer.2.mlp"],
            modules: &[],
            layers: DECODER_LAYERS,
            sparse: |config, layer| sparse(config, layer, "decoder", DECODER_LAYERS),
        },
    ],
    block: |config, _| {
        let (hidden, intermediate) = (config.size("d_model")?, config.size("d_ff")?);
        let capacity = Capacity::new(config.size("expert_capacity")?, 1);
        config.require_flag("is_gated_act", false, "this family's experts have no gate")?;
        // The name of T5's configurations; the model's code asks for `dense_act_fn`.
        let act = config.text("dense_act_fn", "relu")?;
        let named = config.text("feed_forward_proj", act)?;
        if named != act {
            return Err(HfError::config("feed_forward_proj", format!("is {named:?}, and `dense_act_fn` is {act:?}")));
        }
        let layer = LayerDesc::new(Dtype::F32, hidden, intermediate, config.size("num_experts")?, 1)
            .gating(softmax(false))
            .capacity(Some(capacity))
            .mlp(Mlp::relu(Dtype::F32).activation(activation(config, "dense_act_fn", "relu")?));
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

/// `stack` is `encoder` or `decoder`. Where no step is given it follows from the number of sparse layers.
fn sparse(config: &Config, layer: usize, stack: &str, layers: &[&str]) -> Result<bool, HfError> {
    let step = match config.count(&format!("{stack}_sparse_step"))? {
        Some(step) => step,
        None => {
            let sparse_layers = config.count(&format!("num_sparse_{stack}_layers"))?.unwrap_or(0);
            config.size_of(layers)?.checked_div(sparse_layers).unwrap_or(0)
        }
    };
    Ok(step == 1 || (step > 1 && layer % step == 1))
}
