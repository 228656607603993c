//! Stream capture: which calls it records, and which it forbids (CUDA programming guide, "Creating a Graph Using Stream
//! Capture").

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Once};
use std::thread::ThreadId;

use super::event::Event;
use super::graph::{Entry, GRAPHS, Graph, NODES};
use super::handles::{Closer, Handle, fresh, when_a_context_goes};
use super::status::{CUresult, Outcome};
use super::stream::{Kind, Stream, stream};
use super::work::Op;
use super::{api, lock, out};

const GLOBAL: u32 = 0;
const RELAXED: u32 = 2;

/// One capture in progress: the graph so far and the streams in it.
pub(super) struct Capture {
    context: Handle,
    mode: u32,
    thread: ThreadId,
    origin: Handle,
    pub invalid: AtomicBool,
    /// The graph so far, which has a handle from the start: `cuStreamGetCaptureInfo` gives it out.
    pub graph: Arc<Graph>,
    pub graph_handle: Handle,
    /// Streams that take part, the origin first.
    streams: Mutex<Vec<Arc<Stream>>>,
}

/// A stream's part in a capture.
pub(super) struct Captured {
    pub capture: Arc<Capture>,
    /// Nodes that the next one in this stream depends on.
    pub tail: Vec<Handle>,
    /// What `cuStreamGetCaptureInfo` last gave out: the caller may read it until the next call on this stream.
    pub shown: Vec<Handle>,
    /// Data of as many edges, all of the default kind.
    pub edges: Vec<u64>,
}

static ACTIVE: Mutex<Vec<Arc<Capture>>> = Mutex::new(Vec::new());

/// Length of [`ACTIVE`], so that calls outside any capture take no lock.
static ACTIVE_COUNT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// `cuThreadExchangeStreamCaptureMode`.
    static THREAD_MODE: Cell<u32> = const { Cell::new(GLOBAL) };
}

impl Capture {
    pub fn invalidate(&self) {
        self.invalid.store(true, Ordering::Release);
    }

    /// Drops the graph of a capture that comes to nothing.
    fn discard(&self) {
        for node in lock(&self.graph.nodes).iter() {
            let _ = NODES.remove(node.handle);
        }
        let _ = GRAPHS.remove(self.graph_handle);
    }

    fn is_active(self: &Arc<Self>) -> bool {
        lock(&ACTIVE).iter().any(|active| Arc::ptr_eq(active, self))
    }
}

impl Captured {
    fn new(capture: Arc<Capture>, tail: Vec<Handle>) -> Captured {
        Captured { capture, tail, shown: Vec::new(), edges: Vec::new() }
    }

    /// Appends a node after the stream's tail.
    pub fn add(&mut self, op: Op) -> Outcome {
        if self.capture.invalid.load(Ordering::Acquire) {
            return Err(CUresult::ERROR_STREAM_CAPTURE_INVALIDATED.into());
        }
        if let Err(failure) = op.check() {
            self.capture.invalidate();
            return Err(failure);
        }
        let handle = fresh();
        let dependencies = std::mem::replace(&mut self.tail, vec![handle]);
        NODES.insert(handle, Arc::new(self.capture.graph_handle));
        lock(&self.capture.graph.nodes).push(Entry { handle, op: Arc::new(op), dependencies });
        Ok(())
    }

    pub fn depend_on(&mut self, nodes: &[Handle]) {
        self.tail.extend(nodes);
        self.tail.sort_unstable();
        self.tail.dedup();
    }
}

/// Ends captures: their streams go back to running what they are given.
fn close(which: impl Fn(&Capture) -> bool) {
    let mut active = lock(&ACTIVE);
    let closed = active.extract_if(.., |capture| which(capture)).collect::<Vec<_>>();
    ACTIVE_COUNT.store(active.len(), Ordering::Release);
    drop(active);
    for capture in closed {
        for stream in std::mem::take(&mut *lock(&capture.streams)) {
            *lock(&stream.capture) = None;
        }
    }
}

/// Ends a context's captures with it.
struct Captures;

