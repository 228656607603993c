//! Barriers, fences and sleep (PTX ISA 9.7.13, 9.7.19).

use super::memory::SCOPES;
use super::{Class, unknown};
use crate::lower::LowerErrorKind;
use crate::lower::builder::{Builder, Result};
use crate::lower::ir::{Barrier, BarrierKind, Exchange, ExchangeKind, Extra, Order, Scope};
use crate::lower::isa::{Code, Width};
use crate::lower::modifiers::Modifiers;
use crate::lower::operands::{count, describe};
use crate::ptx::ast::{Instruction, Operand, Type};

impl Builder<'_> {
    pub(super) fn barrier(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        self.class = Some(Class::Synchronise);
        if m.take("warp") {
            if !m.take("sync") || i.opcode != "bar" {
                return Err(unknown(i));
            }
            m.finish()?;
            count(&i.operands, 1..=1)?;
            let members = self.source_reg(&i.operands[0], Type::B32)?;
            let x = Exchange { kind: ExchangeKind::Barrier, members, d: None, p: None, a: None, b: None, c: None };
            self.emit_extra(Code::Exchange, Extra::Exchange(x));
            return Ok(());
        }
        if i.opcode == "barrier" && m.take("cluster") {
            return self.cluster_barrier(i, m);
        }
        m.take("cta");
        let aligned = i.opcode == "bar" || m.take("aligned");
        let operands = i.operands.as_slice();
        if m.take("red") {
            let kind = m.required(
                "an operation",
                &[("popc", BarrierKind::RedPopc), ("and", BarrierKind::RedAnd), ("or", BarrierKind::RedOr)],
            )?;
            let ty = if kind == BarrierKind::RedPopc { Type::U32 } else { Type::Pred };
            if m.last_type()? != ty {
                return Err(unknown(i));
            }
            m.finish()?;
            count(operands, 3..=4)?;
            let id = self.barrier_id(&operands[1])?;
            let threads = if operands.len() == 4 { Some(self.barrier_count(&operands[2])?) } else { None };
            let (p, negated) = self.predicate_source(&operands[operands.len() - 1])?;
            let d = self.dest_reg(&operands[0], ty)?;
            let p = Some((self.reg(p, Width::Pred), negated));
            self.emit_extra(
                Code::Barrier,
                Extra::Barrier(Barrier { kind, aligned, id, count: threads, d: Some(d), p }),
            );
            return Ok(());
        }
        let kind = m.required("an operation", &[("sync", BarrierKind::Sync), ("arrive", BarrierKind::Arrive)])?;
        m.finish()?;
        count(operands, if kind == BarrierKind::Arrive { 2..=2 } else { 1..=2 })?;
        let id = self.barrier_id(&operands[0])?;
        let threads = match operands.get(1) {
            Some(o) => Some(self.barrier_count(o)?),
            None => None,
        };
        self.emit_extra(Code::Barrier, Extra::Barrier(Barrier { kind, aligned, id, count: threads, d: None, p: None }));
        Ok(())
    }

    fn barrier_id(&mut self, o: &Operand) -> Result<crate::lower::ir::Reg> {
        if let Operand::Int(n) = o
            && !(0..16).contains(n)
        {
            return Err(LowerErrorKind::Operand {
                expected: "expected a barrier from 0 to 15".into(),
                got: describe(o),
            });
        }
        self.source_reg(o, Type::U32)
    }

    fn barrier_count(&mut self, o: &Operand) -> Result<crate::lower::ir::Reg> {
        if let Operand::Int(n) = o
            && (*n <= 0 || n % 32 != 0 || *n > 1024)
        {
            return Err(LowerErrorKind::Operand {
                expected: "expected a thread count that is a multiple of 32".into(),
                got: describe(o),
            });
        }
        self.source_reg(o, Type::U32)
    }

    /// The executor takes all orders and scopes as the strongest one; checkers are told what they are.
    pub(super) fn fence(&mut self, i: &Instruction) -> Result<()> {
        if self.restricted_fence(i)? {
            return Ok(());
        }
        let mut m = Modifiers::new(i);
        let (order, scope) = if i.opcode == "membar" {
            // `membar.{cta,gl,sys}` is `fence.sc` of the scope (PTX ISA 9.7.13.4).
            let levels = &[("cta", Scope::Cta), ("gl", Scope::Gpu), ("sys", Scope::Sys)];
            (Order::SeqCst, m.required("a level", levels)?)
        } else {
            let orders = [
                ("sc", Order::SeqCst),
                ("acq_rel", Order::AcqRel),
                ("acquire", Order::Acquire),
                ("release", Order::Release),
            ];
            // Without one it is `.acq_rel`.
            (m.one_of(&orders).unwrap_or(Order::AcqRel), m.required("a scope", SCOPES)?)
        };
        m.finish()?;
        count(&i.operands, 0..=0)?;
        self.class = Some(Class::Synchronise);
        self.emit_extra(Code::Fence, Extra::Fence(order, scope));
        Ok(())
    }

    pub(super) fn nanosleep(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        if m.last_type()? != Type::U32 {
            return Err(unknown(i));
        }
        m.finish()?;
        count(&i.operands, 1..=1)?;
        let t = self.source_reg(&i.operands[0], Type::U32)?;
        self.class = Some(Class::Control);
        self.emit_extra(Code::Sleep, Extra::Reads(vec![t]));
        Ok(())
    }
}
