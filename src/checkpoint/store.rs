//! Where a block's values go: onto a device, into the host's memory, or nowhere.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr, DriverError, ValidAsZeroBits};
use half::{bf16, f16};

use super::error::CheckpointError;
use super::tensors::FileTensor;
use crate::{Dtype, Element, Error, In, Tensor};

/// A place for buffers, filled part by part.
pub(super) trait Store {
    /// A buffer of one type.
    type Buffer;

    /// A buffer of `length` elements.
    fn buffer(&mut self, dtype: Dtype, length: usize) -> Result<Self::Buffer, CheckpointError>;

    /// Writes a tensor's values from element `at` on.
    fn put(&mut self, buffer: &mut Self::Buffer, at: usize, values: &FileTensor<'_>) -> Result<(), CheckpointError>;

    /// The values of a tensor of whole numbers.
    fn integers(&mut self, values: &FileTensor<'_>) -> Result<Self::Buffer, CheckpointError>;

    /// The values of a matrix with its rows as columns, rounded; `turned` are they.
    fn turned(
        &mut self,
        dtype: Dtype,
        matrix: &FileTensor<'_>,
        turned: &[f32],
    ) -> Result<Self::Buffer, CheckpointError>;

    /// Whole numbers that are in no file.
    fn numbers(&mut self, values: &[i32]) -> Result<Self::Buffer, CheckpointError>;
}

/// A buffer of one type, on the device (`CudaSlice`) or on the host (`Vec`).
macro_rules! buffers {
    ($(#[$doc:meta])* $name:ident, $of:ident) => {
        $(#[$doc])*
        #[non_exhaustive]
        pub enum $name {
            /// bfloat16.
            Bf16($of<bf16>),
            /// IEEE half precision.
            F16($of<f16>),
            /// IEEE single precision.
            F32($of<f32>),
            /// Whole numbers.
            I32($of<i32>),
        }
    };
}

buffers!(
    /// Weights in device memory, whose type is a value.
    DeviceBuffer,
    CudaSlice
);
buffers!(
    /// Weights in the host's memory, whose type is a value.
    HostBuffer,
    Vec
);

impl DeviceBuffer {
    /// Elements allocated.
    pub(super) fn length(&self) -> usize {
        match self {
            DeviceBuffer::Bf16(buffer) => buffer.len(),
            DeviceBuffer::F16(buffer) => buffer.len(),
            DeviceBuffer::F32(buffer) => buffer.len(),
            DeviceBuffer::I32(buffer) => buffer.len(),
        }
    }

    /// The buffer as operations take weights; none of whole numbers.
    pub fn tensor(&self) -> Option<Tensor<'_>> {
        match self {
            DeviceBuffer::Bf16(buffer) => Some(buffer.into()),
            DeviceBuffer::F16(buffer) => Some(buffer.into()),
            DeviceBuffer::F32(buffer) => Some(buffer.into()),
            DeviceBuffer::I32(_) => None,
        }
    }

    /// The buffer, if it is of f32.
    pub fn f32(&self) -> Option<In<'_, f32>> {
        match self {
            DeviceBuffer::F32(buffer) => Some(buffer.into()),
            _ => None,
        }
    }

    /// The buffer, if it is of whole numbers.
    pub fn i32(&self) -> Option<In<'_, i32>> {
        match self {
            DeviceBuffer::I32(buffer) => Some(buffer.into()),
            _ => None,
        }
    }
}

impl HostBuffer {
    /// The values, exactly.
    pub fn to_f32(&self) -> Vec<f32> {
        fn widened<T: Element>(values: &[T]) -> Vec<f32> {
            values.iter().map(|value| value.to_f32()).collect()
        }
        match self {
            HostBuffer::Bf16(values) => widened(values),
            HostBuffer::F16(values) => widened(values),
            HostBuffer::F32(values) => values.clone(),
            HostBuffer::I32(values) => values.iter().map(|&value| value as f32).collect(),
        }
    }

