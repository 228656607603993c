//! The experts' room on the device against the reference: products in every form, and layers of them.
//!
//! `MOE_SEED` draws other values.

#[path = "../support/buffer.rs"]
#[allow(dead_code)]
mod buffer;
#[path = "../support/device.rs"]
#[allow(dead_code)]
mod device;

mod f32;
mod layers;
mod products;
mod routers;
mod shared;
mod values;
