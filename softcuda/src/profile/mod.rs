//! What launches do to the units of a GPU, and how long these would need at least: a model, never a measurement.
//!
//! Counters are exact for the PTX that ran ([`crate::exec::Counters`]); the traffic behind the L1 caches comes from a model
//! of the caches ([`traffic`]).

mod bounds;
mod cache;
mod html;
mod record;
mod registers;
mod replay;
mod text;
pub mod traffic;
mod work;

pub use bounds::{Bound, bounds};
pub use record::{
    Collector, Device, DeviceFigure, KernelProfile, LaunchProfile, Launched, LineProfile, MOST_LAUNCHES, NOTICE,
    OccupancyProfile, Profile, RegisterSource, Registers, SCHEMA,
};
pub use registers::parse_registers;
pub use traffic::{Hierarchy, Traffic, TrafficWatch};
pub use work::{TensorOps, Work};
