//! Every kernel variant that exists, listed once.
//!
//! `build.rs` renders a PTX module for each entry of `all`; `src/` selects entries, and takes launch geometry from the
//! same values that the template was rendered with. The file is compiled into both, so it depends on nothing but the kinds.

use crate::rules::kinds::{Dtype, Layout, Score};

/// Oldest architecture a variant runs on. `sm_80` PTX is compiled forward by the driver for every later GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Arch {
    /// Ampere and later.
    Sm80,
    /// Hopper alone: architecture-specific code runs on no other compute capability than 9.0.
    Sm90a,
    /// Blackwell of data centres alone: 10.0.
    Sm100a,
}

impl Arch {
    /// Whether a device of this compute capability runs it.
    pub const fn runs_on(self, (major, minor): (u32, u32)) -> bool {
        match self {
            Arch::Sm80 => major >= 8,
            Arch::Sm90a => major == 9 && minor == 0,
            Arch::Sm100a => major == 10 && minor == 0,
        }
    }

    /// The `.target` of the PTX.
    pub const fn target(self) -> &'static str {
        match self {
            Arch::Sm80 => "sm_80",
            Arch::Sm90a => "sm_90a",
            Arch::Sm100a => "sm_100a",
        }
    }
}

/// A thread block's share of a GEMM: `bm x bn` accumulators, `bk` deep stages, `warps_m x warps_n` warps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tile {
    /// Rows.
    pub bm: u32,
    /// Weight outputs: columns, or gate and up of half as many.
    pub bn: u32,
    /// Depth of a stage.
    pub bk: u32,
    /// Warps side by side over the rows.
    pub warps_m: u32,
    /// Warps side by side over the weight outputs.
    pub warps_n: u32,
    /// Stages in flight.
    pub stages: u32,
}

impl Tile {
    const fn new(bm: u32, bn: u32, bk: u32, warps_m: u32, warps_n: u32, stages: u32) -> Tile {
        Tile { bm, bn, bk, warps_m, warps_n, stages }
    }

    /// Threads of a block.
    pub const fn threads(&self) -> u32 {
        self.warps_m * self.warps_n * 32
    }

    fn constants(&self) -> [(&'static str, Constant); 6] {
        let Tile { bm, bn, bk, warps_m, warps_n, stages } = *self;
        [("bm", bm), ("bn", bn), ("bk", bk), ("warps_m", warps_m), ("warps_n", warps_n), ("stages", stages)]
            .map(|(name, value)| (name, Constant::Int(value)))
    }

    /// `bm x bn x bk`, the word in kernel names.
    pub fn name(&self) -> String {
        format!("{}x{}x{}", self.bm, self.bn, self.bk)
    }
}

/// `logits = x W^T + bias` in f32 arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Router {
    /// Type of x.
    pub x: Dtype,
    /// Type of the router's weight: that of x, or f32.
    pub weight: Dtype,
    /// How the work is cut.
    pub shape: RouterShape,
}

/// The router product's way back: f32 gradients of logits times rows of another type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouterBackward {
    /// Type of the rows: the router's weight, or x.
    pub b: Dtype,
    /// Type of the result.
    pub out: Dtype,
}

impl RouterBackward {
    /// Rows of a block.
    pub const ROWS: u32 = 64;
    /// Columns of a block.
    pub const COLUMNS: u32 = 128;
    /// Depth of a stage.
    pub const DEPTH: u32 = 32;

    /// Blocks that a multiprocessor holds at once.
    pub const fn resident_blocks(&self) -> u32 {
        if matches!(self.b, Dtype::F32) { 1 } else { 2 }
    }
}

/// How a router's work is cut into blocks, and by which unit its products are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RouterShape {
    /// 64 tokens by 64 experts a block, in f32.
    Tile,
    /// One warp for an expert and up to four tokens, in f32: for a few tokens, where every SM must pull its part of the weight.
    Warp,
    /// 64 tokens by 64 experts a block, in f32, of rows of any width that begin on any element.
    Any,
    /// 128 tokens by 128 experts a block on tensor cores.
    Mma128,
    /// 64 tokens by 64 experts.
    Mma64,
    /// 32 tokens by 64 experts.
    Mma32,
    /// 16 tokens by 8 experts a block on tensor cores, whose warps share the depth: for a few tokens.
    Few,
}

impl RouterShape {
    /// Every cut.
    pub const ALL: [RouterShape; 7] = [
        RouterShape::Tile,
        RouterShape::Warp,
        RouterShape::Any,
        RouterShape::Mma128,
        RouterShape::Mma64,
        RouterShape::Mma32,
        RouterShape::Few,
    ];

    /// Those on tensor cores. All of them give a token the same bits.
    pub const TENSOR: [RouterShape; 4] =
        [RouterShape::Mma128, RouterShape::Mma64, RouterShape::Mma32, RouterShape::Few];

    /// Tokens and experts that one block covers.
    pub const fn block(self) -> (u32, u32) {
        match self {
            RouterShape::Tile | RouterShape::Any | RouterShape::Mma64 => (64, 64),
            RouterShape::Warp => (4, 8),
            RouterShape::Mma128 => (128, 128),
            RouterShape::Mma32 => (32, 64),
            RouterShape::Few => (16, 8),
        }
    }

    /// Threads of a block.
    pub const fn threads(self) -> u32 {
        256
    }

    /// Whether tensor cores make the products.
    pub const fn is_tensor(self) -> bool {
        matches!(self, RouterShape::Mma128 | RouterShape::Mma64 | RouterShape::Mma32 | RouterShape::Few)
    }

    /// Warps over tokens and over experts, and stages in flight, of a tile on tensor cores.
    const fn tile(self) -> [u32; 3] {
        match self {
            RouterShape::Mma128 => [2, 4, 3],
            _ => [2, 4, 4],
        }
    }

    /// The word in kernel names.
    pub const fn name(self) -> &'static str {
        match self {
            RouterShape::Tile => "tile",
            RouterShape::Warp => "warp",
            RouterShape::Any => "any",
            RouterShape::Mma128 => "mma128x128",
            RouterShape::Mma64 => "mma64x64",
            RouterShape::Mma32 => "mma32x64",
            RouterShape::Few => "few",
        }
    }
}

impl Router {
    /// Whether the products of such numbers are exact on tensor cores: of 16 bits, and of a number of bf16 with the three parts of an f32.
    pub const fn is_exact(x: Dtype, weight: Dtype) -> bool {
        matches!((x, weight), (Dtype::Bf16, Dtype::Bf16 | Dtype::F32) | (Dtype::F16, Dtype::F16))
    }

    /// Whether there is such a kernel.
    pub const fn exists(&self) -> bool {
        match self.shape {
            RouterShape::Any => true,
            // The parts of so many columns of an f32 weight are more than the registers hold, and products outweigh bytes there.
            RouterShape::Mma128 if self.is_split() => false,
            shape => shape.is_tensor() == Router::is_exact(self.x, self.weight),
        }
    }

    const fn is_split(&self) -> bool {
        matches!(self.weight, Dtype::F32)
    }

    /// Dynamic shared memory in bytes: the stages, or the logits in f32.
    pub const fn shared_bytes(&self) -> u32 {
        let (tokens, experts) = self.shape.block();
        match self.shape {
            RouterShape::Mma128 | RouterShape::Mma64 | RouterShape::Mma32 => {
                let [_, _, stages] = self.shape.tile();
                let stage = tokens * 128 + experts * if self.is_split() { 256 } else { 128 };
                let [stages, logits] = [stages * stage, tokens * experts * 4];
                if stages > logits { stages } else { logits }
            }
            _ => 0,
        }
    }

