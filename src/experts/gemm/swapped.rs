//! The kernels for few rows: when they are chosen, and how many blocks share a tile's depth.

use super::desc::{GemmDesc, KernelSet, Output, Rows};
use super::fold;
use crate::experts::tiles::select_tile;
use crate::registry::{GemmSwapped, Kernel, Tile};
use crate::rules::{Dtype, Layout};
use crate::runtime::launch::Address;
use crate::runtime::params::{GemmParams, GemmSwappedMore, GemmSwappedParams, Pointer};
use crate::runtime::shape;
use crate::runtime::workspace::COUNTERS;
use crate::{DeviceInfo, Error, Selection};

/// Most blocks that share a tile's depth.
const MOST_SPLITS: u32 = 16;

/// A launch: which kernel, and what its blocks are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) kernel: GemmSwapped,
    /// Row tiles at most, those of a shared expert too.
    row_tiles: u32,
    columns: u32,
    splits: u32,
    /// Whether the kernel waits itself for the launch in front of it.
    waits: bool,
}

/// The plan where these kernels compute `desc`: 16-bit products in row tiles of their height, of any set. `layout` is that of
/// [`GemmDesc::vector_layout`].
///
/// At this height a product takes as long as its weight takes to come from DRAM, so nothing but bytes on their way counts. The kernel of the `sm_80` set
/// keeps 48 KiB a block in flight and has half as many blocks; this one 56 KiB.
pub(super) fn plan(
    operation: &'static str,
    desc: &GemmDesc,
    layout: Layout,
    device: &DeviceInfo,
) -> Result<Option<Plan>, Error> {
    let height = GemmSwapped::TILE.bm as usize;
    let fits = desc.kernels == KernelSet::Fastest
        && desc.output != Output::TokenSums
        && desc.tile_n.is_none()
        && desc.shared_depth.is_none()
        && GemmSwapped::DTYPES.contains(&desc.dtype)
        && device.shared_bytes_per_block >= GemmSwapped::SHARED_BYTES
        && match &desc.rows {
            Rows::Dense(rows) => {
                let tile = select_tile(desc.dtype, *rows, 1, device)?;
                tile.bm as usize == height || (desc.split && leaves_idle(desc, *rows, &tile, device))
            }
            Rows::Grouped(shape) => shape.tile_m == height,
        };
    if !fits {
        return Ok(None);
    }
    let kernel = GemmSwapped { dtype: desc.dtype, fold: fold(desc.weight.glu), layout, combines: false };
    let own = match &desc.rows {
        Rows::Dense(rows) => rows.div_ceil(height),
        Rows::Grouped(shape) => shape.max_tiles,
    };
    let row_tiles = shape::grid_x(operation, "rows", own.saturating_add(desc.shared_rows.div_ceil(height)) as u64)?;
    let columns = desc.n.div_ceil(kernel.out_columns() as usize) as u64;
    let tiles = shape::grid_x(operation, "n", columns.saturating_mul(row_tiles.into()))?;
    let splits = if desc.split { splits(tiles, desc.k, device) } else { 1 };
    let waits = device.compute_capability >= (9, 0);
    Ok(Some(Plan { kernel, row_tiles, columns: columns as u32, splits, waits }))
}

/// Most row tiles of a dense product that are taken although a taller tile costs less: each reads the weight from L2.
const MOST_DENSE_TILES: usize = 4;

/// Whether `tile`s of a dense product of few rows are fewer than a third of the multiprocessors. These have some 48 KiB on its way a block, so that so few
/// fetch the weight more slowly than L2 gives it to as many blocks as [`splits`] makes of four row tiles.
fn leaves_idle(desc: &GemmDesc, rows: usize, tile: &Tile, device: &DeviceInfo) -> bool {
    let columns = if desc.weight.glu.is_gated() { tile.bn / 2 } else { tile.bn } as usize;
    let blocks = rows.div_ceil(tile.bm as usize) * desc.n.div_ceil(columns);
    rows <= MOST_DENSE_TILES * GemmSwapped::TILE.bm as usize && 3 * blocks < device.multiprocessors as usize
}

