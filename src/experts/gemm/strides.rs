//! Where the elements of a product's matrices lie.

use super::desc::{GemmDesc, SharedDepth};
use crate::Error;
use crate::rules::{Glu, Layout};
use crate::runtime::shape::{self, reach};

/// Distances between elements of a product's matrices, counted in elements: views into larger tensors, and matrices of any order.
///
/// The fastest kernels take rows that begin and end on 16 bytes with columns side by side; for all else there is one that reads 16 bytes, 4 or an
/// element at a time, as it can. A distance of an input may be 0 (a row for all); no two elements of `out` may be the same one. Where `a` has its
/// columns apart and the weight its depths ([`Layout::Kn`]), [`crate::experts::k_grouped`] computes a product without more to it faster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Strides {
    /// Of `a`: from a row to the next, from a column (a depth) to the next.
    pub a: [usize; 2],
    /// Of each tensor of the weight: from an expert to the next, from an output to the next, from a depth to the next.
    pub weight: [usize; 3],
    /// Of `out`: from a row to the next, from a column to the next.
    pub out: [usize; 2],
}

impl Strides {
    /// Of packed matrices, the weight in its layout: what a descriptor without strides has.
    pub fn packed(desc: &GemmDesc) -> Strides {
        Strides { a: [desc.k, 1], weight: desc.weight.strides(desc.n, desc.k), out: [desc.n, 1] }
    }

    /// With other distances in `a`.
    #[must_use]
    pub const fn a(self, row: usize, column: usize) -> Strides {
        Strides { a: [row, column], ..self }
    }

    /// With other distances in the weight.
    #[must_use]
    pub const fn weight(self, expert: usize, output: usize, depth: usize) -> Strides {
        Strides { weight: [expert, output, depth], ..self }
    }

    /// With other distances in `out`.
    #[must_use]
    pub const fn out(self, row: usize, column: usize) -> Strides {
        Strides { out: [row, column], ..self }
    }

    pub(super) fn check(&self, operation: &'static str, desc: &GemmDesc) -> Result<(), Error> {
        for (argument, stride) in
            [("strides.a", self.a), ("strides.weight", [self.weight[1], self.weight[2]]), ("strides.out", self.out)]
        {
            shape::size(operation, argument, stride[0].max(stride[1]))?;
        }
        let outputs = desc.weight.outputs(desc.n);
        let [rows, a_rows, experts] = [desc.out_rows(), desc.a_rows(), desc.rows.experts()];
        extent(operation, "strides.a", &[(a_rows.max(desc.shared_rows), self.a[0]), (desc.k, self.a[1])])?;
        let [expert, output, depth] = self.weight;
        extent(operation, "strides.weight", &[(experts, expert), (outputs, output), (desc.k, depth)])?;
        let rows = rows.max(desc.shared_rows);
        extent(operation, "strides.out", &[(rows, self.out[0]), (desc.n, self.out[1])])?;
        let apart =
            |[inner, outer]: [(usize, usize); 2]| inner.1 > 0 && outer.1 > (inner.0 - 1).saturating_mul(inner.1);
        let (row, column) = ((rows.max(1), self.out[0]), (desc.n, self.out[1]));
        if !apart([column, row]) && !apart([row, column]) {
            let expected = "rows that do not overlap, or columns that do not";
            return Err(Error::invalid(operation, "strides.out", expected, format!("{:?}", self.out)));
        }
        Ok(())
    }

    /// The order of the weight that the kernels for packed rows find here, if all rows begin and end on 16 bytes and their offsets have 32 bits.
    pub(super) fn layout_of_vectors(&self, desc: &GemmDesc) -> Option<Layout> {
        const MOST: [usize; 2] = [1 << 23, 1 << 26];
        let vector = 16 / desc.dtype.bytes() as usize;
        let whole = |stride: usize, most| stride.is_multiple_of(vector) && stride <= most;
        let [expert, output, depth] = self.weight;
        let nk = depth == 1 && whole(output, MOST[0]);
        let kn = output == 1 && whole(depth, MOST[1]);
        let layout = match desc.weight.layout {
            Layout::Nk if nk => Layout::Nk,
            _ if kn => Layout::Kn,
            _ if nk => Layout::Nk,
            _ => return None,
        };
        let sides =
            self.a[1] == 1 && whole(self.a[0], MOST[0]) && self.out[1] == 1 && self.out[0].is_multiple_of(vector);
        (sides && expert.is_multiple_of(vector)).then_some(layout)
    }

    /// Elements that `a` reaches over, of so many rows.
    pub(super) fn a_extent(&self, rows: usize, k: usize) -> usize {
        reach(&[(rows, self.a[0]), (k, self.a[1])])
    }

    /// Elements that `out` reaches over, of so many rows.
    pub(super) fn out_extent(&self, rows: usize, n: usize) -> usize {
        reach(&[(rows, self.out[0]), (n, self.out[1])])
    }
}

/// [`reach`] of what a caller gives: the numbers may be too large.
fn extent(operation: &'static str, argument: &'static str, dimensions: &[(usize, usize)]) -> Result<usize, Error> {
    let last = dimensions.iter().try_fold(0_usize, |sum, &(size, stride)| {
        size.saturating_sub(1).checked_mul(stride).and_then(|distance| sum.checked_add(distance))
    });
    let factors = [last.unwrap_or(usize::MAX).saturating_add(1)];
    shape::product(operation, argument, &factors)
}

/// Whether gate and up alternate: an output of either is two of the tensor's.
pub(super) fn outputs_apart(glu: Glu) -> usize {
    if glu == Glu::Interleaved { 2 } else { 1 }
}

impl GemmDesc {
    /// The distances given, or those of packed matrices.
    pub(super) fn places(&self) -> Strides {
        self.strides.unwrap_or_else(|| Strides::packed(self))
    }

    /// Those of a shared expert's rows and weight.
    pub(super) fn shared_places(&self) -> Strides {
        let places = self.places();
        match self.shared_depth {
            None => places,
            Some(SharedDepth { k, a_row }) => {
                Strides { a: [a_row, places.a[1]], weight: self.weight.strides(self.n, k), ..places }
            }
        }
    }

    /// The layout for the kernels of packed rows, where they can compute this.
    pub(in crate::experts) fn vector_layout(&self) -> Option<Layout> {
        let whole = [self.n, self.k, self.shared_k()].iter().all(|size| size.is_multiple_of(8)) && !self.unaligned;
        let layout = if whole { self.places().layout_of_vectors(self)? } else { return None };
        (self.shared_places().layout_of_vectors(self) == Some(layout)).then_some(layout)
    }
}
