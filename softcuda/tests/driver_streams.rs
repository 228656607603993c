//! Order of work across streams and the host, where some of it has to wait for the host.

mod common;

use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::Arc;
use std::time::Duration;

use common::{device, hold, says, status};
use cudarc::driver::sys::{self, CUresult, CUstream};
use cudarc::driver::{CudaStream, DevicePtr, result};

fn query(stream: CUstream) -> CUresult {
    unsafe { sys::cuStreamQuery(stream) }
}

#[test]
fn a_waiting_stream_keeps_its_order_and_the_host_goes_on() {
    let (_, context, _turn) = device();
    let stream = context.new_stream().unwrap();
    let cell = stream.alloc_zeros::<u32>(1).unwrap();
    let addr = cell.device_ptr(&stream).0;
    let release = hold(&stream);
    let event = context.new_event(None).unwrap();
    // The bytes that a pageable source has when the call is made are the ones that arrive.
    let mut source = vec![7u32];
    unsafe { result::memcpy_htod_async(addr, &source, stream.cu_stream()) }.unwrap();
    source[0] = 8;
    event.record(&stream).unwrap();
    assert_eq!(query(stream.cu_stream()), CUresult::CUDA_ERROR_NOT_READY);
    assert!(!event.is_complete());
    assert_eq!(unsafe { (addr as *const u32).read_volatile() }, 0, "work overtook a host function");
    release.send(()).unwrap();
    event.synchronize().unwrap();
    assert_eq!(unsafe { (addr as *const u32).read_volatile() }, 7);
    stream.synchronize().unwrap();
    assert_eq!(query(stream.cu_stream()), CUresult::CUDA_SUCCESS);
}

#[test]
fn streams_wait_for_events_of_others() {
    let (_, context, _turn) = device();
    let streams: Vec<Arc<CudaStream>> = (0..3).map(|_| context.new_stream().unwrap()).collect();
    let cell = streams[0].alloc_zeros::<u32>(1).unwrap();
    let addr = cell.device_ptr(&streams[0]).0;
    let release = hold(&streams[0]);
    unsafe { result::memset_d8_async(addr, 1, 1, streams[0].cu_stream()) }.unwrap();
    let event = streams[0].record_event(None).unwrap();
    streams[1].wait(&event).unwrap();
    unsafe { result::memset_d8_async(addr, 2, 1, streams[1].cu_stream()) }.unwrap();
    // The third stream waits for nobody.
    unsafe { result::memset_d8_async(addr + 1, 9, 1, streams[2].cu_stream()) }.unwrap();
    streams[2].synchronize().unwrap();
    assert_eq!(unsafe { (addr as *const u32).read_volatile() }, 0x900);
    assert_eq!(query(streams[1].cu_stream()), CUresult::CUDA_ERROR_NOT_READY);
    release.send(()).unwrap();
    streams[1].synchronize().unwrap();
    assert_eq!(unsafe { (addr as *const u32).read_volatile() }, 0x902);
}

#[test]
fn the_legacy_stream_and_blocking_streams_wait_for_each_other() {
    let (_, context, _turn) = device();
    let (mut blocking, mut apart) = (null_mut(), null_mut());
    unsafe {
        sys::cuStreamCreate(&mut blocking, 0).result().unwrap();
        sys::cuStreamCreate(&mut apart, 1).result().unwrap();
    }
    let cell = context.default_stream().alloc_zeros::<u32>(1).unwrap();
    let addr = cell.device_ptr(&context.default_stream()).0;
    let set = |stream: CUstream, value: u8| unsafe { result::memset_d8_async(addr, value, 1, stream) }.unwrap();
    let now = || unsafe { (addr as *const u32).read_volatile() };
    let owned = unsafe { context.wrap_borrowed_stream(blocking) };
    let release = hold(&owned);
    set(null_mut(), 1);
    set(blocking, 2);
    assert_eq!(query(null_mut()), CUresult::CUDA_ERROR_NOT_READY);
    set(apart, 3);
    assert_eq!(now(), 3, "a non-blocking stream waited for the legacy stream");
    release.send(()).unwrap();
    unsafe { result::stream::synchronize(blocking) }.unwrap();
    assert_eq!(now(), 2, "a blocking stream overtook the legacy stream");
    // A copy without a stream is the legacy stream's: it waits for what is held, and returns when it is done.
    let release = hold(&owned);
    set(blocking, 4);
    let waiter = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        release.send(()).unwrap();
    });
    let mut got = [0u8];
    unsafe { result::memcpy_dtoh_sync(&mut got, addr) }.unwrap();
    assert_eq!(got, [4]);
    waiter.join().unwrap();
    drop(owned);
    unsafe {
        sys::cuStreamDestroy_v2(blocking).result().unwrap();
        sys::cuStreamDestroy_v2(apart).result().unwrap();
    }
}

