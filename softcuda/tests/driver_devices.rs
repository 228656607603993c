//! Several devices: contexts, memory, peer access, and host memory that all of them share.

use std::ffi::CString;
use std::ptr::null_mut;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaContext, DevicePtr, LaunchConfig, PushKernelArg, result};
use cudarc::nvrtc::Ptx;

/// Adds 1 to each of `n` words.
const INCREMENT: &str = "
.version 7.0
.target sm_80
.address_size 64
.visible .entry increment(.param .u64 at, .param .u32 n) {
    .reg .pred %p; .reg .b32 %r<4>; .reg .b64 %d<4>;
    mov.u32 %r1, %tid.x; ld.param.u32 %r2, [n]; setp.ge.u32 %p, %r1, %r2; @%p ret;
    ld.param.u64 %d1, [at]; mul.wide.u32 %d2, %r1, 4; add.s64 %d1, %d1, %d2;
    ld.global.u32 %r3, [%d1]; add.u32 %r3, %r3, 1; st.global.u32 [%d1], %r3; ret;
}";

/// An H100 and an A100, in this process; one test at a time.
fn devices() -> ([Arc<CudaContext>; 2], MutexGuard<'static, ()>) {
    static TURN: Mutex<()> = Mutex::new(());
    static ONCE: LazyLock<()> = LazyLock::new(|| {
        // SAFETY: under the lock that every test of this binary takes first.
        unsafe { std::env::set_var("SOFTCUDA_DEVICES", "h100,a100") };
        softcuda::install().expect("the software device");
    });
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    LazyLock::force(&ONCE);
    ([0, 1].map(|ordinal| CudaContext::new(ordinal).unwrap()), turn)
}

fn increment(context: &Arc<CudaContext>, addr: u64, n: u32) -> Result<(), cudarc::driver::DriverError> {
    let module = context.load_module(Ptx::from_src(INCREMENT))?;
    let kernel = module.load_function("increment")?;
    let stream = context.default_stream();
    unsafe { stream.launch_builder(&kernel).arg(&addr).arg(&n).launch(LaunchConfig::for_num_elems(n)) }?;
    stream.synchronize()
}

#[test]
fn devices_are_told_apart() {
    let (contexts, _turn) = devices();
    assert_eq!(CudaContext::device_count().unwrap(), 2);
    assert!(contexts[0].name().unwrap().contains("H100") && contexts[1].name().unwrap().contains("A100"));
    assert_eq!(contexts[1].compute_capability().unwrap(), (8, 0));
    assert_ne!(contexts[0].uuid().unwrap().bytes, contexts[1].uuid().unwrap().bytes);
    assert!(CudaContext::new(2).is_err());
    let mut bus = [0; 16];
    let mut device = -1;
    unsafe {
        sys::cuDeviceGetPCIBusId(bus.as_mut_ptr(), 16, 1).result().unwrap();
        sys::cuDeviceGetByPCIBusId(&mut device, bus.as_ptr()).result().unwrap();
    }
    assert_eq!(device, 1);
    let none = CString::new("0000:07:00.0").unwrap();
    assert_eq!(unsafe { sys::cuDeviceGetByPCIBusId(&mut device, none.as_ptr()) }, CUresult::CUDA_ERROR_INVALID_DEVICE);
}

#[test]
fn memory_counts_against_its_device() {
    let (contexts, _turn) = devices();
    let free = || [0, 1].map(|i: usize| contexts[i].mem_get_info().unwrap().0);
    let before = free();
    contexts[1].bind_to_thread().unwrap();
    let addr = unsafe { result::malloc_sync(1 << 30) }.unwrap();
    assert_eq!(free(), [before[0], before[1] - (1 << 30)]);
    let mut device = -1i32;
    let ordinal = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
    unsafe { sys::cuPointerGetAttribute((&raw mut device).cast(), ordinal, addr) }.result().unwrap();
    assert_eq!(device, 1);
    unsafe { result::free_sync(addr) }.unwrap();
    assert_eq!(free(), before);
}

#[test]
fn copies_cross_devices() {
    let (contexts, _turn) = devices();
    let streams = [0, 1].map(|i: usize| contexts[i].new_stream().unwrap());
    let from = streams[0].clone_htod(&[1u32, 2, 3, 4]).unwrap();
    let mut to = streams[1].alloc_zeros::<u32>(4).unwrap();
    streams[1].memcpy_dtod(&from, &mut to).unwrap();
    assert_eq!(streams[1].clone_dtoh(&to).unwrap(), [1, 2, 3, 4]);
    let (a, b) = (from.device_ptr(&streams[0]).0, to.device_ptr(&streams[1]).0);
    let handles = [0, 1].map(|i: usize| contexts[i].cu_ctx());
    contexts[0].bind_to_thread().unwrap();
    unsafe { sys::cuMemcpyPeer(b + 8, handles[1], a, handles[0], 8) }.result().unwrap();
    assert_eq!(streams[1].clone_dtoh(&to).unwrap(), [1, 2, 1, 2]);
}

