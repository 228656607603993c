//! The driver boundary: everything `unsafe` in the crate.
//!
//! Soundness rests on three points. An [`Address`] is only made here, from a buffer whose context, alignment and length
//! were checked against the extent that the operation's descriptor implies ([`read`], [`write`]). The scalars of a launch
//! come from that same descriptor. And a kernel's parameter list is that of its PTX entry, which a test compares with
//! what each operation packs. Row numbers that a kernel reads from device memory (`tiles`, `slot_token`, `token_slot`)
//! cannot be checked from the host: they must be what dispatch wrote.

use std::ffi::{CString, c_void};
use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{
    CudaContext, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, DriverError, SyncOnDrop, ValidAsZeroBits, result,
};

use crate::runtime::embedded::Embedded;
use crate::{DeviceInfo, Element, Error, Kernels, Selection};

/// A buffer that an operation reads: `&CudaSlice<T>`, `&CudaView<T>`, or anything else with cudarc's [`DevicePtr`].
pub type In<'a, T> = &'a (dyn DevicePtr<T> + 'a);

/// A buffer that an operation writes: `&mut CudaSlice<T>`, `&mut CudaViewMut<T>`, or anything else with cudarc's
/// [`DevicePtrMut`].
pub type Out<'a, T> = &'a mut (dyn DevicePtrMut<T> + 'a);

/// Alignment of matrices and bias vectors in bytes: kernels move 16 bytes at a time.
pub(crate) const VECTOR: u64 = 16;
/// Alignment of lists of `i32` and `f32` that are read one by one.
pub(crate) const SCALAR: u64 = 4;

/// A checked device address, alive as long as the access it was made for.
#[derive(Clone, Copy)]
pub(crate) struct Address<'a> {
    value: sys::CUdeviceptr,
    _held: PhantomData<&'a ()>,
}

impl<'a> Address<'a> {
    /// No address: for tests of what is packed.
    #[cfg(test)]
    pub(crate) const NULL: Address<'static> = Address { value: 0, _held: PhantomData };

    /// The address `bytes` further on, within the same buffer.
    pub(crate) fn offset(self, bytes: usize) -> Address<'a> {
        Address { value: self.value + bytes as u64, _held: PhantomData }
    }
}

/// An access to a buffer on a stream: earlier work on other streams is waited for before, and later work of other
/// streams waits for this one once the value is dropped.
pub(crate) struct Held<'a> {
    value: sys::CUdeviceptr,
    _access: SyncOnDrop<'a>,
}

impl Held<'_> {
    pub(crate) fn address(&self) -> Address<'_> {
        Address { value: self.value, _held: PhantomData }
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
        if kernels.context() != stream.context() {
            return Err(Error::DifferentContext { operation, argument: "stream" });
        }
        stream.context().bind_to_thread().map_err(Error::driver(operation))?;
        Ok(Scope { operation, kernels, stream })
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
        self.check_context(argument, buffer.stream())?;
        let (value, access) = buffer.device_ptr(self.stream);
        self.check_alignment(argument, value, alignment)?;
        Ok(Held { value, _access: access })
    }

    /// Opens `buffer` for writing its first `needed` elements.
    pub(crate) fn write<'b, 'c: 'b, T>(
        &self,
        argument: &'static str,
        buffer: &'b mut (dyn DevicePtrMut<T> + 'c),
        needed: usize,
        alignment: u64,
    ) -> Result<Held<'b>, Error>
    where
        'a: 'b,
    {
        self.check_length(argument, buffer.len(), needed)?;
        self.check_context(argument, buffer.stream())?;
        let (value, access) = buffer.device_ptr_mut(self.stream);
        self.check_alignment(argument, value, alignment)?;
        Ok(Held { value, _access: access })
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
        buffer: Option<&'b mut (dyn DevicePtrMut<T> + 'c)>,
        needed: usize,
        alignment: u64,
    ) -> Result<Option<Held<'b>>, Error>
    where
        'a: 'b,
    {
        buffer.map(|buffer| self.write(argument, buffer, needed, alignment)).transpose()
    }

    fn check_length(&self, argument: &'static str, got: usize, needed: usize) -> Result<(), Error> {
        if got < needed {
            return Err(Error::BufferTooShort { operation: self.operation, argument, needed, got });
        }
        Ok(())
    }

    fn check_context(&self, argument: &'static str, stream: &CudaStream) -> Result<(), Error> {
        if stream.context() != self.stream.context() {
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
    pub(crate) fn launch<const N: usize>(&self, selection: &Selection, params: [Param; N]) -> Result<(), Error> {
        let loaded = self.kernels.function(selection.kernel)?;
        let mut values = params.map(Param::bits);
        let mut pointers: [*mut c_void; N] = std::array::from_fn(|i| (&raw mut values[i]).cast());
        let [x, y, z] = selection.grid;
        let block = (selection.kernel.threads(), 1, 1);
        let shared_bytes = selection.kernel.shared_bytes();
        let stream = self.stream.cu_stream();
        // SAFETY: the function belongs to the stream's context (`begin`) and stays loaded as long as `self.kernels`; the
        // driver copies the parameters out of `values` before it returns; the module's documentation says why the
        // kernel touches only what was checked.
        unsafe {
            if selection.cooperative {
                result::launch_cooperative_kernel(
                    loaded.function,
                    (x, y, z),
                    block,
                    shared_bytes,
                    stream,
                    &mut pointers,
                )
            } else {
                result::launch_kernel(loaded.function, (x, y, z), block, shared_bytes, stream, &mut pointers)
            }
        }
        .map_err(Error::driver(self.operation))
    }

    /// Sets the first `bytes` of a buffer to zero, in stream order.
    pub(crate) fn zero(&self, address: Address<'_>, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller opened the buffer for at least `bytes` bytes.
        unsafe { result::memset_d8_async(address.value, 0, bytes, self.stream.cu_stream()) }
            .map_err(Error::driver(self.operation))
    }
}

// SAFETY: twelve words of plain data, of which every pattern of bits, all zeros included, is a value.
unsafe impl DeviceRepr for crate::routers::balance::RouterStats {}
// SAFETY: as above.
unsafe impl ValidAsZeroBits for crate::routers::balance::RouterStats {}

/// One kernel parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Param {
    /// A device address, `.u64`; 0 stands for an absent buffer.
    Address(u64),
    /// `.u32`.
    U32(u32),
    /// `.f32`.
    F32(f32),
}

