//! Switch Transformers (Fedus et al. 2021): top-1 with the probability as weight, a capacity for each expert.

use super::*;
use crate::Dtype;
use crate::checkpoint::facts::{Act, Experts, Matrices};
use crate::checkpoint::spec::{BlockSpec, Scene};
use crate::layer::Mlp;
use crate::rules::{Capacity, Score};

pub(super) const KIN: &[Family] = &[Family::new(&["switch_transformers"], Score::Softmax)
    .at(&["encoder.block.#.layer.1.mlp", "decoder.block.#.layer.2.mlp"])
    .router("router.classifier.weight")
    .hidden(&["d_model"])
    .width(&["d_ff"])
    .counts(&["num_experts"], &[])
    .experts(Experts::Each(Matrices::plain("experts.expert_#.wi.weight", "experts.expert_#.wo.weight")))
    .activation(Act::Named(&["dense_act_fn"], "relu"))
    .refine("capacity expert_capacity by sequence", refine)];

fn refine(scene: &Scene<'_>, spec: &mut BlockSpec) -> Result<(), CheckpointError> {
    scene.config.require_flag("is_gated_act", false, "this family's experts have no gate")?;
    // The name of T5's configurations; the model's code asks for `dense_act_fn`.
    let act = scene.config.text("dense_act_fn", "relu")?;
    let named = scene.config.text("feed_forward_proj", act)?;
    if named != act {
        let reason = format!("is {named:?}, and `dense_act_fn` is {act:?}");
        return Err(CheckpointError::config("feed_forward_proj", reason));
    }
    let capacity = scene.config.size_of_layer(&["expert_capacity"], 0)?;
    // One sequence; the caller sets its length.
    spec.layer.capacity = Some(Capacity::new(capacity, 1));
    spec.router_bias = scene.config.flag("router_bias", false)?.then_some("router.classifier.bias");
    spec.layer.mlp = Mlp::relu(Dtype::F32).activation(spec.layer.mlp.activation);
    Ok(())
}
