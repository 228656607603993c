//! What every operation refuses: a typed error that names the argument, and nothing launched.

#[path = "refusals/balance.rs"]
mod balance;
#[path = "refusals/noise.rs"]
mod noise;

use std::sync::{Arc, OnceLock};

use cudarc::driver::{CudaContext, CudaStream};
use half::{bf16, f16};
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc, DispatchOutputs, GateDispatchArgs, TileList};
use moe_kernels::experts::combine::{self, CombineArgs, CombineDesc};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Schedule, Tiles};
use moe_kernels::layer::{Linear, Mlp, SharedDesc, SharedWeights};
use moe_kernels::routers::gating::{self, GatingArgs, GatingDesc};
use moe_kernels::routers::router::{self, RouterArgs, RouterDesc};
use moe_kernels::rules::Dtype;
use moe_kernels::rules::{Activation, Glu, Layout};
use moe_kernels::rules::{Gating, Score};
use moe_kernels::{Error, Kernels, LayerArgs, LayerDesc, LayerWeights, Workspace, device};

struct Device {
    stream: Arc<CudaStream>,
    kernels: Kernels,
    soft: Option<softcuda::Control>,
}

fn open() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| {
        let choice = softcuda::install_if_no_gpu().expect("a CUDA driver, real or soft");
        let context = device::open(0).expect("device 0");
        println!("device: {choice}");
        let kernels = Kernels::new(&context).expect("a device of compute capability 8.0 or later");
        Device { stream: context.default_stream(), kernels, soft: choice.control().copied() }
    })
}

impl Device {
    fn zeros<T: cudarc::driver::DeviceRepr + cudarc::driver::ValidAsZeroBits>(
        &self,
        len: usize,
    ) -> cudarc::driver::CudaSlice<T> {
        self.stream.alloc_zeros(len).expect("device memory")
    }

    /// Runs `operation`, which must launch nothing, and returns the argument that its error names.
    fn refused(&self, operation: impl FnOnce() -> Result<(), Error>) -> (Error, &'static str) {
        let before = self.soft.map(|control| control.launch_count());
        let error = operation().expect_err("must be refused");
        self.stream.synchronize().expect("the device is healthy");
        assert_eq!(self.soft.map(|control| control.launch_count()), before, "launched in spite of: {error}");
        let argument = error.argument().unwrap_or_else(|| panic!("names no argument: {error}"));
        assert!(error.to_string().contains(argument), "{error}");
        (error, argument)
    }
}

const T: usize = 5;
const E: usize = 8;
const K: usize = 2;
const H: usize = 64;

fn router_desc() -> RouterDesc {
    RouterDesc { x: Dtype::Bf16, weight: Dtype::Bf16, tokens: T, experts: E, hidden: H }
}

#[test]
fn router_buffers() {
    let d = open();
    let run = |desc: RouterDesc, x: usize, weight: usize, bias: usize, logits: usize| {
        let (x, weight, bias) = (d.zeros::<bf16>(x), d.zeros::<bf16>(weight), d.zeros::<f32>(bias));
        let mut logits = d.zeros::<f32>(logits);
        let args = RouterArgs { x: &x, weight: &weight, bias: Some(&bias), logits: &mut logits };
        d.refused(|| router::forward(&d.kernels, &d.stream, &desc, args)).0
    };
    let short = |argument, needed, got| Error::BufferTooShort { operation: "router", argument, needed, got };
    assert_eq!(run(router_desc(), T * H - 1, E * H, E, T * E), short("x", T * H, T * H - 1));
    assert_eq!(run(router_desc(), T * H, E * H - 8, E, T * E), short("weight", E * H, E * H - 8));
    assert_eq!(run(router_desc(), T * H, E * H, E - 1, T * E), short("bias", E, E - 1));
    assert_eq!(run(router_desc(), T * H, E * H, E, T * E - 1), short("logits", T * E, T * E - 1));
    let wrong = run(RouterDesc { x: Dtype::F16, weight: Dtype::F16, ..router_desc() }, T * H, E * H, E, T * E);
    let (expected, got) = (Dtype::F16, Dtype::Bf16);
    assert_eq!(wrong, Error::WrongDtype { operation: "router", argument: "x", expected, got });
    let wrong = run(RouterDesc { weight: Dtype::F32, ..router_desc() }, T * H, E * H, E, T * E);
    assert_eq!(wrong.argument(), Some("weight"));
}

