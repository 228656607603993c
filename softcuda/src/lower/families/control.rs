//! Control flow but for calls (PTX ISA 9.7.12, 9.7.19).

use super::{Class, unknown};
use crate::lower::LowerErrorKind;
use crate::lower::builder::{Builder, Item, Result, Symbol};
use crate::lower::ir::Extra;
use crate::lower::isa::Code;
use crate::lower::modifiers::Modifiers;
use crate::lower::operands::{count, describe};
use crate::ptx::ast::{Instruction, Operand, Type};

impl Builder<'_> {
    pub(super) fn control(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        self.class = Some(Class::Control);
        let indexed = i.opcode == "brx" && m.take("idx");
        m.take("uni");
        let mask = i.opcode == "pmevent" && m.take("mask");
        m.finish()?;
        match i.opcode.as_str() {
            "bra" => {
                count(&i.operands, 1..=1)?;
                let target = self.label(&i.operands[0])?;
                self.jump(target);
            }
            "brx" if indexed => self.indexed_branch(i)?,
            "ret" => {
                count(&i.operands, 0..=0)?;
                match self.returns.last() {
                    Some(label) => self.jump(*label),
                    None if self.frame.is_some() => self.return_from_body()?,
                    None => self.emit_plain(Code::Exit, 0),
                }
            }
            "exit" => {
                count(&i.operands, 0..=0)?;
                self.emit_plain(Code::Exit, 0);
            }
            // Without a debugger a breakpoint ends the kernel like a trap.
            "trap" | "brkpt" => {
                count(&i.operands, 0..=0)?;
                self.emit_plain(Code::Trap, 0);
            }
            "pmevent" => {
                count(&i.operands, 1..=1)?;
                let most = if mask { 0xffff } else { 15 };
                if !matches!(i.operands[0], Operand::Int(n) if (0..=most).contains(&n)) {
                    return Err(LowerErrorKind::Operand {
                        expected: format!("expected a constant from 0 to {most}"),
                        got: describe(&i.operands[0]),
                    });
                }
                self.emit_plain(Code::Nop, 0);
            }
            "call" => self.call(i)?,
            _ => return Err(unknown(i)),
        }
        Ok(())
    }

    fn label(&self, o: &Operand) -> Result<crate::lower::builder::Label> {
        match o {
            Operand::Name(n) => match self.lookup(n) {
                Some(Symbol::Label(l)) => Ok(*l),
                Some(_) => Err(LowerErrorKind::Operand { expected: "expected a label".into(), got: describe(o) }),
                None => Err(LowerErrorKind::Undeclared { what: "label", name: n.clone() }),
            },
            _ => Err(LowerErrorKind::Operand { expected: "expected a label".into(), got: describe(o) }),
        }
    }

    fn indexed_branch(&mut self, i: &Instruction) -> Result<()> {
        count(&i.operands, 2..=2)?;
        let index = self.source_reg(&i.operands[0], Type::U32)?;
        let names = match &i.operands[1] {
            Operand::Name(n) => match self.lookup(n) {
                Some(Symbol::Targets(t)) => t.clone(),
                _ => return Err(LowerErrorKind::Undeclared { what: "branch target list", name: n.clone() }),
            },
            o => {
                return Err(LowerErrorKind::Operand {
                    expected: "expected a branch target list".into(),
                    got: describe(o),
                });
            }
        };
        let mut targets = Vec::with_capacity(names.len());
        for n in names {
            targets.push(self.label(&Operand::Name(n))?);
        }
        self.emit_extra(Code::BrxIdx, Extra::Brx(index, Vec::new()));
        if let Some(Item::Micro(m)) = self.items.last_mut() {
            m.targets = targets;
        }
        Ok(())
    }
}
