//! Bulk copies and their groups (PTX ISA 9.7.9.25.4, 9.7.9.27.2), `st.async` (9.7.9.12) and `red.async` (9.7.13.7).

use super::{Class, unknown};
use crate::lower::LowerErrorKind;
use crate::lower::builder::{Builder, Result};
use crate::lower::ir::{Address, AtomOp, Extra, Reg};
use crate::lower::ir_bulk::reduction_allowed;
use crate::lower::ir_bulk::{AsyncStore, BulkCopy, BulkOp};
use crate::lower::isa::Code;
use crate::lower::modifiers::Modifiers;
use crate::lower::operands::{count, describe, dotted};
use crate::ptx::ast::{Instruction, Operand, Space, Type};

pub(super) const REDUCTIONS: &[(&str, AtomOp)] = &[
    ("add", AtomOp::Add),
    ("min", AtomOp::Min),
    ("max", AtomOp::Max),
    ("inc", AtomOp::Inc),
    ("dec", AtomOp::Dec),
    ("and", AtomOp::And),
    ("or", AtomOp::Or),
    ("xor", AtomOp::Xor),
];

pub(super) const COMPLETE_TX: &str = "mbarrier::complete_tx::bytes";

impl Builder<'_> {
    pub(super) fn emit_bulk(&mut self, x: BulkOp) {
        self.class = Some(Class::AsyncCopy);
        self.emit_extra(Code::Bulk, Extra::Bulk(x));
    }

    /// An address in one of the given spaces; a bare register is taken to be in the right one.
    pub(super) fn address_in(&mut self, o: &Operand, spaces: &[Space]) -> Result<Address> {
        let (address, of_symbol) = self.address(o)?;
        match of_symbol {
            Some(s) if !spaces.contains(&s) => Err(LowerErrorKind::Operand {
                expected: format!("expected an address in {}", dotted(spaces[0])),
                got: format!("{} in {}", describe(o), dotted(s)),
            }),
            _ => Ok(address),
        }
    }

    /// `cp.async.bulk...` and `cp.reduce.async.bulk...`, after `async`, `bulk` and `reduce` have been taken.
    pub(super) fn bulk(&mut self, i: &Instruction, mut m: Modifiers, reduces: bool) -> Result<()> {
        if !reduces {
            if m.take("commit_group") {
                m.finish()?;
                count(&i.operands, 0..=0)?;
                self.emit_bulk(BulkOp::Commit);
                return Ok(());
            }
            if m.take("wait_group") {
                let read = m.take("read");
                m.finish()?;
                count(&i.operands, 1..=1)?;
                let Operand::Int(n @ 0..=0x7fff_ffff) = i.operands[0] else {
                    return Err(LowerErrorKind::Operand {
                        expected: "expected a number of groups".into(),
                        got: describe(&i.operands[0]),
                    });
                };
                self.emit_bulk(BulkOp::Wait { keep: n as u32, read });
                return Ok(());
            }
            if m.take("prefetch") {
                return if m.take("tensor") { self.tensor_prefetch(i, m) } else { self.bulk_prefetch(i, m) };
            }
        }
        if m.take("tensor") { self.tensor_copy(i, m, reduces) } else { self.bulk_copy(i, m, reduces) }
    }

    /// `cp.async.bulk.prefetch.L2.global{.L2::cache_hint} [from], size{, policy}`
    fn bulk_prefetch(&mut self, i: &Instruction, mut m: Modifiers) -> Result<()> {
        if !m.take("L2") || !m.take("global") {
            return Err(unknown(i));
        }
        let (operands, _) = self.without_policy(i, &mut m)?;
        m.finish()?;
        count(operands, 2..=2)?;
        let from = self.address_in(&operands[0], &[Space::Global])?;
        let bytes = self.bulk_size(&operands[1])?;
        self.emit_bulk(BulkOp::Prefetch { from, bytes });
        Ok(())
    }

    /// A size in bytes, checked where it is a constant.
    fn bulk_size(&mut self, o: &Operand) -> Result<Reg> {
        if let Operand::Int(n) = o
            && (*n < 0 || n % 16 != 0)
        {
            return Err(LowerErrorKind::Operand {
                expected: "expected a size that is a multiple of 16".into(),
                got: describe(o),
            });
        }
        self.source_reg(o, Type::U32)
    }

    /// Destination and source space, in this order.
    pub(super) fn directions(i: &Instruction, m: &mut Modifiers) -> Result<(Space, Space)> {
        // A space that occurs first is the destination.
        let order: Vec<&str> = i
            .modifiers
            .iter()
            .map(String::as_str)
            .filter(|m| matches!(*m, "global" | "shared::cta" | "shared::cluster"))
            .collect();
        order.iter().for_each(|name| {
            m.take(name);
        });
        Ok(match order[..] {
            ["shared::cta", "global"] => (Space::Shared, Space::Global),
            ["shared::cluster", "global"] => (Space::SharedCluster, Space::Global),
            ["shared::cluster", "shared::cta"] => (Space::SharedCluster, Space::Shared),
            ["global", "shared::cta"] => (Space::Global, Space::Shared),
            _ => return Err(unknown(i)),
        })
    }

    fn bulk_copy(&mut self, i: &Instruction, mut m: Modifiers, reduces: bool) -> Result<()> {
        let (to_space, from_space) = Self::directions(i, &mut m)?;
        let to_global = to_space == Space::Global;
        if !m.take(if to_global { "bulk_group" } else { COMPLETE_TX }) {
            return Err(unknown(i));
        }
        let reduce = if reduces {
            if from_space != Space::Shared {
                return Err(unknown(i));
            }
            let op = m.required("an operation", REDUCTIONS)?;
            let noftz = m.take("noftz");
            let ty = m.last_type()?;
            let halves = op == AtomOp::Add && matches!(ty, Type::F16 | Type::BF16);
            if !reduction_allowed(op, ty, !to_global) || noftz != halves {
                return Err(unknown(i));
            }
            Some((op, ty))
        } else {
            None
        };
        let multicast = (to_space, from_space) == (Space::SharedCluster, Space::Global) && m.take("multicast::cluster");
        if to_global && m.take("cp_mask") {
            return Err(LowerErrorKind::Unsupported("`.cp_mask`, which needs sm_100,".into()));
        }
        // Copies between blocks know no cache.
        let (operands, policy) = if from_space == Space::Shared && !to_global {
            (&i.operands[..], None)
        } else {
            self.without_policy(i, &mut m)?
        };
        m.finish()?;
        let n = 3 + usize::from(!to_global) + usize::from(multicast);
        count(operands, n..=n)?;
        let to = self.address_in(&operands[0], &[to_space, Space::Shared][..1 + usize::from(!to_global)])?;
        let from = self.address_in(&operands[1], &[from_space])?;
        let bytes = self.bulk_size(&operands[2])?;
        let mbarrier = if to_global { None } else { Some(self.address_in(&operands[3], &[Space::Shared])?) };
        let multicast = if multicast { Some(self.source_reg(&operands[4], Type::B16)?) } else { None };
        self.emit_bulk(BulkOp::Copy(BulkCopy {
            to_space,
            to,
            from_space,
            from,
            bytes,
            mbarrier,
            multicast,
            reduce,
            policy,
        }));
        Ok(())
    }

    /// `st.async{.weak}{.space}.mbarrier::complete_tx::bytes{.vec}.type [a], b, [mbar]` and
    /// `red.async.relaxed.cluster{.space}.mbarrier::complete_tx::bytes.op.type [a], b, [mbar]`
    pub(super) fn store_async(&mut self, i: &Instruction) -> Result<()> {
        use Type::*;
        let mut m = Modifiers::new(i);
        m.take("async");
        let reduces = i.opcode == "red";
        if reduces {
            if !m.take("relaxed") || !m.take("cluster") {
                return Err(unknown(i));
            }
        } else if !m.take("weak") {
            m.take("cluster");
        }
        let space = m.one_of(&[("shared::cluster", Space::SharedCluster)]);
        if !m.take(COMPLETE_TX) {
            return Err(unknown(i));
        }
        let (reduce, ty, n) = if reduces {
            let op = m.required("an operation", REDUCTIONS)?;
            let ty = m.last_type()?;
            if !reduction_allowed(op, ty, true) {
                return Err(unknown(i));
            }
            (Some((op, ty)), ty, 1)
        } else {
            let n = m.one_of(&[("v2", 2), ("v4", 4)]).unwrap_or(1);
            let ty = m.last_type()?;
            if !matches!(ty, B32 | B64 | U32 | U64 | S32 | S64 | F32 | F64) || n as u32 * ty.bytes() > 16 {
                return Err(unknown(i));
            }
            (None, ty, n)
        };
        m.finish()?;
        count(&i.operands, 3..=3)?;
        let to = self.address_in(&i.operands[0], &[Space::SharedCluster])?;
        let mut values = Vec::with_capacity(n);
        for o in self.vector(&i.operands[1], n)? {
            values.push(self.source_reg(&o, ty)?);
        }
        let mbarrier = self.address_in(&i.operands[2], &[Space::SharedCluster])?;
        self.emit_bulk(BulkOp::Store(AsyncStore { space, to, bytes: ty.bytes(), values, mbarrier, reduce }));
        Ok(())
    }
}
