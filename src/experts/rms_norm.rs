//! RMS normalisation of rows: before a router or experts, of each expert's output, of a block's sum.
//!
//! `y[r] = row_scale[r] norm(x[r] + addend_scale addend[r]) + residual[r]`, with `norm` an [`RmsNorm`]; sums in f32, in a fixed order, `y` rounded
//! once. The sum with the addend is kept in the type of the rows, and can be had too ([`RmsNormArgs::sum`]): it is a residual stream, or the
//! state that one layer's router hands to the next (Zaya).
//!
//! ```
//! use moe_kernels::Dtype;
//! use moe_kernels::experts::rms_norm::{self, RmsNormArgs, RmsNormDesc};
//! use moe_kernels::rules::{Gain, RmsNorm};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = moe_kernels::Kernels::new(stream.context())?;
//! let desc = RmsNormDesc::new(Dtype::F32, 1, 2, RmsNorm::new(3.5).gain(Gain::One));
//! let x = stream.clone_htod(&[3.0_f32, -4.0])?;
//! let mut y = stream.alloc_zeros(2)?;
//! rms_norm::forward(&kernels, &stream, &desc, RmsNormArgs::new(&x, &mut y))?;
//! let error = |got: f32, want: f32| (got - want).abs();
//! let y = stream.clone_dtoh(&y)?;
//! assert!(error(y[0], 0.75) < 1e-6 && error(y[1], -1.0) < 1e-6);
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::dispatched::Dispatched;
use crate::registry::{Kernel, RMS_NORM_THREADS};
use crate::rules::{Dtype, Gain, RmsNorm};
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{Address, SCALAR, Scope, optional};
use crate::runtime::params::RmsNormParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection, Tensor};

const OPERATION: &str = "rms_norm";

/// Bytes that a thread moves at once.
const THREAD_BYTES: u32 = 16;

/// Rows and how they are normalised.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct RmsNormDesc {
    /// Type of all rows and of the weight.
    pub dtype: Dtype,
    /// Rows `R`; 0 is allowed.
    pub rows: usize,
    /// Columns `W`, at least 1. Multiples of 8 are read 16 bytes at a time.
    pub width: usize,
    /// The rule.
    pub norm: RmsNorm,
    /// Type of `y`: `dtype`, or f32 as it was computed.
    pub output: Dtype,
}

impl RmsNormDesc {
    /// `rows` rows of `width` elements.
    pub const fn new(dtype: Dtype, rows: usize, width: usize, norm: RmsNorm) -> RmsNormDesc {
        RmsNormDesc { dtype, rows, width, norm, output: dtype }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        self.check(OPERATION)
    }

    pub(super) fn check(&self, operation: &'static str) -> Result<(), Error> {
        shape::size(operation, "rows", self.rows)?;
        shape::positive(operation, "width", self.width)?;
        shape::product(operation, "x", &[self.rows, self.width])?;
        if self.output != self.dtype && self.output != Dtype::F32 {
            let supported = format!("the type of x ({}) or f32", self.dtype);
            return Err(Error::unsupported(operation, "output", supported, self.output));
        }
        let RmsNorm { epsilon, least, factor, .. } = self.norm;
        for (argument, value) in [("norm.epsilon", epsilon), ("norm.least", least)] {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(Error::invalid(operation, argument, "a finite number of at least 0", value));
            }
        }
        if !factor.is_finite() {
            return Err(Error::invalid(operation, "norm.factor", "a finite number", factor));
        }
        Ok(())
    }

    /// Base-2 logarithm of the threads on a row: a thread for each vector, a warp at least.
    pub(super) fn across_log2(&self) -> u32 {
        let vectors = (self.width as u32).div_ceil(THREAD_BYTES / self.dtype.bytes());
        vectors.next_power_of_two().clamp(32, RMS_NORM_THREADS).ilog2()
    }
}

settings!(RmsNormDesc { output: Dtype });

