//! Expert choice: the experts choose their tokens.
//!
//! Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing" (arXiv:2202.09368), section 3.2.

mod backward;

use super::activation::sigmoid;
use super::gating::{descending, softmax};
use super::{Real, ReferenceError, require, require_shape};
use crate::rules::Affinity;

pub use backward::affinities_backward;

/// `S^T [E,T]`: the affinity of every expert and token, from `logits [T,E]`.
///
/// # Errors
/// Lengths that do not fit.
pub fn affinities<L: Real>(logits: &[L], experts: usize, affinity: Affinity) -> Result<Vec<f64>, ReferenceError> {
    require("experts", experts > 0, || "at least 1".into(), experts)?;
    require("logits", logits.len().is_multiple_of(experts), || format!("rows of {experts}"), logits.len())?;
    let tokens = logits.len() / experts;
    let mut transposed = vec![0.0; logits.len()];
    for (t, row) in logits.chunks(experts).enumerate() {
        let row: Vec<f64> = row.iter().map(|&logit| logit.into()).collect();
        let scores = match affinity {
            Affinity::Softmax => softmax(&row),
            Affinity::Sigmoid => row.iter().map(|&logit| sigmoid(logit)).collect(),
            Affinity::Logit => row,
        };
        scores.iter().enumerate().for_each(|(e, &score)| transposed[e * tokens + t] = score);
    }
    Ok(transposed)
}

/// The tokens of every expert.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen<S> {
    /// `[E,c]`: the tokens that the expert chose (the paper's I), ascending (in the paper by falling affinity, which no sum depends on): rows `e*c` to `(e+1)*c` are its slots.
    pub slot_token: Vec<i32>,
    /// `[E,c]`: their affinities (the paper's G).
    pub slot_weight: Vec<S>,
}

/// `G, I = TopK(S^T, c)`: each expert takes exactly its `capacity` best tokens. Among equal affinities the lower token is
/// taken, and NaN comes after -Inf.
///
/// # Errors
/// Lengths that do not fit, a capacity of 0 or beyond the number of tokens.
pub fn choose<S: Real>(affinities: &[S], experts: usize, capacity: usize) -> Result<Chosen<S>, ReferenceError> {
    require("experts", experts > 0, || "at least 1".into(), experts)?;
    require("affinities", affinities.len().is_multiple_of(experts), || format!("{experts} rows"), affinities.len())?;
    let tokens = affinities.len() / experts;
    require("capacity", (1..=tokens).contains(&capacity), || format!("1 to {tokens}"), capacity)?;
    let mut chosen = Chosen { slot_token: Vec::new(), slot_weight: Vec::new() };
    for row in affinities.chunks(tokens) {
        let mut order: Vec<usize> = (0..tokens).collect();
        order.sort_by(|&a, &b| descending(row[a].into(), row[b].into()));
        order.truncate(capacity);
        order.sort_unstable();
        chosen.slot_token.extend(order.iter().map(|&t| t as i32));
        chosen.slot_weight.extend(order.iter().map(|&t| row[t]));
    }
    Ok(chosen)
}

/// [`choose`] of a batch with padding: of the tokens for which `valid [T]` holds. Where they are fewer than `capacity`, an expert takes all, and
/// rows behind them have token -1 and weight 0.
///
/// # Errors
/// Those of [`choose`], and a length of `valid` that does not fit.
pub fn choose_of<S: Real + Default>(
    affinities: &[S],
    experts: usize,
    capacity: usize,
    valid: &[bool],
) -> Result<Chosen<S>, ReferenceError> {
    let members: Vec<usize> = (0..valid.len()).filter(|&t| valid[t]).collect();
    require_shape("affinities", affinities, &[experts, valid.len()])?;
    require("capacity", (1..=valid.len()).contains(&capacity), || format!("1 to {}", valid.len()), capacity)?;
    let taken = capacity.min(members.len());
    let mut chosen =
        Chosen { slot_token: vec![-1; experts * capacity], slot_weight: vec![S::default(); experts * capacity] };
    if taken == 0 {
        return Ok(chosen);
    }
    let rows = affinities.chunks(valid.len());
    let own: Vec<S> = rows.flat_map(|row| members.iter().map(|&t| row[t])).collect();
    let of_members = choose(&own, experts, taken)?;
    for e in 0..experts {
        for i in 0..taken {
            chosen.slot_token[e * capacity + i] = members[of_members.slot_token[e * taken + i] as usize] as i32;
            chosen.slot_weight[e * capacity + i] = of_members.slot_weight[e * taken + i];
        }
    }
    Ok(chosen)
}

/// The slots of every token, however many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenSlots {
    /// `[T+1]`: where the token's slots begin in `slots`.
    pub offsets: Vec<i32>,
    /// Slots by token, ascending within a token, so that experts ascend too.
    pub slots: Vec<i32>,
}

