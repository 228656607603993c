//! Row groups: the lists of rows that lie by expert already, of which how many is known on the device alone.
//!
//! What a grouped product without a dispatch needs: `torch._grouped_mm`'s ends, counts, DeepGEMM's masked `[E, height]` rows, a batched product. The
//! lists are a [`Dispatched`] in which each row is a token of its own: row `r` reads row `r`, gathered or not, and a combine puts it back where it was.
//!
//! Whatever the numbers are, the lists stay within the rows that the descriptor has: one that is negative, falls below an earlier end or is too
//! large is cut. Nothing is read back, so a graph serves any numbers.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::experts::tiles::max_tiles;
use crate::experts::{Dispatched, SlotShape};
use crate::registry::Kernel;
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::RowGroupsParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Error, In, Kernels, Selection};

const OPERATION: &str = "row_groups";

/// Where the rows of an expert lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RowLayout {
    /// One expert's behind another's. `numbers[e]` is where those of expert `e` end: the offs of `torch._grouped_mm`. Rows from the last end on are
    /// nobody's. An end below an earlier one gives no rows.
    Ends {
        /// Rows of all experts, and of nobody.
        rows: usize,
    },
    /// One expert's behind another's, `numbers[e]` of expert `e`.
    Counts {
        /// Rows of all experts, and of nobody.
        rows: usize,
    },
    /// `[E, height]`, of which expert `e` has the first `numbers[e]`: DeepGEMM's masked layout.
    Masked {
        /// Rows from an expert's first to the next one's.
        height: usize,
    },
    /// `[E, height]`, all of them; there are no numbers.
    Batched {
        /// Rows of each expert.
        height: usize,
    },
}

/// Sizes of row groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RowGroupsDesc {
    /// Where rows lie.
    pub layout: RowLayout,
    /// Experts `E`.
    pub experts: usize,
    /// Rows of a tile ([`crate::experts::tiles::select_tile`]).
    pub tile_m: usize,
}

impl RowGroupsDesc {
    /// The rows of `experts` experts, in tiles of `tile_m`.
    pub const fn new(layout: RowLayout, experts: usize, tile_m: usize) -> RowGroupsDesc {
        RowGroupsDesc { layout, experts, tile_m }
    }

    /// All rows, and the rows of an expert where each has a place of its own.
    fn sizes(&self) -> (usize, usize) {
        match self.layout {
            RowLayout::Ends { rows } | RowLayout::Counts { rows } => (rows, 0),
            RowLayout::Masked { height } | RowLayout::Batched { height } => {
                (self.experts.saturating_mul(height), height)
            }
        }
    }

    /// Sizes of the lists.
    pub fn shape(&self) -> SlotShape {
        let (rows, height) = self.sizes();
        let tile_m = self.tile_m.max(1);
        let tiles = match self.layout {
            RowLayout::Ends { .. } | RowLayout::Counts { .. } => max_tiles(rows, self.experts, tile_m),
            RowLayout::Masked { .. } | RowLayout::Batched { .. } => {
                self.experts.saturating_mul(height.div_ceil(tile_m))
            }
        };
        SlotShape::new(rows, self.experts, Some(1), rows, self.tile_m, tiles)
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::experts(OPERATION, self.experts)?;
        shape::positive(OPERATION, "tile_m", self.tile_m)?;
        shape::size(OPERATION, "layout", self.sizes().0)?;
        self.shape().validate(OPERATION)
    }
}

/// Buffers of row groups.
#[non_exhaustive]
pub struct RowGroupsArgs<'a> {
    /// `[E]`: ends or counts; exactly where the layout has numbers.
    pub numbers: Option<In<'a, i32>>,
    /// The lists, written; made for at least [`RowGroupsDesc::shape`].
    pub dispatched: &'a mut Dispatched,
}

