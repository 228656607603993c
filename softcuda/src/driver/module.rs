//! Modules: `cuModule*`. PTX text is parsed and lowered at once; machine code is not executed.

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_void};
use std::sync::{Arc, Mutex};

use super::context::{CONTEXTS, Context, check_caller, current};
use super::function::{FUNCTIONS, Function};
use super::handles::{Children, Handle, Owned, fresh};
use super::memory::{allocate, release};
use super::status::{CUresult, Outcome};
use super::{api, capture, driver, globals, lock, out};
use crate::lower::{Environment, Program, lower_module};
use crate::memory::Kind;
use crate::ptx;
use crate::ptx::ast::{Module as Ast, Space, Variable};

pub(super) struct Module {
    pub context: Handle,
    program: Program,
    /// `.reqnctapercluster` by kernel.
    clusters: HashMap<String, [u32; 3]>,
    /// Bytes of all `.const` variables.
    pub const_bytes: u64,
    /// Registers a thread may have where a kernel does not say so itself: CU_JIT_MAX_REGISTERS.
    pub max_registers: Option<u32>,
    /// Address and size of each variable.
    globals: HashMap<String, (u64, u64)>,
    /// Handles given out, by kernel.
    functions: Mutex<HashMap<String, Handle>>,
}

pub(super) static MODULES: Children<Module> = Children::new("module", CUresult::ERROR_INVALID_HANDLE);

impl Owned for Module {
    fn owner(&self) -> Handle {
        self.context
    }
}

/// The newest PTX that the parser follows.
const PTX_VERSION: (u32, u32) = (9, 5);

/// Whether a device of this capability runs code for `target`, as PTX ISA 11.1.2 has it: plain targets run on all later
/// devices, `f` ones on later ones of the same family, `a` ones only on their own.
fn check_target(target: &str, (major, minor): (u32, u32)) -> Outcome {
    let invalid = |why: String| CUresult::ERROR_INVALID_PTX.with(why);
    let digits = target.strip_prefix("sm_").unwrap_or("");
    let (digits, suffix) = match digits.char_indices().find(|(_, c)| !c.is_ascii_digit()) {
        Some((at, _)) => digits.split_at(at),
        None => (digits, ""),
    };
    let number: u32 = digits.parse().map_err(|_| invalid(format!("`{target}` is not a target")))?;
    let wanted = (number / 10, number % 10);
    let runs = match suffix {
        "" => wanted <= (major, minor),
        "f" => wanted.0 == major && wanted.1 <= minor,
        "a" => wanted == (major, minor),
        _ => return Err(invalid(format!("`{target}` is not a target"))),
    };
    if runs {
        Ok(())
    } else {
        Err(invalid(format!("target {target} does not run on a device of compute capability {major}.{minor}")))
    }
}

/// Memory of a module that is being made: given back if that fails.
pub(super) struct Placed<'a> {
    pub context: &'a Context,
    pub addresses: Vec<u64>,
}

impl Drop for Placed<'_> {
    fn drop(&mut self) {
        for addr in self.addresses.drain(..) {
            let _ = release(addr, &[Kind::Module]);
        }
    }
}

impl Placed<'_> {
    pub fn add(&mut self, bytes: usize) -> Outcome<u64> {
        let addr = allocate(self.context, bytes, Kind::Module)?;
        self.addresses.push(addr);
        Ok(addr)
    }
}

fn clusters(ast: &Ast) -> HashMap<String, [u32; 3]> {
    let found = ast.functions.iter().filter_map(|function| {
        let (_, extents) = function.directives.iter().find(|(word, _)| word == "reqnctapercluster")?;
        let extent = |axis: usize| extents.get(axis).map_or(1, |&extent| extent as u32);
        Some((function.name.clone(), [extent(0), extent(1), extent(2)]))
    });
    found.collect()
}

