//! The operations one by one, with the caller's buffers between them, give the bits of the whole layer.

mod support;

use cudarc::driver::CudaSlice;
use half::f16;
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use moe_kernels::experts::combine::{self, CombineArgs, CombineDesc};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Rows};
use moe_kernels::experts::{Dispatched, Weight};
use moe_kernels::layer::{ExpertWeights, LayerArgs, LayerDesc, LayerWeights, Mlp, RouteArgs, RouterWeights, Weighting};
use moe_kernels::routers::gating::{self, GatingArgs, GatingDesc};
use moe_kernels::routers::gating_dispatch::{self, GatingDispatchArgs, GatingDispatchDesc};
use moe_kernels::routers::router::{self, RouterArgs, RouterDesc};
use moe_kernels::rules::{Capacity, Gating, GroupScore, Groups, Score};
use moe_kernels::{Dtype, Workspace};
use support::layer_case::{Device, Random, open};

type T = f16;

struct Inputs {
    x: CudaSlice<T>,
    residual: CudaSlice<T>,
    router: CudaSlice<f32>,
    router_bias: CudaSlice<f32>,
    correction_bias: CudaSlice<f32>,
    gate_up: CudaSlice<T>,
    gate_up_bias: CudaSlice<T>,
    down: CudaSlice<T>,
}

/// What both ways must agree on, bit for bit.
#[derive(PartialEq, Debug)]
struct Outcome {
    logits: Vec<f32>,
    ids: Vec<i32>,
    weights: Vec<f32>,
    counts: Vec<i32>,
    y: Vec<T>,
}

impl Inputs {
    fn new(d: &Device, desc: &LayerDesc, tokens: usize) -> Inputs {
        let LayerDesc { hidden, intermediate, experts, .. } = *desc;
        let f16 = |seed, len| d.stream.clone_htod(&Random::tensor::<T>(seed, len, 0.25)).expect("device memory");
        let f32 = |seed, len| d.stream.clone_htod(&Random::tensor::<f32>(seed, len, 0.25)).expect("device memory");
        Inputs {
            x: f16(1, tokens * hidden),
            residual: f16(2, tokens * hidden),
            router: f32(3, experts * hidden),
            router_bias: f32(4, experts),
            correction_bias: f32(5, experts),
            gate_up: f16(6, experts * 2 * intermediate * hidden),
            gate_up_bias: f16(7, experts * 2 * intermediate),
            down: f16(8, experts * hidden * intermediate),
        }
    }
}

fn whole(d: &Device, desc: &LayerDesc, tokens: usize, inputs: &Inputs) -> Outcome {
    let plan = desc.plan(tokens, d.kernels.device()).expect("a valid layer");
    let router = RouterWeights::new(&inputs.router).bias(&inputs.router_bias).correction_bias(&inputs.correction_bias);
    let experts =
        ExpertWeights::new(Weight::new(&inputs.gate_up).bias(&inputs.gate_up_bias), Weight::new(&inputs.down));
    let weights = LayerWeights::new(router, experts);
    let mut out = Buffers::new(d, desc, tokens);
    let mut workspace = Workspace::new(&d.stream, plan.workspace_bytes()).expect("device memory");
    let route =
        RouteArgs::new().logits(&mut out.logits).ids(&mut out.ids).weights(&mut out.weights).counts(&mut out.counts);
    let args = LayerArgs::new(&inputs.x, &mut out.y).residual(&inputs.residual).route(route);
    plan.forward(d.kernels, &d.stream, &weights, args, &mut workspace).expect("enqueued");
    out.read(d)
}

struct Buffers {
    logits: CudaSlice<f32>,
    ids: CudaSlice<i32>,
    weights: CudaSlice<f32>,
    counts: CudaSlice<i32>,
    y: CudaSlice<T>,
}

