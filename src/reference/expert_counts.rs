//! Expert counts: slots of each expert, and the sums of them.

use super::{ReferenceError, require};

/// Counts `[E]` of `ids`, and offsets `[E+1]` where each expert's rows are its slots rounded up to `row_multiple`; ids outside `0..E` are nobody's.
///
/// # Errors
/// A zero.
pub fn expert_counts(ids: &[i32], experts: usize, row_multiple: usize) -> Result<(Vec<i32>, Vec<i32>), ReferenceError> {
    require("experts", experts > 0, || "at least 1".into(), experts)?;
    require("row_multiple", row_multiple > 0, || "at least 1".into(), row_multiple)?;
    let mut counts = vec![0; experts];
    for &id in ids {
        if let Some(count) = usize::try_from(id).ok().and_then(|id| counts.get_mut(id)) {
            *count += 1;
        }
    }
    let mut offsets = vec![0];
    for &count in &counts {
        offsets.push(offsets[offsets.len() - 1] + (count as usize).next_multiple_of(row_multiple) as i32);
    }
    Ok((counts, offsets))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_offsets() {
        let ids = [2, 0, 2, -1, 7, 2];
        assert_eq!(expert_counts(&ids, 4, 1).unwrap(), (vec![1, 0, 3, 0], vec![0, 1, 1, 4, 4]));
        assert_eq!(expert_counts(&ids, 4, 4).unwrap(), (vec![1, 0, 3, 0], vec![0, 4, 4, 8, 8]));
    }
}
