//! What every operation refuses: a typed error that names the argument, and nothing launched.

#[path = "refusals/balance.rs"]
mod balance;
#[path = "refusals/noise.rs"]
mod noise;

use std::sync::{Arc, OnceLock};

use cudarc::driver::{CudaContext, CudaStream};
use half::{bf16, f16};
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use moe_kernels::capacity::row_groups::{self, RowGroupsArgs, RowGroupsDesc, RowLayout};
use moe_kernels::experts::combine::{self, CombineArgs, CombineDesc, Identity};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Output, ProductOut, Rows, Strides, SwigluByExpert};
use moe_kernels::experts::k_grouped::{self, Gathered, KGroupedArgs, KGroupedDesc};
use moe_kernels::experts::{Dispatched, Lists, SlotShape, Weight};
use moe_kernels::layer::{
    ExpertWeights, LayerArgs, LayerDesc, LayerPlan, LayerWeights, Mlp, RouterWeights, SharedDesc, SharedWeights,
};
use moe_kernels::routers::gating::{self, GatingArgs, GatingDesc};
use moe_kernels::routers::gating_dispatch::{self, GatingDispatchArgs, GatingDispatchDesc};
use moe_kernels::routers::router::{self, RouterArgs, RouterDesc};
use moe_kernels::rules::{Activation, Gating, Glu, Score, Swiglu, WeightDesc};
use moe_kernels::{Dtype, Error, Kernels, Workspace, device};

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
    RouterDesc::new(Dtype::Bf16, T, E, H)
}

#[test]
fn router_buffers() {
    let d = open();
    let run = |desc: RouterDesc, x: usize, weight: usize, bias: usize, logits: usize| {
        let (x, weight, bias) = (d.zeros::<bf16>(x), d.zeros::<bf16>(weight), d.zeros::<f32>(bias));
        let mut logits = d.zeros::<f32>(logits);
        let args = RouterArgs::new(&x, &weight, &mut logits).bias(&bias);
        d.refused(|| router::forward(&d.kernels, &d.stream, &desc, args)).0
    };
    let short = |argument, needed, got| Error::BufferTooShort { operation: "router", argument, needed, got };
    assert_eq!(run(router_desc(), T * H - 1, E * H, E, T * E), short("x", T * H, T * H - 1));
    assert_eq!(run(router_desc(), T * H, E * H - 8, E, T * E), short("weight", E * H, E * H - 8));
    assert_eq!(run(router_desc(), T * H, E * H, E - 1, T * E), short("bias", E, E - 1));
    assert_eq!(run(router_desc(), T * H, E * H, E, T * E - 1), short("logits", T * E, T * E - 1));
    let wrong = run(RouterDesc::new(Dtype::F16, T, E, H), T * H, E * H, E, T * E);
    let (expected, got) = (Dtype::F16, Dtype::Bf16);
    assert_eq!(wrong, Error::WrongDtype { operation: "router", argument: "x", expected, got });
    let wrong = run(router_desc().weight(Dtype::F32), T * H, E * H, E, T * E);
    assert_eq!(wrong.argument(), Some("weight"));
}

#[test]
fn misaligned_view() {
    let d = open();
    let (x, weight) = (d.zeros::<bf16>(T * H + 1), d.zeros::<bf16>(E * H));
    let mut logits = d.zeros::<f32>(T * E);
    let view = x.slice(1..);
    let args = RouterArgs::new(&view, &weight, &mut logits);
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
    let args = RouterArgs::new(&x, &weight, &mut logits);
    let (error, _) = d.refused(|| router::forward(&d.kernels, &d.stream, &router_desc(), args));
    assert_eq!(error, Error::DifferentContext { operation: "router", argument: "x" });
    let args = RouterArgs::new(&x, &weight, &mut logits);
    let (error, _) = d.refused(|| router::forward(&d.kernels, &foreign, &router_desc(), args));
    assert_eq!(error, Error::DifferentContext { operation: "router", argument: "stream" });
}

