//! Checks of `unit_experts_*`.

use half::{bf16, f16};
use moe_kernels::experts::unit_experts::{self, UnitExpertsArgs, UnitExpertsDesc};
use moe_kernels::reference::unit_experts::unit_experts as reference;
use moe_kernels::rules::Activation;
use moe_kernels::{Dtype, In};

use crate::support::buffer::Guarded;
use crate::support::compare::{Arithmetic, Bounded, Storage, UNIT, assert_bounded, to_f64};
use crate::support::device;
use crate::support::inputs::{normal, normals};
use crate::timing::time;

pub fn check(dtype: Dtype, rng: &mut fastrand::Rng) {
    match dtype {
        Dtype::Bf16 => typed::<bf16>(rng),
        Dtype::F16 => typed::<f16>(rng),
        Dtype::F32 => typed::<f32>(rng),
        other => unreachable!("no kernel has {other}"),
    }
}

const ACTIVATIONS: [Activation; 5] =
    [Activation::Silu, Activation::Identity, Activation::Relu, Activation::Gelu, Activation::GeluTanh];

fn typed<T: Storage>(rng: &mut fastrand::Rng) {
    for (tokens, hidden, experts, top_k) in [
        (1, 8, 1, 1),
        (3, 64, 64, 4),
        (2, 264, 7, 33),
        (5, 512, 50, 8),
        (1, 2056, 200, 64),
        (2, 96, 300, 32),
        (1, 1048, 9, 31),
    ] {
        for activation in ACTIVATIONS {
            for with_addend in [false, true] {
                let desc = UnitExpertsDesc::new(T::DTYPE, tokens, hidden, experts, top_k).activation(activation);
                case::<T>(rng, &desc, with_addend);
            }
        }
    }
    case::<T>(rng, &UnitExpertsDesc::new(T::DTYPE, 0, 8, 1, 1), true);
}

fn case<T: Storage>(rng: &mut fastrand::Rng, desc: &UnitExpertsDesc, with_addend: bool) {
    let name = format!("{desc:?} addend={with_addend}");
    let (kernels, stream) = (device::kernels(), device::stream());
    let &UnitExpertsDesc { tokens, hidden, experts, top_k, activation, .. } = desc;
    // Some are no experts.
    let ids: Vec<i32> = (0..tokens * top_k)
        .map(|_| match rng.u32(..12) {
            0 => -1,
            1 => experts as i32,
            2 => i32::MIN,
            _ => rng.i32(0..experts as i32),
        })
        .collect();
    let weights: Vec<f32> = (0..tokens * top_k).map(|_| normal(rng) as f32).collect();
    let x = normals::<T>(rng, tokens * hidden, 1.0);
    let mut matrix = |scale: f64| {
        let mut matrix = normals::<T>(rng, experts * hidden, scale);
        // Rows that nobody chose are not read into any sum.
        let free = (0..experts).filter(|&e| !ids.contains(&(e as i32)));
        free.for_each(|e| matrix[e * hidden..][..hidden].fill(T::from_f64(f64::NAN)));
        matrix
    };
    let (input, output) = (matrix(1.5 / (hidden as f64).sqrt()), matrix(1.0));
    let addend = with_addend.then(|| normals::<T>(rng, tokens * hidden, 1.0));

    let want = reference(&x, &input, &output, &ids, &to_f64(&weights), addend.as_deref(), hidden, activation).unwrap();
    let mut bounds = Vec::with_capacity(want.len());
    for t in 0..tokens {
        // What each choice's share may be off, then the sum over choices.
        let shares: Vec<(usize, Bounded)> = (t * top_k..(t + 1) * top_k)
            .filter_map(|j| Some((usize::try_from(ids[j]).ok().filter(|&e| e < experts)?, f64::from(weights[j]))))
            .map(|(e, weight)| {
                let terms: Vec<f64> = (0..hidden)
                    .map(|i| {
                        let (w, x): (f64, f64) = (input[e * hidden + i].into(), x[t * hidden + i].into());
                        w * x
                    })
                    .collect();
                let (value, magnitude) = (terms.iter().sum::<f64>(), terms.iter().map(|term| term.abs()).sum::<f64>());
                let root = terms.iter().map(|term| term * term).sum::<f64>().sqrt();
                let product = Bounded { value, error: Arithmetic::Fma.sum_bound(hidden, value, magnitude, root) };
                let unit = Bounded::activated(activation, product, None);
                let share = unit.value * weight;
                (e, Bounded { value: share, error: unit.error * weight.abs() + UNIT * share.abs() })
            })
            .collect();
        for i in 0..hidden {
            let of = |e: usize| -> f64 { output[e * hidden + i].into() };
            let addend: f64 = addend.as_ref().map_or(0.0, |addend| addend[t * hidden + i].into());
            let magnitude = addend.abs() + shares.iter().map(|(e, share)| (share.value * of(*e)).abs()).sum::<f64>();
            let moved: f64 = shares.iter().map(|(e, share)| share.error * of(*e).abs()).sum();
            bounds.push(moved + (top_k + 1) as f64 * UNIT * magnitude);
        }
    }

    let on_device = |name, list: &[T]| Guarded::input(&stream, name, list);
    let (x, input, output) = (on_device("x", &x), on_device("input", &input), on_device("output", &output));
    let addend = addend.map(|list| on_device("addend", &list));
    let ids = Guarded::input(&stream, "ids", &ids);
    let weights = Guarded::input(&stream, "weights", &weights);
    let mut y = Guarded::<T>::output(&stream, "y", tokens * hidden);
    let mut launch = || {
        y.reset(&stream);
        let (x, input, output, ids, weights) = (x.view(), input.view(), output.view(), ids.view(), weights.view());
        let (addend, mut to) = (addend.as_ref().map(Guarded::view), y.view_mut());
        let mut args = UnitExpertsArgs::new(&x, [In::from(&input), In::from(&output)], &ids, &weights, &mut to);
        args.addend = addend.as_ref().map(In::from);
        unit_experts::forward(kernels, &stream, desc, args).unwrap();
        y.read(&stream)
    };
    let got = launch();
    assert_bounded(&name, &to_f64(&got), &want, &bounds, desc.dtype);
    assert!(launch() == got, "{name}: another run gave other bits");
    time(&stream, &name, || drop(launch()));
}
