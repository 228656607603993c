//! Clusters over host threads. Each host thread takes clusters in launch order and runs the warps of their blocks in turn, a
//! slice at a time, in an order that the seed picks. A cluster that only spins is set aside for further ones, so that patterns
//! in which blocks wait for one another (grid barriers, look-back) make progress. Without clusters each block is its own.
//!
//! So far a cluster goes on until it waits for another one, and what is not ordered between blocks is mostly in order. Most seeds
//! change that: after a round in some, the host thread goes on with another cluster, so that one stands between two barriers while
//! others pass.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex};
use std::time::Instant;

use super::cluster::{self, Shape};
use super::fault::{Fault, FaultKind};
use super::interpreter::{self, Isa, Stop};
use super::lanes::Buffer;
use super::observe::{BlockEvent, BlockSite};
use super::print::Printed;
use super::state::{Cluster, GroupState, Warp, Worker, mix};
use super::tally::Tally;
use super::{Counters, Launch, start};
use crate::lower::ir::{CONSTANT, Extra};

/// Rounds of a cluster before another one is tried: those in which some warp used up its slice count for more than those in
/// which all came to a barrier, where loops of many short stages spend their time. Halved whenever it runs out, for a launch
/// whose blocks have once waited for one another will do it again.
const PATIENCE: u32 = 4096;
const LEAST_PATIENCE: u32 = 256;
/// What a round with an expired slice counts for.
const EXPIRED_COST: u32 = 128;
/// Rounds between looks at the clock.
const CLOCK_ROUNDS: u32 = 64;

/// Clusters that a host thread goes to and fro between where the seed asks for it, besides cooperative ones.
const MIXED: usize = 8;

/// When a host thread leaves a cluster that could go on.
struct Switches {
    random: u64,
    /// One round in so many; 0 for never.
    one_in: u64,
}

impl Switches {
    fn new(seed: u64, clusters: u64) -> Switches {
        let one_in = if seed == 0 { 0 } else { [0, 2, 8][(mix(seed) % 3) as usize] };
        Switches { random: mix(seed ^ clusters.rotate_left(16)), one_in }
    }

    /// After this round?
    fn now(&mut self) -> bool {
        if self.one_in == 0 {
            return false;
        }
        self.random = mix(self.random);
        self.random.is_multiple_of(self.one_in)
    }

    /// Whether one that waited is asked again.
    fn looks(&mut self) -> bool {
        self.random = mix(self.random);
        self.random & 1 != 0
    }

    /// The next cluster of `n` that are there, or `n` for a new one.
    fn choice(&mut self, n: usize) -> usize {
        self.random = mix(self.random);
        (self.random % (n as u64 + 1)) as usize
    }
}

/// What all host threads of a launch share.
struct Common {
    next: AtomicU64,
    total: u64,
    abort: AtomicBool,
    fault: Mutex<Option<Fault>>,
    printed: Mutex<Printed>,
}

/// A number for a launch, or for what watches tell apart from launches.
pub fn fresh_grid() -> u64 {
    static GRIDS: AtomicU64 = AtomicU64::new(1);
    GRIDS.fetch_add(1, Ordering::Relaxed)
}

