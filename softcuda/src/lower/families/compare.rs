//! Comparisons and predicate logic (PTX ISA 9.7.6, 9.7.8).

use super::{Class, unknown};
use crate::lower::builder::{Builder, Result};
use crate::lower::ir::Op;
use crate::lower::isa::{Code, Width};
use crate::lower::modifiers::Modifiers;
use crate::lower::operands::count;
use crate::ptx::ast::{Instruction, Operand, Type};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Compare {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    /// Unsigned by name.
    Lo,
    Ls,
    Hi,
    Hs,
    Equ,
    Neu,
    Ltu,
    Leu,
    Gtu,
    Geu,
    Num,
    Nan,
}

const COMPARES: &[(&str, Compare)] = &[
    ("eq", Compare::Eq),
    ("ne", Compare::Ne),
    ("lt", Compare::Lt),
    ("le", Compare::Le),
    ("gt", Compare::Gt),
    ("ge", Compare::Ge),
    ("lo", Compare::Lo),
    ("ls", Compare::Ls),
    ("hi", Compare::Hi),
    ("hs", Compare::Hs),
    ("equ", Compare::Equ),
    ("neu", Compare::Neu),
    ("ltu", Compare::Ltu),
    ("leu", Compare::Leu),
    ("gtu", Compare::Gtu),
    ("geu", Compare::Geu),
    ("num", Compare::Num),
    ("nan", Compare::Nan),
];

const BOOLEANS: &[(&str, Code)] = &[("and", Code::PredAnd), ("or", Code::PredOr), ("xor", Code::PredXor)];

