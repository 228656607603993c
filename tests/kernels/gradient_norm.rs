//! Checks of `gradient_norm` and `gradient_scale`: buffers of every type, size and place, far ends of the range, what is not finite, frozen experts.

use half::{bf16, f16};
use moe_kernels::experts::gradient_norm::{self, GradientNormArgs, GradientNormDesc, GradientShape};
use moe_kernels::reference::gradient_norm::{clip, norm};
use moe_kernels::registry::GRADIENT_CHUNK;
use moe_kernels::{Dtype, In, Out, OutTensor, Tensor, Workspace};

use crate::support::buffer::Guarded;
use crate::support::compare::{Storage, UNIT, to_f64};
use crate::support::device;
use crate::support::inputs::normals;
use crate::timing::time;

/// A buffer of one of the types.
enum Values {
    Bf16(Vec<bf16>, Guarded<bf16>),
    F16(Vec<f16>, Guarded<f16>),
    F32(Vec<f32>, Guarded<f32>),
}

/// Elements by which buffers begin behind 16 bytes.
const SHIFTS: [usize; 4] = [0, 1, 3, 5];

/// Which experts are frozen, with as many entries as any list here has experts.
fn masks() -> [Option<Vec<i32>>; 3] {
    let some = [0, 1, 0, -1, 0].into_iter().cycle().take(MANY).collect();
    [None, Some(some), Some(vec![0; MANY])]
}

/// Experts of one chunk each: more than there are blocks.
const MANY: usize = 600;

/// Gradients with their shape.
struct Gradient {
    shape: GradientShape,
    values: Values,
}

fn drawn<T: Storage>(
    rng: &mut fastrand::Rng,
    shape: &GradientShape,
    size: f64,
    frozen: Option<&[i32]>,
    shift: usize,
) -> (Vec<T>, Guarded<T>) {
    let mut values: Vec<T> = normals(rng, shape.groups * shape.elements, size);
    if shape.freezes {
        // Memory of a frozen expert holds anything.
        let groups = values.chunks_mut(shape.elements.max(1)).zip(frozen.unwrap_or(&[]));
        groups.filter(|(_, frozen)| **frozen != 0).for_each(|(values, _)| values.fill(T::from_f64(f64::NAN)));
    }
    let buffer = Guarded::filled_output(&device::stream(), "gradients", &values, shift);
    (values, buffer)
}

fn gradient(
    rng: &mut fastrand::Rng,
    shape: GradientShape,
    size: f64,
    frozen: Option<&[i32]>,
    shift: usize,
) -> Gradient {
    let values = match shape.dtype {
        Dtype::Bf16 => {
            let (values, buffer) = drawn(rng, &shape, size, frozen, shift);
            Values::Bf16(values, buffer)
        }
        Dtype::F16 => {
            let (values, buffer) = drawn(rng, &shape, size, frozen, shift);
            Values::F16(values, buffer)
        }
        _ => {
            let (values, buffer) = drawn(rng, &shape, size, frozen, shift);
            Values::F32(values, buffer)
        }
    };
    Gradient { shape, values }
}

/// In f64, without frozen experts.
fn live(gradient: &Gradient, frozen: Option<&[i32]>) -> Vec<f64> {
    let values = match &gradient.values {
        Values::Bf16(values, _) => to_f64(values),
        Values::F16(values, _) => to_f64(values),
        Values::F32(values, _) => to_f64(values),
    };
    let GradientShape { elements, freezes, .. } = gradient.shape;
    let is_frozen = |at: usize| freezes && frozen.is_some_and(|frozen| frozen[at / elements] != 0);
    values.into_iter().enumerate().filter(|&(at, _)| !is_frozen(at)).map(|(_, value)| value).collect()
}

