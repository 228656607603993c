//! Kernel launches: `cuLaunchKernel`, `cuLaunchKernelEx`, `cuLaunchCooperativeKernel`.

use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, OnceLock};

use super::context::{CONTEXTS, Context, current};
use super::function::Function;
use super::handles::Handle;
use super::library::resolve;
use super::peer::View;
use super::status::{CUresult, Outcome};
use super::stream::stream;
use super::work::Op;
use super::{api, checks, control, driver, occupancy, profile};
use crate::device::{MAX_BLOCK, MAX_CLUSTER, MAX_GRID, MAX_PORTABLE_CLUSTER, MAX_THREADS_PER_BLOCK};
use crate::exec::{self, FaultKind, Launch};
use crate::lower::ParamLayout;

/// A launch that has passed every check made before it is enqueued.
pub(super) struct LaunchSpec {
    /// Of the function, or of the kernel of a library that it is.
    handle: Handle,
    function: Arc<Function>,
    grid: [u32; 3],
    block: [u32; 3],
    cluster: [u32; 3],
    dynamic_shared: u32,
    params: Vec<u8>,
    cooperative: bool,
    /// May begin before what is in front of it in the stream has ended.
    dependent: bool,
    /// Addresses of the parameters, made when asked for.
    pointers: OnceLock<Vec<usize>>,
}

fn invalid(text: String) -> super::status::Failure {
    CUresult::ERROR_INVALID_VALUE.with(text)
}

impl LaunchSpec {
    pub fn is_dependent(&self) -> bool {
        self.dependent
    }

    fn check(&self) -> Outcome {
        let device = self.function.device;
        let kernel = &self.function.kernel;
        let name = &kernel.name;
        for (what, extents, limits) in [("grid", self.grid, MAX_GRID), ("block", self.block, MAX_BLOCK)] {
            if extents.iter().zip(limits).any(|(&extent, limit)| extent == 0 || extent > limit) {
                return Err(invalid(format!("{name}: {what} {extents:?} is not within 1..={limits:?}")));
            }
        }
        let threads = self.block.iter().product::<u32>();
        if threads > MAX_THREADS_PER_BLOCK {
            return Err(invalid(format!("{name}: a block of {threads} threads; at most {MAX_THREADS_PER_BLOCK}")));
        }
        if let Some(required) = kernel.reqntid
            && required != self.block
        {
            return Err(invalid(format!("{name}: block {:?}, but .reqntid says {required:?}", self.block)));
        }
        if let Some(most) = kernel.max_threads
            && threads > most
        {
            return Err(invalid(format!("{name}: a block of {threads} threads, but .maxntid allows {most}")));
        }
        let most = self.function.max_dynamic_shared();
        if self.dynamic_shared > most {
            return Err(invalid(format!(
                "{name}: {} bytes of dynamic shared memory; {most} are allowed \
                 (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)",
                self.dynamic_shared
            )));
        }
        self.check_cluster()?;
        if self.cooperative {
            let resident = occupancy::blocks_per_sm(device, &self.function, threads, self.dynamic_shared.into())
                * u64::from(device.sm_count);
            let blocks = self.grid.iter().map(|&extent| u64::from(extent)).product::<u64>();
            if blocks > resident {
                return Err(CUresult::ERROR_COOPERATIVE_LAUNCH_TOO_LARGE
                    .with(format!("{name}: {blocks} blocks, but only {resident} can be resident at once")));
            }
        }
        Ok(())
    }

    fn check_cluster(&self) -> Outcome {
        let name = &self.function.kernel.name;
        let blocks = self.cluster.iter().try_fold(1u32, |product, &extent| product.checked_mul(extent)).unwrap_or(0);
        if blocks == 1 {
            return Ok(());
        }
        if self.function.device.compute_capability < (9, 0) {
            return Err(invalid(format!("{name}: clusters need compute capability 9.0")));
        }
        let most = if self.function.non_portable_cluster() { MAX_CLUSTER } else { MAX_PORTABLE_CLUSTER };
        if blocks == 0 || blocks > most {
            return Err(invalid(format!("{name}: cluster {:?}; 1 to {most} blocks are allowed", self.cluster)));
        }
        if self.grid.iter().zip(self.cluster).any(|(grid, cluster)| grid % cluster != 0) {
            return Err(invalid(format!("{name}: grid {:?} is no multiple of cluster {:?}", self.grid, self.cluster)));
        }
        Ok(())
    }

