//! The device as an L4, which holds fewer threads and less shared memory than the others. A binary of its own: the choice is
//! made once a process.

use cudarc::driver::CudaContext;
use cudarc::driver::sys::CUdevice_attribute::*;

#[test]
fn the_environment_chooses_the_device() {
    // SAFETY: the only test of this binary, before any thread is started.
    unsafe { std::env::set_var("SOFTCUDA_DEVICE", "l4") };
    softcuda::install().unwrap();
    let context = CudaContext::new(0).unwrap();
    assert_eq!(context.compute_capability().unwrap(), (8, 9));
    assert!(context.name().unwrap().contains("L4"));
    assert_eq!(context.total_mem().unwrap(), 24 << 30);
    let attributes = [
        (CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 58),
        (CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, 1536),
        (CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR, 24),
        (CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 99 << 10),
        (CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, 48 << 20),
        (CU_DEVICE_ATTRIBUTE_SINGLE_TO_DOUBLE_PRECISION_PERF_RATIO, 64),
    ];
    for (attribute, value) in attributes {
        assert_eq!(context.attribute(attribute).unwrap(), value, "{attribute:?}");
    }
    let text = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k() { ret; }\n";
    let module = context.load_module(cudarc::nvrtc::Ptx::from_src(text)).unwrap();
    let kernel = module.load_function("k").unwrap();
    // 48 warps in blocks of eight.
    assert_eq!(kernel.occupancy_max_active_blocks_per_multiprocessor(256, 0, None).unwrap(), 6);
}
