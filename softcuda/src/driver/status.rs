//! `CUresult`: codes, their names and texts, and what is known beyond the code.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char};
use std::sync::Mutex;

/// A status code of the driver API.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CUresult(pub u32);

macro_rules! codes {
    ($($name:ident = $value:literal, $text:literal;)*) => {
        impl CUresult {
            $(pub const $name: CUresult = CUresult($value);)*
        }

        const CODES: &[(u32, &CStr, &CStr)] = &[$((
            $value,
            // Both are literals without an inner NUL.
            match CStr::from_bytes_with_nul(concat!("CUDA_", stringify!($name), "\0").as_bytes()) {
                Ok(text) => text,
                Err(_) => c"",
            },
            match CStr::from_bytes_with_nul(concat!($text, "\0").as_bytes()) {
                Ok(text) => text,
                Err(_) => c"",
            },
        ),)*];
    };
}

codes! {
    SUCCESS = 0, "no error";
    ERROR_INVALID_VALUE = 1, "invalid argument";
    ERROR_OUT_OF_MEMORY = 2, "out of memory";
    ERROR_NOT_INITIALIZED = 3, "initialization error";
    ERROR_DEINITIALIZED = 4, "driver shutting down";
    ERROR_PROFILER_DISABLED = 5, "profiler disabled while using external profiling tool";
    ERROR_STUB_LIBRARY = 34, "CUDA driver is a stub library";
    ERROR_NO_DEVICE = 100, "no CUDA-capable device is detected";
    ERROR_INVALID_DEVICE = 101, "invalid device ordinal";
    ERROR_INVALID_IMAGE = 200, "device kernel image is invalid";
    ERROR_INVALID_CONTEXT = 201, "invalid device context";
    ERROR_NO_BINARY_FOR_GPU = 209, "no kernel image is available for execution on the device";
    ERROR_PEER_ACCESS_UNSUPPORTED = 217, "peer access is not supported between these two devices";
    ERROR_UNSUPPORTED_LIMIT = 215, "limit is not supported on this architecture";
    ERROR_INVALID_PTX = 218, "a PTX JIT compilation failed";
    ERROR_UNSUPPORTED_PTX_VERSION = 222, "the provided PTX was compiled with an unsupported toolchain.";
    ERROR_UNSUPPORTED_EXEC_AFFINITY = 224, "the provided execution affinity is not supported";
    ERROR_INVALID_SOURCE = 300, "device kernel image is invalid";
    ERROR_FILE_NOT_FOUND = 301, "file not found";
    ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND = 302, "shared object symbol not found";
    ERROR_OPERATING_SYSTEM = 304, "OS call failed or operation not supported on this OS";
    ERROR_INVALID_HANDLE = 400, "invalid resource handle";
    ERROR_ILLEGAL_STATE = 401, "the operation cannot be performed in the present state";
    ERROR_NOT_FOUND = 500, "named symbol not found";
    ERROR_NOT_READY = 600, "device not ready";
    ERROR_ILLEGAL_ADDRESS = 700, "an illegal memory access was encountered";
    ERROR_LAUNCH_OUT_OF_RESOURCES = 701, "too many resources requested for launch";
    ERROR_LAUNCH_TIMEOUT = 702, "the launch timed out and was terminated";
    ERROR_PEER_ACCESS_ALREADY_ENABLED = 704, "peer access is already enabled";
    ERROR_PEER_ACCESS_NOT_ENABLED = 705, "peer access has not been enabled";
    ERROR_PRIMARY_CONTEXT_ACTIVE = 708, "cannot set while device is active in this process";
    ERROR_CONTEXT_IS_DESTROYED = 709, "context is destroyed";
    ERROR_ASSERT = 710, "device-side assert triggered";
    ERROR_HARDWARE_STACK_ERROR = 714, "hardware stack error";
    ERROR_ILLEGAL_INSTRUCTION = 715, "an illegal instruction was encountered";
    ERROR_MISALIGNED_ADDRESS = 716, "misaligned address";
    ERROR_INVALID_ADDRESS_SPACE = 717, "operation not supported on global/shared address space";
    ERROR_INVALID_PC = 718, "invalid program counter";
    ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712, "part or all of the requested memory range is already mapped";
    ERROR_HOST_MEMORY_NOT_REGISTERED = 713, "pointer does not correspond to a registered memory region";
    ERROR_LAUNCH_FAILED = 719, "unspecified launch failure";
    ERROR_COOPERATIVE_LAUNCH_TOO_LARGE = 720, "too many blocks in cooperative launch";
    ERROR_GRAPH_EXEC_UPDATE_FAILURE = 910, "the graph update was not performed because it included changes which violated constraints specific to instantiated graph update";
    ERROR_NOT_PERMITTED = 800, "operation not permitted";
    ERROR_NOT_SUPPORTED = 801, "operation not supported";
    ERROR_STREAM_CAPTURE_UNSUPPORTED = 900, "operation not permitted when stream is capturing";
    ERROR_STREAM_CAPTURE_INVALIDATED = 901, "operation failed due to a previous error during capture";
    ERROR_STREAM_CAPTURE_MERGE = 902, "operation would result in a merge of separate capture sequences";
    ERROR_STREAM_CAPTURE_UNMATCHED = 903, "capture was not ended in the same stream as it began";
    ERROR_STREAM_CAPTURE_UNJOINED = 904, "capturing stream has unjoined work";
    ERROR_STREAM_CAPTURE_ISOLATION = 905, "dependency created on uncaptured work in another stream";
    ERROR_STREAM_CAPTURE_IMPLICIT = 906, "operation would make the legacy stream depend on a capturing blocking stream";
    ERROR_CAPTURED_EVENT = 907, "operation not permitted on an event last recorded in a capturing stream";
    ERROR_STREAM_CAPTURE_WRONG_THREAD = 908, "attempt to terminate a thread-local capture sequence from another thread";
    ERROR_UNKNOWN = 999, "unknown error";
}

