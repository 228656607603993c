//! The driver boundary: everything `unsafe` in the crate, but for what other libraries made (the constructors of raw buffers,
//! [`super::interop`]), questions to the driver ([`super::driver`]) and the promise that
//! [`crate::routers::measured_gating::RouterStats`] is plain data.
//!
//! Soundness rests on three points. An [`Address`] is only made here, from a buffer whose context, alignment and length
//! were checked against the extent that the operation's descriptor implies ([`Scope::read`], [`Scope::write`]). The scalars of a
//! launch come from that same descriptor. And a kernel's parameters are a struct generated from its PTX entry
//! ([`super::params`]). Row numbers that a kernel reads from device memory come from lists that only dispatch or a check fills
//! ([`crate::experts::Dispatched`]), or by an `unsafe` constructor.

use std::ffi::{CString, c_void};
use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaContext, CudaStream, DriverError, SyncOnDrop, result};

use super::buffer::{In, Out, Sink, Source};
use super::embedded::Embedded;
use super::params::{Params, Pointer};
use crate::{DeviceInfo, Element, Error, Kernels, OutTensor, Selection, Tensor};

/// Alignment of matrices in bytes: kernels move 16 bytes at a time.
pub(crate) const VECTOR: u64 = 16;
/// Alignment of what is read 8 bytes at a time.
pub(crate) const WIDE: u64 = 8;
/// Alignment of lists of `i32` and `f32` that are read one by one.
pub(crate) const SCALAR: u64 = 4;

/// The handle that means the calling thread's own stream (`CU_STREAM_PER_THREAD`).
const PER_THREAD: sys::CUstream = 2 as sys::CUstream;

/// A checked device address, alive as long as the access it was made for.
#[derive(Clone, Copy)]
pub(crate) struct Address<'a> {
    value: sys::CUdeviceptr,
    _held: PhantomData<&'a ()>,
}

impl<'a> Address<'a> {
    /// What the kernel gets.
    pub(crate) fn value(self) -> sys::CUdeviceptr {
        self.value
    }

    /// `len` elements here as a buffer to read, for an operation that is part of another: within what was opened.
    pub(crate) fn input<T>(self, len: usize) -> In<'a, T> {
        In::of_part(self.value, len)
    }

    /// `len` elements here as a buffer to write, for an operation that is part of another: within what was opened.
    pub(crate) fn out<T>(self, len: usize) -> Out<'a, T> {
        Out::of_part(self.value, len)
    }

    /// The address `bytes` further back, within the same buffer.
    pub(super) fn back(self, bytes: usize) -> Address<'a> {
        Address { value: self.value - bytes as u64, _held: PhantomData }
    }

    /// The address `bytes` further on, within the same buffer.
    pub(crate) fn offset(self, bytes: usize) -> Address<'a> {
        Address { value: self.value + bytes as u64, _held: PhantomData }
    }
}

impl<'a> From<Address<'a>> for Pointer<'a> {
    fn from(address: Address<'a>) -> Self {
        Pointer::new(address.value())
    }
}

impl<'a> From<Option<Address<'a>>> for Pointer<'a> {
    fn from(address: Option<Address<'a>>) -> Self {
        address.map_or(Pointer::NULL, Pointer::from)
    }
}

/// An access to a buffer on a stream: earlier work on other streams is waited for before, and later work of other
/// streams waits for this one once the value is dropped; as far as cudarc orders streams, see the crate's documentation.
pub(crate) struct Held<'a> {
    value: sys::CUdeviceptr,
    /// None for memory that somebody else manages.
    _access: Option<SyncOnDrop<'a>>,
}

impl Held<'_> {
    pub(crate) fn address(&self) -> Address<'_> {
        Address { value: self.value, _held: PhantomData }
    }

    /// The same access, known by what lies `bytes` further on in the buffer.
    pub(super) fn at_byte(self, bytes: usize) -> Self {
        Held { value: self.value + bytes as u64, ..self }
    }
}

/// `held.address()` of an optional buffer.
pub(crate) fn optional<'a>(held: &'a Option<Held<'_>>) -> Option<Address<'a>> {
    held.as_ref().map(Held::address)
}

/// What is being asked for and where: the names in errors, the stream of every access.
#[derive(Clone, Copy)]
pub(crate) struct Scope<'a> {
    pub(crate) operation: &'static str,
    pub(crate) kernels: &'a Kernels,
    pub(crate) stream: &'a Arc<CudaStream>,
}

