//! Checks of `rms_norm_*`.

use half::{bf16, f16};
use moe_kernels::experts::rms_norm::{self, RmsNormArgs, RmsNormDesc};
use moe_kernels::experts::{Dispatched, SlotShape};
use moe_kernels::reference::rms_norm::{Rows, rms_norm as reference};
use moe_kernels::rules::{Gain, RmsNorm};
use moe_kernels::{Dtype, In, Out};

use crate::rows::Rows as Lists;
use crate::support::buffer::Guarded;
use crate::support::compare::{Storage, UNIT, assert_bounded, to_f64, unit_roundoff};
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

const GAINS: [Gain; 4] = [Gain::One, Gain::Weight, Gain::OnePlus, Gain::OnePlusFirst];

fn typed<T: Storage>(rng: &mut fastrand::Rng) {
    // Fewer elements than a vector, ends of every length, a warp, several warps and a block a row; rows that are read twice.
    let ragged = (1..=9).map(|width| (33, width)).chain([(17, 36), (9, 301), (2, 8197)]);
    let whole = [(1, 16), (40, 80), (17, 256), (9, 264), (5, 1024), (3, 4104), (2, 8200)];
    for (i, (rows, width)) in ragged.chain(whole).enumerate() {
        for gain in GAINS {
            let norm = RmsNorm::new(1e-5).gain(gain).factor(if i % 2 == 0 { 1.0 } else { 0.37 });
            case::<T>(rng, &RmsNormDesc::new(T::DTYPE, rows, width, norm));
        }
    }
    case::<T>(rng, &RmsNormDesc::new(T::DTYPE, 0, 8, RmsNorm::new(0.0)));
    epsilon_keeps_zeros::<T>();
}

/// Operands of a case, each there or not.
struct Operands<T> {
    weight: Option<Vec<T>>,
    addend: Option<Vec<T>>,
    scale: Option<Vec<T>>,
    residual: Option<Vec<T>>,
    row_scale: Option<Vec<f32>>,
    /// Rows of a dispatch: each one's token, and how many there are.
    rows: Option<(Vec<i32>, i32)>,
}

fn case<T: Storage>(rng: &mut fastrand::Rng, desc: &RmsNormDesc) {
    let (rows, width) = (desc.rows, desc.width);
    let magnitude = 10f64.powf(rng.f64() * 2.0 - 1.0);
    let mut x = normals::<T>(rng, rows * width, magnitude);
    // Some rows are shorter than what is divided by at least, some longer.
    let least = if rng.u32(..3) == 0 { (magnitude * magnitude) as f32 } else { 0.0 };
    let mut desc = *desc;
    desc.norm.least = least;
    let desc = &desc;
    // Rows without a number, or with an infinite one, spoil no other.
    if rows > 4 {
        x[rng.usize(0..width)] = T::from_f64(f64::NAN);
        x[3 * width + rng.usize(0..width)] = T::from_f64(f64::INFINITY);
    }
    let with = |rng: &mut fastrand::Rng, is: bool, len: usize| is.then(|| normals::<T>(rng, len, 1.0));
    let has_addend = rng.bool();
    let (has_scale, has_residual) = (has_addend && rng.bool(), rng.bool());
    let operands = Operands {
        weight: with(rng, desc.norm.gain.has_weight(), width),
        addend: with(rng, has_addend, rows * width),
        scale: with(rng, has_scale, width),
        residual: with(rng, has_residual, rows * width),
        row_scale: rng.bool().then(|| (0..rows).map(|_| normal(rng) as f32).collect()),
        rows: (rows > 0 && rng.bool()).then(|| {
            let tokens = (0..rows).map(|_| if rng.u32(..5) == 0 { -1 } else { 0 }).collect();
            (tokens, rng.i32(0..=rows as i32))
        }),
    };
    let name = format!(
        "{desc:?} addend={has_addend} scale={has_scale} residual={has_residual} row_scale={} rows={:?}",
        operands.row_scale.is_some(),
        operands.rows
    );
    compare(&name, desc, &x, &operands, false);
    compare(&format!("{name} to f32"), &desc.output(Dtype::F32), &x, &operands, false);
    if !has_addend {
        compare(&format!("{name} in place"), desc, &x, &operands, true);
    }
}

