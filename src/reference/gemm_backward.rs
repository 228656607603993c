//! The way back through an expert's second matrix and its activation.

use super::activation::{activate, activate_glu, slope, slopes_glu};
use super::choice_backward::sigmoid_gate;
use super::dispatch::Dispatched;
use super::{Real, ReferenceError, require, require_shape};
use crate::rules::{Activation, Glu, Layout};

/// What a row's gradients are made of.
#[derive(Clone, Copy, Debug)]
pub struct HiddenBackward<'a, T> {
    /// `[tokens, K]` with `gather`, else `[rows, K]`: the gradient of the outputs, before they were weighted.
    pub d_out: &'a [T],
    /// Whether a row reads its token's row of `d_out`.
    pub gather: bool,
    /// `[E, K, N]` ([`Layout::Nk`], outputs first) or `[E, N, K]` ([`Layout::Kn`]).
    pub weight: &'a [T],
    /// Order of the weight.
    pub layout: Layout,
    /// `[E, K]`, where the row's weight scales it too.
    pub bias: Option<&'a [T]>,
    /// Columns of a hidden row, `N`.
    pub n: usize,
    /// Outputs of the second matrix, `K`.
    pub k: usize,
    /// `[.., 2N]`, gates first, or `[.., N]` without a gate.
    pub pre_activation: &'a [T],
    /// Whether a row reads its token's row of `pre_activation`.
    pub gather_pre_activation: bool,
    /// Order of the gradients' columns.
    pub glu: Glu,
    /// Of each expert.
    pub activations: &'a [Activation],
    /// `[rows]`: the row's weight, 1 if absent.
    pub weights: Option<&'a [f32]>,
    /// Whether `weights` are logits of a gate: the row's weight is their sigmoid, and the gradient theirs.
    pub gate: bool,
    /// Factor of all weights.
    pub scale: f64,
    /// `[rows, N]`: what dropout multiplied each hidden value by, 0 or `1 / (1 - p)`; 1 if absent.
    pub kept: Option<&'a [f64]>,
}

/// Gradients by row, and the hidden row itself.
#[derive(Clone, Debug, PartialEq)]
pub struct HiddenGradients {
    /// `[rows, N]`: of the second matrix's input, before the row's weight.
    pub d: Vec<f64>,
    /// `[rows, 2N]` or `[rows, N]`, in the order of the first matrix's outputs.
    pub d_pre_activation: Vec<f64>,
    /// `[rows, N]`: what the second matrix read, times the row's weight.
    pub hidden: Vec<f64>,
    /// `[rows]`: of the row's weight.
    pub d_weight: Vec<f64>,
}

