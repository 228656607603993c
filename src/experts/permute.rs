//! Permute: rows of one matrix as rows of another, by number, bit for bit.
//!
//! `out[r] = x[source[r]]`. With the rows of a dispatch this is the permutation of tokens to their experts' rows (TransformerEngine's and
//! vLLM's `moe_permute`): an expert's rows are contiguous and in token order. The way back, with or without weights, is
//! [`crate::experts::combine`] of the same dispatch. From a map of all experts the dispatch is made by way of
//! [`crate::capacity::routing_map`]; rows rounded up to a multiple, or cut, by [`crate::capacity::dispatch::DispatchDesc::row_multiple`] and
//! [`max_rows`](crate::capacity::dispatch::DispatchDesc::max_rows). Probabilities along with the rows are the dispatch's
//! [`slot_weight`](crate::experts::Dispatched::slot_weight).
//!
//! With a list of row numbers it is any gather, for example of chunks that change places ([`crate::capacity::chunks`]).
//!
//! The products here need none of this, as they gather their rows themselves: it is for experts that other libraries compute.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView};

use super::dispatched::{Dispatched, SlotShape};
use crate::registry::{Kernel, PERMUTE_UNITS, permute_grid};
use crate::rules::Dtype;
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::PermuteParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "permute";

/// What becomes of rows that no row of `x` goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unfilled {
    /// They stay as they are.
    Keep,
    /// Those before the end of the rows (a dispatch's `offsets[E]`, else a list's limit) become zero: gaps between experts.
    ZeroGaps,
    /// All of them become zero.
    ZeroAll,
}

/// Shapes and type of a permutation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PermuteDesc {
    /// Type of `x` and `out`.
    pub dtype: Dtype,
    /// Rows of `x`; 0 is allowed.
    pub from_rows: usize,
    /// Rows of `out`; 0 is allowed.
    pub rows: usize,
    /// Elements of a row, any number from 1 on.
    pub width: usize,
    /// What becomes of other rows.
    pub unfilled: Unfilled,
}

impl PermuteDesc {
    /// `rows` rows out of `from_rows`, of `width` elements of type `dtype`; other rows stay as they are.
    pub const fn new(dtype: Dtype, from_rows: usize, rows: usize, width: usize) -> PermuteDesc {
        PermuteDesc { dtype, from_rows, rows, width, unfilled: Unfilled::Keep }
    }

    /// Tokens to the rows of a dispatch.
    pub const fn of(dtype: Dtype, rows: &SlotShape, width: usize) -> PermuteDesc {
        PermuteDesc::new(dtype, rows.tokens, rows.slots, width)
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "from_rows", self.from_rows)?;
        shape::size(OPERATION, "rows", self.rows)?;
        shape::positive(OPERATION, "width", self.width)?;
        shape::product(OPERATION, "x", &[self.from_rows, self.width])?;
        shape::product(OPERATION, "out", &[self.rows, self.width]).map(drop)
    }

    /// Bytes that a thread moves at once: as many as divide a row.
    fn unit(&self) -> u32 {
        let bytes = self.width * self.dtype.bytes() as usize;
        PERMUTE_UNITS.into_iter().find(|&unit| bytes.is_multiple_of(unit as usize)).unwrap_or(self.dtype.bytes())
    }

    fn units(&self) -> u32 {
        (self.width * self.dtype.bytes() as usize / self.unit() as usize) as u32
    }
}

settings!(PermuteDesc { unfilled: Unfilled });

/// Where rows come from.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub enum RowSource<'a> {
    /// `[rows]`: a row of `x` each; a number outside `0..from_rows` is none.
    List(In<'a, i32>),
    /// The token of each row of a dispatch.
    Dispatched(&'a Dispatched),
}

impl<'a> From<In<'a, i32>> for RowSource<'a> {
    fn from(list: In<'a, i32>) -> Self {
        RowSource::List(list)
    }
}

impl<'a> From<&'a CudaSlice<i32>> for RowSource<'a> {
    fn from(list: &'a CudaSlice<i32>) -> Self {
        RowSource::List(list.into())
    }
}

impl<'a> From<&'a CudaView<'_, i32>> for RowSource<'a> {
    fn from(list: &'a CudaView<'_, i32>) -> Self {
        RowSource::List(list.into())
    }
}

impl<'a> From<&'a Dispatched> for RowSource<'a> {
    fn from(dispatched: &'a Dispatched) -> Self {
        RowSource::Dispatched(dispatched)
    }
}

/// Buffers of a permutation.
#[non_exhaustive]
pub struct PermuteArgs<'a, T> {
    /// `[from_rows, width]`.
    pub x: In<'a, T>,
    /// Which row goes where; a dispatch of `from_rows` tokens and `rows` rows.
    pub source: RowSource<'a>,
    /// `[1]`: how many rows of a list count; absent, all. A dispatch knows its own.
    pub limit: Option<In<'a, i32>>,
    /// `[rows, width]`, written.
    pub out: Out<'a, T>,
}

