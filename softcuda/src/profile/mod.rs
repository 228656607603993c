//! What launches do to the units of a GPU, and how long these would need at least: a model, never a measurement.
//!
//! - Counters of instructions, requests, sectors, wavefronts and matrix products are exact for the PTX that ran
//!   ([`crate::exec::Counters`]), by launch, kernel and PTX line. Loops that only wait for others count once.
//! - Traffic of L1, L2 and device memory comes from a model of the caches ([`traffic`]), which are cold at the start of each launch,
//!   warm, or carried from one launch to the next ([`Caches`]; `SOFTCUDA_PROFILE_CACHES=cold|warm|carried`).
//! - Occupancy follows from registers and shared memory as CUDA's occupancy calculator has it. Registers are those that
//!   `ptxas` reported, where they were recorded ([`crate::Control::record_registers`], `SOFTCUDA_REGISTERS`), else an estimate.
//! - A bound for each unit of the device ([`bounds`]): work over published rate. Their greatest is the modelled time, a lower
//!   bound of what a GPU would take. Latency is not modelled; every report says what that leaves out.
//!
//! The device is one of [`crate::device`], each of whose numbers names its source; `SOFTCUDA_DEVICE=a100|h100|h200|l4`.
//!
//! A profile of a whole process: `SOFTCUDA_PROFILE=FILE PROGRAM` (or `softcuda run --profile FILE -- PROGRAM`) writes
//! `FILE.txt`, `FILE.json` and `FILE.html` when the process ends. Of a section of a program:
//!
//! ```no_run
//! let soft = softcuda::install()?;
//! let ((), profile) = soft.control().profiled(|| { /* launches */ });
//! print!("{}", profile.to_text());
//! let dram: u64 = profile.launches.iter().map(|l| l.work.traffic.dram_bytes()).sum();
//! # Ok::<(), softcuda::InstallError>(())
//! ```

mod bounds;
mod cache;
mod html;
mod limits;
mod product;
mod record;
mod registers;
mod replay;
mod text;
mod trace;
pub mod traffic;
mod watch;
mod work;

pub use bounds::{Bound, bounds};
pub use record::{
    Collector, Device, DeviceFigure, KernelProfile, LaunchProfile, Launched, LineProfile, MOST_LAUNCHES, NOTICE,
    OccupancyProfile, Profile, RegisterSource, Registers, SCHEMA,
};
pub use registers::parse_registers;
pub use traffic::{Caches, Hierarchy, Traffic};
pub use watch::{CarriedCaches, Start, TrafficWatch};
pub use work::{TensorOps, Work};
