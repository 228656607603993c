//! Variants of what chooses experts.

use super::Constant;
use super::capacity::warps_for_experts;
use super::tiles::BLOCK_WARPS;
use crate::rules::kinds::{Dtype, Score};

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

/// Both gradients of a router product in one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouterBackwardBoth {
    /// Type of x and of its gradient.
    pub x: Dtype,
    /// Type of the router's weight: that of x, or f32.
    pub weight: Dtype,
}

impl RouterBackwardBoth {
    /// Blocks that a multiprocessor holds at once.
    pub const fn resident_blocks(&self) -> u32 {
        if matches!((self.x, self.weight), (Dtype::F32, _) | (_, Dtype::F32)) { 1 } else { 2 }
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
    pub(super) const fn tile(self) -> [u32; 3] {
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

    pub(super) const fn is_split(&self) -> bool {
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
    pub(super) const fn blocks_resident(&self) -> u32 {
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

    /// Blocks of the gating that sorts slots too which a multiprocessor holds at once, on every architecture: what its registers are enough for.
    pub const fn dispatch_resident(&self) -> u32 {
        match (self.score.is_some(), self.values) {
            (true, ..=4) => 4,
            (true, 8) => 3,
            _ => 2,
        }
    }

    /// Most experts that a choice is among.
    pub const fn max_experts(&self) -> u32 {
        32 * self.values
    }

    /// Logits that each lane holds, whatever the number of experts: as few have a narrower kernel. Where nothing is asked ptxas loads more at once,
    /// and takes so many registers that of 64 logits half as many warps are resident, and of 128 beside a dispatch some are spilled: there
    /// nothing is taken for certain.
    pub(super) fn certain(&self) -> u32 {
        match (self.score, self.values, self.dispatch) {
            (Some(_), 64, _) | (Some(_), 128, true) => 0,
            (Some(_), values, _) => next_below(values, &Gate::VALUES),
            (None, values, _) => next_below(values, &Gate::ANY_VALUES),
        }
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
    /// Experts up to `32 * values`, which a lane holds the logits of; [`Route::MANY`] looks at them by blocks.
    pub values: u32,
}

impl Route {
    /// Every number of logits a lane may hold.
    pub const VALUES: [u32; 2] = [4, 16];

    /// [`Route::values`] of the kernels for very many experts, of a common score.
    pub const MANY: u32 = 128;

    /// Experts that a block of the kernels for very many computes the logits of, and chooses one of.
    pub const BLOCK_EXPERTS: usize = 8;

    /// Whether it is a kernel for very many experts.
    pub const fn is_many(&self) -> bool {
        self.values == Route::MANY
    }

    /// Most tokens that it is meant for: a warp each, of the block that chooses, or two where that looks at blocks alone.
    pub const fn max_tokens(&self) -> usize {
        if self.is_many() { 16 } else { 8 }
    }

    /// Warps of a block.
    pub const fn warps(&self) -> u32 {
        if self.is_many() { BLOCK_WARPS } else { self.gate().warps() }
    }

    /// The gating and dispatch that it ends with.
    pub const fn gate(&self) -> Gate {
        Gate { score: self.score, values: self.values, dispatch: true }
    }

    /// See [`Gate::certain`].
    pub(super) fn certain(&self) -> u32 {
        next_below(self.values, &Route::VALUES)
    }
}

/// The largest of `all` below `values`, 0 if there is none.
fn next_below(values: u32, all: &[u32]) -> u32 {
    all.iter().copied().filter(|&other| other < values).max().unwrap_or(0)
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

    /// See [`Gate::certain`]. More than 32 choices are among more than 32 experts.
    pub(super) fn certain(&self) -> u32 {
        next_below(self.values, &WideGate::VALUES).max(1)
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

    /// See [`Gate::certain`].
    pub(super) fn certain(&self) -> u32 {
        if self.values == 128 { 0 } else { self.gate().certain() }
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

/// Tokens that a block of the affinity kernel transposes.
pub const AFFINITY_TOKENS: u32 = 32;

/// Tokens that a block of `load_importance` adds up.
pub const LOAD_IMPORTANCE_TOKENS: u32 = 256;

/// Keys of each of the two lists of product keys.
pub const MAX_PRODUCT_KEYS: u32 = 128;

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

    pub(super) fn constants(&self) -> Vec<(&'static str, Constant)> {
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