#[test]
fn freeing_waits_and_synchronising_sees_destroyed_streams() {
    let (_, context, _turn) = device();
    let stream = context.new_stream().unwrap();
    let free = context.mem_get_info().unwrap().0;
    let addr = unsafe { result::malloc_async(stream.cu_stream(), 1 << 20) }.unwrap();
    let release = hold(&stream);
    unsafe { result::free_async(addr, stream.cu_stream()) }.unwrap();
    assert_eq!(context.mem_get_info().unwrap().0, free - (1 << 20), "freed before its turn");
    let raw = stream.cu_stream();
    unsafe { sys::cuStreamDestroy_v2(raw) }.result().unwrap();
    let waiter = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        release.send(()).unwrap();
    });
    context.synchronize().unwrap();
    assert_eq!(context.mem_get_info().unwrap().0, free);
    waiter.join().unwrap();
    std::mem::forget(stream);
}

#[test]
fn host_functions_may_not_call_cuda() {
    unsafe extern "C" fn call(data: *mut c_void) {
        let mut addr = 0;
        // SAFETY: `data` outlives the stream's work.
        unsafe { data.cast::<CUresult>().write(sys::cuMemAlloc_v2(&mut addr, 16)) };
    }
    let (_, context, _turn) = device();
    let stream = context.new_stream().unwrap();
    let mut seen = CUresult::CUDA_SUCCESS;
    context.bind_to_thread().unwrap();
    unsafe { sys::cuLaunchHostFunc(stream.cu_stream(), Some(call), (&raw mut seen).cast()) }.result().unwrap();
    stream.synchronize().unwrap();
    assert_ne!(seen, CUresult::CUDA_SUCCESS);
}

#[test]
fn misuse_is_refused() {
    let (_, context, _turn) = device();
    let stream = context.new_stream().unwrap();
    says(&status(unsafe { sys::cuLaunchHostFunc(stream.cu_stream(), None, null_mut()) }).1, &["`fn` is null"]);
}

#[test]
fn callbacks_come_in_their_turn() {
    unsafe extern "C" fn note(stream: CUstream, status: CUresult, data: *mut c_void) {
        // SAFETY: `data` outlives the stream's work.
        unsafe { data.cast::<(CUstream, CUresult)>().write((stream, status)) };
    }
    let (_, context, _turn) = device();
    let stream = context.new_stream().unwrap();
    let mut seen: (CUstream, CUresult) = (null_mut(), CUresult::CUDA_ERROR_UNKNOWN);
    let release = hold(&stream);
    let data = (&raw mut seen).cast();
    unsafe { sys::cuStreamAddCallback(stream.cu_stream(), Some(note), data, 0) }.result().unwrap();
    assert_eq!(unsafe { data.cast::<(CUstream, CUresult)>().read_volatile() }.0, null_mut());
    release.send(()).unwrap();
    stream.synchronize().unwrap();
    assert_eq!(
        unsafe { data.cast::<(CUstream, CUresult)>().read_volatile() },
        (stream.cu_stream(), CUresult::CUDA_SUCCESS)
    );
}
