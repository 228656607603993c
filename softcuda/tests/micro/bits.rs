//! Bit counting and fields (PTX ISA 9.7.1), logic and shifts (9.7.8), moves (9.7.9).

use crate::device::{sweep, table};

const W16: &[u64] = &[0, 1, 0x8000, 0xffff, 0x1234, 0x00f0];
const W32: &[u64] = &[0, 1, 0x8000_0000, 0xffff_ffff, 0x1234_5678, 0x00ff_ff00, 0x7fff_ffff];
const W64: &[u64] = &[0, 1, 1 << 63, u64::MAX, 0x0123_4567_89ab_cdef, 0x0000_ffff_ffff_0000];
const AMOUNTS: &[u64] = &[0, 1, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 0xffff_ffff];

#[test]
fn counting() {
    sweep("popc.b32 %d, %a;", "b32", &["b32"], &[W32], |x| (0..32).map(|i| x[0] >> i & 1).sum());
    sweep("popc.b64 %d, %a;", "b32", &["b64"], &[W64], |x| (0..64).map(|i| x[0] >> i & 1).sum());
    let clz = |x: u64, n: u64| (0..n).rev().take_while(|i| x >> i & 1 == 0).count() as u64;
    sweep("clz.b32 %d, %a;", "b32", &["b32"], &[W32], |x| clz(x[0], 32));
    sweep("clz.b64 %d, %a;", "b32", &["b64"], &[W64], |x| clz(x[0], 64));
    sweep("brev.b32 %d, %a;", "b32", &["b32"], &[W32], |x| (0..32).map(|i| (x[0] >> i & 1) << (31 - i)).sum());
    sweep("brev.b64 %d, %a;", "b64", &["b64"], &[W64], |x| (0..64).map(|i| (x[0] >> i & 1) << (63 - i)).sum());
}

#[test]
fn bfind() {
    // For signed types the most significant bit that differs from the sign.
    let find = |x: u64, bits: u32, signed: bool| {
        let x = if signed && x >> (bits - 1) & 1 == 1 { !x } else { x };
        (0..bits).rev().find(|i| x >> i & 1 == 1)
    };
    for (ty, bits, signed, values) in
        [("u32", 32, false, W32), ("s32", 32, true, W32), ("u64", 64, false, W64), ("s64", 64, true, W64)]
    {
        let reg = format!("b{bits}");
        let none = 0xffff_ffff;
        sweep(&format!("bfind.{ty} %d, %a;"), "b32", &[&reg], &[values], |x| {
            find(x[0], bits, signed).map_or(none, u64::from)
        });
        sweep(&format!("bfind.shiftamt.{ty} %d, %a;"), "b32", &[&reg], &[values], |x| {
            find(x[0], bits, signed).map_or(none, |i| u64::from(bits - 1 - i))
        });
    }
}

#[test]
fn fns() {
    table(
        "fns.b32 %d, %a, %b, %c;",
        "b32",
        &["b32", "b32", "b32"],
        &[
            (&[0xaaaa_aaaa, 3, 1], 3),
            (&[0xaaaa_aaaa, 3, 0xffff_ffff], 3),
            (&[0xaaaa_aaaa, 2, 1], 3),
            (&[0xaaaa_aaaa, 2, 0xffff_ffff], 1),
            (&[0xaaaa_aaaa, 3, 2], 5),
            (&[0xaaaa_aaaa, 3, 0], 3),
            (&[0xaaaa_aaaa, 2, 0], 0xffff_ffff),
            (&[1, 1, 1], 0xffff_ffff),
        ],
    );
}

/// The loop of the manual.
fn bfe(a: u64, b: u64, c: u64, bits: u64, signed: bool) -> u64 {
    let (msb, pos, len) = (bits - 1, b & 0xff, c & 0xff);
    let bit = |i: u64| a >> i & 1;
    let sign = if !signed || len == 0 { 0 } else { bit((pos + len - 1).min(msb)) };
    (0..bits).map(|i| (if i < len && pos + i <= msb { bit(pos + i) } else { sign }) << i).sum()
}