    /// Runs the kernel. A fault puts the context in error and is not this call's: the launch itself was fine.
    pub fn run(&self, context: &Context) -> Outcome {
        let driver = driver()?;
        let kernel = &self.function.kernel;
        control::record_launch(|| {
            format!("{}\t{:?}\t{:?}\t{}", kernel.name, self.grid, self.block, self.dynamic_shared)
        });
        if !control::executes() {
            return Ok(());
        }
        let mut config = control::config(self.function.device);
        config.heap = context.heap.clone();
        let threads = self.block.iter().product();
        let recording = profile::begin(&mut config, self.function.device, &self.function, threads, self.dynamic_shared);
        let launch = Launch {
            kernel,
            grid: self.grid,
            block: self.block,
            cluster: self.cluster,
            dynamic_shared_bytes: self.dynamic_shared,
            params: &self.params,
            cooperative: self.cooperative,
            memory: &View::new(&driver.memory, context),
            config: &config,
        };
        let outcome = exec::launch(&launch);
        checks::print_new();
        let fault = match outcome {
            Ok(counters) => {
                control::record_counters(&kernel.name, &counters);
                if let Some(recording) = recording {
                    profile::end(&recording, &self.function, &launch, &counters);
                }
                return Ok(());
            }
            Err(fault) => fault,
        };
        let text = fault.to_string();
        let code = match fault.kind {
            FaultKind::IllegalAddress => CUresult::ERROR_ILLEGAL_ADDRESS,
            FaultKind::MisalignedAddress => CUresult::ERROR_MISALIGNED_ADDRESS,
            FaultKind::InvalidAddressSpace => CUresult::ERROR_INVALID_ADDRESS_SPACE,
            FaultKind::InvalidPc => CUresult::ERROR_INVALID_PC,
            FaultKind::IllegalInstruction => CUresult::ERROR_ILLEGAL_INSTRUCTION,
            FaultKind::StackOverflow => CUresult::ERROR_HARDWARE_STACK_ERROR,
            FaultKind::Trap => CUresult::ERROR_LAUNCH_FAILED,
            FaultKind::Assert => CUresult::ERROR_ASSERT,
            FaultKind::Deadlock | FaultKind::LaunchTimeout => CUresult::ERROR_LAUNCH_TIMEOUT,
            FaultKind::InvalidLaunch => return Err(invalid(text)),
        };
        control::record_fault(&text);
        context.set_fault(code.with(text));
        Ok(())
    }
}

/// Gathers the parameter buffer from `kernelParams` or from `extra`.
unsafe fn parameters(function: &Function, params: *const *const u8, extra: *const *const c_void) -> Outcome<Vec<u8>> {
    let kernel = &function.kernel;
    let mut buffer = vec![0u8; kernel.param_bytes as usize];
    if !extra.is_null() {
        if !params.is_null() {
            return Err(invalid("both `kernelParams` and `extra` are given".into()));
        }
        let (mut data, mut size) = (ptr::null::<u8>(), 0);
        // SAFETY: a list of keys and values that CU_LAUNCH_PARAM_END closes, by the API's contract.
        unsafe {
            let mut at = extra;
            while !(*at).is_null() {
                match *at as usize {
                    1 => data = (*at.add(1)).cast(),
                    2 => size = (*at.add(1)).cast::<usize>().read_unaligned(),
                    key => return Err(invalid(format!("{key} is not a key of `extra`"))),
                }
                at = at.add(2);
            }
        }
        if size != buffer.len() || data.is_null() {
            return Err(invalid(format!(
                "{}: a parameter buffer of {size} bytes; the kernel takes {}",
                kernel.name, kernel.param_bytes
            )));
        }
        // SAFETY: the caller's buffer has the size it says.
        unsafe { ptr::copy_nonoverlapping(data, buffer.as_mut_ptr(), size) };
        return Ok(buffer);
    }
    if kernel.params.is_empty() {
        return Ok(buffer);
    }
    if params.is_null() {
        return Err(invalid(format!("{}: `kernelParams` is null", kernel.name)));
    }
    for (index, param) in kernel.params.iter().enumerate() {
        // SAFETY: one pointer for each parameter, each to at least the parameter's size, by the API's contract.
        let value = unsafe { *params.add(index) };
        if value.is_null() {
            return Err(invalid(format!("{}: parameter {index} is a null pointer", kernel.name)));
        }
        let place = &mut buffer[param.offset as usize..][..param.size as usize];
        // SAFETY: as above.
        unsafe { ptr::copy_nonoverlapping(value, place.as_mut_ptr(), place.len()) };
    }
    Ok(buffer)
}

