//! The `sm_90a` kernels: when they are chosen, and the tensor maps of their weights.

use super::desc::{GemmDesc, KernelSet, Rows};
use super::fold;
use crate::experts::weight::WeightAddresses;
use crate::registry::{GemmHopper, Tile};
use crate::rules::Layout;
use crate::runtime::launch::{Boxes, Scope};
use crate::runtime::params::{GemmHopperParams, GemmParams, TensorMap};
use crate::{DeviceInfo, Error};

/// Strides of a tensor map in bytes are below this.
const MAX_STRIDE: u64 = 1 << 40;

/// The kernel and its grid of persistent blocks, where it computes `desc` in row tiles of its own height on this device; `layout` is that of
/// [`GemmDesc::vector_layout`].
pub(super) fn candidate(desc: &GemmDesc, layout: Layout, device: &DeviceInfo) -> Option<(GemmHopper, u32)> {
    let [expert, output, depth] = desc.places().weight;
    let height = GemmHopper::TILE.bm as usize;
    let fits = device.compute_capability == (9, 0)
        && device.shared_bytes_per_block >= GemmHopper::SHARED_BYTES
        && GemmHopper::DTYPES.contains(&desc.dtype)
        && [expert, output.max(depth)].iter().all(|&stride| stride > 0 && stride as u64 * 2 < MAX_STRIDE)
        && match desc.rows {
            Rows::Dense(_) => true,
            Rows::Grouped(shape) => shape.tile_m == height,
        };
    let gemm = GemmHopper { dtype: desc.dtype, fold: fold(desc.weight.glu), layout };
    let tiles = row_tiles(desc, height) as u64 * desc.n.div_ceil(gemm.out_columns() as usize) as u64;
    fits.then(|| (gemm, tiles.min(device.multiprocessors.into()) as u32))
}

/// Row tiles of this height at most, those of a shared expert too.
fn row_tiles(desc: &GemmDesc, height: usize) -> usize {
    let own = match desc.rows {
        Rows::Dense(rows) => rows.div_ceil(height),
        Rows::Grouped(shape) => shape.max_tiles,
    };
    own + desc.shared_rows.div_ceil(height)
}

/// Whether the kernel is ahead of the `sm_80` one of this tile.
///
/// A tile's time goes with its area over the share of the tensor cores' rate that its instructions reach on Hopper: 0.65 for `mma.sync`, 0.88
/// for `wgmma` of 256 columns (measured on an H800 by others, arXiv:2402.13499 and later). Either set runs in rounds of a tile a
/// multiprocessor; a round that is not full takes as long as one that is. Few tiles favour small ones.
pub(super) fn is_faster(desc: &GemmDesc, gemm: &GemmHopper, other: (&Tile, u32), device: &DeviceInfo) -> bool {
    let time = |tile: &Tile, columns: u32, percent: u64| {
        let tiles = row_tiles(desc, tile.bm as usize) as u64 * desc.n.div_ceil(columns as usize) as u64;
        let rounds = tiles.div_ceil(device.multiprocessors.max(1).into());
        u128::from(rounds * u64::from(tile.bm * tile.bn)) * 100 / u128::from(percent)
    };
    let (tile, columns) = other;
    time(&GemmHopper::TILE, gemm.out_columns(), 88) < time(tile, columns, 65)
}

/// What [`KernelSet::Sm90a`] asks for and cannot have.
pub(super) fn refusal(operation: &'static str, desc: &GemmDesc, device: &DeviceInfo) -> Error {
    let (major, minor) = device.compute_capability;
    let rows = match desc.rows {
        Rows::Dense(_) => "dense rows".to_owned(),
        Rows::Grouped(shape) => format!("tiles of {} rows", shape.tile_m),
    };
    let got = format!("{:?} of {}, {rows} on compute capability {major}.{minor}", KernelSet::Sm90a, desc.dtype);
    let expected = "another set, unless 16-bit, dense or in tiles of 128 rows, of rows that begin on 16 bytes, on 9.0";
    Error::unsupported(operation, "kernels", expected, got)
}

/// The launch's parameters with the maps of the weights; `shared` are those of the shared expert.
pub(super) fn with_maps<'a>(
    scope: &Scope<'_>,
    desc: &GemmDesc,
    gemm: &GemmHopper,
    params: GemmParams<'a>,
    weight: WeightAddresses<'_>,
    shared: Option<WeightAddresses<'_>>,
) -> Result<GemmHopperParams<'a>, Error> {
    let [expert, output, depth] = desc.places().weight;
    let (box_outputs, box_depths) = gemm.map_box();
    // Gate and up have a map each; where they alternate one has both.
    let outputs = if desc.weight.glu == crate::rules::Glu::Interleaved { 2 * desc.n } else { desc.n };
    let maps = |weight: WeightAddresses<'_>, experts| {
        let boxes = match gemm.layout {
            Layout::Nk => Boxes {
                dtype: desc.dtype,
                sizes: [desc.k, outputs, experts],
                strides: [output, expert],
                extent: [box_depths, box_outputs],
            },
            _ => Boxes {
                dtype: desc.dtype,
                sizes: [outputs, desc.k, experts],
                strides: [depth, expert],
                extent: [box_outputs, box_depths],
            },
        };
        let first = scope.tensor_map(weight.b, &boxes)?;
        let up = weight.b_up.filter(|_| gemm.fold == crate::registry::Fold::Glu);
        Ok::<_, Error>([first, up.map_or(Ok(first), |up| scope.tensor_map(up, &boxes))?])
    };
    let [b, b_up] = maps(weight, desc.rows.experts())?;
    let [shared_b, shared_b_up]: [TensorMap; 2] = shared.map_or(Ok([b, b_up]), |weight| maps(weight, 1))?;
    Ok(GemmHopperParams::with(params, b, b_up, shared_b, shared_b_up))
}
