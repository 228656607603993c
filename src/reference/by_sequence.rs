//! One expert for all tokens of a sequence: ViTPose+ (Xu et al. 2023), whose image patches go to the expert of the image's dataset.

use super::{ReferenceError, require};

/// Ids `[T]` and weights: token t has expert `index[t / tokens_per_sequence]` with weight 1, or where that is none, -1 with weight 0.
///
/// # Errors
/// No tokens a sequence, or fewer indices than sequences.
pub fn by_sequence(
    index: &[i64],
    tokens: usize,
    tokens_per_sequence: usize,
    experts: usize,
) -> Result<(Vec<i32>, Vec<f32>), ReferenceError> {
    require("tokens_per_sequence", tokens_per_sequence > 0, || "at least 1".into(), tokens_per_sequence)?;
    let sequences = tokens.div_ceil(tokens_per_sequence);
    require("index", index.len() >= sequences, || format!("{sequences} indices"), index.len())?;
    let expert = |token: usize| usize::try_from(index[token / tokens_per_sequence]).ok().filter(|&e| e < experts);
    let ids: Vec<i32> = (0..tokens).map(|token| expert(token).map_or(-1, |e| e as i32)).collect();
    let weights = ids.iter().map(|&id| if id < 0 { 0.0 } else { 1.0 }).collect();
    Ok((ids, weights))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let (ids, weights) = by_sequence(&[3, -1, 4, i64::MAX], 7, 2, 4).unwrap();
        assert_eq!(ids, [3, 3, -1, -1, -1, -1, -1]);
        assert_eq!(weights, [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(by_sequence(&[0], 3, 2, 4).unwrap_err().argument, "index");
    }
}