/// Blocks that share a tile's depth: so many that each multiprocessor has one, as long as a block fills its pipeline.
fn splits(tiles: u32, k: usize, device: &DeviceInfo) -> u32 {
    let tile = &GemmSwapped::TILE;
    let stages = k.div_ceil(tile.bk as usize);
    let most = (stages / tile.stages as usize).clamp(1, MOST_SPLITS as usize) as u32;
    if tiles == 0 { 1 } else { device.multiprocessors.div_ceil(tiles).clamp(1, most) }
}

/// Bytes of the sums that blocks leave of any product on a device: [`Plan::partial_bytes`] is less, as there are less than two blocks a
/// multiprocessor where depth is shared.
pub(crate) fn most_partial_bytes(dtype: Dtype, kernels: KernelSet, device: &DeviceInfo) -> usize {
    let some = GemmSwapped::DTYPES.contains(&dtype) && kernels == KernelSet::Fastest;
    if some { 2 * device.multiprocessors as usize * GemmSwapped::PARTIAL_BYTES } else { 0 }
}

impl Plan {
    /// What is launched.
    pub(crate) fn selection(&self) -> Selection {
        let blocks = self.tiles() * self.splits;
        let selection = Selection::new(Kernel::GemmSwapped(self.kernel), [blocks, 1, 1]);
        Selection { programmatic: self.waits, ..selection }
    }

    /// The same with each token's rows added up at the end, where there are counters for that.
    pub(crate) fn combining(self) -> Option<Plan> {
        let plain = GemmSwapped { combines: false, fold: crate::registry::Fold::Plain, ..self.kernel };
        let counters = self.split_tiles() as usize + self.columns as usize;
        (self.kernel == plain && counters <= COUNTERS && self.tiles() > 0)
            .then_some(Plan { kernel: GemmSwapped { combines: true, ..plain }, ..self })
    }

    fn tiles(&self) -> u32 {
        self.row_tiles * self.columns
    }

    /// Tiles whose depth is shared.
    fn split_tiles(&self) -> u32 {
        if self.splits > 1 { self.tiles() } else { 0 }
    }

    /// Bytes of the sums that blocks leave for the last one of a tile.
    pub(crate) fn partial_bytes(&self) -> usize {
        self.split_tiles() as usize * self.splits as usize * GemmSwapped::PARTIAL_BYTES
    }

    /// Whether blocks count arrivals.
    pub(crate) fn counts(&self) -> bool {
        self.splits > 1 || self.kernel.combines
    }

    /// The launch's parameters; what is left of a [`Sum`] is not read.
    pub(super) fn params<'a>(
        &self,
        params: GemmParams<'a>,
        scratch: Option<Scratch<'a>>,
        sum: Option<Sum<'a>>,
    ) -> GemmSwappedParams<'a> {
        let (partials, counters) = scratch.map(|scratch| (scratch.partials, scratch.counters)).unzip();
        let at = |of: fn(&Sum<'a>) -> Option<Address<'a>>| Pointer::from(sum.as_ref().and_then(of));
        let more = GemmSwappedMore {
            row_tiles: self.row_tiles,
            splits: self.splits,
            partials: partials.into(),
            counters: counters.into(),
            y: at(|sum| Some(sum.y)),
            token_slot: at(|sum| Some(sum.token_slot)),
            residual: at(|sum| sum.residual),
            sum_bias: at(|sum| sum.bias),
            addend: at(|sum| sum.addend),
            addend_gate: at(|sum| sum.addend_gate),
            addend_scale: sum.map_or(1.0, |sum| sum.addend_scale),
            scale: sum.map_or(1.0, |sum| sum.scale),
            early: sum.map_or(0, |sum| u32::from(sum.early)),
            tokens: sum.map_or(0, |sum| sum.tokens),
            top_k: sum.map_or(0, |sum| sum.top_k),
        };
        GemmSwappedParams::with(params, more)
    }
}

/// What blocks of a product leave for each other, where [`Plan::counts`].
#[derive(Clone, Copy)]
pub(crate) struct Scratch<'a> {
    /// Of [`Plan::partial_bytes`].
    pub(crate) partials: Address<'a>,
    /// [`COUNTERS`] of a workspace.
    pub(crate) counters: Address<'a>,
}

