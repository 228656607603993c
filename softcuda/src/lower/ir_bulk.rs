//! Operands of the bulk engine's instructions.

use super::ir::{Address, AtomOp, Reg, Scope, Use};
use crate::ptx::ast::{Space, Type};
use crate::tensormap::Field;

#[derive(Debug, Clone)]
pub enum BulkOp {
    Copy(BulkCopy),
    Tensor(TensorCopy),
    /// `st.async`, `red.async`.
    Store(AsyncStore),
    /// `cp.async.bulk.commit_group`.
    Commit,
    /// `cp.async.bulk.wait_group{.read}`.
    Wait {
        keep: u32,
        read: bool,
    },
    /// A prefetch of `bytes` bytes: checked, and done with.
    Prefetch {
        from: Address,
        bytes: Reg,
    },
}

/// `cp.async.bulk` and `cp.reduce.async.bulk`.
#[derive(Debug, Clone)]
pub struct BulkCopy {
    /// `Global`, `Shared` or `SharedCluster`.
    pub to_space: Space,
    pub to: Address,
    /// `Global` or `Shared`.
    pub from_space: Space,
    pub from: Address,
    pub bytes: Reg,
    /// Where the destination is shared memory.
    pub mbarrier: Option<Address>,
    /// 16-bit mask of the blocks that receive.
    pub multicast: Option<Reg>,
    pub reduce: Option<(AtomOp, Type)>,
    /// [`crate::exec::policy::Policy`], of global memory's side.
    pub policy: Option<Reg>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorDirection {
    /// Global to shared memory.
    Load,
    /// Shared memory to global.
    Store,
    /// Elements of shared memory are combined with those in global memory.
    Reduce(AtomOp),
    Prefetch,
}

/// `cp.async.bulk.tensor`, `cp.reduce.async.bulk.tensor` and the prefetch, in tile mode.
#[derive(Debug, Clone)]
pub struct TensorCopy {
    pub direction: TensorDirection,
    /// Generic address of the tensor map.
    pub map: Address,
    /// One for each dimension, the innermost first.
    pub coordinates: Vec<Reg>,
    /// The tile in shared memory; unused by the prefetch.
    pub tile: Option<Address>,
    pub tile_space: Space,
    pub mbarrier: Option<Address>,
    pub multicast: Option<Reg>,
    /// [`crate::exec::policy::Policy`], of global memory's side.
    pub policy: Option<Reg>,
}

/// `st.async`, and with `reduce` `red.async`.
#[derive(Debug, Clone)]
pub struct AsyncStore {
    /// `None` for generic addresses.
    pub space: Option<Space>,
    pub to: Address,
    /// Bytes of one element.
    pub bytes: u32,
    pub values: Vec<Reg>,
    pub mbarrier: Address,
    pub reduce: Option<(AtomOp, Type)>,
}

impl BulkOp {
    /// Visits every register operand; none is written.
    pub fn visit(&mut self, f: &mut dyn FnMut(&mut Reg, Use)) {
        let mut read = |r: &mut Reg| f(r, Use::Read);
        match self {
            Self::Copy(x) => {
                read(&mut x.to.base);
                read(&mut x.from.base);
                read(&mut x.bytes);
                x.mbarrier.iter_mut().for_each(|a| read(&mut a.base));
                x.multicast.iter_mut().chain(&mut x.policy).for_each(read);
            }
            Self::Tensor(x) => {
                read(&mut x.map.base);
                x.coordinates.iter_mut().for_each(&mut read);
                x.tile.iter_mut().chain(&mut x.mbarrier).for_each(|a| read(&mut a.base));
                x.multicast.iter_mut().chain(&mut x.policy).for_each(read);
            }
            Self::Store(x) => {
                read(&mut x.to.base);
                read(&mut x.mbarrier.base);
                x.values.iter_mut().for_each(read);
            }
            Self::Commit | Self::Wait { .. } => {}
            Self::Prefetch { from, bytes } => {
                read(&mut from.base);
                read(bytes);
            }
        }
    }
}

#[derive(Debug, Clone)]
pub enum TensormapOp {
    /// `tensormap.replace`.
    Replace {
        /// `None` for generic addresses.
        space: Option<Space>,
        map: Address,
        field: Field,
        value: Reg,
        /// Bits that the value is shifted up by.
        shift: u32,
    },
    /// `tensormap.cp_fenceproxy`, from shared to global memory.
    CopyFence { to: Address, from: Address, scope: Scope },
}

impl TensormapOp {
    /// Visits every register operand; none is written.
    pub fn visit(&mut self, f: &mut dyn FnMut(&mut Reg, Use)) {
        match self {
            Self::Replace { map, value, .. } => {
                f(&mut map.base, Use::Read);
                f(value, Use::Read);
            }
            Self::CopyFence { to, from, .. } => {
                f(&mut to.base, Use::Read);
                f(&mut from.base, Use::Read);
            }
        }
    }
}

/// Reductions that instructions have: into global memory, or into a peer's shared memory.
pub fn reduction_allowed(op: AtomOp, ty: Type, shared: bool) -> bool {
    use Type::*;
    match op {
        AtomOp::Add if shared => matches!(ty, U32 | S32 | U64),
        AtomOp::Add => matches!(ty, U32 | S32 | U64 | F32 | F64 | F16 | BF16),
        AtomOp::Min | AtomOp::Max if shared => matches!(ty, U32 | S32),
        AtomOp::Min | AtomOp::Max => matches!(ty, U32 | S32 | U64 | S64 | F16 | BF16),
        AtomOp::Inc | AtomOp::Dec => ty == U32,
        AtomOp::And | AtomOp::Or | AtomOp::Xor => ty == B32 || ty == B64 && !shared,
        AtomOp::Exch | AtomOp::Cas => false,
    }
}