#[test]
fn misaligned_view() {
    let d = open();
    let (x, weight) = (d.zeros::<bf16>(T * H + 1), d.zeros::<bf16>(E * H));
    let mut logits = d.zeros::<f32>(T * E);
    let view = x.slice(1..);
    let args = RouterArgs { x: &view, weight: &weight, bias: None, logits: &mut logits };
    let (error, argument) = d.refused(|| router::forward(&d.kernels, &d.stream, &router_desc(), args));
    assert_eq!(argument, "x");
    assert!(matches!(error, Error::Misaligned { needed: 16, .. }), "{error}");
}

#[test]
fn other_context() {
    let d = open();
    // A context of its own, not the device's primary one.
    let Ok(other) = CudaContext::new_non_primary(0, 0) else {
        println!("the driver makes no second context: not tested");
        return;
    };
    let foreign = other.default_stream();
    let x = foreign.alloc_zeros::<bf16>(T * H).expect("device memory");
    let weight = d.zeros::<bf16>(E * H);
    let mut logits = d.zeros::<f32>(T * E);
    let args = RouterArgs { x: &x, weight: &weight, bias: None, logits: &mut logits };
    let (error, _) = d.refused(|| router::forward(&d.kernels, &d.stream, &router_desc(), args));
    assert_eq!(error, Error::DifferentContext { operation: "router", argument: "x" });
    let args = RouterArgs { x: &x, weight: &weight, bias: None, logits: &mut logits };
    let (error, _) = d.refused(|| router::forward(&d.kernels, &foreign, &router_desc(), args));
    assert_eq!(error, Error::DifferentContext { operation: "router", argument: "stream" });
}

#[test]
fn gating_buffers() {
    let d = open();
    let desc = GatingDesc { tokens: T, experts: E, top_k: K, gating: Gating::new(Score::Softmax) };
    let run = |desc: GatingDesc, logits: usize, bias: usize, ids: usize, weights: usize| {
        let (logits, bias) = (d.zeros::<f32>(logits), d.zeros::<f32>(bias));
        let (mut ids, mut weights) = (d.zeros::<i32>(ids), d.zeros::<f32>(weights));
        let args = GatingArgs { logits: &logits, correction_bias: Some(&bias), ids: &mut ids, weights: &mut weights };
        d.refused(|| gating::forward(&d.kernels, &d.stream, &desc, args)).1
    };
    assert_eq!(run(desc, T * E - 1, E, T * K, T * K), "logits");
    assert_eq!(run(desc, T * E, E - 1, T * K, T * K), "correction_bias");
    assert_eq!(run(desc, T * E, E, T * K - 1, T * K), "ids");
    assert_eq!(run(desc, T * E, E, T * K, T * K - 1), "weights");
    assert_eq!(run(GatingDesc { top_k: E + 1, ..desc }, T * E, E, T * E, T * E), "top_k");
    let without_scores = GatingDesc { gating: Gating::new(Score::TopkSoftmax), ..desc };
    assert_eq!(run(without_scores, T * E, E, T * K, T * K), "correction_bias");
}

/// Lengths of a dispatch's buffers.
#[derive(Clone, Copy)]
struct Lengths {
    ids: usize,
    counts: usize,
    offsets: usize,
    slot_token: usize,
    token_slot: usize,
    slot_weight: usize,
    tiles: usize,
    num_tiles: usize,
    workspace: usize,
}

