//! Slots that experts with a capacity keep by weight.

use super::gating::descending;
use super::{ReferenceError, require, require_shape};

/// Of the slots `ids [T,k]` each expert keeps the `capacity` of largest weight, equal ones by slot, NaN last: their ids and weights; -1 and 0 for
/// others (Megatron-LM's token drop policy `probs`: `topk` over tokens of the chosen experts' probabilities).
///
/// # Errors
/// Lengths that do not fit, a capacity of 0.
pub fn keep_largest(
    ids: &[i32],
    weights: &[f32],
    experts: usize,
    capacity: usize,
) -> Result<(Vec<i32>, Vec<f32>), ReferenceError> {
    require("capacity", capacity > 0, || "at least 1".into(), 0)?;
    require_shape("weights", weights, &[ids.len()])?;
    let (mut kept, mut kept_weights) = (vec![-1; ids.len()], vec![0.0; ids.len()]);
    for expert in 0..experts as i32 {
        let mut slots: Vec<usize> = (0..ids.len()).filter(|&slot| ids[slot] == expert).collect();
        slots.sort_by(|&a, &b| descending(weights[a].into(), weights[b].into()));
        for &slot in slots.iter().take(capacity) {
            (kept[slot], kept_weights[slot]) = (expert, weights[slot]);
        }
    }
    Ok((kept, kept_weights))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_stay_and_the_first_of_equals() {
        let ids = [0, 1, 0, -1, 0, 0];
        let weights = [0.5, 0.1, 0.9, 0.7, 0.5, f32::NAN];
        let (kept, kept_weights) = keep_largest(&ids, &weights, 2, 2).unwrap();
        assert_eq!(kept, [0, 1, 0, -1, -1, -1]);
        assert_eq!(kept_weights, [0.5, 0.1, 0.9, 0.0, 0.0, 0.0]);
    }
}
