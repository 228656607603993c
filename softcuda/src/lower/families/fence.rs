//! Fences that are restricted or between proxies (PTX ISA 9.7.13.4), and `griddepcontrol` (9.7.13.13).

use super::memory::SCOPES;
use super::{Class, unknown};
use crate::lower::LowerErrorKind;
use crate::lower::builder::{Builder, Result};
use crate::lower::ir::{Extra, Order, ProxyFence, Scope};
use crate::lower::isa::Code;
use crate::lower::modifiers::Modifiers;
use crate::lower::operands::{count, describe};
use crate::ptx::ast::{Instruction, Operand, Space};

const TO_CLUSTER: &str = "sync_restrict::shared::cluster";
const FROM_CTA: &str = "sync_restrict::shared::cta";

impl Builder<'_> {
    /// Lowers a fence that is not a plain one; `false` for those.
    pub(super) fn restricted_fence(&mut self, i: &Instruction) -> Result<bool> {
        let mut m = Modifiers::new(i);
        let release = |m: &mut Modifiers| m.take("release");
        let kind = if m.take("proxy") {
            if m.take("alias") {
                ProxyFence::Alias
            } else if m.take("async") {
                ProxyFence::Async(m.one_of(&[
                    ("global", Space::Global),
                    ("shared::cta", Space::Shared),
                    ("shared::cluster", Space::SharedCluster),
                ]))
            } else if i.opcode == "fence" && m.take("tensormap::generic") {
                let released = release(&mut m);
                if !released && !m.take("acquire") {
                    return Err(unknown(i));
                }
                let scope = m.required("a scope", SCOPES)?;
                if !released {
                    return self.tensormap_acquire(i, m, scope).map(|()| true);
                }
                ProxyFence::TensormapRelease(scope)
            } else if i.opcode == "fence" && m.take("async::generic") {
                match self.restriction(i, &mut m)? {
                    Order::Release => ProxyFence::AsyncRelease,
                    _ => ProxyFence::AsyncAcquire,
                }
            } else {
                return Err(unknown(i));
            }
        } else if i.opcode == "fence" && m.take("mbarrier_init") {
            if !release(&mut m) || !m.take("cluster") {
                return Err(unknown(i));
            }
            ProxyFence::MbarrierInit
        } else if i.modifiers.iter().any(|m| m == TO_CLUSTER || m == FROM_CTA) {
            let order = self.restriction(i, &mut m)?;
            m.finish()?;
            count(&i.operands, 0..=0)?;
            self.class = Some(Class::Synchronise);
            self.emit_extra(Code::Fence, Extra::Fence(order, Scope::Cluster));
            return Ok(true);
        } else {
            return Ok(false);
        };
        m.finish()?;
        count(&i.operands, 0..=0)?;
        self.class = Some(Class::Synchronise);
        self.emit_extra(Code::ProxyFence, Extra::ProxyFence(kind, None));
        Ok(true)
    }

    /// `.acquire.sync_restrict::shared::cluster.cluster` or `.release.sync_restrict::shared::cta.cluster`
    fn restriction(&self, i: &Instruction, m: &mut Modifiers) -> Result<Order> {
        let order = m.required("an order", &[("acquire", Order::Acquire), ("release", Order::Release)])?;
        let space = if order == Order::Acquire { TO_CLUSTER } else { FROM_CTA };
        if !m.take(space) || !m.take("cluster") {
            return Err(unknown(i));
        }
        Ok(order)
    }

    /// `fence.proxy.tensormap::generic.acquire.scope [addr], 128`
    fn tensormap_acquire(&mut self, i: &Instruction, m: Modifiers, scope: Scope) -> Result<()> {
        m.finish()?;
        count(&i.operands, 2..=2)?;
        if i.operands[1] != Operand::Int(128) {
            return Err(LowerErrorKind::Operand {
                expected: "expected the size 128".into(),
                got: describe(&i.operands[1]),
            });
        }
        let (address, space) = self.address(&i.operands[0])?;
        if !matches!(space, None | Some(Space::Global)) {
            return Err(LowerErrorKind::Operand {
                expected: "expected an address in global memory".into(),
                got: describe(&i.operands[0]),
            });
        }
        self.class = Some(Class::Synchronise);
        let kind = ProxyFence::TensormapAcquire(scope);
        self.emit_extra(Code::ProxyFence, Extra::ProxyFence(kind, Some(address)));
        Ok(())
    }

    /// Grids run one after another, so that a prerequisite has always completed, and dependents may launch later than they
    /// are allowed to.
    pub(super) fn griddepcontrol(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        let waits = m.required("an action", &[("launch_dependents", false), ("wait", true)])?;
        m.finish()?;
        count(&i.operands, 0..=0)?;
        self.class = Some(Class::Synchronise);
        self.emit_plain(if waits { Code::GridWait } else { Code::Nop }, 0);
        Ok(())
    }
}
