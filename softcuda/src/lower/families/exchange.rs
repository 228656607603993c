//! Exchanges between the lanes of a warp (PTX ISA 9.7.9.6, 9.7.13).

use super::{Class, unknown};
use crate::lower::builder::{Builder, Result};
use crate::lower::ir::{AtomOp, Exchange, ExchangeKind, Extra, Op, Reg, ShflMode, VoteMode};
use crate::lower::isa::{Code, Width};
use crate::lower::modifiers::Modifiers;
use crate::lower::operands::count;
use crate::ptx::ast::{Instruction, Operand, Type};

impl Builder<'_> {
    /// `d|p` or `d`; `_` leaves one out.
    fn pair(&mut self, o: &Operand, ty: Type) -> Result<(Option<Reg>, Option<Reg>)> {
        let (d, p) = match o {
            Operand::Pair(d, p) => (&**d, Some(&**p)),
            d => (d, None),
        };
        let d = if matches!(d, Operand::Sink) { None } else { Some(self.dest_reg(d, ty)?) };
        let p = match p {
            None | Some(Operand::Sink) => None,
            Some(p) => Some(self.dest_reg(p, Type::Pred)?),
        };
        Ok((d, p))
    }

    fn exchange(&mut self, x: Exchange) {
        self.emit_extra(Code::Exchange, Extra::Exchange(x));
    }

    /// The mask of lanes that take part: the operand that `.sync` adds, else the lanes that execute the instruction together.
    fn members(&mut self, mask: Option<&Operand>) -> Result<Reg> {
        match mask {
            Some(o) => self.source_reg(o, Type::B32),
            None => {
                let d = self.temp(Width::W32);
                self.push(Op { code: Code::Activemask, guard: 0, d, a: 0, b: 0, c: 0, x: 0 });
                Ok(self.reg(d, Width::W32))
            }
        }
    }

    pub(super) fn shfl(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        let sync = m.take("sync");
        let mode = m.required(
            "a mode",
            &[("up", ShflMode::Up), ("down", ShflMode::Down), ("bfly", ShflMode::Bfly), ("idx", ShflMode::Idx)],
        )?;
        if m.last_type()? != Type::B32 {
            return Err(unknown(i));
        }
        m.finish()?;
        let arity = if sync { 5 } else { 4 };
        count(&i.operands, arity..=arity)?;
        self.class = Some(Class::Exchange);
        let a = self.source_reg(&i.operands[1], Type::B32)?;
        let b = self.source_reg(&i.operands[2], Type::B32)?;
        let c = self.source_reg(&i.operands[3], Type::B32)?;
        let members = self.members(i.operands.get(4))?;
        let (d, p) = self.pair(&i.operands[0], Type::B32)?;
        if d.is_none() {
            return Err(unknown(i));
        }
        self.exchange(Exchange { kind: ExchangeKind::Shfl(mode), members, d, p, a: Some(a), b: Some(b), c: Some(c) });
        Ok(())
    }

    pub(super) fn vote(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        let sync = m.take("sync");
        let mode = m.required(
            "a mode",
            &[("all", VoteMode::All), ("any", VoteMode::Any), ("uni", VoteMode::Uni), ("ballot", VoteMode::Ballot)],
        )?;
        let ty = m.last_type()?;
        m.finish()?;
        let expected = if mode == VoteMode::Ballot { Type::B32 } else { Type::Pred };
        if ty != expected {
            return Err(unknown(i));
        }
        let arity = if sync { 3 } else { 2 };
        count(&i.operands, arity..=arity)?;
        self.class = Some(Class::Exchange);
        let (a, negated) = self.predicate_source(&i.operands[1])?;
        let a = self.reg(a, Width::Pred);
        let members = self.members(i.operands.get(2))?;
        let d = self.dest_reg(&i.operands[0], ty)?;
        let (d, p) = if mode == VoteMode::Ballot { (Some(d), None) } else { (None, Some(d)) };
        self.exchange(Exchange {
            kind: ExchangeKind::Vote(mode, negated),
            members,
            d,
            p,
            a: Some(a),
            b: None,
            c: None,
        });
        Ok(())
    }

    pub(super) fn match_sync(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        let sync = m.take("sync");
        let kind = m.required("a mode", &[("any", ExchangeKind::MatchAny), ("all", ExchangeKind::MatchAll)])?;
        let ty = m.last_type()?;
        m.finish()?;
        let paired = matches!(i.operands.first(), Some(Operand::Pair(..)));
        if !matches!(ty, Type::B32 | Type::B64) || !sync || paired && kind == ExchangeKind::MatchAny {
            return Err(unknown(i));
        }
        count(&i.operands, 3..=3)?;
        let a = self.source_reg(&i.operands[1], ty)?;
        let members = self.source_reg(&i.operands[2], Type::B32)?;
        let (d, p) = self.pair(&i.operands[0], Type::B32)?;
        self.class = Some(Class::Exchange);
        self.exchange(Exchange { kind, members, d, p, a: Some(a), b: None, c: None });
        Ok(())
    }

    pub(super) fn redux(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        let sync = m.take("sync");
        let op = m.required(
            "an operation",
            &[
                ("add", AtomOp::Add),
                ("min", AtomOp::Min),
                ("max", AtomOp::Max),
                ("and", AtomOp::And),
                ("or", AtomOp::Or),
                ("xor", AtomOp::Xor),
            ],
        )?;
        let ty = m.last_type()?;
        m.finish()?;
        let logic = matches!(op, AtomOp::And | AtomOp::Or | AtomOp::Xor);
        let allowed = if logic { ty == Type::B32 } else { matches!(ty, Type::U32 | Type::S32) };
        if !allowed || !sync {
            return Err(unknown(i));
        }
        count(&i.operands, 3..=3)?;
        let a = self.source_reg(&i.operands[1], ty)?;
        let members = self.source_reg(&i.operands[2], Type::B32)?;
        let d = self.dest_reg(&i.operands[0], ty)?;
        self.class = Some(Class::Exchange);
        self.exchange(Exchange {
            kind: ExchangeKind::Redux(op, ty),
            members,
            d: Some(d),
            p: None,
            a: Some(a),
            b: None,
            c: None,
        });
        Ok(())
    }

    pub(super) fn elect(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        if !m.take("sync") {
            return Err(unknown(i));
        }
        m.finish()?;
        count(&i.operands, 2..=2)?;
        let members = self.source_reg(&i.operands[1], Type::B32)?;
        let (d, p) = self.pair(&i.operands[0], Type::B32)?;
        self.class = Some(Class::Exchange);
        self.exchange(Exchange { kind: ExchangeKind::Elect, members, d, p, a: None, b: None, c: None });
        Ok(())
    }

    pub(super) fn activemask(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        if m.last_type()? != Type::B32 {
            return Err(unknown(i));
        }
        m.finish()?;
        count(&i.operands, 1..=1)?;
        self.class = Some(Class::Exchange);
        let d = self.dest(&i.operands[0], Type::B32)?;
        self.push(Op { code: Code::Activemask, guard: 0, d, a: 0, b: 0, c: 0, x: 0 });
        Ok(())
    }
}