#[test]
fn bit_fields() {
    for (ty, bits, signed, values) in
        [("u32", 32, false, W32), ("s32", 32, true, W32), ("u64", 64, false, W64), ("s64", 64, true, W64)]
    {
        let reg = format!("b{bits}");
        sweep(&format!("bfe.{ty} %d, %a, %b, %c;"), &reg, &[&reg, "b32", "b32"], &[values, AMOUNTS, AMOUNTS], |x| {
            bfe(x[0], x[1], x[2], bits, signed)
        });
    }
    for (bits, values) in [(32u64, W32), (64, W64)] {
        let reg = format!("b{bits}");
        sweep(
            &format!("bfi.b{bits} %d, %a, %b, %c, %e;"),
            &reg,
            &[&reg, &reg, "b32", "b32"],
            &[&values[..4], &values[2..5], AMOUNTS, AMOUNTS],
            |x| {
                let (pos, len) = (x[2] & 0xff, x[3] & 0xff);
                (0..bits)
                    .map(|i| (if i >= pos && i - pos < len { x[0] >> (i - pos) } else { x[1] >> i } & 1) << i)
                    .sum()
            },
        );
    }
}

#[test]
fn masks_and_extensions() {
    let amounts: &[u64] = &[0, 1, 7, 31, 32, 40];
    sweep("bmsk.clamp.b32 %d, %a, %b;", "b32", &["b32", "b32"], &[amounts, amounts], |x| {
        (0..32).filter(|i| *i >= x[0].min(32) && *i < x[0].min(32) + x[1].min(32)).map(|i| 1u64 << i).sum()
    });
    table(
        "szext.wrap.s32 %d, %a, %b;",
        "b32",
        &["b32", "b32"],
        &[(&[0x1f, 5], 0xffff_ffff), (&[0x1f, 6], 0x1f), (&[7, 32], 0)],
    );
    table("szext.clamp.u32 %d, %a, %b;", "b32", &["b32", "b32"], &[(&[0xff, 4], 0xf), (&[0xff, 40], 0xff)]);
}

#[test]
fn logic() {
    for (bits, v) in [(16u32, W16), (32, W32), (64, W64)] {
        let reg = format!("b{bits}");
        let mask = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
        sweep(&format!("and.b{bits} %d, %a, %b;"), &reg, &[&reg, &reg], &[v, v], |x| x[0] & x[1]);
        sweep(&format!("or.b{bits} %d, %a, %b;"), &reg, &[&reg, &reg], &[v, v], |x| x[0] | x[1]);
        sweep(&format!("xor.b{bits} %d, %a, %b;"), &reg, &[&reg, &reg], &[v, v], |x| x[0] ^ x[1]);
        sweep(&format!("not.b{bits} %d, %a;"), &reg, &[&reg], &[v], |x| !x[0] & mask);
        sweep(&format!("cnot.b{bits} %d, %a;"), &reg, &[&reg], &[v], |x| u64::from(x[0] == 0));
    }
    let p: &[u64] = &[0, 1];
    sweep("and.pred %d, %a, %b;", "pred", &["pred", "pred"], &[p, p], |x| x[0] & x[1]);
    sweep("or.pred %d, %a, %b;", "pred", &["pred", "pred"], &[p, p], |x| x[0] | x[1]);
    sweep("xor.pred %d, %a, %b;", "pred", &["pred", "pred"], &[p, p], |x| x[0] ^ x[1]);
    sweep("not.pred %d, %a;", "pred", &["pred"], &[p], |x| 1 - x[0]);
}

#[test]
fn lop3_tables() {
    for lut in [0u64, 0x80, 0xfe, 0x96, 0xe8, 0xca, 0x1b, 0xff] {
        sweep(&format!("lop3.b32 %d, %a, %b, %c, {lut};"), "b32", &["b32"; 3], &[W32, W32, W32], |x| {
            (0..32).map(|i| (lut >> ((x[0] >> i & 1) << 2 | (x[1] >> i & 1) << 1 | (x[2] >> i & 1)) & 1) << i).sum()
        });
    }
}

