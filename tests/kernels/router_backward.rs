//! Checks of `router_backward_*`: whole numbers, whose sums are exact, and random ones against f64.

use cudarc::driver::DeviceRepr;
use half::{bf16, f16};
use moe_kernels::registry::{Kernel, RouterBackward, RouterBackwardBoth};
use moe_kernels::routers::router_backward::{self, InputArgs, RouterBackwardDesc, WeightArgs};
use moe_kernels::{Dtype, Error, In, Out, Workspace};

use crate::support::buffer::Guarded;
use crate::support::compare::{ROUTER_GRADIENT, Storage, rounding};
use crate::support::device;
use crate::support::inputs::normal;
use crate::timing::time;

pub fn check(variant: RouterBackward, rng: &mut fastrand::Rng) {
    match (variant.b, variant.out) {
        (Dtype::Bf16, Dtype::Bf16) => into_x::<bf16, bf16>(variant, rng),
        (Dtype::F16, Dtype::F16) => into_x::<f16, f16>(variant, rng),
        (Dtype::F32, Dtype::Bf16) => into_x::<f32, bf16>(variant, rng),
        (Dtype::F32, Dtype::F16) => into_x::<f32, f16>(variant, rng),
        (Dtype::F32, Dtype::F32) => {
            into_x::<f32, f32>(variant, rng);
            into_weight::<f32>(variant, rng);
        }
        (Dtype::Bf16, Dtype::F32) => into_weight::<bf16>(variant, rng),
        (Dtype::F16, Dtype::F32) => into_weight::<f16>(variant, rng),
        other => unreachable!("no kernel of {other:?}"),
    }
}

const SHAPES: [(usize, usize, usize); 8] = [
    (1, 1, 1),
    (70, 5, 33),
    (64, 64, 64),
    (3, 130, 65),
    (200, 8, 7),
    (66, 12, 130),
    // Less than a stage, of rows that are read four at once.
    (9, 12, 72),
    (10, 20, 136),
];

/// What has no gradient: a row in five, in each stage of 32 another one.
fn without(row: usize) -> bool {
    row % 5 == 2
}

/// Gradients, of which a row in five is 0.
fn gradients(rng: &mut fastrand::Rng, tokens: usize, experts: usize, whole: bool) -> Vec<f32> {
    let mut all: Vec<f32> =
        (0..tokens * experts).map(|_| if whole { rng.i32(-4..=4) as f32 } else { normal(rng) as f32 }).collect();
    (0..tokens).filter(|&t| without(t)).for_each(|t| all[t * experts..][..experts].fill(0.0));
    all
}

fn rows<T: Storage>(rng: &mut fastrand::Rng, len: usize, whole: bool) -> Vec<T> {
    (0..len).map(|_| T::from_f64(if whole { f64::from(rng.i32(-4..=4)) } else { normal(rng) })).collect()
}

/// Compares with `sum a b`, given as pairs, and says what a bound is relative to: the sum of magnitudes.
fn compare<T: Storage>(
    name: &str,
    at: usize,
    got: T,
    before: Option<T>,
    whole: bool,
    terms: impl Iterator<Item = (f64, f64)>,
) {
    let before: f64 = before.map_or(0.0, Into::into);
    let (want, size) = terms.fold((before, before.abs()), |(sum, size), (a, b)| (sum + a * b, size + (a * b).abs()));
    let got: f64 = got.into();
    if whole {
        let want: f64 = T::from_f64(want).into();
        assert!(got == want, "{name}: {at} is {got}, want {want}");
    } else {
        let bound = ROUTER_GRADIENT * size + rounding(T::DTYPE, want.abs());
        assert!((got - want).abs() <= bound, "{name}: {at} is {got}, want {want}, bound {bound:e}");
    }
}

fn bits<T: bytemuck::Pod>(values: &[T]) -> &[u8] {
    bytemuck::cast_slice(values)
}

