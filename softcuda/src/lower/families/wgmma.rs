//! `wgmma` (PTX ISA 9.7.15) and `setmaxnreg` (9.7.19): what the warps of a warpgroup do together.

use super::{Class, unknown};
use crate::lower::LowerErrorKind;
use crate::lower::builder::{Builder, Result};
use crate::lower::ir::{Extra, MmaType, Wgmma, WgmmaA, WgmmaSync, WgmmaSyncKind};
use crate::lower::isa::{Code, Width};
use crate::lower::modifiers::Modifiers;
use crate::lower::operands::{count, describe};
use crate::ptx::ast::{Instruction, Operand, Type};

/// Rows of D, over the whole warpgroup.
const ROWS: u32 = 64;

impl Builder<'_> {
    pub(super) fn wgmma(&mut self, i: &Instruction) -> Result<()> {
        self.warpgroup_target(i)?;
        let mut m = Modifiers::new(i);
        let kind = [
            ("fence", WgmmaSyncKind::Fence),
            ("commit_group", WgmmaSyncKind::Commit),
            ("wait_group", WgmmaSyncKind::Wait(0)),
        ];
        if let Some(kind) = m.one_of(&kind) {
            return self.wgmma_sync(i, m, kind);
        }
        if !m.take("mma_async") {
            return Err(unknown(i));
        }
        if m.take("sp") {
            return Err(LowerErrorKind::Unsupported("sparse `wgmma.mma_async.sp`".into()));
        }
        if !m.take("sync") || !m.take("aligned") {
            return Err(unknown(i));
        }
        if m.take("b1") {
            return Err(LowerErrorKind::Unsupported("`wgmma.mma_async` of single bits, `.b1`".into()));
        }
        let saturate = m.take("satfinite");
        let b = m.last_type()?;
        let a = m.last_type()?;
        let d_type = m.last_type()?;
        let (a_type, b_type, depth) = match (d_type, a, b) {
            (Type::F16 | Type::F32, Type::F16, Type::F16) => (MmaType::F16, MmaType::F16, 16),
            (Type::F32, Type::BF16, Type::BF16) => (MmaType::BF16, MmaType::BF16, 16),
            (Type::F32, Type::TF32, Type::TF32) => (MmaType::TF32, MmaType::TF32, 8),
            (Type::F16 | Type::F32, Type::E4M3 | Type::E5M2, Type::E4M3 | Type::E5M2)
            | (Type::S32, Type::S8 | Type::U8, Type::S8 | Type::U8) => (eight_bit(a), eight_bit(b), 32),
            _ => return Err(unknown(i)),
        };
        let integer = d_type == Type::S32;
        let n = self.wgmma_columns(i, &mut m, depth, integer)?;
        if saturate && !integer {
            return Err(unknown(i));
        }
        m.finish()?;

        let from_registers = matches!(i.operands.get(1), Some(Operand::Vector(_)));
        // Integer types have no scales, and only the 16-bit ones come in either order.
        let sixteen = depth == 16;
        let scales = if integer { 0 } else { 2 };
        let orders = if sixteen { 2 - usize::from(from_registers) } else { 0 };
        count(&i.operands, 4 + scales + orders..=4 + scales + orders)?;
        let immediate = |index: usize, allowed: [i128; 2], what: &str| match &i.operands[index] {
            Operand::Int(value) if allowed.contains(value) => Ok(*value == allowed[1]),
            other => Err(LowerErrorKind::Operand {
                expected: format!("expected {} or {} as {what}", allowed[0], allowed[1]),
                got: describe(other),
            }),
        };
        let mut negated = false;
        if scales != 0 {
            negated = immediate(4, [1, -1], "the scale of A")? != immediate(5, [1, -1], "the scale of B")?;
        }
        let (mut a_turned, mut b_turned) = (false, false);
        if sixteen {
            a_turned = !from_registers && immediate(6, [0, 1], "the order of A")?;
            b_turned = immediate(6 + usize::from(!from_registers), [0, 1], "the order of B")?;
        }
        let a_operand = if from_registers {
            let regs = self.vector(&i.operands[1], 4)?;
            WgmmaA::Registers(regs.iter().map(|o| self.source_reg(o, Type::B32)).collect::<Result<_>>()?)
        } else {
            WgmmaA::Descriptor { reg: self.source_reg(&i.operands[1], Type::B64)?, turned: a_turned }
        };
        let b_operand = self.source_reg(&i.operands[2], Type::B64)?;
        let (scale, scale_negated) = self.predicate_source(&i.operands[3])?;
        let (register_type, registers) = match d_type {
            Type::F16 => (Type::F16x2, n as usize / 4),
            other => (other, n as usize / 2),
        };
        let mut d = Vec::with_capacity(registers);
        for o in self.vector(&i.operands[0], registers)? {
            if matches!(o, Operand::Sink) {
                return Err(LowerErrorKind::Operand { expected: "expected accumulators".into(), got: describe(&o) });
            }
            d.push(self.dest_reg(&o, register_type)?);
        }
        if let Some(twice) = (1..d.len()).find(|&k| d[..k].contains(&d[k])) {
            return Err(LowerErrorKind::Invalid(format!("accumulator {twice} of `wgmma` is named twice")));
        }
        let places = if from_registers { "rs" } else { "ss" };
        let name = format!("wgmma.m{ROWS}n{n}k{depth}.{d_type:?}.{a:?}.{b:?}.{places}").to_lowercase();
        self.class = Some(Class::Matrix);
        self.emit_extra(
            Code::Wgmma,
            Extra::Wgmma(Box::new(Wgmma {
                n,
                k: depth,
                a_type,
                b_type,
                d_type,
                saturate,
                negated,
                c: d.clone(),
                d,
                a: a_operand,
                b: b_operand,
                b_turned,
                scale_d: (self.reg(scale, Width::Pred), scale_negated),
                name,
            })),
        );
        Ok(())
    }

    /// Takes the shape: N is a multiple of 8 to 256, of 16 above 24 for integers.
    fn wgmma_columns(&self, i: &Instruction, m: &mut Modifiers, depth: u32, integer: bool) -> Result<u32> {
        let n = (8..=256u32).step_by(8).find(|n| m.take(&format!("m{ROWS}n{n}k{depth}")));
        match n {
            Some(n) if !integer || n <= 24 || n.is_multiple_of(16) => Ok(n),
            _ => Err(unknown(i)),
        }
    }

    fn wgmma_sync(&mut self, i: &Instruction, mut m: Modifiers, kind: WgmmaSyncKind) -> Result<()> {
        if !m.take("sync") || !m.take("aligned") {
            return Err(unknown(i));
        }
        m.finish()?;
        let kind = match kind {
            WgmmaSyncKind::Wait(_) => {
                count(&i.operands, 1..=1)?;
                let Operand::Int(n @ 0..=0x7fff_ffff) = i.operands[0] else {
                    return Err(LowerErrorKind::Operand {
                        expected: "expected a number of groups".into(),
                        got: describe(&i.operands[0]),
                    });
                };
                WgmmaSyncKind::Wait(n as u32)
            }
            other => {
                count(&i.operands, 0..=0)?;
                other
            }
        };
        self.class = Some(Class::Synchronise);
        self.emit_extra(Code::WgmmaSync, Extra::WgmmaSync(WgmmaSync { kind, in_flight: Vec::new() }));
        Ok(())
    }

    pub(super) fn setmaxnreg(&mut self, i: &Instruction) -> Result<()> {
        self.warpgroup_target(i)?;
        let mut m = Modifiers::new(i);
        let increase = m.required("an action", &[("inc", true), ("dec", false)])?;
        if !m.take("sync") || !m.take("aligned") || m.last_type()? != Type::U32 {
            return Err(unknown(i));
        }
        m.finish()?;
        count(&i.operands, 1..=1)?;
        let Operand::Int(n @ 24..=256) = i.operands[0] else {
            return Err(register_count(&i.operands[0]));
        };
        if n % 8 != 0 {
            return Err(register_count(&i.operands[0]));
        }
        self.class = Some(Class::Control);
        self.emit_plain(Code::SetMaxRegisters, n as u32 | u32::from(increase) << 31);
        Ok(())
    }

    /// These exist on sm_90a alone.
    fn warpgroup_target(&self, i: &Instruction) -> Result<()> {
        if self.module.target == "sm_90a" {
            return Ok(());
        }
        Err(LowerErrorKind::Invalid(format!("`{}` needs `.target sm_90a`, not `{}`", i.opcode, self.module.target)))
    }
}

fn register_count(o: &Operand) -> LowerErrorKind {
    LowerErrorKind::Operand { expected: "expected a multiple of 8 from 24 to 256".into(), got: describe(o) }
}

fn eight_bit(ty: Type) -> MmaType {
    match ty {
        Type::E4M3 => MmaType::E4M3,
        Type::E5M2 => MmaType::E5M2,
        Type::S8 => MmaType::S8,
        _ => MmaType::U8,
    }
}
