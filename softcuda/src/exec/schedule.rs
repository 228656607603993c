//! Blocks over host threads. Each host thread takes blocks in launch order and runs the warps of a block in turn, a slice at
//! a time, in an order that the seed picks. A block that only spins is set aside for further ones, so that patterns in which
//! blocks wait for one another (grid barriers, look-back) make progress.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex};
use std::time::Instant;

use super::copies::Copies;
use super::fault::{Fault, FaultKind};
use super::interpreter::{self, Isa, Stop};
use super::lanes::Buffer;
use super::observe::{BlockEvent, BlockSite};
use super::state::{Barrier, Block, Group, GroupState, Machine, Shared, Warp, Worker, mix};
use super::tally::Tally;
use super::{Counters, Launch};
use crate::lower::ir::CONSTANT;

/// Rounds of a block before another one is tried: those in which some warp used up its slice count for more than those in
/// which all came to a barrier, where loops of many short stages spend their time. Halved whenever it runs out, for a launch
/// whose blocks have once waited for one another will do it again.
const PATIENCE: u32 = 4096;
const LEAST_PATIENCE: u32 = 256;
/// What a round with an expired slice counts for.
const EXPIRED_COST: u32 = 128;
/// Rounds between looks at the clock.
const CLOCK_ROUNDS: u32 = 64;

/// What all host threads of a launch share.
struct Common {
    next: AtomicU64,
    total: u64,
    abort: AtomicBool,
    fault: Mutex<Option<Fault>>,
}