impl<'a> Scope<'a> {
    /// Checks that kernels and stream belong together, and binds their context to the calling thread.
    pub(crate) fn begin(
        operation: &'static str,
        kernels: &'a Kernels,
        stream: &'a Arc<CudaStream>,
    ) -> Result<Scope<'a>, Error> {
        // Two values of one device have the same handle, but each orders only its own streams.
        if !Arc::ptr_eq(kernels.context(), stream.context()) {
            return Err(Error::DifferentContext { operation, argument: "stream" });
        }
        stream.context().bind_to_thread().map_err(Error::driver(operation))?;
        let scope = Scope { operation, kernels, stream };
        let context = stream.context();
        if context.is_managing_stream_synchronization() {
            if scope.is_capturing()? {
                let missing =
                    "unsafe { context.disable_event_tracking() } before the buffers of the graph were allocated";
                return Err(Error::Capture { operation, missing });
            }
            kernels.keep_order().map_err(Error::driver(operation))?;
        } else if stream.cu_stream() == PER_THREAD && context.is_event_tracking() && !scope.is_capturing()? {
            // One stream a thread, of which cudarc counts none.
            kernels.keep_order().map_err(Error::driver(operation))?;
        }
        Ok(scope)
    }

    /// Whether the stream is being captured into a graph.
    pub(crate) fn is_capturing(&self) -> Result<bool, Error> {
        // SAFETY: the stream is alive.
        let status = unsafe { result::stream::is_capturing(self.stream.cu_stream()) };
        Ok(status.map_err(Error::driver(self.operation))? != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Opens `buffer` for reading its first `needed` elements.
    pub(crate) fn read<'b, T>(
        &self,
        argument: &'static str,
        buffer: In<'b, T>,
        needed: usize,
        alignment: u64,
    ) -> Result<Held<'b>, Error>
    where
        'a: 'b,
    {
        self.check_length(argument, buffer.len(), needed)?;
        let (value, access) = match buffer.0 {
            Source::Tracked(buffer) => {
                self.check_context(argument, buffer.stream())?;
                let (value, access) = buffer.device_ptr(self.stream);
                (value, Some(access))
            }
            Source::Raw { address, .. } => (address, None),
        };
        self.check_alignment(argument, value, alignment)?;
        Ok(Held { value, _access: access })
    }

    /// Opens `buffer` for writing its first `needed` elements.
    pub(crate) fn write<'b, 'c: 'b, T>(
        &self,
        argument: &'static str,
        buffer: Out<'c, T>,
        needed: usize,
        alignment: u64,
    ) -> Result<Held<'b>, Error>
    where
        'a: 'b,
    {
        self.check_length(argument, buffer.len(), needed)?;
        let (value, access) = match buffer.0 {
            Sink::Tracked(buffer) => {
                let buffer = buffer.into_inner();
                self.check_context(argument, buffer.stream())?;
                let (value, access) = buffer.device_ptr_mut(self.stream);
                (value, Some(access))
            }
            Sink::Raw { address, .. } => (address, None),
        };
        self.check_alignment(argument, value, alignment)?;
        Ok(Held { value, _access: access })
    }

    /// [`Scope::read`] of a buffer of any type.
    pub(crate) fn read_any<'b>(
        &self,
        argument: &'static str,
        tensor: Tensor<'b>,
        needed: usize,
        alignment: u64,
    ) -> Result<Held<'b>, Error>
    where
        'a: 'b,
    {
        self.read_tensor(argument, tensor, tensor.dtype(), needed, alignment)
    }

    /// [`Scope::read`] of a weight's buffer, whose type must be `expected`.
    pub(crate) fn read_tensor<'b>(
        &self,
        argument: &'static str,
        tensor: Tensor<'b>,
        expected: crate::rules::Dtype,
        needed: usize,
        alignment: u64,
    ) -> Result<Held<'b>, Error>
    where
        'a: 'b,
    {
        let got = tensor.dtype();
        if got != expected {
            return Err(Error::WrongDtype { operation: self.operation, argument, expected, got });
        }
        match tensor {
            Tensor::Bf16(buffer) => self.read(argument, buffer, needed, alignment),
            Tensor::F16(buffer) => self.read(argument, buffer, needed, alignment),
            Tensor::F32(buffer) => self.read(argument, buffer, needed, alignment),
        }
    }

    /// [`Scope::write`] of a buffer of any type.
    pub(crate) fn write_any<'b, 'c: 'b>(
        &self,
        argument: &'static str,
        tensor: OutTensor<'c>,
        needed: usize,
    ) -> Result<Held<'b>, Error>
    where
        'a: 'b,
    {
        let alignment = u64::from(tensor.dtype().bytes());
        match tensor {
            OutTensor::Bf16(buffer) => self.write(argument, buffer, needed, alignment),
            OutTensor::F16(buffer) => self.write(argument, buffer, needed, alignment),
            OutTensor::F32(buffer) => self.write(argument, buffer, needed, alignment),
        }
    }

    /// [`Scope::read`] of a buffer that may be absent.
    pub(crate) fn read_some<'b, T>(
        &self,
        argument: &'static str,
        buffer: Option<In<'b, T>>,
        needed: usize,
        alignment: u64,
    ) -> Result<Option<Held<'b>>, Error>
    where
        'a: 'b,
    {
        buffer.map(|buffer| self.read(argument, buffer, needed, alignment)).transpose()
    }

    /// [`Scope::write`] of a buffer that may be absent.
    pub(crate) fn write_some<'b, 'c: 'b, T>(
        &self,
        argument: &'static str,
        buffer: Option<Out<'c, T>>,
        needed: usize,
        alignment: u64,
    ) -> Result<Option<Held<'b>>, Error>
    where
        'a: 'b,
    {
        buffer.map(|buffer| self.write(argument, buffer, needed, alignment)).transpose()
    }

    /// [`Scope::read`] of seed and offset on the device, which an operation may be given.
    pub(crate) fn read_noise_state<'b>(&self, state: Option<In<'b, u64>>) -> Result<Option<Held<'b>>, Error>
    where
        'a: 'b,
    {
        self.read_some("noise_state", state, 2, WIDE)
    }

    fn check_length(&self, argument: &'static str, got: usize, needed: usize) -> Result<(), Error> {
        if got < needed {
            return Err(Error::BufferTooShort { operation: self.operation, argument, needed, got });
        }
        Ok(())
    }

    fn check_context(&self, argument: &'static str, stream: &CudaStream) -> Result<(), Error> {
        if !Arc::ptr_eq(stream.context(), self.stream.context()) {
            return Err(Error::DifferentContext { operation: self.operation, argument });
        }
        Ok(())
    }

    fn check_alignment(&self, argument: &'static str, address: u64, needed: u64) -> Result<(), Error> {
        if !address.is_multiple_of(needed) {
            return Err(Error::Misaligned { operation: self.operation, argument, needed, address });
        }
        Ok(())
    }

    /// Checks that `T` is the type that the descriptor names.
    pub(crate) fn check_dtype<T: Element>(
        &self,
        argument: &'static str,
        expected: crate::rules::Dtype,
    ) -> Result<(), Error> {
        if T::DTYPE != expected {
            return Err(Error::WrongDtype { operation: self.operation, argument, expected, got: T::DTYPE });
        }
        Ok(())
    }

    /// Puts one kernel on the stream.
    ///
    /// A cooperative grid is cut to what the driver says is resident at once, here and now (a partition of a GPU, a share of it
    /// under MPS): the kernels that meet at a barrier walk their work by the number of blocks that there are.
    pub(crate) fn launch<P: Params>(&self, selection: &Selection, mut params: P) -> Result<(), Error> {
        let kernel = selection.kernel;
        assert_eq!(kernel.variant().entry(), P::ENTRY, "{kernel} is launched with another entry's parameters");
        let loaded = self.kernels.function(self, kernel)?;
        // SAFETY: the pointers are those of the entry's parameters; the module's documentation says why the kernel touches only what was
        // checked.
        unsafe { self.enqueue(loaded, selection, params.pointers().as_mut()) }
    }

    /// Puts a loaded function on the stream, with the grid and the attributes of `selection`.
    ///
    /// # Safety
    /// `loaded` is of the stream's context, and `pointers` point to the values of its parameters, in order, with which it touches
    /// only memory that is open.
    unsafe fn enqueue(
        &self,
        loaded: &Loaded,
        selection: &Selection,
        pointers: &mut [*mut c_void],
    ) -> Result<(), Error> {
        let mut grid = selection.grid;
        if selection.cooperative {
            grid[0] = grid[0].min(loaded.resident_blocks);
        }
        let launch = Launch {
            function: loaded.function,
            grid,
            threads: loaded.threads,
            shared_bytes: loaded.shared_bytes,
            stream: self.stream.cu_stream(),
        };
        // SAFETY: as the caller says. The driver copies the parameters before it returns.
        unsafe {
            let programmatic = selection.programmatic && self.kernels.launches_dependents();
            if selection.cluster != [1; 3] || programmatic {
                launch.with_attributes(&Selection { programmatic, ..*selection }, pointers)
            } else if selection.cooperative && grid != [1; 3] {
                launch.cooperative(pointers)
            } else {
                launch.plain(pointers)
            }
        }
        .map_err(Error::driver(self.operation))
    }

    /// Copies the first `bytes` of a buffer to another, in stream order.
    pub(crate) fn copy(&self, from: Address<'_>, to: Address<'_>, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller opened both buffers for at least `bytes` bytes, one of them for writing.
        unsafe { result::memcpy_dtod_async(to.value, from.value, bytes, self.stream.cu_stream()) }
            .map_err(Error::driver(self.operation))
    }

    /// Sets the first `len` words of a buffer, in stream order.
    pub(crate) fn fill(&self, address: Address<'_>, word: u32, len: usize) -> Result<(), Error> {
        // SAFETY: the caller opened the buffer for at least `len` words.
        unsafe { sys::cuMemsetD32Async(address.value, word, len, self.stream.cu_stream()) }
            .result()
            .map_err(Error::driver(self.operation))
    }

    /// Sets the first `bytes` of a buffer to zero, in stream order.
    pub(crate) fn zero(&self, address: Address<'_>, bytes: usize) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller opened the buffer for at least `bytes` bytes.
        unsafe { result::memset_d8_async(address.value, 0, bytes, self.stream.cu_stream()) }
            .map_err(Error::driver(self.operation))
    }
}