/// With `y[r] = s (W h + b)`, `h = m act(z)` and a loss L whose gradient in `y`, before `s`, is `d_out`: by the chain rule `d = W^T d_out`,
/// `dL/dz = s m d act'(z)`, `dL/ds = <d, h> + <b, d_out>` (the form without `y`: SonicMoE, Guo et al. 2025, arXiv:2512.14080, section 3), for every row that
/// `plan` gives to an expert. `s` is the row's weight times `scale`, whose own factor is in `dL/dweight`.
///
/// # Errors
/// Lengths that do not fit.
pub fn hidden_backward<T: Real>(
    what: &HiddenBackward<T>,
    plan: &Dispatched,
) -> Result<HiddenGradients, ReferenceError> {
    let &HiddenBackward { n, k, glu, .. } = what;
    let (rows, experts) = (plan.slot_token.len(), plan.counts.len());
    let columns = if glu.is_gated() { 2 * n } else { n };
    require_shape("weight", what.weight, &[experts, k, n])?;
    require_shape("activations", what.activations, &[experts])?;
    what.bias.map_or(Ok(()), |bias| require_shape("bias", bias, &[experts, k]))?;
    what.kept.map_or(Ok(()), |kept| require_shape("kept", kept, &[rows, n]))?;
    let long = |values: usize| values >= rows;
    require("weights", what.weights.is_none_or(|weights| long(weights.len())), || format!("{rows} weights"), "fewer")?;
    let d = product_backward(what, plan)?;
    let of_row = |row: usize, gathers: bool| if gathers { plan.slot_token[row] as usize } else { row };
    let mut all = HiddenGradients {
        d,
        d_pre_activation: vec![0.0; rows * columns],
        hidden: vec![0.0; rows * n],
        d_weight: vec![0.0; rows],
    };
    let of_experts = (0..).zip(&plan.counts).flat_map(|(e, &count)| std::iter::repeat_n(e, count as usize));
    for (row, expert) in of_experts.enumerate() {
        let expert: usize = expert;
        let z = &what.pre_activation[of_row(row, what.gather_pre_activation) * columns..][..columns];
        let given = what.weights.map(|weights| f64::from(weights[row]));
        let logit = given.filter(|_| what.gate);
        let weight = logit.map(|logit| sigmoid_gate(logit, None)).or(given).unwrap_or(1.0);
        let s = what.scale * weight;
        let activation = what.activations[expert];
        let mut sum = 0.0;
        for i in 0..n {
            let m = what.kept.map_or(1.0, |kept| kept[row * n + i]);
            let d = all.d[row * n + i];
            let gate: f64 = z[i].into();
            let (value, slopes) = if glu.is_gated() {
                let up = z[n + i].into();
                (activate_glu(activation, gate, up), slopes_glu(activation, gate, up))
            } else {
                (activate(activation, gate), (slope(activation, gate), 0.0))
            };
            sum += d * m * value;
            all.hidden[row * n + i] = s * m * value;
            let (gate_at, up_at) = match glu {
                Glu::UpFirst => (n + i, i),
                Glu::Interleaved => (2 * i, 2 * i + 1),
                Glu::None | Glu::Split | Glu::Apart => (i, n + i),
            };
            let out = &mut all.d_pre_activation[row * columns..][..columns];
            out[gate_at] = s * m * d * slopes.0;
            if glu.is_gated() {
                out[up_at] = s * m * d * slopes.1;
            }
        }
        if let Some(bias) = what.bias {
            let d_out = &what.d_out[of_row(row, what.gather) * k..][..k];
            sum += d_out.iter().zip(&bias[expert * k..]).map(|(&d, &b)| d.into() * b.into()).sum::<f64>();
        }
        let d_weight = what.scale * sum;
        all.d_weight[row] = logit.map_or(d_weight, |logit| sigmoid_gate(logit, Some(d_weight)));
    }
    Ok(all)
}