impl Builder<'_> {
    /// `setp.CmpOp{.BoolOp}{.ftz}.type p[|q], a, b{, {!}c}`
    pub(super) fn setp(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        let ty = m.last_type()?;
        if matches!(ty, Type::F16x2 | Type::BF16x2) {
            return self.setp_pairs(i, m, ty);
        }
        let compare = m.required("a comparison", COMPARES)?;
        let boolean = m.one_of(BOOLEANS);
        let ftz = matches!(ty, Type::F32 | Type::F16) && m.take("ftz");
        m.finish()?;
        count(&i.operands, 3 + usize::from(boolean.is_some())..=3 + usize::from(boolean.is_some()))?;
        self.class = Some(class_of(ty));
        let a = self.source(&i.operands[1], ty)?;
        let b = self.source(&i.operands[2], ty)?;
        let (p, q) = match &i.operands[0] {
            Operand::Pair(..) if matches!(ty, Type::F16 | Type::BF16) => return Err(unknown(i)),
            Operand::Pair(p, q) => (self.dest(p, Type::Pred)?, Some(self.dest(q, Type::Pred)?)),
            p => (self.dest(p, Type::Pred)?, None),
        };
        let (code, sources, negated) = self.comparison(compare, ty, ftz, a, b).ok_or_else(|| unknown(i))?;
        if boolean.is_none() && q.is_none() && !negated {
            self.emit(code, p, &sources);
            return Ok(());
        }
        let raw = self.compute(code, &sources);
        let not_raw = self.compute(Code::PredNot, &[raw]);
        let (yes, no) = if negated { (not_raw, raw) } else { (raw, not_raw) };
        let Some(boolean) = boolean else {
            self.emit(Code::PredMov, p, &[yes]);
            q.into_iter().for_each(|q| self.emit(Code::PredMov, q, &[no]));
            return Ok(());
        };
        let (c, negated) = self.predicate_source(&i.operands[3])?;
        let c = self.predicate(c, negated);
        // p may be c.
        let second = q.map(|q| (q, self.combine(boolean, no, c)));
        let first = self.combine(boolean, yes, c);
        self.emit(Code::PredMov, p, &[first]);
        second.into_iter().for_each(|(q, value)| self.emit(Code::PredMov, q, &[value]));
        Ok(())
    }

    fn combine(&mut self, code: Code, a: u32, b: u32) -> u32 {
        self.compute(code, &[a, b])
    }

    /// `setp` of packed pairs: p for the low halves, q for the high ones.
    fn setp_pairs(&mut self, i: &Instruction, mut m: Modifiers, ty: Type) -> Result<()> {
        let compare = m.required("a comparison", COMPARES)?;
        let boolean = m.one_of(BOOLEANS);
        let ftz = ty == Type::F16x2 && m.take("ftz");
        m.finish()?;
        count(&i.operands, 3 + usize::from(boolean.is_some())..=3 + usize::from(boolean.is_some()))?;
        self.class = Some(Class::Half);
        let (p, q) = match &i.operands[0] {
            Operand::Pair(p, q) => (self.dest(p, Type::Pred)?, Some(self.dest(q, Type::Pred)?)),
            p => (self.dest(p, Type::Pred)?, None),
        };
        let a = self.source(&i.operands[1], ty)?;
        let b = self.source(&i.operands[2], ty)?;
        let one = if ty == Type::F16x2 { Type::F16 } else { Type::BF16 };
        let c = match boolean {
            None => None,
            Some(code) => {
                let (c, negated) = self.predicate_source(&i.operands[3])?;
                Some((code, self.predicate(c, negated)))
            }
        };
        let mut results = [0; 2];
        for (half, result) in [Code::Low16, Code::High16].into_iter().zip(&mut results) {
            let (x, y) = (self.compute(half, &[a]), self.compute(half, &[b]));
            let (code, sources, negated) = self.comparison(compare, one, ftz, x, y).ok_or_else(|| unknown(i))?;
            let raw = self.compute(code, &sources);
            let value = self.predicate(raw, negated);
            *result = match c {
                None => value,
                Some((code, c)) => self.compute(code, &[value, c]),
            };
        }
        self.emit(Code::PredMov, p, &[results[0]]);
        q.into_iter().for_each(|q| self.emit(Code::PredMov, q, &[results[1]]));
        Ok(())
    }

    /// The comparison as a row, its operands, and whether its result is to be negated.
    fn comparison(&mut self, compare: Compare, ty: Type, ftz: bool, a: u32, b: u32) -> Option<(Code, [u32; 2], bool)> {
        use Compare::*;
        use Type::*;
        let (a, b, ty) = match ty {
            F16 | BF16 => {
                let widen = if ty == F16 { Code::CvtF32F16 } else { Code::CvtF32Bf16 };
                let mut half = |x: u32| {
                    let x = if ftz { self.compute(Code::FtzF16, &[x]) } else { x };
                    self.compute(widen, &[x])
                };
                (half(a), half(b), F32)
            }
            F32 if ftz => (self.compute(Code::Ftz, &[a]), self.compute(Code::Ftz, &[b]), F32),
            _ => (a, b, ty),
        };
        if let F32 | F64 = ty {
            let [eq, lt, le, num] = match ty {
                F32 => [Code::EqF32, Code::LtF32, Code::LeF32, Code::NumF32],
                _ => [Code::EqF64, Code::LtF64, Code::LeF64, Code::NumF64],
            };
            return Some(match compare {
                Eq => (eq, [a, b], false),
                Lt => (lt, [a, b], false),
                Le => (le, [a, b], false),
                Gt => (lt, [b, a], false),
                Ge => (le, [b, a], false),
                Neu => (eq, [a, b], true),
                Geu => (lt, [a, b], true),
                Gtu => (le, [a, b], true),
                Leu => (lt, [b, a], true),
                Ltu => (le, [b, a], true),
                Num => (num, [a, b], false),
                Nan => (num, [a, b], true),
                // Ordered and unequal, unordered or equal: less or greater decides both.
                Ne | Equ => {
                    let (less, greater) = (self.compute(lt, &[a, b]), self.compute(lt, &[b, a]));
                    (Code::PredOr, [less, greater], compare == Equ)
                }
                Lo | Ls | Hi | Hs => return None,
            });
        }
        let [eq, lt, le] = match (ty, compare) {
            (B16 | U16 | S16, Eq | Ne) => [Code::Eq16; 3],
            (B32 | U32 | S32, Eq | Ne) => [Code::Eq32; 3],
            (B64 | U64 | S64, Eq | Ne) => [Code::Eq64; 3],
            (U16, _) => [Code::Eq16, Code::LtU16, Code::LeU16],
            (U32, _) => [Code::Eq32, Code::LtU32, Code::LeU32],
            (U64, _) => [Code::Eq64, Code::LtU64, Code::LeU64],
            (S16, _) => [Code::Eq16, Code::LtS16, Code::LeS16],
            (S32, _) => [Code::Eq32, Code::LtS32, Code::LeS32],
            (S64, _) => [Code::Eq64, Code::LtS64, Code::LeS64],
            _ => return None,
        };
        let unsigned = matches!(ty, U16 | U32 | U64);
        Some(match compare {
            Eq => (eq, [a, b], false),
            Ne => (eq, [a, b], true),
            Lt => (lt, [a, b], false),
            Le => (le, [a, b], false),
            Gt => (lt, [b, a], false),
            Ge => (le, [b, a], false),
            Lo if unsigned => (lt, [a, b], false),
            Ls if unsigned => (le, [a, b], false),
            Hi if unsigned => (lt, [b, a], false),
            Hs if unsigned => (le, [b, a], false),
            _ => return None,
        })
    }

    /// `set.CmpOp{.BoolOp}{.ftz}.dtype.stype d, a, b{, {!}c}`: all ones or 1.0 where true.
    pub(super) fn set(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        let ty = m.last_type()?;
        let to = m.last_type()?;
        let compare = m.required("a comparison", COMPARES)?;
        let boolean = m.one_of(BOOLEANS);
        let flushes = matches!(ty, Type::F32 | Type::F16 | Type::F16x2) && to != Type::BF16;
        let ftz = flushes && m.take("ftz");
        m.finish()?;
        count(&i.operands, 3 + usize::from(boolean.is_some())..=3 + usize::from(boolean.is_some()))?;
        if matches!(ty, Type::F16x2 | Type::BF16x2) {
            return self.set_pairs(i, (compare, boolean, ftz), to, ty);
        }
        self.class = Some(class_of(ty));
        let half = matches!(ty, Type::F16 | Type::BF16);
        let allowed = match to {
            Type::U16 | Type::S16 => half,
            Type::F32 => !half,
            Type::F16 => ty != Type::BF16,
            _ => true,
        };
        if !allowed {
            return Err(unknown(i));
        }
        let (yes, code) = match to {
            Type::U32 | Type::S32 => (u32::MAX, Code::Selp32),
            Type::F32 => (1f32.to_bits(), Code::Selp32),
            Type::U16 | Type::S16 => (0xffff, Code::Selp16),
            Type::F16 => (0x3c00, Code::Selp16),
            Type::BF16 => (0x3f80, Code::Selp16),
            _ => return Err(unknown(i)),
        };
        let a = self.source(&i.operands[1], ty)?;
        let b = self.source(&i.operands[2], ty)?;
        let (compare_code, sources, negated) = self.comparison(compare, ty, ftz, a, b).ok_or_else(|| unknown(i))?;
        let raw = self.compute(compare_code, &sources);
        let mut p = self.predicate(raw, negated);
        if let Some(boolean) = boolean {
            let (c, negated) = self.predicate_source(&i.operands[3])?;
            let c = self.predicate(c, negated);
            p = self.compute(boolean, &[p, c]);
        }
        let (yes, no) = (self.constant32(yes), self.constant32(0));
        let d = self.dest(&i.operands[0], to)?;
        self.emit(code, d, &[yes, no, p]);
        Ok(())
    }

    /// `set` of packed pairs: a half of ones, or 1.0, for each half.
    fn set_pairs(
        &mut self,
        i: &Instruction,
        (compare, boolean, ftz): (Compare, Option<Code>, bool),
        to: Type,
        ty: Type,
    ) -> Result<()> {
        let yes = match to {
            Type::U32 | Type::S32 => 0xffff,
            Type::F16x2 if ty == to => 0x3c00,
            Type::BF16x2 if ty == to => 0x3f80,
            _ => return Err(unknown(i)),
        };
        self.class = Some(Class::Half);
        let a = self.source(&i.operands[1], ty)?;
        let b = self.source(&i.operands[2], ty)?;
        let one = if ty == Type::F16x2 { Type::F16 } else { Type::BF16 };
        let c = match boolean {
            None => None,
            Some(code) => {
                let (c, negated) = self.predicate_source(&i.operands[3])?;
                Some((code, self.predicate(c, negated)))
            }
        };
        let (yes, no) = (self.constant32(yes), self.constant32(0));
        let mut halves = [0; 2];
        for (half, result) in [Code::Low16, Code::High16].into_iter().zip(&mut halves) {
            let (x, y) = (self.compute(half, &[a]), self.compute(half, &[b]));
            let (code, sources, negated) = self.comparison(compare, one, ftz, x, y).ok_or_else(|| unknown(i))?;
            let raw = self.compute(code, &sources);
            let mut p = self.predicate(raw, negated);
            if let Some((code, c)) = c {
                p = self.compute(code, &[p, c]);
            }
            *result = self.compute(Code::Selp16, &[yes, no, p]);
        }
        let d = self.dest(&i.operands[0], to)?;
        self.emit(Code::Pack32, d, &halves);
        Ok(())
    }

    /// `and`, `or`, `xor` and `not` of predicates; the other types are rows.
    pub(super) fn predicate_logic(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        if m.last_type()? != Type::Pred {
            return Err(unknown(i));
        }
        m.finish()?;
        let code = match i.opcode.as_str() {
            "and" => Code::PredAnd,
            "or" => Code::PredOr,
            "xor" => Code::PredXor,
            _ => Code::PredNot,
        };
        let arity = if code == Code::PredNot { 1 } else { 2 };
        count(&i.operands, arity + 1..=arity + 1)?;
        let mut sources = Vec::with_capacity(2);
        for o in &i.operands[1..] {
            sources.push(self.source(o, Type::Pred)?);
        }
        let d = self.dest(&i.operands[0], Type::Pred)?;
        self.emit(code, d, &sources);
        Ok(())
    }

    /// `lop3.b32 d, a, b, c, immLut` and `lop3.BoolOp.b32 d|p, a, b, c, immLut, q`
    pub(super) fn lop3(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        let boolean = m.one_of(&BOOLEANS[..2]);
        if m.last_type()? != Type::B32 {
            return Err(unknown(i));
        }
        m.finish()?;
        let arity = if boolean.is_some() { 6 } else { 5 };
        count(&i.operands, arity..=arity)?;
        let mut s = [0; 3];
        for (slot, o) in s.iter_mut().zip(&i.operands[1..]) {
            *slot = self.source(o, Type::B32)?;
        }
        let Operand::Int(lut @ 0..=255) = i.operands[4] else {
            return Err(crate::lower::LowerErrorKind::Operand {
                expected: "expected a truth table from 0 to 255".into(),
                got: crate::lower::operands::describe(&i.operands[4]),
            });
        };
        let lop3 = |d| Op { code: Code::Lop3, guard: 0, d, a: s[0], b: s[1], c: s[2], x: lut as u32 };
        let Some(boolean) = boolean else {
            let d = self.dest(&i.operands[0], Type::B32)?;
            self.push(lop3(d));
            return Ok(());
        };
        let Operand::Pair(d, p) = &i.operands[0] else { return Err(unknown(i)) };
        let (q, negated) = self.predicate_source(&i.operands[5])?;
        let q = self.predicate(q, negated);
        let value = self.temp(Width::W32);
        self.push(lop3(value));
        let zero = self.constant32(0);
        let equal = self.compute(Code::Eq32, &[value, zero]);
        let set = self.compute(Code::PredNot, &[equal]);
        let p = self.dest(p, Type::Pred)?;
        self.emit(boolean, p, &[set, q]);
        let d = self.dest(d, Type::B32)?;
        self.emit(Code::Mov32, d, &[value]);
        Ok(())
    }
}

fn class_of(ty: Type) -> Class {
    match ty {
        Type::F32 => Class::Float,
        Type::F64 => Class::Double,
        Type::F16 | Type::BF16 => Class::Half,
        _ => Class::Integer,
    }
}