/// A launch, ready but for its parameters.
struct Launch {
    function: sys::CUfunction,
    grid: [u32; 3],
    threads: u32,
    shared_bytes: u32,
    stream: sys::CUstream,
}

impl Launch {
    /// # Safety
    /// `pointers` point to the values of the function's parameters, in order.
    unsafe fn plain(&self, pointers: &mut [*mut c_void]) -> Result<(), DriverError> {
        let block = (self.threads, 1, 1);
        // SAFETY: as the caller says.
        unsafe {
            result::launch_kernel(self.function, self.grid.into(), block, self.shared_bytes, self.stream, pointers)
        }
    }

    /// # Safety
    /// As for [`Launch::plain`].
    unsafe fn cooperative(&self, pointers: &mut [*mut c_void]) -> Result<(), DriverError> {
        let (grid, block) = (self.grid.into(), (self.threads, 1, 1));
        // SAFETY: as the caller says.
        unsafe {
            result::launch_cooperative_kernel(self.function, grid, block, self.shared_bytes, self.stream, pointers)
        }
    }

    /// # Safety
    /// As for [`Launch::plain`].
    unsafe fn with_attributes(&self, selection: &Selection, pointers: &mut [*mut c_void]) -> Result<(), DriverError> {
        use sys::CUlaunchAttributeID::*;
        let [x, y, z] = selection.cluster;
        let programmatic = i32::from(selection.programmatic);
        let cooperative = i32::from(selection.cooperative);
        let mut attributes: Vec<sys::CUlaunchAttribute> = [
            (x * y * z > 1).then_some((
                CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
                sys::CUlaunchAttributeValue { clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y, z } },
            )),
            selection.programmatic.then_some((
                CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: programmatic },
            )),
            selection
                .cooperative
                .then_some((CU_LAUNCH_ATTRIBUTE_COOPERATIVE, sys::CUlaunchAttributeValue { cooperative })),
        ]
        .into_iter()
        .flatten()
        .map(|(id, value)| sys::CUlaunchAttribute { id, pad: Default::default(), value })
        .collect();
        let config = sys::CUlaunchConfig {
            gridDimX: self.grid[0],
            gridDimY: self.grid[1],
            gridDimZ: self.grid[2],
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared_bytes,
            hStream: self.stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        // SAFETY: as the caller says; the attributes outlive the call.
        unsafe { sys::cuLaunchKernelEx(&config, self.function, pointers.as_mut_ptr(), std::ptr::null_mut()).result() }
    }
}

