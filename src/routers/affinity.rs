//! Affinity: what each expert thinks of each token, `S^T [E, T]` from `logits [T, E]`, in f32, for [`crate::routers::expert_choice`].

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{AFFINITY_TOKENS, Kernel};
use crate::rules::Affinity;
use crate::runtime::launch::{SCALAR, Scope};
use crate::runtime::params::AffinityParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "affinity";

/// Shapes and kind of affinities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AffinityDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// What is made of a logit.
    pub affinity: Affinity,
}

impl AffinityDesc {
    /// What `experts` experts think of `tokens` tokens.
    pub const fn new(tokens: usize, experts: usize, affinity: Affinity) -> AffinityDesc {
        AffinityDesc { tokens, experts, affinity }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::experts(OPERATION, self.experts)?;
        shape::product(OPERATION, "affinities", &[self.experts, self.tokens]).map(drop)
    }
}

/// Buffers of affinities.
#[non_exhaustive]
pub struct AffinityArgs<'a> {
    /// `[T, E]`.
    pub logits: In<'a, f32>,
    /// `[E, T]`, written.
    pub affinities: Out<'a, f32>,
}

impl<'a> AffinityArgs<'a> {
    /// `logits` to `affinities`.
    pub fn new(logits: impl Into<In<'a, f32>>, affinities: impl Into<Out<'a, f32>>) -> AffinityArgs<'a> {
        AffinityArgs { logits: logits.into(), affinities: affinities.into() }
    }
}

/// Chooses kernel and grid: a block for 32 tokens.
///
/// # Errors
/// Those of [`AffinityDesc::validate`].
pub fn select(desc: &AffinityDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let blocks = (desc.tokens as u32).div_ceil(AFFINITY_TOKENS).max(1);
    Ok(Selection::new(Kernel::Affinity, [blocks, 1, 1]))
}

/// Computes affinities.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`AffinityDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &AffinityDesc,
    args: AffinityArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    if desc.tokens == 0 {
        return Ok(());
    }
    let elements = desc.tokens * desc.experts;
    let logits = scope.read("logits", args.logits, elements, SCALAR)?;
    let affinities = scope.write("affinities", args.affinities, elements, SCALAR)?;
    let mode: u32 = match desc.affinity {
        Affinity::Softmax => 0,
        Affinity::Sigmoid => 1,
        Affinity::Logit => 2,
    };
    scope.launch(
        &selection,
        AffinityParams {
            logits: logits.address().into(),
            affinity: affinities.address().into(),
            tokens: desc.tokens as u32,
            experts: desc.experts as u32,
            mode,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::runtime::device::A100;

    #[test]
    fn faults_name_their_field() {
        let desc = AffinityDesc::new(100, 8, Affinity::Softmax);
        let fault = |desc: AffinityDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(desc.validate(), Ok(()));
        assert_eq!(fault(AffinityDesc { tokens: 1 << 40, ..desc }), "tokens");
        assert_eq!(fault(AffinityDesc { experts: 0, ..desc }), "experts");
        assert_eq!(fault(AffinityDesc { experts: 4097, ..desc }), "experts");
    }

    #[test]
    fn blocks_cover_the_tokens() {
        for (tokens, blocks) in [(0, 1), (1, 1), (32, 1), (33, 2)] {
            let desc = AffinityDesc::new(tokens, 8, Affinity::Logit);
            assert_eq!(select(&desc, &A100).unwrap().grid, [blocks, 1, 1], "{tokens} tokens");
        }
    }
}
