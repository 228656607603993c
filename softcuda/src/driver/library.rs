//! Modules that are loaded without a context: `cuLibrary*` and `cuKernel*`.
//!
//! A library becomes a module in each context in which something of it is first used.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::{Arc, Mutex};

use super::context::{CONTEXTS, Context, current};
use super::function::{self, FUNCTIONS, Function};
use super::handles::{Handle, Table, fresh};
use super::init::check_device;
use super::module::{self, Options, function_of, give_range, global_of, text_of, text_of_file};
use super::status::{CUresult, Outcome};
use super::{api, driver, lock, out};
use crate::ptx;

pub(super) struct Library {
    text: String,
    /// CU_JIT_MAX_REGISTERS.
    max_registers: Option<u32>,
    /// Handles of kernels by name.
    kernels: BTreeMap<String, Handle>,
    /// Modules by context.
    modules: Mutex<HashMap<Handle, Handle>>,
}

/// A kernel of a library, in any context.
pub(super) struct Kernel {
    library: Handle,
    name: CString,
    /// What was set for each device, by attribute.
    attributes: Mutex<BTreeMap<(u32, u32), i32>>,
}

static LIBRARIES: Table<Library> = Table::new("library", CUresult::ERROR_INVALID_HANDLE);
static KERNELS: Table<Kernel> = Table::new("kernel of a library", CUresult::ERROR_INVALID_HANDLE);

impl Library {
    /// The library's module in a context.
    fn module(&self, context: &Context) -> Outcome<Handle> {
        let mut modules = lock(&self.modules);
        if let Some(&known) = modules.get(&context.handle) {
            return Ok(known);
        }
        let new = module::load(&self.text, context, self.max_registers)?;
        modules.insert(context.handle, new);
        Ok(new)
    }
}

impl Kernel {
    fn name(&self) -> String {
        self.name.to_string_lossy().into_owned()
    }

    fn function(&self, context: &Context) -> Outcome<Handle> {
        let module = LIBRARIES.get(self.library)?.module(context)?;
        let handle = function_of(module, &self.name())?;
        let function = FUNCTIONS.get(handle)?;
        for (&(device, attribute), &value) in lock(&self.attributes).iter() {
            if device == context.device {
                function::set_attribute(&function, attribute, value)?;
            }
        }
        Ok(handle)
    }
}

/// The function of a handle, which may name a kernel of a library: then its function in `context`.
pub(super) fn resolve(handle: Handle, context: impl FnOnce() -> Outcome<Arc<Context>>) -> Outcome<Arc<Function>> {
    match KERNELS.get(handle) {
        Ok(kernel) => FUNCTIONS.get(kernel.function(&*context()?)?),
        Err(_) => FUNCTIONS.get(handle),
    }
}

