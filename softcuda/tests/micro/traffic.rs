//! Traffic through the modelled caches, against what can be worked out by hand.

use softcuda::exec::{Config, Counters};
use softcuda::profile::{CarriedCaches, Hierarchy, Start, Traffic, TrafficWatch};

use crate::device::{Buffer, Run};
use crate::hopper::Hopper;

/// 4 multiprocessors with two blocks and 16 KiB of L1 each, 1 MiB of L2.
const SMALL: Hierarchy = Hierarchy { sm_count: 4, blocks_per_sm: 2, l1_bytes: 16 << 10, l2_bytes: 1 << 20 };

/// Registers of a program that computes nothing from its thread.
const PLAIN: &str = ".reg .pred %p; .reg .b32 %r<4>; .reg .b64 %rd<4>;";

/// `%a` and `%b` are the thread's 16 bytes of the first and the second buffer, `%stride` the bytes of the whole grid's.
const PROLOGUE: &str = ".reg .pred %p; .reg .b32 %r<16>, %i, %t; .reg .b64 %a, %b, %base, %z, %stride;
    ld.param.u64 %a, [p0]; ld.param.u64 %b, [p1]; mov.u64 %base, %a; mov.u32 %t, %tid.x; mov.u32 %r0, %ctaid.x;
    mov.u32 %r1, %ntid.x; mov.u32 %r2, %nctaid.x; mad.lo.u32 %t, %r0, %r1, %t; mul.wide.u32 %z, %t, 16;
    add.u64 %a, %a, %z; add.u64 %b, %b, %z; mul.lo.u32 %r2, %r2, %r1; mul.wide.u32 %stride, %r2, 16; mov.u32 %i, 0;";

struct Case {
    grid: u32,
    block: u32,
    bytes: usize,
    hierarchy: Hierarchy,
    start: Start,
    config: Config,
}

impl Case {
    /// Blocks that cover `bytes` with 16 bytes a thread.
    fn over(bytes: usize, hierarchy: Hierarchy) -> Case {
        let (grid, config) = ((bytes / 16 / 256) as u32, Run::default().config);
        Case { grid, block: 256, bytes, hierarchy, start: Start::Cold, config }
    }

    fn run(&self, body: &str) -> (Counters, Traffic) {
        let buffer = || Buffer::new(&vec![0u8; self.bytes]);
        self.run_on(body, &buffer(), &buffer())
    }

    fn run_on(&self, body: &str, a: &Buffer, b: &Buffer) -> (Counters, Traffic) {
        let watch = TrafficWatch::starting(self.hierarchy, self.start.clone());
        let config = Config { count: true, watches: vec![watch.clone()], ..self.config.clone() };
        let run = Run { grid: self.grid, block: self.block, config, ..Run::default() };
        let counters = run.run(&format!("{PROLOGUE}{body}\nret;"), &[a.address, b.address]).unwrap();
        (counters, watch.finish())
    }
}

const COPY: &str = "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%a]; st.global.v4.b32 [%b], {%r4, %r5, %r6, %r7};";

#[test]
fn a_streaming_copy_reads_and_writes_each_byte_once() {
    let bytes = 8 << 20;
    let (c, t) = Case::over(bytes, SMALL).run(COPY);
    let n = bytes as u64;
    assert_eq!((t.dram_read_bytes, t.dram_write_bytes), (n, n));
    assert_eq!((t.l2_read_sectors, t.l2_read_hits, t.l2_write_sectors), (n / 32, 0, n / 32));
    assert_eq!((t.l1_sectors, t.l1_hits, t.l2_atomic_sectors), (n / 32, 0, 0));
    assert_eq!((c.global.sectors, c.global.ideal_sectors), (2 * n / 32, 2 * n / 32));
    // Reads and writes share the cache: about half of it is dirty when the kernel ends.
    assert!((n / 64..=n / 8).contains(&t.dirty_at_end_bytes), "{t:?}");
    assert!(!t.in_pieces);
}

#[test]
fn a_second_pass_hits_l2_if_the_data_fit() {
    // Each thread comes back to its own bytes after everybody else's.
    let passes = "LOOP: mov.u64 %z, %a; mov.u32 %r8, 0;
        INNER: ld.global.cg.v4.b32 {%r4, %r5, %r6, %r7}, [%z]; add.u64 %z, %z, %stride; add.u32 %r8, %r8, 1;
        setp.lt.u32 %p, %r8, 32; @%p bra INNER; add.u32 %i, %i, 1; setp.lt.u32 %p, %i, 3; @%p bra LOOP;";
    // Eight blocks of 256 threads are resident at once: 32 KiB a step, 32 steps.
    let bytes = 1 << 20;
    for (l2, misses) in [(2 << 20, 1), (4 << 20, 1), (1 << 19, 3)] {
        let case = Case { grid: 8, ..Case::over(bytes, Hierarchy { l2_bytes: l2, ..SMALL }) };
        let (_, t) = case.run(passes);
        let n = bytes as u64;
        assert_eq!(t.l2_read_sectors, 3 * n / 32);
        assert_eq!(t.dram_read_bytes, misses * n, "{l2} bytes of L2");
        assert_eq!((t.l1_sectors, t.dram_write_bytes), (0, 0), "`.cg` passes L1 by");
    }
}

