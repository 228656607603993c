//! Combine: every token's sum of its experts' outputs.

use super::activation::sigmoid;
use super::parallel::for_each_row;
use super::{Real, ReferenceError, require, require_shape};

/// `y[t] = residual[t] + addend[t] + sum_j weights[t,j] y_slots[token_slot[t,j]]`, `[T,H]`.
///
/// `y_slots` is `[slots,H]`, `token_slot` `[T,k]` with -1 for a dropped slot, which contributes zero; `weights` `[T,k]` are 1 where
/// absent (Llama 4 weighs the input instead). `addend [T,H]` is the shared expert's output (DeepSeekMoE: Dai et al. 2024, eq. 9).
/// The weighted sum is Shazeer et al. 2017, eq. 1.
///
/// # Errors
/// Lengths that do not fit, a slot beyond `y_slots`.
pub fn combine<Y: Real, A: Real>(
    y_slots: &[Y],
    token_slot: &[i32],
    weights: Option<&[f64]>,
    residual: Option<&[A]>,
    addend: Option<&[A]>,
    top_k: usize,
    hidden: usize,
) -> Result<Vec<f64>, ReferenceError> {
    require("hidden", hidden > 0, || "at least 1".into(), hidden)?;
    require("top_k", top_k > 0, || "at least 1".into(), top_k)?;
    require("token_slot", token_slot.len().is_multiple_of(top_k), || format!("rows of {top_k}"), token_slot.len())?;
    require("y_slots", y_slots.len().is_multiple_of(hidden), || format!("rows of {hidden}"), y_slots.len())?;
    let (tokens, slots) = (token_slot.len() / top_k, y_slots.len() / hidden);
    let last = token_slot.iter().copied().max().unwrap_or(-1);
    require("token_slot", (last as i64) < slots as i64, || format!("slots below {slots}"), last)?;
    if let Some(weights) = weights {
        require_shape("weights", weights, &[tokens, top_k])?;
    }
    for (name, rows) in [("residual", residual), ("addend", addend)] {
        if let Some(rows) = rows {
            require_shape(name, rows, &[tokens, hidden])?;
        }
    }

    let mut y = vec![0.0; tokens * hidden];
    for_each_row(&mut y, hidden, |t, y| {
        for rows in [residual, addend].into_iter().flatten() {
            y.iter_mut().zip(&rows[t * hidden..]).for_each(|(y, &value)| *y += value.into());
        }
        for j in t * top_k..(t + 1) * top_k {
            let Ok(slot) = usize::try_from(token_slot[j]) else { continue };
            let weight = weights.map_or(1.0, |weights| weights[j]);
            y.iter_mut().zip(&y_slots[slot * hidden..]).for_each(|(y, &value)| *y += weight * value.into());
        }
    });
    Ok(y)
}

/// `addend[t] *= sigmoid(logits[t])`: the gate of a shared expert, one logit for each token (Qwen2-MoE: `F.sigmoid(shared_expert_gate(x)) *
/// shared_expert(x)`). `addend` is `[T,H]`, `logits` `[T]`.
///
/// # Errors
/// Lengths that do not fit.
pub fn gate_addend(addend: &mut [f64], logits: &[f64]) -> Result<(), ReferenceError> {
    let fits = addend.len().is_multiple_of(logits.len().max(1)) && (addend.is_empty() || !logits.is_empty());
    require("logits", fits, || "a logit a token".into(), logits.len())?;
    let hidden = (addend.len() / logits.len().max(1)).max(1);
    for (row, &logit) in addend.chunks_mut(hidden).zip(logits) {
        row.iter_mut().for_each(|value| *value *= sigmoid(logit));
    }
    Ok(())
}

/// `y[t] += weight[t] * x[t]` where `weight[t]` is not 0: what experts contribute whose output is their input (LongCat-Flash; see
/// [`super::expert_map`]). `y` and `x` are `[T,H]`, `weight` is `[T]`.
///
/// # Errors
/// Lengths that do not fit.
pub fn add_identity<X: Real>(y: &mut [f64], x: &[X], weight: &[f64]) -> Result<(), ReferenceError> {
    require_shape("x", x, &[y.len()])?;
    require("weight", !weight.is_empty() || y.is_empty(), || "a weight a token".into(), 0)?;
    require("weight", y.len().is_multiple_of(weight.len().max(1)), || "a weight a token".into(), weight.len())?;
    let hidden = y.len() / weight.len().max(1);
    for (i, (y, &x)) in y.iter_mut().zip(x).enumerate().filter(|(i, _)| weight[i / hidden] != 0.0) {
        *y += weight[i / hidden] * x.into();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_what_is_there() {
        let y_slots = [1.0, 2.0, 10.0, 20.0, f64::NAN, f64::NAN];
        let y = combine(
            &y_slots,
            &[1, 0, -1, 0],
            Some(&[0.5, 3.0, 9.0, 2.0]),
            Some(&[100.0; 4]),
            Some(&[1.0, 2.0, 3.0, 4.0]),
            2,
            2,
        );
        assert_eq!(y.unwrap(), [109.0, 118.0, 105.0, 108.0]);
    }

    #[test]
    fn a_token_without_slots_is_zero() {
        assert_eq!(combine::<f64, f64>(&[], &[-1], None, None, None, 1, 3).unwrap(), [0.0; 3]);
    }

    #[test]
    fn a_slot_out_of_range_is_an_error() {
        assert_eq!(combine::<f64, f64>(&[1.0], &[1], None, None, None, 1, 1).unwrap_err().argument, "token_slot");
    }

    #[test]
    fn a_gate_is_a_factor_of_its_token() {
        let mut addend = [2.0, -4.0, 8.0, 16.0];
        gate_addend(&mut addend, &[0.0, 3f64.ln()]).unwrap();
        assert_eq!(addend[..2], [1.0, -2.0]);
        assert!((addend[2] - 6.0).abs() < 1e-12 && (addend[3] - 12.0).abs() < 1e-12);
        assert_eq!(gate_addend(&mut addend, &[0.0; 3]).unwrap_err().argument, "logits");
    }

    #[test]
    fn identities_add_their_input() {
        let mut y = vec![1.0, 2.0, 3.0, 4.0];
        add_identity(&mut y, &[10.0, 20.0, f64::NAN, 40.0], &[0.5, 0.0]).unwrap();
        assert_eq!(y, [6.0, 12.0, 3.0, 4.0]);
        assert_eq!(add_identity(&mut y, &[1.0; 4], &[]).unwrap_err().argument, "weight");
    }
}
