//! What every test of a kernel needs: the device, seeded inputs, buffers that notice writes past their edges, and metrics.
#![allow(dead_code)] // each test binary uses its own part

pub mod buffer;
pub mod compare;
pub mod counters;
pub mod device;
pub mod inputs;
pub mod layer_case;
pub mod lists;
pub mod seed;
