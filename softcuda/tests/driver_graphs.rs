//! Graphs made node by node, changed and updated.

mod common;

use std::ffi::{CString, c_void};
use std::mem::zeroed;
use std::ptr::{null, null_mut};

use common::{device, says, status};
use cudarc::driver::result;
use cudarc::driver::sys::{self, CUgraph, CUgraphExec, CUgraphNode, CUresult};

/// `at[0] = at[0] * factor + 1`.
const STEP: &str = ".version 7.0\n.target sm_80\n.address_size 64
.visible .entry step(.param .u64 at, .param .u32 factor) {
    .reg .b32 %r<3>; .reg .b64 %d<2>;
    ld.param.u64 %d1, [at]; ld.param.u32 %r1, [factor];
    ld.global.u32 %r2, [%d1]; mad.lo.u32 %r2, %r2, %r1, 1; st.global.u32 [%d1], %r2; ret;
}";

fn step() -> sys::CUfunction {
    let text = CString::new(STEP).unwrap();
    unsafe {
        let module = result::module::load_data(text.as_ptr().cast()).unwrap();
        result::module::get_function(module, c"step".to_owned()).unwrap()
    }
}

fn value(addr: u64) -> u32 {
    let mut got = [0u32];
    unsafe { result::memcpy_dtoh_sync(&mut got, addr) }.unwrap();
    got[0]
}

/// Adds a node that sets `at[0]`.
fn set_node(graph: CUgraph, after: &[CUgraphNode], at: u64, value: u32) -> CUgraphNode {
    let mut node = null_mut();
    let params = set_params(at, value);
    unsafe { sys::cuGraphAddMemsetNode(&mut node, graph, after.as_ptr(), after.len(), &params, null_mut()) }
        .result()
        .unwrap();
    node
}

fn set_params(at: u64, value: u32) -> sys::CUDA_MEMSET_NODE_PARAMS {
    sys::CUDA_MEMSET_NODE_PARAMS { dst: at, pitch: 0, value, elementSize: 4, width: 1, height: 1 }
}

/// What a kernel node of `step` takes, for as long as `at` and `factor` stay where they are.
fn step_params(function: sys::CUfunction, params: &mut [*mut c_void; 2]) -> sys::CUDA_KERNEL_NODE_PARAMS {
    let mut node: sys::CUDA_KERNEL_NODE_PARAMS = unsafe { zeroed() };
    node.func = function;
    (node.gridDimX, node.gridDimY, node.gridDimZ) = (1, 1, 1);
    (node.blockDimX, node.blockDimY, node.blockDimZ) = (1, 1, 1);
    node.kernelParams = params.as_mut_ptr();
    node
}

fn step_node(graph: CUgraph, after: &[CUgraphNode], function: sys::CUfunction, at: u64, factor: u32) -> CUgraphNode {
    let mut node = null_mut();
    let mut params = [(&raw const at) as *mut c_void, (&raw const factor) as *mut c_void];
    let params = step_params(function, &mut params);
    unsafe { sys::cuGraphAddKernelNode_v2(&mut node, graph, after.as_ptr(), after.len(), &params) }.result().unwrap();
    node
}

fn graph() -> CUgraph {
    let mut graph = null_mut();
    unsafe { sys::cuGraphCreate(&mut graph, 0) }.result().unwrap();
    graph
}

fn instantiate(graph: CUgraph) -> CUgraphExec {
    let mut executable = null_mut();
    unsafe { sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0) }.result().unwrap();
    executable
}

fn launch(executable: CUgraphExec) {
    unsafe {
        sys::cuGraphLaunch(executable, null_mut()).result().unwrap();
        sys::cuCtxSynchronize().result().unwrap();
    }
}

#[test]
fn nodes_run_in_the_order_of_their_edges_under_every_seed() {
    let (installed, context, _turn) = device();
    context.bind_to_thread().unwrap();
    let addr = unsafe { result::malloc_sync(8) }.unwrap();
    let function = step();
    let graph = graph();
    // Made last to first: only the edges say what comes first.
    let last = step_node(graph, &[], function, addr, 10);
    let middle = step_node(graph, &[], function, addr, 2);
    let first = set_node(graph, &[], addr, 3);
    let (from, to) = ([first, middle], [middle, last]);
    unsafe { sys::cuGraphAddDependencies(graph, from.as_ptr(), to.as_ptr(), 2) }.result().unwrap();
    let executable = instantiate(graph);
    for seed in 0..20 {
        installed.control().set_seed(seed);
        launch(executable);
        assert_eq!(value(addr), 71, "seed {seed}");
    }
    // Without the edge between the kernels either order is right, and some seed shows each.
    unsafe { sys::cuGraphRemoveDependencies(graph, &middle, &last, 1) }.result().unwrap();
    unsafe { sys::cuGraphAddDependencies(graph, &first, &last, 1) }.result().unwrap();
    let looser = instantiate(graph);
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..20 {
        installed.control().set_seed(seed);
        launch(looser);
        seen.insert(value(addr));
    }
    assert_eq!(seen, [63, 71].into());
    installed.control().set_seed(0);
    // A cycle cannot be instantiated.
    unsafe { sys::cuGraphAddDependencies(graph, &last, &first, 1) }.result().unwrap();
    let mut none = null_mut();
    says(&status(unsafe { sys::cuGraphInstantiateWithFlags(&mut none, graph, 0) }).1, &["cycle"]);
    let again = unsafe { sys::cuGraphAddDependencies(graph, &last, &first, 1) };
    assert_eq!(again, CUresult::CUDA_ERROR_INVALID_VALUE);
    unsafe { result::free_sync(addr) }.unwrap();
}

