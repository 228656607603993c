//! Launches, and copies and releases by the driver, that nothing orders: which they are, and what is to be said of their accesses.

use rustc_hash::FxHashMap;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::cell::launch_number;
use crate::exec::{Launch, LaunchOrder, fresh_grid};

/// Launches that are remembered. Older ones count as ordered before.
const REMEMBERED: usize = 4096;

/// What the driver does with memory in a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Copy,
    Set,
    Free,
}

/// A launch, after it has begun.
#[derive(Debug)]
pub struct Earlier {
    order: Arc<LaunchOrder>,
    /// Rather than a launch.
    pub operation: Option<Operation>,
    pub kernel: String,
    pub lines: Arc<Vec<String>>,
    pub grid: [u32; 3],
    pub warps_per_block: u32,
}

/// Launches by number, and their numbers from the oldest on.
type Kept = (FxHashMap<u32, Arc<Earlier>>, VecDeque<u32>);

/// Launches by the number that stamps hold.
#[derive(Debug, Default)]
pub struct Launches {
    inner: RwLock<Kept>,
    /// The driver's latest operation: one that is done piece by piece has one number.
    latest: Mutex<Option<(Arc<LaunchOrder>, Operation, u32)>>,
}

impl Launches {
    /// A launch begins; it is remembered if its order is known.
    pub fn begin(&self, number: u32, launch: &Launch) {
        let Some(order) = launch.config.order.clone() else { return };
        let threads: u32 = launch.block.iter().product();
        let earlier = Earlier {
            order,
            operation: None,
            kernel: launch.kernel.name.clone(),
            lines: Arc::clone(&launch.kernel.lines),
            grid: launch.grid,
            warps_per_block: threads.div_ceil(32),
        };
        self.remember(number, earlier);
    }

    /// The number of an operation of the driver.
    pub fn operation(&self, operation: Operation, order: &Arc<LaunchOrder>) -> u32 {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, what, number)) = &*latest
            && Arc::ptr_eq(known, order)
            && *what == operation
        {
            return *number;
        }
        let number = launch_number(fresh_grid());
        *latest = Some((Arc::clone(order), operation, number));
        let earlier = Earlier {
            order: Arc::clone(order),
            operation: Some(operation),
            kernel: String::new(),
            lines: Arc::default(),
            grid: [1; 3],
            warps_per_block: 1,
        };
        self.remember(number, earlier);
        number
    }

    fn remember(&self, number: u32, earlier: Earlier) {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        let (map, queue) = &mut *inner;
        map.insert(number, Arc::new(earlier));
        queue.push_back(number);
        if queue.len() > REMEMBERED
            && let Some(oldest) = queue.pop_front()
        {
            map.remove(&oldest);
        }
    }

    /// That launch, if nothing orders it before one of this order, of which a warp has waited for those in front of it.
    pub fn beside(&self, number: u32, order: Option<&LaunchOrder>, waited: bool) -> Option<Arc<Earlier>> {
        let order = order?;
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        inner.0.get(&number).filter(|earlier| !order.after_when(waited, &earlier.order)).cloned()
    }
}
