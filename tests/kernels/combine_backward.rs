//! Checks of `combine_backward_*`.

use cudarc::driver::DeviceRepr;
use half::{bf16, f16};
use moe_kernels::experts::SlotShape;
use moe_kernels::experts::combine_backward::{self, CombineBackwardArgs, CombineBackwardDesc};
use moe_kernels::reference::combine::combine_backward as reference;
use moe_kernels::registry::{Combine, Kernel};
use moe_kernels::{Dtype, Error, In, Out};

use crate::rows::Rows;
use crate::support::buffer::Guarded;
use crate::support::compare::{Arithmetic, Storage, assert_sums, to_f64};
use crate::support::device;
use crate::support::inputs::normals;
use crate::timing::time;

pub fn check(variant: Combine, rng: &mut fastrand::Rng) {
    match variant.dtype {
        Dtype::Bf16 => check_as::<bf16>(variant, rng),
        Dtype::F16 => check_as::<f16>(variant, rng),
        Dtype::F32 => check_as::<f32>(variant, rng),
        other => unreachable!("no kernel has {other}"),
    }
}

fn check_as<T: Storage>(variant: Combine, rng: &mut fastrand::Rng) {
    let shapes = if variant.any {
        [(1, 1, 1), (7, 2, 100), (130, 8, 7), (3, 5, 1027), (65, 3, 341), (4300, 2, 3)]
    } else {
        [(1, 1, 8), (7, 2, 104), (130, 8, 96), (3, 5, 1032), (65, 3, 264), (4300, 2, 8)]
    };
    for (tokens, top_k, hidden) in shapes {
        for asked in 1..4 {
            for weighted in [false, true] {
                case::<T>(variant, rng, [tokens, top_k, hidden], asked, weighted);
            }
        }
    }
    refusals::<T>();
}

