//! `cvt` (PTX ISA 9.7.9.21), `cvta` and `isspacep`.

use half::{bf16, f16};

use crate::device::{PROLOGUE, Run, d, f, lower, module, sweep, table};

const FLOATS: &[f32] = &[
    0.0,
    -0.0,
    0.5,
    1.5,
    2.5,
    -0.5,
    -1.5,
    -2.5,
    0.49999997,
    127.5,
    128.5,
    255.5,
    -128.5,
    32767.5,
    65535.5,
    2147483648.0,
    -2147483904.0,
    4294967296.0,
    9.3e18,
    -9.3e18,
    1.9e19,
    1e30,
    -1e30,
    f32::INFINITY,
    f32::NEG_INFINITY,
    1e-40,
];

fn round(x: f64, mode: &str) -> f64 {
    match mode {
        "rni" => x.round_ties_even(),
        "rzi" => x.trunc(),
        "rmi" => x.floor(),
        _ => x.ceil(),
    }
}

fn limits(ty: &str) -> (i128, i128, u32) {
    let bits: u32 = ty[1..].parse().unwrap();
    if ty.starts_with('s') { (-(1 << (bits - 1)), (1 << (bits - 1)) - 1, bits) } else { (0, (1 << bits) - 1, bits) }
}

#[test]
fn float_to_integer_clamps() {
    for ty in ["u16", "s16", "u32", "s32", "u64", "s64"] {
        let (min, max, bits) = limits(ty);
        let reg = format!("b{bits}");
        for mode in ["rni", "rzi", "rmi", "rpi"] {
            let rows: Vec<u64> = FLOATS.iter().map(|&x| f(x)).collect();
            sweep(&format!("cvt.{mode}.{ty}.f32 %d, %a;"), &reg, &["f32"], &[&rows], |x| {
                let r = round(f32::from_bits(x[0] as u32).into(), mode) as i128;
                (r.clamp(min, max) & ((1 << bits) - 1)) as u64
            });
            let rows: Vec<u64> = FLOATS.iter().map(|&x| d(x.into())).collect();
            sweep(&format!("cvt.{mode}.{ty}.f64 %d, %a;"), &reg, &["f64"], &[&rows], |x| {
                let r = round(f64::from_bits(x[0]), mode) as i128;
                (r.clamp(min, max) & ((1 << bits) - 1)) as u64
            });
        }
        // NaN: zero, or 2^(n-1) where either side has 64 bits.
        let wide = 1u64 << (bits - 1);
        table(
            &format!("cvt.rzi.{ty}.f32 %d, %a;"),
            &reg,
            &["f32"],
            &[(&[f(f32::NAN)], if bits == 64 { wide } else { 0 })],
        );
        table(&format!("cvt.rzi.{ty}.f64 %d, %a;"), &reg, &["f64"], &[(&[d(f64::NAN)], wide)]);
    }
    // Bytes live in wider registers, extended by their sign.
    table(
        "cvt.rni.s8.f32 %d, %a;",
        "b32",
        &["f32"],
        &[(&[f(-3.0)], 0xffff_fffd), (&[f(-200.0)], 0xffff_ff80), (&[f(200.0)], 0x7f)],
    );
    table("cvt.rni.u8.f32 %d, %a;", "b32", &["f32"], &[(&[f(-3.0)], 0), (&[f(300.0)], 255)]);
    table("cvt.rni.ftz.s32.f32 %d, %a;", "b32", &["f32"], &[(&[1], 0)]);
    table("cvt.rpi.s32.f32 %d, %a;", "b32", &["f32"], &[(&[1], 1)]);
    table("cvt.rpi.ftz.s32.f32 %d, %a;", "b32", &["f32"], &[(&[1], 0)]);
    table("cvt.rni.s32.f16 %d, %a;", "b32", &["b16"], &[(&[0xc100], 0xffff_fffe)]);
}

