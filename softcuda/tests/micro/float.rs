//! f32 and f64 arithmetic (PTX ISA 9.7.3).

use crate::device::{d, evaluate, f, sweep, table};

const NAN: u64 = 0x7fff_ffff;

/// Zeros, subnormals, limits, infinities, a NaN with a payload, and ordinary numbers.
fn values() -> Vec<u64> {
    [0.0, 1.0, 1.5, -2.75, 3.1e-20, 1e38, f32::MAX, f32::MIN_POSITIVE, 1e-40, f32::INFINITY, 0.1, 16_777_217.0]
        .iter()
        .flat_map(|&x: &f32| [f(x), f(-x)])
        .chain([0x7fc0_1234, 1, 0x8000_0001])
        .collect()
}

fn x(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

/// Every instruction delivers the canonical NaN.
fn canon(v: f32) -> u64 {
    if v.is_nan() { NAN } else { f(v) }
}

fn ftz(bits: u64) -> f32 {
    let v = x(bits);
    if v.is_subnormal() { 0f32.copysign(v) } else { v }
}

#[test]
fn nearest() {
    let v = values();
    let v = v.as_slice();
    let f32s = &["f32", "f32"];
    for (suffix, flush) in [("", false), (".ftz", true)] {
        let a = |b: u64| if flush { ftz(b) } else { x(b) };
        let out = |r: f32| if flush { canon(ftz(f(r))) } else { canon(r) };
        sweep(&format!("add{suffix}.f32 %d, %a, %b;"), "f32", f32s, &[v, v], |r| out(a(r[0]) + a(r[1])));
        sweep(&format!("sub.rn{suffix}.f32 %d, %a, %b;"), "f32", f32s, &[v, v], |r| out(a(r[0]) - a(r[1])));
        sweep(&format!("mul{suffix}.f32 %d, %a, %b;"), "f32", f32s, &[v, v], |r| out(a(r[0]) * a(r[1])));
        sweep(&format!("div.rn{suffix}.f32 %d, %a, %b;"), "f32", f32s, &[v, v], |r| out(a(r[0]) / a(r[1])));
        sweep(&format!("fma.rn{suffix}.f32 %d, %a, %b, %c;"), "f32", &["f32"; 3], &[v, v, v], |r| {
            out(a(r[0]).mul_add(a(r[1]), a(r[2])))
        });
    }
}

#[test]
fn fma_is_fused() {
    let (a, b) = (1.0 + f32::EPSILON, 1.0 - f32::EPSILON);
    table(
        "fma.rn.f32 %d, %a, %b, %c;",
        "f32",
        &["f32"; 3],
        &[(&[f(a), f(b), f(-1.0)], f(-f32::EPSILON * f32::EPSILON))],
    );
    let (a, b) = (1.0 + f64::EPSILON, 1.0 - f64::EPSILON);
    table(
        "fma.rn.f64 %d, %a, %b, %c;",
        "f64",
        &["f64"; 3],
        &[(&[d(a), d(b), d(-1.0)], d(-f64::EPSILON * f64::EPSILON))],
    );
}

/// Directed roundings bracket the f64 result, which is exact or nearly so.
#[test]
fn directed() {
    let v: Vec<u64> = values().into_iter().filter(|&b| x(b).is_finite()).collect();
    for (op, f64_op) in [
        ("add", (|a, b| a + b) as fn(f64, f64) -> f64),
        ("sub", |a, b| a - b),
        ("mul", |a, b| a * b),
        ("div", |a, b| a / b),
    ] {
        let rows: Vec<Vec<u64>> = v.iter().flat_map(|&a| v.iter().map(move |&b| vec![a, b])).collect();
        let run = |mode: &str| evaluate(&format!("{op}.{mode}.f32 %d, %a, %b;"), "f32", &["f32", "f32"], &rows);
        let (down, up, zero) = (run("rm"), run("rp"), run("rz"));
        for (i, r) in rows.iter().enumerate() {
            let exact = f64_op(x(r[0]).into(), x(r[1]).into());
            if exact.is_nan() || exact.is_infinite() {
                continue;
            }
            let (lo, hi, z) = (x(down[i]), x(up[i]), x(zero[i]));
            assert!(f64::from(lo) <= exact && exact <= f64::from(hi), "{op} of {r:x?}: {lo:e} {exact:e} {hi:e}");
            assert!(lo == hi || lo.next_up() == hi, "{op} of {r:x?}: {lo:e} and {hi:e} are not adjacent");
            assert_eq!(z, if exact > 0.0 { lo } else { hi }, "{op}.rz of {r:x?}");
        }
    }
    table(
        "add.rm.f32 %d, %a, %b;",
        "f32",
        &["f32", "f32"],
        &[(&[f(1.0), f(-1.0)], f(-0.0)), (&[f(0.0), f(-0.0)], f(-0.0)), (&[f(1.0), f(1e-30)], f(1.0))],
    );
    table(
        "add.rp.f32 %d, %a, %b;",
        "f32",
        &["f32", "f32"],
        &[(&[f(1.0), f(-1.0)], f(0.0)), (&[f(1.0), f(1e-30)], f(1.0f32.next_up()))],
    );
    table("fma.rz.f32 %d, %a, %b, %c;", "f32", &["f32"; 3], &[(&[f(3.0), f(0.1), f(1e-30)], f(0.3f32.next_down()))]);
    table("sqrt.rp.f32 %d, %a;", "f32", &["f32"], &[(&[f(4.0)], f(2.0)), (&[f(2.0)], f(2f32.sqrt().next_up()))]);
    table("sqrt.rm.f32 %d, %a;", "f32", &["f32"], &[(&[f(2.0)], f(2f32.sqrt()))]);
    table("rcp.rp.f32 %d, %a;", "f32", &["f32"], &[(&[f(3.0)], 0x3eaa_aaab), (&[f(4.0)], f(0.25))]);
    table("rcp.rm.f32 %d, %a;", "f32", &["f32"], &[(&[f(3.0)], 0x3eaa_aaaa)]);
}

#[test]
fn saturation() {
    let cases: &[(&[u64], u64)] = &[
        (&[f(0.25), f(0.5)], f(0.75)),
        (&[f(2.0), f(0.5)], f(1.0)),
        (&[f(-2.0), f(0.5)], f(0.0)),
        (&[f(f32::INFINITY), f(-f32::INFINITY)], f(0.0)),
        (&[NAN, f(1.0)], f(0.0)),
    ];
    table("add.sat.f32 %d, %a, %b;", "f32", &["f32", "f32"], cases);
    table("fma.rn.sat.f32 %d, %a, %b, %c;", "f32", &["f32"; 3], &[(&[f(2.0), f(2.0), f(-1.0)], f(1.0))]);
}

#[test]
fn minimum_and_maximum() {
    let f32s = &["f32", "f32"];
    table(
        "min.f32 %d, %a, %b;",
        "f32",
        f32s,
        &[
            (&[f(1.0), f(2.0)], f(1.0)),
            (&[f(0.0), f(-0.0)], f(-0.0)),
            (&[f(-0.0), f(0.0)], f(-0.0)),
            (&[NAN, f(3.0)], f(3.0)),
            (&[f(3.0), 0x7fc0_0001], f(3.0)),
            (&[0x7fc0_0001, 0xffc0_0001], NAN),
            (&[f(-f32::INFINITY), f(3.0)], f(-f32::INFINITY)),
            (&[1, 2], 1),
        ],
    );
    table(
        "max.f32 %d, %a, %b;",
        "f32",
        f32s,
        &[
            (&[f(0.0), f(-0.0)], f(0.0)),
            (&[f(-0.0), f(0.0)], f(0.0)),
            (&[NAN, f(-3.0)], f(-3.0)),
            (&[f(-1.0), f(-2.0)], f(-1.0)),
        ],
    );
    table("min.ftz.f32 %d, %a, %b;", "f32", f32s, &[(&[0x8000_0001, f(1.0)], f(-0.0))]);
    table("max.NaN.f32 %d, %a, %b;", "f32", f32s, &[(&[0x7fc0_0001, f(3.0)], NAN), (&[f(1.0), f(3.0)], f(3.0))]);
    table(
        "min.xorsign.abs.f32 %d, %a, %b;",
        "f32",
        f32s,
        &[(&[f(-1.0), f(2.0)], f(-1.0)), (&[f(-3.0), f(-2.0)], f(2.0))],
    );
    table(
        "max.f64 %d, %a, %b;",
        "f64",
        &["f64", "f64"],
        &[(&[d(f64::NAN), d(1.0)], d(1.0)), (&[d(-0.0), d(0.0)], d(0.0)), (&[d(-1.0), d(-2.0)], d(-1.0))],
    );
}

#[test]
fn signs_and_tests() {
    table("abs.f32 %d, %a;", "f32", &["f32"], &[(&[f(-2.0)], f(2.0)), (&[0x8000_0001], 1)]);
    table("abs.ftz.f32 %d, %a;", "f32", &["f32"], &[(&[0x8000_0001], 0)]);
    table("neg.f32 %d, %a;", "f32", &["f32"], &[(&[f(2.0)], f(-2.0)), (&[f(0.0)], f(-0.0))]);
    // The sign is that of the first operand.
    table(
        "copysign.f32 %d, %a, %b;",
        "f32",
        &["f32", "f32"],
        &[(&[f(-1.0), f(5.0)], f(-5.0)), (&[f(1.0), f(-5.0)], f(5.0))],
    );
    let v = [f(1.0), f(0.0), f(f32::INFINITY), NAN, 1];
    for (test, want) in [
        ("finite", [1, 1, 0, 0, 1]),
        ("infinite", [0, 0, 1, 0, 0]),
        ("number", [1, 1, 1, 0, 1]),
        ("notanumber", [0, 0, 0, 1, 0]),
        ("normal", [1, 1, 0, 0, 0]),
        ("subnormal", [0, 0, 0, 0, 1]),
    ] {
        let rows: Vec<Vec<u64>> = v.iter().map(|&b| vec![b]).collect();
        assert_eq!(evaluate(&format!("testp.{test}.f32 %d, %a;"), "pred", &["f32"], &rows), want, "{test}");
    }
}

/// The manual's tables of special values, and accuracy on the way.
#[test]
fn approximations() {
    let inf = f(f32::INFINITY);
    let ninf = f(-f32::INFINITY);
    let one = |op: &str, rows: &[(&[u64], u64)]| table(&format!("{op} %d, %a;"), "f32", &["f32"], rows);
    one(
        "rcp.approx.f32",
        &[
            (&[ninf], f(-0.0)),
            (&[f(-0.0)], ninf),
            (&[f(0.0)], inf),
            (&[inf], f(0.0)),
            (&[NAN], NAN),
            (&[f(4.0)], f(0.25)),
        ],
    );
    one("rcp.approx.ftz.f32", &[(&[0x8000_0001], ninf), (&[f(2f32.powi(127))], f(0.0))]);
    one(
        "sqrt.approx.f32",
        &[(&[ninf], NAN), (&[f(-0.0)], f(-0.0)), (&[inf], inf), (&[f(9.0)], f(3.0)), (&[f(-1.0)], NAN)],
    );
    one(
        "rsqrt.approx.f32",
        &[(&[ninf], NAN), (&[f(-0.0)], ninf), (&[f(0.0)], inf), (&[inf], f(0.0)), (&[f(4.0)], f(0.5))],
    );
    one("rsqrt.approx.ftz.f32", &[(&[1], inf)]);
    one("sin.approx.f32", &[(&[ninf], NAN), (&[f(-0.0)], f(-0.0)), (&[f(1.0)], f(1f32.sin()))]);
    one("cos.approx.f32", &[(&[ninf], NAN), (&[f(0.0)], f(1.0)), (&[f(1.0)], f((1f64).cos() as f32))]);
    one(
        "lg2.approx.f32",
        &[(&[ninf], NAN), (&[f(-0.0)], ninf), (&[f(0.0)], ninf), (&[inf], inf), (&[f(8.0)], f(3.0)), (&[1], f(-149.0))],
    );
    one("lg2.approx.ftz.f32", &[(&[1], ninf)]);
    one(
        "ex2.approx.f32",
        &[
            (&[ninf], f(0.0)),
            (&[f(-0.0)], f(1.0)),
            (&[inf], inf),
            (&[f(3.0)], f(8.0)),
            (&[f(-149.0)], 1),
            (&[f(0.5)], f(2f32.sqrt())),
        ],
    );
    one("ex2.approx.ftz.f32", &[(&[f(-149.0)], 0), (&[1], f(1.0))]);
    one(
        "tanh.approx.f32",
        &[(&[ninf], f(-1.0)), (&[f(-0.0)], f(-0.0)), (&[inf], f(1.0)), (&[f(0.5)], f((0.5f64).tanh() as f32))],
    );
    let f32s = &["f32", "f32"];
    table("div.full.f32 %d, %a, %b;", "f32", f32s, &[(&[f(1.0), f(3.0)], f(1.0 / 3.0)), (&[f(0.0), f(0.0)], NAN)]);
    // The reciprocal of a huge divisor is zero.
    table(
        "div.approx.f32 %d, %a, %b;",
        "f32",
        f32s,
        &[(&[f(6.0), f(3.0)], f(2.0)), (&[f(f32::MAX), f(f32::MAX)], f(0.0)), (&[inf, f(f32::MAX)], NAN)],
    );
}

#[test]
fn double_precision() {
    let f64s = &["f64", "f64"];
    let v: Vec<u64> =
        [0.0, -0.0, 1.0, 1e300, -1e-310, 0.1, f64::INFINITY, f64::MAX].iter().map(|&x: &f64| d(x)).collect();
    for (op, g) in [
        ("add", (|a, b| a + b) as fn(f64, f64) -> f64),
        ("sub.rn", |a, b| a - b),
        ("mul", |a, b| a * b),
        ("div.rn", |a, b| a / b),
    ] {
        let rows: Vec<Vec<u64>> = v.iter().flat_map(|&a| v.iter().map(move |&b| vec![a, b])).collect();
        for (row, got) in rows.iter().zip(evaluate(&format!("{op}.f64 %d, %a, %b;"), "f64", f64s, &rows)) {
            let want = g(f64::from_bits(row[0]), f64::from_bits(row[1]));
            assert!(got == want.to_bits() || want.is_nan() && f64::from_bits(got).is_nan(), "{op} of {row:x?}");
        }
    }
    table("sqrt.rn.f64 %d, %a;", "f64", &["f64"], &[(&[d(2.0)], d(2f64.sqrt()))]);
    table("rcp.rn.f64 %d, %a;", "f64", &["f64"], &[(&[d(3.0)], d(1.0 / 3.0))]);
    // Works on the upper words only.
    table("rcp.approx.ftz.f64 %d, %a;", "f64", &["f64"], &[(&[d(4.0) | 0xffff_ffff], d(0.25) & !0xffff_ffff)]);
    table("copysign.f64 %d, %a, %b;", "f64", f64s, &[(&[d(-1.0), d(2.0)], d(-2.0))]);
}