/// Turns `slot_token`, the token of each slot or -1, round.
///
/// # Errors
/// A token beyond `tokens`.
pub fn token_slots(slot_token: &[i32], tokens: usize) -> Result<TokenSlots, ReferenceError> {
    let last = slot_token.iter().copied().max().unwrap_or(-1);
    require("slot_token", i64::from(last) < tokens as i64, || format!("tokens below {tokens}"), last)?;
    let mut lists = vec![Vec::new(); tokens];
    for (slot, &token) in slot_token.iter().enumerate() {
        if let Ok(token) = usize::try_from(token) {
            lists[token].push(slot as i32);
        }
    }
    let mut turned = TokenSlots { offsets: vec![0], slots: Vec::new() };
    for list in lists {
        turned.slots.extend(list);
        turned.offsets.push(turned.slots.len() as i32);
    }
    Ok(turned)
}

/// `y[t] = residual[t] + addend[t] + sum over the token's slots s of slot_weight[s] y_slots[s]`, `[T,H]`; weights are 1 where
/// absent. A token that no expert chose gets `residual + addend`.
///
/// # Errors
/// Lengths that do not fit, a slot beyond `y_slots`.
pub fn combine_ragged<Y: Real, A: Real>(
    y_slots: &[Y],
    of: &TokenSlots,
    slot_weight: Option<&[f32]>,
    residual: Option<&[A]>,
    addend: Option<&[A]>,
    hidden: usize,
) -> Result<Vec<f64>, ReferenceError> {
    require("hidden", hidden > 0, || "at least 1".into(), hidden)?;
    require("y_slots", y_slots.len().is_multiple_of(hidden), || format!("rows of {hidden}"), y_slots.len())?;
    require("offsets", !of.offsets.is_empty(), || "at least 1 entry".into(), 0)?;
    let (tokens, slots) = (of.offsets.len() - 1, y_slots.len() / hidden);
    let last = of.slots.iter().copied().max().unwrap_or(-1);
    require("slots", i64::from(last) < slots as i64, || format!("slots below {slots}"), last)?;
    if let Some(weights) = slot_weight {
        require_shape("slot_weight", weights, &[slots])?;
    }
    for (name, rows) in [("residual", residual), ("addend", addend)] {
        if let Some(rows) = rows {
            require_shape(name, rows, &[tokens, hidden])?;
        }
    }
    let mut y = vec![0.0; tokens * hidden];
    for (t, y) in y.chunks_mut(hidden).enumerate() {
        for rows in [residual, addend].into_iter().flatten() {
            y.iter_mut().zip(&rows[t * hidden..]).for_each(|(y, &value)| *y += value.into());
        }
        for &slot in &of.slots[of.offsets[t] as usize..of.offsets[t + 1] as usize] {
            let weight = slot_weight.map_or(1.0, |weights| f64::from(weights[slot as usize]));
            y.iter_mut().zip(&y_slots[slot as usize * hidden..]).for_each(|(y, &value)| *y += weight * value.into());
        }
    }
    Ok(y)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn affinities_are_columns_of_the_softmax() {
        let got = affinities(&[0.0f64, 3f64.ln(), 0.0, 0.0], 2, Affinity::Softmax).unwrap();
        for (got, want) in got.iter().zip([0.25, 0.5, 0.75, 0.5]) {
            assert!((got - want).abs() < 1e-15);
        }
    }

    #[test]
    fn ties_go_to_the_lower_token_and_nan_is_last() {
        let nan = f32::NAN;
        let got = choose(&[1.0, 2.0, 2.0, 2.0, nan, f32::NEG_INFINITY, nan, 0.0], 2, 2).unwrap();
        assert_eq!(got.slot_token, [1, 2, 1, 3]);
        assert_eq!(got.slot_weight, [2.0, 2.0, f32::NEG_INFINITY, 0.0]);
        assert_eq!(choose(&[nan; 3], 1, 2).unwrap().slot_token, [0, 1]);
    }

    #[test]
    fn a_token_has_as_many_slots_as_experts_chose_it() {
        let turned = token_slots(&[2, 0, 2, -1], 4).unwrap();
        assert_eq!(turned.offsets, [0, 1, 1, 3, 3]);
        assert_eq!(turned.slots, [1, 0, 2]);
        let y =
            combine_ragged(&[1.0, 10.0, 100.0, 0.0], &turned, Some(&[2.0, 3.0, 4.0, 0.0]), Some(&[0.5; 4]), None, 1);
        assert_eq!(y.unwrap(), [30.5, 0.5, 402.5, 0.5]);
    }

    #[test]
    fn more_than_all_tokens_is_an_error() {
        assert_eq!(choose(&[1.0f32; 4], 2, 3).unwrap_err().argument, "capacity");
    }
}
