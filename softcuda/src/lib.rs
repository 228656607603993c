//! A software CUDA device: a CUDA driver (`cu*` C API) that executes PTX on the CPU.
//!
//! Layers, none of which reaches over the next: [`ptx`] reads text into a syntax tree, [`lower`] checks it and turns it
//! into a compact program, [`exec`] runs that program on warps of 32 lanes, `memory` is the device's memory, and
//! `driver` is the C API over all of them.
//!
//! A program calls [`install`] (or [`install_if_no_gpu`]) before it first uses CUDA; from then on CUDA is this device:
//!
//! ```
//! let soft = softcuda::install()?;
//! let context = cudarc::driver::CudaContext::new(0)?;
//! assert!(context.name()?.contains("softcuda"));
//! assert_eq!(soft.control().launch_count(), 0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#[cfg(target_os = "linux")]
mod alias;
pub mod check;
#[cfg(unix)]
mod control;
pub mod device;
#[cfg(target_os = "linux")]
pub mod driver;
pub mod exec;
#[cfg(unix)]
mod install;
pub mod lower;
#[cfg(target_os = "linux")]
pub mod memory;
pub mod profile;
pub mod ptx;
#[cfg(unix)]
mod report;
pub mod tensormap;
#[cfg_attr(not(target_os = "linux"), allow(dead_code))]
mod whole;

#[cfg(unix)]
pub use control::{Control, LaunchRecord};
#[cfg(unix)]
pub use install::{Choice, InstallError, Installed, install, install_if_no_gpu, library};
