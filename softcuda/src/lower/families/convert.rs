//! `cvt` beyond the vectorised rows (PTX ISA 9.7.9.21).

use super::{Class, unknown};
use crate::lower::Round;
use crate::lower::builder::{Builder, Result};
use crate::lower::ir::{Cvt, Extra};
use crate::lower::isa::{Code, Width};
use crate::lower::modifiers::Modifiers;
use crate::lower::operands::count;
use crate::ptx::ast::{Instruction, Operand, Type};

const FLOAT_ROUNDINGS: &[(&str, Round)] =
    &[("rn", Round::Nearest), ("rna", Round::NearestAway), ("rz", Round::Zero), ("rm", Round::Down), ("rp", Round::Up)];
const INTEGER_ROUNDINGS: &[(&str, Round)] =
    &[("rni", Round::Nearest), ("rzi", Round::Zero), ("rmi", Round::Down), ("rpi", Round::Up)];

fn is_integer(ty: Type) -> bool {
    use Type::*;
    matches!(ty, U8 | U16 | U32 | U64 | S8 | S16 | S32 | S64)
}

fn is_float(ty: Type) -> bool {
    use Type::*;
    matches!(ty, F16 | BF16 | F32 | F64)
}

/// Whether every value of integer type `b` is one of `a`: there is nothing to saturate then, and `.sat` is not allowed.
fn holds(a: Type, b: Type) -> bool {
    let signed = |t| matches!(t, Type::S8 | Type::S16 | Type::S32 | Type::S64);
    match (signed(a), signed(b)) {
        (true, false) => a.bytes() > b.bytes(),
        (false, true) => false,
        _ => a.bytes() >= b.bytes(),
    }
}