#[test]
fn gating_buffers() {
    let d = open();
    let desc = GatingDesc::new(T, E, K, Gating::new(Score::Softmax));
    let run = |desc: GatingDesc, logits: usize, bias: usize, ids: usize, weights: usize| {
        let (logits, bias) = (d.zeros::<f32>(logits), d.zeros::<f32>(bias));
        let (mut ids, mut weights) = (d.zeros::<i32>(ids), d.zeros::<f32>(weights));
        let args = GatingArgs::new(&logits, &mut ids, &mut weights).correction_bias(&bias);
        d.refused(|| gating::forward(&d.kernels, &d.stream, &desc, args)).1
    };
    assert_eq!(run(desc, T * E - 1, E, T * K, T * K), "logits");
    assert_eq!(run(desc, T * E, E - 1, T * K, T * K), "correction_bias");
    assert_eq!(run(desc, T * E, E, T * K - 1, T * K), "ids");
    assert_eq!(run(desc, T * E, E, T * K, T * K - 1), "weights");
    assert_eq!(run(GatingDesc::new(T, E, E + 1, desc.gating), T * E, E, T * E, T * E), "top_k");
    let without_scores = GatingDesc::new(T, E, K, Gating::new(Score::TopkSoftmax));
    assert_eq!(run(without_scores, T * E, E, T * K, T * K), "correction_bias");
}

/// Tokens, experts, choices, rows and tiles that a dispatch's lists are made for.
type Most = [usize; 5];

#[test]
fn dispatch_buffers() {
    let d = open();
    let desc = DispatchDesc::new(T, E, K, 16);
    let gating = Gating::new(Score::Sigmoid);
    let most: Most = [T, E, K, desc.slots(), desc.max_tiles()];
    let run = |desc: DispatchDesc, ids: usize, [tokens, experts, top_k, slots, tiles]: Most, space: usize, fused| {
        let (logits, weights) = (d.zeros::<f32>(T * E), d.zeros::<f32>(T * K));
        let (mut chosen, mut chosen_weights) = (d.zeros::<i32>(ids), d.zeros::<f32>(T * K));
        let lists = SlotShape::new(tokens, experts, Some(top_k), slots, 16, tiles);
        let mut lists = Dispatched::new(&d.stream, &lists).unwrap();
        let mut space = Workspace::new(&d.stream, space).unwrap();
        if fused {
            let (ids, weights) = (&mut chosen, &mut chosen_weights);
            let args = GatingDispatchArgs::new(&logits, ids, weights, &mut lists, &mut space);
            let desc = GatingDispatchDesc::new(gating, desc);
            d.refused(|| gating_dispatch::forward(&d.kernels, &d.stream, &desc, args)).1
        } else {
            let args = DispatchArgs::new(&chosen, &mut lists, &mut space).weights(&weights);
            d.refused(|| dispatch::forward(&d.kernels, &d.stream, &desc, args)).1
        }
    };
    let device = d.kernels.device();
    let together = gating_dispatch::workspace_bytes(&GatingDispatchDesc::new(gating, desc), device).unwrap();
    for (fused, space) in [(false, dispatch::workspace_bytes(&desc, device).unwrap()), (true, together)] {
        assert_eq!(run(desc, T * K - 1, most, space, fused), "ids");
        let names = ["tokens", "experts", "token_slot", "slots", "max_tiles"];
        for (index, name) in names.into_iter().enumerate() {
            let mut fewer = most;
            fewer[index] -= 1;
            assert_eq!(run(desc, T * K, fewer, space, fused), format!("dispatched.{name}"));
        }
        assert_eq!(run(desc, T * K, most, space - 1, fused), "workspace");
    }
    let mut without_rows = desc;
    without_rows.tile_m = 0;
    assert_eq!(run(without_rows, T * K, most, 1 << 16, false), "tile_m");
}

