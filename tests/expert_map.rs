//! How mapped experts flow through a layer: null experts that pass on or drop their input, and the experts of one device of several.

mod support;

use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use moe_kernels::capacity::expert_map::{self, ExpertMapArgs, ExpertMapDesc};
use moe_kernels::experts::Weight;
use moe_kernels::experts::combine::{self, CombineArgs, CombineDesc, Identity};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Rows};
use moe_kernels::reference::gemm::{ExpertMatrix, grouped_gemm};
use moe_kernels::reference::{self, dispatch::DispatchRule};
use moe_kernels::routers::gating::{self, GatingArgs, GatingDesc};
use moe_kernels::rules::{Activation, Gating, Glu, IDENTITY, Layout, NONE, Score, WeightDesc};
use moe_kernels::{Dtype, Workspace};
use support::compare::{F32_PRODUCTS, relative_error, to_f64};
use support::device;
use support::inputs::{generator, normals};
use support::lists;

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

    let desc = ExpertMapDesc::new(TOKENS, map.len(), TOP_K);
    let mut local_ids = ints(TOKENS * TOP_K);
    let mut identity_weight = stream.clone_htod(&vec![f32::NAN; TOKENS]).unwrap();
    let (ids, map) = (stream.clone_htod(ids).unwrap(), stream.clone_htod(map).unwrap());
    let args =
        ExpertMapArgs::new(&ids, &map, &mut local_ids).weights(&device_weights).identity_weight(&mut identity_weight);
    expert_map::forward(kernels, &stream, &desc, args).unwrap();

    let order = DispatchDesc::new(TOKENS, local, TOP_K, TILE);
    let mut dispatched = lists::junk(&stream, &order.shape());
    let bytes = dispatch::workspace_bytes(&order, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    let args = DispatchArgs::new(&local_ids, &mut dispatched, &mut workspace);
    dispatch::forward(kernels, &stream, &order, args).unwrap();

    // Rows that no slot fills stay NaN: nothing may come of them.
    let mut inner = upload(&vec![f32::NAN; order.slots() * INNER]);
    let mut y_slots = upload(&vec![f32::NAN; order.slots() * HIDDEN]);
    let rows = Rows::Grouped(order.shape());
    let first = GemmDesc::new(Dtype::F32, rows, INNER, HIDDEN)
        .gather(true)
        .weight(WeightDesc::new(Dtype::F32).glu(Glu::Split))
        .activation(Activation::Silu);
    let args = GemmArgs::new(&device_x, Weight::new(&gate_up), &mut inner).dispatched(&dispatched);
    gemm::forward(kernels, &stream, &first, args).unwrap();
    let second = GemmDesc::new(Dtype::F32, rows, HIDDEN, INNER);
    let args = GemmArgs::new(&inner, Weight::new(&down), &mut y_slots).dispatched(&dispatched);
    gemm::forward(kernels, &stream, &second, args).unwrap();

    let mut y = upload(&vec![f32::NAN; TOKENS * HIDDEN]);
    let desc = CombineDesc::new(Dtype::F32, order.shape(), HIDDEN);
    let args = CombineArgs::new(&y_slots, &dispatched, &mut y)
        .weights(&device_weights)
        .identity(Identity::new(&device_x, &identity_weight));
    combine::forward(kernels, &stream, &desc, args).unwrap();
    (stream.clone_dtoh(&y).unwrap(), stream.clone_dtoh(dispatched.counts()).unwrap())
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
    let first = matrix(gate_up.as_slice(), INNER, HIDDEN, Glu::Split);
    let inner = grouped_gemm(x, &first, &plan, true, None, Activation::Silu).unwrap();
    let second = matrix(down.as_slice(), HIDDEN, INNER, Glu::None);
    let y_slots = grouped_gemm(&inner, &second, &plan, false, None, Activation::Identity).unwrap();
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
    let desc = GatingDesc::new(TOKENS, routed, TOP_K, gating);
    let mut ids = stream.alloc_zeros::<i32>(TOKENS * TOP_K).unwrap();
    let mut weights = stream.alloc_zeros::<f32>(TOKENS * TOP_K).unwrap();
    gating::forward(kernels, &stream, &desc, GatingArgs::new(&logits, &mut ids, &mut weights)).unwrap();
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
    let desc = ExpertMapDesc::new(0, 2, 1);
    let mut local_ids = stream.clone_htod(&[-7i32]).unwrap();
    let (ids, map) = (stream.clone_htod(&[0i32]).unwrap(), stream.clone_htod(&[0i32, 1]).unwrap());
    expert_map::forward(kernels, &stream, &desc, ExpertMapArgs::new(&ids, &map, &mut local_ids)).unwrap();
    assert_eq!(stream.clone_dtoh(&local_ids).unwrap(), [-7]);
}
