//! Logits by cosine.

mod backward;

use super::{ReferenceError, require, require_shape};

pub use backward::{CosineGradients, cosine_backward};

/// `logits_te = exp(min(temperature, most)) f_e (p_t / |p_t|) . (s_e / |s_e|)`, `p = W x + b`, norms at least 1e-12 (Tutel's `CosineTopKGate`, where
/// `f` is 1).
///
/// `x [T,H]`, `weight [D,H]`, `bias [D]`, `similar [E,D]` (`s`), `expert_scale [E]` (`f`).
///
/// # Errors
/// Lengths that do not fit.
pub fn cosine(
    x: &[f64],
    weight: &[f64],
    bias: &[f64],
    similar: &[f64],
    [temperature, most]: [f64; 2],
    expert_scale: Option<&[f64]>,
) -> Result<Vec<f64>, ReferenceError> {
    let width = bias.len();
    require("bias", width > 0, || "at least 1 element".to_owned(), width)?;
    let (hidden, experts) = (weight.len() / width, similar.len() / width);
    require("hidden", hidden > 0, || "at least 1".to_owned(), hidden)?;
    require_shape("weight", weight, &[width, hidden])?;
    require_shape("similar", similar, &[experts, width])?;
    require_shape("x", x, &[x.len() / hidden, hidden])?;
    if let Some(scale) = expert_scale {
        require_shape("expert_scale", scale, &[experts])?;
    }
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    let norm = |v: &[f64]| dot(v, v).sqrt().max(1e-12);
    let factor = temperature.min(most).exp();
    let logits = x.chunks(hidden).flat_map(|x| {
        let p: Vec<f64> = weight.chunks(hidden).zip(bias).map(|(row, bias)| dot(row, x) + bias).collect();
        let of = move |(e, s): (usize, &[f64])| {
            factor * expert_scale.map_or(1.0, |scale| scale[e]) * dot(&p, s) / (norm(&p) * norm(s))
        };
        similar.chunks(width).enumerate().map(of)
    });
    Ok(logits.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_do_not_matter() {
        // p = (3, 4): cosines with (1, 0), (0, -2) and with nothing.
        let similar = [1.0, 0.0, 0.0, -2.0, 0.0, 0.0];
        let got = cosine(&[2.0], &[1.0, 2.0], &[1.0, 0.0], &similar, [9.0, 2.0f64.ln()], None).unwrap();
        let want = [1.2, -1.6, 0.0];
        assert!(got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-12), "{got:?}");
    }
}