#[test]
fn kernels_need_peer_access() {
    let (contexts, _turn) = devices();
    // Contexts of their own: a fault ends them.
    let own = [0, 1].map(|ordinal| CudaContext::new_non_primary(ordinal, 0).unwrap());
    own[1].bind_to_thread().unwrap();
    let there = unsafe { result::malloc_sync(8) }.unwrap();
    unsafe { result::memset_d8_sync(there, 0, 8) }.unwrap();
    own[0].bind_to_thread().unwrap();
    let mut can = 0;
    unsafe { sys::cuDeviceCanAccessPeer(&mut can, 0, 1) }.result().unwrap();
    assert_eq!(can, 1);
    let peer = own[1].cu_ctx();
    unsafe {
        assert_eq!(sys::cuCtxDisablePeerAccess(peer), CUresult::CUDA_ERROR_PEER_ACCESS_NOT_ENABLED);
        sys::cuCtxEnablePeerAccess(peer, 0).result().unwrap();
        assert_eq!(sys::cuCtxEnablePeerAccess(peer, 0), CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
    }
    increment(&own[0], there, 2).unwrap();
    let mut got = [0u32; 2];
    unsafe { result::memcpy_dtoh_sync(&mut got, there) }.unwrap();
    assert_eq!(got, [1, 1]);
    unsafe { sys::cuCtxDisablePeerAccess(peer) }.result().unwrap();
    let error = increment(&own[0], there, 2).unwrap_err();
    assert_eq!(error.0, CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    let text = error.error_string().unwrap().to_string_lossy().into_owned();
    assert!(text.contains("on device 1, to which the context on device 0 has no peer access"), "{text}");
    contexts[0].bind_to_thread().unwrap();
}

#[test]
fn page_locked_memory_is_every_device_s() {
    let (contexts, _turn) = devices();
    contexts[0].bind_to_thread().unwrap();
    let pinned = unsafe { result::malloc_host(8, 0) }.unwrap().cast::<u32>();
    unsafe { pinned.write_bytes(0, 2) };
    increment(&contexts[1], pinned as u64, 2).unwrap();
    assert_eq!(unsafe { [pinned.read(), pinned.add(1).read()] }, [1, 1]);
    contexts[0].bind_to_thread().unwrap();
    unsafe { result::free_host(pinned.cast()) }.unwrap();
}

#[test]
fn registered_host_memory_is_reached_under_its_address() {
    let (contexts, _turn) = devices();
    contexts[0].bind_to_thread().unwrap();
    let mut host = vec![5u32; 64];
    let addr = host.as_mut_ptr() as u64;
    let bytes = 256;
    let (mut device, mut flags) = (0, 0);
    unsafe {
        let unregistered = sys::cuMemHostGetDevicePointer_v2(&mut device, addr as *mut _, 0);
        assert_eq!(unregistered, CUresult::CUDA_ERROR_INVALID_VALUE);
        sys::cuMemHostRegister_v2(addr as *mut _, bytes, 0).result().unwrap();
        let again = sys::cuMemHostRegister_v2((addr + 128) as *mut _, bytes, 0);
        assert_eq!(again, CUresult::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
        sys::cuMemHostGetDevicePointer_v2(&mut device, addr as *mut _, 0).result().unwrap();
        assert_eq!(device, addr);
        sys::cuMemHostGetFlags(&mut flags, addr as *mut _).result().unwrap();
        assert_eq!(flags & 3, 3);
    }
    increment(&contexts[1], addr, 64).unwrap();
    assert_eq!(host, [6; 64]);
    // One word past the range.
    let own = CudaContext::new_non_primary(0, 0).unwrap();
    assert_eq!(increment(&own, addr, 65).unwrap_err().0, CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    contexts[0].bind_to_thread().unwrap();
    unsafe {
        sys::cuMemHostUnregister(addr as *mut _).result().unwrap();
        assert_eq!(sys::cuMemHostUnregister(addr as *mut _), CUresult::CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
        assert_ne!(sys::cuMemHostUnregister(null_mut()), CUresult::CUDA_SUCCESS);
    }
}