/// Lists without tiles, all zeros.
fn no_tiles(d: &Device, shape: &SlotShape) -> Dispatched {
    let ints = |len: usize| d.zeros::<i32>(len);
    let lists = Lists {
        counts: ints(shape.experts),
        offsets: ints(shape.experts + 1),
        slot_token: ints(shape.slots),
        token_slot: ints(shape.slots.max(shape.tokens * shape.top_k.unwrap_or(0))),
        token_offsets: ints(shape.tokens + 1),
        slot_weight: d.zeros(shape.slots),
        tiles: d.zeros(shape.max_tiles),
        num_tiles: ints(1),
    };
    // SAFETY: there are no tiles, and token 0 and row 0 exist.
    unsafe { Dispatched::from_lists(shape, lists) }.unwrap()
}

#[test]
fn gemm_buffers() {
    let d = open();
    let (rows, n, k) = (T * K, 24, H);
    let shape = SlotShape::new(T, E, Some(K), rows, 16, 3);
    let weight = WeightDesc::new(Dtype::F16).glu(Glu::Split);
    let swiglu = |desc: GemmDesc| desc.weight(weight).activation(Activation::Silu);
    let desc = swiglu(GemmDesc::new(Dtype::F16, Rows::Grouped(shape), n, k)).gather(true);
    let run = |desc: GemmDesc, lists: Option<SlotShape>, [a, b, bias, out]: [usize; 4]| {
        let (a, b, bias) = (d.zeros::<f16>(a), d.zeros::<f16>(b), d.zeros::<f16>(bias));
        let lists = lists.map(|shape| no_tiles(d, &shape));
        let mut out = d.zeros::<f16>(out);
        let mut args = GemmArgs::new(&a, Weight::new(&b).bias(&bias), &mut out);
        args.dispatched = lists.as_ref();
        d.refused(|| gemm::forward(&d.kernels, &d.stream, &desc, args)).1
    };
    let enough = [T * k, E * 2 * n * k, E * 2 * n, rows * n];
    for (index, name) in ["a", "weight", "weight.bias", "out"].into_iter().enumerate() {
        let mut lengths = enough;
        lengths[index] -= 1;
        assert_eq!(run(desc, Some(shape), lengths), name);
    }
    assert_eq!(run(desc, None, enough), "dispatched");
    assert_eq!(run(desc, Some(SlotShape::new(T, E, Some(K), rows, 16, 2)), enough), "dispatched");
    let dense = swiglu(GemmDesc::new(Dtype::F16, Rows::Dense(rows), n, k));
    assert_eq!(run(dense.gather(true), None, enough), "gather");
    assert_eq!(run(dense, Some(shape), enough), "dispatched");
    let other = GemmDesc::new(Dtype::Bf16, Rows::Grouped(shape), n, k);
    assert_eq!(run(other, Some(shape), enough), "a");
    // Rows of 13 elements begin anywhere, but are all there.
    let odd = swiglu(GemmDesc::new(Dtype::F16, Rows::Grouped(shape), 13, k)).gather(true);
    let enough = [T * k, E * 2 * 13 * k, E * 2 * 13, rows * 13];
    for (index, name) in ["a", "weight", "weight.bias", "out"].into_iter().enumerate() {
        let mut lengths = enough;
        lengths[index] -= 1;
        assert_eq!(run(odd, Some(shape), lengths), name);
    }
    // A view reaches from its first element to its last, and results of another type go elsewhere.
    let places = Strides::packed(&odd).a(k + 5, 1).weight(2 * 13 * (k + 1) + 3, k + 1, 1).out(20, 1);
    let weight = (E - 1) * (2 * 13 * (k + 1) + 3) + 25 * (k + 1) + k;
    let enough = [(T - 1) * (k + 5) + k, weight, E * 2 * 13, (rows - 1) * 20 + 13];
    for (index, name) in ["a", "weight", "weight.bias", "out"].into_iter().enumerate() {
        let mut lengths = enough;
        lengths[index] -= 1;
        assert_eq!(run(odd.strides(Some(places)), Some(shape), lengths), name);
    }
    assert_eq!(run(odd.output(Output::F32), Some(shape), [1 << 16; 4]), "out");
    assert_eq!(run(odd.output(Output::AddedF32).shared_rows(3), Some(shape), [1 << 16; 4]), "output");
    for places in [places.out(12, 1), places.out(1, 1), places.out(0, 1), places.out(1, rows - 1)] {
        assert_eq!(run(odd.strides(Some(places)), Some(shape), [1 << 16; 4]), "strides.out");
    }
    assert_eq!(run(odd.strides(Some(places.a(1 << 31, 1))), Some(shape), [1 << 16; 4]), "strides.a");
    assert_eq!(run(odd.strides(Some(places.weight(usize::MAX, 1, 1))), Some(shape), [1 << 16; 4]), "strides.weight");
}

