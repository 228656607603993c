//! The `sm_90a` kernels: when they are chosen, and the tensor maps of their weights.

use super::desc::{GemmDesc, KernelSet, Output, Rows};
use super::strides::Strides;
use super::{Addresses, fold};
use crate::experts::weight::WeightAddresses;
use crate::registry::{GemmHopper, Kernel};
use crate::rules::Layout;
use crate::runtime::launch::{Address, Boxes, Scope};
use crate::runtime::params::{GemmHopperMore, GemmHopperParams, GemmParams, TensorMap};
use crate::{DeviceInfo, Error, Selection};

/// Strides of a tensor map in bytes are below this.
const MAX_STRIDE: u64 = 1 << 40;

/// Rows of the lists' tiles that it takes: of the lower one a warpgroup multiplies, and the other leaves.
const HEIGHTS: [usize; 2] = [64, GemmHopper::TILE.bm as usize];

/// Blocks of a cluster: they compute two row tiles of an expert, and fetch its weight together, or two column tiles of a row tile that is left over.
const CLUSTER: u32 = 2;

/// Bytes of L2 that gathered rows may hold against weights and outputs that pass: half of an H100's.
const KEPT_BYTES: f32 = 25e6;

/// The part of gathered rows to keep in L2 until the launch ends: several experts read each, far apart, and weights are read once. 0 where rows are
/// read in order.
fn kept(desc: &GemmDesc) -> f32 {
    let bytes = desc.a_rows() as f32 * desc.k as f32 * desc.dtype.bytes() as f32;
    if desc.gather && bytes > 0.0 { (KEPT_BYTES / bytes).min(1.0) } else { 0.0 }
}

/// A launch of so many blocks.
pub(in crate::experts) fn selection(kernel: Kernel, blocks: u32) -> Selection {
    Selection { cluster: [CLUSTER, 1, 1], ..Selection::new(kernel, [blocks, 1, 1]) }
}

/// The kernel and its grid of persistent blocks, where it computes `desc` in row tiles of its own height on this device, with a shared expert's rows of so many
/// outputs; `layout` is that of [`GemmDesc::vector_layout`].
pub(in crate::experts) fn candidate(
    desc: &GemmDesc,
    shared_n: usize,
    layout: Layout,
    device: &DeviceInfo,
) -> Option<(GemmHopper, u32)> {
    let places = desc.places();
    let [expert, output, depth] = places.weight;
    let height = tile_height(desc);
    let fits = device.compute_capability == (9, 0)
        && desc.output != Output::TokenSums
        && device.shared_bytes_per_block >= GemmHopper::SHARED_BYTES
        && GemmHopper::DTYPES.contains(&desc.dtype)
        && [expert, output.max(depth), places.a[0], desc.shared_places().a[0]].iter().all(|&stride| is_mapped(stride))
        && HEIGHTS.contains(&height);
    let gemm = GemmHopper { dtype: desc.dtype, fold: fold(desc.weight.glu), layout };
    // The kernel counts tiles in 32 bits, two a step, none of which has tiles of a shared expert and of others.
    let tiles = |rows: usize, n: usize| rows as u64 * n.div_ceil(gemm.out_columns() as usize) as u64;
    let [own, shared] = row_tiles(desc, GemmHopper::TILE.bm as usize);
    let tiles = tiles(shared, shared_n).next_multiple_of(CLUSTER.into()) + tiles(own, desc.n);
    let clusters = tiles.div_ceil(CLUSTER.into()).min((device.multiprocessors / CLUSTER).into()) as u32;
    (fits && device.multiprocessors >= CLUSTER && tiles <= i32::MAX as u64).then_some((gemm, CLUSTER * clusters))
}

/// Whether a map's rows may be so many elements apart.
fn is_mapped(stride: usize) -> bool {
    stride > 0 && (stride as u64) < MAX_STRIDE / 2
}

/// Rows of a tile: those of the lists, or the block's.
pub(super) fn tile_height(desc: &GemmDesc) -> usize {
    match desc.rows {
        Rows::Dense(_) => GemmHopper::TILE.bm as usize,
        Rows::Grouped(shape) => shape.tile_m,
    }
}

