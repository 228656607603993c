//! Checks of `router_*`.

use half::{bf16, f16};
use moe_kernels::registry::{Kernel, Router, RouterShape};
use moe_kernels::routers::router::{self, RouterArgs, RouterDesc, SharedGate};
use moe_kernels::rules::{Dtype, LogitRule};
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
    let searched;
    let shapes: &[[usize; 3]] = match variant.shape {
        RouterShape::Warp => &[
            [3, 1, 40],
            [1, 8, 2048],
            [3, 60, 72],
            [4, 257, 136],
            [5, 9, 1000],
            [33, 31, 264],
            [2, 7, 72],
            [6, 9, 1000],
        ],
        RouterShape::Any => &[[1, 1, 1], [3, 65, 41], [70, 9, 133], [65, 129, 7], [5, 60, 1001]],
        RouterShape::Tile => &[[4095, 96, 8], [2050, 129, 24], [701, 500, 72], [150, 4096, 8]],
        RouterShape::Few => &[
            [3, 1, 40],
            [1, 8, 2056],
            [17, 60, 72],
            [9, 257, 136],
            [5, 9, 4200],
            [33, 31, 264],
            [16, 129, 2048],
            [8, 63, 2080],
        ],
        _ => {
            // Fewest tokens at which it is selected, and some more: whole blocks would hide ragged ends. The deepest has experts in all four rows of 32
            // that a thread copies, and a number of them that is a multiple of four.
            searched = [[512, 8], [129, 40], [100, 136]].map(|[experts, hidden]| {
                let selected = |tokens: &usize| {
                    let desc = RouterDesc::new(variant.x, *tokens, experts, hidden).weight(variant.weight);
                    router::select(&desc, device::kernels().device()).unwrap().kernel.variant()
                        == Kernel::Router(variant)
                };
                let tokens =
                    (1..40_000).step_by(43).find(selected).expect("there is a number of tokens for each kernel");
                [tokens, experts, hidden]
            });
            &searched
        }
    };
    for &shape in shapes {
        case::<X, W>(variant, rng, shape, [false, false], LogitRule::PLAIN);
        case::<X, W>(variant, rng, shape, [true, true], LogitRule::PLAIN);
        // Past the cap, far below it, and where the two formulas of tanh meet.
        for (factor, softcap) in [(0.25, None), (1.0, Some(3.0)), (1e-3, Some(0.5)), (-0.125, Some(2.0))] {
            if matches!(variant.shape, RouterShape::Warp | RouterShape::Few) || shape[1] == 129 {
                let rule = LogitRule::PLAIN.factor(factor).softcap(softcap);
                let options = [rng.bool(), rng.bool()];
                case::<X, W>(variant, rng, shape, options, rule);
            }
        }
    }
}

/// Logits, and by how much each may be off.
fn expected<X: Storage, W: Storage>(
    x: &[X],
    weight: &[W],
    bias: Option<&[f32]>,
    hidden: usize,
    arithmetic: Arithmetic,
) -> (Vec<f64>, Vec<f64>) {
    let want = reference::router::router(x, weight, bias, hidden).unwrap();
    // The sums of the terms' magnitudes and squares are logits of other numbers.
    let terms = |f: fn(f64) -> f64| {
        let [x, weight, values] = [to_f64(x), to_f64(weight), bias.map(to_f64).unwrap_or_default()]
            .map(|values| values.into_iter().map(f).collect::<Vec<_>>());
        reference::router::router(&x, &weight, bias.map(|_| values.as_slice()), hidden).unwrap()
    };
    let (magnitudes, squares) = (terms(f64::abs), terms(|v| v * v));
    let bound = |i: usize| arithmetic.sum_bound(hidden + 1, want[i], magnitudes[i], squares[i].sqrt());
    let bounds = (0..want.len()).map(bound).collect();
    (want, bounds)
}