#[test]
fn parameters_change_in_the_graph_and_in_the_executable() {
    let (_, context, _turn) = device();
    context.bind_to_thread().unwrap();
    let addr = unsafe { result::malloc_sync(8) }.unwrap();
    let function = step();
    let graph = graph();
    let set = set_node(graph, &[], addr, 3);
    let kernel = step_node(graph, &[set], function, addr, 2);
    let executable = instantiate(graph);
    launch(executable);
    assert_eq!(value(addr), 7);
    // In the executable only.
    unsafe {
        sys::cuGraphExecMemsetNodeSetParams(executable, set, &set_params(addr, 4), null_mut()).result().unwrap();
        let (at, factor) = (addr, 5u32);
        let mut params = [(&raw const at) as *mut c_void, (&raw const factor) as *mut c_void];
        let params = step_params(function, &mut params);
        sys::cuGraphExecKernelNodeSetParams_v2(executable, kernel, &params).result().unwrap();
        launch(executable);
        assert_eq!(value(addr), 21);
        launch(instantiate(graph));
        assert_eq!(value(addr), 7);
        // What the node says of itself.
        let mut got: sys::CUDA_KERNEL_NODE_PARAMS = zeroed();
        sys::cuGraphKernelNodeGetParams_v2(kernel, &mut got).result().unwrap();
        assert_eq!((got.func, got.gridDimX, got.blockDimZ), (function, 1, 1));
        assert_eq!(**got.kernelParams.add(1).cast::<*const u32>(), 2);
        // And back again, into the graph.
        sys::cuGraphKernelNodeSetParams_v2(kernel, &params).result().unwrap();
        launch(instantiate(graph));
        assert_eq!(value(addr), 16);
        // A node does not change its type, and is of its own graph.
        let wrong = sys::cuGraphMemsetNodeSetParams(kernel, &set_params(addr, 4));
        says(&status(wrong).1, &["a node of type 0 cannot take parameters of type 2"]);
        // Left out, and in again.
        sys::cuGraphNodeSetEnabled(executable, kernel, 0).result().unwrap();
        launch(executable);
        assert_eq!(value(addr), 4);
        sys::cuGraphNodeSetEnabled(executable, kernel, 1).result().unwrap();
        launch(executable);
        assert_eq!(value(addr), 21);
        result::free_sync(addr).unwrap();
    }
}

#[test]
fn executables_are_updated_from_graphs_of_the_same_form() {
    let (_, context, _turn) = device();
    context.bind_to_thread().unwrap();
    let addr = unsafe { result::malloc_sync(8) }.unwrap();
    let function = step();
    let of = |start: u32, factor: u32, linked: bool| {
        let graph = graph();
        let set = set_node(graph, &[], addr, start);
        step_node(graph, if linked { std::slice::from_ref(&set) } else { &[] }, function, addr, factor);
        graph
    };
    let executable = instantiate(of(1, 1, true));
    let update = |graph| unsafe {
        let mut result: sys::CUgraphExecUpdateResultInfo = zeroed();
        let code = sys::cuGraphExecUpdate_v2(executable, graph, &mut result);
        (code, result.result)
    };
    use sys::CUgraphExecUpdateResult::*;
    assert_eq!(update(of(9, 10, true)), (CUresult::CUDA_SUCCESS, CU_GRAPH_EXEC_UPDATE_SUCCESS));
    launch(executable);
    assert_eq!(value(addr), 91);
    let changed = (CUresult::CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE, CU_GRAPH_EXEC_UPDATE_ERROR_TOPOLOGY_CHANGED);
    assert_eq!(update(of(9, 10, false)), changed);
    let other = graph();
    let set = set_node(other, &[], addr, 1);
    set_node(other, &[set], addr, 2);
    let changed = (CUresult::CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE, CU_GRAPH_EXEC_UPDATE_ERROR_NODE_TYPE_CHANGED);
    assert_eq!(update(other), changed);
    launch(executable);
    assert_eq!(value(addr), 91, "a refused update changed something");
    unsafe { result::free_sync(addr) }.unwrap();
}

