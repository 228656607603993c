//! Instructions on mbarrier objects (PTX ISA 9.7.13.15).

use super::memory::SCOPES;
use super::{Class, unknown};
use crate::lower::LowerErrorKind;
use crate::lower::builder::{Builder, Result};
use crate::lower::ir::{Extra, Order, Reg, Scope};
use crate::lower::ir_mbarrier::{Mbarrier, MbarrierKind};
use crate::lower::isa::Code;
use crate::lower::modifiers::Modifiers;
use crate::lower::operands::{count, describe};
use crate::ptx::ast::{Instruction, Operand, Space, Type};

/// Counts and bits that an mbarrier object has room for (PTX ISA 9.7.13.15.2).
pub const MAX_COUNT: u32 = (1 << 20) - 1;

impl Builder<'_> {
    pub(super) fn mbarrier(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        let name = m.required(
            "an operation",
            &[
                ("init", "init"),
                ("inval", "inval"),
                ("arrive", "arrive"),
                ("arrive_drop", "arrive_drop"),
                ("test_wait", "test_wait"),
                ("try_wait", "try_wait"),
                ("pending_count", "pending_count"),
                // After `arrive`, which comes first where both are there.
                ("expect_tx", "expect_tx"),
                ("complete_tx", "complete_tx"),
            ],
        )?;
        match name {
            "pending_count" => self.pending_count(i, m),
            "init" | "inval" => self.mbarrier_life(i, m, name == "init"),
            "arrive" | "arrive_drop" => self.mbarrier_arrive(i, m, name == "arrive_drop"),
            "expect_tx" | "complete_tx" => self.mbarrier_transactions(i, m, name == "expect_tx"),
            _ => self.mbarrier_wait(i, m, name == "try_wait"),
        }
    }

    /// `.sem.scope`, which come together.
    fn order_and_scope(&self, i: &Instruction, m: &mut Modifiers, default: Order) -> Result<(Order, Scope)> {
        let strong = if default == Order::Acquire { "acquire" } else { "release" };
        let order = m.one_of(&[(strong, default), ("relaxed", Order::Relaxed)]);
        let scope = m.one_of(&SCOPES[..2]);
        if order.is_some() != scope.is_some() {
            return Err(unknown(i));
        }
        Ok((order.unwrap_or(default), scope.unwrap_or(Scope::Cta)))
    }

    /// `.shared`, `.shared::cta` and, where allowed, `.shared::cluster`; `None` for generic addresses.
    fn shared_space(m: &mut Modifiers, cluster: bool) -> Option<Space> {
        let spaces =
            [("shared", Space::Shared), ("shared::cta", Space::Shared), ("shared::cluster", Space::SharedCluster)];
        m.one_of(if cluster { &spaces } else { &spaces[..2] })
    }

    /// `.b64`, and nothing after it.
    fn ends_in_b64(i: &Instruction, mut m: Modifiers) -> Result<()> {
        if m.last_type()? != Type::B64 {
            return Err(unknown(i));
        }
        m.finish()
    }

    /// Finishes an instruction on the object at `address`.
    fn emit_mbarrier(&mut self, address: &Operand, space: Option<Space>, mut x: Mbarrier) -> Result<()> {
        let (place, of_symbol) = self.address(address)?;
        if !matches!(of_symbol, None | Some(Space::Shared)) {
            return Err(LowerErrorKind::Operand {
                expected: "expected an address in shared memory".into(),
                got: describe(address),
            });
        }
        (x.address, x.space) = (place, space.or(of_symbol));
        self.class = Some(Class::Synchronise);
        self.emit_extra(Code::Mbarrier, Extra::Mbarrier(x));
        Ok(())
    }

    fn blank(&mut self, kind: MbarrierKind, order: Order, scope: Scope) -> Mbarrier {
        // The address is set when the instruction is finished.
        let base = self.constant64(0);
        let address = crate::lower::ir::Address { base: self.reg(base, crate::lower::isa::Width::W64), offset: 0 };
        Mbarrier { kind, space: None, address, order, scope, d: None, a: None, hint: None }
    }

    /// A count, checked where it is a constant.
    fn mbarrier_count(&mut self, o: &Operand, least: i128) -> Result<Reg> {
        if let Operand::Int(n) = o
            && !(least..=MAX_COUNT.into()).contains(n)
        {
            let expected = format!("expected a count from {least} to {MAX_COUNT}");
            return Err(LowerErrorKind::Operand { expected, got: describe(o) });
        }
        self.source_reg(o, Type::U32)
    }

    /// `init [addr], count`, `inval [addr]`
    fn mbarrier_life(&mut self, i: &Instruction, mut m: Modifiers, init: bool) -> Result<()> {
        let space = Self::shared_space(&mut m, false);
        Self::ends_in_b64(i, m)?;
        let n = 1 + usize::from(init);
        count(&i.operands, n..=n)?;
        let kind = if init { MbarrierKind::Init } else { MbarrierKind::Inval };
        let mut x = self.blank(kind, Order::Weak, Scope::Cta);
        if init {
            x.a = Some(self.mbarrier_count(&i.operands[1], 1)?);
        }
        self.emit_mbarrier(&i.operands[0], space, x)
    }

    /// `arrive{.expect_tx|.noComplete}{.sem.scope}{.space} state, [addr]{, count}`
    fn mbarrier_arrive(&mut self, i: &Instruction, mut m: Modifiers, drop: bool) -> Result<()> {
        let expect = m.take("expect_tx");
        let no_complete = !expect && m.take("noComplete");
        let (order, scope) = self.order_and_scope(i, &mut m, Order::Release)?;
        if no_complete && (order, scope) != (Order::Release, Scope::Cta) {
            return Err(unknown(i));
        }
        let space = Self::shared_space(&mut m, !no_complete);
        Self::ends_in_b64(i, m)?;
        count(&i.operands, if expect || no_complete { 3..=3 } else { 2..=3 })?;
        let mut x = self.blank(MbarrierKind::Arrive { drop, no_complete, expect }, order, scope);
        match &i.operands[0] {
            Operand::Sink => {}
            o if space == Some(Space::SharedCluster) => {
                return Err(LowerErrorKind::Operand {
                    expected: "expected `_`, for an arrival in `.shared::cluster` returns no state".into(),
                    got: describe(o),
                });
            }
            o => x.d = Some(self.dest_reg(o, Type::B64)?),
        }
        if let Some(o) = i.operands.get(2) {
            x.a = Some(self.mbarrier_count(o, i128::from(!expect))?);
        }
        self.emit_mbarrier(&i.operands[1], space, x)
    }

    /// `expect_tx`, `complete_tx{.relaxed.scope}{.space} [addr], count`
    fn mbarrier_transactions(&mut self, i: &Instruction, mut m: Modifiers, expect: bool) -> Result<()> {
        let (relaxed, scope) = (m.take("relaxed"), m.one_of(&SCOPES[..2]));
        if relaxed != scope.is_some() {
            return Err(unknown(i));
        }
        let space = Self::shared_space(&mut m, true);
        Self::ends_in_b64(i, m)?;
        count(&i.operands, 2..=2)?;
        let kind = if expect { MbarrierKind::ExpectTx } else { MbarrierKind::CompleteTx };
        let mut x = self.blank(kind, Order::Relaxed, scope.unwrap_or(Scope::Cta));
        x.a = Some(self.mbarrier_count(&i.operands[1], 0)?);
        self.emit_mbarrier(&i.operands[0], space, x)
    }

    /// `test_wait`, `try_wait{.parity}{.sem.scope}{.space} p, [addr], state or parity{, hint}`
    fn mbarrier_wait(&mut self, i: &Instruction, mut m: Modifiers, suspends: bool) -> Result<()> {
        let parity = m.take("parity");
        let (order, scope) = self.order_and_scope(i, &mut m, Order::Acquire)?;
        let space = Self::shared_space(&mut m, false);
        Self::ends_in_b64(i, m)?;
        count(&i.operands, if suspends { 3..=4 } else { 3..=3 })?;
        let mut x = self.blank(MbarrierKind::Wait { suspends, parity }, order, scope);
        x.a = Some(self.source_reg(&i.operands[2], if parity { Type::B32 } else { Type::B64 })?);
        if let Some(o) = i.operands.get(3) {
            x.hint = Some(self.source_reg(o, Type::U32)?);
        }
        x.d = Some(self.dest_reg(&i.operands[0], Type::Pred)?);
        self.emit_mbarrier(&i.operands[1], space, x)
    }

    /// `pending_count.b64 count, state`: the low bits of a state are the pending count.
    fn pending_count(&mut self, i: &Instruction, m: Modifiers) -> Result<()> {
        Self::ends_in_b64(i, m)?;
        count(&i.operands, 2..=2)?;
        let state = self.source(&i.operands[1], Type::B64)?;
        let d = self.dest(&i.operands[0], Type::U32)?;
        let mask = self.constant32(MAX_COUNT);
        let low = self.compute(Code::Low32, &[state]);
        self.emit(Code::And32, d, &[low, mask]);
        Ok(())
    }

    /// `cp.async.mbarrier.arrive{.noinc}{.space}.b64 [addr]`, after `async` and `mbarrier` have been taken.
    pub(super) fn copy_arrive(&mut self, i: &Instruction, mut m: Modifiers) -> Result<()> {
        if !m.take("arrive") {
            return Err(unknown(i));
        }
        let increment = !m.take("noinc");
        let space = Self::shared_space(&mut m, false);
        Self::ends_in_b64(i, m)?;
        count(&i.operands, 1..=1)?;
        let x = self.blank(MbarrierKind::CopyArrive { increment }, Order::Relaxed, Scope::Cta);
        self.emit_mbarrier(&i.operands[0], space, x)
    }
}
