//! Integer arithmetic (PTX ISA 9.7.1) and extended precision (9.7.2).

use crate::device::{sweep, table};

const W16: &[u64] = &[0, 1, 2, 0x7f, 0x7fff, 0x8000, 0x8001, 0xfffe, 0xffff, 0x1234];
const W32: &[u64] = &[0, 1, 2, 3, 7, 0x7fff_ffff, 0x8000_0000, 0x8000_0001, 0xffff_fffe, 0xffff_ffff, 0x1234_5678];
const W64: &[u64] =
    &[0, 1, 3, 0x7fff_ffff_ffff_ffff, 1 << 63, u64::MAX, u64::MAX - 1, 0x1234_5678_9abc_def0, 0xffff_ffff];

/// A value of `bits` bits as the type says.
fn value(x: u64, bits: u32, signed: bool) -> i128 {
    let x = i128::from(x) & ((1 << bits) - 1);
    if signed && x >> (bits - 1) == 1 { x - (1 << bits) } else { x }
}

fn keep(x: i128, bits: u32) -> u64 {
    (x & ((1i128 << bits) - 1)) as u64
}

/// Calls `check(type, register, bits, signed, values)` for the six integer types.
fn types(check: impl Fn(&str, &str, u32, bool, &'static [u64])) {
    for (ty, bits, signed, values) in [
        ("u16", 16, false, W16),
        ("s16", 16, true, W16),
        ("u32", 32, false, W32),
        ("s32", 32, true, W32),
        ("u64", 64, false, W64),
        ("s64", 64, true, W64),
    ] {
        check(ty, &format!("b{bits}"), bits, signed, values);
    }
}

#[test]
fn add_sub_mul_wrap() {
    types(|ty, reg, bits, signed, v| {
        let two = |op: &str, f: fn(i128, i128) -> i128| {
            sweep(&format!("{op}.{ty} %d, %a, %b;"), reg, &[reg, reg], &[v, v], |x| {
                keep(f(value(x[0], bits, signed), value(x[1], bits, signed)), bits)
            });
        };
        two("add", |a, b| a + b);
        two("sub", |a, b| a - b);
        two("mul.lo", i128::wrapping_mul);
    });
}

#[test]
fn high_and_wide_products() {
    types(|ty, reg, bits, signed, v| {
        let product = |x: &[u64]| {
            let (a, b) = (value(x[0], bits, signed), value(x[1], bits, signed));
            // 64-bit unsigned products need all of u128.
            if signed { (a * b) as u128 } else { a as u128 * b as u128 }
        };
        sweep(&format!("mul.hi.{ty} %d, %a, %b;"), reg, &[reg, reg], &[v, v], |x| {
            keep((product(x) >> bits) as i128, bits)
        });
        if bits < 64 {
            let wide = format!("b{}", 2 * bits);
            sweep(&format!("mul.wide.{ty} %d, %a, %b;"), &wide, &[reg, reg], &[v, v], |x| {
                keep(product(x) as i128, 2 * bits)
            });
            sweep(
                &format!("mad.wide.{ty} %d, %a, %b, %c;"),
                &wide,
                &[reg, reg, &wide],
                &[v, v, &[0, 5, u64::MAX]],
                |x| keep((product(x) as i128).wrapping_add(i128::from(x[2])), 2 * bits),
            );
        }
        sweep(&format!("mad.hi.{ty} %d, %a, %b, %c;"), reg, &[reg, reg, reg], &[v, v, &[0, 9]], |x| {
            keep(((product(x) >> bits) as i128).wrapping_add(x[2].into()), bits)
        });
        sweep(&format!("mad.lo.{ty} %d, %a, %b, %c;"), reg, &[reg, reg, reg], &[v, v, &[0, 9]], |x| {
            keep((product(x) as i128).wrapping_add(x[2].into()), bits)
        });
    });
}

#[test]
fn constants_are_cut_to_size() {
    table("add.u32 %d, %a, 4294967297;", "b32", &["b32"], &[(&[5], 6)]);
    table("add.u16 %d, %a, -1;", "b16", &["b16"], &[(&[5], 4)]);
    table("add.u64 %d, %a, -1;", "b64", &["b64"], &[(&[5], 4)]);
}

#[test]
fn saturating() {
    let s = |x: u64| value(x, 32, true);
    let clamp = |x: i128| keep(x.clamp(i32::MIN.into(), i32::MAX.into()), 32);
    sweep("add.sat.s32 %d, %a, %b;", "b32", &["b32", "b32"], &[W32, W32], |x| clamp(s(x[0]) + s(x[1])));
    sweep("sub.sat.s32 %d, %a, %b;", "b32", &["b32", "b32"], &[W32, W32], |x| clamp(s(x[0]) - s(x[1])));
    sweep("mad.hi.sat.s32 %d, %a, %b, %c;", "b32", &["b32"; 3], &[W32, W32, W32], |x| {
        clamp((s(x[0]) * s(x[1]) >> 32) + s(x[2]))
    });
}

#[test]
fn division() {
    types(|ty, reg, bits, signed, v| {
        let nonzero = &v[1..];
        sweep(&format!("div.{ty} %d, %a, %b;"), reg, &[reg, reg], &[v, nonzero], |x| {
            keep(value(x[0], bits, signed) / value(x[1], bits, signed), bits)
        });
        sweep(&format!("rem.{ty} %d, %a, %b;"), reg, &[reg, reg], &[v, nonzero], |x| {
            keep(value(x[0], bits, signed) % value(x[1], bits, signed), bits)
        });
        // The manual leaves division by zero open; GPUs give all ones and the dividend.
        sweep(&format!("div.{ty} %d, %a, %b;"), reg, &[reg, reg], &[v, &[0]], |_| keep(-1, bits));
        sweep(&format!("rem.{ty} %d, %a, %b;"), reg, &[reg, reg], &[v, &[0]], |x| x[0]);
    });
}

#[test]
fn min_max_abs_neg_sad() {
    types(|ty, reg, bits, signed, v| {
        let n = move |x: u64| value(x, bits, signed);
        sweep(&format!("min.{ty} %d, %a, %b;"), reg, &[reg, reg], &[v, v], |x| keep(n(x[0]).min(n(x[1])), bits));
        sweep(&format!("max.{ty} %d, %a, %b;"), reg, &[reg, reg], &[v, v], |x| keep(n(x[0]).max(n(x[1])), bits));
        sweep(&format!("sad.{ty} %d, %a, %b, %c;"), reg, &[reg; 3], &[v, v, &[0, 1]], |x| {
            keep((n(x[0]) - n(x[1])).abs() + i128::from(x[2]), bits)
        });
        if signed {
            sweep(&format!("abs.{ty} %d, %a;"), reg, &[reg], &[v], |x| keep(n(x[0]).abs(), bits));
            sweep(&format!("neg.{ty} %d, %a;"), reg, &[reg], &[v], |x| keep(-n(x[0]), bits));
        }
    });
}

#[test]
fn products_of_24_bits() {
    let u = |x: u64| i128::from(x & 0xff_ffff);
    let s = |x: u64| value(x, 24, true);
    let v: &[u64] = &[0, 1, 0x7f_ffff, 0x80_0000, 0xff_ffff, 0xff00_0001, 0x12_3456];
    sweep("mul24.lo.u32 %d, %a, %b;", "b32", &["b32", "b32"], &[v, v], |x| keep(u(x[0]) * u(x[1]), 32));
    sweep("mul24.hi.u32 %d, %a, %b;", "b32", &["b32", "b32"], &[v, v], |x| keep(u(x[0]) * u(x[1]) >> 16, 32));
    sweep("mul24.lo.s32 %d, %a, %b;", "b32", &["b32", "b32"], &[v, v], |x| keep(s(x[0]) * s(x[1]), 32));
    sweep("mul24.hi.s32 %d, %a, %b;", "b32", &["b32", "b32"], &[v, v], |x| keep(s(x[0]) * s(x[1]) >> 16, 32));
    sweep("mad24.lo.s32 %d, %a, %b, %c;", "b32", &["b32"; 3], &[v, v, &[7]], |x| keep(s(x[0]) * s(x[1]) + 7, 32));
}

#[test]
fn dot_products_of_bytes() {
    let v: &[u64] = &[0, 0x0102_0304, 0x80ff_7f01, 0xffff_ffff];
    let byte = |x: u64, i: u32, signed| value(x >> (8 * i), 8, signed);
    let half = |x: u64, i: u32, signed| value(x >> (16 * i), 16, signed);
    for (a, sa) in [("u32", false), ("s32", true)] {
        for (b, sb) in [("u32", false), ("s32", true)] {
            sweep(&format!("dp4a.{a}.{b} %d, %a, %b, %c;"), "b32", &["b32"; 3], &[v, v, &[0, 100]], |x| {
                keep((0..4).map(|i| byte(x[0], i, sa) * byte(x[1], i, sb)).sum::<i128>() + i128::from(x[2]), 32)
            });
            for (mode, first) in [("lo", 0), ("hi", 2)] {
                sweep(&format!("dp2a.{mode}.{a}.{b} %d, %a, %b, %c;"), "b32", &["b32"; 3], &[v, v, &[0, 100]], |x| {
                    let dot = (0..2).map(|i| half(x[0], i, sa) * byte(x[1], first + i, sb)).sum::<i128>();
                    keep(dot + i128::from(x[2]), 32)
                });
            }
        }
    }
}

#[test]
fn carry_chains() {
    // 96-bit sums and differences through 32-bit halves: (a, b) pairs of 64 bits and the third word.
    let add = ".reg .b32 %l<8>;
        mov.b64 {%l0, %l1}, %a; mov.b64 {%l2, %l3}, %b;
        add.cc.u32 %l4, %l0, %l2; addc.cc.u32 %l5, %l1, %l3; addc.u32 %d, 0, 0;";
    sweep(add, "b32", &["b64", "b64"], &[W64, W64], |x| ((u128::from(x[0]) + u128::from(x[1])) >> 64) as u64);
    let sub = ".reg .b32 %l<8>;
        mov.b64 {%l0, %l1}, %a; mov.b64 {%l2, %l3}, %b;
        sub.cc.u32 %l4, %l0, %l2; subc.cc.u32 %l5, %l1, %l3; subc.u32 %d, 0, 0;";
    sweep(sub, "b32", &["b64", "b64"], &[W64, W64], |x| if x[0] < x[1] { 0xffff_ffff } else { 0 });
    let sum = ".reg .b32 %l<8>;
        mov.b64 {%l0, %l1}, %a; mov.b64 {%l2, %l3}, %b;
        add.cc.u32 %l0, %l0, %l2; addc.u32 %l1, %l1, %l3; mov.b64 %d, {%l0, %l1};";
    sweep(sum, "b64", &["b64", "b64"], &[W64, W64], |x| x[0].wrapping_add(x[1]));
    // 64-bit product from 32-bit pieces, as compilers write it.
    let product = ".reg .b32 %l<8>;
        mov.b64 {%l0, %l1}, %a; mov.b64 {%l2, %l3}, %b;
        mul.lo.u32 %l4, %l0, %l2; mul.hi.u32 %l5, %l0, %l2;
        mad.lo.cc.u32 %l5, %l0, %l3, %l5; madc.hi.u32 %l6, %l0, %l3, 0;
        mad.lo.cc.u32 %l5, %l1, %l2, %l5; madc.hi.u32 %l6, %l1, %l2, %l6;
        mov.b64 %d, {%l4, %l5};";
    sweep(product, "b64", &["b64", "b64"], &[W64, W64], |x| x[0].wrapping_mul(x[1]));
    table("add.cc.u64 %a, %a, %b; addc.u64 %d, 0, 0;", "b64", &["b64", "b64"], &[(&[u64::MAX, 1], 1), (&[5, 6], 0)]);
}

#[test]
fn one_condition_code_for_sums_and_differences() {
    // As `ptxas` compiles them for sm_75 to sm_120 (9.7.2): the carry out of a + !b + 1.
    for (ty, w, ones) in
        [("u32", "b32", u64::from(u32::MAX)), ("u64", "b64", u64::MAX), ("s32", "b32", u64::from(u32::MAX))]
    {
        let v: &[u64] = &[0, 1, 2, ones - 1, ones, ones / 2, ones / 2 + 1];
        let keep = |x: u128| x as u64 & ones;
        let carry = |x: u128| u128::from(x > u128::from(ones));
        let not = |x: u64| u128::from(!x & ones);
        let wide = u128::from;
        sweep(&format!("sub.cc.{ty} %a, %a, %b; addc.{ty} %d, 0, 0;"), w, &[w, w], &[v, v], |x| {
            u64::from(x[0] >= x[1])
        });
        sweep(&format!("add.cc.{ty} %a, %a, %b; subc.{ty} %d, %a, %b;"), w, &[w, w], &[v, v], |x| {
            let sum = wide(x[0]) + wide(x[1]);
            keep(wide(keep(sum)) + not(x[1]) + carry(sum))
        });
        sweep(
            &format!("sub.cc.{ty} %a, %a, %b; addc.cc.{ty} %a, %a, %b; subc.{ty} %d, %a, 0;"),
            w,
            &[w, w],
            &[v, v],
            |x| {
                let first = wide(x[0]) + not(x[1]) + 1;
                let second = wide(keep(first)) + wide(x[1]) + carry(first);
                keep(wide(keep(second)) + not(0) + carry(second))
            },
        );
        sweep(&format!("sub.cc.{ty} %a, %a, %b; madc.lo.{ty} %d, %a, %b, 3;"), w, &[w, w], &[v, v], |x| {
            let first = wide(x[0]) + not(x[1]) + 1;
            keep(wide(keep(first)).wrapping_mul(wide(x[1])) + 3 + carry(first))
        });
    }
}

#[test]
fn pairs_with_relu() {
    let v: &[u64] = &[0x0001_ffff, 0x8000_7fff, 0x0005_0003, 0xfff0_0000];
    for (op, host) in [("min", i16::min as fn(i16, i16) -> i16), ("max", i16::max)] {
        crate::device::sweep(&format!("{op}.relu.s16x2 %d, %a, %b;"), "b32", &["b32", "b32"], &[v, v], |x| {
            let half = |s: u32| u64::from(host((x[0] >> s) as i16, (x[1] >> s) as i16).max(0) as u16);
            half(0) | half(16) << 16
        });
    }
}
