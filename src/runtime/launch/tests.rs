//! Launches that no kernel of the registry makes yet, through the same code: a tensor map by value, a cluster, programmatic dependent
//! launch, and a cooperative grid on a device that holds less of it at once.

use cudarc::driver::{CudaSlice, DevicePtr};

use super::*;
use crate::device;
use crate::registry;
use crate::runtime::params::TensorMap;

/// Each block of 32 threads fetches 4 rows of 8 by a tensor map; `out[32 block + thread]` is the block's element `thread` + 1000
/// times that of the other block of its cluster.
const PAIRS: &str = "
.version 8.0
.target sm_90
.address_size 64
.visible .entry pairs(.param .align 64 .b8 param_map[128], .param .u64 param_out)
{
    .reg .u64 %map, %out; .reg .u32 %thread, %block, %rank, %row, %at, %peer; .reg .f32 %own, %other; .reg .pred %waits, %done;
    .shared .align 128 .b8 rows[128];
    .shared .align 8 .b64 full;
    griddepcontrol.wait;
    mov.b64 %map, param_map;
    cvta.param.u64 %map, %map;
    ld.param.u64 %out, [param_out];
    mov.u32 %thread, %tid.x;
    mov.u32 %block, %ctaid.x;
    mov.u32 %rank, %cluster_ctarank;
    setp.ne.u32 %waits, %thread, 0;
    @%waits bra STARTED;
    mbarrier.init.shared::cta.b64 [full], 1;
    fence.proxy.async;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], 128;
    shl.b32 %row, %block, 2;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [rows], [%map, {0, %row}], [full];
STARTED:
    bar.sync 0;
WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %done, [full], 0;
    @!%done bra WAIT;
    barrier.cluster.arrive.release;
    barrier.cluster.wait.acquire;
    mov.u32 %at, rows;
    mad.lo.u32 %at, %thread, 4, %at;
    ld.shared.f32 %own, [%at];
    xor.b32 %rank, %rank, 1;
    mapa.shared::cluster.u32 %peer, %at, %rank;
    ld.shared::cluster.f32 %other, [%peer];
    barrier.cluster.arrive.release;
    barrier.cluster.wait.acquire;
    fma.rn.f32 %own, %other, 0f447A0000, %own;
    mad.lo.u32 %thread, %block, 32, %thread;
    mad.wide.u32 %out, %thread, 4, %out;
    st.global.f32 [%out], %own;
    ret;
}
";

/// `out[block]` is the number of blocks.
const BLOCKS: &str = "
.version 7.0
.target sm_80
.address_size 64
.visible .entry blocks(.param .u64 param_out)
{
    .reg .u64 %out; .reg .u32 %block, %blocks;
    ld.param.u64 %out, [param_out];
    mov.u32 %block, %ctaid.x;
    mov.u32 %blocks, %nctaid.x;
    mad.wide.u32 %out, %block, 4, %out;
    st.global.u32 [%out], %blocks;
    ret;
}
";

/// An entry of 32 threads and no dynamic shared memory.
fn loaded(kernels: &Kernels, name: &str, ptx: &str) -> Loaded {
    let text = CString::new(ptx).unwrap();
    let load = || unsafe { result::module::load_data(text.as_ptr().cast()) };
    Loaded::of_module(kernels.context(), name, kernels.device(), (32, 0), load).unwrap()
}

fn kernels() -> Kernels {
    softcuda::install_if_no_gpu().expect("a real or a software device can be had");
    Kernels::new(&device::open(0).unwrap()).unwrap()
}

/// What stands in for a kernel of the registry: only the grid and the attributes count here.
fn selection(grid: u32) -> Selection {
    Selection::new(registry::Kernel::Base, [grid, 1, 1])
}

/// A map of `[rows, 8]` f32 in boxes of 4 rows.
fn map_of(matrix: &CudaSlice<f32>, stream: &Arc<CudaStream>) -> TensorMap {
    let mut map = std::mem::MaybeUninit::<sys::CUtensorMap>::zeroed();
    let (address, _access) = matrix.device_ptr(stream);
    let (extents, strides, boxes, steps) = ([8, matrix.len() as u64 / 8], [32u64], [8u32, 4], [1u32, 1]);
    // SAFETY: the arrays have the lengths of rank 2, and `map` is a whole map at a multiple of 64 bytes.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            map.as_mut_ptr(),
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            2,
            address as *mut c_void,
            extents.as_ptr(),
            strides.as_ptr(),
            boxes.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        .result()
        .unwrap();
        TensorMap(std::mem::transmute_copy(&map))
    }
}

#[test]
fn tensor_map_cluster_and_programmatic_launch() {
    let kernels = kernels();
    if kernels.device().compute_capability < (9, 0) {
        println!("the device has no clusters: not tested");
        return;
    }
    let stream = kernels.context().default_stream();
    let scope = Scope::begin("test", &kernels, &stream).unwrap();
    let pairs = loaded(&kernels, "pairs", PAIRS);
    const BLOCKS: usize = 6;
    let values: Vec<f32> = (0..32 * BLOCKS).map(|i| i as f32).collect();
    let matrix = stream.clone_htod(&values).unwrap();
    let mut out = stream.alloc_zeros::<f32>(32 * BLOCKS).unwrap();
    {
        let held = scope.write("out", (&mut out).into(), 32 * BLOCKS, SCALAR).unwrap();
        let mut map = map_of(&matrix, &stream);
        let mut address = held.address().value();
        let mut pointers: [*mut c_void; 2] = [(&raw mut map).cast(), (&raw mut address).cast()];
        let selection = Selection { cluster: [2, 1, 1], programmatic: true, ..selection(BLOCKS as u32) };
        // SAFETY: the parameters of `pairs`, in order; the matrix and `out` have the rows of six blocks.
        unsafe { scope.enqueue(&pairs, &selection, &mut pointers) }.unwrap();
    }
    let expected: Vec<f32> = (0..32 * BLOCKS).map(|i| values[i] + 1000.0 * values[i ^ 32]).collect();
    assert_eq!(stream.clone_dtoh(&out).unwrap(), expected);
}

#[test]
fn a_cooperative_grid_is_cut_to_what_is_resident() {
    let kernels = kernels();
    let stream = kernels.context().default_stream();
    let scope = Scope::begin("test", &kernels, &stream).unwrap();
    let mut blocks = loaded(&kernels, "blocks", BLOCKS);
    assert!(blocks.resident_blocks >= kernels.device().multiprocessors, "{}", blocks.resident_blocks);
    let run = |blocks: &Loaded, selection: Selection| {
        let mut out = stream.alloc_zeros::<u32>(8).unwrap();
        {
            let held = scope.write("out", (&mut out).into(), 8, SCALAR).unwrap();
            let mut address = held.address().value();
            // SAFETY: the parameter of `blocks`; at most eight blocks write a word each.
            unsafe { scope.enqueue(blocks, &selection, &mut [(&raw mut address).cast()]) }.unwrap();
        }
        stream.clone_dtoh(&out).unwrap()
    };
    let together = Selection { cooperative: true, ..selection(8) };
    assert_eq!(run(&blocks, together), [8; 8]);
    blocks.resident_blocks = 3;
    assert_eq!(run(&blocks, together), [3, 3, 3, 0, 0, 0, 0, 0]);
    // Blocks that do not meet need not be resident at once.
    assert_eq!(run(&blocks, selection(8)), [8; 8]);
    blocks.resident_blocks = 1;
    assert_eq!(run(&blocks, together), [1, 0, 0, 0, 0, 0, 0, 0]);
}
