//! How mapped experts flow through a layer: null experts that pass on or drop their input, and the experts of one device of several.

mod support;

use moe_kernels::Workspace;
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc, DispatchOutputs, TileList};
use moe_kernels::capacity::expert_map::{self, ExpertMapArgs, ExpertMapDesc};
use moe_kernels::experts::combine::{self, CombineArgs, CombineDesc, Identity};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Schedule, Tiles};
use moe_kernels::reference::gemm::{ExpertMatrix, grouped_gemm};
use moe_kernels::reference::{self, activation, dispatch::DispatchRule};
use moe_kernels::routers::gating::{self, GatingArgs, GatingDesc};
use moe_kernels::rules::Dtype;
use moe_kernels::rules::{Activation, Glu, Layout};
use moe_kernels::rules::{Gating, Score};
use moe_kernels::rules::{IDENTITY, NONE};
use support::compare::{F32_PRODUCTS, relative_error, to_f64};
use support::device;
use support::inputs::{generator, normals};

const TOKENS: usize = 75;
const HIDDEN: usize = 48;
const INNER: usize = 32;
const TOP_K: usize = 4;
const TILE: usize = 16;

/// A layer's weights: `gate_up [E,2I,H]`, `down [E,H,I]`.
struct Experts {
    gate_up: Vec<f32>,
    down: Vec<f32>,
}

impl Experts {
    fn of(&self, expert: usize) -> (&[f32], &[f32]) {
        let (first, second) = (2 * INNER * HIDDEN, HIDDEN * INNER);
        (&self.gate_up[expert * first..][..first], &self.down[expert * second..][..second])
    }
}

/// Runs x through the experts whose global numbers are `here`, after the map; the router's choice is given. `[T,H]`.
fn run(
    x: &[f32],
    ids: &[i32],
    weights: &[f32],
    map: &[i32],
    experts: &Experts,
    here: &[usize],
) -> (Vec<f32>, Vec<i32>) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let local = here.len();
    let (mut gate_up, mut down) = (Vec::new(), Vec::new());
    for &expert in here {
        let (first, second) = experts.of(expert);
        gate_up.extend_from_slice(first);
        down.extend_from_slice(second);
    }
    let upload = |values: &[f32]| stream.clone_htod(values).unwrap();
    let ints = |len: usize| stream.clone_htod(&vec![-7i32; len]).unwrap();
    let (device_x, device_weights) = (upload(x), upload(weights));
    let (gate_up, down) = (upload(&gate_up), upload(&down));

    let desc = ExpertMapDesc { tokens: TOKENS, experts: map.len(), top_k: TOP_K, max_replicas: 1, seed: 0 };
    let mut local_ids = ints(TOKENS * TOP_K);
    let mut identity_weight = stream.clone_htod(&vec![f32::NAN; TOKENS]).unwrap();
    let args = ExpertMapArgs {
        ids: &stream.clone_htod(ids).unwrap(),
        weights: Some(&device_weights),
        map: &stream.clone_htod(map).unwrap(),
        replicas: None,
        local_ids: &mut local_ids,
        identity_weight: Some(&mut identity_weight),
    };
    expert_map::forward(kernels, &stream, &desc, args).unwrap();

    let order = DispatchDesc { tokens: TOKENS, experts: local, top_k: TOP_K, capacity: None, tile_m: TILE };
    let (mut counts, mut offsets) = (ints(local), ints(local + 1));
    let (mut slot_token, mut token_slot) = (ints(order.slots()), ints(TOKENS * TOP_K));
    let mut tiles = stream.clone_htod(&vec![[-7i32; 4]; order.max_tiles()]).unwrap();
    let mut num_tiles = ints(1);
    let bytes = dispatch::workspace_bytes(&order, kernels.device()).unwrap();
    let outputs = DispatchOutputs {
        counts: &mut counts,
        offsets: &mut offsets,
        slot_token: &mut slot_token,
        token_slot: &mut token_slot,
        slot_weight: None,
        tiles: Some(TileList { tiles: &mut tiles, num_tiles: &mut num_tiles }),
    };
    let workspace = &mut Workspace::new(&stream, bytes).unwrap();
    let args = DispatchArgs { ids: &local_ids, weights: None, outputs, workspace };
    dispatch::forward(kernels, &stream, &order, args).unwrap();

    // Rows that no slot fills stay NaN: nothing may come of them.
    let mut inner = upload(&vec![f32::NAN; order.slots() * INNER]);
    let mut y_slots = upload(&vec![f32::NAN; order.slots() * HIDDEN]);
    let first = GemmDesc {
        dtype: Dtype::F32,
        rows: order.slots(),
        a_rows: TOKENS,
        experts: local,
        n: INNER,
        k: HIDDEN,
        glu: Glu::Split,
        activation: Activation::Silu,
        layout: Layout::Nk,
        schedule: Schedule::Grouped { tile_m: TILE, max_tiles: order.max_tiles() },
    };
    let list = Tiles { tiles: &tiles, num_tiles: &num_tiles };
    let args = GemmArgs {
        a: &device_x,
        b: &gate_up,
        bias: None,
        slot_token: Some(&slot_token),
        row_scale: None,
        tiles: Some(list),
        out: &mut inner,
    };
    gemm::forward(kernels, &stream, &first, args).unwrap();
    let second = GemmDesc {
        a_rows: order.slots(),
        n: HIDDEN,
        k: INNER,
        glu: Glu::None,
        activation: Activation::Identity,
        ..first
    };
    let args = GemmArgs {
        a: &inner,
        b: &down,
        bias: None,
        slot_token: None,
        row_scale: None,
        tiles: Some(list),
        out: &mut y_slots,
    };
    gemm::forward(kernels, &stream, &second, args).unwrap();

    let mut y = upload(&vec![f32::NAN; TOKENS * HIDDEN]);
    let desc = CombineDesc { dtype: Dtype::F32, tokens: TOKENS, top_k: TOP_K, hidden: HIDDEN, slots: order.slots() };
    let args = CombineArgs {
        y_slots: &y_slots,
        token_slot: &token_slot,
        weights: Some(&device_weights),
        residual: None,
        addend: None,
        y: &mut y,
    };
    let identity = Identity { x: &device_x, weight: &identity_weight };
    combine::forward_with_identity(kernels, &stream, &desc, args, identity).unwrap();
    (stream.clone_dtoh(&y).unwrap(), stream.clone_dtoh(&counts).unwrap())
}

