//! Bulk copies, their completion, reductions, and asynchronous stores (PTX ISA 9.7.9.25.4, 9.7.9.27.2, 9.7.9.12, 9.7.13.7).

use half::{bf16, f16};
use softcuda::exec::FaultKind;

use crate::device::Buffer;
use crate::hopper::{Hopper, refused};

const POISON: u32 = u32::MAX;

/// Shared memory: an mbarrier object `b` for one arrival, set up by thread 0, and `s` of 4096 bytes; `%r20`, `%r21` hold their
/// addresses, `%rd10` the first further parameter, `%p7` says which thread is the first.
const SETUP: &str = ".shared .align 8 .b64 b; .shared .align 1024 .b8 s[4096]; mov.u32 %r20, b; mov.u32 %r21, s; ld.param.u64 %rd10, [p1];
    setp.eq.u32 %p7, %thread, 0; @%p7 mbarrier.init.shared::cta.b64 [b], 1; fence.mbarrier_init.release.cluster; bar.sync 0;
    barrier.cluster.arrive; barrier.cluster.wait;\n";

/// All threads wait for the first phase.
const WAIT: &str = "WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p, [b], 0; @!%p bra WAIT;\n";

fn words(n: u32) -> Vec<u32> {
    (0..n).map(|i| 1000 + 3 * i).collect()
}

#[test]
fn global_to_shared() {
    let source = Buffer::new(&words(512));
    for space in ["shared::cta", "shared::cluster"] {
        // Three copies of different sizes, then every thread reads its word.
        let copy = format!("cp.async.bulk.{space}.global.mbarrier::complete_tx::bytes");
        let body = format!(
            "{SETUP} mov.u32 %r2, 16; mov.b64 %rd2, 0; @!%p7 bra GO; mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 1024;
             {copy} [%r21], [%rd10], 512, [b]; {copy}.L2::cache_hint [%r21+528], [%rd10+528], 496, [%r20], %rd2;
             {copy} [s+512], [%rd10+512], %r2, [b]; GO: {WAIT}
             mad.lo.u32 %r3, %thread, 4, %r21; ld.shared.u32 %r4, [%r3]; st.global.u32 [%out], %r4;"
        );
        Hopper::row(1, 256, 1).under_seeds(&body, &[source.address], &words(256));
    }
}

#[test]
fn copies_land_late_and_read_their_source_then() {
    let body = format!(
        "{SETUP} @%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 128; st.shared.u32 [%r21+4], 7; bar.sync 0;
         @%p7 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [s], [%rd10], 128, [b]; bar.sync 0;
         ld.shared.u32 %r2, [%r21+4]; @%p7 st.global.u32 [%rd10+4], 9; {WAIT} ld.shared.u32 %r3, [%r21+4];
         xor.b32 %r2, %r2, %r3; st.global.u32 [%out], %r2;"
    );
    let source = Buffer::new(&words(32));
    assert_eq!(Hopper::row(1, 64, 1).per_thread(&body, &[source.address]).unwrap(), [POISON ^ 9; 64]);
    // Other seeds let it land at once too.
    let early = (1..40).any(|seed| {
        let source = Buffer::new(&words(32));
        let got = Hopper::row(1, 64, 1).seed(seed).per_thread(&body, &[source.address]).unwrap();
        got.iter().any(|&x| x != POISON ^ 9)
    });
    assert!(early, "no seed lands the copy early");
}

#[test]
fn a_copy_lands_though_others_spin_for_what_follows_it() {
    // Warp 1 does not wait for the object but for a word that warp 0 writes after it.
    let source = Buffer::new(&words(4));
    let flag = Buffer::new(&[0u32]);
    let body = format!(
        "{SETUP} ld.param.u64 %rd11, [p2]; setp.gt.u32 %p1, %thread, 31; @%p1 bra OTHER;
         @%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 16;
         @%p7 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [s], [%rd10], 16, [b]; {WAIT}
         st.release.gpu.global.u32 [%rd11], 1;
         OTHER: SPIN: ld.acquire.gpu.global.u32 %r2, [%rd11]; setp.eq.u32 %p, %r2, 0; @%p bra SPIN;
         ld.shared.u32 %r3, [s+8]; st.global.u32 [%out], %r3;"
    );
    let f = Hopper::row(1, 64, 1).per_thread(&body, &[source.address, flag.address]);
    assert_eq!(f.unwrap(), [1006; 64]);
}

