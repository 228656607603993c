//! f64 arithmetic in the directed roundings (PTX ISA 9.7.3): the exact result as an integer and a power of two, rounded once.

use super::rounding::Round;
use crate::lower::ir::ArithOp;

/// `m · 2^e`, and whether something positive below the last bit was dropped.
#[derive(Clone, Copy)]
struct Exact {
    negative: bool,
    m: u128,
    e: i32,
    sticky: bool,
}

/// Sign, significand and exponent of a finite number.
fn parts(x: f64) -> Exact {
    let bits = x.to_bits();
    let (exponent, fraction) = ((bits >> 52 & 0x7ff) as i32, bits & ((1 << 52) - 1));
    let (m, e) = if exponent == 0 { (fraction, -1074) } else { (fraction | 1 << 52, exponent - 1075) };
    Exact { negative: bits >> 63 == 1, m: m.into(), e, sticky: false }
}

impl Exact {
    /// The same value with its highest bit at position `top`.
    fn normalised(self, top: u32) -> Self {
        let shift = top as i32 - (127 - self.m.leading_zeros() as i32);
        Self { m: self.m << shift, e: self.e - shift, ..self }
    }

    /// A sum that is not zero, unless the operands cancel; both are short enough for all of their bits to be kept where they
    /// can cancel.
    fn plus(self, other: Self) -> Option<Self> {
        if self.m == 0 || other.m == 0 {
            return [self, other].into_iter().find(|x| x.m != 0);
        }
        let (a, b) = (self.normalised(125), other.normalised(125));
        let (big, small) = if (a.e, a.m) >= (b.e, b.m) { (a, b) } else { (b, a) };
        let distance = (big.e - small.e) as u32;
        let shifted = if distance > 127 { 0 } else { small.m >> distance };
        let lost = distance > 127 || shifted << distance != small.m;
        if big.negative == small.negative {
            return Some(Self { m: big.m + shifted, sticky: lost, ..big });
        }
        // What was lost is taken from the last bit, so that the rest is again something positive.
        let m = big.m - shifted - u128::from(lost);
        (m != 0 || lost).then_some(Self { m, sticky: lost, ..big })
    }

    fn round(self, mode: Round) -> f64 {
        let bits = 128 - self.m.leading_zeros() as i32;
        // The exponent of the last bit kept.
        let last = (self.e + bits - 53).max(-1074);
        let shift = last - self.e;
        let (kept, half, rest) = match shift {
            i32::MIN..=0 => ((self.m << -shift) as u64, false, self.sticky),
            1..=127 => {
                let low = self.m & ((1 << (shift - 1)) - 1);
                ((self.m >> shift) as u64, self.m >> (shift - 1) & 1 == 1, low != 0 || self.sticky)
            }
            128 => (0, self.m >> 127 == 1, self.m << 1 != 0 || self.sticky),
            _ => (0, false, true),
        };
        let inexact = half || rest;
        let up = match mode {
            Round::Nearest => half && (rest || kept & 1 == 1),
            Round::NearestAway => half,
            Round::Zero => false,
            Round::Down => self.negative && inexact,
            Round::Up => !self.negative && inexact,
        };
        // The leading one counts into the exponent, and so does a carry out of the significand.
        let bits = (((last + 1074) as u64) << 52) + kept + u64::from(up);
        let infinity = f64::INFINITY.to_bits();
        let bits = if bits < infinity {
            bits
        } else {
            match (mode, self.negative) {
                (Round::Zero, _) | (Round::Down, false) | (Round::Up, true) => infinity - 1,
                _ => infinity,
            }
        };
        f64::from_bits(bits | u64::from(self.negative) << 63)
    }
}

