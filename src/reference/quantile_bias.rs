//! Quantile balancing.

use super::gating::descending;
use super::{ReferenceError, require, require_shape};

/// `bias'_e = -(the c+1-th largest of S_te - alpha_t over the m tokens that count)`, with `alpha_t = S_t,id + bias_id` the choice value of the
/// token's last id, and `c = floor(m k / E)` each expert's share (Megatron-LM, `qb_dual_update`: `S - beta` chooses, `beta = -bias`). Sums
/// are f32, as the choice's are. Where that is not finite, or no token counts, the bias stays.
///
/// `scores [T,E]`, `ids [T,k+1]`, `bias [E]`; `valid [T]` says which tokens are no padding, and one whose last id is no expert's does not count.
///
/// # Errors
/// Lengths that do not fit.
pub fn quantile_bias(
    scores: &[f32],
    ids: &[i32],
    bias: &[f32],
    top_k: usize,
    valid: &[bool],
) -> Result<Vec<f32>, ReferenceError> {
    let experts = bias.len();
    require("top_k", (1..experts).contains(&top_k), || format!("1 to {}", experts.saturating_sub(1)), top_k)?;
    require_shape("scores", scores, &[valid.len(), experts])?;
    require_shape("ids", ids, &[valid.len(), top_k + 1])?;
    let rows = scores.chunks(experts).zip(ids.chunks(top_k + 1)).zip(valid);
    let counted: Vec<(&[f32], f32)> = rows
        .filter(|(_, valid)| **valid)
        .filter_map(|((row, ids), _)| {
            let last = usize::try_from(ids[top_k]).ok().filter(|&id| id < experts)?;
            Some((row, row[last] + bias[last]))
        })
        .collect();
    let share = counted.len() * top_k / experts;
    let updated = (0..experts).map(|e| {
        let mut margins: Vec<f32> = counted.iter().map(|(row, alpha)| row[e] - alpha).collect();
        margins.sort_by(|&a, &b| descending(a.into(), b.into()));
        margins.get(share).map(|margin| -margin).filter(|bias| bias.is_finite()).unwrap_or(bias[e])
    });
    Ok(updated.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_popular_expert_loses_half_of_its_tokens() {
        // Four tokens prefer expert 0 by 0.1, 0.2, 0.3, 0.4; each expert's share is two.
        let scores = [0.1f32, 0.0, 0.2, 0.0, 0.3, 0.0, 0.4, 0.0];
        let updated = quantile_bias(&scores, &[0, 1].repeat(4), &[0.0, 0.0], 1, &[true; 4]).unwrap();
        // The third largest margin of expert 0 is 0.2: with that bias two stay above, one is level.
        assert_eq!(updated, [-0.2, 0.0]);
        let one = quantile_bias(&scores, &[0, 1].repeat(4), &[0.0, 0.5], 1, &[false; 4]).unwrap();
        assert_eq!(one, [0.0, 0.5], "no token counts");
    }
}
