//! [`cust`](https://docs.rs/cust/0.3.2): its contexts, streams and buffers, for every operation.
//!
//! Only the context enters safely. A `DeviceBuffer` may be freed while it is in use (`drop_async` on another stream is a safe function),
//! copies of a `DeviceSlice` outlive what they point to, and neither is tracked: whoever lends one to an operation answers for that, as for
//! `cust`'s own launches. A `DevicePointer` enters by its `as_raw()` and [`In::from_raw`] or [`Out::from_raw`].
//!
//! ```no_run
//! use cust::memory::DeviceBuffer;
//! use cust::stream::{Stream, StreamFlags};
//! use moe_kernels::Kernels;
//! use moe_kernels::interop::cust as lend;
//! use moe_kernels::routers::gating::{self, GatingArgs, GatingDesc};
//! use moe_kernels::rules::{Gating, Score};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let own = cust::quick_init()?;
//! let context = lend::context(&own)?;
//! let kernels = Kernels::new(&context)?;
//! let own_stream = Stream::new(StreamFlags::DEFAULT, None)?;
//!
//! let logits = DeviceBuffer::from_slice(&[0.5f32, 1.0, -1.0, 0.0])?;
//! let (mut ids, mut weights) = (DeviceBuffer::from_slice(&[0i32; 2])?, DeviceBuffer::from_slice(&[0f32; 2])?);
//! let desc = GatingDesc::new(1, 4, 2, Gating::new(Score::Softmax));
//! // SAFETY: stream and buffers live until the stream was waited for, and nothing else uses them till then.
//! unsafe {
//!     let stream = lend::stream(&context, &own_stream);
//!     let args = GatingArgs::new(lend::input(&logits), lend::out(&mut ids), lend::out(&mut weights));
//!     gating::forward(&kernels, &stream, &desc, args)?;
//! }
//! own_stream.synchronize()?;
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream};
use cust::context::Context;
use cust::memory::{DeviceCopy, DeviceSlice};
use cust::stream::Stream;

use crate::{Error, In, Out};

/// The device's primary context, which a `cust` context is: retained here too.
///
/// For one of `cust::context::legacy` make it current and call [`super::current_context`].
///
/// # Errors
/// [`Error::Driver`].
pub fn context(context: &Context) -> Result<Arc<CudaContext>, Error> {
    // SAFETY: alive as long as the borrow, and a primary context, which is retained.
    unsafe { super::context(context.as_raw().cast()) }
}

/// A `cust` stream.
///
/// # Safety
/// As for [`super::stream`]: it lives as long as the value and its clones.
pub unsafe fn stream(context: &Arc<CudaContext>, stream: &Stream) -> Arc<CudaStream> {
    // SAFETY: as the caller says.
    unsafe { super::stream(context, stream.as_inner().cast()) }
}

/// A buffer, or a part of one, to read. As many `T` as its bytes hold: `cust` has no 16-bit float of `half` 2, so that a weight in bf16
/// is a slice of `u16` there.
///
/// # Safety
/// As for [`In::from_raw`].
pub unsafe fn input<'a, S: DeviceCopy, T>(slice: &'a DeviceSlice<S>) -> In<'a, T> {
    // SAFETY: as the caller says.
    unsafe { In::from_raw(slice.as_device_ptr().as_raw(), elements::<S, T>(slice)) }
}

/// A buffer, or a part of one, to write; see [`input`].
///
/// # Safety
/// As for [`Out::from_raw`].
pub unsafe fn out<'a, S: DeviceCopy, T>(slice: &'a mut DeviceSlice<S>) -> Out<'a, T> {
    // SAFETY: as the caller says.
    unsafe { Out::from_raw(slice.as_device_ptr().as_raw(), elements::<S, T>(slice)) }
}

fn elements<S: DeviceCopy, T>(slice: &DeviceSlice<S>) -> usize {
    const { assert!(size_of::<T>() > 0) };
    slice.len() * size_of::<S>() / size_of::<T>()
}