    /// Blocks that a multiprocessor of sm_80 to sm_90 is asked to hold at once.
    const fn blocks_resident(&self) -> u32 {
        match self.shape {
            RouterShape::Mma128 | RouterShape::Few => 1,
            _ => 2,
        }
    }
}

/// Top-k gating, one warp a token, `values` logits in each lane's registers; with `dispatch` the same launch also
/// sorts the slots by expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Gate {
    /// From logits to scores; none: any rule there is, said at run time.
    pub score: Option<Score>,
    /// Logits a lane holds: experts up to `32 * values`.
    pub values: u32,
    /// Whether the slots are sorted too.
    pub dispatch: bool,
}

impl Gate {
    /// Every number of logits a lane may hold.
    pub const VALUES: [u32; 8] = [1, 2, 4, 8, 16, 32, 64, 128];

    /// The same where the rule is said at run time.
    pub const ANY_VALUES: [u32; 2] = [8, 32];

    /// Experts of a token: a lane holds one choice.
    pub const MAX_TOP_K: u32 = 32;

    /// Expert groups: a lane holds the score of one.
    pub const MAX_GROUPS: u32 = 32;

    /// Most experts that a choice is among.
    pub const fn max_experts(&self) -> u32 {
        32 * self.values
    }

    /// Most experts whose slots are counted: those, and where the rule may append any, as many as a token has.
    pub const fn max_counted(&self) -> u32 {
        self.max_experts() + if self.score.is_none() { Gate::MAX_TOP_K } else { 0 }
    }

    /// Warps of a block.
    pub const fn warps(&self) -> u32 {
        warps_for_experts(self.max_experts())
    }

    /// The word in kernel names.
    pub const fn score_name(&self) -> &'static str {
        match self.score {
            Some(score) => score.name(),
            None => "any",
        }
    }
}

/// Router, gating and dispatch of a few tokens in one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Route {
    /// From logits to scores; none: any rule there is, said at run time.
    pub score: Option<Score>,
    /// Logits a lane holds: experts up to `32 * values`.
    pub values: u32,
}

impl Route {
    /// Every number of logits a lane may hold.
    pub const VALUES: [u32; 2] = [4, 16];

    /// Most tokens that it is meant for: a warp each, of the block that chooses.
    pub const MAX_TOKENS: usize = 8;

    /// The gating and dispatch that it ends with.
    pub const fn gate(&self) -> Gate {
        Gate { score: self.score, values: self.values, dispatch: true }
    }
}

/// Top-k gating of more than 32 experts a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WideGate {
    /// From logits to scores.
    pub score: Score,
    /// Logits a lane holds: experts up to `32 * values`.
    pub values: u32,
}

impl WideGate {
    /// Every number of logits a lane may hold.
    pub const VALUES: [u32; 3] = [8, 32, 128];

    /// Experts of a token: a lane holds two choices.
    pub const MAX_TOP_K: u32 = 64;

    /// The gating of the same score and width for fewer choices.
    pub const fn gate(&self) -> Gate {
        Gate { score: Some(self.score), values: self.values, dispatch: false }
    }
}

/// Top-k gating that also measures the batch: balancing losses and router statistics from the same logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MeasuredGate {
    /// From logits to scores; none: any rule there is, said at run time.
    pub score: Option<Score>,
    /// Logits a lane holds: experts up to `32 * values`.
    pub values: u32,
}

impl MeasuredGate {
    /// The gating of the same score and width that measures nothing.
    pub const fn gate(&self) -> Gate {
        Gate { score: self.score, values: self.values, dispatch: false }
    }

    /// Blocks that a multiprocessor holds at once.
    pub const fn blocks_resident(&self) -> u32 {
        if self.values <= 8 { 2 } else { 1 }
    }

    /// Dynamic shared memory in bytes: rows of sums of each warp (two kinds of them where registers hold neither), two arrays of
    /// counters, 32 bytes of scratch a warp.
    pub const fn shared_bytes(&self) -> u32 {
        let (warps, row) = (self.gate().warps(), 4 * self.gate().max_experts());
        let rows = if self.values <= 64 { warps } else { 2 * warps };
        (rows + 2) * row + 32 * warps
    }
}

/// Dispatch alone, from ids that somebody else chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Dispatch {
    /// Most experts.
    pub max_experts: u32,
    /// Bytes of an id: 4 or 8.
    pub ids_bytes: u32,
}

/// Bytes of an id, as routers elsewhere leave them.
pub const IDS_BYTES: [u32; 2] = [4, 8];

impl Dispatch {
    /// Every limit on experts.
    pub const MAX_EXPERTS: [u32; 3] = [1024, 4096, 8192];

    /// Most experts whose slots are limited: a block has two warps for them.
    pub const MAX_LIMITED_EXPERTS: u32 = 4096;

    /// Warps of a block.
    pub const fn warps(&self) -> u32 {
        warps_for_experts(self.max_experts)
    }
}

/// Warps of a block that counts slots by expert: each warp keeps a counter for each expert in shared memory, 32 KiB in all.
const fn warps_for_experts(max_experts: u32) -> u32 {
    match max_experts {
        0..=1024 => 8,
        // A few more where a rule appends experts.
        1025..=4128 => 2,
        _ => 1,
    }
}

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

    const fn fold(&self) -> Fold {
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
    const fn across(self, hidden: u32) -> u32 {
        let vectors = self.vectors(hidden).next_power_of_two();
        if vectors < Combine::THREADS { vectors } else { Combine::THREADS }
    }

    const fn vectors(self, hidden: u32) -> u32 {
        hidden.div_ceil(16 / self.dtype.bytes())
    }

    /// Blocks for `tokens` > 0 rows of `hidden` > 0 elements: x over tokens, of which a block takes several where a row
    /// does not fill it, y over parts of a row.
    pub const fn grid(self, tokens: u32, hidden: u32) -> [u32; 3] {
        let tokens_per_block = Combine::THREADS / self.across(hidden);
        [tokens.div_ceil(tokens_per_block), self.vectors(hidden).div_ceil(Combine::THREADS), 1]
    }
}

/// Experts that tokens get where experts have a capacity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Admission {
    /// Experts up to this many.
    pub max_experts: u32,
}

impl Admission {
    /// Every limit on experts.
    pub const MAX_EXPERTS: [u32; 2] = [1024, 4096];

    /// Warps of a block.
    pub const fn warps(&self) -> u32 {
        warps_for_experts(self.max_experts)
    }
}

/// Tokens that a block of the affinity kernel transposes.
pub const AFFINITY_TOKENS: u32 = 32;

/// Most experts whose slots are counted alone.
pub const MAX_COUNTED: u32 = 8192;

/// Buffers of gradients that one launch measures or scales.
pub const GRADIENT_BUFFERS: u32 = 4;

/// Elements that a block adds up at once.
pub const GRADIENT_CHUNK: u32 = 1 << 15;

/// Most chunks of rows that change places at once.
pub const MAX_CHUNKS: u32 = 4096;

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

/// Tokens that a block of `load_importance` adds up.
pub const LOAD_IMPORTANCE_TOKENS: u32 = 256;

/// Keys of each of the two lists of product keys.
pub const MAX_PRODUCT_KEYS: u32 = 128;