#[test]
fn integer_to_integer() {
    let v: &[u64] = &[0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff];
    for from in ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"] {
        for to in ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"] {
            let (_, _, from_bits) = limits(from);
            let (min, max, to_bits) = limits(to);
            let (from_reg, to_reg) = (format!("b{}", from_bits.max(16)), format!("b{}", to_bits.max(16)));
            let reg_bits = to_bits.max(16);
            let fits = {
                let ((a, b, _), (c, d, _)) = (limits(from), limits(to));
                c <= a && b <= d
            };
            for sat in if fits { vec![false] } else { vec![false, true] } {
                let rows: Vec<u64> =
                    v.iter().map(|x| if from_bits < 32 { x & ((1 << from_bits.max(16)) - 1) } else { *x }).collect();
                sweep(
                    &format!("cvt{}.{to}.{from} %d, %a;", if sat { ".sat" } else { "" }),
                    &to_reg,
                    &[&from_reg],
                    &[&rows],
                    |x| {
                        let low = i128::from(x[0]) & ((1 << from_bits) - 1);
                        let value = if from.starts_with('s') && low >> (from_bits - 1) == 1 {
                            low - (1 << from_bits)
                        } else {
                            low
                        };
                        let value = if sat { value.clamp(min, max) } else { value & ((1 << to_bits) - 1) };
                        // Extended to the register by the destination's sign.
                        let value = value & ((1 << to_bits) - 1);
                        let value = if to.starts_with('s') && value >> (to_bits - 1) == 1 {
                            value - (1 << to_bits)
                        } else {
                            value
                        };
                        (value & ((1 << reg_bits) - 1)) as u64
                    },
                );
            }
        }
    }
    table("cvt.u32.u8 %d, %a;", "b32", &["b32"], &[(&[0x1234_56ff], 0xff)]);
    table("cvt.s64.s8 %d, %a;", "b64", &["b32"], &[(&[0x80], 0xffff_ffff_ffff_ff80)]);
}

#[test]
fn integer_to_float() {
    let v: &[u64] = &[0, 1, 16_777_217, 16_777_219, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff];
    sweep("cvt.rn.f32.u32 %d, %a;", "f32", &["b32"], &[v], |x| f(x[0] as u32 as f32));
    sweep("cvt.rn.f32.s32 %d, %a;", "f32", &["b32"], &[v], |x| f(x[0] as i32 as f32));
    table(
        "cvt.rz.f32.u32 %d, %a;",
        "f32",
        &["b32"],
        &[(&[0xffff_ffff], f(4294967040.0)), (&[16_777_219], f(16_777_218.0))],
    );
    table(
        "cvt.rp.f32.s32 %d, %a;",
        "f32",
        &["b32"],
        &[(&[16_777_217], f(16_777_218.0)), (&[0xff00_0000 - 1], f(-16_777_216.0 - 0.0))],
    );
    table("cvt.rm.f32.s32 %d, %a;", "f32", &["b32"], &[(&[0xfeff_ffff], f(-16_777_218.0))]);
    // Half-way at 64 bits but for the last bit: one rounding only.
    table(
        "cvt.rn.f32.u64 %d, %a;",
        "f32",
        &["b64"],
        &[(&[(1 << 63) + (1 << 39)], f(9.223372e18)), (&[(1 << 63) + (1 << 39) + 1], f(9.223373e18))],
    );
    sweep("cvt.rn.f64.s64 %d, %a;", "f64", &["b64"], &[&[0, 1, u64::MAX, (1 << 53) + 1, 1 << 63]], |x| {
        d(x[0] as i64 as f64)
    });
    table("cvt.rz.f64.u64 %d, %a;", "f64", &["b64"], &[(&[u64::MAX], d(18446744073709549568.0))]);
    table("cvt.rp.f64.u64 %d, %a;", "f64", &["b64"], &[(&[(1 << 53) + 1], d(9007199254740994.0))]);
    table("cvt.rn.f16.s32 %d, %a;", "b16", &["b32"], &[(&[65519], 0x7bff), (&[65520], 0x7c00), (&[2049], 0x6800)]);
    table("cvt.rn.f16.u16 %d, %a;", "b16", &["b16"], &[(&[3], 0x4200)]);
    table("cvt.rn.bf16.s16 %d, %a;", "b16", &["b16"], &[(&[0xffff], 0xbf80), (&[257], 0x4380)]);
}

