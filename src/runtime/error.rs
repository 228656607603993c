//! The one error type of the crate.

use cudarc::driver::DriverError;

use crate::rules::Dtype;

/// Why an operation was refused or failed.
///
/// Everything but [`Error::Driver`] and [`Error::ModuleLoad`] is found before the first launch: the operation has then
/// written nothing.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value that no device and no version of the crate could accept.
    #[error("{operation}: `{argument}` is {got}, expected {expected}")]
    Invalid {
        /// Operation that was asked for.
        operation: &'static str,
        /// Argument or descriptor field at fault.
        argument: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// A meaningful request for which no kernel exists, or which the device at hand cannot run.
    #[error("{operation}: `{argument}` is {got}, which is not supported: {supported}")]
    Unsupported {
        /// Operation that was asked for.
        operation: &'static str,
        /// Argument or descriptor field at fault.
        argument: &'static str,
        /// What is supported.
        supported: String,
        /// What came.
        got: String,
    },
    /// A product of sizes, or a size handed to the kernel, exceeds its integer type.
    #[error("{operation}: `{argument}` overflows: {value} exceeds {limit}")]
    Overflow {
        /// Operation that was asked for.
        operation: &'static str,
        /// Quantity that overflows.
        argument: &'static str,
        /// The quantity, or the product that could not be formed.
        value: String,
        /// The largest value allowed.
        limit: u64,
    },
    /// A buffer of another element type than the descriptor says.
    #[error("{operation}: `{argument}` holds {got}, the descriptor says {expected}")]
    WrongDtype {
        /// Operation that was asked for.
        operation: &'static str,
        /// Buffer at fault.
        argument: &'static str,
        /// Type by the descriptor.
        expected: Dtype,
        /// Type of the buffer.
        got: Dtype,
    },
    /// A buffer that is smaller than what the kernel may touch.
    #[error("{operation}: `{argument}` has {got} elements, needs {needed}")]
    BufferTooShort {
        /// Operation that was asked for.
        operation: &'static str,
        /// Buffer at fault.
        argument: &'static str,
        /// Elements that the kernel may touch.
        needed: usize,
        /// Elements that came.
        got: usize,
    },
    /// A workspace that was made for a smaller problem.
    #[error("{operation}: the workspace has {got} bytes, needs {needed}")]
    WorkspaceTooSmall {
        /// Operation that was asked for.
        operation: &'static str,
        /// Bytes needed.
        needed: usize,
        /// Bytes there.
        got: usize,
    },
    /// A buffer whose first element does not lie on the boundary that the kernel's vector accesses need.
    #[error("{operation}: `{argument}` begins at {address:#x}, needs a multiple of {needed} bytes")]
    Misaligned {
        /// Operation that was asked for.
        operation: &'static str,
        /// Buffer at fault.
        argument: &'static str,
        /// Alignment needed, in bytes.
        needed: u64,
        /// Device address of the buffer.
        address: u64,
    },
    /// An optional argument that the descriptor makes necessary.
    #[error("{operation}: `{argument}` is missing: {reason}")]
    Missing {
        /// Operation that was asked for.
        operation: &'static str,
        /// Argument that is absent.
        argument: &'static str,
        /// Why it is needed.
        reason: &'static str,
    },
    /// An optional argument that the descriptor does not provide for.
    #[error("{operation}: `{argument}` is given: {reason}")]
    Unexpected {
        /// Operation that was asked for.
        operation: &'static str,
        /// Argument that is present.
        argument: &'static str,
        /// Why it must be absent.
        reason: &'static str,
    },
    /// A buffer, stream or kernel set of another CUDA context than the launch's.
    #[error(
        "{operation}: `{argument}` belongs to another CUDA context, or another `CudaContext` value of the same device"
    )]
    DifferentContext {
        /// Operation that was asked for.
        operation: &'static str,
        /// Argument at fault.
        argument: &'static str,
    },
    /// A step of graph capture that was left out: see the crate's documentation.
    #[error("{operation}: the stream is being captured into a graph, without {missing}")]
    Capture {
        /// Operation that was asked for.
        operation: &'static str,
        /// What should have been done.
        missing: &'static str,
    },
    /// The machine has no CUDA driver library.
    #[error("no CUDA driver on this machine: neither libcuda.so nor nvcuda.dll could be loaded")]
    NoCuda,
    /// A driver library is there, but no device of that number.
    #[error("no CUDA device {ordinal}: the driver reports {count}")]
    NoDevice {
        /// Device asked for.
        ordinal: usize,
        /// Devices that the driver reports.
        count: usize,
    },
    /// The driver accepted neither the machine code nor the PTX of a kernel.
    #[error("kernel {kernel} cannot be loaded: {source:?}")]
    ModuleLoad {
        /// The variant's name.
        kernel: String,
        /// What the driver said.
        source: DriverError,
    },
    /// A call of the CUDA driver failed.
    #[error("{operation}: CUDA driver: {source:?}")]
    Driver {
        /// Operation under way.
        operation: &'static str,
        /// What the driver said.
        source: DriverError,
    },
}

impl Error {
    pub(crate) fn invalid(
        operation: &'static str,
        argument: &'static str,
        expected: impl Into<String>,
        got: impl ToString,
    ) -> Error {
        Error::Invalid { operation, argument, expected: expected.into(), got: got.to_string() }
    }

    pub(crate) fn unsupported(
        operation: &'static str,
        argument: &'static str,
        supported: impl Into<String>,
        got: impl ToString,
    ) -> Error {
        Error::Unsupported { operation, argument, supported: supported.into(), got: got.to_string() }
    }

    pub(crate) fn driver(operation: &'static str) -> impl FnOnce(DriverError) -> Error {
        move |source| Error::Driver { operation, source }
    }

    /// The same error on behalf of another operation: that which was asked for, where it is made of several.
    pub(crate) fn within(mut self, of: &'static str) -> Error {
        match &mut self {
            Error::Invalid { operation, .. }
            | Error::Unsupported { operation, .. }
            | Error::Overflow { operation, .. }
            | Error::WrongDtype { operation, .. }
            | Error::BufferTooShort { operation, .. }
            | Error::WorkspaceTooSmall { operation, .. }
            | Error::Misaligned { operation, .. }
            | Error::Missing { operation, .. }
            | Error::Unexpected { operation, .. }
            | Error::DifferentContext { operation, .. }
            | Error::Capture { operation, .. }
            | Error::Driver { operation, .. } => *operation = of,
            Error::NoCuda | Error::NoDevice { .. } | Error::ModuleLoad { .. } => {}
        }
        self
    }

    /// The argument or field that the error is about, where there is one.
    pub fn argument(&self) -> Option<&'static str> {
        match self {
            Error::Invalid { argument, .. }
            | Error::Unsupported { argument, .. }
            | Error::Overflow { argument, .. }
            | Error::WrongDtype { argument, .. }
            | Error::BufferTooShort { argument, .. }
            | Error::Misaligned { argument, .. }
            | Error::Missing { argument, .. }
            | Error::Unexpected { argument, .. }
            | Error::DifferentContext { argument, .. } => Some(argument),
            Error::WorkspaceTooSmall { .. } => Some("workspace"),
            Error::Capture { .. }
            | Error::NoCuda
            | Error::NoDevice { .. }
            | Error::ModuleLoad { .. }
            | Error::Driver { .. } => None,
        }
    }
}
