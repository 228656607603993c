//! A layer's backward pass in one call.

mod case;
#[path = "../support/data.rs"]
mod data;
#[path = "../support/device.rs"]
#[allow(dead_code)]
mod device;
mod slopes;
mod torch;
mod variants;