impl<'a> RowGroupsArgs<'a> {
    /// `numbers` to `dispatched`.
    pub fn new(numbers: impl Into<In<'a, i32>>, dispatched: &'a mut Dispatched) -> RowGroupsArgs<'a> {
        RowGroupsArgs { numbers: Some(numbers.into()), dispatched }
    }

    /// Of a batched layout.
    pub fn batched(dispatched: &'a mut Dispatched) -> RowGroupsArgs<'a> {
        RowGroupsArgs { numbers: None, dispatched }
    }
}

/// Chooses kernel and grid: four rows a thread.
///
/// # Errors
/// Those of [`RowGroupsDesc::validate`].
pub fn select(desc: &RowGroupsDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let threads = Kernel::RowGroups.threads() as usize;
    let wanted = desc.sizes().0.div_ceil(4 * threads).max(desc.experts.div_ceil(threads));
    let blocks = wanted.clamp(1, 2 * device.multiprocessors.max(1) as usize) as u32;
    Ok(Selection::new(Kernel::RowGroups, [blocks, 1, 1]))
}

/// Makes the lists.
///
/// # Errors
/// Those of [`RowGroupsDesc::validate`]; [`Error::Missing`] or [`Error::Unexpected`] for numbers against the layout; those of a buffer:
/// [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &RowGroupsDesc,
    args: RowGroupsArgs<'_>,
) -> Result<(), Error> {
    let (operation, argument) = (OPERATION, "numbers");
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(operation, kernels, stream)?;
    let kind = match desc.layout {
        RowLayout::Ends { .. } => 0,
        RowLayout::Counts { .. } => 1,
        RowLayout::Masked { .. } => 2,
        RowLayout::Batched { .. } => 3,
    };
    match (desc.layout, args.numbers.is_some()) {
        (RowLayout::Batched { .. }, true) => {
            return Err(Error::Unexpected { operation, argument, reason: "the layout is Batched" });
        }
        (RowLayout::Batched { .. }, false) | (_, true) => {}
        (_, false) => return Err(Error::Missing { operation, argument, reason: "the layout is not Batched" }),
    }
    let numbers = scope.read_some(argument, args.numbers, desc.experts, SCALAR)?;
    let lists = args.dispatched.fill(&scope, &desc.shape())?;
    let (rows, height) = desc.sizes();
    let at = lists.addresses();
    scope.launch(
        &selection,
        RowGroupsParams {
            numbers: optional(&numbers).into(),
            counts: at.counts.into(),
            offsets: at.offsets.into(),
            slot_token: at.slot_token.into(),
            token_slot: at.token_slot.into(),
            tiles: at.tiles.into(),
            num_tiles: at.num_tiles.into(),
            kind,
            experts: desc.experts as u32,
            rows: rows as u32,
            height: height as u32,
            tile_m: desc.tile_m as u32,
        },
    )?;
    lists.filled();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::device::A100;

    #[test]
    fn faults_name_their_field() {
        let desc = |layout, experts, tile_m| select(&RowGroupsDesc::new(layout, experts, tile_m), &A100);
        let fault = |layout, experts, tile_m| desc(layout, experts, tile_m).unwrap_err().argument().unwrap();
        assert!(desc(RowLayout::Ends { rows: 0 }, 1, 16).is_ok());
        assert_eq!(fault(RowLayout::Counts { rows: 8 }, 0, 16), "experts");
        assert_eq!(fault(RowLayout::Counts { rows: 8 }, 8, 0), "tile_m");
        assert_eq!(fault(RowLayout::Ends { rows: 1 << 31 }, 8, 16), "layout");
        assert_eq!(fault(RowLayout::Masked { height: 1 << 29 }, 8, 16), "layout");
    }

    #[test]
    fn tiles_are_counted_at_their_worst() {
        let tiles = |layout| RowGroupsDesc::new(layout, 3, 16).shape().max_tiles;
        assert_eq!(tiles(RowLayout::Ends { rows: 40 }), max_tiles(40, 3, 16));
        assert_eq!(tiles(RowLayout::Masked { height: 17 }), 6);
        assert_eq!(tiles(RowLayout::Batched { height: 16 }), 3);
    }
}
