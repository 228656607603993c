//! `setp` and `set` (PTX ISA 9.7.6).

use crate::device::{d, evaluate, f, sweep, table};

#[test]
fn integers() {
    let v: &[u64] = &[0, 1, 0x7fff, 0x8000, 0xffff];
    let w: &[u64] = &[0, 1, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff];
    let x: &[u64] = &[0, 1, u64::MAX >> 1, 1 << 63, u64::MAX];
    for (bits, values) in [(16u32, v), (32, w), (64, x)] {
        let reg = format!("b{bits}");
        let signed = move |x: u64| i128::from(x) - if x >> (bits - 1) & 1 == 1 { 1i128 << bits } else { 0 };
        let run = |op: &str, ty: char, want: &dyn Fn(u64, u64) -> bool| {
            sweep(&format!("setp.{op}.{ty}{bits} %d, %a, %b;"), "pred", &[&reg, &reg], &[values, values], |x| {
                want(x[0], x[1]).into()
            });
        };
        for ty in ['b', 'u', 's'] {
            run("eq", ty, &|a, b| a == b);
            run("ne", ty, &|a, b| a != b);
        }
        for (op, test) in [
            ("lt", (|a, b| a < b) as fn(i128, i128) -> bool),
            ("le", |a, b| a <= b),
            ("gt", |a, b| a > b),
            ("ge", |a, b| a >= b),
        ] {
            run(op, 's', &|a, b| test(signed(a), signed(b)));
            run(op, 'u', &|a, b| test(a.into(), b.into()));
        }
        run("lo", 'u', &|a, b| a < b);
        run("hs", 'u', &|a, b| a >= b);
    }
}

#[test]
fn floats_ordered_and_unordered() {
    let v: Vec<u64> = [f(0.0), f(-0.0), f(1.0), f(-1.0), f(f32::INFINITY), f(f32::NAN), 1].to_vec();
    let x = |b: u64| f32::from_bits(b as u32);
    let ops: [(&str, fn(f32, f32) -> bool); 14] = [
        ("eq", |a, b| a == b),
        ("ne", |a, b| a < b || a > b),
        ("lt", |a, b| a < b),
        ("le", |a, b| a <= b),
        ("gt", |a, b| a > b),
        ("ge", |a, b| a >= b),
        ("equ", |a, b| a == b || a.is_nan() || b.is_nan()),
        ("neu", |a, b| a != b),
        ("ltu", |a, b| !(a >= b)),
        ("leu", |a, b| !(a > b)),
        ("gtu", |a, b| !(a <= b)),
        ("geu", |a, b| !(a < b)),
        ("num", |a, b| !a.is_nan() && !b.is_nan()),
        ("nan", |a, b| a.is_nan() || b.is_nan()),
    ];
    for (op, test) in ops {
        sweep(&format!("setp.{op}.f32 %d, %a, %b;"), "pred", &["f32", "f32"], &[&v, &v], |r| {
            test(x(r[0]), x(r[1])).into()
        });
        let wide: Vec<u64> = v.iter().map(|&b| d(x(b).into())).collect();
        sweep(&format!("setp.{op}.f64 %d, %a, %b;"), "pred", &["f64", "f64"], &[&wide, &wide], |r| {
            test(f64::from_bits(r[0]) as f32, f64::from_bits(r[1]) as f32).into()
        });
    }
    table("setp.eq.ftz.f32 %d, %a, %b;", "pred", &["f32", "f32"], &[(&[1, f(0.0)], 1)]);
    table("setp.lt.f16 %d, %a, %b;", "pred", &["b16", "b16"], &[(&[0xbc00, 0x3c00], 1), (&[0x7e00, 0], 0)]);
    table(
        "setp.gtu.bf16 %d, %a, %b;",
        "pred",
        &["b16", "b16"],
        &[(&[0x4000, 0x3f80], 1), (&[0x7fc0, 0], 1), (&[0, 0], 0)],
    );
}

