//! Back through an RMS normalisation of rows: see [`super::rms_norm`].
//!
//! `dx[r] = p (c - u q)`, with `u` what was normalised, `c` its gradient but for the normalisation's factor `p`, and `q = c . u / (W (mean(u^2) +
//! epsilon))`. With [`RmsNormBackwardArgs::d_weight`] a second launch, [`super::column_products`], sums the gradient of the weight over all rows.
//! Sums in f32 and in a fixed order.
//!
//! ```
//! use moe_kernels::Dtype;
//! use moe_kernels::experts::rms_norm_backward::{self, Gradient, RmsNormBackwardArgs, RmsNormBackwardDesc};
//! use moe_kernels::rules::{Gain, RmsNorm};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = moe_kernels::Kernels::new(stream.context())?;
//! let desc = RmsNormBackwardDesc::new(Dtype::F32, 1, 2, RmsNorm::new(0.0).gain(Gain::One));
//! let (x, dy) = (stream.clone_htod(&[3.0_f32, -4.0])?, stream.clone_htod(&[6.0_f32, -8.0])?);
//! let mut dx = stream.alloc_zeros(2)?;
//! rms_norm_backward::backward(&kernels, &stream, &desc, RmsNormBackwardArgs::new(&x, Gradient::from(&dy), &mut dx))?;
//! // Along a row nothing changes: its length is divided by itself.
//! assert!(stream.clone_dtoh(&dx)?.iter().all(|d| d.abs() < 1e-5));
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};

use super::column_products::{self, ColumnProductsDesc};
use super::dispatched::Dispatched;
use super::rms_norm::{RmsNormDesc, check_weight};
use crate::registry::{Kernel, RMS_NORM_THREADS};
use crate::rules::{Dtype, Gain, RmsNorm};
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{Held, SCALAR, Scope, optional};
use crate::runtime::params::RmsNormBackwardParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection, Tensor};

const OPERATION: &str = "rms_norm_backward";

/// Rows and how they were normalised.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct RmsNormBackwardDesc {
    /// Type of all rows and of the weight.
    pub dtype: Dtype,
    /// Rows `R`; 0 is allowed.
    pub rows: usize,
    /// Columns `W`, at least 1. Multiples of 8 are read 16 bytes at a time.
    pub width: usize,
    /// The rule.
    pub norm: RmsNorm,
    /// Type of the gradient that comes: `dtype`, or f32.
    pub gradient: Dtype,
    /// Adds to what `dx` holds, in f32 and once, before it is rounded.
    pub accumulate: bool,
    /// Adds to what `d_weight` holds, once.
    pub accumulate_weight: bool,
}

impl RmsNormBackwardDesc {
    /// `rows` rows of `width` elements.
    pub const fn new(dtype: Dtype, rows: usize, width: usize, norm: RmsNorm) -> RmsNormBackwardDesc {
        let (accumulate, accumulate_weight) = (false, false);
        RmsNormBackwardDesc { dtype, rows, width, norm, gradient: dtype, accumulate, accumulate_weight }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        self.forward().check(OPERATION)?;
        if self.gradient != self.dtype && self.gradient != Dtype::F32 {
            let supported = format!("the type of x ({}) or f32", self.dtype);
            return Err(Error::unsupported(OPERATION, "gradient", supported, self.gradient));
        }
        Ok(())
    }

    fn forward(&self) -> RmsNormDesc {
        RmsNormDesc::new(self.dtype, self.rows, self.width, self.norm)
    }

    /// The sums of the weight's gradient.
    fn sums(&self) -> ColumnProductsDesc {
        let sums = ColumnProductsDesc::new(self.dtype, self.rows, self.width).gradient(self.gradient);
        sums.accumulate(self.accumulate_weight)
    }
}

settings!(RmsNormBackwardDesc { gradient: Dtype, accumulate: bool, accumulate_weight: bool });

/// A gradient of rows.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub enum Gradient<'a, T> {
    /// Of the type of the rows.
    Rounded(In<'a, T>),
    /// Of f32 beside another type of rows.
    F32(In<'a, f32>),
}

impl<'a, T: Element> From<In<'a, T>> for Gradient<'a, T> {
    fn from(rows: In<'a, T>) -> Self {
        Gradient::Rounded(rows)
    }
}

impl<'a, T: Element> From<&'a CudaSlice<T>> for Gradient<'a, T> {
    fn from(rows: &'a CudaSlice<T>) -> Self {
        Gradient::Rounded(rows.into())
    }
}

