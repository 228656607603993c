//! Clusters: special registers (PTX ISA 10), `mapa` and `getctarank` (9.7.9), `barrier.cluster` (9.7.13.4), distributed shared
//! memory.

use softcuda::exec::FaultKind;

use crate::device::{self, Buffer};
use crate::hopper::{Hopper, refused};

#[test]
fn special_registers_of_a_grid_of_clusters() {
    let names = [
        "%clusterid.x",
        "%clusterid.y",
        "%clusterid.z",
        "%nclusterid.x",
        "%nclusterid.y",
        "%nclusterid.z",
        "%cluster_ctaid.x",
        "%cluster_ctaid.y",
        "%cluster_ctaid.z",
        "%cluster_nctaid.x",
        "%cluster_nctaid.y",
        "%cluster_nctaid.z",
        "%cluster_ctarank",
        "%cluster_nctarank",
        "%ctaid.x",
        "%ctaid.y",
        "%ctaid.z",
    ];
    let (grid, cluster) = ([4u32, 6, 4], [2u32, 3, 2]);
    let run = Hopper { grid, cluster, block: 1, ..Hopper::default() };
    let out = Buffer::new(&vec![0u32; 96 * 18]);
    let reads: String =
        (0..17).map(|i| format!("mov.u32 %r, {}; st.global.u32 [%o+{}], %r;\n", names[i], 4 * i)).collect();
    let body = format!(
        ".reg .pred %p; .reg .b32 %r, %x, %y, %i; .reg .b64 %o;
         ld.param.u64 %o, [p0]; mov.u32 %i, %ctaid.z; mov.u32 %x, %nctaid.y; mov.u32 %y, %ctaid.y; mad.lo.u32 %i, %i, %x, %y;
         mov.u32 %x, %nctaid.x; mov.u32 %y, %ctaid.x; mad.lo.u32 %i, %i, %x, %y; mad.wide.u32 %o, %i, 72, %o;
         {reads} mov.pred %p, %is_explicit_cluster; selp.u32 %r, 1, 0, %p; st.global.u32 [%o+68], %r; ret;"
    );
    run.run(&body, &[out.address]).unwrap();
    let got: Vec<u32> = out.read();
    for z in 0..4 {
        for y in 0..6 {
            for x in 0..4 {
                let at = [x, y, z];
                let inner: [u32; 3] = std::array::from_fn(|i| at[i] % cluster[i]);
                let want = [
                    (0..3).map(|i| at[i] / cluster[i]).collect::<Vec<_>>(),
                    (0..3).map(|i| grid[i] / cluster[i]).collect(),
                    inner.to_vec(),
                    cluster.to_vec(),
                    vec![inner[0] + 2 * inner[1] + 6 * inner[2], 12],
                    at.to_vec(),
                    vec![1],
                ]
                .concat();
                let i = (((z * 6 + y) * 4 + x) * 18) as usize;
                assert_eq!(got[i..i + 18], want, "block {at:?}");
            }
        }
    }
}

#[test]
fn without_clusters_each_block_is_its_own() {
    let body = "mov.u32 %r2, %clusterid.x; mad.lo.u32 %r2, %size, 100, %r2; mad.lo.u32 %r2, %rank, 10000, %r2;
        mov.pred %p, %is_explicit_cluster; @%p add.u32 %r2, %r2, 50000; barrier.cluster.arrive; barrier.cluster.wait; st.global.u32 [%out], %r2;";
    assert_eq!(Hopper::row(3, 1, 1).per_thread(body, &[]).unwrap(), [100, 101, 102]);
}

