//! Forms of entry points for programs in which each thread has a default stream of its own (`_ptds` and `_ptsz`, which
//! `CUDA_API_PER_THREAD_DEFAULT_STREAM` or `nvcc --default-stream per-thread` asks for): as the plain ones, but that stream 0, or
//! no stream, means `CU_STREAM_PER_THREAD` (CUDA driver API, "Stream synchronization behavior").

use std::ffi::c_void;

use super::graph::InstantiateParams;
use super::handles::Handle;
use super::launch::LaunchConfig;
use super::managed::Location;
use super::pitched::{Copy2D, Copy3D};
use super::status::CUresult;
use super::stream::with_default_per_thread;

macro_rules! per_thread {
    ($($module:ident { $($name:ident = $plain:ident($($argument:ident: $ty:ty),*);)* })*) => {
        $($(
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($argument: $ty),*) -> CUresult {
                with_default_per_thread(|| unsafe { super::$module::$plain($($argument),*) })
            }
        )*)*

        /// The form of a plain entry point, by its address; the same where there is but one.
        pub(super) fn form_of(plain: *const c_void) -> *const c_void {
            let forms = [$($((super::$module::$plain as *const c_void, $name as *const c_void),)*)*];
            forms.iter().find(|(known, _)| *known == plain).map_or(plain, |(_, form)| *form)
        }
    };
}

