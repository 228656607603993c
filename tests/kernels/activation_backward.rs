//! Checks of `activation_backward_*`: every function, bound and order against the reference, whose own tests are finite differences.

use cudarc::driver::DeviceRepr;
use half::{bf16, f16};
use moe_kernels::experts::activation_backward::{self, ActivationBackwardArgs, ActivationBackwardDesc};
use moe_kernels::reference::activation::{activate, activate_glu, slope, slopes_glu};
use moe_kernels::registry::Kernel;
use moe_kernels::rules::{Activation, Bound, Dtype, Glu, Swiglu};
use moe_kernels::{Element, In, Out};

use crate::support::buffer::Guarded;
use crate::support::compare::{ACTIVATION_GRADIENT, Storage, rounding};
use crate::support::device;
use crate::support::inputs::normal;
use crate::timing::time;

pub fn check(dtype: Dtype, rng: &mut fastrand::Rng) {
    match dtype {
        Dtype::Bf16 => check_in::<bf16>(rng),
        Dtype::F16 => check_in::<f16>(rng),
        Dtype::F32 => check_in::<f32>(rng),
        other => unreachable!("no kernel of {other}"),
    }
}

fn check_in<T: Storage>(rng: &mut fastrand::Rng) {
    let units = [
        Swiglu::new(),
        Swiglu::GPT_OSS.gate(Bound::Clamp(1.5)).up(Bound::Clamp(1.25)),
        Swiglu::clamped(0.75).clamp_after(true).factor(-2.0),
        Swiglu::softcapped(2.0, 3.0),
        Swiglu::new().up(Bound::Softcap(1.5)).alpha(0.5),
    ];
    let plain = [Activation::Relu, Activation::ReluSquared, Activation::Gelu, Activation::GeluTanh, Activation::Silu];
    for glu in Glu::ALL {
        for activation in plain {
            case::<T>(rng, activation, glu);
        }
        if glu == Glu::None {
            case::<T>(rng, Activation::Identity, glu);
        } else {
            units.into_iter().for_each(|unit| case::<T>(rng, unit.into(), glu));
        }
    }
}

fn case<T: Storage>(rng: &mut fastrand::Rng, activation: Activation, glu: Glu) {
    // 300 columns: more than one round of the block. 1200 rows: more than one of a block.
    let many = activation == Activation::Silu && glu == Glu::Split;
    for (rows, width) in [(1, 1), (5, 300), (67, 33)].into_iter().chain(many.then_some((1200, 3))) {
        let desc = ActivationBackwardDesc::new(T::DTYPE, rows, width, activation).glu(glu);
        let live = [None, Some(rows.div_ceil(2)), Some(rows + 3), Some(0)][rng.usize(..4)];
        let live = live.filter(|_| rows < 1200);
        run::<T>(rng, &desc, live);
    }
}

/// Values around 0, and now and then far away.
fn values<T: Storage>(rng: &mut fastrand::Rng, len: usize) -> Vec<T> {
    let far = [-300.0, -90.0, -20.0, 20.0, 90.0, 300.0, 0.0, -0.0, 1.5, -1.25];
    (0..len)
        .map(|_| T::from_f64(if rng.u32(..12) == 0 { far[rng.usize(..far.len())] } else { 1.5 * normal(rng) }))
        .collect()
}

struct Got<T> {
    d_pre: Vec<T>,
    hidden: Vec<T>,
    d_weight: Vec<f32>,
}

