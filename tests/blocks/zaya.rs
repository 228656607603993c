//! Zaya: a router with a network, and a state that it has from the previous layer's and hands on; a number that stands for no expert.

use moe_kernels::experts::Weight;
use moe_kernels::layer::{
    ExpertWeights, LayerArgs, LayerDesc, LayerWeights, MapDesc, MapTable, RouteArgs, RouterWeights,
};
use moe_kernels::routers::network::{NetworkArgs, NetworkDesc, NetworkWeights};
use moe_kernels::rules::{Gating, NONE, RmsNorm, Score};
use moe_kernels::{Dtype, Workspace};

use crate::folder::Folder;
use crate::run::{Run, close};
use crate::support::compare::Storage;

pub fn block<T: Storage>() {
    let (run, folder) = (Run::new(), Folder::open("zaya", "model.layers.1.mlp."));
    let (hidden, width, intermediate, experts) = (64, 16, 16, 10);
    let x = folder.golden("x");
    let tokens = x.len() / hidden;
    let x = run.put::<T>(&x);

    // State and network in f32, in which the logits were recorded.
    let network = NetworkDesc::new(T::DTYPE, tokens, hidden, width, experts + 1, RmsNorm::new(1e-5)).state(Dtype::F32);
    let down_bias = run.put::<T>(&folder.weight("gate.down_proj.bias"));
    let down = run.put::<T>(&folder.weight("gate.down_proj.weight"));
    let put = |name: &str| run.put::<f32>(&folder.weight(&format!("gate.{name}")));
    let (scale, gain) = (put("router_states_scale"), put("router_mlp.norm.weight"));
    let (first, first_bias) = (put("router_mlp.fc1.weight"), put("router_mlp.fc1.bias"));
    let (second, second_bias) = (put("router_mlp.fc2.weight"), put("router_mlp.fc2.bias"));
    let output = put("router_mlp.out_proj.weight");
    let layers = [Weight::new(&first).bias(&first_bias), Weight::new(&second).bias(&second_bias)];
    let weights =
        NetworkWeights::new(Weight::new(&down).bias(&down_bias), layers, &output).state_scale(&scale).norm(&gain);
    let previous = run.put::<f32>(&folder.golden("prev_router_hidden_states"));
    let (mut state, mut logits) = (run.out::<f32>(tokens * width), run.out::<f32>(tokens * (experts + 1)));
    let plan = network.plan(run.kernels.device()).unwrap();
    let mut workspace = Workspace::new(&run.stream, plan.workspace_bytes()).unwrap();
    let args = NetworkArgs::new(&x, &mut logits).previous(&previous).state(&mut state);
    plan.forward::<T, f32>(run.kernels, &run.stream, &weights, args, &mut workspace).unwrap();
    close("state", &run.get(&state), &folder.golden("router_hidden_states"), T::DTYPE);
    close("logits", &run.get(&logits), &folder.golden("logits"), T::DTYPE);

    // The last number is that of a choice of nothing.
    let desc = LayerDesc::new(T::DTYPE, hidden, intermediate, experts + 1, 1)
        .gating(Gating::new(Score::Softmax))
        .map(Some(MapDesc::new(experts)));
    let table: Vec<i32> = (0..experts as i32).chain([NONE]).collect();
    let table = run.ints(&table);
    let bias = run.put::<f32>(&folder.weight("gate.balancing_biases"));
    let gate_up = run.put::<T>(&folder.weight("experts.gate_up_proj"));
    let down = run.put::<T>(&folder.weight("experts.down_proj"));
    let weights = LayerWeights::new(
        RouterWeights::of_logits().correction_bias(&bias),
        ExpertWeights::new(Weight::new(&gate_up), Weight::new(&down)),
    );
    let plan = desc.plan(tokens, run.kernels.device()).unwrap();
    let mut workspace = Workspace::new(&run.stream, plan.workspace_bytes()).unwrap();
    let (mut y, mut ids, mut shares) = (run.out::<T>(tokens * hidden), run.out_ints(tokens), run.out::<f32>(tokens));
    let route = RouteArgs::new().given_logits(&logits).ids(&mut ids).weights(&mut shares).map(MapTable::new(&table));
    let args = LayerArgs::new(&x, &mut y).route(route);
    plan.forward(run.kernels, &run.stream, &weights, args, &mut workspace).unwrap();
    close("y", &run.get(&y), &folder.golden("y"), T::DTYPE);

    // transformers gives a token without an expert to expert 0, with weight 0.
    let (ids, shares) = (run.get_ints(&ids), run.get(&shares));
    let skips = |id: i32| id == experts as i32;
    let numbers: Vec<i32> = ids.iter().map(|&id| if skips(id) { 0 } else { id }).collect();
    let weights: Vec<f64> = ids.iter().zip(shares).map(|(&id, share)| if skips(id) { 0.0 } else { share }).collect();
    assert_eq!(numbers, folder.golden_ints("ids"));
    close("weights", &weights, &folder.golden("weights"), T::DTYPE);
    assert!(ids.iter().any(|&id| skips(id)), "the recorded batch has tokens without an expert");
}
