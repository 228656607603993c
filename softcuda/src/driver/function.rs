//! Kernels as functions of a module: `cuFunc*`.

use std::ffi::c_char;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};

use super::handles::{Children, Handle, Owned};
use super::module::Module;
use super::status::{CUresult, Outcome};
use super::{api, driver, out};
use crate::device::{Description, MAX_REGISTERS_PER_THREAD, MAX_THREADS_PER_BLOCK, REGISTERS, SHARED_PER_BLOCK};
use crate::lower::Kernel;

pub(super) struct Function {
    pub context: Handle,
    pub module: Handle,
    pub device: &'static Description,
    pub kernel: Arc<Kernel>,
    pub name: std::ffi::CString,
    /// Bytes of `.const` variables of its module.
    const_bytes: u32,
    /// What the options of its module's compilation allow.
    max_registers: Option<u32>,
    /// `.reqnctapercluster`.
    pub required_cluster: Option<[u32; 3]>,
    max_dynamic: AtomicU32,
    carveout: AtomicI32,
    non_portable: AtomicBool,
    binary_version: u32,
}

pub(super) static FUNCTIONS: Children<Function> = Children::new("function", CUresult::ERROR_INVALID_HANDLE);

impl Owned for Function {
    fn owner(&self) -> Handle {
        self.context
    }
}

impl Function {
    pub fn new(
        module: &Module,
        handle: Handle,
        kernel: Arc<Kernel>,
        required_cluster: Option<[u32; 3]>,
    ) -> Outcome<Function> {
        let device = super::context::CONTEXTS.get(module.context)?.description()?;
        let (major, minor) = device.compute_capability;
        let max_dynamic = SHARED_PER_BLOCK.saturating_sub(kernel.static_shared_bytes);
        let name = std::ffi::CString::new(kernel.name.clone()).unwrap_or_default();
        Ok(Function {
            context: module.context,
            module: handle,
            device,
            kernel,
            name,
            const_bytes: module.const_bytes as u32,
            max_registers: module.max_registers,
            required_cluster,
            max_dynamic: AtomicU32::new(max_dynamic),
            carveout: AtomicI32::new(-1),
            non_portable: AtomicBool::new(false),
            binary_version: 10 * major + minor,
        })
    }

    pub fn max_dynamic_shared(&self) -> u32 {
        self.max_dynamic.load(Ordering::Relaxed)
    }

    pub fn non_portable_cluster(&self) -> bool {
        self.non_portable.load(Ordering::Relaxed)
    }

    /// Registers a thread would have on hardware: as recorded from `ptxas`, else the lowering's estimate, held to what the
    /// kernel's directives would make `ptxas` keep to.
    pub fn registers(&self) -> u32 {
        if let Some(recorded) = super::profile::recorded_registers(&self.kernel.name) {
            return recorded;
        }
        let bounded = self.kernel.max_threads.map_or(MAX_REGISTERS_PER_THREAD, |threads| {
            let blocks = self.kernel.min_ctas_per_sm.unwrap_or(1).max(1);
            // Allocation is by 8 registers a thread.
            (REGISTERS / (threads.next_multiple_of(32) * blocks).max(1) / 8 * 8).max(16)
        });
        // A kernel's own directive goes before the option.
        let most = self.kernel.max_registers.or(self.max_registers.filter(|_| self.kernel.min_ctas_per_sm.is_none()));
        let most = most.unwrap_or(MAX_REGISTERS_PER_THREAD).clamp(16, MAX_REGISTERS_PER_THREAD);
        self.kernel.registers.max(16).min(bounded).min(most)
    }

    fn max_threads(&self) -> u32 {
        let by_registers = REGISTERS / (self.registers().next_multiple_of(8) * 32) * 32;
        MAX_THREADS_PER_BLOCK.min(self.kernel.max_threads.unwrap_or(by_registers))
    }
}