/// Choices of a token by product keys, and experts of one unit that a token has: two for each lane.
pub const MAX_UNIT_TOP_K: u32 = 64;

/// Warps of the kernels that work by whole blocks of 256 threads.
pub const BLOCK_WARPS: u32 = 8;

/// Weighted sum of a token's expert outputs, however many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CombineRagged {
    /// Type of the rows.
    pub dtype: Dtype,
    /// Whether rows have any width and begin on any element.
    pub any: bool,
}

/// Balanced routing by Sinkhorn's iteration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sinkhorn {
    /// Experts up to this many.
    pub max_experts: u32,
}

impl Sinkhorn {
    /// Warps of a block.
    pub const fn warps(&self) -> u32 {
        warps_for_experts(self.max_experts)
    }
}

/// How the keys of one token lie in the registers of the routers that add noise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Spread {
    /// Experts that a lane holds.
    pub values: u32,
    /// Warps of a token: one, or all of the block.
    pub team: u32,
}

impl Spread {
    /// Every spread, by rising number of experts.
    pub const ALL: [Spread; 8] = {
        const fn spread(values: u32, team: u32) -> Spread {
            Spread { values, team }
        }
        [
            spread(1, 1),
            spread(2, 1),
            spread(4, 1),
            spread(8, 1),
            spread(16, 1),
            spread(16, 2),
            spread(16, 4),
            spread(16, 8),
        ]
    };

    /// Most experts.
    pub const fn max_experts(&self) -> u32 {
        32 * self.values * self.team
    }

    /// Warps of a block.
    pub const fn warps(&self) -> u32 {
        if self.team == 1 { BLOCK_WARPS } else { self.team }
    }

    /// Tokens that a block works on at once.
    pub const fn tokens(&self) -> u32 {
        self.warps() / self.team
    }

    /// Blocks that a multiprocessor holds at once: the kernels ask for registers of 16 warps.
    pub const fn resident_blocks(&self) -> u32 {
        16 / self.warps()
    }

    fn constants(&self) -> Vec<(&'static str, Constant)> {
        vec![
            ("values", Constant::Int(self.values)),
            ("team", Constant::Int(self.team)),
            ("warps", Constant::Int(self.warps())),
            ("max_experts", Constant::Int(self.max_experts())),
        ]
    }
}

/// Noisy top-k gating.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Noisy {
    /// Where a token's experts lie.
    pub spread: Spread,
    /// The second level of a hierarchy: experts of the groups that tokens chose.
    pub grouped: bool,
}

/// One compiled kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kernel {
    /// Scores of experts.
    Router(Router),
    /// Choice of experts, with dispatch or without.
    Gating(Gate),
    /// Scores of experts, choice and dispatch of a few tokens.
    Route(Route),
    /// Choice of more than 32 experts.
    GatingWide(WideGate),
    /// Slots that experts with a capacity keep by weight.
    KeepLargest,
    /// The correction bias that shares a batch out evenly.
    QuantileBias,
    /// The loss of importance and of loads under noise.
    LoadImportance,
    /// Slots sorted by expert.
    Dispatch(Dispatch),
    /// The same with each expert's rows rounded up to a multiple, and a limit on all rows.
    DispatchRows(Dispatch),
    /// Slots of each expert counted, and the sums of the counts.
    ExpertCounts {
        /// Bytes of an id: 4 or 8.
        ids_bytes: u32,
    },
    /// Expert numbers of each token from its row of a map of all experts.
    MapToIds,
    /// The other way.
    IdsToMap {
        /// Bytes of an id: 4 or 8.
        ids_bytes: u32,
    },
    /// Where rows come from when chunks of rows change places.
    ChunkRows,
    /// Rows of one matrix as another, by number.
    Permute {
        /// Bytes that a thread moves at once.
        unit: u32,
    },
    /// The experts' products.
    Gemm(Gemm),
    /// The experts' products on Hopper.
    GemmHopper(GemmHopper),
    /// The experts' products of few rows.
    GemmSwapped(GemmSwapped),
    /// The experts' products, whatever the rows' width.
    GemmAny(GemmAny),
    /// The second product's way back, with the activation's behind it: a plain product's shape.
    GemmBackward(Gemm),
    /// The same whatever the rows' width.
    GemmBackwardAny(GemmAny),
    /// Products over the experts' rows.
    KGrouped(KGrouped),
    /// Sums over a token's experts.
    Combine(Combine),
    /// Which of its choices a token gets under a capacity.
    Admission(Admission),
    /// What each expert thinks of each token.
    Affinity,
    /// Each expert's best tokens.
    ExpertChoice,
    /// The slots of every token.
    TokenSlots,
    /// Sums over as many slots as a token has.
    CombineRagged(CombineRagged),
    /// Balanced assignment (BASE).
    Base,
    /// Balanced routing by optimal transport (S-BASE).
    Sinkhorn(Sinkhorn),
    /// Experts by token id.
    Hash,
    /// Noisy top-k gating with importance, load and their losses.
    Noisy(Noisy),
    /// Choice of experts, with losses and statistics.
    MeasuredGating(MeasuredGate),
    /// Balancing losses of totals.
    BalanceLoss,
    /// The correction bias after a step.
    UpdateBias,
    /// Router's expert numbers to those of a device.
    ExpertMap {
        /// Bytes of an id: 4 or 8.
        ids_bytes: u32,
    },
    /// What is wrong with lists from elsewhere.
    CheckLists,
    /// Lists of rows that lie by expert.
    RowGroups,
    /// Experts drawn from the router's distribution.
    Sampled(Spread),
    /// Multiplicative noise on a matrix.
    Jitter(Dtype),
    /// A noise state moved on.
    NoiseState,
    /// The gradient of a gating's logits.
    GatingBackward {
        /// Every rule and loss, else those of the common models.
        any: bool,
    },
    /// Gradients of the factors of a gating's weights.
    ScaleSums,
    /// Slots of each expert in each sequence.
    SequenceCounts,
    /// The gradients of a noisy gating's products.
    NoisyBackward {
        /// The second level of a hierarchy.
        grouped: bool,
    },
    /// The gradient of sampled routing's logits.
    SampledBackward,
    /// The gradient of the logits by which experts chose tokens.
    AffinityBackward,
    /// The gradient of the loss of importance and of loads.
    LoadImportanceBackward,
    /// The way back from rows of length 1 to what they were made of, of this type.
    UnitBackward(Dtype),
    /// The gradient of both lists' scores of product keys.
    ProductKeysBackward,
    /// Back through the activation between the products.
    ActivationBackward(Dtype),
    /// Norm, finiteness and clipping factor of gradients.
    GradientNorm,
    /// Gradients times a factor.
    GradientScale,
    /// Back through the sums over a token's experts.
    CombineBackward(Combine),
    /// Back through the router's product.
    RouterBackward(RouterBackward),
    /// Rows divided by their root mean square.
    RmsNorm(Dtype),
    /// Back through that.
    RmsNormBackward(Dtype),
    /// Sums down columns of rows times rows.
    ColumnProducts(Dtype),
    /// Experts by the best pairs of keys.
    ProductKeys,
    /// Experts of one hidden unit.
    UnitExperts(Dtype),
    /// Gradients of the weights of choices.
    ChoiceBackward(Dtype),
    /// A shared expert's gate, and its slope.
    SigmoidGate,
    /// One expert for the tokens of a sequence.
    BySequence {
        /// Bytes of an index: 4 or 8.
        ids_bytes: u32,
    },
    /// The tokens of each bank of experts, by their types.
    TokenBanks {
        /// Bytes of a type: 4 or 8.
        ids_bytes: u32,
    },
}

