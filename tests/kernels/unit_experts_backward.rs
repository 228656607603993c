//! Checks of `unit_experts_backward_*` and `unit_experts_rows_*`, which one operation launches one behind the other.

use half::{bf16, f16};
use moe_kernels::experts::unit_experts::UnitExpertsDesc;
use moe_kernels::experts::unit_experts_backward::{
    self, UnitExpertsBackwardArgs, UnitExpertsBackwardDesc, workspace_bytes,
};
use moe_kernels::reference::activation::{activate, slope};
use moe_kernels::reference::unit_experts::{UnitGradients, unit_experts_backward as reference};
use moe_kernels::rules::Activation;
use moe_kernels::{Dtype, Error, In, Workspace};

use crate::support::buffer::Guarded;
use crate::support::compare::{ACTIVATION_GRADIENT, Arithmetic, Bounded, Storage, UNIT, assert_bounded, to_f64};
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

/// Which gradients are asked for: of x, weights, input, output.
const WANTED: [[bool; 4]; 5] = [
    [true, true, true, true],
    [false, true, true, false],
    [true, false, false, true],
    [true, false, false, false],
    [false, false, true, true],
];

/// Which experts tokens choose.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Choice {
    /// Any, and now and then none.
    Any,
    /// One, all.
    One,
    Nobody,
}

fn typed<T: Storage>(rng: &mut fastrand::Rng) {
    // 17000 experts: 64 a block. 40 and 700 tokens: more than a step of each warp's walk, and of an expert's sum.
    let sizes = [
        (1, 8, 1, 1),
        (3, 64, 64, 4),
        (2, 264, 7, 33),
        (40, 72, 5, 9),
        (5, 520, 50, 8),
        (1, 2056, 200, 64),
        (2, 96, 300, 31),
        (3, 8, 17000, 64),
        (0, 24, 5, 2),
    ];
    for (at, (tokens, hidden, experts, top_k)) in sizes.into_iter().enumerate() {
        for (i, activation) in ACTIVATIONS.into_iter().enumerate() {
            let forward = UnitExpertsDesc::new(T::DTYPE, tokens, hidden, experts, top_k).activation(activation);
            let desc = UnitExpertsBackwardDesc::new(forward)
                .accumulate((i + at) % 3 == 1)
                .accumulate_experts((i + at / 2) % 2 == 1);
            case::<T>(rng, &desc, WANTED[(i + at) % 5], Choice::Any);
        }
    }
    let forward = UnitExpertsDesc::new(T::DTYPE, 700, 16, 4, 1);
    case::<T>(rng, &UnitExpertsBackwardDesc::new(forward), WANTED[0], Choice::One);
    let forward = UnitExpertsDesc::new(T::DTYPE, 9, 16, 70, 3);
    for accumulate in [false, true] {
        let desc = UnitExpertsBackwardDesc::new(forward).accumulate(accumulate).accumulate_experts(accumulate);
        case::<T>(rng, &desc, WANTED[0], Choice::Nobody);
    }
    nobody_beside_an_infinite_row::<T>();
    without_a_workspace::<T>();
}

fn drawn(rng: &mut fastrand::Rng, len: usize, experts: usize, choice: Choice) -> Vec<i32> {
    let nobody = [-1, experts as i32, i32::MIN, i32::MAX];
    (0..len)
        .map(|_| match choice {
            Choice::One => experts as i32 - 1,
            Choice::Any if rng.u32(..10) > 0 => rng.i32(0..experts as i32),
            _ => nobody[rng.usize(..4)],
        })
        .collect()
}

/// The most by which products, activations and slopes of a choice may be off.
struct Errors {
    /// Of the weight's gradient, the factor of `output`'s row and that of `input`'s.
    weight: f64,
    out_factor: f64,
    in_factor: f64,
}

