//! Launches: what is checked before a kernel runs, functions' attributes, occupancy, graphs of kernels.

mod common;

use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::Arc;

use common::{device, failure, says};
use cudarc::driver::sys::{self, CUfunction_attribute::*, CUresult};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaStream, DevicePtr, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;

use CUresult::*;

/// `fill`: out[i] = value for i < n. `shared`: each thread leaves its number in dynamic shared memory, and thread t of each
/// block writes its neighbour's to out. `counter` adds 1 to a module variable.
const SOURCE: &str = "
.version 8.0
.target sm_80
.address_size 64

.visible .global .u32 count = 40;
.extern .shared .align 16 .b8 dynamic[];

.visible .entry fill(.param .u64 out, .param .u32 n, .param .u32 value)
{
    .reg .pred %p;
    .reg .b32 %r<6>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [out];
    ld.param.u32 %r1, [n];
    ld.param.u32 %r2, [value];
    mov.u32 %r3, %ctaid.x;
    mov.u32 %r4, %ntid.x;
    mov.u32 %r5, %tid.x;
    mad.lo.s32 %r3, %r3, %r4, %r5;
    setp.ge.u32 %p, %r3, %r1;
    @%p bra done;
    mul.wide.u32 %rd2, %r3, 4;
    add.s64 %rd3, %rd1, %rd2;
    st.global.u32 [%rd3], %r2;
done:
    ret;
}

.visible .entry shared(.param .u64 out)
.maxntid 128
{
    .reg .b32 %r<8>;
    .reg .b64 %rd<4>;
    .shared .align 4 .b8 fixed[1024];
    ld.param.u64 %rd1, [out];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, dynamic;
    shl.b32 %r3, %r1, 2;
    add.s32 %r4, %r2, %r3;
    st.shared.u32 [%r4], %r1;
    mov.u32 %r5, fixed;
    st.shared.u32 [%r5], %r1;
    bar.sync 0;
    xor.b32 %r6, %r3, 4;
    add.s32 %r6, %r2, %r6;
    ld.shared.u32 %r7, [%r6];
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    st.global.u32 [%rd3], %r7;
    ret;
}

.visible .entry counter()
.reqntid 32, 2
{
    .reg .b32 %r<2>;
    .reg .b64 %rd<2>;
    mov.u64 %rd1, count;
    red.global.add.u32 [%rd1], 1;
    ret;
}
";

fn load(context: &Arc<CudaContext>) -> Arc<CudaModule> {
    context.load_module(Ptx::from_src(SOURCE)).unwrap()
}

fn config(grid: u32, block: u32, shared: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (grid, 1, 1), block_dim: (block, 1, 1), shared_mem_bytes: shared }
}

fn count(stream: &Arc<CudaStream>, module: &Arc<CudaModule>) -> u32 {
    let count = module.get_global("count", stream).unwrap();
    let mut value = [0u8; 4];
    stream.memcpy_dtoh(&count, &mut value).unwrap();
    u32::from_ne_bytes(value)
}

#[test]
fn kernels_run_and_are_counted() {
    let (installed, context, _turn) = device();
    let control = installed.control();
    let (stream, module) = (context.default_stream(), load(&context));
    let fill = module.load_function("fill").unwrap();
    let mut out = stream.alloc_zeros::<u32>(1000).unwrap();
    let before = control.launch_count();
    control.log_launches(true);
    unsafe { stream.launch_builder(&fill).arg(&mut out).arg(&900u32).arg(&7u32).launch(config(8, 128, 0)) }.unwrap();
    let got = stream.clone_dtoh(&out).unwrap();
    assert!(got[..900].iter().all(|&v| v == 7) && got[900..].iter().all(|&v| v == 0));
    assert_eq!(control.launch_count(), before + 1);
    let launches = control.launches();
    assert_eq!(launches.len(), 1);
    assert_eq!((launches[0].kernel.as_str(), launches[0].grid, launches[0].block), ("fill", [8, 1, 1], [128, 1, 1]));
    control.log_launches(false);

    let shared = module.load_function("shared").unwrap();
    unsafe { stream.launch_builder(&shared).arg(&mut out).launch(config(1, 128, 512)) }.unwrap();
    let want: Vec<u32> = (0..128).map(|t| t ^ 1).collect();
    assert_eq!(stream.clone_dtoh(&out).unwrap()[..128], want);
}

