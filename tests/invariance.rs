//! A layer that is batch-invariant gives a token the same bits in any batch, wherever it stands there.
//!
//! `MOE_SEED` draws other values.

use std::collections::BTreeSet;

#[path = "support/device.rs"]
#[allow(dead_code)]
mod device;
#[path = "experts/values.rs"]
#[allow(dead_code)]
mod values;

use half::{bf16, f16};
use moe_kernels::Workspace;
use moe_kernels::experts::Weight;
use moe_kernels::layer::{
    ExpertWeights, LayerArgs, LayerDesc, LayerWeights, RouteArgs, RouterWeights, SharedDesc, SharedWeights,
};
use values::{Storage, generator, normals, wide};

const HIDDEN: usize = 56;
const INTERMEDIATE: usize = 24;
const EXPERTS: usize = 64;
const TOP_K: usize = 8;
const TOKENS: usize = 2000;

/// First token and size of each batch: every height of tiles, both sides of where the router would change its kernel.
const BATCHES: [(usize, usize); 9] =
    [(0, TOKENS), (0, 1), (1999, 1), (3, 2), (61, 17), (700, 64), (13, 65), (500, 700), (900, 1057)];

/// What a token comes out as: `y`, chosen experts and their weights, and the logit of the shared expert's gate.
type Token = (Vec<u64>, Vec<i32>, Vec<u32>, u32);

fn check<T: Storage>(heights: &[usize]) {
    let mut rng = generator("a batch", T::DTYPE);
    let (kernels, stream) = (device::kernels(), device::stream());
    let desc = LayerDesc::new(T::DTYPE, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K).batch_invariant(true);
    let desc = desc.shared(Some(SharedDesc::new(INTERMEDIATE, desc.mlp).gated(true)));
    let x: Vec<T> = normals(&mut rng, TOKENS * HIDDEN, 1.0);
    let both = HIDDEN * INTERMEDIATE;
    let sizes = [EXPERTS * HIDDEN, EXPERTS * 2 * both, EXPERTS * both, 2 * both, both, HIDDEN];
    let weights = sizes.map(|len| stream.clone_htod(&normals::<T>(&mut rng, len, 0.12)).unwrap());
    let [router, gate_up, down, shared_up, shared_down, gate] = &weights;
    let shared = SharedWeights::new(Weight::new(shared_up), Weight::new(shared_down)).gate(gate);
    let experts = ExpertWeights::new(Weight::new(gate_up), Weight::new(down)).shared(shared);
    let weights = LayerWeights::new(RouterWeights::new(router), experts);

    let mut used = BTreeSet::new();
    let mut run = |first: usize, tokens: usize| -> Vec<Token> {
        let plan = desc.plan(tokens, kernels.device()).unwrap();
        used.insert(plan.tile_m());
        let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).unwrap();
        let x = stream.clone_htod(&x[first * HIDDEN..][..tokens * HIDDEN]).unwrap();
        let mut y = stream.alloc_zeros::<T>(tokens * HIDDEN).unwrap();
        let mut ids = stream.alloc_zeros::<i32>(tokens * TOP_K).unwrap();
        let mut chosen = stream.alloc_zeros::<f32>(tokens * TOP_K).unwrap();
        let mut logits = stream.alloc_zeros::<f32>(tokens).unwrap();
        let route = RouteArgs::new().ids(&mut ids).weights(&mut chosen);
        let args = LayerArgs::new(&x, &mut y).route(route).shared_gate(&mut logits);
        plan.forward(kernels, &stream, &weights, args, &mut workspace).unwrap();
        let y = wide(&stream.clone_dtoh(&y).unwrap());
        assert!(y.iter().all(|value| value.is_finite()) && y.iter().any(|&value| value != 0.0));
        let (ids, chosen) = (stream.clone_dtoh(&ids).unwrap(), stream.clone_dtoh(&chosen).unwrap());
        let logits = stream.clone_dtoh(&logits).unwrap();
        (y.chunks(HIDDEN).zip(ids.chunks(TOP_K)).zip(chosen.chunks(TOP_K)).zip(logits))
            .map(|(((y, ids), chosen), logit)| {
                let y = y.iter().map(|value| value.to_bits()).collect();
                (y, ids.to_vec(), chosen.iter().map(|weight| weight.to_bits()).collect(), logit.to_bits())
            })
            .collect()
    };
    let all = run(0, TOKENS);
    for (first, tokens) in BATCHES {
        for (i, got) in run(first, tokens).iter().enumerate() {
            assert_eq!(*got, all[first + i], "{}: token {} of {tokens} from {first}", T::DTYPE, first + i);
        }
    }
    assert_eq!(used.into_iter().collect::<Vec<_>>(), heights, "heights of tiles");
}

#[test]
fn bf16_tokens_are_the_same_in_any_batch() {
    check::<bf16>(&[16, 64, 128]);
}

#[test]
fn f16_tokens_are_the_same_in_any_batch() {
    check::<f16>(&[16, 64, 128]);
}

#[test]
fn f32_tokens_are_the_same_in_any_batch() {
    check::<f32>(&[16, 64]);
}
