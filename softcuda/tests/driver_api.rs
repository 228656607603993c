//! The driver without kernels, through cudarc.

mod common;

use std::ffi::{CString, c_void};
use std::ptr::{null, null_mut};

use common::{device, failure, says, status};
use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaContext, DevicePtr, DevicePtrMut, result};
use softcuda::memory::POISON;

#[test]
fn device_describes_itself() {
    let (installed, context, _turn) = device();
    assert!(installed.path().ends_with("libsoftcuda.so"));
    assert!(context.name().unwrap().contains("softcuda"));
    assert_eq!(context.compute_capability().unwrap(), (9, 0));
    use sys::CUdevice_attribute::*;
    assert_eq!(context.attribute(CU_DEVICE_ATTRIBUTE_WARP_SIZE).unwrap(), 32);
    assert_eq!(context.attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).unwrap(), 132);
    assert_eq!(context.attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN).unwrap(), 227 << 10);
    assert!(context.has_async_alloc());
    assert_eq!(context.total_mem().unwrap(), 80 << 30);
    let mut version = 0;
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().unwrap();
    assert!(version >= 12_080);
    assert_eq!(failure(cudarc::driver::CudaContext::new(1)).0, CUresult::CUDA_ERROR_INVALID_DEVICE);
}

#[test]
fn copies_and_sets_round_trip() {
    let (_, context, _turn) = device();
    for stream in [context.default_stream(), context.per_thread_stream(), context.new_stream().unwrap()] {
        let host: Vec<u32> = (0..10_000).map(|i| i * 7).collect();
        let a = stream.clone_htod(&host).unwrap();
        let mut b = unsafe { stream.alloc::<u32>(host.len()) }.unwrap();
        stream.memcpy_dtod(&a, &mut b).unwrap();
        assert_eq!(stream.clone_dtoh(&b).unwrap(), host);
        stream.memset_zeros(&mut b.slice_mut(10..20)).unwrap();
        let got = stream.clone_dtoh(&b).unwrap();
        assert_eq!(got[10..20], [0; 10]);
        assert_eq!((&got[..10], &got[20..]), (&host[..10], &host[20..]));
        let (addr, _record) = b.device_ptr_mut(&stream);
        unsafe {
            sys::cuMemsetD16Async(addr + 2, 0xabcd, 2, stream.cu_stream()).result().unwrap();
            sys::cuMemsetD32_v2(addr + 8, 0x1234_5678, 1).result().unwrap();
        }
        let mut got = [0u16; 6];
        unsafe { result::memcpy_dtoh_sync(&mut got, addr) }.unwrap();
        assert_eq!(got, [0, 0xabcd, 0xabcd, 0, 0x5678, 0x1234]);
        let misaligned = unsafe { sys::cuMemsetD32_v2(addr + 2, 0, 1) };
        says(&status(misaligned).1, &["invalid argument: cuMemsetD32_v2", "not aligned to 4 bytes"]);
    }
}

#[test]
fn fresh_memory_is_poison() {
    let (_, context, _turn) = device();
    let stream = context.default_stream();
    let slice = unsafe { stream.alloc::<u16>(1000) }.unwrap();
    assert!(stream.clone_dtoh(&slice).unwrap().iter().all(|&word| word == POISON));
    let floats = unsafe { slice.transmute::<f32>(500) }.unwrap();
    assert!(stream.clone_dtoh(&floats).unwrap().iter().all(|value| value.is_nan()));
}