impl Kernel {
    /// The whole specialisation in one word: the PTX entry's name, the module's file name, the name of its tests.
    pub fn name(&self) -> String {
        match self {
            Kernel::Router(k) => format!("router_{}_{}_{}", k.x, k.weight, k.shape.name()),
            Kernel::Gating(k) => {
                format!("gating_{}_v{}{}", k.score_name(), k.values, if k.dispatch { "_dispatch" } else { "" })
            }
            Kernel::Route(k) => format!("route_{}_v{}", k.gate().score_name(), k.values),
            Kernel::GatingWide(k) => format!("{}_wide", Kernel::Gating(k.gate()).name()),
            Kernel::Dispatch(k) => format!("dispatch_e{}{}", k.max_experts, wide(k.ids_bytes)),
            Kernel::DispatchRows(k) => format!("dispatch_rows_e{}{}", k.max_experts, wide(k.ids_bytes)),
            Kernel::ExpertCounts { ids_bytes } => format!("expert_counts{}", wide(*ids_bytes)),
            Kernel::MapToIds => "map_to_ids".into(),
            Kernel::IdsToMap { ids_bytes } => format!("ids_to_map{}", wide(*ids_bytes)),
            Kernel::ChunkRows => "chunk_rows".into(),
            Kernel::Permute { unit } => format!("permute_b{unit}"),
            Kernel::Gemm(k) => {
                format!("gemm_{}_{}_{}_{}", k.dtype, k.tile.name(), k.fold.name(), k.layout.name())
            }
            Kernel::GemmHopper(k) => {
                let tile = GemmHopper::TILE.name();
                format!("gemm_{}_{tile}_{}_{}_sm90a", k.dtype, k.fold.name(), k.layout.name())
            }
            Kernel::GemmSwapped(k) => {
                let (tile, end) = (GemmSwapped::TILE.name(), if k.combines { "_combine" } else { "" });
                format!("gemm_{}_{tile}_{}_{}_swapped{end}", k.dtype, k.fold.name(), k.layout.name())
            }
            Kernel::GemmAny(k) => format!("gemm_{}_{}_{}_any", k.dtype, k.tile().name(), k.fold().name()),
            Kernel::GemmBackward(k) => format!("gemm_backward_{}_{}_{}", k.dtype, k.tile.name(), k.layout.name()),
            Kernel::GemmBackwardAny(k) => format!("gemm_backward_{}_{}_any", k.dtype, k.tile().name()),
            Kernel::KGrouped(k) => format!("k_grouped_{}_{}{}", k.dtype, k.tile().name(), any_width(k.any)),
            Kernel::Combine(k) => format!("combine_{}{}", k.dtype, any_width(k.any)),
            Kernel::Admission(k) => format!("admission_e{}", k.max_experts),
            Kernel::Affinity => "affinity".into(),
            Kernel::ExpertChoice => "expert_choice".into(),
            Kernel::TokenSlots => "token_slots".into(),
            Kernel::CombineRagged(k) => format!("combine_ragged_{}{}", k.dtype, any_width(k.any)),
            Kernel::Base => "base".into(),
            Kernel::Sinkhorn(k) => format!("sinkhorn_e{}", k.max_experts),
            Kernel::Hash => "hash".into(),
            Kernel::Noisy(k) => {
                format!("noisy_{}e{}", if k.grouped { "grouped_" } else { "" }, k.spread.max_experts())
            }
            Kernel::MeasuredGating(k) => format!("{}_measured", Kernel::Gating(k.gate()).name()),
            Kernel::KeepLargest => "keep_largest".into(),
            Kernel::QuantileBias => "quantile_bias".into(),
            Kernel::LoadImportance => "load_importance".into(),
            Kernel::BalanceLoss => "balance_loss".into(),
            Kernel::UpdateBias => "update_bias".into(),
            Kernel::ExpertMap { ids_bytes } => format!("expert_map{}", wide(*ids_bytes)),
            Kernel::CheckLists => "check_lists".into(),
            Kernel::RowGroups => "row_groups".into(),
            Kernel::Sampled(spread) => format!("sampled_e{}", spread.max_experts()),
            Kernel::Jitter(dtype) => format!("jitter_{dtype}"),
            Kernel::NoiseState => "noise_state".into(),
            Kernel::GatingBackward { any } => format!("gating_backward{}", if *any { "_any" } else { "" }),
            Kernel::ScaleSums => "scale_sums".into(),
            Kernel::NoisyBackward { grouped } => format!("noisy_backward{}", if *grouped { "_grouped" } else { "" }),
            Kernel::SequenceCounts => "sequence_counts".into(),
            Kernel::SampledBackward => "sampled_backward".into(),
            Kernel::AffinityBackward => "affinity_backward".into(),
            Kernel::LoadImportanceBackward => "load_importance_backward".into(),
            Kernel::ProductKeysBackward => "product_keys_backward".into(),
            Kernel::UnitBackward(dtype) => format!("unit_backward_{dtype}"),
            Kernel::ActivationBackward(dtype) => format!("activation_backward_{dtype}"),
            Kernel::GradientNorm => "gradient_norm".into(),
            Kernel::GradientScale => "gradient_scale".into(),
            Kernel::CombineBackward(k) => format!("combine_backward_{}{}", k.dtype, any_width(k.any)),
            Kernel::RouterBackward(k) => format!("router_backward_{}_{}", k.b, k.out),
            Kernel::RmsNorm(dtype) => format!("rms_norm_{dtype}"),
            Kernel::RmsNormBackward(dtype) => format!("rms_norm_backward_{dtype}"),
            Kernel::ColumnProducts(dtype) => format!("column_products_{dtype}"),
            Kernel::ProductKeys => "product_keys".into(),
            Kernel::UnitExperts(dtype) => format!("unit_experts_{dtype}"),
            Kernel::ChoiceBackward(dtype) => format!("choice_backward_{dtype}"),
            Kernel::SigmoidGate => "sigmoid_gate".into(),
            Kernel::BySequence { ids_bytes } => format!("by_sequence{}", wide(*ids_bytes)),
            Kernel::TokenBanks { ids_bytes } => format!("token_banks{}", wide(*ids_bytes)),
        }
    }