#[test]
fn every_block_reads_every_peer_by_each_kind_of_address() {
    for (blocks, cluster) in [(4, 4), (8, 2), (16, 16), (3, 1)] {
        let run = Hopper::row(blocks, 64, cluster);
        // Thread t of each block writes its place in the grid, then reads thread t ^ 1 of the next block: by a mapped 32-bit
        // address, by a mapped generic one, and by a generic one made of the 32-bit one; all must agree.
        let body = ".shared .align 4 .b8 s[256];
            mov.u32 %r2, s; mad.lo.u32 %r3, %thread, 4, %r2; st.shared.u32 [%r3], %t;
            barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
            add.u32 %r4, %rank, 1; rem.u32 %r4, %r4, %size; xor.b32 %r5, %thread, 1; mad.lo.u32 %r5, %r5, 4, %r2;
            mapa.shared::cluster.u32 %r6, %r5, %r4; ld.shared::cluster.u32 %r7, [%r6];
            cvt.u64.u32 %rd1, %r5; cvta.shared.u64 %rd1, %rd1; mapa.u64 %rd2, %rd1, %r4; ld.u32 %r8, [%rd2];
            cvt.u64.u32 %rd3, %r6; cvta.shared::cluster.u64 %rd3, %rd3; ld.relaxed.cluster.u32 %r9, [%rd3];
            getctarank.shared::cluster.u32 %r10, %r6; getctarank.u64 %r11, %rd2; getctarank.shared::cluster.u32 %r12, %r5;
            setp.eq.u32 %p, %r7, %r8; setp.eq.and.u32 %p, %r7, %r9, %p; setp.eq.and.u32 %p, %r10, %r4, %p;
            setp.eq.and.u32 %p, %r11, %r4, %p; setp.eq.and.u32 %p, %r12, %rank, %p;
            isspacep.shared %q, %rd1; and.pred %p, %p, %q; isspacep.shared::cta %q, %rd1; and.pred %p, %p, %q;
            isspacep.shared::cluster %q, %rd2; and.pred %p, %p, %q;
            isspacep.shared::cta %q, %rd2; setp.eq.u32 %p1, %r4, %rank; xor.pred %q, %q, %p1; @%q mov.u32 %r7, 0xbad1;
            @!%p mov.u32 %r7, 0xbad0;
            st.global.u32 [%out], %r7; barrier.cluster.arrive; barrier.cluster.wait;";
        let want: Vec<u32> = (0..blocks * 64)
            .map(|t| {
                let (block, thread) = (t / 64, t % 64);
                let next = block / cluster * cluster + (block % cluster + 1) % cluster;
                next * 64 + (thread ^ 1)
            })
            .collect();
        run.under_seeds(body, &[], &want);
    }
}

#[test]
fn stores_and_atomics_reach_peers() {
    // Every thread of every block adds its rank + 1 to a word of block 0 and to one of every peer, and writes its own slot in
    // the last block.
    let body = ".shared .align 8 .b8 s[1024]; mov.u32 %r2, s;
        setp.eq.u32 %p, %thread, 0; @%p st.shared.u32 [%r2], 0; barrier.cluster.arrive; barrier.cluster.wait;
        add.u32 %r3, %rank, 1; mov.u32 %r4, 0;
        LOOP: mapa.shared::cluster.u32 %r5, %r2, %r4; red.relaxed.cluster.shared::cluster.add.u32 [%r5], %r3;
        add.u32 %r4, %r4, 1; setp.lt.u32 %q, %r4, %size; @%q bra LOOP;
        mov.u32 %r5, s; sub.u32 %r6, %size, 1; mapa.shared::cluster.u32 %r5, %r5, %r6; mad.lo.u32 %r7, %rank, 32, %thread;
        mad.lo.u32 %r5, %r7, 4, %r5; st.shared::cluster.u32 [%r5+16], %t;
        mov.u32 %r8, s; mapa.shared::cluster.u32 %r8, %r8, 0; atom.shared::cluster.exch.b32 %r9, [%r8+8], 5;
        barrier.cluster.arrive.release; barrier.cluster.wait.acquire;
        ld.shared.u32 %r10, [%r2]; mov.u32 %r5, s; mapa.shared::cluster.u32 %r5, %r5, %r6; mad.lo.u32 %r5, %r7, 4, %r5;
        ld.shared::cluster.u32 %r11, [%r5+16]; mad.lo.u32 %r10, %r11, 10000, %r10; st.global.u32 [%out], %r10;
        barrier.cluster.arrive; barrier.cluster.wait;";
    // 32 threads of each of four blocks: 32 (1 + 2 + 3 + 4).
    let want: Vec<u32> = (0..128).map(|t| t * 10000 + 320).collect();
    Hopper::row(4, 32, 4).under_seeds(body, &[], &want);
}

