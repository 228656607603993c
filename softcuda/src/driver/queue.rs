//! How a stream's work gets done: in the call that submits it where that can be, else by a host thread of the stream.
//!
//! Running work in the submitting call is one of the schedules that CUDA allows, and one that repeats from run to run. It is
//! left where work may have to wait for the host: for a host function, for a value in memory, or for another stream that is
//! so waiting. From then on what is submitted queues up, and the stream's thread works it off. With
//! `SOFTCUDA_STREAMS=concurrent` everything but captures takes that way, so that streams and the host overlap.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::context::Context;
use super::status::{CUresult, Outcome};
use super::stream::{Kind, Stream};
use super::work::Op;
use super::{checks, control, lock, order};
use crate::exec::LaunchOrder;

/// A stream's thread ends when it has had nothing to do for this long.
const IDLE: Duration = Duration::from_millis(50);

/// A point in a stream, reached or not.
#[derive(Default)]
pub(super) struct Point {
    reached: Mutex<Option<Instant>>,
    changed: Condvar,
}

impl Point {
    /// When it was reached.
    pub fn reached(&self) -> Option<Instant> {
        *lock(&self.reached)
    }

    pub fn wait(&self) {
        let mut reached = lock(&self.reached);
        while reached.is_none() {
            reached = wait(&self.changed, reached);
        }
    }

    pub fn reach(&self) {
        *lock(&self.reached) = Some(Instant::now());
        self.changed.notify_all();
    }
}

fn wait<'a, T>(changed: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// What can be submitted to a stream.
pub(super) enum Task {
    Op(Arc<Op>),
    /// Marks that everything before it is done.
    Record(Arc<Point>),
    /// Waits for a point of another stream.
    Wait(Arc<Point>),
}

impl Task {
    /// Whether it may have to wait for something that the host does later.
    fn may_wait(&self) -> bool {
        match self {
            Task::Op(op) => op.may_wait(),
            Task::Wait(point) => point.reached().is_none(),
            Task::Record(_) => false,
        }
    }

    /// Whether it runs in a context that is in error too: points are still reached, for others wait for them, and callbacks are
    /// told of the error.
    fn outlives_fault(&self) -> bool {
        match self {
            Task::Record(_) | Task::Wait(_) => true,
            Task::Op(op) => matches!(**op, Op::Callback { .. }),
        }
    }

    /// What can wait in a queue without the caller's memory staying as it is.
    fn staged(self) -> Task {
        match self {
            Task::Op(op) => Task::Op(op.staged().map_or(op, Arc::new)),
            other => other,
        }
    }

    fn run(self, context: &Context) -> Outcome {
        match self {
            Task::Op(op) => op.run(context),
            Task::Record(point) => {
                point.reach();
                Ok(())
            }
            Task::Wait(point) => {
                point.wait();
                Ok(())
            }
        }
    }
}

/// Where a task's launches stand among all.
type Order = Option<Arc<LaunchOrder>>;

#[derive(Default)]
struct State {
    /// With the order of what they launch.
    tasks: VecDeque<(Task, Order)>,
    /// A host thread runs a task in the call that submitted it.
    inline: bool,
    /// The stream's thread is at a task.
    working: bool,
    /// The stream has a thread.
    thread: bool,
}

impl State {
    fn queued(&self) -> bool {
        self.working || !self.tasks.is_empty()
    }
}

/// The work of one stream.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

/// How a submission goes on.
enum Way {
    Inline,
    Queue,
    /// A call on another host thread must end first; then look again.
    After(Arc<Stream>),
}

impl Queue {
    pub fn is_idle(&self) -> bool {
        let state = lock(&self.state);
        !state.inline && !state.queued()
    }

    /// Waits until all that was submitted is done.
    pub fn drain(&self) {
        let mut state = lock(&self.state);
        while state.inline || state.queued() {
            state = wait(&self.changed, state);
        }
    }

    fn await_inline(&self) {
        let mut state = lock(&self.state);
        while state.inline {
            state = wait(&self.changed, state);
        }
    }

    /// A point after everything in the queue; `None` if there is nothing. To be called with the context's order held.
    fn tail(&self) -> Option<Arc<Point>> {
        let mut state = lock(&self.state);
        if !state.queued() {
            return None;
        }
        if let Some((Task::Record(point), _)) = state.tasks.back() {
            return Some(point.clone());
        }
        let point = Arc::new(Point::default());
        state.tasks.push_back((Task::Record(point.clone()), None));
        self.changed.notify_all();
        Some(point)
    }
}