fn compile(text: &str, context: &Context, max_registers: Option<u32>) -> Outcome<Module> {
    let max_registers = max_registers.or_else(|| super::link::max_registers(text));
    let capability = context.description()?.compute_capability;
    let invalid = |why: String| CUresult::ERROR_INVALID_PTX.with(why);
    let text = super::patch::apply(text)?;
    let ast = ptx::parse(&text).map_err(|error| invalid(error.to_string()))?;
    if ast.version > PTX_VERSION {
        let ((a, b), (c, d)) = (ast.version, PTX_VERSION);
        return Err(CUresult::ERROR_UNSUPPORTED_PTX_VERSION
            .with(format!("the module is PTX {a}.{b}; the newest supported is {c}.{d}")));
    }
    check_target(&ast.target, capability)?;
    let mut placed = Placed { context, addresses: Vec::new() };
    let globals = globals::place(&ast, &mut placed)?;
    let symbols = globals.iter().map(|(name, (addr, _))| (name.clone(), *addr)).collect();
    let environment = Environment { symbols, compute_capability: capability };
    let program = lower_module(&ast, &environment).map_err(|error| invalid(error.to_string()))?;
    // From here on the context's list of allocations alone keeps them.
    placed.addresses.clear();
    let clusters = clusters(&ast);
    let constants = ast.variables.iter().filter(|variable| variable.space == Space::Const);
    let place = |end: u64, variable: &Variable| {
        end.next_multiple_of(variable.alignment().max(1)) + variable.bytes().unwrap_or_default()
    };
    let const_bytes = constants.fold(0, place);
    let (context, functions) = (context.handle, Mutex::default());
    Ok(Module { context, program, clusters, const_bytes, max_registers, globals, functions })
}

/// Whether an image of at least four bytes begins as machine code does.
fn check_magic(magic: [u8; 4]) -> Outcome {
    let fat_binaries = [0xba55_ed50_u32, 0x4662_43b1];
    if &magic == b"\x7fELF" || fat_binaries.contains(&u32::from_le_bytes(magic)) {
        return Err(CUresult::ERROR_NO_BINARY_FOR_GPU.with("the image is machine code; softcuda executes PTX text"));
    }
    Ok(())
}

/// The text of an image, which is PTX or nothing this device can run.
pub(super) unsafe fn text_of(image: *const u8) -> Outcome<String> {
    if image.is_null() {
        return Err(CUresult::ERROR_INVALID_VALUE.with("`image` is null"));
    }
    // SAFETY: every kind of image has at least four bytes, the shortest text its NUL before them.
    let mut magic = [0; 4];
    for (place, byte) in magic.iter_mut().enumerate() {
        *byte = unsafe { *image.add(place) };
        if *byte == 0 {
            break;
        }
    }
    check_magic(magic)?;
    // SAFETY: not machine code, so by the API's contract a NUL-terminated text.
    let text = unsafe { CStr::from_ptr(image.cast()) };
    Ok(text.to_string_lossy().into_owned())
}

/// [`text_of`] an image whose length is known, with or without a NUL at its end.
pub(super) fn text_of_bytes(image: &[u8]) -> Outcome<String> {
    let mut magic = [0; 4];
    magic.iter_mut().zip(image).for_each(|(place, byte)| *place = *byte);
    check_magic(magic)?;
    let text = image.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(text).into_owned())
}

/// The text of an image in a file.
pub(super) unsafe fn text_of_file(path: *const c_char) -> Outcome<String> {
    if path.is_null() {
        return Err(CUresult::ERROR_INVALID_VALUE.with("the path is null"));
    }
    // SAFETY: a NUL-terminated path, by the API's contract.
    let path = unsafe { CStr::from_ptr(path) }.to_string_lossy();
    let image = std::fs::read(&*path);
    text_of_bytes(&image.map_err(|error| CUresult::ERROR_FILE_NOT_FOUND.with(format!("{path}: {error}")))?)
}

/// Makes a module of a text in a context; `max_registers` as the options of its compilation say.
pub(super) fn load(text: &str, context: &Context, max_registers: Option<u32>) -> Outcome<Handle> {
    capture::forbid_unsafe("cuModuleLoadData")?;
    let module = compile(text, context, max_registers).inspect_err(|failure| {
        if let Some(detail) = &failure.detail {
            super::say(format_args!("module not loaded: {detail}"));
        }
    })?;
    Ok(MODULES.add(module))
}

/// Options of a just-in-time compilation that are not left to the optimiser, which is not here.
pub(super) struct Options {
    /// CU_JIT_MAX_REGISTERS.
    pub max_registers: Option<u32>,
    /// CU_JIT_ERROR_LOG_BUFFER, and the value that holds its size: the room before, the length after.
    error: Option<(usize, usize)>,
    /// CU_JIT_INFO_LOG_BUFFER likewise.
    info: Option<(usize, usize)>,
}