/// Where the normalised rows go.
#[non_exhaustive]
pub enum RmsNormOut<'a, T> {
    /// Rounded to the type of `x`.
    Rounded(Out<'a, T>),
    /// With [`RmsNormDesc::output`] of f32 where `x` has another type.
    F32(Out<'a, f32>),
}

/// Buffers of a normalisation. Where the width is a multiple of 8 all rows are 16-byte aligned, else by their elements.
#[non_exhaustive]
pub struct RmsNormArgs<'a, T> {
    /// `[R, W]`; absent, `y` itself is normalised.
    pub x: Option<In<'a, T>>,
    /// `[W]`, exactly where the rule's gain has a weight.
    pub weight: Option<Tensor<'a>>,
    /// `[R, W]`, added to `x` before all else.
    pub addend: Option<In<'a, T>>,
    /// `[W]`, with an addend: factors of its columns.
    pub addend_scale: Option<Tensor<'a>>,
    /// `[R, W]`, with an addend, written: the sum that is normalised.
    pub sum: Option<Out<'a, T>>,
    /// `[R, W]`, added last.
    pub residual: Option<In<'a, T>>,
    /// `[R]`: factors of the normalised rows, before the residual.
    pub row_scale: Option<In<'a, f32>>,
    /// The dispatch whose rows these are: rows that it does not fill are neither read nor written.
    pub dispatched: Option<&'a Dispatched>,
    /// `[R, W]`, written.
    pub y: RmsNormOut<'a, T>,
}

