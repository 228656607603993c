//! S-BASE: balanced routing by an entropy-regularised optimal transport (Clark et al., *Unified Scaling Laws for Routed Language
//! Models*, 2022, appendix B.2.1).
//!
//! Sinkhorn's iteration finds a potential `v[e]` for each expert so that the columns of `softmax(logits + v)` have equal sums, to
//! a tolerance or for a number of iterations. A token goes to the `k` experts of largest `logits + v`; its weights are the
//! router's own probabilities, `softmax(logits)`, as the plan only chooses. See [`crate::reference::sinkhorn`].
//!
//! The way back, through the weights, is [`crate::routers::gating_backward`] with [`crate::rules::Score::Softmax`].
//!
//! ```
//! use moe_kernels::Workspace;
//! use moe_kernels::routers::sinkhorn::{self, SinkhornArgs, SinkhornDesc};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = moe_kernels::Kernels::new(stream.context())?;
//! // Both tokens prefer expert 0; balanced, the second goes to the other.
//! let logits = stream.clone_htod(&[4.0_f32, 0.0, 3.0, 2.0])?;
//! let desc = SinkhornDesc::new(2, 2, 1, 1000, 1e-3);
//! let mut ids = stream.alloc_zeros(2)?;
//! let mut potentials = stream.alloc_zeros(2)?;
//! let mut status = stream.alloc_zeros(2)?;
//! let mut workspace = Workspace::new(&stream, sinkhorn::workspace_bytes(&desc, kernels.device())?)?;
//! let args = SinkhornArgs::new(&logits, &mut ids, &mut potentials, &mut status, &mut workspace);
//! sinkhorn::forward(&kernels, &stream, &desc, args)?;
//! assert_eq!(stream.clone_dtoh(&ids)?, [0, 1]);
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{Admission, Kernel, Sinkhorn};
use crate::runtime::builder::buffers;
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::SinkhornParams;
use crate::runtime::shape;
use crate::runtime::workspace::BARRIER_HEADER;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection, Workspace};

const OPERATION: &str = "sinkhorn";

/// Most iterations that may be asked for.
pub const MAX_ITERATIONS: u32 = 1 << 18;

/// Shapes and rule of a balanced routing.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct SinkhornDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// Experts per token `k`, 1 to 32 and at most `E`.
    pub top_k: usize,
    /// Most iterations.
    pub iterations: u32,
    /// End once every column sum is within this of `T / E`, relatively; below 0 for exactly `iterations`.
    pub tolerance: f32,
}

impl SinkhornDesc {
    /// `top_k` of `experts` experts for each of `tokens` tokens, after `iterations` at most or once within `tolerance`.
    pub const fn new(tokens: usize, experts: usize, top_k: usize, iterations: u32, tolerance: f32) -> SinkhornDesc {
        SinkhornDesc { tokens, experts, top_k, iterations, tolerance }
    }
}

/// Buffers of a balanced routing.
#[non_exhaustive]
pub struct SinkhornArgs<'a> {
    /// `[T, E]`.
    pub logits: In<'a, f32>,
    /// `[T, k]`, written: experts by falling `logits + potentials`.
    pub ids: Out<'a, i32>,
    /// `[T, k]`, written: `softmax(logits)` of the chosen.
    pub weights: Option<Out<'a, f32>>,
    /// `[E]`, written: `v`.
    pub potentials: Out<'a, f32>,
    /// `[2]`, written: iterations done; bits of the f32 largest `|column sum / (T/E) - 1|` before the last update.
    pub status: Out<'a, u32>,
    /// At least [`workspace_bytes`].
    pub workspace: &'a mut Workspace,
}

impl<'a> SinkhornArgs<'a> {
    /// `logits` to `ids`, `potentials` and `status`, without weights.
    pub fn new(
        logits: impl Into<In<'a, f32>>,
        ids: impl Into<Out<'a, i32>>,
        potentials: impl Into<Out<'a, f32>>,
        status: impl Into<Out<'a, u32>>,
        workspace: &'a mut Workspace,
    ) -> SinkhornArgs<'a> {
        SinkhornArgs {
            logits: logits.into(),
            ids: ids.into(),
            weights: None,
            potentials: potentials.into(),
            status: status.into(),
            workspace,
        }
    }
}