impl Options {
    /// # Safety
    /// `keys` and `values` have `count` elements, as the API's contract has it.
    pub unsafe fn new(count: u32, keys: *const u32, values: *mut *mut c_void) -> Outcome<Options> {
        if count == 0 {
            return Ok(Options { max_registers: None, error: None, info: None });
        }
        if keys.is_null() || values.is_null() {
            return Err(CUresult::ERROR_INVALID_VALUE.with("options are counted but not given"));
        }
        // SAFETY: by the contract above.
        let keys = unsafe { std::slice::from_raw_parts(keys, count as usize) };
        let log = |buffer_key, size_key| {
            let find = |key| keys.iter().position(|&found| found == key);
            let (buffer, size) = (find(buffer_key)?, find(size_key)?);
            // SAFETY: as many values as keys.
            Some(unsafe { (*values.add(buffer) as usize, values.add(size) as usize) })
        };
        // SAFETY: as above. Values of numbers are these themselves in place of pointers.
        let number = |key| keys.iter().position(|&found| found == key).map(|at| unsafe { *values.add(at) } as usize);
        let max_registers = number(0).and_then(|value| u32::try_from(value).ok()).filter(|&value| value > 0);
        Ok(Options { max_registers, info: log(3, 4), error: log(5, 6) })
    }

    /// Writes the log of a failure, empty for none, and the lengths of both logs.
    ///
    /// # Safety
    /// The caller's buffers are still there.
    pub unsafe fn log(&self, text: &str) {
        for (log, text) in [(self.info, ""), (self.error, text)] {
            let Some((buffer, size)) = log else { continue };
            let (to, size) = (buffer as *mut u8, size as *mut usize);
            // SAFETY: the buffer has the size that its own option gives.
            unsafe {
                let room = size.read_unaligned();
                if to.is_null() || room == 0 {
                    continue;
                }
                let len = text.len().min(room - 1);
                std::ptr::copy_nonoverlapping(text.as_ptr(), to, len);
                to.add(len).write(0);
                size.write_unaligned(len);
            }
        }
    }

