//! The device as an A100. A binary of its own: the choice is made once a process.

use cudarc::driver::sys::{CUdevice_attribute::*, CUresult};
use cudarc::driver::{CudaContext, DriverError};
use cudarc::nvrtc::Ptx;

#[test]
fn the_environment_chooses_the_device() {
    // SAFETY: the only test of this binary, before any thread is started.
    unsafe {
        std::env::set_var("SOFTCUDA_DEVICE", "a100");
        std::env::set_var("SOFTCUDA_MEMORY_MIB", "100");
    }
    softcuda::install().unwrap();
    let context = CudaContext::new(0).unwrap();
    assert_eq!(context.compute_capability().unwrap(), (8, 0));
    assert!(context.name().unwrap().contains("A100"));
    assert_eq!(context.total_mem().unwrap(), 100 << 20);
    let attributes = [
        (CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 108),
        (CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, 48 << 10),
        (CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 163 << 10),
        (CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH, 0),
    ];
    for (attribute, value) in attributes {
        assert_eq!(context.attribute(attribute).unwrap(), value, "{attribute:?}");
    }
    let load = |target: &str| context.load_module(Ptx::from_src(format!(".version 8.0\n.target {target}\n")));
    load("sm_80").unwrap();
    for newer in ["sm_86", "sm_90", "sm_90a"] {
        let Err(DriverError(code)) = load(newer) else { panic!("{newer} was loaded") };
        assert_eq!(code, CUresult::CUDA_ERROR_INVALID_PTX);
    }
}