per_thread! {
    copy {
        cuMemcpy_ptds = cuMemcpy(dst: u64, src: u64, bytes: usize);
        cuMemcpyPeer_ptds = cuMemcpyPeer(dst: u64, dst_context: Handle, src: u64, src_context: Handle, bytes: usize);
        cuMemcpyHtoD_v2_ptds = cuMemcpyHtoD_v2(dst: u64, src: u64, bytes: usize);
        cuMemcpyDtoH_v2_ptds = cuMemcpyDtoH_v2(dst: u64, src: u64, bytes: usize);
        cuMemcpyDtoD_v2_ptds = cuMemcpyDtoD_v2(dst: u64, src: u64, bytes: usize);
        cuMemsetD8_v2_ptds = cuMemsetD8_v2(dst: u64, value: u8, count: usize);
        cuMemsetD16_v2_ptds = cuMemsetD16_v2(dst: u64, value: u16, count: usize);
        cuMemsetD32_v2_ptds = cuMemsetD32_v2(dst: u64, value: u32, count: usize);
        cuMemcpyAsync_ptsz = cuMemcpyAsync(dst: u64, src: u64, bytes: usize, handle: Handle);
        cuMemcpyPeerAsync_ptsz = cuMemcpyPeerAsync(
            dst: u64, dst_context: Handle, src: u64, src_context: Handle, bytes: usize, handle: Handle
        );
        cuMemcpyHtoDAsync_v2_ptsz = cuMemcpyHtoDAsync_v2(dst: u64, src: u64, bytes: usize, handle: Handle);
        cuMemcpyDtoHAsync_v2_ptsz = cuMemcpyDtoHAsync_v2(dst: u64, src: u64, bytes: usize, handle: Handle);
        cuMemcpyDtoDAsync_v2_ptsz = cuMemcpyDtoDAsync_v2(dst: u64, src: u64, bytes: usize, handle: Handle);
        cuMemsetD8Async_ptsz = cuMemsetD8Async(dst: u64, value: u8, count: usize, handle: Handle);
        cuMemsetD16Async_ptsz = cuMemsetD16Async(dst: u64, value: u16, count: usize, handle: Handle);
        cuMemsetD32Async_ptsz = cuMemsetD32Async(dst: u64, value: u32, count: usize, handle: Handle);
    }
    pitched {
        cuMemcpy2D_v2_ptds = cuMemcpy2D_v2(copy: *const Copy2D);
        cuMemcpy2DUnaligned_v2_ptds = cuMemcpy2DUnaligned_v2(copy: *const Copy2D);
        cuMemcpy3D_v2_ptds = cuMemcpy3D_v2(copy: *const Copy3D);
        cuMemcpy3DPeer_ptds = cuMemcpy3DPeer(copy: *const Copy3D);
        cuMemsetD2D8_v2_ptds = cuMemsetD2D8_v2(dst: u64, pitch: usize, value: u8, width: usize, height: usize);
        cuMemsetD2D16_v2_ptds = cuMemsetD2D16_v2(dst: u64, pitch: usize, value: u16, width: usize, height: usize);
        cuMemsetD2D32_v2_ptds = cuMemsetD2D32_v2(dst: u64, pitch: usize, value: u32, width: usize, height: usize);
        cuMemcpy2DAsync_v2_ptsz = cuMemcpy2DAsync_v2(copy: *const Copy2D, handle: Handle);
        cuMemcpy3DAsync_v2_ptsz = cuMemcpy3DAsync_v2(copy: *const Copy3D, handle: Handle);
        cuMemcpy3DPeerAsync_ptsz = cuMemcpy3DPeerAsync(copy: *const Copy3D, handle: Handle);
        cuMemsetD2D8Async_ptsz = cuMemsetD2D8Async(
            dst: u64, pitch: usize, value: u8, width: usize, height: usize, handle: Handle
        );
        cuMemsetD2D16Async_ptsz = cuMemsetD2D16Async(
            dst: u64, pitch: usize, value: u16, width: usize, height: usize, handle: Handle
        );
        cuMemsetD2D32Async_ptsz = cuMemsetD2D32Async(
            dst: u64, pitch: usize, value: u32, width: usize, height: usize, handle: Handle
        );
    }
    stream {
        cuStreamGetPriority_ptsz = cuStreamGetPriority(handle: Handle, priority: *mut i32);
        cuStreamGetId_ptsz = cuStreamGetId(handle: Handle, id: *mut u64);
        cuStreamGetFlags_ptsz = cuStreamGetFlags(handle: Handle, flags: *mut u32);
        cuStreamGetDevice_ptsz = cuStreamGetDevice(handle: Handle, device: *mut i32);
        cuStreamGetCtx_ptsz = cuStreamGetCtx(handle: Handle, context: *mut Handle);
        cuStreamWaitEvent_ptsz = cuStreamWaitEvent(handle: Handle, event: Handle, flags: u32);
        cuStreamAddCallback_ptsz = cuStreamAddCallback(
            handle: Handle, function: Option<unsafe extern "C" fn(Handle, CUresult, *mut c_void)>, data: usize,
            flags: u32
        );
        cuStreamSynchronize_ptsz = cuStreamSynchronize(handle: Handle);
        cuStreamQuery_ptsz = cuStreamQuery(handle: Handle);
        cuStreamIsCapturing_ptsz = cuStreamIsCapturing(handle: Handle, status: *mut u32);
        cuLaunchHostFunc_ptsz = cuLaunchHostFunc(
            handle: Handle, function: Option<unsafe extern "C" fn(*mut c_void)>, data: usize
        );
    }
    managed {
        cuStreamAttachMemAsync_ptsz = cuStreamAttachMemAsync(handle: Handle, addr: u64, bytes: usize, flags: u32);
        cuMemPrefetchAsync_ptsz = cuMemPrefetchAsync(addr: u64, bytes: usize, device: i32, handle: Handle);
        cuMemPrefetchAsync_v2_ptsz = cuMemPrefetchAsync_v2(
            addr: u64, bytes: usize, location: Location, flags: u32, handle: Handle
        );
    }
    capture {
        cuStreamBeginCapture_v2_ptsz = cuStreamBeginCapture_v2(handle: Handle, mode: u32);
        cuStreamEndCapture_ptsz = cuStreamEndCapture(handle: Handle, graph: *mut Handle);
    }
    capture_info {
        cuStreamGetCaptureInfo_ptsz = cuStreamGetCaptureInfo(handle: Handle, status: *mut u32, id: *mut u64);
        cuStreamGetCaptureInfo_v2_ptsz = cuStreamGetCaptureInfo_v2(
            handle: Handle, status: *mut u32, id: *mut u64, graph: *mut Handle, dependencies: *mut *const Handle,
            count: *mut usize
        );
        cuStreamGetCaptureInfo_v3_ptsz = cuStreamGetCaptureInfo_v3(
            handle: Handle, status: *mut u32, id: *mut u64, graph: *mut Handle, dependencies: *mut *const Handle,
            edges: *mut *const u64, count: *mut usize
        );
        cuStreamUpdateCaptureDependencies_ptsz = cuStreamUpdateCaptureDependencies(
            handle: Handle, nodes: *const Handle, count: usize, flags: u32
        );
        cuStreamUpdateCaptureDependencies_v2_ptsz = cuStreamUpdateCaptureDependencies_v2(
            handle: Handle, nodes: *const Handle, edges: *const u64, count: usize, flags: u32
        );
    }
    memops {
        cuStreamWaitValue32_v2_ptsz = cuStreamWaitValue32_v2(handle: Handle, addr: u64, value: u32, flags: u32);
        cuStreamWaitValue64_v2_ptsz = cuStreamWaitValue64_v2(handle: Handle, addr: u64, value: u64, flags: u32);
        cuStreamWriteValue32_v2_ptsz = cuStreamWriteValue32_v2(handle: Handle, addr: u64, value: u32, flags: u32);
        cuStreamWriteValue64_v2_ptsz = cuStreamWriteValue64_v2(handle: Handle, addr: u64, value: u64, flags: u32);
    }
    event {
        cuEventRecord_ptsz = cuEventRecord(event: Handle, stream: Handle);
        cuEventRecordWithFlags_ptsz = cuEventRecordWithFlags(event: Handle, stream: Handle, flags: u32);
    }
    launch {
        cuLaunchKernel_ptsz = cuLaunchKernel(
            function: Handle, grid_x: u32, grid_y: u32, grid_z: u32, block_x: u32, block_y: u32, block_z: u32,
            dynamic_shared: u32, stream: Handle, params: *const *const u8, extra: *const *const c_void
        );
        cuLaunchKernelEx_ptsz = cuLaunchKernelEx(
            config: *const LaunchConfig, function: Handle, params: *const *const u8, extra: *const *const c_void
        );
        cuLaunchCooperativeKernel_ptsz = cuLaunchCooperativeKernel(
            function: Handle, grid_x: u32, grid_y: u32, grid_z: u32, block_x: u32, block_y: u32, block_z: u32,
            dynamic_shared: u32, stream: Handle, params: *const *const u8
        );
    }
    graph {
        cuGraphInstantiateWithParams_ptsz = cuGraphInstantiateWithParams(
            to: *mut Handle, graph: Handle, params: *mut InstantiateParams
        );
        cuGraphUpload_ptsz = cuGraphUpload(executable: Handle, stream_handle: Handle);
        cuGraphLaunch_ptsz = cuGraphLaunch(executable: Handle, stream_handle: Handle);
    }
    pool {
        cuMemAllocAsync_ptsz = cuMemAllocAsync(to: *mut u64, bytes: usize, handle: Handle);
        cuMemFreeAsync_ptsz = cuMemFreeAsync(addr: u64, handle: Handle);
        cuMemAllocFromPoolAsync_ptsz = cuMemAllocFromPoolAsync(to: *mut u64, bytes: usize, pool: Handle, handle: Handle);
    }
}