#[test]
fn the_barrier_is_for_all_threads_that_have_not_exited_and_splits_arrival_from_waiting() {
    // Half of the threads end; the others meet three times, doing something between arrival and wait, in divergent code.
    let body = ".shared .align 4 .b8 s[512]; mov.u32 %r2, s; mad.lo.u32 %r3, %thread, 4, %r2; st.global.u32 [%out], 1;
        setp.ge.u32 %p, %thread, 40; @%p exit; mov.u32 %r4, 0; mov.u32 %r8, 0;
        LOOP: add.u32 %r5, %t, %r4; st.shared.u32 [%r3], %r5; barrier.cluster.arrive; add.u32 %r9, %r9, 1;
        setp.lt.u32 %q, %thread, 7; @%q bra LOW; barrier.cluster.wait; bra JOIN; LOW: barrier.cluster.wait;
        JOIN: xor.b32 %r6, %rank, 1; mapa.shared::cluster.u32 %r7, %r3, %r6; ld.shared::cluster.u32 %r7, [%r7]; add.u32 %r8, %r8, %r7;
        barrier.cluster.arrive.relaxed; barrier.cluster.wait;
        add.u32 %r4, %r4, 1; setp.lt.u32 %q, %r4, 3; @%q bra LOOP; st.global.u32 [%out], %r8;";
    let want: Vec<u32> = (0..128u32).map(|t| if t % 64 < 40 { 3 * (t ^ 64) + 3 } else { 1 }).collect();
    Hopper::row(2, 64, 2).under_seeds(body, &[], &want);
}

#[test]
fn misuse_is_a_fault() {
    let pair = Hopper::row(2, 32, 2);
    let f = pair.fault("barrier.cluster.wait;", &[]);
    assert_eq!(f.kind, FaultKind::IllegalInstruction, "{f}");
    assert!(f.message.contains("without `barrier.cluster.arrive`"), "{f}");
    let f = pair.fault("barrier.cluster.arrive; barrier.cluster.arrive;", &[]);
    assert!(f.message.contains("twice"), "{f}");
    let f = pair.fault("setp.eq.u32 %p, %thread, 3; @%p barrier.cluster.arrive.aligned;", &[]);
    assert_eq!(f.kind, FaultKind::IllegalInstruction, "{f}");
    // Block 1 never comes.
    let f =
        pair.fault("setp.eq.u32 %p, %rank, 1; @%p bar.sync 0, 64; barrier.cluster.arrive; barrier.cluster.wait;", &[]);
    assert_eq!(f.kind, FaultKind::Deadlock, "{f}");
    device_says(
        &f.message,
        &["phase 0 of the cluster's barrier: 32 of 64 threads have arrived", "bar.sync 0, 64", "block [1, 0, 0]"],
    );
    let f = pair.fault(".shared .b32 s; mov.u32 %r2, s; mapa.shared::cluster.u32 %r3, %r2, 2;", &[]);
    assert!(f.message.contains("`mapa` to block 2 of a cluster of 2"), "{f}");
    // A peer's address is not one of the block's own.
    let f = pair.fault(
        ".shared .b32 s; mov.u32 %r2, s; xor.b32 %r4, %rank, 1; mapa.shared::cluster.u32 %r3, %r2, %r4; st.shared.u32 [%r3], 0;", &[],
    );
    assert_eq!(f.kind, FaultKind::InvalidAddressSpace, "{f}");
    let f = pair.fault(
        ".shared .b32 s; mov.u32 %r2, s; mapa.shared::cluster.u32 %r3, %r2, 1; st.shared::cluster.u32 [%r3+4], 0;",
        &[],
    );
    assert_eq!(f.kind, FaultKind::IllegalAddress, "{f}");
    let f = pair.fault("mov.u32 %r3, 0x5000000; st.shared::cluster.u32 [%r3], 0;", &[]);
    assert!(f.message.contains("names block 4 of a cluster of 2"), "{f}");
}

