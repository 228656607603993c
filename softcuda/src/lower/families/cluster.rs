//! Clusters: `mapa`, `getctarank` (PTX ISA 9.7.9.24, 9.7.9.25), `barrier.cluster` (9.7.13.4).

use super::{Class, unknown};
use crate::lower::builder::{Builder, Result};
use crate::lower::ir::Extra;
use crate::lower::ir_cluster::{ClusterOp, Mapa};
use crate::lower::isa::Code;
use crate::lower::modifiers::Modifiers;
use crate::lower::operands::count;
use crate::ptx::ast::{Instruction, Type};

impl Builder<'_> {
    fn cluster_op(&mut self, x: ClusterOp) {
        self.emit_extra(Code::Cluster, Extra::Cluster(x));
    }

    /// `mapa{.shared::cluster}.type d, a, rank`
    pub(super) fn mapa(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        let generic = !m.take("shared::cluster");
        let ty = m.last_type()?;
        m.finish()?;
        // Generic addresses have 64 bits here.
        if !(ty == Type::U64 || ty == Type::U32 && !generic) {
            return Err(unknown(i));
        }
        count(&i.operands, 3..=3)?;
        let a = self.source_reg(&i.operands[1], ty)?;
        let rank = self.source_reg(&i.operands[2], Type::U32)?;
        let d = self.dest_reg(&i.operands[0], ty)?;
        self.class = Some(Class::Integer);
        self.cluster_op(ClusterOp::Mapa(Mapa { d, a, rank, generic }));
        Ok(())
    }

    /// `getctarank{.shared::cluster}.type d, a`
    pub(super) fn getctarank(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        let generic = !m.take("shared::cluster");
        let ty = m.last_type()?;
        m.finish()?;
        if !(ty == Type::U64 || ty == Type::U32 && !generic) {
            return Err(unknown(i));
        }
        count(&i.operands, 2..=2)?;
        let a = self.source_reg(&i.operands[1], ty)?;
        let d = self.dest_reg(&i.operands[0], Type::U32)?;
        self.class = Some(Class::Integer);
        self.cluster_op(ClusterOp::GetRank { d, a, generic });
        Ok(())
    }

    /// `barrier.cluster.arrive{.release|.relaxed}{.aligned}`, `barrier.cluster.wait{.acquire}{.aligned}`, after `cluster`
    /// has been taken.
    pub(super) fn cluster_barrier(&mut self, i: &Instruction, mut m: Modifiers) -> Result<()> {
        let arrive = m.required("an operation", &[("arrive", true), ("wait", false)])?;
        let release =
            if arrive { m.one_of(&[("release", true), ("relaxed", false)]).unwrap_or(true) } else { m.take("acquire") };
        let aligned = m.take("aligned");
        m.finish()?;
        count(&i.operands, 0..=0)?;
        self.cluster_op(if arrive { ClusterOp::Arrive { aligned, release } } else { ClusterOp::Wait { aligned } });
        Ok(())
    }
}
