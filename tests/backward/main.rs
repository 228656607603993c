//! A layer's backward pass in one call.

mod case;
mod compare;
#[path = "../support/data.rs"]
mod data;
#[path = "../support/device.rs"]
#[allow(dead_code)]
mod device;
mod gating;
mod mlp;
mod network;
mod properties;
mod random;
mod refusals;
#[path = "../support/seed.rs"]
mod seed;
mod slopes;
mod torch;
mod variants;
