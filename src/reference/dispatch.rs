//! Dispatch: slots sorted by expert.

use super::{ReferenceError, require};
use crate::rules::Capacity;

/// How slots are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DispatchRule {
    /// Experts, `E`.
    pub experts: usize,
    /// Experts of a token, `k`.
    pub top_k: usize,
    /// Limit of slots per expert; without it nothing is dropped.
    pub capacity: Option<Capacity>,
    /// Rows of a tile.
    pub tile_m: usize,
}

/// Slots by expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dispatched {
    /// `[E]`, slots that the expert takes.
    pub counts: Vec<i32>,
    /// `[E+1]`, first row of the expert.
    pub offsets: Vec<i32>,
    /// `[offsets[E]]`, the token of each row, -1 in a row of the padded layout that no slot fills.
    pub slot_token: Vec<i32>,
    /// `[T,k]`, the row of each slot, -1 for a dropped or skipped one.
    pub token_slot: Vec<i32>,
    /// `{expert, first row, row after the last, 0}` of each tile, experts ascending.
    pub tiles: Vec<[i32; 4]>,
}

impl Dispatched {
    /// `[offsets[E]]`, `weights [T,k]` moved to the rows of their slots; zero in rows that no slot fills.
    pub fn slot_weight<W: Copy + Default>(&self, weights: &[W]) -> Vec<W> {
        let mut moved = vec![W::default(); self.slot_token.len()];
        for (&slot, &weight) in self.token_slot.iter().zip(weights) {
            if slot >= 0 {
                moved[slot as usize] = weight;
            }
        }
        moved
    }

    /// The same slots with the rows of each expert rounded up to `row_multiple`, and no row from `max_rows` on: what would stand there is
    /// dropped. Also the number of slots dropped.
    ///
    /// Blocks of rows of one expert: vLLM's `moe_align_block_size`, MegaBlocks' padded gather (Gale et al. 2022); the limit is
    /// TransformerEngine's `num_out_tokens`.
    ///
    /// # Errors
    /// A zero; rows that are padded already.
    pub fn with_rows(
        &self,
        row_multiple: usize,
        max_rows: Option<usize>,
        tile_m: usize,
    ) -> Result<(Dispatched, usize), ReferenceError> {
        require("row_multiple", row_multiple > 0, || "at least 1".into(), row_multiple)?;
        require("tile_m", tile_m > 0, || "at least 1".into(), tile_m)?;
        let padded = self.slot_token.contains(&-1);
        require("dispatched", !padded, || "rows without gaps".into(), "gaps")?;
        let end = max_rows.unwrap_or(usize::MAX);
        let mut result = Dispatched {
            counts: Vec::new(),
            offsets: vec![0],
            slot_token: Vec::new(),
            token_slot: vec![-1; self.token_slot.len()],
            tiles: Vec::new(),
        };
        // The row of each old row.
        let mut moved = vec![-1; self.slot_token.len()];
        for (expert, &count) in self.counts.iter().enumerate() {
            let (from, first) = (self.offsets[expert] as usize, result.slot_token.len());
            let kept = (count as usize).min(end - first);
            for i in 0..kept {
                moved[from + i] = (first + i) as i32;
                result.slot_token.push(self.slot_token[from + i]);
            }
            for row in (first..first + kept).step_by(tile_m) {
                result.tiles.push([expert as i32, row as i32, (row + tile_m).min(first + kept) as i32, 0]);
            }
            result.slot_token.resize((first + (count as usize).next_multiple_of(row_multiple)).min(end), -1);
            result.counts.push(kept as i32);
            result.offsets.push(result.slot_token.len() as i32);
        }
        for (to, &slot) in result.token_slot.iter_mut().zip(&self.token_slot) {
            if slot >= 0 {
                *to = moved[slot as usize];
            }
        }
        let dropped = moved.iter().filter(|&&row| row < 0).count();
        Ok((result, dropped))
    }
}