/// The shape of a launch.
struct Shape {
    grid: [u32; 3],
    block: [u32; 3],
    cluster: Option<[u32; 3]>,
    dynamic_shared: u32,
    cooperative: bool,
    dependent: bool,
}

/// A launch that has not been checked yet.
fn prepare(
    handle: Handle,
    function: Arc<Function>,
    shape: Shape,
    params: *const *const u8,
    extra: *const *const c_void,
) -> Outcome<LaunchSpec> {
    let Shape { grid, block, cluster, dynamic_shared, cooperative, dependent } = shape;
    let cluster = match (function.required_cluster, cluster) {
        (Some(required), Some(asked)) if required != asked => {
            return Err(invalid(format!("cluster {asked:?}, but .reqnctapercluster says {required:?}")));
        }
        (None, None) if function.kernel.explicit_cluster => {
            return Err(invalid("no cluster, but .explicitcluster asks for one".into()));
        }
        (required, asked) => required.or(asked).unwrap_or([1; 3]),
    };
    let params = unsafe { parameters(&function, params, extra)? };
    let pointers = OnceLock::new();
    Ok(LaunchSpec { handle, function, grid, block, cluster, dynamic_shared, params, cooperative, dependent, pointers })
}

/// What every call that launches comes to.
fn launch(
    function: Handle,
    shape: Shape,
    handle: Handle,
    params: *const *const u8,
    extra: *const *const c_void,
) -> Outcome {
    let stream = stream(handle)?;
    let found = resolve(function, || stream.context())?;
    if !stream.belongs_to(found.context) {
        return Err(CUresult::ERROR_INVALID_HANDLE.with("the function and the stream belong to different contexts"));
    }
    let spec = prepare(function, found, shape, params, extra)?;
    let checked = spec.check();
    if let (Err(_), Some(captured)) = (&checked, &*super::lock(&stream.capture)) {
        captured.capture.invalidate();
    }
    checked?;
    stream.submit(Op::Launch(Box::new(spec)))
}

/// Defines a launch whose extents come as nine arguments.
macro_rules! launches {
    ($name:ident, $cooperative:literal, ($($extra:ident)?)) => {
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            function: Handle,
            grid_x: u32,
            grid_y: u32,
            grid_z: u32,
            block_x: u32,
            block_y: u32,
            block_z: u32,
            dynamic_shared: u32,
            stream: Handle,
            params: *const *const u8,
            $($extra: *const *const c_void,)?
        ) -> CUresult {
            let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
            let cooperative = $cooperative;
            let shape = Shape { grid, block, cluster: None, dynamic_shared, cooperative, dependent: false };
            let extra = [$($extra,)? ptr::null()][0];
            api(stringify!($name), || launch(function, shape, stream, params, extra))
        }
    };
}

launches!(cuLaunchKernel, false, (extra));
launches!(cuLaunchCooperativeKernel, true, ());

/// `CUDA_KERNEL_NODE_PARAMS`, version 2 and later.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct KernelParams {
    function: Handle,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    params: *const *const u8,
    extra: *const *const c_void,
    kernel: Handle,
    context: Handle,
}

