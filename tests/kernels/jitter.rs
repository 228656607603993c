//! Checks of `jitter_*`.

use cudarc::driver::CudaView;
use half::{bf16, f16};
use moe_kernels::routers::jitter::{self, JitterArgs, JitterDesc};
use moe_kernels::rules::Dtype;
use moe_kernels::rules::NoiseSource;
use moe_kernels::{In, reference};

use crate::noise_state::State;
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

fn run<'a, T: Storage>(desc: &JitterDesc, mut args: JitterArgs<'a, T>, state: &'a Option<CudaView<'_, u64>>) {
    args.noise_state = state.as_ref().map(In::from);
    jitter::forward(device::kernels(), &device::stream(), desc, args).unwrap();
}

/// To `y`, and in place.
fn launch<T: Storage>(desc: &JitterDesc, x: &[T], state: &State) -> Vec<T> {
    let (stream, on_device) = (device::stream(), state.view());
    let input = Guarded::input(&stream, "x", x);
    let mut y = Guarded::<T>::output(&stream, "y", x.len());
    run(desc, JitterArgs::new(&input.view(), &mut y.view_mut()), &on_device);
    input.assert_unchanged(&stream);
    let got = y.read(&stream);
    let mut same = Guarded::input(&stream, "x", x);
    run(desc, JitterArgs::in_place(&mut same.view_mut()), &on_device);
    let bytes = |values: &[T]| bytemuck::cast_slice::<T, u8>(values).to_vec();
    assert!(bytes(&got) == bytes(&same.read(&stream)), "{desc:?}: in place other bits");
    time(&stream, &format!("{desc:?}"), || run(desc, JitterArgs::new(&input.view(), &mut y.view_mut()), &on_device));
    state.assert_unchanged();
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
    let state = State::draw(rng);
    let want = reference::jitter::jitter::<T, T>(&x, desc.epsilon, state.of(desc.noise)).unwrap();
    for (i, (got, want)) in launch(desc, &x, &state).iter().zip(want).enumerate() {
        let got: f64 = (*got).into();
        assert!(
            got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()),
            "{desc:?} {state:?}: y[{i}] is {got:e}, want {want:e}"
        );
    }
}

/// 16 parts of the interval get the same: chi-square of 15 degrees of freedom exceeds 60 for fewer than 1 of 10^6 seeds (its tail there is
/// 2.5e-7). Parts end between two numbers of the type.
fn factors_fill_the_interval<T: Storage>() {
    const ELEMENTS: usize = 1 << 15;
    let noise = NoiseSource::new(run_seed(), 4);
    let desc = JitterDesc::new(T::DTYPE, ELEMENTS, 0.5, noise);
    let y = launch(&desc, &[T::from_f64(1.0); ELEMENTS], &State::NONE);
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