/// PTX ISA 9.7.8.6: the predicate says whether any bit is set, combined with another one.
#[test]
fn lop3_with_a_predicate() {
    let (p, w): (&[u64], &[u64]) = (&[0, 1], &[0, 0xff, 0xffff_0000]);
    for (op, negated) in [("or", false), ("and", false), ("or", true), ("and", true)] {
        let not = if negated { "!" } else { "" };
        let text = format!(
            ".reg .pred %p; .reg .b32 %l; lop3.{op}.b32 %l|%p, %a, %b, %b, 0xc0, {not}%c; selp.u32 %d, 1, 0, %p; lop3.{op}.b32 _|%p, %a, %b, %b, 0xc0, {not}%c;
             @%p add.u32 %d, %d, 2; and.b32 %l, %l, 0xfffffffc; add.u32 %d, %d, %l;"
        );
        sweep(&text, "b32", &["b32", "b32", "pred"], &[w, w, p], |x| {
            let value = x[0] & x[1];
            let (set, q) = (value != 0, (x[2] == 1) != negated);
            let yes = if op == "or" { set || q } else { set && q };
            (value & 0xffff_fffc) + if yes { 3 } else { 0 }
        });
    }
}

#[test]
fn shifts_clamp() {
    for (bits, v) in [(16u64, W16), (32, W32), (64, W64)] {
        let reg = format!("b{bits}");
        let mask = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
        sweep(&format!("shl.b{bits} %d, %a, %b;"), &reg, &[&reg, "b32"], &[v, AMOUNTS], |x| {
            if x[1] >= bits { 0 } else { x[0] << x[1] & mask }
        });
        sweep(&format!("shr.u{bits} %d, %a, %b;"), &reg, &[&reg, "b32"], &[v, AMOUNTS], |x| {
            if x[1] >= bits { 0 } else { x[0] >> x[1] }
        });
        sweep(&format!("shr.s{bits} %d, %a, %b;"), &reg, &[&reg, "b32"], &[v, AMOUNTS], |x| {
            let signed = i128::from(x[0]) - if x[0] >> (bits - 1) & 1 == 1 { 1i128 << bits } else { 0 };
            (signed >> x[1].min(bits)) as u64 & mask
        });
    }
    // Funnel shifts: the upper or lower word of {b, a}.
    let pool = |x: &[u64]| x[1] << 32 | x[0];
    let v: &[u64] = &[0, 0x1234_5678, 0xffff_0000];
    sweep("shf.l.clamp.b32 %d, %a, %b, %c;", "b32", &["b32"; 3], &[v, v, AMOUNTS], |x| {
        (u128::from(pool(x)) << x[2].min(32) >> 32) as u64 & 0xffff_ffff
    });
    sweep("shf.r.clamp.b32 %d, %a, %b, %c;", "b32", &["b32"; 3], &[v, v, AMOUNTS], |x| {
        pool(x) >> x[2].min(32) & 0xffff_ffff
    });
    sweep("shf.l.wrap.b32 %d, %a, %b, %c;", "b32", &["b32"; 3], &[v, v, AMOUNTS], |x| {
        (u128::from(pool(x)) << (x[2] & 31) >> 32) as u64 & 0xffff_ffff
    });
    sweep("shf.r.wrap.b32 %d, %a, %b, %c;", "b32", &["b32"; 3], &[v, v, AMOUNTS], |x| {
        pool(x) >> (x[2] & 31) & 0xffff_ffff
    });
}

