//! What of the model is plain Rust: each part with its forward pass, which keeps what the way back needs, and its backward pass, which adds to
//! the gradients of its parameters and returns that of its input.
//!
//! Rows are tokens, of one sequence after the other; matrices are row-major. Nothing here depends on how many threads there are.

pub mod attention;
pub mod cross_entropy;
pub mod dense;
pub mod embedding;
pub mod linear;
pub mod model;
pub mod norm;
pub mod parameter;
pub mod products;

/// What numbers are: f32 in the programs, f64 where tests compare gradients with finite differences.
pub use super::Real;

/// What can go wrong is the device's part.
pub type Outcome<T> = Result<T, Box<dyn std::error::Error>>;
