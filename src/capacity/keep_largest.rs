//! Where experts have a capacity, each keeps its slots of largest weight (Megatron-LM's `moe_token_drop_policy` `probs`): what stands between a
//! gating and a dispatch, in place of [`crate::rules::Capacity`], which keeps the first.
//!
//! ```
//! use moe_kernels::capacity::keep_largest::{self, KeepLargestArgs, KeepLargestDesc};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = moe_kernels::Kernels::new(stream.context())?;
//! let ids = stream.clone_htod(&[0, 0, 1, 0])?;
//! let weights = stream.clone_htod(&[0.5_f32, 0.9, 0.1, 0.7])?;
//! let (mut kept, mut kept_weights) = (stream.alloc_zeros(4)?, stream.alloc_zeros(4)?);
//! let args = KeepLargestArgs::new(&ids, &weights, &mut kept).kept_weights(&mut kept_weights);
//! keep_largest::forward(&kernels, &stream, &KeepLargestDesc::new(4, 2, 1, 2), args)?;
//! assert_eq!(stream.clone_dtoh(&kept)?, [-1, 0, 1, 0]);
//! assert_eq!(stream.clone_dtoh(&kept_weights)?, [0.0, 0.9, 0.1, 0.7]);
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::Kernel;
use crate::runtime::builder::buffers;
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::KeepLargestParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "keep_largest";

/// Shapes and capacity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeepLargestDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts `E`, 1 to 8192.
    pub experts: usize,
    /// Experts per token `k`, 1 to 64.
    pub top_k: usize,
    /// Slots that an expert keeps of the batch, at least 1 ([`crate::rules::capacity`]).
    pub capacity: usize,
}

impl KeepLargestDesc {
    /// `capacity` slots for each of `experts` experts, of `top_k` choices of each of `tokens` tokens.
    pub const fn new(tokens: usize, experts: usize, top_k: usize, capacity: usize) -> KeepLargestDesc {
        KeepLargestDesc { tokens, experts, top_k, capacity }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::experts_up_to(OPERATION, self.experts, crate::MAX_COUNTED_EXPERTS)?;
        shape::top_k_up_to(OPERATION, self.top_k, usize::MAX, crate::MAX_TOP_K)?;
        shape::positive(OPERATION, "capacity", self.capacity)?;
        shape::product_i32(OPERATION, "ids", &[self.tokens, self.top_k]).map(drop)
    }
}

/// Buffers.
#[non_exhaustive]
pub struct KeepLargestArgs<'a> {
    /// `[T, k]`: chosen experts; one outside `0..E` is none, padding's -1 above all.
    pub ids: In<'a, i32>,
    /// `[T, k]`.
    pub weights: In<'a, f32>,
    /// `[T, k]`, written: the expert where it keeps the slot, else -1.
    pub kept_ids: Out<'a, i32>,
    /// `[T, k]`, written: the weight where the slot is kept, else 0.
    pub kept_weights: Option<Out<'a, f32>>,
}

impl<'a> KeepLargestArgs<'a> {
    /// `ids` and `weights` to `kept_ids`.
    pub fn new(
        ids: impl Into<In<'a, i32>>,
        weights: impl Into<In<'a, f32>>,
        kept_ids: impl Into<Out<'a, i32>>,
    ) -> KeepLargestArgs<'a> {
        KeepLargestArgs { ids: ids.into(), weights: weights.into(), kept_ids: kept_ids.into(), kept_weights: None }
    }
}

buffers!(KeepLargestArgs<'a> { kept_weights: Out<f32> });

/// Chooses kernel and grid: a block an expert.
///
/// # Errors
/// Those of [`KeepLargestDesc::validate`].
pub fn select(desc: &KeepLargestDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    Ok(Selection::new(Kernel::KeepLargest, [desc.experts as u32, 1, 1]))
}

/// Drops what is beyond the capacity: of equal weights the later slots, NaN before all others.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`KeepLargestDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &KeepLargestDesc,
    args: KeepLargestArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    if desc.tokens == 0 {
        return Ok(());
    }
    let slots = desc.tokens * desc.top_k;
    let ids = scope.read("ids", args.ids, slots, SCALAR)?;
    let weights = scope.read("weights", args.weights, slots, SCALAR)?;
    let kept_ids = scope.write("kept_ids", args.kept_ids, slots, SCALAR)?;
    let kept_weights = scope.write_some("kept_weights", args.kept_weights, slots, SCALAR)?;
    scope.launch(
        &selection,
        KeepLargestParams {
            ids: ids.address().into(),
            weights: weights.address().into(),
            kept_ids: kept_ids.address().into(),
            kept_weights: optional(&kept_weights).into(),
            slots: slots as u32,
            experts: desc.experts as u32,
            capacity: desc.capacity as u32,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_field() {
        let desc = KeepLargestDesc::new(10, 8, 2, 3);
        let fault = |desc: KeepLargestDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(desc.validate(), Ok(()));
        assert_eq!(fault(KeepLargestDesc { experts: 8193, ..desc }), "experts");
        assert_eq!(fault(KeepLargestDesc { top_k: 65, ..desc }), "top_k");
        assert_eq!(fault(KeepLargestDesc { capacity: 0, ..desc }), "capacity");
        assert_eq!(fault(KeepLargestDesc { tokens: 1 << 30, ..desc }), "ids");
    }
}