pub fn run(l: &Launch) -> Result<Counters, Fault> {
    let shape = check(l)?;
    let grid_id = fresh_grid();
    let total = shape.clusters();
    let common = Common {
        next: AtomicU64::new(0),
        total,
        abort: AtomicBool::new(false),
        fault: Mutex::new(None),
        printed: Mutex::default(),
    };
    let constants = constants(&l.kernel.body.constants);
    let params = aligned(l.params);
    // Asking the system takes longer than a small launch.
    static CORES: LazyLock<usize> = LazyLock::new(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
    let threads = if l.config.threads == 0 { *CORES } else { l.config.threads };
    let threads = threads.min(usize::try_from(total).unwrap_or(usize::MAX)).max(1);
    let merged = Mutex::new(Counters::default());
    l.config.watches.iter().for_each(|w| w.begin(l, grid_id));
    let work = || {
        let mut worker = worker(l, shape, &constants, &params, grid_id);
        if let Err(fault) = run_clusters(&mut worker, l, &common) {
            common.abort.store(true, Ordering::Relaxed);
            common.fault.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(fault);
        }
        if !worker.printed.is_empty() {
            common.printed.lock().unwrap_or_else(|e| e.into_inner()).append(&mut worker.printed);
        }
        if let Some(tally) = worker.tally.take() {
            merged.lock().unwrap_or_else(|e| e.into_inner()).add(&tally.finish(worker.body));
        }
    };
    if threads == 1 {
        work();
    } else {
        rayon::in_place_scope(|scope| {
            for _ in 1..threads {
                scope.spawn(|_| work());
            }
            work();
        });
    }
    l.config.watches.iter().for_each(|w| w.end(l, grid_id));
    l.config.output.write(&common.printed.into_inner().unwrap_or_else(|e| e.into_inner()));
    if let Some(fault) = common.fault.into_inner().unwrap_or_else(|e| e.into_inner()) {
        l.config.watches.iter().for_each(|w| w.fault(&fault));
        return Err(fault);
    }
    let mut counters = merged.into_inner().unwrap_or_else(|e| e.into_inner());
    counters.launches = 1;
    Ok(counters)
}

/// Whether the launch fits the kernel; the shapes that it really has.
fn check(l: &Launch) -> Result<Shape, Fault> {
    let k = l.kernel;
    let bad = |message: String| Err(Fault::of_launch(k, FaultKind::InvalidLaunch, message));
    let threads: u64 = l.block.iter().map(|&n| u64::from(n)).product();
    let blocks = l.grid.iter().try_fold(1u64, |n, &x| n.checked_mul(x.into()));
    if l.grid.contains(&0) || l.block.contains(&0) || blocks.is_none() {
        return bad(format!("grid {:?} of blocks {:?}", l.grid, l.block));
    }
    if threads > 1024 {
        return bad(format!("{threads} threads per block; at most 1024"));
    }
    if let Some(max) = k.max_threads
        && threads > max.into()
    {
        return bad(format!("{threads} threads per block; the kernel allows {max}"));
    }
    if let Some(required) = k.reqntid
        && required != l.block
    {
        return bad(format!("blocks of {:?} threads; the kernel requires {required:?}", l.block));
    }
    if let Some(isa) = l.config.isa
        && !Isa::available().contains(&isa)
    {
        return bad(format!("the host has no {isa:?}"));
    }
    if l.params.len() != k.param_bytes as usize {
        return bad(format!("{} bytes of parameters; the kernel takes {}", l.params.len(), k.param_bytes));
    }
    cluster::shape(l).map_err(|message| Fault::of_launch(k, FaultKind::InvalidLaunch, message))
}

/// The constants, aligned.
fn constants(words: &[u32]) -> Buffer {
    let mut buffer = Buffer::new(words.len() * 4);
    // SAFETY: the buffer has room for all words.
    unsafe { std::ptr::copy_nonoverlapping(words.as_ptr(), buffer.as_mut_ptr().cast(), words.len()) };
    debug_assert!((words.len() as u64 * 4) < u64::from(CONSTANT));
    buffer
}

/// The parameters at an address as aligned as any of them may ask.
fn aligned(params: &[u8]) -> Buffer {
    let mut buffer = Buffer::new(params.len());
    // SAFETY: the buffer has room for all bytes.
    unsafe { std::ptr::copy_nonoverlapping(params.as_ptr(), buffer.as_mut_ptr(), params.len()) };
    buffer
}

fn worker<'a>(l: &'a Launch<'a>, shape: Shape, constants: &Buffer, params: &'a Buffer, grid_id: u64) -> Worker<'a> {
    let body = &l.kernel.body;
    let observers: Vec<_> = l.config.watches.iter().filter_map(|w| w.observer(l, grid_id)).collect();
    Worker {
        kernel: l.kernel,
        body,
        constants: constants.as_ptr().cast_mut(),
        params: params.bytes(l.params.len()),
        memory: l.memory,
        config: l.config,
        grid: shape.grid,
        block: l.block,
        cluster: shape.cluster,
        dynamic_shared: l.dynamic_shared_bytes,
        local_bytes: l.kernel.local_bytes + l.kernel.stack_bytes.unwrap_or(l.config.stack_bytes).next_multiple_of(16),
        printed: Printed::new(),
        started: Instant::now(),
        clock: 0,
        allocations: Vec::new(),
        tally: l.config.count.then(|| Box::new(Tally::new(body.blocks.len(), l.kernel.lines.len()))),
        watched: l.config.count || !observers.is_empty(),
        observers,
        isa: l.config.isa.unwrap_or_else(Isa::detect),
        grid_id,
        spare: VecDeque::new(),
    }
}

/// A cluster and how long it has made no visible progress.
struct Resident {
    cluster: Cluster,
    /// Rounds since its turn began, weighed.
    waited: u32,
    /// Some warp used up its slice in the latest round, as those that wait for another cluster do.
    spins: bool,
}

