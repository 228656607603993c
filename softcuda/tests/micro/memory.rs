//! Loads, stores and atomics in every space (PTX ISA 9.7.9, 9.7.13), and what happens at wrong addresses.

use softcuda::exec::{Config, FaultKind};

use crate::device::{Buffer, Run, memory};

#[test]
fn widths_and_extension() {
    let bytes: Vec<u8> = (0x80..0x90).collect();
    let b = Buffer::new(&bytes);
    let out = Buffer::new(&[0u64; 8]);
    Run { block: 1, ..Run::default() }
        .run(
            ".reg .b64 %i, %o, %v; .reg .b32 %r; .reg .b16 %h;
             ld.param.u64 %i, [p0]; ld.param.u64 %o, [p1];
             ld.global.u8 %r, [%i+1]; cvt.u64.u32 %v, %r; st.global.u64 [%o], %v;
             ld.global.s8 %r, [%i+1]; cvt.u64.u32 %v, %r; st.global.u64 [%o+8], %v;
             ld.global.s16 %r, [%i+2]; cvt.u64.u32 %v, %r; st.global.u64 [%o+16], %v;
             ld.global.u16 %h, [%i+2]; cvt.u64.u16 %v, %h; st.global.u64 [%o+24], %v;
             ld.global.s32 %v, [%i+4]; st.global.u64 [%o+32], %v;
             ld.global.u32 %v, [%i+4]; st.global.u64 [%o+40], %v;
             ld.global.b64 %v, [%i+8]; st.global.b64 [%o+48], %v;
             mov.b64 %v, 0x1122334455667788; st.global.u64 [%o+56], 0; st.global.u8 [%o+57], %v; st.global.u16 [%o+60], %v;
             ret;",
            &[b.address, out.address],
        )
        .unwrap();
    let want = [
        0x81,
        0xffff_ff81,
        0xffff_8382,
        0x8382,
        0xffff_ffff_8786_8584,
        0x8786_8584,
        0x8f8e_8d8c_8b8a_8988,
        0x0000_7788_0000_8800,
    ];
    assert_eq!(out.read::<u64>(), want);
}

#[test]
fn vectors_and_masks() {
    let input: Vec<u32> = (0..128).collect();
    let i = Buffer::new(&input);
    let out = Buffer::new(&[9u32; 128]);
    Run::default()
        .run(
            ".reg .pred %p; .reg .b64 %i, %o; .reg .b32 %t, %v<4>; .reg .v4 .b32 %w;
             ld.param.u64 %i, [p0]; ld.param.u64 %o, [p1]; mov.u32 %t, %tid.x;
             mad.wide.u32 %i, %t, 16, %i; mad.wide.u32 %o, %t, 16, %o;
             ld.global.v4.b32 {%v0, %v1, %v2, %v3}, [%i];
             ld.global.v4.b32 %w, [%i];
             add.u32 %v3, %v3, %w.y;
             and.b32 %t, %t, 1; setp.eq.u32 %p, %t, 1;
             @%p st.global.v2.b32 [%o+8], {%v3, %v0};
             @!%p ld.global.v2.u32 {_, %v1}, [%i+8];
             st.global.b32 [%o], %v1;
             ret;",
            &[i.address, out.address],
        )
        .unwrap();
    let got: Vec<u32> = out.read();
    for (t, row) in got.chunks(4).enumerate() {
        let x = |n: usize| (4 * t + n) as u32;
        if t % 2 == 1 {
            assert_eq!(row, [x(1), 9, x(3) + x(1), x(0)]);
        } else {
            assert_eq!(row, [x(3), 9, 9, 9]);
        }
    }
}

#[test]
fn shared_memory_starts_as_nan_and_differs_by_seed() {
    let body = ".shared .align 4 .b8 s[128]; mov.u32 %r2, s; mad.lo.u32 %r2, %lane, 4, %r2; ld.shared.u32 %r3, [%r2]; st.global.u32 [%out], %r3;";
    let patterns: Vec<u32> = (0..8)
        .map(|seed| {
            let config = Config { seed, threads: 1, ..Config::default() };
            let run = Run { config, own: true, ..Run::default() };
            let words = run.per_thread(body);
            assert!(words.iter().all(|w| *w == words[0]));
            words[0]
        })
        .collect();
    for p in &patterns {
        assert!(
            f32::from_bits(*p).is_nan()
                && half::f16::from_bits(*p as u16).is_nan()
                && half::bf16::from_bits(*p as u16).is_nan()
        );
    }
    assert!(patterns.iter().any(|p| *p != patterns[0]));
}

