//! Events: `cuEvent*`.

use super::capture::{self, Capture};
use super::context::current;
use super::handles::{Children, Handle, Owned};
use super::order::Clock;
use super::queue::{Point, Task};
use super::status::{CUresult, Outcome};
use super::stream::stream;
use super::{api, driver, lock, order, out};
use std::sync::{Arc, Mutex};

const DISABLE_TIMING: u32 = 2;
const INTERPROCESS: u32 = 4;

pub(super) struct Event {
    pub context: Handle,
    timing: bool,
    state: Mutex<Mark>,
}

/// What an event was last recorded at.
#[derive(Clone, Default)]
pub(super) struct Mark {
    pub recorded: bool,
    pub at: Option<Arc<Point>>,
    /// Nodes of a capture rather than a point in time.
    pub captured: Option<(Arc<Capture>, Vec<usize>)>,
    /// What it comes after.
    pub clock: Clock,
}

pub(super) static EVENTS: Children<Event> = Children::new("event", CUresult::ERROR_INVALID_HANDLE);

impl Owned for Event {
    fn owner(&self) -> Handle {
        self.context
    }
}

impl Event {
    /// Records a point that is reached.
    pub fn mark_now(&self) {
        let point = Point::default();
        point.reach();
        *lock(&self.state) = Mark { recorded: true, at: Some(Arc::new(point)), ..Mark::default() };
    }

    pub fn mark(&self) -> Mark {
        lock(&self.state).clone()
    }
}

/// The event of a handle, the current context being usable.
pub(super) fn event(handle: Handle) -> Outcome<Arc<Event>> {
    driver()?;
    let event = EVENTS.get(handle)?;
    super::context::CONTEXTS.get(event.context)?.check()?;
    Ok(event)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(to: *mut Handle, flags: u32) -> CUresult {
    api("cuEventCreate", || {
        let context = current()?.handle;
        // CU_EVENT_BLOCKING_SYNC, DISABLE_TIMING, INTERPROCESS
        if flags > 7 || (flags & INTERPROCESS != 0 && flags & DISABLE_TIMING == 0) {
            return Err(CUresult::ERROR_INVALID_VALUE.with(format!("{flags:#x} are not flags of an event")));
        }
        if flags & INTERPROCESS != 0 {
            return Err(super::unsupported("an interprocess event"));
        }
        let event = Event { context, timing: flags & DISABLE_TIMING == 0, state: Mutex::default() };
        unsafe { out(to, "phEvent", EVENTS.add(event)) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventDestroy_v2(handle: Handle) -> CUresult {
    api("cuEventDestroy_v2", || {
        let checked = event(handle).map(drop);
        EVENTS.remove(handle)?;
        checked
    })
}

fn record(handle: Handle, stream_handle: Handle, flags: u32) -> Outcome {
    let event = event(handle)?;
    let stream = stream(stream_handle)?;
    let context = stream.context()?;
    if context.handle != event.context {
        return Err(CUresult::ERROR_INVALID_HANDLE.with("the event and the stream belong to different contexts"));
    }
    if flags != 0 {
        return Err(super::unsupported(format!("cuEventRecordWithFlags with flags {flags:#x}")));
    }
    if let Some(captured) = &*lock(&stream.capture) {
        let captured = Some((captured.capture.clone(), captured.tail.clone()));
        *lock(&event.state) = Mark { recorded: true, captured, ..Mark::default() };
        return Ok(());
    }
    let at = Arc::new(Point::default());
    stream.submit_task(Task::Record(at.clone()))?;
    *lock(&event.state) = Mark { recorded: true, at: Some(at), captured: None, clock: stream.order.now() };
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventRecord(event: Handle, stream: Handle) -> CUresult {
    api("cuEventRecord", || record(event, stream, 0))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventRecordWithFlags(event: Handle, stream: Handle, flags: u32) -> CUresult {
    api("cuEventRecordWithFlags", || record(event, stream, flags))
}

/// An event that the host may ask about: not one of a capture.
fn on_timeline(event: &Event) -> Outcome<Mark> {
    let mark = event.mark();
    if let Some((capture, _)) = &mark.captured {
        capture.invalidate();
        return Err(CUresult::ERROR_CAPTURED_EVENT.into());
    }
    Ok(mark)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventQuery(handle: Handle) -> CUresult {
    api("cuEventQuery", || {
        let event = event(handle)?;
        let mark = on_timeline(&event)?;
        capture::forbid_unsafe("cuEventQuery")?;
        match mark.at {
            Some(point) if point.reached().is_none() => Err(CUresult::ERROR_NOT_READY.into()),
            _ => {
                order::met_by_host(&mark.clock);
                // What was done since the call began may have faulted.
                self::event(handle).map(drop)
            }
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventSynchronize(handle: Handle) -> CUresult {
    api("cuEventSynchronize", || {
        let found = event(handle)?;
        let mark = on_timeline(&found)?;
        if let Some(point) = mark.at {
            point.wait();
        }
        order::met_by_host(&mark.clock);
        // What came before may have put the context in error.
        event(handle).map(drop)
    })
}

fn elapsed(to: *mut f32, start: Handle, end: Handle) -> Outcome {
    let (start, end) = (event(start)?, event(end)?);
    if !start.timing || !end.timing {
        return Err(CUresult::ERROR_INVALID_HANDLE.with("an event was made with CU_EVENT_DISABLE_TIMING"));
    }
    let (Some(from), Some(till)) = (on_timeline(&start)?.at, on_timeline(&end)?.at) else {
        return Err(CUresult::ERROR_INVALID_HANDLE.with("an event has not been recorded"));
    };
    let (Some(from), Some(till)) = (from.reached(), till.reached()) else {
        return Err(CUresult::ERROR_NOT_READY.into());
    };
    let milliseconds =
        if till >= from { (till - from).as_secs_f64() * 1e3 } else { -((from - till).as_secs_f64() * 1e3) };
    super::context::CONTEXTS.get(end.context)?.check()?;
    unsafe { out(to, "pMilliseconds", milliseconds as f32) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime(to: *mut f32, start: Handle, end: Handle) -> CUresult {
    api("cuEventElapsedTime", || elapsed(to, start, end))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime_v2(to: *mut f32, start: Handle, end: Handle) -> CUresult {
    api("cuEventElapsedTime_v2", || elapsed(to, start, end))
}
