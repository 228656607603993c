//! BASE layers: a balanced assignment of tokens to experts (Lewis et al., *BASE Layers*, 2021).
//!
//! Maximises `sum_t scores[t, ids[t]]` over the assignments that give each expert exactly `T / E` tokens, by an auction on the
//! device, in integers, so that the result does not depend on the device: see [`crate::reference::base::auction`]. The sum is
//! within `tokens * epsilon` of the optimum, if scores are finite and below `epsilon * 2^27` in magnitude, and the auction ended
//! within its rounds, which [`BaseArgs::status`] says.
//!
//! The way back, through the gate of the assigned expert, is [`crate::routers::gating_backward`] with [`crate::rules::Score::Sigmoid`].
//!
//! ```
//! use moe_kernels::Workspace;
//! use moe_kernels::routers::base::{self, BaseArgs, BaseDesc};
//! use moe_kernels::rules::AuctionRule;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = moe_kernels::Kernels::new(stream.context())?;
//! // Both tokens prefer expert 0; the second has less to lose.
//! let scores = stream.clone_htod(&[4.0_f32, 0.0, 3.0, 2.0])?;
//! let desc = BaseDesc::new(2, AuctionRule::new(2, 1e-3, 10_000));
//! let mut ids = stream.alloc_zeros(2)?;
//! let mut status = stream.alloc_zeros(2)?;
//! let mut workspace = Workspace::new(&stream, base::workspace_bytes(&desc)?)?;
//! base::forward(&kernels, &stream, &desc, BaseArgs::new(&scores, &mut ids, &mut status, &mut workspace))?;
//! assert_eq!(stream.clone_dtoh(&ids)?, [0, 1]);
//! assert_eq!(stream.clone_dtoh(&status)?[1], 1, "the auction ended");
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::Kernel;
use crate::rules::{AuctionRule, units};
use crate::runtime::builder::buffers;
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::BaseParams;
use crate::runtime::shape;
use crate::runtime::workspace::BARRIER_HEADER;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection, Workspace};

const OPERATION: &str = "base";

/// Most rounds that may be asked for.
pub const MAX_ROUNDS: u32 = 1 << 20;

/// Shapes and rule of a balanced assignment.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct BaseDesc {
    /// Tokens `T`, a multiple of the experts; 0 is allowed.
    pub tokens: usize,
    /// Experts `E` (1 to 4096), epsilon, and most rounds.
    pub rule: AuctionRule,
}

impl BaseDesc {
    /// A balanced assignment of `tokens` tokens by `rule`.
    pub const fn new(tokens: usize, rule: AuctionRule) -> BaseDesc {
        BaseDesc { tokens, rule }
    }
}

/// Buffers of a balanced assignment.
#[non_exhaustive]
pub struct BaseArgs<'a> {
    /// `[T, E]`: token by expert embedding.
    pub scores: In<'a, f32>,
    /// `[T]`, written: each expert appears `T / E` times.
    pub ids: Out<'a, i32>,
    /// `[T]`, written: `sigmoid(scores[t, ids[t]])`, the paper's gate.
    pub weights: Option<Out<'a, f32>>,
    /// `[2]`, written: rounds of bidding, and 1 if the auction ended within the most allowed. If not (0), the tokens that were left were
    /// given to experts with places left.
    pub status: Out<'a, u32>,
    /// At least [`workspace_bytes`].
    pub workspace: &'a mut Workspace,
}

impl<'a> BaseArgs<'a> {
    /// `scores` to `ids` and `status`, without weights.
    pub fn new(
        scores: impl Into<In<'a, f32>>,
        ids: impl Into<Out<'a, i32>>,
        status: impl Into<Out<'a, u32>>,
        workspace: &'a mut Workspace,
    ) -> BaseArgs<'a> {
        BaseArgs { scores: scores.into(), ids: ids.into(), weights: None, status: status.into(), workspace }
    }
}

