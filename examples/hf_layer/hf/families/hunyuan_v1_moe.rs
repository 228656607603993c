//! Hunyuan-A13B (Tencent 2025). `tencent/Hunyuan-A13B-Instruct`. Several counts may be lists with an entry for each layer.

use super::*;

pub const FAMILY: Family = Family {
    model_types: &["hunyuan_v1_moe"],
    stacks: &[decoder(|config, layer| Ok(layer >= config.count("moe_layer_num_skipped")?.unwrap_or(0)))],
    block: |config, layer| {
        let of_layer = |key| config.count_of_layer(key, layer);
        let required =
            |key| of_layer(key)?.filter(|&count| count > 0).ok_or_else(|| HfError::config(key, "is missing or 0"));
        let intermediate = match of_layer("moe_intermediate_size")? {
            Some(size) => size,
            None => required("intermediate_size")?,
        };
        let gating = softmax(config.flag("norm_topk_prob", true)?);
        let mut desc = gated_layer(config, intermediate, required("num_experts")?, required("moe_topk")?, gating)?;
        let shared =
            if config.flag("use_mixed_mlp_moe", true)? { of_layer("num_shared_expert")?.unwrap_or(1) } else { 0 };
        desc.shared = shared_expert(intermediate * shared, desc.mlp);
        Ok(BlockSpec {
            router: "gate.wg.weight",
            shared: (shared > 0).then_some(Matrices {
                gate: Some("shared_mlp.gate_proj.weight"),
                up: "shared_mlp.up_proj.weight",
                down: "shared_mlp.down_proj.weight",
            }),
            ..plain_block(desc, PROJECTIONS)
        })
    },
};
