//! Checks of `combine_*`.

use half::{bf16, f16};
use moe_kernels::experts::combine::{self, CombineArgs, CombineDesc, Identity};
use moe_kernels::reference;
use moe_kernels::registry::{Combine, Kernel};
use moe_kernels::rules::Dtype;

use crate::support::buffer::Guarded;
use crate::support::compare::{Arithmetic, Storage, assert_sums, to_f64};
use crate::support::device;
use crate::support::inputs::{normal, normals};
use crate::timing::time;

pub fn check(variant: Combine, rng: &mut fastrand::Rng) {
    match variant.dtype {
        Dtype::Bf16 => check_as::<bf16>(variant, rng),
        Dtype::F16 => check_as::<f16>(variant, rng),
        Dtype::F32 => check_as::<f32>(variant, rng),
    }
}

fn check_as<T: Storage>(variant: Combine, rng: &mut fastrand::Rng) {
    for (tokens, top_k, hidden) in [(1, 1, 8), (1, 32, 2056), (7, 2, 104), (130, 8, 96), (3, 5, 4104), (65, 3, 2048)] {
        for options in 0..16 {
            case::<T>(variant, rng, [tokens, top_k, hidden], options);
        }
    }
}

/// Bits of `options`: weights, residual, addend, identity experts.
fn case<T: Storage>(variant: Combine, rng: &mut fastrand::Rng, [tokens, top_k, hidden]: [usize; 3], options: u32) {
    let kernels = device::kernels();
    let stream = device::stream();
    let name = format!("T={tokens} k={top_k} H={hidden} options={options:04b}");
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
    let weights: Option<Vec<f32>> =
        (options & 1 != 0).then(|| (0..tokens * top_k).map(|_| normal(rng) as f32).collect());
    let mut rows = |bit: u32| (options & bit != 0).then(|| normals::<T>(rng, tokens * hidden, 1.0));
    let (residual, addend, mut identity) = (rows(2), rows(4), rows(8));
    // A third of the tokens have no identity expert: their x is not read.
    let identity_weight: Vec<f32> =
        (0..tokens).map(|_| if rng.u32(..3) == 0 { 0.0 } else { normal(rng) as f32 }).collect();
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
        let mut sum = reference::combine::combine(
            &of(to_f64(&y_slots)),
            &token_slot,
            weights.as_deref(),
            residual.as_deref(),
            addend.as_deref(),
            top_k,
            hidden,
        )
        .unwrap();
        if let Some(identity) = &identity {
            reference::combine::add_identity(&mut sum, &of(to_f64(identity)), &of(to_f64(&identity_weight))).unwrap();
        }
        sum
    };
    let (want, magnitudes) = (sum(|v| v), sum(f64::abs));
    let bounds: Vec<f64> = magnitudes.iter().map(|&m| Arithmetic::Fma.sum_bound(top_k + 3, m, m, m)).collect();

    let desc = CombineDesc { dtype: variant.dtype, tokens, top_k, hidden, slots };
    assert_eq!(combine::select(&desc, kernels.device()).unwrap().kernel, Kernel::Combine(variant));
    let y_slots = Guarded::input(&stream, "y_slots", &y_slots);
    let token_slot = Guarded::input(&stream, "token_slot", &token_slot);
    let weights = weights.map(|values| Guarded::input(&stream, "weights", &values));
    let residual = residual.map(|values| Guarded::input(&stream, "residual", &values));
    let addend = addend.map(|values| Guarded::input(&stream, "addend", &values));
    let identity = identity.map(|values| Guarded::input(&stream, "identity", &values));
    let identity_weight = Guarded::input(&stream, "identity_weight", &identity_weight);
    let mut y = Guarded::<T>::output(&stream, "y", tokens * hidden);
    let views =
        (weights.as_ref().map(Guarded::view), residual.as_ref().map(Guarded::view), addend.as_ref().map(Guarded::view));
    let launch = |y: &mut Guarded<T>| {
        let mut y = y.view_mut();
        let args = CombineArgs {
            y_slots: &y_slots.view(),
            token_slot: &token_slot.view(),
            weights: views.0.as_ref().map(|view| view as _),
            residual: views.1.as_ref().map(|view| view as _),
            addend: views.2.as_ref().map(|view| view as _),
            y: &mut y,
        };
        match &identity {
            None => combine::forward(kernels, &stream, &desc, args),
            Some(x) => {
                let identity = Identity { x: &x.view(), weight: &identity_weight.view() };
                combine::forward_with_identity(kernels, &stream, &desc, args, identity)
            }
        }
        .unwrap()
    };
    launch(&mut y);
    let first = y.read(&stream);
    assert_sums(&name, &to_f64(&first), &want, &bounds, variant.dtype);
    y_slots.assert_unchanged(&stream);
    token_slot.assert_unchanged(&stream);
    time(&stream, &name, || launch(&mut y));
    y.reset(&stream);
    launch(&mut y);
    assert!(y.read(&stream) == first, "{name}: another run gave other bits");
}
