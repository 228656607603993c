//! The memory and initialisation checkers as a CUDA program meets them: through the driver, which tells them of allocations
//! and of the host's copies.

use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaContext, CudaFunction, LaunchConfig, PushKernelArg, sys};
use softcuda::Control;

const PTX: &str = "
.version 7.0
.target sm_80
.address_size 64

// out[i] = in[i]
.visible .entry copy(.param .u64 to, .param .u64 from)
{
    .reg .u64 %to, %from, %at;
    .reg .u32 %i, %v;
    ld.param.u64 %to, [to];
    ld.param.u64 %from, [from];
    mov.u32 %i, %tid.x;
    mul.wide.u32 %at, %i, 4;
    add.u64 %from, %from, %at;
    add.u64 %to, %to, %at;
    ld.global.u32 %v, [%from];
    st.global.u32 [%to], %v;
    ret;
}

// Reads shared memory that only the first half of the block has written.
.visible .entry half_shared(.param .u64 to)
{
    .shared .align 4 .b8 buffer[256];
    .reg .u64 %to;
    .reg .u32 %i, %v, %at, %base;
    .reg .pred %low;
    ld.param.u64 %to, [to];
    mov.u32 %i, %tid.x;
    mov.u32 %base, buffer;
    mad.lo.u32 %at, %i, 4, %base;
    setp.lt.u32 %low, %i, 32;
    @%low st.shared.u32 [%at], %i;
    bar.sync 0;
    ld.shared.u32 %v, [%at];
    st.global.u32 [%to], %v;
    ret;
}
";

/// The checkers belong to the process: one test at a time.
fn device(checks: &str) -> (MutexGuard<'static, ()>, Control, std::sync::Arc<CudaContext>) {
    static ONE: Mutex<()> = Mutex::new(());
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let control = *softcuda::install().unwrap().control();
    let context = CudaContext::new(0).unwrap();
    assert!(control.set_checks(checks));
    (one, control, context)
}

fn function(context: &std::sync::Arc<CudaContext>, name: &str) -> CudaFunction {
    context.load_module(cudarc::nvrtc::Ptx::from_src(PTX)).unwrap().load_function(name).unwrap()
}

const ONE_BLOCK: LaunchConfig = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (64, 1, 1), shared_mem_bytes: 0 };

#[test]
fn reads_of_unwritten_global_memory_are_found() {
    let (_one, control, context) = device("init");
    let stream = context.default_stream();
    let copy = function(&context, "copy");
    // SAFETY: written below, by half.
    let from = unsafe { stream.alloc::<u32>(64) }.unwrap();
    let mut to = stream.alloc_zeros::<u32>(64).unwrap();
    let mut half = from.clone();
    stream.memcpy_htod(&[1u32; 40], &mut half.slice_mut(..40)).unwrap();
    let mut launch = stream.launch_builder(&copy);
    launch.arg(&mut to).arg(&half);
    // SAFETY: 64 threads copy 64 elements.
    unsafe { launch.launch(ONE_BLOCK) }.unwrap();
    let findings = control.findings();
    assert_eq!(findings.len(), 1, "{findings:?}");
    let expected = "read, but not all of it was ever written, and so do 23 more lanes; kernel `copy`, line 17: \
                    `ld.global.u32 %v, [%from];`, block (0, 0, 0), warp 1, lane 8";
    assert!(findings[0].starts_with("init: global memory at 0x") && findings[0].ends_with(expected), "{}", findings[0]);
}

#[test]
fn written_memory_is_no_finding_however_it_was_written() {
    let (_one, control, context) = device("all");
    let stream = context.default_stream();
    let copy = function(&context, "copy");
    let from = stream.clone_htod(&[7u32; 64]).unwrap();
    let (mut a, mut b) = (stream.alloc_zeros::<u32>(64).unwrap(), stream.alloc_zeros::<u32>(64).unwrap());
    for (to, from) in [(&mut a, &from), (&mut b, &from.clone())] {
        let mut launch = stream.launch_builder(&copy);
        launch.arg(to).arg(from);
        // SAFETY: 64 threads copy 64 elements.
        unsafe { launch.launch(ONE_BLOCK) }.unwrap();
    }
    assert_eq!(stream.clone_dtoh(&b).unwrap(), [7; 64]);
    assert_eq!(control.findings(), Vec::<String>::new());
}

#[test]
fn reads_of_unwritten_shared_memory_are_found() {
    let (_one, control, context) = device("init");
    let stream = context.default_stream();
    let kernel = function(&context, "half_shared");
    let mut to = stream.alloc_zeros::<u32>(1).unwrap();
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&mut to);
    // SAFETY: one element is written.
    unsafe { launch.launch(ONE_BLOCK) }.unwrap();
    let findings = control.findings();
    assert_eq!(findings.len(), 1, "{findings:?}");
    let expected = "init: shared memory at 0x80 (4 bytes) is read, but not all of it was ever written, and so do 31 more \
                    lanes; kernel `half_shared`, line 36: `ld.shared.u32 %v, [%at];`, block (0, 0, 0), warp 1, lane 0";
    assert_eq!(findings[0], expected);
}

