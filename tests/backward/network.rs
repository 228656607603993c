//! A router's network and state: the whole way back in one call, against the reference.

use half::bf16;
use moe_kernels::experts::Weight;
use moe_kernels::reference::network::{Network, network_backward};
use moe_kernels::routers::network::{
    NetworkBackwardArgs, NetworkBackwardPlan, NetworkDesc, NetworkGradients, NetworkWeights,
};
use moe_kernels::rules::{Activation, Gain, RmsNorm};
use moe_kernels::{Dtype, Element, Error, Workspace};

use crate::compare::{GUARD, HELD, JUNK, norm, read};
use crate::device;
use crate::mlp::{random, upload};

/// Which inputs there are.
#[derive(Clone, Copy, Debug)]
struct With {
    previous: bool,
    scale: bool,
    biases: bool,
    /// The next layer's part of the state's gradient.
    state: bool,
    gain: Gain,
    add: bool,
}

const ALL: With = With { previous: true, scale: true, biases: true, state: true, gain: Gain::Weight, add: true };

#[test]
fn against_the_reference() {
    let first = With { previous: false, scale: false, state: false, add: false, ..ALL };
    for with in
        [ALL, first, With { state: false, ..ALL }, With { scale: false, ..ALL }, With { biases: false, ..first }]
    {
        case::<f32>([37, 24, 16, 11], with);
        case::<bf16>([37, 24, 16, 11], with);
    }
    // Any width; many tokens, whose sums are made in parts; one.
    case::<f32>([5, 19, 13, 3], With { gain: Gain::One, ..ALL });
    case::<bf16>([700, 64, 32, 17], ALL);
    case::<f32>([1, 8, 8, 1], ALL);
    case::<f32>([0, 8, 8, 4], With { add: false, ..ALL });
}

fn case<T: Element>([tokens, hidden, width, experts]: [usize; 4], with: With) {
    let name = format!("{} {tokens} {hidden} {width} {experts} {with:?}", T::DTYPE);
    let (stream, kernels) = (device::stream(), device::kernels());
    let mut rng = fastrand::Rng::with_seed(11);
    let x = random::<T>(&mut rng, tokens * hidden, 1.0);
    let (down, down_bias) = (random::<T>(&mut rng, width * hidden, 0.5), random::<T>(&mut rng, width, 0.5));
    let mut numbers = |len: usize| random::<f32>(&mut rng, len, 0.5);
    let layers = [(); 2].map(|()| (numbers(width * width), numbers(width)));
    let (output, gain, scale) = (numbers(experts * width), numbers(width), numbers(width));
    let (previous, d_logits, d_state) = (numbers(tokens * width), numbers(tokens * experts), numbers(tokens * width));
    let rule = RmsNorm::new(1e-5).gain(with.gain);

    let desc = NetworkDesc::new(T::DTYPE, tokens, hidden, width, experts, rule).state(Dtype::F32);
    let plan = NetworkBackwardPlan::new(&desc, kernels.device()).unwrap().add_to_x(with.add);
    let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).unwrap();
    let on = |values: &[f32]| upload(&stream, values);
    let (x_on, down_on, down_bias_on) = (upload(&stream, &x), upload(&stream, &down), upload(&stream, &down_bias));
    let layers_on = layers.each_ref().map(|(matrix, bias)| (on(matrix), on(bias)));
    let (output_on, gain_on, scale_on) = (on(&output), on(&gain), on(&scale));
    let (previous_on, d_logits_on, d_state_on) = (on(&previous), on(&d_logits), on(&d_state));
    let layer = |which: usize| {
        let (matrix, bias) = &layers_on[which];
        if with.biases { Weight::new(matrix).bias(bias) } else { Weight::new(matrix) }
    };
    let of_x = Weight::new(&down_on);
    let of_x = if with.biases { of_x.bias(&down_bias_on) } else { of_x };
    let mut weights = NetworkWeights::new(of_x, [layer(0), layer(1)], &output_on);
    weights.norm = with.gain.has_weight().then_some((&gain_on).into());
    weights.state_scale = with.scale.then_some((&scale_on).into());

    fn full<E: Element>(len: usize, value: f32) -> cudarc::driver::CudaSlice<E> {
        let mut all = vec![E::from_f32(value); len];
        all.extend([E::from_f32(JUNK); GUARD]);
        device::stream().clone_htod(&all).unwrap()
    }
    let run = |workspace: &mut Workspace| {
        let mut dx = full::<T>(tokens * hidden, if with.add { HELD } else { JUNK });
        let lens = [
            tokens * width,
            width * hidden,
            width,
            width,
            width,
            width * width,
            width,
            width * width,
            width,
            experts * width,
        ];
        let mut outs = lens.map(|len| full::<f32>(len, JUNK));
        {
            let [d_previous, d_down, d_down_bias, d_scale, d_gain, first, first_bias, second, second_bias, d_output] =
                &mut outs;
            let mut to = NetworkGradients::new().x(&mut dx).down(d_down).output(d_output);
            to.layers = [Some(first.into()), Some(second.into())];
            if with.biases {
                to = to.down_bias(d_down_bias);
                to.layer_biases = [Some(first_bias.into()), Some(second_bias.into())];
            }
            if with.previous {
                to.previous = Some(d_previous.into());
                to.state_scale = with.scale.then_some(d_scale.into());
            }
            to.norm = with.gain.has_weight().then_some(d_gain.into());
            let mut args = NetworkBackwardArgs::new(&x_on, &d_logits_on, to);
            args.previous = with.previous.then_some((&previous_on).into());
            args.d_state = with.state.then_some((&d_state_on).into());
            plan.backward(kernels, &stream, &weights, args, workspace).unwrap();
        }
        let mut found = vec![read(&stream, "x", &dx)];
        found.extend(outs.iter().map(|out| read(&stream, "gradient", out)));
        found
    };
    let got = run(&mut workspace);
    assert!(got == run(&mut workspace), "{name}: another run gave other bits");

    let wide = |values: &[T]| values.iter().map(|v| v.to_f32().into()).collect::<Vec<f64>>();
    let wide32 = |values: &[f32]| values.iter().map(|&v| v.into()).collect::<Vec<f64>>();
    let (x, down, down_bias) = (wide(&x), wide(&down), wide(&down_bias));
    let layers = layers.each_ref().map(|(matrix, bias)| (wide32(matrix), wide32(bias)));
    let (output, gain, scale) = (wide32(&output), wide32(&gain), wide32(&scale));
    let (previous, d_logits, d_state) = (wide32(&previous), wide32(&d_logits), wide32(&d_state));
    let biased = |bias: &'_ Vec<f64>| with.biases.then(|| bias.clone());
    let biases = [&layers[0].1, &layers[1].1, &down_bias].map(biased);
    let of = Network {
        x: &x,
        hidden,
        width,
        previous: with.previous.then_some(&previous[..]),
        down: (&down, biases[2].as_deref()),
        state_scale: with.scale.then_some(&scale[..]),
        norm: rule,
        gain: with.gain.has_weight().then_some(&gain[..]),
        layers: [(&layers[0].0, biases[0].as_deref()), (&layers[1].0, biases[1].as_deref())],
        activation: Activation::Gelu,
        output: &output,
    };
    let want = network_backward(&of, &d_logits, with.state.then_some(&d_state[..])).unwrap();
    let dx = want.x.iter().map(|d| d + if with.add { f64::from(HELD) } else { 0.0 }).collect::<Vec<f64>>();
    let [first, second] = want.layers;
    // One that is not asked for stays as it was.
    let junk = |there: bool, values: Vec<f64>| if there { values } else { vec![JUNK.into(); values.len()] };
    let scaled = with.previous && with.scale;
    let wants = [
        dx,
        want.previous.unwrap_or_else(|| vec![JUNK.into(); tokens * width]),
        want.down.0,
        junk(with.biases, want.down.1),
        junk(scaled, want.state_scale.unwrap_or_else(|| vec![0.0; width])),
        want.gain.unwrap_or_else(|| vec![JUNK.into(); width]),
        first.0,
        junk(with.biases, first.1),
        second.0,
        junk(with.biases, second.1),
        want.output,
    ];
    for (which, (got, want)) in got.iter().zip(&wants).enumerate() {
        assert_eq!(got.len(), want.len(), "{name}: {which}");
        let error = norm(got.iter().zip(want).map(|(got, want)| got - want));
        let size = norm(want.iter().copied());
        // Products of f32 behind one another; of x the rounding of its type.
        let most = if which == 0 && T::DTYPE == Dtype::Bf16 { 2f64.powi(-8) } else { 2e-5 };
        assert!(error <= most * size, "{name}: gradient {which} is off by {error:e} of {size:e}");
    }
}

