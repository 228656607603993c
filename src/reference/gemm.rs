//! Grouped GEMM: each row times the matrix of its expert, with scale, bias and activation.

mod backward;

use super::activation::{activate, activate_glu};
use super::dispatch::Dispatched;
use super::parallel::{for_each_row, map_rows};
use super::{Real, ReferenceError, require, require_shape};
use crate::rules::Activation;
use crate::rules::NoiseSource;
use crate::rules::{Glu, Layout};
use crate::rules::{drop_below, keep_scale};

pub use backward::{MatrixGradient, ProductGradient, dense_backward, grouped_backward};

/// One matrix for each expert.
#[derive(Clone, Copy, Debug)]
pub struct ExpertMatrix<'a, W> {
    /// `[E, Nb, K]` ([`Layout::Nk`]) or `[E, K, Nb]` ([`Layout::Kn`]); `Nb` is `N`, or `2N` where gate and up lie together.
    pub weight: &'a [W],
    /// `[E, Nb]`, in the order of the weight's rows.
    pub bias: Option<&'a [W]>,
    /// Columns of the output, `N`.
    pub n: usize,
    /// Columns of the input, `K`.
    pub k: usize,
    /// Whether a gate is folded in, and where it lies. Of [`Glu::Apart`] each expert's gate stands before its up here.
    pub glu: Glu,
    /// Which of `Nb` and `K` is contiguous.
    pub layout: Layout,
}

impl<W: Real> ExpertMatrix<'_, W> {
    /// Rows of the weight, `Nb`.
    pub fn weight_rows(&self) -> usize {
        if self.glu == Glu::None { self.n } else { 2 * self.n }
    }

    /// Where an element is: of an expert's row `row < Nb`, that of column `column < K`.
    fn index(&self, expert: usize, row: usize, column: usize) -> usize {
        let rows = self.weight_rows();
        expert * rows * self.k
            + match self.layout {
                Layout::Nk => row * self.k + column,
                Layout::Kn => column * rows + row,
            }
    }

    /// `scale * (a . W[expert]^T)[row] + bias[expert, row]`.
    fn product<A: Real>(&self, a: &[A], scale: f64, expert: usize, row: usize) -> f64 {
        let rows = self.weight_rows();
        let weight = &self.weight[expert * rows * self.k..][..rows * self.k];
        let sum: f64 = match self.layout {
            Layout::Nk => super::router::dot(a, &weight[row * self.k..][..self.k]),
            Layout::Kn => a.iter().zip(weight[row..].iter().step_by(rows)).map(|(&a, &w)| a.into() * w.into()).sum(),
        };
        scale * sum + self.bias.map_or(0.0, |bias| bias[expert * rows + row].into())
    }

    /// Rows of the weight that a column of the result comes from: its only one, or gate's and up's.
    fn rows_of(&self, column: usize) -> (usize, Option<usize>) {
        match self.glu {
            Glu::None => (column, None),
            Glu::Split | Glu::Apart => (column, Some(self.n + column)),
            Glu::UpFirst => (self.n + column, Some(column)),
            Glu::Interleaved => (2 * column, Some(2 * column + 1)),
        }
    }

    /// One output element.
    fn element<A: Real>(&self, a: &[A], scale: f64, expert: usize, column: usize, activation: Activation) -> f64 {
        let at = |row| self.product(a, scale, expert, row);
        match self.rows_of(column) {
            (row, None) => activate(activation, at(row)),
            (gate, Some(up)) => activate_glu(activation, at(gate), at(up)),
        }
    }
}

