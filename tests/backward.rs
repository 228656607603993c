//! A layer's backward pass put together from operations, against gradients that torch's autograd recorded of the same checkpoint.
//!
//! Nine launches behind a forward pass that keeps x, the pre-activations, logits, ids and the dispatch; nothing is read back between them.

#[path = "support/data.rs"]
mod data;
#[path = "support/device.rs"]
#[allow(dead_code)]
mod device;

use std::path::Path;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr};
use half::{bf16, f16};
use moe_kernels::experts::activation_backward::{self, ActivationBackwardArgs, ActivationBackwardDesc};
use moe_kernels::experts::combine::{self, CombineArgs, CombineDesc};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, ProductOut, Rows};
use moe_kernels::experts::k_grouped::{self, Gathered, KGroupedArgs, KGroupedDesc};
use moe_kernels::experts::{Dispatched, Weight};
use moe_kernels::layer::{ExpertWeights, ExpertsArgs, ExpertsPlan, LayerDesc, LayerPlan, RouteArgs, RouterWeights};
use moe_kernels::routers::gating_backward::{self, GatingBackwardArgs, GatingBackwardDesc};
use moe_kernels::routers::router_backward::{self, RouterBackwardDesc};
use moe_kernels::rules::{Activation, Gating, Layout, Score, WeightDesc};
use moe_kernels::{Dtype, Element, Workspace};
use safetensors::{Dtype as Stored, SafeTensors};

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
    let numbers = |len: usize| stream.alloc_zeros::<f32>(len).unwrap();
    let (x, dy, gate_up, down, router) = (to(&x), to(&dy), to(&gate_up), to(&down.concat()), to(&router));

    // Forward, keeping what the way back needs.
    let desc = LayerDesc::new(T::DTYPE, hidden, width, experts, top_k).gating(gating);
    let plan: LayerPlan = desc.plan(tokens, kernels.device()).unwrap();
    let route = plan.route();
    let shape = route.rows();
    let rows = shape.slots;
    let products = ExpertsPlan::new(&desc, &shape, kernels.device()).unwrap();
    let mut dispatched = Dispatched::new(&stream, &shape).unwrap();
    let bytes = route.workspace_bytes().max(products.workspace_bytes());
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    let (mut logits, mut weights) = (numbers(tokens * experts), numbers(tokens * top_k));
    let mut ids = stream.alloc_zeros::<i32>(tokens * top_k).unwrap();
    let mut kept = RouteArgs::new();
    kept.logits = Some((&mut logits).into());
    kept.ids = Some((&mut ids).into());
    kept.weights = Some((&mut weights).into());
    route.forward(kernels, &stream, &RouterWeights::new(&router), &x, kept, &mut dispatched, &mut workspace).unwrap();
    let (mut y_slots, mut pre_activation) = (zeros(rows * hidden), zeros(rows * 2 * width));
    let expert_weights = ExpertWeights::new(Weight::new(&gate_up), Weight::new(&down));
    let mut args = ExpertsArgs::new(&x, &dispatched, &mut y_slots);
    args.pre_activation = Some((&mut pre_activation).into());
    products.forward(kernels, &stream, &expert_weights, args, &mut workspace).unwrap();

    // 1. The gradient of the second product's input: dy, gathered, times the weight in its other layout.
    let transposed = WeightDesc::new(T::DTYPE).layout(Layout::Kn);
    let product = |n, k, gather, a: &CudaSlice<T>, weight: &CudaSlice<T>, out: &mut CudaSlice<T>| {
        let desc = GemmDesc::new(T::DTYPE, Rows::Grouped(shape), n, k)
            .gather(gather)
            .weight(transposed)
            .activation(Activation::Identity);
        let args = GemmArgs::new(a, Weight::new(weight), out).dispatched(&dispatched);
        gemm::forward(kernels, &stream, &desc, args).unwrap();
    };
    let mut d_hidden = zeros(rows * width);
    product(width, hidden, true, &dy, &down, &mut d_hidden);

    // 2. Back through the activation.
    let (mut d_pre, mut weighted, mut d_slot_weight) = (zeros(rows * 2 * width), zeros(rows * width), numbers(rows));
    let live = dispatched.offsets().slice(experts..experts + 1);
    let through = ActivationBackwardDesc::new(T::DTYPE, rows, width, desc.mlp.activation);
    let mut args = ActivationBackwardArgs::new(&pre_activation, &d_hidden, &mut d_pre);
    args.slot_weight = Some(dispatched.slot_weight().into());
    args.live = Some((&live).into());
    args.hidden = Some((&mut weighted).into());
    args.d_slot_weight = Some((&mut d_slot_weight).into());
    activation_backward::forward(kernels, &stream, &through, args).unwrap();

    // 3, 4. Both weights' gradients: sums over each expert's rows.
    let sums = |m, n, gathered, a: &CudaSlice<T>, b: &CudaSlice<T>, out: &mut CudaSlice<T>| {
        let desc = KGroupedDesc::new(T::DTYPE, shape, m, n).gathered(gathered);
        let args = KGroupedArgs::new(a, b, &dispatched, ProductOut::Rounded(out.into()));
        k_grouped::forward(kernels, &stream, &desc, args).unwrap();
    };
    let (mut d_down, mut d_gate_up) = (zeros(experts * hidden * width), zeros(experts * 2 * width * hidden));
    sums(hidden, width, Gathered::A, &dy, &weighted, &mut d_down);
    sums(2 * width, hidden, Gathered::B, &d_pre, &x, &mut d_gate_up);

    // 5. Through the gating.
    let mut d_logits = numbers(tokens * experts);
    let gating = GatingBackwardDesc::new(tokens, experts, top_k, desc.gating);
    let args = GatingBackwardArgs::new(&logits, &ids, &d_slot_weight, &mut d_logits).dispatched(&dispatched);
    gating_backward::forward(kernels, &stream, &gating, args).unwrap();

    // 6, 7. The router's product.
    let router_back = RouterBackwardDesc::new(T::DTYPE, tokens, experts, hidden);
    let mut d_router = numbers(experts * hidden);
    router_backward::into_weight::<T>(kernels, &stream, &router_back, &d_logits, &x, &mut d_router).unwrap();
    let mut dx_router = zeros(tokens * hidden);
    router_backward::into_x::<T, T>(kernels, &stream, &router_back, &d_logits, &router, &mut dx_router).unwrap();

    // 8, 9. Back to the tokens, onto what came through the router.
    let (mut dx_slots, mut dx) = (zeros(rows * hidden), zeros(tokens * hidden));
    product(hidden, 2 * width, false, &d_pre, &gate_up, &mut dx_slots);
    let sum = CombineDesc::new(T::DTYPE, shape, hidden);
    let mut args = CombineArgs::new(&dx_slots, &dispatched, &mut dx);
    args.residual = Some((&dx_router).into());
    combine::forward(kernels, &stream, &sum, args).unwrap();

    let most = tolerance(T::DTYPE);
    near(&stream, "dx", &dx, &grads("dx"), most);
    near(&stream, "d.gate.weight", &d_router, &grads("d.gate.weight"), most);
    near(&stream, "d.experts.gate_up_proj", &d_gate_up, &grads("d.experts.gate_up_proj"), most);
    near(&stream, "d.experts.down_proj", &d_down, &grads("d.experts.down_proj"), most);
}
