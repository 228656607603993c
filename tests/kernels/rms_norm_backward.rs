//! Checks of `rms_norm_backward_*`, and of the sums of a weight's gradient behind it.

use half::{bf16, f16};
use moe_kernels::experts::rms_norm_backward::{self, Gradient, RmsNormBackwardArgs, RmsNormBackwardDesc};
use moe_kernels::experts::{Dispatched, SlotShape};
use moe_kernels::reference::rms_norm::{Rows, rms_norm_backward as reference};
use moe_kernels::rules::{Gain, RmsNorm};
use moe_kernels::{Dtype, In};

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
    let whole = [(1, 16), (140, 80), (17, 256), (9, 264), (5, 1024), (3, 4104), (2, 8200)];
    for (i, (rows, width)) in ragged.chain(whole).enumerate() {
        for gain in GAINS {
            let norm = RmsNorm::new(1e-5).gain(gain).factor(if i % 2 == 0 { 1.0 } else { 0.37 });
            case::<T>(rng, &RmsNormBackwardDesc::new(T::DTYPE, rows, width, norm));
        }
    }
    case::<T>(rng, &RmsNormBackwardDesc::new(T::DTYPE, 0, 8, RmsNorm::new(0.0)));
}

/// Operands of a case, each there or not.
struct Operands<T> {
    x: Vec<T>,
    /// As it is stored, widened.
    dy: Vec<f64>,
    weight: Option<Vec<T>>,
    addend_scale: Option<Vec<T>>,
    row_scale: Option<Vec<f32>>,
    held: Vec<T>,
    /// Tokens, each row's, and how many rows there are.
    gathered: Option<(usize, Vec<i32>, i32)>,
    has_addend: bool,
    /// Whether the rows' factors have gradients.
    scales: bool,
}

impl<T> Operands<T> {
    /// The row of dy that a row takes; none where there is no row.
    fn source(&self, row: usize) -> Option<usize> {
        match &self.gathered {
            None => Some(row),
            Some((_, tokens, last)) => usize::try_from(tokens[row]).ok().filter(|_| (row as i32) < *last),
        }
    }
}

pub fn case<T: Storage>(rng: &mut fastrand::Rng, desc: &RmsNormBackwardDesc) {
    let (rows, width) = (desc.rows, desc.width);
    let mut desc = *desc;
    desc.accumulate = rng.bool();
    if rng.bool() {
        desc.gradient = Dtype::F32;
    }
    let magnitude = 10f64.powf(rng.f64() * 2.0 - 1.0);
    // Some rows are shorter than what is divided by at least, some longer.
    if rng.u32(..3) == 0 {
        desc.norm.least = (magnitude * magnitude) as f32;
    }
    let gathered = (rows > 0 && rng.bool()).then(|| {
        let tokens = rng.usize(1..=rows);
        let of_rows = (0..rows).map(|_| if rng.u32(..5) == 0 { -1 } else { rng.i32(0..tokens as i32) }).collect();
        (tokens, of_rows, rng.i32(0..=rows as i32))
    });
    let sources = gathered.as_ref().map_or(rows, |(tokens, ..)| *tokens);
    let dy = normals::<f32>(rng, sources * width, 1e-4);
    let dy = dy.iter().map(|&d| if desc.gradient == Dtype::F32 { d.into() } else { T::from_f64(d.into()).into() });
    let has_addend = rng.bool();
    let operands = Operands {
        x: normals::<T>(rng, rows * width, magnitude),
        dy: dy.collect(),
        weight: desc.norm.gain.has_weight().then(|| normals::<T>(rng, width, 1.0)),
        addend_scale: (has_addend && rng.bool()).then(|| normals::<T>(rng, width, 1.0)),
        row_scale: rng.bool().then(|| (0..rows).map(|_| normal(rng) as f32).collect()),
        held: normals::<T>(rng, rows * width, 1e-4),
        gathered,
        has_addend,
        scales: rng.u32(..3) > 0,
    };
    let name = format!(
        "{desc:?} addend={has_addend} scale={} row_scale={} gathered={:?}",
        operands.addend_scale.is_some(),
        operands.row_scale.is_some(),
        operands.gathered
    );
    compare(&name, &desc, &operands);
}

