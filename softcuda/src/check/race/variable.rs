//! Places that strong accesses synchronise through: what was released there, by whom it may be acquired (PTX ISA 8.8).

use rustc_hash::FxHashMap;
use std::sync::Mutex;

use super::clock::Away;
use super::home::{Home, Known, level};
use crate::exec::observe::{Order, Scope};

/// What has been released at one place. Nothing is ever forgotten, for which write a read takes its value from is not known.
#[derive(Debug, Default, Clone)]
pub struct Variable {
    /// To everybody.
    device: Away,
    /// To the blocks of one cluster, by home.
    clusters: FxHashMap<u32, Away>,
    /// To one block's threads, by the block.
    blocks: FxHashMap<u64, Away>,
}

impl Variable {
    /// A strong write by a thread of `block`; `what` is from [`Home::released`].
    pub fn release(&mut self, (home, warps): (u32, &dyn Fn(usize) -> bool), block: u64, what: &[(usize, Known)]) {
        for (level, known) in what {
            let to = match level {
                0 => self.blocks.entry(block).or_default(),
                1 => self.clusters.entry(home).or_default(),
                _ => &mut self.device,
            };
            to.publish(home, &known.times, warps);
            if !known.away.is_empty() {
                to.join(&known.away);
            }
        }
    }

    /// A strong read by a warp of `block`.
    pub fn acquire(&self, home: &mut Home, warp: usize, block: u64, order: Order, scope: Scope) {
        let at_once = matches!(order, Order::Acquire | Order::AcqRel | Order::SeqCst);
        let id = home.id;
        let w = &mut home.warps[warp];
        let sources = [self.blocks.get(&block), self.clusters.get(&id), Some(&self.device)];
        for (l, from) in sources.into_iter().enumerate() {
            let Some(from) = from.filter(|f| !f.is_empty()) else { continue };
            // What is released more widely than this reads is there for threads of the same home.
            let own = (l > level(scope)).then(|| from.only(id));
            let (from, l) = own.as_ref().map_or((from, l), |own| (own, 0));
            if at_once {
                w.acquire(id, warp, from);
            } else {
                w.pending[l].join(from);
            }
        }
    }
}

const SHARDS: usize = 64;

/// A place in global memory as a launch sees it: launches may run at the same time.
pub type Place = (u64, u64);

/// Variables in global memory, by launch and address.
#[derive(Debug)]
pub struct Variables {
    shards: Vec<Mutex<FxHashMap<Place, Variable>>>,
}

impl Default for Variables {
    fn default() -> Self {
        Variables { shards: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }
}

impl Variables {
    pub fn with<R>(&self, address: u64, f: impl FnOnce(&mut FxHashMap<Place, Variable>) -> R) -> R {
        let shard = &self.shards[(address >> 2) as usize % SHARDS];
        f(&mut shard.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// A launch is over.
    pub fn forget(&self, grid: u64) {
        for shard in &self.shards {
            shard.lock().unwrap_or_else(std::sync::PoisonError::into_inner).retain(|(of, _), _| *of != grid);
        }
    }
}