impl Closer for Captures {
    fn close(&self, context: Handle) {
        lock(&ACTIVE).iter().filter(|capture| capture.context == context).for_each(|capture| capture.discard());
        close(|capture| capture.context == context);
    }
}

/// A stream is gone: what it began has no end, and what it took part in cannot be joined.
pub(super) fn leave(stream: &Stream) {
    let part = lock(&stream.capture).take();
    if let Some(captured) = part {
        captured.capture.invalidate();
        if captured.capture.origin == stream.handle {
            captured.capture.discard();
            close(|capture| std::ptr::eq(capture, &*captured.capture));
        }
    }
}

/// Captures in progress that `which` holds for are invalidated, and if there are any, `code` is the result.
fn forbid(which: impl Fn(&Capture) -> bool, code: CUresult, why: impl Fn() -> String) -> Outcome {
    if ACTIVE_COUNT.load(Ordering::Acquire) == 0 {
        return Ok(());
    }
    let mut found = false;
    for capture in lock(&ACTIVE).iter().filter(|capture| which(capture)) {
        capture.invalidate();
        found = true;
    }
    if found { Err(code.with(why())) } else { Ok(()) }
}

/// For calls that CUDA calls potentially unsafe during capture: they may synchronise or take effect outside any stream.
pub(super) fn forbid_unsafe(function: &str) -> Outcome {
    let mine = THREAD_MODE.get();
    let thread = std::thread::current().id();
    let hit = |capture: &Capture| match mine {
        RELAXED => false,
        _ if capture.thread == thread => capture.mode != RELAXED,
        mode => mode == GLOBAL && capture.mode == GLOBAL,
    };
    let why = || format!("{function} may not be called while this capture is in progress");
    forbid(hit, CUresult::ERROR_STREAM_CAPTURE_UNSUPPORTED, why)
}

/// For calls that wait for all work of a context.
pub(super) fn forbid_in(context: Handle, function: &str) -> Outcome {
    let why = || format!("{function} while a stream of the context is capturing");
    forbid(|capture| capture.context == context, CUresult::ERROR_STREAM_CAPTURE_UNSUPPORTED, why)?;
    forbid_unsafe(function)
}

/// For use of the legacy stream, which would wait for the context's blocking streams.
pub(super) fn forbid_implicit(context: Handle) -> Outcome {
    let blocking = |capture: &Capture| lock(&capture.streams).iter().any(|stream| stream.kind == Kind::Blocking);
    let hit = |capture: &Capture| capture.context == context && blocking(capture);
    let why = || "the legacy stream depends on a capturing stream".to_owned();
    forbid(hit, CUresult::ERROR_STREAM_CAPTURE_IMPLICIT, why)
}

/// `cuStreamWaitEvent`.
pub(super) fn wait(stream: &Arc<Stream>, event: &Event) -> Outcome {
    let mark = event.mark();
    let mut part = lock(&stream.capture);
    let Some((capture, nodes)) = mark.captured else {
        return match &*part {
            Some(captured) if mark.recorded => {
                captured.capture.invalidate();
                let why = "a capturing stream waits for an event recorded outside the capture";
                Err(CUresult::ERROR_STREAM_CAPTURE_ISOLATION.with(why))
            }
            _ => Ok(()),
        };
    };
    match &mut *part {
        Some(captured) if Arc::ptr_eq(&captured.capture, &capture) => {
            captured.depend_on(&nodes);
            Ok(())
        }
        Some(captured) => {
            captured.capture.invalidate();
            capture.invalidate();
            Err(CUresult::ERROR_STREAM_CAPTURE_MERGE.into())
        }
        None if !capture.is_active() => {
            Err(CUresult::ERROR_CAPTURED_EVENT.with("the event was recorded in a capture that has ended"))
        }
        None if stream.kind == Kind::Legacy => {
            capture.invalidate();
            Err(CUresult::ERROR_STREAM_CAPTURE_IMPLICIT.with("the legacy stream cannot join a capture"))
        }
        None => {
            lock(&capture.streams).push(stream.clone());
            *part = Some(Captured::new(capture, nodes));
            Ok(())
        }
    }
}