#[test]
fn static_and_dynamic_shared_memory() {
    let run =
        Run { block: 64, shared: 256, outside: ".extern .shared .align 32 .b8 dynamic[];".into(), ..Run::default() };
    let got = run.per_thread(
        ".shared .align 4 .b8 s[256];
         mov.u32 %r2, s; mov.u32 %r3, dynamic; mad.lo.u32 %r4, %thread, 4, %r2; mad.lo.u32 %r5, %thread, 4, %r3;
         st.shared.u32 [%r4], %thread; mul.lo.u32 %r6, %thread, 3; st.shared.u32 [%r5], %r6;
         bar.sync 0;
         xor.b32 %r7, %thread, 63; mad.lo.u32 %r4, %r7, 4, %r2; mad.lo.u32 %r5, %r7, 4, %r3;
         ld.shared.u32 %r8, [%r4]; ld.shared.u32 %r9, [%r5]; mad.lo.u32 %r8, %r8, 1000, %r9;
         mov.u32 %r10, %dynamic_smem_size; mad.lo.u32 %r8, %r10, 1000000, %r8;
         st.global.u32 [%out], %r8;",
    );
    let want: Vec<u32> = (0..64).map(|t| 256_000_000 + (t ^ 63) * 1000 + (t ^ 63) * 3).collect();
    assert_eq!(got, want);
}

#[test]
fn module_variables_and_constants() {
    let run = Run { outside: ".global .align 4 .u32 counter; .const .align 4 .b8 table[16];".into(), ..Run::default() };
    let got = run.per_thread(
        "ld.const.u32 %r2, [table+4]; atom.global.add.u32 %r3, [counter], 1; mov.u64 %rd0, counter;
         cvta.global.u64 %rd1, %rd0; bar.warp.sync -1; ld.u32 %r4, [%rd1]; add.u32 %r4, %r4, %r2;
         st.global.u32 [%out], %r4;",
    );
    assert_eq!(got, [32; 32]);
}

/// `(operation, type, old, operand, compare-with, new)` on 32 or 64 bits.
type AtomRow = (&'static str, &'static str, u64, u64, u64, u64);

#[test]
fn atomics_in_global_and_shared() {
    let f = |x: f32| u64::from(x.to_bits());
    let rows: &[AtomRow] = &[
        ("add", "u32", 5, 0xffff_ffff, 0, 4),
        ("add", "u64", u64::MAX, 2, 0, 1),
        ("add", "f32", f(1.5), f(2.0), 0, f(3.5)),
        ("add", "f64", 1.5f64.to_bits(), 2f64.to_bits(), 0, 3.5f64.to_bits()),
        ("add.noftz", "f16x2", 0x3c00_4000, 0x3c00_3c00, 0, 0x4000_4200),
        ("add.noftz", "bf16x2", 0x3f80_4000, 0x3f80_3f80, 0, 0x4000_4040),
        ("min", "s32", 0xffff_ffff, 1, 0, 0xffff_ffff),
        ("min", "u32", 0xffff_ffff, 1, 0, 1),
        ("max", "s64", u64::MAX, 1, 0, 1),
        ("max", "u64", u64::MAX, 1, 0, u64::MAX),
        ("inc", "u32", 4, 4, 0, 0),
        ("inc", "u32", 3, 4, 0, 4),
        ("dec", "u32", 0, 4, 0, 4),
        ("dec", "u32", 9, 4, 0, 4),
        ("dec", "u32", 3, 4, 0, 2),
        ("exch", "b64", 7, 1 << 40, 0, 1 << 40),
        ("cas", "b32", 7, 7, 9, 9),
        ("cas", "b32", 8, 7, 9, 8),
        ("cas", "b64", 7, 7, 1 << 40, 1 << 40),
        ("and", "b32", 0b1100, 0b1010, 0, 0b1000),
        ("or", "b64", 0b1100, 0b1010, 0, 0b1110),
        ("xor", "b32", 0b1100, 0b1010, 0, 0b0110),
    ];
    for (op, ty, old, b, c, new) in rows {
        let bits = if ty.ends_with("64") { 64 } else { 32 };
        let reg = match *ty {
            "f32" => "f32",
            "f64" => "f64",
            _ if bits == 64 => "b64",
            _ => "b32",
        };
        let third = if *op == "cas" { ", %c" } else { "" };
        for (place, space) in [("%cell", "global"), ("s", "shared"), ("%cell", ""), ("%generic", "")] {
            let dot = if space.is_empty() { "" } else { "." };
            let text = format!(
                ".reg .b64 %cell, %o, %generic, %x; .reg .{reg} %old, %b, %c, %new; .shared .align 8 .b64 s;
                 ld.param.u64 %cell, [p0]; ld.param.u64 %o, [p1]; ld.param.{reg} %b, [p2]; ld.param.{reg} %c, [p3];
                 ld.global.b64 %x, [%cell]; st.shared.b64 [s], %x; mov.u64 %generic, s; cvta.shared.u64 %generic, %generic;
                 atom{dot}{space}.{op}.{ty} %old, [{place}], %b{third};
                 ld{}.{reg} %new, [{place}]; st.global.{reg} [%o], %old; st.global.{reg} [%o+8], %new; ret;",
                if place == "s" { ".shared" } else { "" },
            );
            let (cell, out) = (Buffer::new(&[*old]), Buffer::new(&[0u64; 2]));
            Run { block: 1, ..Run::default() }.run(&text, &[cell.address, out.address, *b, *c]).unwrap();
            assert_eq!(out.read::<u64>(), [*old, *new], "atom.{space}.{op}.{ty} of {old:#x}, {b:#x}, {c:#x}");
        }
    }
}

