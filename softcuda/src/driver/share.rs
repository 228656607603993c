//! What share of its device a context may use: all of it, as this driver has neither green contexts nor MPS.

use super::context::CONTEXTS;
use super::handles::Handle;
use super::status::CUresult;
use super::{api, out};

/// `CUdevResource` of the type SM, as far as CUDA 12.4 to 13.4 agree: its type, padding, then how many multiprocessors, and the smallest partition
/// and granularity in which they could be split.
#[repr(C)]
pub(super) struct DevResource {
    kind: u32,
    padding: [u8; 92],
    multiprocessors: u32,
    smallest_partition: u32,
    granularity: u32,
}

const SM: u32 = 1;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetDevResource(context: Handle, resource: *mut DevResource, kind: u32) -> CUresult {
    api("cuCtxGetDevResource", || {
        let context = CONTEXTS.get(context)?;
        context.check()?;
        if kind != SM {
            return Err(super::unsupported(format!("a device resource of type {kind}")));
        }
        let device = context.description()?;
        // Smallest partition and granularity by compute capability: driver API, green contexts.
        let (smallest_partition, granularity) = if device.compute_capability >= (9, 0) { (8, 8) } else { (4, 2) };
        let resource_of_all = DevResource {
            kind: SM,
            padding: [0; 92],
            multiprocessors: device.sm_count,
            smallest_partition,
            granularity,
        };
        unsafe { out(resource, "resource", resource_of_all) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetExecAffinity(_affinity: *mut u32, _kind: u32) -> CUresult {
    api("cuCtxGetExecAffinity", || {
        super::context::current()?;
        Err(CUresult::ERROR_UNSUPPORTED_EXEC_AFFINITY.with("execution affinity needs MPS"))
    })
}