impl Buffers {
    fn new(d: &Device, desc: &LayerDesc, tokens: usize) -> Buffers {
        let floats = |len| d.stream.alloc_zeros::<f32>(len).expect("device memory");
        let ints = |len| d.stream.alloc_zeros::<i32>(len).expect("device memory");
        Buffers {
            logits: floats(tokens * desc.experts),
            ids: ints(tokens * desc.top_k),
            weights: floats(tokens * desc.top_k),
            counts: ints(desc.experts),
            y: d.stream.alloc_zeros(tokens * desc.hidden).expect("device memory"),
        }
    }

    fn read(&self, d: &Device) -> Outcome {
        Outcome {
            logits: d.stream.clone_dtoh(&self.logits).expect("the kernels ran"),
            ids: d.stream.clone_dtoh(&self.ids).expect("the kernels ran"),
            weights: d.stream.clone_dtoh(&self.weights).expect("the kernels ran"),
            counts: d.stream.clone_dtoh(&self.counts).expect("the kernels ran"),
            y: d.stream.clone_dtoh(&self.y).expect("the kernels ran"),
        }
    }
}

fn one_by_one(d: &Device, desc: &LayerDesc, tokens: usize, inputs: &Inputs, fused: bool) -> Outcome {
    let (kernels, stream) = (d.kernels, &d.stream);
    let LayerDesc { dtype, router_dtype, hidden, intermediate, experts, top_k, gating, capacity, .. } = *desc;
    let mut out = Buffers::new(d, desc, tokens);

    let routing = RouterDesc::new(dtype, tokens, experts, hidden).weight(router_dtype);
    let args = RouterArgs::new(&inputs.x, &inputs.router, &mut out.logits).bias(&inputs.router_bias);
    router::forward(kernels, stream, &routing, args).expect("router");

    let tile_m = 16;
    let sorting = DispatchDesc::new(tokens, experts, top_k, tile_m).capacity(capacity);
    let rows = sorting.shape();
    let mut dispatched = Dispatched::new(stream, &rows).expect("device memory");
    let together = GatingDispatchDesc::new(gating, sorting);
    let bytes = if fused {
        gating_dispatch::workspace_bytes(&together, kernels.device())
    } else {
        dispatch::workspace_bytes(&sorting, kernels.device())
    };
    let mut workspace = Workspace::new(stream, bytes.expect("a valid dispatch")).expect("device memory");
    if fused {
        let (ids, weights) = (&mut out.ids, &mut out.weights);
        let args = GatingDispatchArgs::new(&out.logits, ids, weights, &mut dispatched, &mut workspace)
            .correction_bias(&inputs.correction_bias);
        gating_dispatch::forward(kernels, stream, &together, args).expect("gating with dispatch");
    } else {
        let args =
            GatingArgs::new(&out.logits, &mut out.ids, &mut out.weights).correction_bias(&inputs.correction_bias);
        gating::forward(kernels, stream, &GatingDesc::new(tokens, experts, top_k, gating), args).expect("gating");
        let args = DispatchArgs::new(&out.ids, &mut dispatched, &mut workspace).weights(&out.weights);
        dispatch::forward(kernels, stream, &sorting, args).expect("dispatch");
    }

    let first = GemmDesc::new(dtype, Rows::Grouped(rows), intermediate, hidden)
        .gather(true)
        .weight(desc.mlp.gate_up)
        .activation(desc.mlp.activation);
    let mut h = stream.alloc_zeros::<T>(rows.slots * intermediate).expect("device memory");
    let input_weighted = desc.weighting == Weighting::Input;
    let gate_up = Weight::new(&inputs.gate_up).bias(&inputs.gate_up_bias);
    let mut args = GemmArgs::new(&inputs.x, gate_up, &mut h).dispatched(&dispatched);
    args.row_scale = input_weighted.then(|| dispatched.slot_weight().into());
    gemm::forward(kernels, stream, &first, args).expect("first product");
    let second = GemmDesc::new(dtype, Rows::Grouped(rows), hidden, intermediate).weight(desc.mlp.down);
    let mut y_slots = stream.alloc_zeros::<T>(rows.slots * hidden).expect("device memory");
    let mut args = GemmArgs::new(&h, Weight::new(&inputs.down), &mut y_slots).dispatched(&dispatched);
    args.out_scale = (!input_weighted).then(|| dispatched.slot_weight().into());
    gemm::forward(kernels, stream, &second, args).expect("second product");

    let args = CombineArgs::new(&y_slots, &dispatched, &mut out.y).residual(&inputs.residual);
    combine::forward(kernels, stream, &CombineDesc::new(dtype, rows, hidden), args).expect("combine");
    let mut outcome = out.read(d);
    outcome.counts = stream.clone_dtoh(dispatched.counts()).expect("the kernels ran");
    outcome
}

