//! Arithmetic with rounding, saturation or carry (PTX ISA 9.7.1, 9.7.2, 9.7.3, 9.7.4) and `bfi`.

use super::{Class, unknown};
use crate::lower::Round;
use crate::lower::builder::{Builder, Result};
use crate::lower::ir::{Arith, ArithOp, Extra, FALSE, TRUE};
use crate::lower::isa::Code;
use crate::lower::modifiers::Modifiers;
use crate::lower::operands::count;
use crate::ptx::ast::{Instruction, Type};

const ROUNDINGS: &[(&str, Round)] =
    &[("rn", Round::Nearest), ("rz", Round::Zero), ("rm", Round::Down), ("rp", Round::Up)];

impl Builder<'_> {
    pub(super) fn arithmetic(&mut self, i: &Instruction) -> Result<()> {
        let m = Modifiers::new(i);
        let carries = i.modifiers.iter().any(|m| m == "cc");
        match i.opcode.as_str() {
            "bfi" => self.bfi(i, m),
            "addc" | "subc" => self.carry_add(i, m),
            "add" | "sub" if carries => self.carry_add(i, m),
            "madc" => self.carry_mad(i, m),
            "mad" if carries => self.carry_mad(i, m),
            _ => self.float_arithmetic(i, m),
        }
    }

    fn float_arithmetic(&mut self, i: &Instruction, mut m: Modifiers) -> Result<()> {
        use ArithOp::*;
        use Type::*;
        let op = match i.opcode.as_str() {
            "add" => Add,
            "sub" => Sub,
            "mul" => Mul,
            "fma" | "mad" => Fma,
            "div" => Div,
            "rcp" => Rcp,
            "sqrt" => Sqrt,
            "min" => Min,
            "max" => Max,
            "abs" => Abs,
            _ => Neg,
        };
        let ty = m.last_type()?;
        let half = matches!(ty, F16 | F16x2);
        let bhalf = matches!(ty, BF16 | BF16x2);
        if !(half || bhalf || ty == F32 || ty == F64) {
            return Err(unknown(i));
        }
        let min_max = matches!(op, Min | Max);
        let rounds = matches!(op, Add | Sub | Mul | Fma | Div | Rcp | Sqrt);
        let round = if rounds { m.one_of(ROUNDINGS) } else { None };
        let ftz = !bhalf && ty != F64 && m.take("ftz");
        let sat = matches!(op, Add | Sub | Mul | Fma) && (ty == F32 || half) && m.take("sat");
        let oob = op == Fma && (half || bhalf) && !sat && m.take("oob");
        let relu = op == Fma && (half || bhalf) && m.take("relu");
        let nan = min_max && ty != F64 && m.take("NaN");
        let xorsign = min_max && ty != F64 && m.take("xorsign");
        if xorsign && !m.take("abs") || (sat || oob && ftz) && (relu || oob) {
            return Err(unknown(i));
        }
        m.finish()?;
        let implemented = match op {
            // fma, rcp, sqrt and div name their rounding; add, sub and mul default to the nearest.
            Fma | Div | Rcp | Sqrt if round.is_none() => false,
            Fma if i.opcode == "mad" => ty == F32 || ty == F64,
            Div | Rcp | Sqrt => ty == F32 || ty == F64,
            _ if ty == F64 => rounds && round.is_some(),
            Add | Sub | Mul | Fma if half || bhalf => matches!(round, None | Some(Round::Nearest)),
            Abs | Neg => half,
            _ => true,
        };
        if !implemented {
            return Err(unknown(i));
        }
        let arity = match op {
            Rcp | Sqrt | Abs | Neg => 1,
            Fma => 3,
            _ => 2,
        };
        count(&i.operands, arity + 1..=arity + 1)?;
        self.class = Some(match ty {
            F32 if matches!(op, Div | Rcp | Sqrt) => Class::Special,
            F32 => Class::Float,
            F64 => Class::Double,
            _ => Class::Half,
        });
        let mut sources = Vec::with_capacity(arity);
        for o in &i.operands[1..] {
            sources.push(self.source_reg(o, ty)?);
        }
        let d = self.dest_reg(&i.operands[0], ty)?;
        let round = round.unwrap_or(Round::Nearest);
        self.emit_extra(
            Code::Arith,
            Extra::Arith(Arith { op, ty, round, ftz, sat, relu, nan, oob, xorsign, d, sources }),
        );
        Ok(())
    }

    /// `f, a, b, pos, len`: the low `len` bits of a over those of b from `pos`.
    fn bfi(&mut self, i: &Instruction, mut m: Modifiers) -> Result<()> {
        let ty = m.last_type()?;
        let (mask, shift, merge) = match ty {
            Type::B32 => (Code::BfiMask32, Code::Shl32, Code::Merge32),
            Type::B64 => (Code::BfiMask64, Code::Shl64, Code::Merge64),
            _ => return Err(unknown(i)),
        };
        m.finish()?;
        count(&i.operands, 5..=5)?;
        let a = self.source(&i.operands[1], ty)?;
        let b = self.source(&i.operands[2], ty)?;
        let pos = self.source(&i.operands[3], Type::U32)?;
        let len = self.source(&i.operands[4], Type::U32)?;
        let low_byte = self.constant32(0xff);
        let pos8 = self.compute(Code::And32, &[pos, low_byte]);
        let mask = self.compute(mask, &[pos, len]);
        let shifted = self.compute(shift, &[a, pos8]);
        let d = self.dest(&i.operands[0], ty)?;
        self.emit(merge, d, &[shifted, b, mask]);
        Ok(())
    }

    /// `add.cc`, `addc`, `sub.cc`, `subc`. The condition code is one bit for sums and differences. A difference sets it where
    /// nothing is borrowed and takes one more off where it is clear: the manual (9.7.2) speaks of a borrow, which a chain of
    /// differences cannot tell apart, and what `ptxas` makes of a chain of both kinds (`IADD3.X` of the complement) shows
    /// which bit is kept.
    fn carry_add(&mut self, i: &Instruction, mut m: Modifiers) -> Result<()> {
        let subtract = i.opcode.starts_with("sub");
        let ty = m.last_type()?;
        let set = m.take("cc");
        m.finish()?;
        count(&i.operands, 3..=3)?;
        let (value, out) = carry_codes(ty, subtract).ok_or_else(|| unknown(i))?;
        let a = self.source(&i.operands[1], ty)?;
        let b = self.source(&i.operands[2], ty)?;
        let none = if subtract { TRUE } else { FALSE };
        let carry_in = if i.opcode.ends_with('c') { self.carry() } else { none };
        let d = self.dest(&i.operands[0], ty)?;
        self.add_with_carry((value, out), d, [a, b, carry_in], set)
    }

    fn add_with_carry(&mut self, (value, out): (Code, Code), d: u32, sources: [u32; 3], set: bool) -> Result<()> {
        // The destination may be a source: the carry is found first.
        let carry_out = set.then(|| self.compute(out, &sources));
        self.emit(value, d, &sources);
        if let Some(c) = carry_out {
            let carry = self.carry();
            self.emit(Code::PredMov, carry, &[c]);
        }
        Ok(())
    }

    /// `mad.{lo,hi}.cc`, `madc.{lo,hi}`.
    fn carry_mad(&mut self, i: &Instruction, mut m: Modifiers) -> Result<()> {
        let ty = m.last_type()?;
        let high = m.required("`.lo` or `.hi`", &[("lo", false), ("hi", true)])?;
        let set = m.take("cc");
        m.finish()?;
        count(&i.operands, 4..=4)?;
        let codes = carry_codes(ty, false).ok_or_else(|| unknown(i))?;
        let multiply = match (high, ty) {
            (false, Type::U32 | Type::S32) => Code::MulLo32,
            (false, _) => Code::MulLo64,
            (true, Type::U32) => Code::MulHiU32,
            (true, Type::S32) => Code::MulHiS32,
            (true, Type::U64) => Code::MulHiU64,
            (true, _) => Code::MulHiS64,
        };
        let a = self.source(&i.operands[1], ty)?;
        let b = self.source(&i.operands[2], ty)?;
        let c = self.source(&i.operands[3], ty)?;
        let carry_in = if i.opcode == "madc" { self.carry() } else { FALSE };
        let product = self.compute(multiply, &[a, b]);
        let d = self.dest(&i.operands[0], ty)?;
        self.add_with_carry(codes, d, [product, c, carry_in], set)
    }
}

/// The sum and the carry out of a three-operand addition or subtraction.
fn carry_codes(ty: Type, subtract: bool) -> Option<(Code, Code)> {
    Some(match (ty, subtract) {
        (Type::U32 | Type::S32, false) => (Code::AddCarry32, Code::CarryOut32),
        (Type::U64 | Type::S64, false) => (Code::AddCarry64, Code::CarryOut64),
        (Type::U32 | Type::S32, true) => (Code::SubCarry32, Code::SubCarryOut32),
        (Type::U64 | Type::S64, true) => (Code::SubCarry64, Code::SubCarryOut64),
        _ => return None,
    })
}
