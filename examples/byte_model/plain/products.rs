//! Products of matrices.

use std::num::NonZero;
use std::sync::OnceLock;
use std::thread;

use super::Real;

/// Multiplications below which a second thread costs more than it saves.
const WORTH_A_THREAD: usize = 1 << 19;

/// `a b`, `[m, n]` of `a [m, k]` and `b [k, n]`.
///
/// Rows of the result are shared among threads; each is summed in the order of k, whatever their number.
pub fn product(a: &[Real], b: &[Real], [m, k, n]: [usize; 3]) -> Vec<Real> {
    assert_eq!((a.len(), b.len()), (m * k, k * n), "a [{m}, {k}], b [{k}, {n}]");
    let mut out = vec![0.0; m * n];
    if m * k * n == 0 {
        return out;
    }
    let threads = threads().min(m * k * n / WORTH_A_THREAD).max(1);
    let rows = m.div_ceil(threads);
    thread::scope(|scope| {
        let mut parts = out.chunks_mut(rows * n).zip(a.chunks(rows * k));
        let (first_out, first_a) = parts.next().expect("there is a row");
        for (out, a) in parts {
            scope.spawn(move || rows_of_product(out, a, b, k, n));
        }
        rows_of_product(first_out, first_a, b, k, n);
    });
    out
}

/// `aᵀ`, `[columns, rows]`.
pub fn transposed(a: &[Real], [rows, columns]: [usize; 2]) -> Vec<Real> {
    assert_eq!(a.len(), rows * columns);
    let mut out = vec![0.0; a.len()];
    for (row, values) in a.chunks_exact(columns.max(1)).enumerate() {
        for (column, &value) in values.iter().enumerate() {
            out[column * rows + row] = value;
        }
    }
    out
}

/// Four terms of the sums at once: a row of the result is loaded and stored a quarter as often.
fn rows_of_product(out: &mut [Real], a: &[Real], b: &[Real], k: usize, n: usize) {
    for (out, a) in out.chunks_exact_mut(n).zip(a.chunks_exact(k)) {
        let (a_fours, b_fours) = (a.chunks_exact(4), b.chunks_exact(4 * n));
        let rest = a_fours.remainder().iter().zip(b_fours.remainder().chunks_exact(n));
        for (a, b) in a_fours.zip(b_fours) {
            let (b0, b) = b.split_at(n);
            let (b1, b) = b.split_at(n);
            let (b2, b3) = b.split_at(n);
            for ((((out, b0), b1), b2), b3) in out.iter_mut().zip(b0).zip(b1).zip(b2).zip(b3) {
                *out += a[0] * b0 + a[1] * b1 + a[2] * b2 + a[3] * b3;
            }
        }
        for (&a, b) in rest {
            out.iter_mut().zip(b).for_each(|(out, b)| *out += a * b);
        }
    }
}

fn threads() -> usize {
    static THREADS: OnceLock<usize> = OnceLock::new();
    *THREADS.get_or_init(|| thread::available_parallelism().map_or(1, NonZero::get))
}