#[test]
fn counters_cross_to_the_program() {
    let (installed, context, _turn) = device();
    let control = installed.control();
    let (stream, module) = (context.default_stream(), load(&context));
    let fill = module.load_function("fill").unwrap();
    let mut out = stream.alloc_zeros::<u32>(1024).unwrap();
    let mut launch = || unsafe {
        stream.launch_builder(&fill).arg(&mut out).arg(&1024u32).arg(&7u32).launch(config(8, 128, 0)).unwrap();
    };
    control.set_counting(true);
    launch();
    launch();
    let counters = control.counters();
    control.set_counting(false);
    let fill = &counters["fill"];
    assert_eq!((fill.launches, fill.blocks, fill.warps), (2, 16, 64));
    // Each warp stores 128 bytes: 4 sectors, and no fewer could do.
    assert_eq!((fill.global.requests, fill.global.sectors, fill.global.ideal_sectors), (64, 256, 256));
    assert!(control.counters().is_empty());
    launch();
    assert!(control.counters().is_empty());
}

#[test]
fn execution_can_be_left_out() {
    let (installed, context, _turn) = device();
    let control = installed.control();
    let (stream, module) = (context.default_stream(), load(&context));
    let fill = module.load_function("fill").unwrap();
    let mut out = stream.alloc_zeros::<u32>(32).unwrap();
    let before = control.launch_count();
    let mut launch = |threads| unsafe {
        stream.launch_builder(&fill).arg(&mut out).arg(&32u32).arg(&7u32).launch(config(1, threads, 0)).map(drop)
    };
    control.set_executing(false);
    launch(32).unwrap();
    assert_eq!(failure(launch(2000)).0, CUDA_ERROR_INVALID_VALUE);
    control.set_executing(true);
    assert_eq!(control.launch_count(), before + 1);
    assert_eq!(stream.clone_dtoh(&out).unwrap(), [0; 32]);
}

#[test]
fn parameters_may_come_in_a_buffer() {
    let (_, context, _turn) = device();
    let (stream, module) = (context.default_stream(), load(&context));
    let fill = raw(&module, "fill");
    let out = stream.alloc_zeros::<u32>(4).unwrap();
    let addr = out.device_ptr(&stream).0;
    let mut buffer = [addr, 3 | 9 << 32];
    let mut size = 16usize;
    let mut extra: [*mut c_void; 5] = [
        std::ptr::without_provenance_mut(1),
        buffer.as_mut_ptr().cast(),
        std::ptr::without_provenance_mut(2),
        (&raw mut size).cast(),
        null_mut(),
    ];
    let mut launch = |size_now: usize| {
        size = size_now;
        unsafe { sys::cuLaunchKernel(fill, 1, 1, 1, 32, 1, 1, 0, null_mut(), null_mut(), extra.as_mut_ptr()) }.result()
    };
    launch(16).unwrap();
    assert_eq!(stream.clone_dtoh(&out).unwrap(), [9, 9, 9, 0]);
    says(&failure(launch(12)).1, &["parameter buffer of 12 bytes; the kernel takes 16"]);
    let code = unsafe { sys::cuLaunchKernel(fill, 1, 1, 1, 32, 1, 1, 0, null_mut(), null_mut(), null_mut()) };
    says(&failure(code.result()).1, &["`kernelParams` is null"]);
}

fn raw(module: &Arc<CudaModule>, name: &str) -> sys::CUfunction {
    module.load_function(name).unwrap().cu_function()
}