#[test]
fn what_one_block_has_read_its_multiprocessor_has_in_l1() {
    // All blocks read the same 4 KiB twice.
    let body = |load: &str| {
        format!(
            "mov.u32 %t, %tid.x; mul.wide.u32 %z, %t, 16; add.u64 %a, %base, %z; {load} {{%r4, %r5, %r6, %r7}}, [%a];
             bar.sync 0; {load} {{%r4, %r5, %r6, %r7}}, [%a];"
        )
    };
    let case = Case { grid: 16, ..Case::over(4096, SMALL) };
    let (_, t) = case.run(&body("ld.global.v4.b32"));
    // 128 sectors, 2 reads, 16 blocks; each of four multiprocessors misses them once.
    assert_eq!((t.l1_sectors, t.l1_hits), (4096, 4096 - 4 * 128));
    assert_eq!((t.l2_read_sectors, t.l2_read_hits, t.dram_read_bytes), (512, 384, 4096));
    for uncached in ["ld.global.cg.v4.b32", "ld.volatile.global.v4.b32", "ld.global.L1::no_allocate.v4.b32"] {
        let (_, t) = case.run(&body(uncached));
        assert_eq!((t.l1_sectors, t.l2_read_sectors, t.dram_read_bytes), (0, 4096, 4096), "{uncached}");
    }
    let (_, t) = case.run(&body("ld.relaxed.gpu.global.v4.b32"));
    assert_eq!(t.l1_sectors, 0);
}

#[test]
fn strided_access_moves_whole_sectors() {
    // 4 bytes of every 64.
    let bytes = 256 << 10;
    let threads = bytes / 64;
    let case = Case { grid: (threads / 128) as u32, block: 128, ..Case::over(bytes, SMALL) };
    let (c, t) = case.run("mul.wide.u32 %z, %t, 64; add.u64 %a, %base, %z; ld.global.u32 %r4, [%a];");
    let n = threads as u64;
    assert_eq!((c.global.requests, c.global.sectors, c.global.ideal_sectors), (n / 32, n, n / 8));
    assert_eq!((t.l2_read_sectors, t.dram_read_bytes), (n, 32 * n));
}

#[test]
fn atomics_and_overwritten_sectors() {
    let case = Case { grid: 1, block: 64, ..Case::over(4096, SMALL) };
    let (_, t) = case.run("red.global.add.u32 [%base], 1; red.global.add.u32 [%base], 1;");
    assert_eq!((t.l2_atomic_sectors, t.dram_read_bytes, t.dram_write_bytes), (4, 32, 32));
    // Written three times, one write to memory.
    let store = "st.global.v4.b32 [%b], {%r4, %r5, %r6, %r7};";
    let (_, t) = Case::over(4096, SMALL).run(&store.repeat(3));
    assert_eq!((t.l2_write_sectors, t.dram_write_bytes, t.dirty_at_end_bytes), (384, 4096, 4096));
    // A reading thread finds in L2 what another one has written.
    let (_, t) = Case { grid: 1, ..Case::over(4096, SMALL) }.run(
        "st.global.v4.b32 [%b], {%r4, %r5, %r6, %r7}; bar.sync 0; ld.global.cg.v4.b32 {%r4, %r5, %r6, %r7}, [%b];",
    );
    assert_eq!((t.l2_read_sectors, t.l2_read_hits, t.dram_read_bytes), (128, 128, 0));
}

#[test]
fn asynchronous_copies() {
    let body = |operator: &str| {
        format!(
            ".shared .align 16 .b8 s[4096]; mov.u32 %r3, s; mov.u32 %r4, %tid.x; mad.lo.u32 %r3, %r4, 16, %r3;
             cp.async.{operator}.shared.global [%r3], [%a], 16; cp.async.{operator}.shared.global [%r3], [%a], 16;
             cp.async.commit_group; cp.async.wait_group 0;"
        )
    };
    let case = Case { grid: 1, ..Case::over(4096, SMALL) };
    let (c, t) = case.run(&body("cg"));
    assert_eq!((t.l1_sectors, t.l2_read_sectors, t.dram_read_bytes), (0, 256, 4096));
    assert_eq!(c.async_bytes, 8192);
    assert_eq!(c.opcodes["cp.async.wait_group"], 8);
    let (_, t) = case.run(&body("ca"));
    assert_eq!((t.l1_sectors, t.l1_hits, t.l2_read_sectors), (256, 128, 128));
}

