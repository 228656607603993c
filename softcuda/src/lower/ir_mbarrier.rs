//! Operands of the instructions on mbarrier objects.

use super::ir::{Address, Order, Reg, Scope, Use};
use crate::ptx::ast::Space;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MbarrierKind {
    Init,
    Inval,
    Arrive {
        /// `arrive_drop`: the thread will not come in later phases either.
        drop: bool,
        /// The arrival must not complete the phase.
        no_complete: bool,
        /// `.expect_tx`: the count is one of transactions, and one arrival follows.
        expect: bool,
    },
    ExpectTx,
    CompleteTx,
    Wait {
        /// `try_wait`, which may suspend the thread.
        suspends: bool,
        parity: bool,
    },
    /// `cp.async.mbarrier.arrive`.
    CopyArrive {
        /// Without `.noinc`.
        increment: bool,
    },
}

/// An operation on an mbarrier object.
#[derive(Debug, Clone)]
pub struct Mbarrier {
    pub kind: MbarrierKind,
    /// `None` for generic addresses.
    pub space: Option<Space>,
    pub address: Address,
    pub order: Order,
    pub scope: Scope,
    /// The state that an arrival returns, or the predicate that a wait does.
    pub d: Option<Reg>,
    /// Count of arrivals or transactions, state or parity.
    pub a: Option<Reg>,
    /// Registers that are only read: the hint on how long to wait.
    pub hint: Option<Reg>,
}

impl Mbarrier {
    /// Visits every register operand, writes first.
    pub fn visit(&mut self, f: &mut dyn FnMut(&mut Reg, Use)) {
        self.d.iter_mut().for_each(|r| f(r, Use::Write));
        f(&mut self.address.base, Use::Read);
        self.a.iter_mut().chain(&mut self.hint).for_each(|r| f(r, Use::Read));
    }
}
