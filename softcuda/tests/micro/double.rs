//! f64 arithmetic in all four roundings (PTX ISA 9.7.3).

use crate::device::{d, evaluate, table};

const MODES: [&str; 4] = ["rn", "rz", "rm", "rp"];

fn x(bits: u64) -> f64 {
    f64::from_bits(bits)
}

fn values() -> Vec<u64> {
    let tiny = f64::from_bits(1);
    [1.0, 3.0, 0.1, 1e300, 1e-300, 4503599627370497.5, f64::MAX, f64::MIN_POSITIVE, tiny, 1.0 + f64::EPSILON, 7e-162]
        .iter()
        .flat_map(|&v: &f64| [d(v), d(-v)])
        .collect()
}

/// The three directed results bracket the exact one: below and above it, adjacent or equal, zero being the nearer to zero.
/// Where all is exact, all four agree.
#[test]
fn directed_results_bracket_the_nearest() {
    let v = values();
    let pairs: Vec<Vec<u64>> = v.iter().flat_map(|&a| v.iter().map(move |&b| vec![a, b])).collect();
    let triples: Vec<Vec<u64>> =
        pairs.iter().flat_map(|p| [vec![p[0], p[1], d(1.0)], vec![p[0], p[1], d(-1e-5)]]).collect();
    let positive: Vec<Vec<u64>> = v.iter().filter(|&&b| x(b) > 0.0).map(|&b| vec![b]).collect();
    type Host = fn(&[f64]) -> f64;
    let cases: [(&str, &[Vec<u64>], Host); 7] = [
        ("add", &pairs, |v| v[0] + v[1]),
        ("sub", &pairs, |v| v[0] - v[1]),
        ("mul", &pairs, |v| v[0] * v[1]),
        ("div", &pairs, |v| v[0] / v[1]),
        ("fma", &triples, |v| v[0].mul_add(v[1], v[2])),
        ("rcp", &positive, |v| 1.0 / v[0]),
        ("sqrt", &positive, |v| v[0].sqrt()),
    ];
    for (op, rows, host) in cases {
        let n = rows[0].len();
        let operands = ["%a", "%b", "%c"][..n].join(", ");
        let run = |mode: &str| {
            evaluate(&format!("{op}.{mode}.f64 %d, {operands};"), "f64", &["f64", "f64", "f64"][..n], rows)
        };
        let [near, zero, down, up] = MODES.map(run);
        for (i, row) in rows.iter().enumerate() {
            let row: Vec<f64> = row.iter().map(|&b| x(b)).collect();
            let want = host(&row);
            let (lo, hi) = (x(down[i]), x(up[i]));
            assert_eq!(near[i], want.to_bits(), "{op}.rn of {row:?}");
            assert!(lo <= want && want <= hi, "{op} of {row:?}: {lo:e} {want:e} {hi:e}");
            assert!(lo == hi || lo.next_up() == hi, "{op} of {row:?}: {lo:e} and {hi:e} are not adjacent");
            let nearer = if hi > 0.0 { lo } else { hi };
            assert_eq!(x(zero[i]), nearer, "{op}.rz of {row:?}");
        }
    }
}

/// Exact results that rounding errors of the host's own arithmetic cannot be told from: by hand.
#[test]
fn cases_by_hand() {
    let two = &["f64", "f64"];
    let tiny = f64::from_bits(1);
    for (instruction, rows) in [
        (
            "add.rp.f64 %d, %a, %b;",
            vec![([1.0, tiny], 1f64.next_up()), ([f64::MAX, f64::MAX], f64::INFINITY), ([1.0, -1.0], 0.0)],
        ),
        (
            "add.rm.f64 %d, %a, %b;",
            vec![([1.0, -tiny], 1f64.next_down()), ([f64::MAX, f64::MAX], f64::MAX), ([1.0, -1.0], -0.0)],
        ),
        ("sub.rz.f64 %d, %a, %b;", vec![([1.0, tiny], 1f64.next_down()), ([-1.0, -tiny], -(1f64.next_down()))]),
        ("mul.rp.f64 %d, %a, %b;", vec![([tiny, 0.5], tiny), ([-tiny, 0.5], -0.0), ([1e308, 10.0], f64::INFINITY)]),
        ("mul.rz.f64 %d, %a, %b;", vec![([tiny, 0.75], 0.0), ([-1e308, 10.0], -f64::MAX)]),
        (
            "div.rp.f64 %d, %a, %b;",
            vec![([1.0, 3.0], (1f64 / 3.0).next_up()), ([1.0, 0.0], f64::INFINITY), ([6.0, 3.0], 2.0)],
        ),
    ] {
        for (operands, want) in rows {
            table(instruction, "f64", two, &[(&operands.map(d), d(want))]);
        }
    }
    // 1 + 2^-53 squared is 1 + 2^-52 + 2^-106: above what is nearest.
    let a = 1.0 + f64::EPSILON;
    table("fma.rp.f64 %d, %a, %a, %b;", "f64", two, &[(&[d(a), d(0.0)], d((1.0 + 2.0 * f64::EPSILON).next_up()))]);
    table("fma.rm.f64 %d, %a, %a, %b;", "f64", two, &[(&[d(a), d(0.0)], d(1.0 + 2.0 * f64::EPSILON))]);
    table("sqrt.rp.f64 %d, %a;", "f64", &["f64"], &[(&[d(4.0)], d(2.0)), (&[d(2.0)], d(2f64.sqrt()))]);
    table("sqrt.rm.f64 %d, %a;", "f64", &["f64"], &[(&[d(4.0)], d(2.0)), (&[d(2.0)], d(2f64.sqrt().next_down()))]);
    table("rcp.rz.f64 %d, %a;", "f64", &["f64"], &[(&[d(3.0)], d(1.0 / 3.0)), (&[d(-4.0)], d(-0.25))]);
    table("mad.rz.f64 %d, %a, %b, %a;", "f64", two, &[(&[d(1.0), d(tiny)], d(1.0))]);
}