impl Param {
    /// The value in the low bytes, where the driver reads as many as the parameter has (every CUDA host is little-endian).
    fn bits(self) -> u64 {
        match self {
            Param::Address(value) => value,
            Param::U32(value) => value.into(),
            Param::F32(value) => value.to_bits().into(),
        }
    }
}

impl From<Address<'_>> for Param {
    fn from(address: Address<'_>) -> Param {
        Param::Address(address.value)
    }
}

impl From<Option<Address<'_>>> for Param {
    fn from(address: Option<Address<'_>>) -> Param {
        Param::Address(address.map_or(0, |address| address.value))
    }
}

impl From<u32> for Param {
    fn from(value: u32) -> Param {
        Param::U32(value)
    }
}

impl From<f32> for Param {
    fn from(value: f32) -> Param {
        Param::F32(value)
    }
}

/// Shared memory of a block that needs no opting in.
const DEFAULT_SHARED_BYTES: u32 = 48 << 10;

/// A kernel in a context.
pub(crate) struct Loaded {
    context: Arc<CudaContext>,
    module: sys::CUmodule,
    function: sys::CUfunction,
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
        shared_bytes: u32,
    ) -> Result<Loaded, Error> {
        let failed = |source| Error::ModuleLoad { kernel: entry.name.into(), source };
        context.bind_to_thread().map_err(failed)?;
        let module = load_module(entry, device).map_err(failed)?;
        // From here on `drop` unloads the module on any error.
        let mut loaded = Loaded { context: context.clone(), module, function: std::ptr::null_mut() };
        let name = CString::new(entry.name).expect("kernel names hold no zero byte");
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
        Ok(loaded)
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

/// Machine code of the device's major version and at most its minor version runs on it; a driver that cannot take it
/// (an emulated device, say) gets the PTX.
fn load_module(entry: &Embedded, device: &DeviceInfo) -> Result<sys::CUmodule, DriverError> {
    let (major, minor) = device.compute_capability;
    let image = entry
        .images
        .iter()
        .filter_map(|image| Some((image.compute_capability()?, image)))
        .filter(|((of_major, of_minor), _)| *of_major == major && *of_minor <= minor)
        .max_by_key(|(capability, _)| *capability);
    if let Some((_, image)) = image {
        // SAFETY: a whole ELF image; its length is in its headers.
        match unsafe { result::module::load_data(image.cubin.as_ptr().cast()) } {
            Err(DriverError(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU | CUresult::CUDA_ERROR_INVALID_IMAGE)) => {}
            other => return other,
        }
    }
    let text = CString::new(entry.ptx).map_err(|_| DriverError(CUresult::CUDA_ERROR_INVALID_PTX))?;
    // SAFETY: PTX text that ends in a zero byte.
    unsafe { result::module::load_data(text.as_ptr().cast()) }
}

/// Number of devices; an error where cudarc's own calls would panic for want of a driver library.
pub(crate) fn device_count() -> Result<usize, Error> {
    // SAFETY: opens the driver library, as any call of cudarc would.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::NoCuda);
    }
    match result::init() {
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => return Ok(0),
        other => other.map_err(Error::driver("starting the driver"))?,
    }
    let count = result::device::get_count().map_err(Error::driver("counting devices"))?;
    Ok(usize::try_from(count).unwrap_or(0))
}
