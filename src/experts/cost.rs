//! What a product takes, in closed form: the time of the unit of a device that its kernel keeps busy longest.
//!
//! A kernel cuts a product into tiles, of which a multiprocessor computes one after the other. A tile has, for each step of 64 depths, multiplications on tensor cores and passes
//! of 128 bytes through shared memory: those that bring its rows and outputs there, and those that take them to the tensor cores. Tiles run in rounds of one a
//! multiprocessor; a last round that is not full takes as long as one that is, but L2 and device memory, which all share, give those that work in it more. Nothing is searched.
//!
//! It chooses between the kernels of one product ([`super::gemm`], [`super::gemm_backward`], [`super::k_grouped`]), and the height of a layer's tiles.
//! [`super::overrides`] has what was measured.

use crate::DeviceInfo;
use crate::registry::Tile;

/// What one multiprocessor does in a cycle, or is given while all others ask too.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Multiplications of 16-bit numbers by `mma.sync`.
    pub mma: f64,
    /// The same by `wgmma`, from 128 columns on; 0 where there is none.
    pub wgmma: f64,
    /// Bytes of L2.
    pub l2_bytes: f64,
    /// Bytes of device memory.
    pub dram_bytes: f64,
}

impl Rates {
    /// Of a compute capability, as `softcuda`'s profile has them, each of whose numbers names its source.
    ///
    /// - 8.0: white paper of the A100: 1024; L2: 2008 bytes a cycle, measured on an A100 (Luo et al., arXiv:2501.12084); 2039 GB/s at 1410 MHz; all over its
    ///   108.
    /// - 8.6, 8.9 and 12.0: white paper of Ada: 512; nothing is published on L2, and Hopper's is taken; 300 GB/s of an L4's 58 at 2040 MHz.
    /// - 9.0: 2048 at 1830 MHz beside 1980 of all else, of which `mma.sync` reached 64.9 % and `wgmma` 96 % on an H800; L2: 4472 bytes a cycle over its 132
    ///   (the same measurements); 3352 GB/s.
    /// - Others, of which nothing of this is published: as 9.0, without `wgmma`.
    pub const fn of((major, minor): (u32, u32)) -> Rates {
        const TENSOR: f64 = 2048.0 * 1830.0 / 1980.0;
        const HOPPER: Rates = Rates {
            mma: 0.649 * TENSOR,
            wgmma: 0.96 * TENSOR,
            l2_bytes: 4472.0 / 132.0,
            dram_bytes: 3352e3 / 1980.0 / 132.0,
        };
        match (major, minor) {
            (8, 0) => Rates { mma: 1024.0, wgmma: 0.0, l2_bytes: 2008.0 / 108.0, dram_bytes: 2039e3 / 1410.0 / 108.0 },
            (8 | 12, _) => Rates { mma: 512.0, wgmma: 0.0, dram_bytes: 300e3 / 2040.0 / 58.0, ..HOPPER },
            (9, 0) => HOPPER,
            _ => Rates { wgmma: 0.0, ..HOPPER },
        }
    }
}

/// Depths of a step.
pub(crate) const STEP: usize = 64;

/// Bytes that a row of A or an output of B has in a step, and that a multiprocessor's shared memory gives or takes in a cycle (white papers from Volta's on).
const STEP_BYTES: f64 = 128.0;

/// Rows that a warpgroup's instruction multiplies.
const WARPGROUP_ROWS: u32 = 64;

/// Rows of a product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProductRows {
    /// Rows that experts share at random, and how many they are.
    pub(crate) grouped: [usize; 2],
    /// Rows beside them that all go to one expert more.
    pub(crate) dense: usize,
}

impl ProductRows {
    /// Tiles of so many rows that are to be expected.
    pub(crate) fn tiles(&self, height: u32) -> u64 {
        let [slots, experts] = self.grouped;
        expected_tiles(slots, experts, height) + (self.dense as u64).div_ceil(height.into())
    }

    pub(crate) fn live(&self) -> f64 {
        (self.grouped[0] + self.dense) as f64
    }

    /// Matrices that are read: of experts with a row.
    pub(crate) fn matrices(&self) -> usize {
        let [slots, experts] = self.grouped;
        experts.min(slots) + usize::from(self.dense > 0)
    }
}

/// Tiles of `bm` rows that `slots` rows need which `experts` experts share at random: a half for each expert beside the full ones, and at least one for each.
fn expected_tiles(slots: usize, experts: usize, bm: u32) -> u64 {
    let (slots, active, bm) = (slots as u64, experts.min(slots) as u64, u64::from(bm));
    (2 * slots + active * bm).div_ceil(2 * bm).max(active)
}

/// A tile, and how its kernel multiplies it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub(crate) bm: u32,
    pub(crate) bn: u32,
    by: Instructions,
}

#[derive(Clone, Copy, Debug)]
enum Instructions {
    /// `mma.sync`: so many warps side by side over rows and outputs, each of which loads its part of either.
    Warps([u32; 2]),
    /// `wgmma` of 64 rows and so many outputs, which reads both from shared memory.
    Warpgroups(u32),
}