#[test]
fn between_floats() {
    let v: Vec<u64> =
        FLOATS.iter().chain(&[65519.9, 65520.0, 6e-8, 3e-8, 2.9e-8, 0.1, 3.4e38]).map(|&x| f(x)).collect();
    sweep("cvt.rn.f16.f32 %d, %a;", "b16", &["f32"], &[&v], |x| {
        f16::from_f32(f32::from_bits(x[0] as u32)).to_bits().into()
    });
    sweep("cvt.rn.bf16.f32 %d, %a;", "b16", &["f32"], &[&v], |x| {
        bf16::from_f32(f32::from_bits(x[0] as u32)).to_bits().into()
    });
    table("cvt.rn.f16.f32 %d, %a;", "b16", &["f32"], &[(&[0xffc0_0001], 0x7fff)]);
    table(
        "cvt.rn.bf16.f32 %d, %a;",
        "b16",
        &["f32"],
        &[(&[0xffc0_0001], 0x7fff), (&[0x3f80_8000], 0x3f80), (&[0x3f81_8000], 0x3f82)],
    );
    table("cvt.rz.bf16.f32 %d, %a;", "b16", &["f32"], &[(&[0x3f81_ffff], 0x3f81), (&[0x7f7f_ffff], 0x7f7f)]);
    table("cvt.rz.f16.f32 %d, %a;", "b16", &["f32"], &[(&[f(65535.0)], 0x7bff), (&[f(-1e10)], 0xfbff)]);
    table("cvt.rp.f16.f32 %d, %a;", "b16", &["f32"], &[(&[1], 1), (&[f(-65535.0)], 0xfbff)]);
    table(
        "cvt.rn.relu.f16.f32 %d, %a;",
        "b16",
        &["f32"],
        &[(&[f(-1.0)], 0), (&[f(2.0)], 0x4000), (&[f(f32::NAN)], 0x7fff)],
    );
    sweep("cvt.f32.f16 %d, %a;", "f32", &["b16"], &[&[0, 0x8000, 1, 0x3ff, 0x3c00, 0x7bff, 0xfc00]], |x| {
        f(f16::from_bits(x[0] as u16).to_f32())
    });
    table("cvt.f32.bf16 %d, %a;", "f32", &["b16"], &[(&[0x3f81], 0x3f81_0000), (&[1], 0x1_0000)]);
    table(
        "cvt.f64.f32 %d, %a;",
        "f64",
        &["f32"],
        &[(&[1], d(1.401298464324817e-45)), (&[f(0.1)], d(f64::from(0.1f32)))],
    );
    table("cvt.ftz.f64.f32 %d, %a;", "f64", &["f32"], &[(&[0x8000_0001], d(-0.0))]);
    table(
        "cvt.rn.f32.f64 %d, %a;",
        "f32",
        &["f64"],
        &[(&[d(0.1)], f(0.1)), (&[d(1e300)], f(f32::INFINITY)), (&[d(1e-45)], 1)],
    );
    table("cvt.rz.f32.f64 %d, %a;", "f32", &["f64"], &[(&[d(1e300)], f(f32::MAX)), (&[d(0.1)], 0x3dcc_cccc)]);
    table("cvt.rn.ftz.f32.f64 %d, %a;", "f32", &["f64"], &[(&[d(-1e-40)], f(-0.0))]);
    table(
        "cvt.rzi.f32.f32 %d, %a;",
        "f32",
        &["f32"],
        &[(&[f(-2.7)], f(-2.0)), (&[f(-0.3)], f(-0.0)), (&[f(1e30)], f(1e30))],
    );
    table(
        "cvt.sat.f32.f32 %d, %a;",
        "f32",
        &["f32"],
        &[(&[f(-2.7)], f(0.0)), (&[f(1.3)], f(1.0)), (&[f(f32::NAN)], 0)],
    );
    table(
        "cvt.rna.tf32.f32 %d, %a;",
        "b32",
        &["f32"],
        &[
            (&[0x3f80_1000], 0x3f80_2000),
            (&[0x3f80_0fff], 0x3f80_0000),
            (&[0xbf80_1000], 0xbf80_2000),
            (&[0x7f80_0000], 0x7f80_0000),
        ],
    );
}