#[test]
fn memory_is_accounted_for() {
    let (_, context, _turn) = device();
    let stream = context.default_stream();
    let (free, total) = context.mem_get_info().unwrap();
    assert_eq!(total, 80 << 30);
    let large = unsafe { stream.alloc::<u8>(60 << 30) }.unwrap();
    assert_eq!(context.mem_get_info().unwrap().0, free - (60 << 30));
    let (code, text) = failure(unsafe { stream.alloc::<u8>(30 << 30) });
    assert_eq!(code, CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    says(&text, &["out of memory", "32212254720 bytes requested"]);
    drop(large);
    assert_eq!(context.mem_get_info().unwrap().0, free);
    // An empty allocation is a null pointer, as cudarc relies on.
    let empty = stream.null::<f32>().unwrap();
    assert_eq!(empty.device_ptr(&stream).0, 0);
    assert_eq!(failure(unsafe { result::malloc_sync(0) }).0, CUresult::CUDA_ERROR_INVALID_VALUE);
}

#[test]
fn bad_addresses_in_copies_are_refused() {
    let (_, context, _turn) = device();
    let stream = context.default_stream();
    let slice = stream.alloc_zeros::<u8>(100).unwrap();
    let addr = slice.device_ptr(&stream).0;
    let mut host = [0u8; 101];
    let (code, text) = failure(unsafe { result::memcpy_dtoh_sync(&mut host, addr) });
    assert_eq!(code, CUresult::CUDA_ERROR_INVALID_VALUE);
    says(&text, &["cuMemcpyDtoH_v2", "ends 1 bytes past the end of allocation", "(100 bytes at"]);
    drop(slice);
    let (_, text) = failure(unsafe { result::memcpy_htod_sync(addr, &host) });
    says(&text, &["which has been freed"]);
    let (_, text) = failure(unsafe { result::free_sync(addr) });
    says(&text, &["not the start of an allocation", "which has been freed"]);
    let (_, text) = failure(unsafe { result::memset_d8_sync(0, 0, 1) });
    says(&text, &["null pointer"]);
    // None of these harms the context.
    context.synchronize().unwrap();
}

#[test]
fn pinned_managed_and_pools() {
    let (_, context, _turn) = device();
    let stream = context.default_stream();
    let mut pinned = unsafe { context.alloc_pinned::<u32>(64) }.unwrap();
    pinned.as_mut_slice().unwrap().fill(5);
    let slice = stream.clone_htod(&pinned).unwrap();
    assert_eq!(stream.clone_dtoh(&slice).unwrap(), [5; 64]);
    let managed = unsafe { result::malloc_managed(256, sys::CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL) }.unwrap();
    let location = sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: 0 };
    unsafe {
        result::mem_prefetch_async(managed, 256, location, null_mut()).unwrap();
        *(managed as *mut u32) = 77;
        let mut got = [0u32];
        result::memcpy_dtoh_sync(&mut got, managed).unwrap();
        assert_eq!(got, [77]);
        let attribute = |which, addr| {
            let mut value = 0u64;
            sys::cuPointerGetAttribute((&raw mut value).cast::<c_void>(), which, addr).result().map(|()| value)
        };
        use sys::CUpointer_attribute::*;
        let addr = slice.device_ptr(&stream).0;
        assert_eq!(attribute(CU_POINTER_ATTRIBUTE_IS_MANAGED, managed).unwrap(), 1);
        assert_eq!(attribute(CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, addr + 3).unwrap(), addr);
        assert_eq!(attribute(CU_POINTER_ATTRIBUTE_RANGE_SIZE, addr).unwrap(), 256);
        assert_eq!(attribute(CU_POINTER_ATTRIBUTE_MEMORY_TYPE, pinned.as_ptr().unwrap() as u64).unwrap(), 1);
        assert_eq!(failure(attribute(CU_POINTER_ATTRIBUTE_CONTEXT, 4096)).0, CUresult::CUDA_ERROR_INVALID_VALUE);
        result::free_sync(managed).unwrap();

        let pool = result::device::get_default_mem_pool(0).unwrap();
        let used = || {
            let mut used = 0u64;
            let which = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT;
            result::mem_pool::get_attribute(pool, which, (&raw mut used).cast()).unwrap();
            used
        };
        let before = used();
        let more = stream.alloc::<u8>(1000).unwrap();
        assert_eq!(used(), before + 1000);
        drop(more);
        assert_eq!(used(), before);
    }
}