/// `out[r] = act(row_scale[r] * (a[s] W[e]^T) + bias[e])` for every row `r` that `plan` gives to an expert `e`, `[rows, N]`.
///
/// `s` is `plan.slot_token[r]` with `gather` (the first matrix reads tokens, `a [T,K]`), else `r` (the second reads what the
/// first wrote, `a [rows,K]`). `row_scale [rows]` multiplies the product alone, as if it had multiplied the input (Llama 4).
/// Rows that no slot fills are NaN: nothing may depend on them.
///
/// # Errors
/// Lengths that do not fit.
pub fn grouped_gemm<A: Real, W: Real>(
    a: &[A],
    matrix: &ExpertMatrix<W>,
    plan: &Dispatched,
    gather: bool,
    row_scale: Option<&[f64]>,
    activation: Activation,
) -> Result<Vec<f64>, ReferenceError> {
    grouped_gemm_by_expert(a, matrix, plan, gather, row_scale, &vec![activation; plan.counts.len()])
}

/// [`grouped_gemm`] with an activation for each expert, `[E]`: limits, steepness and offsets of a SwiGLU that differ from expert to expert.
///
/// # Errors
/// Lengths that do not fit.
pub fn grouped_gemm_by_expert<A: Real, W: Real>(
    a: &[A],
    matrix: &ExpertMatrix<W>,
    plan: &Dispatched,
    gather: bool,
    row_scale: Option<&[f64]>,
    activations: &[Activation],
) -> Result<Vec<f64>, ReferenceError> {
    require_shape("activations", activations, &[plan.counts.len()])?;
    check(matrix, plan.counts.len(), Activation::Identity)?;
    activations.iter().try_for_each(|&activation| check(matrix, plan.counts.len(), activation))?;
    let each = |a: &[A], scale: f64, expert: usize, out: &mut [f64]| {
        let activation = activations[expert];
        out.iter_mut().enumerate().for_each(|(c, value)| *value = matrix.element(a, scale, expert, c, activation));
    };
    rows_of_experts(a, [matrix.n, matrix.k], plan, gather, row_scale, each)
}

/// What stands before the activation in [`grouped_gemm`], scaled and biased: `[rows, N]`, or with a gate `[rows, 2N]`, where each row has
/// its gates first, then its ups, whatever the order of the weight's rows. What a backward pass takes the activation's slope at (SonicMoE
/// keeps just this of the intermediates: Guo et al. 2025, arXiv:2512.14080, section 3).
///
/// # Errors
/// Lengths that do not fit.
pub fn grouped_pre_activation<A: Real, W: Real>(
    a: &[A],
    matrix: &ExpertMatrix<W>,
    plan: &Dispatched,
    gather: bool,
    row_scale: Option<&[f64]>,
) -> Result<Vec<f64>, ReferenceError> {
    check(matrix, plan.counts.len(), Activation::Identity)?;
    let each = |a: &[A], scale: f64, expert: usize, out: &mut [f64]| {
        for column in 0..matrix.n {
            let (first, up) = matrix.rows_of(column);
            out[column] = matrix.product(a, scale, expert, first);
            if let Some(up) = up {
                out[matrix.n + column] = matrix.product(a, scale, expert, up);
            }
        }
    };
    rows_of_experts(a, [matrix.weight_rows(), matrix.k], plan, gather, row_scale, each)
}

/// `each(row of a, its scale, its expert, row of the result)` for every row that `plan` gives to an expert; NaN elsewhere.
fn rows_of_experts<A: Real>(
    a: &[A],
    [width, k]: [usize; 2],
    plan: &Dispatched,
    gather: bool,
    row_scale: Option<&[f64]>,
    each: impl Fn(&[A], f64, usize, &mut [f64]) + Sync,
) -> Result<Vec<f64>, ReferenceError> {
    let rows = plan.slot_token.len();
    require("a", a.len().is_multiple_of(k), || format!("rows of {k} elements"), a.len())?;
    let rows_a = a.len() / k;
    if gather {
        let last = plan.slot_token.iter().copied().max().unwrap_or(-1);
        require("a", (last as i64) < rows_a as i64, || format!("a row for token {last}"), rows_a)?;
    } else {
        require_shape("a", a, &[rows, k])?;
    }
    if let Some(scale) = row_scale {
        require_shape("row_scale", scale, &[rows])?;
    }

    let expert_of = row_experts(plan);
    let mut out = vec![f64::NAN; rows * width];
    for_each_row(&mut out, width, |row, out| {
        let Some(expert) = expert_of[row] else { return };
        let source = if gather { plan.slot_token[row] as usize } else { row };
        each(&a[source * k..][..k], row_scale.map_or(1.0, |scale| scale[row]), expert, out);
    });
    Ok(out)
}