fn into_x<W: Storage + DeviceRepr, X: Storage + DeviceRepr>(variant: RouterBackward, rng: &mut fastrand::Rng) {
    let (kernels, stream) = (device::kernels(), device::stream());
    for (turn, (tokens, experts, hidden)) in SHAPES.into_iter().enumerate() {
        for whole in [true, false] {
            let desc = RouterBackwardDesc::new(X::DTYPE, tokens, experts, hidden)
                .weight(W::DTYPE)
                .accumulate((turn + usize::from(whole)) % 2 == 0);
            let selection = router_backward::select_into_x(&desc, kernels.device()).unwrap();
            assert_eq!(selection.kernel.variant(), Kernel::RouterBackward(variant));
            let (mut d, mut weight) = (gradients(rng, tokens, experts, whole), rows::<W>(rng, experts * hidden, whole));
            // An expert that has no gradient of any token may have any row.
            for e in (0..experts).filter(|&e| without(e)) {
                d.iter_mut().skip(e).step_by(experts).for_each(|d| *d = 0.0);
                weight[e * hidden..][..hidden].fill(W::from_f64(f64::NAN));
            }
            // Every other turn a gate goes along: a column more of gradients, a row more of the weight.
            let gated = turn % 2 == 0;
            let (d_gate, gate) = (gradients(rng, tokens, 1, whole), rows::<W>(rng, hidden, whole));
            let d_gate_in = Guarded::input(&stream, "gate.d_logits", &d_gate);
            let gate_in = Guarded::shifted_input(&stream, "gate.weight", &gate, 1);
            let desc = desc.gate(gated);
            let before = rows::<X>(rng, tokens * hidden, whole);
            let (d_in, w_in) = (Guarded::input(&stream, "d_logits", &d), Guarded::input(&stream, "weight", &weight));
            let launch = || {
                let mut dx = if desc.accumulate {
                    Guarded::filled_output(&stream, "dx", &before, 0)
                } else {
                    Guarded::<X>::output(&stream, "dx", tokens * hidden)
                };
                {
                    let (d, w, mut to) = (d_in.view(), w_in.view(), dx.view_mut());
                    if gated {
                        let (d_gate, gate) = (d_gate_in.view(), gate_in.view());
                        let args = InputArgs::<X, W>::new(&d, &w, &mut to).gate(&d_gate, &gate);
                        router_backward::input(kernels, &stream, &desc, args).unwrap();
                    } else {
                        router_backward::into_x::<X, W>(kernels, &stream, &desc, &d, &w, &mut to).unwrap();
                    }
                }
                dx.read(&stream)
            };
            let got = launch();
            let name = format!("{desc:?}");
            assert!(bits(&got) == bits(&launch()), "{name}: another run gave other bits");
            time(&stream, &name, || drop(launch()));
            d_in.assert_unchanged(&stream);
            for (at, &value) in got.iter().enumerate() {
                let (t, h) = (at / hidden, at % hidden);
                let with = (0..experts).filter(|&e| !without(e));
                let terms = with.map(|e| (f64::from(d[t * experts + e]), weight[e * hidden + h].into()));
                let terms = terms.chain(gated.then(|| (f64::from(d_gate[t]), gate[h].into())));
                compare(&name, at, value, desc.accumulate.then(|| before[at]), whole, terms);
            }
        }
    }
}

/// Shapes of which the tokens are added up in parts, where a workspace is lent.
const IN_PARTS: [(usize, usize, usize); 4] = [(2100, 5, 33), (600, 130, 65), (1000, 64, 264), (700, 1, 1)];

fn into_weight<X: Storage + DeviceRepr>(variant: RouterBackward, rng: &mut fastrand::Rng) {
    for (turn, (tokens, experts, hidden)) in SHAPES.into_iter().chain(IN_PARTS).chain([(0, 3, 5)]).enumerate() {
        for whole in [true, false] {
            let desc = RouterBackwardDesc::new(X::DTYPE, tokens, experts, hidden)
                .accumulate((turn + usize::from(whole)) % 2 == 1);
            for (with_bias, lent) in [(false, false), (true, true)] {
                // A gate goes along with each of them in turn.
                let desc = desc.gate((turn / 2 + usize::from(lent)) % 2 == 0);
                weight::<X>(variant, rng, &desc, whole, with_bias, lent);
            }
        }
    }
    if X::DTYPE == Dtype::F32 {
        // More tiles of parts than blocks run at once, so that one sees to two: this kernel has one block a multiprocessor.
        let tiles = device::kernels().device().multiprocessors as usize / 2 + 1;
        weight::<X>(variant, rng, &RouterBackwardDesc::new(X::DTYPE, 512, 1, 128 * tiles), true, true, true);
    }
    workspace_is_needed::<X>();
}

