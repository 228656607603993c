//! What is made of totals: losses after layers or devices have been added up, and the correction bias of the next step.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::{OPERATION, RouterStats};
use crate::registry::Kernel;
use crate::runtime::launch::{In, Out, Param, SCALAR, Scope};
use crate::runtime::shape;
use crate::{Error, Kernels, Selection};

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
    let at = [&counts, &loss_counts, &probability, &importance, &stats].map(|held| held.address().into());
    let selection = Selection { kernel: Kernel::BalanceLoss, grid: BLOCK, cooperative: false };
    scope.launch(&selection, loss_params(desc, at))
}

fn loss_params(desc: &TotalsDesc, [counts, loss_counts, probability, importance, stats]: [Param; 5]) -> [Param; 7] {
    let (experts, tokens) = (desc.experts as u32, desc.tokens as u32);
    [counts, loss_counts, probability, importance, stats, experts.into(), tokens.into()]
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
    let selection = Selection { kernel: Kernel::UpdateBias, grid: BLOCK, cooperative: false };
    scope.launch(&selection, bias_params(desc, bias.address().into(), counts.address().into()))
}

fn bias_params(desc: &BiasDesc, bias: Param, counts: Param) -> [Param; 4] {
    [bias, counts, (desc.experts as u32).into(), desc.rate.into()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn params_are_those_of_the_entries() {
        let null = Param::Address(0);
        let loss = loss_params(&TotalsDesc { experts: 8, tokens: 9 }, [null; 5]);
        crate::runtime::embedded::assert_takes(Kernel::BalanceLoss, &loss);
        let bias = bias_params(&BiasDesc { experts: 8, rate: 0.001 }, null, null);
        crate::runtime::embedded::assert_takes(Kernel::UpdateBias, &bias);
    }
}