#[test]
fn packing_puts_the_first_source_on_top() {
    let two = &["f32", "f32"];
    table("cvt.rn.bf16x2.f32 %d, %a, %b;", "b32", two, &[(&[f(1.0), f(2.0)], 0x3f80_4000)]);
    table("cvt.rn.f16x2.f32 %d, %a, %b;", "b32", two, &[(&[f(1.0), f(2.0)], 0x3c00_4000)]);
    table("cvt.rz.bf16x2.f32 %d, %a, %b;", "b32", two, &[(&[0x3f81_ffff, 0x3f80_8001], 0x3f81_3f80)]);
    table("cvt.rn.relu.bf16x2.f32 %d, %a, %b;", "b32", two, &[(&[f(-1.0), f(2.0)], 0x0000_4000)]);
    table(
        "cvt.rn.satfinite.e4m3x2.f32 %d, %a, %b;",
        "b16",
        two,
        &[(&[f(1.0), f(1000.0)], 0x387e), (&[f(-0.5), f(f32::NAN)], 0xb07f)],
    );
    table("cvt.rn.satfinite.e5m2x2.f32 %d, %a, %b;", "b16", two, &[(&[f(1.0), f(1e9)], 0x3c7b)]);
    table("cvt.rn.f16x2.e4m3x2 %d, %a;", "b32", &["b16"], &[(&[0x387e], 0x3c00_5f00), (&[0x017f], 0x1800_7fff)]);
    table("cvt.rn.f16x2.e5m2x2 %d, %a;", "b32", &["b16"], &[(&[0x3c7b], 0x3c00_7b00), (&[0x7cfc], 0x7c00_fc00)]);
}

#[test]
fn address_spaces() {
    let got = Run { block: 1, ..Run::default() }.per_thread(
        ".shared .align 16 .b8 s[64]; .local .align 8 .b8 l[16];
         mov.u64 %rd0, s; cvta.shared.u64 %rd1, %rd0; cvta.to.shared.u64 %rd2, %rd1;
         setp.eq.u64 %p0, %rd0, %rd2;
         isspacep.shared %p1, %rd1; isspacep.global %p2, %rd1; isspacep.global %p3, %out;
         mov.u64 %rd3, l; cvta.local.u64 %rd4, %rd3; isspacep.local %p4, %rd4;
         mov.u32 %r2, 77; st.u32 [%rd1+4], %r2; ld.shared.u32 %r3, [s+4];
         mov.u32 %r4, 88; st.local.u32 [l+8], %r4; ld.u32 %r5, [%rd4+8];
         selp.u32 %r6, 1, 0, %p0; selp.u32 %r7, 2, 0, %p1; selp.u32 %r8, 4, 0, %p2; selp.u32 %r9, 8, 0, %p3;
         selp.u32 %r10, 16, 0, %p4;
         add.u32 %r6, %r6, %r7; add.u32 %r6, %r6, %r8; add.u32 %r6, %r6, %r9; add.u32 %r6, %r6, %r10;
         mad.lo.u32 %r6, %r3, 100, %r6; mad.lo.u32 %r6, %r5, 10000, %r6;
         st.global.u32 [%out], %r6;",
    );
    assert_eq!(got, [88 * 10000 + 77 * 100 + 27]);
}

