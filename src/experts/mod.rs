//! The experts' products, and the sum of their outputs.

pub mod combine;
pub(crate) mod dispatched;
pub mod gemm;
pub mod permute;
pub mod tiles;
pub(crate) mod weight;

pub use dispatched::{Dispatched, Lists, SlotShape, TileEntry};
pub use weight::Weight;
