//! Keys of `config.json` that change what a block computes in one family or another.
//!
//! A family honours such a key by asking for it. Where it does not, only a value that changes nothing is accepted: a model that
//! was changed must not be taken for the family's own. What the tensors show is not listed (see `load`), nor what matters in
//! training only (`router_jitter_noise`, losses, dropout).

use moe_kernels::layer::Weighting;
use moe_kernels::rules::{Activation, Score};
use serde_json::Value;

use super::super::config::Config;
use super::super::error::HfError;
use super::super::family::BlockSpec;
use super::activation_named;

/// Fails where a key that the family did not ask for would change the block.
pub fn refuse(config: &Config, block: &BlockSpec) -> Result<(), HfError> {
    match config.unread().find(|&(key, value)| neutral(key, value, block) == Some(false)) {
        None => Ok(()),
        Some((key, value)) => {
            let family = config.model_type();
            Err(HfError::config(key, format!("is {value}, which would change the block: not known of {family}")))
        }
    }
}

/// Whether the value changes nothing; none where the key has no influence on a block.
fn neutral(key: &str, value: &Value, block: &BlockSpec) -> Option<bool> {
    let gating = &block.layer.gating;
    let at_most = |limit: f64| value.as_f64().is_some_and(|number| number <= limit);
    // One number, or one for each layer.
    let nothing = |value: &Value| match value {
        Value::Array(list) => list.iter().all(|value| value.as_f64() == Some(0.0)),
        value => value.as_f64() == Some(0.0),
    };
    let is = |text: &str| value.as_str() == Some(text);
    let flag = |expected: bool| value.as_bool() == Some(expected);
    Some(match key {
        // Scores and the choice.
        "scoring_func" | "moe_score_func" | "moe_gate_act" | "expert_selection_fn" => match gating.score {
            Score::Sigmoid => is("sigmoid"),
            _ => is("softmax"),
        },
        "topk_method" => is("greedy"),
        "moe_router_use_sigmoid" => flag(gating.score == Score::Sigmoid),
        "n_group" | "num_expert_group" | "topk_group" => at_most(1.0),
        "group_limited_greedy" => flag(false),
        "router_bias" | "use_router_bias" => flag(block.router_bias.is_some()),
        "use_routing_bias" | "use_expert_bias" | "moe_use_aux_free" | "moe_router_enable_expert_bias" => {
            flag(block.correction_bias.is_some())
        }
        "router_logit_softcapping" | "moe_router_logit_softcapping" => nothing(value),
        "zero_expert_num" => nothing(value),
        // Weights.
        "norm_topk_prob" | "moe_renormalize" | "moe_norm_gate_logits" => match gating.score {
            // The chosen always sum to 1.
            Score::TopkSoftmax => value.is_boolean(),
            _ => flag(gating.renormalise.is_some()),
        },
        "routed_scaling_factor"
        | "moe_routed_scaling_factor"
        | "router_scaling_factor"
        | "moe_router_scaling_factor"
        | "route_scale" => value.as_f64() == Some(1.0),
        "moe_normalize_expert_weights" => value.as_f64() == Some(1.0),
        "moe_apply_router_weight_on_input" => flag(block.layer.weighting == Weighting::Input),
        // Who gets in.
        "expert_capacity" => false,
        "moe_drop_tokens" => flag(false),
        "router_type" => is("tokens_masked"),
        "moe_token_dropout" => nothing(value),
        // Experts.
        "hidden_act" | "hidden_activation" | "mlp_hidden_act" | "activation_function" => {
            let named = value.as_str().and_then(activation_named);
            named.is_some_and(|named| match block.layer.mlp.activation {
                Activation::Swiglu(_) => named == Activation::Silu,
                other => named == other,
            })
        }
        "is_gated_act" => flag(block.layer.mlp.gate_up.glu.is_gated()),
        "swiglu_limit" | "swiglu_limits" | "swiglu_alpha" | "swiglu_limits_shared" => nothing(value),
        "moe_latent_size" => nothing(value),
        // Shared experts.
        "n_shared_experts"
        | "num_shared_experts"
        | "num_shared_expert"
        | "moe_num_shared_experts"
        | "shared_intermediate_size"
        | "shared_expert_intermediate_size"
        | "moe_shared_expert_intermediate_size" => nothing(value),
        _ => return None,
    })
}