/// The expert of each row; none where no slot fills it.
fn row_experts(plan: &Dispatched) -> Vec<Option<usize>> {
    let mut expert_of = vec![None; plan.slot_token.len()];
    for (expert, (&first, &count)) in plan.offsets.iter().zip(&plan.counts).enumerate() {
        expert_of[first as usize..][..count as usize].fill(Some(expert));
    }
    expert_of
}

/// The same with a single expert for all rows: `out = act(a W^T + bias)`, `[rows, N]`. The shared expert.
///
/// # Errors
/// Lengths that do not fit.
pub fn dense_gemm<A: Real, W: Real>(
    a: &[A],
    matrix: &ExpertMatrix<W>,
    activation: Activation,
) -> Result<Vec<f64>, ReferenceError> {
    check(matrix, 1, activation)?;
    require("a", a.len().is_multiple_of(matrix.k), || format!("rows of {} elements", matrix.k), a.len())?;
    let outputs =
        |a: &[A]| -> Vec<f64> { (0..matrix.n).map(|column| matrix.element(a, 1.0, 0, column, activation)).collect() };
    Ok(map_rows(a, matrix.k, outputs).concat())
}

/// Dropout of `out [rows,N]`: element i is 0 if its random word is below `2^32 p`, else divided by `1 - p`.
///
/// Expert dropout: Fedus et al. 2021, "Switch Transformers", section 2.4. Rows stand in the order of slots.
///
/// # Errors
/// `probability` outside 0 (included) to 1 (excluded).
pub fn dropout(out: &mut [f64], probability: f32, noise: NoiseSource) -> Result<(), ReferenceError> {
    require("probability", (0.0..1.0).contains(&probability), || "0 to 1, without 1".into(), probability)?;
    let (below, scale) = (drop_below(probability), keep_scale(probability));
    out.iter_mut().enumerate().for_each(|(i, value)| {
        *value = if noise.dropout_word(i as u64) < below { 0.0 } else { *value * f64::from(scale) };
    });
    Ok(())
}

fn check<W: Real>(matrix: &ExpertMatrix<W>, experts: usize, activation: Activation) -> Result<(), ReferenceError> {
    require("n", matrix.n > 0, || "at least 1".into(), 0)?;
    require("k", matrix.k > 0, || "at least 1".into(), 0)?;
    require_shape("weight", matrix.weight, &[experts, matrix.weight_rows(), matrix.k])?;
    if let Some(bias) = matrix.bias {
        require_shape("bias", bias, &[experts, matrix.weight_rows()])?;
    }
    require("activation", !activation.needs_gate() || matrix.glu != Glu::None, || "a gated matrix".into(), "none")
}

#[cfg(test)]
mod tests {
    use super::super::dispatch::{DispatchRule, dispatch};
    use super::*;

    fn plan(ids: &[i32], experts: usize) -> Dispatched {
        dispatch(ids, &DispatchRule { experts, top_k: 1, capacity: None, tile_m: 16 }).unwrap()
    }

