//! What is known of a capture in progress: `cuStreamGetCaptureInfo`, and what its next node depends on.

use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::capture::forbid_implicit;
use super::graph_nodes::{check_members, handles};
use super::handles::Handle;
use super::status::{CUresult, Outcome};
use super::stream::{Kind, stream};
use super::{api, lock, out};

/// Where what is known of a capture goes; any but the first may be null.
struct InfoTo {
    status: *mut u32,
    id: *mut u64,
    graph: *mut Handle,
    dependencies: *mut *const Handle,
    edges: *mut *const u64,
    count: *mut usize,
}

/// Status of the capture that a stream takes part in, and while it is active its identifier, its graph so far, and the nodes that
/// the stream's next one will depend on.
unsafe fn info(handle: Handle, to: InfoTo) -> Outcome {
    let stream = stream(handle)?;
    if stream.kind == Kind::Legacy {
        forbid_implicit(stream.context()?.handle)?;
    }
    let mut part = lock(&stream.capture);
    // CU_STREAM_CAPTURE_STATUS_NONE, ACTIVE, INVALIDATED
    let value = part.as_ref().map_or(0, |it| if it.capture.invalid.load(Ordering::Acquire) { 2 } else { 1 });
    unsafe { out(to.status, "captureStatus_out", value)? };
    let Some(captured) = part.as_mut().filter(|_| value == 1) else { return Ok(()) };
    captured.shown.clone_from(&captured.tail);
    captured.edges = vec![0; captured.tail.len()];
    unsafe {
        give(to.id, Arc::as_ptr(&captured.capture) as u64)?;
        give(to.graph, captured.capture.graph_handle)?;
        give(to.dependencies, captured.shown.as_ptr())?;
        give(to.edges, captured.edges.as_ptr())?;
        give(to.count, captured.shown.len())
    }
}

/// Writes where something is asked for.
unsafe fn give<T>(to: *mut T, value: T) -> Outcome {
    if to.is_null() { Ok(()) } else { unsafe { out(to, "pointer", value) } }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamGetCaptureInfo(handle: Handle, status: *mut u32, id: *mut u64) -> CUresult {
    let (graph, dependencies, edges, count) = (null_mut(), null_mut(), null_mut(), null_mut());
    let to = InfoTo { status, id, graph, dependencies, edges, count };
    api("cuStreamGetCaptureInfo", || unsafe { info(handle, to) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamGetCaptureInfo_v2(
    handle: Handle,
    status: *mut u32,
    id: *mut u64,
    graph: *mut Handle,
    dependencies: *mut *const Handle,
    count: *mut usize,
) -> CUresult {
    let to = InfoTo { status, id, graph, dependencies, edges: null_mut(), count };
    api("cuStreamGetCaptureInfo_v2", || unsafe { info(handle, to) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamGetCaptureInfo_v3(
    handle: Handle,
    status: *mut u32,
    id: *mut u64,
    graph: *mut Handle,
    dependencies: *mut *const Handle,
    edges: *mut *const u64,
    count: *mut usize,
) -> CUresult {
    let to = InfoTo { status, id, graph, dependencies, edges, count };
    api("cuStreamGetCaptureInfo_v3", || unsafe { info(handle, to) })
}

/// Adds to what the next node of a capturing stream will depend on, or sets it.
unsafe fn update(handle: Handle, nodes: *const Handle, count: usize, flags: u32) -> Outcome {
    let stream = stream(handle)?;
    let nodes = unsafe { handles(nodes, count)? };
    let mut part = lock(&stream.capture);
    let Some(captured) = &mut *part else {
        return Err(CUresult::ERROR_ILLEGAL_STATE.with("the stream is not capturing"));
    };
    if captured.capture.invalid.load(Ordering::Acquire) {
        return Err(CUresult::ERROR_STREAM_CAPTURE_INVALIDATED.into());
    }
    check_members(&lock(&captured.capture.graph.nodes), &nodes)?;
    match flags {
        // CU_STREAM_ADD_CAPTURE_DEPENDENCIES, SET
        0 => {}
        1 => captured.tail.clear(),
        _ => return Err(CUresult::ERROR_INVALID_VALUE.with(format!("{flags:#x} are not flags of this call"))),
    }
    captured.depend_on(&nodes);
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamUpdateCaptureDependencies(
    handle: Handle,
    nodes: *const Handle,
    count: usize,
    flags: u32,
) -> CUresult {
    api("cuStreamUpdateCaptureDependencies", || unsafe { update(handle, nodes, count, flags) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamUpdateCaptureDependencies_v2(
    handle: Handle,
    nodes: *const Handle,
    edges: *const u64,
    count: usize,
    flags: u32,
) -> CUresult {
    api("cuStreamUpdateCaptureDependencies_v2", || unsafe {
        // SAFETY: as many as there are nodes, or null.
        if !edges.is_null() && (0..count).any(|place| edges.add(place).read_unaligned() != 0) {
            return Err(super::unsupported("an edge of another kind than the default"));
        }
        update(handle, nodes, count, flags)
    })
}