/// `add`, `sub`, `mul`, `fma`, `div`, `rcp` or `sqrt` in any rounding.
pub fn f64_op(op: ArithOp, a: f64, b: f64, c: f64, mode: Round) -> f64 {
    let (op, a, b) = match op {
        ArithOp::Sub => (ArithOp::Add, a, -b),
        ArithOp::Rcp => (ArithOp::Div, 1.0, a),
        other => (other, a, b),
    };
    let (nearest, operands): (f64, &[f64]) = match op {
        ArithOp::Add => (a + b, &[a, b]),
        ArithOp::Mul => (a * b, &[a, b]),
        ArithOp::Fma => (a.mul_add(b, c), &[a, b, c]),
        ArithOp::Div => (a / b, &[a, b]),
        _ => (a.sqrt(), &[a]),
    };
    // NaN, infinities, and quotients by or of zero have nothing to round.
    let special = operands.iter().any(|x| !x.is_finite()) || nearest.is_nan();
    if special || mode == Round::Nearest {
        return nearest;
    }
    let (x, y, z) = (parts(a), parts(b), parts(c));
    let negative = x.negative != y.negative;
    let product = Exact { negative, m: x.m * y.m, e: x.e + y.e, sticky: false };
    // An exact zero of two terms of opposite sign is -0 when rounding down only; of terms of the same sign it has theirs.
    let zero = |p: bool, q: bool| if p && q || (p || q) && mode == Round::Down { -0.0 } else { 0.0 };
    match op {
        ArithOp::Add => x.plus(y).map_or(zero(x.negative, y.negative), |s| s.round(mode)),
        ArithOp::Fma => product.plus(z).map_or(zero(product.negative, z.negative), |s| s.round(mode)),
        ArithOp::Mul if product.m == 0 => nearest,
        ArithOp::Mul => product.round(mode),
        ArithOp::Div if x.m == 0 || y.m == 0 => nearest,
        ArithOp::Div => {
            let (p, q) = (x.normalised(126), y.normalised(52));
            Exact { negative, m: p.m / q.m, e: p.e - q.e, sticky: p.m % q.m != 0 }.round(mode)
        }
        _ if x.m == 0 => nearest,
        _ => {
            let p = x.normalised(125);
            let p = if p.e % 2 == 0 { p } else { Exact { m: p.m << 1, e: p.e - 1, ..p } };
            let root = p.m.isqrt();
            Exact { m: root, e: p.e / 2, sticky: root * root != p.m, ..p }.round(mode)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(state: &mut u64) -> f64 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let bits = *state ^ *state >> 29;
        // Exponents near enough for sums to matter, now and then anywhere.
        let bits = if *state >> 60 == 0 { bits } else { bits & !(0x7f8 << 52) | 0x3f8 << 52 };
        let x = f64::from_bits(bits);
        if x.is_finite() { x } else { 1.5 }
    }

    /// Nearest rounding of the same exact values is what the host computes, so the values are right; and directed results
    /// bracket them.
    #[test]
    fn agrees_with_the_host_and_brackets_it() {
        let mut state = 1;
        for _ in 0..200_000 {
            let (a, b, c) = (random(&mut state), random(&mut state), random(&mut state));
            for (op, want) in [
                (ArithOp::Add, a + b),
                (ArithOp::Sub, a - b),
                (ArithOp::Mul, a * b),
                (ArithOp::Fma, a.mul_add(b, c)),
                (ArithOp::Div, a / b),
                (ArithOp::Sqrt, a.abs().sqrt()),
            ] {
                let a = if op == ArithOp::Sqrt { a.abs() } else { a };
                // Ties to even and away differ in exact ties only, which these operands do not make.
                let [near, down, up, zero] =
                    [Round::NearestAway, Round::Down, Round::Up, Round::Zero].map(|m| f64_op(op, a, b, c, m));
                if want.abs() > 1e-300 && want.is_finite() && op != ArithOp::Add && op != ArithOp::Sub {
                    assert_eq!(near.to_bits(), want.to_bits(), "{op:?} {a:e} {b:e} {c:e}");
                }
                assert!(down <= want && want <= up, "{op:?} {a:e} {b:e} {c:e}: {down:e} {want:e} {up:e}");
                assert!(down == up || down.next_up() == up, "{op:?} {a:e} {b:e} {c:e}: {down:e} {up:e}");
                assert_eq!(zero, if want > 0.0 || down >= 0.0 { down } else { up }, "{op:?} {a:e} {b:e} {c:e}");
            }
        }
    }

    #[test]
    fn edges() {
        let tiny = f64::from_bits(1);
        for (op, a, b, mode, want) in [
            (ArithOp::Add, 1.0, tiny, Round::Up, 1f64.next_up()),
            (ArithOp::Add, 1.0, -tiny, Round::Zero, 1f64.next_down()),
            (ArithOp::Add, f64::MAX, f64::MAX, Round::Zero, f64::MAX),
            (ArithOp::Add, f64::MAX, f64::MAX, Round::Up, f64::INFINITY),
            (ArithOp::Mul, -f64::MAX, 2.0, Round::Up, -f64::MAX),
            (ArithOp::Mul, tiny, 0.5, Round::Up, tiny),
            (ArithOp::Mul, tiny, tiny, Round::Zero, 0.0),
            (ArithOp::Mul, -tiny, tiny, Round::Down, -tiny),
            (ArithOp::Div, 1.0, 3.0, Round::Up, (1f64 / 3.0).next_up()),
            (ArithOp::Sub, 1.0, 1.0, Round::Down, -0.0),
            (ArithOp::Sub, 1.0, 1.0, Round::Up, 0.0),
            (ArithOp::Sqrt, 2.0, 0.0, Round::Down, 2f64.sqrt().next_down()),
            (ArithOp::Sqrt, 4.0, 0.0, Round::Up, 2.0),
            (ArithOp::Rcp, 3.0, 0.0, Round::Zero, 1.0 / 3.0),
            (ArithOp::Div, 1.0, 0.0, Round::Zero, f64::INFINITY),
        ] {
            let got = f64_op(op, a, b, 0.0, mode);
            assert_eq!(got.to_bits(), want.to_bits(), "{op:?} {a:e} {b:e} {mode:?}: {got:e}, expected {want:e}");
        }
    }
}
