//! Variants of what computes on slots.

use super::tiles::{BLOCK_WARPS, Tile};
use crate::rules::kinds::{Dtype, Layout};

/// How the outputs of a product's weight fold into columns of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fold {
    /// One column an output.
    Plain,
    /// A column from gate and up, which have an address each.
    Glu,
    /// A column from gate and up, which alternate.
    Iglu,
}

impl Fold {
    /// Every form.
    pub const ALL: [Fold; 3] = [Fold::Plain, Fold::Glu, Fold::Iglu];

    /// The word in kernel names.
    pub const fn name(self) -> &'static str {
        match self {
            Fold::Plain => "plain",
            Fold::Glu => "glu",
            Fold::Iglu => "iglu",
        }
    }
}

/// One GEMM for all experts: rows of A by slot, B by the tile's expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Gemm {
    /// Type of all matrices.
    pub dtype: Dtype,
    /// A block's share.
    pub tile: Tile,
    /// How weight outputs fold into columns.
    pub fold: Fold,
    /// Memory order of the weight.
    pub layout: Layout,
}

impl Gemm {
    /// Tiles by falling `bm`; the selection walks them.
    pub const fn tiles(dtype: Dtype) -> &'static [Tile] {
        const HALF: [Tile; 3] =
            [Tile::new(128, 128, 64, 2, 2, 3), Tile::new(64, 128, 64, 2, 2, 3), Tile::new(16, 128, 64, 1, 4, 4)];
        const SINGLE: [Tile; 2] = [Tile::new(64, 64, 32, 2, 2, 3), Tile::new(16, 64, 32, 1, 4, 4)];
        match dtype {
            Dtype::Bf16 | Dtype::F16 => &HALF,
            Dtype::F32 => &SINGLE,
        }
    }

    /// Tiles of the same heights with twice the columns and warps, for weights that are wide enough: a row of A is fetched half as often.
    pub const fn wide_tiles(dtype: Dtype) -> &'static [Tile] {
        const HALF: [Tile; 2] = [Tile::new(128, 256, 64, 2, 4, 3), Tile::new(64, 256, 64, 2, 4, 3)];
        match dtype {
            Dtype::Bf16 | Dtype::F16 => &HALF,
            Dtype::F32 => &[],
        }
    }

    /// Dynamic shared memory in bytes: the stages of A and B.
    pub const fn shared_bytes(&self) -> u32 {
        let t = &self.tile;
        t.stages * (t.bm + t.bn) * t.bk * self.dtype.bytes()
    }

    /// Output columns that one block writes: half of `bn` where gate and up fold into one.
    pub const fn out_columns(&self) -> u32 {
        match self.fold {
            Fold::Plain => self.tile.bn,
            Fold::Glu | Fold::Iglu => self.tile.bn / 2,
        }
    }
}

/// [`Gemm`] by wgmma and TMA: two warpgroups multiply, a third fetches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GemmHopper {
    /// Type of all matrices, of 16 bits.
    pub dtype: Dtype,
    /// How weight outputs fold into columns.
    pub fold: Fold,
    /// Memory order of the weight.
    pub layout: Layout,
}

impl GemmHopper {
    /// The types it multiplies.
    pub const DTYPES: [Dtype; 2] = [Dtype::Bf16, Dtype::F16];

    /// A block's share, of the warps that multiply.
    pub const TILE: Tile = Tile::new(128, 256, 64, 8, 1, 4);

    /// Threads of a block: those that multiply, and the warpgroup that fetches.
    pub const THREADS: u32 = GemmHopper::TILE.threads() + 128;

    /// Dynamic shared memory in bytes: the stages of A and B, an f32 slab of 64 x 64 for each warpgroup that multiplies, three barriers a stage.
    pub const SHARED_BYTES: u32 = {
        let t = &GemmHopper::TILE;
        t.stages * ((t.bm + t.bn) * t.bk * 2 + 24) + t.bm * 64 * 4
    };

    /// Bytes behind those that a warpgroup of the way back has: the sums of its 64 rows, and a word.
    pub const SUMS_BYTES: u32 = 64 * 4 + 16;

    /// [`SHARED_BYTES`](Self::SHARED_BYTES) of the way back.
    pub const BACKWARD_SHARED_BYTES: u32 = GemmHopper::SHARED_BYTES + 2 * GemmHopper::SUMS_BYTES;