#[test]
fn dispatch_buffers() {
    let d = open();
    let desc = DispatchDesc { tokens: T, experts: E, top_k: K, capacity: None, tile_m: 16 };
    let workspace = dispatch::workspace_bytes(&desc, d.kernels.device()).unwrap();
    let enough = Lengths {
        ids: T * K,
        counts: E,
        offsets: E + 1,
        slot_token: desc.slots(),
        token_slot: T * K,
        slot_weight: desc.slots(),
        tiles: desc.max_tiles(),
        num_tiles: 1,
        workspace,
    };
    let run = |desc: DispatchDesc, n: Lengths, fused: bool| {
        let (ids, weights, logits) = (d.zeros::<i32>(n.ids), d.zeros::<f32>(T * K), d.zeros::<f32>(T * E));
        let (mut chosen, mut chosen_weights) = (d.zeros::<i32>(n.ids), d.zeros::<f32>(T * K));
        let (mut counts, mut offsets) = (d.zeros::<i32>(n.counts), d.zeros::<i32>(n.offsets));
        let (mut slot_token, mut token_slot) = (d.zeros::<i32>(n.slot_token), d.zeros::<i32>(n.token_slot));
        let mut slot_weight = d.zeros::<f32>(n.slot_weight);
        let (mut tiles, mut num_tiles) = (d.zeros::<[i32; 4]>(n.tiles), d.zeros::<i32>(n.num_tiles));
        let mut workspace = Workspace::new(&d.stream, n.workspace).unwrap();
        let outputs = DispatchOutputs {
            counts: &mut counts,
            offsets: &mut offsets,
            slot_token: &mut slot_token,
            token_slot: &mut token_slot,
            slot_weight: Some(&mut slot_weight),
            tiles: Some(TileList { tiles: &mut tiles, num_tiles: &mut num_tiles }),
        };
        let workspace = &mut workspace;
        if fused {
            let args = GateDispatchArgs {
                logits: &logits,
                correction_bias: None,
                ids: &mut chosen,
                weights: &mut chosen_weights,
                outputs,
                workspace,
            };
            let gating = Gating::new(Score::Sigmoid);
            d.refused(|| dispatch::gate_and_dispatch(&d.kernels, &d.stream, &gating, &desc, args)).1
        } else {
            let args = DispatchArgs { ids: &ids, weights: Some(&weights), outputs, workspace };
            d.refused(|| dispatch::forward(&d.kernels, &d.stream, &desc, args)).1
        }
    };
    for fused in [false, true] {
        let run = |n: Lengths| run(desc, n, fused);
        assert_eq!(run(Lengths { ids: T * K - 1, ..enough }), "ids");
        assert_eq!(run(Lengths { counts: E - 1, ..enough }), "counts");
        assert_eq!(run(Lengths { offsets: E, ..enough }), "offsets");
        assert_eq!(run(Lengths { slot_token: desc.slots() - 1, ..enough }), "slot_token");
        assert_eq!(run(Lengths { token_slot: T * K - 1, ..enough }), "token_slot");
        assert_eq!(run(Lengths { slot_weight: desc.slots() - 1, ..enough }), "slot_weight");
        assert_eq!(run(Lengths { tiles: desc.max_tiles() - 1, ..enough }), "tiles");
        assert_eq!(run(Lengths { workspace: workspace - 1, ..enough }), "workspace");
    }
    assert_eq!(run(DispatchDesc { tile_m: 0, ..desc }, enough, false), "tile_m");
}

#[test]
fn slot_weights_need_weights() {
    let d = open();
    let desc = DispatchDesc { tokens: T, experts: E, top_k: K, capacity: None, tile_m: 16 };
    let ids = d.zeros::<i32>(T * K);
    let (mut counts, mut offsets) = (d.zeros::<i32>(E), d.zeros::<i32>(E + 1));
    let (mut slot_token, mut token_slot) = (d.zeros::<i32>(T * K), d.zeros::<i32>(T * K));
    let mut slot_weight = d.zeros::<f32>(T * K);
    let mut workspace =
        Workspace::new(&d.stream, dispatch::workspace_bytes(&desc, d.kernels.device()).unwrap()).unwrap();
    let args = DispatchArgs {
        ids: &ids,
        weights: None,
        outputs: DispatchOutputs {
            counts: &mut counts,
            offsets: &mut offsets,
            slot_token: &mut slot_token,
            token_slot: &mut token_slot,
            slot_weight: Some(&mut slot_weight),
            tiles: None,
        },
        workspace: &mut workspace,
    };
    let (error, argument) = d.refused(|| dispatch::forward(&d.kernels, &d.stream, &desc, args));
    assert!(matches!(error, Error::Missing { .. }) && argument == "weights", "{error}");
}

