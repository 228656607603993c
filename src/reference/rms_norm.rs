//! RMS normalisation of rows: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4.
//!
//! Where a model keeps a row in its storage type before it is normalised, so does this: the sum with an addend, and a row with its gain first.

mod backward;

use super::{Real, ReferenceError, require, require_shape};
use crate::rules::{Gain, RmsNorm};

pub use backward::{NormGradient, rms_norm_backward};

/// Rows that are normalised, and what goes with them.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, T> {
    /// `[R, W]`.
    pub x: &'a [T],
    /// Columns `W`.
    pub width: usize,
    /// `[W]`, where the gain has one.
    pub weight: Option<&'a [T]>,
    /// `[R, W]`, added to `x` first.
    pub addend: Option<&'a [T]>,
    /// `[W]`: factors of the addend's columns.
    pub addend_scale: Option<&'a [T]>,
    /// `[R]`: factors of the normalised rows.
    pub row_scale: Option<&'a [f64]>,
    /// `[R, W]`, added last.
    pub residual: Option<&'a [T]>,
}

/// What became of the rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Normed {
    /// `[R, W]`: `x + addend_scale addend`, rounded to the type.
    pub sum: Vec<f64>,
    /// `[R, W]`, not rounded.
    pub y: Vec<f64>,
}

/// `y[r] = row_scale[r] norm(x[r] + addend_scale addend[r]) + residual[r]`.
///
/// # Errors
/// Lengths that do not fit, a weight that the gain has not or the reverse.
pub fn rms_norm<T: Real>(rows: &Rows<'_, T>, norm: &RmsNorm) -> Result<Normed, ReferenceError> {
    let Rows { x, width, .. } = *rows;
    require("width", width > 0, || "at least 1".into(), width)?;
    require("x", x.len().is_multiple_of(width), || format!("rows of {width}"), x.len())?;
    let count = x.len() / width;
    for (name, list) in [("weight", rows.weight), ("addend_scale", rows.addend_scale)] {
        list.map(|list| require_shape(name, list, &[width])).transpose()?;
    }
    for (name, matrix) in [("addend", rows.addend), ("residual", rows.residual)] {
        matrix.map(|matrix| require_shape(name, matrix, &[count, width])).transpose()?;
    }
    rows.row_scale.map(|list| require_shape("row_scale", list, &[count])).transpose()?;
    let has = norm.gain.has_weight();
    require("weight", rows.weight.is_some() == has, || format!("{has}"), rows.weight.is_some())?;

    let at = |list: Option<&[T]>, i: usize, absent: f64| list.map_or(absent, |list| list[i].into());
    let mut normed = Normed { sum: Vec::with_capacity(x.len()), y: Vec::with_capacity(x.len()) };
    for r in 0..count {
        let v = (0..width).map(|c| match rows.addend {
            Some(addend) => {
                T::round(x[r * width + c].into() + at(rows.addend_scale, c, 1.0) * addend[r * width + c].into())
            }
            None => x[r * width + c].into(),
        });
        let mut v: Vec<f64> = v.collect();
        normed.sum.extend(&v);
        let gain = |c: usize| match norm.gain {
            Gain::One => 1.0,
            Gain::Weight => at(rows.weight, c, 1.0),
            Gain::OnePlus | Gain::OnePlusFirst => 1.0 + at(rows.weight, c, 0.0),
        };
        if norm.gain == Gain::OnePlusFirst {
            v.iter_mut().enumerate().for_each(|(c, v)| *v = T::round(*v * gain(c)));
        }
        let mean = v.iter().map(|v| v * v).sum::<f64>() / width as f64;
        let under_root = mean + f64::from(norm.epsilon);
        // Not a number stays none.
        let under_root = if under_root < f64::from(norm.least) { f64::from(norm.least) } else { under_root };
        let scale = f64::from(norm.factor) / under_root.sqrt();
        let row_scale = rows.row_scale.map_or(1.0, |list| list[r]);
        normed.y.extend(v.iter().enumerate().map(|(c, v)| {
            let gain = if norm.gain == Gain::OnePlusFirst { 1.0 } else { gain(c) };
            v * scale * gain * row_scale + at(rows.residual, r * width + c, 0.0)
        }));
    }
    Ok(normed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(x: &[f64]) -> Rows<'_, f64> {
        Rows { x, width: 2, weight: None, addend: None, addend_scale: None, row_scale: None, residual: None }
    }

    #[test]
    fn by_hand() {
        // Mean squares 12.5 and 2, with epsilon 12.5 + 3.5 = 16 and 5.5.
        let norm = RmsNorm::new(3.5).gain(Gain::One).factor(2.0);
        let normed = rms_norm(&rows(&[3.0, -4.0]), &norm).unwrap();
        assert_eq!(normed.y, [1.5, -2.0]);
        let with = Rows {
            weight: Some(&[2.0, -0.5]),
            residual: Some(&[1.0, 1.0]),
            row_scale: Some(&[3.0]),
            ..rows(&[3.0, -4.0])
        };
        assert_eq!(rms_norm(&with, &RmsNorm::new(3.5)).unwrap().y, [5.5, 2.5]);
        assert_eq!(rms_norm(&with, &RmsNorm::new(3.5).gain(Gain::OnePlus)).unwrap().y, [7.75, -0.5]);
        // Gains 3 and 0.5: (9, -2), mean square 42.5.
        let first = rms_norm(&with, &RmsNorm::new(57.5).gain(Gain::OnePlusFirst)).unwrap();
        assert!((first.y[0] - 3.7).abs() < 1e-15 && (first.y[1] - 0.4).abs() < 1e-15);
    }

    #[test]
    fn a_least_length() {
        // A length of 5 stays, one of 1e-3 becomes 1 (F.normalize, times the root of the width).
        let norm = RmsNorm::new(0.0).least(0.5).gain(Gain::One);
        let normed = rms_norm(&rows(&[3.0, -4.0, 6e-4, 8e-4]), &norm).unwrap();
        let want = [0.6, -0.8, 6e-4, 8e-4].map(|v| v * 2f64.sqrt());
        assert!(normed.y.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-15), "{:?}", normed.y);
        assert!(rms_norm(&rows(&[f64::NAN, 1.0]), &norm).unwrap().y[0].is_nan());
    }

    #[test]
    fn an_addend_with_factors() {
        let with = Rows { addend: Some(&[1.0, 2.0]), addend_scale: Some(&[2.0, -1.0]), ..rows(&[1.0, -2.0]) };
        let normed = rms_norm(&with, &RmsNorm::new(0.0).gain(Gain::One)).unwrap();
        assert_eq!(normed.sum, [3.0, -4.0]);
        assert_eq!(normed.y, [3.0 / 12.5f64.sqrt(), -4.0 / 12.5f64.sqrt()]);
    }

    #[test]
    fn a_weight_where_there_is_none() {
        let error =
            rms_norm(&Rows { weight: Some(&[1.0, 1.0]), ..rows(&[1.0, 1.0]) }, &RmsNorm::new(0.0).gain(Gain::One));
        assert_eq!(error.unwrap_err().argument, "weight");
    }
}
