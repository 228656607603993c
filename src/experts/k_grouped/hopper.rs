//! The `sm_90a` kernels: when they are chosen, and the tensor maps of the operand that lies by rows.

use super::{Gathered, KGroupedDesc, OPERATION, SharedSizes};
use crate::experts::cost::{Block, Rates, STEP, Work, step_bytes};
use crate::registry::{KGrouped, KGroupedHopper, Kernel};
use crate::runtime::launch::{Address, Boxes, Scope};
use crate::runtime::params::{KGroupedHopperMore, KGroupedHopperParams, KGroupedParams};
use crate::{DeviceInfo, Error, Selection};

/// Blocks of a cluster: they compute neighbouring tiles, and fetch what both need together.
const CLUSTER: u32 = 2;

/// Rows of a stage, and columns of a box of 128 bytes.
const BOX: [u32; 2] = [64; 2];

/// The kernel and its grid of persistent blocks, where it computes `desc` on this device.
pub(super) fn candidate(desc: &KGroupedDesc, device: &DeviceInfo) -> Option<Selection> {
    let fits = device.compute_capability == (9, 0)
        && device.shared_bytes_per_block >= KGroupedHopper::SHARED_BYTES
        && device.multiprocessors >= CLUSTER
        && KGroupedHopper::DTYPES.contains(&desc.dtype)
        && desc.packed_in_vectors()
        && desc.second.is_none()
        && desc.rows.slots + desc.shared_rows > 0;
    let gathers_b = desc.gathered == Gathered::B;
    let kernel = KGroupedHopper { dtype: desc.dtype, gathers_b };
    // Rows of a tensor map lie apart, and the kernel counts pairs of tiles in 32 bits.
    let [own, shared] = by_rows(desc, &kernel);
    let counts = own.1 > 0 && shared.1 > 0 && pairs(desc) <= i32::MAX as u64;
    if !fits || !counts {
        return None;
    }
    let clusters = pairs(desc).min((device.multiprocessors / CLUSTER).into()) as u32;
    let selection = Selection::new(Kernel::KGroupedHopper(kernel), [CLUSTER * clusters, 1, 1]);
    Some(Selection { cluster: [CLUSTER, 1, 1], ..selection })
}

/// Columns of the operand that is not gathered, and elements from a row of it to the next; the same of a shared expert's.
fn by_rows(desc: &KGroupedDesc, kernel: &KGroupedHopper) -> [(usize, usize); 2] {
    let (places, SharedSizes { m, n, rows: [a, b, _] }) = (desc.places(), desc.shared());
    if kernel.gathers_b { [(desc.m, places.a[0]), (m, a)] } else { [(desc.n, places.b[0]), (n, b)] }
}

/// Groups of one size.
#[derive(Clone, Copy)]
struct Groups {
    count: u64,
    m: u64,
    n: u64,
    /// Rows of an average one.
    rows: usize,
}

impl Groups {
    /// The experts', and a shared one's.
    fn of(desc: &KGroupedDesc) -> [Groups; 2] {
        let (experts, SharedSizes { m, n, .. }) = (desc.rows.experts, desc.shared());
        let rows = desc.rows.slots.div_ceil(experts);
        [
            Groups { count: experts as u64, m: desc.m as u64, n: desc.n as u64, rows },
            Groups { count: u64::from(desc.shared_rows > 0), m: m as u64, n: n as u64, rows: desc.shared_rows },
        ]
    }

    /// Tiles of so many rows and columns.
    fn tiles(&self, [bm, bn]: [u32; 2]) -> u64 {
        self.m.div_ceil(bm.into()) * self.n.div_ceil(bn.into()) * self.count
    }
}

/// Pairs of tiles, which a cluster computes at once: 256 columns of either operand.
fn pairs(desc: &KGroupedDesc) -> u64 {
    Groups::of(desc).iter().map(|groups| groups.tiles([256; 2])).sum()
}

/// Whether the kernel takes no more cycles than the `sm_80` one.
pub(super) fn is_ahead(desc: &KGroupedDesc, selection: &Selection, other: &KGrouped, device: &DeviceInfo) -> bool {
    let Kernel::KGroupedHopper(kernel) = selection.kernel.variant() else { return false };
    let rates = Rates::of(device.compute_capability);
    let size = if desc.f32_out { 4 } else { desc.dtype.bytes() };
    // `together`: tiles of so many rows and columns are computed at once; `fetched`: columns of both operands that come from L2 for a tile.
    let cycles = |together: [u32; 2], block: Block, through_shared: u32, fetched: u32| {
        let [bm, bn] = [block.bm, block.bn].map(f64::from);
        let out_bytes = bm * bn * f64::from(size);
        let end_bytes = bm * bn * f64::from(through_shared) + out_bytes;
        let at_once = u64::from(together[0] * together[1] / (block.bm * block.bn));
        let [own, shared] = Groups::of(desc).map(|groups| {
            let (tiles, steps) = (at_once * groups.tiles(together), groups.rows.div_ceil(STEP) as f64);
            let l2_bytes = tiles as f64 * (step_bytes(fetched.into(), steps) + out_bytes);
            Work { tiles, tile: block.tile(&rates, steps, [bm, bm], end_bytes), l2_bytes }
        });
        own.beside(shared).cycles(device)
    };
    let tile = kernel.tile();
    // 128 columns of one operand, and of the other half of 256. An instruction's outputs are columns of B.
    let own = cycles([256; 2], Block::of_warpgroups(tile.bm, tile.bn, tile.bn), 0, 256);
    let tile = other.tile();
    // Through a tile of f32, written and read.
    own <= cycles([tile.bm, tile.bn], Block::of_warps(&tile), 8, tile.bm + tile.bn)
}

