//! Experts of one hidden unit: He 2024, "Mixture of A Million Experts" (PEER), eq. 2; Doge's retrieved experts.

mod backward;

use super::activation::activate;
use super::parallel::for_each_row;
use super::{Real, ReferenceError, require, require_shape};
use crate::rules::Activation;

pub use backward::{UnitGradients, unit_experts_backward};

/// `y[t] = addend[t] + sum_j weights[t,j] act(input[e_j] . x[t]) output[e_j]`, `e_j = ids[t,j]`, `[T, H]`.
///
/// `input` and `output` are `[E, H]`. An id that is no expert adds nothing.
///
/// # Errors
/// Lengths that do not fit.
#[allow(clippy::too_many_arguments)]
pub fn unit_experts<T: Real>(
    x: &[T],
    input: &[T],
    output: &[T],
    ids: &[i32],
    weights: &[f64],
    addend: Option<&[T]>,
    hidden: usize,
    activation: Activation,
) -> Result<Vec<f64>, ReferenceError> {
    require("hidden", hidden > 0, || "at least 1".into(), hidden)?;
    require("x", x.len().is_multiple_of(hidden), || format!("rows of {hidden}"), x.len())?;
    require("input", input.len().is_multiple_of(hidden), || format!("rows of {hidden}"), input.len())?;
    require_shape("output", output, &[input.len()])?;
    let tokens = x.len() / hidden;
    require("ids", ids.len().is_multiple_of(tokens.max(1)), || format!("{tokens} rows"), ids.len())?;
    require_shape("weights", weights, &[ids.len()])?;
    addend.map(|addend| require_shape("addend", addend, &[x.len()])).transpose()?;

    let (top_k, experts) = (ids.len() / tokens.max(1), input.len() / hidden);
    let mut y = vec![0.0; x.len()];
    for_each_row(&mut y, hidden, |t, y| {
        let row =
            |matrix: &[T], r: usize| matrix[r * hidden..][..hidden].iter().map(|&v| v.into()).collect::<Vec<f64>>();
        let x = row(x, t);
        addend.into_iter().for_each(|addend| y.copy_from_slice(&row(addend, t)));
        for j in t * top_k..(t + 1) * top_k {
            let Some(expert) = usize::try_from(ids[j]).ok().filter(|&id| id < experts) else { continue };
            let product: f64 = row(input, expert).iter().zip(&x).map(|(w, x)| w * x).sum();
            let share = weights[j] * activate(activation, product);
            y.iter_mut().zip(row(output, expert)).for_each(|(y, w)| *y += share * w);
        }
    });
    Ok(y)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let (input, output) = ([1.0, 1.0, -1.0, 0.0], [2.0, 3.0, 5.0, 7.0]);
        let y = |ids: &[i32]| {
            unit_experts(&[1.0, 2.0], &input, &output, ids, &[0.5, 10.0], Some(&[100.0, 0.0]), 2, Activation::Relu)
        };
        // Expert 0 yields 3, expert 1 relu(-1) = 0.
        assert_eq!(y(&[0, 1]).unwrap(), [103.0, 4.5]);
        assert_eq!(y(&[-1, 2]).unwrap(), [100.0, 0.0]);
        let all = unit_experts(&[1.0, 2.0], &input, &output, &[1], &[1.0], None, 2, Activation::Identity).unwrap();
        assert_eq!(all, [-5.0, -7.0]);
    }
}
