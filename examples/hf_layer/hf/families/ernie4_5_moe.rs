//! ERNIE 4.5 (Baidu 2025): softmax scores, chosen with a correction bias. `baidu/ERNIE-4.5-21B-A3B-PT`.

use super::*;

/// What the sum of a token's weights is at least, where the configuration does not say.
const NORM_MIN: f64 = 1e-12;

pub const FAMILY: Family = Family {
    model_types: &["ernie4_5_moe"],
    stacks: &[decoder(sparse)],
    block: |config, _| {
        config.require_flag("use_bias", false, "biases of separate experts are not read")?;
        config.require_text("moe_gate", "topk")?;
        let least = config.number("moe_norm_min", NORM_MIN)? as f32;
        let gating = Gating::new(Score::Softmax).renormalise(Some(Renormalise::AtLeast(least)));
        let intermediate = config.size("moe_intermediate_size")?;
        let (experts, top_k) = experts_and_top_k(config, &["moe_num_experts"], &["moe_k"])?;
        let layer = gated_layer(config, intermediate, experts, top_k, gating)?;
        // Without it the model's own code has no bias.
        let corrected = config.flag("moe_use_aux_free", true)?;
        let block = BlockSpec {
            correction_bias: corrected.then_some("moe_statics.e_score_correction_bias"),
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
