//! Variants of what says where slots go.

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
pub(super) const fn warps_for_experts(max_experts: u32) -> u32 {
    match max_experts {
        0..=1024 => 8,
        // A few more where a rule appends experts.
        1025..=4128 => 2,
        _ => 1,
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

/// Most experts whose slots are counted alone.
pub const MAX_COUNTED: u32 = 8192;

/// Most chunks of rows that change places at once.
pub const MAX_CHUNKS: u32 = 4096;
