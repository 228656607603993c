//! Families that have little in common with others.

use super::*;
use crate::checkpoint::facts::{Act, Experts, MODULE, Matrices};
use crate::checkpoint::kind::KindSpec;
use crate::checkpoint::spec::{BlockSpec, Scene};
use crate::checkpoint::weights::SequenceCapacity;
use crate::layer::MapDesc;
use crate::rules::{AdmissionRule, NONE, Order, RmsNorm, Score};

pub(super) const KIN: &[Family] = &[
    // NLLB (NLLB team 2022): two experts a token, with a capacity that all first choices have before any second one.
    Family::new(&["nllb_moe", "nllb-moe"], Score::Softmax)
        .at(&["model.encoder.layers.#.ffn", "model.decoder.layers.#.ffn"])
        .router("router.classifier.weight")
        .hidden(&["d_model"])
        .width(&["encoder_ffn_dim"])
        .counts(&["num_experts"], &[])
        .renormalised(Renormalise::AtLeast(f32::EPSILON))
        .experts(Experts::Each(Matrices::plain("experts.expert_#.fc1.weight", "experts.expert_#.fc2.weight").biased()))
        .activation(Act::Named(&["activation_function"], "relu"))
        .refine(
            "two, capacity `expert_capacity`, first choices first; their sum x 1 - `moe_token_dropout` (0.2)",
            nllb,
        ),
    // Zaya (Zyphra 2026): the router has a network, and a state that goes from layer to layer.
    Family::new(&["zaya"], Score::Softmax)
        .router("gate.router_mlp.out_proj.weight")
        .correction("gate.balancing_biases")
        .experts(MODULE)
        .refine("logits of a network with a state; one more number stands for no expert", zaya),
    // Doge (2024): experts of one hidden unit by product keys, beside a dense MLP.
    Family::new(&["doge"], Score::TopkSoftmax)
        .router("router_gate.weight")
        .width(&["intermediate_size"])
        .experts(Experts::Each(Matrices::gated("gate_proj.weight", "up_proj.weight", "down_proj.weight")))
        .refine("logits are sums of two keys', experts have one unit, beside a dense MLP", doge),
    // ViTPose+ (Xu et al. 2023): an image's expert is that of its dataset, and makes the last columns of the output.
    Family::new(&["vitpose_backbone"], Score::Softmax)
        .at(&["encoder.layer.#.mlp", "backbone.encoder.layer.#.mlp"])
        .router("experts.0.weight")
        .width(&[])
        .counts(&["num_experts"], &[])
        .experts(Experts::Each(Matrices::plain("experts.#.weight", "experts.#.weight").biased()))
        .activation(Act::Named(&["hidden_act"], "gelu"))
        .without_scores()
        .refine("experts make the last `part_features` columns of the output", vitpose),
];

fn nllb(scene: &Scene<'_>, spec: &mut BlockSpec) -> Result<(), CheckpointError> {
    let config = scene.config;
    config.require_text("second_expert_policy", "all")?;
    config.require_flag("batch_prioritized_routing", false, "an order by probability is not computed")?;
    let layer = &mut spec.layer;
    layer.top_k = 2;
    if scene.prefix.contains(".decoder.") {
        layer.intermediate = config.size_of_layer(&["decoder_ffn_dim"], scene.layer)?;
    }
    let fraction = config.number("moe_eval_capacity_token_fraction", 1.0)?;
    let fixed = config.count("expert_capacity")?;
    spec.capacity = match fixed {
        _ if fraction > 0.0 => SequenceCapacity::Fraction(fraction),
        Some(_) => SequenceCapacity::Fixed,
        None => SequenceCapacity::TwoShares,
    };
    let rule = AdmissionRule::new(layer.experts, 2, fixed.unwrap_or(1).max(1), 1).order(Order::ByChoice);
    let before = config.flag("normalize_router_prob_before_dropping", false)?;
    let divided = layer.gating.renormalise.take();
    if before {
        layer.gating.renormalise = divided;
    }
    layer.admission = Some(rule.renormalise(divided.filter(|_| !before)));
    layer.routed_scale = 1.0 - config.number("moe_token_dropout", 0.2)? as f32;
    spec.router_bias = config.flag("router_bias", false)?.then_some("router.classifier.bias");
    Ok(())
}

fn zaya(scene: &Scene<'_>, spec: &mut BlockSpec) -> Result<(), CheckpointError> {
    let experts = spec.layer.experts;
    spec.layer.experts = experts + 1;
    spec.layer.map = Some(MapDesc::new(experts));
    spec.weightless = Some((1, NONE));
    let width = scene.config.size_of_layer(&["router_hidden_size"], scene.layer)?;
    let norm = RmsNorm::new(scene.config.number("rms_norm_eps", 1e-5)? as f32);
    (spec.router, spec.kind) = (None, KindSpec::Network { width, norm });
    Ok(())
}

fn doge(scene: &Scene<'_>, spec: &mut BlockSpec) -> Result<(), CheckpointError> {
    scene.config.require_flag("mlp_bias", false, "biases are not read")?;
    let experts = spec.layer.experts;
    let keys = experts.isqrt();
    if keys * keys != experts {
        return Err(CheckpointError::config("num_experts", format!("is {experts}, expected a square")));
    }
    spec.kind = KindSpec::UnitExperts { keys };
    Ok(())
}

fn vitpose(scene: &Scene<'_>, spec: &mut BlockSpec) -> Result<(), CheckpointError> {
    let hidden = spec.layer.hidden;
    let width = scene.config.number("mlp_ratio", 4.0)? * hidden as f64;
    let part = scene.config.size_of_layer(&["part_features"], scene.layer)?;
    if part > hidden {
        return Err(CheckpointError::config("part_features", format!("is {part}, expected at most {hidden}")));
    }
    if !(width >= 1.0 && width <= f64::from(u32::MAX)) {
        return Err(CheckpointError::config("mlp_ratio", format!("makes a width of {width}")));
    }
    spec.layer.intermediate = width as usize;
    (spec.router, spec.kind) = (None, KindSpec::BySequence { part });
    Ok(())
}
