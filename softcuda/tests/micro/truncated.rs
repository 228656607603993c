//! Products added as published studies of tensor cores say (`softcuda::exec::Products`): what the instructions make of terms at the
//! edge of what is kept. Every element of a matrix has one value, so that every sum is the same.

use softcuda::exec::{Config, Products};

use crate::device::{Buffer, Run};
use crate::warpgroup::{Program64, descriptor};

/// What an `mma` with these elements in every place makes of accumulators of 1, on a device.
fn mma(instruction: &str, words: (u32, u32), capability: (u32, u32), products: Products) -> f32 {
    let out = Buffer::new(&[0u32; 32]);
    let config = Config { products, compute_capability: capability, ..Run::default().config };
    let body = format!(
        ".reg .b32 %a<4>, %b<2>, %d<4>, %t; .reg .b64 %o; ld.param.u64 %o, [p0]; mov.u32 %t, %tid.x; mad.wide.u32 %o, %t, 4, %o;
         mov.b32 %a0, {a}; mov.b32 %a1, {a}; mov.b32 %a2, {a}; mov.b32 %a3, {a}; mov.b32 %b0, {b}; mov.b32 %b1, {b};
         mov.b32 %d0, 0f3F800000; mov.b32 %d1, %d0; mov.b32 %d2, %d0; mov.b32 %d3, %d0;
         {instruction} {{%d0, %d1, %d2, %d3}}, {{%a0, %a1, %a2, %a3}}, {{%b0, %b1}}, {{%d0, %d1, %d2, %d3}};
         st.global.b32 [%o], %d3; ret;",
        a = words.0,
        b = words.1,
    );
    Run { config, own: true, ..Run::default() }.run(&body, &[out.address]).unwrap();
    let all: Vec<f32> = out.read();
    assert!(all.iter().all(|x| x.to_bits() == all[0].to_bits()), "{all:?}");
    all[0]
}

fn ulp(n: i32) -> f32 {
    2f32.powi(-n)
}

#[test]
fn warp_products() {
    let bf16 = |x: f32| (x.to_bits() >> 16) * 0x0001_0001;
    let mma16 = |a: f32, b: f32, capability, products| {
        mma("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", (bf16(a), bf16(b)), capability, products)
    };
    // Sixteen terms of 2^-24: one by one each is half a last place and rounds to even; together they are 2^-20.
    assert_eq!(mma16(ulp(12), ulp(12), (8, 0), Products::Fused), 1.0);
    assert_eq!(mma16(ulp(12), ulp(12), (8, 0), Products::Truncated), 1.0 + ulp(20));
    // 2^-25 is kept by sm_90, not by sm_80.
    assert_eq!(mma16(ulp(12), ulp(13), (8, 0), Products::Truncated), 1.0);
    assert_eq!(mma16(ulp(12), ulp(13), (9, 0), Products::Truncated), 1.0 + ulp(21));
    // 1.5 × 2^-24 is cut to 2^-24 by sm_80 and kept whole by sm_90.
    assert_eq!(mma16(ulp(12), 1.5 * ulp(12), (8, 0), Products::Truncated), 1.0 + ulp(20));
    assert_eq!(mma16(ulp(12), 1.5 * ulp(12), (9, 0), Products::Truncated), 1.0 + 1.5 * ulp(20));
    let tf32 = |x: f32| x.to_bits();
    let mma8 = |a: f32, b: f32, products| {
        mma("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", (tf32(a), tf32(b)), (8, 0), products)
    };
    // Two steps of four, of 2^-24 each.
    assert_eq!(mma8(ulp(12), 1.5 * ulp(12), Products::Truncated), 1.0 + 2.0 * ulp(22));
}

/// What a `wgmma` with these elements in every place makes of accumulators of 1.
fn wgmma(types: &str, k: usize, byte: (u8, u8), products: Products) -> f32 {
    // 64 rows of A and 8 of B, 32 bytes each, as core matrices of 8 rows of 16 bytes.
    let mut image = Vec::new();
    for i in 0..(64 + 8) * 32 {
        image.push(if i % 2 == 0 { byte.0 } else { byte.1 });
    }
    let program = Program64 {
        threads: 128,
        image,
        registers: 4,
        accumulators: vec![1f32.to_bits(); 4 * 128],
        a_words: vec![],
        a: descriptor(0, 128, 256, 0, 0),
        b: descriptor(2048, 128, 256, 0, 0),
        scale: true,
        seed: 0,
        isa: None,
        body: format!(
            "wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.m64n8k{k}.f32.{types} {{%d0, %d1, %d2, %d3}}, %da, %db, %scale, 1, 1{};
             wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;",
            if types.contains("16") { ", 0, 0" } else { "" }
        ),
    };
    let got = program.configured(&program.text(), |config| config.products = products).unwrap();
    assert!(got.iter().all(|x| *x == got[0]), "{got:x?}");
    f32::from_bits(got[0])
}

#[test]
fn warpgroup_products() {
    // bf16 2^-12 is 0x3980, little-endian.
    assert_eq!(wgmma("bf16.bf16", 16, (0x80, 0x39), Products::Fused), 1.0);
    assert_eq!(wgmma("bf16.bf16", 16, (0x80, 0x39), Products::Truncated), 1.0 + ulp(20));
    // e4m3 2^-7 is 0x04, a subnormal: 32 products of 2^-14 are below the 13 bits that are kept.
    assert_eq!(wgmma("e4m3.e4m3", 32, (0x04, 0x04), Products::Fused), 1.0 + ulp(9));
    assert_eq!(wgmma("e4m3.e4m3", 32, (0x04, 0x04), Products::Truncated), 1.0);
    // 2^-6 is 0x08: 2^-12 each.
    assert_eq!(wgmma("e4m3.e4m3", 32, (0x08, 0x08), Products::Truncated), 1.0 + ulp(7));
}
