//! The families, one file each, and what several of them share.

use moe_kernels::Dtype;
use moe_kernels::layer::{LayerDesc, Mlp, SharedDesc};
use moe_kernels::rules::{Activation, Gating, Groups, Renormalise, Score, Swiglu};

use super::config::Config;
use super::error::HfError;
use super::family::{BlockSpec, Experts, Family, Matrices, Stack};

mod deepseek_v3;
mod ernie4_5_moe;
mod foreign;
mod glm4_moe;
mod gpt_oss;
mod granitemoe;
mod hunyuan_v1_moe;
mod llama4;
mod minimax_m2;
mod mixtral;
mod olmoe;
mod qwen3_moe;
mod switch_transformers;

pub const ALL: [Family; 12] = [
    mixtral::FAMILY,
    qwen3_moe::FAMILY,
    olmoe::FAMILY,
    deepseek_v3::FAMILY,
    glm4_moe::FAMILY,
    gpt_oss::FAMILY,
    switch_transformers::FAMILY,
    llama4::FAMILY,
    granitemoe::FAMILY,
    minimax_m2::FAMILY,
    ernie4_5_moe::FAMILY,
    hunyuan_v1_moe::FAMILY,
];

/// How transformers' modules hold the experts of all families that have a tensor for each expert on the hub: one tensor for all,
/// `[E,2I,H]` with the gate's rows first, and `[E,H,I]`. Some programs write checkpoints in this form.
pub const MODULE_EXPERTS: Experts =
    Experts::Packed { gate_up: "experts.gate_up_proj", gate_up_bias: None, down: "experts.down_proj", down_bias: None };

pub use foreign::refuse as refuse_foreign_keys;

/// The family of a configuration.
pub fn of(config: &Config) -> Result<Family, HfError> {
    let known = || ALL.iter().flat_map(|family| family.model_types).copied().collect::<Vec<_>>().join(", ");
    ALL.into_iter()
        .find(|family| family.model_types.contains(&config.model_type()))
        .ok_or_else(|| HfError::UnknownFamily { found: config.model_type().to_owned(), known: known() })
}

/// Decoder layers `model.layers.#` whose block is called `mlp`.
const fn decoder(sparse: fn(&Config, usize) -> Result<bool, HfError>) -> Stack {
    Stack { tensors: &["model.layers.#.mlp"], modules: &[], layers: LAYERS, sparse }
}

const LAYERS: &[&str] = &["num_hidden_layers"];

fn every_layer(_: &Config, _: usize) -> Result<bool, HfError> {
    Ok(true)
}

/// `first_k_dense_replace` dense layers, then only MoE.
fn after_the_first_dense(config: &Config, layer: usize) -> Result<bool, HfError> {
    let frequency = config.count("moe_layer_freq")?.unwrap_or(1).max(1);
    Ok(layer >= config.count("first_k_dense_replace")?.unwrap_or(0) && layer.is_multiple_of(frequency))
}

/// Llama's names of an MLP's three matrices, by expert.
const PROJECTIONS: Matrices = Matrices {
    gate: Some("experts.#.gate_proj.weight"),
    up: "experts.#.up_proj.weight",
    down: "experts.#.down_proj.weight",
};

const SHARED_EXPERTS: Matrices = Matrices {
    gate: Some("shared_experts.gate_proj.weight"),
    up: "shared_experts.up_proj.weight",
    down: "shared_experts.down_proj.weight",
};

/// Mixtral's names: `w1` gate, `w3` up, `w2` down.
const W123: Matrices =
    Matrices { gate: Some("experts.#.w1.weight"), up: "experts.#.w3.weight", down: "experts.#.w2.weight" };

/// A layer of gated experts as `nn.Linear` holds them, with the activation that `hidden_act` names; types are filled in later.
fn gated_layer(
    config: &Config,
    intermediate: usize,
    experts: usize,
    top_k: usize,
    gating: Gating,
) -> Result<LayerDesc, HfError> {
    let mlp = Mlp::swiglu(Dtype::F32).activation(activation(config, "hidden_act", "silu")?);
    require_groups(experts, top_k, &gating)?;
    let hidden = config.size("hidden_size")?;
    Ok(LayerDesc::new(Dtype::F32, hidden, intermediate, experts, top_k).gating(gating).mlp(mlp))
}

/// How many experts there are and how many a token gets, each by its spellings.
fn experts_and_top_k(config: &Config, experts: &[&str], top_k: &[&str]) -> Result<(usize, usize), HfError> {
    let counts = (config.size_of(experts)?, config.size_of(top_k)?);
    require_enough((config.spelling(experts), counts.0), (config.spelling(top_k), counts.1))?;
    Ok(counts)
}

