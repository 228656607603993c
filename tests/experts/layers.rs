//! Layers in f16.

use half::f16;
use moe_kernels::experts::Weight;
use moe_kernels::layer::{ExpertWeights, LayerArgs, LayerDesc, LayerWeights, Mlp, RouterWeights};
use moe_kernels::rules::Activation;
use moe_kernels::{Dtype, Workspace};

use crate::device;

/// An expert's output lies outside f16, a quarter of it within: it is weighted before it is rounded.
#[test]
fn f16_outputs_are_weighted_before_they_are_rounded() {
    let (hidden, intermediate, experts, top_k) = (8, 8, 4, 4);
    let (kernels, stream) = (device::kernels(), device::stream());
    // x = h = (205, 0, ..); the first expert's rows are (320, 0, ..), the others' are zeros: outputs 65600 and 0.
    let first = |value: f32, row: usize| if row < hidden { f16::from_f32(value) } else { f16::ZERO };
    let down: Vec<f16> = (0..experts * hidden * intermediate)
        .map(|i| if i % intermediate == 0 { first(320.0, i / intermediate) } else { f16::ZERO })
        .collect();
    let up: Vec<f16> = (0..experts * 64).map(|i| f16::from_f32(if i % 64 % 9 == 0 { 1.0 } else { 0.0 })).collect();
    let mut x = [f16::ZERO; 8];
    x[0] = f16::from_f32(205.0);
    let x = stream.clone_htod(&x).unwrap();
    let (up, down) = (stream.clone_htod(&up).unwrap(), stream.clone_htod(&down).unwrap());
    // Equal logits: all four with weight 1/4.
    let router = stream.clone_htod(&vec![f16::ZERO; experts * hidden]).unwrap();

    let mlp = Mlp::relu(Dtype::F16).activation(Activation::Identity);
    let desc = LayerDesc::new(Dtype::F16, hidden, intermediate, experts, top_k).mlp(mlp);
    let plan = desc.plan(1, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).unwrap();
    let weights =
        LayerWeights::new(RouterWeights::new(&router), ExpertWeights::new(Weight::new(&up), Weight::new(&down)));
    let mut y = stream.alloc_zeros::<f16>(hidden).unwrap();
    plan.forward(kernels, &stream, &weights, LayerArgs::new(&x, &mut y), &mut workspace).unwrap();
    assert_eq!(stream.clone_dtoh(&y).unwrap(), [f16::from_f32(16400.0); 8]);
}