#[test]
fn multicast_reaches_the_blocks_of_the_mask() {
    // Block 1 sends to blocks 0, 1 and 3; each waits for its own object. Block 2 keeps what it had.
    let source = Buffer::new(&words(128));
    let body = format!(
        "{SETUP} mov.u32 %r9, 5; mad.lo.u32 %r3, %thread, 4, %r21; setp.eq.u32 %p6, %rank, 2; @%p6 st.shared.u32 [%r3+64], 5; @%p6 bra NONE;
         @%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 256; barrier.cluster.arrive; barrier.cluster.wait;
         setp.eq.u32 %p1, %rank, 1; and.pred %p1, %p1, %p7; mov.u16 %h1, 11; mov.b64 %rd2, 0;
         @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [s+64], [%rd10], 128, [b], %h1;
         @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [s+192], [%rd10+128], 128, [b], %h1, %rd2;
         {WAIT} bra END; NONE: barrier.cluster.arrive; barrier.cluster.wait;
         END: ld.shared.u32 %r4, [%r3+64]; st.global.u32 [%out], %r4; barrier.cluster.arrive; barrier.cluster.wait;"
    );
    let want: Vec<u32> = (0..256).map(|t| if t / 64 == 2 { 5 } else { words(64)[t % 64] }).collect();
    Hopper::row(4, 64, 4).under_seeds(&body, &[source.address], &want);
}

#[test]
fn shared_memory_to_that_of_the_next_block() {
    let body = format!(
        "{SETUP} mad.lo.u32 %r3, %thread, 4, %r21; st.shared.u32 [%r3], %t; fence.proxy.async.shared::cta; bar.sync 0;
         @%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 256; add.u32 %r4, %rank, 1; rem.u32 %r4, %r4, %size;
         add.u32 %r5, %r21, 1024; mapa.shared::cluster.u32 %r6, %r5, %r4; mapa.shared::cluster.u32 %r7, %r20, %r4;
         @%p7 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r6], [%r21], 256, [%r7];
         {WAIT} ld.shared.u32 %r8, [%r3+1024]; st.global.u32 [%out], %r8; barrier.cluster.arrive; barrier.cluster.wait;"
    );
    let want: Vec<u32> = (0..192).map(|t| (t + 192 - 64) % 192).collect();
    Hopper::row(3, 64, 3).under_seeds(&body, &[0], &want);
}

#[test]
fn shared_to_global_and_its_groups() {
    // The source is overwritten after it has been read, the destination is complete after the whole wait.
    let run = |wait: &str, seed: u64| {
        let target = Buffer::new(&[0u32; 64]);
        let body = format!(
            "{SETUP} mad.lo.u32 %r3, %thread, 4, %r21; st.shared.u32 [%r3], %t; fence.proxy.async.shared::cta; bar.sync 0;
             @!%p7 bra END; mov.b64 %rd2, 0; cp.async.bulk.global.shared::cta.bulk_group [%rd10], [s], 128;
             cp.async.bulk.commit_group; cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%rd10+128], [s+128], 128, %rd2;
             cp.async.bulk.commit_group; {wait} END: ld.global.u32 %r4, [%rd10]; st.global.u32 [%out], %r4;"
        );
        let got = Hopper::row(1, 64, 1).seed(seed).per_thread(&body, &[target.address]).unwrap();
        (got[0], target.read::<u32>())
    };
    let all: Vec<u32> = (0..64).collect();
    for seed in 0..20 {
        let (seen, target) = run("cp.async.bulk.wait_group 0;", seed);
        assert_eq!((seen, target), (0, all.clone()), "seed {seed}");
        let (_, target) =
            run("cp.async.bulk.wait_group.read 0; st.shared.u32 [s], 99; st.shared.u32 [s+128], 99;", seed);
        assert_eq!(target, all, "seed {seed}: the source had been read");
        // Never waited for: complete at the end of the grid.
        assert_eq!(run("", seed).1, all, "seed {seed}");
    }
    // One group may stay in flight, and reads its source after that.
    let (seen, target) = run("cp.async.bulk.wait_group 1; st.shared.u32 [s], 99; st.shared.u32 [s+128], 98;", 0);
    assert_eq!((seen, target[0], target[32]), (0, 0, 98));
    let (_, target) = run("cp.async.bulk.wait_group.read 1; st.shared.u32 [s], 99; st.shared.u32 [s+128], 98;", 0);
    assert_eq!((target[0], target[32]), (0, 98));
    // Before the wait the destination is poisoned.
    assert_eq!(
        run("ld.global.u32 %r4, [%rd10]; st.global.u32 [%out], %r4; cp.async.bulk.wait_group.read 0; exit;", 0).0,
        POISON
    );
}

