//! `cuOccupancy*`, computed as the CUDA occupancy calculator does, from the lowering's estimate of registers.

use super::context::current;
use super::function::Function;
use super::handles::Handle;
use super::launch::{LaunchConfig, config_parts};
use super::library::resolve;
use super::status::{CUresult, Outcome};
use super::{api, driver, out};
use crate::device::{
    Description, MAX_CLUSTER, MAX_PORTABLE_CLUSTER, MAX_THREADS_PER_BLOCK, SHARED_RESERVED, SHARED_UNIT, WARP_SIZE,
};

/// `CUoccupancyB2DSize`: dynamic shared memory as a function of the block size.
type SharedOfBlock = Option<unsafe extern "C" fn(i32) -> usize>;

/// Blocks of `threads` threads that one multiprocessor holds at once.
pub(super) fn blocks_per_sm(device: &Description, function: &Function, threads: u32, dynamic_shared: u64) -> u64 {
    let shared = u64::from(function.kernel.static_shared_bytes) + dynamic_shared;
    crate::device::occupancy(device, function.registers(), threads, shared).blocks.into()
}

/// Threads of a block, 0 where there are too many to count.
fn volume(block: [u32; 3]) -> u32 {
    block.iter().try_fold(1u32, |product, &extent| product.checked_mul(extent)).unwrap_or(0)
}

fn threads(block_size: i32) -> Outcome<u32> {
    u32::try_from(block_size)
        .ok()
        .filter(|threads| *threads > 0)
        .ok_or_else(|| CUresult::ERROR_INVALID_VALUE.with(format!("a block of {block_size} threads")))
}

/// Flags of an occupancy query: CU_OCCUPANCY_DISABLE_CACHING_OVERRIDE, which changes nothing here.
fn check_flags(flags: u32) -> Outcome {
    driver()?;
    if flags > 1 { Err(CUresult::ERROR_INVALID_VALUE.with(format!("flags {flags:#x}"))) } else { Ok(()) }
}

