//! A router's logits and a shared expert's gate beside them.

use std::collections::BTreeSet;

use half::{bf16, f16};
use moe_kernels::reference;
use moe_kernels::registry::{Kernel, Router, RouterShape};
use moe_kernels::routers::router::{self, RouterArgs, RouterDesc, SharedGate};

use crate::buffer::Guarded;
use crate::device;
use crate::values::{Storage, generator, normals, wide};

/// Logits and gate of `tokens` rows.
fn run<X: Storage, W: Storage>(desc: &RouterDesc, x: &[X], weights: [&[W]; 2], bias: Option<&[f32]>) -> [Vec<f32>; 2] {
    let (kernels, stream) = (device::kernels(), device::stream());
    let x = Guarded::input(&stream, "x", x);
    let [weight, gate_weight] = weights.map(|weight| Guarded::input(&stream, "weight", weight));
    // Behind one element: it begins on no more than an element.
    let bias = bias.map(|bias| stream.clone_htod(&[&[f32::NAN], bias].concat()).unwrap());
    let bias = bias.as_ref().map(|bias| bias.slice(1..));
    let mut logits = Guarded::<f32>::output(&stream, "logits", desc.tokens * desc.experts);
    let mut gate = Guarded::<f32>::output(&stream, "gate", desc.tokens);
    {
        let (x, weight, gate_weight) = (x.view(), weight.view(), gate_weight.view());
        let (mut logits, mut gate) = (logits.view_mut(), gate.view_mut());
        let mut args = RouterArgs::new(&x, &weight, &mut logits);
        args.bias = bias.as_ref().map(Into::into);
        if desc.shared_gate {
            args = args.shared_gate(SharedGate::new(&gate_weight, &mut gate));
        }
        router::forward(kernels, &stream, desc, args).unwrap();
    }
    [logits.read(&stream), gate.read(&stream)]
}

fn check<X: Storage, W: Storage>() {
    let mut rng = generator("routers", X::DTYPE);
    let mut shapes = BTreeSet::new();
    for draw in 0..24 {
        let hidden = 8 * [rng.usize(1..9), rng.usize(9..140)][rng.usize(..2)];
        let experts = [0, rng.usize(1..20), 64, rng.usize(60..130)][draw % 4];
        let tokens = [rng.usize(1..9), rng.usize(60..150), rng.usize(300..400)][rng.usize(..3)];
        let base = RouterDesc::new(X::DTYPE, tokens, experts, hidden).weight(W::DTYPE).shared_gate(true);
        let x: Vec<X> = normals(&mut rng, tokens * hidden, 1.0);
        let weight: Vec<W> = normals(&mut rng, experts * hidden, 1.0);
        let gate_weight: Vec<W> = normals(&mut rng, hidden, 1.0);
        let bias: Option<Vec<f32>> = rng.bool().then(|| normals(&mut rng, experts, 1.0));
        let size = |values: &[f64]| values.iter().map(|value| value.abs()).collect::<Vec<_>>();
        let sums = |x: &[f64], weight: &[f64], bias: Option<&[f64]>| {
            reference::router::router(x, weight, bias, hidden).unwrap()
        };
        let wide_bias = bias.as_deref().map(wide);

        let mut gates = Vec::new();
        for invariant in [false, true] {
            let desc = base.batch_invariant(invariant);
            let Kernel::Router(kernel) = router::select(&desc, device::kernels().device()).unwrap().kernel.variant()
            else {
                unreachable!()
            };
            shapes.insert(kernel.shape);
            let [logits, gate] = run(&desc, &x, [&weight, &gate_weight], bias.as_deref());
            let pairs = [(&logits, &weight, wide_bias.as_deref()), (&gate, &gate_weight, None)];
            for (got, weight, bias) in pairs {
                let want = sums(&wide(&x), &wide(weight), bias);
                let sizes = sums(&size(&wide(&x)), &size(&wide(weight)), bias.map(size).as_deref());
                assert_eq!(got.len(), want.len());
                for (i, ((&got, want), size)) in got.iter().zip(want).zip(sizes).enumerate() {
                    assert!((f64::from(got) - want).abs() <= 1e-6 * size, "{desc:?}: {i} is {got:e}, want {want:e}");
                }
            }
            if experts > 0 {
                let without = run(&desc.shared_gate(false), &x, [&weight, &gate_weight], bias.as_deref());
                assert_eq!(without[0], logits, "{desc:?}: the gate changes no logit");
            }
            gates.push(gate);
        }
        assert_eq!(gates[0], gates[1], "{base:?}: the gate has the same bits in both kernels");
    }
    let all = if Router::is_exact(X::DTYPE, W::DTYPE) {
        vec![RouterShape::Mma32, RouterShape::Few]
    } else {
        vec![RouterShape::Tile, RouterShape::Warp]
    };
    assert_eq!(shapes.into_iter().collect::<Vec<_>>(), all, "kernels that were asked");
}

#[test]
fn routers_with_a_gate() {
    check::<bf16, bf16>();
    check::<f16, f32>();
    check::<f32, f32>();
}