impl<'a, T> RmsNormArgs<'a, T> {
    /// `x` to `y`, without a weight.
    pub fn new(x: impl Into<In<'a, T>>, y: impl Into<Out<'a, T>>) -> RmsNormArgs<'a, T> {
        RmsNormArgs { x: Some(x.into()), ..RmsNormArgs::in_place(y) }
    }

    /// `x` to f32, without a weight.
    pub fn to_f32(x: impl Into<In<'a, T>>, y: impl Into<Out<'a, f32>>) -> RmsNormArgs<'a, T> {
        RmsNormArgs { x: Some(x.into()), ..RmsNormArgs::to(RmsNormOut::F32(y.into())) }
    }

    /// `y` itself, without a weight.
    pub fn in_place(y: impl Into<Out<'a, T>>) -> RmsNormArgs<'a, T> {
        RmsNormArgs::to(RmsNormOut::Rounded(y.into()))
    }

    fn to(y: RmsNormOut<'a, T>) -> RmsNormArgs<'a, T> {
        RmsNormArgs {
            x: None,
            weight: None,
            addend: None,
            addend_scale: None,
            sum: None,
            residual: None,
            row_scale: None,
            dispatched: None,
            y,
        }
    }

    /// With a weight.
    #[must_use]
    pub fn weight(self, weight: impl Into<Tensor<'a>>) -> RmsNormArgs<'a, T> {
        RmsNormArgs { weight: Some(weight.into()), ..self }
    }

    /// With factors of the addend's columns.
    #[must_use]
    pub fn addend_scale(self, scale: impl Into<Tensor<'a>>) -> RmsNormArgs<'a, T> {
        RmsNormArgs { addend_scale: Some(scale.into()), ..self }
    }

    /// Of the rows of a dispatch.
    #[must_use]
    pub fn dispatched(self, dispatched: &'a Dispatched) -> RmsNormArgs<'a, T> {
        RmsNormArgs { dispatched: Some(dispatched), ..self }
    }
}

buffers!(RmsNormArgs<'a, T> { addend: In<T>, sum: Out<T>, residual: In<T>, row_scale: In<f32> });

/// Chooses kernel and grid.
///
/// # Errors
/// Those of [`RmsNormDesc::validate`].
pub fn select(desc: &RmsNormDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    select_for(OPERATION, desc, device)
}

/// [`select`] on behalf of `operation`.
pub(crate) fn select_for(
    operation: &'static str,
    desc: &RmsNormDesc,
    _device: &DeviceInfo,
) -> Result<Selection, Error> {
    desc.check(operation)?;
    let rows_of_block = RMS_NORM_THREADS >> desc.across_log2();
    let blocks = (desc.rows as u32).div_ceil(rows_of_block).max(1);
    Ok(Selection::new(Kernel::RmsNorm(desc.dtype), [blocks, 1, 1]))
}

/// Normalises every row.
///
/// With no rows nothing is launched.
///
/// # Errors
/// Those of [`RmsNormDesc::validate`]; [`Error::Missing`] or [`Error::Unexpected`] for a weight against the rule, for a scale or a sum without an
/// addend; [`Error::Invalid`] for a dispatch of other rows; those of a buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`],
/// [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn forward<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &RmsNormDesc,
    args: RmsNormArgs<'_, T>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    scope.check_dtype::<T>("x", desc.dtype)?;
    check_weight(OPERATION, "weight", desc.norm.gain, args.weight.is_some())?;
    if args.addend.is_none() {
        let given = [("addend_scale", args.addend_scale.is_some()), ("sum", args.sum.is_some())];
        if let Some((argument, _)) = given.into_iter().find(|(_, given)| *given) {
            return Err(Error::Unexpected { operation: OPERATION, argument, reason: "there is no addend" });
        }
    }
    if let Some(shape) = args.dispatched.map(Dispatched::shape)
        && shape.slots != desc.rows
    {
        let expected = format!("a dispatch of {} rows", desc.rows);
        return Err(Error::invalid(OPERATION, "dispatched", expected, format!("one of {}", shape.slots)));
    }
    if desc.rows == 0 {
        return Ok(());
    }
    let (dtype, elements, width) = (desc.dtype, desc.rows * desc.width, desc.width);
    let align = shape::row_alignment(dtype, width);
    let x = scope.read_some("x", args.x, elements, align)?;
    let list = |argument| move |list| scope.read_tensor(argument, list, dtype, width, align);
    let weight = args.weight.map(list("weight")).transpose()?;
    let addend = scope.read_some("addend", args.addend, elements, align)?;
    let addend_scale = args.addend_scale.map(list("addend_scale")).transpose()?;
    let sum = scope.write_some("sum", args.sum, elements, align)?;
    let residual = scope.read_some("residual", args.residual, elements, align)?;
    let row_scale = scope.read_some("row_scale", args.row_scale, desc.rows, SCALAR)?;
    let dispatched = args.dispatched.map(|dispatched| dispatched.read(&scope)).transpose()?;
    let y = match (args.y, desc.output == desc.dtype) {
        (RmsNormOut::Rounded(y), true) => scope.write("y", y, elements, align)?,
        (RmsNormOut::F32(y), _) if desc.output == Dtype::F32 => {
            scope.write("y", y, elements, shape::row_alignment(Dtype::F32, width))?
        }
        (y, _) => {
            let got = if matches!(y, RmsNormOut::F32(_)) { Dtype::F32 } else { desc.dtype };
            return Err(Error::WrongDtype { operation: OPERATION, argument: "y", expected: desc.output, got });
        }
    };
    let at = Addresses {
        weight: optional(&weight),
        addend: optional(&addend),
        addend_scale: optional(&addend_scale),
        sum: optional(&sum),
        residual: optional(&residual),
        row_scale: optional(&row_scale),
        live: dispatched.as_ref().map(|rows| rows.live(args.dispatched.map_or(0, |d| d.shape().experts))),
        ..Addresses::new(optional(&x).unwrap_or_else(|| y.address()), y.address())
    };
    enqueue(&scope, desc, &selection, at)
}

/// Whether a weight is given where the gain has one, and only there.
pub(crate) fn check_weight(
    operation: &'static str,
    argument: &'static str,
    gain: Gain,
    given: bool,
) -> Result<(), Error> {
    match (gain.has_weight(), given) {
        (true, false) => Err(Error::Missing { operation, argument, reason: "the norm's gain has a weight" }),
        (false, true) => Err(Error::Unexpected { operation, argument, reason: "the norm's gain has no weight" }),
        _ => Ok(()),
    }
}

/// What a normalisation reads and writes.
pub(crate) struct Addresses<'a> {
    /// May be `y`: each thread reads what it then writes.
    pub(crate) x: Address<'a>,
    pub(crate) weight: Option<Address<'a>>,
    pub(crate) addend: Option<Address<'a>>,
    pub(crate) addend_scale: Option<Address<'a>>,
    pub(crate) sum: Option<Address<'a>>,
    pub(crate) residual: Option<Address<'a>>,
    pub(crate) row_scale: Option<Address<'a>>,
    /// Of the rows of a dispatch: their number, and each one's token.
    pub(crate) live: Option<(Address<'a>, Address<'a>)>,
    pub(crate) y: Address<'a>,
}

impl<'a> Addresses<'a> {
    pub(crate) fn new(x: Address<'a>, y: Address<'a>) -> Addresses<'a> {
        Addresses {
            x,
            weight: None,
            addend: None,
            addend_scale: None,
            sum: None,
            residual: None,
            row_scale: None,
            live: None,
            y,
        }
    }
}

pub(crate) fn enqueue(
    scope: &Scope<'_>,
    desc: &RmsNormDesc,
    selection: &Selection,
    at: Addresses<'_>,
) -> Result<(), Error> {
    let RmsNorm { epsilon, least, gain, factor } = desc.norm;
    let (last_row, slot_token) = at.live.unzip();
    scope.launch(
        selection,
        RmsNormParams {
            x: at.x.into(),
            y: at.y.into(),
            weight: at.weight.into(),
            addend: at.addend.into(),
            addend_scale: at.addend_scale.into(),
            sum: at.sum.into(),
            residual: at.residual.into(),
            row_scale: at.row_scale.into(),
            last_row: last_row.into(),
            slot_token: slot_token.into(),
            rows: desc.rows as u32,
            width: desc.width as u32,
            across_log2: desc.across_log2(),
            gain_first: u32::from(gain == Gain::OnePlusFirst),
            y_f32: u32::from(desc.output == Dtype::F32),
            // The gain without its weight.
            gain_base: if gain == Gain::Weight { 0.0 } else { 1.0 },
            inverse_width: (1.0 / desc.width as f64) as f32,
            epsilon,
            least,
            factor,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::device::A100;

    fn desc(rows: usize, width: usize) -> RmsNormDesc {
        RmsNormDesc::new(Dtype::Bf16, rows, width, RmsNorm::new(1e-6))
    }

    #[test]
    fn faults_name_their_field() {
        let fault = |desc: RmsNormDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(desc(3, 5).validate(), Ok(()));
        assert_eq!(fault(desc(1 << 31, 8)), "rows");
        assert_eq!(fault(desc(3, 0)), "width");
        assert_eq!(fault(RmsNormDesc { norm: RmsNorm::new(-1e-6), ..desc(3, 8) }), "norm.epsilon");
        assert_eq!(fault(RmsNormDesc { norm: RmsNorm::new(f32::NAN), ..desc(3, 8) }), "norm.epsilon");
        assert_eq!(fault(RmsNormDesc { norm: RmsNorm::new(0.0).least(f32::INFINITY), ..desc(3, 8) }), "norm.least");
        assert_eq!(fault(RmsNormDesc { norm: RmsNorm::new(0.0).factor(f32::INFINITY), ..desc(3, 8) }), "norm.factor");
    }

    #[test]
    fn a_block_is_full_of_rows() {
        let blocks = |rows, width| select(&desc(rows, width), &A100).unwrap().grid[0];
        // 32, 64 and 512 threads a row.
        assert_eq!([blocks(0, 8), blocks(16, 256), blocks(17, 1)], [1, 1, 2]);
        assert_eq!([blocks(8, 264), blocks(9, 512)], [1, 2]);
        assert_eq!([blocks(3, 4096), blocks(3, 1 << 20)], [3, 3]);
    }
}