#[test]
fn bad_launches_are_refused() {
    let (installed, context, _turn) = device();
    let (stream, module) = (context.default_stream(), load(&context));
    let function = |name: &str| module.load_function(name).unwrap();
    let (fill, shared, counter) = (function("fill"), function("shared"), function("counter"));
    let mut out = stream.alloc_zeros::<u32>(128).unwrap();
    let before = installed.control().launch_count();
    let mut refuse = |function: &CudaFunction, config: LaunchConfig, parts: &[&str]| {
        let mut launch = stream.launch_builder(function);
        launch.arg(&mut out).arg(&0u32).arg(&0u32);
        let (code, text) = failure(unsafe { launch.launch(config) });
        assert_eq!(code, CUDA_ERROR_INVALID_VALUE);
        says(&text, parts);
    };
    let shaped = |grid, block| LaunchConfig { grid_dim: grid, block_dim: block, shared_mem_bytes: 0 };
    refuse(&fill, shaped((0, 1, 1), (32, 1, 1)), &["fill: grid [0, 1, 1] is not within"]);
    refuse(&fill, shaped((1, 65536, 1), (32, 1, 1)), &["fill: grid [1, 65536, 1]"]);
    refuse(&fill, shaped((1, 1, 1), (1, 1, 65)), &["fill: block [1, 1, 65]"]);
    refuse(&fill, shaped((1, 1, 1), (64, 32, 1)), &["a block of 2048 threads; at most 1024"]);
    refuse(&shared, config(1, 129, 0), &["a block of 129 threads, but .maxntid allows 128"]);
    refuse(&counter, config(1, 64, 0), &["block [64, 1, 1], but .reqntid says [32, 2, 1]"]);
    // 48 KiB without opting in, less the kernel's own.
    refuse(&fill, config(1, 32, (48 << 10) + 1), &["49153 bytes of dynamic shared memory; 49152 are allowed"]);
    refuse(&shared, config(1, 32, 48 << 10), &["48128 are allowed"]);
    assert_eq!(installed.control().launch_count(), before);
    context.synchronize().unwrap();
}

#[test]
fn more_shared_memory_must_be_asked_for() {
    let (_, context, _turn) = device();
    let (stream, module) = (context.default_stream(), load(&context));
    let shared = module.load_function("shared").unwrap();
    let mut out = stream.alloc_zeros::<u32>(128).unwrap();
    let most = (227 << 10) - 1024;
    let set = |bytes| shared.set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes);
    says(&failure(set(most + 1)).1, &["at most 231424"]);
    set(most).unwrap();
    unsafe { stream.launch_builder(&shared).arg(&mut out).launch(config(1, 128, most as u32)) }.unwrap();
    stream.synchronize().unwrap();
    assert_eq!(shared.get_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES).unwrap(), most);
}

#[test]
fn attributes_and_occupancy() {
    let (_, context, _turn) = device();
    let module = load(&context);
    let fill = module.load_function("fill").unwrap();
    let shared = module.load_function("shared").unwrap();
    assert_eq!(shared.get_attribute(CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES).unwrap(), 1024);
    assert_eq!(shared.get_attribute(CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK).unwrap(), 128);
    assert_eq!(shared.get_attribute(CU_FUNC_ATTRIBUTE_PTX_VERSION).unwrap(), 80);
    assert_eq!(shared.get_attribute(CU_FUNC_ATTRIBUTE_BINARY_VERSION).unwrap(), 90);
    assert_eq!(shared.get_attribute(CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES).unwrap(), 0);
    let registers = fill.get_attribute(CU_FUNC_ATTRIBUTE_NUM_REGS).unwrap();
    assert!((16..=40).contains(&registers), "{registers}");
    // 2048 threads a multiprocessor, then 32 blocks, then 228 KiB of shared memory.
    let blocks = |function: &CudaFunction, threads, bytes| {
        function.occupancy_max_active_blocks_per_multiprocessor(threads, bytes, None).unwrap()
    };
    assert_eq!(blocks(&fill, 256, 0), 8);
    assert_eq!(blocks(&fill, 32, 0), 32);
    assert_eq!(blocks(&fill, 128, 100 << 10), 2);
    assert_eq!(blocks(&fill, 128, 227 << 10), 1);
    assert_eq!(blocks(&fill, 128, (227 << 10) + 1), 0);
    let (grid, block) =
        unsafe { cudarc::driver::result::occupancy::max_potential_block_size(raw(&module, "fill"), None, 0, 0) }
            .unwrap();
    assert_eq!((grid, block), (2 * 132, 1024));
    let mut name = std::ptr::null();
    unsafe { sys::cuFuncGetName(&mut name, raw(&module, "fill")) }.result().unwrap();
    assert_eq!(unsafe { std::ffi::CStr::from_ptr(name) }, c"fill");
    let (mut offset, mut size) = (0, 0);
    unsafe { sys::cuFuncGetParamInfo(raw(&module, "fill"), 2, &mut offset, &mut size) }.result().unwrap();
    assert_eq!((offset, size), (12, 4));
}

