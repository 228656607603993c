//! Properties over random shapes, skews and values: the device and the reference agree, whatever comes in.
//!
//! The seed is fixed, so that a run is the same everywhere; `MOE_SEED` changes it, and a failure is shrunk and printed.

#[path = "properties/admission.rs"]
mod admission;
#[path = "properties/noise.rs"]
mod noise;
#[path = "properties/products.rs"]
mod products;
mod support;

use half::{bf16, f16};
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use moe_kernels::layer::{LayerDesc, Mlp, SharedDesc};
use moe_kernels::reference::{self, dispatch::DispatchRule};
use moe_kernels::routers::gating_dispatch::{self, GatingDispatchArgs, GatingDispatchDesc};
use moe_kernels::rules::{Capacity, Gating, Renormalise, Score};
use moe_kernels::{Dtype, Workspace};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use support::compare::{Shares, assert_weights};
use support::device;
use support::inputs::run_seed;
use support::layer_case::{Case, check};
use support::lists;

/// DeepSeek-V3's.
const EPSILON: Renormalise = Renormalise::Plus(1e-20);

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        rng_seed: RngSeed::Fixed(run_seed()),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// Experts, and experts a token.
fn experts_and_k() -> impl Strategy<Value = (usize, usize)> {
    prop_oneof![1usize..=8, 9usize..=70, 71usize..=300, Just(1025usize)]
        .prop_flat_map(|experts| (Just(experts), 1..=experts.min(32)))
}

/// No limit, or one counted in sequences of any length, padded or not.
fn capacity() -> impl Strategy<Value = Option<Capacity>> {
    prop::option::of(
        (1usize..=6, 1usize..=80, any::<bool>())
            .prop_map(|(per_expert, sequence, padded)| Capacity::new(per_expert, sequence).padded(padded)),
    )
}

/// Values that gating must order: a few equal ones, both zeros, infinities, NaN.
fn logit() -> impl Strategy<Value = f32> {
    prop_oneof![
        6 => -4.0f32..4.0,
        3 => prop::sample::select(vec![-1.0f32, -0.0, 0.0, 0.5]),
        1 => prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE / 4.0]),
    ]
}

/// What dispatch wrote, as the reference writes it.
struct Sorted {
    counts: Vec<i32>,
    offsets: Vec<i32>,
    slot_token: Vec<i32>,
    token_slot: Vec<i32>,
    tiles: Vec<[i32; 4]>,
}

/// Runs dispatch on `ids`, or, given logits, gating and dispatch in one launch; the latter also yields ids and weights.
fn sort(desc: &DispatchDesc, input: Result<&[i32], (&Gating, &[f32])>) -> (Sorted, Vec<i32>, Vec<f32>) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let choices = desc.tokens * desc.top_k;
    let junk = |len: usize| stream.clone_htod(&vec![-7i32; len.max(1)]).unwrap();
    let mut dispatched = lists::junk(&stream, &desc.shape());
    let mut ids = junk(choices);
    let mut weights = stream.alloc_zeros::<f32>(choices.max(1)).unwrap();
    match input {
        Ok(given) => {
            if !given.is_empty() {
                stream.memcpy_htod(given, &mut ids).unwrap();
            }
            let bytes = dispatch::workspace_bytes(desc, kernels.device()).unwrap();
            let mut workspace = Workspace::new(&stream, bytes).unwrap();
            let args = DispatchArgs::new(&ids, &mut dispatched, &mut workspace);
            dispatch::forward(kernels, &stream, desc, args).unwrap();
        }
        Err((gating, logits)) => {
            let mut buffer = stream.alloc_zeros::<f32>(logits.len().max(1)).unwrap();
            if !logits.is_empty() {
                stream.memcpy_htod(logits, &mut buffer).unwrap();
            }
            let desc = GatingDispatchDesc::new(*gating, *desc);
            let bytes = gating_dispatch::workspace_bytes(&desc, kernels.device()).unwrap();
            let mut workspace = Workspace::new(&stream, bytes).unwrap();
            let args = GatingDispatchArgs::new(&buffer, &mut ids, &mut weights, &mut dispatched, &mut workspace);
            gating_dispatch::forward(kernels, &stream, &desc, args).unwrap();
        }
    }
    let read = |buffer| stream.clone_dtoh::<i32, _>(buffer).unwrap();
    let offsets = read(dispatched.offsets());
    let live = offsets[desc.experts] as usize;
    let count = read(dispatched.num_tiles())[0] as usize;
    let sorted = Sorted {
        counts: read(dispatched.counts()),
        slot_token: read(dispatched.slot_token())[..live].to_vec(),
        token_slot: read(dispatched.token_slot())[..choices].to_vec(),
        tiles: stream.clone_dtoh(dispatched.tiles()).unwrap()[..count].to_vec(),
        offsets,
    };
    (sorted, read(&ids)[..choices].to_vec(), stream.clone_dtoh(&weights).unwrap()[..choices].to_vec())
}

fn assert_sorted(desc: &DispatchDesc, ids: &[i32], got: &Sorted) {
    let DispatchDesc { experts, top_k, capacity, tile_m, .. } = *desc;
    let want = reference::dispatch::dispatch(ids, &DispatchRule { experts, top_k, capacity, tile_m }).unwrap();
    assert_eq!(got.counts, want.counts, "counts");
    assert_eq!(got.offsets, want.offsets, "offsets");
    assert_eq!(got.token_slot, want.token_slot, "token_slot");
    assert_eq!(got.slot_token, want.slot_token, "slot_token");
    assert_eq!(got.tiles, want.tiles, "tiles");
}

