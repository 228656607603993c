//! Checkers: observers of running kernels that find what a GPU would do wrong silently, each its own module and switch.
//!
//! All are silent on correct programs. What each can see and what it cannot stands in its module's documentation.
//!
//! A checker is a [`Watch`] that reports to the [`Findings`] that it was made with. [`Checks`] holds
//! the ones that are switched on, and what the host does to memory.

mod asynchrony;
mod finding;
mod init;
mod memory;
mod race;
mod shadow;
mod sync;

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

pub use finding::{Finding, Findings, Place};
pub use race::Operation;

use crate::exec::LaunchOrder;
use crate::exec::observe::Watch;

/// The checkers there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Checker {
    /// Bounds, alignment, use after free, leaks.
    Memory,
    /// Reads of bytes that nothing has written.
    Init,
    /// Accesses that nothing orders.
    Race,
    /// Barriers: divergent or mismatched ones, misuse, deadlock.
    Sync,
    /// Asynchronous copies and products: data used before it is there, buffers reused while they are read.
    Async,
}

impl Checker {
    /// Every checker.
    pub const ALL: [Checker; 5] = [Checker::Memory, Checker::Init, Checker::Race, Checker::Sync, Checker::Async];

    /// The word in `SOFTCUDA_CHECKS`.
    pub const fn name(self) -> &'static str {
        match self {
            Checker::Memory => "memory",
            Checker::Init => "init",
            Checker::Race => "race",
            Checker::Sync => "sync",
            Checker::Async => "async",
        }
    }
}

impl fmt::Display for Checker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which checkers are on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Selection(u8);

impl Selection {
    pub const NONE: Selection = Selection(0);
    pub const ALL: Selection = Selection((1 << Checker::ALL.len()) - 1);

    pub fn of(checkers: &[Checker]) -> Selection {
        Selection(checkers.iter().fold(0, |bits, &c| bits | 1 << c as u8))
    }

    pub fn has(self, checker: Checker) -> bool {
        self.0 >> checker as u8 & 1 == 1
    }

    /// Names separated by commas; `all`, and `none` or nothing.
    ///
    /// # Errors
    /// The word that names no checker.
    pub fn parse(text: &str) -> Result<Selection, String> {
        let mut selection = Selection::NONE;
        for word in text.split(',').map(str::trim).filter(|w| !w.is_empty()) {
            let named = Checker::ALL.into_iter().find(|c| c.name() == word);
            match (word, named) {
                ("all", _) => selection = Selection::ALL,
                ("none", _) => selection = Selection::NONE,
                (_, Some(checker)) => selection.0 |= Selection::of(&[checker]).0,
                _ => return Err(word.to_owned()),
            }
        }
        Ok(selection)
    }
}

/// Checkers that are on, with what they have found. Lives across launches, for memory does.
#[derive(Debug)]
pub struct Checks {
    selection: Selection,
    findings: Arc<Findings>,
    watches: Vec<Arc<dyn Watch>>,
    memory: Option<Arc<memory::Memory>>,
    init: Option<Arc<init::Init>>,
    race: Option<Arc<race::Race>>,
}

impl Checks {
    /// Checkers for a device whose global memory has addresses of `range`. Whoever owns the memory tells of allocations and of
    /// the host's accesses; what was allocated before counts as written once it is told as such.
    ///
    /// # Errors
    /// The host grants no address space for a shadow.
    pub fn new(selection: Selection, range: Range<u64>) -> io::Result<Checks> {
        let findings = Arc::new(Findings::default());
        let mut watches: Vec<Arc<dyn Watch>> = Vec::new();
        let on = |checker| selection.has(checker).then(|| Arc::clone(&findings));
        let memory = on(Checker::Memory).map(|f| Arc::new(memory::Memory::new(f)));
        watches.extend(memory.clone().map(|w| w as Arc<dyn Watch>));
        let init = on(Checker::Init).map(|f| init::Init::new(f, range).map(Arc::new)).transpose()?;
        watches.extend(init.clone().map(|w| w as Arc<dyn Watch>));
        let race = on(Checker::Race).map(|f| Arc::new(race::Race::new(f)));
        watches.extend(race.clone().map(|w| w as Arc<dyn Watch>));
        watches.extend(on(Checker::Sync).map(|f| Arc::new(sync::Sync::new(f)) as Arc<dyn Watch>));
        watches.extend(on(Checker::Async).map(|f| Arc::new(asynchrony::Async::new(f)) as Arc<dyn Watch>));
        Ok(Checks { race, selection, findings, watches, memory, init })
    }

    /// Which checkers these are.
    pub fn selection(&self) -> Selection {
        self.selection
    }

    /// Memory was allocated; `written` if whoever allocated it has filled it or may fill it unseen.
    pub fn allocated(&self, address: u64, bytes: u64, written: bool) {
        if let Some(init) = &self.init {
            init.allocated(address, bytes, written);
        }
        if let Some(race) = &self.race {
            race.allocated(address, bytes);
        }
    }

    /// An allocation outlives its context.
    pub fn leaked(&self, address: u64, bytes: u64, serial: u64) {
        if let Some(memory) = &self.memory {
            memory.leaked(address, bytes, serial);
        }
    }

    /// The driver does this in a stream with device memory; `order` as for launches. Returns whether there was something to
    /// report.
    pub fn operation(
        &self,
        order: &Arc<LaunchOrder>,
        operation: Operation,
        address: u64,
        bytes: u64,
        writes: bool,
    ) -> bool {
        bytes > 0 && self.race.as_ref().is_some_and(|race| race.operation(order, operation, address, bytes, writes))
    }

    /// The host, or the driver in its name, wrote device memory.
    pub fn host_wrote(&self, address: u64, bytes: u64) {
        if let Some(init) = &self.init {
            init.written(address, bytes);
        }
    }

    /// The device copied memory outside any kernel.
    pub fn copied(&self, from: u64, to: u64, bytes: u64) {
        if let Some(init) = &self.init {
            init.copied(from, to, bytes);
        }
    }

    /// For [`Config::watches`](crate::exec::Config::watches).
    pub fn watches(&self) -> Vec<Arc<dyn Watch>> {
        self.watches.clone()
    }

    pub fn findings(&self) -> &Findings {
        &self.findings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selections_name_checkers() {
        assert_eq!(Selection::parse("race, init"), Ok(Selection::of(&[Checker::Init, Checker::Race])));
        assert_eq!(Selection::parse("all"), Ok(Selection::ALL));
        assert_eq!(Selection::parse(""), Ok(Selection::NONE));
        assert_eq!(Selection::parse("memory,rice"), Err("rice".into()));
        assert!(Selection::ALL.has(Checker::Async) && !Selection::NONE.has(Checker::Memory));
    }
}
