//! Clusters, blocks and warps as they are before their first instruction.

use super::Launch;
use super::call::Calls;
use super::cluster::ClusterState;
use super::copies::Copies;
use super::lanes::Buffer;
use super::policy::Policy;
use super::state::{Barrier, Cluster, Group, GroupState, Shared, Warp, Worker, mix};

/// The cluster at this place in launch order, made of the parts of a finished one where there is one.
pub fn cluster(worker: &mut Worker, l: &Launch, index: u64) -> Cluster {
    let size = worker.cluster.iter().product::<u32>();
    let threads: u32 = l.block.iter().product();
    let mut cluster = worker.spare.pop_front().unwrap_or_else(|| {
        let bytes = shared_bytes(l);
        Cluster {
            state: ClusterState::default(),
            blocks: (0..size).map(|rank| new_block(rank, bytes, threads)).collect(),
            warps: (0..size)
                .map(|_| (0..threads.div_ceil(32)).map(|index| new_warp(worker, index, threads)).collect())
                .collect(),
        }
    });
    cluster.state.reset(index, worker.grid, worker.cluster, threads);
    cluster.state.seed = mix(l.config.seed ^ index.rotate_left(32));
    let pattern = poison(l.config.seed);
    let [gx, gy, _] = worker.grid.map(u64::from);
    for (rank, block) in cluster.blocks.iter_mut().enumerate() {
        block.block = cluster.state.block(rank as u32, worker.cluster);
        let [x, y, z] = block.block.map(u64::from);
        block.linear = (z * gy + y) * gx + x;
        block.exited_threads = 0;
        block.worked = false;
        block.barriers = [Barrier::default(); 16];
        block.mbarriers.clear();
        block.phase_completed = false;
        block.warpgroups.iter_mut().for_each(|g| g.clear());
        block.registers.clear();
        block.memory.fill(pattern);
    }
    let luck = if l.config.seed == 0 { 0 } else { cluster.state.seed };
    cluster.state.waits = luck;
    for (i, warp) in cluster.warps.iter_mut().flatten().enumerate() {
        warp.groups.clear();
        warp.groups.push(Group { pc: worker.body.entry, mask: warp.present, state: GroupState::Ready });
        warp.current = 0;
        warp.exited = 0;
        warp.rotate = false;
        warp.pinned = false;
        warp.copies.clear();
        warp.wgmma.clear(luck, i as u64);
        warp.registers = Default::default();
        warp.calls.clear();
        warp.cluster_arrived = 0;
        warp.poll_expired = 0;
        warp.polled = false;
        warp.bulk_committed = [0; 32];
        warp.local.fill(pattern);
    }
    cluster
}

/// Shared memory of one block: the declared, then the dynamic.
fn shared_bytes(l: &Launch) -> u32 {
    let (k, dynamic) = (l.kernel, l.dynamic_shared_bytes);
    if dynamic == 0 { k.static_shared_bytes } else { k.static_shared_bytes.next_multiple_of(k.shared_align) + dynamic }
}

/// What memory that nobody has written reads as: any of these bytes makes NaN in f16, bf16, f32 and f64, and a large number
/// otherwise.
fn poison(seed: u64) -> [u8; 2] {
    let random = mix(seed);
    [0x81 | (random as u8 & 0x7f), if random >> 8 & 1 == 1 { 0xff } else { 0x7f }]
}

fn new_block(rank: u32, bytes: u32, threads: u32) -> Shared {
    Shared {
        block: [0; 3],
        linear: 0,
        rank,
        memory: Buffer::new(bytes as usize),
        bytes,
        barriers: [Barrier::default(); 16],
        mbarriers: Vec::new(),
        phase_completed: false,
        warpgroups: (0..threads.div_ceil(128)).map(|_| Default::default()).collect(),
        registers: Default::default(),
        exited_threads: 0,
        threads,
        worked: false,
    }
}

fn new_warp(worker: &Worker, index: u32, threads: u32) -> Warp {
    let body = worker.body;
    let mut predicates = vec![0; body.predicates as usize];
    predicates[0] = u32::MAX;
    let lanes = (threads - 32 * index).min(32);
    Warp {
        file: Buffer::new(body.file_bytes as usize),
        predicates,
        groups: Vec::with_capacity(4),
        current: 0,
        index,
        present: u32::MAX >> (32 - lanes),
        exited: 0,
        local: Buffer::new(worker.local_bytes as usize * 32),
        copies: Copies::default(),
        wgmma: Default::default(),
        registers: Default::default(),
        calls: Calls::default(),
        cluster_arrived: 0,
        cluster_parity: 0,
        poll_expired: 0,
        polled: false,
        poll: 0,
        bulk_committed: [0; 32],
        rotate: false,
        pinned: false,
        turn: 0,
        policy: Policy::default(),
    }
}
