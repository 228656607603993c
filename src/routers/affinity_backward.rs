//! The way back through what experts that choose their tokens think of them ([`crate::routers::affinity`],
//! [`crate::routers::expert_choice`]): from gradients of slots' weights to those of logits. The choice is constant.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::expert_choice::ExpertChoiceDesc;
use crate::experts::Dispatched;
use crate::registry::{BLOCK_WARPS, Kernel};
use crate::rules::Affinity;
use crate::runtime::builder::settings;
use crate::runtime::launch::{SCALAR, Scope};
use crate::runtime::params::AffinityBackwardParams;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "affinity_backward";

/// Shapes and affinity of an expert choice's backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AffinityBackwardDesc {
    /// The choice.
    pub choice: ExpertChoiceDesc,
    /// What the experts chose by, and what weighs their slots.
    pub affinity: Affinity,
    /// Adds to `d_logits` instead of writing it.
    pub accumulate: bool,
}

impl AffinityBackwardDesc {
    /// Of `choice` by `affinity`.
    pub const fn new(choice: ExpertChoiceDesc, affinity: Affinity) -> AffinityBackwardDesc {
        AffinityBackwardDesc { choice, affinity, accumulate: false }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// Those of [`ExpertChoiceDesc::validate`].
    pub fn validate(&self) -> Result<(), Error> {
        self.choice.validate().map_err(|error| error.within(OPERATION))
    }
}

settings!(AffinityBackwardDesc { accumulate: bool });

/// Buffers of an expert choice's backward pass.
#[non_exhaustive]
pub struct AffinityBackwardArgs<'a> {
    /// `[T, E]`: those that affinities were made of.
    pub logits: In<'a, f32>,
    /// What [`crate::routers::expert_choice::dispatch`] filled.
    pub dispatched: &'a Dispatched,
    /// `[E, c]`: gradients of the slots' weights; those of slots without a token are not read.
    pub d_slot_weight: In<'a, f32>,
    /// `[T, E]`, written, or added to.
    pub d_logits: Out<'a, f32>,
}

impl<'a> AffinityBackwardArgs<'a> {
    /// `d_slot_weight` of the slots of `dispatched` to `d_logits`.
    pub fn new(
        logits: impl Into<In<'a, f32>>,
        dispatched: &'a Dispatched,
        d_slot_weight: impl Into<In<'a, f32>>,
        d_logits: impl Into<Out<'a, f32>>,
    ) -> AffinityBackwardArgs<'a> {
        AffinityBackwardArgs {
            logits: logits.into(),
            dispatched,
            d_slot_weight: d_slot_weight.into(),
            d_logits: d_logits.into(),
        }
    }
}

/// Chooses kernel and grid: a warp for each token up to eight blocks a multiprocessor.
///
/// # Errors
/// Those of [`AffinityBackwardDesc::validate`].
pub fn select(desc: &AffinityBackwardDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let blocks = (desc.choice.tokens as u32).div_ceil(BLOCK_WARPS).min(8 * device.multiprocessors).max(1);
    Ok(Selection::new(Kernel::AffinityBackward, [blocks, 1, 1]))
}

/// Computes the gradient of the logits.
///
/// # Errors
/// Those of [`AffinityBackwardDesc::validate`]; [`Error::Invalid`] for another dispatch than the choice's; those of a buffer:
/// [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &AffinityBackwardDesc,
    args: AffinityBackwardArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let ExpertChoiceDesc { tokens, experts, capacity, .. } = desc.choice;
    let shape = args.dispatched.shape();
    if (shape.tokens, shape.experts, shape.top_k, shape.slots) != (tokens, experts, None, desc.choice.slots()) {
        let expected = format!("{tokens} tokens of which each of {experts} experts chose {capacity}");
        return Err(Error::invalid(OPERATION, "dispatched", expected, format!("{shape:?}")));
    }
    let logits = scope.read("logits", args.logits, tokens * experts, SCALAR)?;
    let d_slot_weight = scope.read("d_slot_weight", args.d_slot_weight, desc.choice.slots(), SCALAR)?;
    let lists = args.dispatched.read(&scope)?;
    let d_logits = scope.write("d_logits", args.d_logits, tokens * experts, SCALAR)?;
    scope.launch(
        &selection,
        AffinityBackwardParams {
            logits: logits.address().into(),
            d_slot_weight: d_slot_weight.address().into(),
            token_offsets: lists.addresses().token_offsets.into(),
            token_slot: lists.addresses().token_slot.into(),
            d_logits: d_logits.address().into(),
            tokens: tokens as u32,
            experts: experts as u32,
            capacity: capacity as u32,
            mode: match desc.affinity {
                Affinity::Softmax => 0,
                Affinity::Sigmoid => 1,
                Affinity::Logit => 2,
            },
            accumulate: u32::from(desc.accumulate),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_field() {
        let with = |choice| AffinityBackwardDesc::new(choice, Affinity::Softmax);
        let fault = |desc: AffinityBackwardDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(with(ExpertChoiceDesc::new(10, 4, 2)).validate(), Ok(()));
        assert_eq!(fault(with(ExpertChoiceDesc::new(0, 4, 2))), "tokens");
        assert_eq!(fault(with(ExpertChoiceDesc::new(10, 4, 11))), "capacity");
    }
}