/// A block's shared memory goes with it.
#[test]
fn an_exited_peer_has_no_shared_memory() {
    let body = ".shared .b32 s; setp.eq.u32 %p, %rank, 1; @%p exit; barrier.cluster.arrive; barrier.cluster.wait;
        mov.u32 %r2, s; mapa.shared::cluster.u32 %r3, %r2, 1; ld.shared::cluster.u32 %r4, [%r3];";
    for seed in 0..20 {
        let f = Hopper::row(2, 32, 2).seed(seed).fault(body, &[]);
        assert_eq!(f.kind, FaultKind::IllegalAddress, "{f}");
        assert!(f.message.contains("has exited"), "{f}");
    }
}

#[test]
fn directives_shape_the_launch() {
    let body = "st.global.u32 [%out], %size;";
    let with = |directives: &str, grid: u32, cluster: u32| {
        let run = Hopper { directives: directives.into(), ..Hopper::row(grid, 32, cluster) };
        run.per_thread(body, &[]).map_err(|f| {
            assert_eq!(f.kind, FaultKind::InvalidLaunch, "{f}");
            f.message
        })
    };
    assert_eq!(with(".explicitcluster .reqnctapercluster 2", 4, 2).unwrap(), [2; 128]);
    assert_eq!(with(".reqnctapercluster 2, 1, 1", 4, 1).unwrap(), [2; 128]);
    assert_eq!(with(".explicitcluster .maxclusterrank 4", 4, 4).unwrap(), [4; 128]);
    device_says(&with(".reqnctapercluster 2", 4, 4).unwrap_err(), &["requires [2, 1, 1]"]);
    device_says(&with(".maxclusterrank 2", 4, 4).unwrap_err(), &["allows 2"]);
    device_says(&with("", 5, 2).unwrap_err(), &["no multiple of clusters"]);
    device_says(&with("", 32, 32).unwrap_err(), &["1 to 16"]);
    let mut old = Hopper::row(2, 32, 2);
    old.config.compute_capability = (8, 0);
    assert!(old.fault(body, &[]).message.contains("compute capability 9.0"));
}

#[test]
fn clusters_wait_for_one_another_through_global_memory() {
    // A grid barrier by hand: more clusters than are resident at once on one host thread until they wait.
    let counter = Buffer::new(&[0u32]);
    let run =
        Hopper { config: softcuda::exec::Config { threads: 2, ..Hopper::default().config }, ..Hopper::row(16, 32, 4) };
    let body = "ld.param.u64 %rd1, [p1]; setp.eq.u32 %p, %thread, 0; @%p red.release.gpu.global.add.u32 [%rd1], 1;
        SPIN: ld.acquire.gpu.global.u32 %r2, [%rd1]; setp.lt.u32 %q, %r2, 16; @%q bra SPIN; barrier.cluster.arrive; barrier.cluster.wait;
        st.global.u32 [%out], %r2;";
    assert_eq!(run.per_thread(body, &[counter.address]).unwrap(), [16; 512]);
}

#[test]
fn spellings() {
    for text in [
        "mapa.u32 %r2, %r3, 0;",
        "mapa.shared.u32 %r2, %r3, 0;",
        "getctarank.shared::cluster.u64 %rd1, %rd2;",
        "barrier.cluster.sync;",
        "barrier.cluster.arrive.acquire;",
        "barrier.cluster.wait.release;",
        "mov.u32 %r2, %is_explicit_cluster;",
        "ld.shared::gpu.u32 %r2, [%r3];",
    ] {
        refused(text);
    }
}

#[track_caller]
fn device_says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

#[test]
fn kernels_for_older_devices_have_clusters_of_one_too() {
    let got = device::Run { grid: 2, ..device::Run::default() }
        .per_thread("mov.u32 %r2, %cluster_nctarank; st.global.u32 [%out], %r2;");
    assert_eq!(got, [1; 64]);
}