    /// The values, if they are of bfloat16.
    pub fn bf16(&self) -> Option<&[bf16]> {
        match self {
            HostBuffer::Bf16(values) => Some(values),
            _ => None,
        }
    }

    /// The values, if they are of half precision.
    pub fn f16(&self) -> Option<&[f16]> {
        match self {
            HostBuffer::F16(values) => Some(values),
            _ => None,
        }
    }

    /// The values, if they are of single precision.
    pub fn f32(&self) -> Option<&[f32]> {
        match self {
            HostBuffer::F32(values) => Some(values),
            _ => None,
        }
    }

    /// The values of a buffer of whole numbers, else none.
    pub fn i32(&self) -> &[i32] {
        match self {
            HostBuffer::I32(values) => values,
            _ => &[],
        }
    }
}

const OPERATION: &str = "loading a checkpoint";

fn failed(source: DriverError) -> CheckpointError {
    Error::Driver { operation: OPERATION, source }.into()
}

/// A type of which no kernel here has weights.
fn unknown(dtype: Dtype) -> CheckpointError {
    let supported = "bf16, f16 and f32".into();
    Error::Unsupported { operation: OPERATION, argument: "dtype", supported, got: dtype.to_string() }.into()
}

fn rounded<T: Element>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&value| T::from_f32(value)).collect()
}

/// Device memory; each part is copied from the mapped file, or from its converted values.
pub(super) struct ToDevice<'a> {
    pub(super) stream: &'a Arc<CudaStream>,
}

impl ToDevice<'_> {
    /// One element where there are none: CUDA has no empty allocations.
    fn zeros<T: DeviceRepr + ValidAsZeroBits>(&self, length: usize) -> Result<CudaSlice<T>, CheckpointError> {
        self.stream.alloc_zeros(length.max(1)).map_err(failed)
    }

    fn copy<T: DeviceRepr>(&self, buffer: &mut CudaSlice<T>, at: usize, values: &[T]) -> Result<(), CheckpointError> {
        if values.is_empty() {
            return Ok(());
        }
        self.stream.memcpy_htod(values, &mut buffer.slice_mut(at..at + values.len())).map_err(failed)
    }
}

impl Store for ToDevice<'_> {
    type Buffer = DeviceBuffer;

    fn buffer(&mut self, dtype: Dtype, length: usize) -> Result<DeviceBuffer, CheckpointError> {
        match dtype {
            Dtype::Bf16 => Ok(DeviceBuffer::Bf16(self.zeros(length)?)),
            Dtype::F16 => Ok(DeviceBuffer::F16(self.zeros(length)?)),
            Dtype::F32 => Ok(DeviceBuffer::F32(self.zeros(length)?)),
            #[allow(unreachable_patterns)]
            other => Err(unknown(other)),
        }
    }

    fn put(&mut self, buffer: &mut DeviceBuffer, at: usize, values: &FileTensor<'_>) -> Result<(), CheckpointError> {
        match buffer {
            DeviceBuffer::Bf16(buffer) => self.copy(buffer, at, &values.values()?),
            DeviceBuffer::F16(buffer) => self.copy(buffer, at, &values.values()?),
            DeviceBuffer::F32(buffer) => self.copy(buffer, at, &values.values()?),
            DeviceBuffer::I32(buffer) => self.copy(buffer, at, &values.integers()?),
        }
    }

    fn integers(&mut self, values: &FileTensor<'_>) -> Result<DeviceBuffer, CheckpointError> {
        let mut buffer = DeviceBuffer::I32(self.zeros(values.elements())?);
        self.put(&mut buffer, 0, values)?;
        Ok(buffer)
    }

    fn turned(&mut self, dtype: Dtype, _: &FileTensor<'_>, values: &[f32]) -> Result<DeviceBuffer, CheckpointError> {
        let mut buffer = self.buffer(dtype, values.len())?;
        match &mut buffer {
            DeviceBuffer::Bf16(buffer) => self.copy(buffer, 0, &rounded(values))?,
            DeviceBuffer::F16(buffer) => self.copy(buffer, 0, &rounded(values))?,
            DeviceBuffer::F32(buffer) => self.copy(buffer, 0, values)?,
            DeviceBuffer::I32(_) => {}
        }
        Ok(buffer)
    }

    fn numbers(&mut self, values: &[i32]) -> Result<DeviceBuffer, CheckpointError> {
        let mut buffer = self.zeros(values.len())?;
        self.copy(&mut buffer, 0, values)?;
        Ok(DeviceBuffer::I32(buffer))
    }
}

