//! One expert for all tokens of a sequence or image, by an index that the caller has (ViTPose+: Xu et al. 2023, where an image's patches go to
//! the expert of the image's dataset).
//!
//! ```
//! use moe_kernels::routers::by_sequence::{self, BySequenceArgs, BySequenceDesc};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = moe_kernels::Kernels::new(stream.context())?;
//! // Two images of two patches.
//! let datasets = stream.clone_htod(&[5, 1])?;
//! let (mut ids, mut weights) = (stream.alloc_zeros(4)?, stream.alloc_zeros(4)?);
//! let desc = BySequenceDesc::new(4, 2, 6);
//! by_sequence::forward(&kernels, &stream, &desc, BySequenceArgs::new(&datasets, &mut ids, &mut weights))?;
//! assert_eq!(stream.clone_dtoh(&ids)?, [5, 5, 1, 1]);
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::capacity::Ids;
use crate::registry::Kernel;
use crate::rules::IdFormat;
use crate::runtime::builder::settings;
use crate::runtime::launch::{SCALAR, Scope};
use crate::runtime::params::BySequenceParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Error, Kernels, Out, Selection};

const OPERATION: &str = "by_sequence";

/// Shapes of a choice by sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BySequenceDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Tokens of a sequence `L`, at least 1; the last may be shorter.
    pub tokens_per_sequence: usize,
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// How the indices are stored.
    pub index: IdFormat,
}

impl BySequenceDesc {
    /// One of `experts` experts for each `tokens_per_sequence` of `tokens` tokens, by indices of 32 bits.
    pub const fn new(tokens: usize, tokens_per_sequence: usize, experts: usize) -> BySequenceDesc {
        BySequenceDesc { tokens, tokens_per_sequence, experts, index: IdFormat::I32 }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::positive(OPERATION, "tokens_per_sequence", self.tokens_per_sequence)?;
        shape::experts(OPERATION, self.experts).map(drop)
    }
}

settings!(BySequenceDesc { index: IdFormat });

/// Buffers of a choice by sequence.
#[non_exhaustive]
pub struct BySequenceArgs<'a> {
    /// `[ceil(T / L)]`. One that is no expert sends its tokens nowhere.
    pub index: Ids<'a>,
    /// `[T]`, written; -1 for no expert.
    pub ids: Out<'a, i32>,
    /// `[T]`, written: 1, or 0 for no expert.
    pub weights: Out<'a, f32>,
}

impl<'a> BySequenceArgs<'a> {
    /// `index` to `ids` and `weights`.
    pub fn new(
        index: impl Into<Ids<'a>>,
        ids: impl Into<Out<'a, i32>>,
        weights: impl Into<Out<'a, f32>>,
    ) -> BySequenceArgs<'a> {
        BySequenceArgs { index: index.into(), ids: ids.into(), weights: weights.into() }
    }
}

/// Chooses kernel and grid: a thread a token.
///
/// # Errors
/// Those of [`BySequenceDesc::validate`].
pub fn select(desc: &BySequenceDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let kernel = Kernel::BySequence { ids_bytes: desc.index.bytes() };
    let blocks = (desc.tokens as u32).div_ceil(kernel.threads()).max(1);
    Ok(Selection::new(kernel, [blocks, 1, 1]))
}

/// Gives every token its sequence's expert.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`BySequenceDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`], an index
/// of another format; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &BySequenceDesc,
    args: BySequenceArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    if desc.tokens == 0 {
        return Ok(());
    }
    let sequences = desc.tokens.div_ceil(desc.tokens_per_sequence);
    let index = args.index.open(&scope, "index", desc.index, sequences)?;
    let ids = scope.write("ids", args.ids, desc.tokens, SCALAR)?;
    let weights = scope.write("weights", args.weights, desc.tokens, SCALAR)?;
    scope.launch(
        &selection,
        BySequenceParams {
            index: index.address().into(),
            ids: ids.address().into(),
            weights: weights.address().into(),
            tokens: desc.tokens as u32,
            tokens_per_sequence: desc.tokens_per_sequence as u32,
            experts: desc.experts as u32,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_field() {
        let desc = BySequenceDesc::new(10, 4, 8);
        let fault = |desc: BySequenceDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(desc.validate(), Ok(()));
        assert_eq!(fault(BySequenceDesc { tokens_per_sequence: 0, ..desc }), "tokens_per_sequence");
        assert_eq!(fault(BySequenceDesc { experts: 0, ..desc }), "experts");
        assert_eq!(fault(BySequenceDesc { tokens: 1 << 31, ..desc }), "tokens");
    }
}
