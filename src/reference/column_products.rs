//! Sums down the columns of rows times others: gradients of what multiplies a column.

use super::{Real, ReferenceError, require, require_shape};

/// `out[c] = sum_r x[r,c] (f_r d[r,c] - h_r gain[c] x[r,c])`, `[W]`, over the rows that are `there`.
///
/// `x` and `d` are `[R,W]`; `factors [R,2]` are `f_r, h_r`, absent 1 and 0; `gain [W]` is absent where `h` is.
///
/// # Errors
/// Lengths that do not fit.
pub fn column_products<X: Real, D: Real>(
    x: &[X],
    d: &[D],
    width: usize,
    factors: Option<&[f64]>,
    gain: Option<&[f64]>,
    there: impl Fn(usize) -> bool,
) -> Result<Vec<f64>, ReferenceError> {
    require("width", width > 0 && x.len().is_multiple_of(width), || format!("rows of {width}"), x.len())?;
    require_shape("d", d, &[x.len()])?;
    factors.map(|factors| require_shape("factors", factors, &[x.len() / width, 2])).transpose()?;
    gain.map(|gain| require_shape("gain", gain, &[width])).transpose()?;
    let mut sums = vec![0.0; width];
    for (i, (&x, &d)) in x.iter().zip(d).enumerate().filter(|(i, _)| there(i / width)) {
        let [f, h] = factors.map_or([1.0, 0.0], |factors| [factors[i / width * 2], factors[i / width * 2 + 1]]);
        let x: f64 = x.into();
        let less = if h == 0.0 { 0.0 } else { h * gain.map_or(1.0, |gain| gain[i % width]) * x };
        sums[i % width] += x * (f * d.into() - less);
    }
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let (x, d) = ([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]);
        assert_eq!(column_products(&x, &d, 2, None, None, |_| true).unwrap(), [100.0, 200.0]);
        assert_eq!(column_products(&x, &d, 2, None, None, |r| r == 1).unwrap(), [90.0, 160.0]);
        let factors = [0.5, 0.0, 0.0, 2.0];
        let got = column_products(&x, &d, 2, Some(&factors), Some(&[3.0, -1.0]), |_| true).unwrap();
        assert_eq!(got, [5.0 - 3.0 * 6.0 * 3.0, 20.0 + 4.0 * 2.0 * 4.0]);
        assert_eq!(column_products(&x, &d[1..], 2, None, None, |_| true).unwrap_err().argument, "d");
    }
}
