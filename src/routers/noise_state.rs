//! Noise states: seed and offset on the device, so that a captured graph draws anew at each replay.
//!
//! A rule's [`NoiseSource`] is a value: a CUDA graph captures it, and every replay draws the same words. The arguments of all that draws
//! ([`crate::routers::noisy`], [`crate::routers::hierarchical`], [`crate::routers::sampled`], [`crate::routers::jitter`],
//! [`crate::capacity::admission`], dropout in [`crate::experts::gemm`], and [`crate::layer`]) take a `noise_state` too: two `u64`
//! `{seed, offset}` on the device, 8-byte aligned, read when the kernel runs. The words are then those of
//! [`NoiseSource::with_state`]: the state's seed, and the state's offset plus the source's, modulo 2^64. The source's own seed is not used.
//!
//! So one state serves all draws of a step, each with an offset of its own (0, 1, 2, ...), and [`advance`] at the end of the step, inside the
//! graph, moves it past them all. PyTorch's Philox generator does the same under graph capture.
//!
//! ```
//! use moe_kernels::routers::noise_state;
//! use moe_kernels::rules::NoiseSource;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = moe_kernels::Kernels::new(stream.context())?;
//! // A step that draws twice, with offsets 0 and 1.
//! let mut state = stream.clone_htod(&[7_u64, 100])?;
//! noise_state::advance(&kernels, &stream, &mut state, 2)?;
//! let [seed, offset] = stream.clone_dtoh(&state)?[..] else { unreachable!() };
//! assert_eq!([seed, offset], [7, 102]);
//! assert_eq!(NoiseSource::new(0, 1).with_state([seed, offset]), NoiseSource::new(7, 103));
//! # Ok(())
//! # }
//! ```
//!
//! [`NoiseSource`]: crate::rules::NoiseSource
//! [`NoiseSource::with_state`]: crate::rules::NoiseSource::with_state

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::Kernel;
use crate::runtime::launch::{Scope, WIDE};
use crate::runtime::params::NoiseStateParams;
use crate::{Error, Kernels, Out, Selection};

const OPERATION: &str = "noise_state";

/// Kernel and grid of [`advance`], for [`Kernels::preload`].
pub fn select() -> Selection {
    Selection::new(Kernel::NoiseState, [1, 1, 1])
}

/// Adds `draws` to the offset of `state`, `[2]` `{seed, offset}`, modulo 2^64.
///
/// # Errors
/// Those of the buffer: [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn advance<'a>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    state: impl Into<Out<'a, u64>>,
    draws: u64,
) -> Result<(), Error> {
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let state = scope.write("state", state.into(), 2, WIDE)?;
    scope.launch(
        &select(),
        NoiseStateParams {
            noise_state: state.address().into(),
            draws_lo: draws as u32,
            draws_hi: (draws >> 32) as u32,
        },
    )
}
