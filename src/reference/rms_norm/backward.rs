//! The way back through an RMS norm.

use super::Rows;
use crate::reference::{Real, ReferenceError, require_shape};
use crate::rules::{Gain, RmsNorm};

/// What [`super::rms_norm`] passes back.
#[derive(Clone, Debug, PartialEq)]
pub struct NormGradient {
    /// `[R, W]`, of `x + addend_scale addend`: of `x`, and times `addend_scale` of the addend. A residual has the gradient `dy`.
    pub sum: Vec<f64>,
    /// `[W]`, where the gain has a weight.
    pub weight: Option<Vec<f64>>,
    /// `[R]`, of the row factors; what they are where each is 1, too.
    pub row_scale: Vec<f64>,
}

/// The gradients of `sum dy y`, where `y [R,W]` is what [`super::rms_norm`] makes of the same arguments.
///
/// With `u` the row (times its gain if that comes first), `m` the mean of its squares and `f = factor / sqrt(m + epsilon)`, the row is
/// `y = s f u g`. For `c = s g dy`: `du = f c - f u (c . u) / (W (m + epsilon))`, `dg = sum s f u dy`, `ds = f (u g) . dy`. Where the row is
/// rounded before it is normalised, the rounding's slope is 1.
/// Where `m + epsilon` is below the norm's `least` that stands in its place, and `du = f c`.
///
/// # Errors
/// Those of [`super::rms_norm`], and a `dy` of another length.
pub fn rms_norm_backward<T: Real>(
    rows: &Rows<'_, T>,
    norm: &RmsNorm,
    dy: &[f64],
) -> Result<NormGradient, ReferenceError> {
    let width = rows.width;
    let v = super::rms_norm(rows, norm)?.sum;
    require_shape("dy", dy, &[v.len()])?;
    let gain: Vec<f64> = (0..width)
        .map(|c| match (norm.gain, rows.weight) {
            (Gain::One, _) | (_, None) => 1.0,
            (Gain::Weight, Some(weight)) => weight[c].into(),
            (Gain::OnePlus | Gain::OnePlusFirst, Some(weight)) => 1.0 + weight[c].into(),
        })
        .collect();
    let is_first = norm.gain == Gain::OnePlusFirst;
    let mut gradient = NormGradient { sum: Vec::with_capacity(v.len()), weight: None, row_scale: Vec::new() };
    let mut d_gain = vec![0.0; width];
    for (r, (v, dy)) in v.chunks(width).zip(dy.chunks(width)).enumerate() {
        let row_scale = rows.row_scale.map_or(1.0, |list| list[r]);
        let u: Vec<f64> = v.iter().zip(&gain).map(|(v, g)| if is_first { T::round(v * g) } else { *v }).collect();
        let after = |c: usize| if is_first { 1.0 } else { gain[c] };
        let mean = u.iter().map(|u| u * u).sum::<f64>() / width as f64 + f64::from(norm.epsilon);
        let least = f64::from(norm.least);
        let (mean, bends) = if mean < least { (least, 0.0) } else { (mean, 1.0) };
        let factor = f64::from(norm.factor) / mean.sqrt();
        let c: Vec<f64> = dy.iter().enumerate().map(|(i, dy)| row_scale * after(i) * dy).collect();
        let dot: f64 = c.iter().zip(&u).map(|(c, u)| c * u).sum();
        let d_u = c.iter().zip(&u).map(|(c, u)| factor * (c - bends * u * dot / (width as f64 * mean)));
        for (i, d_u) in d_u.enumerate() {
            gradient.sum.push(if is_first { d_u * gain[i] } else { d_u });
            d_gain[i] += if is_first { d_u * v[i] } else { row_scale * factor * u[i] * dy[i] };
        }
        gradient.row_scale.push(u.iter().zip(dy).enumerate().map(|(i, (u, dy))| factor * u * after(i) * dy).sum());
    }
    gradient.weight = norm.gain.has_weight().then_some(d_gain);
    Ok(gradient)
}

#[cfg(test)]
mod tests {
    use super::super::rms_norm;
    use super::*;

    #[test]
    fn by_finite_differences() {
        let mut rng = fastrand::Rng::with_seed(3);
        let (count, width) = (3, 5);
        let mut random = |len: usize| (0..len).map(|_| 2.0 * rng.f64() - 1.0).collect::<Vec<f64>>();
        let (x, weight, scale, dy) = (random(count * width), random(width), random(count), random(count * width));
        let value = |norm: &RmsNorm, x: &[f64], weight: &[f64], scale: &[f64]| -> f64 {
            let weight = norm.gain.has_weight().then_some(weight);
            let rows =
                Rows { x, width, weight, addend: None, addend_scale: None, row_scale: Some(scale), residual: None };
            rms_norm(&rows, norm).unwrap().y.iter().zip(&dy).map(|(y, d)| y * d).sum()
        };
        let differences = |at: &[f64], value: &dyn Fn(&[f64]) -> f64| -> Vec<f64> {
            let moved = |i: usize, by: f64| {
                let mut moved = at.to_vec();
                moved[i] += by;
                value(&moved)
            };
            (0..at.len()).map(|i| (moved(i, 1e-5) - moved(i, -1e-5)) / 2e-5).collect()
        };
        let near = |name: &str, got: &[f64], want: &[f64]| {
            let error = got.iter().zip(want).map(|(g, w)| (g - w).powi(2)).sum::<f64>().sqrt();
            assert!(error <= 1e-8 * want.iter().map(|w| w * w).sum::<f64>().sqrt(), "{name}: {got:?}, want {want:?}");
        };
        let gains = [Gain::One, Gain::Weight, Gain::OnePlus, Gain::OnePlusFirst];
        for (gain, least) in gains.into_iter().flat_map(|gain| [0.0, 0.3, 9.0].map(|least| (gain, least))) {
            let norm = RmsNorm::new(1e-3).least(least).gain(gain).factor(0.7);
            let of = gain.has_weight().then_some(&weight[..]);
            let rows = Rows {
                x: &x[..],
                width,
                weight: of,
                addend: None,
                addend_scale: None,
                row_scale: Some(&scale),
                residual: None,
            };
            let got = rms_norm_backward(&rows, &norm, &dy).unwrap();
            near("x", &got.sum, &differences(&x, &|x| value(&norm, x, &weight, &scale)));
            near("row_scale", &got.row_scale, &differences(&scale, &|scale| value(&norm, &x, &weight, scale)));
            assert_eq!(got.weight.is_some(), gain.has_weight());
            if let Some(d) = got.weight {
                near("weight", &d, &differences(&weight, &|weight| value(&norm, &x, weight, &scale)));
            }
        }
    }
}