#[test]
fn what_a_destroyed_context_still_holds_is_a_leak() {
    let (_one, control, _context) = device("memory");
    let (mut own, mut before, mut address) = (std::ptr::null_mut(), std::ptr::null_mut(), 0);
    // SAFETY: plain calls of the driver API; the context is made and destroyed here.
    unsafe {
        sys::cuCtxGetCurrent(&mut before).result().unwrap();
        let status = sys::cuCtxCreate_v4(&mut own, std::ptr::null_mut(), 0, 0);
        status.result().unwrap();
        sys::cuMemAlloc_v2(&mut address, 100).result().unwrap();
        sys::cuCtxDestroy_v2(own).result().unwrap();
        sys::cuCtxSetCurrent(before).result().unwrap();
    }
    let findings = control.findings();
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert!(findings[0].starts_with(&format!("memory: 100 bytes at {address:#x}, allocation number ")));
}

#[test]
fn unknown_checkers_are_refused() {
    let (_one, control, _context) = device("none");
    assert!(!control.set_checks("memory,rice"));
    assert_eq!(control.findings(), Vec::<String>::new());
}

#[test]
fn launches_beside_one_another_keep_their_own_order() {
    let (_one, control, context) = device("race");
    let text = include_str!("pass/grid_barrier.ptx");
    let kernel = context.load_module(cudarc::nvrtc::Ptx::from_src(text)).unwrap().load_function("k").unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let stream = context.new_stream().unwrap();
                for _ in 0..12 {
                    let mut data = stream.alloc_zeros::<u32>(256).unwrap();
                    let mut counter = stream.alloc_zeros::<u32>(32).unwrap();
                    let mut launch = stream.launch_builder(&kernel);
                    launch.arg(&mut data).arg(&mut counter);
                    // SAFETY: four blocks of 64 threads exchange 256 words.
                    unsafe {
                        launch.launch_cooperative(LaunchConfig {
                            grid_dim: (4, 1, 1),
                            block_dim: (64, 1, 1),
                            shared_mem_bytes: 1024,
                        })
                    }
                    .unwrap();
                }
            });
        }
    });
    assert_eq!(control.findings(), Vec::<String>::new());
}

/// Two launches that touch the same words, in two streams; what is done between them.
fn two_streams(
    between: impl Fn(&CudaContext, &std::sync::Arc<cudarc::driver::CudaStream>, &std::sync::Arc<cudarc::driver::CudaStream>),
) -> Vec<String> {
    let (_one, control, context) = device("race");
    // SAFETY: this test orders its launches by itself, or means not to.
    unsafe { context.disable_event_tracking() };
    let (first, second) = (context.new_stream().unwrap(), context.new_stream().unwrap());
    let copy = function(&context, "copy");
    let from = first.clone_htod(&[7u32; 64]).unwrap();
    let mut middle = first.alloc_zeros::<u32>(64).unwrap();
    let mut to = first.alloc_zeros::<u32>(64).unwrap();
    context.synchronize().unwrap();
    let mut launch = first.launch_builder(&copy);
    launch.arg(&mut middle).arg(&from);
    // SAFETY: 64 threads copy 64 elements.
    unsafe { launch.launch(ONE_BLOCK) }.unwrap();
    between(&context, &first, &second);
    let mut launch = second.launch_builder(&copy);
    launch.arg(&mut to).arg(&middle);
    // SAFETY: as above.
    unsafe { launch.launch(ONE_BLOCK) }.unwrap();
    context.synchronize().unwrap();
    control.findings()
}

#[test]
fn launches_that_nothing_orders_race() {
    let findings = two_streams(|_, _, _| {});
    assert_eq!(findings.len(), 1, "{findings:?}");
    let expected = "is not ordered after the write by another launch, which no stream and no event orders before this one; \
                    kernel `copy`, line 17: `ld.global.u32 %v, [%from];`";
    assert!(findings[0].starts_with("race: read of 4 bytes of global memory") && findings[0].contains(expected));
    assert!(findings[0].contains("against kernel `copy`, line 18: `st.global.u32 [%to], %v;`"), "{}", findings[0]);
}

