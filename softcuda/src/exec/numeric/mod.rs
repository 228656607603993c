//! Scalar definitions of what instructions compute, one lane at a time.

pub(crate) mod eight_bit;
pub(crate) mod exact;
pub(crate) mod float;
pub(crate) mod int;
pub(crate) mod rounding;
pub(crate) mod small;
pub(crate) mod truncated;

pub use small::{BF16, BF16x2, F16, F16x2};
