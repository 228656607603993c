//! `malloc` of device code as a CUDA program meets it: the heap's limit, blocks that outlive launches, and leaks at the context's
//! end.

use cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg, sys};

const PTX: &str = "
.version 7.0
.target sm_80
.address_size 64
.extern .func (.param .b64 r) malloc(.param .b64 bytes);
.extern .func free(.param .b64 block);

// *block = malloc(bytes)
.visible .entry allocate(.param .u64 block, .param .u64 bytes)
{
    .reg .b64 %to, %n, %b;
    ld.param.u64 %to, [block];
    ld.param.u64 %n, [bytes];
    {
        .param .b64 n;
        .param .b64 b;
        st.param.b64 [n], %n;
        call.uni (b), malloc, (n);
        ld.param.b64 %b, [b];
    }
    st.global.u64 [%to], %b;
    ret;
}

// free(*block)
.visible .entry release(.param .u64 block)
{
    .reg .b64 %from, %b;
    ld.param.u64 %from, [block];
    ld.global.u64 %b, [%from];
    {
        .param .b64 b;
        st.param.b64 [b], %b;
        call.uni free, (b);
    }
    ret;
}
";

fn set_heap(bytes: usize) -> sys::CUresult {
    // SAFETY: takes any value.
    unsafe { sys::cuCtxSetLimit(sys::CUlimit::CU_LIMIT_MALLOC_HEAP_SIZE, bytes) }
}

#[test]
fn the_heap_of_a_context() {
    let control = *softcuda::install().unwrap().control();
    let context = CudaContext::new(0).unwrap();
    assert!(control.set_checks("memory"));
    let module = context.load_module(cudarc::nvrtc::Ptx::from_src(PTX)).unwrap();
    let (allocate, release) = (module.load_function("allocate").unwrap(), module.load_function("release").unwrap());
    let stream = context.default_stream();
    let one = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (1, 1, 1), shared_mem_bytes: 0 };
    let mut block = stream.alloc_zeros::<u64>(1).unwrap();
    let mut malloc = |bytes: u64| {
        // SAFETY: the kernel's parameters, and room for what it writes.
        unsafe { stream.launch_builder(&allocate).arg(&mut block).arg(&bytes).launch(one) }.unwrap();
        stream.clone_dtoh(&block).unwrap()[0]
    };

    assert_eq!(set_heap(4096), sys::CUresult::CUDA_SUCCESS);
    let first = malloc(4000);
    assert_ne!(first, 0);
    assert_eq!(malloc(200), 0, "there is no room for 200 bytes more");
    assert_eq!(set_heap(1 << 20), sys::CUresult::CUDA_ERROR_INVALID_VALUE, "the heap is in use");
    // The host cannot free it.
    // SAFETY: an address that is checked.
    assert_eq!(unsafe { sys::cuMemFree_v2(first) }, sys::CUresult::CUDA_ERROR_INVALID_VALUE);
    let mut kept = stream.clone_htod(&[first]).unwrap();
    // SAFETY: as above.
    unsafe { stream.launch_builder(&release).arg(&mut kept).launch(one) }.unwrap();
    stream.synchronize().unwrap();
    assert_ne!(malloc(96), 0, "its room is free again");
    assert_eq!(control.findings(), Vec::<String>::new());

    // One block of 96 bytes is never freed.
    drop((kept, block, allocate, release, module, stream));
    let device = context.cu_device();
    drop(context);
    // SAFETY: nothing of the context is used any more.
    assert_eq!(unsafe { sys::cuDevicePrimaryCtxReset_v2(device) }, sys::CUresult::CUDA_SUCCESS);
    let findings = control.findings();
    assert!(
        findings.len() == 1 && findings[0].contains("96 bytes at") && findings[0].contains("never freed"),
        "{findings:?}"
    );
}