#[test]
fn events_measure_time() {
    let (_, context, _turn) = device();
    let stream = context.new_stream().unwrap();
    let timing = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
    let start = stream.record_event(timing).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let end = stream.record_event(timing).unwrap();
    assert!(end.is_complete());
    let elapsed = start.elapsed_ms(&end).unwrap();
    assert!((15.0..2000.0).contains(&elapsed), "{elapsed}");
    let untimed = stream.record_event(None).unwrap();
    let (code, text) = failure(start.elapsed_ms(&untimed));
    assert_eq!(code, CUresult::CUDA_ERROR_INVALID_HANDLE);
    says(&text, &["CU_EVENT_DISABLE_TIMING"]);
    let unrecorded = context.new_event(timing).unwrap();
    assert!(unrecorded.is_complete());
    assert_eq!(failure(start.elapsed_ms(&unrecorded)).0, CUresult::CUDA_ERROR_INVALID_HANDLE);
    stream.wait(&end).unwrap();
}

#[test]
fn host_functions_run_in_order() {
    let (_, context, _turn) = device();
    let stream = context.new_stream().unwrap();
    let mut slice = stream.alloc_zeros::<u32>(1).unwrap();
    let addr = slice.device_ptr_mut(&stream).0;
    unsafe extern "C" fn increment(data: *mut c_void) {
        unsafe { *data.cast::<u32>() += 1 };
    }
    // Page-locked: a copy reads it in its turn, while it takes pageable memory as it is at the call.
    let mut count = unsafe { context.alloc_pinned::<u32>(1) }.unwrap();
    count.as_mut_slice().unwrap()[0] = 0;
    unsafe {
        let place = count.as_mut_ptr().unwrap();
        result::stream::launch_host_function(stream.cu_stream(), increment, place.cast()).unwrap();
        let count = std::slice::from_raw_parts(place, 1);
        result::memcpy_htod_async(addr, count, stream.cu_stream()).unwrap();
    }
    assert_eq!(stream.clone_dtoh(&slice).unwrap(), [1]);
}

fn load(text: &str) -> Result<sys::CUmodule, cudarc::driver::DriverError> {
    let text = CString::new(text).unwrap();
    unsafe { result::module::load_data(text.as_ptr().cast()) }
}