impl Block {
    /// By `mma.sync`.
    pub(crate) fn of_warps(tile: &Tile) -> Block {
        Block { bm: tile.bm, bn: tile.bn, by: Instructions::Warps([tile.warps_m, tile.warps_n]) }
    }

    /// By `wgmma` of so many outputs.
    pub(crate) const fn of_warpgroups(bm: u32, bn: u32, outputs: u32) -> Block {
        Block { bm, bn, by: Instructions::Warpgroups(outputs) }
    }

    /// Rows that are multiplied together: dead ones up to a multiple of these cost products. Main loops of `mma.sync` have whole quarters of a tile, of 32 rows at least.
    fn together(&self) -> u32 {
        match self.by {
            Instructions::Warps(_) => (self.bm / 4).max(32).min(self.bm),
            Instructions::Warpgroups(_) => WARPGROUP_ROWS,
        }
    }

    /// Rows that its tiles of a product multiply, on average.
    pub(crate) fn multiplied(&self, rows: &ProductRows) -> f64 {
        let together = self.together();
        (rows.tiles(together) * u64::from(together)) as f64 / rows.tiles(self.bm).max(1) as f64
    }

    /// What a tile takes of a multiprocessor for `steps` steps with so many rows, of which `live` are fetched, and with so many bytes through shared memory or L1 at its end.
    pub(crate) fn tile(&self, rates: &Rates, steps: f64, [multiplied, live]: [f64; 2], end_bytes: f64) -> TileCost {
        let bn = f64::from(self.bn);
        let (rate, loaded) = match self.by {
            Instructions::Warps([over_rows, over_outputs]) => {
                (rates.mma, multiplied * f64::from(over_outputs) + bn * f64::from(over_rows))
            }
            Instructions::Warpgroups(outputs) => {
                let [outputs, rows] = [outputs, WARPGROUP_ROWS].map(f64::from);
                (rates.wgmma, multiplied * bn / outputs + bn * multiplied / rows)
            }
        };
        let products = steps * STEP as f64 * multiplied * bn / rate;
        TileCost { products, passes: steps * (live + bn + loaded) + end_bytes / STEP_BYTES }
    }
}

/// Cycles of a tile.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TileCost {
    /// Of tensor cores.
    pub(crate) products: f64,
    /// Of shared memory.
    pub(crate) passes: f64,
}

/// A kernel's work on a product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    pub(crate) tiles: u64,
    pub(crate) tile: TileCost,
    /// Bytes that all of them take from L2 and give to it.
    pub(crate) l2_bytes: f64,
}

impl Work {
    /// Both in one launch, tiles after tiles.
    pub(crate) fn beside(self, other: Work) -> Work {
        let tiles = self.tiles + other.tiles;
        let share = self.tiles as f64 / tiles.max(1) as f64;
        let mean = |own: f64, other: f64| share * own + (1.0 - share) * other;
        Work {
            tiles,
            tile: TileCost {
                products: mean(self.tile.products, other.tile.products),
                passes: mean(self.tile.passes, other.tile.passes),
            },
            l2_bytes: self.l2_bytes + other.l2_bytes,
        }
    }

    /// Cycles on a device whose memory is not asked: all kernels of a product ask it for the same bytes.
    pub(crate) fn cycles(&self, device: &DeviceInfo) -> f64 {
        self.of_rounds(self.tiles.div_ceil(device.multiprocessors.max(1).into()) as f64, device)
    }

    /// The same where blocks that walk the tiles end all at once.
    pub(crate) fn balanced_cycles(&self, device: &DeviceInfo) -> f64 {
        self.of_rounds((self.tiles as f64 / f64::from(device.multiprocessors.max(1))).max(1.0), device)
    }

    fn of_rounds(&self, rounds: f64, device: &DeviceInfo) -> f64 {
        let l2 = Rates::of(device.compute_capability).l2_bytes * f64::from(device.multiprocessors.max(1));
        (rounds * self.tile.products.max(self.tile.passes)).max(self.l2_bytes / l2)
    }
}

/// Cycles that so many bytes of device memory take.
pub(crate) fn dram_cycles(bytes: f64, device: &DeviceInfo) -> f64 {
    bytes / (Rates::of(device.compute_capability).dram_bytes * f64::from(device.multiprocessors.max(1)))
}

