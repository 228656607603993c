//! Kernels for Mixture-of-Experts layers, written by hand in PTX, behind safe Rust.

#![warn(missing_docs)]
#![deny(unsafe_code)]
#![deny(unsafe_op_in_unsafe_fn)]

pub mod combine;
pub mod device;
pub mod dispatch;
mod dtype;
mod embedded;
mod error;
pub mod gating;
pub mod gemm;
pub mod kernels;
#[allow(unsafe_code)]
mod launch;
pub mod layer;
pub mod reference;
#[path = "../kernels/registry.rs"]
pub mod registry;
pub mod router;
mod shape;
pub mod tiles;
mod workspace;

pub use device::DeviceInfo;
pub use dtype::Element;
pub use error::Error;
pub use kernels::Kernels;
pub use launch::{In, Out};
pub use layer::{LayerArgs, LayerDesc, LayerPlan, LayerWeights};
pub use registry::Dtype;
pub use workspace::Workspace;

/// Most experts that a layer may have.
pub const MAX_EXPERTS: usize = 4096;

/// Most experts that a token may go to.
pub const MAX_TOP_K: usize = 32;

/// A kernel and how it is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selection {
    /// The variant; its block size and shared memory are in the registry.
    pub kernel: registry::Kernel,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Whether all blocks must be resident at once, because they meet at a barrier.
    pub cooperative: bool,
}
