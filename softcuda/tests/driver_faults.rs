//! Faults of kernels: the launch succeeds, everything after it fails, and the message says where it happened. Each test
//! has a context of its own, since a fault stays with its context.

mod common;

use std::sync::Arc;

use common::{device, failure, hold, says};
use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaContext, CudaFunction, CudaStream, DevicePtr, LaunchConfig, PushKernelArg, result};
use cudarc::nvrtc::Ptx;

use CUresult::*;

/// Kernels of one pointer and one offset in bytes; each instruction that can fault is on a line of its own.
fn kernel(context: &Arc<CudaContext>, body: &str) -> CudaFunction {
    let source = format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry victim(.param .u64 base, .param .u64 offset)\n{{\n\
         .reg .b32 %r<4>;\n.reg .b64 %rd<4>;\n.reg .pred %p;\nld.param.u64 %rd1, [base];\nld.param.u64 %rd2, [offset];\n\
         add.s64 %rd3, %rd1, %rd2;\nmov.u32 %r1, %tid.x;\nsetp.eq.u32 %p, %r1, 5;\n{body}\nret;\n}}\n"
    );
    context.load_module(Ptx::from_src(source)).unwrap().load_function("victim").unwrap()
}

/// The line of the source that the body starts on.
const BODY: u32 = 14;

struct Faulted {
    code: CUresult,
    text: String,
    last: String,
}

/// Runs `body` on an allocation of 64 words with an offset in bytes, in 32 threads.
fn fault(body: &str, offset: i64, free_first: bool) -> Faulted {
    let (installed, _primary, _turn) = device();
    let context = CudaContext::new_non_primary(0, 0).unwrap();
    let stream = context.default_stream();
    let function = kernel(&context, body);
    let slice = stream.alloc_zeros::<u32>(64).unwrap();
    let addr = cudarc::driver::DevicePtr::device_ptr(&slice, &stream).0;
    let slice = (!free_first).then_some(slice);
    let config = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (32, 1, 1), shared_mem_bytes: 0 };
    let launched = unsafe { stream.launch_builder(&function).arg(&addr).arg(&offset).launch(config) };
    launched.expect("a launch reports no fault of its kernel");
    let (code, text) = failure(stream.synchronize());
    // Whatever comes next fails alike.
    assert_eq!(failure(context.synchronize()).0, code);
    assert_eq!(failure(stream.alloc_zeros::<u32>(1)).0, code);
    assert_eq!(failure(unsafe { stream.launch_builder(&function).arg(&addr).arg(&offset).launch(config) }).0, code);
    assert_eq!(failure(context.new_stream()).0, code);
    drop(slice);
    let last = installed.control().last_fault().unwrap();
    assert!(text.contains(&last), "{text:?} does not contain {last:?}");
    drop((function, stream, context));
    // Other contexts go on.
    let other = CudaContext::new_non_primary(0, 0).unwrap();
    other.synchronize().unwrap();
    Faulted { code, text, last }
}

#[test]
fn writes_past_the_end() {
    let found = fault("@%p st.global.u32 [%rd3], %r1;", 256, false);
    assert_eq!(found.code, CUDA_ERROR_ILLEGAL_ADDRESS);
    says(&found.text, &["an illegal memory access was encountered", "0 bytes past the end of allocation", "256 bytes"]);
    says(&found.last, &["kernel `victim`", &format!("line {BODY}: `@%p st.global.u32 [%rd3], %r1;`")]);
    says(&found.last, &["block (0, 0, 0), thread (5, 0, 0)"]);
}

#[test]
fn reads_before_the_start() {
    let found = fault("ld.global.u32 %r2, [%rd3];", -8, false);
    assert_eq!(found.code, CUDA_ERROR_ILLEGAL_ADDRESS);
    says(&found.last, &["8 bytes before the start of allocation"]);
}

#[test]
fn an_access_half_outside() {
    let found = fault("ld.global.b8 %r2, [%rd3]; ld.global.u32 %r2, [%rd3+1];", 252 + 3, false);
    assert_eq!(found.code, CUDA_ERROR_ILLEGAL_ADDRESS);
    says(&found.last, &["past the end"]);
}

#[test]
fn freed_memory() {
    let found = fault("ld.global.u32 %r2, [%rd3];", 16, true);
    assert_eq!(found.code, CUDA_ERROR_ILLEGAL_ADDRESS);
    says(&found.last, &["16 bytes into allocation", "which has been freed"]);
}

#[test]
fn null_pointers() {
    let found = fault("ld.global.u32 %r2, [%rd2];", 0, false);
    assert_eq!(found.code, CUDA_ERROR_ILLEGAL_ADDRESS);
    says(&found.last, &["null pointer"]);
}

#[test]
fn misaligned_addresses() {
    let found = fault("ld.global.u32 %r2, [%rd3];", 2, false);
    assert_eq!(found.code, CUDA_ERROR_MISALIGNED_ADDRESS);
    says(&found.text, &["misaligned address"]);
    says(&found.last, &["kernel `victim`", &format!("line {BODY}")]);
}

