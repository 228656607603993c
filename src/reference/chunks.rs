//! Chunks of rows that change places (expert parallelism).

use super::{ReferenceError, require_shape};

/// The row that each of `rows` rows comes from when chunks of `sizes` rows stand in another `order` (-1 past the last), and the sizes in it.
///
/// A negative size is 0, and so is that of an entry of `order` that names no chunk.
///
/// # Errors
/// Lengths that differ.
pub fn chunk_rows(sizes: &[i32], order: &[i32], rows: usize) -> Result<(Vec<i32>, Vec<i32>), ReferenceError> {
    require_shape("order", order, &[sizes.len()])?;
    let size = |c: usize| sizes[c].max(0) as usize;
    let first = |c: usize| (0..c).map(size).sum::<usize>();
    let (mut source, mut new_sizes) = (Vec::new(), Vec::new());
    for &c in order {
        let chunk = usize::try_from(c).ok().filter(|&c| c < sizes.len());
        let (first, size) = chunk.map_or((0, 0), |c| (first(c), size(c)));
        source.extend((first..first + size).map(|row| if row < rows { row as i32 } else { -1 }));
        new_sizes.push(size as i32);
    }
    source.resize(rows, -1);
    Ok((source, new_sizes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_in_another_order() {
        let (source, sizes) = chunk_rows(&[2, 0, 3, 1], &[2, 3, 1, 0], 7).unwrap();
        assert_eq!(source, [2, 3, 4, 5, 0, 1, -1]);
        assert_eq!(sizes, [3, 1, 0, 2]);
    }
}
