//! Linking of PTX modules: `cuLink*`.
//!
//! The result is one PTX module: definitions of all inputs, in order, with declarations of what is defined elsewhere left out
//! and names that are a module's own made distinct (PTX ISA 5.4 and 11.6, "Linking Directives"). It is loaded like any other.

use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::{Arc, Mutex};

use super::context::current;
use super::handles::{Handle, Table};
use super::module::{Options, text_of_bytes};
use super::status::{CUresult, Failure, Outcome};
use super::{api, driver, lock, out};
use crate::ptx::link::{self, Input};

/// A link in progress.
struct Link {
    state: Mutex<State>,
    /// Where the log goes, as the options of `cuLinkCreate` say; the caller keeps the buffers until the link is destroyed.
    options: Options,
}

#[derive(Default)]
struct State {
    inputs: Vec<Input>,
    /// The result, which the caller may read until the link is destroyed.
    image: Option<CString>,
}

/// Begins the first line of an image that was linked with CU_JIT_MAX_REGISTERS; the number follows.
const MAX_REGISTERS: &str = "// linked with max registers: ";

/// The option that an image was linked with.
pub(super) fn max_registers(image: &str) -> Option<u32> {
    image.lines().next()?.strip_prefix(MAX_REGISTERS)?.parse().ok()
}

static LINKS: Table<Link> = Table::new("link", CUresult::ERROR_INVALID_HANDLE);

fn add(state: Handle, kind: u32, name: String, text: impl FnOnce() -> Outcome<String>) -> Outcome {
    driver()?;
    let link = LINKS.get(state)?;
    // CU_JIT_INPUT_PTX
    let added = if kind == 1 {
        text().and_then(|text| {
            // Said now rather than at the end: whoever adds knows what it added.
            crate::ptx::parse(&text).map_err(|error| CUresult::ERROR_INVALID_PTX.with(format!("{name}: {error}")))?;
            Ok(Input { name, text })
        })
    } else {
        let kinds = ["a cubin", "PTX", "a fat binary", "an object", "a library of objects", "NVVM IR"];
        let kind = kinds.get(kind as usize).copied().unwrap_or("an unknown kind of input");
        Err(CUresult::ERROR_NO_BINARY_FOR_GPU.with(format!("{name} is {kind}; softcuda links PTX")))
    };
    let failed = |failure: &Failure| unsafe { link.options.log(failure.detail.as_deref().unwrap_or_default()) };
    let input = added.inspect_err(failed)?;
    lock(&link.state).inputs.push(input);
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLinkCreate_v2(
    count: u32,
    keys: *const u32,
    values: *mut *mut c_void,
    to: *mut Handle,
) -> CUresult {
    api("cuLinkCreate_v2", || {
        current()?;
        let options = unsafe { Options::new(count, keys, values)? };
        unsafe { out(to, "stateOut", LINKS.add(Link { state: Mutex::default(), options })) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLinkAddData_v2(
    state: Handle,
    kind: u32,
    data: *const u8,
    bytes: usize,
    name: *const c_char,
    _count: u32,
    _keys: *const u32,
    _values: *mut *mut c_void,
) -> CUresult {
    api("cuLinkAddData_v2", || {
        if data.is_null() {
            return Err(CUresult::ERROR_INVALID_VALUE.with("`data` is null"));
        }
        // SAFETY: null or a NUL-terminated name, by the API's contract.
        let name = (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned());
        let name = name.unwrap_or_else(|| "an unnamed input".to_owned());
        // SAFETY: `bytes` bytes, by the API's contract.
        add(state, kind, name, || text_of_bytes(unsafe { std::slice::from_raw_parts(data, bytes) }))
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLinkAddFile_v2(
    state: Handle,
    kind: u32,
    path: *const c_char,
    _count: u32,
    _keys: *const u32,
    _values: *mut *mut c_void,
) -> CUresult {
    api("cuLinkAddFile_v2", || {
        if path.is_null() {
            return Err(CUresult::ERROR_INVALID_VALUE.with("`path` is null"));
        }
        // SAFETY: a NUL-terminated path, by the API's contract.
        let path = unsafe { CStr::from_ptr(path) }.to_string_lossy().into_owned();
        let read = || std::fs::read(&path).map_err(|e| CUresult::ERROR_FILE_NOT_FOUND.with(format!("{path}: {e}")));
        add(state, kind, path.clone(), || text_of_bytes(&read()?))
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLinkComplete(state: Handle, image: *mut *const c_char, bytes: *mut usize) -> CUresult {
    api("cuLinkComplete", || {
        current()?;
        let link: Arc<Link> = LINKS.get(state)?;
        let mut state = lock(&link.state);
        let linked = link::link(&state.inputs).map_err(|error| {
            unsafe { link.options.log(&error.to_string()) };
            CUresult::ERROR_INVALID_PTX.with(error.to_string())
        })?;
        let linked = match link.options.max_registers {
            Some(most) => format!("{MAX_REGISTERS}{most}\n{linked}"),
            None => linked,
        };
        let linked = CString::new(linked).map_err(|_| CUresult::ERROR_INVALID_PTX)?;
        let kept = state.image.insert(linked);
        unsafe {
            out(image, "cubinOut", kept.as_ptr())?;
            if bytes.is_null() { Ok(()) } else { out(bytes, "sizeOut", kept.as_bytes_with_nul().len()) }
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLinkDestroy(state: Handle) -> CUresult {
    api("cuLinkDestroy", || {
        driver()?;
        LINKS.remove(state).map(drop)
    })
}
