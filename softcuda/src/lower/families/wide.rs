//! 128-bit values (PTX ISA 5.2, 9.7.9.10, 9.7.9.8, 9.7.13.5): moved in halves, exchanged whole.

use super::unknown;
use crate::lower::LowerErrorKind;
use crate::lower::builder::{Builder, Result, Symbol};
use crate::lower::ir::Reg;
use crate::lower::isa::{Code, Width};
use crate::lower::operands::describe;
use crate::ptx::ast::{Instruction, Operand, Type};

impl Builder<'_> {
    /// The low and the high half of a `.b128` register.
    pub(super) fn halves(&self, o: &Operand) -> Result<[Reg; 2]> {
        if let Operand::Name(n) = o
            && let Some(Symbol::Wide(halves)) = self.lookup(n)
        {
            return Ok(halves.map(|slot| self.reg(slot, Width::W64)));
        }
        Err(LowerErrorKind::Operand { expected: "expected a register of type .b128".into(), got: describe(o) })
    }

    /// `mov.b128`: a register, or two or four parts to or from one.
    pub(super) fn mov_wide(&mut self, i: &Instruction, d: &Operand, a: &Operand) -> Result<()> {
        match (d, a) {
            (d, Operand::Vector(parts)) => {
                let values = match parts.as_slice() {
                    [low, high] => [self.source(low, Type::B64)?, self.source(high, Type::B64)?],
                    [a, b, c, d] => {
                        let words = [a, b, c, d].map(|o| self.source(o, Type::B32));
                        let [a, b, c, d] = words;
                        let (low, high) = ([a?, b?], [c?, d?]);
                        [self.compute(Code::Pack64, &low), self.compute(Code::Pack64, &high)]
                    }
                    _ => return Err(unknown(i)),
                };
                for (d, value) in self.halves(d)?.into_iter().zip(values) {
                    self.emit(Code::Mov64, d.slot, &[value]);
                }
            }
            (Operand::Vector(parts), a) => {
                let halves = self.halves(a)?;
                match parts.len() {
                    2 => {
                        for (o, half) in parts.iter().zip(halves) {
                            let d = self.dest(o, Type::B64)?;
                            self.emit(Code::Mov64, d, &[half.slot]);
                        }
                    }
                    4 => {
                        for (pair, half) in parts.chunks(2).zip(halves) {
                            for (o, code) in pair.iter().zip([Code::Low32, Code::High32]) {
                                let d = self.dest(o, Type::B32)?;
                                self.emit(code, d, &[half.slot]);
                            }
                        }
                    }
                    _ => return Err(unknown(i)),
                }
            }
            (d, a) => {
                let (d, a) = (self.halves(d)?, self.halves(a)?);
                for (d, a) in d.into_iter().zip(a) {
                    self.emit(Code::Mov64, d.slot, &[a.slot]);
                }
            }
        }
        Ok(())
    }
}
