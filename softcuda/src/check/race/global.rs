//! The shadow of global memory, shared by all host threads: pages made on demand, each with its lock.

use rustc_hash::FxHashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::cell::Cell;

/// Readers of a piece of global memory that are remembered.
pub const READERS: usize = 2;
/// Bytes of a cell.
pub const CELL: u32 = 128;
const CELLS: usize = 32;
/// Bytes of a page.
pub const PAGE: u64 = CELL as u64 * CELLS as u64;

const SHARDS: usize = 64;
/// Pages that an observer finds without asking.
const CACHED: usize = 512;

type Cells = [Cell<READERS>; CELLS];

#[derive(Debug)]
pub struct Page(Mutex<Cells>);

impl Page {
    pub fn cells(&self) -> MutexGuard<'_, Cells> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
pub struct Global {
    shards: Vec<RwLock<FxHashMap<u64, Arc<Page>>>>,
}

impl Default for Global {
    fn default() -> Self {
        Global { shards: (0..SHARDS).map(|_| RwLock::default()).collect() }
    }
}

impl Global {
    fn page(&self, number: u64) -> Arc<Page> {
        let shard = &self.shards[number as usize % SHARDS];
        if let Some(page) = shard.read().unwrap_or_else(PoisonError::into_inner).get(&number) {
            return Arc::clone(page);
        }
        let mut pages = shard.write().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(Page(Mutex::new(std::array::from_fn(|_| Cell::default()))));
        Arc::clone(pages.entry(number).or_insert_with(new))
    }

    /// Pages of a range of addresses that anybody has touched, with their numbers.
    pub fn touched(&self, address: u64, bytes: u64) -> Vec<(u64, Arc<Page>)> {
        let numbers = address / PAGE..(address + bytes).div_ceil(PAGE);
        let mut found = Vec::new();
        for shard in &self.shards {
            let pages = shard.read().unwrap_or_else(PoisonError::into_inner);
            found.extend(pages.iter().filter(|(n, _)| numbers.contains(n)).map(|(&n, page)| (n, Arc::clone(page))));
        }
        found
    }

    /// Forgets who touched a range of addresses.
    pub fn forget(&self, address: u64, bytes: u64) {
        let gone = address / PAGE..(address + bytes).div_ceil(PAGE);
        for shard in &self.shards {
            shard.write().unwrap_or_else(PoisonError::into_inner).retain(|number, _| !gone.contains(number));
        }
    }
}

/// An observer's own way to pages.
pub struct Pages<'a> {
    global: &'a Global,
    cache: Vec<Option<(u64, Arc<Page>)>>,
}

impl<'a> Pages<'a> {
    pub fn new(global: &'a Global) -> Self {
        Pages { global, cache: vec![None; CACHED] }
    }

    pub fn get(&mut self, address: u64) -> &Page {
        let number = address / PAGE;
        let slot = &mut self.cache[number as usize % CACHED];
        if slot.as_ref().is_none_or(|(n, _)| *n != number) {
            *slot = Some((number, self.global.page(number)));
        }
        &slot.as_ref().expect("it was just filled").1
    }
}