/// Reduces 16 bytes of `b` into `a` with one instruction.
fn reduce(op: &str, ty: &str, a: [u8; 16], b: [u8; 16], shared: bool, seed: u64) -> [u8; 16] {
    let target = Buffer::new(&a);
    let source = Buffer::new(&b);
    let load = "ld.param.u64 %rd11, [p2]; ld.global.v2.b64 {%rd3, %rd4}, [%rd11]; st.shared.v2.b64 [s], {%rd3, %rd4}; fence.proxy.async;";
    let (run, body) = if shared {
        // Into the other block of a pair, from where it is written back.
        let body = format!(
            "{SETUP} {load} ld.global.v2.b64 {{%rd3, %rd4}}, [%rd10]; st.shared.v2.b64 [s+64], {{%rd3, %rd4}};
             @%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 16; barrier.cluster.arrive; barrier.cluster.wait;
             setp.eq.u32 %p1, %rank, 0; and.pred %p1, %p1, %p7; add.u32 %r5, %r21, 64; xor.b32 %r4, %rank, 1;
             mapa.shared::cluster.u32 %r6, %r5, %r4; mapa.shared::cluster.u32 %r7, %r20, %r4;
             @%p7 cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.{op}.{ty} [%r6], [%r21], 16, [%r7];
             {WAIT} ld.shared.v2.b64 {{%rd3, %rd4}}, [s+64]; @%p1 st.global.v2.b64 [%rd10], {{%rd3, %rd4}};
             barrier.cluster.arrive; barrier.cluster.wait;"
        );
        (Hopper::row(2, 32, 2), body)
    } else {
        let body = format!(
            "{SETUP} {load} bar.sync 0; @!%p7 bra END; cp.reduce.async.bulk.global.shared::cta.bulk_group.{op}.{ty} [%rd10], [s], 16;
             cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; END:"
        );
        (Hopper::row(1, 32, 1), body)
    };
    run.seed(seed).per_thread(&body, &[target.address, source.address]).unwrap_or_else(|f| panic!("{op}.{ty}: {f}"));
    target.read::<u8>().try_into().unwrap()
}

macro_rules! reductions {
    ($t:ty, $name:literal, $a:expr, $b:expr, $shared:expr, { $($op:literal => $f:expr,)* }) => {
        $({
            let (a, b): ([$t; 16 / size_of::<$t>()], [$t; 16 / size_of::<$t>()]) = ($a, $b);
            let f: fn($t, $t) -> $t = $f;
            let bytes = |v: &[$t]| -> [u8; 16] { v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>().try_into().unwrap() };
            let want: Vec<$t> = a.iter().zip(&b).map(|(&a, &b)| f(a, b)).collect();
            for seed in [0, 1] {
                let got = reduce($op, $name, bytes(&a), bytes(&b), $shared, seed);
                assert_eq!(got, bytes(&want), "{}.{}", $op, $name);
            }
        })*
    };
}