/// Lists of buffers: sizes around 16 bytes, around a chunk and over several, of one launch and of two.
fn lists(rng: &mut fastrand::Rng) -> Vec<Vec<GradientShape>> {
    let chunk = GRADIENT_CHUNK as usize;
    let dtype = |rng: &mut fastrand::Rng| Dtype::ALL[rng.usize(..3)];
    vec![
        vec![],
        vec![GradientShape::new(Dtype::Bf16, 1)],
        vec![GradientShape::experts(dtype(rng), 3, 2 * chunk + 5), GradientShape::new(dtype(rng), 0)],
        vec![
            GradientShape::new(dtype(rng), 7),
            GradientShape::new(dtype(rng), 0),
            GradientShape::experts(dtype(rng), 5, 8),
            GradientShape::experts(dtype(rng), 4, chunk),
        ],
        Dtype::ALL
            .iter()
            .flat_map(|&d| [GradientShape::experts(d, 4, 300), GradientShape::new(d, chunk + 9)])
            .collect(),
        (0..9).map(|i| GradientShape::new(dtype(rng), 11 * i + 2)).collect(),
        vec![GradientShape::experts(dtype(rng), MANY, 3)],
    ]
}

pub fn check(rng: &mut fastrand::Rng) {
    for shapes in lists(rng) {
        // f16 has no number of the smaller sizes, bf16 and f32 have squares that f32 has not.
        for size in [1.0, 1e-5, 1e-25, 1e25] {
            let small = shapes.iter().map(|shape| shape.groups * shape.elements).sum::<usize>() < 10_000;
            let ranges = || shapes.iter().all(|shape| shape.dtype != Dtype::F16);
            if size == 1.0 || small && ranges() {
                let mut frozen = masks();
                rng.shuffle(&mut frozen);
                // Each mask where the numbers are of the common size.
                for frozen in frozen.iter().take(if size == 1.0 { 3 } else { 1 }) {
                    measure(rng, &shapes, size, frozen.as_deref());
                }
            }
        }
    }
    // One element that is not finite, wherever it lies.
    let shapes = [GradientShape::new(Dtype::F16, 70), GradientShape::experts(Dtype::F32, 3, 41)];
    for wrong in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        for at in [0, 17, 69, 70, 70 + 40, 70 + 122] {
            let mut gradients: Vec<Gradient> = shapes.iter().map(|&shape| gradient(rng, shape, 1.0, None, 0)).collect();
            match &mut gradients[usize::from(at >= 70)].values {
                Values::F16(values, buffer) => {
                    values[at] = f16::from_f32(wrong);
                    *buffer = Guarded::filled_output(&device::stream(), "gradients", values, 0);
                }
                Values::F32(values, buffer) => {
                    values[at - 70] = wrong;
                    *buffer = Guarded::filled_output(&device::stream(), "gradients", values, 1);
                }
                Values::Bf16(..) => unreachable!("no buffer here is bf16"),
            }
            let name = format!("{wrong} at {at}");
            let [norm, factor, overflow] = run(&gradients, 2.0, Some(1.0), None, &name);
            assert_eq!(overflow, 1.0, "{name}");
            let want = f64::from(wrong.abs());
            assert!(f64::from(norm) == want || norm.is_nan() && want.is_nan(), "{name}: norm {norm}");
            assert!(if wrong.is_nan() { factor.is_nan() } else { factor == 0.0 }, "{name}: factor {factor}");
        }
    }
}

fn measure(rng: &mut fastrand::Rng, shapes: &[GradientShape], size: f64, frozen: Option<&[i32]>) {
    let mut gradient = |&shape| {
        let shift = SHIFTS[rng.usize(..4)];
        gradient(rng, shape, size, frozen, shift)
    };
    let gradients: Vec<Gradient> = shapes.iter().map(&mut gradient).collect();
    let values: Vec<Vec<f64>> = gradients.iter().map(|gradient| live(gradient, frozen)).collect();
    let values: Vec<&[f64]> = values.iter().map(Vec::as_slice).collect();
    for (scale, max_norm) in [(1.0, None), (0.125, Some(size as f32 * 0.5)), (1.0, Some(1e30)), (1.0, Some(0.0))] {
        let name = format!("{shapes:?} of {size:e}, scale {scale}, most {max_norm:?}, frozen {frozen:?}");
        let [got, factor, overflow] = run(&gradients, scale, max_norm, frozen, &name);
        let want = norm(&values, scale.into());
        assert_eq!(overflow, 0.0, "{name}");
        // f64 sums: nothing but the last rounding.
        let near = |got: f32, want: f64| (f64::from(got) - want).abs() <= 1.01 * UNIT * want.abs() + 1e-45;
        assert!(near(got, want), "{name}: norm {got}, want {want}");
        let want = f64::from(scale) * clip(want, max_norm.map(f64::from));
        assert!(near(factor, want), "{name}: factor {factor}, want {want}");
    }
}

