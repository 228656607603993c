//! Muse Spark: experts see a normalised projection of x, and each one's output is normalised before it is weighted.

use moe_kernels::experts::Weight;
use moe_kernels::layer::{
    ExpertWeights, LatentDesc, LatentWeights, LayerArgs, LayerDesc, LayerWeights, NormWeights, Norms, RouteArgs,
    RouterWeights,
};
use moe_kernels::rules::{Gain, Gating, Renormalise, RmsNorm, Score};
use moe_kernels::{Dtype, Workspace};

use crate::folder::Folder;
use crate::run::{Run, close, same_weights};
use crate::support::compare::Storage;

pub fn block<T: Storage>() {
    let (run, folder) = (Run::new(), Folder::open("muse_spark", "layers.0.mlp."));
    let (hidden, latent, intermediate, experts, k) = (80, 40, 24, 8, 4);
    let gating = Gating::new(Score::Sigmoid).renormalise(Some(Renormalise::Plus(1e-15))).scale(1.5);
    let pre_norm = RmsNorm::new(1e-5).gain(Gain::OnePlus);
    let post_norm = RmsNorm::new(1e-8).gain(Gain::OnePlusFirst);
    let desc = LayerDesc::new(T::DTYPE, hidden, intermediate, experts, k)
        .router_dtype(Dtype::F32)
        .gating(gating)
        .norms(Norms::new().slots(Some(post_norm)))
        .latent(Some(LatentDesc::new(T::DTYPE, latent).norm(Some(pre_norm))));
    // The logits' factor is the router's own.
    let factor = 0.1767766952966369;
    let router: Vec<f32> = folder.weight("gate.weight").iter().map(|w| w * factor).collect();
    let router = run.put::<f32>(&router);
    let bias = run.put::<f32>(&folder.weight("gate.e_score_correction_bias"));
    let gate_up = run.put::<T>(&folder.weight("experts.gate_up_proj"));
    let down = run.put::<T>(&folder.weight("experts.down_proj"));
    let (before, after) = (
        run.put::<T>(&folder.weight("pre_expert_proj.weight")),
        run.put::<T>(&folder.weight("post_expert_proj.weight")),
    );
    let pre_gain = run.put::<T>(&folder.weight("pre_expert_norm.weight"));
    let post_gain = run.put::<T>(&folder.weight("experts.post_expert_norm.weight"));
    let weights = LayerWeights::new(
        RouterWeights::new(&router).correction_bias(&bias),
        ExpertWeights::new(Weight::new(&gate_up), Weight::new(&down))
            .norms(NormWeights::new().slots(&post_gain))
            .latent(LatentWeights::new(Weight::new(&before), Weight::new(&after)).norm(&pre_gain)),
    );

    let x = folder.golden("x");
    let tokens = x.len() / hidden;
    let x = run.put::<T>(&x);
    let plan = desc.plan(tokens, run.kernels.device()).unwrap();
    let mut workspace = Workspace::new(&run.stream, plan.workspace_bytes()).unwrap();
    let (mut y, mut ids, mut shares) = (run.out::<T>(tokens * hidden), run.out_ints(tokens * k), run.out(tokens * k));
    let mut logits = run.out::<f32>(tokens * experts);
    let route = RouteArgs::new().logits(&mut logits).ids(&mut ids).weights(&mut shares);
    let args = LayerArgs::new(&x, &mut y).route(route);
    plan.forward(run.kernels, &run.stream, &weights, args, &mut workspace).unwrap();
    close("logits", &run.get(&logits), &folder.golden("logits"), T::DTYPE);
    let (want_ids, want_shares) = (folder.golden_ints("ids"), folder.golden("weights"));
    same_weights("weights", (&run.get_ints(&ids), &run.get::<f32>(&shares)), (&want_ids, &want_shares), k, T::DTYPE);
    close("y", &run.get(&y), &folder.golden("y"), T::DTYPE);
}
