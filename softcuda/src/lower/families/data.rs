//! Moves, addresses of symbols, packing (PTX ISA 9.7.9).

use super::{Class, unknown};
use crate::lower::LowerErrorKind;
use crate::lower::builder::{Builder, Result, Symbol};
use crate::lower::ir::Extra;
use crate::lower::isa::{Code, Width};
use crate::lower::modifiers::Modifiers;
use crate::lower::operands::{count, describe, dotted};
use crate::ptx::ast::{Instruction, Operand, Space, Type};

impl Builder<'_> {
    /// Predicates and vectors; the other moves are rows.
    pub(super) fn mov(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        let vector = m.one_of(&[("v2", 2), ("v4", 4)]);
        let ty = m.last_type()?;
        m.finish()?;
        count(&i.operands, 2..=2)?;
        self.class = Some(Class::Move);
        if let Some(n) = vector {
            return self.mov_vector(i, n, ty);
        }
        let (d, a) = (&self.spread(&i.operands[0]), &self.spread(&i.operands[1]));
        if ty == Type::B128 {
            return self.mov_wide(i, d, a);
        }
        match (ty, d, a) {
            (Type::Pred, ..) => {
                let a = self.source(a, Type::Pred)?;
                let d = self.dest(d, Type::Pred)?;
                self.emit(Code::PredMov, d, &[a]);
                Ok(())
            }
            (Type::B16 | Type::B32 | Type::B64, d, Operand::Vector(parts)) => {
                let value = self.pack(parts, ty, i)?;
                let d = self.dest(d, ty)?;
                let code = match ty {
                    Type::B64 => Code::Mov64,
                    Type::B32 => Code::Mov32,
                    _ => Code::Mov16,
                };
                self.emit(code, d, &[value]);
                Ok(())
            }
            (Type::B16 | Type::B32 | Type::B64, Operand::Vector(parts), a) => {
                let a = self.source(a, ty)?;
                self.unpack(parts, ty, a, i)
            }
            _ => Err(unknown(i)),
        }
    }

    /// `mov.v2` and `mov.v4`: component by component, all read before any is written.
    fn mov_vector(&mut self, i: &Instruction, n: usize, ty: Type) -> Result<()> {
        let code = match Width::of(ty) {
            Some(Width::W64) => Code::Mov64,
            Some(Width::W32) => Code::Mov32,
            _ => return Err(unknown(i)),
        };
        if n as u32 * ty.bytes() > 16 {
            return Err(unknown(i));
        }
        let mut values = Vec::with_capacity(n);
        for o in self.vector(&i.operands[1], n)? {
            let value = self.source(&o, ty)?;
            values.push(self.compute(code, &[value]));
        }
        for (o, value) in self.vector(&i.operands[0], n)?.iter().zip(values) {
            if !matches!(o, Operand::Sink) {
                let d = self.dest(o, ty)?;
                self.emit(code, d, &[value]);
            }
        }
        Ok(())
    }

    fn pack(&mut self, parts: &[Operand], ty: Type, i: &Instruction) -> Result<u32> {
        Ok(match (ty, parts) {
            (Type::B64, [a, b]) => {
                let (a, b) = (self.source(a, Type::B32)?, self.source(b, Type::B32)?);
                self.compute(Code::Pack64, &[a, b])
            }
            (Type::B64, [a, b, c, d]) => {
                let low = self.pack(&[a.clone(), b.clone()], Type::B32, i)?;
                let high = self.pack(&[c.clone(), d.clone()], Type::B32, i)?;
                self.compute(Code::Pack64, &[low, high])
            }
            (Type::B32, [a, b]) => {
                let (a, b) = (self.source(a, Type::B16)?, self.source(b, Type::B16)?);
                self.compute(Code::Pack32, &[a, b])
            }
            (Type::B32, [a, b, c, d]) => {
                let low = self.pack(&[a.clone(), b.clone()], Type::B16, i)?;
                let high = self.pack(&[c.clone(), d.clone()], Type::B16, i)?;
                self.compute(Code::Pack32, &[low, high])
            }
            (Type::B16, [a, b]) => {
                let (a, b) = (self.source(a, Type::B8)?, self.source(b, Type::B8)?);
                let (mask, eight) = (self.constant32(0xff), self.constant32(8));
                let low = self.compute(Code::And16, &[a, mask]);
                let high = self.compute(Code::Shl16, &[b, eight]);
                self.compute(Code::Or16, &[low, high])
            }
            _ => return Err(unknown(i)),
        })
    }

    fn unpack(&mut self, parts: &[Operand], ty: Type, a: u32, i: &Instruction) -> Result<()> {
        // The source stays readable until the last part is written, for a part may be the source's own register.
        let (halves, part) = match (ty, parts.len()) {
            (Type::B64, 2) => ([Code::Low32, Code::High32], Type::B32),
            (Type::B32, 2) => ([Code::Low16, Code::High16], Type::B16),
            (Type::B64, 4) | (Type::B32, 4) => {
                let (codes, half) = if ty == Type::B64 {
                    ([Code::Low32, Code::High32], Type::B32)
                } else {
                    ([Code::Low16, Code::High16], Type::B16)
                };
                let (low, high) = (self.compute(codes[0], &[a]), self.compute(codes[1], &[a]));
                self.unpack(&parts[..2], half, low, i)?;
                return self.unpack(&parts[2..], half, high, i);
            }
            (Type::B16, 2) => {
                let (mask, eight) = (self.constant32(0xff), self.constant32(8));
                let low = self.compute(Code::And16, &[a, mask]);
                let high = self.compute(Code::ShrU16, &[a, eight]);
                for (o, value) in parts.iter().zip([low, high]) {
                    if !matches!(o, Operand::Sink) {
                        let d = self.dest(o, Type::B8)?;
                        self.emit(Code::Mov16, d, &[value]);
                    }
                }
                return Ok(());
            }
            _ => return Err(unknown(i)),
        };
        let values = halves.map(|code| self.compute(code, &[a]));
        for (o, value) in parts.iter().zip(values) {
            if !matches!(o, Operand::Sink) {
                let d = self.dest(o, part)?;
                self.emit(if part == Type::B32 { Code::Mov32 } else { Code::Mov16 }, d, &[value]);
            }
        }
        Ok(())
    }

    /// `cvta{.to}.space.size`
    pub(super) fn cvta(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        let to = m.take("to");
        let space = m.required("a state space", SPACES)?;
        let ty = m.last_type()?;
        m.finish()?;
        if ty != Type::U64 {
            return Err(LowerErrorKind::Unsupported("32-bit generic addresses".into()));
        }
        count(&i.operands, 2..=2)?;
        let operand = &i.operands[1];
        if let Operand::Name(n) | Operand::SymbolOffset { name: n, .. } = operand
            && let Some(Symbol::Variable { space: s, .. }) = self.lookup(n)
            && *s != space
            && (*s, space) != (Space::Shared, Space::SharedCluster)
        {
            return Err(LowerErrorKind::Operand {
                expected: format!("expected a variable in {}", dotted(space)),
                got: describe(operand),
            });
        }
        let a = self.source(operand, Type::U64)?;
        let d = self.dest(&i.operands[0], Type::U64)?;
        let base = window(space);
        if base == 0 {
            self.emit(Code::Mov64, d, &[a]);
        } else {
            let base = self.constant64(base);
            self.emit(if to { Code::Sub64 } else { Code::Add64 }, d, &[a, base]);
        }
        Ok(())
    }

    /// `isspacep.space p, a`
    pub(super) fn isspacep(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        let space = m.required("a state space", SPACES)?;
        m.finish()?;
        count(&i.operands, 2..=2)?;
        let a = self.source_reg(&i.operands[1], Type::U64)?;
        let p = self.dest(&i.operands[0], Type::Pred)?;
        let p = self.reg(p, Width::Pred);
        self.emit_extra(Code::TestSpace, Extra::TestSpace(p, a, space));
        Ok(())
    }
}

const SPACES: &[(&str, Space)] = &[
    ("global", Space::Global),
    ("shared", Space::Shared),
    ("shared::cta", Space::Shared),
    ("shared::cluster", Space::SharedCluster),
    ("local", Space::Local),
    ("const", Space::Const),
    ("param", Space::Param),
    ("param::entry", Space::Param),
];

/// Base of a space's window in the generic address space.
fn window(space: Space) -> u64 {
    match space {
        Space::Shared | Space::SharedCluster => crate::lower::SHARED_WINDOW,
        Space::Local => crate::lower::LOCAL_WINDOW,
        Space::Param => crate::lower::PARAM_WINDOW,
        _ => 0,
    }
}