/// What [`KernelSet::Sm90a`](crate::experts::gemm::KernelSet::Sm90a) asks for and cannot have.
pub(super) fn refusal(desc: &KGroupedDesc, device: &DeviceInfo) -> Error {
    let (major, minor) = device.compute_capability;
    let got = format!("{:?} of {} on compute capability {major}.{minor}", desc.kernels, desc.dtype);
    let expected = "another set, unless 16-bit, of rows that begin on 16 bytes, at most one gathered, of one matrix a group, on 9.0";
    Error::unsupported(OPERATION, "kernels", expected, got)
}

/// The launch's parameters with the maps of the operand that is not gathered, `[a, b]` and the shared expert's.
pub(super) fn with_maps<'a>(
    scope: &Scope<'_>,
    desc: &KGroupedDesc,
    kernel: &KGroupedHopper,
    params: KGroupedParams<'a>,
    sides: [Address<'_>; 2],
    shared: Option<[Address<'_>; 2]>,
) -> Result<KGroupedHopperParams<'a>, Error> {
    let [own, of_shared] = by_rows(desc, kernel);
    let side = usize::from(!kernel.gathers_b);
    // Element (c, y, z) is column c of row y + z: a box whose y begins below 0 begins with zeros.
    let map_of = |first: Address<'_>, rows: usize, (columns, row): (usize, usize)| {
        let [_, deep] = BOX;
        let sizes = [columns, deep as usize, rows];
        scope.tensor_map(first, &Boxes { dtype: desc.dtype, sizes, strides: [row; 2], extent: BOX })
    };
    let own = (desc.rows.slots > 0).then(|| map_of(sides[side], desc.rows.slots, own)).transpose()?;
    let of_shared = shared.map(|shared| map_of(shared[side], desc.shared_rows, of_shared)).transpose()?;
    // One that the kernel does not use is the other.
    let map = own.or(of_shared).expect("there are rows, as the kernel was chosen");
    let more = KGroupedHopperMore { experts: desc.rows.experts as u32, map, map_shared: of_shared.unwrap_or(map) };
    Ok(KGroupedHopperParams::with(params, more))
}

#[cfg(test)]
mod tests {
    use super::super::select;
    use super::*;
    use crate::experts::dispatched::SlotShape;
    use crate::experts::gemm::KernelSet;
    use crate::rules::Dtype;
    use crate::runtime::device::{A100, H100};

    /// A gradient of Qwen3-30B's second weight, of so many tokens.
    fn qwen3(tokens: usize) -> KGroupedDesc {
        let rows = SlotShape::new(tokens, 128, Some(8), 8 * tokens, 128, tokens);
        KGroupedDesc::new(Dtype::Bf16, rows, 2048, 768).gathered(Gathered::A)
    }

    fn chosen(desc: &KGroupedDesc, device: &DeviceInfo) -> Option<bool> {
        match select(desc, device).unwrap().kernel.variant() {
            Kernel::KGroupedHopper(kernel) => Some(kernel.gathers_b),
            _ => None,
        }
    }

    #[test]
    fn only_hopper_runs_it_and_only_where_it_is_ahead() {
        for tokens in [512, 4096, 32768] {
            assert_eq!(chosen(&qwen3(tokens), &H100), Some(false), "{tokens}");
        }
        assert_eq!(chosen(&qwen3(4096), &A100), None);
        assert_eq!(chosen(&qwen3(4096), &DeviceInfo { shared_bytes_per_block: 164 << 10, ..H100 }), None);
        assert_eq!(chosen(&qwen3(4096).gathered(Gathered::B), &H100), Some(true));
        assert_eq!(chosen(&qwen3(4096).gathered(Gathered::Both), &H100), None);
        assert_eq!(chosen(&qwen3(4096).kernels(KernelSet::Sm80), &H100), None);
        assert_eq!(chosen(&KGroupedDesc { dtype: Dtype::F32, ..qwen3(4096) }, &H100), None);
        assert_eq!(chosen(&KGroupedDesc { m: 2047, ..qwen3(4096) }, &H100), None);
        // A block of sm_80 for each multiprocessor does it in one round, unless groups are so shallow that its way out, through shared memory, is most of it.
        let one = KGroupedDesc::new(Dtype::F16, SlotShape::new(512, 1, Some(1), 512, 64, 8), 1024, 1024);
        assert_eq!(chosen(&one, &H100), None);
        let shallow = KGroupedDesc { rows: SlotShape::new(64, 1, Some(1), 64, 64, 1), ..one };
        assert_eq!(chosen(&shallow, &H100), Some(false));
    }

    #[test]
    fn a_set_that_was_asked_for() {
        let small = KGroupedDesc::new(Dtype::F16, SlotShape::new(1536, 3, Some(1), 1536, 64, 27), 264, 520);
        let forced = small.kernels(KernelSet::Sm90a);
        assert_eq!(chosen(&small, &H100), None);
        // Two and three pairs a group.
        let selection = select(&forced, &H100).unwrap();
        assert_eq!((selection.grid, selection.cluster), ([2 * 3 * 2 * 3, 1, 1], [2, 1, 1]));
        assert_eq!(select(&qwen3(4096), &H100).unwrap().grid, [132, 1, 1]);
        for (desc, device) in
            [(forced, &A100), (forced.gathered(Gathered::Both), &H100), (forced.unaligned(true), &H100)]
        {
            assert_eq!(select(&desc, device).unwrap_err().argument(), Some("kernels"));
        }
    }
}
