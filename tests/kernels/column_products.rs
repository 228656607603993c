//! Checks of `column_products_*` without factors of rows; with them behind `rms_norm_backward`.

use half::{bf16, f16};
use moe_kernels::experts::column_products::{self, ColumnProductsDesc};
use moe_kernels::experts::rms_norm_backward::{Gradient, RmsNormBackwardDesc};
use moe_kernels::reference::column_products::column_products as reference;
use moe_kernels::rules::{Gain, RmsNorm};
use moe_kernels::{Dtype, In};

use crate::rms_norm_backward::case as of_norm;
use crate::support::buffer::Guarded;
use crate::support::compare::{Storage, UNIT, assert_bounded, to_f64};
use crate::support::device;
use crate::support::inputs::normals;
use crate::timing::time;

pub fn check(dtype: Dtype, rng: &mut fastrand::Rng) {
    match dtype {
        Dtype::Bf16 => typed::<bf16>(rng),
        Dtype::F16 => typed::<f16>(rng),
        Dtype::F32 => typed::<f32>(rng),
        other => unreachable!("no kernel has {other}"),
    }
}

fn typed<T: Storage>(rng: &mut fastrand::Rng) {
    // No rows, fewer than warps, than a batch of them, and several batches with an end of every kind; parts of a warp's columns, and two warps'.
    for rows in [0, 1, 31, 32, 33, 96, 127, 129, 300] {
        for width in [1, 7, 32, 65] {
            case::<T>(rng, &ColumnProductsDesc::new(T::DTYPE, rows, width));
            case::<T>(rng, &ColumnProductsDesc::new(T::DTYPE, rows, width).gradient(Dtype::F32));
            case::<T>(rng, &ColumnProductsDesc::new(T::DTYPE, rows, width).accumulate(true));
        }
    }
    // With factors of rows, weights of columns, and rows by way of tokens.
    for (rows, width) in [(140, 33), (33, 8), (300, 40)] {
        for gain in [Gain::Weight, Gain::OnePlus, Gain::OnePlusFirst, Gain::OnePlusFirst] {
            of_norm::<T>(rng, &RmsNormBackwardDesc::new(T::DTYPE, rows, width, RmsNorm::new(1e-5).gain(gain)));
        }
    }
}

fn case<T: Storage>(rng: &mut fastrand::Rng, desc: &ColumnProductsDesc) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let (rows, width) = (desc.rows, desc.width);
    let (x, d) = (normals::<T>(rng, rows * width, 1.0), normals::<T>(rng, rows * width, 1e-5));
    let wide: Vec<f32> = normals(rng, rows * width, 1e-5);
    let to_f32 = desc.gradient != desc.dtype;
    let d_values = if to_f32 { to_f64(&wide) } else { to_f64(&d) };
    let mut want = reference(&x, &d_values, width, None, None, |_| true).unwrap();
    let held: Vec<f32> = normals(rng, width, 1e-5);
    if desc.accumulate {
        want.iter_mut().zip(&held).for_each(|(want, held)| *want += f64::from(*held));
    }
    let (x_on_device, d, wide) =
        (Guarded::input(&stream, "x", &x), Guarded::input(&stream, "d", &d), Guarded::input(&stream, "d", &wide));
    let mut out = match desc.accumulate {
        true => Guarded::filled_output(&stream, "out", &held, 0),
        false => Guarded::<f32>::output(&stream, "out", width),
    };
    let mut launch = || {
        out.reset(&stream);
        let (x, d, wide) = (x_on_device.view(), d.view(), wide.view());
        let gradient = if to_f32 { Gradient::F32(In::from(&wide)) } else { Gradient::Rounded(In::from(&d)) };
        column_products::sum::<T>(kernels, &stream, desc, &x, gradient, &mut out.view_mut()).unwrap();
        out.read(&stream)
    };
    let got = launch();
    let name = format!("{desc:?}");
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
    assert_eq!(bits(&launch()), bits(&got), "{name}: another run gave other bits");
    time(&stream, &name, || drop(launch()));
    x_on_device.assert_unchanged(&stream);
    // The last addition.
    let mut bounds: Vec<f64> =
        held.iter().map(|held| if desc.accumulate { UNIT * f64::from(held.abs()) } else { 0.0 }).collect();
    for (i, (&x, d)) in x.iter().zip(&d_values).enumerate() {
        let x: f64 = x.into();
        // A product, a warp's additions and those of the warps.
        bounds[i % width] += (rows as f64 / 32.0 + 35.0) * UNIT * (x * d).abs();
    }
    assert_bounded(&name, &to_f64(&got), &want, &bounds, Dtype::F32);
}
