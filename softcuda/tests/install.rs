//! The choice of a driver. One test: the environment and the installed driver are the process's.

use softcuda::{Choice, InstallError, install, install_if_no_gpu};

#[test]
fn the_environment_chooses_the_driver() {
    // SAFETY: the only test of this binary, and nothing else reads the environment meanwhile.
    let set = |name: &str, value: &str| unsafe { std::env::set_var(name, value) };
    set("MOE_DEVICE", "gpu");
    let error = install_if_no_gpu().unwrap_err();
    assert_eq!(error.to_string(), "MOE_DEVICE must be `soft`, `cuda` or unset, not `gpu`");

    set("MOE_DEVICE", "soft");
    set("SOFTCUDA_LIBRARY", "/no/such/libsoftcuda.so");
    let error = install_if_no_gpu().unwrap_err();
    assert!(matches!(&error, InstallError::NotFound(paths) if paths.len() == 1), "{error}");
    set("SOFTCUDA_LIBRARY", file!());
    let not_a_library = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    set("SOFTCUDA_LIBRARY", not_a_library.to_str().unwrap());
    assert!(matches!(install().unwrap_err(), InstallError::Load { .. }));

    // A failed attempt leaves nothing behind.
    set("SOFTCUDA_LIBRARY", "");
    let choice = install_if_no_gpu().unwrap();
    assert_eq!(choice.to_string(), "softcuda, the software device");
    assert_eq!(choice.control().unwrap().version(), env!("CARGO_PKG_VERSION"));
    let Choice::Soft(installed) = choice else { panic!("not the software device") };
    assert_eq!(install().unwrap().path(), installed.path());
    assert_eq!(cudarc::driver::CudaContext::device_count().unwrap(), 1);

    // Both names mean it, and no other file was loaded for them.
    use libloading::os::unix::{Library, RTLD_NOW};
    let address = |name: &str| {
        let library = unsafe { Library::open(Some(name), RTLD_NOW | libc::RTLD_NOLOAD) }.unwrap();
        let function = unsafe { *library.get::<unsafe extern "C" fn(u32) -> u32>(b"cuInit\0").unwrap() };
        std::mem::forget(library);
        function as usize
    };
    let own = address(installed.path().to_str().unwrap());
    assert_eq!([address("libcuda.so"), address("libcuda.so.1")], [own; 2]);

    // What is installed is not taken for a GPU's driver.
    set("MOE_DEVICE", "");
    assert!(install_if_no_gpu().unwrap().control().is_some());
}
