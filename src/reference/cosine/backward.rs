//! The gradients of a router by cosine.

use crate::reference::{ReferenceError, require, require_shape};

/// Gradients of all that [`super::cosine`] takes.
#[derive(Clone, Debug, PartialEq)]
pub struct CosineGradients {
    /// `[T,H]`.
    pub x: Vec<f64>,
    /// `[D,H]`.
    pub weight: Vec<f64>,
    /// `[D]`.
    pub bias: Vec<f64>,
    /// `[E,D]`.
    pub similar: Vec<f64>,
    /// 0 where the temperature is at its bound or above.
    pub temperature: f64,
    /// `[E]`.
    pub expert_scale: Vec<f64>,
}

/// The gradients of `sum d_logits logits`, `d_logits [T,E]`. A unit row `u = v / |v|` has `dv = (du - u (u . du)) / |v|`; one shorter than 1e-12
/// is divided by that, a constant.
///
/// # Errors
/// Lengths that do not fit.
#[allow(clippy::too_many_arguments)]
pub fn cosine_backward(
    x: &[f64],
    weight: &[f64],
    bias: &[f64],
    similar: &[f64],
    [temperature, most]: [f64; 2],
    expert_scale: Option<&[f64]>,
    d_logits: &[f64],
) -> Result<CosineGradients, ReferenceError> {
    let width = bias.len();
    require("bias", width > 0, || "at least 1 element".to_owned(), width)?;
    let (hidden, experts) = (weight.len() / width, similar.len() / width);
    require("hidden", hidden > 0, || "at least 1".to_owned(), hidden)?;
    let tokens = x.len() / hidden;
    require_shape("weight", weight, &[width, hidden])?;
    require_shape("similar", similar, &[experts, width])?;
    require_shape("x", x, &[tokens, hidden])?;
    require_shape("d_logits", d_logits, &[tokens, experts])?;
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    let length = |v: &[f64]| dot(v, v).sqrt();
    // The direction of a row, and what its gradient becomes behind it.
    let direction = |v: &[f64]| -> Vec<f64> { v.iter().map(|value| value / length(v).max(1e-12)).collect() };
    let behind = |v: &[f64], du: &[f64]| -> Vec<f64> {
        let (u, norm) = (direction(v), length(v));
        let along = if norm < 1e-12 { 0.0 } else { dot(&u, du) };
        u.iter().zip(du).map(|(u, du)| (du - u * along) / norm.max(1e-12)).collect()
    };
    let factor = temperature.min(most).exp();
    let scale = |e: usize| expert_scale.map_or(1.0, |scale| scale[e]);
    let directions: Vec<Vec<f64>> = similar.chunks(width).map(direction).collect();
    let mut d_directions = vec![vec![0.0; width]; experts];
    let mut result = CosineGradients {
        x: Vec::new(),
        weight: vec![0.0; weight.len()],
        bias: vec![0.0; width],
        similar: Vec::new(),
        temperature: 0.0,
        expert_scale: vec![0.0; experts],
    };
    for (x, d) in x.chunks(hidden).zip(d_logits.chunks(experts)) {
        let p: Vec<f64> = weight.chunks(hidden).zip(bias).map(|(row, bias)| dot(row, x) + bias).collect();
        let u = direction(&p);
        let mut du = vec![0.0; width];
        for e in 0..experts {
            let of = d[e] * factor * scale(e);
            du.iter_mut().zip(&directions[e]).for_each(|(sum, s)| *sum += of * s);
            d_directions[e].iter_mut().zip(&u).for_each(|(sum, u)| *sum += of * u);
            let cosine = dot(&u, &directions[e]);
            result.expert_scale[e] += d[e] * factor * cosine;
            result.temperature += if temperature < most { of * cosine } else { 0.0 };
        }
        let dp = behind(&p, &du);
        for (i, d) in dp.iter().enumerate() {
            result.bias[i] += d;
            result.weight[i * hidden..][..hidden].iter_mut().zip(x).for_each(|(sum, x)| *sum += d * x);
        }
        result
            .x
            .extend((0..hidden).map(|h| dp.iter().enumerate().map(|(i, d)| d * weight[i * hidden + h]).sum::<f64>()));
    }
    result.similar = similar.chunks(width).zip(&d_directions).flat_map(|(s, d)| behind(s, d)).collect();
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::super::cosine;
    use super::*;

    #[test]
    fn everything_by_finite_differences() {
        let mut rng = fastrand::Rng::with_seed(12);
        let (tokens, hidden, width, experts) = (3, 4, 5, 3);
        let mut draw = |len: usize| (0..len).map(|_| 2.0 * rng.f64() - 1.0).collect::<Vec<f64>>();
        let at =
            [draw(tokens * hidden), draw(width * hidden), draw(width), draw(experts * width), vec![0.5], draw(experts)];
        let d = draw(tokens * experts);
        let value = |at: &[Vec<f64>; 6]| -> f64 {
            let logits = cosine(&at[0], &at[1], &at[2], &at[3], [at[4][0], 2.0], Some(&at[5])).unwrap();
            logits.iter().zip(&d).map(|(l, d)| l * d).sum()
        };
        let got = cosine_backward(&at[0], &at[1], &at[2], &at[3], [at[4][0], 2.0], Some(&at[5]), &d).unwrap();
        let all = [got.x, got.weight, got.bias, got.similar, vec![got.temperature], got.expert_scale];
        for (which, got) in all.iter().enumerate() {
            for (i, &got) in got.iter().enumerate() {
                let moved = |by: f64| {
                    let mut moved = at.clone();
                    moved[which][i] += by;
                    value(&moved)
                };
                let want = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                assert!((got - want).abs() < 1e-8, "{which} {i}: {got}, want {want}");
            }
        }
        let bound = cosine_backward(&at[0], &at[1], &at[2], &at[3], [2.0, 2.0], None, &d).unwrap();
        assert_eq!(bound.temperature, 0.0);
    }
}
