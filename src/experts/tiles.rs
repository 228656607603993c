//! How many tiles a grouped GEMM may need, and which tile fits a load.

use super::cost::Rates;
use super::gemm::KernelSet;
use crate::registry::{Fold, Gemm, GemmHopper, Tile};
use crate::rules::{Dtype, Layout};
use crate::{DeviceInfo, Error};

/// Largest number of tiles of `tile_m` rows that `slots` slots can need, however they spread over `experts` experts.
///
/// Each of at most `n = min(experts, slots)` experts that have rows needs `ceil(rows / tile_m)` tiles, and wastes less than
/// one: the total is at most `floor((slots + n (tile_m - 1)) / tile_m)`. The bound is attained, and needs no count from
/// the device: it is what grids are launched with.
///
/// `tile_m` is at least 1.
pub const fn max_tiles(slots: usize, experts: usize, tile_m: usize) -> usize {
    let active = if experts < slots { experts } else { slots };
    // Written so that it cannot overflow: slots / tile_m whole tiles, the rest spread at its worst.
    slots / tile_m + (slots % tile_m + active * (tile_m - 1)) / tile_m
}

/// Rows of computation that streaming one tile's share of the weight costs as much as.
///
/// A tile of `bm x bn` reads `bn` weight columns whatever `bm` is. A column of 64 depths is 128 bytes of 16-bit weights out of L2, a row of it 64
/// multiplications, each at the multiprocessor's [rate](Rates); half of it hides behind the products of other blocks: 55 rows on an A100. On Hopper, whose
/// L2 gives 2.6 times what DRAM does (A100: 1.4), a weight that low tiles take from L2 twice is hidden behind DRAM, and low tiles need a launch less;
/// of the others nothing is published on L2, and products of f32 take longer: 32 rows.
fn weight_rows(dtype: Dtype, device: &DeviceInfo) -> u64 {
    let rates = Rates::of(device.compute_capability);
    if device.compute_capability == (8, 0) && dtype != Dtype::F32 { (rates.mma / rates.l2_bytes) as u64 } else { 32 }
}

/// Chooses the tile of a GEMM that `slots` rows enter, spread over `experts` experts.
///
/// An active expert gets `r = slots / min(experts, slots)` rows on average. With loads that vary, it needs about
/// `r / bm + 1/2` tiles, each costing its `bm` rows and a share of `w` for the weight (55 rows on an A100, else 32), so the choice minimises
/// `(r / bm + 1/2) (bm + w)`: few rows per expert take low tiles, from 129 rows on the tallest. Both GEMMs of a layer use
/// the same tile list, so the choice depends on neither's width; [`LayerDesc::plan`](crate::layer::LayerDesc::plan), which knows both, weighs 64 rows against 128 by what
/// both products [cost](super::cost).
///
/// A tile of 128 rows of which at most 64 live multiplies and fetches what a tile of 64 does, and an expert with more takes its weight from L2 once. On an
/// A100, which waits for L2, and for Hopper's own kernels ([`KernelSet::Sm90a`]) 16-bit types take the tallest as soon as experts may have more than 64
/// rows, from 33 on average.
///
/// Tiles whose shared memory the device cannot give are left out.
///
/// # Errors
/// [`Error::Unsupported`] where the device has too little shared memory for any tile.
pub fn select_tile(dtype: Dtype, slots: usize, experts: usize, device: &DeviceInfo) -> Result<Tile, Error> {
    select_tile_of(KernelSet::Fastest, dtype, slots, experts, device)
}

/// [`select_tile`] for kernels of this set.
pub(crate) fn select_tile_of(
    kernels: KernelSet,
    dtype: Dtype,
    slots: usize,
    experts: usize,
    device: &DeviceInfo,
) -> Result<Tile, Error> {
    let active = experts.min(slots).max(1);
    let grows_early = match device.compute_capability {
        (8, 0) => true,
        (9, 0) => kernels != KernelSet::Sm80,
        _ => false,
    };
    let many = slots / 32 >= active && slots != 32 * active;
    let tallest = if grows_early && many && dtype != Dtype::F32 { GemmHopper::TILE.bm } else { 0 };
    let weight = weight_rows(dtype, device);
    let cost = |tile: &Tile| height_cost(slots, experts, tile, weight);
    fitting(dtype, device).min_by_key(|tile| (tile.bm != tallest, cost(tile), tile.bm)).ok_or_else(|| {
        let least = Gemm::tiles(dtype).iter().map(|&tile| shared_bytes(dtype, tile)).min().unwrap_or(0);
        Error::unsupported(
            "select_tile",
            "device",
            format!("at least {least} bytes of shared memory per block"),
            format!("a device with {} bytes", device.shared_bytes_per_block),
        )
    })
}

/// What [`select_tile`] minimises.
fn height_cost(slots: usize, experts: usize, tile: &Tile, weight_rows: u64) -> u128 {
    let (active, slots, bm) = (experts.min(slots).max(1) as u128, slots as u128, u128::from(tile.bm));
    // (slots/active/bm + 1/2) (bm + w), times 2 active bm, is (2 slots + active bm) (bm + w) / bm.
    (2 * slots + active * bm) * (bm + u128::from(weight_rows)) * 1024 / bm
}

/// The tile of so many weight outputs for dense rows.
pub(crate) fn select_tile_of_width(dtype: Dtype, rows: usize, width: usize, device: &DeviceInfo) -> Option<Tile> {
    let tiles = Gemm::tiles(dtype).iter().chain(Gemm::wide_tiles(dtype)).copied();
    let fits = |tile: &Tile| tile.bn as usize == width && shared_bytes(dtype, *tile) <= device.shared_bytes_per_block;
    let weight = weight_rows(dtype, device);
    tiles.filter(fits).min_by_key(|tile| (height_cost(rows, 1, tile, weight), tile.bm))
}