impl Errors {
    fn new(activation: Activation, weight: f64, [input, x, output, dy]: [&[f64]; 4]) -> Errors {
        let product = |a: &[f64], b: &[f64]| {
            let terms: Vec<f64> = a.iter().zip(b).map(|(a, b)| a * b).collect();
            let (value, magnitude) = (terms.iter().sum::<f64>(), terms.iter().map(|term| term.abs()).sum::<f64>());
            let root = terms.iter().map(|term| term * term).sum::<f64>().sqrt();
            Bounded { value, error: Arithmetic::Fma.sum_bound(terms.len(), value, magnitude, root) }
        };
        let (p, c) = (product(input, x), product(output, dy));
        // What an error of p moves, and what the function is off by itself.
        let of = |f: &dyn Fn(f64) -> f64, least: f64| {
            let value = f(p.value);
            let moved = [-1.0, 1.0].map(|sign| (f(p.value + sign * p.error) - value).abs());
            Bounded { value, error: moved[0].max(moved[1]) + ACTIVATION_GRADIENT * value.abs().max(least) }
        };
        let a = of(&|p| activate(activation, p), 0.1);
        // A slope is a sum of terms of the order of 1.
        let s = of(&|p| slope(activation, p), 4.0);
        let times = |a: Bounded, b: Bounded| {
            let value = a.value * b.value;
            let error = a.error * b.value.abs() + a.value.abs() * b.error + a.error * b.error;
            Bounded { value, error: error + UNIT * value.abs() }
        };
        let weight = Bounded { value: weight, error: 0.0 };
        Errors {
            weight: times(a, c).error,
            out_factor: times(weight, a).error,
            in_factor: times(times(weight, s), c).error,
        }
    }
}

/// Sums with what they may be off.
struct Sums {
    magnitudes: Vec<f64>,
    moved: Vec<f64>,
    terms: Vec<usize>,
}

impl Sums {
    fn new(before: &[f64]) -> Sums {
        let moved = vec![0.0; before.len()];
        Sums { magnitudes: before.iter().map(|v| v.abs()).collect(), moved, terms: vec![1; before.len()] }
    }

    fn add(&mut self, row: usize, factor: f64, error: f64, values: &[f64]) {
        for (i, value) in values.iter().enumerate() {
            let at = row * values.len() + i;
            self.magnitudes[at] += (factor * value).abs();
            self.moved[at] += error * value.abs();
            self.terms[at] += 1;
        }
    }

    fn bounds(&self) -> Vec<f64> {
        let all = self.magnitudes.iter().zip(&self.moved).zip(&self.terms);
        all.map(|((magnitude, moved), &terms)| moved + terms as f64 * UNIT * (magnitude + moved)).collect()
    }
}