/// The launch that a kernel node stands for.
pub(super) unsafe fn of_node(node: &KernelParams) -> Outcome<LaunchSpec> {
    let KernelParams { function, grid, block, shared, params, extra, kernel, context } = *node;
    let handle = if function == 0 { kernel } else { function };
    let in_context = || if context == 0 { current() } else { CONTEXTS.get(context) };
    let function = resolve(handle, in_context)?;
    let shape = Shape { grid, block, cluster: None, dynamic_shared: shared, cooperative: false, dependent: false };
    let spec = prepare(handle, function, shape, params, extra)?;
    spec.check()?;
    Ok(spec)
}

impl LaunchSpec {
    /// The parameters of the kernel node that the launch is; pointers live as long as the node keeps this launch.
    pub fn node_params(&self) -> KernelParams {
        let pointers = self.pointers.get_or_init(|| {
            let place = |param: &ParamLayout| self.params[param.offset as usize..].as_ptr() as usize;
            self.function.kernel.params.iter().map(place).collect()
        });
        KernelParams {
            function: self.handle,
            grid: self.grid,
            block: self.block,
            shared: self.dynamic_shared,
            params: pointers.as_ptr().cast(),
            extra: ptr::null(),
            kernel: 0,
            context: 0,
        }
    }
}

/// `CUlaunchAttribute`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Attribute {
    id: u32,
    pad: u32,
    value: [u32; 16],
}

/// `CUlaunchConfig`.
#[repr(C)]
pub struct LaunchConfig {
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    stream: Handle,
    attributes: *const Attribute,
    attribute_count: u32,
}

impl LaunchConfig {
    /// Cluster extents, whether the launch is cooperative, and whether it is a programmatic dependent one.
    unsafe fn attributes(&self) -> Outcome<(Option<[u32; 3]>, bool, bool)> {
        let (mut cluster, mut cooperative, mut dependent) = (None, false, false);
        for index in 0..self.attribute_count as usize {
            if self.attributes.is_null() {
                return Err(invalid("`attrs` is null".into()));
            }
            // SAFETY: the array has `numAttrs` elements by the API's contract.
            let Attribute { id, value, .. } = unsafe { self.attributes.add(index).read_unaligned() };
            match id {
                // IGNORE; ACCESS_POLICY_WINDOW, SYNCHRONIZATION_POLICY and PRIORITY are hints; memory synchronisation domains
                // only restrict what fences order.
                0 | 1 | 3 | 8 | 9 | 10 => {}
                // Programmatic stream serialization allows an overlap that this device never makes use of; the race checker
                // tells where a program could not bear it.
                6 => dependent = value[0] != 0,
                2 => cooperative = value[0] != 0,
                4 => cluster = Some([value[0], value[1], value[2]]),
                // CLUSTER_SCHEDULING_POLICY_PREFERENCE
                5 => {}
                _ => return Err(super::unsupported(format!("launch attribute {id}"))),
            }
        }
        Ok((cluster, cooperative, dependent))
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernelEx(
    config: *const LaunchConfig,
    function: Handle,
    params: *const *const u8,
    extra: *const *const c_void,
) -> CUresult {
    api("cuLaunchKernelEx", || {
        // SAFETY: null, or a CUlaunchConfig of the caller's.
        let config = unsafe { config.as_ref() }.ok_or_else(|| invalid("`config` is null".into()))?;
        let (cluster, cooperative, dependent) = unsafe { config.attributes()? };
        let LaunchConfig { grid, block, shared, stream, .. } = *config;
        let shape = Shape { grid, block, cluster, dynamic_shared: shared, cooperative, dependent };
        launch(function, shape, stream, params, extra)
    })
}

/// The cluster that a `CUlaunchConfig` asks for, for occupancy.
pub(super) unsafe fn config_parts(config: *const LaunchConfig) -> Outcome<([u32; 3], u32, Option<[u32; 3]>)> {
    // SAFETY: null, or a CUlaunchConfig of the caller's.
    let config = unsafe { config.as_ref() }.ok_or_else(|| invalid("`config` is null".into()))?;
    let (cluster, ..) = unsafe { config.attributes()? };
    Ok((config.block, config.shared, cluster))
}
