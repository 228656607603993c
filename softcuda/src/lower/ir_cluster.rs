//! Operands of the instructions on clusters.

use super::ir::{Reg, Use};

#[derive(Debug, Clone)]
pub enum ClusterOp {
    Mapa(Mapa),
    /// `getctarank`.
    GetRank {
        d: Reg,
        a: Reg,
        generic: bool,
    },
    /// `barrier.cluster.arrive`.
    Arrive {
        aligned: bool,
        /// Not `.relaxed`.
        release: bool,
    },
    /// `barrier.cluster.wait`.
    Wait {
        aligned: bool,
    },
}

/// `mapa`: the address that is to the block of `rank` what `a` is to its own.
#[derive(Debug, Clone)]
pub struct Mapa {
    pub d: Reg,
    pub a: Reg,
    pub rank: Reg,
    pub generic: bool,
}

impl ClusterOp {
    /// Visits every register operand, writes first.
    pub fn visit(&mut self, f: &mut dyn FnMut(&mut Reg, Use)) {
        match self {
            Self::Mapa(x) => {
                f(&mut x.d, Use::Write);
                f(&mut x.a, Use::Read);
                f(&mut x.rank, Use::Read);
            }
            Self::GetRank { d, a, .. } => {
                f(d, Use::Write);
                f(a, Use::Read);
            }
            Self::Arrive { .. } | Self::Wait { .. } => {}
        }
    }
}
