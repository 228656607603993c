//! A software CUDA device: a CUDA driver (`cu*` C API) that executes PTX on the CPU.
//!
//! Layers, none of which reaches over the next: [`ptx`] reads text into a syntax tree, `lower` checks it and turns it
//! into a compact program, `exec` runs that program on warps of 32 lanes, `memory` is the device's memory, and
//! `driver` is the C API over all of them.

pub mod exec;
pub mod lower;
#[cfg(target_os = "linux")]
pub mod memory;
pub mod ptx;
