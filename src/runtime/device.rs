//! What the selection of kernels needs to know of a device, and a way to open one that cannot panic.

use std::sync::Arc;

use cudarc::driver::CudaContext;
use cudarc::driver::sys::CUdevice_attribute;

use crate::Error;
use crate::runtime::driver;

/// Properties of a device that decide which kernel runs and how wide.
///
/// All fields are public: selection is a pure function of a descriptor and this value, and can be asked about a device
/// that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Major and minor compute capability.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors that work of the context may run on: all of the device's, or the context's share of them (a green context's
    /// partition, an execution affinity under MPS).
    pub multiprocessors: u32,
    /// Shared memory in bytes that one block may use after opting in.
    pub shared_bytes_per_block: u32,
    /// Whether all blocks of a grid can be guaranteed to run at once.
    pub cooperative_launch: bool,
}

impl DeviceInfo {
    /// Asks the driver.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn of(context: &CudaContext) -> Result<DeviceInfo, Error> {
        let attribute = |which| -> Result<u32, Error> {
            let value = context.attribute(which).map_err(Error::driver("device attributes"))?;
            Ok(u32::try_from(value).unwrap_or(0))
        };
        Ok(DeviceInfo {
            compute_capability: (
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: driver::multiprocessors(
                context,
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            )?,
            shared_bytes_per_block: attribute(
                CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )?,
            cooperative_launch: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH)? != 0,
        })
    }
}

const OPENING: &str = "opening the device";

/// Opens CUDA device `ordinal`, counted from 0, with its primary context.
///
/// The same as [`CudaContext::new`], except that a machine without CUDA yields an error where cudarc panics.
///
/// # Errors
/// [`Error::NoCuda`] without a driver library, [`Error::NoDevice`] without that device, [`Error::Driver`] otherwise: also where the
/// primary context is there but a kernel's fault has broken it (see the crate's documentation for the way back).
pub fn open(ordinal: usize) -> Result<Arc<CudaContext>, Error> {
    let count = count()?;
    if ordinal >= count {
        return Err(Error::NoDevice { ordinal, count });
    }
    let context = CudaContext::new(ordinal).map_err(Error::driver(OPENING))?;
    driver::check_health(&context, OPENING)?;
    Ok(context)
}

/// Number of CUDA devices.
///
/// # Errors
/// [`Error::NoCuda`] without a driver library; [`Error::Driver`] where the driver cannot start.
pub fn count() -> Result<usize, Error> {
    driver::device_count()
}

/// An A100, for tests of pure functions.
#[cfg(test)]
pub(crate) const A100: DeviceInfo = DeviceInfo {
    compute_capability: (8, 0),
    multiprocessors: 108,
    shared_bytes_per_block: 163 << 10,
    cooperative_launch: true,
};

/// An H100, for tests of pure functions.
#[cfg(test)]
pub(crate) const H100: DeviceInfo =
    DeviceInfo { compute_capability: (9, 0), multiprocessors: 132, shared_bytes_per_block: 227 << 10, ..A100 };