    /// Its parameter list, which variants share: the build makes a struct of this name and `Params`.
    pub const fn entry(&self) -> &'static str {
        match self {
            Kernel::Router(_) => "Router",
            Kernel::Gating(Gate { score: Some(_), dispatch: false, .. }) => "Gating",
            Kernel::Gating(Gate { score: Some(_), dispatch: true, .. }) => "GatingDispatch",
            Kernel::Gating(Gate { score: None, dispatch: false, .. }) => "GatingAny",
            Kernel::Gating(Gate { score: None, dispatch: true, .. }) => "GatingAnyDispatch",
            Kernel::Route(Route { score: Some(_), .. }) => "Route",
            Kernel::Route(Route { score: None, .. }) => "RouteAny",
            Kernel::GatingWide(_) => "Gating",
            Kernel::Dispatch(_) => "Dispatch",
            Kernel::DispatchRows(_) => "DispatchRows",
            Kernel::ExpertCounts { .. } => "ExpertCounts",
            Kernel::MapToIds => "MapToIds",
            Kernel::IdsToMap { .. } => "IdsToMap",
            Kernel::ChunkRows => "ChunkRows",
            Kernel::Permute { .. } => "Permute",
            Kernel::Gemm(_) | Kernel::GemmAny(_) => "Gemm",
            Kernel::GemmHopper(_) => "GemmHopper",
            Kernel::GemmSwapped(_) => "GemmSwapped",
            Kernel::GemmBackward(_) | Kernel::GemmBackwardAny(_) => "GemmBackward",
            Kernel::KGrouped(_) => "KGrouped",
            Kernel::Combine(_) => "Combine",
            Kernel::Admission(_) => "Admission",
            Kernel::Affinity => "Affinity",
            Kernel::ExpertChoice => "ExpertChoice",
            Kernel::TokenSlots => "TokenSlots",
            Kernel::CombineRagged(_) => "CombineRagged",
            Kernel::Base => "Base",
            Kernel::Sinkhorn(_) => "Sinkhorn",
            Kernel::Hash => "Hash",
            Kernel::Noisy(Noisy { grouped: false, .. }) => "Noisy",
            Kernel::Noisy(Noisy { grouped: true, .. }) => "NoisyGrouped",
            Kernel::MeasuredGating(MeasuredGate { score: Some(_), .. }) => "MeasuredGating",
            Kernel::MeasuredGating(MeasuredGate { score: None, .. }) => "MeasuredGatingAny",
            Kernel::KeepLargest => "KeepLargest",
            Kernel::QuantileBias => "QuantileBias",
            Kernel::LoadImportance => "LoadImportance",
            Kernel::BalanceLoss => "BalanceLoss",
            Kernel::UpdateBias => "UpdateBias",
            Kernel::ExpertMap { .. } => "ExpertMap",
            Kernel::CheckLists => "CheckLists",
            Kernel::RowGroups => "RowGroups",
            Kernel::Sampled(_) => "Sampled",
            Kernel::Jitter(_) => "Jitter",
            Kernel::NoiseState => "NoiseState",
            Kernel::GatingBackward { any: false } => "GatingBackward",
            Kernel::GatingBackward { any: true } => "GatingBackwardAny",
            Kernel::ScaleSums => "ScaleSums",
            Kernel::NoisyBackward { grouped: false } => "NoisyBackward",
            Kernel::NoisyBackward { grouped: true } => "NoisyBackwardGrouped",
            Kernel::SequenceCounts => "SequenceCounts",
            Kernel::SampledBackward => "SampledBackward",
            Kernel::AffinityBackward => "AffinityBackward",
            Kernel::LoadImportanceBackward => "LoadImportanceBackward",
            Kernel::ProductKeysBackward => "ProductKeysBackward",
            Kernel::UnitBackward(_) => "UnitBackward",
            Kernel::ActivationBackward(_) => "ActivationBackward",
            Kernel::GradientNorm => "GradientNorm",
            Kernel::GradientScale => "GradientScale",
            Kernel::CombineBackward(_) => "CombineBackward",
            Kernel::RouterBackward(_) => "RouterBackward",
            Kernel::RmsNorm(_) => "RmsNorm",
            Kernel::RmsNormBackward(_) => "RmsNormBackward",
            Kernel::ColumnProducts(_) => "ColumnProducts",
            Kernel::ProductKeys => "ProductKeys",
            Kernel::UnitExperts(_) => "UnitExperts",
            Kernel::ChoiceBackward(_) => "ChoiceBackward",
            Kernel::SigmoidGate => "SigmoidGate",
            Kernel::BySequence { .. } => "BySequence",
            Kernel::TokenBanks { .. } => "TokenBanks",
        }
    }

    /// Oldest architecture that runs it.
    pub const fn arch(&self) -> Arch {
        match self {
            Kernel::GemmHopper(_) => Arch::Sm90a,
            _ => Arch::Sm80,
        }
    }

    /// Threads of a block.
    pub const fn threads(&self) -> u32 {
        match self {
            Kernel::Router(k) => k.shape.threads(),
            Kernel::Gating(k) => k.warps() * 32,
            Kernel::Route(k) => k.gate().warps() * 32,
            Kernel::GatingWide(k) => k.gate().warps() * 32,
            Kernel::KeepLargest | Kernel::QuantileBias | Kernel::LoadImportance => BLOCK_WARPS * 32,
            Kernel::Dispatch(k) | Kernel::DispatchRows(k) => k.warps() * 32,
            Kernel::ExpertCounts { .. }
            | Kernel::MapToIds
            | Kernel::IdsToMap { .. }
            | Kernel::ChunkRows
            | Kernel::Permute { .. } => BLOCK_WARPS * 32,
            Kernel::Gemm(k) | Kernel::GemmBackward(k) => k.tile.threads(),
            Kernel::GemmHopper(_) => GemmHopper::THREADS,
            Kernel::GemmSwapped(_) => GemmSwapped::TILE.threads(),
            Kernel::GemmAny(k) | Kernel::GemmBackwardAny(k) => k.tile().threads(),
            Kernel::KGrouped(k) => k.tile().threads(),
            Kernel::Combine(_) | Kernel::CombineRagged(_) => Combine::THREADS,
            Kernel::Admission(k) => k.warps() * 32,
            Kernel::Sinkhorn(k) => k.warps() * 32,
            Kernel::Affinity | Kernel::ExpertChoice | Kernel::TokenSlots | Kernel::Base | Kernel::Hash => {
                BLOCK_WARPS * 32
            }
            Kernel::Noisy(k) => k.spread.warps() * 32,
            Kernel::MeasuredGating(k) => k.gate().warps() * 32,
            Kernel::BalanceLoss | Kernel::UpdateBias | Kernel::ExpertMap { .. } | Kernel::CheckLists => {
                BLOCK_WARPS * 32
            }
            Kernel::Sampled(spread) => spread.warps() * 32,
            Kernel::Jitter(_)
            | Kernel::RowGroups
            | Kernel::GatingBackward { .. }
            | Kernel::ScaleSums
            | Kernel::NoisyBackward { .. }
            | Kernel::SequenceCounts
            | Kernel::SampledBackward
            | Kernel::AffinityBackward
            | Kernel::LoadImportanceBackward
            | Kernel::ProductKeysBackward
            | Kernel::UnitBackward(_)
            | Kernel::ActivationBackward(_)
            | Kernel::GradientNorm
            | Kernel::GradientScale
            | Kernel::CombineBackward(_)
            | Kernel::RouterBackward(_) => BLOCK_WARPS * 32,
            Kernel::NoiseState => 32,
            Kernel::ChoiceBackward(_) | Kernel::SigmoidGate => BLOCK_WARPS * 32,
            Kernel::RmsNorm(_) | Kernel::RmsNormBackward(_) => RMS_NORM_THREADS,
            Kernel::ColumnProducts(_) => COLUMN_PRODUCTS_THREADS,
            Kernel::ProductKeys | Kernel::UnitExperts(_) | Kernel::BySequence { .. } | Kernel::TokenBanks { .. } => {
                BLOCK_WARPS * 32
            }
        }
    }

    /// Dynamic shared memory in bytes.
    pub const fn shared_bytes(&self) -> u32 {
        match self {
            Kernel::Router(k) => k.shared_bytes(),
            Kernel::Gemm(k) | Kernel::GemmBackward(k) => k.shared_bytes(),
            Kernel::GemmHopper(_) => GemmHopper::SHARED_BYTES,
            Kernel::GemmSwapped(_) => GemmSwapped::SHARED_BYTES,
            Kernel::GemmAny(k) | Kernel::GemmBackwardAny(k) => k.shared_bytes(),
            Kernel::KGrouped(k) => k.shared_bytes(),
            Kernel::MeasuredGating(k) => k.shared_bytes(),
            _ => 0,
        }
    }

    /// File below `kernels/` that this variant is rendered from.
    pub const fn template(&self) -> &'static str {
        match self {
            Kernel::Router(Router { shape: RouterShape::Tile | RouterShape::Any, .. }) => {
                "routers/router_tile.ptx.jinja"
            }
            Kernel::Router(Router { shape: RouterShape::Warp, .. }) => "routers/router_warp.ptx.jinja",
            Kernel::Router(Router { shape: RouterShape::Few, .. }) => "routers/router_few.ptx.jinja",
            Kernel::Router(_) => "routers/router_mma.ptx.jinja",
            Kernel::Gating(Gate { dispatch: false, .. }) => "routers/gating.ptx.jinja",
            Kernel::Gating(Gate { dispatch: true, .. }) => "routers/gating_dispatch.ptx.jinja",
            Kernel::Route(_) => "routers/route.ptx.jinja",
            Kernel::GatingWide(_) => "routers/gating_wide.ptx.jinja",
            Kernel::Dispatch(_) | Kernel::DispatchRows(_) => "capacity/dispatch.ptx.jinja",
            Kernel::ExpertCounts { .. } => "capacity/expert_counts.ptx.jinja",
            Kernel::MapToIds => "capacity/map_to_ids.ptx.jinja",
            Kernel::IdsToMap { .. } => "capacity/ids_to_map.ptx.jinja",
            Kernel::ChunkRows => "capacity/chunk_rows.ptx.jinja",
            Kernel::Permute { .. } => "experts/permute.ptx.jinja",
            Kernel::Gemm(_) => "experts/gemm.ptx.jinja",
            Kernel::GemmHopper(_) => "experts/sm90a/gemm.ptx.jinja",
            Kernel::GemmSwapped(_) => "experts/gemm_swapped.ptx.jinja",
            Kernel::GemmAny(_) => "experts/gemm_any.ptx.jinja",
            Kernel::GemmBackward(_) | Kernel::GemmBackwardAny(_) => "experts/gemm_backward.ptx.jinja",
            Kernel::KGrouped(KGrouped { any: false, .. }) => "experts/k_grouped.ptx.jinja",
            Kernel::KGrouped(KGrouped { any: true, .. }) => "experts/k_grouped_any.ptx.jinja",
            Kernel::Combine(_) => "experts/combine.ptx.jinja",
            Kernel::Admission(_) => "capacity/admission.ptx.jinja",
            Kernel::Affinity => "routers/affinity.ptx.jinja",
            Kernel::ExpertChoice => "routers/expert_choice.ptx.jinja",
            Kernel::TokenSlots => "capacity/token_slots.ptx.jinja",
            Kernel::CombineRagged(_) => "experts/combine_ragged.ptx.jinja",
            Kernel::Base => "routers/base.ptx.jinja",
            Kernel::Sinkhorn(_) => "routers/sinkhorn.ptx.jinja",
            Kernel::Hash => "routers/hash.ptx.jinja",
            Kernel::Noisy(_) => "routers/noisy.ptx.jinja",
            Kernel::MeasuredGating(_) => "routers/gating_measured.ptx.jinja",
            Kernel::KeepLargest => "capacity/keep_largest.ptx.jinja",
            Kernel::QuantileBias => "routers/quantile_bias.ptx.jinja",
            Kernel::LoadImportance => "routers/load_importance.ptx.jinja",
            Kernel::BalanceLoss => "routers/balance_loss.ptx.jinja",
            Kernel::UpdateBias => "routers/update_bias.ptx.jinja",
            Kernel::ExpertMap { .. } => "capacity/expert_map.ptx.jinja",
            Kernel::CheckLists => "capacity/check_lists.ptx.jinja",
            Kernel::RowGroups => "capacity/row_groups.ptx.jinja",
            Kernel::Sampled(_) => "routers/sampled.ptx.jinja",
            Kernel::Jitter(_) => "routers/jitter.ptx.jinja",
            Kernel::NoiseState => "routers/noise_state.ptx.jinja",
            Kernel::GatingBackward { .. } => "routers/gating_backward.ptx.jinja",
            Kernel::ScaleSums => "routers/scale_sums.ptx.jinja",
            Kernel::NoisyBackward { .. } => "routers/noisy_backward.ptx.jinja",
            Kernel::SequenceCounts => "routers/sequence_counts.ptx.jinja",
            Kernel::SampledBackward => "routers/sampled_backward.ptx.jinja",
            Kernel::AffinityBackward => "routers/affinity_backward.ptx.jinja",
            Kernel::LoadImportanceBackward => "routers/load_importance_backward.ptx.jinja",
            Kernel::ProductKeysBackward => "routers/product_keys_backward.ptx.jinja",
            Kernel::UnitBackward(_) => "routers/unit_backward.ptx.jinja",
            Kernel::ActivationBackward(_) => "experts/activation_backward.ptx.jinja",
            Kernel::GradientNorm | Kernel::GradientScale => "experts/gradient_norm.ptx.jinja",
            Kernel::CombineBackward(_) => "experts/combine_backward.ptx.jinja",
            Kernel::RouterBackward(_) => "routers/router_backward.ptx.jinja",
            Kernel::RmsNorm(_) => "experts/rms_norm.ptx.jinja",
            Kernel::RmsNormBackward(_) => "experts/rms_norm_backward.ptx.jinja",
            Kernel::ColumnProducts(_) => "experts/column_products.ptx.jinja",
            Kernel::ProductKeys => "routers/product_keys.ptx.jinja",
            Kernel::UnitExperts(_) => "experts/unit_experts.ptx.jinja",
            Kernel::ChoiceBackward(_) => "experts/choice_backward.ptx.jinja",
            Kernel::SigmoidGate => "experts/sigmoid_gate.ptx.jinja",
            Kernel::BySequence { .. } => "routers/by_sequence.ptx.jinja",
            Kernel::TokenBanks { .. } => "routers/token_banks.ptx.jinja",
        }
    }

    /// The constants that the template sees, beside `name`, `target` and `threads`.
    pub fn constants(&self) -> Vec<(&'static str, Constant)> {
        use Constant::{Int, Text};
        match self {
            Kernel::Router(k) => {
                let [warps_m, warps_n, stages] = k.shape.tile();
                vec![
                    ("x_dtype", Text(k.x.name())),
                    ("w_dtype", Text(k.weight.name())),
                    ("any", Int(u32::from(matches!(k.shape, RouterShape::Any)))),
                    ("block_tokens", Int(k.shape.block().0)),
                    ("block_experts", Int(k.shape.block().1)),
                    ("warps_m", Int(warps_m)),
                    ("warps_n", Int(warps_n)),
                    ("stages", Int(stages)),
                    ("resident", Int(k.blocks_resident())),
                ]
            }
            Kernel::Gating(k) => vec![
                ("score", Text(k.score_name())),
                ("ids_bytes", Int(4)),
                ("values", Int(k.values)),
                ("max_experts", Int(k.max_counted())),
                ("warps", Int(k.warps())),
            ],
            Kernel::Route(k) => Kernel::Gating(k.gate()).constants(),
            Kernel::GatingWide(k) => vec![
                ("score", Text(k.score.name())),
                ("values", Int(k.values)),
                ("max_experts", Int(k.gate().max_experts())),
                ("warps", Int(k.gate().warps())),
            ],
            Kernel::MeasuredGating(k) => vec![
                ("score", Text(k.gate().score_name())),
                ("values", Int(k.values)),
                ("max_experts", Int(k.gate().max_experts())),
                ("warps", Int(k.gate().warps())),
                ("blocks_resident", Int(k.blocks_resident())),
            ],
            Kernel::Dispatch(k) => {
                vec![("max_experts", Int(k.max_experts)), ("ids_bytes", Int(k.ids_bytes)), ("warps", Int(k.warps()))]
            }
            Kernel::DispatchRows(k) => {
                let mut constants = Kernel::Dispatch(*k).constants();
                constants.push(("row_layout", Int(1)));
                constants
            }
            Kernel::ExpertCounts { ids_bytes } => {
                vec![("warps", Int(BLOCK_WARPS)), ("ids_bytes", Int(*ids_bytes)), ("max_experts", Int(MAX_COUNTED))]
            }
            Kernel::MapToIds => vec![("warps", Int(BLOCK_WARPS))],
            Kernel::IdsToMap { ids_bytes } => vec![("warps", Int(BLOCK_WARPS)), ("ids_bytes", Int(*ids_bytes))],
            Kernel::ChunkRows => vec![("warps", Int(BLOCK_WARPS)), ("max_chunks", Int(MAX_CHUNKS))],
            Kernel::Permute { unit } => vec![("unit", Int(*unit))],
            Kernel::Gemm(k) => {
                let own =
                    [("dtype", Text(k.dtype.name())), ("glu", Text(k.fold.name())), ("layout", Text(k.layout.name()))];
                own.into_iter().chain(k.tile.constants()).collect()
            }
            Kernel::GemmHopper(k) => {
                let own =
                    [("dtype", Text(k.dtype.name())), ("glu", Text(k.fold.name())), ("layout", Text(k.layout.name()))];
                own.into_iter().chain(GemmHopper::TILE.constants()).collect()
            }
            Kernel::GemmSwapped(k) => {
                let own = [
                    ("dtype", Text(k.dtype.name())),
                    ("glu", Text(k.fold.name())),
                    ("layout", Text(k.layout.name())),
                    ("combines", Int(u32::from(k.combines))),
                ];
                own.into_iter().chain(GemmSwapped::TILE.constants()).collect()
            }
            Kernel::GemmAny(k) => {
                let own = [("dtype", Text(k.dtype.name())), ("glu", Text(k.fold().name()))];
                own.into_iter().chain(k.tile().constants()).collect()
            }
            Kernel::GemmBackward(k) => {
                let mut constants = Kernel::Gemm(*k).constants();
                constants.push(("any_width", Int(0)));
                constants
            }
            Kernel::GemmBackwardAny(k) => {
                let mut constants = Kernel::GemmAny(*k).constants();
                constants.push(("any_width", Int(1)));
                constants
            }
            Kernel::KGrouped(k) => {
                std::iter::once(("dtype", Text(k.dtype.name()))).chain(k.tile().constants()).collect()
            }
            Kernel::Combine(Combine { dtype, any }) | Kernel::CombineRagged(CombineRagged { dtype, any }) => {
                vec![("dtype", Text(dtype.name())), ("any", Int(u32::from(*any)))]
            }
            Kernel::Admission(k) => vec![("max_experts", Int(k.max_experts)), ("warps", Int(k.warps()))],
            Kernel::Sinkhorn(k) => vec![("max_experts", Int(k.max_experts)), ("warps", Int(k.warps()))],
            Kernel::Affinity | Kernel::Hash | Kernel::CheckLists | Kernel::NoiseState => vec![],
            Kernel::SampledBackward
            | Kernel::AffinityBackward
            | Kernel::LoadImportanceBackward
            | Kernel::ProductKeysBackward => vec![("warps", Int(BLOCK_WARPS))],
            Kernel::NoisyBackward { grouped } => {
                vec![("warps", Int(BLOCK_WARPS)), ("grouped", Int(u32::from(*grouped)))]
            }
            Kernel::UnitBackward(dtype) => vec![("dtype", Text(dtype.name())), ("warps", Int(BLOCK_WARPS))],
            Kernel::SequenceCounts => vec![("warps", Int(BLOCK_WARPS)), ("max_experts", Int(4096))],
            Kernel::BalanceLoss | Kernel::UpdateBias | Kernel::ScaleSums => vec![("warps", Int(BLOCK_WARPS))],
            Kernel::GatingBackward { any } => vec![("warps", Int(BLOCK_WARPS)), ("any", Int(u32::from(*any)))],
            Kernel::ExpertMap { ids_bytes } => vec![("warps", Int(BLOCK_WARPS)), ("ids_bytes", Int(*ids_bytes))],
            Kernel::ExpertChoice
            | Kernel::TokenSlots
            | Kernel::Base
            | Kernel::RowGroups
            | Kernel::KeepLargest
            | Kernel::QuantileBias => {
                vec![("warps", Int(BLOCK_WARPS))]
            }
            Kernel::LoadImportance => {
                vec![("warps", Int(BLOCK_WARPS)), ("block_tokens", Int(LOAD_IMPORTANCE_TOKENS))]
            }
            Kernel::Noisy(k) => {
                let mut constants = k.spread.constants();
                constants.push(("grouped", Int(k.grouped as u32)));
                constants
            }
            Kernel::Sampled(spread) => spread.constants(),
            Kernel::Jitter(dtype)
            | Kernel::RmsNorm(dtype)
            | Kernel::RmsNormBackward(dtype)
            | Kernel::ColumnProducts(dtype) => vec![("dtype", Text(dtype.name()))],
            Kernel::ActivationBackward(dtype) => vec![("dtype", Text(dtype.name())), ("warps", Int(BLOCK_WARPS))],
            Kernel::GradientNorm | Kernel::GradientScale => vec![
                ("scales", Int(u32::from(matches!(self, Kernel::GradientScale)))),
                ("buffers", Int(GRADIENT_BUFFERS)),
                ("chunk", Int(GRADIENT_CHUNK)),
                ("warps", Int(BLOCK_WARPS)),
            ],
            Kernel::CombineBackward(Combine { dtype, any }) => {
                vec![("dtype", Text(dtype.name())), ("any", Int(u32::from(*any))), ("warps", Int(BLOCK_WARPS))]
            }
            Kernel::RouterBackward(k) => vec![
                ("b_dtype", Text(k.b.name())),
                ("out_dtype", Text(k.out.name())),
                ("bm", Int(RouterBackward::ROWS)),
                ("bn", Int(RouterBackward::COLUMNS)),
                ("depth", Int(RouterBackward::DEPTH)),
            ],
            Kernel::ProductKeys => vec![("warps", Int(BLOCK_WARPS)), ("max_keys", Int(MAX_PRODUCT_KEYS))],
            Kernel::UnitExperts(dtype) => vec![("dtype", Text(dtype.name())), ("warps", Int(BLOCK_WARPS))],
            Kernel::ChoiceBackward(dtype) => vec![("dtype", Text(dtype.name())), ("warps", Int(BLOCK_WARPS))],
            Kernel::SigmoidGate => vec![],
            Kernel::BySequence { ids_bytes } | Kernel::TokenBanks { ids_bytes } => vec![("ids_bytes", Int(*ids_bytes))],
        }
    }
}