    fn matrix(weight: &[f64], n: usize, k: usize) -> ExpertMatrix<'_, f64> {
        ExpertMatrix { weight, bias: None, n, k, glu: Glu::None, layout: Layout::Nk }
    }

    #[test]
    fn gathers_tokens_and_picks_the_expert() {
        let weight = [1.0, 0.0, 0.0, 1.0, /* expert 1 */ 1.0, 1.0, 2.0, -1.0];
        let out = grouped_gemm(
            &[5.0, 7.0, 1.0, 2.0],
            &matrix(&weight, 2, 2),
            &plan(&[1, 0], 2),
            true,
            None,
            Activation::Identity,
        );
        assert_eq!(out.unwrap(), [1.0, 2.0, 12.0, 3.0]);
    }

    #[test]
    fn transposed_weight_is_the_same_matrix() {
        let nk = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let kn = [1.0, 4.0, 2.0, 5.0, 3.0, 6.0];
        let a = [1.0, 10.0, 100.0];
        let want = dense_gemm(&a, &matrix(&nk, 2, 3), Activation::Identity).unwrap();
        let got =
            dense_gemm(&a, &ExpertMatrix { layout: Layout::Kn, ..matrix(&kn, 2, 3) }, Activation::Identity).unwrap();
        assert_eq!(want, [321.0, 654.0]);
        assert_eq!(got, want);
    }

    #[test]
    fn scale_comes_before_the_bias() {
        let with_bias = ExpertMatrix { bias: Some(&[10.0][..]), ..matrix(&[3.0], 1, 1) };
        let out = grouped_gemm(&[2.0], &with_bias, &plan(&[0], 1), true, Some(&[0.5]), Activation::Identity).unwrap();
        assert_eq!(out, [13.0]);
    }

    #[test]
    fn gate_and_up_split_and_interleaved() {
        let split = ExpertMatrix { glu: Glu::Split, ..matrix(&[1.0, -2.0, 3.0, 4.0], 2, 1) };
        assert_eq!(dense_gemm(&[1.0], &split, Activation::Relu).unwrap(), [3.0, 0.0]);
        let interleaved = ExpertMatrix { glu: Glu::Interleaved, ..split };
        assert_eq!(dense_gemm(&[1.0], &interleaved, Activation::Relu).unwrap(), [-2.0, 12.0]);
    }

    #[test]
    fn before_the_activation_gates_come_first() {
        let bias = [0.5, 0.25, 0.0, 0.0];
        let weight = [1.0, 2.0, 3.0, 4.0];
        let of = |glu| {
            let matrix = ExpertMatrix { glu, bias: Some(&bias[..]), ..matrix(&weight, 2, 1) };
            grouped_pre_activation(&[10.0], &matrix, &plan(&[0], 1), true, Some(&[0.1])).unwrap()
        };
        assert_eq!(of(Glu::Split), [1.5, 2.25, 3.0, 4.0]);
        assert_eq!(of(Glu::UpFirst), [3.0, 4.0, 1.5, 2.25]);
        assert_eq!(of(Glu::Interleaved), [1.5, 3.0, 2.25, 4.0]);
        let plain = grouped_pre_activation(&[2.0], &matrix(&[3.0], 1, 1), &plan(&[0], 1), true, None);
        assert_eq!(plain.unwrap(), [6.0]);
    }

    #[test]
    fn a_short_weight_is_an_error() {
        let error = dense_gemm(&[1.0, 2.0], &matrix(&[1.0; 5], 3, 2), Activation::Identity).unwrap_err();
        assert_eq!(error.to_string(), "reference argument `weight`: expected a slice of [1, 3, 2] elements, found 5");
    }

    #[test]
    fn dropout_keeps_the_mean() {
        let noise = NoiseSource { seed: 3, offset: 4 };
        let mut out = vec![1.0; 40_000];
        dropout(&mut out, 0.4, noise).unwrap();
        let kept = out.iter().filter(|&&value| value != 0.0).count() as f64;
        // 24000 expected, standard deviation 98.
        assert!((kept - 24_000.0).abs() < 490.0, "{kept}");
        assert!(out.iter().all(|&value| value == 0.0 || (value - 1.0 / 0.6).abs() < 1e-6));
        assert_eq!(dropout(&mut out, 1.0, noise).unwrap_err().argument, "probability");
        let mut nan = [f64::NAN; 64];
        dropout(&mut nan, 0.5, noise).unwrap();
        assert!(nan.contains(&0.0), "what is dropped is zero, whatever it was");
    }
}