    /// Output columns of a tile.
    pub const fn out_columns(&self) -> u32 {
        match self.fold {
            Fold::Plain => GemmHopper::TILE.bn,
            Fold::Glu | Fold::Iglu => GemmHopper::TILE.bn / 2,
        }
    }

    /// Weight outputs and depths in a box of the weight's tensor maps: 128 bytes of what lies side by side.
    pub const fn map_box(&self) -> (u32, u32) {
        match self.layout {
            Layout::Nk => (128, 64),
            _ => (64, 64),
        }
    }
}

/// [`Gemm`] for few rows, with the weight's outputs as the M side of the products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GemmSwapped {
    /// Type of all matrices, of 16 bits.
    pub dtype: Dtype,
    /// How weight outputs fold into columns.
    pub fold: Fold,
    /// Memory order of the weight.
    pub layout: Layout,
    /// Whether each token's rows are added up at the end.
    pub combines: bool,
}

impl GemmSwapped {
    /// The types it multiplies.
    pub const DTYPES: [Dtype; 2] = [Dtype::Bf16, Dtype::F16];

    /// A block's share.
    pub const TILE: Tile = Tile::new(16, 64, 64, 1, 4, 8);

    /// Dynamic shared memory in bytes: the stages of A and B.
    pub const SHARED_BYTES: u32 = {
        let t = &GemmSwapped::TILE;
        t.stages * (t.bm + t.bn) * t.bk * 2
    };

    /// Bytes that a block leaves of its sums, where several share a tile's depth.
    pub const PARTIAL_BYTES: usize = GemmSwapped::TILE.bm as usize * GemmSwapped::TILE.bn as usize * 4;

    /// Output columns of a tile.
    pub const fn out_columns(&self) -> u32 {
        match self.fold {
            Fold::Plain => GemmSwapped::TILE.bn,
            Fold::Glu | Fold::Iglu => GemmSwapped::TILE.bn / 2,
        }
    }
}

/// One GEMM for all experts over rows of any width, address and stride.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GemmAny {
    /// Type of all matrices.
    pub dtype: Dtype,
    /// Whether gate and up, which have an address each, fold into a column.
    pub gated: bool,
}

impl GemmAny {
    /// A block's share.
    pub const fn tile(&self) -> Tile {
        match self.dtype {
            Dtype::Bf16 | Dtype::F16 => Tile::new(64, 128, 64, 2, 2, 1),
            Dtype::F32 => Tile::new(64, 64, 32, 2, 2, 1),
        }
    }

    /// Output columns that one block writes.
    pub const fn out_columns(&self) -> u32 {
        if self.gated { self.tile().bn / 2 } else { self.tile().bn }
    }

    /// Dynamic shared memory in bytes: the stage, and after it the f32 tile in its place.
    pub const fn shared_bytes(&self) -> u32 {
        let t = self.tile();
        let (stage, tile) = ((t.bm + t.bn) * t.bk * self.dtype.bytes(), t.bm * t.bn * 4);
        if stage > tile { stage } else { tile }
    }

    pub(super) const fn fold(&self) -> Fold {
        if self.gated { Fold::Glu } else { Fold::Plain }
    }
}

/// A product for each expert over its rows: groups along K.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KGrouped {
    /// Type of both operands.
    pub dtype: Dtype,
    /// Whether matrices have any width, address and stride.
    pub any: bool,
}

impl KGrouped {
    /// A block's share: rows of a stage hold 256 bytes of either operand.
    pub const fn tile(&self) -> Tile {
        let stages = if self.any { 1 } else { 3 };
        match self.dtype {
            Dtype::Bf16 | Dtype::F16 => Tile::new(128, 128, 64, 2, 2, stages),
            Dtype::F32 => Tile::new(64, 64, 32, 2, 2, stages),
        }
    }

    /// Dynamic shared memory in bytes: the stages, and after them the f32 tile in their place.
    pub const fn shared_bytes(&self) -> u32 {
        let t = self.tile();
        let (stages, tile) = (t.stages * (t.bm + t.bn) * t.bk * self.dtype.bytes(), t.bm * t.bn * 4);
        if stages > tile { stages } else { tile }
    }
}