/// Each token's sum, for a kernel that combines.
#[derive(Clone, Copy)]
pub(crate) struct Sum<'a> {
    pub(crate) y: Address<'a>,
    pub(crate) token_slot: Address<'a>,
    pub(crate) residual: Option<Address<'a>>,
    pub(crate) bias: Option<Address<'a>>,
    pub(crate) addend: Option<Address<'a>>,
    pub(crate) addend_gate: Option<Address<'a>>,
    pub(crate) addend_scale: f32,
    pub(crate) scale: f32,
    pub(crate) tokens: u32,
    pub(crate) top_k: u32,
    /// Whether the lists and the weights were there when the launch in front, which waits for its own predecessors, began: then they are read
    /// before it has ended.
    pub(crate) early: bool,
}

#[cfg(test)]
mod tests {
    use super::super::select;
    use super::*;
    use crate::experts::dispatched::SlotShape;
    use crate::experts::tiles::max_tiles;
    use crate::runtime::device::{A100, H100};

    /// A second product of so many tokens.
    fn down(tokens: usize, [experts, top_k, hidden, intermediate]: [usize; 4]) -> GemmDesc {
        let slots = tokens * top_k;
        let tiles = max_tiles(slots, experts, 16);
        let rows = Rows::Grouped(SlotShape::new(tokens, experts, Some(top_k), slots, 16, tiles));
        GemmDesc::new(Dtype::Bf16, rows, hidden, intermediate).split(true)
    }

    fn blocks(desc: &GemmDesc) -> u32 {
        let selection = select(desc, &H100).unwrap();
        assert!(matches!(selection.kernel.variant(), Kernel::GemmSwapped(_)), "{selection:?}");
        selection.grid[0]
    }

    #[test]
    fn every_multiprocessor_has_a_block() {
        let mixtral = [8, 2, 4096, 14336];
        assert_eq!(blocks(&down(1, mixtral)), 2 * 64 * 2);
        assert_eq!(blocks(&down(1, mixtral).split(false)), 2 * 64);
        assert_eq!(blocks(&down(1, [128, 8, 2048, 768])), 8 * 32);
        // Few stages are not shared.
        assert_eq!(blocks(&down(1, [8, 1, 768, 512])), 12);
        for shape in [mixtral, [8, 1, 64, 65536], [64, 1, 768, 3072], [60, 4, 2048, 1408]] {
            for tokens in [1, 2, 8] {
                let desc = down(tokens, shape);
                let plan = plan("test", &desc, Layout::Nk, &H100).unwrap().unwrap();
                assert!(plan.partial_bytes() <= most_partial_bytes(Dtype::Bf16, KernelSet::Fastest, &H100), "{plan:?}");
                assert!(plan.split_tiles() as usize <= COUNTERS);
            }
        }
    }

    #[test]
    fn other_sets_and_heights_have_their_own() {
        let desc = down(1, [8, 2, 4096, 14336]);
        let is = |desc: GemmDesc| matches!(select(&desc, &A100).unwrap().kernel.variant(), Kernel::GemmSwapped(_));
        assert!(is(desc));
        assert!(!is(desc.kernels(KernelSet::Sm80)));
        assert!(!is(desc.unaligned(true)));
        assert!(is(GemmDesc { rows: Rows::Dense(8), ..desc }));
        assert!(!is(GemmDesc { rows: Rows::Dense(800), ..desc }));
        // Some dozen rows, of which another kernel's tiles would be 32 on 108 multiprocessors, or 256.
        let dense = GemmDesc { rows: Rows::Dense(64), ..desc };
        assert!(is(dense));
        assert!(!is(dense.split(false)));
        assert!(!is(GemmDesc { n: 128 * 256, ..dense }));
        assert!(!is(GemmDesc { rows: Rows::Dense(65), ..desc }));
        assert_eq!(select(&GemmDesc { rows: Rows::Dense(0), ..desc }, &A100).unwrap().grid, [0, 1, 1]);
    }
}