#[test]
fn atomic_f32_addition_flushes_in_global_memory_only() {
    let got = Run { block: 1, ..Run::default() }.per_thread(
        ".shared .align 4 .f32 s; mov.b32 %f0, 1; st.shared.f32 [s], %f0; st.global.f32 [%out], %f0;
         atom.shared.add.f32 %f1, [s], %f0; red.global.add.f32 [%out], %f0; ld.shared.u32 %r2, [s];
         ld.global.u32 %r3, [%out]; mad.lo.u32 %r2, %r2, 16, %r3; st.global.u32 [%out], %r2;",
    );
    assert_eq!(got, [32]);
}

#[test]
fn atomics_from_many_host_threads_lose_nothing() {
    let cell = Buffer::new(&[0u32, 0]);
    let run = Run { grid: 64, block: 128, config: Config { threads: 4, ..Config::default() }, ..Run::default() };
    run.run(
        ".reg .b64 %c; .reg .b32 %r; .reg .f32 %f; ld.param.u64 %c, [p0]; mov.f32 %f, 0f3F800000;
         red.global.add.u32 [%c], 1; atom.global.add.f32 %f, [%c+4], %f; ret;",
        &[cell.address],
    )
    .unwrap();
    let got: Vec<u32> = cell.read();
    assert_eq!((got[0], f32::from_bits(got[1])), (8192, 8192.0));
}

#[test]
fn faults_name_the_place() {
    let b = Buffer::new(&[0u32; 40]);
    // Thread 8 of the second block steps past the end.
    let run = Run { grid: 2, ..Run::default() };
    let fault = run
        .run(
            ".reg .b64 %a; .reg .b32 %t, %c; ld.param.u64 %a, [p0]; mov.u32 %t, %tid.x; mov.u32 %c, %ctaid.x;
             mad.lo.u32 %t, %c, 32, %t; mad.wide.u32 %a, %t, 4, %a;\nst.global.u32 [%a], %t; ret;",
            &[b.address],
        )
        .unwrap_err();
    assert_eq!(fault.kind, FaultKind::IllegalAddress);
    assert_eq!((fault.block, fault.thread, fault.line), ([1, 0, 0], [8, 0, 0], 9));
    assert_eq!((fault.address, fault.bytes, fault.space), (Some(b.address + 160), Some(4), Some("global")));
    let text = fault.to_string();
    assert!(
        text.contains("st.global.u32 [%a], %t") && text.contains("kernel `k`") && text.contains("160 bytes"),
        "{text}"
    );
    assert!(!text.contains('\n'));
}

#[test]
fn each_kind_of_wrong_address() {
    let b = Buffer::new(&[0u32; 64]);
    let check = |body: &str, kind: FaultKind, says: &str| {
        let text = format!(
            ".reg .b64 %a; .reg .b32 %r<4>; .shared .align 16 .b8 s[64]; .local .align 8 .b8 l[16]; ld.param.u64 %a, [p0]; {body} ret;"
        );
        let fault = Run { block: 1, ..Run::default() }.run(&text, &[b.address]).unwrap_err();
        assert_eq!(fault.kind, kind, "{body}: {fault}");
        assert!(fault.to_string().contains(says), "{body}: {fault}");
    };
    use FaultKind::*;
    check("ld.global.u32 %r0, [%a+2];", MisalignedAddress, "not a multiple of 4");
    check("ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%a+8];", MisalignedAddress, "not a multiple of 16");
    check("ld.global.u32 %r0, [%a+256];", IllegalAddress, "global access of 4 bytes");
    check("mov.u64 %a, 0; ld.global.u32 %r0, [%a];", IllegalAddress, "global");
    check("ld.shared.u32 %r0, [s+64];", IllegalAddress, "shared memory is 64 bytes");
    check("st.shared.v2.u32 [s+60], {%r0, %r1};", MisalignedAddress, "shared");
    check("st.local.u32 [l+16], %r0;", IllegalAddress, "local memory is 16 bytes");
    check("mov.u64 %a, s; cvta.shared.u64 %a, %a; ld.u32 %r0, [%a+64];", IllegalAddress, "shared");
    check(
        "mov.u64 %a, l; cvta.local.u64 %a, %a; atom.add.u32 %r0, [%a], 1;",
        InvalidAddressSpace,
        "neither global nor shared",
    );
    check("atom.global.add.u32 %r0, [%a+1], 1;", MisalignedAddress, "4");
    check("cp.async.cg.shared.global [s+8], [%a], 16;", MisalignedAddress, "16");
    check("cp.async.ca.shared.global [s], [%a+256], 4;", IllegalAddress, "global");
    let gone = memory().alloc(64).unwrap();
    memory().free(gone).unwrap();
    check(&format!("mov.u64 %a, {gone}; ld.global.u32 %r0, [%a];"), IllegalAddress, "freed");
}

