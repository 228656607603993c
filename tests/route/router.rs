use bytemuck::Pod;
use half::{bf16, f16};
use moe_kernels::Element;
use moe_kernels::reference::{Real, router::router};
use moe_kernels::registry::{Kernel, Router, RouterShape};

use crate::device::{Arg, Input, Output, launch, optional};
use crate::random::Random;

fn case<X: Element + Real + Pod, W: Element + Real + Pod>(
    shape: RouterShape,
    [tokens, experts, hidden]: [usize; 3],
    with_bias: bool,
    misaligned: bool,
) {
    let kernel = Kernel::Router(Router { x: X::DTYPE, weight: W::DTYPE, shape });
    let what = format!("{} T={tokens} E={experts} H={hidden} bias={with_bias}", kernel.name());
    let mut random = Random::new(hidden as u64);
    let x: Vec<X> = random.normals(tokens * hidden);
    let weight: Vec<W> = random.normals(experts * hidden);
    let bias: Option<Vec<f32>> = with_bias.then(|| random.normals(experts));
    let want = router(&x, &weight, bias.as_deref(), hidden).unwrap();

    let (x, weight, bias) = (Input::new(&x), Input::new(&weight), bias.map(|bias| Input::new(&bias)));
    let (block_tokens, block_experts) = shape.block();
    let grid = [(tokens as u32).div_ceil(block_tokens), (experts as u32).div_ceil(block_experts), 1];
    let mut first = None;
    for seed in 0..2 {
        let logits = Output::at_offset::<f32>(tokens * experts, if misaligned { 4 } else { 0 });
        let counters = launch(
            kernel,
            grid,
            seed,
            &[
                Arg::In(&x),
                Arg::In(&weight),
                optional(&bias),
                Arg::Out(&logits),
                Arg::Null,
                Arg::Null,
                Arg::U32(tokens as u32),
                Arg::U32(experts as u32),
                Arg::U32(hidden as u32),
                Arg::F32(1.0),
                Arg::F32(0.0),
            ],
        );
        assert_eq!(counters.shared.wavefronts, counters.shared.ideal_wavefronts, "{what}: bank conflicts");
        let got = logits.read::<f32>();
        // A sum of H products rounded one by one errs like sqrt(H) roundoffs of its norm, which is sqrt(H) here.
        let bound = 4e-7 * hidden as f64;
        for (at, (&got, &want)) in got.iter().zip(&want).enumerate() {
            assert!((f64::from(got) - want).abs() <= bound, "{what}: logit {at} is {got}, should be {want}");
        }
        let bits: Vec<u32> = got.iter().map(|value| value.to_bits()).collect();
        assert_eq!(*first.get_or_insert(bits.clone()), bits, "{what}: not deterministic");
    }
}

fn shapes<X: Element + Real + Pod, W: Element + Real + Pod>() {
    for (dims, bias) in [([1, 9, 72], true), ([2, 8, 264], false), ([3, 1, 2072], true), ([7, 31, 40], true)] {
        case::<X, W>(RouterShape::Warp, dims, bias, false);
    }
    for (dims, bias) in [([5, 7, 72], true), ([66, 68, 40], true), ([64, 64, 8], false), ([1, 130, 520], true)] {
        case::<X, W>(RouterShape::Tile, dims, bias, false);
    }
    case::<X, W>(RouterShape::Tile, [65, 64, 16], true, true);
}

#[test]
fn bf16_by_bf16() {
    shapes::<bf16, bf16>();
}

#[test]
fn bf16_by_f32() {
    shapes::<bf16, f32>();
}

#[test]
fn f16_by_f16() {
    shapes::<f16, f16>();
}

#[test]
fn f16_by_f32() {
    shapes::<f16, f32>();
}

#[test]
fn f32_by_f32() {
    shapes::<f32, f32>();
}

#[test]
fn four_thousand_experts() {
    case::<bf16, bf16>(RouterShape::Warp, [1, 4095, 64], false, false);
    case::<bf16, bf16>(RouterShape::Tile, [2, 4096, 64], false, false);
}