/// Ends an inline turn, also by a panic.
struct Turn<'a>(&'a Queue);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).inline = false;
        self.0.changed.notify_all();
    }
}

/// Adds a task to a stream: it runs when everything before it has run.
///
/// # Errors
/// The task's own if it ran in this call; those of a task that runs later put the context in error, which is this call's error
/// if it waits for the task.
pub(super) fn submit(stream: &Arc<Stream>, context: &Arc<Context>, task: Task) -> Outcome {
    loop {
        let order = lock(&context.order);
        match way(stream, context, &task) {
            Way::After(other) => {
                drop(order);
                other.queue.await_inline();
            }
            Way::Inline => {
                lock(&stream.queue.state).inline = true;
                drop(order);
                let _turn = Turn(&stream.queue);
                // Another thread's work may have put the context in error while this call waited for its turn.
                if matches!(task, Task::Op(_)) {
                    context.check()?;
                }
                let order = place(stream, context, &task);
                return order::with(order, || task.run(context));
            }
            Way::Queue => {
                let waits_for_host = matches!(&task, Task::Op(op) if op.returns_when_done());
                let place = place(stream, context, &task);
                let gates: Vec<_> = rivals(stream, context).iter().filter_map(|other| other.queue.tail()).collect();
                let mut state = lock(&stream.queue.state);
                if !state.thread {
                    let (stream, context) = (stream.clone(), context.clone());
                    let thread = std::thread::Builder::new().name("softcuda stream".to_owned());
                    thread.spawn(move || work(&stream, &context)).map_err(|error| {
                        CUresult::ERROR_OPERATING_SYSTEM.with(format!("no thread for the stream: {error}"))
                    })?;
                    state.thread = true;
                }
                state.tasks.extend(gates.into_iter().map(|gate| (Task::Wait(gate), None)));
                state.tasks.push_back((task.staged(), place));
                stream.queue.changed.notify_all();
                drop(state);
                drop(order);
                return if waits_for_host { stream.settle() } else { Ok(()) };
            }
        }
    }
}

/// Streams whose earlier work this one's waits for: legacy and blocking streams wait for each other.
fn rivals(stream: &Stream, context: &Context) -> Vec<Arc<Stream>> {
    match stream.kind {
        Kind::Legacy => context.blocking_streams(),
        Kind::Blocking => vec![context.legacy_stream.clone()],
        Kind::NonBlocking => Vec::new(),
    }
}

fn way(stream: &Arc<Stream>, context: &Context, task: &Task) -> Way {
    let mut queued = control::concurrent_streams() || task.may_wait();
    for other in std::iter::once(stream.clone()).chain(rivals(stream, context)) {
        let state = lock(&other.queue.state);
        if state.inline {
            drop(state);
            return Way::After(other);
        }
        queued |= state.queued();
    }
    if queued { Way::Queue } else { Way::Inline }
}

/// Where a task's launches stand among all, as it is submitted; told to checkers only, and so not kept without them.
fn place(stream: &Stream, context: &Context, task: &Task) -> Order {
    let Task::Op(op) = task else { return None };
    if !checks::on() {
        return None;
    }
    if matches!(**op, Op::WaitValue(_)) {
        order::give_up();
    }
    let rivals = rivals(stream, context);
    let before = rivals.iter().map(|rival| &rival.order);
    Some(stream.order.submit(before, op.meets_host(), op.is_dependent()))
}

/// The stream's thread.
fn work(stream: &Stream, context: &Context) {
    let queue = &stream.queue;
    let mut state = lock(&queue.state);
    loop {
        let Some((task, order)) = state.tasks.pop_front() else {
            let (again, timeout) = queue.changed.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
            state = again;
            if timeout.timed_out() && state.tasks.is_empty() {
                state.thread = false;
                return;
            }
            continue;
        };
        state.working = true;
        drop(state);
        let runs = task.outlives_fault() || context.check().is_ok();
        if runs {
            let outcome =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| order::with(order, || task.run(context))));
            let outcome = outcome
                .unwrap_or_else(|_| Err(CUresult::ERROR_UNKNOWN.with("internal error of softcuda in a stream's work")));
            if let Err(failure) = outcome {
                control::record_fault(failure.detail.as_deref().unwrap_or_default());
                context.set_fault(failure);
            }
        }
        state = lock(&queue.state);
        state.working = false;
        queue.changed.notify_all();
    }
}