#[test]
fn row_groups_buffers() {
    let d = open();
    let run = |layout, numbers: Option<usize>, made_for: RowLayout| {
        let mut dispatched = Dispatched::new(&d.stream, &RowGroupsDesc::new(made_for, E, 16).shape()).unwrap();
        let numbers = numbers.map(|len| d.zeros::<i32>(len));
        let args = match &numbers {
            Some(numbers) => RowGroupsArgs::new(numbers, &mut dispatched),
            None => RowGroupsArgs::batched(&mut dispatched),
        };
        let desc = RowGroupsDesc::new(layout, E, 16);
        d.refused(|| row_groups::forward(&d.kernels, &d.stream, &desc, args)).1
    };
    let (ends, batched) = (RowLayout::Ends { rows: 50 }, RowLayout::Batched { height: 50 });
    assert_eq!(run(ends, Some(E - 1), ends), "numbers");
    assert_eq!(run(ends, None, ends), "numbers");
    assert_eq!(run(batched, Some(E), batched), "numbers");
    assert_eq!(run(ends, Some(E), RowLayout::Counts { rows: 49 }), "dispatched.tokens");
    assert_eq!(run(batched, None, ends), "dispatched.tokens");
}

#[test]
fn k_grouped_buffers() {
    let d = open();
    let (slots, m, n) = (T * K, 24, 16);
    let shape = SlotShape::new(T, E, Some(K), slots, 16, 3);
    let desc = KGroupedDesc::new(Dtype::F16, shape, m, n).gathered(Gathered::B);
    let run = |desc: KGroupedDesc, lists: SlotShape, [a, b, out]: [usize; 3]| {
        let (a, b, mut out) = (d.zeros::<f16>(a), d.zeros::<f16>(b), d.zeros::<f16>(out));
        let lists = Dispatched::new(&d.stream, &lists).unwrap();
        let args = KGroupedArgs::new(&a, &b, &lists, ProductOut::Rounded((&mut out).into()));
        d.refused(|| k_grouped::forward(&d.kernels, &d.stream, &desc, args)).1
    };
    // Lists as they are made have no rows: another shape.
    assert_eq!(run(desc, shape, [slots * m, T * n, E * m * n]), "dispatched");
    let none = SlotShape::new(0, E, Some(K), 0, 16, 0);
    let desc = KGroupedDesc::new(Dtype::F16, none, m, n).gathered(Gathered::B);
    assert_eq!(run(desc, none, [1, 1, E * m * n - 1]), "out");
    assert_eq!(run(desc.f32_out(true), none, [1, 1, E * m * n]), "out");
    assert_eq!(run(KGroupedDesc::new(Dtype::Bf16, none, m, n), none, [1, 1, E * m * n]), "a");
}