/// How many nodes `tail` depends on, directly or not, itself included.
fn ancestors(nodes: &[Entry], tail: &[Handle]) -> usize {
    let places: HashMap<Handle, &Entry> = nodes.iter().map(|node| (node.handle, node)).collect();
    let mut reached = HashSet::new();
    let mut open = tail.to_vec();
    while let Some(node) = open.pop() {
        // Nodes of a graph that is given out may have been destroyed.
        if let Some(entry) = places.get(&node)
            && reached.insert(node)
        {
            open.extend(&entry.dependencies);
        }
    }
    reached.len()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamBeginCapture_v2(handle: Handle, mode: u32) -> CUresult {
    api("cuStreamBeginCapture_v2", || {
        let stream = stream(handle)?;
        if mode > RELAXED {
            return Err(CUresult::ERROR_INVALID_VALUE.with(format!("{mode} is not a CUstreamCaptureMode")));
        }
        if stream.kind == Kind::Legacy {
            return Err(CUresult::ERROR_STREAM_CAPTURE_UNSUPPORTED.with("the legacy stream cannot be captured"));
        }
        let mut part = lock(&stream.capture);
        if let Some(captured) = &*part {
            captured.capture.invalidate();
            return Err(CUresult::ERROR_ILLEGAL_STATE.with("the stream is capturing already"));
        }
        let (graph, graph_handle) = (Arc::new(Graph::default()), fresh());
        let capture = Arc::new(Capture {
            context: stream.context()?.handle,
            mode,
            thread: std::thread::current().id(),
            origin: stream.handle,
            invalid: AtomicBool::new(false),
            graph: graph.clone(),
            graph_handle,
            streams: Mutex::new(vec![stream.clone()]),
        });
        static LISTED: Once = Once::new();
        when_a_context_goes(&LISTED, &Captures);
        let mut active = lock(&ACTIVE);
        active.push(capture.clone());
        ACTIVE_COUNT.store(active.len(), Ordering::Release);
        GRAPHS.insert(graph_handle, graph);
        *part = Some(Captured::new(capture, Vec::new()));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamEndCapture(handle: Handle, graph: *mut Handle) -> CUresult {
    api("cuStreamEndCapture", || {
        unsafe { out(graph, "phGraph", 0)? };
        let stream = stream(handle)?;
        let (capture, tail) = match &*lock(&stream.capture) {
            Some(captured) => (captured.capture.clone(), captured.tail.clone()),
            None => return Err(CUresult::ERROR_ILLEGAL_STATE.with("the stream is not capturing")),
        };
        if capture.origin != stream.handle {
            capture.invalidate();
            return Err(CUresult::ERROR_STREAM_CAPTURE_UNMATCHED.into());
        }
        if capture.mode != RELAXED && capture.thread != std::thread::current().id() {
            return Err(CUresult::ERROR_STREAM_CAPTURE_WRONG_THREAD.into());
        }
        close(|other| std::ptr::eq(other, &*capture));
        if capture.invalid.load(Ordering::Acquire) {
            capture.discard();
            return Err(CUresult::ERROR_STREAM_CAPTURE_INVALIDATED.into());
        }
        let nodes = lock(&capture.graph.nodes);
        let left = nodes.len() - ancestors(&nodes, &tail);
        drop(nodes);
        if left > 0 {
            capture.discard();
            return Err(CUresult::ERROR_STREAM_CAPTURE_UNJOINED
                .with(format!("{left} operations of forked streams were not joined to the origin")));
        }
        unsafe { out(graph, "phGraph", capture.graph_handle) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuThreadExchangeStreamCaptureMode(mode: *mut u32) -> CUresult {
    api("cuThreadExchangeStreamCaptureMode", || {
        if mode.is_null() {
            return Err(CUresult::ERROR_INVALID_VALUE.with("`mode` is null"));
        }
        // SAFETY: not null, and valid for reads and writes by the API's contract.
        let new = unsafe { mode.read_unaligned() };
        if new > RELAXED {
            return Err(CUresult::ERROR_INVALID_VALUE.with(format!("{new} is not a CUstreamCaptureMode")));
        }
        unsafe { out(mode, "mode", THREAD_MODE.replace(new)) }
    })
}
