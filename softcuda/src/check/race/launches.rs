//! Launches that nothing orders: which they are, and what is to be said of their accesses.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, PoisonError, RwLock};

use crate::exec::{Launch, LaunchOrder};

/// Launches that are remembered. Older ones count as ordered before.
const REMEMBERED: usize = 4096;

/// A launch, after it has begun.
#[derive(Debug)]
pub struct Earlier {
    order: Arc<LaunchOrder>,
    pub kernel: String,
    pub lines: Arc<Vec<String>>,
    pub grid: [u32; 3],
    pub warps_per_block: u32,
}

/// Launches by number, and their numbers from the oldest on.
type Kept = (HashMap<u32, Arc<Earlier>>, VecDeque<u32>);

/// Launches by the number that stamps hold.
#[derive(Debug, Default)]
pub struct Launches {
    inner: RwLock<Kept>,
}

impl Launches {
    /// A launch begins; it is remembered if its order is known.
    pub fn begin(&self, number: u32, launch: &Launch) {
        let Some(order) = launch.config.order.clone() else { return };
        let threads: u32 = launch.block.iter().product();
        let earlier = Earlier {
            order,
            kernel: launch.kernel.name.clone(),
            lines: Arc::clone(&launch.kernel.lines),
            grid: launch.grid,
            warps_per_block: threads.div_ceil(32),
        };
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

    /// That launch, if nothing orders it before one of this order.
    pub fn beside(&self, number: u32, order: Option<&LaunchOrder>) -> Option<Arc<Earlier>> {
        let order = order?;
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        inner.0.get(&number).filter(|earlier| !order.after(&earlier.order)).cloned()
    }
}
