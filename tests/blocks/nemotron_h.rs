//! Nemotron-H with a latent width: router and shared expert see x, the routed experts a projection of it.

use moe_kernels::Workspace;
use moe_kernels::experts::Weight;
use moe_kernels::layer::{
    ExpertWeights, LatentDesc, LatentWeights, LayerArgs, LayerDesc, LayerWeights, Mlp, RouteArgs, RouterWeights,
    SharedDesc, SharedWeights,
};
use moe_kernels::rules::{Activation, Gating, Renormalise, Score};

use crate::folder::Folder;
use crate::run::{Run, close, same_weights};
use crate::support::compare::{Storage, to_f64};

pub fn block<T: Storage>() {
    let (run, folder) = (Run::new(), Folder::open("nemotron_h_latent", "backbone.layers.0.mixer."));
    let (hidden, latent, intermediate, experts, k) = (72, 36, 24, 16, 2);
    let mlp = Mlp::relu(T::DTYPE).activation(Activation::ReluSquared);
    let gating = Gating::new(Score::Sigmoid).renormalise(Some(Renormalise::Plus(1e-20))).scale(1.5);
    let desc = LayerDesc::new(T::DTYPE, hidden, intermediate, experts, k)
        .router_dtype(moe_kernels::Dtype::F32)
        .mlp(mlp)
        .gating(gating)
        .shared(Some(SharedDesc::new(16, mlp)))
        .latent(Some(LatentDesc::new(T::DTYPE, latent)));
    let router = run.put::<f32>(&folder.weight("gate.weight"));
    let bias = run.put::<f32>(&folder.weight("gate.e_score_correction_bias"));
    let up = run.put::<T>(&folder.stacked("experts.{}.up_proj.weight", 0..experts));
    let down = run.put::<T>(&folder.stacked("experts.{}.down_proj.weight", 0..experts));
    let shared_up = run.put::<T>(&folder.weight("shared_experts.up_proj.weight"));
    let shared_down = run.put::<T>(&folder.weight("shared_experts.down_proj.weight"));
    let (before, after) = (
        run.put::<T>(&folder.weight("fc1_latent_proj.weight")),
        run.put::<T>(&folder.weight("fc2_latent_proj.weight")),
    );
    let weights = LayerWeights::new(
        RouterWeights::new(&router).correction_bias(&bias),
        ExpertWeights::new(Weight::new(&up), Weight::new(&down))
            .shared(SharedWeights::new(Weight::new(&shared_up), Weight::new(&shared_down)))
            .latent(LatentWeights::new(Weight::new(&before), Weight::new(&after))),
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
    let want = folder.golden("y");
    close("y", &run.get(&y), &want, T::DTYPE);

    // Onto a residual, which comes after the projection.
    let residual: Vec<f32> = (0..want.len()).map(|i| (i % 17) as f32 / 16.0 - 0.5).collect();
    let onto = run.put::<T>(&residual);
    let mut with = run.out::<T>(tokens * hidden);
    let args = LayerArgs::new(&x, &mut with).residual(&onto);
    plan.forward(run.kernels, &run.stream, &weights, args, &mut workspace).unwrap();
    let sum: Vec<f32> = residual.iter().zip(&want).map(|(residual, y)| residual + y).collect();
    close("y with a residual", &run.get(&with), &sum, T::DTYPE);
    let mut same = onto;
    let args = LayerArgs::new(&x, &mut same).accumulate();
    plan.forward(run.kernels, &run.stream, &weights, args, &mut workspace).unwrap();
    assert_eq!(run.get(&same), run.get(&with), "onto y itself");
    assert!(to_f64(&want).iter().any(|y| y.abs() > 0.0));
}
