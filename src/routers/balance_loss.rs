//! Balancing losses of totals, after those of layers or devices have been added up: see [`crate::routers::measured_gating`].

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::Kernel;
use crate::routers::measured_gating::RouterStats;
use crate::runtime::launch::{SCALAR, Scope};
use crate::runtime::params::BalanceLossParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "balance_loss";

/// Shapes of totals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BalanceLossDesc {
    /// Tokens that the loss's totals are of, at least 1.
    pub tokens: usize,
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
}

impl BalanceLossDesc {
    /// Totals of `tokens` tokens over `experts` experts.
    pub const fn new(tokens: usize, experts: usize) -> BalanceLossDesc {
        BalanceLossDesc { tokens, experts }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::positive(OPERATION, "tokens", self.tokens)?;
        shape::experts(OPERATION, self.experts).map(drop)
    }
}

/// Buffers of losses. The totals are those of [`crate::routers::measured_gating::Totals`].
#[non_exhaustive]
pub struct BalanceLossArgs<'a> {
    /// `[E]`.
    pub counts: In<'a, i32>,
    /// `[E]`.
    pub loss_counts: In<'a, i32>,
    /// `[E]`.
    pub probability: In<'a, f32>,
    /// `[E]`.
    pub importance: In<'a, f32>,
    /// `[1]`, of which those fields are written that depend on totals alone.
    pub stats: Out<'a, RouterStats>,
}

impl<'a> BalanceLossArgs<'a> {
    /// Totals to `stats`.
    pub fn new(
        counts: impl Into<In<'a, i32>>,
        loss_counts: impl Into<In<'a, i32>>,
        probability: impl Into<In<'a, f32>>,
        importance: impl Into<In<'a, f32>>,
        stats: impl Into<Out<'a, RouterStats>>,
    ) -> BalanceLossArgs<'a> {
        BalanceLossArgs {
            counts: counts.into(),
            loss_counts: loss_counts.into(),
            probability: probability.into(),
            importance: importance.into(),
            stats: stats.into(),
        }
    }
}

/// Chooses kernel and grid: one block.
///
/// # Errors
/// Those of [`BalanceLossDesc::validate`].
pub fn select(desc: &BalanceLossDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    Ok(Selection::new(Kernel::BalanceLoss, [1, 1, 1]))
}

/// Writes those fields of `stats` that depend on totals alone: `slots`, `max_load`, `balance_loss`, `importance_cv2`, `load_cv2`,
/// `max_over_mean`. The others stay.
///
/// # Errors
/// Those of [`BalanceLossDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &BalanceLossDesc,
    args: BalanceLossArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let counts = scope.read("counts", args.counts, desc.experts, SCALAR)?;
    let loss_counts = scope.read("loss_counts", args.loss_counts, desc.experts, SCALAR)?;
    let probability = scope.read("probability", args.probability, desc.experts, SCALAR)?;
    let importance = scope.read("importance", args.importance, desc.experts, SCALAR)?;
    let stats = scope.write("stats", args.stats, 1, SCALAR)?;
    scope.launch(
        &selection,
        BalanceLossParams {
            counts: counts.address().into(),
            loss_counts: loss_counts.address().into(),
            probability: probability.address().into(),
            importance: importance.address().into(),
            stats: stats.address().into(),
            experts: desc.experts as u32,
            loss_tokens: desc.tokens as u32,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_field() {
        let fault = |desc: BalanceLossDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(BalanceLossDesc::new(1, 4096).validate(), Ok(()));
        assert_eq!(fault(BalanceLossDesc::new(0, 8)), "tokens");
        assert_eq!(fault(BalanceLossDesc::new(1 << 32, 8)), "tokens");
        assert_eq!(fault(BalanceLossDesc::new(1, 4097)), "experts");
    }
}
