//! Expert choice: the experts choose their tokens (Zhou et al., *Mixture-of-Experts with Expert Choice Routing*, 2022).
//!
//! 1. [`crate::routers::affinity`]: what each expert thinks of each token, `S^T [E, T]`.
//! 2. [`forward`]: each expert takes exactly its `c` best tokens; ties go to the lower token, NaN comes last. Slots
//!    `e * c` to `(e + 1) * c` are expert `e`'s, its tokens ascending: what a grouped GEMM gathers by, without a dispatch.
//! 3. [`crate::capacity::token_slots`]: a token has no expert, or many: the slots of each, ascending.
//! 4. [`crate::experts::combine_ragged`]: each token's weighted sum over its slots, in that order: the same input gives the same bits.
//!
//! ```
//! use moe_kernels::capacity::token_slots::{self, TokenSlotsArgs, TokenSlotsDesc};
//! use moe_kernels::experts::combine_ragged::{self, CombineRaggedArgs, CombineRaggedDesc};
//! use moe_kernels::routers::affinity::{self, AffinityArgs, AffinityDesc};
//! use moe_kernels::routers::expert_choice::{self, ExpertChoiceArgs, ExpertChoiceDesc};
//! use moe_kernels::rules::Affinity;
//! use moe_kernels::{Dtype, Workspace};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = moe_kernels::Kernels::new(stream.context())?;
//! let (tokens, experts, hidden) = (3, 2, 8);
//! let logits = stream.clone_htod(&[3.0, 0.0, 2.0, 5.0, 1.0, 4.0])?;
//! let mut affinities = stream.alloc_zeros(experts * tokens)?;
//! let desc = AffinityDesc::new(tokens, experts, Affinity::Logit);
//! affinity::forward(&kernels, &stream, &desc, AffinityArgs::new(&logits, &mut affinities))?;
//!
//! let desc = ExpertChoiceDesc::new(tokens, experts, 2);
//! let mut slot_token = stream.alloc_zeros(desc.slots())?;
//! let mut slot_weight = stream.alloc_zeros(desc.slots())?;
//! let args = ExpertChoiceArgs::new(&affinities, &mut slot_token).slot_weight(&mut slot_weight);
//! expert_choice::forward(&kernels, &stream, &desc, args)?;
//! assert_eq!(stream.clone_dtoh(&slot_token)?, [0, 1, 1, 2]);
//!
//! // Token 1 has two experts, the others have one.
//! let slots = TokenSlotsDesc::new(tokens, desc.slots());
//! let mut workspace = Workspace::new(&stream, token_slots::workspace_bytes(&slots, kernels.device())?)?;
//! let mut offsets = stream.alloc_zeros(tokens + 1)?;
//! let mut token_slots = stream.alloc_zeros(desc.slots())?;
//! let args = TokenSlotsArgs::new(&slot_token, &mut offsets, &mut token_slots, &mut workspace);
//! token_slots::forward(&kernels, &stream, &slots, args)?;
//! assert_eq!(stream.clone_dtoh(&offsets)?, [0, 1, 3, 4]);
//!
//! // Here the experts would come, from the rows of `slot_token` to `y_slots`.
//! let y_slots = stream.clone_htod(&vec![1.0_f32; desc.slots() * hidden])?;
//! let mut y = stream.alloc_zeros(tokens * hidden)?;
//! let desc = CombineRaggedDesc::new(Dtype::F32, tokens, desc.slots(), hidden);
//! let args = CombineRaggedArgs::new(&y_slots, &offsets, &token_slots, &mut y).slot_weight(&slot_weight);
//! combine_ragged::forward(&kernels, &stream, &desc, args)?;
//! assert_eq!(stream.clone_dtoh(&y)?, [[3.0; 8], [7.0; 8], [4.0; 8]].concat());
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::Kernel;
use crate::runtime::builder::buffers;
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::ExpertChoiceParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "expert_choice";