proptest! {
    #![proptest_config(config(192))]

    /// Ids of any kind: skewed to one expert or spread, -1 or far out of range.
    #[test]
    fn dispatch_sorts_any_ids(
        (experts, top_k) in experts_and_k(),
        tokens in 0usize..150,
        capacity in capacity(),
        tile_m in prop::sample::select(vec![1usize, 16, 64, 128]),
        skew in 1usize..=400,
        seed in any::<u64>(),
    ) {
        let desc = DispatchDesc::new(tokens, experts, top_k, tile_m).capacity(capacity);
        prop_assume!(desc.validate().is_ok());
        let mut rng = fastrand::Rng::with_seed(seed);
        let ids: Vec<i32> = (0..tokens * top_k)
            .map(|_| match rng.u32(..12) {
                0 => -1,
                1 => [i32::MIN, i32::MAX, experts as i32][rng.usize(..3)],
                _ => rng.usize(..skew.min(experts)) as i32,
            })
            .collect();
        assert_sorted(&desc, &ids, &sort(&desc, Ok(&ids)).0);
    }

    /// Logits of any kind, NaN rows included: ids in range and distinct, those of the reference, and dispatch sorts them.
    #[test]
    fn gating_orders_any_logits(
        (experts, top_k, tokens, logits) in experts_and_k().prop_flat_map(|(experts, top_k)| {
            (0usize..20).prop_flat_map(move |tokens| {
                (Just(experts), Just(top_k), Just(tokens), prop::collection::vec(logit(), tokens * experts))
            })
        }),
        score in prop::sample::select(Score::COMMON.to_vec()),
        renormalise in any::<bool>(),
        capacity in capacity(),
    ) {
        let desc = DispatchDesc::new(tokens, experts, top_k, 16).capacity(capacity);
        prop_assume!(desc.validate().is_ok());
        let gating = Gating::new(score).renormalise(renormalise.then_some(EPSILON));
        let (sorted, ids, weights) = sort(&desc, Err((&gating, &logits)));
        for chosen in ids.chunks(top_k) {
            let mut distinct = chosen.to_vec();
            distinct.sort_unstable();
            distinct.dedup();
            prop_assert_eq!(distinct.len(), top_k, "ids {:?} repeat", chosen);
            prop_assert!(chosen.iter().all(|&id| (0..experts as i32).contains(&id)), "ids {:?} out of range", chosen);
        }
        let want = reference::gating::gate::<f32, f32>(&logits, None, experts, top_k, &gating).unwrap();
        prop_assert_eq!(&ids, &want.ids);
        let shares = Shares::of(score, experts, top_k);
        assert_weights("weights", &weights, &want.weights, shares, if renormalise { top_k } else { 0 });
        assert_sorted(&desc, &ids, &sorted);
    }
}

proptest! {
    #![proptest_config(config(96))]

    /// Whole layers of any shape: no tokens, one expert, experts without tokens, all options.
    #[test]
    fn layers_of_any_shape(
        experts in prop_oneof![1usize..=4, 5usize..=40],
        k in 1usize..=6,
        (hidden, intermediate) in (1usize..=12, 1usize..=10),
        tokens in prop_oneof![Just(0usize), 1usize..=4, 5usize..=60],
        mlp in prop::sample::select(vec![Mlp::swiglu(Dtype::Bf16), Mlp::relu(Dtype::Bf16), Mlp::gpt_oss(Dtype::Bf16)]),
        score in prop::sample::select(Score::COMMON.to_vec()),
        capacity in capacity(),
        (renormalise, router_bias, expert_bias, residual) in any::<(bool, bool, bool, bool)>(),
    ) {
        let desc = LayerDesc::new(Dtype::Bf16, 8 * hidden, 8 * intermediate, experts, k.min(experts))
            .mlp(mlp)
            .capacity(capacity)
            .gating(Gating::new(score).renormalise(renormalise.then_some(EPSILON)));
        let case = Case { router_bias, expert_bias, residual, ..Case::new(desc, tokens) };
        check::<bf16, bf16>(&case);
    }
}

proptest! {
    #![proptest_config(config(48))]

    /// Layers whose rows have any number of elements, as where a model is split over ranks.
    #[test]
    fn layers_of_any_width(
        experts in 1usize..=9,
        k in 1usize..=3,
        hidden in prop_oneof![1usize..=100, Just(133usize), Just(170usize), (1usize..=8).prop_map(|n| 8 * n)],
        intermediate in prop_oneof![1usize..=90, Just(341usize), (1usize..=8).prop_map(|n| 8 * n)],
        tokens in prop_oneof![1usize..=4, 5usize..=70],
        mlp in prop::sample::select(vec![Mlp::swiglu(Dtype::F16), Mlp::relu(Dtype::F16), Mlp::gpt_oss(Dtype::F16)]),
        shared in prop::option::of(any::<bool>()),
        (f32_router, router_bias, expert_bias, residual) in any::<(bool, bool, bool, bool)>(),
    ) {
        // A shared expert as wide as the others, in their launches, or a narrower one in its own.
        let shared = shared.map(|joins| SharedDesc::new(if joins { intermediate } else { intermediate.div_ceil(2) }, mlp));
        let desc = LayerDesc::new(Dtype::F16, hidden, intermediate, experts, k.min(experts)).mlp(mlp).shared(shared);
        let case = Case { router_bias, expert_bias, residual, ..Case::new(desc, tokens) };
        if f32_router {
            check::<f16, f32>(&Case { desc: desc.router_dtype(Dtype::F32), ..case });
        } else {
            check::<f16, f16>(&case);
        }
    }
}
