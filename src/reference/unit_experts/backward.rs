//! The way back through experts of one unit.

use crate::reference::activation::{activate, slope};
use crate::reference::router::dot;
use crate::reference::{Real, ReferenceError, require, require_shape};
use crate::rules::Activation;

/// What [`super::unit_experts`] passes back; an addend has the gradient `dy`.
#[derive(Clone, Debug, PartialEq)]
pub struct UnitGradients {
    /// `[T,H]`.
    pub x: Vec<f64>,
    /// `[E,H]`.
    pub input: Vec<f64>,
    /// `[E,H]`.
    pub output: Vec<f64>,
    /// `[T,k]`; zero for an id that is no expert.
    pub weights: Vec<f64>,
}

/// The gradients of `sum dy y`. Of a choice with `p = input[e] . x`, `a = act(p)`, `c = output[e] . dy` and the weight `w`: `dw = a c`,
/// `d_output = w a dy`, and with `dp = w act'(p) c`, `d_input = dp x`, `dx = dp input[e]`.
///
/// # Errors
/// Lengths that do not fit.
#[allow(clippy::too_many_arguments)]
pub fn unit_experts_backward<T: Real>(
    x: &[T],
    input: &[T],
    output: &[T],
    ids: &[i32],
    weights: &[f64],
    hidden: usize,
    activation: Activation,
    dy: &[f64],
) -> Result<UnitGradients, ReferenceError> {
    require("hidden", hidden > 0, || "at least 1".into(), hidden)?;
    require("x", x.len().is_multiple_of(hidden), || format!("rows of {hidden}"), x.len())?;
    require_shape("output", output, &[input.len()])?;
    require_shape("dy", dy, &[x.len()])?;
    let (tokens, experts) = (x.len() / hidden, input.len() / hidden);
    require("ids", ids.len().is_multiple_of(tokens.max(1)), || format!("{tokens} rows"), ids.len())?;
    require_shape("weights", weights, &[ids.len()])?;

    let top_k = ids.len() / tokens.max(1);
    let zeros = |length| vec![0.0; length];
    let mut gradients = UnitGradients {
        x: zeros(x.len()),
        input: zeros(input.len()),
        output: zeros(output.len()),
        weights: zeros(ids.len()),
    };
    for (slot, &id) in ids.iter().enumerate() {
        let Some(expert) = usize::try_from(id).ok().filter(|&id| id < experts) else { continue };
        let (token, row) =
            (slot / top_k * hidden..slot / top_k * hidden + hidden, expert * hidden..(expert + 1) * hidden);
        let (x, input, dy) = (&x[token.clone()], &input[row.clone()], &dy[token.clone()]);
        let (p, c, w) = (dot(input, x), dot(&output[row.clone()], dy), weights[slot]);
        let (a, d_p) = (activate(activation, p), w * slope(activation, p) * c);
        gradients.weights[slot] = a * c;
        gradients.output[row.clone()].iter_mut().zip(dy).for_each(|(d, dy)| *d += w * a * dy);
        gradients.input[row].iter_mut().zip(x).for_each(|(d, &x)| *d += d_p * x.into());
        gradients.x[token].iter_mut().zip(input).for_each(|(d, &w)| *d += d_p * w.into());
    }
    Ok(gradients)
}

#[cfg(test)]
mod tests {
    use super::super::unit_experts;
    use super::*;

    #[test]
    fn by_finite_differences() {
        let mut rng = fastrand::Rng::with_seed(5);
        let mut random = |length: usize| (0..length).map(|_| 2.0 * rng.f64() - 1.0).collect::<Vec<f64>>();
        let (hidden, ids) = (3, [0, 2, 1, 1, -1, 3]);
        let values = [random(2 * hidden), random(4 * hidden), random(4 * hidden), random(6)];
        let dy = random(2 * hidden);
        let value = |[x, input, output, weights]: &[Vec<f64>; 4]| -> f64 {
            let y = unit_experts(x, input, output, &ids, weights, None, hidden, Activation::Silu).unwrap();
            y.iter().zip(&dy).map(|(y, d)| y * d).sum()
        };
        let [x, input, output, weights] = &values;
        let got = unit_experts_backward(x, input, output, &ids, weights, hidden, Activation::Silu, &dy).unwrap();
        for (at, got) in [got.x, got.input, got.output, got.weights].iter().enumerate() {
            for (i, got) in got.iter().enumerate() {
                let moved = |by: f64| {
                    let mut moved = values.clone();
                    moved[at][i] += by;
                    value(&moved)
                };
                let want = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                assert!((got - want).abs() < 1e-9, "{at} {i}: {got}, want {want}");
            }
        }
    }
}