/// `to[i] = from[i]`; `early` before it waits for the launches in front of it, else after.
const DEPENDENT: &str = "
.version 7.8
.target sm_90
.address_size 64
.visible .entry late(.param .u64 to, .param .u64 from)
{
    .reg .u64 %to, %from, %at;
    .reg .u32 %i, %v;
    ld.param.u64 %to, [to];
    ld.param.u64 %from, [from];
    mov.u32 %i, %tid.x;
    mul.wide.u32 %at, %i, 4;
    add.u64 %from, %from, %at;
    add.u64 %to, %to, %at;
    griddepcontrol.wait;
    griddepcontrol.launch_dependents;
    ld.global.u32 %v, [%from];
    st.global.u32 [%to], %v;
    ret;
}
.visible .entry early(.param .u64 to, .param .u64 from)
{
    .reg .u64 %to, %from, %at;
    .reg .u32 %i, %v;
    ld.param.u64 %to, [to];
    ld.param.u64 %from, [from];
    mov.u32 %i, %tid.x;
    mul.wide.u32 %at, %i, 4;
    add.u64 %from, %from, %at;
    add.u64 %to, %to, %at;
    griddepcontrol.launch_dependents;
    ld.global.u32 %v, [%from];
    griddepcontrol.wait;
    st.global.u32 [%to], %v;
    ret;
}
";

/// Three launches in one stream, each dependent if so said: a to b, c to d, `from` (a buffer's number) to e.
fn dependents(last: &str, from: usize, dependent: bool, between: impl Fn(&cudarc::driver::CudaStream)) -> Vec<String> {
    let (_one, control, context) = device("race");
    let stream = context.new_stream().unwrap();
    let text = std::ffi::CString::new(DEPENDENT).unwrap();
    let mut module = std::ptr::null_mut();
    // SAFETY: the text ends with a NUL; the module lives as long as the process.
    unsafe { sys::cuModuleLoadData(&mut module, text.as_ptr().cast()).result().unwrap() };
    let handle = |name: &str| {
        let (name, mut function) = (std::ffi::CString::new(name).unwrap(), std::ptr::null_mut());
        // SAFETY: the module is loaded.
        unsafe { sys::cuModuleGetFunction(&mut function, module, name.as_ptr()).result().unwrap() };
        function
    };
    let buffers: Vec<_> = (0..5).map(|_| stream.clone_htod(&[7u32; 64]).unwrap()).collect();
    stream.synchronize().unwrap();
    let address = |buffer: usize| cudarc::driver::DevicePtr::device_ptr(&buffers[buffer], &stream).0;
    let mut attribute = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: Default::default(),
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: i32::from(dependent) },
    };
    for (name, to, from) in [("late", 1, 0), ("late", 3, 2), (last, 4, from)] {
        let (mut to, mut from) = (address(to), address(from));
        let mut params: [*mut std::ffi::c_void; 2] = [(&raw mut to).cast(), (&raw mut from).cast()];
        let config = sys::CUlaunchConfig {
            gridDimX: 1,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: 64,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            hStream: stream.cu_stream(),
            attrs: &mut attribute,
            numAttrs: 1,
        };
        // SAFETY: the kernel's parameters; 64 threads copy 64 elements.
        unsafe {
            sys::cuLaunchKernelEx(&config, handle(name), params.as_mut_ptr(), std::ptr::null_mut()).result().unwrap();
        }
        between(&stream);
    }
    stream.synchronize().unwrap();
    control.findings()
}

#[test]
fn a_dependent_launch_races_until_it_waits() {
    let nothing = |_: &cudarc::driver::CudaStream| ();
    // d, which the launch in front writes: by one that waits before it reads, and one that does not.
    assert_eq!(dependents("late", 3, true, nothing), Vec::<String>::new());
    let findings = dependents("early", 3, true, nothing);
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert!(findings[0].contains("kernel `early`") && findings[0].contains("against kernel `late`"), "{}", findings[0]);
    // b, of the launch before that, and what nobody writes.
    assert_eq!(dependents("early", 1, true, nothing), Vec::<String>::new());
    assert_eq!(dependents("early", 0, true, nothing), Vec::<String>::new());
    // Without the attribute, or after the host has waited, all is over.
    assert_eq!(dependents("early", 3, false, nothing), Vec::<String>::new());
    assert_eq!(dependents("early", 3, true, |stream| stream.synchronize().unwrap()), Vec::<String>::new());
}

#[test]
fn events_and_the_host_order_launches() {
    let by_event = two_streams(|_, first, second| second.wait(&first.record_event(None).unwrap()).unwrap());
    assert_eq!(by_event, Vec::<String>::new());
    let by_event_on_host = two_streams(|_, first, _| first.record_event(None).unwrap().synchronize().unwrap());
    assert_eq!(by_event_on_host, Vec::<String>::new());
    let by_host = two_streams(|_, first, _| first.synchronize().unwrap());
    assert_eq!(by_host, Vec::<String>::new());
    let by_wrong_event = two_streams(|_, first, second| first.wait(&second.record_event(None).unwrap()).unwrap());
    assert_eq!(by_wrong_event.len(), 1, "{by_wrong_event:?}");
}