#[test]
fn cooperative_launches_must_fit_the_device() {
    let (_, context, _turn) = device();
    let (stream, module) = (context.default_stream(), load(&context));
    let fill = module.load_function("fill").unwrap();
    let mut out = stream.alloc_zeros::<u32>(16).unwrap();
    let mut launch = |grid| unsafe {
        stream.launch_builder(&fill).arg(&mut out).arg(&16u32).arg(&1u32).launch_cooperative(config(grid, 1024, 0))
    };
    launch(264).unwrap();
    let (code, text) = failure(launch(265));
    assert_eq!(code, CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE);
    says(&text, &["265 blocks, but only 264"]);
}

#[test]
fn extended_launches_take_attributes() {
    let (_, context, _turn) = device();
    let (stream, module) = (context.default_stream(), load(&context));
    let out = stream.alloc_zeros::<u32>(4).unwrap();
    let (addr, n, value) = (out.device_ptr(&stream).0, 4u32, 3u32);
    let mut params = [(&raw const addr) as *mut c_void, (&raw const n) as *mut _, (&raw const value) as *mut _];
    let mut launch = |cluster: [u32; 3], id| {
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = id;
        attribute.value.clusterDim.x = cluster[0];
        attribute.value.clusterDim.y = cluster[1];
        attribute.value.clusterDim.z = cluster[2];
        let config = sys::CUlaunchConfig {
            gridDimX: 4,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: 32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            hStream: null_mut(),
            attrs: &mut attribute,
            numAttrs: 1,
        };
        let fill = raw(&module, "fill");
        unsafe { sys::cuLaunchKernelEx(&config, fill, params.as_mut_ptr(), null_mut()) }.result()
    };
    use sys::CUlaunchAttributeID::*;
    launch([1, 1, 1], CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION).unwrap();
    assert_eq!(stream.clone_dtoh(&out).unwrap(), [3; 4]);
    launch([1, 0, 0], CU_LAUNCH_ATTRIBUTE_COOPERATIVE).unwrap();
    launch([1, 0, 0], CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION).unwrap();
    says(
        &failure(launch([3, 1, 1], CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)).1,
        &["is no multiple of cluster [3, 1, 1]"],
    );
    says(&failure(launch([16, 1, 1], CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)).1, &["1 to 8 blocks"]);
    let unknown = launch([1, 1, 1], CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_EVENT);
    assert_eq!(failure(unknown).0, CUDA_ERROR_NOT_SUPPORTED);
}

#[test]
fn captured_kernels_run_at_replay() {
    let (installed, context, _turn) = device();
    unsafe { context.disable_event_tracking() };
    let (stream, module) = (context.new_stream().unwrap(), load(&context));
    let counter = module.load_function("counter").unwrap();
    let launch = LaunchConfig { grid_dim: (3, 1, 1), block_dim: (32, 2, 1), shared_mem_bytes: 0 };
    let before = installed.control().launch_count();
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL).unwrap();
    unsafe { stream.launch_builder(&counter).launch(launch) }.unwrap();
    unsafe { stream.launch_builder(&counter).launch(launch) }.unwrap();
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap().unwrap();
    assert_eq!(installed.control().launch_count(), before);
    assert_eq!(count(&stream, &module), 40);
    graph.launch().unwrap();
    assert_eq!(count(&stream, &module), 40 + 2 * 3 * 64);
    assert_eq!(installed.control().launch_count(), before + 2);
    // A refused launch spoils the capture.
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL).unwrap();
    let refused = unsafe { stream.launch_builder(&counter).launch(config(1, 64, 0)) };
    assert_eq!(failure(refused).0, CUDA_ERROR_INVALID_VALUE);
    let ended = stream.end_capture(sys::CUgraphInstantiate_flags(0));
    assert_eq!(failure(ended).0, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
}

#[test]
fn parameters_are_read_at_the_call() {
    let (_, context, _turn) = device();
    unsafe { context.disable_event_tracking() };
    let (stream, module) = (context.new_stream().unwrap(), load(&context));
    let fill = module.load_function("fill").unwrap();
    let mut out = stream.alloc_zeros::<u32>(4).unwrap();
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL).unwrap();
    let mut value = 5u32;
    unsafe { stream.launch_builder(&fill).arg(&mut out).arg(&4u32).arg(&value).launch(config(1, 32, 0)) }.unwrap();
    value += 1;
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap().unwrap();
    graph.launch().unwrap();
    assert_eq!(stream.clone_dtoh(&out).unwrap(), [value - 1; 4]);
}