#[test]
fn prmt_modes() {
    let b32 = &["b32", "b32", "b32"];
    let (a, b) = (0x8302_0100, 0x0706_8504);
    table(
        "prmt.b32 %d, %a, %b, %c;",
        "b32",
        b32,
        &[
            (&[a, b, 0x3210], a),
            (&[a, b, 0x7654], b),
            (&[a, b, 0x5410], 0x8504_0100),
            // Bit 3 of a selector replicates the byte's sign.
            (&[a, b, 0xba98], 0xff00_0000),
            (&[a, b, 0xd3c0], 0xff83_0000),
        ],
    );
    // Tables of the manual, bytes named by their index in {b, a}.
    let (a, b) = (0x0302_0100, 0x0706_0504);
    let modes: [(&str, [u64; 4]); 6] = [
        ("f4e", [0x0302_0100, 0x0403_0201, 0x0504_0302, 0x0605_0403]),
        ("b4e", [0x0506_0700, 0x0607_0001, 0x0700_0102, 0x0001_0203]),
        ("rc8", [0x0000_0000, 0x0101_0101, 0x0202_0202, 0x0303_0303]),
        ("ecl", [0x0302_0100, 0x0302_0101, 0x0302_0202, 0x0303_0303]),
        ("ecr", [0x0000_0000, 0x0101_0100, 0x0202_0100, 0x0302_0100]),
        ("rc16", [0x0100_0100, 0x0302_0302, 0x0100_0100, 0x0302_0302]),
    ];
    for (mode, want) in modes {
        for (c, want) in want.into_iter().enumerate() {
            table(&format!("prmt.b32.{mode} %d, %a, %b, %c;"), "b32", b32, &[(&[a, b, c as u64], want)]);
        }
    }
}

#[test]
fn moves_pack_and_unpack() {
    table(
        ".reg .b32 %l, %h; mov.b64 {%l, %h}, %a; mov.b64 %d, {%h, %l};",
        "b64",
        &["b64"],
        &[(&[0x0123_4567_89ab_cdef], 0x89ab_cdef_0123_4567)],
    );
    table(
        ".reg .b16 %l, %h; mov.b32 {%l, %h}, %a; mov.b32 %d, {%h, %l};",
        "b32",
        &["b32"],
        &[(&[0x1234_abcd], 0xabcd_1234)],
    );
    table(
        ".reg .b16 %w<4>; mov.b64 {%w0, %w1, %w2, %w3}, %a; mov.b64 %d, {%w3, %w2, %w1, %w0};",
        "b64",
        &["b64"],
        &[(&[0x0123_4567_89ab_cdef], 0xcdef_89ab_4567_0123)],
    );
    table(
        ".reg .b8 %w<4>; mov.b32 {%w0, %w1, %w2, %w3}, %a; mov.b32 %d, {%w3, %w2, %w1, %w0};",
        "b32",
        &["b32"],
        &[(&[0x0123_4567], 0x6745_2301)],
    );
    table(
        ".reg .b32 %h; mov.b64 {_, %h}, %a; mov.b32 %d, %h;",
        "b32",
        &["b64"],
        &[(&[0x0123_4567_89ab_cdef], 0x0123_4567)],
    );
    // A register that is both a part and the whole.
    table(
        ".reg .b16 %l, %h; mov.b32 {%l, %h}, %a; mov.b32 {%h, %l}, %a; mov.b32 %d, {%l, %h};",
        "b32",
        &["b32"],
        &[(&[0x1234_abcd], 0xabcd_1234)],
    );
}

#[test]
fn selections() {
    sweep("selp.b32 %d, %a, %b, %c;", "b32", &["b32", "b32", "pred"], &[&[1, 2], &[3, 4], &[0, 1]], |x| {
        if x[2] == 1 { x[0] } else { x[1] }
    });
    sweep("selp.b64 %d, %a, %b, %c;", "b64", &["b64", "b64", "pred"], &[&[1 << 40], &[3], &[0, 1]], |x| {
        if x[2] == 1 { x[0] } else { x[1] }
    });
    table(
        "slct.u32.s32 %d, %a, %b, %c;",
        "b32",
        &["b32"; 3],
        &[(&[1, 2, 0], 1), (&[1, 2, 0xffff_ffff], 2), (&[1, 2, 5], 1)],
    );
    let nan = 0x7fc0_0000;
    let rows: &[(&[u64], u64)] =
        &[(&[1, 2, 0x8000_0000], 1), (&[1, 2, 0xbf80_0000], 2), (&[1, 2, nan], 2), (&[1, 2, 0x8000_0001], 2)];
    table("slct.b32.f32 %d, %a, %b, %c;", "b32", &["b32", "b32", "f32"], rows);
    table("slct.ftz.b32.f32 %d, %a, %b, %c;", "b32", &["b32", "b32", "f32"], &[(&[1, 2, 0x8000_0001], 1)]);
}