#[test]
fn reductions_of_integers() {
    let (a, b) = ([0u32, 5, 0xffff_fff0, 7], [3u32, 5, 0x20, 0x8000_0000]);
    for shared in [false, true] {
        reductions!(u32, "u32", a, b, shared, {
            "add" => |a, b| a.wrapping_add(b),
            "min" => |a, b| a.min(b),
            "max" => |a, b| a.max(b),
            "inc" => |a, b| if a >= b { 0 } else { a + 1 },
            "dec" => |a, b| if a == 0 || a > b { b } else { a - 1 },
        });
        reductions!(u32, "b32", a, b, shared, { "and" => |a, b| a & b, "or" => |a, b| a | b, "xor" => |a, b| a ^ b, });
        reductions!(i32, "s32", [-5, 5, i32::MIN, 7], [3, -5, -1, 8], shared, {
            "add" => |a, b| a.wrapping_add(b), "min" => |a, b| a.min(b), "max" => |a, b| a.max(b),
        });
        reductions!(u64, "u64", [u64::MAX, 1 << 40], [2, 5], shared, { "add" => |a, b| a.wrapping_add(b), });
    }
    let (a, b) = ([u64::MAX, 1 << 40], [2u64, 5]);
    reductions!(u64, "u64", a, b, false, { "min" => |a, b| a.min(b), "max" => |a, b| a.max(b), });
    reductions!(u64, "b64", a, b, false, { "and" => |a, b| a & b, "or" => |a, b| a | b, "xor" => |a, b| a ^ b, });
    reductions!(i64, "s64", [-1, 1 << 40], [2, -5], false, { "min" => |a, b| a.min(b), "max" => |a, b| a.max(b), });
}

#[test]
fn reductions_of_floating_point() {
    reductions!(f32, "f32", [1.5, -2.0, 1e30, 0.1], [0.25, 2.0, 1e30, 0.2], false, { "add" => |a, b| a + b, });
    reductions!(f64, "f64", [1.5, -2.0], [0.25, 1e-300], false, { "add" => |a, b| a + b, });
    // Subnormal f32 is flushed.
    let sub = f32::from_bits(1);
    reductions!(f32, "f32", [sub, 1.0, sub, -sub], [sub, sub, 0.0, 0.0], false, {
        "add" => |a, b| if a == 1.0 { 1.0 } else { 0.0 * b },
    });
    let h = |x: [f32; 8]| x.map(|v| f16::from_f32(v).to_bits());
    let (a, b) =
        ([1.5, -2.0, 60000.0, 0.1, -0.0, 3.0, 1e-7, f32::NAN], [0.25, 2.5, 60000.0, 0.2, 0.0, -3.0, 1e-7, 4.0]);
    reductions!(u16, "noftz.f16", h(a), h(b), false, {
        "add" => |a, b| { let s = f16::from_f32(f16::from_bits(a).to_f32() + f16::from_bits(b).to_f32()); if s.is_nan() { 0x7fff } else { s.to_bits() } },
    });
    reductions!(u16, "f16", h(a), h(b), false, {
        "min" => |a, b| half_min(a, b, f16::from_bits(a).to_f32(), f16::from_bits(b).to_f32()),
        "max" => |a, b| half_max(a, b, f16::from_bits(a).to_f32(), f16::from_bits(b).to_f32()),
    });
    let h = |x: [f32; 8]| x.map(|v| bf16::from_f32(v).to_bits());
    reductions!(u16, "bf16", h(a), h(b), false, {
        "min" => |a, b| half_min(a, b, bf16::from_bits(a).to_f32(), bf16::from_bits(b).to_f32()),
        "max" => |a, b| half_max(a, b, bf16::from_bits(a).to_f32(), bf16::from_bits(b).to_f32()),
    });
}

fn half_min(a: u16, b: u16, x: f32, y: f32) -> u16 {
    if y.is_nan() || x < y || x == y && x.is_sign_negative() { a } else { b }
}

fn half_max(a: u16, b: u16, x: f32, y: f32) -> u16 {
    if y.is_nan() || x > y || x == y && x.is_sign_positive() { a } else { b }
}

