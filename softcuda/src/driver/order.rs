//! Which launches, copies and releases of memory come before which: clocks of streams, events and the host, for the race
//! checker.
//!
//! Work of a stream is in order. Between streams there is order where an event is waited for, where the host waits for one
//! stream and then submits to another, and between the legacy stream and blocking ones. The host counts as one thread:
//! what any of its threads has waited for, all are taken to know. Whatever makes the host take part in a stream's order
//! (host functions, graphs, writing of values) is taken to order both ways. A program that lets streams wait for values in
//! memory orders them in ways that are not followed: from then on nothing is said of its launches.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::lock;
use crate::exec::LaunchOrder;

/// For each stream, how many of its launches come before.
#[derive(Debug, Clone, Default)]
pub(super) struct Clock(HashMap<u64, u64>);

impl Clock {
    pub fn join(&mut self, other: &Clock) {
        for (&stream, &position) in &other.0 {
            let known = self.0.entry(stream).or_default();
            *known = position.max(*known);
        }
    }
}

/// What the host knows to be done.
static HOST: Mutex<Option<Clock>> = Mutex::new(None);

/// The host has waited for all that this comes after.
pub(super) fn met_by_host(clock: &Clock) {
    lock(&HOST).get_or_insert_default().join(clock);
}

/// The order of what the host does itself now: after all that it has waited for.
pub(super) fn of_host() -> Option<Arc<LaunchOrder>> {
    if LOST.load(Ordering::Relaxed) {
        return None;
    }
    let known = lock(&HOST).as_ref().map_or_else(HashMap::new, |clock| clock.0.clone());
    Some(Arc::new(LaunchOrder { stream: u64::MAX, position: 0, known, before_wait: None }))
}

static LOST: AtomicBool = AtomicBool::new(false);

/// The order of launches can no longer be told.
pub(super) fn give_up() {
    LOST.store(true, Ordering::Relaxed);
}

/// A stream's part.
#[derive(Debug)]
pub(super) struct StreamOrder {
    id: u64,
    clock: Mutex<Clock>,
}

impl Default for StreamOrder {
    fn default() -> Self {
        static IDS: AtomicU64 = AtomicU64::new(0);
        StreamOrder { id: IDS.fetch_add(1, Ordering::Relaxed), clock: Mutex::default() }
    }
}

impl StreamOrder {
    /// What the stream's latest work comes after, itself included.
    pub fn now(&self) -> Clock {
        lock(&self.clock).clone()
    }

    /// Later work of the stream comes after this.
    pub fn learn(&self, from: &Clock) {
        lock(&self.clock).join(from);
    }

    /// The host has waited for the stream.
    pub fn met_by_host(&self) {
        met_by_host(&self.now());
    }

    /// Work is submitted, which those streams' earlier work comes before; the host takes part if `both`. With `dependent` it may
    /// begin before what is in front of it in the stream has ended, but not before what is in front of that: a launch lets
    /// its dependents begin when it has waited for its own predecessors, which is not looked after.
    pub fn submit<'a>(
        &self,
        rivals: impl Iterator<Item = &'a StreamOrder>,
        both: bool,
        dependent: bool,
    ) -> Arc<LaunchOrder> {
        let before: Vec<Clock> = rivals.map(StreamOrder::now).collect();
        let mut clock = lock(&self.clock);
        before.iter().for_each(|c| clock.join(c));
        let mut met = 0;
        if let Some(host) = &*lock(&HOST) {
            clock.join(host);
            met = host.0.get(&self.id).copied().unwrap_or(0);
        }
        let position = clock.0.entry(self.id).or_default();
        *position += 1;
        let before_wait = dependent.then_some(met.max(position.saturating_sub(2)));
        let order = LaunchOrder { stream: self.id, position: *position, known: clock.0.clone(), before_wait };
        drop(clock);
        if both {
            self.met_by_host();
        }
        Arc::new(order)
    }
}

thread_local! {
    static CURRENT: std::cell::RefCell<Option<Arc<LaunchOrder>>> = const { std::cell::RefCell::new(None) };
}

/// Whether this thread still has such an order; not at its end.
pub(super) fn reachable() -> bool {
    CURRENT.try_with(|_| ()).is_ok()
}

/// The order of the work that this thread is running; `None` where it cannot be told.
pub(super) fn current() -> Option<Arc<LaunchOrder>> {
    CURRENT.with_borrow(Clone::clone).filter(|_| !LOST.load(Ordering::Relaxed))
}

/// Runs work of this order.
pub(super) fn with<R>(order: Option<Arc<LaunchOrder>>, work: impl FnOnce() -> R) -> R {
    let before = CURRENT.replace(order);
    let result = work();
    CURRENT.set(before);
    result
}
