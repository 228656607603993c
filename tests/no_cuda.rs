//! A program that never installs a driver: opening a device is an answer, not a panic, and planning needs no device.

use moe_kernels::layer::LayerDesc;
use moe_kernels::{DeviceInfo, Dtype, Error, device};

#[test]
fn opening_a_device_never_panics() {
    // SAFETY: opens the driver library, if there is one, as any use of CUDA would.
    let present = unsafe { cudarc::driver::sys::is_culib_present() };
    match device::open(0) {
        Ok(_) | Err(Error::NoDevice { .. } | Error::Driver { .. }) if present => println!("this machine has a driver"),
        Err(Error::NoCuda) if !present => {}
        other => panic!("driver library present: {present}, yet {other:?}"),
    }
    assert_eq!(device::count().err() == Some(Error::NoCuda), !present);
    assert!(Error::NoCuda.to_string().contains("no CUDA driver on this machine"));
}

#[test]
fn planning_needs_no_device() {
    let h100 = DeviceInfo {
        compute_capability: (9, 0),
        multiprocessors: 132,
        shared_bytes_per_block: 227 << 10,
        cooperative_launch: true,
    };
    let plan = LayerDesc::new(Dtype::Bf16, 2048, 768, 128, 8).plan(4096, &h100).unwrap();
    assert_eq!(plan.launches(), 5);
    for (stage, selection) in plan.stages() {
        println!("{}: {} {:?}", stage.name(), selection.kernel.name(), selection.grid);
    }
}
