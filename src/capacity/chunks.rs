//! Chunks: where rows come from when chunks of them change places.
//!
//! After tokens were exchanged between devices, the rows of a rank's local experts come rank by rank; products want them expert by expert, and what
//! goes back rank by rank again (TransformerEngine's `sort_chunks_by_index`). Sizes and order of the chunks stay on the device: [`forward`] makes of them the list that
//! [`crate::experts::permute`] goes by, for rows and for what belongs to rows, and the sizes in the new order.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{Kernel, MAX_CHUNKS};
use crate::runtime::builder::buffers;
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::ChunkRowsParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "chunks";

/// Sizes of a change of places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ChunksDesc {
    /// Chunks, at most 4096; 0 is allowed.
    pub chunks: usize,
    /// Rows, as many as all chunks have or more; 0 is allowed.
    pub rows: usize,
}

impl ChunksDesc {
    /// `chunks` chunks of `rows` rows together.
    pub const fn new(chunks: usize, rows: usize) -> ChunksDesc {
        ChunksDesc { chunks, rows }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        if self.chunks > MAX_CHUNKS as usize {
            return Err(Error::unsupported(OPERATION, "chunks", format!("at most {MAX_CHUNKS}"), self.chunks));
        }
        shape::size(OPERATION, "rows", self.rows).map(drop)
    }
}

/// Buffers of a change of places.
#[non_exhaustive]
pub struct ChunksArgs<'a> {
    /// `[chunks]`: rows of each chunk as they stand; a negative one is 0.
    pub sizes: In<'a, i32>,
    /// `[chunks]`: which chunk comes first, second, ...; one outside `0..chunks` is a chunk without rows.
    pub order: In<'a, i32>,
    /// `[rows]`, written: where each row comes from; -1 past the last chunk's, and where sizes that pass `rows` lead outside.
    pub source: Out<'a, i32>,
    /// `[chunks]`, written: `sizes` in the new order.
    pub new_sizes: Option<Out<'a, i32>>,
}

impl<'a> ChunksArgs<'a> {
    /// Chunks of `sizes` rows in another `order`.
    pub fn new(
        sizes: impl Into<In<'a, i32>>,
        order: impl Into<In<'a, i32>>,
        source: impl Into<Out<'a, i32>>,
    ) -> ChunksArgs<'a> {
        ChunksArgs { sizes: sizes.into(), order: order.into(), source: source.into(), new_sizes: None }
    }
}

buffers!(ChunksArgs<'a> { new_sizes: Out<i32> });

/// Chooses kernel and grid: four rows a thread or more.
///
/// # Errors
/// Those of [`ChunksDesc::validate`].
pub fn select(desc: &ChunksDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let blocks = desc.rows.div_ceil(4 * Kernel::ChunkRows.threads() as usize) as u32;
    Ok(Selection::new(Kernel::ChunkRows, [blocks.clamp(1, 2 * device.multiprocessors), 1, 1]))
}

/// Lists where each row comes from.
///
/// # Errors
/// Those of [`ChunksDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`]; and those
/// of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &ChunksDesc,
    args: ChunksArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let sizes = scope.read("sizes", args.sizes, desc.chunks, SCALAR)?;
    let order = scope.read("order", args.order, desc.chunks, SCALAR)?;
    let source = scope.write("source", args.source, desc.rows, SCALAR)?;
    let new_sizes = scope.write_some("new_sizes", args.new_sizes, desc.chunks, SCALAR)?;
    scope.launch(
        &selection,
        ChunkRowsParams {
            sizes: sizes.address().into(),
            order: order.address().into(),
            source: source.address().into(),
            new_sizes: optional(&new_sizes).into(),
            chunks: desc.chunks as u32,
            rows: desc.rows as u32,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::device::A100;

    #[test]
    fn faults_name_their_field() {
        let fault = |desc: ChunksDesc| select(&desc, &A100).unwrap_err().argument().unwrap();
        assert_eq!(select(&ChunksDesc::new(0, 0), &A100).unwrap().grid, [1, 1, 1]);
        assert_eq!(fault(ChunksDesc::new(4097, 10)), "chunks");
        assert_eq!(fault(ChunksDesc::new(4, 1 << 31)), "rows");
    }
}
