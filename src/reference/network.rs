//! A router with a network and a state (Zaya: transformers 5.24, modeling_zaya.ZayaRouter), forth and back.

use super::activation::{activate, slope};
use super::rms_norm::{self, Rows};
use super::{ReferenceError, require, require_shape};
use crate::rules::{Activation, RmsNorm};

/// Inputs and weights of a network.
#[derive(Clone, Copy, Debug)]
pub struct Network<'a> {
    /// `[T, H]`.
    pub x: &'a [f64],
    /// Hidden size `H`.
    pub hidden: usize,
    /// Width `D` of state and network.
    pub width: usize,
    /// `[T, D]`: the previous layer's state.
    pub previous: Option<&'a [f64]>,
    /// `[D, H]`, and its bias `[D]`.
    pub down: (&'a [f64], Option<&'a [f64]>),
    /// `[D]`: factors of the previous state; 1 where absent.
    pub state_scale: Option<&'a [f64]>,
    /// The norm of the state.
    pub norm: RmsNorm,
    /// `[D]`, where the norm's gain has a weight.
    pub gain: Option<&'a [f64]>,
    /// `[D, D]` each, with their biases `[D]`.
    pub layers: [(&'a [f64], Option<&'a [f64]>); 2],
    /// What follows either.
    pub activation: Activation,
    /// `[E, D]`.
    pub output: &'a [f64],
}

/// What a network yields, and what stands between.
#[derive(Clone, Debug, PartialEq)]
pub struct NetworkValues {
    /// `[T, D]`: `W_down x + b_down + state_scale previous`.
    pub state: Vec<f64>,
    /// `[T, D]`, of the norm and of either layer.
    pub seen: [Vec<f64>; 3],
    /// `[T, D]`, in front of either activation.
    pub pre_activations: [Vec<f64>; 2],
    /// `[T, E]`.
    pub logits: Vec<f64>,
}

/// Gradients of all that a network reads.
#[derive(Clone, Debug, PartialEq)]
pub struct NetworkGradient {
    /// `[T, H]`.
    pub x: Vec<f64>,
    /// `[T, D]`, where there is a previous state.
    pub previous: Option<Vec<f64>>,
    /// `[D, H]` and `[D]`.
    pub down: (Vec<f64>, Vec<f64>),
    /// `[D]`, where there is a previous state; what it is where each factor is 1, too.
    pub state_scale: Option<Vec<f64>>,
    /// `[D]`, where the gain has a weight.
    pub gain: Option<Vec<f64>>,
    /// `[D, D]` and `[D]` each.
    pub layers: [(Vec<f64>, Vec<f64>); 2],
    /// `[E, D]`.
    pub output: Vec<f64>,
}

/// `v W^T + b` of rows `v [T, k]` and `W [n, k]`.
fn product(v: &[f64], (w, bias): (&[f64], Option<&[f64]>), k: usize) -> Vec<f64> {
    let dot = |row: &[f64], of: &[f64]| row.iter().zip(of).map(|(a, b)| a * b).sum::<f64>();
    let outputs = |row: &[f64]| {
        let biased = w.chunks(k).enumerate().map(|(i, of)| dot(row, of) + bias.map_or(0.0, |bias| bias[i]));
        biased.collect::<Vec<f64>>()
    };
    v.chunks(k).flat_map(outputs).collect()
}

/// Gradients of `v`, `W` and `b` from that of [`product`]: `d W`, `d^T v`, and the sums of `d`.
fn product_backward(d: &[f64], v: &[f64], w: &[f64], [n, k]: [usize; 2]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (mut dv, mut dw, mut db) = (vec![0.0; v.len()], vec![0.0; n * k], vec![0.0; n]);
    for ((d, v), dv) in d.chunks(n).zip(v.chunks(k)).zip(dv.chunks_mut(k)) {
        for i in 0..n {
            db[i] += d[i];
            for j in 0..k {
                dv[j] += d[i] * w[i * k + j];
                dw[i * k + j] += d[i] * v[j];
            }
        }
    }
    (dv, dw, db)
}

/// State and logits.
///
/// # Errors
/// Lengths that do not fit.
pub fn network(of: &Network<'_>) -> Result<NetworkValues, ReferenceError> {
    let Network { x, hidden, width, .. } = *of;
    require("hidden", hidden > 0 && x.len().is_multiple_of(hidden), || format!("rows of {hidden}"), x.len())?;
    require_shape("down", of.down.0, &[width, hidden])?;
    for layer in &of.layers {
        require_shape("layers", layer.0, &[width, width])?;
    }
    require("output", of.output.len().is_multiple_of(width), || format!("rows of {width}"), of.output.len())?;
    let projected = product(x, of.down, hidden);
    let normed = rms_norm::rms_norm(&rows(of, &projected), &of.norm)?;
    let act = |values: &[f64]| values.iter().map(|&v| activate(of.activation, v)).collect::<Vec<f64>>();
    let first = product(&normed.y, of.layers[0], width);
    let behind = act(&first);
    let second = product(&behind, of.layers[1], width);
    let last = act(&second);
    let logits = product(&last, (of.output, None), width);
    Ok(NetworkValues { state: normed.sum, seen: [normed.y, behind, last], pre_activations: [first, second], logits })
}

