//! Checks of `router_*`.

use half::{bf16, f16};
use moe_kernels::registry::{Kernel, Router, RouterShape};
use moe_kernels::routers::router::{self, RouterArgs, RouterDesc};
use moe_kernels::rules::Dtype;
use moe_kernels::{In, reference};

use crate::support::buffer::Guarded;
use crate::support::compare::{Arithmetic, Storage, assert_sums, to_f64};
use crate::support::device;
use crate::support::inputs::normals;
use crate::timing::time;

pub fn check(variant: Router, rng: &mut fastrand::Rng) {
    match (variant.x, variant.weight) {
        (Dtype::Bf16, Dtype::Bf16) => check_as::<bf16, bf16>(variant, rng),
        (Dtype::Bf16, _) => check_as::<bf16, f32>(variant, rng),
        (Dtype::F16, Dtype::F16) => check_as::<f16, f16>(variant, rng),
        (Dtype::F16, _) => check_as::<f16, f32>(variant, rng),
        (Dtype::F32, _) => check_as::<f32, f32>(variant, rng),
        (other, _) => unreachable!("no kernel has {other}"),
    }
}

fn check_as<X: Storage, W: Storage>(variant: Router, rng: &mut fastrand::Rng) {
    // Shapes at which the selection takes the variant: `case` checks that it does.
    let shapes: &[[usize; 3]] = match variant.shape {
        RouterShape::Warp => &[[3, 1, 40], [1, 8, 2048], [3, 60, 72], [4, 257, 136], [5, 9, 1000], [33, 31, 264]],
        RouterShape::Tile => &[[4095, 96, 8], [2050, 129, 24], [701, 500, 72], [150, 4096, 8]],
    };
    for &shape in shapes {
        for with_bias in [false, true] {
            case::<X, W>(variant, rng, shape, with_bias);
        }
    }
}

fn case<X: Storage, W: Storage>(
    variant: Router,
    rng: &mut fastrand::Rng,
    [tokens, experts, hidden]: [usize; 3],
    with_bias: bool,
) {
    let kernels = device::kernels();
    let stream = device::stream();
    let name = format!("T={tokens} E={experts} H={hidden} bias={with_bias}");
    let x: Vec<X> = normals(rng, tokens * hidden, 1.0);
    let weight: Vec<W> = normals(rng, experts * hidden, 1.0);
    let bias: Option<Vec<f32>> = with_bias.then(|| normals(rng, experts, 1.0));
    let want = reference::router::router(&x, &weight, bias.as_deref(), hidden).unwrap();
    // The sums of the terms' magnitudes and squares are logits of other numbers.
    let terms = |f: fn(f64) -> f64| {
        let [x, weight, bias] = [to_f64(&x), to_f64(&weight), bias.as_deref().map(to_f64).unwrap_or_default()]
            .map(|values| values.into_iter().map(f).collect::<Vec<_>>());
        reference::router::router(&x, &weight, with_bias.then_some(bias.as_slice()), hidden).unwrap()
    };
    let (magnitudes, squares) = (terms(f64::abs), terms(|v| v * v));
    let bound = |i: usize| Arithmetic::Fma.sum_bound(hidden + 1, want[i], magnitudes[i], squares[i].sqrt());
    let bounds: Vec<f64> = (0..want.len()).map(bound).collect();

    let desc = RouterDesc::new(variant.x, tokens, experts, hidden).weight(variant.weight);
    let selected = router::select(&desc, kernels.device()).unwrap().kernel.variant();
    assert_eq!(selected, Kernel::Router(variant), "{name}: the shape does not test this variant");
    let x = Guarded::input(&stream, "x", &x);
    let weight = Guarded::input(&stream, "weight", &weight);
    let bias = bias.map(|values| Guarded::input(&stream, "bias", &values));
    let mut logits = Guarded::<f32>::output(&stream, "logits", tokens * experts);
    let launch = |logits: &mut Guarded<f32>| {
        let (x, weight, bias, mut logits) =
            (x.view(), weight.view(), bias.as_ref().map(Guarded::view), logits.view_mut());
        let mut args = RouterArgs::new(&x, &weight, &mut logits);
        args.bias = bias.as_ref().map(In::from);
        router::forward(kernels, &stream, &desc, args).unwrap()
    };
    launch(&mut logits);
    let first = logits.read(&stream);
    assert_sums(&name, &to_f64(&first), &want, &bounds, Dtype::F32);
    x.assert_unchanged(&stream);
    weight.assert_unchanged(&stream);
    time(&stream, &name, || launch(&mut logits));
    logits.reset(&stream);
    launch(&mut logits);
    assert!(logits.read(&stream) == first, "{name}: another run gave other bits");
}
