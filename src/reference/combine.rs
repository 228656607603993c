//! Combine: every token's sum of its experts' outputs.

mod backward;

use super::activation::sigmoid;
use super::parallel::for_each_row;
use super::{Real, ReferenceError, require, require_shape};

pub use backward::{CombineGradient, add_identity_backward, combine_backward, gate_addend_backward};

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

/// `y[t] = residual[t] + bias + addend_scale addend[t] + scale y[t]`: what a layer makes of its experts' sum `y [T,H]`. `bias` is `[H]` (JetMoE),
/// `residual` and `addend` are `[T,H]`. A `scale` on the sum is Step 3's; both 1/2 are Cohere 2's mean of experts and shared expert.
///
/// # Errors
/// Lengths that do not fit.
pub fn add_around<A: Real>(
    y: &mut [f64],
    [scale, addend_scale]: [f64; 2],
    bias: Option<&[A]>,
    residual: Option<&[A]>,
    addend: Option<&[A]>,
) -> Result<(), ReferenceError> {
    for (name, rows) in [("residual", residual), ("addend", addend)] {
        if let Some(rows) = rows {
            require_shape(name, rows, &[y.len()])?;
        }
    }
    let hidden = bias.map_or(1, <[A]>::len);
    require("bias", hidden > 0 && y.len().is_multiple_of(hidden), || "a number a column".into(), hidden)?;
    let at = |rows: Option<&[A]>, i: usize| rows.map_or(0.0, |rows| rows[i].into());
    for (i, y) in y.iter_mut().enumerate() {
        *y = at(residual, i) + at(bias, i % hidden) + addend_scale * at(addend, i) + scale * *y;
    }
    Ok(())
}

/// The weight of each token's identity experts, `[T]`: the sum of those of its `weights [T,k]` whose id is one of `experts`. Numbers behind the
/// experts that have weights are experts without computation (LongCat-Flash, arXiv:2509.01322, section 2.1).
///
/// # Errors
/// Lengths that do not fit.
pub fn identity_weight(
    ids: &[i32],
    weights: &[f64],
    top_k: usize,
    experts: std::ops::Range<i32>,
) -> Result<Vec<f64>, ReferenceError> {
    require("top_k", top_k > 0, || "at least 1".into(), top_k)?;
    require("ids", ids.len().is_multiple_of(top_k), || format!("rows of {top_k}"), ids.len())?;
    require_shape("weights", weights, &[ids.len()])?;
    let of = |(ids, weights): (&[i32], &[f64])| {
        ids.iter().zip(weights).filter(|(id, _)| experts.contains(id)).map(|(_, weight)| weight).sum()
    };
    Ok(ids.chunks(top_k).zip(weights.chunks(top_k)).map(of).collect())
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
    fn factors_and_a_bias_stand_around_the_sum() {
        let mut y = [1.0, 2.0, 3.0, 4.0];
        let all = (Some(&[0.5, 0.25][..]), Some(&[100.0; 4][..]), Some(&[1.0, 2.0, 3.0, 4.0][..]));
        add_around(&mut y, [10.0, 3.0], all.0, all.1, all.2).unwrap();
        assert_eq!(y, [113.5, 126.25, 139.5, 152.25]);
        add_around::<f64>(&mut y, [0.5, 1.0], None, None, None).unwrap();
        assert_eq!(y[0], 56.75);
        assert_eq!(add_around(&mut y, [1.0; 2], Some(&[1.0; 3]), None, None).unwrap_err().argument, "bias");
    }

    #[test]
    fn weights_of_identities_add_up() {
        let ids = [0, 4, 3, -1, 2, 5];
        let weights = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0];
        assert_eq!(identity_weight(&ids, &weights, 3, 3..5).unwrap(), [6.0, 0.0]);
        assert_eq!(identity_weight(&ids, &weights[1..], 3, 3..5).unwrap_err().argument, "weights");
    }

    #[test]
    fn identities_add_their_input() {
        let mut y = vec![1.0, 2.0, 3.0, 4.0];
        add_identity(&mut y, &[10.0, 20.0, f64::NAN, 40.0], &[0.5, 0.0]).unwrap();
        assert_eq!(y, [6.0, 12.0, 3.0, 4.0]);
        assert_eq!(add_identity(&mut y, &[1.0; 4], &[]).unwrap_err().argument, "weight");
    }
}
