//! The operations one by one, with the caller's buffers between them, give the bits of the whole layer.

mod support;

use cudarc::driver::CudaSlice;
use half::f16;
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc, DispatchOutputs, GateDispatchArgs, TileList};
use moe_kernels::experts::combine::{self, CombineArgs, CombineDesc};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Schedule, Tiles};
use moe_kernels::layer::{Linear, Mlp, Weighting};
use moe_kernels::routers::gating::{self, GatingArgs, GatingDesc};
use moe_kernels::routers::router::{self, RouterArgs, RouterDesc};
use moe_kernels::rules::Capacity;
use moe_kernels::rules::Dtype;
use moe_kernels::rules::{Activation, Glu};
use moe_kernels::rules::{Gating, GroupScore, Groups, Score};
use moe_kernels::{LayerArgs, LayerDesc, LayerWeights, Workspace};
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
    let weights = LayerWeights {
        router: &inputs.router,
        router_bias: Some(&inputs.router_bias),
        correction_bias: Some(&inputs.correction_bias),
        gate_up: Linear { weight: &inputs.gate_up, bias: Some(&inputs.gate_up_bias) },
        down: Linear { weight: &inputs.down, bias: None },
        shared: None,
    };
    let mut out = Buffers::new(d, desc, tokens);
    let mut workspace = Workspace::new(&d.stream, plan.workspace_bytes()).expect("device memory");
    let args = LayerArgs {
        residual: Some(&inputs.residual),
        logits: Some(&mut out.logits),
        ids: Some(&mut out.ids),
        weights: Some(&mut out.weights),
        counts: Some(&mut out.counts),
        ..LayerArgs::new(&inputs.x, &mut out.y)
    };
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

    let routing = RouterDesc { x: dtype, weight: router_dtype, tokens, experts, hidden };
    let args =
        RouterArgs { x: &inputs.x, weight: &inputs.router, bias: Some(&inputs.router_bias), logits: &mut out.logits };
    router::forward(kernels, stream, &routing, args).expect("router");

    let tile_m = 16;
    let sorting = DispatchDesc { tokens, experts, top_k, capacity, tile_m };
    let slots = sorting.slots();
    let ints = |len| stream.alloc_zeros::<i32>(len).expect("device memory");
    let (mut offsets, mut slot_token, mut token_slot) = (ints(experts + 1), ints(slots), ints(tokens * top_k));
    let mut slot_weight = stream.alloc_zeros::<f32>(slots).expect("device memory");
    let mut tiles = stream.alloc_zeros::<[i32; 4]>(sorting.max_tiles()).expect("device memory");
    let mut num_tiles = ints(1);
    let bytes = dispatch::workspace_bytes(&sorting, kernels.device()).expect("a valid dispatch");
    let mut workspace = Workspace::new(stream, bytes).expect("device memory");
    let outputs = DispatchOutputs {
        counts: &mut out.counts,
        offsets: &mut offsets,
        slot_token: &mut slot_token,
        token_slot: &mut token_slot,
        slot_weight: Some(&mut slot_weight),
        tiles: Some(TileList { tiles: &mut tiles, num_tiles: &mut num_tiles }),
    };
    if fused {
        let args = GateDispatchArgs {
            logits: &out.logits,
            correction_bias: Some(&inputs.correction_bias),
            ids: &mut out.ids,
            weights: &mut out.weights,
            outputs,
            workspace: &mut workspace,
        };
        dispatch::gate_and_dispatch(kernels, stream, &gating, &sorting, args).expect("gate and dispatch");
    } else {
        let args = GatingArgs {
            logits: &out.logits,
            correction_bias: Some(&inputs.correction_bias),
            ids: &mut out.ids,
            weights: &mut out.weights,
        };
        gating::forward(kernels, stream, &GatingDesc { tokens, experts, top_k, gating }, args).expect("gating");
        let args = DispatchArgs { ids: &out.ids, weights: Some(&out.weights), outputs, workspace: &mut workspace };
        dispatch::forward(kernels, stream, &sorting, args).expect("dispatch");
    }

    let list = Tiles { tiles: &tiles, num_tiles: &num_tiles };
    let first = GemmDesc {
        dtype,
        rows: slots,
        a_rows: tokens,
        experts,
        n: intermediate,
        k: hidden,
        glu: desc.mlp.glu,
        activation: desc.mlp.activation,
        layout: desc.mlp.gate_up_layout,
        schedule: Schedule::Grouped { tile_m, max_tiles: sorting.max_tiles() },
    };
    let mut h = stream.alloc_zeros::<T>(slots * intermediate).expect("device memory");
    let input_weighted = desc.weighting == Weighting::Input;
    let args = GemmArgs {
        a: &inputs.x,
        b: &inputs.gate_up,
        bias: Some(&inputs.gate_up_bias),
        slot_token: Some(&slot_token),
        row_scale: if input_weighted { Some(&slot_weight) } else { None },
        tiles: Some(list),
        out: &mut h,
    };
    gemm::forward(kernels, stream, &first, args).expect("first product");
    let second = GemmDesc {
        a_rows: slots,
        n: hidden,
        k: intermediate,
        glu: Glu::None,
        activation: Activation::Identity,
        layout: desc.mlp.down_layout,
        ..first
    };
    let mut y_slots = stream.alloc_zeros::<T>(slots * hidden).expect("device memory");
    let args = GemmArgs {
        a: &h,
        b: &inputs.down,
        bias: None,
        slot_token: None,
        row_scale: None,
        tiles: Some(list),
        out: &mut y_slots,
    };
    gemm::forward(kernels, stream, &second, args).expect("second product");

    let args = CombineArgs {
        y_slots: &y_slots,
        token_slot: &token_slot,
        weights: if input_weighted { None } else { Some(&out.weights) },
        residual: Some(&inputs.residual),
        addend: None,
        y: &mut out.y,
    };
    combine::forward(kernels, stream, &CombineDesc { dtype, tokens, top_k, hidden, slots }, args).expect("combine");
    out.read(d)
}