    /// Runs a compilation and writes its log.
    ///
    /// # Safety
    /// As for [`Options::log`].
    pub unsafe fn logged<T>(&self, compile: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
        let outcome = compile();
        let text = outcome.as_ref().err().and_then(|failure| failure.detail.as_deref()).unwrap_or("");
        unsafe { self.log(text) };
        outcome
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(to: *mut Handle, image: *const u8) -> CUresult {
    api("cuModuleLoadData", || unsafe {
        let context = current()?;
        out(to, "module", load(&text_of(image)?, &context, None)?)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadFatBinary(to: *mut Handle, image: *const u8) -> CUresult {
    api("cuModuleLoadFatBinary", || unsafe {
        let context = current()?;
        out(to, "module", load(&text_of(image)?, &context, None)?)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadDataEx(
    to: *mut Handle,
    image: *const u8,
    count: u32,
    keys: *const u32,
    values: *mut *mut c_void,
) -> CUresult {
    api("cuModuleLoadDataEx", || unsafe {
        let context = current()?;
        let options = Options::new(count, keys, values)?;
        out(to, "module", options.logged(|| load(&text_of(image)?, &context, options.max_registers))?)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoad(to: *mut Handle, path: *const c_char) -> CUresult {
    api("cuModuleLoad", || unsafe {
        let context = current()?;
        out(to, "module", load(&text_of_file(path)?, &context, None)?)
    })
}

/// Drops a module and gives back its memory.
pub(super) fn unload(handle: Handle) -> Outcome {
    let module = MODULES.remove(handle)?;
    for (_, function) in lock(&module.functions).drain() {
        let _ = FUNCTIONS.remove(function);
    }
    for (addr, _) in module.globals.values() {
        let _ = release(*addr, &[Kind::Module]);
    }
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleUnload(handle: Handle) -> CUresult {
    api("cuModuleUnload", || {
        check_caller()?;
        capture::forbid_unsafe("cuModuleUnload")?;
        let state = CONTEXTS.get(MODULES.get(handle)?.context)?.drain();
        unload(handle)?;
        state
    })
}

/// The module of a handle, and a name given with it.
unsafe fn module_and_name(handle: Handle, name: *const c_char) -> Outcome<(Arc<Module>, String)> {
    driver()?;
    let module = MODULES.get(handle)?;
    CONTEXTS.get(module.context)?.check()?;
    if name.is_null() {
        return Err(CUresult::ERROR_INVALID_VALUE.with("`name` is null"));
    }
    // SAFETY: a NUL-terminated name, by the API's contract.
    Ok((module, unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(to: *mut Handle, handle: Handle, name: *const c_char) -> CUresult {
    api("cuModuleGetFunction", || {
        let (_, name) = unsafe { module_and_name(handle, name)? };
        unsafe { out(to, "hfunc", function_of(handle, &name)?) }
    })
}

/// The function of a kernel of a module.
pub(super) fn function_of(handle: Handle, name: &str) -> Outcome<Handle> {
    let module = MODULES.get(handle)?;
    let mut functions = lock(&module.functions);
    if let Some(&known) = functions.get(name) {
        return Ok(known);
    }
    let kernel = module.program.kernel(name).cloned();
    let kernel = kernel.ok_or_else(|| CUresult::ERROR_NOT_FOUND.with(format!("no kernel `{name}`")))?;
    let function = Function::new(&module, handle, kernel, module.clusters.get(name).copied())?;
    let new = fresh();
    FUNCTIONS.insert(new, Arc::new(function));
    functions.insert(name.to_owned(), new);
    Ok(new)
}

/// Address and size of a variable of a module.
pub(super) fn global_of(handle: Handle, name: &str) -> Outcome<(u64, u64)> {
    let found = MODULES.get(handle)?.globals.get(name).copied();
    found.ok_or_else(|| CUresult::ERROR_NOT_FOUND.with(format!("no variable `{name}`")))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleEnumerateFunctions(to: *mut Handle, count: u32, handle: Handle) -> CUresult {
    api("cuModuleEnumerateFunctions", || {
        driver()?;
        let names: Vec<String> =
            MODULES.get(handle)?.program.kernels.iter().map(|kernel| kernel.name.clone()).collect();
        for (place, name) in names.iter().take(count as usize).enumerate() {
            // SAFETY: `count` places, by the API's contract.
            unsafe { out(to.wrapping_add(place), "functions", function_of(handle, name)?)? };
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunctionCount(count: *mut u32, handle: Handle) -> CUresult {
    api("cuModuleGetFunctionCount", || {
        driver()?;
        unsafe { out(count, "count", MODULES.get(handle)?.program.kernels.len() as u32) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetGlobal_v2(
    addr: *mut u64,
    bytes: *mut usize,
    handle: Handle,
    name: *const c_char,
) -> CUresult {
    api("cuModuleGetGlobal_v2", || {
        let (_, name) = unsafe { module_and_name(handle, name)? };
        unsafe { give_range(addr, bytes, global_of(handle, &name)?) }
    })
}

/// Writes an address and a size where they are asked for.
pub(super) unsafe fn give_range(addr: *mut u64, bytes: *mut usize, (start, size): (u64, u64)) -> Outcome {
    for (to, value) in [(addr, start), (bytes.cast(), size)] {
        if !to.is_null() {
            unsafe { out(to, "pointer", value)? };
        }
    }
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetLoadingMode(mode: *mut u32) -> CUresult {
    // CU_MODULE_EAGER_LOADING
    api("cuModuleGetLoadingMode", || driver().and_then(|_| unsafe { out(mode, "mode", 1) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_run_where_the_manual_says() {
        let cases = [
            ("sm_80", (8, 0), true),
            ("sm_80", (9, 0), true),
            ("sm_90", (8, 0), false),
            ("sm_90a", (9, 0), true),
            ("sm_90a", (8, 0), false),
            ("sm_80a", (9, 0), false),
            ("sm_100a", (9, 0), false),
            ("sm_100f", (10, 3), true),
            ("sm_120", (10, 0), false),
            ("compute_80", (9, 0), false),
            ("sm_80x", (9, 0), false),
        ];
        for (target, capability, runs) in cases {
            assert_eq!(check_target(target, capability).is_ok(), runs, "{target} on {capability:?}");
        }
    }
}