/// Shapes of an expert choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExpertChoiceDesc {
    /// Tokens `T`, at least 1.
    pub tokens: usize,
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// Tokens of each expert `c`, 1 to `T`: the paper's `T * capacity factor / E` ([`crate::rules::capacity`]).
    pub capacity: usize,
}

impl ExpertChoiceDesc {
    /// `capacity` of `tokens` tokens for each of `experts` experts.
    pub const fn new(tokens: usize, experts: usize, capacity: usize) -> ExpertChoiceDesc {
        ExpertChoiceDesc { tokens, experts, capacity }
    }
}

impl ExpertChoiceDesc {
    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::positive(OPERATION, "tokens", self.tokens)?;
        shape::experts(OPERATION, self.experts)?;
        if self.capacity == 0 || self.capacity > self.tokens {
            let expected = format!("1 to the number of tokens, {}", self.tokens);
            return Err(Error::invalid(OPERATION, "capacity", expected, self.capacity));
        }
        shape::product(OPERATION, "affinity", &[self.experts, self.tokens])?;
        shape::product_i32(OPERATION, "slot_token", &[self.experts, self.capacity]).map(drop)
    }

    /// Rows of the slot-ordered buffers, `E * c`.
    ///
    /// Meaningful for a valid descriptor.
    pub fn slots(&self) -> usize {
        self.experts * self.capacity
    }
}

/// Buffers of an expert choice.
#[non_exhaustive]
pub struct ExpertChoiceArgs<'a> {
    /// `[E, T]`.
    pub affinities: In<'a, f32>,
    /// `[E, c]`, written: each expert's tokens, ascending.
    pub slot_token: Out<'a, i32>,
    /// `[E, c]`, written: their affinities.
    pub slot_weight: Option<Out<'a, f32>>,
}

impl<'a> ExpertChoiceArgs<'a> {
    /// `affinities` to `slot_token`, without weights.
    pub fn new(affinities: impl Into<In<'a, f32>>, slot_token: impl Into<Out<'a, i32>>) -> ExpertChoiceArgs<'a> {
        ExpertChoiceArgs { affinities: affinities.into(), slot_token: slot_token.into(), slot_weight: None }
    }
}

buffers!(ExpertChoiceArgs<'a> { slot_weight: Out<f32> });

/// Chooses kernel and grid: a block an expert.
///
/// # Errors
/// Those of [`ExpertChoiceDesc::validate`].
pub fn select(desc: &ExpertChoiceDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    Ok(Selection::new(Kernel::ExpertChoice, [desc.experts as u32, 1, 1]))
}

/// Chooses each expert's tokens.
///
/// # Errors
/// Those of [`ExpertChoiceDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &ExpertChoiceDesc,
    args: ExpertChoiceArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let affinities = scope.read("affinities", args.affinities, desc.tokens * desc.experts, SCALAR)?;
    let slot_token = scope.write("slot_token", args.slot_token, desc.slots(), SCALAR)?;
    let slot_weight = scope.write_some("slot_weight", args.slot_weight, desc.slots(), SCALAR)?;
    scope.launch(
        &selection,
        ExpertChoiceParams {
            affinity: affinities.address().into(),
            slot_token: slot_token.address().into(),
            slot_weight: optional(&slot_weight).into(),
            tokens: desc.tokens as u32,
            capacity: desc.capacity as u32,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_field() {
        let desc = ExpertChoiceDesc { tokens: 100, experts: 8, capacity: 25 };
        let fault = |desc: ExpertChoiceDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(desc.validate(), Ok(()));
        assert_eq!(fault(ExpertChoiceDesc { tokens: 0, ..desc }), "tokens");
        assert_eq!(fault(ExpertChoiceDesc { experts: 4097, ..desc }), "experts");
        assert_eq!(fault(ExpertChoiceDesc { capacity: 101, ..desc }), "capacity");
        assert_eq!(fault(ExpertChoiceDesc { capacity: 0, ..desc }), "capacity");
        assert_eq!(fault(ExpertChoiceDesc { tokens: 1 << 30, capacity: 1 << 29, ..desc }), "slot_token");
    }
}