/// Shared memory of a block that needs no opting in.
const DEFAULT_SHARED_BYTES: u32 = 48 << 10;

/// A kernel in a context.
pub(crate) struct Loaded {
    context: Arc<CudaContext>,
    module: sys::CUmodule,
    function: sys::CUfunction,
    threads: u32,
    shared_bytes: u32,
    /// Blocks that the driver keeps on the device at once, at least 1.
    resident_blocks: u32,
}

// SAFETY: both handles are names for objects of the driver, which is thread-safe.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

impl Loaded {
    /// Loads the machine code made for the device where there is one, else the PTX.
    pub(crate) fn new(
        context: &Arc<CudaContext>,
        entry: &Embedded,
        device: &DeviceInfo,
        kernel: &crate::Kernel,
    ) -> Result<Loaded, Error> {
        let shape = (kernel.threads(), kernel.shared_bytes());
        Loaded::of_module(context, entry.name, device, shape, || load_module(entry, device))
    }

    /// The function `name` of the module that `load` loads, for blocks of so many threads and bytes of dynamic shared memory.
    fn of_module(
        context: &Arc<CudaContext>,
        name: &str,
        device: &DeviceInfo,
        (threads, shared_bytes): (u32, u32),
        load: impl FnOnce() -> Result<sys::CUmodule, DriverError>,
    ) -> Result<Loaded, Error> {
        let failed = |source| Error::ModuleLoad { kernel: name.into(), source };
        context.bind_to_thread().map_err(failed)?;
        let module = load().map_err(failed)?;
        // From here on `drop` unloads the module on any error.
        let function = std::ptr::null_mut();
        let mut loaded =
            Loaded { context: context.clone(), module, function, threads, shared_bytes, resident_blocks: 1 };
        let name = CString::new(name).expect("kernel names hold no zero byte");
        // SAFETY: the module was loaded just now into the current context.
        loaded.function = unsafe { result::module::get_function(module, name) }.map_err(failed)?;
        if shared_bytes > DEFAULT_SHARED_BYTES {
            // SAFETY: the function is alive; the value is checked by the driver.
            unsafe {
                result::function::set_function_attribute(
                    loaded.function,
                    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    shared_bytes as i32,
                )
            }
            .map_err(failed)?;
        }
        let mut per_multiprocessor = 0;
        // SAFETY: the function is alive, and the number is written.
        unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &mut per_multiprocessor,
                loaded.function,
                threads as i32,
                shared_bytes as usize,
            )
        }
        .result()
        .map_err(failed)?;
        loaded.resident_blocks = (per_multiprocessor as u32).saturating_mul(device.multiprocessors).max(1);
        Ok(loaded)
    }
}

