//! Expert maps: from the router's expert numbers to what a device holds.
//!
//! Expert parallelism gives each device some experts (global id to local id, or none here); popular experts have several physical
//! replicas (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 3.4); null experts cost nothing (Meituan 2025, "LongCat-Flash
//! Technical Report", section 2.1, zero-computation experts: the token itself is the output).

use super::{ReferenceError, require, require_shape};
use crate::rules::{IDENTITY, NONE};

/// Ids as a device sees them.
#[derive(Clone, Debug, PartialEq)]
pub struct Mapped {
    /// `[T,k]`, local numbers, -1 for slots that no expert here takes.
    pub ids: Vec<i32>,
    /// `[T]`, sum of the weights of identity experts: their output is this times x.
    pub identity_weight: Vec<f64>,
}

/// Maps `ids [T,k]` by `map [E,R]`: entry r of an expert's row is its replica r.
///
/// `replicas [E]` says how many of a row count (1 to R; absent: R = 1). Slot s, counted through `ids`, takes replica
/// `floor(hash(s, seed) * replicas / 2^32)`: even in the long run, the same each time. Ids outside `0..E` stay unmapped (-1).
///
/// # Errors
/// Lengths that do not fit, a count of replicas outside 1 to R.
pub fn map_experts(
    ids: &[i32],
    weights: Option<&[f64]>,
    top_k: usize,
    map: &[i32],
    max_replicas: usize,
    replicas: Option<&[i32]>,
    seed: u32,
) -> Result<Mapped, ReferenceError> {
    require("top_k", top_k > 0, || "at least 1".into(), top_k)?;
    require("ids", ids.len().is_multiple_of(top_k), || format!("rows of {top_k}"), ids.len())?;
    require("max_replicas", max_replicas > 0, || "at least 1".into(), max_replicas)?;
    require("map", map.len().is_multiple_of(max_replicas), || format!("rows of {max_replicas}"), map.len())?;
    if let Some(weights) = weights {
        require_shape("weights", weights, &[ids.len()])?;
    }
    if let Some(replicas) = replicas {
        require_shape("replicas", replicas, &[map.len() / max_replicas])?;
        let range = 1..=max_replicas as i32;
        let odd = replicas.iter().find(|count| !range.contains(count));
        require("replicas", odd.is_none(), || format!("1 to {max_replicas}"), odd.unwrap_or(&0))?;
    }

    let mut result = Mapped { ids: Vec::new(), identity_weight: vec![0.0; ids.len() / top_k] };
    for (slot, &id) in ids.iter().enumerate() {
        let row = usize::try_from(id).ok().and_then(|id| Some((id, map.chunks(max_replicas).nth(id)?)));
        let target = row.map_or(NONE, |(id, row)| {
            let count = replicas.map_or(1, |replicas| replicas[id] as u64);
            row[((u64::from(hash(slot as u32, seed)) * count) >> 32) as usize]
        });
        if target == IDENTITY {
            result.identity_weight[slot / top_k] += weights.map_or(1.0, |weights| weights[slot]);
        }
        result.ids.push(target.max(NONE));
    }
    Ok(result)
}

/// A mixing hash of 32 bits: multiply, shift, exclusive or, three rounds.
pub fn hash(value: u32, seed: u32) -> u32 {
    let mut h = value ^ seed;
    for multiplier in [0x9E37_79B1u32, 0x85EB_CA77, 0xC2B2_AE3D] {
        h = h.wrapping_mul(multiplier);
        h ^= h >> 15;
    }
    h
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_elsewhere_identity_and_out_of_range() {
        let map = [NONE, 0, IDENTITY, 1, IDENTITY];
        let got = map_experts(&[1, 2, 3, 0, 4, 2, -1, 9], Some(&[1., 2., 3., 4., 5., 6., 7., 8.]), 2, &map, 1, None, 0);
        let got = got.unwrap();
        assert_eq!(got.ids, [0, -1, 1, -1, -1, -1, -1, -1]);
        assert_eq!(got.identity_weight, [2.0, 0.0, 11.0, 0.0]);
    }

    #[test]
    fn replicas_share_evenly() {
        let map = [0, 1, 2, 3, NONE, NONE];
        let ids = vec![0; 3000];
        let got = map_experts(&ids, None, 1, &map, 3, Some(&[3, 1]), 77).unwrap();
        for replica in 0..3 {
            let count = got.ids.iter().filter(|&&id| id == replica).count() as f64;
            // 1000 expected, standard deviation 26.
            assert!((count - 1000.0).abs() < 130.0, "{replica}: {count}");
        }
        assert_eq!(map_experts(&[1; 5], None, 1, &map, 3, Some(&[3, 1]), 77).unwrap().ids, [3; 5]);
        assert_eq!(map_experts(&[1], None, 1, &map, 3, Some(&[3, 4]), 0).unwrap_err().argument, "replicas");
    }
}
