//! GLM-4.5 (Zeng et al. 2025), which routes like DeepSeek-V3. `zai-org/GLM-4.5-Air`.

use super::*;

pub const FAMILY: Family = Family {
    model_types: &["glm4_moe"],
    stacks: &[decoder(after_the_first_dense)],
    block: |config, _| {
        let intermediate = config.size("moe_intermediate_size")?;
        let (experts, top_k) = experts_and_top_k(config, &["n_routed_experts"], &["num_experts_per_tok"])?;
        let layer = gated_layer(config, intermediate, experts, top_k, grouped_sigmoid(config, 1, 1, 1.0)?)?;
        with_shared_experts(config, intermediate, "n_shared_experts", biased(layer))
    },
};