#[test]
fn neither_host_threads_nor_seeds_change_the_traffic() {
    // Blocks that reuse each other's data in a cache that holds a part of them.
    let body = "LOOP: ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%a]; st.global.v4.b32 [%b], {%r4, %r5, %r6, %r7};
        xor.b64 %z, %a, %base; and.b64 %z, %z, 65520; add.u64 %a, %base, %z; add.u32 %i, %i, 1; setp.lt.u32 %p, %i, 3;
        @%p bra LOOP;";
    let hierarchy = Hierarchy { l2_bytes: 128 << 10, ..SMALL };
    let (a, b) = (Buffer::new(&vec![0u8; 1 << 20]), Buffer::new(&vec![0u8; 1 << 20]));
    let run = |threads, seed| {
        let mut case = Case::over(1 << 20, hierarchy);
        case.config = Config { threads, seed, ..case.config };
        case.run_on(body, &a, &b).1
    };
    let first = run(1, 0);
    assert!(first.l2_read_hits > 0 && first.l2_read_hits < first.l2_read_sectors && first.l1_hits > 0, "{first:?}");
    for (threads, seed) in [(1, 0), (4, 0), (7, 0), (2, 99), (3, 5)] {
        assert_eq!(run(threads, seed), first, "{threads} threads, seed {seed}");
    }
}

#[test]
fn bulk_copies_pass_l1_by() {
    let body =
        ".shared .align 8 .b64 b; .shared .align 128 .b8 s[4096]; ld.param.u64 %rd1, [p1]; ld.param.u64 %rd2, [p2];
        mov.u32 %r1, s; mbarrier.init.shared::cta.b64 [b], 1; mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 4096;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], 4096, [b];
        WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p, [b], 0; @!%p bra WAIT;
        cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r1], 2048; cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0; ret;";
    let (from, to) = (Buffer::new(&[1u8; 4096]), Buffer::new(&[0u8; 4096]));
    let watch = TrafficWatch::new(SMALL);
    let mut run = Hopper::row(1, 1, 1);
    run.config = Config { count: true, watches: vec![watch.clone()], ..run.config };
    let counters = run.counters(&format!("{PLAIN}{body}"), &[to.address, from.address, to.address]).unwrap();
    let t = watch.finish();
    assert_eq!((t.l1_sectors, t.l2_read_sectors, t.l2_write_sectors), (0, 128, 64));
    assert_eq!((t.dram_read_bytes, t.dram_write_bytes), (4096, 2048));
    assert_eq!((counters.async_bytes, counters.global.sectors, counters.global.ideal_sectors), (4096, 192, 192));
    assert_eq!(to.read::<u8>()[..2049], [[1u8; 2048].as_slice(), &[0]].concat());
}

#[test]
fn a_warm_launch_finds_what_it_left() {
    let run = |bytes, start| Case { start, ..Case::over(bytes, SMALL) }.run(COPY).1;
    // Both buffers, 512 KiB, fit 1 MiB: nothing goes to memory, and what is written stays dirty.
    let n = 256 << 10;
    let cold = run(n as usize, Start::Cold);
    assert_eq!((cold.dram_read_bytes, cold.dram_write_bytes, cold.dirty_at_end_bytes, cold.l2_read_hits), (n, n, n, 0));
    let warm = run(n as usize, Start::Warm);
    assert_eq!((warm.dram_read_bytes, warm.dram_write_bytes, warm.dirty_at_end_bytes), (0, 0, n));
    assert_eq!((warm.l2_read_sectors, warm.l2_read_hits, warm.l2_write_sectors), (n / 32, n / 32, n / 32));
    // L1 is empty at the start all the same.
    assert_eq!((warm.l1_sectors, warm.l1_hits), (n / 32, 0));
    // 16 MiB do not fit: least recently used, none of it is left when it is wanted again, and as much is written as is dirtied.
    let n = 8 << 20;
    let warm = run(n as usize, Start::Warm);
    assert_eq!((warm.dram_read_bytes, warm.dram_write_bytes, warm.l2_read_hits), (n, n, 0));
}