/// [`KGrouped`] by wgmma and TMA: two warpgroups multiply, a third fetches. Of one operand, whose rows may be gathered, a block has 128 columns,
/// of the other 256.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KGroupedHopper {
    /// Type of both operands, of 16 bits.
    pub dtype: Dtype,
    /// Whether it is B that may be gathered; else it is A.
    pub gathers_b: bool,
}

impl KGroupedHopper {
    /// The types it multiplies.
    pub const DTYPES: [Dtype; 2] = [Dtype::Bf16, Dtype::F16];

    const STAGES: u32 = 4;

    /// Threads of a block: those that multiply, and the warpgroup that fetches.
    pub const THREADS: u32 = 384;

    /// Dynamic shared memory in bytes: stages of 64 rows of 384 columns, sums of columns of each warp that multiplies, three barriers a stage.
    pub const SHARED_BYTES: u32 = KGroupedHopper::STAGES * (64 * 384 * 2 + 24) + 8 * 512;

    /// A block's share, of the warps that multiply.
    pub const fn tile(&self) -> Tile {
        let [bm, bn] = if self.gathers_b { [256, 128] } else { [128, 256] };
        Tile::new(bm, bn, 64, 8, 1, KGroupedHopper::STAGES)
    }
}

/// Weighted sum of a token's expert outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Combine {
    /// Type of all matrices.
    pub dtype: Dtype,
    /// Whether rows have any width and begin on any element.
    pub any: bool,
}

impl Combine {
    /// Threads of a block.
    pub const THREADS: u32 = 256;

    /// Threads side by side on one token, each with 16 bytes of it: a power of two, at most a block.
    pub(super) const fn across(self, hidden: u32) -> u32 {
        let vectors = self.vectors(hidden).next_power_of_two();
        if vectors < Combine::THREADS { vectors } else { Combine::THREADS }
    }

    pub(super) const fn vectors(self, hidden: u32) -> u32 {
        hidden.div_ceil(16 / self.dtype.bytes())
    }

    /// Blocks for `tokens` > 0 rows of `hidden` > 0 elements: x over tokens, of which a block takes several where a row
    /// does not fill it, y over parts of a row.
    pub const fn grid(self, tokens: u32, hidden: u32) -> [u32; 3] {
        let tokens_per_block = Combine::THREADS / self.across(hidden);
        [tokens.div_ceil(tokens_per_block), self.vectors(hidden).div_ceil(Combine::THREADS), 1]
    }
}

/// Buffers of gradients that one launch measures or scales.
pub const GRADIENT_BUFFERS: u32 = 4;

/// Elements that a block adds up at once.
pub const GRADIENT_CHUNK: u32 = 1 << 15;

/// Bytes that a thread of a permutation moves at once, falling: the largest that divides a row is taken.
pub const PERMUTE_UNITS: [u32; 4] = [16, 8, 4, 2];

/// Units that a thread of a permutation moves.
pub const PERMUTE_BATCH: u32 = 4;

/// Blocks of a permutation of `rows` > 0 rows of `units` > 0 units: x over rows, of which a block takes several where a row does not fill
/// it, y over parts of a row.
pub const fn permute_grid(rows: u32, units: u32) -> [u32; 3] {
    let threads = BLOCK_WARPS * 32;
    let across = units.div_ceil(PERMUTE_BATCH).next_power_of_two();
    let across = if across < threads { across } else { threads };
    [rows.div_ceil(threads / across), units.div_ceil(threads * PERMUTE_BATCH), 1]
}

/// Threads of a block of the RMS normalisation, and so most that share a row.
pub const RMS_NORM_THREADS: u32 = 512;

/// Threads of a block that sums down columns: a warp for each of 32 rows at a time.
pub const COLUMN_PRODUCTS_THREADS: u32 = 1024;

/// Choices of a token by product keys, and experts of one unit that a token has: two for each lane.
pub const MAX_UNIT_TOP_K: u32 = 64;

/// Experts of one unit whose gradients a block sums: two for each lane.
pub const MAX_UNIT_SHARE: u32 = 64;

/// Weighted sum of a token's expert outputs, however many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CombineRagged {
    /// Type of the rows.
    pub dtype: Dtype,
    /// Whether rows have any width and begin on any element.
    pub any: bool,
}

/// The end of the name of a kernel for rows of any width.
pub(super) fn any_width(any: bool) -> &'static str {
    if any { "_any" } else { "" }
}