/// PTX ISA 9.7.9.22: both sources saturated, the second below the first, the third's low bits above them.
#[test]
fn packing_with_saturation() {
    let v: &[u64] = &[0, 1, 5, 0xffff_ffff, 0xffff_fffd, 0x7fff_ffff, 0x8000_0000, 200];
    let clamp = |x: u64, bits: u32, signed: bool| {
        let x = i64::from(x as u32 as i32);
        let (min, max) = if signed { (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) } else { (0, (1i64 << bits) - 1) };
        x.clamp(min, max) as u64 & ((1 << bits) - 1)
    };
    for (ty, bits, signed) in [("u16", 16, false), ("s16", 16, true)] {
        crate::device::sweep(&format!("cvt.pack.sat.{ty}.s32 %d, %a, %b;"), "b32", &["b32", "b32"], &[v, v], |x| {
            clamp(x[0], bits, signed) << bits | clamp(x[1], bits, signed)
        });
    }
    for (ty, bits, signed) in
        [("u8", 8, false), ("s8", 8, true), ("u4", 4, false), ("s4", 4, true), ("u2", 2, false), ("s2", 2, true)]
    {
        let c: &[u64] = &[0, 0x1234_5678];
        let text = format!("cvt.pack.sat.{ty}.s32.b32 %d, %a, %b, %c;");
        crate::device::sweep(&text, "b32", &["b32"; 3], &[v, v, c], |x| {
            (x[2] << (2 * bits) | clamp(x[0], bits, signed) << bits | clamp(x[1], bits, signed)) & 0xffff_ffff
        });
    }
}

#[test]
fn bf16_only_widens() {
    crate::device::table(
        "cvt.rz.f32.bf16 %d, %a;",
        "f32",
        &["b16"],
        &[(&[0x3f81], 0x3f81_0000), (&[0x8001], 0x8001_0000)],
    );
    crate::device::table(
        "cvt.rn.ftz.bf16.f32 %d, %a;",
        "b16",
        &["f32"],
        &[(&[0x0040_0000], 0), (&[0x3f80_8000], 0x3f80)],
    );
}

/// The bits of a value of an integer type in a register of `register` bits: extended by its sign, or by zeros.
fn in_register(value: i128, (bits, signed): (u32, bool), register: u32) -> u64 {
    let low = value & ((1 << bits) - 1);
    let extended = if signed && low >> (bits - 1) == 1 { low - (1 << bits) } else { low };
    (extended & ((1 << register) - 1)) as u64
}

#[test]
fn results_in_wider_registers_are_extended_bit_by_bit() {
    // Destinations of `cvt` and `ld` (9.4.1): every integer type in every register that holds it, read back whole.
    let v: &[u64] =
        &[0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x1234_5680, 0x8000_0000, 0xffff_ff80, 0x7fff_ffff];
    for bits in [8u32, 16, 32] {
        for signed in [false, true] {
            let ty = format!("{}{bits}", if signed { 's' } else { 'u' });
            for register in [16u32, 32, 64].into_iter().filter(|&r| r >= bits) {
                // What reads all 32 bits of the slot of a 16-bit register must find zeros above.
                let read = match register {
                    16 => "mov.b32 %pair, {%wider, %wider}; cvt.u64.u32 %d, %pair;",
                    32 => "cvt.u64.u32 %d, %wider;",
                    _ => "mov.b64 %d, %wider;",
                };
                let whole = |x: u64| if register == 16 { x | x << 16 } else { x };
                let declare = format!(".reg .b{register} %wider; .reg .b32 %pair;");
                let want = |x: &[u64]| whole(in_register(x[0].into(), (bits, signed), register));
                sweep(&format!("{declare} cvt.{ty}.s32 %wider, %a; {read}"), "b64", &["b32"], &[v], want);
                sweep(&format!("{declare} cvt.{ty}.u64 %wider, %a; {read}"), "b64", &["b64"], &[v], want);
                let memory = format!(
                    "{{ .shared .align 8 .b8 sh[256]; .reg .b32 %at; mov.u32 %at, %tid.x; mad.lo.u32 %at, %at, 8, 0; st.shared.b32 [%at], %a; ld.shared.{ty} %wider, [%at]; }}"
                );
                sweep(&format!("{declare} {memory} {read}"), "b64", &["b32"], &[v], want);
                let floats: Vec<u64> =
                    [0.0f32, 1.0, -1.0, 127.0, -128.0, 200.0, -200.0, 40000.0, -40000.0, 3e9, -3e9].map(f).to_vec();
                let (min, max) =
                    if signed { (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1) } else { (0, (1i128 << bits) - 1) };
                sweep(&format!("{declare} cvt.rzi.{ty}.f32 %wider, %a; {read}"), "b64", &["f32"], &[&floats], |x| {
                    let value = (f32::from_bits(x[0] as u32) as i128).clamp(min, max);
                    whole(in_register(value, (bits, signed), register))
                });
            }
        }
    }
}

