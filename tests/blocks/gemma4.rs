//! Gemma 4: the router sees a normalised and scaled row, the experts a row that another norm makes of the same.

use moe_kernels::experts::{Dispatched, Weight};
use moe_kernels::layer::{
    Choices, ExpertWeights, LayerArgs, LayerDesc, LayerWeights, Mlp, NormWeights, Norms, RouteArgs, RouterWeights,
};
use moe_kernels::rules::{Activation, Gating, RmsNorm, Score};
use moe_kernels::{Dtype, Workspace};

use crate::folder::Folder;
use crate::run::{Run, close, same_weights};
use crate::support::compare::Storage;

pub fn gemma4<T: Storage>() {
    block::<T>("gemma4", "model.layers.0.", 16);
}

pub fn diffusion_gemma<T: Storage>() {
    block::<T>("diffusion_gemma", "layers.0.", 24);
}

fn block<T: Storage>(family: &str, prefix: &'static str, intermediate: usize) {
    let (run, folder) = (Run::new(), Folder::open(family, prefix));
    let (hidden, experts, k) = (64, 8, 2);
    let norms = Norms::new()
        .router(Some(RmsNorm::new(1e-6).factor((hidden as f32).powf(-0.5))))
        .experts(Some(RmsNorm::new(1e-6)));
    let desc = LayerDesc::new(T::DTYPE, hidden, intermediate, experts, k)
        .router_dtype(Dtype::F32)
        .gating(Gating::new(Score::Softmax).renormalised())
        .mlp(Mlp::swiglu(T::DTYPE).activation(Activation::GeluTanh))
        .norms(norms);
    let router = run.put::<f32>(&folder.weight("router.proj.weight"));
    let scale = run.put::<T>(&folder.weight("router.scale"));
    let gain = run.put::<T>(&folder.weight("pre_feedforward_layernorm_2.weight"));
    let gate_up = run.put::<T>(&folder.weight("experts.gate_up_proj"));
    let down = run.put::<T>(&folder.weight("experts.down_proj"));
    let weights = LayerWeights::new(
        RouterWeights::new(&router).norm(&scale),
        ExpertWeights::new(Weight::new(&gate_up), Weight::new(&down)).norms(NormWeights::new().experts(&gain)),
    );

    let x = folder.golden("x");
    let tokens = x.len() / hidden;
    let x = run.put::<T>(&x);
    let plan = desc.plan(tokens, run.kernels.device()).unwrap();
    let mut workspace = Workspace::new(&run.stream, plan.workspace_bytes()).unwrap();
    let (mut ids, mut shares) = (run.out_ints(tokens * k), run.out::<f32>(tokens * k));
    let mut logits = run.out::<f32>(tokens * experts);
    let route = RouteArgs::new().logits(&mut logits).ids(&mut ids).weights(&mut shares);
    let mut rows = Dispatched::new(&run.stream, &plan.route().rows()).unwrap();
    plan.route().forward::<T>(run.kernels, &run.stream, &weights.router, &x, route, &mut rows, &mut workspace).unwrap();
    // What was recorded is the softmax.
    let probabilities: Vec<f64> =
        run.get(&logits).chunks(experts).flat_map(moe_kernels::reference::gating::softmax).collect();
    close("probs", &probabilities, &folder.golden("probs"), T::DTYPE);
    // The scale of each expert, on the weights.
    let by_expert = folder.weight("router.per_expert_scale");
    let chosen = run.get_ints(&ids);
    let scaled: Vec<f32> =
        chosen.iter().zip(run.get(&shares)).map(|(&id, share)| share as f32 * by_expert[id as usize]).collect();
    let (want_ids, want_shares) = (folder.golden_ints("ids"), folder.golden("weights"));
    let got: Vec<f64> = scaled.iter().map(|&share| share.into()).collect();
    same_weights("weights", (&chosen, &got), (&want_ids, &want_shares), k, T::DTYPE);

    let shares = run.put::<f32>(&scaled);
    let mut y = run.out::<T>(tokens * hidden);
    let args = LayerArgs::new(&x, &mut y).choices(Choices::new(&ids, &shares));
    plan.forward(run.kernels, &run.stream, &weights, args, &mut workspace).unwrap();
    close("y", &run.get(&y), &folder.golden("y"), T::DTYPE);
}
