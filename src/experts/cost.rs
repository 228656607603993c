//! What a product's blocks cost, in closed form: the rates of an architecture's multiprocessor, and the time of a block by them.
//!
//! A block of `bm x bn` weight outputs takes, for each 64 depths, the time of the slower of two: its `64 bm bn` multiplications on tensor cores, or its
//! `128 (bm + bn)` bytes of 16-bit rows and weights out of L2. Blocks run in rounds of one a multiprocessor; a last round that is not full takes as
//! long as one that is. Nothing is searched; [`super::overrides`] has what was measured.

use crate::DeviceInfo;
use crate::registry::Tile;

/// What one multiprocessor does in a cycle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rates {
    /// Multiplications of 16-bit numbers by `mma.sync`.
    pub mma: u64,
    /// The same by `wgmma`, with 256 columns; 0 where there is none.
    pub wgmma: u64,
    /// Bytes that L2 gives it while all others ask too.
    pub l2_bytes: u64,
}

impl Rates {
    /// Of a compute capability.
    ///
    /// - 8.0: white paper of the A100, 1024; L2: 2008 bytes a cycle measured on an A100 (Luo et al., arXiv:2501.12084) over its 108.
    /// - 8.6, 8.9 and 12.0: white paper of Ada, 512; nothing is published on L2, and Hopper's is taken.
    /// - 9.0: 2048, of which `mma.sync` reached 65 % and `wgmma` 88 % on an H800 with random data; L2: 4472 bytes a cycle over its 132 (the
    ///   same measurements).
    /// - Others, of which nothing of this is published: as 9.0, without `wgmma`.
    pub const fn of((major, minor): (u32, u32)) -> Rates {
        match (major, minor) {
            (8, 0) => Rates { mma: 1024, wgmma: 0, l2_bytes: 18 },
            (8 | 12, _) => Rates { mma: 512, wgmma: 0, l2_bytes: 33 },
            (9, 0) => Rates { mma: 1331, wgmma: 1802, l2_bytes: 33 },
            _ => Rates { mma: 1331, wgmma: 0, l2_bytes: 33 },
        }
    }

    /// Cycles of 64 depths of a tile by `mma.sync`.
    pub(crate) const fn stage_cycles(&self, tile: &Tile) -> u64 {
        let (bm, bn) = (tile.bm as u64, tile.bn as u64);
        let (products, bytes) = (64 * bm * bn / self.mma, 128 * (bm + bn) / self.l2_bytes);
        if products > bytes { products } else { bytes }
    }
}

/// Cycles of a product of `k` depths in `blocks` blocks of a tile.
pub(crate) fn product_cycles(tile: &Tile, blocks: u64, k: usize, device: &DeviceInfo) -> u64 {
    let rounds = blocks.div_ceil(device.multiprocessors.max(1).into());
    rounds * k.div_ceil(64) as u64 * Rates::of(device.compute_capability).stage_cycles(tile)
}

/// Tiles of `bm` rows that `slots` rows need which `experts` experts share at random: a half for each expert beside the full ones.
pub(crate) fn expected_tiles(slots: usize, experts: usize, bm: u32) -> u64 {
    let (slots, active, bm) = (slots as u64, experts.min(slots).max(1) as u64, u64::from(bm));
    (2 * slots + active * bm).div_ceil(2 * bm)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Gemm;
    use crate::rules::Dtype;
    use crate::runtime::device::{A100, H100};

    #[test]
    fn l2_bounds_narrow_tiles_of_an_a100() {
        let rates = Rates::of((8, 0));
        let [narrow, wide] = [Gemm::tiles(Dtype::Bf16)[0], Gemm::wide_tiles(Dtype::Bf16)[0]];
        assert_eq!(rates.stage_cycles(&narrow), 128 * 256 / 18);
        assert!(rates.stage_cycles(&wide) < 2 * rates.stage_cycles(&narrow));
        // Full rounds favour the wide tile, a few blocks the narrow one.
        let cycles = |tile, blocks| product_cycles(tile, blocks, 2048, &A100);
        assert!(cycles(&wide, 1080) < cycles(&narrow, 2160));
        assert!(cycles(&wide, 40) > cycles(&narrow, 80));
    }

    #[test]
    fn every_architecture_has_rates() {
        for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)] {
            let rates = Rates::of(capability);
            assert!(rates.mma > 0 && rates.l2_bytes > 0, "{capability:?}");
            assert_eq!(rates.wgmma > 0, capability == H100.compute_capability);
        }
    }

    #[test]
    fn a_half_tile_for_each_active_expert() {
        assert_eq!(expected_tiles(0, 8, 64), 1);
        assert_eq!(expected_tiles(4, 8, 64), 3);
        assert_eq!(expected_tiles(8 * 256, 8, 128), 16 + 4);
    }
}
