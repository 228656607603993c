//! What a loss by sequence counts: slots of each expert in each sequence, and tokens of each sequence ([`crate::rules::LossGradient::sequence`];
//! DeepSeek-V3, eq. 18).
//!
//! Tokens count as in [`crate::routers::measured_gating`]: no padding, and none whose logits are garbage. For
//! [`crate::rules::LossCounts::Scores`] give it ids of the largest scores, from a gating without bias and groups.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::gating::logit_flags;
use crate::registry::Kernel;
use crate::rules::Sequences;
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::SequenceCountsParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection, Tensor, TokenMask};

const OPERATION: &str = "sequence_counts";

/// Shapes of a count by sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SequenceCountsDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// Experts per token `k`, 1 to 64.
    pub top_k: usize,
    /// Tokens of a sequence.
    pub tokens_per_sequence: usize,
    /// Which tokens these are.
    pub sequences: Sequences,
}

impl SequenceCountsDesc {
    /// Of sequences of `tokens_per_sequence` tokens, one behind the other.
    pub const fn new(tokens: usize, experts: usize, top_k: usize, tokens_per_sequence: usize) -> SequenceCountsDesc {
        SequenceCountsDesc { tokens, experts, top_k, tokens_per_sequence, sequences: Sequences::Following }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        let argument = "tokens_per_sequence";
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::experts(OPERATION, self.experts)?;
        shape::top_k_up_to(OPERATION, self.top_k, usize::MAX, crate::MAX_TOP_K)?;
        shape::positive(OPERATION, argument, self.tokens_per_sequence)?;
        shape::size(OPERATION, argument, self.tokens_per_sequence)?;
        if self.sequences == Sequences::Alternating && !self.tokens.is_multiple_of(self.tokens_per_sequence) {
            let expected = format!("a divisor of the number of tokens, {}, where sequences alternate", self.tokens);
            return Err(Error::invalid(OPERATION, argument, expected, self.tokens_per_sequence));
        }
        shape::product(OPERATION, "logits", &[self.tokens, self.experts])?;
        shape::product_i32(OPERATION, "ids", &[self.tokens, self.top_k])?;
        shape::product(OPERATION, "counts", &[self.count(), self.experts]).map(drop)
    }

    /// Sequences `B`.
    pub fn count(&self) -> usize {
        self.tokens.div_ceil(self.tokens_per_sequence.max(1))
    }
}

settings!(SequenceCountsDesc { sequences: Sequences });

/// Buffers of a count by sequence.
#[non_exhaustive]
pub struct SequenceCountsArgs<'a> {
    /// `[T, E]`, of any [`crate::Element`].
    pub logits: Tensor<'a>,
    /// `[T, k]`. One that is no expert's is no choice.
    pub ids: In<'a, i32>,
    /// Which tokens count.
    pub mask: TokenMask<'a>,
    /// `[B, E]`, written.
    pub counts: Out<'a, i32>,
    /// `[B]`, written: tokens of each sequence that count.
    pub lengths: Option<Out<'a, u32>>,
}

impl<'a> SequenceCountsArgs<'a> {
    /// Of `ids` to `counts`.
    pub fn new(
        logits: impl Into<Tensor<'a>>,
        ids: impl Into<In<'a, i32>>,
        counts: impl Into<Out<'a, i32>>,
    ) -> SequenceCountsArgs<'a> {
        SequenceCountsArgs {
            logits: logits.into(),
            ids: ids.into(),
            mask: TokenMask::all(),
            counts: counts.into(),
            lengths: None,
        }
    }

    /// With padding among the tokens.
    #[must_use]
    pub fn mask(self, mask: TokenMask<'a>) -> SequenceCountsArgs<'a> {
        SequenceCountsArgs { mask, ..self }
    }
}

buffers!(SequenceCountsArgs<'a> { lengths: Out<u32> });

/// Chooses kernel and grid: a block a sequence.
///
/// # Errors
/// Those of [`SequenceCountsDesc::validate`].
pub fn select(desc: &SequenceCountsDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let blocks = shape::grid_x(OPERATION, "tokens", desc.count().max(1) as u64)?;
    Ok(Selection::new(Kernel::SequenceCounts, [blocks, 1, 1]))
}

/// Counts.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`SequenceCountsDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &SequenceCountsDesc,
    args: SequenceCountsArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let &SequenceCountsDesc { tokens, experts, top_k, tokens_per_sequence, sequences } = desc;
    if tokens == 0 {
        return Ok(());
    }
    let dtype = args.logits.dtype();
    let logits = scope.read_any("logits", args.logits, tokens * experts, dtype.bytes().into())?;
    let ids = scope.read("ids", args.ids, tokens * top_k, SCALAR)?;
    let mask = args.mask.open(&scope, tokens)?;
    let counts = scope.write("counts", args.counts, desc.count() * experts, SCALAR)?;
    let lengths = scope.write_some("lengths", args.lengths, desc.count(), SCALAR)?;
    let [sequence_step, token_step] = match sequences {
        Sequences::Following => [tokens_per_sequence, 1],
        Sequences::Alternating => [1, desc.count()],
    };
    scope.launch(
        &selection,
        SequenceCountsParams {
            logits: logits.address().into(),
            ids: ids.address().into(),
            mask: mask.addresses().mask.into(),
            valid_tokens: mask.addresses().valid_tokens.into(),
            token_flags: mask.addresses().flags() | logit_flags(dtype),
            tokens: tokens as u32,
            experts: experts as u32,
            top_k: top_k as u32,
            tokens_per_sequence: tokens_per_sequence as u32,
            sequence_step: sequence_step as u32,
            token_step: token_step as u32,
            counts: counts.address().into(),
            lengths: optional(&lengths).into(),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_field() {
        let desc = SequenceCountsDesc::new(12, 4, 2, 5);
        let fault = |desc: SequenceCountsDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!((desc.validate(), desc.count()), (Ok(()), 3));
        assert_eq!(fault(SequenceCountsDesc { experts: 0, ..desc }), "experts");
        assert_eq!(fault(SequenceCountsDesc { top_k: 65, ..desc }), "top_k");
        assert_eq!(fault(SequenceCountsDesc { tokens_per_sequence: 0, ..desc }), "tokens_per_sequence");
        assert_eq!(fault(desc.sequences(Sequences::Alternating)), "tokens_per_sequence");
    }
}
