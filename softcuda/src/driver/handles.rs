//! Handles: what C sees as pointers to opaque structures.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use super::status::{CUresult, Outcome};

/// `CUcontext`, `CUstream` and so on: pointer-sized, never dereferenced.
pub type Handle = usize;

/// Distinct over all types and for the life of the process; small numbers are special stream handles.
static NEXT: AtomicUsize = AtomicUsize::new(0x5c00_0000_0000);

/// A handle that nothing else has.
pub(super) fn fresh() -> Handle {
    NEXT.fetch_add(16, Ordering::Relaxed)
}

/// The live objects of one type by handle.
pub(super) struct Table<T> {
    name: &'static str,
    error: CUresult,
    objects: OnceLock<RwLock<HashMap<Handle, Arc<T>>>>,
}

impl<T> Table<T> {
    /// `error` is what an unknown handle gives.
    pub const fn new(name: &'static str, error: CUresult) -> Self {
        Table { name, error, objects: OnceLock::new() }
    }

    fn objects(&self) -> &RwLock<HashMap<Handle, Arc<T>>> {
        self.objects.get_or_init(Default::default)
    }

    pub fn insert(&self, handle: Handle, object: Arc<T>) {
        self.objects().write().unwrap_or_else(PoisonError::into_inner).insert(handle, object);
    }

    pub fn add(&self, object: T) -> Handle {
        let handle = fresh();
        self.insert(handle, Arc::new(object));
        handle
    }

    fn unknown(&self, handle: Handle) -> super::status::Failure {
        self.error.with(format!("{handle:#x} is not a live {}", self.name))
    }

    pub fn get(&self, handle: Handle) -> Outcome<Arc<T>> {
        let objects = self.objects().read().unwrap_or_else(PoisonError::into_inner);
        objects.get(&handle).cloned().ok_or_else(|| self.unknown(handle))
    }

    pub fn remove(&self, handle: Handle) -> Outcome<Arc<T>> {
        let mut objects = self.objects().write().unwrap_or_else(PoisonError::into_inner);
        objects.remove(&handle).ok_or_else(|| self.unknown(handle))
    }

    /// The live objects that `which` holds for.
    pub fn select(&self, which: impl Fn(&T) -> bool) -> Vec<Arc<T>> {
        let objects = self.objects().read().unwrap_or_else(PoisonError::into_inner);
        objects.values().filter(|object| which(object)).cloned().collect()
    }

    /// Drops every object that `keep` rejects.
    pub fn retain(&self, keep: impl Fn(&T) -> bool) {
        let mut objects = self.objects().write().unwrap_or_else(PoisonError::into_inner);
        objects.retain(|_, object| keep(object));
    }
}
