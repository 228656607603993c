//! What a grouped product costs by each kernel that computes it ([`crate::experts::cost`]), and the height of a layer's tiles.

use super::desc::{GemmDesc, KernelSet, Rows};
use super::{fold, hopper};
use crate::DeviceInfo;
use crate::experts::cost::{Block, ProductRows, Rates, STEP, Work, dram_cycles, step_bytes};
use crate::experts::dispatched::SlotShape;
use crate::experts::tiles::max_tiles;
use crate::registry::{Gemm, GemmHopper, Tile};
use crate::rules::{Dtype, Layout};

/// A kernel of a product.
#[derive(Clone, Copy, Debug)]
pub(in crate::experts) enum Candidate {
    /// Of the `sm_80` set, with so many columns of the result a block.
    Sm80(Tile, u32),
    /// Of the `sm_90a` set.
    Hopper(GemmHopper),
}

impl Candidate {
    pub(in crate::experts) fn sm80(gemm: &Gemm) -> Candidate {
        Candidate::Sm80(gemm.tile, gemm.out_columns())
    }

    /// Its work on the product.
    fn work(&self, desc: &GemmDesc, device: &DeviceInfo) -> Work {
        let rates = Rates::of(device.compute_capability);
        let (block, out_columns) = match self {
            Candidate::Sm80(tile, out_columns) => (Block::of_warps(tile), *out_columns),
            Candidate::Hopper(gemm) => {
                let Tile { bn, .. } = GemmHopper::TILE;
                (Block::of_warpgroups(hopper::tile_height(desc) as u32, bn, bn), gemm.out_columns())
            }
        };
        let rows = rows(desc);
        let (row_tiles, columns) = (rows.tiles(block.bm), desc.n.div_ceil(out_columns as usize) as u64);
        let steps = desc.k.div_ceil(STEP) as f64;
        let (multiplied, live) = (block.multiplied(&rows), rows.live() / row_tiles.max(1) as f64);
        let size = f64::from(desc.dtype.bytes());
        let out_bytes = live * f64::from(out_columns) * size;
        let end_bytes = match self {
            // Through a tile of f32, written and read.
            Candidate::Sm80(..) => 8.0 * multiplied * f64::from(block.bn) + out_bytes,
            // As they are stored, likewise.
            Candidate::Hopper(_) => 2.0 * out_bytes,
        };
        // A weight is fetched for each row tile; by a cluster for both of its tiles.
        let weights = match self {
            Candidate::Sm80(..) => row_tiles,
            Candidate::Hopper(_) => rows.tiles(2 * block.bm),
        };
        let fetched = step_bytes(rows.live() + weights as f64 * f64::from(block.bn), steps);
        Work {
            tiles: row_tiles * columns,
            tile: block.tile(&rates, steps, [multiplied, live], end_bytes),
            l2_bytes: columns as f64 * fetched + rows.live() * desc.n as f64 * size,
        }
    }

    /// The same with a shared expert's rows of so many outputs, and of their own depth.
    fn work_beside(&self, desc: &GemmDesc, shared_n: usize, device: &DeviceInfo) -> Work {
        if desc.shared_rows == 0 || [shared_n, desc.shared_k()] == [desc.n, desc.k] {
            return self.work(desc, device);
        }
        self.work(&desc.alone(), device).beside(self.work(&desc.of_shared(shared_n), device))
    }

    /// Cycles of the product, with a shared expert's rows of so many outputs. Hopper's blocks walk the tiles, and leave the part of one where no row lives: they are taken to end at once.
    pub(in crate::experts) fn cycles(&self, desc: &GemmDesc, shared_n: usize, device: &DeviceInfo) -> f64 {
        let work = self.work_beside(desc, shared_n, device);
        match self {
            Candidate::Sm80(..) => work.cycles(device),
            Candidate::Hopper(_) => work.balanced_cycles(device),
        }
    }

    /// Cycles of the product, whose last round takes as long as any.
    fn cycles_of_rounds(&self, desc: &GemmDesc, device: &DeviceInfo) -> f64 {
        self.work_beside(desc, desc.n, device).cycles(device)
    }