buffers!(SinkhornArgs<'a> { weights: Out<f32> });

impl SinkhornDesc {
    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::experts(OPERATION, self.experts)?;
        shape::top_k(OPERATION, self.top_k, self.experts)?;
        shape::product(OPERATION, "logits", &[self.tokens, self.experts])?;
        shape::product_i32(OPERATION, "ids", &[self.tokens, self.top_k])?;
        if self.iterations > MAX_ITERATIONS {
            let supported = format!("at most {MAX_ITERATIONS}");
            return Err(Error::unsupported(OPERATION, "iterations", supported, self.iterations));
        }
        if self.tolerance.is_nan() {
            return Err(Error::invalid(OPERATION, "tolerance", "a number", self.tolerance));
        }
        Ok(())
    }
}

/// Workspace of [`forward`] in bytes.
///
/// # Errors
/// Those of [`SinkhornDesc::validate`].
pub fn workspace_bytes(desc: &SinkhornDesc, device: &DeviceInfo) -> Result<usize, Error> {
    let blocks = select(desc, device)?.grid[0] as usize;
    Ok(BARRIER_HEADER + blocks * desc.experts * size_of::<f32>())
}

/// Chooses kernel and grid: a warp for four tokens, as far as all blocks are resident.
///
/// # Errors
/// Those of [`SinkhornDesc::validate`].
pub fn select(desc: &SinkhornDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let max_experts = if desc.experts <= 1024 { Admission::MAX_EXPERTS[0] } else { Admission::MAX_EXPERTS[1] };
    let sinkhorn = Sinkhorn { max_experts };
    let wanted = (desc.tokens as u32).div_ceil(4 * sinkhorn.warps());
    let blocks = if device.cooperative_launch { wanted.clamp(1, device.multiprocessors) } else { 1 };
    Ok(Selection::cooperative(Kernel::Sinkhorn(sinkhorn), blocks))
}

/// Balances and chooses.
///
/// With no tokens nothing is launched, and potentials and status become zero.
///
/// # Errors
/// Those of [`SinkhornDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &SinkhornDesc,
    args: SinkhornArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let potentials = scope.write("potentials", args.potentials, desc.experts, SCALAR)?;
    let status = scope.write("status", args.status, 2, SCALAR)?;
    if desc.tokens == 0 {
        scope.zero(potentials.address(), desc.experts * size_of::<f32>())?;
        return scope.zero(status.address(), 2 * size_of::<u32>());
    }
    let choices = desc.tokens * desc.top_k;
    let logits = scope.read("logits", args.logits, desc.tokens * desc.experts, SCALAR)?;
    let ids = scope.write("ids", args.ids, choices, SCALAR)?;
    let weights = scope.write_some("weights", args.weights, choices, SCALAR)?;
    let workspace = args.workspace.open(&scope, workspace_bytes(desc, kernels.device())?)?;
    scope.launch(
        &selection,
        SinkhornParams {
            logits: logits.address().into(),
            ids: ids.address().into(),
            weights: optional(&weights).into(),
            potentials: potentials.address().into(),
            status: status.address().into(),
            tokens: desc.tokens as u32,
            experts: desc.experts as u32,
            top_k: desc.top_k as u32,
            iterations: desc.iterations,
            tolerance: desc.tolerance,
            workspace: workspace.address().into(),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(desc: SinkhornDesc) -> &'static str {
        desc.validate().unwrap_err().argument().unwrap()
    }

    #[test]
    fn faults_name_their_field() {
        let desc = SinkhornDesc { tokens: 64, experts: 8, top_k: 1, iterations: 10, tolerance: 1e-3 };
        assert_eq!(desc.validate(), Ok(()));
        assert_eq!(fault(SinkhornDesc { experts: 4097, ..desc }), "experts");
        assert_eq!(fault(SinkhornDesc { top_k: 9, ..desc }), "top_k");
        assert_eq!(fault(SinkhornDesc { iterations: u32::MAX, ..desc }), "iterations");
        assert_eq!(fault(SinkhornDesc { tolerance: f32::NAN, ..desc }), "tolerance");
        let device = crate::runtime::device::A100;
        assert_eq!(workspace_bytes(&desc, &device).unwrap(), 32 + 2 * 8 * 4);
    }
}