#[cfg(test)]
impl Loaded {
    pub(crate) fn with_resident_limit(mut self, blocks: u32) -> Loaded {
        self.resident_blocks = self.resident_blocks.min(blocks);
        self
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        self.context.record_err(self.context.bind_to_thread());
        // Launches may be under way.
        self.context.record_err(self.context.synchronize());
        // SAFETY: loaded once by `new`, and not used after this.
        self.context.record_err(unsafe { result::module::unload(self.module) });
    }
}

/// The machine code made for the device where there is one; a driver that cannot take it (an emulated device, say) gets the PTX.
fn load_module(entry: &Embedded, device: &DeviceInfo) -> Result<sys::CUmodule, DriverError> {
    if let Some(image) = entry.image_for(device.compute_capability) {
        // SAFETY: a whole ELF image; its length is in its headers.
        match unsafe { result::module::load_data(image.cubin().as_ptr().cast()) } {
            Err(DriverError(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU | CUresult::CUDA_ERROR_INVALID_IMAGE)) => {}
            other => return other,
        }
    }
    let text = CString::new(entry.ptx_for(device.compute_capability))
        .map_err(|_| DriverError(CUresult::CUDA_ERROR_INVALID_PTX))?;
    // SAFETY: PTX text that ends in a zero byte.
    unsafe { result::module::load_data(text.as_ptr().cast()) }
}

mod tensor_map;
pub(crate) use tensor_map::Boxes;

#[cfg(test)]
mod fewer_blocks;
#[cfg(test)]
mod tests;