fn compare<T: Storage>(name: &str, desc: &RmsNormBackwardDesc, operands: &Operands<T>) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let (rows, width) = (desc.rows, desc.width);
    let has_weight = desc.norm.gain.has_weight();

    let x = Guarded::input(&stream, "x", &operands.x);
    let rounded: Vec<T> = operands.dy.iter().map(|&d| T::from_f64(d)).collect();
    let wide: Vec<f32> = operands.dy.iter().map(|&d| d as f32).collect();
    let (dy, dy_f32) = (Guarded::input(&stream, "dy", &rounded), Guarded::input(&stream, "dy", &wide));
    let input = |name, list: &Option<Vec<T>>| list.as_ref().map(|list| Guarded::input(&stream, name, list));
    let (weight, scale) = (input("weight", &operands.weight), input("addend_scale", &operands.addend_scale));
    let row_scale = operands.row_scale.as_ref().map(|list| Guarded::input(&stream, "row_scale", list));
    let dispatched: Option<Dispatched> = operands.gathered.as_ref().map(|(tokens, slot_token, last)| {
        let shape = SlotShape::new(*tokens, 1, None, rows, 16, 0);
        let lists = Lists { slot_token: slot_token.clone(), offsets: vec![0, *last], ..Lists::default() };
        lists.dispatched(&stream, &shape)
    });
    let mut dx = match desc.accumulate {
        true => Guarded::filled_output(&stream, "dx", &operands.held, 0),
        false => Guarded::output(&stream, "dx", rows * width),
    };
    let mut d_addend = Guarded::<T>::output(&stream, "d_addend", rows * width);
    let mut d_row_scale = Guarded::<f32>::output(&stream, "d_row_scale", rows);
    let mut d_weight = Guarded::<f32>::output(&stream, "d_weight", width);
    let mut factors = Guarded::<f32>::output(&stream, "factors", 2 * rows);
    let mut launch = || {
        dx.reset(&stream);
        d_addend.reset(&stream);
        d_row_scale.reset(&stream);
        d_weight.reset(&stream);
        factors.reset(&stream);
        let [weight, scale] = [&weight, &scale].map(|list| list.as_ref().map(Guarded::view));
        let row_scale = row_scale.as_ref().map(Guarded::view);
        let (x, dy, dy_f32) = (x.view(), dy.view(), dy_f32.view());
        let (mut to, mut to_addend, mut to_scale) = (dx.view_mut(), d_addend.view_mut(), d_row_scale.view_mut());
        let (mut to_weight, mut to_factors) = (d_weight.view_mut(), factors.view_mut());
        let gradient = match desc.gradient == desc.dtype {
            true => Gradient::Rounded(In::from(&dy)),
            false => Gradient::F32(In::from(&dy_f32)),
        };
        let mut args = RmsNormBackwardArgs::new(&x, gradient, &mut to);
        args.weight = weight.as_ref().map(Into::into);
        args.addend_scale = scale.as_ref().map(Into::into);
        args.row_scale = row_scale.as_ref().map(In::from);
        args.gathered = dispatched.as_ref();
        if operands.scales {
            args.d_row_scale = Some((&mut to_scale).into());
        }
        if operands.has_addend {
            args.d_addend = Some((&mut to_addend).into());
        }
        if has_weight {
            args.d_weight = Some((&mut to_weight).into());
            args.factors = Some((&mut to_factors).into());
        }
        rms_norm_backward::backward(kernels, &stream, desc, args).unwrap();
        (dx.read(&stream), d_addend.read(&stream), d_row_scale.read(&stream), d_weight.read(&stream))
    };
    let got = launch();
    let again = launch();
    let bits = |of: &(Vec<T>, Vec<T>, Vec<f32>, Vec<f32>)| {
        let bytes = |rows: &[T]| bytemuck::cast_slice::<T, u8>(rows).to_vec();
        [bytes(&of.0), bytes(&of.1), bytemuck::cast_slice(&of.2).to_vec(), bytemuck::cast_slice(&of.3).to_vec()]
    };
    assert!(bits(&got) == bits(&again), "{name}: another run gave other bits");
    time(&stream, name, || drop(launch()));
    x.assert_unchanged(&stream);
    let (dx, d_addend, d_row_scale, d_weight) = got;

    // Rows that are not there have no gradient.
    let dy: Vec<f64> = (0..rows)
        .flat_map(|row| match operands.source(row) {
            Some(source) => operands.dy[source * width..][..width].to_vec(),
            None => vec![0.0; width],
        })
        .collect();
    let row_scale = operands.row_scale.as_deref().map(to_f64);
    let of = Rows {
        x: &operands.x[..],
        width,
        weight: operands.weight.as_deref(),
        addend: None,
        addend_scale: None,
        row_scale: row_scale.as_deref(),
        residual: None,
    };
    let want = reference(&of, &desc.norm, &dy).unwrap();

    // A sum is off by its additions, each of them by a unit of what is added up; then half a dozen products, and a square root that approximates.
    let additions = (width as f64 / 32.0).min(24.0) + 24.0;
    let units = 2.0 * additions + 16.0;
    let is_first = desc.norm.gain == Gain::OnePlusFirst;
    let between = if is_first { 2.0 * unit_roundoff(desc.dtype) } else { 0.0 };
    let relative = units * UNIT + between;
    let gain = |c: usize| match (&operands.weight, desc.norm.gain) {
        (Some(weight), Gain::Weight) => weight[c].into(),
        (Some(weight), _) => 1.0 + weight[c].into(),
        (None, _) => 1.0,
    };
    let mut weight_bounds = vec![0.0; width];
    for r in 0..rows {
        let range = r * width..(r + 1) * width;
        let Some(_) = operands.source(r) else {
            let untouched = |got: &[T], before: T| got.iter().all(|&v| v.bits_are(before));
            match desc.accumulate {
                true => {
                    assert!(dx[range.clone()] == operands.held[range.clone()], "{name}: row {r} is not to be written")
                }
                false => {
                    assert!(untouched(&dx[range.clone()], Guarded::<T>::junk()), "{name}: row {r} is not to be written")
                }
            }
            assert!(untouched(&d_addend[range], Guarded::<T>::junk()), "{name}: row {r} of the addend");
            continue;
        };
        let u: Vec<f64> = range
            .clone()
            .map(|i| operands.x[i].into())
            .enumerate()
            .map(|(c, x): (usize, f64)| if is_first { x * gain(c) } else { x })
            .collect();
        let after = |c: usize| if is_first { 1.0 } else { gain(c) };
        let mean = u.iter().map(|u| u * u).sum::<f64>() / width as f64 + f64::from(desc.norm.epsilon);
        let constant = mean < f64::from(desc.norm.least);
        let mean = mean.max(desc.norm.least.into());
        let p = f64::from(desc.norm.factor) / mean.sqrt();
        let row = row_scale.as_ref().map_or(1.0, |list| list[r]);
        let c: Vec<f64> = range.clone().enumerate().map(|(c, i)| (after(c) * dy[i]).abs()).collect();
        let dot: f64 = c.iter().zip(&u).map(|(c, u)| c * u.abs()).sum();
        let q = if constant { 0.0 } else { dot / (width as f64 * mean) };
        let terms = |i: usize| (row * p).abs() * (c[i] + u[i].abs() * q);
        let outer = |i: usize| if is_first { gain(i).abs() } else { 1.0 };
        let bounds: Vec<f64> = (0..width).map(|i| relative * terms(i) * outer(i)).collect();
        let (mut sums, mut sum_bounds) = (want.sum[range.clone()].to_vec(), bounds.clone());
        if desc.accumulate {
            for (i, (sum, bound)) in sums.iter_mut().zip(&mut sum_bounds).enumerate() {
                let held: f64 = operands.held[range.start + i].into();
                *sum += held;
                *bound += 2.0 * UNIT * sum.abs();
            }
        }
        assert_bounded(&format!("{name}: row {r}"), &to_f64(&dx[range.clone()]), &sums, &sum_bounds, desc.dtype);
        if operands.has_addend {
            let factor = |i: usize| operands.addend_scale.as_ref().map_or(1.0, |list| list[i].into());
            let want: Vec<f64> = (0..width).map(|i| factor(i) * sums[i]).collect();
            let bounds: Vec<f64> =
                (0..width).map(|i| factor(i).abs() * sum_bounds[i] + 2.0 * UNIT * want[i].abs()).collect();
            let got = to_f64(&d_addend[range.clone()]);
            assert_bounded(&format!("{name}: addend of row {r}"), &got, &want, &bounds, desc.dtype);
        }
        let bound = relative * p.abs() * dot;
        let (got, want) = (f64::from(d_row_scale[r]), want.row_scale[r]);
        assert!(
            (got - want).abs() <= bound + 1e-37 || !operands.scales,
            "{name}: scale of row {r} has {got:e}, want {want:e}, bound {bound:e}"
        );
        for (i, bound) in weight_bounds.iter_mut().enumerate() {
            let x: f64 = operands.x[range.start + i].into();
            let of_mean = if is_first { u[i].abs() * q } else { 0.0 };
            *bound += x.abs() * (row * p).abs() * (dy[range.start + i].abs() + of_mean);
        }
    }
    if let Some(want) = want.weight.filter(|_| has_weight) {
        let additions = rows as f64 / 32.0 + 33.0;
        let bounds: Vec<f64> = weight_bounds.iter().map(|bound| (relative + additions * UNIT) * bound).collect();
        assert_bounded(&format!("{name}: weight"), &to_f64(&d_weight), &want, &bounds, Dtype::F32);
    }
}

/// Whether two elements have the same bits.
trait SameBits {
    fn bits_are(self, other: Self) -> bool;
}

impl<T: bytemuck::Pod> SameBits for T {
    fn bits_are(self, other: T) -> bool {
        bytemuck::bytes_of(&self) == bytemuck::bytes_of(&other)
    }
}
