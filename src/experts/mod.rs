//! The experts' products, and the sum of their outputs.

pub mod combine;
pub mod combine_ragged;
pub mod gemm;
pub mod tiles;