#[test]
fn combine_buffers() {
    let d = open();
    let shape = SlotShape::new(T, E, Some(K), T * K, 16, 3);
    let desc = CombineDesc::new(Dtype::F32, shape, H);
    let run = |lists: SlotShape, [y_slots, weights, residual, addend, y]: [usize; 5]| {
        let (y_slots, lists) = (d.zeros::<f32>(y_slots), no_tiles(d, &lists));
        let (weights, residual, addend) = (d.zeros::<f32>(weights), d.zeros::<f32>(residual), d.zeros::<f32>(addend));
        let mut y = d.zeros::<f32>(y);
        let args = CombineArgs::new(&y_slots, &lists, &mut y).weights(&weights).residual(&residual).addend(&addend);
        d.refused(|| combine::forward(&d.kernels, &d.stream, &desc, args)).1
    };
    let enough = [T * K * H, T * K, T * H, T * H, T * H];
    for (index, name) in ["y_slots", "weights", "residual", "addend", "y"].into_iter().enumerate() {
        let mut lengths = enough;
        lengths[index] -= 1;
        assert_eq!(run(shape, lengths), name);
    }
    assert_eq!(run(SlotShape::new(T, E, Some(K - 1), T * K, 16, 3), enough), "dispatched");
}

#[test]
fn what_combine_adds_besides() {
    let d = open();
    let shape = SlotShape::new(T, E, Some(K), T * K, 16, 3);
    let desc = CombineDesc::new(Dtype::F32, shape, H);
    let (y_slots, lists, x) = (d.zeros::<f32>(T * K * H), no_tiles(d, &shape), d.zeros::<f32>(T * H));
    let run = |bias: usize, [ids, weights]: [usize; 2], experts: std::ops::Range<u32>| {
        let (bias, ids, weights) = (d.zeros::<f32>(bias), d.zeros::<i32>(ids), d.zeros::<f32>(weights));
        let mut y = d.zeros::<f32>(T * H);
        let identity = Identity::of_choices(&x, &ids, &weights, experts);
        let args = CombineArgs::new(&y_slots, &lists, &mut y).bias(&bias).identity(identity);
        d.refused(|| combine::forward(&d.kernels, &d.stream, &desc, args)).1
    };
    let choices = [T * K; 2];
    assert_eq!(run(H - 1, choices, 3..5), "bias");
    assert_eq!(run(H, [T * K - 1, T * K], 3..5), "identity.choices.ids");
    assert_eq!(run(H, [T * K, T * K - 1], 3..5), "identity.weight");
    assert_eq!(run(H, choices, 3..1 << 31), "identity.choices.experts");
    #[allow(clippy::reversed_empty_ranges)]
    let backwards = 5..3;
    assert_eq!(run(H, choices, backwards), "identity.choices.experts");
}

/// Numbers by expert: as many as experts, and for what the activation has.
#[test]
fn numbers_of_an_activation_by_expert() {
    let d = open();
    let (rows, n, k) = (T * K, 24, H);
    let shape = SlotShape::new(T, E, Some(K), rows, 16, 3);
    let desc = |activation: Activation| {
        GemmDesc::new(Dtype::F16, Rows::Grouped(shape), n, k)
            .gather(true)
            .weight(WeightDesc::new(Dtype::F16).glu(Glu::Split))
            .activation(activation)
    };
    let lists = no_tiles(d, &shape);
    let (a, b) = (d.zeros::<f16>(T * k), d.zeros::<f16>(E * 2 * n * k));
    let (enough, short) = (d.zeros::<f32>(E), d.zeros::<f32>(E - 1));
    let run = |activation: Activation, swiglu: SwigluByExpert<'_>| {
        let mut out = d.zeros::<f16>(rows * n);
        let args = GemmArgs::new(&a, Weight::new(&b), &mut out).dispatched(&lists).swiglu(swiglu);
        d.refused(|| gemm::forward(&d.kernels, &d.stream, &desc(activation), args)).1
    };
    let clamped = Activation::Swiglu(Swiglu::clamped(1.0));
    assert_eq!(run(clamped, SwigluByExpert::new().alpha(&short)), "swiglu.alpha");
    assert_eq!(run(clamped, SwigluByExpert::new().gate(&short)), "swiglu.gate");
    assert_eq!(run(clamped, SwigluByExpert::new().up(&short)), "swiglu.up");
    assert_eq!(run(clamped, SwigluByExpert::new().offset(&short)), "swiglu.offset");
    assert_eq!(run(Swiglu::new().into(), SwigluByExpert::new().gate(&enough)), "swiglu.gate");
    assert_eq!(run(Swiglu::new().into(), SwigluByExpert::new().up(&enough)), "swiglu.up");
    assert_eq!(run(Activation::Silu, SwigluByExpert::new().alpha(&enough)), "swiglu");
}