#[test]
fn second_predicate_and_boolean() {
    // p = (a < b) op c, q = !(a < b) op c.
    for (op, g) in [("and", (|a, c| a & c) as fn(u64, u64) -> u64), ("or", |a, c| a | c), ("xor", |a, c| a ^ c)] {
        for (not, flip) in [("", 0), ("!", 1)] {
            let text = format!(
                ".reg .pred %p, %q; setp.lt.{op}.s32 %p|%q, %a, %b, {not}%c;
                 selp.u32 %d, 1, 0, %p; .reg .b32 %w; selp.u32 %w, 2, 0, %q; add.u32 %d, %d, %w;"
            );
            sweep(&text, "b32", &["b32", "b32", "pred"], &[&[1, 5], &[2, 3], &[0, 1]], |x| {
                let less = u64::from(x[0] < x[1]);
                g(less, x[2] ^ flip) + 2 * g(1 - less, x[2] ^ flip)
            });
        }
    }
    // The destination may be the third source.
    let rows = vec![vec![1, 2, 1], vec![1, 2, 0]];
    let text = "setp.lt.and.u32 %c, %a, %b, %c; selp.u32 %d, 1, 0, %c;";
    assert_eq!(evaluate(text, "b32", &["b32", "b32", "pred"], &rows), [1, 0]);
    table(
        ".reg .pred %p, %q; setp.gt.f16x2 %p|%q, %a, %b; selp.u32 %d, 1, 0, %p; @%q add.u32 %d, %d, 2;",
        "b32",
        &["b32", "b32"],
        &[(&[0x3c00_0000, 0x0000_0000], 2), (&[0x0000_3c00, 0], 1)],
    );
}

#[test]
fn set_delivers_numbers() {
    table("set.lt.u32.s32 %d, %a, %b;", "b32", &["b32", "b32"], &[(&[1, 2], 0xffff_ffff), (&[2, 1], 0)]);
    table("set.gt.f32.f32 %d, %a, %b;", "f32", &["f32", "f32"], &[(&[f(2.0), f(1.0)], f(1.0)), (&[f(1.0), f(1.0)], 0)]);
    table(
        "set.lt.and.u32.s32 %d, %a, %b, %c;",
        "b32",
        &["b32", "b32", "pred"],
        &[(&[1, 2, 0], 0), (&[1, 2, 1], 0xffff_ffff)],
    );
}

/// PTX ISA 9.7.7: a half of ones, or 1.0, for each half of the sources.
#[test]
fn sets_of_pairs() {
    let v: &[u64] = &[0x3c00_4000, 0x4000_3c00, 0x3c00_3c00, 0x7e00_0000, 0x0001_0000];
    let value = |h: u64| half::f16::from_bits(h as u16).to_f32();
    for (to, yes) in [("u32", 0xffff_u64), ("f16x2", 0x3c00)] {
        crate::device::sweep(&format!("set.lt.{to}.f16x2 %d, %a, %b;"), "b32", &["b32", "b32"], &[v, v], |x| {
            let half = |s: u32| if value(x[0] >> s & 0xffff) < value(x[1] >> s & 0xffff) { yes << s } else { 0 };
            half(0) | half(16)
        });
    }
    let text = "set.geu.and.ftz.s32.f16x2 %d, %a, %b, !%c;";
    crate::device::sweep(text, "b32", &["b32", "b32", "pred"], &[v, v, &[0, 1]], |x| {
        let flushed = |h: u64| if h & 0x7c00 == 0 { 0.0 } else { value(h) };
        let half = |s: u32| !(flushed(x[0] >> s & 0xffff) < flushed(x[1] >> s & 0xffff)) && x[2] == 0;
        u64::from(half(0)) * 0xffff | u64::from(half(16)) * 0xffff_0000
    });
    crate::device::table(
        "set.eq.bf16x2.bf16x2 %d, %a, %b;",
        "b32",
        &["b32", "b32"],
        &[(&[0x3f80_4000, 0x3f80_3f80], 0x3f80_0000), (&[0x7fc0_8000, 0x7fc0_0000], 0x0000_3f80)],
    );
}