fn rows<'a>(of: &Network<'a>, projected: &'a [f64]) -> Rows<'a, f64> {
    Rows {
        x: projected,
        width: of.width,
        weight: of.gain,
        addend: of.previous,
        addend_scale: of.state_scale.filter(|_| of.previous.is_some()),
        row_scale: None,
        residual: None,
    }
}

/// The gradients of `sum d_logits logits + sum d_state state`.
///
/// # Errors
/// Those of [`network`], and gradients of other lengths.
pub fn network_backward(
    of: &Network<'_>,
    d_logits: &[f64],
    d_state: Option<&[f64]>,
) -> Result<NetworkGradient, ReferenceError> {
    let Network { x, hidden, width, .. } = *of;
    let values = network(of)?;
    require_shape("d_logits", d_logits, &[values.logits.len()])?;
    d_state.map(|d| require_shape("d_state", d, &[values.state.len()])).transpose()?;
    let experts = of.output.len() / width;
    let [normed, behind, last] = &values.seen;
    let through =
        |d: &[f64], pre: &[f64]| d.iter().zip(pre).map(|(d, &v)| d * slope(of.activation, v)).collect::<Vec<f64>>();
    let (d, output, _) = product_backward(d_logits, last, of.output, [experts, width]);
    let d = through(&d, &values.pre_activations[1]);
    let (d, second, second_bias) = product_backward(&d, behind, of.layers[1].0, [width; 2]);
    let d = through(&d, &values.pre_activations[0]);
    let (d, first, first_bias) = product_backward(&d, normed, of.layers[0].0, [width; 2]);
    let projected = product(x, of.down, hidden);
    let norm = rms_norm::rms_norm_backward(&rows(of, &projected), &of.norm, &d)?;
    let mut state = norm.sum;
    if let Some(more) = d_state {
        state.iter_mut().zip(more).for_each(|(sum, d)| *sum += d);
    }
    let (dx, down, down_bias) = product_backward(&state, x, of.down.0, [width, hidden]);
    let scale = |i: usize| of.state_scale.map_or(1.0, |scale| scale[i % width]);
    Ok(NetworkGradient {
        x: dx,
        previous: of.previous.map(|_| state.iter().enumerate().map(|(i, d)| scale(i) * d).collect()),
        down: (down, down_bias),
        state_scale: of.previous.map(|previous| {
            let mut sums = vec![0.0; width];
            state.iter().zip(previous).enumerate().for_each(|(i, (d, p))| sums[i % width] += d * p);
            sums
        }),
        gain: norm.weight,
        layers: [(first, first_bias), (second, second_bias)],
        output,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::Gain;

    /// Every gradient is the slope of the value.
    #[test]
    fn by_finite_differences() {
        const T: usize = 3;
        let (hidden, width, experts) = (4, 5, 6);
        let mut rng = fastrand::Rng::with_seed(4);
        let mut random = |len: usize| (0..len).map(|_| 2.0 * rng.f64() - 1.0).collect::<Vec<f64>>();
        // In the order of the gradients below.
        let mut all = [
            T * hidden,
            T * width,
            width * hidden,
            width,
            width,
            width,
            width * width,
            width,
            width * width,
            width,
            experts * width,
        ]
        .map(&mut random);
        let (d_logits, d_state) = (random(T * experts), random(T * width));
        fn of(all: &[Vec<f64>; 11], hidden: usize, width: usize) -> Network<'_> {
            Network {
                x: &all[0],
                hidden,
                width,
                previous: Some(&all[1]),
                down: (&all[2], Some(&all[3])),
                state_scale: Some(&all[4]),
                norm: RmsNorm::new(1e-3).gain(Gain::Weight),
                gain: Some(&all[5]),
                layers: [(&all[6], Some(&all[7])), (&all[8], Some(&all[9]))],
                activation: Activation::Gelu,
                output: &all[10],
            }
        }
        let value = |all: &[Vec<f64>; 11]| {
            let values = network(&of(all, hidden, width)).unwrap();
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            dot(&values.logits, &d_logits) + dot(&values.state, &d_state)
        };
        let got = network_backward(&of(&all, hidden, width), &d_logits, Some(&d_state)).unwrap();
        let [first, second] = got.layers;
        let gradients = [
            got.x,
            got.previous.unwrap(),
            got.down.0,
            got.down.1,
            got.state_scale.unwrap(),
            got.gain.unwrap(),
            first.0,
            first.1,
            second.0,
            second.1,
            got.output,
        ];
        for which in 0..all.len() {
            for i in 0..all[which].len() {
                let kept = all[which][i];
                let mut at = |step: f64| {
                    all[which][i] = kept + step;
                    value(&all)
                };
                let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
                all[which][i] = kept;
                let got = gradients[which][i];
                assert!((got - slope).abs() < 1e-7 * (1.0 + slope.abs()), "{which}[{i}]: {got}, {slope}");
            }
        }
    }
}
