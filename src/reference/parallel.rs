//! Rows worked on side by side with the feature `parallel-reference`, else one after the other: the same results.

#[cfg(feature = "parallel-reference")]
use rayon::prelude::*;

/// `each(i, row)` for the rows of `length` elements of `matrix`.
pub(super) fn for_each_row<T: Send>(matrix: &mut [T], length: usize, each: impl Fn(usize, &mut [T]) + Sync) {
    #[cfg(feature = "parallel-reference")]
    matrix.par_chunks_mut(length).enumerate().for_each(|(i, row)| each(i, row));
    #[cfg(not(feature = "parallel-reference"))]
    matrix.chunks_mut(length).enumerate().for_each(|(i, row)| each(i, row));
}

/// What `of` makes of each row of `length` elements of `matrix`, in order.
pub(super) fn map_rows<T: Sync, R: Send>(matrix: &[T], length: usize, of: impl Fn(&[T]) -> R + Send + Sync) -> Vec<R> {
    #[cfg(feature = "parallel-reference")]
    return matrix.par_chunks(length).map(of).collect();
    #[cfg(not(feature = "parallel-reference"))]
    matrix.chunks(length).map(of).collect()
}