fn weight<X: Storage + DeviceRepr>(
    variant: RouterBackward,
    rng: &mut fastrand::Rng,
    desc: &RouterBackwardDesc,
    whole: bool,
    with_bias: bool,
    lent: bool,
) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let &RouterBackwardDesc { tokens, experts, hidden, .. } = desc;
    let (selection, parts) = router_backward::select_weight(desc, kernels.device()).unwrap();
    assert_eq!(selection.kernel.variant(), Kernel::RouterBackward(variant));
    assert_eq!(parts > 1, tokens >= 512, "{desc:?}: {parts} parts");
    let d = gradients(rng, tokens, experts, whole);
    let mut x = rows::<X>(rng, tokens * hidden, whole);
    // What no gradient reaches may be anything.
    (0..tokens).filter(|&t| without(t)).for_each(|t| x[t * hidden..][..hidden].fill(X::from_f64(f64::NAN)));
    let d_gate: Vec<f32> = gradients(rng, tokens, 1, whole);
    let d_gate_in = Guarded::input(&stream, "gate.d_logits", &d_gate);
    let before = [experts * hidden, experts, hidden].map(|len| rows::<f32>(rng, len, whole));
    let (d_in, x_in) = (Guarded::input(&stream, "d_logits", &d), Guarded::input(&stream, "x", &x));
    let bytes = router_backward::workspace_bytes(desc).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    let mut launch = || {
        let mut out = [("d_weight", 0), ("d_bias", 1), ("gate.d_weight", 2)].map(|(what, i)| {
            // Of the gate alone outputs that are not written two at once, and those of the router with them.
            let shift = if i == 2 { experts % 2 } else { 0 };
            let junk = vec![Guarded::<f32>::junk(); before[i].len()];
            Guarded::filled_output(&stream, what, if desc.accumulate { &before[i] } else { &junk }, shift)
        });
        {
            let (d, x, d_gate) = (d_in.view(), x_in.view(), d_gate_in.view());
            let [to, bias, to_gate] = &mut out.each_mut().map(Guarded::view_mut);
            let mut args = WeightArgs::new(&d, &x, to);
            args.d_bias = with_bias.then(|| Out::from(bias));
            args.gate = desc.gate.then(|| (In::from(&d_gate), Out::from(to_gate)));
            args.workspace = lent.then_some(&mut workspace);
            router_backward::weight::<X>(kernels, &stream, desc, args).unwrap();
        }
        if !with_bias {
            out[1].assert_unchanged(&stream);
        }
        if !desc.gate {
            out[2].assert_unchanged(&stream);
        }
        out.map(|out| out.read(&stream))
    };
    let got = launch();
    let name = format!("{desc:?} bias {with_bias} workspace {lent}");
    let again = launch();
    assert!((0..3).all(|i| bits(&got[i]) == bits(&again[i])), "{name}: another run gave other bits");
    time(&stream, &name, || drop(launch()));
    d_in.assert_unchanged(&stream);
    let live = || (0..tokens).filter(|&t| !without(t));
    for (at, &value) in got[0].iter().enumerate() {
        let (e, h) = (at / hidden, at % hidden);
        let terms = live().map(|t| (f64::from(d[t * experts + e]), x[t * hidden + h].into()));
        compare(&name, at, value, desc.accumulate.then(|| before[0][at]), whole, terms);
    }
    for (h, &value) in got[2].iter().enumerate().filter(|_| desc.gate) {
        let terms = live().map(|t| (f64::from(d_gate[t]), x[t * hidden + h].into()));
        compare(&format!("{name}: gate"), h, value, desc.accumulate.then(|| before[2][h]), whole, terms);
    }
    for (e, &value) in got[1].iter().enumerate().filter(|_| with_bias) {
        let terms = live().map(|t| (f64::from(d[t * experts + e]), 1.0));
        compare(&format!("{name}: bias"), e, value, desc.accumulate.then(|| before[1][e]), whole, terms);
    }
}

pub fn check_both(variant: RouterBackwardBoth, rng: &mut fastrand::Rng) {
    match (variant.x, variant.weight) {
        (Dtype::Bf16, Dtype::Bf16) => both::<bf16, bf16>(variant, rng),
        (Dtype::Bf16, Dtype::F32) => both::<bf16, f32>(variant, rng),
        (Dtype::F16, Dtype::F16) => both::<f16, f16>(variant, rng),
        (Dtype::F16, Dtype::F32) => both::<f16, f32>(variant, rng),
        (Dtype::F32, Dtype::F32) => both::<f32, f32>(variant, rng),
        other => unreachable!("no kernel of {other:?}"),
    }
}