/// The host's memory.
pub(super) struct ToHost;

impl Store for ToHost {
    type Buffer = HostBuffer;

    fn buffer(&mut self, dtype: Dtype, length: usize) -> Result<HostBuffer, CheckpointError> {
        match dtype {
            Dtype::Bf16 => Ok(HostBuffer::Bf16(vec![bf16::ZERO; length])),
            Dtype::F16 => Ok(HostBuffer::F16(vec![f16::ZERO; length])),
            Dtype::F32 => Ok(HostBuffer::F32(vec![0.0; length])),
            #[allow(unreachable_patterns)]
            other => Err(unknown(other)),
        }
    }

    fn put(&mut self, buffer: &mut HostBuffer, at: usize, values: &FileTensor<'_>) -> Result<(), CheckpointError> {
        let end = at + values.elements();
        match buffer {
            HostBuffer::Bf16(buffer) => buffer[at..end].copy_from_slice(&values.values()?),
            HostBuffer::F16(buffer) => buffer[at..end].copy_from_slice(&values.values()?),
            HostBuffer::F32(buffer) => buffer[at..end].copy_from_slice(&values.values()?),
            HostBuffer::I32(buffer) => buffer[at..end].copy_from_slice(&values.integers()?),
        }
        Ok(())
    }

    fn integers(&mut self, values: &FileTensor<'_>) -> Result<HostBuffer, CheckpointError> {
        Ok(HostBuffer::I32(values.integers()?))
    }

    fn turned(&mut self, dtype: Dtype, _: &FileTensor<'_>, values: &[f32]) -> Result<HostBuffer, CheckpointError> {
        match dtype {
            Dtype::Bf16 => Ok(HostBuffer::Bf16(rounded(values))),
            Dtype::F16 => Ok(HostBuffer::F16(rounded(values))),
            Dtype::F32 => Ok(HostBuffer::F32(values.to_vec())),
            #[allow(unreachable_patterns)]
            other => Err(unknown(other)),
        }
    }

    fn numbers(&mut self, values: &[i32]) -> Result<HostBuffer, CheckpointError> {
        Ok(HostBuffer::I32(values.to_vec()))
    }
}

/// Nowhere: finds what is wrong with names, shapes and types, and counts bytes.
#[derive(Default)]
pub(super) struct ToNowhere {
    pub(super) bytes: u64,
}

impl Store for ToNowhere {
    type Buffer = ();

    fn buffer(&mut self, _: Dtype, _: usize) -> Result<(), CheckpointError> {
        Ok(())
    }

    fn put(&mut self, (): &mut (), _: usize, values: &FileTensor<'_>) -> Result<(), CheckpointError> {
        self.bytes += values.bytes() as u64;
        values.check_floats()
    }

    fn integers(&mut self, values: &FileTensor<'_>) -> Result<(), CheckpointError> {
        self.bytes += values.bytes() as u64;
        values.check_integers()
    }

    fn turned(&mut self, _: Dtype, _: &FileTensor<'_>, _: &[f32]) -> Result<(), CheckpointError> {
        Ok(())
    }

    fn numbers(&mut self, _: &[i32]) -> Result<(), CheckpointError> {
        Ok(())
    }
}
