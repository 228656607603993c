//! What a product's blocks cost, in closed form: the rates of an architecture's multiprocessor, and the time of a block by them.
//!
//! A block of `bm x bn` weight outputs has, for each 64 depths, `64 bm bn` multiplications on tensor cores and `128 (bm + bn)` bytes of 16-bit rows and
//! weights out of L2. Blocks run in rounds of one a multiprocessor; a last round that is not full takes as long as one that is, but L2, which all share, gives
//! those that work in it more. Nothing is searched; [`super::overrides`] has what was measured.

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
}

/// Bytes a cycle that one multiprocessor takes from L2 at most, whatever the others ask for (white papers from Volta's on).
const MOST_L2_BYTES: u64 = 64;

/// Rows of a product: how many live, and the tiles that they are in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TiledRows {
    pub(crate) live: u64,
    pub(crate) tiles: u64,
}

impl TiledRows {
    /// Rows that a tile multiplies on average: its live ones up to whole quarters, as its main loops have them (32 at least).
    fn multiplied(&self, tile: &Tile) -> u64 {
        let quarter = u64::from(tile.bm / 4).max(32).min(tile.bm.into());
        let live = self.live.div_ceil(self.tiles.max(1));
        live.next_multiple_of(quarter).clamp(quarter, tile.bm.into())
    }
}

/// Cycles of a product of these rows, `columns` column tiles and `k` depths, by `mma.sync`: those of the slowest of three, the multiprocessor with the most blocks
/// by its products or by what it can take from L2, and L2 by the bytes of all.
pub(crate) fn product_cycles(tile: &Tile, rows: TiledRows, columns: u64, k: usize, device: &DeviceInfo) -> u64 {
    let multiprocessors = u64::from(device.multiprocessors.max(1));
    let rates = Rates::of(device.compute_capability);
    let (multiplied, bn) = (rows.multiplied(tile), u64::from(tile.bn));
    let (products, bytes) = (64 * multiplied * bn / rates.mma, 128 * (multiplied + bn));
    let alone = (rows.tiles * columns).div_ceil(multiprocessors) * products.max(bytes / MOST_L2_BYTES);
    let together = columns * 128 * (rows.live + rows.tiles * bn) / (multiprocessors * rates.l2_bytes);
    k.div_ceil(64) as u64 * alone.max(together)
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

    /// Cycles of 64 depths of so many row tiles, all of them with `live` rows.
    fn cycles(tile: &Tile, tiles: u64, live: u64, columns: u64) -> u64 {
        product_cycles(tile, TiledRows { live: tiles * live, tiles }, columns, 64, &A100)
    }

    #[test]
    fn l2_bounds_narrow_tiles_of_an_a100() {
        let [narrow, wide] = [&Gemm::tiles(Dtype::Bf16)[0], &Gemm::wide_tiles(Dtype::Bf16)[0]];
        // Ten rounds: 32 KB of L2 for each million of products; the wide tile has three quarters of the bytes.
        assert_eq!(cycles(narrow, 135, 128, 8), 8 * 135 * 128 * 256 / (108 * 18));
        assert!(cycles(wide, 135, 128, 4) < cycles(narrow, 135, 128, 8));
        // A few blocks: products decide, and the narrow ones have half of them each.
        assert_eq!([cycles(narrow, 10, 128, 8), cycles(wide, 10, 128, 4)], [80 * 128 * 256 / (108 * 18), 2048]);
    }

    #[test]
    fn a_round_that_is_not_full_leaves_l2_to_its_blocks() {
        let [narrow, wide] = [&Gemm::tiles(Dtype::Bf16)[0], &Gemm::wide_tiles(Dtype::Bf16)[0]];
        // 1.2 rounds of wide tiles are two by their products, and 2.4 of narrow ones more by their bytes.
        assert_eq!(cycles(wide, 32, 128, 4), 2 * 2048);
        assert_eq!(cycles(narrow, 32, 128, 8), 8 * 32 * 128 * 256 / (108 * 18));
    }

    #[test]
    fn dead_rows_cost_products_up_to_whole_quarters_and_no_bytes() {
        let [tall, middle, low] = [0, 1, 2].map(|index| &Gemm::tiles(Dtype::Bf16)[index]);
        let multiplied = |tile, live| TiledRows { live, tiles: 1 }.multiplied(tile);
        assert_eq!([1, 33, 80, 97, 200].map(|live| multiplied(tall, live)), [32, 64, 96, 128, 128]);
        assert_eq!([1, 33].map(|live| multiplied(middle, live)), [32, 64]);
        assert_eq!(multiplied(low, 1), 16);
        assert_eq!(cycles(tall, 108, 80, 8), 8 * 108 * 128 * (80 + 128) / (108 * 18));
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
