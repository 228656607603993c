//! Gives the cdylib the name by which NVIDIA's driver calls itself: what is linked with it asks for `libcuda.so.1`, and once it is
//! loaded by path, `dlopen` of that name means it.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1");
    }
}