/// Bytes of `count` rows or outputs in so many steps.
pub(crate) fn step_bytes(count: f64, steps: f64) -> f64 {
    STEP_BYTES * count * steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::{Gemm, GemmHopper, KGroupedHopper};
    use crate::rules::Dtype;
    use crate::runtime::device::{A100, H100};

    fn rows(slots: usize, experts: usize) -> ProductRows {
        ProductRows { grouped: [slots, experts], dense: 0 }
    }

    #[test]
    fn a_tile_brings_its_rows_and_takes_them_to_the_tensor_cores() {
        let passes = |block: Block, live: u32| {
            block.tile(&Rates::of((9, 0)), 1.0, [f64::from(block.bm), f64::from(live)], 0.0).passes
        };
        let [tall, wide] = [&Gemm::tiles(Dtype::Bf16)[0], &Gemm::wide_tiles(Dtype::Bf16)[0]].map(Block::of_warps);
        // Two warps side by side read each row, and two or four each output.
        assert_eq!([passes(tall, 128), passes(tall, 100), passes(wide, 128)], [768.0, 740.0, 384.0 + 512.0 + 512.0]);
        // A warpgroup reads its 64 rows and all outputs.
        let Tile { bm, bn, .. } = GemmHopper::TILE;
        assert_eq!(passes(Block::of_warpgroups(bm, bn, bn), 128), 384.0 + 128.0 + 2.0 * 256.0);
        assert_eq!(passes(Block::of_warpgroups(64, bn, bn), 64), 2.0 * 320.0);
        let Tile { bm, bn, .. } = KGroupedHopper { dtype: Dtype::Bf16, gathers_b: true }.tile();
        assert_eq!(passes(Block::of_warpgroups(bm, bn, bn), 256), 384.0 + 256.0 + 4.0 * 128.0);
    }

    #[test]
    fn dead_rows_cost_products_up_to_whole_quarters() {
        let [tall, _, low] = [0, 1, 2].map(|index| Block::of_warps(&Gemm::tiles(Dtype::Bf16)[index]));
        let one = |block: Block, live| block.multiplied(&ProductRows { grouped: [0, 0], dense: live });
        assert_eq!([1, 33, 80, 97].map(|live| one(tall, live)), [32.0, 64.0, 96.0, 128.0]);
        assert_eq!(one(low, 1), 16.0);
        let hopper = Block::of_warpgroups(128, 256, 256);
        assert_eq!([1, 65].map(|live| one(hopper, live)), [64.0, 128.0]);
        // Half a quarter for each expert: 256 + 16 rows in 2.5 tiles.
        assert_eq!(tall.multiplied(&rows(4 * 256, 4)), (256.0 + 16.0) / 2.5);
    }

    #[test]
    fn the_slowest_unit_decides() {
        let (products, passes) = (1000.0, 700.0);
        let of = |tiles, tile, l2_bytes| Work { tiles, tile, l2_bytes }.cycles(&A100);
        let tile = TileCost { products, passes };
        // Whole rounds of 108 tiles.
        assert_eq!([1, 108, 109, 217].map(|tiles| of(tiles, tile, 0.0)), [1000.0, 1000.0, 2000.0, 3000.0]);
        assert_eq!(of(1, TileCost { products, passes: 1200.0 }, 0.0), 1200.0);
        // L2, which is not in rounds.
        assert_eq!(of(109, tile, 2008.0 * 2500.0), 2500.0);
        let balanced = |tiles| Work { tiles, tile, l2_bytes: 0.0 }.balanced_cycles(&A100);
        assert_eq!([1, 108, 135].map(balanced), [1000.0, 1000.0, 1250.0]);
    }

    #[test]
    fn two_kinds_of_tiles_in_one_launch() {
        let work = |tiles, products, l2_bytes| Work { tiles, tile: TileCost { products, passes: 10.0 }, l2_bytes };
        let both = work(54, 1000.0, 5.0).beside(work(162, 200.0, 7.0));
        assert_eq!((both.tiles, both.tile.products, both.tile.passes, both.l2_bytes), (216, 400.0, 10.0, 12.0));
        assert_eq!(both.cycles(&A100), 800.0);
        assert_eq!(work(0, 0.0, 0.0).beside(work(108, 300.0, 0.0)).cycles(&A100), 300.0);
    }

    #[test]
    fn memory_is_as_fast_as_it_is_sold() {
        for (device, bytes_a_second, hertz) in [(A100, 2039e9, 1.41e9), (H100, 3352e9, 1.98e9)] {
            let seconds = dram_cycles(1e9, &device) / hertz;
            assert!((seconds * bytes_a_second / 1e9 - 1.0).abs() < 1e-9, "{seconds}");
        }
    }

    #[test]
    fn every_architecture_has_rates() {
        for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)] {
            let rates = Rates::of(capability);
            assert!(rates.mma > 0.0 && rates.l2_bytes > 0.0 && rates.dram_bytes > 0.0, "{capability:?}");
            assert_eq!(rates.wgmma > 0.0, capability == H100.compute_capability);
        }
    }

    #[test]
    fn a_half_tile_for_each_active_expert() {
        assert_eq!(expected_tiles(0, 8, 64), 0);
        // Each that has a row has a tile.
        assert_eq!(expected_tiles(4, 8, 64), 4);
        assert_eq!(expected_tiles(8 * 33, 8, 128), 8);
        assert_eq!(expected_tiles(8 * 256, 8, 128), 16 + 4);
    }
}