#[test]
fn gemm_buffers() {
    let d = open();
    let (rows, n, k) = (10, 24, H);
    let desc = GemmDesc {
        dtype: Dtype::F16,
        rows,
        a_rows: T,
        experts: E,
        n,
        k,
        glu: Glu::Split,
        activation: Activation::Silu,
        layout: Layout::Nk,
        schedule: Schedule::Grouped { tile_m: 16, max_tiles: 3 },
    };
    let run = |desc: GemmDesc, gather: bool, listed: bool, [a, b, bias, out, tiles]: [usize; 5]| {
        let (a, b, bias) = (d.zeros::<f16>(a), d.zeros::<f16>(b), d.zeros::<f16>(bias));
        let slot_token = d.zeros::<i32>(rows);
        let (tiles, num_tiles) = (d.zeros::<[i32; 4]>(tiles), d.zeros::<i32>(1));
        let mut out = d.zeros::<f16>(out);
        let args = GemmArgs {
            a: &a,
            b: &b,
            bias: Some(&bias),
            slot_token: if gather { Some(&slot_token) } else { None },
            row_scale: None,
            tiles: listed.then_some(Tiles { tiles: &tiles, num_tiles: &num_tiles }),
            out: &mut out,
        };
        d.refused(|| gemm::forward(&d.kernels, &d.stream, &desc, args)).1
    };
    let enough = [T * k, E * 2 * n * k, E * 2 * n, rows * n, 3];
    for (index, name) in ["a", "b", "bias", "out", "tiles"].into_iter().enumerate() {
        let mut lengths = enough;
        lengths[index] -= 1;
        assert_eq!(run(desc, true, true, lengths), name);
    }
    assert_eq!(run(desc, true, false, enough), "tiles");
    assert_eq!(run(desc, false, true, enough), "a_rows");
    let dense = GemmDesc { experts: 1, schedule: Schedule::Dense, ..desc };
    assert_eq!(run(dense, true, true, enough), "tiles");
    assert_eq!(run(GemmDesc { dtype: Dtype::Bf16, ..desc }, true, true, enough), "a");
}

#[test]
fn combine_buffers() {
    let d = open();
    let desc = CombineDesc { dtype: Dtype::F32, tokens: T, top_k: K, hidden: H, slots: T * K };
    let run = |[y_slots, token_slot, weights, residual, addend, y]: [usize; 6]| {
        let (y_slots, token_slot) = (d.zeros::<f32>(y_slots), d.zeros::<i32>(token_slot));
        let (weights, residual, addend) = (d.zeros::<f32>(weights), d.zeros::<f32>(residual), d.zeros::<f32>(addend));
        let mut y = d.zeros::<f32>(y);
        let args = CombineArgs {
            y_slots: &y_slots,
            token_slot: &token_slot,
            weights: Some(&weights),
            residual: Some(&residual),
            addend: Some(&addend),
            y: &mut y,
        };
        d.refused(|| combine::forward(&d.kernels, &d.stream, &desc, args)).1
    };
    let enough = [T * K * H, T * K, T * K, T * H, T * H, T * H];
    let names = ["y_slots", "token_slot", "weights", "residual", "addend", "y"];
    for (index, name) in names.into_iter().enumerate() {
        let mut lengths = enough;
        lengths[index] -= 1;
        assert_eq!(run(lengths), name);
    }
}

