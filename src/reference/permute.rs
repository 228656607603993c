//! Permute: rows of one matrix as rows of another.

use super::{ReferenceError, require};

/// `out[r] = x[source[r]]` for rows of `width` elements; none where `source[r]` is no row of `x`.
///
/// # Errors
/// A width of 0, an `x` that is no whole number of rows.
pub fn permute<T: Copy>(x: &[T], source: &[i32], width: usize) -> Result<Vec<Option<Vec<T>>>, ReferenceError> {
    require("width", width > 0, || "at least 1".into(), width)?;
    require("x", x.len().is_multiple_of(width), || format!("rows of {width}"), x.len())?;
    let row = |&r: &i32| usize::try_from(r).ok().and_then(|r| x.chunks(width).nth(r)).map(<[T]>::to_vec);
    Ok(source.iter().map(row).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_by_number() {
        let got = permute(&[1, 2, 3, 4, 5, 6], &[2, -1, 0, 3, 0], 2).unwrap();
        assert_eq!(got, [Some(vec![5, 6]), None, Some(vec![1, 2]), None, Some(vec![1, 2])]);
        assert_eq!(permute(&[1, 2, 3], &[0], 2).unwrap_err().argument, "x");
    }
}