#[test]
fn traps() {
    let found = fault("@%p trap;", 0, false);
    assert_eq!(found.code, CUDA_ERROR_LAUNCH_FAILED);
    says(&found.last, &["trap", "thread (5, 0, 0)"]);
}

#[test]
fn endless_loops_time_out() {
    let (installed, _context, turn) = device();
    installed.control().set_timeout_ms(200);
    drop((_context, turn));
    let found = fault("again: bra again;", 0, false);
    installed.control().set_timeout_ms(0);
    assert_eq!(found.code, CUDA_ERROR_LAUNCH_TIMEOUT);
}

/// A context with a stream that a fault is queued up in; what `then` does, given the stream and an allocation of 64 words,
/// happens before the fault.
fn after_a_queued_fault<T>(then: impl FnOnce(&Arc<CudaStream>, u64) -> T) -> T {
    let (_, _primary, _turn) = device();
    let context = CudaContext::new_non_primary(0, 0).unwrap();
    let stream = context.new_stream().unwrap();
    let function = kernel(&context, "ld.global.u32 %r2, [%rd2];");
    let slice = stream.alloc_zeros::<u32>(64).unwrap();
    let addr = slice.device_ptr(&stream).0;
    stream.synchronize().unwrap();
    let release = hold(&stream);
    let config = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (1, 1, 1), shared_mem_bytes: 0 };
    unsafe { stream.launch_builder(&function).arg(&addr).arg(&0i64).launch(config) }.unwrap();
    let releaser = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(50));
        release.send(()).unwrap();
    });
    let seen = then(&stream, addr);
    releaser.join().unwrap();
    assert_eq!(failure(stream.synchronize()).0, CUDA_ERROR_ILLEGAL_ADDRESS);
    seen
}

#[test]
fn copies_that_return_when_they_are_done_tell_of_a_fault_before_them() {
    let (code, got) = after_a_queued_fault(|stream, addr| {
        let mut got = [9u32; 64];
        // SAFETY: the allocation has 64 words.
        let copied = unsafe { result::memcpy_dtoh_async(&mut got, addr, stream.cu_stream()) };
        (failure(copied).0, got)
    });
    assert_eq!((code, got), (CUDA_ERROR_ILLEGAL_ADDRESS, [9; 64]));
    // Rows to pageable memory are copied before the call returns as well.
    let code = after_a_queued_fault(|stream, addr| {
        let mut got = [0u32; 16];
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcHost: std::ptr::null(),
            srcDevice: addr,
            srcArray: std::ptr::null_mut(),
            srcPitch: 32,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
            dstHost: got.as_mut_ptr().cast(),
            dstDevice: 0,
            dstArray: std::ptr::null_mut(),
            dstPitch: 16,
            WidthInBytes: 16,
            Height: 4,
        };
        unsafe { sys::cuMemcpy2DAsync_v2(&copy, stream.cu_stream()) }
    });
    assert_eq!(code, CUDA_ERROR_ILLEGAL_ADDRESS);
}

#[test]
fn callbacks_are_told_of_a_fault_before_them_and_host_functions_do_not_run() {
    unsafe extern "C" fn note(_: sys::CUstream, status: CUresult, data: *mut std::ffi::c_void) {
        // SAFETY: `data` outlives the stream's work.
        unsafe { data.cast::<CUresult>().write(status) };
    }
    unsafe extern "C" fn run(data: *mut std::ffi::c_void) {
        // SAFETY: as above.
        unsafe { data.cast::<bool>().write(true) };
    }
    let (mut seen, mut ran) = (CUDA_SUCCESS, false);
    after_a_queued_fault(|stream, _| unsafe {
        sys::cuStreamAddCallback(stream.cu_stream(), Some(note), (&raw mut seen).cast(), 0).result().unwrap();
        sys::cuLaunchHostFunc(stream.cu_stream(), Some(run), (&raw mut ran).cast()).result().unwrap();
    });
    assert_eq!((seen, ran), (CUDA_ERROR_ILLEGAL_ADDRESS, false));
}

#[test]
fn whatever_waits_for_work_tells_of_its_fault() {
    type Wait = fn(&Arc<CudaStream>) -> CUresult;
    let waits: [(&str, Wait); 4] = [
        ("query", |stream| {
            loop {
                let status = unsafe { sys::cuStreamQuery(stream.cu_stream()) };
                if status != CUDA_ERROR_NOT_READY {
                    break status;
                }
            }
        }),
        ("event", |stream| {
            let event = stream.record_event(None).unwrap();
            failure(event.synchronize()).0
        }),
        ("peer access", |stream| unsafe { sys::cuCtxDisablePeerAccess(stream.context().cu_ctx()) }),
        ("free", |stream| {
            let context = stream.context().cu_ctx();
            let mut addr = 0;
            unsafe {
                sys::cuCtxSetCurrent(context).result().unwrap();
                sys::cuMemAlloc_v2(&mut addr, 16).result().unwrap();
                sys::cuMemFree_v2(addr)
            }
        }),
    ];
    for (what, wait) in waits {
        assert_eq!(after_a_queued_fault(|stream, _| wait(stream)), CUDA_ERROR_ILLEGAL_ADDRESS, "{what}");
    }
}