#[test]
fn children_copies_events_and_host_functions() {
    unsafe extern "C" fn double(data: *mut c_void) {
        unsafe { *data.cast::<u32>() *= 2 };
    }
    let (_, context, _turn) = device();
    context.bind_to_thread().unwrap();
    let addr = unsafe { result::malloc_sync(8) }.unwrap();
    let pinned = unsafe { result::malloc_host(8, 0) }.unwrap().cast::<u32>();
    let child = graph();
    set_node(child, &[], addr, 21);
    let parent = graph();
    let (mut embedded, mut copy, mut host, mut record, mut empty) =
        (null_mut(), null_mut(), null_mut(), null_mut(), null_mut());
    let event = context.new_event(None).unwrap();
    unsafe {
        sys::cuGraphAddChildGraphNode(&mut embedded, parent, null(), 0, child).result().unwrap();
        // No member of the enumeration is zero.
        let mut params = std::mem::MaybeUninit::<sys::CUDA_MEMCPY3D>::zeroed();
        (*params.as_mut_ptr()).srcMemoryType = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
        (*params.as_mut_ptr()).dstMemoryType = sys::CUmemorytype::CU_MEMORYTYPE_HOST;
        let mut params = params.assume_init();
        params.srcDevice = addr;
        params.dstHost = pinned.cast();
        (params.WidthInBytes, params.Height, params.Depth) = (4, 1, 1);
        let added = sys::cuGraphAddMemcpyNode(&mut copy, parent, &embedded, 1, &params, context.cu_ctx());
        added.result().unwrap();
        let params = sys::CUDA_HOST_NODE_PARAMS { fn_: Some(double), userData: pinned.cast() };
        sys::cuGraphAddHostNode(&mut host, parent, &copy, 1, &params).result().unwrap();
        sys::cuGraphAddEventRecordNode(&mut record, parent, &host, 1, event.cu_event()).result().unwrap();
        sys::cuGraphAddEmptyNode(&mut empty, parent, &record, 1).result().unwrap();
    }
    // The child was copied: what becomes of it does not matter.
    unsafe { sys::cuGraphDestroy(child) }.result().unwrap();
    launch(instantiate(parent));
    assert_eq!(unsafe { *pinned }, 42);
    assert!(event.is_complete());
    // A clone has the same nodes under other handles.
    let mut clone = null_mut();
    let mut found = null_mut();
    let (mut count, mut kind) = (0, sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY);
    unsafe {
        sys::cuGraphClone(&mut clone, parent).result().unwrap();
        sys::cuGraphNodeFindInClone(&mut found, host, clone).result().unwrap();
        assert_ne!(found, host);
        sys::cuGraphNodeGetType(found, &mut kind).result().unwrap();
        assert_eq!(kind, sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_HOST);
        sys::cuGraphGetRootNodes(clone, null_mut(), &mut count).result().unwrap();
        assert_eq!(count, 1);
        // Without its node the rest of the chain falls apart.
        sys::cuGraphDestroyNode(found).result().unwrap();
        sys::cuGraphGetNodes(clone, null_mut(), &mut count).result().unwrap();
        assert_eq!(count, 4);
        sys::cuGraphGetRootNodes(clone, null_mut(), &mut count).result().unwrap();
        assert_eq!(count, 2);
        assert_ne!(sys::cuGraphNodeGetType(found, &mut kind), CUresult::CUDA_SUCCESS);
        result::free_host(pinned.cast()).unwrap();
        result::free_sync(addr).unwrap();
    }
}

#[test]
fn a_launch_is_captured_as_a_child() {
    let (_, context, _turn) = device();
    context.bind_to_thread().unwrap();
    let stream = context.new_stream().unwrap();
    let addr = unsafe { result::malloc_sync(8) }.unwrap();
    let inner = graph();
    set_node(inner, &[], addr, 5);
    let inner = instantiate(inner);
    unsafe { result::memset_d8_sync(addr, 0, 8) }.unwrap();
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    let mut outer = null_mut();
    unsafe {
        sys::cuStreamBeginCapture_v2(stream.cu_stream(), mode).result().unwrap();
        sys::cuGraphLaunch(inner, stream.cu_stream()).result().unwrap();
        sys::cuStreamEndCapture(stream.cu_stream(), &mut outer).result().unwrap();
    }
    assert_eq!(value(addr), 0, "captured work ran");
    launch(instantiate(outer));
    assert_eq!(value(addr), 5);
    unsafe { result::free_sync(addr) }.unwrap();
}