/// The end of the name of a kernel that takes wide ids.
fn wide(ids_bytes: u32) -> &'static str {
    if ids_bytes == 8 { "_i64" } else { "" }
}

/// The end of the name of a kernel for rows of any width.
fn any_width(any: bool) -> &'static str {
    if any { "_any" } else { "" }
}

/// A constant of a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Constant {
    /// A number.
    Int(u32),
    /// A word.
    Text(&'static str),
}

/// All variants, in the order of the embedded table.
pub fn all() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for x in Dtype::ALL {
        for weight in if x == Dtype::F32 { vec![Dtype::F32] } else { vec![x, Dtype::F32] } {
            for shape in RouterShape::ALL {
                kernels.extend(Some(Router { x, weight, shape }).filter(Router::exists).map(Kernel::Router));
            }
        }
    }
    for score in Score::COMMON {
        for values in Gate::VALUES {
            for dispatch in [false, true] {
                kernels.push(Kernel::Gating(Gate { score: Some(score), values, dispatch }));
            }
        }
    }
    for score in Score::COMMON {
        kernels.extend(WideGate::VALUES.map(|values| Kernel::GatingWide(WideGate { score, values })));
    }
    for values in Gate::ANY_VALUES {
        for dispatch in [false, true] {
            kernels.push(Kernel::Gating(Gate { score: None, values, dispatch }));
        }
    }
    for score in Score::COMMON.map(Some).into_iter().chain([None]) {
        kernels.extend(Route::VALUES.map(|values| Kernel::Route(Route { score, values })));
    }
    for max_experts in Dispatch::MAX_EXPERTS {
        for ids_bytes in IDS_BYTES {
            let dispatch = Dispatch { max_experts, ids_bytes };
            kernels.extend([Kernel::Dispatch(dispatch), Kernel::DispatchRows(dispatch)]);
        }
    }
    for dtype in Dtype::ALL {
        for &tile in Gemm::tiles(dtype).iter().chain(Gemm::wide_tiles(dtype)) {
            for fold in Fold::ALL {
                for layout in Layout::ALL {
                    kernels.push(Kernel::Gemm(Gemm { dtype, tile, fold, layout }));
                }
            }
        }
    }
    for dtype in GemmHopper::DTYPES {
        for fold in Fold::ALL {
            kernels.extend(Layout::ALL.map(|layout| Kernel::GemmHopper(GemmHopper { dtype, fold, layout })));
        }
    }
    for dtype in GemmSwapped::DTYPES {
        for layout in Layout::ALL {
            let swapped = |fold, combines| Kernel::GemmSwapped(GemmSwapped { dtype, fold, layout, combines });
            kernels.extend(Fold::ALL.map(|fold| swapped(fold, false)));
            kernels.push(swapped(Fold::Plain, true));
        }
    }
    for dtype in Dtype::ALL {
        kernels.extend([false, true].map(|gated| Kernel::GemmAny(GemmAny { dtype, gated })));
    }
    for dtype in Dtype::ALL {
        for &tile in Gemm::tiles(dtype) {
            let backward = |layout| Kernel::GemmBackward(Gemm { dtype, tile, fold: Fold::Plain, layout });
            kernels.extend(Layout::ALL.map(backward));
        }
        kernels.push(Kernel::GemmBackwardAny(GemmAny { dtype, gated: false }));
    }
    for dtype in Dtype::ALL {
        for any in [false, true] {
            kernels.push(Kernel::KGrouped(KGrouped { dtype, any }));
            kernels.push(Kernel::Combine(Combine { dtype, any }));
            kernels.push(Kernel::CombineBackward(Combine { dtype, any }));
            kernels.push(Kernel::CombineRagged(CombineRagged { dtype, any }));
        }
    }
    for max_experts in Admission::MAX_EXPERTS {
        kernels.push(Kernel::Admission(Admission { max_experts }));
        kernels.push(Kernel::Sinkhorn(Sinkhorn { max_experts }));
    }
    kernels.extend([Kernel::Affinity, Kernel::ExpertChoice, Kernel::TokenSlots, Kernel::Base, Kernel::Hash]);
    for spread in Spread::ALL {
        kernels.extend([false, true].map(|grouped| Kernel::Noisy(Noisy { spread, grouped })));
        kernels.push(Kernel::Sampled(spread));
    }
    for score in Score::COMMON {
        for values in Gate::VALUES {
            kernels.push(Kernel::MeasuredGating(MeasuredGate { score: Some(score), values }));
        }
    }
    kernels.extend(Gate::ANY_VALUES.map(|values| Kernel::MeasuredGating(MeasuredGate { score: None, values })));
    kernels.extend([Kernel::BalanceLoss, Kernel::UpdateBias, Kernel::CheckLists, Kernel::RowGroups]);
    kernels.extend([Kernel::KeepLargest, Kernel::QuantileBias, Kernel::LoadImportance]);
    kernels.extend(IDS_BYTES.map(|ids_bytes| Kernel::ExpertMap { ids_bytes }));
    kernels.extend(Dtype::ALL.map(Kernel::Jitter));
    kernels.extend([Kernel::NoiseState, Kernel::ScaleSums, Kernel::SequenceCounts]);
    kernels.extend([false, true].map(|grouped| Kernel::NoisyBackward { grouped }));
    kernels.extend([Kernel::SampledBackward, Kernel::AffinityBackward]);
    kernels.extend([Kernel::LoadImportanceBackward, Kernel::ProductKeysBackward]);
    kernels.extend(Dtype::ALL.map(Kernel::UnitBackward));
    kernels.extend([Kernel::GradientNorm, Kernel::GradientScale]);
    kernels.extend([false, true].map(|any| Kernel::GatingBackward { any }));
    kernels.extend(Dtype::ALL.map(Kernel::ActivationBackward));
    for b in Dtype::ALL {
        // Into the weight f32; into x its type, which is that of the weight unless that is f32.
        let outs = Dtype::ALL.into_iter().filter(|&out| b == Dtype::F32 || out == b || out == Dtype::F32);
        kernels.extend(outs.map(|out| Kernel::RouterBackward(RouterBackward { b, out })));
    }
    for ids_bytes in IDS_BYTES {
        kernels.extend([Kernel::ExpertCounts { ids_bytes }, Kernel::IdsToMap { ids_bytes }]);
    }
    kernels.extend([Kernel::MapToIds, Kernel::ChunkRows]);
    kernels.extend(PERMUTE_UNITS.map(|unit| Kernel::Permute { unit }));
    kernels.extend(Dtype::ALL.map(Kernel::RmsNorm));
    kernels.extend(Dtype::ALL.map(Kernel::RmsNormBackward));
    kernels.extend(Dtype::ALL.map(Kernel::ColumnProducts));
    kernels.push(Kernel::ProductKeys);
    kernels.extend(Dtype::ALL.map(Kernel::UnitExperts));
    kernels.extend(Dtype::ALL.map(Kernel::ChoiceBackward));
    kernels.push(Kernel::SigmoidGate);
    kernels.extend(IDS_BYTES.map(|ids_bytes| Kernel::BySequence { ids_bytes }));
    kernels.extend(IDS_BYTES.map(|ids_bytes| Kernel::TokenBanks { ids_bytes }));
    kernels
}