fn max_active(to: *mut i32, function: Handle, block_size: i32, dynamic: usize, flags: u32) -> Outcome {
    check_flags(flags)?;
    let function = resolve(function, current)?;
    let blocks = blocks_per_sm(function.device, &function, threads(block_size)?, dynamic as u64);
    unsafe { out(to, "numBlocks", blocks as i32) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
    blocks: *mut i32,
    function: Handle,
    block_size: i32,
    dynamic: usize,
) -> CUresult {
    api("cuOccupancyMaxActiveBlocksPerMultiprocessor", || max_active(blocks, function, block_size, dynamic, 0))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    blocks: *mut i32,
    function: Handle,
    block_size: i32,
    dynamic: usize,
    flags: u32,
) -> CUresult {
    api("cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags", || {
        max_active(blocks, function, block_size, dynamic, flags)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyAvailableDynamicSMemPerBlock(
    bytes: *mut usize,
    function: Handle,
    blocks: i32,
    block_size: i32,
) -> CUresult {
    api("cuOccupancyAvailableDynamicSMemPerBlock", || {
        driver()?;
        let function = resolve(function, current)?;
        let device = function.device;
        let most = blocks_per_sm(device, &function, threads(block_size)?, 0);
        let blocks = u64::try_from(blocks).ok().filter(|blocks| (1..=most).contains(blocks));
        let blocks = blocks.ok_or_else(|| {
            CUresult::ERROR_INVALID_VALUE.with(format!("1 to {most} such blocks fit a multiprocessor"))
        })?;
        let share = u64::from(device.shared_per_sm) / blocks / SHARED_UNIT * SHARED_UNIT;
        let share = share.saturating_sub(SHARED_RESERVED.into()).min(device.shared_per_block_optin.into());
        let available = share.saturating_sub(function.kernel.static_shared_bytes.into());
        unsafe { out(bytes, "dynamicSmemSize", available as usize) }
    })
}

fn potential_block_size(
    min_grid: *mut i32,
    block_size: *mut i32,
    function: Handle,
    shared_of_block: SharedOfBlock,
    dynamic: usize,
    limit: i32,
    flags: u32,
) -> Outcome {
    check_flags(flags)?;
    let function = resolve(function, current)?;
    let device = function.device;
    let most = function.kernel.max_threads.unwrap_or(MAX_THREADS_PER_BLOCK).min(MAX_THREADS_PER_BLOCK);
    let most = if limit > 0 { most.min(limit as u32) } else { most };
    // Largest first: of equal occupancies the largest block wins.
    let sizes = (1..=most.div_ceil(WARP_SIZE)).rev().map(|warps| (warps * WARP_SIZE).min(most));
    let mut best = (0, 0, 0);
    for threads in sizes {
        // SAFETY: the caller's function, for which it vouches.
        let dynamic = shared_of_block.map_or(dynamic, |shared| unsafe { shared(threads as i32) });
        let blocks = blocks_per_sm(device, &function, threads, dynamic as u64);
        let resident = blocks * u64::from(threads);
        if resident > best.0 {
            best = (resident, threads, blocks);
        }
    }
    let (_, threads, blocks) = best;
    if threads == 0 {
        return Err(CUresult::ERROR_INVALID_VALUE.with("no block size fits a multiprocessor"));
    }
    unsafe {
        out(min_grid, "minGridSize", blocks as i32 * device.sm_count as i32)?;
        out(block_size, "blockSize", threads as i32)
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxPotentialBlockSize(
    min_grid: *mut i32,
    block_size: *mut i32,
    function: Handle,
    shared_of_block: SharedOfBlock,
    dynamic: usize,
    limit: i32,
) -> CUresult {
    api("cuOccupancyMaxPotentialBlockSize", || {
        potential_block_size(min_grid, block_size, function, shared_of_block, dynamic, limit, 0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxPotentialBlockSizeWithFlags(
    min_grid: *mut i32,
    block_size: *mut i32,
    function: Handle,
    shared_of_block: SharedOfBlock,
    dynamic: usize,
    limit: i32,
    flags: u32,
) -> CUresult {
    api("cuOccupancyMaxPotentialBlockSizeWithFlags", || {
        potential_block_size(min_grid, block_size, function, shared_of_block, dynamic, limit, flags)
    })
}

fn check_clusters(device: &Description) -> Outcome {
    if device.compute_capability < (9, 0) {
        return Err(CUresult::ERROR_NOT_SUPPORTED.with("clusters need compute capability 9.0"));
    }
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxPotentialClusterSize(
    size: *mut i32,
    function: Handle,
    config: *const LaunchConfig,
) -> CUresult {
    api("cuOccupancyMaxPotentialClusterSize", || {
        driver()?;
        let function = resolve(function, current)?;
        let device = function.device;
        check_clusters(device)?;
        let (block, shared, _) = unsafe { config_parts(config)? };
        let blocks = blocks_per_sm(device, &function, volume(block), shared.into());
        let most = if function.non_portable_cluster() { MAX_CLUSTER } else { MAX_PORTABLE_CLUSTER };
        unsafe { out(size, "clusterSize", if blocks == 0 { 0 } else { most as i32 }) }
    })
}

/// Clusters that fit the device, as if its multiprocessors were one group; hardware loses a few to the groups' borders.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxActiveClusters(
    clusters: *mut i32,
    function: Handle,
    config: *const LaunchConfig,
) -> CUresult {
    api("cuOccupancyMaxActiveClusters", || {
        driver()?;
        let function = resolve(function, current)?;
        let device = function.device;
        check_clusters(device)?;
        let (block, shared, cluster) = unsafe { config_parts(config)? };
        let size = volume(function.required_cluster.or(cluster).unwrap_or([1; 3])).max(1);
        let blocks = blocks_per_sm(device, &function, volume(block), shared.into());
        let resident = blocks * u64::from(device.sm_count) / u64::from(size);
        unsafe { out(clusters, "numClusters", resident as i32) }
    })
}