#[test]
fn inactive_lanes_access_nothing() {
    let b = Buffer::new(&[7u32]);
    Run::default()
        .run(
            ".reg .pred %p; .reg .b64 %a; .reg .b32 %r; ld.param.u64 %a, [p0]; mov.u32 %r, %tid.x; setp.eq.u32 %p, %r, 0;
             mad.wide.u32 %a, %r, 4096, %a; @%p ld.global.u32 %r, [%a]; @%p st.global.u32 [%a], %r; ret;",
            &[b.address],
        )
        .unwrap();
}

#[test]
fn orders_and_cache_hints_are_accepted() {
    let got = Run::default().per_thread(
        ".reg .b64 %pol; createpolicy.fractional.L2::evict_last.b64 %pol, 1.0;
         st.volatile.global.u32 [%out], %thread; st.relaxed.gpu.global.u32 [%out], %thread; st.release.sys.global.u32 [%out], %thread;
         ld.acquire.gpu.global.u32 %r2, [%out]; ld.relaxed.cta.global.u32 %r2, [%out]; ld.volatile.global.u32 %r2, [%out];
         ld.global.nc.L1::no_allocate.L2::128B.u32 %r3, [%out]; ld.global.L2::cache_hint.u32 %r3, [%out], %pol;
         ld.global.cg.u32 %r4, [%out]; prefetch.global.L2 [%out]; fence.acq_rel.gpu; membar.gl; fence.sc.cta;
         add.u32 %r2, %r2, %r3; add.u32 %r2, %r2, %r4; st.global.cs.u32 [%out], %r2;",
    );
    assert_eq!(got, (0..32).map(|t| 3 * t).collect::<Vec<_>>());
}

#[test]
fn parameters_by_register_and_generic_address() {
    let got = Run { block: 1, ..Run::default() }.per_thread(
        "mov.b64 %rd0, p0; ld.param.u32 %r2, [%rd0]; cvta.param.u64 %rd1, %rd0; ld.u32 %r3, [%rd1];
         cvt.u32.u64 %r4, %out; sub.u32 %r2, %r2, %r4; sub.u32 %r3, %r3, %r4; or.b32 %r2, %r2, %r3; st.global.u32 [%out], %r2;",
    );
    assert_eq!(got, [0]);
}

#[test]
fn what_takes_an_address_without_touching_memory() {
    // A fence and a hint dereference nothing (9.7.9.14 to 9.7.9.19, 9.7.13.4), and of a source of no bytes nothing is read.
    for address in
        ["mov.b64 %rd1, 0;", "mov.b64 %rd1, 0xffffffffffff00;", "mov.u64 %rd1, sh; cvta.shared.u64 %rd1, %rd1;"]
    {
        for instruction in [
            "fence.proxy.tensormap::generic.acquire.gpu [%rd1], 128;",
            "fence.proxy.tensormap::generic.acquire.sys [%rd1], 128;",
            "prefetch.L1 [%rd1];",
            "prefetch.global.L2::evict_last [%rd1];",
            "prefetch.tensormap [%rd1];",
            "prefetchu.L1 [%rd1];",
            "discard.global.L2 [%rd1], 128;",
            "applypriority.global.L2::evict_normal [%rd1], 128;",
            "createpolicy.range.global.L2::evict_last.b64 %rd2, [%rd1], 128, 128;",
            "cp.async.bulk.prefetch.L2.global [%rd1], 128;",
            "cp.async.ca.shared.global [sh], [%rd1], 16, 0; cp.async.wait_all;",
            "setp.eq.u32 %p, %lane, %lane; cp.async.cg.shared.global [sh], [%rd1], 16, %p; cp.async.wait_all;",
            "isspacep.global %p, %rd1;",
            "cvta.to.global.u64 %rd2, %rd1;",
        ] {
            let body = format!(".shared .align 128 .b8 sh[128]; {address} {instruction} st.global.u32 [%out], 7;");
            assert_eq!(Run::default().per_thread(&body), [7; 32], "{address} {instruction}");
        }
    }
}
