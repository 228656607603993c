//! The experts' products, and the sum of their outputs.

pub mod combine;
pub mod gemm;
pub mod tiles;