fn compare<T: Storage>(name: &str, desc: &RmsNormDesc, x: &[T], operands: &Operands<T>, in_place: bool) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let (rows, width) = (desc.rows, desc.width);
    let row_scale = operands.row_scale.as_deref().map(to_f64);
    let want = reference(
        &Rows {
            x,
            width,
            weight: operands.weight.as_deref(),
            addend: operands.addend.as_deref(),
            addend_scale: operands.scale.as_deref(),
            row_scale: row_scale.as_deref(),
            residual: operands.residual.as_deref(),
        },
        &desc.norm,
    )
    .unwrap();

    let input = |name, list: &Option<Vec<T>>| list.as_ref().map(|list| Guarded::input(&stream, name, list));
    let x_on_device = Guarded::input(&stream, "x", x);
    let weight = input("weight", &operands.weight);
    let addend = input("addend", &operands.addend);
    let scale = input("addend_scale", &operands.scale);
    let residual = input("residual", &operands.residual);
    let factors = operands.row_scale.as_ref().map(|list| Guarded::input(&stream, "row_scale", list));
    let dispatched: Option<Dispatched> = operands.rows.as_ref().map(|(slot_token, last)| {
        let shape = SlotShape::new(1, 1, Some(1), rows, 16, 0);
        let lists = Lists { slot_token: slot_token.clone(), offsets: vec![0, *last], ..Lists::default() };
        lists.dispatched(&stream, &shape)
    });
    let mut y = if in_place { Guarded::input(&stream, "y", x) } else { Guarded::output(&stream, "y", rows * width) };
    let mut y_f32 = Guarded::<f32>::output(&stream, "y", rows * width);
    let mut sum = Guarded::<T>::output(&stream, "sum", rows * width);
    let to_f32 = desc.output != desc.dtype;
    let mut launch = || {
        y.reset(&stream);
        y_f32.reset(&stream);
        let [weight, addend, scale, residual] =
            [&weight, &addend, &scale, &residual].map(|list| list.as_ref().map(Guarded::view));
        let (x, mut to, mut wide, mut kept) = (x_on_device.view(), y.view_mut(), y_f32.view_mut(), sum.view_mut());
        let factors = factors.as_ref().map(Guarded::view);
        let mut args = match (to_f32, in_place) {
            (true, _) => RmsNormArgs::to_f32(&x, &mut wide),
            (false, true) => RmsNormArgs::in_place(&mut to),
            (false, false) => RmsNormArgs::new(&x, &mut to),
        };
        args.weight = weight.as_ref().map(Into::into);
        args.addend = addend.as_ref().map(In::from);
        args.addend_scale = scale.as_ref().map(Into::into);
        args.residual = residual.as_ref().map(In::from);
        args.row_scale = factors.as_ref().map(In::from);
        args.dispatched = dispatched.as_ref();
        if addend.is_some() {
            args.sum = Some(Out::from(&mut kept));
        }
        rms_norm::forward(kernels, &stream, desc, args).unwrap();
        let (y, wide) = (y.read(&stream), y_f32.read(&stream));
        if to_f32 { (bits(&wide), to_f64(&wide)) } else { (bits(&y), to_f64(&y)) }
    };
    let (got_bits, got) = launch();
    assert!(launch().0 == got_bits, "{name}: another run gave other bits");
    time(&stream, name, || drop(launch()));
    x_on_device.assert_unchanged(&stream);
    let got_sum = sum.read(&stream);

    let (sums, rounded) =
        (unit_roundoff(desc.dtype), operands.addend.is_some() || desc.norm.gain == Gain::OnePlusFirst);
    for r in 0..rows {
        let live = operands.rows.as_ref().is_none_or(|(tokens, last)| (r as i32) < *last && tokens[r] >= 0);
        let range = r * width..(r + 1) * width;
        if !live {
            let bytes = got_bits.len() / (rows * width);
            let before = if in_place { bits(&x[range.clone()]) } else { vec![0xff; width * bytes] };
            assert!(got_bits[range.start * bytes..range.end * bytes] == before, "{name}: row {r} is not to be written");
            continue;
        }
        if let Some(addend) = &operands.addend {
            // One fused operation, rounded once more to 16 bits.
            let exact = |i: usize| {
                let scale: f64 = operands.scale.as_ref().map_or(1.0, |list| list[i % width].into());
                let (x, addend): (f64, f64) = (x[i].into(), addend[i].into());
                x + scale * addend
            };
            let sums: Vec<f64> = range.clone().map(exact).collect();
            let bounds: Vec<f64> = sums.iter().map(|sum| UNIT * sum.abs()).collect();
            let got = to_f64(&got_sum[range.clone()]);
            assert_bounded(&format!("{name}: sum of row {r}"), &got, &sums, &bounds, desc.dtype);
        }
        let (got, want) = (&got[range.clone()], &want.y[range.clone()]);
        // A mean is off by half of what its additions and roundings are, with a square root that approximates to 2^-22.4; five products. What is
        // rounded to the type in between may be a neighbour of the reference's: one unit, and so much of the mean.
        let additions = (width as f64 / 32.0).min(24.0) + 24.0;
        let units = 0.5 * additions + 3.1 + 6.0;
        let between = if rounded { 2.0 * sums } else { 0.0 };
        let bounds: Vec<f64> = range
            .clone()
            .zip(want)
            .map(|(i, want)| {
                let residual = operands.residual.as_ref().map_or(0.0, |list| list[i].into());
                (units * UNIT + between) * (want - residual).abs() + UNIT * want.abs()
            })
            .collect();
        assert_bounded(&format!("{name}: row {r}"), got, want, &bounds, desc.output);
    }
}

fn bits<T: bytemuck::Pod>(values: &[T]) -> Vec<u8> {
    bytemuck::cast_slice::<T, u8>(values).to_vec()
}

/// A row of zeros is zeros for any epsilon above 0.
fn epsilon_keeps_zeros<T: Storage>() {
    let desc = RmsNormDesc::new(T::DTYPE, 1, 8, RmsNorm::new(1e-8).gain(Gain::One));
    let operands = Operands { weight: None, addend: None, scale: None, residual: None, row_scale: None, rows: None };
    compare("zeros", &desc, &[T::from_f64(0.0); 8], &operands, false);
}
