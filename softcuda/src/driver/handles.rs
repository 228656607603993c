//! Handles: what C sees as pointers to opaque structures. Objects that belong to a context are taken down with it from here: a
//! context need not know what kinds there are.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Once, OnceLock, PoisonError, RwLock};

use super::lock;
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

/// What belongs to a context.
pub(super) trait Owned: Send + Sync {
    fn owner(&self) -> Handle;
}

/// What has to be done when a context goes.
pub(super) trait Closer: Sync {
    fn close(&self, context: Handle);
}

static CLOSERS: Mutex<Vec<&'static dyn Closer>> = Mutex::new(Vec::new());

/// Has `closer` called for each context that goes from now on, in no particular order with others.
pub(super) fn when_a_context_goes(once: &Once, closer: &'static dyn Closer) {
    once.call_once(|| lock(&CLOSERS).push(closer));
}

/// A context goes, and all that belongs to it.
pub(super) fn close_context(context: Handle) {
    let closers = lock(&CLOSERS).clone();
    closers.iter().for_each(|closer| closer.close(context));
}

/// The live objects of one type, each of which goes with its context.
pub(super) struct Children<T: 'static> {
    table: Table<T>,
    listed: Once,
}

impl<T: Owned> Children<T> {
    /// As [`Table::new`].
    pub const fn new(name: &'static str, error: CUresult) -> Self {
        Children { table: Table::new(name, error), listed: Once::new() }
    }

    pub fn insert(&'static self, handle: Handle, object: Arc<T>) {
        when_a_context_goes(&self.listed, self);
        self.table.insert(handle, object);
    }

    pub fn add(&'static self, object: T) -> Handle {
        let handle = fresh();
        self.insert(handle, Arc::new(object));
        handle
    }
}

impl<T: Owned> Closer for Children<T> {
    fn close(&self, context: Handle) {
        self.table.retain(|object| object.owner() != context);
    }
}

impl<T> Deref for Children<T> {
    type Target = Table<T>;

    fn deref(&self) -> &Table<T> {
        &self.table
    }
}
