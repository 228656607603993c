//! Kernels for Mixture-of-Experts layers.

#[allow(dead_code)]
#[path = "../kernels/registry.rs"]
mod registry;

pub mod reference;
