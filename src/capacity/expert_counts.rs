//! Expert counts: how many slots each expert has, and where its rows would begin, without the lists of a dispatch.
//!
//! What decides on buffers, sends rows to other devices or feeds statistics needs no more. Up to 8192 experts.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{Kernel, MAX_COUNTED};
use crate::rules::IdFormat;
use crate::runtime::builder::{buffers, settings};
use crate::runtime::ids::Ids;
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::ExpertCountsParams;
use crate::runtime::shape;
use crate::runtime::workspace::BARRIER_HEADER;
use crate::{DeviceInfo, Error, Kernels, Out, Selection, Workspace};

const OPERATION: &str = "expert_counts";

/// Sizes of a count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExpertCountsDesc {
    /// Slots; 0 is allowed.
    pub slots: usize,
    /// Experts `E`, 1 to 8192.
    pub experts: usize,
    /// How ids are stored.
    pub ids: IdFormat,
    /// Rows of an expert are rounded up to a multiple of this in the offsets; 1 unless set.
    pub row_multiple: usize,
}

impl ExpertCountsDesc {
    /// The slots of each of `experts` experts among `slots`.
    pub const fn new(slots: usize, experts: usize) -> ExpertCountsDesc {
        ExpertCountsDesc { slots, experts, ids: IdFormat::I32, row_multiple: 1 }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "slots", self.slots)?;
        if self.experts > MAX_COUNTED as usize {
            let supported = format!("at most {MAX_COUNTED}");
            return Err(Error::unsupported(OPERATION, "experts", supported, self.experts));
        }
        shape::positive(OPERATION, "experts", self.experts)?;
        shape::positive(OPERATION, "row_multiple", self.row_multiple)?;
        let tiles = crate::experts::tiles::max_tiles(self.slots, self.experts, self.row_multiple);
        shape::product_i32(OPERATION, "row_multiple", &[self.row_multiple, tiles]).map(drop)
    }
}

settings!(ExpertCountsDesc { ids: IdFormat, row_multiple: usize });

/// Buffers of a count.
#[non_exhaustive]
pub struct ExpertCountsArgs<'a> {
    /// `[slots]`; one outside `0..E` is nobody's.
    pub ids: Ids<'a>,
    /// `[E]`, written.
    pub counts: Out<'a, i32>,
    /// `[E + 1]`, written: first row of each expert, then the number of rows.
    pub offsets: Option<Out<'a, i32>>,
    /// At least [`workspace_bytes`].
    pub workspace: &'a mut Workspace,
}

impl<'a> ExpertCountsArgs<'a> {
    /// The counts of `ids`, without offsets.
    pub fn new(
        ids: impl Into<Ids<'a>>,
        counts: impl Into<Out<'a, i32>>,
        workspace: &'a mut Workspace,
    ) -> ExpertCountsArgs<'a> {
        ExpertCountsArgs { ids: ids.into(), counts: counts.into(), offsets: None, workspace }
    }
}

buffers!(ExpertCountsArgs<'a> { offsets: Out<i32> });

/// Workspace of [`forward`] in bytes, whatever is counted.
pub const fn workspace_bytes() -> usize {
    BARRIER_HEADER
}

/// Chooses kernel and grid: eight steps of a warp or more, as many blocks as the device has multiprocessors.
///
/// # Errors
/// Those of [`ExpertCountsDesc::validate`].
pub fn select(desc: &ExpertCountsDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let kernel = Kernel::ExpertCounts { ids_bytes: desc.ids.bytes() };
    let blocks = desc.slots.div_ceil(8 * kernel.threads() as usize) as u32;
    Ok(Selection::new(kernel, [blocks.clamp(1, device.multiprocessors), 1, 1]))
}

/// Counts slots by expert.
///
/// With no slots the results are set to zero, and nothing is launched.
///
/// # Errors
/// Those of [`ExpertCountsDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`],
/// [`Error::WorkspaceTooSmall`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &ExpertCountsDesc,
    args: ExpertCountsArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let counts = scope.write("counts", args.counts, desc.experts, SCALAR)?;
    let offsets = scope.write_some("offsets", args.offsets, desc.experts + 1, SCALAR)?;
    let ids = args.ids.open(&scope, "ids", desc.ids, desc.slots)?;
    let workspace = args.workspace.open(&scope, workspace_bytes())?;
    // What blocks add to.
    scope.zero(counts.address(), desc.experts * size_of::<i32>())?;
    if desc.slots == 0 {
        let bytes = (desc.experts + 1) * size_of::<i32>();
        return optional(&offsets).map_or(Ok(()), |offsets| scope.zero(offsets, bytes));
    }
    scope.launch(
        &selection,
        ExpertCountsParams {
            ids: ids.address().into(),
            num_ids: desc.slots as u32,
            experts: desc.experts as u32,
            row_multiple: desc.row_multiple as u32,
            counts: counts.address().into(),
            offsets: optional(&offsets).into(),
            workspace: workspace.address().into(),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::device::A100;

    #[test]
    fn faults_name_their_field() {
        let fault = |desc: ExpertCountsDesc| select(&desc, &A100).unwrap_err().argument().unwrap();
        let desc = ExpertCountsDesc::new(1000, 8192);
        assert_eq!(select(&desc, &A100).unwrap().grid, [1, 1, 1]);
        assert_eq!(select(&ExpertCountsDesc::new(1 << 20, 8), &A100).unwrap().grid, [108, 1, 1]);
        assert_eq!(fault(ExpertCountsDesc { experts: 8193, ..desc }), "experts");
        assert_eq!(fault(ExpertCountsDesc { row_multiple: 0, ..desc }), "row_multiple");
        assert_eq!(fault(ExpertCountsDesc { row_multiple: 1 << 25, ..desc }), "row_multiple");
        assert_eq!(fault(ExpertCountsDesc { slots: 1 << 31, ..desc }), "slots");
    }
}