/// Fails where a token gets more experts than there are, each given by its key and value.
fn require_enough((experts_key, experts): (&str, usize), (key, top_k): (&str, usize)) -> Result<(), HfError> {
    if top_k <= experts {
        return Ok(());
    }
    Err(HfError::config(key, format!("is {top_k}, expected at most `{experts_key}`, which is {experts}")))
}

/// Fails where the groups do not divide the experts, or those that are kept have too few.
fn require_groups(experts: usize, top_k: usize, gating: &Gating) -> Result<(), HfError> {
    let Some(Groups { count, kept, .. }) = gating.groups else { return Ok(()) };
    if !experts.is_multiple_of(count) || experts / count < 2 {
        let reason = format!("is {count}, expected a number that divides {experts} experts into groups of 2 or more");
        return Err(HfError::config("n_group", reason));
    }
    if !(1..=count).contains(&kept) || kept * (experts / count) < top_k {
        let size = experts / count;
        let reason = format!("is {kept} of {count} groups of {size} experts: from them {top_k} are chosen");
        return Err(HfError::config("topk_group", reason));
    }
    Ok(())
}

/// A block with a router `gate.weight` and separate experts, and nothing else.
fn plain_block(layer: LayerDesc, experts: Matrices) -> BlockSpec {
    BlockSpec {
        layer,
        router: "gate.weight",
        router_bias: None,
        correction_bias: None,
        experts: Experts::Separate(experts),
        shared: None,
        unordered: false,
    }
}

/// A plain block with DeepSeek-V3's correction bias.
fn biased(layer: LayerDesc) -> BlockSpec {
    BlockSpec {
        correction_bias: Some("gate.e_score_correction_bias"),
        unordered: true,
        ..plain_block(layer, PROJECTIONS)
    }
}

/// Adds the shared expert: as many experts' width as `key` says, if any.
fn with_shared_experts(
    config: &Config,
    intermediate: usize,
    key: &str,
    mut block: BlockSpec,
) -> Result<BlockSpec, HfError> {
    let count = config.count(key)?.unwrap_or(0);
    block.layer.shared = shared_expert(intermediate * count, block.layer.mlp);
    block.shared = (count > 0).then_some(SHARED_EXPERTS);
    Ok(block)
}

fn shared_expert(intermediate: usize, mlp: Mlp) -> Option<SharedDesc> {
    (intermediate > 0).then_some(SharedDesc::new(intermediate, mlp))
}

/// Softmax over all experts, renormalised or not.
fn softmax(renormalise: bool) -> Gating {
    Gating::new(Score::Softmax).renormalise(renormalise.then_some(Renormalise::Plus(0.0)))
}

/// Sigmoid with groups and scaling, as DeepSeek-V3 and GLM-4.5 configure it.
fn grouped_sigmoid(config: &Config, groups: usize, kept: usize, scale: f64) -> Result<Gating, HfError> {
    config.require_text("topk_method", "noaux_tc")?;
    let count = config.count("n_group")?.unwrap_or(groups);
    let kept = config.count("topk_group")?.unwrap_or(kept);
    let renormalise = config.flag("norm_topk_prob", true)?;
    let gating = Gating::new(scoring(config)?)
        .renormalise(renormalise.then_some(Renormalise::Plus(1e-20)))
        .scale(config.number("routed_scaling_factor", scale)? as f32);
    Ok(gating.groups((count > 1).then_some(Groups::new(count, kept))))
}

fn scoring(config: &Config) -> Result<Score, HfError> {
    match config.text("scoring_func", "sigmoid")? {
        "sigmoid" => Ok(Score::Sigmoid),
        "softmax" => Ok(Score::Softmax),
        other => Err(HfError::config("scoring_func", format!("is {other:?}, expected \"sigmoid\" or \"softmax\""))),
    }
}

/// The names of transformers' `ACT2FN`.
fn activation(config: &Config, key: &str, default: &str) -> Result<Activation, HfError> {
    let name = config.text(key, default)?;
    activation_named(name).ok_or_else(|| HfError::config(key, format!("is {name:?}, an activation that no kernel has")))
}

fn activation_named(name: &str) -> Option<Activation> {
    match name {
        "silu" | "swish" => Some(Activation::Silu),
        "gelu" | "gelu_python" => Some(Activation::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Some(Activation::GeluTanh),
        "relu" => Some(Activation::Relu),
        _ => None,
    }
}