#[test]
fn layer_weights_against_the_descriptor() {
    let d = open();
    let (intermediate, shared_intermediate) = (32, 40);
    let desc = LayerDesc {
        shared: Some(SharedDesc { intermediate: shared_intermediate, mlp: Mlp::SWIGLU }),
        ..LayerDesc::new(Dtype::Bf16, H, intermediate, E, K)
    };
    let plan = desc.plan(T, d.kernels.device()).unwrap();
    let without = LayerDesc { shared: None, ..desc }.plan(T, d.kernels.device()).unwrap();
    let router = d.zeros::<bf16>(E * H);
    let (gate_up, down) = (d.zeros::<bf16>(E * 2 * intermediate * H), d.zeros::<bf16>(E * H * intermediate));
    let shared_gate_up = d.zeros::<bf16>(2 * shared_intermediate * H);
    let shared_down = d.zeros::<bf16>(shared_intermediate * H);
    let bias = d.zeros::<bf16>(E * H);
    let shared = SharedWeights {
        gate_up: Linear { weight: &shared_gate_up, bias: None },
        down: Linear { weight: &shared_down, bias: None },
    };
    let weights = LayerWeights {
        router: &router,
        router_bias: None,
        correction_bias: None,
        gate_up: Linear { weight: &gate_up, bias: None },
        down: Linear { weight: &down, bias: Some(&bias) },
        shared: Some(shared),
    };
    let run = |plan: &moe_kernels::LayerPlan, weights: LayerWeights<'_, bf16>, workspace: usize, y: usize| {
        let (x, mut y) = (d.zeros::<bf16>(T * H), d.zeros::<bf16>(y));
        let mut workspace = Workspace::new(&d.stream, workspace).unwrap();
        let args = LayerArgs::new(&x, &mut y);
        d.refused(|| plan.forward(&d.kernels, &d.stream, &weights, args, &mut workspace))
    };
    let bytes = plan.workspace_bytes();
    assert_eq!(run(&plan, weights, bytes - 1, T * H).1, "workspace");
    assert_eq!(run(&plan, weights, bytes, T * H - 1).1, "y");
    assert!(matches!(
        run(&plan, LayerWeights { shared: None, ..weights }, bytes, T * H),
        (Error::Missing { .. }, "shared")
    ));
    assert!(matches!(run(&without, weights, bytes, T * H), (Error::Unexpected { .. }, "shared")));
    let swapped = LayerWeights { gate_up: Linear { weight: &down, bias: None }, ..weights };
    assert_eq!(run(&plan, swapped, bytes, T * H).1, "gate_up.weight");
    let rest = bias.slice(8..);
    let short = LayerWeights { down: Linear { weight: &down, bias: Some(&rest) }, ..weights };
    assert_eq!(run(&plan, short, bytes, T * H).1, "down.bias");
}

#[test]
fn plan_of_another_device() {
    let d = open();
    let more =
        moe_kernels::DeviceInfo { multiprocessors: d.kernels.device().multiprocessors + 1, ..*d.kernels.device() };
    let plan = LayerDesc::new(Dtype::F32, H, 32, E, K).plan(T, &more).unwrap();
    let router = d.zeros::<f32>(E * H);
    let (gate_up, down) = (d.zeros::<f32>(E * 2 * 32 * H), d.zeros::<f32>(E * H * 32));
    let weights = LayerWeights {
        router: &router,
        router_bias: None,
        correction_bias: None,
        gate_up: Linear { weight: &gate_up, bias: None },
        down: Linear { weight: &down, bias: None },
        shared: None,
    };
    let (x, mut y) = (d.zeros::<f32>(T * H), d.zeros::<f32>(T * H));
    let mut workspace = Workspace::new(&d.stream, plan.workspace_bytes()).unwrap();
    let args = LayerArgs::new(&x, &mut y);
    let (_, argument) = d.refused(|| plan.forward(&d.kernels, &d.stream, &weights, args, &mut workspace));
    assert_eq!(argument, "plan");
}

#[test]
fn a_device_that_is_not_there() {
    open();
    let count = device::count().unwrap();
    assert_eq!(device::open(count).err(), Some(Error::NoDevice { ordinal: count, count }));
}