/// `d[r] = W[e]^T d_out[r]`, `[rows, N]`.
///
/// # Errors
/// Lengths that do not fit.
pub fn product_backward<T: Real>(what: &HiddenBackward<T>, plan: &Dispatched) -> Result<Vec<f64>, ReferenceError> {
    let &HiddenBackward { n, k, .. } = what;
    let mut d = vec![0.0; plan.slot_token.len() * n];
    require_shape("weight", what.weight, &[plan.counts.len(), k, n])?;
    let of_experts = (0..).zip(&plan.counts).flat_map(|(e, &count)| std::iter::repeat_n(e, count as usize));
    for (row, (out, expert)) in d.chunks_mut(n).zip(of_experts).enumerate() {
        let expert: usize = expert;
        let from = if what.gather { plan.slot_token[row] as usize } else { row };
        require("d_out", what.d_out.len() >= (from + 1) * k, || format!("{} rows", from + 1), what.d_out.len() / k)?;
        let d_out = &what.d_out[from * k..][..k];
        let weight = &what.weight[expert * k * n..][..k * n];
        match what.layout {
            Layout::Nk => {
                for (&factor, weight) in d_out.iter().zip(weight.chunks(n)) {
                    let factor: f64 = factor.into();
                    out.iter_mut().zip(weight).for_each(|(sum, &w)| *sum += factor * w.into());
                }
            }
            Layout::Kn => {
                out.iter_mut().zip(weight.chunks(k)).for_each(|(sum, weight)| *sum = super::router::dot(d_out, weight));
            }
        }
    }
    Ok(d)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::dispatch::{DispatchRule, dispatch};
    use crate::rules::Swiglu;

    /// Central differences of `s (W m act(z) + b)` times fixed factors.
    #[test]
    fn by_finite_differences() {
        let (n, k) = (3, 2);
        let weight = [0.3, -0.7, 0.2, 0.9, 0.4, -0.5];
        let (bias, d_out) = ([0.25, -0.125], [0.8, -1.1]);
        let (s, scale, kept) = (0.6f32, 2.5, [1.25, 0.0, 1.25]);
        let z = [0.4, -0.8, 1.3, 0.5, 0.7, -1.9];
        let plan = dispatch(&[0], &DispatchRule { experts: 1, top_k: 1, capacity: None, tile_m: 16 }).unwrap();
        for (glu, activation) in [
            (Glu::Split, Activation::from(Swiglu::GPT_OSS)),
            (Glu::Interleaved, Activation::Silu),
            (Glu::None, Activation::GeluTanh),
        ] {
            let columns = if glu.is_gated() { 2 * n } else { n };
            let loss = |z: &[f64], s: f64| -> f64 {
                let h = |i: usize| match glu {
                    Glu::None => activate(activation, z[i]),
                    _ => activate_glu(activation, z[i], z[n + i]),
                };
                (0..k)
                    .map(|o| {
                        let sum: f64 = (0..n).map(|i| weight[o * n + i] * kept[i] * h(i)).sum();
                        d_out[o] * s * scale * (sum + bias[o])
                    })
                    .sum()
            };
            let what = HiddenBackward {
                d_out: &d_out[..],
                gather: true,
                weight: &weight[..],
                layout: Layout::Nk,
                bias: Some(&bias[..]),
                n,
                k,
                pre_activation: &z[..columns],
                gather_pre_activation: false,
                glu,
                activations: &[activation],
                weights: Some(&[s]),
                gate: false,
                scale,
                kept: Some(&kept),
            };
            let got = hidden_backward(&what, &plan).unwrap();
            // A gate whose logit is s.
            let gated = hidden_backward(&HiddenBackward { gate: true, ..what }, &plan).unwrap();
            let sigmoid = |l: f64| 1.0 / (1.0 + (-l).exp());
            let of_logit = |by: f64| loss(&z, sigmoid(f64::from(s) + by));
            assert!((gated.d_weight[0] - (of_logit(1e-6) - of_logit(-1e-6)) / 2e-6).abs() < 1e-8);
            let ratio = sigmoid(s.into()) / f64::from(s);
            let scaled =
                |gated: &[f64], plain: &[f64]| gated.iter().zip(plain).all(|(g, p)| (g - ratio * p).abs() < 1e-14);
            assert!(scaled(&gated.hidden, &got.hidden) && scaled(&gated.d_pre_activation, &got.d_pre_activation));
            let transposed: Vec<f64> = (0..n).flat_map(|i| (0..k).map(move |o| weight[o * n + i])).collect();
            let other = HiddenBackward { weight: &transposed, layout: Layout::Kn, ..what };
            let apart = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(apart(&got.d, &hidden_backward(&other, &plan).unwrap().d) < 1e-15);
            let step = 1e-6;
            let s = f64::from(s);
            let close = |got: f64, plus: f64, minus: f64| {
                let want = (plus - minus) / (2.0 * step);
                assert!((got - want).abs() < 1e-8, "{glu:?} {activation:?}: {got}, {want}");
            };
            close(got.d_weight[0], loss(&z, s + step), loss(&z, s - step));
            for at in 0..columns {
                let moved = |by: f64| {
                    let mut z = z;
                    z[at] += by;
                    loss(&z, s)
                };
                let place = if glu == Glu::Interleaved { 2 * (at % n) + at / n } else { at };
                close(got.d_pre_activation[place], moved(step), moved(-step));
            }
            for (i, &m) in kept.iter().enumerate() {
                let h =
                    if glu.is_gated() { activate_glu(activation, z[i], z[n + i]) } else { activate(activation, z[i]) };
                assert!((got.hidden[i] - s * scale * m * h).abs() < 1e-15);
            }
        }
    }
}