/// Row tiles at most, of dense rows of this height, and those of a shared expert.
fn row_tiles(desc: &GemmDesc, height: usize) -> [usize; 2] {
    let own = match desc.rows {
        Rows::Dense(rows) => rows.div_ceil(height),
        Rows::Grouped(shape) => shape.max_tiles,
    };
    [own, desc.shared_rows.div_ceil(height)]
}

/// What [`KernelSet::Sm90a`] asks for and cannot have.
pub(in crate::experts) fn refusal(operation: &'static str, desc: &GemmDesc, device: &DeviceInfo) -> Error {
    let (major, minor) = device.compute_capability;
    let rows = match desc.rows {
        Rows::Dense(_) => "dense rows".to_owned(),
        Rows::Grouped(shape) => format!("tiles of {} rows", shape.tile_m),
    };
    let got = format!("{:?} of {}, {rows} on compute capability {major}.{minor}", KernelSet::Sm90a, desc.dtype);
    let expected =
        "another set, unless 16-bit, dense or in tiles of 64 or 128 rows, of rows that begin on 16 bytes, on 9.0";
    Error::unsupported(operation, "kernels", expected, got)
}

/// The map of a tensor of the weight.
pub(in crate::experts) fn weight_map(
    scope: &Scope<'_>,
    desc: &GemmDesc,
    gemm: &GemmHopper,
    first: Address<'_>,
) -> Result<TensorMap, Error> {
    let experts = desc.rows.experts();
    let [expert, output, depth] = desc.places().weight;
    let (box_outputs, box_depths) = gemm.map_box();
    // Gate and up have a map each; where they alternate one has both.
    let outputs = if desc.weight.glu == crate::rules::Glu::Interleaved { 2 * desc.n } else { desc.n };
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
    scope.tensor_map(first, &boxes)
}

/// The map of rows of so many columns, `stride` elements apart, by 64 rows and columns.
fn rows_map(
    scope: &Scope<'_>,
    desc: &GemmDesc,
    first: Address<'_>,
    [rows, width]: [usize; 2],
    stride: usize,
) -> Result<TensorMap, Error> {
    let boxes = Boxes { dtype: desc.dtype, sizes: [width, rows, 1], strides: [stride; 2], extent: [64; 2] };
    scope.tensor_map(first, &boxes)
}

/// Maps of the rows of `a` and of the shared expert's; of those that the kernel does not read by one, `unused`.
pub(in crate::experts) fn a_maps(
    scope: &Scope<'_>,
    desc: &GemmDesc,
    a: Address<'_>,
    shared: Option<Address<'_>>,
    unused: TensorMap,
) -> Result<[TensorMap; 2], Error> {
    let of = |first, sizes, places: Strides| rows_map(scope, desc, first, sizes, places.a[0]);
    let rows = desc.a_rows();
    let own = if desc.gather || rows == 0 { unused } else { of(a, [rows, desc.k], desc.places())? };
    let of_shared = |first| of(first, [desc.shared_rows, desc.shared_k()], desc.shared_places());
    Ok([own, shared.map_or(Ok(own), of_shared)?])
}

/// The launch's parameters with the maps of weights, rows and results.
pub(super) fn with_maps<'a>(
    scope: &Scope<'_>,
    desc: &GemmDesc,
    gemm: &GemmHopper,
    params: GemmParams<'a>,
    at: &Addresses<'_>,
) -> Result<GemmHopperParams<'a>, Error> {
    let places = desc.places();
    let maps = |desc: &GemmDesc, weight: WeightAddresses<'_>| {
        let of = |first| weight_map(scope, desc, gemm, first);
        let first = of(weight.b)?;
        let up = weight.b_up.filter(|_| gemm.fold == crate::registry::Fold::Glu);
        Ok::<_, Error>([first, up.map_or(Ok(first), of)?])
    };
    let [map_b, map_b_up] = maps(desc, at.weight)?;
    // Those that the kernel does not use are the weight's.
    let [map_shared_b, map_shared_b_up]: [TensorMap; 2] =
        at.shared.map_or(Ok([map_b, map_b_up]), |shared| maps(&desc.of_shared(desc.n), shared.weight))?;
    let [map_a, map_shared_a] = a_maps(scope, desc, at.a, at.shared.map(|shared| shared.a), map_b)?;
    let out_of = |first, rows: usize| {
        // A tile of 64 rows is stored by the map; fewer rows may have any stride.
        let used = desc.output == Output::Rounded && rows >= 64;
        if used { rows_map(scope, desc, first, [rows, desc.n], places.out[0]) } else { Ok(map_b) }
    };
    let map_out = out_of(at.out, desc.rows.count())?;
    let map_shared_out = at.shared.map_or(Ok(map_out), |shared| out_of(shared.out, desc.shared_rows))?;
    let a_kept = kept(desc);
    let more = GemmHopperMore {
        map_b,
        map_b_up,
        map_shared_b,
        map_shared_b_up,
        map_a,
        map_shared_a,
        map_out,
        map_shared_out,
        a_kept,
    };
    Ok(GemmHopperParams::with(params, more))
}