pub fn run(l: &Launch) -> Result<Counters, Fault> {
    check(l)?;
    static GRIDS: AtomicU64 = AtomicU64::new(1);
    let grid_id = GRIDS.fetch_add(1, Ordering::Relaxed);
    let total = l.grid.iter().map(|&n| u64::from(n)).product();
    let common = Common { next: AtomicU64::new(0), total, abort: AtomicBool::new(false), fault: Mutex::new(None) };
    let constants = constants(&l.kernel.body.constants);
    let params = aligned(l.params);
    // Asking the system takes longer than a small launch.
    static CORES: LazyLock<usize> = LazyLock::new(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
    let threads = if l.config.threads == 0 { *CORES } else { l.config.threads };
    let threads = threads.min(usize::try_from(total).unwrap_or(usize::MAX)).max(1);
    let merged = Mutex::new(Counters::default());
    l.config.watches.iter().for_each(|w| w.begin(l, grid_id));
    let work = || {
        let mut worker = worker(l, &constants, &params, grid_id);
        if let Err(fault) = run_blocks(&mut worker, l, &common) {
            common.abort.store(true, Ordering::Relaxed);
            common.fault.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(fault);
        }
        if let Some(tally) = worker.tally.take() {
            merged.lock().unwrap_or_else(|e| e.into_inner()).add(&tally.finish(&worker));
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
    if let Some(fault) = common.fault.into_inner().unwrap_or_else(|e| e.into_inner()) {
        l.config.watches.iter().for_each(|w| w.fault(&fault));
        return Err(fault);
    }
    let mut counters = merged.into_inner().unwrap_or_else(|e| e.into_inner());
    counters.launches = 1;
    Ok(counters)
}

/// Whether the launch fits the kernel.
fn check(l: &Launch) -> Result<(), Fault> {
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
    if l.params.len() != k.param_bytes as usize {
        return bad(format!("{} bytes of parameters; the kernel takes {}", l.params.len(), k.param_bytes));
    }
    if l.cluster != [1, 1, 1] {
        return bad(format!("clusters of {:?} blocks are not implemented", l.cluster));
    }
    Ok(())
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

fn worker<'a>(l: &'a Launch<'a>, constants: &Buffer, params: &'a Buffer, grid_id: u64) -> Worker<'a> {
    let body = &l.kernel.body;
    let observers: Vec<_> = l.config.watches.iter().filter_map(|w| w.observer(l, grid_id)).collect();
    Worker {
        kernel: l.kernel,
        body,
        constants: constants.as_ptr().cast_mut(),
        params: params.bytes(l.params.len()),
        memory: l.memory,
        config: l.config,
        grid: l.grid,
        block: l.block,
        dynamic_shared: l.dynamic_shared_bytes,
        started: Instant::now(),
        clock: 0,
        allocations: Vec::new(),
        tally: l.config.count.then(|| Box::new(Tally::new(body.blocks.len(), l.kernel.lines.len()))),
        watched: l.config.count || !observers.is_empty(),
        observers,
        isa: Isa::detect(),
        grid_id,
        spare: VecDeque::new(),
    }
}

/// A block and how long it has made no visible progress.
struct Resident {
    block: Block,
    /// Rounds since its turn began, weighed.
    waited: u32,
}

fn run_blocks(worker: &mut Worker, l: &Launch, common: &Common) -> Result<(), Fault> {
    let limit = if l.cooperative { usize::MAX } else { l.config.max_resident_blocks.max(1) };
    let mut resident: VecDeque<Resident> = VecDeque::new();
    let mut patience = PATIENCE;
    let mut rounds = 0u32;
    loop {
        if common.abort.load(Ordering::Relaxed) {
            return Ok(());
        }
        if resident.is_empty() {
            match take(worker, l, common) {
                Some(block) => resident.push_back(Resident { block, waited: 0 }),
                None => return Ok(()),
            }
        }
        let current = &mut resident[0];
        match round(worker, &mut current.block)? {
            Round::Finished => {
                let done = resident.pop_front().expect("there is a current block");
                tell(worker, &done.block, BlockEvent::End);
                if let Some(t) = &mut worker.tally {
                    t.finished_blocks += 1;
                    t.finished_warps += done.block.warps.len() as u64;
                }
                worker.spare.push_back(done.block);
            }
            Round::Progress => current.waited += 1,
            Round::Expired => current.waited += EXPIRED_COST,
        }
        rounds = rounds.wrapping_add(1);
        if rounds.is_multiple_of(CLOCK_ROUNDS)
            && let Some(timeout) = l.config.timeout
            && worker.started.elapsed() > timeout
            && let Some(current) = resident.front_mut()
        {
            return Err(place(worker, &mut current.block, FaultKind::LaunchTimeout, "the launch ran too long"));
        }
        if resident.front().is_some_and(|r| r.waited >= patience) {
            patience = (patience / 2).max(LEAST_PATIENCE);
            resident[0].waited = 0;
            resident.rotate_left(1);
            if resident.len() < limit
                && let Some(block) = take(worker, l, common)
            {
                resident.push_front(Resident { block, waited: 0 });
            }
        }
    }
}

/// The next block that no host thread has taken.
fn take(worker: &mut Worker, l: &Launch, common: &Common) -> Option<Block> {
    if common.next.load(Ordering::Relaxed) >= common.total {
        return None;
    }
    let linear = common.next.fetch_add(1, Ordering::Relaxed);
    (linear < common.total).then(|| start(worker, l, linear))
}

fn start(worker: &mut Worker, l: &Launch, linear: u64) -> Block {
    let k = l.kernel;
    let threads: u32 = l.block.iter().product();
    let seed = mix(l.config.seed ^ linear.rotate_left(32));
    let dynamic = l.dynamic_shared_bytes;
    let bytes = if dynamic == 0 {
        k.static_shared_bytes
    } else {
        k.static_shared_bytes.next_multiple_of(k.shared_align) + dynamic
    };
    let mut block = worker.spare.pop_front().unwrap_or_else(|| {
        let warps = (0..threads.div_ceil(32)).map(|index| new_warp(worker, index, threads)).collect();
        let shared = Shared {
            block: [0; 3],
            linear: 0,
            memory: Buffer::new(bytes as usize),
            bytes,
            barriers: [Barrier::default(); 16],
            warpgroups: (0..threads.div_ceil(128)).map(|_| Default::default()).collect(),
            registers: Default::default(),
            exited_threads: 0,
            threads,
            seed: 0,
        };
        Block { shared, warps }
    });
    let [gx, gy, _] = l.grid.map(u64::from);
    block.shared.block = [(linear % gx) as u32, (linear / gx % gy) as u32, (linear / gx / gy) as u32];
    block.shared.linear = linear;
    block.shared.seed = seed;
    block.shared.exited_threads = 0;
    block.shared.barriers = [Barrier::default(); 16];
    block.shared.warpgroups.iter_mut().for_each(|g| g.clear());
    block.shared.registers.clear();
    // Any of these bytes reads as NaN in f16, bf16, f32 and f64, and as a large number otherwise.
    let pattern =
        [0x81 | (mix(l.config.seed) as u8 & 0x7f), if mix(l.config.seed) >> 8 & 1 == 1 { 0xff } else { 0x7f }];
    block.shared.memory.fill(pattern);
    for warp in &mut block.warps {
        warp.groups.clear();
        warp.groups.push(Group { pc: 0, mask: warp.present, state: GroupState::Ready });
        warp.current = 0;
        warp.exited = 0;
        warp.rotate = false;
        warp.pinned = false;
        warp.copies.clear();
        let luck = if l.config.seed == 0 { 0 } else { seed };
        warp.wgmma.clear(luck, warp.index.into());
        warp.registers = Default::default();
        warp.local.fill(pattern);
    }
    tell(worker, &block, BlockEvent::Begin);
    block
}

/// Tells observers of a block's start or end.
fn tell(worker: &mut Worker, block: &Block, event: BlockEvent) {
    let site = BlockSite {
        block: block.shared.linear,
        cluster: block.shared.linear,
        threads: block.shared.threads,
        shared_bytes: block.shared.bytes,
        local_bytes: worker.kernel.local_bytes,
    };
    worker.observers.iter_mut().for_each(|o| o.block(&site, event));
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
        local: Buffer::new(worker.kernel.local_bytes as usize * 32),
        copies: Copies::default(),
        wgmma: Default::default(),
        registers: Default::default(),
        rotate: false,
        pinned: false,
        turn: 0,
    }
}

enum Round {
    Finished,
    /// Every warp came to a barrier or its end.
    Progress,
    /// Some warp used up its slice.
    Expired,
}

/// Runs every warp of a block that can run once, in an order that the seed picks.
fn round(worker: &mut Worker, block: &mut Block) -> Result<Round, Fault> {
    let n = block.warps.len();
    let mut order: [u8; 32] = std::array::from_fn(|i| i as u8);
    let mut random = mix(block.shared.seed.wrapping_add(worker.clock));
    block.shared.seed = random;
    for i in (1..n).rev() {
        random = mix(random);
        order.swap(i, (random % (i as u64 + 1)) as usize);
    }
    let mut expired = false;
    let mut ran = false;
    for &i in &order[..n] {
        let warp = &mut block.warps[usize::from(i)];
        if !warp.runnable() {
            continue;
        }
        ran = true;
        let mut machine = Machine { worker, shared: &mut block.shared, warp };
        match interpreter::run(&mut machine) {
            Ok(stop) => expired |= stop == Stop::Expired,
            Err((raw, pc)) => return Err(machine.fault(*raw, pc)),
        }
    }
    if block.warps.iter().all(Warp::finished) {
        return Ok(Round::Finished);
    }
    let released = block.release(worker);
    if !released && !expired && !block.warps.iter().any(Warp::runnable) {
        let message = waiting(worker, block);
        return Err(place(worker, block, FaultKind::Deadlock, &message));
    }
    debug_assert!(ran || released);
    Ok(if expired { Round::Expired } else { Round::Progress })
}

/// Who waits where.
fn waiting(worker: &Worker, block: &Block) -> String {
    let mut parts = Vec::new();
    for warp in &block.warps {
        for g in &warp.groups {
            let line = worker.body.lines.get(g.pc as usize).copied().unwrap_or(0);
            let text = worker.kernel.lines.get((line as usize).wrapping_sub(1)).map_or("", |l| l.trim());
            parts.push(format!("warp {} lanes {:#010x} at line {line} `{text}`", warp.index, g.mask));
        }
    }
    let more = parts.len().saturating_sub(8);
    parts.truncate(8);
    let tail = if more == 0 { String::new() } else { format!(" and {more} more") };
    format!(
        "no thread of the block can go on, {} have exited; waiting: {}{tail}",
        block.shared.exited_threads,
        parts.join(", ")
    )
}

/// A fault of the whole block, placed at the first thread that has not exited.
fn place(worker: &mut Worker, block: &mut Block, kind: FaultKind, message: &str) -> Fault {
    let Some(warp) = block.warps.iter_mut().find(|w| !w.finished()) else {
        return Fault::of_launch(worker.kernel, kind, message);
    };
    let (pc, mask) = warp.groups.first().map_or((0, 1), |g| (g.pc, g.mask));
    let raw = super::state::Raw::new(kind, mask, message);
    Machine { worker, shared: &mut block.shared, warp }.fault(*raw, pc)
}