    /// Whether it takes no more [`cycles`](Self::cycles) than the other.
    pub(in crate::experts) fn is_ahead_of(
        &self,
        other: Candidate,
        desc: &GemmDesc,
        shared_n: usize,
        device: &DeviceInfo,
    ) -> bool {
        self.cycles(desc, shared_n, device) <= other.cycles(desc, shared_n, device)
    }
}

fn rows(desc: &GemmDesc) -> ProductRows {
    match desc.rows {
        Rows::Dense(rows) => ProductRows { grouped: [0, 0], dense: rows },
        Rows::Grouped(shape) => ProductRows { grouped: [shape.slots, shape.experts], dense: desc.shared_rows },
    }
}

/// The kernels of the `sm_80` set that compute the product in tiles of so many rows, `wide` ones among them, and fit the device.
pub(super) fn of_height(
    desc: &GemmDesc,
    layout: Layout,
    height: u32,
    wide: &'static [Tile],
    device: &DeviceInfo,
) -> impl Iterator<Item = Gemm> + use<> {
    let with = Gemm { dtype: desc.dtype, tile: GemmHopper::TILE, fold: fold(desc.weight.glu), layout };
    let most = device.shared_bytes_per_block;
    let tiles = Gemm::tiles(desc.dtype).iter().chain(wide).filter(move |tile| tile.bm == height);
    tiles.map(move |&tile| Gemm { tile, ..with }).filter(move |gemm| gemm.shared_bytes() <= most)
}

/// Heights of tiles between which [`height`] chooses.
const HEIGHTS: [u32; 2] = [64, 128];

/// The height of a dispatch's tiles, where `products` take its rows one after the other and `first` is what [`crate::experts::tiles::select_tile`] has for any
/// widths: of 64 and 128 rows those in which they cost less, whether blocks that walk tiles end with a whole round or all at once. Few tall tiles leave
/// multiprocessors idle; low ones fetch weights more often.
///
/// Other heights stay, as do those of f32, of rows that are not packed, and of devices of whose L2 nothing is published.
pub(crate) fn height(products: &[GemmDesc], first: u32, device: &DeviceInfo) -> u32 {
    let known = matches!(device.compute_capability, (8 | 9, 0));
    if !known || !HEIGHTS.contains(&first) {
        return first;
    }
    let cost = |height| {
        let of = |product| cycles_of_height(product, height, device);
        products
            .iter()
            .map(of)
            .try_fold([0.0; 2], |sum, cycles| cycles.map(|cycles| [sum[0] + cycles[0], sum[1] + cycles[1]]))
    };
    let Some([balanced, rounds]) = cost(first) else { return first };
    let is_cheaper = |&height: &u32| cost(height).is_some_and(|cost| cost[0] <= balanced && cost[1] < rounds);
    HEIGHTS.into_iter().find(|height| *height != first && is_cheaper(height)).unwrap_or(first)
}