fn run_clusters(worker: &mut Worker, l: &Launch, common: &Common) -> Result<(), Fault> {
    let size = worker.cluster.iter().product::<u32>() as usize;
    let limit = if l.cooperative { usize::MAX } else { (l.config.max_resident_blocks / size).max(1) };
    let mut resident: VecDeque<Resident> = VecDeque::new();
    let mut patience = PATIENCE;
    let mut switches = Switches::new(l.config.seed, common.total);
    let mut rounds = 0u32;
    loop {
        if common.abort.load(Ordering::Relaxed) {
            return Ok(());
        }
        if resident.is_empty() {
            match take(worker, l, common) {
                Some(cluster) => resident.push_back(Resident { cluster, waited: 0, spins: false }),
                None => return Ok(()),
            }
        }
        let current = &mut resident[0];
        match round(worker, &mut current.cluster)? {
            Round::Finished => {
                let done = resident.pop_front().expect("there is a current cluster");
                tell(worker, &done.cluster, BlockEvent::End);
                if let Some(t) = &mut worker.tally {
                    t.finished_blocks += done.cluster.blocks.len() as u64;
                    t.working_blocks += done.cluster.blocks.iter().filter(|block| block.worked).count() as u64;
                    t.finished_warps += done.cluster.warps.iter().map(|w| w.len() as u64).sum::<u64>();
                }
                worker.spare.push_back(done.cluster);
            }
            Round::Progress => {
                current.waited += 1;
                current.spins = false;
            }
            Round::Expired => {
                current.waited += EXPIRED_COST;
                current.spins = true;
            }
        }
        rounds = rounds.wrapping_add(1);
        if rounds.is_multiple_of(CLOCK_ROUNDS)
            && let Some(timeout) = l.config.timeout
            && worker.started.elapsed() > timeout
            && let Some(current) = resident.front_mut()
        {
            return Err(place(worker, &mut current.cluster, FaultKind::LaunchTimeout, "the launch ran too long"));
        }
        if resident.front().is_some_and(|r| r.waited >= patience) {
            patience = (patience / 2).max(LEAST_PATIENCE);
            resident[0].waited = 0;
            resident.rotate_left(1);
            if resident.len() < limit
                && let Some(cluster) = take(worker, l, common)
            {
                resident.push_front(Resident { cluster, waited: 0, spins: false });
            }
        } else if switches.now() && !resident.is_empty() {
            let next = switches.choice(resident.len());
            let room = resident.len() < if l.cooperative { limit } else { limit.min(MIXED) };
            if next < resident.len() {
                // One that waits gets its turn when others do nothing else, and now and then before: else whoever sees first that a
                // barrier is open would always be the first at the next one too, and never find it open at once.
                if !resident[next].spins || switches.looks() {
                    resident.swap(0, next);
                }
            } else if room && let Some(cluster) = take(worker, l, common) {
                resident.push_front(Resident { cluster, waited: 0, spins: false });
            }
        }
    }
}

/// The next cluster that no host thread has taken.
fn take(worker: &mut Worker, l: &Launch, common: &Common) -> Option<Cluster> {
    if common.next.load(Ordering::Relaxed) >= common.total {
        return None;
    }
    let index = common.next.fetch_add(1, Ordering::Relaxed);
    (index < common.total).then(|| {
        let cluster = start::cluster(worker, l, index);
        tell(worker, &cluster, BlockEvent::Begin);
        cluster
    })
}

/// Tells observers of the start or end of a cluster's blocks.
fn tell(worker: &mut Worker, cluster: &Cluster, event: BlockEvent) {
    for block in &cluster.blocks {
        let site = BlockSite {
            block: block.linear,
            cluster: cluster.blocks[0].linear,
            threads: block.threads,
            shared_bytes: block.bytes,
            local_bytes: worker.local_bytes,
        };
        worker.observers.iter_mut().for_each(|o| o.block(&site, event));
    }
}

enum Round {
    Finished,
    /// Every warp came to a barrier or its end.
    Progress,
    /// Some warp used up its slice.
    Expired,
}

/// The numbers below `n` (at most `N`) in a random order, the first `n` of the array.
fn shuffled<const N: usize>(n: usize, random: &mut u64) -> [u8; N] {
    let mut order: [u8; N] = std::array::from_fn(|i| i as u8);
    for i in (1..n).rev() {
        *random = mix(*random);
        order.swap(i, (*random % (i as u64 + 1)) as usize);
    }
    order
}

