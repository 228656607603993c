//! ERNIE 4.5 (Baidu 2025): softmax scores, chosen with a correction bias. `baidu/ERNIE-4.5-21B-A3B-PT`.

use super::*;

pub const FAMILY: Family = Family {
    model_types: &["ernie4_5_moe"],
    stacks: &[decoder(sparse)],
    block: |config, _| {
        if config.flag("use_bias", false)? {
            return Err(HfError::config("use_bias", "is true: biases of separate experts are not read"));
        }
        let intermediate = config.size("moe_intermediate_size")?;
        let experts = config.size("moe_num_experts")?;
        let layer = gated_layer(config, intermediate, experts, config.size("moe_k")?, softmax(true))?;
        let block = BlockSpec {
            correction_bias: Some("moe_statics.e_score_correction_bias"),
            ..plain_block(layer, PROJECTIONS)
        };
        with_shared_experts(config, intermediate, "moe_num_shared_experts", block)
    },
};

fn sparse(config: &Config, layer: usize) -> Result<bool, HfError> {
    let interval = config.count("moe_layer_interval")?.unwrap_or(1).max(1);
    let start = config.count("moe_layer_start_index")?.unwrap_or(1);
    // -1 is the last layer.
    let end = config.integer("moe_layer_end_index")?.and_then(|end| usize::try_from(end).ok());
    Ok((layer + 1).is_multiple_of(interval) && layer >= start && end.is_none_or(|end| layer <= end))
}