#[test]
fn layer_weights_against_the_descriptor() {
    let d = open();
    let (intermediate, shared_intermediate) = (32, 40);
    let desc = LayerDesc::new(Dtype::Bf16, H, intermediate, E, K)
        .shared(Some(SharedDesc::new(shared_intermediate, Mlp::swiglu(Dtype::Bf16))));
    let plan = desc.plan(T, d.kernels.device()).unwrap();
    let without = desc.shared(None).plan(T, d.kernels.device()).unwrap();
    let router = d.zeros::<bf16>(E * H);
    let (gate_up, down) = (d.zeros::<bf16>(E * 2 * intermediate * H), d.zeros::<bf16>(E * H * intermediate));
    let shared_gate_up = d.zeros::<bf16>(2 * shared_intermediate * H);
    let shared_down = d.zeros::<bf16>(shared_intermediate * H);
    let bias = d.zeros::<bf16>(E * H);
    let shared = SharedWeights::new(Weight::new(&shared_gate_up), Weight::new(&shared_down));
    let experts = ExpertWeights::new(Weight::new(&gate_up), Weight::new(&down).bias(&bias)).shared(shared);
    let router = RouterWeights::new(&router);
    let weights = LayerWeights::new(router, experts);
    let run = |plan: &LayerPlan, weights: LayerWeights<'_>, workspace: usize, y: usize| {
        let (x, mut y) = (d.zeros::<bf16>(T * H), d.zeros::<bf16>(y));
        let mut workspace = Workspace::new(&d.stream, workspace).unwrap();
        let args = LayerArgs::new(&x, &mut y);
        d.refused(|| plan.forward(&d.kernels, &d.stream, &weights, args, &mut workspace))
    };
    let bytes = plan.workspace_bytes();
    assert_eq!(run(&plan, weights, bytes - 1, T * H).1, "workspace");
    assert_eq!(run(&plan, weights, bytes, T * H - 1).1, "y");
    let unshared = LayerWeights::new(router, ExpertWeights::new(experts.gate_up, experts.down));
    assert!(matches!(run(&plan, unshared, bytes, T * H), (Error::Missing { .. }, "shared")));
    assert!(matches!(run(&without, weights, bytes, T * H), (Error::Unexpected { .. }, "shared")));
    let swapped = ExpertWeights::new(Weight::new(&down), experts.down).shared(shared);
    assert_eq!(run(&plan, LayerWeights::new(router, swapped), bytes, T * H).1, "gate_up");
    let rest = bias.slice(8..);
    let short = ExpertWeights::new(experts.gate_up, Weight::new(&down).bias(&rest)).shared(shared);
    assert_eq!(run(&plan, LayerWeights::new(router, short), bytes, T * H).1, "down.bias");
    let vector = d.zeros::<bf16>(H - 1);
    assert_eq!(run(&plan, LayerWeights::new(router, experts.bias(&vector)), bytes, T * H).1, "bias");
}

#[test]
fn plan_of_another_device() {
    let d = open();
    let more =
        moe_kernels::DeviceInfo { multiprocessors: d.kernels.device().multiprocessors + 1, ..*d.kernels.device() };
    let plan = LayerDesc::new(Dtype::F32, H, 32, E, K).plan(T, &more).unwrap();
    let router = d.zeros::<f32>(E * H);
    let (gate_up, down) = (d.zeros::<f32>(E * 2 * 32 * H), d.zeros::<f32>(E * H * 32));
    let experts = ExpertWeights::new(Weight::new(&gate_up), Weight::new(&down));
    let weights = LayerWeights::new(RouterWeights::new(&router), experts);
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
