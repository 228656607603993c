//! Jitter: multiplicative uniform noise on the router's input or on its logits (Fedus et al., *Switch Transformers*, 2021, appendix C).
//!
//! `y[i] = x[i] * u`, `u` uniform between `1 - epsilon` and `1 + epsilon`, rounded once to the type of `x`. The router takes `y`, the experts
//! take `x`. The noise follows from seed, offset and `i` alone ([`NoiseSource`]); jitter shares no random word with the routers that use the
//! same source. See [`crate::reference::jitter`], whose results these are bit for bit (products below 2^-118 may differ in a tie of bf16).
//!
//! The way back is the same operation: gradients of `y`, with the source that `x` had, become those of `x`.
//!
//! ```
//! use moe_kernels::Dtype;
//! use moe_kernels::routers::jitter::{self, JitterArgs, JitterDesc};
//! use moe_kernels::rules::NoiseSource;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = moe_kernels::Kernels::new(stream.context())?;
//! let desc = JitterDesc::new(Dtype::F32, 8, 0.5, NoiseSource::new(1, 0));
//! let mut x = stream.clone_htod(&[1.0_f32; 8])?;
//! let mut y = stream.alloc_zeros(8)?;
//! jitter::forward(&kernels, &stream, &desc, JitterArgs::new(&x, &mut y))?;
//! let noisy = stream.clone_dtoh(&y)?;
//! assert!(noisy.iter().all(|value| (0.5..=1.5).contains(value) && *value != 1.0));
//!
//! jitter::forward(&kernels, &stream, &desc, JitterArgs::in_place(&mut x))?;
//! assert_eq!(stream.clone_dtoh(&x)?, noisy);
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::Kernel;
use crate::rules::{Dtype, NoiseSource};
use crate::runtime::builder::buffers;
use crate::runtime::launch::{Address, Scope, VECTOR, optional};
use crate::runtime::params::JitterParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "jitter";

/// Bytes that a thread moves.
const THREAD_BYTES: u32 = 16;

/// Size and strength of a jitter.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct JitterDesc {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Elements, `T * H` or `T * E`; 0 is allowed.
    pub elements: usize,
    /// Half the width of the interval, 0 to 1.
    pub epsilon: f32,
    /// The random words.
    pub noise: NoiseSource,
}

impl JitterDesc {
    /// Noise between `1 - epsilon` and `1 + epsilon` on `elements` elements of type `dtype`.
    pub const fn new(dtype: Dtype, elements: usize, epsilon: f32, noise: NoiseSource) -> JitterDesc {
        JitterDesc { dtype, elements, epsilon, noise }
    }
}

/// Buffers of a jitter, `x` and `y` 16-byte aligned.
#[non_exhaustive]
pub struct JitterArgs<'a, T> {
    /// `[elements]`; absent, `y` itself gets the noise.
    pub x: Option<In<'a, T>>,
    /// `[elements]`, written.
    pub y: Out<'a, T>,
    /// `[2]`, 8-byte aligned: see [`crate::routers::noise_state`]. Absent, the descriptor's seed and offset are all there is.
    pub noise_state: Option<In<'a, u64>>,
}

impl<'a, T> JitterArgs<'a, T> {
    /// `x` with noise to `y`.
    pub fn new(x: impl Into<In<'a, T>>, y: impl Into<Out<'a, T>>) -> JitterArgs<'a, T> {
        JitterArgs { x: Some(x.into()), y: y.into(), noise_state: None }
    }

    /// Noise on `y` itself: on logits, say, before gating.
    pub fn in_place(y: impl Into<Out<'a, T>>) -> JitterArgs<'a, T> {
        JitterArgs { x: None, y: y.into(), noise_state: None }
    }
}

buffers!(JitterArgs<'a, T> { noise_state: In<u64> });

impl JitterDesc {
    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::product(OPERATION, "elements", &[self.elements])?;
        if !(0.0..=1.0).contains(&self.epsilon) {
            return Err(Error::invalid(OPERATION, "epsilon", "0 to 1", self.epsilon));
        }
        self.blocks().map(drop)
    }

    fn blocks(&self) -> Result<u32, Error> {
        let of_block = u64::from(THREAD_BYTES / self.dtype.bytes() * Kernel::Jitter(self.dtype).threads());
        shape::grid_x(OPERATION, "elements", (self.elements as u64).div_ceil(of_block))
    }
}

/// Chooses kernel and grid: a thread for 16 bytes.
///
/// # Errors
/// Those of [`JitterDesc::validate`].
pub fn select(desc: &JitterDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let blocks = desc.blocks()?.max(1);
    Ok(Selection::new(Kernel::Jitter(desc.dtype), [blocks, 1, 1]))
}

/// Writes `x` with noise to `y`, or `y` with noise to itself.
///
/// With no elements nothing is launched.
///
/// # Errors
/// Those of [`JitterDesc::validate`]; those of a buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`]; and those of the driver.
pub fn forward<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &JitterDesc,
    args: JitterArgs<'_, T>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    scope.check_dtype::<T>("y", desc.dtype)?;
    if desc.elements == 0 {
        return Ok(());
    }
    let x = scope.read_some("x", args.x, desc.elements, VECTOR)?;
    let y = scope.write("y", args.y, desc.elements, VECTOR)?;
    let noise_state = scope.read_noise_state(args.noise_state)?;
    let from = optional(&x).unwrap_or_else(|| y.address());
    scope.launch(&selection, params(desc, from, y.address(), optional(&noise_state)))
}

fn params<'a>(desc: &JitterDesc, x: Address<'a>, y: Address<'a>, noise_state: Option<Address<'a>>) -> JitterParams<'a> {
    let JitterDesc { elements, epsilon, noise, .. } = *desc;
    let [seed_lo, seed_hi, offset_lo, offset_hi] = noise.words_of_source();
    JitterParams {
        x: x.into(),
        y: y.into(),
        elements_lo: elements as u32,
        elements_hi: (elements as u64 >> 32) as u32,
        // As the reference computes them.
        width: 2.0 * epsilon,
        lowest: 1.0 - epsilon,
        seed_lo,
        seed_hi,
        offset_lo,
        offset_hi,
        noise_state: noise_state.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_field() {
        let desc = JitterDesc { dtype: Dtype::Bf16, elements: 100, epsilon: 0.01, noise: NoiseSource::default() };
        assert_eq!(desc.validate(), Ok(()));
        let fault = |desc: JitterDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(fault(JitterDesc { epsilon: 1.5, ..desc }), "epsilon");
        assert_eq!(fault(JitterDesc { epsilon: f32::NAN, ..desc }), "epsilon");
        assert_eq!(fault(JitterDesc { elements: 1 << 43, ..desc }), "elements");
        assert_eq!(fault(JitterDesc { elements: usize::MAX, ..desc }), "elements");
        for dtype in Dtype::ALL {
            let desc = JitterDesc { dtype, ..desc };
            let block = 256 * 16 / dtype.bytes() as usize;
            for (elements, blocks) in [(0, 1), (1, 1), (block, 1), (block + 1, 2)] {
                let got = select(&JitterDesc { elements, ..desc }, &crate::runtime::device::A100).unwrap();
                assert_eq!(got.grid, [blocks, 1, 1], "{elements} elements");
            }
        }
    }
}
