//! Gradients that torch's autograd recorded of a checkpoint's block.

use std::path::Path;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr};
use half::{bf16, f16};
use moe_kernels::experts::Weight;
use moe_kernels::layer::{
    BackwardArgs, BackwardDesc, ExpertWeights, LayerArgs, LayerDesc, LayerGradients, LayerWeights, RouterGradients,
    RouterWeights, Saved, WeightGradients,
};
use moe_kernels::rules::{Gating, Score};
use moe_kernels::{Dtype, Element, Workspace};
use safetensors::{Dtype as Stored, SafeTensors};

use crate::{data, device};

/// In the norm: f32 sums of a few hundred terms behind one another; in 16 bits the roundings of what lies between products.
fn tolerance(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 2e-6,
        Dtype::F16 => 1e-3,
        Dtype::Bf16 => 1e-2,
        other => unreachable!("no case has {other}"),
    }
}

/// Tensors of a file as f32.
fn tensors(path: &Path) -> impl Fn(&str) -> Vec<f32> + use<> {
    let bytes = std::fs::read(path).unwrap();
    move |name| {
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        match tensor.dtype() {
            Stored::F32 => tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            Stored::BF16 => {
                let word = |b: &[u8]| u32::from(u16::from_le_bytes(b.try_into().unwrap())) << 16;
                tensor.data().chunks_exact(2).map(|b| f32::from_bits(word(b))).collect()
            }
            other => panic!("{name} is {other:?}"),
        }
    }
}

fn near<T: Element + DeviceRepr>(stream: &Arc<CudaStream>, name: &str, got: &CudaSlice<T>, want: &[f32], most: f64) {
    let got: Vec<f32> = stream.clone_dtoh(got).unwrap().into_iter().map(T::to_f32).collect();
    assert_eq!(got.len(), want.len(), "{name}");
    let square = |v: f64| v * v;
    let error: f64 = got.iter().zip(want).map(|(&g, &w)| square(f64::from(g) - f64::from(w))).sum();
    let norm: f64 = want.iter().map(|&w| square(w.into())).sum();
    let error = (error / norm).sqrt();
    println!("{} {name}: {error:.1e}", T::DTYPE);
    assert!(error <= most, "{} {name}: relative error {error:e}", T::DTYPE);
}

/// A checkpoint's block: its folder, the names of its tensors, sizes and rule.
struct Block {
    folder: &'static str,
    prefix: &'static str,
    /// Gate, up, down.
    parts: [&'static str; 3],
    experts: usize,
    top_k: usize,
    gating: Gating,
}

/// Softmax over all experts, the chosen renormalised: only they have a gradient.
#[test]
fn mixtral_by_torch() {
    by_torch(&Block {
        folder: "mixtral",
        prefix: "model.layers.0.block_sparse_moe",
        parts: ["w1", "w3", "w2"],
        experts: 8,
        top_k: 2,
        gating: Gating::new(Score::Softmax).renormalised(),
    });
}

/// Not renormalised: every logit has one.
#[test]
fn olmoe_by_torch() {
    by_torch(&Block {
        folder: "olmoe",
        prefix: "model.layers.0.mlp",
        parts: ["gate_proj", "up_proj", "down_proj"],
        experts: 10,
        top_k: 4,
        gating: Gating::new(Score::Softmax),
    });
}

fn by_torch(block: &Block) {
    in_type::<f32>(block);
    in_type::<f16>(block);
    in_type::<bf16>(block);
}

fn in_type<T: Element + DeviceRepr>(block: &Block) {
    let folder = data::path("families").join(block.folder);
    let (model, golden, grads) = (
        tensors(&folder.join("model.safetensors")),
        tensors(&folder.join("golden.safetensors")),
        tensors(&folder.join("golden_grads.safetensors")),
    );
    let &Block { experts, top_k, gating, prefix, parts, .. } = block;
    let tensor = |name: &str| model(&format!("{prefix}.{name}.weight"));
    let by_expert = |part: &str| (0..experts).map(|e| tensor(&format!("experts.{e}.{part}"))).collect::<Vec<_>>();
    let [gate, up, down] = parts.map(by_expert);
    let router = tensor("gate");
    let (hidden, width) = (router.len() / experts, down[0].len() * experts / router.len());
    let (x, dy) = (golden("x"), grads("dy"));
    let tokens = x.len() / hidden;
    let gate_up: Vec<f32> = gate.iter().zip(&up).flat_map(|(gate, up)| [&gate[..], &up[..]].concat()).collect();

    let (kernels, stream) = (device::kernels(), device::stream());
    let to = |values: &[f32]| {
        let rounded: Vec<T> = values.iter().map(|&value| T::from_f32(value)).collect();
        stream.clone_htod(&rounded).unwrap()
    };
    let zeros = |len: usize| stream.alloc_zeros::<T>(len).unwrap();
    let (x, dy, gate_up, down, router) = (to(&x), to(&dy), to(&gate_up), to(&down.concat()), to(&router));

    let desc = LayerDesc::new(T::DTYPE, hidden, width, experts, top_k).gating(gating);
    let plan = desc.plan(tokens, kernels.device()).unwrap();
    let back = plan.backward_plan(&BackwardDesc::new()).unwrap();
    assert!(back.launches() <= 9, "{} launches", back.launches());
    let bytes = plan.workspace_bytes().max(back.workspace_bytes());
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    let mut saved = Saved::new(&stream, &back).unwrap();
    let experts_here = ExpertWeights::new(Weight::new(&gate_up), Weight::new(&down));
    let weights = LayerWeights::new(RouterWeights::new(&router), experts_here);
    let mut y = zeros(tokens * hidden);
    plan.forward_saving(kernels, &stream, &weights, LayerArgs::new(&x, &mut y), &mut saved, &mut workspace).unwrap();

    let (mut dx, mut d_router) = (zeros(tokens * hidden), stream.alloc_zeros::<f32>(experts * hidden).unwrap());
    let (mut d_down, mut d_gate_up) = (zeros(experts * hidden * width), zeros(experts * 2 * width * hidden));
    let gradients = LayerGradients::new()
        .x(&mut dx)
        .router(RouterGradients::new().matrix(&mut d_router))
        .gate_up(WeightGradients::new(&mut d_gate_up))
        .down(WeightGradients::new(&mut d_down));
    back.backward(kernels, &stream, &weights, &saved, BackwardArgs::new(&x, &dy, gradients), &mut workspace).unwrap();

    let most = tolerance(T::DTYPE);
    near(&stream, "dx", &dx, &grads("dx"), most);
    near(&stream, "d.gate.weight", &d_router, &grads("d.gate.weight"), most);
    near(&stream, "d.experts.gate_up_proj", &d_gate_up, &grads("d.experts.gate_up_proj"), most);
    near(&stream, "d.experts.down_proj", &d_down, &grads("d.experts.down_proj"), most);
}
