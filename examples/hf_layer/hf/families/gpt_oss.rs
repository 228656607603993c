//! gpt-oss (OpenAI 2025): softmax over the chosen logits, biases everywhere, interleaved gate and up, transposed experts.
//! `openai/gpt-oss-20b` once dequantised: the hub's own files hold the experts in MXFP4 (`gate_up_proj_blocks`).

use super::*;

pub const FAMILY: Family = Family {
    model_types: &["gpt_oss"],
    stacks: &[decoder(every_layer)],
    block: |config, _| {
        let (experts, top_k) = experts_and_top_k(
            config,
            &["num_local_experts", "num_experts"],
            &["num_experts_per_tok", "experts_per_token"],
        )?;
        if activation(config, "hidden_act", "silu")? != Activation::Silu {
            return Err(HfError::config("hidden_act", "is not \"silu\", which the clamped unit is made of"));
        }
        let unit = Swiglu::clamped(config.number("swiglu_limit", 7.0)? as f32)
            .alpha(config.number("swiglu_alpha", 1.702)? as f32)
            .offset(1.0);
        let gating = Gating::new(Score::TopkSoftmax);
        let layer = gated_layer(config, config.size("intermediate_size")?, experts, top_k, gating)?
            .mlp(Mlp::gpt_oss(Dtype::F32).activation(unit.into()));
        Ok(BlockSpec {
            router: "router.weight",
            router_bias: Some("router.bias"),
            experts: Experts::Packed {
                gate_up: "experts.gate_up_proj",
                gate_up_bias: Some("experts.gate_up_proj_bias"),
                down: "experts.down_proj",
                down_bias: Some("experts.down_proj_bias"),
            },
            ..plain_block(layer, PROJECTIONS)
        })
    },
};