fn case<T: Storage>(rng: &mut fastrand::Rng, desc: &UnitExpertsBackwardDesc, wanted: [bool; 4], choice: Choice) {
    let name = format!("{desc:?} wanted={wanted:?} {choice:?}");
    let (kernels, stream) = (device::kernels(), device::stream());
    let UnitExpertsDesc { tokens, hidden, experts, top_k, activation, .. } = desc.forward;
    let ids = drawn(rng, tokens * top_k, experts, choice);
    let chosen = |slot: usize| usize::try_from(ids[slot]).ok().filter(|&e| e < experts);
    let weights: Vec<f32> = (0..tokens * top_k).map(|_| normal(rng) as f32).collect();
    let (x, dy) = (normals::<T>(rng, tokens * hidden, 1.0), normals::<T>(rng, tokens * hidden, 1.0));
    let mut free = vec![true; experts];
    (0..ids.len()).filter_map(chosen).for_each(|e| free[e] = false);
    let mut matrix = |scale: f64| {
        let mut matrix = normals::<T>(rng, experts * hidden, scale);
        // Rows that nobody chose are not read into any sum.
        (0..experts).filter(|&e| free[e]).for_each(|e| matrix[e * hidden..][..hidden].fill(T::from_f64(f64::NAN)));
        matrix
    };
    let (input, output) = (matrix(1.5 / (hidden as f64).sqrt()), matrix(1.0));
    let before_x = normals::<T>(rng, tokens * hidden, 1.0);
    let mut before = || normals::<f32>(rng, experts * hidden, 1.0);
    let (before_in, before_out) = (before(), before());

    let UnitGradients { x: mut want_x, input: mut want_in, output: mut want_out, weights: want_weights } =
        reference(&x, &input, &output, &ids, &to_f64(&weights), hidden, activation, &to_f64(&dy)).unwrap();
    let add = |to: &mut [f64], before: &[f64]| to.iter_mut().zip(before).for_each(|(to, before)| *to += before);
    let kept = |adds: bool, before: Vec<f64>| if adds { before } else { vec![0.0; before.len()] };
    let there_x = kept(desc.accumulate, to_f64(&before_x));
    let there = [&before_in, &before_out].map(|before| kept(desc.accumulate_experts, to_f64(before)));
    add(&mut want_x, &there_x);
    add(&mut want_in, &there[0]);
    add(&mut want_out, &there[1]);
    let mut weight_bounds = vec![0.0; ids.len()];
    let (mut of_x, [mut of_in, mut of_out]) = (Sums::new(&there_x), [&there[0], &there[1]].map(|v| Sums::new(v)));
    for slot in 0..ids.len() {
        let Some(expert) = chosen(slot) else { continue };
        let row = |values: &[T], at: usize| to_f64(&values[at * hidden..][..hidden]);
        let (x, dy) = (row(&x, slot / top_k), row(&dy, slot / top_k));
        let (input, output) = (row(&input, expert), row(&output, expert));
        let weight = f64::from(weights[slot]);
        let errors = Errors::new(activation, weight, [&input, &x, &output, &dy]);
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let p = dot(&input, &x);
        let in_factor = weight * slope(activation, p) * dot(&output, &dy);
        weight_bounds[slot] = errors.weight;
        of_x.add(slot / top_k, in_factor, errors.in_factor, &input);
        of_in.add(expert, in_factor, errors.in_factor, &x);
        of_out.add(expert, weight * activate(activation, p), errors.out_factor, &dy);
    }

    let on_device = |name, values: &[T]| Guarded::input(&stream, name, values);
    let inputs = [("x", &x), ("input", &input), ("output", &output), ("dy", &dy)].map(|(name, v)| on_device(name, v));
    let (ids, weights) = (Guarded::input(&stream, "ids", &ids), Guarded::input(&stream, "weights", &weights));
    let bytes = workspace_bytes(desc).unwrap();
    let launch = || {
        let (mut dx, mut d_input, mut d_output) = (
            Guarded::filled_output(&stream, "dx", &before_x, 0),
            Guarded::filled_output(&stream, "d_input", &before_in, 0),
            Guarded::filled_output(&stream, "d_output", &before_out, 0),
        );
        let mut d_weights = Guarded::<f32>::output(&stream, "d_weights", tokens * top_k);
        let mut workspace = Workspace::new(&stream, bytes).unwrap();
        {
            let [x, input, output, dy] = inputs.each_ref().map(Guarded::view);
            let (ids, weights) = (ids.view(), weights.view());
            let (mut dx, mut d_weights) = (dx.view_mut(), d_weights.view_mut());
            let (mut d_input, mut d_output) = (d_input.view_mut(), d_output.view_mut());
            let rows = [In::from(&input), In::from(&output)];
            let mut args = UnitExpertsBackwardArgs::new(&x, rows, &ids, &weights, &dy).workspace(&mut workspace);
            args.dx = wanted[0].then(|| (&mut dx).into());
            args.d_weights = wanted[1].then(|| (&mut d_weights).into());
            args.d_input = wanted[2].then(|| (&mut d_input).into());
            args.d_output = wanted[3].then(|| (&mut d_output).into());
            unit_experts_backward::backward(kernels, &stream, desc, args).unwrap();
        }
        if !wanted[0] {
            dx.assert_unchanged(&stream);
        }
        if !wanted[1] {
            d_weights.assert_unchanged(&stream);
        }
        if !wanted[2] {
            d_input.assert_unchanged(&stream);
        }
        if !wanted[3] {
            d_output.assert_unchanged(&stream);
        }
        (dx.read(&stream), d_weights.read(&stream), d_input.read(&stream), d_output.read(&stream))
    };
    let got = launch();
    if wanted[0] {
        assert_bounded(&format!("{name}: dx"), &to_f64(&got.0), &want_x, &of_x.bounds(), T::DTYPE);
    }
    if wanted[1] {
        assert_bounded(&format!("{name}: d_weights"), &to_f64(&got.1), &want_weights, &weight_bounds, Dtype::F32);
    }
    if wanted[2] {
        assert_bounded(&format!("{name}: d_input"), &to_f64(&got.2), &want_in, &of_in.bounds(), Dtype::F32);
    }
    if wanted[3] {
        assert_bounded(&format!("{name}: d_output"), &to_f64(&got.3), &want_out, &of_out.bounds(), Dtype::F32);
    }
    let again = launch();
    let bits = |of: &(Vec<T>, Vec<f32>, Vec<f32>, Vec<f32>)| {
        let words = [&of.1, &of.2, &of.3].map(|values| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
        (bytemuck::cast_slice::<T, u8>(&of.0).to_vec(), words)
    };
    assert!(bits(&got) == bits(&again), "{name}: another run gave other bits");
    inputs.iter().for_each(|buffer| buffer.assert_unchanged(&stream));
    time(&stream, &name, || drop(launch()));
}

/// Choices that are none add nothing, not 0 times what stands where a row would be.
fn nobody_beside_an_infinite_row<T: Storage>() {
    let (kernels, stream) = (device::kernels(), device::stream());
    let hidden = 8;
    let forward = UnitExpertsDesc::new(T::DTYPE, 1, hidden, 2, 4).activation(Activation::Identity);
    let desc = UnitExpertsBackwardDesc::new(forward);
    let row = |value: f64| [T::from_f64(value)].repeat(hidden);
    let rows = |first: f64| [row(first), row(1.0)].concat();
    let [x, dy, input, output] = [row(1.0), row(1.0), rows(f64::INFINITY), rows(1.0)];
    let [x, dy, input, output] = [x, dy, input, output].map(|values| stream.clone_htod(&values).unwrap());
    let ids = stream.clone_htod(&[0, 0, -1, 2]).unwrap();
    let weights = stream.clone_htod(&[1f32; 4]).unwrap();
    let (mut dx, mut d_weights) =
        (stream.clone_htod(&row(0.0)).unwrap(), Guarded::<f32>::output(&stream, "d_weights", 4));
    {
        let mut d_weights = d_weights.view_mut();
        let rows = [In::from(&input), In::from(&output)];
        let mut args = UnitExpertsBackwardArgs::new(&x, rows, &ids, &weights, &dy).dx(&mut dx);
        args.d_weights = Some((&mut d_weights).into());
        unit_experts_backward::backward(kernels, &stream, &desc, args).unwrap();
    }
    let dx = to_f64(&stream.clone_dtoh(&dx).unwrap());
    assert!(dx.iter().all(|&dx| dx == f64::INFINITY), "{dx:?}");
    assert_eq!(d_weights.read(&stream), [f32::INFINITY, f32::INFINITY, 0.0, 0.0]);
}

fn without_a_workspace<T: Storage>() {
    let (kernels, stream) = (device::kernels(), device::stream());
    let desc = UnitExpertsBackwardDesc::new(UnitExpertsDesc::new(T::DTYPE, 1, 8, 2, 1));
    let rows = stream.alloc_zeros::<T>(16).unwrap();
    let (ids, weights) = (stream.alloc_zeros::<i32>(1).unwrap(), stream.alloc_zeros::<f32>(1).unwrap());
    let mut d_input = stream.alloc_zeros::<f32>(16).unwrap();
    let args = UnitExpertsBackwardArgs::new(&rows, [In::from(&rows), In::from(&rows)], &ids, &weights, &rows)
        .d_input(&mut d_input);
    let error = unit_experts_backward::backward(kernels, &stream, &desc, args).unwrap_err();
    assert!(matches!(error, Error::Missing { argument: "workspace", .. }), "{error}");
}
