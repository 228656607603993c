//! The way back through a grouped product: `z = s a W^T + b`, `out = act(z)`, by the chain rule.

use super::{ExpertMatrix, grouped_pre_activation, row_experts};
use crate::reference::activation::{slope, slopes_glu};
use crate::reference::dispatch::Dispatched;
use crate::reference::{Real, ReferenceError, require_shape};
use crate::rules::Activation;

/// Gradients of an [`ExpertMatrix`], in the order of its elements.
#[derive(Clone, Debug, PartialEq)]
pub struct MatrixGradient {
    /// As [`ExpertMatrix::weight`]; zero for an expert without rows.
    pub weight: Vec<f64>,
    /// As [`ExpertMatrix::bias`].
    pub bias: Option<Vec<f64>>,
}

/// What [`super::grouped_gemm`] passes back.
#[derive(Clone, Debug, PartialEq)]
pub struct ProductGradient {
    /// `[rows,K]`, of what each row has read, the row's scale included. Zero in rows that no slot fills.
    pub a: Vec<f64>,
    /// `[rows]`, of the row scales; what they are where each is 1, too.
    pub row_scale: Vec<f64>,
    /// Of the matrices.
    pub matrix: MatrixGradient,
}

/// The gradients of `sum d_out out`, where `out [rows,N]` is what [`super::grouped_gemm_by_expert`] makes of the same arguments.
///
/// `dz = act'(z) d_out`; `da = s dz W`, `ds = dz . (a W^T)`, and over an expert's rows `dW = sum dz^T (s a)`, `db = sum dz` (Rumelhart et al. 1986).
/// With a gate, `dz` of its row is `slope_gate d_out` and of the up's row `slope_up d_out`: [`slopes_glu`].
///
/// # Errors
/// Lengths that do not fit.
pub fn grouped_backward<A: Real, W: Real>(
    a: &[A],
    matrix: &ExpertMatrix<W>,
    plan: &Dispatched,
    gather: bool,
    row_scale: Option<&[f64]>,
    activations: &[Activation],
    d_out: &[f64],
) -> Result<ProductGradient, ReferenceError> {
    let (rows, n, k, weight_rows) = (plan.slot_token.len(), matrix.n, matrix.k, matrix.weight_rows());
    require_shape("activations", activations, &[plan.counts.len()])?;
    require_shape("d_out", d_out, &[rows, n])?;
    let z = grouped_pre_activation(a, matrix, plan, gather, row_scale)?;
    let mut gradient = ProductGradient {
        a: vec![0.0; rows * k],
        row_scale: vec![0.0; rows],
        matrix: MatrixGradient {
            weight: vec![0.0; matrix.weight.len()],
            bias: matrix.bias.map(|bias| vec![0.0; bias.len()]),
        },
    };
    for (row, expert) in row_experts(plan).into_iter().enumerate() {
        let Some(expert) = expert else { continue };
        let source = if gather { plan.slot_token[row] as usize } else { row };
        let (a, scale) = (&a[source * k..][..k], row_scale.map_or(1.0, |scale| scale[row]));
        let z = &z[row * weight_rows..][..weight_rows];
        for column in 0..n {
            let d = d_out[row * n + column];
            let (first, up) = matrix.rows_of(column);
            let (d_first, d_up) = match up {
                None => (slope(activations[expert], z[column]) * d, 0.0),
                Some(_) => {
                    let slopes = slopes_glu(activations[expert], z[column], z[n + column]);
                    (slopes.0 * d, slopes.1 * d)
                }
            };
            for (weight_row, dz) in [(Some(first), d_first), (up, d_up)] {
                let Some(weight_row) = weight_row else { continue };
                for (j, &a) in a.iter().enumerate() {
                    let (at, a) = (matrix.index(expert, weight_row, j), a.into());
                    let weight = matrix.weight[at].into();
                    gradient.a[row * k + j] += scale * dz * weight;
                    gradient.row_scale[row] += dz * a * weight;
                    gradient.matrix.weight[at] += dz * scale * a;
                }
                if let Some(bias) = &mut gradient.matrix.bias {
                    bias[expert * weight_rows + weight_row] += dz;
                }
            }
        }
    }
    Ok(gradient)
}

/// The same of [`super::dense_gemm`]: a single expert for all rows of `a [rows,K]`.
///
/// # Errors
/// Lengths that do not fit.
pub fn dense_backward<A: Real, W: Real>(
    a: &[A],
    matrix: &ExpertMatrix<W>,
    activation: Activation,
    d_out: &[f64],
) -> Result<ProductGradient, ReferenceError> {
    let rows = (a.len() / matrix.k.max(1)) as i32;
    let all = Dispatched {
        counts: vec![rows],
        offsets: vec![0, rows],
        slot_token: (0..rows).collect(),
        token_slot: (0..rows).collect(),
        tiles: Vec::new(),
    };
    grouped_backward(a, matrix, &all, false, None, &[activation], d_out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::dispatch::{DispatchRule, dispatch};
    use crate::rules::{Glu, Layout};

    #[test]
    fn by_hand() {
        // Two experts that multiply by 2 and 3; rows of both read token 0, 5.
        let plan = dispatch(&[0, 1], &DispatchRule { experts: 3, top_k: 2, capacity: None, tile_m: 16 }).unwrap();
        let weight = [2.0, 3.0, 7.0];
        let matrix = ExpertMatrix {
            weight: &weight,
            bias: Some(&[0.0, -16.0, 0.0]),
            n: 1,
            k: 1,
            glu: Glu::None,
            layout: Layout::Nk,
        };
        let relu = [Activation::Relu; 3];
        let got = grouped_backward(&[5.0], &matrix, &plan, true, Some(&[0.5, 1.0]), &relu, &[10.0, 100.0]).unwrap();
        // z is 0.5 * 10 and 15 - 16: the second is cut off. The third expert has no row.
        assert_eq!(got.a, [10.0, 0.0]);
        assert_eq!(got.row_scale, [100.0, 0.0]);
        assert_eq!(got.matrix.weight, [25.0, 0.0, 0.0]);
        assert_eq!(got.matrix.bias.unwrap(), [10.0, 0.0, 0.0]);
    }

    #[test]
    fn rows_that_nobody_fills_stay_out() {
        let capacity = Some(crate::rules::Capacity { per_expert: 2, tokens_per_sequence: 1, padded: true });
        let plan = dispatch(&[0], &DispatchRule { experts: 1, top_k: 1, capacity, tile_m: 16 }).unwrap();
        let matrix = ExpertMatrix { weight: &[2.0], bias: None, n: 1, k: 1, glu: Glu::None, layout: Layout::Nk };
        let identity = [Activation::Identity];
        let got = grouped_backward(&[5.0], &matrix, &plan, true, None, &identity, &[1.0, f64::NAN]).unwrap();
        assert_eq!((got.a, got.matrix.weight), (vec![2.0, 0.0], vec![5.0]));
    }
}
