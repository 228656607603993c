//! `ldmatrix`, `stmatrix`, `movmatrix` and `mma.sync` (PTX ISA 9.7.14).

use super::{Class, spelling, unknown};
use crate::lower::LowerErrorKind;
use crate::lower::builder::{Builder, Result};
use crate::lower::ir::{Extra, MatrixMove, Mma, MmaType, Op, Reg};
use crate::lower::isa::Code;
use crate::lower::modifiers::Modifiers;
use crate::lower::operands::{count, describe};
use crate::ptx::ast::{Instruction, Operand, Space, Type};

impl Builder<'_> {
    pub(super) fn matrix_move(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        let store = i.opcode == "stmatrix";
        if !m.take("sync") || !m.take("aligned") || !m.take("m8n8") {
            return Err(unknown(i));
        }
        let n = m.required("a count", &[("x1", 1), ("x2", 2), ("x4", 4)])?;
        let transposed = m.take("trans");
        let generic = m.one_of(&[("shared", ()), ("shared::cta", ())]).is_none();
        if m.last_type()? != Type::B16 {
            return Err(unknown(i));
        }
        m.finish()?;
        count(&i.operands, 2..=2)?;
        let (data, place) = if store { (1, 0) } else { (0, 1) };
        let (address, space) = self.address(&i.operands[place])?;
        if !matches!(space, None | Some(Space::Shared)) {
            return Err(LowerErrorKind::Operand {
                expected: "expected an address in shared memory".into(),
                got: describe(&i.operands[place]),
            });
        }
        let mut regs = Vec::with_capacity(n);
        for o in self.vector(&i.operands[data], n)? {
            regs.push(if store { self.source_reg(&o, Type::B32)? } else { self.dest_reg(&o, Type::B32)? });
        }
        self.class = Some(Class::MatrixMove);
        let inner = MatrixMove { address, transposed, generic: generic && space.is_none(), regs };
        self.emit_extra(if store { Code::StoreMatrix } else { Code::LoadMatrix }, Extra::MatrixMove { store, inner });
        Ok(())
    }

    /// Transposes an 8x8 matrix across the warp.
    pub(super) fn movmatrix(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        let named = ["sync", "aligned", "m8n8", "trans"].iter().all(|name| m.take(name));
        if !named || m.last_type()? != Type::B16 {
            return Err(unknown(i));
        }
        m.finish()?;
        count(&i.operands, 2..=2)?;
        let a = self.source(&i.operands[1], Type::B32)?;
        let d = self.dest(&i.operands[0], Type::B32)?;
        self.class = Some(Class::MatrixMove);
        self.push(Op { code: Code::MoveMatrix, guard: 0, d, a, b: 0, c: 0, x: 0 });
        Ok(())
    }

    /// An instruction of this architecture and later ones.
    fn needs(&self, i: &Instruction, architecture: u32) -> Result<()> {
        let target = &self.module.target;
        let number = target.strip_prefix("sm_").and_then(|t| t.trim_end_matches(['a', 'f']).parse::<u32>().ok());
        if number.is_some_and(|n| n >= architecture) {
            return Ok(());
        }
        Err(LowerErrorKind::Invalid(format!("`{}` needs sm_{architecture}, not `{target}`", spelling(i))))
    }

    pub(super) fn mma(&mut self, i: &Instruction) -> Result<()> {
        use Type::*;
        // Kinds of product that this device has not, by the modifier that says so.
        const ABSENT: [(&str, &str); 9] = [
            ("sp", "a sparse product"),
            ("sp::ordered_metadata", "a sparse product"),
            ("s4", "a product of 4-bit integers"),
            ("u4", "a product of 4-bit integers"),
            ("b1", "a product of single bits"),
            ("block_scale", "a block-scaled product"),
            ("kind::f8f6f4", "a product of sm_120a"),
            ("kind::mxf8f6f4", "a product of sm_120a"),
            ("kind::mxf4", "a product of sm_120a"),
        ];
        if let Some((_, what)) = ABSENT.iter().find(|(name, _)| i.modifiers.iter().any(|m| m == name)) {
            return Err(LowerErrorKind::Unsupported(format!("`{}`, {what}", spelling(i))));
        }
        let mut m = Modifiers::new(i);
        if !m.take("sync") || !m.take("aligned") {
            return Err(unknown(i));
        }
        let shape = m.required(
            "a shape",
            &[
                ("m16n8k4", (16, 8, 4)),
                ("m16n8k8", (16, 8, 8)),
                ("m16n8k16", (16, 8, 16)),
                ("m16n8k32", (16, 8, 32)),
                ("m8n8k4", (8, 8, 4)),
                ("m8n8k16", (8, 8, 16)),
            ],
        )?;
        // A by rows, B by columns; the modifiers' order says which is which.
        let row_first = i.modifiers.iter().find(|m| matches!(m.as_str(), "row" | "col")).is_some_and(|m| m == "row");
        if !m.take("row") || !m.take("col") || !row_first {
            return Err(unknown(i));
        }
        let c_type = m.last_type()?;
        let b = m.last_type()?;
        let a = m.last_type()?;
        let d_type = m.last_type()?;
        let saturate = c_type == S32 && m.take("satfinite");
        m.finish()?;
        let float_accumulator = matches!((d_type, c_type), (F32, F32));
        let half_accumulator = matches!((d_type, c_type), (F16, F16) | (F32, F32));
        let (a_type, b_type, registers, accumulators) = match (shape, a, b) {
            ((16, 8, 8), F16, F16) if half_accumulator => (MmaType::F16, MmaType::F16, (2, 1), 4),
            ((16, 8, 16), F16, F16) if half_accumulator => (MmaType::F16, MmaType::F16, (4, 2), 4),
            ((16, 8, 8), BF16, BF16) if float_accumulator => (MmaType::BF16, MmaType::BF16, (2, 1), 4),
            ((16, 8, 16), BF16, BF16) if float_accumulator => (MmaType::BF16, MmaType::BF16, (4, 2), 4),
            ((16, 8, 4), TF32, TF32) if float_accumulator => (MmaType::TF32, MmaType::TF32, (2, 1), 4),
            ((16, 8, 8), TF32, TF32) if float_accumulator => (MmaType::TF32, MmaType::TF32, (4, 2), 4),
            ((8, 8, 4), F64, F64) if (d_type, c_type) == (F64, F64) => (MmaType::F64, MmaType::F64, (1, 1), 2),
            ((16, 8, depth @ (4 | 8 | 16)), F64, F64) if (d_type, c_type) == (F64, F64) => {
                self.needs(i, 90)?;
                (MmaType::F64, MmaType::F64, (depth / 2, depth / 4), 4)
            }
            ((16, 8, depth @ (16 | 32)), E4M3 | E5M2, E4M3 | E5M2) if half_accumulator => {
                self.needs(i, 89)?;
                let ty = |t| if t == E4M3 { MmaType::E4M3 } else { MmaType::E5M2 };
                (ty(a), ty(b), (depth / 8, depth / 16), 4)
            }
            ((8, 8, 4), F16, F16) => {
                let what = format!("`{}`, the product of four quads of sm_70", spelling(i));
                return Err(LowerErrorKind::Unsupported(what));
            }
            (shape, S8 | U8, S8 | U8) if (d_type, c_type) == (S32, S32) => {
                let registers = match shape {
                    (8, 8, 16) => (1, 1),
                    (16, 8, 16) => (2, 1),
                    (16, 8, 32) => (4, 2),
                    _ => return Err(unknown(i)),
                };
                let ty = |t| if t == S8 { MmaType::S8 } else { MmaType::U8 };
                (ty(a), ty(b), registers, if shape.0 == 8 { 2 } else { 4 })
            }
            _ => return Err(unknown(i)),
        };
        count(&i.operands, 4..=4)?;
        let factor = if a == F64 { F64 } else { B32 };
        let accumulator = |ty: Type| match ty {
            F16 => (F16x2, accumulators / 2),
            other => (other, accumulators),
        };
        let sources = |this: &mut Self, o: &Operand, ty: Type, n: usize| -> Result<Vec<Reg>> {
            this.vector(o, n)?.iter().map(|o| this.source_reg(o, ty)).collect()
        };
        let a_regs = sources(self, &i.operands[1], factor, registers.0)?;
        let b_regs = sources(self, &i.operands[2], factor, registers.1)?;
        let (ty, n) = accumulator(c_type);
        let c_regs = sources(self, &i.operands[3], ty, n)?;
        let (ty, n) = accumulator(d_type);
        let mut d_regs = Vec::with_capacity(n);
        for o in self.vector(&i.operands[0], n)? {
            d_regs.push(self.dest_reg(&o, ty)?);
        }
        let (rows, columns, depth) = shape;
        let name = format!("m{rows}n{columns}k{depth}.{d_type:?}.{a:?}.{b:?}.{c_type:?}").to_lowercase();
        self.class = Some(Class::Matrix);
        self.emit_extra(
            Code::Mma,
            Extra::Mma(Mma {
                m: rows,
                a_type,
                b_type,
                c_type,
                d_type,
                saturate,
                d: d_regs,
                a: a_regs,
                b: b_regs,
                c: c_regs,
                name,
            }),
        );
        Ok(())
    }
}
