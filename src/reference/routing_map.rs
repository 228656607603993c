//! Routing maps: a token's experts as a row of flags, one for each expert (Megatron-LM's `routing_map`), and as ids.

use super::{ReferenceError, require, require_shape};

/// Ids of a map's experts.
#[derive(Clone, Debug, PartialEq)]
pub struct MapIds {
    /// `[T,k]`, rising within a token, then -1.
    pub ids: Vec<i32>,
    /// `[T,k]`, the probabilities of these, then 0; empty without probabilities.
    pub weights: Vec<f32>,
    /// Experts past a token's first `k`.
    pub over: usize,
}

/// The experts of `map [T,E]`, with their `probs [T,E]`, as `top_k` ids a token.
///
/// # Errors
/// Lengths that do not fit, a zero.
pub fn to_ids(map: &[u8], probs: Option<&[f32]>, experts: usize, top_k: usize) -> Result<MapIds, ReferenceError> {
    require("experts", experts > 0, || "at least 1".into(), experts)?;
    require("top_k", top_k > 0, || "at least 1".into(), top_k)?;
    require("map", map.len().is_multiple_of(experts), || format!("rows of {experts}"), map.len())?;
    if let Some(probs) = probs {
        require_shape("probs", probs, &[map.len()])?;
    }
    let mut result = MapIds { ids: Vec::new(), weights: Vec::new(), over: 0 };
    for (t, row) in map.chunks(experts).enumerate() {
        let chosen: Vec<usize> = (0..experts).filter(|&e| row[e] != 0).collect();
        result.over += chosen.len().saturating_sub(top_k);
        for j in 0..top_k {
            result.ids.push(chosen.get(j).map_or(-1, |&e| e as i32));
            if let Some(probs) = probs {
                result.weights.push(chosen.get(j).map_or(0.0, |&e| probs[t * experts + e]));
            }
        }
    }
    Ok(result)
}

/// The map `[T,E]` of `ids [T,k]`, and the sums of an expert's weights, in f32, in the order of a token's ids; ids outside `0..E` are nothing.
///
/// # Errors
/// Lengths that do not fit, a zero.
pub fn from_ids(
    ids: &[i32],
    weights: Option<&[f32]>,
    top_k: usize,
    experts: usize,
) -> Result<(Vec<u8>, Vec<f32>), ReferenceError> {
    require("experts", experts > 0, || "at least 1".into(), experts)?;
    require("top_k", top_k > 0, || "at least 1".into(), top_k)?;
    require("ids", ids.len().is_multiple_of(top_k), || format!("rows of {top_k}"), ids.len())?;
    if let Some(weights) = weights {
        require_shape("weights", weights, &[ids.len()])?;
    }
    let tokens = ids.len() / top_k;
    let mut map = vec![0; tokens * experts];
    let mut probs = vec![0.0; if weights.is_some() { map.len() } else { 0 }];
    for (slot, &id) in ids.iter().enumerate() {
        let Some(e) = usize::try_from(id).ok().filter(|&e| e < experts) else { continue };
        let at = slot / top_k * experts + e;
        map[at] = 1;
        if let Some(weights) = weights {
            probs[at] += weights[slot];
        }
    }
    Ok((map, probs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        let map = [0, 1, 1, 0, 0, 0, 1, 1, 1];
        let probs = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9];
        let got = to_ids(&map, Some(&probs), 3, 2).unwrap();
        assert_eq!(got.ids, [1, 2, -1, -1, 0, 1]);
        assert_eq!(got.weights, [0.2, 0.3, 0.0, 0.0, 0.7, 0.8]);
        assert_eq!(got.over, 1);
        let (back, weights) = from_ids(&got.ids, Some(&got.weights), 2, 3).unwrap();
        assert_eq!(back, [0, 1, 1, 0, 0, 0, 1, 1, 0]);
        assert_eq!(weights, [0.0, 0.2, 0.3, 0.0, 0.0, 0.0, 0.7, 0.8, 0.0]);
    }

    #[test]
    fn an_expert_twice_and_one_that_is_not() {
        let (map, probs) = from_ids(&[1, 1, 5, -1], Some(&[1.0, 2.0, 4.0, 8.0]), 4, 3).unwrap();
        assert_eq!((map, probs), (vec![0, 1, 0], vec![0.0, 3.0, 0.0]));
    }
}
