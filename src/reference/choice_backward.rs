//! Gradients of the weights of a token's choices, from those of the rows that the choices became; and a shared expert's gate.

use super::activation::sigmoid;
use super::router::dot;
use super::{Real, ReferenceError, require, require_shape};

/// `d_weights [T,k]` for `y[t] = sum_j weights[t,j] v_j`: `d_slot_weight` of the choice's row, `dy[t] . x[t]` of a choice without one that `identity`
/// says is its input, 0 of any other.
///
/// # Errors
/// Lengths that do not fit, a row past the last.
pub fn choice_backward<X: Real>(
    d_slot_weight: &[f64],
    token_slot: &[i32],
    identity: impl Fn(usize) -> bool,
    (x, dy): (&[X], &[X]),
    top_k: usize,
) -> Result<Vec<f64>, ReferenceError> {
    require("top_k", top_k > 0 && token_slot.len().is_multiple_of(top_k), || "rows of `token_slot`".into(), top_k)?;
    require_shape("dy", dy, &[x.len()])?;
    let hidden = x.len() / (token_slot.len() / top_k).max(1);
    let last = token_slot.iter().copied().max().unwrap_or(-1);
    require("token_slot", i64::from(last) < d_slot_weight.len() as i64, || "a row of `d_slot_weight`".into(), last)?;
    let of = |(choice, &slot): (usize, &i32)| match usize::try_from(slot) {
        Ok(row) => d_slot_weight[row],
        Err(_) if identity(choice) => {
            let row = choice / top_k * hidden..choice / top_k * hidden + hidden;
            dot(&x[row.clone()], &dy[row])
        }
        Err(_) => 0.0,
    };
    Ok(token_slot.iter().enumerate().map(of).collect())
}

/// `sigmoid(l)`, or with the gradient `d` of that `d sigmoid(l) (1 - sigmoid(l))`.
pub fn sigmoid_gate(logit: f64, d: Option<f64>) -> f64 {
    d.map_or(sigmoid(logit), |d| d * sigmoid(logit) * sigmoid(-logit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        // Token 0: a row and nothing; token 1: an identity, 2 * 5 + 3 * 7, and a row.
        let got = choice_backward(
            &[0.5, 0.25],
            &[1, -1, -1, 0],
            |at| at == 2,
            (&[1.0, 1.0, 2.0, 3.0], &[1.0, 1.0, 5.0, 7.0]),
            2,
        );
        assert_eq!(got.unwrap(), [0.25, 0.0, 31.0, 0.5]);
        let error = choice_backward(&[0.5], &[1], |_| false, (&[1.0], &[1.0]), 1).unwrap_err();
        assert_eq!(error.argument, "token_slot");
        assert_eq!((sigmoid_gate(0.0, None), sigmoid_gate(0.0, Some(8.0))), (0.5, 2.0));
    }
}