#[test]
fn operations_compose_to_the_layer() {
    let d = open();
    let groups = Groups::new(6, 3).score(GroupScore::Max);
    let base = LayerDesc::new(Dtype::F16, 40, 72, 12, 3)
        .router_dtype(Dtype::F32)
        .gating(Gating::new(Score::Sigmoid).renormalised().scale(1.5).groups(Some(groups)));
    let capacity = |padded| Some(Capacity::new(2, 9).padded(padded));
    let interleaved = Mlp::gpt_oss(Dtype::F16).down(Mlp::swiglu(Dtype::F16).down);
    let cases = [
        ("dropless", base),
        ("capacity", base.capacity(capacity(false))),
        ("padded, input weighted", base.capacity(capacity(true)).weighting(Weighting::Input)),
        ("interleaved", base.mlp(interleaved)),
    ];
    for (name, desc) in cases {
        let tokens = 31;
        let inputs = Inputs::new(d, &desc, tokens);
        let want = whole(d, &desc, tokens, &inputs);
        assert!(want.y.iter().any(|value| *value != T::ZERO), "{name}");
        assert_eq!(one_by_one(d, &desc, tokens, &inputs, false), want, "{name}: gating, then dispatch");
        assert_eq!(one_by_one(d, &desc, tokens, &inputs, true), want, "{name}: gating with dispatch");
    }
}

/// Ids that skip: -1 and any other number outside the experts.
#[test]
fn skipped_slots() {
    let d = open();
    let (tokens, experts, top_k) = (6, 3, 2);
    let ids = [2, -1, 0, 2, i32::MIN, 3, 1, 0, -1, i32::MAX, 2, 1];
    let desc = DispatchDesc::new(tokens, experts, top_k, 2);
    let stream = &d.stream;
    let ids = stream.clone_htod(&ids).expect("device memory");
    let mut dispatched = Dispatched::new(stream, &desc.shape()).expect("device memory");
    let bytes = dispatch::workspace_bytes(&desc, d.kernels.device()).expect("a valid dispatch");
    let mut workspace = Workspace::new(stream, bytes).expect("device memory");
    let args = DispatchArgs::new(&ids, &mut dispatched, &mut workspace);
    dispatch::forward(d.kernels, stream, &desc, args).expect("dispatch");
    let read = |from: &CudaSlice<i32>| stream.clone_dtoh(from).expect("the kernels ran");
    assert_eq!(read(dispatched.counts()), [2, 2, 3]);
    assert_eq!(read(dispatched.offsets()), [0, 2, 4, 7]);
    assert_eq!(read(dispatched.slot_token())[..7], [1, 3, 3, 5, 0, 1, 5]);
    assert_eq!(read(dispatched.token_slot()), [4, -1, 0, 5, -1, -1, 2, 1, -1, -1, 6, 3]);
    assert_eq!(read(dispatched.num_tiles()), [4]);
    let tiles = stream.clone_dtoh(dispatched.tiles()).expect("the kernels ran");
    assert_eq!(tiles[..4], [[0, 0, 2, 0], [1, 2, 4, 0], [2, 4, 6, 0], [2, 6, 7, 0]]);
}
