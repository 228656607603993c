//! A driver that came first. A binary of its own: what is loaded stays loaded.

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use softcuda::InstallError;

#[test]
fn a_driver_loaded_before_is_noticed() {
    // A copy under another name stands for NVIDIA's driver: what counts is the name that it answers to.
    let folder = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let copy = std::env::temp_dir().join(format!("softcuda-occupied-{}.so", std::process::id()));
    std::fs::copy(folder.join("libsoftcuda.so"), &copy).unwrap();
    let first = unsafe { Library::open(Some(&copy), RTLD_NOW | RTLD_GLOBAL) };
    std::fs::remove_file(&copy).unwrap();
    std::mem::forget(first.unwrap());
    let error = softcuda::install().unwrap_err();
    assert!(matches!(error, InstallError::Occupied), "{error}");
}