#[test]
fn modules_that_do_not_load_say_why() {
    let (_, _context, _turn) = device();
    use CUresult::*;
    let header = ".version 8.0\n.target sm_80\n.address_size 64\n";
    let cases = [
        (format!("{header}.entry k() {{ mov.u32 %r1 %r2; }}"), CUDA_ERROR_INVALID_PTX, "line 4, column 26: expected"),
        ("hello".into(), CUDA_ERROR_INVALID_PTX, "expected `.version`, found `hello`"),
        (String::new(), CUDA_ERROR_INVALID_PTX, "expected `.version`"),
        (".version 8.0 .target sm_100".into(), CUDA_ERROR_INVALID_PTX, "sm_100 does not run on"),
        (".version 8.0 .target sm_80a".into(), CUDA_ERROR_INVALID_PTX, "sm_80a does not run on"),
        (".version 99.0 .target sm_80".into(), CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "the module is PTX 99.0"),
        ("\x7fELF machine code".into(), CUDA_ERROR_NO_BINARY_FOR_GPU, "softcuda executes PTX"),
        (format!("{header}.const .b8 c[70000];"), CUDA_ERROR_INVALID_PTX, "constants exceed 65536 bytes"),
        (format!("{header}.extern .global .b8 c[4];"), CUDA_ERROR_INVALID_PTX, "unresolved extern"),
        (format!("{header}.global .u32 a = b;"), CUDA_ERROR_INVALID_PTX, "line 4: variable `a`: the address of `b`"),
    ];
    for (text, code, part) in cases {
        let (found, message) = failure(load(&text));
        assert_eq!(found, code, "{text}: {message}");
        says(&message, &[part]);
    }
    let missing = result::module::load(CString::new("/no/such/file.ptx").unwrap());
    assert_eq!(failure(missing).0, CUDA_ERROR_FILE_NOT_FOUND);

    let mut log = [0u8; 200];
    let mut keys = [sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER, sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    let mut values: [*mut c_void; 2] = [log.as_mut_ptr().cast(), log.len() as *mut c_void];
    let mut module = null_mut();
    let text = c".version 8.0 .target sm_80 ?";
    let (keys, values) = (keys.as_mut_ptr(), values.as_mut_ptr());
    let code = unsafe { sys::cuModuleLoadDataEx(&mut module, text.as_ptr().cast(), 2, keys, values) };
    assert_eq!(code, CUDA_ERROR_INVALID_PTX);
    let len = unsafe { *values.add(1) } as usize;
    says(std::str::from_utf8(&log[..len]).unwrap(), &["line 1, column 28: expected"]);
}

#[test]
fn module_variables_are_initialised() {
    let (_, context, _turn) = device();
    let module = load(
        ".version 8.0\n.target sm_80\n.address_size 64\n\
         .visible .const .align 8 .f32 c[4] = {0f3F800000, 2.5, -3.0};\n\
         .visible .global .align 512 .b8 g[3] = {1, 255, -1};\n\
         .visible .global .u64 p[2] = {g+2, generic(c)};\n\
         .visible .global .v2 .u16 v[3] = {{1, 2}, {3, 4}};\n\
         .global .b32 zero[100];\n",
    )
    .unwrap();
    let global = |name: &str| unsafe { result::module::get_global(module, CString::new(name).unwrap()) };
    fn read<T: Copy + Default, const N: usize>(addr: u64) -> [T; N] {
        let mut got = [T::default(); N];
        unsafe { result::memcpy_dtoh_sync(&mut got, addr) }.unwrap();
        got
    }
    let (c, g) = (global("c").unwrap(), global("g").unwrap());
    assert_eq!((c.1, g.1), (16, 3));
    assert_eq!(g.0 % 512, 0);
    assert_eq!(read::<f32, 4>(c.0), [1.0, 2.5, -3.0, 0.0]);
    assert_eq!(read::<u8, 3>(g.0), [1, 255, 255]);
    assert_eq!(read::<u64, 2>(global("p").unwrap().0), [g.0 + 2, c.0]);
    assert_eq!(read::<u16, 6>(global("v").unwrap().0), [1, 2, 3, 4, 0, 0]);
    assert_eq!(read::<u32, 100>(global("zero").unwrap().0), [0; 100]);
    assert_eq!(failure(global("none")).0, CUresult::CUDA_ERROR_NOT_FOUND);
    let function = unsafe { result::module::get_function(module, CString::new("none").unwrap()) };
    says(&failure(function).1, &["no kernel `none`"]);
    unsafe { result::module::unload(module) }.unwrap();
    says(&failure(unsafe { result::memcpy_dtoh_sync(&mut [0u8], c.0) }).1, &["which has been freed"]);
    assert_eq!(failure(unsafe { result::module::unload(module) }).0, CUresult::CUDA_ERROR_INVALID_HANDLE);
    context.synchronize().unwrap();
}

#[test]
fn stale_handles_are_errors() {
    let (_, context, _turn) = device();
    let stream = context.new_stream().unwrap();
    let handle = stream.cu_stream();
    drop(stream);
    let (code, text) = failure(unsafe { result::stream::synchronize(handle) });
    assert_eq!(code, CUresult::CUDA_ERROR_INVALID_HANDLE);
    says(&text, &["is not a live stream"]);
    let event = context.new_event(None).unwrap();
    let wrong_kind = unsafe { result::stream::synchronize(event.cu_event().cast()) };
    assert_eq!(failure(wrong_kind).0, CUresult::CUDA_ERROR_INVALID_HANDLE);
    let null_function = unsafe { result::launch_kernel(null_mut(), (1, 1, 1), (1, 1, 1), 0, null_mut(), &mut []) };
    assert_eq!(failure(null_function).0, CUresult::CUDA_ERROR_INVALID_HANDLE);
}

#[test]
fn a_context_takes_its_memory_with_it() {
    let (_, context, _turn) = device();
    let free = context.mem_get_info().unwrap().0;
    let handle = {
        let other = cudarc::driver::CudaContext::new_non_primary(0, 0).unwrap();
        let leaked = unsafe { result::malloc_sync(1 << 20) }.unwrap();
        assert_ne!(leaked, 0);
        assert_eq!(other.mem_get_info().unwrap().0, free - (1 << 20));
        other.cu_ctx()
    };
    assert_eq!(context.mem_get_info().unwrap().0, free);
    assert_eq!(failure(unsafe { result::ctx::set_current(handle) }).0, CUresult::CUDA_ERROR_INVALID_CONTEXT);
}

#[test]
fn unsupported_calls_say_so() {
    let (_, _context, _turn) = device();
    let mut map = unsafe { std::mem::zeroed() };
    let corner = [0; 3];
    let code = unsafe {
        sys::cuTensorMapEncodeIm2col(
            &mut map,
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            3,
            null_mut(),
            [1; 3].as_ptr(),
            [16; 2].as_ptr(),
            corner.as_ptr(),
            corner.as_ptr(),
            8,
            8,
            [1; 3].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    let (code, text) = status(code);
    assert_eq!(code, CUresult::CUDA_ERROR_NOT_SUPPORTED);
    says(&text, &["cuTensorMapEncodeIm2col is not implemented by softcuda"]);
}

/// Every entry point in the driver's source is found by `cuGetProcAddress` under its unversioned name.
#[test]
fn proc_addresses_are_complete() {
    let (_, _context, _turn) = device();
    let address = |name: &str, version| {
        let name = CString::new(name).unwrap();
        let mut found = null_mut();
        let mut status = sys::CUdriverProcAddressQueryResult::CU_GET_PROC_ADDRESS_SUCCESS;
        let code = unsafe { sys::cuGetProcAddress_v2(name.as_ptr(), &mut found, version, 0, &mut status) };
        (code, status, found)
    };
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/driver");
    let mut names = Vec::new();
    for file in std::fs::read_dir(folder).unwrap() {
        let file = file.unwrap().path();
        let text = std::fs::read_to_string(&file).unwrap();
        let declared = text.split("pub unsafe extern \"C\" fn ").skip(1).map(|rest| rest.split('(').next().unwrap());
        names.extend(declared.filter(|name| name.starts_with("cu")).map(str::to_owned));
    }
    assert!(names.len() > 100, "{}", names.len());
    for name in &names {
        let base = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let base = base.strip_suffix("_v").unwrap_or(name);
        let (code, _, found) = address(base, 13_050);
        assert_eq!(code, CUresult::CUDA_SUCCESS, "{name} as {base}");
        assert!(!found.is_null());
    }
    // Those that macros define.
    let defined = [
        "cuMemcpyHtoD",
        "cuMemcpyDtoHAsync",
        "cuMemsetD32",
        "cuLaunchKernel",
        "cuLaunchCooperativeKernel",
        "cuMemcpy2D",
        "cuMemcpy3DPeer",
        "cuMemsetD2D16Async",
        "cuStreamWaitValue32",
        "cuStreamWriteValue64",
        "cuGraphAddKernelNode",
        "cuGraphExecHostNodeSetParams",
    ];
    for name in defined {
        assert_eq!(address(name, 12_080).0, CUresult::CUDA_SUCCESS, "{name}");
    }
    use sys::CUdriverProcAddressQueryResult::*;
    let version = |name, version| address(name, version).2;
    assert_ne!(version("cuCtxCreate", 12_000), version("cuCtxCreate", 12_080));
    assert_ne!(version("cuGraphGetEdges", 12_000), version("cuGraphGetEdges", 12_080));
    let (code, status, found) = address("cuGraphAddKernelNode", 11_000);
    assert_eq!((code, found), (CUresult::CUDA_ERROR_NOT_FOUND, null_mut()));
    assert_eq!(status, CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT);
    let (code, status, _) = address("cuTexRefrain", 12_080);
    assert_eq!((code, status), (CUresult::CUDA_ERROR_NOT_FOUND, CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND));
}

#[test]
fn error_names_and_texts() {
    let (_, _context, _turn) = device();
    let error = cudarc::driver::DriverError(CUresult::CUDA_ERROR_MISALIGNED_ADDRESS);
    assert_eq!(error.error_name().unwrap(), c"CUDA_ERROR_MISALIGNED_ADDRESS");
    assert_eq!(error.error_string().unwrap(), c"misaligned address");
    let mut text = null();
    let unknown: CUresult = unsafe { std::mem::transmute(CUresult::CUDA_ERROR_UNKNOWN as u32) };
    unsafe { sys::cuGetErrorString(unknown, &mut text) }.result().unwrap();
    assert!(!text.is_null());
}

#[test]
fn pointers_and_modules_name_their_context() {
    let (_, _primary, _turn) = device();
    let context = CudaContext::new_non_primary(0, 0).unwrap();
    let bytes = 1 << 20;
    context.bind_to_thread().unwrap();
    let free = context.mem_get_info().unwrap().0;
    let mut pageable = [0u8; 4096];
    let start = pageable.as_mut_ptr().cast();
    let (addr, host) = unsafe {
        let (mut addr, mut host) = (0, std::ptr::null_mut());
        sys::cuMemAlloc_v2(&mut addr, bytes).result().unwrap();
        sys::cuMemHostAlloc(&mut host, bytes, 0).result().unwrap();
        sys::cuMemHostRegister_v2(start, 4096, 0).result().unwrap();
        (addr, host)
    };
    let image = c".version 7.0\n.target sm_80\n.address_size 64\n.visible .global .u32 table[4];";
    let module = unsafe { result::module::load_data(image.as_ptr().cast()) }.unwrap();
    // SAFETY: no context is current from here on.
    unsafe { result::ctx::set_current(std::ptr::null_mut()) }.unwrap();
    let mut owner: sys::CUcontext = std::ptr::null_mut();
    let context_of = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_CONTEXT;
    unsafe {
        sys::cuPointerGetAttribute((&raw mut owner).cast(), context_of, addr).result().unwrap();
        assert_eq!(owner, context.cu_ctx());
        sys::cuMemFree_v2(0).result().unwrap();
        sys::cuMemFree_v2(addr).result().unwrap();
        sys::cuMemFreeHost(host).result().unwrap();
        sys::cuMemHostUnregister(start).result().unwrap();
        sys::cuModuleUnload(module).result().unwrap();
    }
    let (code, text) = status(unsafe { sys::cuMemFree_v2(addr) });
    assert_eq!(code, CUresult::CUDA_ERROR_INVALID_VALUE);
    says(&text, &["which has been freed"]);
    assert_eq!(context.mem_get_info().unwrap().0, free);
    // With another context current, it is still the owner's.
    let mut addr = 0;
    unsafe { sys::cuMemAlloc_v2(&mut addr, bytes) }.result().unwrap();
    let other = CudaContext::new_non_primary(0, 0).unwrap();
    other.bind_to_thread().unwrap();
    unsafe { sys::cuPointerGetAttribute((&raw mut owner).cast(), context_of, addr) }.result().unwrap();
    assert_eq!(owner, context.cu_ctx());
    unsafe { sys::cuMemFree_v2(addr) }.result().unwrap();
    assert_eq!(context.mem_get_info().unwrap().0, free);
}
