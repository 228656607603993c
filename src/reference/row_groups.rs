//! Row groups: which rows are an expert's, where they lie by expert already.

/// The rows of each expert, `[first, end)`, one expert's behind another's: `ends[e]` is where those of expert `e` end
/// (`torch._grouped_mm`'s offs).
///
/// An end is at least the one before it and 0, and at most `rows`.
pub fn by_ends(ends: &[i32], rows: usize) -> Vec<(usize, usize)> {
    let mut last = 0;
    ends.iter()
        .map(|&end| {
            let first = last;
            last = (end.max(0) as usize).min(rows).max(last);
            (first, last)
        })
        .collect()
}

/// The same of `counts[e]` rows for expert `e`; a negative count is none, and there are `rows` in all.
pub fn by_counts(counts: &[i32], rows: usize) -> Vec<(usize, usize)> {
    let mut last = 0;
    counts
        .iter()
        .map(|&count| {
            let first = last;
            last = (last + count.max(0) as usize).min(rows);
            (first, last)
        })
        .collect()
}

/// The same of `[E, height]` rows, of which expert `e` has the first `counts[e]` (DeepGEMM's masked layout).
pub fn masked(counts: &[i32], height: usize) -> Vec<(usize, usize)> {
    counts
        .iter()
        .enumerate()
        .map(|(e, &count)| (e * height, e * height + (count.max(0) as usize).min(height)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_cut() {
        assert_eq!(by_ends(&[2, 2, 7, 5, 100], 10), [(0, 2), (2, 2), (2, 7), (7, 7), (7, 10)]);
        assert_eq!(by_counts(&[2, -1, i32::MAX, 3], 10), [(0, 2), (2, 2), (2, 10), (10, 10)]);
        assert_eq!(masked(&[2, -1, 100], 4), [(0, 2), (4, 4), (8, 12)]);
    }
}