#[cfg(test)]
mod tests {
    use super::super::select;
    use super::*;
    use crate::experts::dispatched::SlotShape;
    use crate::rules::{Activation, Dtype, Glu, WeightDesc};
    use crate::runtime::device::{A100, H100};

    /// Qwen3-30B's first product of so many tokens, in the worst case of tiles.
    fn qwen3(tokens: usize, tile_m: usize) -> GemmDesc {
        let tiles = crate::experts::tiles::max_tiles(8 * tokens, 128, tile_m);
        let rows = Rows::Grouped(SlotShape::new(tokens, 128, Some(8), 8 * tokens, tile_m, tiles));
        GemmDesc::new(Dtype::Bf16, rows, 768, 2048)
            .gather(true)
            .weight(WeightDesc::new(Dtype::Bf16).glu(Glu::Split))
            .activation(Activation::Silu)
    }

    fn is_hopper(desc: &GemmDesc, device: &DeviceInfo) -> bool {
        matches!(select(desc, device).unwrap().kernel.variant(), Kernel::GemmHopper(_))
    }

    #[test]
    fn only_hopper_runs_it_and_only_where_it_is_ahead() {
        assert!(is_hopper(&qwen3(32768, 128), &H100));
        assert!(!is_hopper(&qwen3(32768, 128), &A100));
        assert!(!is_hopper(&qwen3(32768, 128), &DeviceInfo { compute_capability: (10, 0), ..H100 }));
        assert!(!is_hopper(&qwen3(32768, 128), &DeviceInfo { shared_bytes_per_block: 200 << 10, ..H100 }));
        assert!(is_hopper(&qwen3(1024, 64), &H100));
        assert!(!is_hopper(&qwen3(128, 16), &H100), "lists of low tiles");
        assert!(!is_hopper(&qwen3(32768, 128).kernels(KernelSet::Sm80), &H100));
        assert!(!is_hopper(&qwen3(32768, 128).unaligned(true), &H100));
        let dense = |rows, n| GemmDesc::new(Dtype::F16, Rows::Dense(rows), n, 4096);
        assert!(is_hopper(&dense(4096, 4096), &H100));
        assert!(!is_hopper(&dense(1024, 1024), &H100), "64 blocks of sm_80 do it in one round");
        assert!(!is_hopper(
            &GemmDesc { dtype: Dtype::F32, weight: WeightDesc::new(Dtype::F32), ..dense(4096, 4096) },
            &H100
        ));
    }

    #[test]
    fn a_block_a_multiprocessor_walks_the_tiles() {
        assert_eq!(select(&qwen3(32768, 128), &H100).unwrap().grid, [132, 1, 1]);
        let few = GemmDesc::new(Dtype::Bf16, Rows::Dense(257), 264, 64).kernels(KernelSet::Sm90a);
        assert_eq!(select(&few, &H100).unwrap().grid, [6, 1, 1]);
        let none = GemmDesc { rows: Rows::Dense(0), ..few };
        assert_eq!(select(&none, &H100).unwrap().grid, [0, 1, 1]);
    }

    #[test]
    fn what_the_set_cannot_do_is_refused() {
        for desc in [qwen3(64, 16), qwen3(64, 128).unaligned(true)] {
            let error = select(&desc.kernels(KernelSet::Sm90a), &H100).unwrap_err();
            assert_eq!(error.argument(), Some("kernels"));
        }
        assert!(select(&qwen3(64, 128).kernels(KernelSet::Sm90a), &A100).is_err());
    }
}
