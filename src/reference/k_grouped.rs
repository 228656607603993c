//! Products over the rows of each expert: groups along K.

use super::{Real, ReferenceError, require, require_shape};

/// A matrix of rows, and by way of what a row of an expert finds its own.
#[derive(Clone, Copy, Debug)]
pub struct RowMatrix<'a, T> {
    /// `[rows, columns]`.
    pub values: &'a [T],
    /// Its columns.
    pub columns: usize,
    /// Row `r` of an expert reads row `slot_token[r]`, else `r`.
    pub slot_token: Option<&'a [i32]>,
}

impl<T: Real> RowMatrix<'_, T> {
    fn row(&self, row: usize) -> &[T] {
        let row = self.slot_token.map_or(row, |slot_token| slot_token[row] as usize);
        &self.values[row * self.columns..][..self.columns]
    }
}

/// `out[e] = sum over r in spans[e] of a[r]^T b[r]`, `[E, M, N]`: what an expert's rows leave of a gradient of its weight (`dW = sum dv x^T`, Rumelhart et
/// al. 1986), `torch._grouped_mm` of two matrices.
///
/// `spans[e]` is `[first, end)`. Zero for an expert without rows.
///
/// # Errors
/// Rows that a matrix does not have.
pub fn k_grouped<A: Real, B: Real>(
    a: RowMatrix<'_, A>,
    b: RowMatrix<'_, B>,
    spans: &[(usize, usize)],
) -> Result<Vec<f64>, ReferenceError> {
    let rows = spans.iter().map(|&(_, end)| end).max().unwrap_or(0);
    for (name, columns, len, slot_token) in
        [("a", a.columns, a.values.len(), a.slot_token), ("b", b.columns, b.values.len(), b.slot_token)]
    {
        require(name, columns > 0 && len.is_multiple_of(columns), || format!("rows of {columns} elements"), len)?;
        match slot_token {
            None => require(name, len / columns >= rows, || format!("at least {rows} rows"), len / columns)?,
            Some(tokens) => require_shape("slot_token", &tokens[..rows.min(tokens.len())], &[rows])?,
        }
    }
    let mut out = vec![0.0; spans.len() * a.columns * b.columns];
    for (matrix, &(first, end)) in out.chunks_mut(a.columns * b.columns).zip(spans) {
        for row in first..end {
            for (sums, &factor) in matrix.chunks_mut(b.columns).zip(a.row(row)) {
                let factor: f64 = factor.into();
                sums.iter_mut().zip(b.row(row)).for_each(|(sum, &value)| *sum += factor * value.into());
            }
        }
    }
    Ok(out)
}

/// `out[e] = scale sum over r in spans[e] of weights[r] a[r]`, `[E, M]`: what an expert's rows leave of the gradient of a bias that `weights[r]` multiplied
/// (1 if absent).
///
/// # Errors
/// Rows that the matrix or the weights do not have.
pub fn column_sums<A: Real>(
    a: RowMatrix<'_, A>,
    weights: Option<&[f32]>,
    scale: f64,
    spans: &[(usize, usize)],
) -> Result<Vec<f64>, ReferenceError> {
    let rows = spans.iter().map(|&(_, end)| end).max().unwrap_or(0);
    require("weights", weights.is_none_or(|weights| weights.len() >= rows), || format!("{rows} weights"), "fewer")?;
    let mut out = vec![0.0; spans.len() * a.columns];
    for (sums, &(first, end)) in out.chunks_mut(a.columns).zip(spans) {
        for row in first..end {
            let factor = scale * weights.map_or(1.0, |weights| f64::from(weights[row]));
            sums.iter_mut().zip(a.row(row)).for_each(|(sum, &value)| *sum += factor * value.into());
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_add_up_by_expert() {
        let tokens = [1, 0, 1];
        let a = RowMatrix { values: &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], columns: 2, slot_token: None };
        let b = RowMatrix { values: &[10.0, 100.0], columns: 1, slot_token: Some(&tokens[..]) };
        let out = k_grouped(a, b, &[(0, 1), (1, 1), (1, 3)]).unwrap();
        assert_eq!(out, [100.0, 200.0, 0.0, 0.0, 530.0, 640.0]);
        assert_eq!(k_grouped(a, b, &[(0, 4)]).unwrap_err().argument, "a");
        assert_eq!(column_sums(a, Some(&[2.0, 0.5, 1.0]), 10.0, &[(0, 1), (1, 3)]).unwrap(), [20.0, 40.0, 65.0, 80.0]);
        assert_eq!(column_sums(b, None, 1.0, &[(0, 3), (3, 3)]).unwrap(), [210.0, 0.0]);
    }
}
