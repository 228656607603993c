//! Checks of `combine_*`.

use half::{bf16, f16};
use moe_kernels::experts::SlotShape;
use moe_kernels::experts::combine::{self, CombineArgs, CombineDesc, Identity};
use moe_kernels::registry::{Combine, Kernel};
use moe_kernels::{Dtype, In, reference};

use crate::ids::{self, Stored};
use crate::rows::Rows;
use crate::support::buffer::Guarded;
use crate::support::compare::{Arithmetic, FEW_ROUNDINGS, Storage, assert_sums, to_f64};
use crate::support::device;
use crate::support::inputs::{normal, normals};
use crate::timing::time;

pub fn check(variant: Combine, rng: &mut fastrand::Rng) {
    of_dtype(variant, false, rng);
}

/// Of sums that are there, in place of rows.
pub fn check_sums(variant: Combine, rng: &mut fastrand::Rng) {
    of_dtype(variant, true, rng);
}

fn of_dtype(variant: Combine, sums: bool, rng: &mut fastrand::Rng) {
    match variant.dtype {
        Dtype::Bf16 => check_as::<bf16>(variant, sums, rng),
        Dtype::F16 => check_as::<f16>(variant, sums, rng),
        Dtype::F32 => check_as::<f32>(variant, sums, rng),
        other => unreachable!("no kernel has {other}"),
    }
}

fn check_as<T: Storage>(variant: Combine, sums: bool, rng: &mut fastrand::Rng) {
    let shapes = if variant.any {
        [(1, 1, 1), (1, 32, 2057), (7, 2, 100), (130, 8, 7), (3, 5, 4100), (65, 3, 341)]
    } else {
        [(1, 1, 8), (1, 32, 2056), (7, 2, 104), (130, 8, 96), (3, 5, 4104), (65, 3, 2048)]
    };
    for (tokens, top_k, hidden) in shapes {
        // Weights are those of rows.
        for options in (0..32).step_by(if sums { 2 } else { 1 }) {
            case::<T>(variant, sums, rng, [tokens, top_k, hidden], options);
        }
    }
}