/// An error code, and what there is to say beyond it.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    pub code: CUresult,
    pub detail: Option<String>,
}

impl From<CUresult> for Failure {
    fn from(code: CUresult) -> Self {
        Failure { code, detail: None }
    }
}

pub(super) type Outcome<T = ()> = Result<T, Failure>;

impl CUresult {
    pub(super) fn with(self, detail: impl Into<String>) -> Failure {
        Failure { code: self, detail: Some(detail.into()) }
    }
}

thread_local! {
    /// The detail of this thread's latest failure of each kind.
    static DETAILS: RefCell<HashMap<u32, String>> = RefCell::default();
}

/// Texts handed out by `cuGetErrorString`, which the caller may keep for ever: each distinct one is leaked once.
static LEAKED: Mutex<Option<HashMap<String, &'static CStr>>> = Mutex::new(None);

/// Distinct texts to leak before falling back to the plain ones.
const MAX_LEAKED: usize = 4096;

/// Notes a failure of `function`, so that `cuGetErrorString` can say more than its code.
pub(super) fn note(function: &str, failure: &Failure) {
    // At the end of a thread nobody is left to ask.
    let _ = DETAILS.try_with(|details| match &failure.detail {
        Some(detail) => details.borrow_mut().insert(failure.code.0, format!("{function}: {detail}")),
        None => details.borrow_mut().remove(&failure.code.0),
    });
    if let Some(detail) = &failure.detail
        && super::settings().log
    {
        super::say(format_args!("{function}: {}: {detail}", name(failure.code).unwrap_or("unknown code")));
    }
}

fn entry(code: CUresult) -> Option<&'static (u32, &'static CStr, &'static CStr)> {
    CODES.iter().find(|(value, ..)| *value == code.0)
}

pub(super) fn name(code: CUresult) -> Option<&'static str> {
    entry(code).and_then(|(_, name, _)| name.to_str().ok())
}

/// The code's text, followed by the detail of this thread's latest failure with that code.
fn text(code: CUresult) -> Option<&'static CStr> {
    let (_, _, plain) = entry(code)?;
    let detail = DETAILS.try_with(|details| details.borrow().get(&code.0).cloned());
    // Whoever held the lock below when a process was forked is not there to give it back.
    let Ok(Some(detail)) = detail else { return Some(plain) };
    if super::life::is_forked() {
        return Some(plain);
    }
    let full = format!("{}: {detail}", plain.to_string_lossy()).replace('\0', "");
    let mut leaked = super::lock(&LEAKED);
    let leaked = leaked.get_or_insert_default();
    if let Some(known) = leaked.get(&full) {
        return Some(known);
    }
    if leaked.len() >= MAX_LEAKED {
        return Some(plain);
    }
    let text: &'static CStr = Box::leak(CString::new(full.clone()).ok()?.into_boxed_c_str());
    leaked.insert(full, text);
    Some(text)
}

unsafe fn give(text: Option<&'static CStr>, to: *mut *const c_char) -> CUresult {
    if to.is_null() {
        return CUresult::ERROR_INVALID_VALUE;
    }
    // SAFETY: the caller passes a writable pointer, as the API's contract has it.
    unsafe { to.write(text.map_or(std::ptr::null(), CStr::as_ptr)) };
    if text.is_some() { CUresult::SUCCESS } else { CUresult::ERROR_INVALID_VALUE }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(error: CUresult, name: *mut *const c_char) -> CUresult {
    unsafe { give(entry(error).map(|(_, name, _)| *name), name) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(error: CUresult, string: *mut *const c_char) -> CUresult {
    unsafe { give(super::guarded(|| text(error)).flatten(), string) }
}
