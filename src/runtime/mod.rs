//! The device underneath: opening it, loading kernels, checking buffers, launching.

pub mod device;
pub(crate) mod element;
pub(crate) mod embedded;
pub(crate) mod error;
pub mod kernels;
#[allow(unsafe_code)]
pub(crate) mod launch;
pub(crate) mod shape;
pub(crate) mod workspace;
