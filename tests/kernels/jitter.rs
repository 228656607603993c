//! Checks of `jitter_*`.

use half::{bf16, f16};
use moe_kernels::reference;
use moe_kernels::routers::jitter::{self, JitterArgs, JitterDesc};
use moe_kernels::rules::Dtype;
use moe_kernels::rules::NoiseSource;

use crate::support::buffer::Guarded;
use crate::support::compare::Storage;
use crate::support::device;
use crate::support::inputs::{normal, run_seed};
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
    // Every length of the last part, and whole blocks.
    for elements in (1..=17).chain([2047, 2048, 2049, 40_003]) {
        for epsilon in [0.01, 0.0, 1.0] {
            let noise = NoiseSource::new(rng.u64(..), rng.u64(..));
            case::<T>(rng, &JitterDesc::new(T::DTYPE, elements, epsilon, noise));
        }
    }
    case::<T>(rng, &JitterDesc::new(T::DTYPE, 0, 0.5, NoiseSource::default()));
    factors_fill_the_interval::<T>();
}

/// To `y`, and in place.
fn launch<T: Storage>(desc: &JitterDesc, x: &[T]) -> Vec<T> {
    let (kernels, stream) = (device::kernels(), device::stream());
    let input = Guarded::input(&stream, "x", x);
    let mut y = Guarded::<T>::output(&stream, "y", x.len());
    jitter::forward(kernels, &stream, desc, JitterArgs::new(&input.view(), &mut y.view_mut())).unwrap();
    input.assert_unchanged(&stream);
    let got = y.read(&stream);
    let mut same = Guarded::input(&stream, "x", x);
    jitter::forward(kernels, &stream, desc, JitterArgs::in_place(&mut same.view_mut())).unwrap();
    let bytes = |values: &[T]| bytemuck::cast_slice::<T, u8>(values).to_vec();
    assert!(bytes(&got) == bytes(&same.read(&stream)), "{desc:?}: in place other bits");
    time(&stream, &format!("{desc:?}"), || {
        jitter::forward(kernels, &stream, desc, JitterArgs::new(&input.view(), &mut y.view_mut())).unwrap();
    });
    got
}

fn case<T: Storage>(rng: &mut fastrand::Rng, desc: &JitterDesc) {
    let x: Vec<T> = (0..desc.elements)
        .map(|_| {
            T::from_f64(match rng.u32(..24) {
                0 => f64::NAN,
                1 => f64::INFINITY,
                2 => f64::NEG_INFINITY,
                3 => -0.0,
                4 => f64::from(f32::MAX),
                5 => 6e4,
                6 => 1e-5,
                _ => normal(rng),
            })
        })
        .collect();
    let want = reference::jitter::jitter::<T, T>(&x, desc.epsilon, desc.noise).unwrap();
    for (i, (got, want)) in launch(desc, &x).iter().zip(want).enumerate() {
        let got: f64 = (*got).into();
        assert!(
            got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()),
            "{desc:?}: y[{i}] is {got:e}, want {want:e}"
        );
    }
}

/// 16 parts of the interval get the same: chi-square of 15 degrees of freedom exceeds 60 for fewer than 1 of 10^6 seeds (its tail there is
/// 2.5e-7). Parts end between two numbers of the type.
fn factors_fill_the_interval<T: Storage>() {
    const ELEMENTS: usize = 1 << 15;
    let noise = NoiseSource::new(run_seed(), 4);
    let desc = JitterDesc::new(T::DTYPE, ELEMENTS, 0.5, noise);
    let y = launch(&desc, &[T::from_f64(1.0); ELEMENTS]);
    let mut counts = [0.0f64; 16];
    for y in y {
        let y: f64 = y.into();
        // Rounding moves what lies at most half a unit off an end; 2^-9 is the largest half unit of the three types in this interval.
        let part = ((y - 0.5) * 16.0 + 1e-9) as usize;
        counts[part.min(15)] += 1.0;
    }
    if T::DTYPE == Dtype::F32 {
        let expected = ELEMENTS as f64 / 16.0;
        let chi_square: f64 = counts.iter().map(|count| (count - expected) * (count - expected) / expected).sum();
        assert!(chi_square < 60.0, "chi-square {chi_square}");
    }
    assert!(counts.iter().all(|&count| count > 0.0));
}