fn function(handle: Handle) -> Outcome<Arc<Function>> {
    driver()?;
    let function = super::library::resolve(handle, super::context::current)?;
    super::context::CONTEXTS.get(function.context)?.check()?;
    Ok(function)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncGetAttribute(value: *mut i32, attribute: u32, handle: Handle) -> CUresult {
    api("cuFuncGetAttribute", || unsafe { out(value, "pi", self::attribute(&*function(handle)?, attribute)?) })
}

/// The value of a `CUfunction_attribute`.
pub(super) fn attribute(function: &Function, attribute: u32) -> Outcome<i32> {
    let kernel = &function.kernel;
    let (major, minor) = kernel.version;
    let cluster = function.required_cluster;
    let found = match attribute {
        // MAX_THREADS_PER_BLOCK, SHARED_SIZE_BYTES, CONST_SIZE_BYTES, LOCAL_SIZE_BYTES, NUM_REGS
        0 => function.max_threads(),
        1 => kernel.static_shared_bytes,
        2 => function.const_bytes,
        3 => kernel.local_bytes,
        4 => function.registers(),
        // PTX_VERSION, BINARY_VERSION, CACHE_MODE_CA
        5 => 10 * major + minor,
        6 => function.binary_version,
        7 => 0,
        8 => function.max_dynamic_shared(),
        // PREFERRED_SHARED_MEMORY_CARVEOUT
        9 => return Ok(function.carveout.load(Ordering::Relaxed)),
        // CLUSTER_SIZE_MUST_BE_SET, REQUIRED_CLUSTER_WIDTH, HEIGHT, DEPTH
        10 => cluster.is_some().into(),
        11..=13 => cluster.map_or(0, |extents| extents[attribute as usize - 11]),
        14 => function.non_portable_cluster().into(),
        // CLUSTER_SCHEDULING_POLICY_PREFERENCE
        15 => 0,
        _ => return Err(CUresult::ERROR_INVALID_VALUE.with(format!("{attribute} is no known attribute"))),
    };
    Ok(found as i32)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncSetAttribute(handle: Handle, attribute: u32, value: i32) -> CUresult {
    api("cuFuncSetAttribute", || set_attribute(&*function(handle)?, attribute, value))
}

pub(super) fn set_attribute(function: &Function, attribute: u32, value: i32) -> Outcome {
    let invalid = |text: String| Err(CUresult::ERROR_INVALID_VALUE.with(text));
    match attribute {
        8 => {
            let optin = function.device.shared_per_block_optin;
            let most = optin.saturating_sub(function.kernel.static_shared_bytes);
            match u32::try_from(value) {
                Ok(bytes) if bytes <= most => function.max_dynamic.store(bytes, Ordering::Relaxed),
                _ => return invalid(format!("{value} bytes of dynamic shared memory; at most {most}")),
            }
        }
        9 if (-1..=100).contains(&value) => function.carveout.store(value, Ordering::Relaxed),
        9 => return invalid(format!("a carveout of {value} percent")),
        14 => function.non_portable.store(value != 0, Ordering::Relaxed),
        15 if (0..=2).contains(&value) => {}
        _ => return invalid(format!("attribute {attribute} cannot be set to {value}")),
    }
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncSetCacheConfig(handle: Handle, config: u32) -> CUresult {
    api("cuFuncSetCacheConfig", || {
        function(handle)?;
        // A preference without effect: caches are not modelled.
        if config > 3 { Err(CUresult::ERROR_INVALID_VALUE.into()) } else { Ok(()) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncGetName(name: *mut *const c_char, handle: Handle) -> CUresult {
    // The text lives as long as the module: the table holds the function until then.
    api("cuFuncGetName", || unsafe { out(name, "name", function(handle)?.name.as_ptr()) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncGetModule(module: *mut Handle, handle: Handle) -> CUresult {
    api("cuFuncGetModule", || unsafe { out(module, "hmod", function(handle)?.module) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncGetParamInfo(
    handle: Handle,
    index: usize,
    offset: *mut usize,
    size: *mut usize,
) -> CUresult {
    api("cuFuncGetParamInfo", || unsafe { give_param(&*function(handle)?, index, offset, size) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncGetParamCount(handle: Handle, count: *mut usize) -> CUresult {
    api("cuFuncGetParamCount", || unsafe { out(count, "paramCount", function(handle)?.kernel.params.len()) })
}

/// Functions are loaded with their module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncLoad(handle: Handle) -> CUresult {
    api("cuFuncLoad", || function(handle).map(drop))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncIsLoaded(state: *mut u32, handle: Handle) -> CUresult {
    // CU_FUNCTION_LOADING_STATE_LOADED
    api("cuFuncIsLoaded", || function(handle).and_then(|_| unsafe { out(state, "state", 1) }))
}

/// Place and size of a parameter.
pub(super) unsafe fn give_param(function: &Function, index: usize, offset: *mut usize, size: *mut usize) -> Outcome {
    let count = function.kernel.params.len();
    let param = function.kernel.params.get(index);
    let param = param
        .ok_or_else(|| CUresult::ERROR_INVALID_VALUE.with(format!("parameter {index}; the kernel has {count}")))?;
    unsafe {
        out(offset, "paramOffset", param.offset as usize)?;
        if size.is_null() { Ok(()) } else { out(size, "paramSize", param.size as usize) }
    }
}