/// Norm, factor and flag.
fn run(gradients: &[Gradient], scale: f32, max_norm: Option<f32>, frozen: Option<&[i32]>, name: &str) -> [f32; 3] {
    let (kernels, stream) = (device::kernels(), device::stream());
    let shapes: Vec<GradientShape> = gradients.iter().map(|gradient| gradient.shape).collect();
    let desc = GradientNormDesc::new(&shapes).scale(scale).max_norm(max_norm);
    let mut workspace = Workspace::new(&stream, gradient_norm::workspace_bytes(&desc).unwrap()).unwrap();
    let frozen = frozen.map(|frozen| Guarded::input(&stream, "frozen", frozen));
    let [mut norm, mut factor] = ["norm", "factor"].map(|name| Guarded::<f32>::output(&stream, name, 1));
    let mut overflow = Guarded::<i32>::output(&stream, "overflow", 1);
    let mut launch =
        |norm: &mut Guarded<f32>, factor: &mut Guarded<f32>, overflow: &mut Guarded<i32>, wants: [bool; 3]| {
            enum View<'a> {
                Bf16(cudarc::driver::CudaView<'a, bf16>),
                F16(cudarc::driver::CudaView<'a, f16>),
                F32(cudarc::driver::CudaView<'a, f32>),
            }
            let views: Vec<View<'_>> = gradients
                .iter()
                .map(|gradient| match &gradient.values {
                    Values::Bf16(_, buffer) => View::Bf16(buffer.view()),
                    Values::F16(_, buffer) => View::F16(buffer.view()),
                    Values::F32(_, buffer) => View::F32(buffer.view()),
                })
                .collect();
            let tensors: Vec<Tensor<'_>> = views
                .iter()
                .map(|view| match view {
                    View::Bf16(view) => view.into(),
                    View::F16(view) => view.into(),
                    View::F32(view) => view.into(),
                })
                .collect();
            let frozen = frozen.as_ref().map(Guarded::view);
            let (mut norm, mut factor, mut overflow) = (norm.view_mut(), factor.view_mut(), overflow.view_mut());
            let mut args = GradientNormArgs::new(&tensors);
            args.norm = wants[0].then(|| Out::from(&mut norm));
            args.factor = wants[1].then(|| Out::from(&mut factor));
            args.overflow = wants[2].then(|| Out::from(&mut overflow));
            args.frozen = frozen.as_ref().map(In::from);
            gradient_norm::forward(kernels, &stream, &desc, args, &mut workspace).unwrap();
        };
    launch(&mut norm, &mut factor, &mut overflow, [true; 3]);
    let bits = |norm: &Guarded<f32>, factor: &Guarded<f32>| {
        [norm.read(&stream)[0].to_bits(), factor.read(&stream)[0].to_bits()]
    };
    let first = bits(&norm, &factor);
    // What is not asked for is not written.
    norm.reset(&stream);
    factor.reset(&stream);
    overflow.reset(&stream);
    launch(&mut norm, &mut factor, &mut overflow, [true, false, false]);
    assert_eq!(first[0], norm.read(&stream)[0].to_bits(), "{name}: norm alone");
    factor.assert_unchanged(&stream);
    overflow.assert_unchanged(&stream);
    launch(&mut norm, &mut factor, &mut overflow, [false; 3]);
    norm.reset(&stream);
    // In the workspace as it was left.
    launch(&mut norm, &mut factor, &mut overflow, [true; 3]);
    assert_eq!(first, bits(&norm, &factor), "{name}: another run gave other bits");
    time(&stream, name, || launch(&mut norm, &mut factor, &mut overflow, [true; 3]));
    for gradient in gradients {
        match &gradient.values {
            Values::Bf16(_, buffer) => buffer.assert_unchanged(&stream),
            Values::F16(_, buffer) => buffer.assert_unchanged(&stream),
            Values::F32(_, buffer) => buffer.assert_unchanged(&stream),
        }
    }
    [norm.read(&stream)[0], factor.read(&stream)[0], overflow.read(&stream)[0] as f32]
}

pub fn check_scale(rng: &mut fastrand::Rng) {
    let (kernels, stream) = (device::kernels(), device::stream());
    // Every list begins at 16 bytes once, without a mask and with one.
    let lists = lists(rng).into_iter().flat_map(|shapes| [(shapes.clone(), true), (shapes, false)]);
    for (turn, (shapes, aligned)) in lists.enumerate() {
        let masks = masks();
        let mask = if (turn / 2 + turn) % 2 == 0 { masks[1].as_deref() } else { masks[2 * rng.usize(..2)].as_deref() };
        let frozen = mask.map(|frozen| &frozen[..5]);
        let mut gradient = |&shape| {
            let shift = if aligned { 0 } else { SHIFTS[rng.usize(..4)] };
            gradient(rng, shape, 1.0, mask, shift)
        };
        let mut gradients: Vec<Gradient> = shapes.iter().map(&mut gradient).collect();
        let factor = [0.37f32, 0.0, -2.0][rng.usize(..3)];
        let factor_in = Guarded::input(&stream, "factor", &[factor]);
        let frozen_in = mask.map(|frozen| Guarded::input(&stream, "frozen", frozen));
        let launch = |gradients: &mut [Gradient]| {
            enum View<'a> {
                Bf16(cudarc::driver::CudaViewMut<'a, bf16>),
                F16(cudarc::driver::CudaViewMut<'a, f16>),
                F32(cudarc::driver::CudaViewMut<'a, f32>),
            }
            let mut views: Vec<View<'_>> = gradients
                .iter_mut()
                .map(|gradient| match &mut gradient.values {
                    Values::Bf16(_, buffer) => View::Bf16(buffer.view_mut()),
                    Values::F16(_, buffer) => View::F16(buffer.view_mut()),
                    Values::F32(_, buffer) => View::F32(buffer.view_mut()),
                })
                .collect();
            let tensors: Vec<OutTensor<'_>> = views
                .iter_mut()
                .map(|view| match view {
                    View::Bf16(view) => view.into(),
                    View::F16(view) => view.into(),
                    View::F32(view) => view.into(),
                })
                .collect();
            let (factor, frozen) = (factor_in.view(), frozen_in.as_ref().map(Guarded::view));
            let frozen = frozen.as_ref().map(In::from);
            gradient_norm::multiply(kernels, &stream, &shapes, tensors, frozen, In::from(&factor)).unwrap();
        };
        launch(&mut gradients);
        for (index, gradient) in gradients.iter().enumerate() {
            let shape = gradient.shape;
            let name = format!("{shape:?}, {index} of {shapes:?}, frozen {frozen:?}, factor {factor}");
            let is_frozen = |at: usize| shape.freezes && mask.is_some_and(|frozen| frozen[at / shape.elements] != 0);
            fn same<T: Storage + std::fmt::Debug>(
                name: &str,
                buffer: &Guarded<T>,
                before: &[T],
                factor: f32,
                frozen: &dyn Fn(usize) -> bool,
            ) {
                let got = buffer.read(&device::stream());
                for (at, (got, &before)) in got.iter().zip(before).enumerate() {
                    // One f32 product, rounded once.
                    let product: f64 = (T::to_f32(before) * factor).into();
                    let want = if frozen(at) { before } else { T::from_f64(product) };
                    assert!(
                        bytemuck::bytes_of(got) == bytemuck::bytes_of(&want),
                        "{name}: element {at} is {got:?}, want {want:?}"
                    );
                }
            }
            match &gradient.values {
                Values::Bf16(before, buffer) => same(&name, buffer, before, factor, &is_frozen),
                Values::F16(before, buffer) => same(&name, buffer, before, factor, &is_frozen),
                Values::F32(before, buffer) => same(&name, buffer, before, factor, &is_frozen),
            }
        }
        time(&stream, &format!("{shapes:?}"), || launch(&mut gradients));
    }
}