impl<T: Element> Gradient<'_, T> {
    /// Opens `elements` elements, which must be of `expected`.
    pub(super) fn open<'b>(
        self,
        scope: &Scope<'b>,
        expected: Dtype,
        elements: usize,
        width: usize,
    ) -> Result<Held<'b>, Error>
    where
        Self: 'b,
    {
        let align = shape::row_alignment(expected, width);
        match (self, expected == T::DTYPE) {
            (Gradient::Rounded(rows), true) => scope.read("dy", rows, elements, align),
            (Gradient::F32(rows), _) if expected == Dtype::F32 => scope.read("dy", rows, elements, align),
            (rows, _) => {
                let got = if matches!(rows, Gradient::F32(_)) { Dtype::F32 } else { T::DTYPE };
                Err(Error::WrongDtype { operation: scope.operation, argument: "dy", expected, got })
            }
        }
    }
}

/// Buffers of a way back. Where the width is a multiple of 8 all rows are 16-byte aligned, else by their elements.
#[non_exhaustive]
pub struct RmsNormBackwardArgs<'a, T> {
    /// `[R, W]`: what was normalised, the sum with an addend included.
    pub x: In<'a, T>,
    /// `[R, W]`, or with `gathered` `[T, W]`: the gradient of `y`.
    pub dy: Gradient<'a, T>,
    /// `[W]`, exactly where the rule's gain has a weight.
    pub weight: Option<Tensor<'a>>,
    /// `[W]`, with `d_addend`: factors of the addend's columns.
    pub addend_scale: Option<Tensor<'a>>,
    /// `[R]`: factors of the normalised rows.
    pub row_scale: Option<In<'a, f32>>,
    /// The dispatch whose rows these are: each takes the gradient of its token. Rows that it does not fill are neither read nor written.
    pub gathered: Option<&'a Dispatched>,
    /// `[R, W]`, written: may be `dy`, where that is of the same type and not gathered.
    pub dx: Out<'a, T>,
    /// `[R, W]`, written: of the addend, `dx` times `addend_scale`. What `dx` held is part of it, a gradient of the same sum.
    pub d_addend: Option<Out<'a, T>>,
    /// `[R]`, written: of the rows' factors, which may be absent, being 1.
    pub d_row_scale: Option<Out<'a, f32>>,
    /// `[W]`, written: of the weight; with `factors`.
    pub d_weight: Option<Out<'a, f32>>,
    /// `[R, 2]`, written: what the sums of `d_weight` take of each row.
    pub factors: Option<Out<'a, f32>>,
}

