//! Sums down the columns of rows times other rows: gradients of what multiplies each column.
//!
//! `out[c] = sum_r x[r,c] d[r,c]`, in f32 and in a fixed order: of factors of columns, where `x` is what they multiply and `d` the product's gradient.
//! Back through a norm the rows have factors too ([`super::rms_norm_backward`]).

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::rms_norm_backward::Gradient;
use crate::registry::Kernel;
use crate::rules::Dtype;
use crate::runtime::builder::settings;
use crate::runtime::launch::{Address, SCALAR, Scope};
use crate::runtime::params::ColumnProductsParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "column_products";

/// Rows and their types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ColumnProductsDesc {
    /// Type of `x`.
    pub dtype: Dtype,
    /// Rows `R`; 0 is allowed.
    pub rows: usize,
    /// Columns `W`, at least 1.
    pub width: usize,
    /// Type of `d`: `dtype`, or f32.
    pub gradient: Dtype,
    /// Adds to what `out` holds, once.
    pub accumulate: bool,
}

impl ColumnProductsDesc {
    /// `rows` rows of `width` elements.
    pub const fn new(dtype: Dtype, rows: usize, width: usize) -> ColumnProductsDesc {
        ColumnProductsDesc { dtype, rows, width, gradient: dtype, accumulate: false }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "rows", self.rows)?;
        shape::positive(OPERATION, "width", self.width)?;
        shape::product(OPERATION, "x", &[self.rows, self.width])?;
        if self.gradient != self.dtype && self.gradient != Dtype::F32 {
            let supported = format!("the type of x ({}) or f32", self.dtype);
            return Err(Error::unsupported(OPERATION, "gradient", supported, self.gradient));
        }
        Ok(())
    }

    fn selection(&self) -> Selection {
        Selection::new(Kernel::ColumnProducts(self.dtype), [self.width.div_ceil(COLUMNS) as u32, 1, 1])
    }
}

/// Columns of a block: the lanes of a warp.
const COLUMNS: usize = 32;

settings!(ColumnProductsDesc { gradient: Dtype, accumulate: bool });

/// Chooses kernel and grid.
///
/// # Errors
/// Those of [`ColumnProductsDesc::validate`].
pub fn select(desc: &ColumnProductsDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    Ok(desc.selection())
}

/// `out [W]` of `x [R,W]` and `d [R,W]`; zero with no rows, or with `accumulate` as it was.
///
/// # Errors
/// Those of [`ColumnProductsDesc::validate`]; those of a buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`]; and those of the driver.
pub fn sum<'a, T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &ColumnProductsDesc,
    x: impl Into<In<'a, T>>,
    d: Gradient<'a, T>,
    out: impl Into<Out<'a, f32>>,
) -> Result<(), Error> {
    desc.validate()?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    scope.check_dtype::<T>("x", desc.dtype)?;
    let (elements, width) = (desc.rows * desc.width, desc.width);
    let x = scope.read("x", x.into(), elements, SCALAR)?;
    // One element to a thread, wherever rows begin.
    let d = d.open(&scope, desc.gradient, elements, 1)?;
    let out = scope.write("out", out.into(), width, SCALAR)?;
    let at = Addresses { x: x.address(), d: d.address(), factors: None, weight: None, live: None, out: out.address() };
    enqueue(&scope, desc, 0.0, at)
}

/// What the sums read and write.
pub(super) struct Addresses<'a> {
    pub(super) x: Address<'a>,
    pub(super) d: Address<'a>,
    pub(super) factors: Option<Address<'a>>,
    pub(super) weight: Option<Address<'a>>,
    /// Of the rows of a dispatch: their number, and each one's token.
    pub(super) live: Option<(Address<'a>, Address<'a>)>,
    pub(super) out: Address<'a>,
}

pub(super) fn enqueue(
    scope: &Scope<'_>,
    desc: &ColumnProductsDesc,
    gain_base: f32,
    at: Addresses<'_>,
) -> Result<(), Error> {
    let (last_row, slot_token) = at.live.unzip();
    scope.launch(
        &desc.selection(),
        ColumnProductsParams {
            x: at.x.into(),
            d: at.d.into(),
            factors: at.factors.into(),
            weight: at.weight.into(),
            last_row: last_row.into(),
            slot_token: slot_token.into(),
            out: at.out.into(),
            rows: desc.rows as u32,
            width: desc.width as u32,
            d_f32: u32::from(desc.gradient != desc.dtype),
            gain_base,
            accumulate: u32::from(desc.accumulate),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_field() {
        let desc = ColumnProductsDesc::new(Dtype::Bf16, 10, 64);
        let fault = |desc: ColumnProductsDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(desc.validate(), Ok(()));
        assert_eq!(fault(ColumnProductsDesc { width: 0, ..desc }), "width");
        assert_eq!(fault(ColumnProductsDesc { rows: 1 << 40, ..desc }), "rows");
        assert_eq!(fault(desc.gradient(Dtype::F16)), "gradient");
    }
}
