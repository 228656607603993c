//! What is made of totals: losses after layers or devices have been added up, and the correction bias of the next step.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::{OPERATION, RouterStats};
use crate::registry::Kernel;
use crate::runtime::launch::{SCALAR, Scope};
use crate::runtime::params::{BalanceLossParams, UpdateBiasParams};
use crate::runtime::shape;
use crate::{Error, In, Kernels, Out, Selection};

/// Shapes of totals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TotalsDesc {
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// Tokens that the loss's totals are of, at least 1.
    pub tokens: usize,
}

/// Sums over tokens, by expert, to read: see [`super::Totals`].
pub struct TotalsIn<'a> {
    /// `[E]`.
    pub counts: In<'a, i32>,
    /// `[E]`.
    pub loss_counts: In<'a, i32>,
    /// `[E]`.
    pub probability: In<'a, f32>,
    /// `[E]`.
    pub importance: In<'a, f32>,
}

/// Shapes of an update of the correction bias.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BiasDesc {
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// Step, finite: DeepSeek-V3's "bias update speed", 0.001 there.
    pub rate: f32,
}

const BLOCK: [u32; 3] = [1, 1, 1];

/// Writes those fields of `stats` that depend on totals alone: `slots`, `max_load`, `balance_loss`, `importance_cv2`, `load_cv2`,
/// `max_over_mean`. The others stay.
///
/// # Errors
/// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`] for the descriptor; those of a buffer:
/// [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn losses_of_totals(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &TotalsDesc,
    totals: TotalsIn<'_>,
    stats: Out<'_, RouterStats>,
) -> Result<(), Error> {
    shape::experts(OPERATION, desc.experts)?;
    shape::positive(OPERATION, "tokens", desc.tokens)?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let counts = scope.read("totals.counts", totals.counts, desc.experts, SCALAR)?;
    let loss_counts = scope.read("totals.loss_counts", totals.loss_counts, desc.experts, SCALAR)?;
    let probability = scope.read("totals.probability", totals.probability, desc.experts, SCALAR)?;
    let importance = scope.read("totals.importance", totals.importance, desc.experts, SCALAR)?;
    let stats = scope.write("stats", stats, 1, SCALAR)?;
    let selection = Selection::new(Kernel::BalanceLoss, BLOCK);
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

/// `bias[e] += rate * sign(mean(counts) - counts[e])`: balancing without an auxiliary loss (Wang et al. 2024, algorithm 1;
/// DeepSeek-V3, section 2.1.2). `bias` and `counts` are `[E]`, the counts those of a whole step (all devices').
///
/// # Errors
/// [`Error::Invalid`] or [`Error::Unsupported`] for the descriptor; those of a buffer: [`Error::BufferTooShort`],
/// [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn update_bias(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &BiasDesc,
    counts: In<'_, i32>,
    bias: Out<'_, f32>,
) -> Result<(), Error> {
    shape::experts(OPERATION, desc.experts)?;
    if !desc.rate.is_finite() {
        return Err(Error::invalid(OPERATION, "rate", "a finite number", desc.rate));
    }
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let counts = scope.read("counts", counts, desc.experts, SCALAR)?;
    let bias = scope.write("bias", bias, desc.experts, SCALAR)?;
    let selection = Selection::new(Kernel::UpdateBias, BLOCK);
    scope.launch(
        &selection,
        UpdateBiasParams {
            correction_bias: bias.address().into(),
            counts: counts.address().into(),
            experts: desc.experts as u32,
            rate: desc.rate,
        },
    )
}
