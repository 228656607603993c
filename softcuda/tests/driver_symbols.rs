//! Entry points as programs look them up: by name in the library, and through `cuGetProcAddress`.

mod common;

use std::ffi::{CStr, CString, c_void};

use common::device;
use cudarc::driver::sys::{self, CUresult, CUstream};
use libloading::os::unix::{Library, RTLD_NOW, Symbol};

use CUresult::*;

fn library() -> Library {
    unsafe { Library::open(Some("libcuda.so.1"), RTLD_NOW) }.unwrap()
}

fn symbol<T>(library: &Library, name: &str) -> Symbol<T> {
    unsafe { library.get(CString::new(name).unwrap().as_bytes_with_nul()) }.unwrap_or_else(|error| panic!("{error}"))
}

/// The address that `cuGetProcAddress` gives for a name.
fn proc_address(name: &CStr, flags: u64) -> *mut c_void {
    let mut found = std::ptr::null_mut();
    let status = unsafe { sys::cuGetProcAddress_v2(name.as_ptr(), &mut found, 12080, flags, std::ptr::null_mut()) };
    status.result().unwrap_or_else(|error| panic!("{name:?}: {error:?}"));
    found
}

#[test]
fn what_is_not_supported_has_a_symbol_that_says_so() {
    let (_, context, _turn) = device();
    context.bind_to_thread().unwrap();
    let library = library();
    type Plain = unsafe extern "C" fn(*mut u8, usize) -> CUresult;
    for name in [
        "cuIpcGetMemHandle",
        "cuIpcOpenMemHandle_v2",
        "cuIpcCloseMemHandle",
        "cuIpcGetEventHandle",
        "cuIpcOpenEventHandle",
        "cuMemAddressReserve",
        "cuMulticastCreate",
        "cuTexObjectCreate",
        "cuGreenCtxCreate",
    ] {
        let function: Symbol<Plain> = symbol(&library, name);
        let mut room = [0u8; 64];
        assert_eq!(unsafe { function(room.as_mut_ptr(), 0) }, CUDA_ERROR_NOT_SUPPORTED, "{name}");
        let base = CString::new(name.trim_end_matches("_v2")).unwrap();
        assert_eq!(proc_address(&base, 0), *function as *mut c_void, "{name}");
    }
}

#[test]
fn programs_with_a_default_stream_for_each_thread_get_it() {
    const PER_THREAD: CUstream = 2 as CUstream;
    let (_, context, _turn) = device();
    context.bind_to_thread().unwrap();
    let library = library();
    type GetId = unsafe extern "C" fn(CUstream, *mut u64) -> CUresult;
    type Set = unsafe extern "C" fn(u64, u8, usize, CUstream) -> CUresult;
    type Copy = unsafe extern "C" fn(*mut c_void, u64, usize) -> CUresult;
    let id_of: Symbol<GetId> = symbol(&library, "cuStreamGetId_ptsz");
    let set: Symbol<Set> = symbol(&library, "cuMemsetD8Async_ptsz");
    let copy: Symbol<Copy> = symbol(&library, "cuMemcpyDtoH_v2_ptds");
    let (mut plain, mut mine, mut own, mut other) = (0, 0, 0, 0);
    unsafe {
        sys::cuStreamGetId(std::ptr::null_mut(), &mut plain).result().unwrap();
        sys::cuStreamGetId(PER_THREAD, &mut mine).result().unwrap();
        id_of(std::ptr::null_mut(), &mut own).result().unwrap();
        // A stream that is named is that stream.
        id_of(1 as CUstream, &mut other).result().unwrap();
    }
    assert_eq!((own, other), (mine, plain));
    assert_ne!(own, plain);
    let mut addr = 0;
    let mut got = [0u8; 8];
    unsafe {
        sys::cuMemAlloc_v2(&mut addr, 8).result().unwrap();
        set(addr, 7, 8, std::ptr::null_mut()).result().unwrap();
        copy(got.as_mut_ptr().cast(), addr, 8).result().unwrap();
        sys::cuMemFree_v2(addr).result().unwrap();
    }
    assert_eq!(got, [7; 8]);
    // CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM
    assert_eq!(proc_address(c"cuStreamGetId", 2), *id_of as *mut c_void);
    assert_ne!(proc_address(c"cuStreamGetId", 1), *id_of as *mut c_void);
    assert_eq!(proc_address(c"cuMemAlloc", 2), proc_address(c"cuMemAlloc", 0));
}