#[test]
fn asynchronous_stores_and_reductions() {
    // Every thread of block r stores its words into block r + 1 and adds to a sum there.
    for (bytes, store, first) in [
        (4, "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r6], %t, [%r7];", 1),
        (8, "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%r6], {%t, %r9}, [%r7];", 1),
        (8, "cvt.u64.u32 %rd3, %t; st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%r6], %rd3, [%r7];", 1),
        (16, "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%r6], {%t, %r9, %r9, %r9}, [%r7];", 1),
        (
            4,
            "cvt.u64.u32 %rd3, %r6; cvta.shared::cluster.u64 %rd3, %rd3; cvt.u64.u32 %rd4, %r7; cvta.shared::cluster.u64 %rd4, %rd4; st.async.mbarrier::complete_tx::bytes.b32 [%rd3], %t, [%rd4];",
            1,
        ),
    ] {
        let expect = 32 * (bytes * first + 4);
        let body = format!(
            "{SETUP} @%p7 st.shared.u32 [s+2048], 0; mov.u32 %r9, 7; @%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], {expect};
             barrier.cluster.arrive; barrier.cluster.wait;
             add.u32 %r4, %rank, 1; rem.u32 %r4, %r4, %size; mad.lo.u32 %r5, %thread, {bytes}, %r21; mapa.shared::cluster.u32 %r6, %r5, %r4;
             mapa.shared::cluster.u32 %r7, %r20, %r4; {store} add.u32 %r8, %r21, 2048; mapa.shared::cluster.u32 %r8, %r8, %r4;
             red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%r8], %thread, [%r7];
             {WAIT} ld.shared.u32 %r10, [%r5]; ld.shared.u32 %r11, [s+2048]; mad.lo.u32 %r10, %r10, 1000, %r11; st.global.u32 [%out], %r10;
             barrier.cluster.arrive; barrier.cluster.wait;"
        );
        let want: Vec<u32> = (0..64).map(|t| (t ^ 32) * 1000 + 31 * 16).collect();
        Hopper::row(2, 32, 2).under_seeds(&body, &[0], &want);
    }
}

#[track_caller]
fn misuse(blocks: u32, body: &str, kind: FaultKind, part: &str) {
    let source = Buffer::new(&words(64));
    let f =
        Hopper::row(blocks, 32, blocks).fault(&format!("{SETUP} @!%p7 bra END; {body} END: ret;"), &[source.address]);
    assert_eq!(f.kind, kind, "{f}");
    assert!(f.message.contains(part), "{part:?} is not in {f}");
}