/// The same in f64, every expert by itself.
fn reference(x: &[f32], ids: &[i32], weights: &[f32], map: &[i32], experts: &Experts, here: &[usize]) -> Vec<f64> {
    let weights = to_f64(weights);
    let mapped = reference::expert_map::map_experts(ids, Some(&weights), TOP_K, map, 1, None, 0).unwrap();
    let rule = DispatchRule { experts: here.len(), top_k: TOP_K, capacity: None, tile_m: TILE };
    let plan = reference::dispatch::dispatch(&mapped.ids, &rule).unwrap();
    let gate_up: Vec<f32> = here.iter().flat_map(|&expert| experts.of(expert).0.to_vec()).collect();
    let down: Vec<f32> = here.iter().flat_map(|&expert| experts.of(expert).1.to_vec()).collect();
    let matrix = |weight, n, k, glu| ExpertMatrix { weight, bias: None, n, k, glu, layout: Layout::Nk };
    let silu = activation::Activation::Silu;
    let first = matrix(gate_up.as_slice(), INNER, HIDDEN, Glu::Split);
    let inner = grouped_gemm(x, &first, &plan, true, None, silu).unwrap();
    let second = matrix(down.as_slice(), HIDDEN, INNER, Glu::None);
    let y_slots = grouped_gemm(&inner, &second, &plan, false, None, activation::Activation::Identity).unwrap();
    let mut y =
        reference::combine::combine::<f64, f64>(&y_slots, &plan.token_slot, Some(&weights), None, None, TOP_K, HIDDEN)
            .unwrap();
    reference::combine::add_identity(&mut y, x, &mapped.identity_weight).unwrap();
    y
}

struct Batch {
    x: Vec<f32>,
    ids: Vec<i32>,
    weights: Vec<f32>,
    experts: Experts,
}

