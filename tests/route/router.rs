use bytemuck::Pod;
use half::{bf16, f16};
use moe_kernels::Element;
use moe_kernels::reference::{Real, router::router};
use moe_kernels::registry::{Kernel, Router, RouterShape};
use softcuda::exec::{Config, Counters, Products};

use crate::device::{Arg, Input, Output, launch_as, optional};
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
    let mut first = None;
    for seed in 0..2 {
        let logits = Output::at_offset::<f32>(tokens * experts, if misaligned { 4 } else { 0 });
        let config = Config { seed, ..Config::default() };
        let counters = run(kernel, [tokens, experts, hidden], config, [&x, &weight], &bias, &logits);
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

/// The logits of `x` and weight, without a gate.
fn run(
    kernel: Kernel,
    [tokens, experts, hidden]: [usize; 3],
    config: Config,
    [x, weight]: [&Input; 2],
    bias: &Option<Input>,
    logits: &Output,
) -> Counters {
    let Kernel::Router(Router { shape, .. }) = kernel else { unreachable!() };
    let (block_tokens, block_experts) = shape.block();
    let [rows, columns] = [(tokens as u32).div_ceil(block_tokens), (experts as u32).div_ceil(block_experts)];
    let grid = if shape.is_tensor() { [rows * columns, 1, 1] } else { [rows, columns, 1] };
    let args = [
        Arg::In(x),
        Arg::In(weight),
        optional(bias),
        Arg::Out(logits),
        Arg::Null,
        Arg::Null,
        Arg::U32(tokens as u32),
        Arg::U32(experts as u32),
        Arg::U32(hidden as u32),
        Arg::F32(1.0),
        Arg::F32(0.0),
        Arg::U32(0),
    ];
    launch_as(kernel, grid, config, &args)
}

fn shapes<X: Element + Real + Pod, W: Element + Real + Pod>() {
    let exists = |shape: &RouterShape| Router { x: X::DTYPE, weight: W::DTYPE, shape: *shape }.exists();
    for shape in RouterShape::ALL.into_iter().filter(exists) {
        match shape {
            // Element by element: its columns of shared memory meet.
            RouterShape::Any => {}
            RouterShape::Warp | RouterShape::Few => {
                for (dims, bias) in
                    [([1, 9, 72], true), ([2, 8, 264], false), ([3, 1, 2072], true), ([7, 31, 40], true)]
                {
                    case::<X, W>(shape, dims, bias, false);
                }
            }
            _ => {
                for (dims, bias) in
                    [([5, 7, 72], true), ([66, 68, 40], true), ([64, 64, 8], false), ([1, 130, 520], true)]
                {
                    case::<X, W>(shape, dims, bias, false);
                }
                case::<X, W>(shape, [65, 64, 16], true, true);
            }
        }
    }
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
    case::<f32, f32>(RouterShape::Warp, [1, 4095, 64], false, false);
    case::<f32, f32>(RouterShape::Tile, [2, 4096, 64], false, false);
    case::<bf16, bf16>(RouterShape::Few, [1, 4095, 64], false, false);
    case::<bf16, bf16>(RouterShape::Mma64, [2, 4096, 64], false, false);
}

/// Logits by every cut on tensor cores: the same bits, which are returned.
fn in_every_cut<X: Element + Real + Pod, W: Element + Real + Pod>(
    dims: [usize; 3],
    config: &Config,
    x: &[X],
    weight: &[W],
) -> Vec<f32> {
    let (x, weight) = (Input::new(x), Input::new(weight));
    let kernels = RouterShape::TENSOR.map(|shape| Router { x: X::DTYPE, weight: W::DTYPE, shape });
    let mut first: Option<Vec<u32>> = None;
    for router in kernels.into_iter().filter(Router::exists) {
        let logits = Output::new::<f32>(dims[0] * dims[1]);
        run(Kernel::Router(router), dims, config.clone(), [&x, &weight], &None, &logits);
        let bits: Vec<u32> = logits.read::<f32>().into_iter().map(f32::to_bits).collect();
        assert_eq!(*first.get_or_insert_with(|| bits.clone()), bits, "{router:?} of {dims:?}: other bits");
    }
    first.unwrap().into_iter().map(f32::from_bits).collect()
}

/// Within 1e-6 of f64 sums, relative to the sum of magnitudes, as tensor cores of these devices add.
fn exact<X: Element + Real + Pod, W: Element + Real + Pod>() {
    let dims @ [tokens, experts, hidden] = [33, 10, 4104];
    let mut random = Random::new(7);
    let (x, weight): (Vec<X>, Vec<W>) = (random.normals(tokens * hidden), random.normals(experts * hidden));
    let magnitudes = |values: &[f64]| values.iter().map(|value| value.abs()).collect::<Vec<_>>();
    let x64: Vec<f64> = x.iter().map(|&x| x.into()).collect();
    let weight64: Vec<f64> = weight.iter().map(|&w| w.into()).collect();
    let sizes = router::<f64, f64, f32>(&magnitudes(&x64), &magnitudes(&weight64), None, hidden).unwrap();
    for (products, compute_capability) in
        [(Products::Fused, (8, 0)), (Products::Truncated, (8, 0)), (Products::Truncated, (9, 0))]
    {
        let config = Config { products, compute_capability, ..Config::default() };
        let check = |x: &[X], weight: &[W], what: &str| {
            let want = router::<X, W, f32>(x, weight, None, hidden).unwrap();
            let got = in_every_cut(dims, &config, x, weight);
            let worst = (got.iter().zip(&want).zip(&sizes))
                .map(|((&got, want), size)| (f64::from(got) - want).abs() / size)
                .fold(0.0, f64::max);
            println!("{} by {}, {what}, {products:?} {compute_capability:?}: {worst:.1e}", X::DTYPE, W::DTYPE);
            assert!(worst <= 1e-6, "{} by {}, {what}, {products:?}: off by {worst:e}", X::DTYPE, W::DTYPE);
        };
        check(&x, &weight, "signs at random");
        // All of one sign is where cutting instead of rounding drifts most.
        let positive_x: Vec<X> = x64.iter().map(|value| X::from_f32(value.abs() as f32)).collect();
        let positive: Vec<W> = weight64.iter().map(|value| W::from_f32(value.abs() as f32)).collect();
        check(&positive_x, &positive, "of one sign");
    }
}

#[test]
fn within_a_millionth_of_the_sum_of_magnitudes() {
    exact::<bf16, bf16>();
    exact::<f16, f16>();
    exact::<bf16, f32>();
}