#[test]
fn refusals() {
    let (stream, kernels) = (device::stream(), device::kernels());
    let desc = NetworkDesc::new(Dtype::Bf16, 3, 8, 8, 4, RmsNorm::new(1e-5).gain(Gain::One));
    let fault = |result: Result<(), Error>| result.unwrap_err().argument().unwrap();
    assert_eq!(fault(NetworkBackwardPlan::new(&desc, kernels.device()).map(drop)), "state");
    let plan = NetworkBackwardPlan::new(&desc.state(Dtype::F32), kernels.device()).unwrap();
    let (x, ones) = (upload(&stream, &[bf16::ONE; 64]), upload(&stream, &[1.0f32; 64]));
    let weights = NetworkWeights::new(Weight::new(&x), [Weight::new(&ones), Weight::new(&ones)], &ones);
    let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).unwrap();
    let mut out = stream.alloc_zeros::<f32>(64).unwrap();
    let mut of = |change: &dyn for<'a> Fn(&mut NetworkGradients<'a, bf16>, moe_kernels::Out<'a, f32>)| {
        let mut to = NetworkGradients::new();
        change(&mut to, (&mut out).into());
        let args = NetworkBackwardArgs::new(&x, &ones, to);
        fault(plan.backward(kernels, &stream, &weights, args, &mut workspace))
    };
    assert_eq!(of(&|to, out| to.previous = Some(out)), "gradients.previous");
    assert_eq!(of(&|to, out| to.state_scale = Some(out)), "gradients.state_scale");
    assert_eq!(of(&|to, out| to.norm = Some(out)), "gradients.norm");
    assert_eq!(of(&|to, out| to.down_bias = Some(out)), "gradients.down_bias");
    assert_eq!(of(&|to, out| to.layer_biases[1] = Some(out)), "gradients.layer_biases");
}