/// Sorts the slots of `ids [T,k]` by expert, stably: within an expert by token, then by place among the token's choices.
///
/// An id outside `0..E` (-1 above all) is a skipped slot. With a capacity, an expert takes its first slots of every sequence
/// and the others are dropped (Fedus et al. 2021, "Switch Transformers", section 2.2; GShard's layout if it is padded).
///
/// # Errors
/// Lengths that do not fit, a zero in the rule.
pub fn dispatch(ids: &[i32], rule: &DispatchRule) -> Result<Dispatched, ReferenceError> {
    require("experts", rule.experts > 0, || "at least 1".into(), rule.experts)?;
    require("top_k", rule.top_k > 0, || "at least 1".into(), rule.top_k)?;
    require("tile_m", rule.tile_m > 0, || "at least 1".into(), rule.tile_m)?;
    require("ids", ids.len().is_multiple_of(rule.top_k), || format!("rows of {}", rule.top_k), ids.len())?;
    let tokens = ids.len() / rule.top_k;
    if let Some(capacity) = rule.capacity {
        require("capacity.per_expert", capacity.per_expert > 0, || "at least 1".into(), 0)?;
        require("capacity.tokens_per_sequence", capacity.tokens_per_sequence > 0, || "at least 1".into(), 0)?;
    }

    // Slots each expert keeps, in order.
    let mut kept: Vec<Vec<usize>> = vec![Vec::new(); rule.experts];
    let sequence = rule.capacity.map_or(tokens, |capacity| capacity.tokens_per_sequence).max(1);
    for (index, sequence_ids) in ids.chunks(sequence * rule.top_k).enumerate() {
        let mut taken = vec![0; rule.experts];
        for (at, &id) in sequence_ids.iter().enumerate() {
            let Some(expert) = usize::try_from(id).ok().filter(|&id| id < rule.experts) else { continue };
            if rule.capacity.is_none_or(|capacity| taken[expert] < capacity.per_expert) {
                taken[expert] += 1;
                kept[expert].push(index * sequence * rule.top_k + at);
            }
        }
    }

    let room = rule.capacity.filter(|c| c.padded).map(|c| c.per_expert * tokens.div_ceil(c.tokens_per_sequence));
    let mut result = Dispatched {
        counts: kept.iter().map(|slots| slots.len() as i32).collect(),
        offsets: vec![0],
        slot_token: Vec::new(),
        token_slot: vec![-1; ids.len()],
        tiles: Vec::new(),
    };
    for (expert, slots) in kept.iter().enumerate() {
        let first = result.slot_token.len();
        for &slot in slots {
            result.token_slot[slot] = result.slot_token.len() as i32;
            result.slot_token.push((slot / rule.top_k) as i32);
        }
        let end = result.slot_token.len();
        for row in (first..end).step_by(rule.tile_m) {
            result.tiles.push([expert as i32, row as i32, (row + rule.tile_m).min(end) as i32, 0]);
        }
        if let Some(room) = room {
            result.slot_token.resize(first + room, -1);
        }
        result.offsets.push(result.slot_token.len() as i32);
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(experts: usize, top_k: usize, tile_m: usize) -> DispatchRule {
        DispatchRule { experts, top_k, capacity: None, tile_m }
    }

    #[test]
    fn stable_within_an_expert() {
        let got = dispatch(&[2, 0, 0, 2, 2, 3, 0, 2], &rule(4, 2, 2)).unwrap();
        assert_eq!(got.counts, [3, 0, 4, 1]);
        assert_eq!(got.offsets, [0, 3, 3, 7, 8]);
        assert_eq!(got.slot_token, [0, 1, 3, 0, 1, 2, 3, 2]);
        assert_eq!(got.token_slot, [3, 0, 1, 4, 5, 7, 2, 6]);
        assert_eq!(got.tiles, [[0, 0, 2, 0], [0, 2, 3, 0], [2, 3, 5, 0], [2, 5, 7, 0], [3, 7, 8, 0]]);
        assert_eq!(got.slot_weight(&[1, 2, 3, 4, 5, 6, 7, 8]), [2, 3, 7, 1, 4, 5, 8, 6]);
    }

    #[test]
    fn ids_out_of_range_are_skipped() {
        let got = dispatch(&[-1, 1, 2, 0], &rule(2, 2, 4)).unwrap();
        assert_eq!(got.counts, [1, 1]);
        assert_eq!(got.token_slot, [-1, 1, -1, 0]);
        assert_eq!(got.slot_token, [1, 0]);
    }

    #[test]
    fn capacity_counts_anew_in_each_sequence() {
        let capacity = Some(Capacity { per_expert: 2, tokens_per_sequence: 3, padded: false });
        let got = dispatch(&[0, 0, 0, 0, 1], &DispatchRule { capacity, ..rule(2, 1, 8) }).unwrap();
        assert_eq!(got.counts, [3, 1]);
        assert_eq!(got.token_slot, [0, 1, -1, 2, 3]);
        assert_eq!(got.slot_token, [0, 1, 3, 4]);
    }

    #[test]
    fn padded_rows_hold_no_token() {
        let capacity = Some(Capacity { per_expert: 2, tokens_per_sequence: 3, padded: true });
        let got = dispatch(&[0, 0, 0, 0, 1], &DispatchRule { capacity, ..rule(2, 1, 8) }).unwrap();
        assert_eq!(got.counts, [3, 1]);
        assert_eq!(got.offsets, [0, 4, 8]);
        assert_eq!(got.slot_token, [0, 1, 3, -1, 4, -1, -1, -1]);
        assert_eq!(got.token_slot, [0, 1, -1, 2, 4]);
        assert_eq!(got.tiles, [[0, 0, 3, 0], [1, 4, 5, 0]]);
        assert_eq!(got.slot_weight(&[1, 2, 3, 4, 5]), [1, 2, 4, 0, 5, 0, 0, 0]);
    }

    #[test]
    fn rows_rounded_up_and_ended() {
        let plan = dispatch(&[2, 0, 0, 2, 2, 3, 0, 2], &rule(4, 2, 2)).unwrap();
        let (got, dropped) = plan.with_rows(4, Some(10), 2).unwrap();
        // 3 rows of 4, none, 4 of 4, then 1 of 4, of which 2 are there.
        assert_eq!((got.counts, got.offsets), (vec![3, 0, 4, 1], vec![0, 4, 4, 8, 10]));
        assert_eq!(got.slot_token, [0, 1, 3, -1, 0, 1, 2, 3, 2, -1]);
        assert_eq!(got.tiles, [[0, 0, 2, 0], [0, 2, 3, 0], [2, 4, 6, 0], [2, 6, 8, 0], [3, 8, 9, 0]]);
        assert_eq!((dropped, got.token_slot), (0, vec![4, 0, 1, 5, 6, 8, 2, 7]));
        let (got, dropped) = plan.with_rows(1, Some(5), 2).unwrap();
        assert_eq!((got.counts, got.offsets), (vec![3, 0, 2, 0], vec![0, 3, 3, 5, 5]));
        assert_eq!((dropped, got.token_slot), (3, vec![3, 0, 1, 4, -1, -1, 2, -1]));
        assert_eq!(plan.with_rows(1, None, 2).unwrap(), (plan.clone(), 0));
    }

    #[test]
    fn no_tokens() {
        let got = dispatch(&[], &rule(3, 2, 4)).unwrap();
        assert_eq!((got.counts, got.offsets), (vec![0; 3], vec![0; 4]));
        assert!(got.tiles.is_empty() && got.slot_token.is_empty());
    }
}
