//! `cuGetProcAddress`: entry points by name and CUDA version.

use std::ffi::{CStr, c_char, c_void};

use super::status::{CUresult, Outcome};
use super::tensormap;
use super::{absent, capture_info, per_thread};
use super::{
    api, capture, context, copy, event, export_table, function, graph, graph_nodes, init, launch, managed, memory,
    module, occupancy, out,
};
use super::{library, link, memops, peer, pitched, pool, registered, share, status, stream};

/// Name without version suffix, the CUDA version (1000 * major + 10 * minor) from which that name means this entry point,
/// and the entry point.
struct Entry(&'static str, i32, *const c_void);

// SAFETY: addresses of functions.
unsafe impl Sync for Entry {}

macro_rules! entries {
    ($($module:ident { $($name:literal $since:literal $symbol:ident,)* })*) => {
        static ENTRIES: &[Entry] = &[
            Entry("cuGetProcAddress", 11030, cuGetProcAddress as *const c_void),
            Entry("cuGetProcAddress", 12000, cuGetProcAddress_v2 as *const c_void),
            $($(Entry($name, $since, $module::$symbol as *const c_void),)*)*
        ];
    };
}

entries! {
    status {
        "cuGetErrorName" 2000 cuGetErrorName,
        "cuGetErrorString" 2000 cuGetErrorString,
    }
    init {
        "cuInit" 2000 cuInit,
        "cuDriverGetVersion" 2000 cuDriverGetVersion,
        "cuDeviceGet" 2000 cuDeviceGet,
        "cuDeviceGetCount" 2000 cuDeviceGetCount,
        "cuDeviceGetName" 2000 cuDeviceGetName,
        "cuDeviceGetUuid" 2000 cuDeviceGetUuid,
        "cuDeviceGetUuid" 11040 cuDeviceGetUuid_v2,
        "cuDeviceTotalMem" 3020 cuDeviceTotalMem_v2,
        "cuDeviceGetAttribute" 2000 cuDeviceGetAttribute,
        "cuDeviceComputeCapability" 2000 cuDeviceComputeCapability,
        "cuDeviceGetPCIBusId" 4010 cuDeviceGetPCIBusId,
        "cuDeviceGetByPCIBusId" 4010 cuDeviceGetByPCIBusId,
        "cuProfilerStart" 2000 cuProfilerStart,
        "cuProfilerStop" 2000 cuProfilerStop,
    }
    peer {
        "cuDeviceCanAccessPeer" 4000 cuDeviceCanAccessPeer,
        "cuDeviceGetP2PAttribute" 8000 cuDeviceGetP2PAttribute,
        "cuCtxEnablePeerAccess" 4000 cuCtxEnablePeerAccess,
        "cuCtxDisablePeerAccess" 4000 cuCtxDisablePeerAccess,
    }
    link {
        "cuLinkCreate" 6050 cuLinkCreate_v2,
        "cuLinkAddData" 6050 cuLinkAddData_v2,
        "cuLinkAddFile" 6050 cuLinkAddFile_v2,
        "cuLinkComplete" 5050 cuLinkComplete,
        "cuLinkDestroy" 5050 cuLinkDestroy,
    }
    library {
        "cuLibraryLoadData" 12000 cuLibraryLoadData,
        "cuLibraryLoadFromFile" 12000 cuLibraryLoadFromFile,
        "cuLibraryUnload" 12000 cuLibraryUnload,
        "cuLibraryGetKernel" 12000 cuLibraryGetKernel,
        "cuLibraryGetKernelCount" 12040 cuLibraryGetKernelCount,
        "cuLibraryEnumerateKernels" 12040 cuLibraryEnumerateKernels,
        "cuLibraryGetModule" 12000 cuLibraryGetModule,
        "cuLibraryGetGlobal" 12000 cuLibraryGetGlobal,
        "cuLibraryGetManaged" 12000 cuLibraryGetManaged,
        "cuKernelGetFunction" 12000 cuKernelGetFunction,
        "cuKernelGetLibrary" 12050 cuKernelGetLibrary,
        "cuKernelGetName" 12030 cuKernelGetName,
        "cuKernelGetAttribute" 12000 cuKernelGetAttribute,
        "cuKernelSetAttribute" 12000 cuKernelSetAttribute,
        "cuKernelSetCacheConfig" 12000 cuKernelSetCacheConfig,
        "cuKernelGetParamInfo" 12040 cuKernelGetParamInfo,
    }
    memops {
        "cuStreamWaitValue32" 8000 cuStreamWaitValue32_v2,
        "cuStreamWaitValue64" 9000 cuStreamWaitValue64_v2,
        "cuStreamWriteValue32" 8000 cuStreamWriteValue32_v2,
        "cuStreamWriteValue64" 9000 cuStreamWriteValue64_v2,
    }
    pitched {
        "cuMemcpy2D" 3020 cuMemcpy2D_v2,
        "cuMemcpy2DUnaligned" 3020 cuMemcpy2DUnaligned_v2,
        "cuMemcpy2DAsync" 3020 cuMemcpy2DAsync_v2,
        "cuMemcpy3D" 3020 cuMemcpy3D_v2,
        "cuMemcpy3DAsync" 3020 cuMemcpy3DAsync_v2,
        "cuMemcpy3DPeer" 4000 cuMemcpy3DPeer,
        "cuMemcpy3DPeerAsync" 4000 cuMemcpy3DPeerAsync,
        "cuMemsetD2D8" 3020 cuMemsetD2D8_v2,
        "cuMemsetD2D8Async" 3020 cuMemsetD2D8Async,
        "cuMemsetD2D16" 3020 cuMemsetD2D16_v2,
        "cuMemsetD2D16Async" 3020 cuMemsetD2D16Async,
        "cuMemsetD2D32" 3020 cuMemsetD2D32_v2,
        "cuMemsetD2D32Async" 3020 cuMemsetD2D32Async,
        "cuMemAllocPitch" 3020 cuMemAllocPitch_v2,
    }
    registered {
        "cuMemHostRegister" 6050 cuMemHostRegister_v2,
        "cuMemHostUnregister" 4000 cuMemHostUnregister,
        "cuMemHostGetFlags" 2030 cuMemHostGetFlags,
    }
    context {
        "cuDevicePrimaryCtxRetain" 2000 cuDevicePrimaryCtxRetain,
        "cuDevicePrimaryCtxRelease" 11000 cuDevicePrimaryCtxRelease_v2,
        "cuDevicePrimaryCtxReset" 11000 cuDevicePrimaryCtxReset_v2,
        "cuDevicePrimaryCtxGetState" 2000 cuDevicePrimaryCtxGetState,
        "cuDevicePrimaryCtxSetFlags" 11000 cuDevicePrimaryCtxSetFlags_v2,
        "cuCtxCreate" 3020 cuCtxCreate_v2,
        "cuCtxCreate" 11040 cuCtxCreate_v3,
        "cuCtxCreate" 12050 cuCtxCreate_v4,
        "cuCtxDestroy" 4000 cuCtxDestroy_v2,
        "cuCtxGetCurrent" 2000 cuCtxGetCurrent,
        "cuCtxSetCurrent" 2000 cuCtxSetCurrent,
        "cuCtxPushCurrent" 4000 cuCtxPushCurrent_v2,
        "cuCtxPopCurrent" 4000 cuCtxPopCurrent_v2,
        "cuCtxGetDevice" 2000 cuCtxGetDevice,
        "cuCtxGetApiVersion" 2000 cuCtxGetApiVersion,
        "cuCtxGetFlags" 2000 cuCtxGetFlags,
        "cuCtxSetFlags" 2000 cuCtxSetFlags,
        "cuCtxSynchronize" 2000 cuCtxSynchronize,
        "cuCtxSynchronize" 13000 cuCtxSynchronize_v2,
        "cuCtxGetDevice" 13000 cuCtxGetDevice_v2,
        "cuCtxGetId" 12000 cuCtxGetId,
        "cuCtxGetStreamPriorityRange" 2000 cuCtxGetStreamPriorityRange,
        "cuCtxGetLimit" 2000 cuCtxGetLimit,
        "cuCtxSetLimit" 2000 cuCtxSetLimit,
        "cuCtxGetCacheConfig" 2000 cuCtxGetCacheConfig,
        "cuCtxSetCacheConfig" 2000 cuCtxSetCacheConfig,
    }
    share {
        "cuCtxGetDevResource" 12040 cuCtxGetDevResource,
        "cuCtxGetExecAffinity" 11040 cuCtxGetExecAffinity,
    }
    stream {
        "cuStreamCreate" 2000 cuStreamCreate,
        "cuStreamCreateWithPriority" 2000 cuStreamCreateWithPriority,
        "cuStreamDestroy" 4000 cuStreamDestroy_v2,
        "cuStreamSynchronize" 2000 cuStreamSynchronize,
        "cuStreamQuery" 2000 cuStreamQuery,
        "cuStreamWaitEvent" 2000 cuStreamWaitEvent,
        "cuStreamGetCtx" 2000 cuStreamGetCtx,
        "cuStreamGetFlags" 2000 cuStreamGetFlags,
        "cuStreamGetPriority" 2000 cuStreamGetPriority,
        "cuStreamGetDevice" 2000 cuStreamGetDevice,
        "cuStreamGetId" 2000 cuStreamGetId,
        "cuLaunchHostFunc" 2000 cuLaunchHostFunc,
        "cuStreamAddCallback" 5000 cuStreamAddCallback,
        "cuStreamIsCapturing" 2000 cuStreamIsCapturing,
    }
    capture {
        "cuStreamBeginCapture" 10010 cuStreamBeginCapture_v2,
        "cuStreamEndCapture" 2000 cuStreamEndCapture,
        "cuThreadExchangeStreamCaptureMode" 2000 cuThreadExchangeStreamCaptureMode,
    }
    capture_info {
        "cuStreamGetCaptureInfo" 10010 cuStreamGetCaptureInfo,
        "cuStreamGetCaptureInfo" 11030 cuStreamGetCaptureInfo_v2,
        "cuStreamGetCaptureInfo" 12030 cuStreamGetCaptureInfo_v3,
        "cuStreamUpdateCaptureDependencies" 11030 cuStreamUpdateCaptureDependencies,
        "cuStreamUpdateCaptureDependencies" 12030 cuStreamUpdateCaptureDependencies_v2,
    }
    event {
        "cuEventCreate" 2000 cuEventCreate,
        "cuEventDestroy" 4000 cuEventDestroy_v2,
        "cuEventRecord" 2000 cuEventRecord,
        "cuEventRecordWithFlags" 2000 cuEventRecordWithFlags,
        "cuEventQuery" 2000 cuEventQuery,
        "cuEventSynchronize" 2000 cuEventSynchronize,
        "cuEventElapsedTime" 2000 cuEventElapsedTime,
        "cuEventElapsedTime" 12080 cuEventElapsedTime_v2,
    }
    export_table {
        "cuGetExportTable" 3000 cuGetExportTable,
    }
    memory {
        "cuMemAlloc" 3020 cuMemAlloc_v2,
        "cuMemFree" 3020 cuMemFree_v2,
        "cuMemHostAlloc" 2020 cuMemHostAlloc,
        "cuMemAllocHost" 3020 cuMemAllocHost_v2,
        "cuMemFreeHost" 2000 cuMemFreeHost,
        "cuMemHostGetDevicePointer" 3020 cuMemHostGetDevicePointer_v2,
        "cuMemGetInfo" 3020 cuMemGetInfo_v2,
        "cuMemGetAddressRange" 3020 cuMemGetAddressRange_v2,
        "cuPointerGetAttribute" 2000 cuPointerGetAttribute,
        "cuPointerGetAttributes" 7000 cuPointerGetAttributes,
    }
    pool {
        "cuMemAllocAsync" 2000 cuMemAllocAsync,
        "cuMemAllocFromPoolAsync" 2000 cuMemAllocFromPoolAsync,
        "cuMemFreeAsync" 2000 cuMemFreeAsync,
        "cuDeviceGetDefaultMemPool" 2000 cuDeviceGetDefaultMemPool,
        "cuDeviceGetMemPool" 2000 cuDeviceGetMemPool,
        "cuDeviceSetMemPool" 2000 cuDeviceSetMemPool,
        "cuMemPoolCreate" 2000 cuMemPoolCreate,
        "cuMemPoolDestroy" 2000 cuMemPoolDestroy,
        "cuMemPoolTrimTo" 2000 cuMemPoolTrimTo,
        "cuMemPoolGetAttribute" 2000 cuMemPoolGetAttribute,
        "cuMemPoolSetAttribute" 2000 cuMemPoolSetAttribute,
    }
    managed {
        "cuMemAllocManaged" 2000 cuMemAllocManaged,
        "cuMemAdvise" 8000 cuMemAdvise,
        "cuMemPrefetchAsync" 8000 cuMemPrefetchAsync,
        "cuMemAdvise" 12020 cuMemAdvise_v2,
        "cuMemPrefetchAsync" 12020 cuMemPrefetchAsync_v2,
        "cuStreamAttachMemAsync" 2000 cuStreamAttachMemAsync,
    }
    copy {
        "cuMemcpyPeer" 4000 cuMemcpyPeer,
        "cuMemcpyPeerAsync" 4000 cuMemcpyPeerAsync,
        "cuMemcpyHtoD" 3020 cuMemcpyHtoD_v2,
        "cuMemcpyHtoDAsync" 3020 cuMemcpyHtoDAsync_v2,
        "cuMemcpyDtoH" 3020 cuMemcpyDtoH_v2,
        "cuMemcpyDtoHAsync" 3020 cuMemcpyDtoHAsync_v2,
        "cuMemcpyDtoD" 3020 cuMemcpyDtoD_v2,
        "cuMemcpyDtoDAsync" 3020 cuMemcpyDtoDAsync_v2,
        "cuMemcpy" 2000 cuMemcpy,
        "cuMemcpyAsync" 2000 cuMemcpyAsync,
        "cuMemsetD8" 3020 cuMemsetD8_v2,
        "cuMemsetD8Async" 2000 cuMemsetD8Async,
        "cuMemsetD16" 3020 cuMemsetD16_v2,
        "cuMemsetD16Async" 2000 cuMemsetD16Async,
        "cuMemsetD32" 3020 cuMemsetD32_v2,
        "cuMemsetD32Async" 2000 cuMemsetD32Async,
    }
    module {
        "cuModuleLoadData" 2000 cuModuleLoadData,
        "cuModuleLoadDataEx" 2000 cuModuleLoadDataEx,
        "cuModuleLoad" 2000 cuModuleLoad,
        "cuModuleUnload" 2000 cuModuleUnload,
        "cuModuleGetFunction" 2000 cuModuleGetFunction,
        "cuModuleLoadFatBinary" 2000 cuModuleLoadFatBinary,
        "cuModuleEnumerateFunctions" 12040 cuModuleEnumerateFunctions,
        "cuModuleGetFunctionCount" 2000 cuModuleGetFunctionCount,
        "cuModuleGetGlobal" 3020 cuModuleGetGlobal_v2,
        "cuModuleGetLoadingMode" 2000 cuModuleGetLoadingMode,
    }
    function {
        "cuFuncGetAttribute" 2000 cuFuncGetAttribute,
        "cuFuncSetAttribute" 2000 cuFuncSetAttribute,
        "cuFuncSetCacheConfig" 2000 cuFuncSetCacheConfig,
        "cuFuncGetName" 2000 cuFuncGetName,
        "cuFuncGetModule" 2000 cuFuncGetModule,
        "cuFuncGetParamCount" 13020 cuFuncGetParamCount,
        "cuFuncLoad" 12040 cuFuncLoad,
        "cuFuncIsLoaded" 12040 cuFuncIsLoaded,
        "cuFuncGetParamInfo" 2000 cuFuncGetParamInfo,
    }
    occupancy {
        "cuOccupancyMaxActiveBlocksPerMultiprocessor" 2000 cuOccupancyMaxActiveBlocksPerMultiprocessor,
        "cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags" 2000 cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags,
        "cuOccupancyAvailableDynamicSMemPerBlock" 2000 cuOccupancyAvailableDynamicSMemPerBlock,
        "cuOccupancyMaxPotentialBlockSize" 2000 cuOccupancyMaxPotentialBlockSize,
        "cuOccupancyMaxPotentialBlockSizeWithFlags" 2000 cuOccupancyMaxPotentialBlockSizeWithFlags,
        "cuOccupancyMaxPotentialClusterSize" 2000 cuOccupancyMaxPotentialClusterSize,
        "cuOccupancyMaxActiveClusters" 2000 cuOccupancyMaxActiveClusters,
    }
    tensormap {
        "cuTensorMapEncodeTiled" 12000 cuTensorMapEncodeTiled,
        "cuTensorMapReplaceAddress" 12000 cuTensorMapReplaceAddress,
        "cuTensorMapEncodeIm2col" 12000 cuTensorMapEncodeIm2col,
        "cuTensorMapEncodeIm2colWide" 12080 cuTensorMapEncodeIm2colWide,
    }
    launch {
        "cuLaunchKernel" 2000 cuLaunchKernel,
        "cuLaunchCooperativeKernel" 2000 cuLaunchCooperativeKernel,
        "cuLaunchKernelEx" 2000 cuLaunchKernelEx,
    }
    graph {
        "cuGraphInstantiateWithFlags" 11040 cuGraphInstantiateWithFlags,
        "cuGraphInstantiate" 12000 cuGraphInstantiateWithFlags,
        "cuGraphInstantiateWithParams" 12000 cuGraphInstantiateWithParams,
        "cuGraphExecGetFlags" 12000 cuGraphExecGetFlags,
        "cuGraphExecUpdate" 12000 cuGraphExecUpdate_v2,
        "cuGraphLaunch" 10000 cuGraphLaunch,
        "cuGraphUpload" 11010 cuGraphUpload,
        "cuGraphDestroy" 10000 cuGraphDestroy,
        "cuGraphExecDestroy" 10000 cuGraphExecDestroy,
    }
    graph_nodes {
        "cuGraphCreate" 10000 cuGraphCreate,
        "cuGraphClone" 10000 cuGraphClone,
        "cuGraphNodeFindInClone" 10000 cuGraphNodeFindInClone,
        "cuGraphAddKernelNode" 12000 cuGraphAddKernelNode_v2,
        "cuGraphAddMemcpyNode" 10000 cuGraphAddMemcpyNode,
        "cuGraphAddMemsetNode" 10000 cuGraphAddMemsetNode,
        "cuGraphAddHostNode" 10000 cuGraphAddHostNode,
        "cuGraphAddEmptyNode" 10000 cuGraphAddEmptyNode,
        "cuGraphAddChildGraphNode" 10000 cuGraphAddChildGraphNode,
        "cuGraphAddEventRecordNode" 11010 cuGraphAddEventRecordNode,
        "cuGraphAddEventWaitNode" 11010 cuGraphAddEventWaitNode,
        "cuGraphDestroyNode" 10000 cuGraphDestroyNode,
        "cuGraphAddDependencies" 10000 cuGraphAddDependencies,
        "cuGraphRemoveDependencies" 10000 cuGraphRemoveDependencies,
        "cuGraphAddDependencies" 12030 cuGraphAddDependencies_v2,
        "cuGraphRemoveDependencies" 12030 cuGraphRemoveDependencies_v2,
        "cuGraphGetEdges" 12030 cuGraphGetEdges_v2,
        "cuGraphNodeGetDependencies" 12030 cuGraphNodeGetDependencies_v2,
        "cuGraphNodeGetDependentNodes" 12030 cuGraphNodeGetDependentNodes_v2,
        "cuGraphGetNodes" 10000 cuGraphGetNodes,
        "cuGraphGetRootNodes" 10000 cuGraphGetRootNodes,
        "cuGraphGetEdges" 10000 cuGraphGetEdges,
        "cuGraphNodeGetDependencies" 10000 cuGraphNodeGetDependencies,
        "cuGraphNodeGetDependentNodes" 10000 cuGraphNodeGetDependentNodes,
        "cuGraphNodeGetType" 10000 cuGraphNodeGetType,
        "cuGraphKernelNodeGetParams" 12000 cuGraphKernelNodeGetParams_v2,
        "cuGraphKernelNodeSetParams" 12000 cuGraphKernelNodeSetParams_v2,
        "cuGraphMemcpyNodeSetParams" 10000 cuGraphMemcpyNodeSetParams,
        "cuGraphMemsetNodeSetParams" 10000 cuGraphMemsetNodeSetParams,
        "cuGraphHostNodeSetParams" 10000 cuGraphHostNodeSetParams,
        "cuGraphExecKernelNodeSetParams" 12000 cuGraphExecKernelNodeSetParams_v2,
        "cuGraphExecMemcpyNodeSetParams" 10020 cuGraphExecMemcpyNodeSetParams,
        "cuGraphExecMemsetNodeSetParams" 10020 cuGraphExecMemsetNodeSetParams,
        "cuGraphExecHostNodeSetParams" 10020 cuGraphExecHostNodeSetParams,
        "cuGraphNodeSetEnabled" 11060 cuGraphNodeSetEnabled,
        "cuGraphNodeGetEnabled" 11060 cuGraphNodeGetEnabled,
    }
}

/// `CU_GET_PROC_ADDRESS_SUCCESS`, `_SYMBOL_NOT_FOUND`, `_VERSION_NOT_SUFFICIENT`
const FOUND: u32 = 0;
const NOT_FOUND: u32 = 1;
const TOO_OLD: u32 = 2;

unsafe fn look_up(symbol: *const c_char, to: *mut *const c_void, version: i32, flags: u64) -> Outcome<u32> {
    if symbol.is_null() {
        return Err(CUresult::ERROR_INVALID_VALUE.with("`symbol` is null"));
    }
    // CU_GET_PROC_ADDRESS_LEGACY_STREAM, CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM
    if flags > 2 {
        return Err(super::unsupported(format!("cuGetProcAddress with flags {flags:#x}")));
    }
    // SAFETY: a NUL-terminated name, by the API's contract.
    let symbol = unsafe { CStr::from_ptr(symbol) }.to_string_lossy();
    let named = ENTRIES.iter().filter(|entry| entry.0 == symbol);
    let found = named.clone().filter(|entry| entry.1 <= version).max_by_key(|entry| entry.1);
    let known = named.clone().next().is_some();
    let found = found.map(|entry| entry.2).or_else(|| if known { None } else { absent::find(&symbol) });
    let found = found.map(|plain| if flags == 2 { per_thread::form_of(plain) } else { plain });
    unsafe { out(to, "pfn", found.unwrap_or(std::ptr::null()))? };
    Ok(match found {
        Some(_) => FOUND,
        None if known => TOO_OLD,
        None => NOT_FOUND,
    })
}

/// # Safety
/// The name that [`look_up`] has taken.
unsafe fn outcome(status: u32, symbol: *const c_char) -> Outcome {
    if status == FOUND {
        return Ok(());
    }
    // SAFETY: by the contract above.
    let symbol = unsafe { CStr::from_ptr(symbol) }.to_string_lossy();
    let what = if status == TOO_OLD { "in that version" } else { "at all" };
    Err(CUresult::ERROR_NOT_FOUND.with(format!("softcuda has no {symbol} {what}")))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetProcAddress(
    symbol: *const c_char,
    to: *mut *const c_void,
    version: i32,
    flags: u64,
) -> CUresult {
    api("cuGetProcAddress", || unsafe { outcome(look_up(symbol, to, version, flags)?, symbol) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetProcAddress_v2(
    symbol: *const c_char,
    to: *mut *const c_void,
    version: i32,
    flags: u64,
    status: *mut u32,
) -> CUresult {
    api("cuGetProcAddress_v2", || {
        let found = unsafe { look_up(symbol, to, version, flags)? };
        if !status.is_null() {
            unsafe { out(status, "symbolStatus", found)? };
        }
        unsafe { outcome(found, symbol) }
    })
}
