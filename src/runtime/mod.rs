//! The device underneath: opening it, loading kernels, checking buffers, launching.

#[allow(unsafe_code)]
pub(crate) mod buffer;
pub(crate) mod builder;
pub mod device;
#[allow(unsafe_code)]
mod driver;
pub(crate) mod element;
pub(crate) mod embedded;
pub(crate) mod error;
pub(crate) mod ids;
#[allow(unsafe_code)]
pub mod interop;
pub mod kernels;
#[allow(unsafe_code)]
pub(crate) mod launch;
pub(crate) mod params;
pub(crate) mod selection;
pub(crate) mod shape;
pub(crate) mod token_mask;
pub(crate) mod workspace;
