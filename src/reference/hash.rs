//! Hash layers: the expert follows from the token's id alone.
//!
//! Roller et al. 2021, "Hash Layers For Large Sparse Models" (arXiv:2106.04426).

use super::{ReferenceError, require};

/// From a token's id to its experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hash<'a> {
    /// `table [V,k]`: the experts of each word of the vocabulary (the paper's balanced, clustered and dispersed hashes).
    Table(&'a [i32]),
    /// A mixing hash for each of the k places (the paper's random hash, without its table).
    Mix {
        /// Chooses the functions.
        seed: u64,
    },
}

/// The 32-bit finaliser of MurmurHash3 (Appleby), a bijection.
pub fn mix32(mut word: u32) -> u32 {
    word ^= word >> 16;
    word = word.wrapping_mul(0x85eb_ca6b);
    word ^= word >> 13;
    word = word.wrapping_mul(0xc2b2_ae35);
    word ^ word >> 16
}

/// Place `j`'s hash of a token id, 32 bits: the id is mixed with one half of the seed, then with the other and `j`.
pub fn hash(token_id: i32, j: u32, seed: u64) -> u32 {
    let (low, high) = (seed as u32, (seed >> 32) as u32);
    mix32(mix32(token_id as u32 ^ low).wrapping_add(high).wrapping_add(j.wrapping_mul(0x9e37_79b9)))
}

/// Ids `[T,k]` of the experts of `token_ids [T]`: several hashes a token are the paper's MultiHash (section 3.2), whose
/// pieces of one feed-forward layer, side by side, add up as experts of weight 1 do. That a token's experts differ is ours: the paper's
/// hashes choose each for itself.
///
/// A table's entry is taken as it is if it is an expert, else -1, as for a token id outside the table. The mixing hash
/// gives expert `floor(hash E / 2^32)`; one that the token already has moves on to the next free expert (upwards, from the last to the
/// first), so that the k experts are distinct.
///
/// # Errors
/// A table whose length does not fit, `top_k` of 0, or above `experts` for a mixing hash.
pub fn route(token_ids: &[i32], hash_by: Hash, experts: usize, top_k: usize) -> Result<Vec<i32>, ReferenceError> {
    require("experts", experts > 0, || "at least 1".into(), experts)?;
    require("top_k", top_k > 0, || "at least 1".into(), top_k)?;
    let mut ids: Vec<i32> = Vec::with_capacity(token_ids.len() * top_k);
    match hash_by {
        Hash::Table(table) => {
            require("table", table.len().is_multiple_of(top_k), || format!("rows of {top_k}"), table.len())?;
            for &token in token_ids {
                for j in 0..top_k {
                    let row = usize::try_from(token).ok().and_then(|token| token.checked_mul(top_k));
                    let entry = row.and_then(|row| table.get(row + j)).copied();
                    ids.push(entry.filter(|&id| (0..experts as i64).contains(&i64::from(id))).unwrap_or(-1));
                }
            }
        }
        Hash::Mix { seed } => {
            require("top_k", top_k <= experts, || format!("at most {experts}"), top_k)?;
            for &token in token_ids {
                let own = ids.len();
                for j in 0..top_k {
                    let mut id = ((u64::from(hash(token, j as u32, seed)) * experts as u64) >> 32) as i32;
                    while ids[own..].contains(&id) {
                        id = (id + 1) % experts as i32;
                    }
                    ids.push(id);
                }
            }
        }
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mix32_of_zero_and_one() {
        assert_eq!(mix32(0), 0);
        assert_eq!(mix32(1), 0x514e_28b7);
    }

    #[test]
    fn tables_are_looked_up() {
        let table = [3, 0, 1, 2, 4, -5];
        assert_eq!(route(&[2, 0, -1, 3], Hash::Table(&table), 4, 2).unwrap(), [-1, -1, 3, 0, -1, -1, -1, -1]);
    }

    #[test]
    fn places_are_distinct() {
        let tokens: Vec<i32> = (0..50).collect();
        let ids = route(&tokens, Hash::Mix { seed: 7 }, 5, 5).unwrap();
        for row in ids.chunks(5) {
            let mut row = row.to_vec();
            row.sort_unstable();
            assert_eq!(row, [0, 1, 2, 3, 4]);
        }
    }
}
