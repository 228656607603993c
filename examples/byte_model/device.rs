//! The device that the MoE layers run on.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use moe_kernels::{Kernels, device};

use super::Outcome;

/// A stream and the kernels.
pub struct Device {
    pub stream: Arc<CudaStream>,
    pub kernels: Kernels,
    pub name: String,
}

impl Device {
    /// The GPU if there is one, else the software device.
    pub fn open() -> Outcome<Device> {
        softcuda::install_if_no_gpu()?;
        let context = device::open(0)?;
        let (stream, kernels) = (context.new_stream()?, Kernels::new(&context)?);
        Ok(Device { stream, kernels, name: context.name()? })
    }
}
