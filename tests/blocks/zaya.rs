//! Zaya: a router with a network, and a state that it has from the previous layer's and hands on; a number that stands for no expert.

use moe_kernels::experts::Weight;
use moe_kernels::layer::{
    ExpertWeights, LayerArgs, LayerDesc, LayerWeights, MapDesc, MapTable, RouteArgs, RouterWeights,
};
use moe_kernels::reference::gemm::{ExpertMatrix, dense_gemm};
use moe_kernels::reference::rms_norm::{Rows, rms_norm};
use moe_kernels::routers::network::{NetworkArgs, NetworkDesc, NetworkWeights};
use moe_kernels::rules::{Activation, Gain, Gating, Glu, Layout, NONE, RmsNorm, Score};
use moe_kernels::{Dtype, Workspace};

use crate::folder::Folder;
use crate::run::{Run, close};
use crate::support::compare::{Storage, to_f64};
use crate::support::inputs::{generator, normals};

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

/// A first layer, which has no state before it, with state and network in the type of x: the projection is the state.
pub fn first_layer<T: Storage>() {
    let run = Run::new();
    let (tokens, hidden, width, experts) = (21, 40, 24, 7);
    let mut rng = generator("zaya's first layer");
    let mut draw = |len: usize, scale: f64| {
        let values = normals::<T>(&mut rng, len, scale);
        (to_f64(&values), run.stream.clone_htod(&values).unwrap())
    };
    let (x, on_device) = draw(tokens * hidden, 1.0);
    let (down, down_on) = draw(width * hidden, 0.2);
    let (down_bias, down_bias_on) = draw(width, 0.5);
    let (first, first_on) = draw(width * width, 0.3);
    let (second, second_on) = draw(width * width, 0.3);
    let (second_bias, second_bias_on) = draw(width, 0.5);
    let (output, output_on) = draw(experts * width, 0.3);

    let norm = RmsNorm::new(1e-5).gain(Gain::One);
    let plan = NetworkDesc::new(T::DTYPE, tokens, hidden, width, experts, norm).plan(run.kernels.device()).unwrap();
    let layers = [Weight::new(&first_on), Weight::new(&second_on).bias(&second_bias_on)];
    let weights = NetworkWeights::new(Weight::new(&down_on).bias(&down_bias_on), layers, &output_on);
    let mut workspace = Workspace::new(&run.stream, plan.workspace_bytes()).unwrap();
    let (mut state, mut logits) = (run.out::<T>(tokens * width), run.out::<f32>(tokens * experts));
    let args = NetworkArgs::new(&on_device, &mut logits).state(&mut state);
    plan.forward::<T, T>(run.kernels, &run.stream, &weights, args, &mut workspace).unwrap();

    let dense = |a: &[f64], weight: &[f64], bias: Option<&[f64]>, n: usize, k: usize, act: Activation| {
        dense_gemm(a, &ExpertMatrix { weight, bias, n, k, glu: Glu::None, layout: Layout::Nk }, act).unwrap()
    };
    let want_state = dense(&x, &down, Some(&down_bias), width, hidden, Activation::Identity);
    let rows =
        Rows { x: &want_state, width, weight: None, addend: None, addend_scale: None, row_scale: None, residual: None };
    let h = dense(&rms_norm(&rows, &norm).unwrap().y, &first, None, width, width, Activation::Gelu);
    let h = dense(&h, &second, Some(&second_bias), width, width, Activation::Gelu);
    let want = dense(&h, &output, None, experts, width, Activation::Identity);
    let narrow = |values: &[f64]| values.iter().map(|&value| value as f32).collect::<Vec<_>>();
    close("state", &run.get(&state), &narrow(&want_state), T::DTYPE);
    close("logits", &run.get(&logits), &narrow(&want), T::DTYPE);
    // The state is not needed.
    let mut again = run.out::<f32>(tokens * experts);
    let args = NetworkArgs::new(&on_device, &mut again);
    plan.forward::<T, T>(run.kernels, &run.stream, &weights, args, &mut workspace).unwrap();
    assert_eq!(run.get(&again), run.get(&logits));
}