fn run<T: Storage + Element + DeviceRepr>(rng: &mut fastrand::Rng, desc: &ActivationBackwardDesc, live: Option<usize>) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let &ActivationBackwardDesc { rows, width, activation, glu, .. } = desc;
    let variant = activation_backward::select(desc, kernels.device()).unwrap().kernel.variant();
    assert_eq!(variant, Kernel::ActivationBackward(T::DTYPE));
    let columns = desc.columns();
    let pre: Vec<T> = values(rng, rows * columns);
    let d: Vec<T> = (0..rows * width).map(|_| T::from_f64(normal(rng))).collect();
    let weight: Option<Vec<f32>> = rng.bool().then(|| (0..rows).map(|_| rng.f32()).collect());
    // Many rows: sums of a block one after the other.
    let wants = rng.bool() || rows > 1000;

    let (pre_in, d_in) = (Guarded::input(&stream, "pre_activation", &pre), Guarded::input(&stream, "d_hidden", &d));
    let ones = vec![1.0; rows];
    let weight_in = Guarded::input(&stream, "slot_weight", weight.as_deref().unwrap_or(&ones));
    let live_in = Guarded::input(&stream, "live", &[live.unwrap_or(0) as i32]);
    let launch = || {
        let mut d_pre = Guarded::<T>::output(&stream, "d_pre_activation", rows * columns);
        let mut hidden = Guarded::<T>::output(&stream, "hidden", rows * width);
        let mut d_weight = Guarded::<f32>::output(&stream, "d_slot_weight", rows);
        {
            let (pre, d, weights, number) = (pre_in.view(), d_in.view(), weight_in.view(), live_in.view());
            let (mut d_pre, mut hidden, mut d_weight) = (d_pre.view_mut(), hidden.view_mut(), d_weight.view_mut());
            let mut args = ActivationBackwardArgs::new(&pre, &d, &mut d_pre);
            args.slot_weight = weight.as_ref().map(|_| In::from(&weights));
            args.live = live.map(|_| In::from(&number));
            if wants {
                args.hidden = Some(Out::from(&mut hidden));
                args.d_slot_weight = Some(Out::from(&mut d_weight));
            }
            activation_backward::forward(kernels, &stream, desc, args).unwrap();
        }
        if !wants {
            hidden.assert_unchanged(&stream);
            d_weight.assert_unchanged(&stream);
        }
        Got { d_pre: d_pre.read(&stream), hidden: hidden.read(&stream), d_weight: d_weight.read(&stream) }
    };
    let (got, again) = (launch(), launch());
    let name = format!("{desc:?} live {live:?}");
    let same = |a: &[T], b: &[T]| bytemuck::cast_slice::<T, u8>(a) == bytemuck::cast_slice::<T, u8>(b);
    assert!(same(&got.d_pre, &again.d_pre) && same(&got.hidden, &again.hidden), "{name}: another run gave other bits");
    time(&stream, &name, || drop(launch()));
    pre_in.assert_unchanged(&stream);
    d_in.assert_unchanged(&stream);

    let there = live.unwrap_or(rows).min(rows);
    let near = |what: &str, at: usize, got: f64, want: f64, scale: f64| {
        // Past the largest number of the type: infinite.
        let stored: f64 = T::from_f64(want).into();
        if stored.is_infinite() && got == stored {
            return;
        }
        let bound = ACTIVATION_GRADIENT * scale + rounding(T::DTYPE, want.abs());
        assert!((got - want).abs() <= bound, "{name}: {what} {at} is {got}, want {want}, bound {bound:e}");
    };
    for r in 0..rows {
        let s = f64::from(weight.as_ref().map_or(1.0, |weight| weight[r]));
        let (mut dot, mut size) = (0.0, 0.0);
        for i in 0..width {
            let gate: f64 = pre[r * columns + i].into();
            let up: f64 = if glu.is_gated() { pre[r * columns + width + i].into() } else { 1.0 };
            let d: f64 = d[r * width + i].into();
            let (value, slopes) = if glu.is_gated() {
                (activate_glu(activation, gate, up), slopes_glu(activation, gate, up))
            } else {
                (activate(activation, gate), (slope(activation, gate), 0.0))
            };
            dot += d * value;
            size += (d * value).abs();
            let (gate_at, up_at) = match glu {
                Glu::UpFirst => (width + i, i),
                Glu::Interleaved => (2 * i, 2 * i + 1),
                _ => (i, width + i),
            };
            let out = |at: usize| -> f64 { got.d_pre[r * columns + at].into() };
            if r >= there {
                let junk = |value: T| bytemuck::bytes_of(&value) == bytemuck::bytes_of(&Guarded::<T>::junk());
                assert!(junk(got.d_pre[r * columns + gate_at]), "{name}: row {r} is not there, and was written");
                continue;
            }
            // A slope is a difference of terms of the size of the value's and 1.
            let scale = s * d.abs() * up.abs().max(1.0) * 4.0;
            near("gate", r * width + i, out(gate_at), s * d * slopes.0, scale.max((s * d * slopes.0).abs()));
            if glu.is_gated() {
                // 1 - tanh^2 is a difference of numbers up to 1.
                let want = s * d * slopes.1;
                let gate_value = activate(activation, gate).abs();
                near("up", r * width + i, out(up_at), want, want.abs().max(s * d.abs() * gate_value.max(0.1)));
            }
            if wants {
                near(
                    "hidden",
                    r * width + i,
                    got.hidden[r * width + i].into(),
                    s * value,
                    (s * value).abs().max(0.1 * s * up.abs()),
                );
            }
        }
        if wants && r < there {
            let error = (f64::from(got.d_weight[r]) - dot).abs();
            assert!(error <= 4.0 * ACTIVATION_GRADIENT * size.max(1e-3), "{name}: weight {r}, {error:e} of {size}");
        }
    }
}