#[test]
fn caches_are_carried_from_one_launch_to_the_next() {
    let caches = CarriedCaches::default();
    let start = || Start::Carried(caches.clone());
    let buffer = |bytes: usize| Buffer::new(&vec![0u8; bytes]);
    let n = 256 << 10;
    let (a, b, c, large) = (buffer(n), buffer(n), buffer(n), buffer(4 << 20));
    let copy = |from: &Buffer, to: &Buffer| Case { start: start(), ..Case::over(n, SMALL) }.run_on(COPY, from, to).1;
    let n = n as u64;
    let first = copy(&a, &b);
    assert_eq!((first.dram_read_bytes, first.dram_write_bytes, first.dirty_at_end_bytes), (n, 0, n));
    // What the first has written the second reads from L2.
    let second = copy(&b, &c);
    assert_eq!((second.dram_read_bytes, second.l2_read_hits), (0, n / 32));
    assert_eq!((second.dram_write_bytes, second.dirty_at_end_bytes), (0, 2 * n));
    // Four times the cache, only read, pushes out what both have written; L1 of another size makes no difference to L2.
    let hierarchy = Hierarchy { l1_bytes: 32 << 10, ..SMALL };
    let load = "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%a];";
    let third = Case { start: start(), ..Case::over(4 << 20, hierarchy) }.run_on(load, &large, &large).1;
    assert_eq!((third.dram_read_bytes, third.dram_write_bytes, third.dirty_at_end_bytes), (4 << 20, 2 * n, 0));
    assert_eq!(copy(&a, &b).dram_read_bytes, n);
    assert_eq!(copy(&a, &b).dram_read_bytes, 0);
    caches.clear();
    assert_eq!(copy(&a, &b), first);
}

#[test]
fn what_is_kept_stays_while_more_than_the_cache_passes() {
    // 256 KiB by a policy, then 4 MiB through 1 MiB of L2, then the 256 KiB again.
    let body = |policy: &str, other: &str| {
        format!(
            ".shared .align 16 .b8 s[4096]; .reg .b64 %keep, %pass, %n; mov.u32 %r3, s; mad.lo.u32 %r3, %t, 16, %r3;
             {policy} {other} mov.u32 %r5, 0;
             AGAIN: mov.u64 %z, %a; mov.u32 %i, 0;
             KEPT: cp.async.cg.shared.global.L2::cache_hint [%r3], [%z], 16, %keep; add.u64 %z, %z, 4096; add.u32 %i, %i, 1;
             setp.lt.u32 %p, %i, 64; @%p bra KEPT;
             cp.async.wait_all; setp.ne.u32 %p, %r5, 0; @%p bra END; mov.u32 %r5, 1; mov.u64 %z, %b; mov.u32 %i, 0;
             PASSED: cp.async.cg.shared.global.L2::cache_hint [%r3], [%z], 16, %pass; add.u64 %z, %z, 4096; add.u32 %i, %i, 1;
             setp.lt.u32 %p, %i, 1024; @%p bra PASSED;
             bra AGAIN;
             END: cp.async.wait_all;"
        )
    };
    let (small, large) = (256 << 10, 4 << 20);
    let case = Case { grid: 1, ..Case::over(large, SMALL) };
    let again = |policy: &str, other: &str| {
        let policy = format!("createpolicy.fractional.L2::{policy};");
        let other = format!("createpolicy.fractional.L2::{other}.b64 %pass;");
        case.run(&body(&policy, &other)).1.dram_read_bytes as usize - small - large
    };
    assert_eq!(again("evict_normal.b64 %keep", "evict_normal"), small);
    assert_eq!(again("evict_last.b64 %keep", "evict_normal"), 0);
    assert_eq!(again("evict_last.b64 %keep, 1.0", "evict_last"), small);
    assert_eq!(again("evict_normal.b64 %keep", "evict_first"), 0);
    let half = again("evict_last.L2::evict_first.b64 %keep, 0.5", "evict_normal");
    assert!((small / 3..2 * small / 3).contains(&half), "{half} of {small}");
}

/// A cluster of two: the first block's boxes go to both, each block stores once it has received.
#[test]
fn a_multicast_reads_once() {
    let body = ".shared .align 8 .b64 b; .shared .align 128 .b8 s[4096]; .reg .b16 %both; ld.param.u64 %rd1, [p1];
        mov.u32 %r1, s; mov.u32 %r2, %cluster_ctarank; mov.u16 %both, 3; mbarrier.init.shared::cta.b64 [b], 1;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 4096; fence.mbarrier_init.release.cluster;
        barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
        setp.ne.u32 %p, %r2, 0; @%p bra WAIT;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r1], [%rd1], 4096, [b], %both;
        WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p, [b], 0; @!%p bra WAIT;
        barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; ret;";
    let from = Buffer::new(&[1u8; 4096]);
    let watch = TrafficWatch::new(SMALL);
    let mut run = Hopper::row(2, 1, 2);
    run.config = Config { count: true, watches: vec![watch.clone()], ..run.config };
    let counters = run.counters(&format!("{PLAIN}{body}"), &[from.address, from.address, from.address]).unwrap();
    let t = watch.finish();
    assert_eq!((t.l2_read_sectors, t.dram_read_bytes), (128, 4096));
    // 512 bytes a request, and both blocks' memory takes all of it.
    assert_eq!((counters.global.requests, counters.global.sectors, counters.async_bytes), (8, 128, 8192));
}