/// Runs every warp of a cluster that can run once, in an order that the seed picks: block by block, and warp by warp in each.
fn round(worker: &mut Worker, cluster: &mut Cluster) -> Result<Round, Fault> {
    let mut random = mix(cluster.state.seed.wrapping_add(worker.clock));
    cluster.state.seed = random;
    let blocks = cluster.blocks.len();
    let ranks: [u8; 16] = shuffled(blocks, &mut random);
    let mut expired = false;
    let mut released = false;
    for &rank in &ranks[..blocks] {
        let rank = usize::from(rank);
        cluster.land_early(worker, random)?;
        let n = cluster.warps[rank].len();
        let order: [u8; 32] = shuffled(n, &mut random);
        for &i in &order[..n] {
            let i = usize::from(i);
            if !cluster.warps[rank][i].runnable() {
                continue;
            }
            let mut machine = cluster.machine(worker, rank, i);
            match interpreter::run(&mut machine) {
                Ok(stop) => {
                    expired |= stop == Stop::Expired;
                    machine.warp.polled = stop == Stop::Polled;
                }
                Err((raw, pc)) => return Err(machine.fault(*raw, pc)),
            }
        }
        released |= cluster.release_block(worker, rank);
    }
    if cluster.warps.iter().flatten().all(Warp::finished) {
        cluster.finish(worker)?;
        return Ok(Round::Finished);
    }
    released |= cluster.release_all(worker);
    released |= cluster.wake();
    let ready = cluster.warps.iter().flatten().any(|w| w.runnable() && !w.polled);
    if !cluster.engine_round(worker, released || ready && !expired, expired)? {
        let message = waiting(worker, cluster);
        return Err(place(worker, cluster, FaultKind::Deadlock, &message));
    }
    Ok(if expired { Round::Expired } else { Round::Progress })
}

/// Who waits where.
fn waiting(worker: &mut Worker, cluster: &mut Cluster) -> String {
    let mut parts = Vec::new();
    for rank in 0..cluster.blocks.len() {
        for i in 0..cluster.warps[rank].len() {
            for group in 0..cluster.warps[rank][i].groups.len() {
                parts.push(waiting_group(worker, cluster, rank, i, group));
            }
        }
    }
    let more = parts.len().saturating_sub(8);
    parts.truncate(8);
    let tail = if more == 0 { String::new() } else { format!(" and {more} more") };
    let what = if cluster.blocks.len() == 1 { "block" } else { "cluster" };
    let exited = cluster.blocks.iter().map(|b| b.exited_threads).sum::<u32>();
    format!("no thread of the {what} can go on, {exited} have exited; waiting: {}{tail}", parts.join(", "))
}

fn waiting_group(worker: &mut Worker, cluster: &mut Cluster, rank: usize, warp: usize, group: usize) -> String {
    let mut g = cluster.warps[rank][warp].groups[group];
    if cluster.warps[rank][warp].polled && g.state == GroupState::Ready {
        g.pc = cluster.warps[rank][warp].poll;
    }
    let body = worker.body;
    let line = body.lines.get(g.pc as usize).copied().unwrap_or(0);
    let text = worker.kernel.lines.get((line as usize).wrapping_sub(1)).map_or("", |l| l.trim());
    let of = if cluster.blocks.len() == 1 { String::new() } else { format!("block {:?} ", cluster.blocks[rank].block) };
    let place = format!("{of}warp {warp} lanes {:#010x} at line {line} `{text}`", g.mask);
    let what = match (g.state, body.ops.get(g.pc as usize).and_then(|op| body.extras.get(op.a as usize))) {
        (GroupState::AtClusterBarrier, _) => cluster.state.describe(),
        (GroupState::AtMbarrier | GroupState::Ready, Some(Extra::Mbarrier(x))) => {
            let mut machine = cluster.machine(worker, rank, warp);
            let file = machine.file();
            machine.describe_wait(file, x, g.mask).unwrap_or_default()
        }
        (GroupState::AtBarrier(id), _) => cluster.blocks[rank].describe_barrier(id),
        (GroupState::AtSync, Some(Extra::Exchange(x))) => {
            let file = cluster.machine(worker, rank, warp).file();
            // SAFETY: the slot is a 32-bit one of this kernel.
            let members = unsafe { file.lanes32(x.members.slot) }[g.mask.trailing_zeros() as usize % 32];
            format!(" (for lanes {:#010x})", members & cluster.warps[rank][warp].live() & !g.mask)
        }
        _ => String::new(),
    };
    place + &what
}

/// A fault of the whole cluster, placed at the first thread that has not exited.
fn place(worker: &mut Worker, cluster: &mut Cluster, kind: FaultKind, message: &str) -> Fault {
    let mut all = cluster.warps.iter().enumerate().flat_map(|(rank, w)| (0..w.len()).map(move |i| (rank, i)));
    let Some((rank, i)) = all.find(|&(rank, i)| !cluster.warps[rank][i].finished()) else {
        return Fault::of_launch(worker.kernel, kind, message);
    };
    let (pc, mask) = cluster.warps[rank][i].groups.first().map_or((0, 1), |g| (g.pc, g.mask));
    let raw = super::state::Raw::new(kind, mask, message);
    cluster.machine(worker, rank, i).fault(*raw, pc)
}