/// The bits of both launches of their own, which are checked by themselves; tokens in one part and in several.
fn both<X: Storage + DeviceRepr, W: Storage + DeviceRepr>(variant: RouterBackwardBoth, rng: &mut fastrand::Rng) {
    let (kernels, stream) = (device::kernels(), device::stream());
    for (turn, (tokens, experts, hidden)) in SHAPES.into_iter().chain(IN_PARTS).chain([(0, 3, 5)]).enumerate() {
        let desc = RouterBackwardDesc::new(X::DTYPE, tokens, experts, hidden).weight(W::DTYPE);
        let (accumulate, added, with_bias) = (turn % 2 == 0, turn % 3 == 0, turn % 4 < 2);
        let desc = desc.accumulate(accumulate).gate(turn / 2 % 2 == 0);
        let selection = router_backward::select_both(&desc, kernels.device()).unwrap().0;
        assert_eq!(selection.kernel.variant(), Kernel::RouterBackwardBoth(variant));
        let (mut d, d_gate) = (gradients(rng, tokens, experts, false), gradients(rng, tokens, 1, false));
        let (mut x, mut matrix) = (rows::<X>(rng, tokens * hidden, false), rows::<W>(rng, experts * hidden, false));
        // What no gradient reaches may be anything: tokens, and an expert.
        (0..tokens).filter(|&t| without(t)).for_each(|t| x[t * hidden..][..hidden].fill(X::from_f64(f64::NAN)));
        if experts > 1 {
            d.iter_mut().skip(1).step_by(experts).for_each(|d| *d = 0.0);
            matrix[hidden..2 * hidden].fill(W::from_f64(f64::NAN));
        }
        let gate = rows::<W>(rng, hidden, false);
        let floats = [("d_logits", &d), ("gate.d_logits", &d_gate)].map(|(what, of)| Guarded::input(&stream, what, of));
        let x_in = Guarded::input(&stream, "x", &x);
        let of_w = [("weight", &matrix), ("gate.weight", &gate)].map(|(what, of)| Guarded::input(&stream, what, of));
        let before = [experts * hidden, experts, hidden].map(|len| rows::<f32>(rng, len, false));
        let dx_before = rows::<X>(rng, tokens * hidden, false);
        let bytes = router_backward::workspace_bytes(&desc).unwrap();
        let mut workspace = Workspace::new(&stream, bytes).unwrap();
        let mut launch = |together: bool| {
            let mut out = [("d_weight", 0), ("d_bias", 1), ("gate.d_weight", 2)].map(|(what, i)| {
                let junk = vec![Guarded::<f32>::junk(); before[i].len()];
                Guarded::filled_output(&stream, what, if accumulate { &before[i] } else { &junk }, 0)
            });
            let mut dx = match added {
                true => Guarded::filled_output(&stream, "dx", &dx_before, 0),
                false => Guarded::<X>::output(&stream, "dx", tokens * hidden),
            };
            {
                let ([d, d_gate], [w, gate]) =
                    (floats.each_ref().map(Guarded::view), of_w.each_ref().map(Guarded::view));
                let (x, mut dx) = (x_in.view(), dx.view_mut());
                let [to, bias, to_gate] = &mut out.each_mut().map(Guarded::view_mut);
                let mut into_x = InputArgs::<X, W>::new(&d, &w, &mut dx);
                into_x.gate = desc.gate.then(|| (In::from(&d_gate), In::from(&gate)));
                let mut into_weight = WeightArgs::new(&d, &x, to).workspace(&mut workspace);
                into_weight.d_bias = with_bias.then(|| Out::from(bias));
                into_weight.gate = desc.gate.then(|| (In::from(&d_gate), Out::from(to_gate)));
                if together {
                    router_backward::both(kernels, &stream, &desc, into_x, added, into_weight).unwrap();
                } else {
                    router_backward::input(kernels, &stream, &desc.accumulate(added), into_x).unwrap();
                    router_backward::weight(kernels, &stream, &desc, into_weight).unwrap();
                }
            }
            (out.map(|out| out.read(&stream)), dx.read(&stream))
        };
        let (want, want_dx) = launch(false);
        let name = format!("{desc:?} bias {with_bias} added {added}");
        for _ in 0..2 {
            let (got, dx) = launch(true);
            (0..3).for_each(|i| assert!(bits(&got[i]) == bits(&want[i]), "{name}: gradient {i}"));
            assert!(bits(&dx) == bits(&want_dx), "{name}: dx");
        }
        assert!(want[0].iter().all(|v| v.is_finite()) || experts * hidden == 0, "{name}");
        time(&stream, &name, || drop(launch(true)));
        floats.iter().for_each(|buffer| buffer.assert_unchanged(&stream));
    }
}

fn workspace_is_needed<X: Storage + DeviceRepr>() {
    let (kernels, stream) = (device::kernels(), device::stream());
    let desc = RouterBackwardDesc::new(X::DTYPE, 600, 2, 3);
    let (d, x) =
        (Guarded::input(&stream, "d_logits", &[0f32; 1200]), rows::<X>(&mut fastrand::Rng::with_seed(0), 1800, true));
    let x = Guarded::input(&stream, "x", &x);
    let mut out = Guarded::<f32>::output(&stream, "d_weight", 6);
    let mut workspace = Workspace::new(&stream, router_backward::workspace_bytes(&desc).unwrap() - 1).unwrap();
    let (d, x, mut to) = (d.view(), x.view(), out.view_mut());
    let args = WeightArgs::new(&d, &x, &mut to).workspace(&mut workspace);
    let error = router_backward::weight::<X>(kernels, &stream, &desc, args).unwrap_err();
    assert!(matches!(error, Error::WorkspaceTooSmall { .. }), "{error}");
}