/// Cycles of a product in tiles of so many rows, by the kernel that costs least, and those of its whole rounds; none where none of 16 bits computes it.
fn cycles_of_height(product: &GemmDesc, height: u32, device: &DeviceInfo) -> Option<[f64; 2]> {
    let Rows::Grouped(shape) = product.rows else { return None };
    let max_tiles = max_tiles(shape.slots, shape.experts, height as usize);
    let desc = GemmDesc { rows: Rows::Grouped(SlotShape { tile_m: height as usize, max_tiles, ..shape }), ..*product };
    let layout = desc.vector_layout().filter(|_| desc.dtype != Dtype::F32)?;
    let own = of_height(&desc, layout, height, Gemm::wide_tiles(desc.dtype), device).map(|gemm| Candidate::sm80(&gemm));
    let hopper = hopper::candidate(&desc, desc.n, layout, device).filter(|_| desc.kernels != KernelSet::Sm80);
    let all = own.chain(hopper.map(|(gemm, _)| Candidate::Hopper(gemm)));
    let cycles = all.map(|kernel| (kernel.cycles(&desc, desc.n, device), kernel));
    let (busy, kernel) = cycles.min_by(|(a, _), (b, _)| a.total_cmp(b))?;
    // Rows and results of products of so few tiles that the height matters pass from launch to launch in L2.
    let weights = rows(&desc).matrices() * desc.pre_activation_columns() * desc.k;
    let dram = dram_cycles(weights as f64 * f64::from(desc.dtype.bytes()), device);
    Some([busy, kernel.cycles_of_rounds(&desc, device)].map(|busy| busy.max(dram)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Fold;
    use crate::rules::{Activation, Glu, WeightDesc};
    use crate::runtime::device::{A100, H100};

    const HOPPER: Candidate =
        Candidate::Hopper(GemmHopper { dtype: Dtype::Bf16, fold: Fold::Plain, layout: Layout::Nk });

    fn glu(candidate: Candidate) -> Candidate {
        match candidate {
            Candidate::Hopper(gemm) => Candidate::Hopper(GemmHopper { fold: Fold::Glu, ..gemm }),
            other => other,
        }
    }

    /// Of 128 rows, and 128 and 256 columns.
    fn narrow_and_wide() -> [Candidate; 2] {
        [Gemm::tiles(Dtype::Bf16)[0], Gemm::wide_tiles(Dtype::Bf16)[0]].map(|tile| Candidate::Sm80(tile, tile.bn))
    }

    /// Whole tiles of 128 rows, so many columns, and 64 depths.
    fn dense(tiles: usize, n: usize) -> GemmDesc {
        GemmDesc::new(Dtype::Bf16, Rows::Dense(128 * tiles), n, 64)
    }

    /// Both products of a layer of `experts` experts, in tiles of so many rows.
    fn layer([experts, top_k, hidden, intermediate]: [usize; 4], tokens: usize, height: u32) -> [GemmDesc; 2] {
        let (slots, tile_m) = (tokens * top_k, height as usize);
        let tiles = max_tiles(slots, experts, tile_m);
        let rows = Rows::Grouped(SlotShape::new(tokens, experts, Some(top_k), slots, tile_m, tiles));
        let gate_up = GemmDesc::new(Dtype::Bf16, rows, intermediate, hidden).gather(true);
        let gate_up = gate_up.weight(WeightDesc::new(Dtype::Bf16).glu(Glu::Split)).activation(Activation::Silu);
        [gate_up, GemmDesc::new(Dtype::Bf16, rows, hidden, intermediate)]
    }

    #[test]
    fn l2_bounds_narrow_tiles_of_an_a100() {
        let cycles = |tiles, n| narrow_and_wide().map(|candidate| candidate.cycles(&dense(tiles, n), n, &A100));
        // Ten rounds, 32 KB of L2 for each million of products and 32 for its results; the wide tile has three quarters of the rows and outputs.
        let [narrow, wide] = cycles(135, 1024);
        assert_eq!(narrow, (8 * 135 * (128 * 256 + 2 * 128 * 128)) as f64 / 2008.0);
        assert!(wide < narrow);
        // A few blocks, each of which shared memory holds up longer than products.
        let [narrow, wide] = cycles(10, 1024);
        assert!(narrow < wide);
    }

    #[test]
    fn a_round_that_is_not_full_leaves_l2_to_its_blocks() {
        let deep = |tiles| GemmDesc { k: 64 * 64, ..dense(tiles, 1024) };
        // 1.2 rounds of wide tiles are two by their products, and 2.4 of narrow ones more by their bytes.
        let [narrow, wide] = narrow_and_wide().map(|candidate| candidate.cycles(&deep(32), 1024, &A100));
        assert_eq!(wide, 2.0 * 64.0 * 2048.0);
        assert_eq!(narrow, (8 * 32 * (64 * 128 * 256 + 2 * 128 * 128)) as f64 / 2008.0);
    }

    #[test]
    fn never_less_for_more() {
        for device in [A100, H100] {
            let [narrow, wide] = narrow_and_wide();
            for candidate in [narrow, wide, HOPPER] {
                let all = |descs: Vec<GemmDesc>| {
                    let cycles: Vec<f64> = descs.iter().map(|desc| candidate.cycles(desc, desc.n, &device)).collect();
                    assert!(cycles.is_sorted(), "{candidate:?}: {cycles:?}");
                };
                all((1..60).map(|i| dense(i, 1024)).collect());
                all((1..60).map(|i| dense(20, 128 * i)).collect());
                all((1..60).map(|i| GemmDesc { k: 32 * i, ..dense(20, 1024) }).collect());
            }
        }
    }

    #[test]
    fn wgmma_where_there_is_work_for_all() {
        let [narrow, _] = narrow_and_wide();
        let deep = |tiles| GemmDesc { k: 4096, ..dense(tiles, 4096) };
        assert!(HOPPER.is_ahead_of(narrow, &deep(33), 4096, &H100));
        // 128 tiles of half the size take one round all the same.
        assert!(!HOPPER.is_ahead_of(narrow, &deep(4), 4096, &H100));
        // Two rounds of those are longer than one.
        assert!(HOPPER.is_ahead_of(narrow, &deep(5), 4096, &H100));
        // 24 tiles of rows by 6 and by 11 of columns: 144 of Hopper's are hardly more than a round, and the others two, or three if one is more.
        let [gate_up, _] = layer([15, 4, 1024, 704], 512, 128);
        let [narrow, hopper] = [Candidate::Sm80(Gemm::tiles(Dtype::Bf16)[0], 64), glu(HOPPER)];
        assert!(hopper.is_ahead_of(narrow, &gate_up, gate_up.n, &H100));
    }

    #[test]
    fn shared_memory_holds_mma_sync_up() {
        // As many products in either, and less than an eighth through shared memory at the end: mma.sync's 768 passes a step beside 854 cycles.
        let block = Block::of_warps(&Gemm::tiles(Dtype::Bf16)[0]);
        let tile = block.tile(&Rates::of((9, 0)), 1.0, [128.0, 128.0], 0.0);
        assert!(tile.passes < tile.products && tile.passes > 0.89 * tile.products, "{tile:?}");
        // Of 85 live rows of 128, the last of an expert among them, the passes of the outputs remain.
        let tile = block.tile(&Rates::of((9, 0)), 1.0, [96.0, 85.0], 0.0);
        assert!(tile.passes > tile.products, "{tile:?}");
    }

    fn chosen(shape: [usize; 4], tokens: usize, first: u32, device: &DeviceInfo) -> u32 {
        height(&layer(shape, tokens, first), first, device)
    }

    #[test]
    fn few_tall_tiles_become_more_low_ones() {
        // Mixtral's 512 tokens in an eighth of its width and a quarter of its depth: 44 tiles of 128 x 256 in the second product, or 76 of 64 x 256.
        let narrow = [8, 2, 1024, 1792];
        assert_eq!(chosen(narrow, 512, 128, &H100), 64);
        assert_eq!(chosen([8, 2, 4096, 14336], 512, 128, &H100), 128);
        assert_eq!(chosen([128, 8, 2048, 768], 4096, 128, &H100), 128);
        // An A100 waits for L2, which low tiles ask twice for a weight.
        assert_eq!(chosen(narrow, 512, 128, &A100), 128);
        // From either side the same.
        assert_eq!(chosen(narrow, 512, 64, &H100), 64);
        // Fewer rounds of low tiles are less, but not less work, and more passes through shared memory, if blocks end at once.
        assert_eq!(chosen([8, 4, 1024, 1024], 1024, 128, &H100), 128);
    }

    #[test]
    fn what_is_not_known_stays() {
        let narrow = [8, 2, 1024, 1792];
        assert_eq!(chosen(narrow, 512, 16, &H100), 16);
        for capability in [(8, 6), (8, 9), (10, 0), (12, 0)] {
            let device = DeviceInfo { compute_capability: capability, ..H100 };
            assert_eq!(chosen(narrow, 512, 128, &device), 128, "{capability:?}");
        }
        let of = |with: fn(GemmDesc) -> GemmDesc| height(&layer(narrow, 512, 128).map(with), 128, &H100);
        assert_eq!(of(|desc| desc), 64);
        assert_eq!(of(|desc| desc.unaligned(true)), 128);
        assert_eq!(of(|desc| GemmDesc { dtype: Dtype::F32, weight: WeightDesc::new(Dtype::F32), ..desc }), 128);
    }
}