/// Bits of `asked`: rows, weights.
fn case<T: Storage + DeviceRepr>(
    variant: Combine,
    rng: &mut fastrand::Rng,
    [tokens, top_k, hidden]: [usize; 3],
    asked: u32,
    weighted: bool,
) {
    let (kernels, stream) = (device::kernels(), device::stream());
    // Rows of nobody among the others, and rows behind the last.
    let slots = tokens * top_k + 5;
    let live = slots - rng.usize(..5);
    let mut order: Vec<i32> = (0..live as i32).collect();
    rng.shuffle(&mut order);
    let token_slot: Vec<i32> = (0..tokens * top_k).map(|j| if rng.u32(..5) == 0 { -1 } else { order[j] }).collect();
    let mut slot_token = vec![-1; live];
    for (j, &row) in token_slot.iter().enumerate().filter(|&(_, &row)| row >= 0) {
        slot_token[row as usize] = (j / top_k) as i32;
    }
    let scale = if rng.bool() { 1.0 } else { 0.75 };
    let name = format!("T={tokens} k={top_k} H={hidden} asked={asked} weighted={weighted} scale={scale} live={live}");

    let dy: Vec<T> = normals(rng, tokens * hidden, 1.0);
    // What no token's row is must not be read.
    let mut y_slots = vec![T::from_f64(f64::NAN); slots * hidden];
    let mut slot_weight = vec![f32::NAN; slots];
    for &row in token_slot.iter().filter(|&&row| row >= 0) {
        y_slots[row as usize * hidden..][..hidden].copy_from_slice(&normals::<T>(rng, hidden, 1.0));
        slot_weight[row as usize] = rng.f32() - 0.5;
    }
    let weights: Vec<f64> =
        token_slot.iter().map(|&row| usize::try_from(row).map_or(0.0, |row| slot_weight[row].into())).collect();
    let of = |f: fn(f64) -> f64| {
        let of = |values: Vec<f64>| values.into_iter().map(f).collect::<Vec<_>>();
        let weights = weighted.then(|| of(weights.clone()));
        let gradient =
            reference(&of(to_f64(&y_slots)), &token_slot, weights.as_deref(), &of(to_f64(&dy)), top_k, hidden).unwrap();
        let scaled = |values: Vec<f64>| values.into_iter().map(|v| v * scale).collect::<Vec<_>>();
        let mut by_row = vec![0.0; live];
        for (&row, &weight) in token_slot.iter().zip(&gradient.weights).filter(|&(&row, _)| row >= 0) {
            by_row[row as usize] = weight;
        }
        (scaled(gradient.y_slots), scaled(by_row))
    };
    let ((want_rows, want_weights), (size_rows, size_weights)) = (of(|v| v), of(f64::abs));

    let shape = SlotShape::new(tokens, 2, Some(top_k), slots, 16, 0);
    let desc = CombineBackwardDesc::new(variant.dtype, shape, hidden).scale(scale as f32);
    let selection = combine_backward::select(&desc, kernels.device()).unwrap();
    assert_eq!(selection.kernel.variant(), Kernel::CombineBackward(variant));
    let dispatched =
        Rows { slot_token, offsets: vec![0, 1, live as i32], ..Rows::default() }.dispatched(&stream, &shape);
    let shift = |elements: usize| if variant.any { elements } else { 0 };
    let dy = Guarded::shifted_input(&stream, "dy", &dy, shift(1));
    let y_slots = Guarded::shifted_input(&stream, "y_slots", &y_slots, shift(3));
    let slot_weight = Guarded::input(&stream, "slot_weight", &slot_weight);
    let junk = vec![Guarded::<T>::junk(); slots * hidden];
    let mut d_rows = Guarded::filled_output(&stream, "d_y_slots", &junk, shift(5));
    let mut d_weights = Guarded::<f32>::output(&stream, "d_slot_weight", slots);
    let launch = |d_rows: &mut Guarded<T>, d_weights: &mut Guarded<f32>| {
        let (dy, y_slots, slot_weight) = (dy.view(), y_slots.view(), slot_weight.view());
        let (mut d_rows, mut d_weights) = (d_rows.view_mut(), d_weights.view_mut());
        let mut args = CombineBackwardArgs::new(&dy, &dispatched);
        args.slot_weight = weighted.then(|| In::from(&slot_weight));
        if asked & 1 != 0 {
            args.d_y_slots = Some(Out::from(&mut d_rows));
        }
        if asked & 2 != 0 {
            args = args.y_slots(&y_slots);
            args.d_slot_weight = Some(Out::from(&mut d_weights));
        }
        combine_backward::forward(kernels, &stream, &desc, args).unwrap();
    };
    launch(&mut d_rows, &mut d_weights);
    let (rows, weights) = (d_rows.read(&stream), d_weights.read(&stream));
    if asked & 1 != 0 {
        let (there, behind) = rows.split_at(live * hidden);
        let bounds: Vec<f64> = size_rows.iter().map(|&m| Arithmetic::Fma.sum_bound(2, m, m, m)).collect();
        let there_bounds = &bounds[..live * hidden];
        assert_sums(&format!("{name}: rows"), &to_f64(there), &want_rows[..live * hidden], there_bounds, variant.dtype);
        let junk = |value: &T| bytemuck::bytes_of(value) == bytemuck::bytes_of(&Guarded::<T>::junk());
        assert!(behind.iter().all(junk), "{name}: a row behind the last was written");
    } else {
        d_rows.assert_unchanged(&stream);
    }
    if asked & 2 != 0 {
        let (there, behind) = weights.split_at(live);
        let bounds: Vec<f64> = size_weights.iter().map(|&m| Arithmetic::Fma.sum_bound(hidden + 2, m, m, m)).collect();
        assert_sums(&format!("{name}: weights"), &to_f64(there), &want_weights, &bounds, Dtype::F32);
        let junk = |value: &f32| value.to_bits() == Guarded::<f32>::junk().to_bits();
        assert!(behind.iter().all(junk), "{name}: a weight behind the last was written");
    } else {
        d_weights.assert_unchanged(&stream);
    }
    time(&stream, &name, || launch(&mut d_rows, &mut d_weights));
    d_rows.reset(&stream);
    d_weights.reset(&stream);
    launch(&mut d_rows, &mut d_weights);
    let same = bytemuck::cast_slice::<T, u8>(&d_rows.read(&stream)) == bytemuck::cast_slice::<T, u8>(&rows);
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert!(same && bits(&d_weights.read(&stream)) == bits(&weights), "{name}: another run gave other bits");
    dy.assert_unchanged(&stream);
    y_slots.assert_unchanged(&stream);
    slot_weight.assert_unchanged(&stream);
}

fn refusals<T: Storage + DeviceRepr>() {
    let (kernels, stream) = (device::kernels(), device::stream());
    let shape = SlotShape::new(2, 1, Some(1), 2, 16, 0);
    let desc = CombineBackwardDesc::new(T::DTYPE, shape, 8);
    let rows = Rows { slot_token: vec![0, 1], offsets: vec![0, 2], ..Rows::default() }.dispatched(&stream, &shape);
    let dy = stream.alloc_zeros::<T>(16).unwrap();
    let mut weights = stream.alloc_zeros::<f32>(2).unwrap();
    let fault = |desc: &CombineBackwardDesc, args: CombineBackwardArgs<'_, T>| -> Error {
        combine_backward::forward(kernels, &stream, desc, args).unwrap_err()
    };
    let args = || CombineBackwardArgs::new(&dy, &rows);
    assert_eq!(fault(&desc, args().d_slot_weight(&mut weights)).argument(), Some("y_slots"));
    assert_eq!(fault(&desc, args().y_slots(&dy)).argument(), Some("y_slots"));
    let other = SlotShape::new(3, 1, Some(1), 2, 16, 0);
    assert_eq!(fault(&CombineBackwardDesc::new(T::DTYPE, other, 8), args()).argument(), Some("dispatched"));
    let mut short = stream.alloc_zeros::<T>(15).unwrap();
    assert_eq!(fault(&desc, args().d_y_slots(&mut short)).argument(), Some("d_y_slots"));
}