/// Bits of `options`: weights, residual, addend, identity experts, factors and a bias.
fn case<T: Storage>(
    variant: Combine,
    sums: bool,
    rng: &mut fastrand::Rng,
    [tokens, top_k, hidden]: [usize; 3],
    options: u32,
) {
    let kernels = device::kernels();
    let stream = device::stream();
    let name = format!("T={tokens} k={top_k} H={hidden} options={options:05b}");
    // More rows than choices, and rows that no choice refers to hold NaN: they must not be read into any sum.
    let slots = tokens * top_k + 3;
    let mut order: Vec<i32> = (0..slots as i32).collect();
    rng.shuffle(&mut order);
    let token_slot: Vec<i32> =
        order[..tokens * top_k].iter().map(|&slot| if rng.u32(..5) == 0 { -1 } else { slot }).collect();
    let mut y_slots = vec![T::from_f64(f64::NAN); slots * hidden];
    for &slot in token_slot.iter().filter(|&&slot| slot >= 0) {
        y_slots[slot as usize * hidden..][..hidden].copy_from_slice(&normals::<T>(rng, hidden, 1.0));
    }
    let summed: Vec<f32> = normals(rng, if sums { tokens * hidden } else { 0 }, 2.0);
    let weights: Option<Vec<f32>> =
        (options & 1 != 0).then(|| (0..tokens * top_k).map(|_| normal(rng) as f32).collect());
    let mut rows = |bit: u32| (options & bit != 0).then(|| normals::<T>(rng, tokens * hidden, 1.0));
    let (residual, addend, mut identity) = (rows(2), rows(4), rows(8));
    // A shared expert's gate, of either sign.
    let gate: Option<Vec<f32>> = (addend.is_some() && rng.bool()).then(|| normals(rng, tokens, 2.0));
    let bias: Option<Vec<T>> = (options & 16 != 0).then(|| normals(rng, hidden, 1.0));
    let mut factor = || if options & 16 != 0 && rng.u32(..4) != 0 { normal(rng) as f32 } else { 1.0 };
    let [scale, addend_scale] = [factor(), factor()];
    // A third of the tokens have no identity expert: their x is not read. Which ones they are, choices say, or a weight alone.
    let by_choices = rng.bool();
    let identities = 5..9;
    let ids: Vec<i32> = (0..tokens)
        .flat_map(|_| {
            let from = if rng.u32(..3) == 0 { [-1, 0, 4, 9] } else { [-1, 5, 8, 9] };
            (0..top_k).map(|_| from[rng.usize(..4)]).collect::<Vec<_>>()
        })
        .collect();
    let choice_weights: Vec<f32> = normals(rng, tokens * top_k, 1.0);
    let identity_weight: Vec<f32> = if by_choices {
        let sums = reference::combine::identity_weight(&ids, &to_f64(&choice_weights), top_k, identities.clone());
        sums.unwrap().into_iter().map(|sum| sum as f32).collect()
    } else {
        (0..tokens).map(|_| if rng.u32(..3) == 0 { 0.0 } else { normal(rng) as f32 }).collect()
    };
    if let Some(identity) = &mut identity {
        for (row, &weight) in identity.chunks_mut(hidden).zip(&identity_weight) {
            if weight == 0.0 {
                row.fill(T::from_f64(f64::NAN));
            }
        }
    }

    let sum = |f: fn(f64) -> f64| {
        let of = |values: Vec<f64>| values.into_iter().map(f).collect::<Vec<_>>();
        let [weights, residual, addend] =
            [weights.as_deref().map(to_f64), residual.as_deref().map(to_f64), addend.as_deref().map(to_f64)]
                .map(|values| values.map(of));
        let addend = addend.map(|mut addend| {
            gate.iter().for_each(|gate| reference::combine::gate_addend(&mut addend, &to_f64(gate)).unwrap());
            addend
        });
        let weights = weights.as_deref();
        let y_slots = of(to_f64(&y_slots));
        let mut sum = match sums {
            true => of(to_f64(&summed)),
            false => reference::combine::combine::<f64, f64>(&y_slots, &token_slot, weights, None, None, top_k, hidden)
                .unwrap(),
        };
        if let Some(identity) = &identity {
            let weight = match by_choices {
                true => {
                    reference::combine::identity_weight(&ids, &of(to_f64(&choice_weights)), top_k, identities.clone())
                }
                false => Ok(of(to_f64(&identity_weight))),
            };
            reference::combine::add_identity(&mut sum, &of(to_f64(identity)), &weight.unwrap()).unwrap();
        }
        let (residual, addend) = (residual.as_deref(), addend.as_deref());
        let (bias, factors) =
            (bias.as_deref().map(|bias| of(to_f64(bias))), [scale, addend_scale].map(|v| f(v.into())));
        reference::combine::add_around(&mut sum, factors, bias.as_deref(), residual, addend).unwrap();
        sum
    };
    let (want, magnitudes) = (sum(|v| v), sum(f64::abs));
    let sigmoid = if gate.is_some() { FEW_ROUNDINGS } else { 0.0 };
    let bounds: Vec<f64> =
        magnitudes.iter().map(|&m| Arithmetic::Fma.sum_bound(2 * top_k + 6, m, m, m) + sigmoid * m).collect();

    let shape = SlotShape::new(tokens, 1, Some(top_k), slots, 16, 0);
    let desc = CombineDesc::new(variant.dtype, shape, hidden).scale(scale).addend_scale(addend_scale).sums(sums);
    let kernel = if sums { Kernel::CombineSums(variant) } else { Kernel::Combine(variant) };
    assert_eq!(combine::select(&desc, kernels.device()).unwrap().kernel.variant(), kernel);
    // Where rows begin on any element, so do buffers.
    let shift = |elements: usize| if variant.any { elements } else { 0 };
    let y_slots = Guarded::shifted_input(&stream, "y_slots", &y_slots, shift(1));
    let summed = Guarded::shifted_input(&stream, "sums", &summed, shift(1));
    let dispatched = Rows { token_slot, ..Rows::default() }.dispatched(&stream, &shape);
    let weights = weights.map(|values| Guarded::input(&stream, "weights", &values));
    // A residual that the sum replaces.
    let mut accumulated = residual.as_ref().map(|values| Guarded::shifted_input(&stream, "y", values, shift(3)));
    let residual = residual.map(|values| Guarded::shifted_input(&stream, "residual", &values, shift(5)));
    let addend = addend.map(|values| Guarded::shifted_input(&stream, "addend", &values, shift(7)));
    let gate = gate.map(|values| Guarded::input(&stream, "addend_gate", &values));
    let identity = identity.map(|values| Guarded::shifted_input(&stream, "identity", &values, shift(1)));
    let identity_weight =
        Guarded::input(&stream, "identity_weight", if by_choices { &choice_weights } else { &identity_weight });
    let bytes = [4, 8][rng.usize(..2)];
    let format = ids::format(rng, bytes);
    let ids = Stored::new(&stream, rng, format, &ids, identities.end as usize);
    let bias = bias.map(|values| Guarded::shifted_input(&stream, "bias", &values, shift(3)));
    let junk = vec![Guarded::<T>::junk(); tokens * hidden];
    let mut y = Guarded::filled_output(&stream, "y", &junk, shift(1));
    let launch = |y: &mut Guarded<T>, accumulate: bool| {
        let (rows, identity_weight, mut y) = (y_slots.view(), identity_weight.view(), y.view_mut());
        let summed = summed.view();
        let weights = weights.as_ref().map(Guarded::view);
        let [residual, addend, identity] =
            [&residual, &addend, &identity].map(|buffer| buffer.as_ref().map(Guarded::view));
        let gate = gate.as_ref().map(Guarded::view);
        let mut args = match sums {
            true => CombineArgs::of_sums(&summed, &dispatched, &mut y),
            false => CombineArgs::new(&rows, &dispatched, &mut y),
        };
        args.addend_gate = gate.as_ref().map(In::from);
        args.weights = weights.as_ref().map(In::from);
        args.addend = addend.as_ref().map(In::from);
        let bias = bias.as_ref().map(Guarded::view);
        let numbers = identities.start as u32..identities.end as u32;
        args.bias = bias.as_ref().map(In::from);
        if accumulate {
            args = args.accumulate();
        } else {
            args.residual = residual.as_ref().map(In::from);
        }
        ids.with(|ids| {
            let mut args = args;
            args.identity = identity.as_ref().map(|x| match by_choices {
                true => Identity::of_choices(x, ids, &identity_weight, numbers),
                false => Identity::new(x, &identity_weight),
            });
            combine::forward(kernels, &stream, &desc, args).unwrap()
        })
    };
    launch(&mut y, false);
    let first = y.read(&stream);
    assert_sums(&name, &to_f64(&first), &want, &bounds, variant.dtype);
    y_slots.assert_unchanged(&stream);
    summed.assert_unchanged(&stream);
    time(&stream, &name, || launch(&mut y, false));
    y.reset(&stream);
    launch(&mut y, false);
    assert!(y.read(&stream) == first, "{name}: another run gave other bits");
    if let Some(y) = &mut accumulated {
        launch(y, true);
        assert!(y.read(&stream) == first, "{name}: onto the residual other bits");
    }
}