/// Tokens gated over `routed` experts, of which `real` have weights.
fn batch(name: &str, routed: usize, real: usize) -> Batch {
    let (kernels, stream) = (device::kernels(), device::stream());
    let rng = &mut generator(name);
    let x = normals::<f32>(rng, TOKENS * HIDDEN, 1.0);
    let experts = Experts {
        gate_up: normals::<f32>(rng, real * 2 * INNER * HIDDEN, 0.1),
        down: normals::<f32>(rng, real * HIDDEN * INNER, 0.2),
    };
    let logits = stream.clone_htod(&normals::<f32>(rng, TOKENS * routed, 1.0)).unwrap();
    let gating = Gating::new(Score::Softmax).renormalised();
    let desc = GatingDesc { tokens: TOKENS, experts: routed, top_k: TOP_K, gating };
    let mut ids = stream.alloc_zeros::<i32>(TOKENS * TOP_K).unwrap();
    let mut weights = stream.alloc_zeros::<f32>(TOKENS * TOP_K).unwrap();
    let args = GatingArgs { logits: &logits, correction_bias: None, ids: &mut ids, weights: &mut weights };
    gating::forward(kernels, &stream, &desc, args).unwrap();
    Batch { x, ids: stream.clone_dtoh(&ids).unwrap(), weights: stream.clone_dtoh(&weights).unwrap(), experts }
}

/// LongCat-Flash's shape in small: the router knows identity and zero experts beside the real ones.
#[test]
fn null_experts_cost_nothing_and_pass_their_input_on() {
    let real = 5;
    let map: Vec<i32> = (0..real as i32).chain([IDENTITY, IDENTITY, IDENTITY, NONE]).collect();
    let Batch { x, ids, weights, experts } = batch("null experts", map.len(), real);
    let here: Vec<usize> = (0..real).collect();
    let (got, counts) = run(&x, &ids, &weights, &map, &experts, &here);
    let want = reference(&x, &ids, &weights, &map, &experts, &here);
    let error = relative_error("y", &to_f64(&got), &want);
    assert!(error <= F32_PRODUCTS, "{error:e}");
    let real_slots = ids.iter().filter(|&&id| (id as usize) < real).count();
    assert_eq!(counts.iter().sum::<i32>() as usize, real_slots, "null slots have no rows");
    assert!(real_slots < ids.len());
}

/// Two devices with fewer experts each than a token has choices: their outputs add up to the whole layer's.
#[test]
fn devices_add_up() {
    let all = 6;
    let Batch { x, ids, weights, experts } = batch("devices", all, all);
    let mut sum = vec![0.0; TOKENS * HIDDEN];
    for here in [[4, 1, 3], [0, 5, 2]] {
        let map: Vec<i32> =
            (0..all).map(|e| here.iter().position(|&global| global == e).map_or(NONE, |local| local as i32)).collect();
        let (got, _) = run(&x, &ids, &weights, &map, &experts, &here);
        sum.iter_mut().zip(got).for_each(|(sum, y)| *sum += f64::from(y));
    }
    let whole: Vec<usize> = (0..all).collect();
    let map: Vec<i32> = (0..all as i32).collect();
    let want = reference(&x, &ids, &weights, &map, &experts, &whole);
    let error = relative_error("sum of devices", &sum, &want);
    assert!(error <= F32_PRODUCTS, "{error:e}");
}

#[test]
fn no_tokens() {
    let (kernels, stream) = (device::kernels(), device::stream());
    let desc = ExpertMapDesc { tokens: 0, experts: 2, top_k: 1, max_replicas: 1, seed: 0 };
    let mut local_ids = stream.clone_htod(&[-7i32]).unwrap();
    let args = ExpertMapArgs {
        ids: &stream.clone_htod(&[0i32]).unwrap(),
        weights: None,
        map: &stream.clone_htod(&[0i32, 1]).unwrap(),
        replicas: None,
        local_ids: &mut local_ids,
        identity_weight: None,
    };
    expert_map::forward(kernels, &stream, &desc, args).unwrap();
    assert_eq!(stream.clone_dtoh(&local_ids).unwrap(), [-7]);
}