/// The fewest rows that a tile of this type has on the device: what the tile list of a batch is bounded with, whatever its size.
pub(crate) fn lowest_tile(dtype: Dtype, device: &DeviceInfo) -> usize {
    fitting(dtype, device).map(|tile| tile.bm as usize).min().unwrap_or(1)
}

/// The tile of `tile_m` rows.
///
/// # Errors
/// [`Error::Unsupported`] where no variant has that height, or its shared memory exceeds the device's.
pub fn tile_of_height(dtype: Dtype, tile_m: usize, device: &DeviceInfo) -> Result<Tile, Error> {
    fitting(dtype, device).find(|tile| tile.bm as usize == tile_m).ok_or_else(|| {
        let heights: Vec<_> = fitting(dtype, device).map(|tile| tile.bm.to_string()).collect();
        Error::unsupported(
            "gemm",
            "tile_m",
            format!("{dtype} has tiles of {} rows on this device", heights.join(", ")),
            tile_m,
        )
    })
}

fn fitting(dtype: Dtype, device: &DeviceInfo) -> impl Iterator<Item = Tile> {
    let limit = device.shared_bytes_per_block;
    Gemm::tiles(dtype).iter().copied().filter(move |&tile| shared_bytes(dtype, tile) <= limit)
}

fn shared_bytes(dtype: Dtype, tile: Tile) -> u32 {
    Gemm { dtype, tile, fold: Fold::Plain, layout: Layout::Nk }.shared_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::device::{A100, H100};

    /// The most tiles over all ways to spread `slots` over `experts`.
    fn brute_force(slots: usize, experts: usize, tile_m: usize) -> usize {
        if experts == 1 {
            return slots.div_ceil(tile_m);
        }
        (0..=slots).map(|first| first.div_ceil(tile_m) + brute_force(slots - first, experts - 1, tile_m)).max().unwrap()
    }

    #[test]
    fn bound_is_attained() {
        for slots in 0..=14 {
            for experts in 1..=4 {
                for tile_m in 1..=5 {
                    let most = brute_force(slots, experts, tile_m);
                    assert_eq!(
                        max_tiles(slots, experts, tile_m),
                        most,
                        "{slots} slots, {experts} experts, {tile_m} rows"
                    );
                }
            }
        }
    }

    #[test]
    fn rows_per_expert_decide() {
        let height = |slots, experts| select_tile(Dtype::Bf16, slots, experts, &A100).unwrap().bm;
        assert_eq!(height(1, 8), 16);
        assert_eq!(height(8 * 8, 8), 16);
        assert_eq!(height(8 * 32, 8), 64);
        assert_eq!(height(8 * 512, 8), 128);
        assert_eq!(height(32768 * 8, 128), 128);
        assert_eq!(select_tile(Dtype::F32, 1 << 20, 8, &A100).unwrap().bm, 64);
    }

    #[test]
    fn what_l2_gives_decides_when_tiles_grow() {
        // A weight that comes from L2 twice costs more than half a tile's dead rows: `(r / 16 + 1/2) (16 + w)` against `(r / 64 + 1/2) (64 + w)`.
        let height = |dtype, rows: usize, device| select_tile(dtype, 8 * rows, 8, device).unwrap().bm;
        // And from where experts may have more than 64 rows on, it comes once.
        assert_eq!([9, 10, 32, 33].map(|rows| height(Dtype::Bf16, rows, &A100)), [16, 64, 64, 128]);
        assert_eq!([16, 17].map(|rows| height(Dtype::Bf16, rows, &H100)), [16, 64]);
        assert_eq!([16, 17].map(|rows| height(Dtype::F32, rows, &A100)), [16, 64]);
    }

    #[test]
    fn hopper_takes_tall_tiles_early() {
        let height = |dtype, slots| select_tile(dtype, slots, 128, &H100).unwrap().bm;
        assert_eq!([128 * 4, 128 * 32, 128 * 33].map(|slots| height(Dtype::Bf16, slots)), [16, 64, 128]);
        assert_eq!(height(Dtype::F32, 128 * 33), 64);
        let other = select_tile_of(KernelSet::Sm80, Dtype::Bf16, 128 * 33, 128, &H100).unwrap();
        assert_eq!(other.bm, 64, "kernels that have no tile of their own for it");
    }

    #[test]
    fn height_never_falls_as_rows_grow() {
        for (dtype, device) in Dtype::ALL.into_iter().flat_map(|dtype| [(dtype, &A100), (dtype, &H100)]) {
            let mut last = 0;
            for slots in (1..20_000).step_by(7) {
                let height = select_tile(dtype, slots, 16, device).unwrap().bm;
                assert!(height >= last, "{dtype}: {slots} slots");
                last = height;
            }
        }
    }

    #[test]
    fn little_shared_memory_takes_lower_tiles_or_is_refused() {
        let small = DeviceInfo { shared_bytes_per_block: 80 << 10, ..A100 };
        assert!(select_tile(Dtype::Bf16, 1 << 20, 8, &small).unwrap().bm < 128);
        let tiny = DeviceInfo { shared_bytes_per_block: 16 << 10, ..A100 };
        assert!(matches!(select_tile(Dtype::Bf16, 1, 8, &tiny), Err(Error::Unsupported { argument: "device", .. })));
        assert!(matches!(tile_of_height(Dtype::Bf16, 17, &A100), Err(Error::Unsupported { argument: "tile_m", .. })));
    }
}
