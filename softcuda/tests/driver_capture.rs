//! Stream capture: what it records, what it forbids, and graphs run from it.

mod common;

use std::sync::Arc;

use common::{device, failure, says};
use cudarc::driver::sys::CUstreamCaptureMode::*;
use cudarc::driver::sys::{self, CUgraphInstantiate_flags as Flags, CUresult};
use cudarc::driver::{CudaContext, CudaGraph, CudaSlice, CudaStream, DevicePtr, result};

use CUresult::*;

const NO_FLAGS: Flags = Flags(0);

fn begin(stream: &CudaStream) {
    stream.begin_capture(CU_STREAM_CAPTURE_MODE_GLOBAL).unwrap();
}

/// Ends a capture that must have been invalidated, and checks that the stream then works as before.
fn ends_invalid(stream: &Arc<CudaStream>) {
    let status = stream.capture_status().unwrap();
    assert_eq!(status, sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_INVALIDATED);
    assert_eq!(failure(stream.end_capture(NO_FLAGS)).0, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    stream.synchronize().unwrap();
}

/// A stream whose slices wait for no events, and a slice of zeros.
fn stream_and_slice(context: &Arc<CudaContext>) -> (Arc<CudaStream>, CudaSlice<u32>) {
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().unwrap();
    let slice = stream.alloc_zeros::<u32>(4).unwrap();
    (stream, slice)
}

fn set(stream: &CudaStream, slice: &CudaSlice<u32>, value: u8) {
    let addr = slice.device_ptr(slice.stream()).0;
    unsafe { result::memset_d8_async(addr, value, 16, stream.cu_stream()) }.unwrap();
}

fn node_types(graph: &CudaGraph) -> Vec<u32> {
    let mut count = 0;
    unsafe { sys::cuGraphGetNodes(graph.cu_graph(), std::ptr::null_mut(), &mut count) }.result().unwrap();
    let mut nodes = vec![std::ptr::null_mut(); count];
    unsafe { sys::cuGraphGetNodes(graph.cu_graph(), nodes.as_mut_ptr(), &mut count) }.result().unwrap();
    let kind = |node| {
        let mut kind = sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
        unsafe { sys::cuGraphNodeGetType(node, &mut kind) }.result().unwrap();
        kind as u32
    };
    nodes.into_iter().map(kind).collect()
}

fn edges(graph: &CudaGraph) -> usize {
    let (mut count, none) = (0, std::ptr::null_mut);
    unsafe { sys::cuGraphGetEdges(graph.cu_graph(), none(), none(), &mut count) }.result().unwrap();
    count
}

#[test]
fn a_captured_sequence_replays() {
    let (_, context, _turn) = device();
    let (stream, mut slice) = stream_and_slice(&context);
    let mut copy = stream.alloc_zeros::<u32>(4).unwrap();
    let host = [7u32; 4];
    begin(&stream);
    let status = stream.capture_status().unwrap();
    assert_eq!(status, sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE);
    stream.memcpy_dtod(&slice, &mut copy).unwrap();
    stream.memcpy_htod(&host, &mut slice).unwrap();
    let graph = stream.end_capture(NO_FLAGS).unwrap().unwrap();
    assert_eq!(stream.clone_dtoh(&slice).unwrap(), [0; 4], "capture runs nothing");
    assert_eq!(node_types(&graph), [1, 1]);
    assert_eq!(edges(&graph), 1);
    graph.upload().unwrap();
    graph.launch().unwrap();
    assert_eq!(stream.clone_dtoh(&slice).unwrap(), [7; 4]);
    assert_eq!(stream.clone_dtoh(&copy).unwrap(), [0; 4]);
    graph.launch().unwrap();
    assert_eq!(stream.clone_dtoh(&copy).unwrap(), [7; 4]);
}

#[test]
fn forked_streams_join() {
    let (installed, context, _turn) = device();
    let (stream, slice) = stream_and_slice(&context);
    let other = context.new_stream().unwrap();
    let second = other.alloc_zeros::<u32>(4).unwrap();
    begin(&stream);
    set(&stream, &slice, 1);
    other.join(&stream).unwrap();
    set(&other, &second, 2);
    set(&stream, &slice, 3);
    stream.join(&other).unwrap();
    set(&stream, &second, 4);
    let graph = stream.end_capture(NO_FLAGS).unwrap().unwrap();
    // 1 -> 2, 1 -> 3, 2 -> 4, 3 -> 4
    assert_eq!((node_types(&graph).len(), edges(&graph)), (4, 4));
    // Any order that the dependencies allow ends the same.
    for seed in 0..20 {
        installed.control().set_seed(seed);
        set(&stream, &second, 0);
        graph.launch().unwrap();
        assert_eq!(stream.clone_dtoh(&slice).unwrap(), [0x0303_0303; 4]);
        assert_eq!(stream.clone_dtoh(&second).unwrap(), [0x0404_0404; 4]);
    }
    installed.control().set_seed(0);
}

#[test]
fn a_missing_dependency_shows_under_some_seed() {
    let (installed, context, _turn) = device();
    let (stream, slice) = stream_and_slice(&context);
    let other = context.new_stream().unwrap();
    begin(&stream);
    other.join(&stream).unwrap();
    set(&other, &slice, 1);
    set(&stream, &slice, 2);
    stream.join(&other).unwrap();
    let graph = stream.end_capture(NO_FLAGS).unwrap().unwrap();
    let outcomes: std::collections::BTreeSet<u32> = (1..50)
        .map(|seed| {
            installed.control().set_seed(seed);
            graph.launch().unwrap();
            stream.clone_dtoh(&slice).unwrap()[0] & 0xff
        })
        .collect();
    installed.control().set_seed(0);
    assert_eq!(outcomes, [1, 2].into());
}

#[test]
fn work_left_in_a_forked_stream_is_an_error() {
    let (_, context, _turn) = device();
    let (stream, slice) = stream_and_slice(&context);
    let other = context.new_stream().unwrap();
    begin(&stream);
    other.join(&stream).unwrap();
    set(&other, &slice, 1);
    let (code, text) = failure(stream.end_capture(NO_FLAGS));
    assert_eq!(code, CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
    says(&text, &["1 operations of forked streams"]);
    assert_eq!(other.capture_status().unwrap(), sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE);
}

#[test]
fn forbidden_calls_invalidate_the_capture() {
    let (_, context, _turn) = device();
    let (stream, mut slice) = stream_and_slice(&context);
    let event = stream.record_event(None).unwrap();
    let mut host = vec![0u32; 4];
    let addr = slice.device_ptr(&stream).0;
    type Call<'a> = Box<dyn FnMut() -> Result<(), cudarc::driver::DriverError> + 'a>;
    let calls: Vec<(&str, CUresult, Call)> = vec![
        ("stream sync", CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, Box::new(|| stream.synchronize())),
        ("context sync", CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, Box::new(|| context.synchronize())),
        ("alloc", CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, Box::new(|| unsafe { result::malloc_sync(4).map(drop) })),
        (
            "host alloc",
            CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
            Box::new(|| unsafe { context.alloc_pinned::<u32>(4).map(drop) }),
        ),
        ("alloc async", CUDA_ERROR_NOT_SUPPORTED, Box::new(|| stream.alloc_zeros::<u32>(4).map(drop))),
        (
            "read back",
            CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
            Box::new(|| unsafe { result::memcpy_dtoh_sync(&mut host, addr) }),
        ),
        ("event query", CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, Box::new(|| event.try_is_complete().map(drop))),
        ("outside event", CUDA_ERROR_STREAM_CAPTURE_ISOLATION, Box::new(|| stream.wait(&event))),
        ("captured event", CUDA_ERROR_CAPTURED_EVENT, Box::new(|| stream.record_event(None)?.synchronize())),
        (
            "module load",
            CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
            Box::new(|| unsafe { result::module::load_data(c".version 8.0 .target sm_80".as_ptr().cast()).map(drop) }),
        ),
        (
            "bad memset",
            CUDA_ERROR_INVALID_VALUE,
            Box::new(|| unsafe { result::memset_d8_async(addr, 0, 17, stream.cu_stream()) }),
        ),
    ];
    for (what, code, mut call) in calls {
        begin(&stream);
        assert_eq!(failure(call()).0, code, "{what}");
        ends_invalid(&stream);
    }
    // After all that the stream captures as ever.
    begin(&stream);
    stream.memset_zeros(&mut slice).unwrap();
    stream.end_capture(NO_FLAGS).unwrap().unwrap().launch().unwrap();
}

#[test]
fn rules_of_beginning_and_ending() {
    let (_, context, _turn) = device();
    let (stream, _slice) = stream_and_slice(&context);
    let legacy = context.default_stream();
    let refused = legacy.begin_capture(CU_STREAM_CAPTURE_MODE_RELAXED);
    assert_eq!(failure(refused).0, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    assert_eq!(failure(stream.end_capture(NO_FLAGS)).0, CUDA_ERROR_ILLEGAL_STATE);

    // Relaxed captures allow what others forbid.
    stream.begin_capture(CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
    let addr = unsafe { result::malloc_sync(4) }.unwrap();
    unsafe { result::free_sync(addr) }.unwrap();
    stream.end_capture(NO_FLAGS).unwrap();

    // A global capture forbids them in other threads too, a thread-local one does not.
    let elsewhere = |context: &Arc<CudaContext>| {
        let context = context.clone();
        let alloc = move || {
            context.bind_to_thread().unwrap();
            unsafe { result::malloc_sync(4).and_then(|addr| result::free_sync(addr)) }
        };
        std::thread::spawn(alloc).join().unwrap()
    };
    stream.begin_capture(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    elsewhere(&context).unwrap();
    stream.end_capture(NO_FLAGS).unwrap();
    begin(&stream);
    assert_eq!(failure(elsewhere(&context)).0, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    ends_invalid(&stream);

    // Two captures cannot merge.
    let other = context.new_stream().unwrap();
    begin(&stream);
    begin(&other);
    assert_eq!(failure(stream.join(&other)).0, CUDA_ERROR_STREAM_CAPTURE_MERGE);
    ends_invalid_pair(&stream, &other);

    // Another thread may not end it.
    begin(&stream);
    let moved = stream.clone();
    let code = std::thread::spawn(move || failure(moved.end_capture(NO_FLAGS)).0).join().unwrap();
    assert_eq!(code, CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
    stream.end_capture(NO_FLAGS).unwrap();

    // A fork cannot end what the origin began.
    begin(&stream);
    other.join(&stream).unwrap();
    assert_eq!(failure(other.end_capture(NO_FLAGS)).0, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
    ends_invalid(&stream);

    begin(&stream);
    let both =
        Flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH | Flags::CUDA_GRAPH_INSTANTIATE_FLAG_DEVICE_LAUNCH;
    assert_eq!(failure(stream.end_capture(both)).0, CUDA_ERROR_INVALID_VALUE);
}

fn ends_invalid_pair(a: &Arc<CudaStream>, b: &Arc<CudaStream>) {
    for stream in [a, b] {
        assert_eq!(failure(stream.end_capture(NO_FLAGS)).0, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    }
    a.synchronize().unwrap();
}

#[test]
fn the_legacy_stream_may_not_wait_for_a_captured_blocking_one() {
    let (_, context, _turn) = device();
    unsafe { context.disable_event_tracking() };
    let legacy = context.default_stream();
    let mut slice = legacy.alloc_zeros::<u32>(4).unwrap();
    let raw = result::stream::create(result::stream::StreamKind::Default).unwrap();
    let blocking = unsafe { context.wrap_borrowed_stream(raw) };
    begin(&blocking);
    assert_eq!(failure(legacy.memset_zeros(&mut slice)).0, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    ends_invalid(&blocking);
    unsafe { result::stream::destroy(raw) }.unwrap();
}

#[test]
fn an_abandoned_capture_forbids_nothing_more() {
    let (_, context, _turn) = device();
    let alloc = || unsafe { result::malloc_sync(4).and_then(|addr| result::free_sync(addr)) };
    let (stream, slice) = stream_and_slice(&context);
    let other = context.new_stream().unwrap();
    begin(&stream);
    other.join(&stream).unwrap();
    assert_eq!(failure(alloc()).0, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    std::mem::forget(slice);
    unsafe { result::stream::destroy(stream.cu_stream()) }.unwrap();
    std::mem::forget(stream);
    alloc().unwrap();
    assert_eq!(other.capture_status().unwrap(), sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE);

    let short_lived = CudaContext::new_non_primary(0, 0).unwrap();
    begin(&short_lived.new_stream().map(std::mem::ManuallyDrop::new).unwrap());
    unsafe { sys::cuCtxDestroy_v2(short_lived.cu_ctx()) }.result().unwrap();
    std::mem::forget(short_lived);
    context.bind_to_thread().unwrap();
    alloc().unwrap();
}

/// Memory that is gone when the graph runs is met by the device, as on hardware, and not by the launching call.
/// The fault stays with the context, so this takes one of its own.
#[test]
fn freed_memory_in_a_graph_faults() {
    let (installed, _context, _turn) = device();
    let context = CudaContext::new_non_primary(0, 0).unwrap();
    let (stream, slice) = stream_and_slice(&context);
    begin(&stream);
    set(&stream, &slice, 1);
    let graph = stream.end_capture(NO_FLAGS).unwrap().unwrap();
    drop(slice);
    graph.launch().unwrap();
    let (code, text) = failure(stream.synchronize());
    assert_eq!(code, CUDA_ERROR_ILLEGAL_ADDRESS);
    says(&text, &["an illegal memory access", "which has been freed"]);
    says(&installed.control().last_fault().unwrap(), &["which has been freed"]);
}

#[test]
fn the_graph_of_a_capture_in_progress_can_be_had_and_added_to() {
    let (_, context, _turn) = device();
    let (stream, slice) = stream_and_slice(&context);
    let addr = slice.device_ptr(slice.stream()).0;
    begin(&stream);
    set(&stream, &slice, 1);
    let info = || {
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        let (mut id, mut graph, mut nodes, mut count) = (0, std::ptr::null_mut(), std::ptr::null(), 0);
        let raw = stream.cu_stream();
        let told =
            unsafe { sys::cuStreamGetCaptureInfo_v2(raw, &mut status, &mut id, &mut graph, &mut nodes, &mut count) };
        told.result().unwrap();
        assert_eq!(status, sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE);
        // SAFETY: so many, until the next call on the stream.
        (id, graph, unsafe { std::slice::from_raw_parts(nodes, count) }.to_vec())
    };
    let (id, graph, tail) = info();
    assert_eq!(tail.len(), 1);
    let mut count = 0;
    unsafe { sys::cuGraphGetNodes(graph, std::ptr::null_mut(), &mut count) }.result().unwrap();
    assert_eq!(count, 1);
    // A node by hand, between those that the stream makes.
    let params = sys::CUDA_MEMSET_NODE_PARAMS { dst: addr, pitch: 0, value: 2, elementSize: 1, width: 8, height: 1 };
    let mut node = std::ptr::null_mut();
    unsafe {
        sys::cuGraphAddMemsetNode(&mut node, graph, tail.as_ptr(), 1, &params, context.cu_ctx()).result().unwrap();
        sys::cuStreamUpdateCaptureDependencies(stream.cu_stream(), &mut node, 1, 1).result().unwrap();
    }
    assert_eq!(info(), (id, graph, vec![node]));
    unsafe { result::memset_d8_async(addr, 3, 4, stream.cu_stream()) }.unwrap();
    let (mut ended, mut before) = (std::ptr::null_mut(), 0);
    unsafe {
        let last = info().2[0];
        sys::cuStreamEndCapture(stream.cu_stream(), &mut ended).result().unwrap();
        assert_eq!(ended, graph);
        let mut found = [std::ptr::null_mut(); 4];
        before += 4;
        sys::cuGraphNodeGetDependencies(last, found.as_mut_ptr(), &mut before).result().unwrap();
        assert_eq!((before, found[0]), (1, node));
        let mut executable = std::ptr::null_mut();
        sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0).result().unwrap();
        sys::cuGraphLaunch(executable, stream.cu_stream()).result().unwrap();
        sys::cuGraphDestroy(graph).result().unwrap();
    }
    assert_eq!(stream.clone_dtoh(&slice).unwrap(), [0x0303_0303, 0x0202_0202, 0x0101_0101, 0x0101_0101]);
    // Not capturing: there is nothing to update, and nothing to tell.
    let updated = unsafe { sys::cuStreamUpdateCaptureDependencies(stream.cu_stream(), &mut node, 1, 1) };
    assert_eq!(updated, CUDA_ERROR_ILLEGAL_STATE);
    // The graph of a capture that comes to nothing goes with it.
    begin(&stream);
    let (_, graph, _) = info();
    unsafe { sys::cuMemFree_v2(0) };
    unsafe { sys::cuCtxSynchronize() };
    ends_invalid(&stream);
    assert_eq!(unsafe { sys::cuGraphDestroy(graph) }, CUDA_ERROR_INVALID_VALUE);
}