buffers!(BaseArgs<'a> { weights: Out<f32> });

impl BaseDesc {
    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        let AuctionRule { experts, epsilon, max_rounds } = self.rule;
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::experts(OPERATION, experts)?;
        shape::product(OPERATION, "scores", &[self.tokens, experts])?;
        if !self.tokens.is_multiple_of(experts) {
            let expected = format!("a multiple of the number of experts, {experts}");
            return Err(Error::invalid(OPERATION, "tokens", expected, self.tokens));
        }
        if !(epsilon > 0.0 && epsilon.is_finite()) {
            return Err(Error::invalid(OPERATION, "epsilon", "a positive number", epsilon));
        }
        if max_rounds > MAX_ROUNDS {
            return Err(Error::unsupported(OPERATION, "max_rounds", format!("at most {MAX_ROUNDS}"), max_rounds));
        }
        Ok(())
    }
}

/// Workspace of [`forward`] in bytes.
///
/// # Errors
/// Those of [`BaseDesc::validate`].
pub fn workspace_bytes(desc: &BaseDesc) -> Result<usize, Error> {
    desc.validate()?;
    // A price, two counts for each expert; a bid for each token.
    Ok(BARRIER_HEADER + 16 * desc.rule.experts + 8 * desc.tokens)
}

/// Chooses kernel and grid: a warp for sixteen tokens, a block for eight experts, as far as all blocks are resident.
///
/// # Errors
/// Those of [`BaseDesc::validate`].
pub fn select(desc: &BaseDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let wanted = desc.tokens.div_ceil(128).max(desc.rule.experts.div_ceil(8)) as u32;
    let blocks = if device.cooperative_launch { wanted.clamp(1, device.multiprocessors) } else { 1 };
    Ok(Selection::cooperative(Kernel::Base, blocks))
}

/// Assigns tokens to experts.
///
/// With no tokens nothing is launched, and the status becomes zero rounds, not ended.
///
/// # Errors
/// Those of [`BaseDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those of the driver.
pub fn forward(kernels: &Kernels, stream: &Arc<CudaStream>, desc: &BaseDesc, args: BaseArgs<'_>) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let status = scope.write("status", args.status, 2, SCALAR)?;
    if desc.tokens == 0 {
        return scope.zero(status.address(), 2 * size_of::<u32>());
    }
    let scores = scope.read("scores", args.scores, desc.tokens * desc.rule.experts, SCALAR)?;
    let ids = scope.write("ids", args.ids, desc.tokens, SCALAR)?;
    let weights = scope.write_some("weights", args.weights, desc.tokens, SCALAR)?;
    let workspace = args.workspace.open(&scope, workspace_bytes(desc)?)?;
    scope.launch(
        &selection,
        BaseParams {
            scores: scores.address().into(),
            ids: ids.address().into(),
            weights: optional(&weights).into(),
            status: status.address().into(),
            tokens: desc.tokens as u32,
            experts: desc.rule.experts as u32,
            max_rounds: desc.rule.max_rounds,
            units: units(desc.rule.epsilon),
            workspace: workspace.address().into(),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn desc() -> BaseDesc {
        BaseDesc { tokens: 64, rule: AuctionRule { experts: 8, epsilon: 1e-3, max_rounds: 1000 } }
    }

    fn fault(change: impl FnOnce(&mut BaseDesc)) -> &'static str {
        let mut desc = desc();
        change(&mut desc);
        desc.validate().unwrap_err().argument().unwrap()
    }

    #[test]
    fn faults_name_their_field() {
        assert_eq!(desc().validate(), Ok(()));
        assert_eq!(fault(|d| d.tokens = 65), "tokens");
        assert_eq!(fault(|d| d.rule.experts = 0), "experts");
        assert_eq!(fault(|d| d.rule.epsilon = 0.0), "epsilon");
        assert_eq!(fault(|d| d.rule.epsilon = f32::NAN), "epsilon");
        assert_eq!(fault(|d| d.rule.max_rounds = u32::MAX), "max_rounds");
    }

    #[test]
    fn blocks_are_resident() {
        let device = crate::runtime::device::A100;
        assert_eq!(select(&desc(), &device).unwrap().grid, [1, 1, 1]);
        assert_eq!(select(&BaseDesc { tokens: 1 << 16, ..desc() }, &device).unwrap().grid, [108, 1, 1]);
        let alone = DeviceInfo { cooperative_launch: false, ..device };
        assert!(!select(&desc(), &alone).unwrap().cooperative);
    }
}
