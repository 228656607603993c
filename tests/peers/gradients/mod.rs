//! The backward halves of other libraries' suites, and what their users complain of.
//!
//! Gradients are compared with f64 computations of their own: sums written out, and differences of the peer's formula where that is of logits.

pub mod complaints;
mod empty;
pub mod formulas;
pub mod layers;
pub mod products;
pub mod routers;
pub mod rows;
