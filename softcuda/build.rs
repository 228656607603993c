//! Gives the cdylib the SONAME under which programs look for the CUDA driver, so that once it is loaded by path,
//! `dlopen("libcuda.so")` resolves to it.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
    }
}