#[test]
fn operations_compose_to_the_layer() {
    let d = open();
    let groups = Some(Groups { count: 6, kept: 3, score: GroupScore::Max });
    let base = LayerDesc {
        router_dtype: Dtype::F32,
        gating: Gating { score: Score::Sigmoid, renormalise: true, scale: 1.5, groups },
        ..LayerDesc::new(Dtype::F16, 40, 72, 12, 3)
    };
    let capacity = |padded| Some(Capacity { per_expert: 2, tokens_per_sequence: 9, padded });
    let cases = [
        ("dropless", base),
        ("capacity", LayerDesc { capacity: capacity(false), ..base }),
        ("padded, input weighted", LayerDesc { capacity: capacity(true), weighting: Weighting::Input, ..base }),
        ("interleaved", LayerDesc { mlp: Mlp { down_layout: Mlp::SWIGLU.down_layout, ..Mlp::GPT_OSS }, ..base }),
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
    let desc = DispatchDesc { tokens, experts, top_k, capacity: None, tile_m: 2 };
    let stream = &d.stream;
    let ids = stream.clone_htod(&ids).expect("device memory");
    let ints = |len| stream.alloc_zeros::<i32>(len).expect("device memory");
    let (mut counts, mut offsets, mut slot_token) = (ints(experts), ints(experts + 1), ints(desc.slots()));
    let (mut token_slot, mut num_tiles) = (ints(tokens * top_k), ints(1));
    let mut tiles = stream.alloc_zeros::<[i32; 4]>(desc.max_tiles()).expect("device memory");
    let bytes = dispatch::workspace_bytes(&desc, d.kernels.device()).expect("a valid dispatch");
    let mut workspace = Workspace::new(stream, bytes).expect("device memory");
    let args = DispatchArgs {
        ids: &ids,
        weights: None,
        outputs: DispatchOutputs {
            counts: &mut counts,
            offsets: &mut offsets,
            slot_token: &mut slot_token,
            token_slot: &mut token_slot,
            slot_weight: None,
            tiles: Some(TileList { tiles: &mut tiles, num_tiles: &mut num_tiles }),
        },
        workspace: &mut workspace,
    };
    dispatch::forward(d.kernels, stream, &desc, args).expect("dispatch");
    let read = |from: &CudaSlice<i32>| stream.clone_dtoh(from).expect("the kernels ran");
    assert_eq!(read(&counts), [2, 2, 3]);
    assert_eq!(read(&offsets), [0, 2, 4, 7]);
    assert_eq!(read(&slot_token)[..7], [1, 3, 3, 5, 0, 1, 5]);
    assert_eq!(read(&token_slot), [4, -1, 0, 5, -1, -1, 2, 1, -1, -1, 6, 3]);
    assert_eq!(read(&num_tiles), [4]);
    let tiles = stream.clone_dtoh(&tiles).expect("the kernels ran");
    assert_eq!(tiles[..4], [[0, 0, 2, 0], [1, 2, 4, 0], [2, 4, 6, 0], [2, 6, 7, 0]]);
}
