//! The way back through the sums that end a layer.

use super::gate_addend;
use crate::reference::activation::sigmoid;
use crate::reference::router::dot;
use crate::reference::{Real, ReferenceError, require, require_shape};

/// What [`super::combine`] passes back.
#[derive(Clone, Debug, PartialEq)]
pub struct CombineGradient {
    /// `[slots,H]`; zero in rows that no slot fills.
    pub y_slots: Vec<f64>,
    /// `[T,k]`; zero for a slot without a row. Also where no weights were given: of weights that are 1.
    pub weights: Vec<f64>,
}

/// The gradients of `sum dy y` for `y[t] = sum_j weights[t,j] y_slots[token_slot[t,j]]`: `d_y_slots[r] = weights[t,j] dy[t]`,
/// `d_weights[t,j] = dy[t] . y_slots[r]`. A residual and an addend have the gradient `dy`.
///
/// # Errors
/// Lengths that do not fit.
pub fn combine_backward<Y: Real>(
    y_slots: &[Y],
    token_slot: &[i32],
    weights: Option<&[f64]>,
    dy: &[f64],
    top_k: usize,
    hidden: usize,
) -> Result<CombineGradient, ReferenceError> {
    require("hidden", hidden > 0, || "at least 1".into(), hidden)?;
    require("top_k", top_k > 0, || "at least 1".into(), top_k)?;
    require_shape("dy", dy, &[token_slot.len() / top_k, hidden])?;
    weights.map(|weights| require_shape("weights", weights, &[token_slot.len()])).transpose()?;
    let last = token_slot.iter().copied().max().unwrap_or(-1);
    require("token_slot", i64::from(last) < (y_slots.len() / hidden) as i64, || "a row of `y_slots`".into(), last)?;

    let mut gradient = CombineGradient { y_slots: vec![0.0; y_slots.len()], weights: vec![0.0; token_slot.len()] };
    for (slot, &row) in token_slot.iter().enumerate() {
        let Ok(row) = usize::try_from(row) else { continue };
        let dy = &dy[slot / top_k * hidden..][..hidden];
        let weight = weights.map_or(1.0, |weights| weights[slot]);
        gradient.weights[slot] = dot(dy, &y_slots[row * hidden..][..hidden]);
        gradient.y_slots[row * hidden..][..hidden].iter_mut().zip(dy).for_each(|(d, dy)| *d = weight * dy);
    }
    Ok(gradient)
}

/// Of `sum d sigmoid(logits[t]) addend[t]`: the gradients of `addend [T,H]` and of `logits [T]`, `s (1 - s) d[t] . addend[t]`.
///
/// # Errors
/// Lengths that do not fit.
pub fn gate_addend_backward(addend: &[f64], logits: &[f64], d: &[f64]) -> Result<(Vec<f64>, Vec<f64>), ReferenceError> {
    require_shape("d", d, &[addend.len()])?;
    let mut d_addend = d.to_vec();
    gate_addend(&mut d_addend, logits)?;
    let hidden = (addend.len() / logits.len().max(1)).max(1);
    let rows = addend.chunks(hidden).zip(d.chunks(hidden)).zip(logits);
    let d_logits = rows.map(|((addend, d), &logit)| sigmoid(logit) * sigmoid(-logit) * dot(addend, d)).collect();
    Ok((d_addend, d_logits))
}

/// The gradients of `sum dy y` for `y[t] += sum_j weights[t,j] x[t]` over the choices whose id is one of `experts`, added to `d_x [T,H]` and
/// `d_weights [T,k]`: of [`super::add_identity`] and [`super::identity_weight`].
///
/// # Errors
/// Lengths that do not fit.
pub fn add_identity_backward<X: Real>(
    (x, ids, weights): (&[X], &[i32], &[f64]),
    top_k: usize,
    experts: std::ops::Range<i32>,
    dy: &[f64],
    (d_x, d_weights): (&mut [f64], &mut [f64]),
) -> Result<(), ReferenceError> {
    require("top_k", top_k > 0 && ids.len().is_multiple_of(top_k), || format!("rows of {top_k}"), ids.len())?;
    for (name, list, length) in [("weights", weights, ids.len()), ("d_weights", d_weights, ids.len())] {
        require_shape(name, list, &[length])?;
    }
    require_shape("dy", dy, &[x.len()])?;
    require_shape("d_x", d_x, &[x.len()])?;
    let hidden = x.len() / (ids.len() / top_k).max(1);
    for (slot, _) in ids.iter().enumerate().filter(|(_, id)| experts.contains(id)) {
        let row = slot / top_k * hidden..slot / top_k * hidden + hidden;
        d_weights[slot] += dot(&x[row.clone()], &dy[row.clone()]);
        d_x[row.clone()].iter_mut().zip(&dy[row]).for_each(|(d, dy)| *d += weights[slot] * dy);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_weights_by_hand() {
        let y_slots = [1.0, 2.0, 10.0, 20.0, f64::NAN, f64::NAN];
        let got =
            combine_backward(&y_slots, &[1, 0, -1, -1], Some(&[0.5, 3.0, 7.0, 9.0]), &[1.0, -1.0, 5.0, 5.0], 2, 2);
        let got = got.unwrap();
        assert_eq!(got.weights, [-10.0, -1.0, 0.0, 0.0]);
        assert_eq!(got.y_slots, [3.0, -3.0, 0.5, -0.5, 0.0, 0.0]);
    }

    #[test]
    fn identities_by_hand() {
        let (mut d_x, mut d_weights) = ([1.0, 1.0], [0.0; 2]);
        let given = (&[2.0, 3.0][..], &[4, 0][..], &[0.5, 9.0][..]);
        add_identity_backward(given, 2, 3..5, &[10.0, 1.0], (&mut d_x, &mut d_weights)).unwrap();
        assert_eq!((d_x, d_weights), ([6.0, 1.5], [23.0, 0.0]));
    }
}