impl<'a, T> PermuteArgs<'a, T> {
    /// Rows of `x` to `out`, as `source` says.
    pub fn new(
        x: impl Into<In<'a, T>>,
        source: impl Into<RowSource<'a>>,
        out: impl Into<Out<'a, T>>,
    ) -> PermuteArgs<'a, T> {
        PermuteArgs { x: x.into(), source: source.into(), limit: None, out: out.into() }
    }
}

buffers!(PermuteArgs<'a, T> { limit: In<i32> });

/// Chooses kernel and grid.
///
/// # Errors
/// Those of [`PermuteDesc::validate`]; [`Error::Overflow`] where the grid would exceed the device's limit.
pub fn select(desc: &PermuteDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let units = desc.width as u64 * u64::from(desc.dtype.bytes()) / u64::from(desc.unit());
    if units > shape::MAX as u64 {
        let value = format!("{units} units of {} bytes", desc.unit());
        return Err(Error::Overflow { operation: OPERATION, argument: "width", value, limit: shape::MAX as u64 });
    }
    let grid = permute_grid(desc.rows as u32, desc.units());
    shape::grid_y(OPERATION, "width", grid[1])?;
    Ok(Selection::new(Kernel::Permute { unit: desc.unit() }, grid))
}

/// Moves the rows.
///
/// With no rows nothing is launched.
///
/// # Errors
/// Those of [`select`]; [`Error::Invalid`] for a dispatch of another shape; [`Error::Unexpected`] for a limit beside a dispatch; those of a
/// buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`], [`Error::Misaligned`] (to 16 bytes, or to what divides a row's bytes if that is
/// less), [`Error::DifferentContext`]; and those of the driver.
pub fn forward<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &PermuteDesc,
    args: PermuteArgs<'_, T>,
) -> Result<(), Error> {
    let operation = OPERATION;
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(operation, kernels, stream)?;
    scope.check_dtype::<T>("x", desc.dtype)?;
    let alignment = u64::from(desc.unit());
    let x = scope.read("x", args.x, desc.from_rows * desc.width, alignment)?;
    let out = scope.write("out", args.out, desc.rows * desc.width, alignment)?;
    let limit = scope.read_some("limit", args.limit, 1, SCALAR)?;
    let launch = |source, limit| {
        if desc.rows == 0 {
            return Ok(());
        }
        let params = PermuteParams {
            x: x.address().into(),
            source,
            limit,
            out: out.address().into(),
            from_rows: desc.from_rows as u32,
            rows: desc.rows as u32,
            units: desc.units(),
            fill: desc.unfilled as u32,
        };
        scope.launch(&selection, params)
    };
    match args.source {
        RowSource::List(list) => {
            let source = scope.read("source", list, desc.rows, SCALAR)?;
            launch(source.address().into(), optional(&limit).into())
        }
        RowSource::Dispatched(dispatched) => {
            let of = dispatched.shape();
            if (of.tokens, of.slots) != (desc.from_rows, desc.rows) {
                let expected = format!("a dispatch of {} tokens and {} rows", desc.from_rows, desc.rows);
                return Err(Error::invalid(operation, "source", expected, format!("{of:?}")));
            }
            if limit.is_some() {
                return Err(Error::Unexpected { operation, argument: "limit", reason: "a dispatch knows its rows" });
            }
            let rows = dispatched.read(&scope)?;
            let offsets = scope.read("offsets", dispatched.offsets().into(), of.experts + 1, SCALAR)?;
            let end = offsets.address().offset(of.experts * size_of::<i32>());
            launch(rows.addresses().slot_token.into(), end.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::device::A100;

    #[test]
    fn faults_name_their_field() {
        let fault = |desc: PermuteDesc| select(&desc, &A100).unwrap_err().argument().unwrap();
        let desc = PermuteDesc::new(Dtype::Bf16, 100, 200, 64);
        assert!(select(&desc, &A100).is_ok());
        assert_eq!(fault(PermuteDesc { width: 0, ..desc }), "width");
        assert_eq!(fault(PermuteDesc { from_rows: 1 << 31, ..desc }), "from_rows");
        assert_eq!(fault(PermuteDesc { rows: 1 << 31, ..desc }), "rows");
        assert_eq!(fault(PermuteDesc { width: (1 << 30) + 1, ..desc }), "width");
    }

    #[test]
    fn rows_move_in_the_largest_units_that_divide_them() {
        let unit = |dtype, width| PermuteDesc::new(dtype, 1, 1, width).unit();
        assert_eq!(unit(Dtype::Bf16, 64), 16);
        assert_eq!(unit(Dtype::F16, 100), 8);
        assert_eq!(unit(Dtype::Bf16, 682), 4);
        assert_eq!(unit(Dtype::Bf16, 511), 2);
        assert_eq!(unit(Dtype::F32, 1), 4);
        let grid = |rows, width| select(&PermuteDesc::new(Dtype::F32, 1, rows, width), &A100).unwrap().grid;
        assert_eq!(grid(1000, 1), [4, 1, 1], "256 rows of one unit a block");
        assert_eq!(grid(10, 4 * 1024), [10, 1, 1]);
        assert_eq!(grid(10, 4 * 1025), [10, 2, 1]);
    }
}
