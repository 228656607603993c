//! Checks of `unit_backward_*`, alone the smallest part of a router by cosine: all of its way back against the reference, whose own tests are finite
//! differences.

use half::{bf16, f16};
use moe_kernels::reference::cosine::cosine_backward;
use moe_kernels::routers::cosine::{CosineBackwardPlan, CosineDesc, CosineGradients, CosineWeights};
use moe_kernels::{Dtype, In, Out, Workspace};

use crate::support::buffer::Guarded;
use crate::support::compare::{F32_PRODUCTS, Storage, rounding, to_f64};
use crate::support::device;
use crate::support::inputs::{normal, normals};
use crate::timing::time;

pub fn check(dtype: Dtype, rng: &mut fastrand::Rng) {
    for (tokens, hidden, width, experts) in
        [(0, 8, 4, 3), (1, 1, 1, 1), (37, 16, 8, 5), (20, 33, 40, 9), (300, 8, 16, 2), (5, 64, 130, 40)]
    {
        for kind in [Rows::Normal, Rows::Short, Rows::Bound] {
            let desc = CosineDesc::new(dtype, tokens, hidden, width, experts);
            let desc = if kind == Rows::Bound { desc.temperature(desc.most) } else { desc };
            match dtype {
                Dtype::Bf16 => case::<bf16>(rng, desc, kind),
                Dtype::F16 => case::<f16>(rng, desc, kind),
                _ => case::<f32>(rng, desc, kind),
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Rows {
    Normal,
    /// A row of zeros among the experts', and one that is shorter than 1e-12 where the type has such numbers.
    Short,
    /// The temperature is at its bound.
    Bound,
}

fn case<T: Storage>(rng: &mut fastrand::Rng, desc: CosineDesc, kind: Rows) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let CosineDesc { tokens, hidden, width, experts, temperature, most, .. } = desc;
    let x = normals::<T>(rng, tokens * hidden, 1.0);
    let projection = normals::<T>(rng, width * hidden, 0.5);
    let mut similar = normals::<T>(rng, experts * width, 1.0);
    if kind == Rows::Short {
        similar[..width].fill(T::from_f64(0.0));
        if experts > 1 && T::DTYPE != Dtype::F16 {
            // On either side of the least length.
            let length = [0.7e-12, 1.4e-12][rng.usize(..2)] / (width as f64).sqrt();
            similar[width..2 * width].iter_mut().for_each(|v| *v = T::from_f64(length * Into::<f64>::into(*v)));
        }
    }
    let numbers = |rng: &mut fastrand::Rng, len: usize| (0..len).map(|_| normal(rng) as f32).collect::<Vec<f32>>();
    let (bias, scale, d) = (numbers(rng, width), numbers(rng, experts), numbers(rng, tokens * experts));
    let (with_bias, with_scale, accumulate) = (rng.bool(), rng.bool(), rng.bool());
    let name = format!("{desc:?} {kind:?} bias {with_bias} factors {with_scale} accumulate {accumulate}");
    let lengths = [width * hidden, width, experts * width, experts, 1];
    let before = lengths.map(|len| numbers(rng, len));
    let x_before = normals::<T>(rng, tokens * hidden, 1.0);
    let typed = [("x", &x), ("projection", &projection), ("similar", &similar)]
        .map(|(what, values)| Guarded::input(&stream, what, values));
    let floats = [("bias", &bias), ("expert_scale", &scale), ("d_logits", &d)]
        .map(|(what, values)| Guarded::input(&stream, what, values));
    let plan = CosineBackwardPlan::new(&desc, accumulate, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).unwrap();
    let mut launch = || {
        let mut out = before.each_ref().map(|before| match accumulate {
            true => Guarded::filled_output(&stream, "gradient", before, 0),
            false => Guarded::<f32>::output(&stream, "gradient", before.len()),
        });
        let mut dx = match accumulate {
            true => Guarded::filled_output(&stream, "dx", &x_before, 0),
            false => Guarded::<T>::output(&stream, "dx", x_before.len()),
        };
        {
            let [x, projection, similar] = typed.each_ref().map(Guarded::view);
            let [bias, scale, d] = floats.each_ref().map(Guarded::view);
            let mut weights = CosineWeights::new(&projection, &similar);
            weights.bias = with_bias.then(|| In::from(&bias));
            weights.expert_scale = with_scale.then(|| In::from(&scale));
            let [d_projection, d_bias, d_similar, d_scale, d_temperature] = &mut out.each_mut().map(Guarded::view_mut);
            let mut dx = dx.view_mut();
            let mut gradients = CosineGradients::new(d_similar)
                .x(&mut dx)
                .projection(d_projection)
                .expert_scale(d_scale)
                .temperature(d_temperature);
            gradients.bias = Some(Out::from(d_bias));
            plan.backward::<T, T>(kernels, &stream, weights, &x, &d, gradients, &mut workspace).unwrap();
        }
        (out.map(|out| out.read(&stream)), dx.read(&stream))
    };
    let (got, dx) = launch();
    let again = launch();
    let bits = |of: &[Vec<f32>; 5]| of.iter().flatten().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&got), bits(&again.0), "{name}: another run gave other bits");
    assert!(dx == again.1, "{name}: another run gave another dx");
    time(&stream, &name, || drop(launch()));
    typed.iter().for_each(|buffer| buffer.assert_unchanged(&stream));

    let no_bias = vec![0.0; width];
    let bias = if with_bias { to_f64(&bias) } else { no_bias };
    let scale = to_f64(&scale);
    let want = cosine_backward(
        &to_f64(&x),
        &to_f64(&projection),
        &bias,
        &to_f64(&similar),
        [temperature.into(), most.into()],
        with_scale.then_some(&scale[..]),
        &to_f64(&d),
    )
    .unwrap();
    // What sums of both signs are made of.
    let largest = scale.iter().fold(1.0, |most: f64, f| if with_scale { most.max(f.abs()) } else { most });
    let size = f64::from(temperature.min(most).exp()) * largest * to_f64(&d).iter().map(|d| d * d).sum::<f64>().sqrt();
    let wants = [&want.weight, &want.bias, &want.similar, &want.expert_scale, &vec![want.temperature]];
    for (which, (got, want)) in got.iter().zip(wants).enumerate() {
        let before = accumulate.then(|| to_f64(&before[which]));
        compare(&format!("{name}: gradient {which}"), &to_f64(got), want, before, Dtype::F32, size);
    }
    compare(&format!("{name}: dx"), &to_f64(&dx), &want.x, accumulate.then(|| to_f64(&x_before)), T::DTYPE, size);
}

/// In the norm: products of TF32, directions of rows, sums over tokens; and one rounding of each.
fn compare(name: &str, got: &[f64], want: &[f64], before: Option<Vec<f64>>, dtype: Dtype, size: f64) {
    let norm = want.iter().map(|v| v * v).sum::<f64>().sqrt();
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let before = before.as_ref().map_or(0.0, |before| before[i]);
        let bound = 4.0 * F32_PRODUCTS * (norm + size + before.abs()) + rounding(dtype, (want + before).abs());
        let error = (got - want - before).abs();
        assert!(error <= bound, "{name}[{i}] is {got}, want {}, off by {error:e} > {bound:e}", want + before);
    }
}
