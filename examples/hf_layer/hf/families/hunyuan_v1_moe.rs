//! Hunyuan-A13B (Tencent 2025). `tencent/Hunyuan-A13B-Instruct`. Several counts may be lists with an entry for each layer.

use super::*;

pub const FAMILY: Family = Family {
    model_types: &["hunyuan_v1_moe"],
    stacks: &[decoder(|config, layer| Ok(layer >= config.count("moe_layer_num_skipped")?.unwrap_or(0)))],
    block: |config, layer| {
        let of_layer = |key| config.count_of_layer(key, layer);
        let required =
            |key| of_layer(key)?.filter(|&count| count > 0).ok_or_else(|| HfError::config(key, "is missing or 0"));
        // `n_group`, `topk_group` and `routed_scaling_factor` act only with it.
        config.require_flag("group_limited_greedy", false, "groups of this family are not read")?;
        config.disregard(&["n_group", "topk_group", "routed_scaling_factor"]);
        let intermediate = match of_layer("moe_intermediate_size")? {
            Some(size) => size,
            None => required("intermediate_size")?,
        };
        let gating = softmax(config.flag("norm_topk_prob", true)?);
        let (experts, top_k) = (required("num_experts")?, required("moe_topk")?);
        require_enough(("num_experts", experts), ("moe_topk", top_k))?;
        let mut desc = gated_layer(config, intermediate, experts, top_k, gating)?;
        let count = of_layer("num_shared_expert")?.unwrap_or(1);
        let shared = if config.flag("use_mixed_mlp_moe", true)? { count } else { 0 };
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