#[test]
fn misuse_is_a_fault() {
    use FaultKind::*;
    let load = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes";
    misuse(1, &format!("{load} [s+8], [%rd10], 16, [b];"), MisalignedAddress, "destination");
    misuse(1, &format!("{load} [s], [%rd10+4], 16, [b];"), MisalignedAddress, "source");
    misuse(
        1,
        &format!("mov.u32 %r2, 24; {load} [s], [%rd10], %r2, [b];"),
        IllegalInstruction,
        "24 bytes, no multiple of 16",
    );
    misuse(1, &format!("{load} [s+4080], [%rd10], 32, [b];"), IllegalAddress, "shared memory is");
    misuse(
        1,
        &format!("{load} [s], [%rd10+240], 32, [b];"),
        IllegalAddress,
        "crosses the end of an allocation of 256 bytes",
    );
    misuse(1, &format!("{load} [s], [%rd10], 16, [s+64];"), IllegalInstruction, "no mbarrier object");
    misuse(1, "cp.async.bulk.global.shared::cta.bulk_group [%rd10+240], [s], 32;", IllegalAddress, "crosses the end");
    misuse(
        2,
        &format!(
            "mapa.shared::cluster.u32 %r2, %r20, 1; setp.eq.u32 %p, %rank, 1; @%p bra END; {load} [s], [%rd10], 16, [%r2];"
        ),
        IllegalInstruction,
        "mbarrier object in block 1",
    );
    misuse(
        2,
        &format!("mov.u16 %h1, 5; {load}.multicast::cluster [s], [%rd10], 16, [b], %h1;"),
        IllegalInstruction,
        "blocks 0x0005 of a cluster of 2",
    );
    misuse(
        2,
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [s+64], [s], 16, [b];",
        IllegalInstruction,
        "of the same block",
    );
    misuse(
        1,
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r21], %r2, [%r20];",
        IllegalInstruction,
        "more than one block",
    );
    misuse(
        2,
        "xor.b32 %r2, %rank, 1; mapa.shared::cluster.u32 %r6, %r21, %r2; cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r6], [%rd10], 16, [b];",
        InvalidAddressSpace,
        "not in the block's own",
    );
    // More bytes than the phase expects: the copy's transactions take the count below zero, and the phase never completes.
    misuse(
        1,
        &format!("mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 16; {load} [s], [%rd10], 32, [b]; {WAIT}"),
        Deadlock,
        "tx-count -16",
    );
    let gone = "setp.eq.u32 %p, %rank, 1; @%p exit; nanosleep.u32 100; mov.u32 %r9, 0; SPIN: nanosleep.u32 100; add.u32 %r9, %r9, 1; setp.lt.u32 %p, %r9, 9; @%p bra SPIN;";
    let body = format!(
        "{gone} mapa.shared::cluster.u32 %r2, %r21, 1; mapa.shared::cluster.u32 %r3, %r20, 1; {load} [%r2], [%rd10], 16, [%r3];"
    );
    let source = Buffer::new(&words(64));
    let f = Hopper::row(2, 32, 2).fault(&format!("{SETUP} {body}"), &[source.address]);
    assert!(f.message.contains("has exited"), "{f}");
}

#[test]
fn prefetches_are_checked_and_change_nothing() {
    let source = Buffer::new(&words(64));
    let body = format!(
        "{SETUP} cp.async.bulk.prefetch.L2.global [%rd10], 128; mov.b64 %rd2, 0; cp.async.bulk.prefetch.L2.global.L2::cache_hint [%rd10], 64, %rd2;
         st.global.u32 [%out], 1;"
    );
    assert_eq!(Hopper::default().per_thread(&body, &[source.address]).unwrap(), [1; 32]);
    misuse(1, "cp.async.bulk.prefetch.L2.global [%rd10+8], 128;", FaultKind::MisalignedAddress, "source");
}

#[test]
fn spellings() {
    let load = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes";
    for text in [
        format!("{load} [%r1], [%rd1], 24, [%r2];"),
        format!("{load} [%r1], [%rd1], 16;"),
        format!("{load}.multicast::cluster [%r1], [%rd1], 16, [%r2];"),
        "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.multicast::cluster [%r1], [%rd1], 16, [%r2], %h1;".into(),
        "cp.async.bulk.shared::cluster.global.bulk_group [%r1], [%rd1], 16;".into(),
        "cp.async.bulk.global.shared::cluster.bulk_group [%rd1], [%r1], 16;".into(),
        "cp.async.bulk.global.shared::cta.bulk_group.cp_mask [%rd1], [%r1], 16, %h1;".into(),
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f16 [%rd1], [%r1], 16;".into(),
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s64 [%rd1], [%r1], 16;".into(),
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.and.u32 [%rd1], [%r1], 16;".into(),
        "cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.add.f32 [%r1], [%r2], 16, [%r3];".into(),
        "cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.and.b64 [%r1], [%r2], 16, [%r3];".into(),
        "cp.async.bulk.wait_group %r1;".into(),
        "st.async.shared::cta.mbarrier::complete_tx::bytes.u32 [%r1], %r2, [%r3];".into(),
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b64 [%r1], {%rd1, %rd1, %rd1, %rd1}, [%r3];".into(),
        "red.async.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%r1], %r2, [%r3];".into(),
        "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.f32 [%r1], %f1, [%r3];".into(),
    ] {
        refused(&text);
    }
    assert!(refused("cp.async.bulk.global.shared::cta.bulk_group.cp_mask [%rd1], [%r1], 16, %h1;").contains("sm_100"));
}
