//! The experts' products, and the sum of their outputs.

pub mod combine;
pub(crate) mod dispatched;
pub mod gemm;
pub mod k_grouped;
pub mod rms_norm;
pub mod tiles;
pub mod unit_experts;
pub(crate) mod weight;

pub use dispatched::{Dispatched, Lists, SlotShape, TileEntry};
pub use weight::Weight;