impl Builder<'_> {
    pub(super) fn cvt(&mut self, i: &Instruction) -> Result<()> {
        use Type::*;
        if i.modifiers.first().is_some_and(|m| m == "pack") {
            return self.cvt_pack(i);
        }
        let mut m = Modifiers::new(i);
        let from = m.last_type()?;
        let to = m.last_type()?;
        let float_round = m.one_of(FLOAT_ROUNDINGS);
        let integer_round = m.one_of(INTEGER_ROUNDINGS);
        let ftz = m.take("ftz");
        let sat = m.take("sat");
        let satfinite = m.take("satfinite");
        let relu = m.take("relu");
        m.finish()?;
        let packs = matches!((to, from), (F16x2 | BF16x2 | E4M3x2 | E5M2x2, F32));
        let nearest = float_round == Some(Round::Nearest);
        let rounds = nearest || float_round == Some(Round::Zero);
        let plain = !ftz && !sat && integer_round.is_none();
        let ok = match (to, from) {
            (F16x2 | BF16x2, F32) => rounds && plain,
            (E4M3x2 | E5M2x2, F32 | F16x2) => nearest && satfinite && plain,
            (F16x2, E4M3x2 | E5M2x2) => nearest && !satfinite && plain,
            (TF32, F32) if float_round == Some(Round::NearestAway) => plain && !relu,
            // `.satfinite` with these came with sm_100.
            (TF32, F32) => rounds && plain && !satfinite,
            (a, b) if is_integer(a) && is_integer(b) => {
                let plain = float_round.is_none() && integer_round.is_none() && !ftz && !satfinite && !relu;
                plain && (!sat || !holds(a, b))
            }
            (a, b) if is_integer(a) && is_float(b) => {
                let rounds = integer_round.is_some() && float_round.is_none();
                let allowed = b != BF16 || !sat;
                rounds && (!ftz || b == F32) && !satfinite && !relu && allowed
            }
            (a, b) if is_float(a) && is_integer(b) => {
                integer_round.is_none()
                    && float_round.is_some_and(|r| r != Round::NearestAway)
                    && (!ftz || a == F32)
                    && !satfinite
                    && !relu
                    && !(a == BF16 && sat)
            }
            (a, b) if is_float(a) && is_float(b) => {
                let narrows = a.bytes() < b.bytes() || a.bytes() == b.bytes() && a != b;
                // A rounding where bf16 only becomes wider has nothing to do.
                let rounding = if b == BF16 && a.bytes() > 2 && float_round.is_some_and(|r| r != Round::NearestAway) {
                    integer_round.is_none()
                } else if narrows {
                    integer_round.is_none() && float_round.is_some_and(|r| r != Round::NearestAway)
                } else {
                    float_round.is_none() && (a == b || integer_round.is_none())
                };
                let small = matches!(a, F16 | BF16) && b == F32;
                rounding
                    && (!ftz || a == F32 || b == F32)
                    && (!(relu || satfinite) || small && rounds && !ftz)
                    && !(a == BF16 && (ftz && b != F32 || sat) || b == BF16 && sat)
            }
            _ => false,
        };
        if !ok {
            return Err(unknown(i));
        }
        self.class = Some(Class::Convert);
        let arity = if packs { 3 } else { 2 };
        count(&i.operands, arity..=arity)?;
        let storage = |ty| match ty {
            TF32 => B32,
            E4M3x2 | E5M2x2 => B16,
            other => other,
        };
        let a = match from {
            TF32 | E4M3x2 | E5M2x2 => self.source_reg(&i.operands[1], storage(from))?,
            _ => self.wide_source(&i.operands[1], from)?,
        };
        let b = if packs { Some(self.wide_source(&i.operands[2], from)?) } else { None };
        let d = match to {
            // Types without a relaxed form.
            TF32 | E4M3x2 | E5M2x2 if !matches!(i.operands[0], Operand::Sink) => {
                Some(self.dest_reg(&i.operands[0], storage(to))?)
            }
            _ => self.wide_dest(&i.operands[0], storage(to))?,
        };
        let Some(d) = d else { return Ok(()) };
        let round = float_round.or(integer_round).unwrap_or(Round::Nearest);
        let integral = integer_round.is_some();
        let cvt = Cvt { to, from, round, integral, ftz, sat, satfinite, relu, d, a, b };
        self.emit_extra(Code::Cvt, Extra::Cvt(cvt));
        self.narrow(&i.operands[0], to)
    }

    /// `cvt.pack.sat.type.s32{.b32} d, a, b{, c}`: both saturated, b below a below the low bits of c.
    fn cvt_pack(&mut self, i: &Instruction) -> Result<()> {
        let words: Vec<&str> = i.modifiers.iter().map(String::as_str).collect();
        let (bits, signed, thirds) = match words.as_slice() {
            ["pack", "sat", "u16", "s32"] => (16, false, false),
            ["pack", "sat", "s16", "s32"] => (16, true, false),
            ["pack", "sat", "u8", "s32", "b32"] => (8, false, true),
            ["pack", "sat", "s8", "s32", "b32"] => (8, true, true),
            ["pack", "sat", "u4", "s32", "b32"] => (4, false, true),
            ["pack", "sat", "s4", "s32", "b32"] => (4, true, true),
            ["pack", "sat", "u2", "s32", "b32"] => (2, false, true),
            ["pack", "sat", "s2", "s32", "b32"] => (2, true, true),
            _ => return Err(unknown(i)),
        };
        count(&i.operands, if thirds { 4..=4 } else { 3..=3 })?;
        self.class = Some(Class::Convert);
        let (least, most) = if signed { (-(1i32 << (bits - 1)), (1 << (bits - 1)) - 1) } else { (0, (1 << bits) - 1) };
        let (least, most) = (self.constant32(least as u32), self.constant32(most as u32));
        let mask = self.constant32((1 << bits) - 1);
        let mut fields = [0; 2];
        for (field, o) in fields.iter_mut().zip(&i.operands[1..3]) {
            let a = self.wide_source(o, Type::S32)?;
            let a = if a.width == Width::W64 { self.compute(Code::Trunc32, &[a.slot]) } else { a.slot };
            let above = self.compute(Code::MaxS32, &[a, least]);
            let clamped = self.compute(Code::MinS32, &[above, most]);
            *field = self.compute(Code::And32, &[clamped, mask]);
        }
        let [high, low] = fields;
        let (once, twice) = (self.constant32(bits), self.constant32(2 * bits));
        let shifted = self.compute(Code::Shl32, &[high, once]);
        let mut packed = self.compute(Code::Or32, &[shifted, low]);
        if thirds {
            let c = self.source(&i.operands[3], Type::B32)?;
            let rest = self.compute(Code::Shl32, &[c, twice]);
            packed = self.compute(Code::Or32, &[packed, rest]);
        }
        // The result is an unsigned integer where the register is wider.
        if let Some(d) = self.wide_dest(&i.operands[0], Type::U32)? {
            self.emit(if d.width == Width::W64 { Code::Zext32 } else { Code::Mov32 }, d.slot, &[packed]);
        }
        Ok(())
    }
}