fn case<X: Storage, W: Storage>(
    variant: Router,
    rng: &mut fastrand::Rng,
    [tokens, experts, hidden]: [usize; 3],
    [with_bias, gated]: [bool; 2],
    rule: LogitRule,
) {
    let kernels = device::kernels();
    let stream = device::stream();
    let name = format!("T={tokens} E={experts} H={hidden} bias={with_bias} gate={gated} {rule:?}");
    let x: Vec<X> = normals(rng, tokens * hidden, 1.0);
    let weight: Vec<W> = normals(rng, experts * hidden, 1.0);
    let bias: Option<Vec<f32>> = with_bias.then(|| normals(rng, experts, 1.0));
    let arithmetic = if variant.shape.is_tensor() { Arithmetic::MmaParts } else { Arithmetic::Fma };
    let (mut want, mut bounds) = expected(&x, &weight, bias.as_deref(), hidden, arithmetic);
    if rule != LogitRule::PLAIN {
        want = reference::router::finish(&want, rule);
        // No value moves by more than the factor under a cap; tanh is off by 4 units, a product, a quotient and a product by one each.
        bounds.iter_mut().zip(&want).for_each(|(bound, l)| {
            *bound = f64::from(rule.factor.abs()) * *bound + 7.0 * l.abs() / 16_777_216.0;
        });
    }
    // A shared expert's gate: one more row, without a bias.
    let gate_weight: Vec<W> = normals(rng, hidden, 1.0);
    let (gate_want, gate_bounds) = expected(&x, &gate_weight, None, hidden, arithmetic);

    let desc =
        RouterDesc::new(variant.x, tokens, experts, hidden).weight(variant.weight).shared_gate(gated).logits(rule);
    let selected = router::select(&desc, kernels.device()).unwrap().kernel.variant();
    assert_eq!(selected, Kernel::Router(variant), "{name}: the shape does not test this variant");
    // Where rows begin on any element, so do buffers.
    let shift = |elements: usize| if variant.shape == RouterShape::Any { elements } else { 0 };
    let x = Guarded::shifted_input(&stream, "x", &x, shift(1));
    let weight = Guarded::shifted_input(&stream, "weight", &weight, shift(3));
    let bias = bias.map(|values| Guarded::input(&stream, "bias", &values));
    let mut logits = Guarded::<f32>::output(&stream, "logits", tokens * experts);
    let gate_weight = Guarded::shifted_input(&stream, "shared_gate.weight", &gate_weight, shift(5));
    let mut gate = Guarded::<f32>::output(&stream, "shared_gate.logits", tokens);
    let launch = |logits: &mut Guarded<f32>, gate: &mut Guarded<f32>| {
        let (gate_weight, mut gate) = (gate_weight.view(), gate.view_mut());
        let (x, weight, bias, mut logits) =
            (x.view(), weight.view(), bias.as_ref().map(Guarded::view), logits.view_mut());
        let mut args = RouterArgs::new(&x, &weight, &mut logits);
        args.bias = bias.as_ref().map(In::from);
        args.shared_gate = gated.then(|| SharedGate::new(&gate_weight, &mut gate));
        router::forward(kernels, &stream, &desc, args).unwrap()
    };
    launch(&mut logits, &mut gate);
    let first = logits.read(&stream);
    if gated {
        assert_sums(&format!("{name}: gate"), &to_f64(&gate.read(&stream)), &gate_want, &gate_bounds, Dtype::F32);
    } else {
        gate.assert_unchanged(&stream);
    }
    assert_sums(&name, &to_f64(&first), &want, &bounds, Dtype::F32);
    // Of 16 bits: the same, rounded once.
    let halves = narrow::<f16, X, W>(&desc, &x, &weight, bias.as_ref(), gated.then_some(&gate_weight));
    let same = halves.iter().zip(&first).all(|(half, logit)| half.to_bits() == f16::from_f32(*logit).to_bits());
    assert!(same, "{name}: f16");
    let halves = narrow::<bf16, X, W>(&desc, &x, &weight, bias.as_ref(), gated.then_some(&gate_weight));
    let same = halves.iter().zip(&first).all(|(half, logit)| half.to_bits() == bf16::from_f32(*logit).to_bits());
    assert!(same, "{name}: bf16");
    x.assert_unchanged(&stream);
    weight.assert_unchanged(&stream);
    time(&stream, &name, || launch(&mut logits, &mut gate));
    logits.reset(&stream);
    launch(&mut logits, &mut gate);
    assert!(logits.read(&stream) == first, "{name}: another run gave other bits");
}

/// The logits of 16 bits.
fn narrow<L: Storage, X: Storage, W: Storage>(
    desc: &RouterDesc,
    x: &Guarded<X>,
    weight: &Guarded<W>,
    bias: Option<&Guarded<f32>>,
    gate_weight: Option<&Guarded<W>>,
) -> Vec<L> {
    let stream = device::stream();
    let mut logits = Guarded::<L>::output(&stream, "logits", desc.tokens * desc.experts);
    let mut gate = Guarded::<f32>::output(&stream, "shared_gate.logits", desc.tokens);
    {
        let (x, weight, bias, gate_weight) =
            (x.view(), weight.view(), bias.map(Guarded::view), gate_weight.map(Guarded::view));
        let (mut to, mut gate) = (logits.view_mut(), gate.view_mut());
        let mut args = RouterArgs::new(&x, &weight, &mut to);
        args.bias = bias.as_ref().map(In::from);
        args.shared_gate = gate_weight.as_ref().map(|weight| SharedGate::new(weight, &mut gate));
        router::forward(device::kernels(), &stream, desc, args).unwrap();
    }
    logits.read(&stream)
}