#[test]
fn sources_in_wider_registers_are_cut() {
    // Sources of `cvt` and `st` (9.4.1).
    let v: &[u64] = &[0, 0x1_0000_0001, 0xabcd_ef80_8000_8080, u64::MAX, 0x7fff_7fff_7f7f_7f7f];
    for bits in [8u32, 16, 32] {
        for signed in [false, true] {
            let ty = format!("{}{bits}", if signed { 's' } else { 'u' });
            let sign = if signed { 's' } else { 'u' };
            sweep(&format!("cvt.{sign}64.{ty} %d, %a;"), "b64", &["b64"], &[v], |x| {
                in_register(x[0].into(), (bits, signed), 64)
            });
        }
        let memory = format!(
            "{{ .shared .align 8 .b8 sh[256]; .reg .b32 %at; mov.u32 %at, %tid.x; mul.lo.u32 %at, %at, 8; st.shared.b64 [%at], -1; st.shared.b{bits} [%at], %a; ld.shared.b64 %d, [%at]; }}"
        );
        let low = u64::MAX >> (64 - bits);
        sweep(&memory, "b64", &["b64"], &[v], |x| x[0] & low | !low);
    }
    // Floating-point types in untyped registers that are wider, which hold zeros above a result.
    table("cvt.rn.f32.s32 %d, %a;", "b64", &["b32"], &[(&[0xffff_ffff], f(-1.0))]);
    table("cvt.f32.f16 %d, %a;", "f32", &["b64"], &[(&[0xffff_ffff_ffff_3c00], f(1.0))]);
    table("cvt.rn.f16.f32 %d, %a;", "b64", &["b64"], &[(&[0xffff_ffff_3f80_0000], 0x3c00)]);
    table(
        "cvt.pack.sat.s16.s32 %d, %a, %b;",
        "b64",
        &["b64", "b64"],
        &[(&[0x5_ffff_ffff, 0x9_0001_0000], 0xffff_7fff)],
    );
    let memory = "{ .shared .align 8 .b8 sh[256]; .reg .b32 %at; mov.u32 %at, %tid.x; mul.lo.u32 %at, %at, 8; st.shared.f32 [%at], %a; ld.shared.f32 %d, [%at]; }";
    table(memory, "b64", &["b64"], &[(&[0xffff_ffff_3f80_0000], 0x3f80_0000)]);
}

#[test]
fn registers_that_a_type_does_not_fit() {
    for (register, instruction) in [
        ("f32", "ld.global.u32 %x, [%out];"),
        ("f64", "ld.global.f32 %x, [%out];"),
        ("u64", "ld.global.f32 %x, [%out];"),
        ("u32", "st.global.f32 [%out], %x;"),
        ("b16", "ld.global.b32 %x, [%out];"),
        ("f16", "ld.global.u16 %x, [%out];"),
        ("b32", "cvt.rn.bf16.f32 %x, %f0;"),
        ("b64", "cvt.rn.bf16x2.f32 %x, %f0, %f1;"),
        ("b32", "cvt.rn.satfinite.e4m3x2.f32 %x, %f0, %f1;"),
        ("b64", "cvt.rna.tf32.f32 %x, %f0;"),
        ("u32", "cvt.rn.f32.s32 %x, %r0;"),
        ("f32", "cvt.rn.f16.f32 %x, %f0;"),
    ] {
        let body = format!("{PROLOGUE} .reg .{register} %x; {instruction} ret;");
        let error = lower(&module(1, "", &body)).expect_err(instruction).to_string();
        assert!(error.contains("a register"), "{register}, {instruction}: {error}");
    }
}