fn load(to: *mut Handle, text: impl FnOnce() -> Outcome<String>, options: &Options) -> Outcome {
    driver()?;
    let load = || {
        let text = text()?;
        let ast = ptx::parse(&text).map_err(|error| CUresult::ERROR_INVALID_PTX.with(error.to_string()))?;
        let library = fresh();
        let entries = ast.functions.iter().filter(|function| function.is_entry && function.body.is_some());
        let kernels = entries.map(|entry| {
            let name = CString::new(entry.name.clone()).unwrap_or_default();
            (entry.name.clone(), KERNELS.add(Kernel { library, name, attributes: Mutex::default() }))
        });
        let max_registers = options.max_registers;
        let made = Library { text, max_registers, kernels: kernels.collect(), modules: Mutex::default() };
        // Where there is a context, what is wrong shows now.
        if let Ok(context) = current()
            && let Err(failure) = made.module(&context)
        {
            made.kernels.values().for_each(|kernel| drop(KERNELS.remove(*kernel)));
            return Err(failure);
        }
        LIBRARIES.insert(library, Arc::new(made));
        Ok(library)
    };
    // SAFETY: the caller's buffers are there while its call runs.
    unsafe { out(to, "library", options.logged(load)?) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLibraryLoadData(
    to: *mut Handle,
    image: *const u8,
    keys: *const u32,
    values: *mut *mut c_void,
    count: u32,
    _library_keys: *const u32,
    _library_values: *mut *mut c_void,
    _library_count: u32,
) -> CUresult {
    api("cuLibraryLoadData", || unsafe { load(to, || text_of(image), &Options::new(count, keys, values)?) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLibraryLoadFromFile(
    to: *mut Handle,
    path: *const c_char,
    keys: *const u32,
    values: *mut *mut c_void,
    count: u32,
    _library_keys: *const u32,
    _library_values: *mut *mut c_void,
    _library_count: u32,
) -> CUresult {
    api("cuLibraryLoadFromFile", || unsafe { load(to, || text_of_file(path), &Options::new(count, keys, values)?) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLibraryUnload(handle: Handle) -> CUresult {
    api("cuLibraryUnload", || {
        driver()?;
        let library = LIBRARIES.remove(handle)?;
        for kernel in library.kernels.values() {
            let _ = KERNELS.remove(*kernel);
        }
        let mut state = Ok(());
        for (context, module) in lock(&library.modules).drain() {
            // A context that is gone has taken the module with it.
            if let Ok(context) = CONTEXTS.get(context) {
                state = state.and(context.drain());
                module::unload(module)?;
            }
        }
        state
    })
}

/// # Safety
/// Null or NUL-terminated.
unsafe fn name_of(name: *const c_char) -> Outcome<String> {
    if name.is_null() {
        return Err(CUresult::ERROR_INVALID_VALUE.with("`name` is null"));
    }
    Ok(unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLibraryGetKernel(to: *mut Handle, library: Handle, name: *const c_char) -> CUresult {
    api("cuLibraryGetKernel", || {
        driver()?;
        let name = unsafe { name_of(name)? };
        let found = LIBRARIES.get(library)?.kernels.get(&name).copied();
        let found = found.ok_or_else(|| CUresult::ERROR_NOT_FOUND.with(format!("no kernel `{name}`")))?;
        unsafe { out(to, "pKernel", found) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLibraryGetKernelCount(count: *mut u32, library: Handle) -> CUresult {
    api("cuLibraryGetKernelCount", || {
        driver()?;
        unsafe { out(count, "count", LIBRARIES.get(library)?.kernels.len() as u32) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLibraryEnumerateKernels(to: *mut Handle, count: u32, library: Handle) -> CUresult {
    api("cuLibraryEnumerateKernels", || {
        driver()?;
        for (place, kernel) in LIBRARIES.get(library)?.kernels.values().take(count as usize).enumerate() {
            // SAFETY: `count` places, by the API's contract.
            unsafe { out(to.wrapping_add(place), "kernels", *kernel)? };
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLibraryGetModule(to: *mut Handle, library: Handle) -> CUresult {
    api("cuLibraryGetModule", || {
        let context = current()?;
        unsafe { out(to, "pMod", LIBRARIES.get(library)?.module(&context)?) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLibraryGetGlobal(
    addr: *mut u64,
    bytes: *mut usize,
    library: Handle,
    name: *const c_char,
) -> CUresult {
    api("cuLibraryGetGlobal", || {
        let context = current()?;
        let module = LIBRARIES.get(library)?.module(&context)?;
        unsafe { give_range(addr, bytes, global_of(module, &name_of(name)?)?) }
    })
}

/// Host and device share their memory here, so that a managed variable is a variable like any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLibraryGetManaged(
    addr: *mut u64,
    bytes: *mut usize,
    library: Handle,
    name: *const c_char,
) -> CUresult {
    api("cuLibraryGetManaged", || {
        let context = current()?;
        let module = LIBRARIES.get(library)?.module(&context)?;
        unsafe { give_range(addr, bytes, global_of(module, &name_of(name)?)?) }
    })
}

fn kernel(handle: Handle) -> Outcome<Arc<Kernel>> {
    driver()?;
    KERNELS.get(handle)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuKernelGetFunction(to: *mut Handle, handle: Handle) -> CUresult {
    api("cuKernelGetFunction", || {
        let context = current()?;
        unsafe { out(to, "pFunc", kernel(handle)?.function(&context)?) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuKernelGetLibrary(to: *mut Handle, handle: Handle) -> CUresult {
    api("cuKernelGetLibrary", || unsafe { out(to, "pLib", kernel(handle)?.library) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuKernelGetName(to: *mut *const c_char, handle: Handle) -> CUresult {
    // The text lives as long as the library: the table holds the kernel until then.
    api("cuKernelGetName", || unsafe { out(to, "name", kernel(handle)?.name.as_ptr()) })
}

/// A context on a device: the current one where it is, else any that the device has.
fn context_on(device: i32) -> Outcome<Arc<Context>> {
    let device = check_device(device)?;
    match current() {
        Ok(context) if context.device == device => Ok(context),
        _ => CONTEXTS
            .select(|context| context.device == device && context.check().is_ok())
            .into_iter()
            .next()
            .ok_or_else(|| CUresult::ERROR_INVALID_CONTEXT.with(format!("device {device} has no context"))),
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuKernelGetAttribute(to: *mut i32, attribute: u32, handle: Handle, device: i32) -> CUresult {
    api("cuKernelGetAttribute", || {
        let function = kernel(handle)?.function(&*context_on(device)?)?;
        unsafe { out(to, "pi", function::attribute(&*FUNCTIONS.get(function)?, attribute)?) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuKernelSetAttribute(attribute: u32, value: i32, handle: Handle, device: i32) -> CUresult {
    api("cuKernelSetAttribute", || {
        let kernel = kernel(handle)?;
        let context = context_on(device)?;
        function::set_attribute(&*FUNCTIONS.get(kernel.function(&context)?)?, attribute, value)?;
        // For contexts that come to use it.
        lock(&kernel.attributes).insert((context.device, attribute), value);
        Ok(())
    })
}

/// A preference without effect: caches have no configuration.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuKernelSetCacheConfig(handle: Handle, config: u32, device: i32) -> CUresult {
    api("cuKernelSetCacheConfig", || {
        kernel(handle)?;
        check_device(device)?;
        if config > 3 { Err(CUresult::ERROR_INVALID_VALUE.into()) } else { Ok(()) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuKernelGetParamInfo(
    handle: Handle,
    index: usize,
    offset: *mut usize,
    size: *mut usize,
) -> CUresult {
    api("cuKernelGetParamInfo", || {
        let kernel = kernel(handle)?;
        let context = current()?;
        let function = FUNCTIONS.get(kernel.function(&context)?)?;
        unsafe { function::give_param(&function, index, offset, size) }
    })
}