impl<'a, T> RmsNormBackwardArgs<'a, T> {
    /// From `dy` to `dx`, for rows `x`, without a weight.
    pub fn new(x: impl Into<In<'a, T>>, dy: Gradient<'a, T>, dx: impl Into<Out<'a, T>>) -> RmsNormBackwardArgs<'a, T> {
        RmsNormBackwardArgs {
            x: x.into(),
            dy,
            weight: None,
            addend_scale: None,
            row_scale: None,
            gathered: None,
            dx: dx.into(),
            d_addend: None,
            d_row_scale: None,
            d_weight: None,
            factors: None,
        }
    }

    /// With a weight.
    #[must_use]
    pub fn weight(self, weight: impl Into<Tensor<'a>>) -> RmsNormBackwardArgs<'a, T> {
        RmsNormBackwardArgs { weight: Some(weight.into()), ..self }
    }

    /// Of the rows of a dispatch, each with its token's gradient.
    #[must_use]
    pub fn gathered(self, dispatched: &'a Dispatched) -> RmsNormBackwardArgs<'a, T> {
        RmsNormBackwardArgs { gathered: Some(dispatched), ..self }
    }
}

buffers!(RmsNormBackwardArgs<'a, T> {
    row_scale: In<f32>,
    d_addend: Out<T>,
    d_row_scale: Out<f32>,
    d_weight: Out<f32>,
    factors: Out<f32>,
});

/// Chooses kernel and grid of the first launch.
///
/// # Errors
/// Those of [`RmsNormBackwardDesc::validate`].
pub fn select(desc: &RmsNormBackwardDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let rows_of_block = RMS_NORM_THREADS >> desc.forward().across_log2();
    let blocks = (desc.rows as u32).div_ceil(rows_of_block).max(1);
    Ok(Selection::new(Kernel::RmsNormBackward(desc.dtype), [blocks, 1, 1]))
}

/// From `dy` to `dx` and to what else is asked for.
///
/// With no rows nothing is launched but for `d_weight`, which becomes zero, or with `accumulate_weight` stays.
///
/// # Errors
/// Those of [`RmsNormBackwardDesc::validate`]; [`Error::Missing`] or [`Error::Unexpected`] for a weight or its gradient against the rule, `factors`
/// without that gradient or the reverse, a scale without an addend's gradient; [`Error::Invalid`] for a dispatch of other rows; those of a buffer:
/// [`Error::WrongDtype`], [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn backward<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &RmsNormBackwardDesc,
    args: RmsNormBackwardArgs<'_, T>,
) -> Result<(), Error> {
    let operation = OPERATION;
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    scope.check_dtype::<T>("x", desc.dtype)?;
    let has = desc.norm.gain.has_weight();
    check_weight(OPERATION, "weight", desc.norm.gain, args.weight.is_some())?;
    if args.d_weight.is_some() && !has {
        return Err(Error::Unexpected { operation, argument: "d_weight", reason: "the norm's gain has no weight" });
    }
    match (args.d_weight.is_some(), args.factors.is_some()) {
        (true, false) => {
            return Err(Error::Missing { operation, argument: "factors", reason: "the weight's gradient is summed" });
        }
        (false, true) => {
            return Err(Error::Unexpected { operation, argument: "factors", reason: "there is no d_weight" });
        }
        _ => {}
    }
    if args.addend_scale.is_some() && args.d_addend.is_none() {
        return Err(Error::Unexpected { operation, argument: "addend_scale", reason: "there is no d_addend" });
    }
    let shape = args.gathered.map(Dispatched::shape);
    if let Some(shape) = shape.filter(|shape| shape.slots != desc.rows) {
        let expected = format!("a dispatch of {} rows", desc.rows);
        return Err(Error::invalid(OPERATION, "gathered", expected, format!("one of {}", shape.slots)));
    }
    let (dtype, rows, width) = (desc.dtype, desc.rows, desc.width);
    let elements = rows * width;
    let align = shape::row_alignment(dtype, width);
    let d_weight = scope.write_some("d_weight", args.d_weight, width, SCALAR)?;
    if rows == 0 {
        return match &d_weight {
            Some(d_weight) if !desc.accumulate_weight => scope.zero(d_weight.address(), width * size_of::<f32>()),
            _ => Ok(()),
        };
    }
    let sources = shape.map_or(rows, |shape| shape.tokens);
    let x = scope.read("x", args.x, elements, align)?;
    let dy = args.dy.open(&scope, desc.gradient, sources * width, width)?;
    let list = |argument| move |list| scope.read_tensor(argument, list, dtype, width, align);
    let weight = args.weight.map(list("weight")).transpose()?;
    let addend_scale = args.addend_scale.map(list("addend_scale")).transpose()?;
    let row_scale = scope.read_some("row_scale", args.row_scale, rows, SCALAR)?;
    let dispatched = args.gathered.map(|dispatched| dispatched.read(&scope)).transpose()?;
    let live = dispatched.as_ref().map(|rows| rows.live(shape.map_or(0, |shape| shape.experts)));
    let dx = scope.write("dx", args.dx, elements, align)?;
    let d_addend = scope.write_some("d_addend", args.d_addend, elements, align)?;
    let d_row_scale = scope.write_some("d_row_scale", args.d_row_scale, rows, SCALAR)?;
    let factors = scope.write_some("factors", args.factors, 2 * rows, PAIR)?;
    let RmsNorm { epsilon, least, gain, factor } = desc.norm;
    let (last_row, slot_token) = live.unzip();
    let gain_base = gain_base(gain);
    scope.launch(
        &selection,
        RmsNormBackwardParams {
            x: x.address().into(),
            dy: dy.address().into(),
            weight: optional(&weight).into(),
            addend_scale: optional(&addend_scale).into(),
            row_scale: optional(&row_scale).into(),
            last_row: last_row.into(),
            slot_token: slot_token.into(),
            dx: dx.address().into(),
            d_addend: optional(&d_addend).into(),
            d_row_scale: optional(&d_row_scale).into(),
            factors: optional(&factors).into(),
            rows: rows as u32,
            width: width as u32,
            across_log2: desc.forward().across_log2(),
            gain_first: u32::from(gain == Gain::OnePlusFirst),
            dy_f32: u32::from(desc.gradient != dtype),
            accumulate: u32::from(desc.accumulate),
            gain_base,
            inverse_width: (1.0 / width as f64) as f32,
            epsilon,
            least,
            factor,
        },
    )?;
    let Some(d_weight) = optional(&d_weight) else { return Ok(()) };
    let at = column_products::Addresses {
        x: x.address(),
        d: dy.address(),
        factors: optional(&factors),
        weight: optional(&weight),
        live,
        out: d_weight,
    };
    column_products::enqueue(&scope, &desc.sums(), gain_base, at)
}

/// Bytes of a pair of numbers.
const PAIR: u64 = 8;

/// What a gain is without its weight.
fn gain_base(gain: Gain) -> f32 {
    match gain {
        Gain::Weight => 0.0,
        Gain::One | Gain::OnePlus | Gain::OnePlusFirst => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_field() {
        let desc = RmsNormBackwardDesc::new(Dtype::Bf16, 10, 64, RmsNorm::new(1e-6));
        let fault = |desc: RmsNormBackwardDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(desc.validate(), Ok(()));
        assert_eq!(fault(RmsNormBackwardDesc { width: 0, ..desc }), "width");
        assert_eq!(fault(RmsNormBackwardDesc { norm: RmsNorm::new(-1.0), ..desc }), "norm.epsilon");
        assert_eq!(fault(desc.gradient(Dtype::F16)), "gradient");
    }
}
