//! Nodes of graphs, one by one: what makes them, what is known of them, and how they change.

use std::sync::Arc;

use super::event::event;
use super::graph::{EXECUTABLES, Entry, Executable, GRAPHS, Graph, NODES, add};
use super::handles::{Handle, fresh};
use super::launch::{self, KernelParams};
use super::pitched::{self, Copy3D};
use super::status::{CUresult, Outcome};
use super::work::Op;
use super::{api, driver, lock, out};

/// # Safety
/// `count` handles, or null where there are none.
pub(super) unsafe fn handles(from: *const Handle, count: usize) -> Outcome<Vec<Handle>> {
    if count > 0 && from.is_null() {
        return Err(CUresult::ERROR_INVALID_VALUE.with("nodes are counted but not given"));
    }
    // SAFETY: by the contract above; C callers may pass addresses less aligned than Rust asks for.
    Ok((0..count).map(|place| unsafe { from.add(place).read_unaligned() }).collect())
}

pub(super) fn check_members(nodes: &[Entry], wanted: &[Handle]) -> Outcome {
    match wanted.iter().find(|wanted| !nodes.iter().any(|node| node.handle == **wanted)) {
        Some(stranger) => Err(CUresult::ERROR_INVALID_VALUE.with(format!("{stranger:#x} is no node of this graph"))),
        None => Ok(()),
    }
}

/// Appends a node.
unsafe fn add_node(
    to: *mut Handle,
    graph: Handle,
    dependencies: *const Handle,
    count: usize,
    op: impl FnOnce() -> Outcome<Op>,
) -> Outcome {
    driver()?;
    let graph_object = GRAPHS.get(graph)?;
    let mut dependencies = unsafe { handles(dependencies, count)? };
    dependencies.sort_unstable();
    dependencies.dedup();
    let op = op()?;
    op.check()?;
    let handle = fresh();
    unsafe { out(to, "phGraphNode", handle)? };
    let mut nodes = lock(&graph_object.nodes);
    check_members(&nodes, &dependencies)?;
    nodes.push(Entry { handle, op: Arc::new(op), dependencies });
    NODES.insert(handle, Arc::new(graph));
    Ok(())
}

fn graph_of(node: Handle) -> Outcome<Arc<Graph>> {
    driver()?;
    GRAPHS.get(*NODES.get(node)?)
}

fn op_of(node: Handle) -> Outcome<Arc<Op>> {
    let graph = graph_of(node)?;
    let nodes = lock(&graph.nodes);
    let found = nodes.iter().find(|entry| entry.handle == node).map(|entry| entry.op.clone());
    found.ok_or_else(|| CUresult::ERROR_INVALID_VALUE.into())
}

fn check_type(old: &Op, new: &Op) -> Outcome {
    if old.node_type() == new.node_type() {
        return new.check();
    }
    let (old, new) = (old.node_type(), new.node_type());
    Err(CUresult::ERROR_INVALID_VALUE.with(format!("a node of type {old} cannot take parameters of type {new}")))
}

fn set_in_graph(node: Handle, op: Op) -> Outcome {
    let graph = graph_of(node)?;
    let mut nodes = lock(&graph.nodes);
    let entry = nodes.iter_mut().find(|entry| entry.handle == node).ok_or(CUresult::ERROR_INVALID_VALUE)?;
    check_type(&entry.op, &op)?;
    entry.op = Arc::new(op);
    Ok(())
}

fn set_in_executable(executable: Handle, node: Handle, op: Op) -> Outcome {
    driver()?;
    let executable = EXECUTABLES.get(executable)?;
    let place = executable.place(node)?;
    let mut nodes = lock(&executable.nodes);
    check_type(&nodes[place].op, &op)?;
    nodes[place].op = Arc::new(op);
    Ok(())
}

/// `CUDA_MEMSET_NODE_PARAMS`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MemsetParams {
    dst: u64,
    pitch: usize,
    value: u32,
    element: u32,
    width: usize,
    height: usize,
}

/// `CUDA_HOST_NODE_PARAMS`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HostParams {
    function: Option<unsafe extern "C" fn(*mut std::ffi::c_void)>,
    data: usize,
}

/// # Safety
/// Null or valid for a read.
unsafe fn read<T: Copy>(params: *const T) -> Outcome<T> {
    if params.is_null() {
        return Err(CUresult::ERROR_INVALID_VALUE.with("the parameters are null"));
    }
    Ok(unsafe { params.read_unaligned() })
}

unsafe fn kernel_op(params: *const KernelParams) -> Outcome<Op> {
    Ok(Op::Launch(Box::new(unsafe { launch::of_node(&read(params)?)? })))
}

unsafe fn memset_op(params: *const MemsetParams) -> Outcome<Op> {
    let MemsetParams { dst, pitch, value, element, width, height } = unsafe { read(params)? };
    if !matches!(element, 1 | 2 | 4) {
        return Err(CUresult::ERROR_INVALID_VALUE.with(format!("elements of {element} bytes; 1, 2 or 4")));
    }
    pitched::set(dst, pitch, value, element, width, height)
}

unsafe fn host_op(params: *const HostParams) -> Outcome<Op> {
    let HostParams { function, data } = unsafe { read(params)? };
    let function = function.ok_or_else(|| CUresult::ERROR_INVALID_VALUE.with("`fn` is null"))?;
    Ok(Op::Host { function, data })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphCreate(to: *mut Handle, flags: u32) -> CUresult {
    api("cuGraphCreate", || {
        driver()?;
        if flags != 0 {
            return Err(CUresult::ERROR_INVALID_VALUE.with("`flags` must be 0"));
        }
        unsafe { out(to, "phGraph", add(Vec::new())) }
    })
}

/// A copy whose nodes are new; [`cuGraphNodeFindInClone`] finds them by their place.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphClone(to: *mut Handle, original: Handle) -> CUresult {
    api("cuGraphClone", || {
        driver()?;
        let graph = GRAPHS.get(original)?;
        let mut nodes = lock(&graph.nodes).clone();
        let renamed: std::collections::HashMap<Handle, Handle> =
            nodes.iter().map(|node| (node.handle, fresh())).collect();
        for node in &mut nodes {
            node.handle = renamed[&node.handle];
            node.dependencies.iter_mut().for_each(|dependency| *dependency = renamed[dependency]);
        }
        unsafe { out(to, "phGraphClone", add(nodes)) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphNodeFindInClone(to: *mut Handle, original: Handle, clone: Handle) -> CUresult {
    api("cuGraphNodeFindInClone", || {
        let graph = graph_of(original)?;
        let place = lock(&graph.nodes).iter().position(|node| node.handle == original);
        let clone = GRAPHS.get(clone)?;
        let found = place.and_then(|place| lock(&clone.nodes).get(place).map(|node| node.handle));
        unsafe { out(to, "phNode", found.ok_or(CUresult::ERROR_INVALID_VALUE)?) }
    })
}

macro_rules! adders {
    ($($name:ident($params:ty) $op:ident;)*) => {
        $(
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(
                to: *mut Handle,
                graph: Handle,
                dependencies: *const Handle,
                count: usize,
                params: *const $params,
            ) -> CUresult {
                api(stringify!($name), || unsafe { add_node(to, graph, dependencies, count, || $op(params)) })
            }
        )*
    };
}

adders! {
    cuGraphAddKernelNode_v2(KernelParams) kernel_op;
    cuGraphAddHostNode(HostParams) host_op;
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphAddMemsetNode(
    to: *mut Handle,
    graph: Handle,
    dependencies: *const Handle,
    count: usize,
    params: *const MemsetParams,
    _context: Handle,
) -> CUresult {
    api("cuGraphAddMemsetNode", || unsafe { add_node(to, graph, dependencies, count, || memset_op(params)) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphAddMemcpyNode(
    to: *mut Handle,
    graph: Handle,
    dependencies: *const Handle,
    count: usize,
    params: *const Copy3D,
    _context: Handle,
) -> CUresult {
    api("cuGraphAddMemcpyNode", || unsafe { add_node(to, graph, dependencies, count, || pitched::op_3d(params)) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphAddEmptyNode(
    to: *mut Handle,
    graph: Handle,
    dependencies: *const Handle,
    count: usize,
) -> CUresult {
    api("cuGraphAddEmptyNode", || unsafe { add_node(to, graph, dependencies, count, || Ok(Op::Empty)) })
}

/// The child is copied: what becomes of it later is its own affair.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphAddChildGraphNode(
    to: *mut Handle,
    graph: Handle,
    dependencies: *const Handle,
    count: usize,
    child: Handle,
) -> CUresult {
    api("cuGraphAddChildGraphNode", || {
        let child = || Ok(Op::Graph(Arc::new(GRAPHS.get(child)?.executable(0)?)));
        unsafe { add_node(to, graph, dependencies, count, child) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphAddEventRecordNode(
    to: *mut Handle,
    graph: Handle,
    dependencies: *const Handle,
    count: usize,
    recorded: Handle,
) -> CUresult {
    api("cuGraphAddEventRecordNode", || unsafe {
        add_node(to, graph, dependencies, count, || Ok(Op::Record(event(recorded)?)))
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphAddEventWaitNode(
    to: *mut Handle,
    graph: Handle,
    dependencies: *const Handle,
    count: usize,
    awaited: Handle,
) -> CUresult {
    api("cuGraphAddEventWaitNode", || unsafe {
        add_node(to, graph, dependencies, count, || Ok(Op::WaitEvent(event(awaited)?)))
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphDestroyNode(node: Handle) -> CUresult {
    api("cuGraphDestroyNode", || {
        let graph = graph_of(node)?;
        let mut nodes = lock(&graph.nodes);
        nodes.retain(|entry| entry.handle != node);
        nodes.iter_mut().for_each(|entry| entry.dependencies.retain(|dependency| *dependency != node));
        NODES.remove(node).map(drop)
    })
}

/// Adds or removes edges, all or none.
unsafe fn change_edges(graph: Handle, from: *const Handle, to: *const Handle, count: usize, adds: bool) -> Outcome {
    driver()?;
    let (from, to) = unsafe { (handles(from, count)?, handles(to, count)?) };
    let graph = GRAPHS.get(graph)?;
    let mut nodes = lock(&graph.nodes);
    check_members(&nodes, &from)?;
    check_members(&nodes, &to)?;
    let mut changed = nodes.clone();
    for (from, to) in from.iter().zip(&to) {
        let entry = changed.iter_mut().find(|entry| entry.handle == *to).ok_or(CUresult::ERROR_INVALID_VALUE)?;
        let place = entry.dependencies.iter().position(|dependency| dependency == from);
        match (place, adds) {
            (None, true) if from != to => entry.dependencies.push(*from),
            (Some(place), false) => drop(entry.dependencies.remove(place)),
            _ => {
                let what = if adds { "cannot be added" } else { "is not there" };
                return Err(CUresult::ERROR_INVALID_VALUE.with(format!("the edge {from:#x} to {to:#x} {what}")));
            }
        }
    }
    *nodes = changed;
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphAddDependencies(
    graph: Handle,
    from: *const Handle,
    to: *const Handle,
    count: usize,
) -> CUresult {
    api("cuGraphAddDependencies", || unsafe { change_edges(graph, from, to, count, true) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphRemoveDependencies(
    graph: Handle,
    from: *const Handle,
    to: *const Handle,
    count: usize,
) -> CUresult {
    api("cuGraphRemoveDependencies", || unsafe { change_edges(graph, from, to, count, false) })
}

/// Copies `items` to an array of `*count` places, or just tells how many there are if the array is null; surplus places
/// become 0.
unsafe fn list(items: &[Handle], to: *mut Handle, count: *mut usize) -> Outcome {
    if count.is_null() {
        return Err(CUresult::ERROR_INVALID_VALUE.with("the count is null"));
    }
    if to.is_null() {
        return unsafe { out(count, "count", items.len()) };
    }
    // SAFETY: `count` is valid, and the array has as many places as it says.
    unsafe {
        let room = count.read_unaligned();
        for place in 0..room {
            to.add(place).write_unaligned(items.get(place).copied().unwrap_or(0));
        }
        out(count, "count", room.min(items.len()))
    }
}

fn nodes_of(graph: Handle) -> Outcome<Vec<Entry>> {
    driver()?;
    Ok(lock(&GRAPHS.get(graph)?.nodes).clone())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphGetNodes(graph: Handle, nodes: *mut Handle, count: *mut usize) -> CUresult {
    api("cuGraphGetNodes", || {
        let all: Vec<Handle> = nodes_of(graph)?.iter().map(|node| node.handle).collect();
        unsafe { list(&all, nodes, count) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphGetRootNodes(graph: Handle, nodes: *mut Handle, count: *mut usize) -> CUresult {
    api("cuGraphGetRootNodes", || {
        let all = nodes_of(graph)?;
        let roots: Vec<Handle> = all.iter().filter(|n| n.dependencies.is_empty()).map(|n| n.handle).collect();
        unsafe { list(&roots, nodes, count) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphGetEdges(
    graph: Handle,
    from: *mut Handle,
    to: *mut Handle,
    count: *mut usize,
) -> CUresult {
    api("cuGraphGetEdges", || {
        let nodes = nodes_of(graph)?;
        let edges = nodes.iter().flat_map(|n| n.dependencies.iter().map(|&dependency| (dependency, n.handle)));
        let (sources, targets): (Vec<_>, Vec<_>) = edges.unzip();
        if from.is_null() != to.is_null() {
            return Err(CUresult::ERROR_INVALID_VALUE.with("`from` and `to` must both be null or neither"));
        }
        let mut again = if count.is_null() { 0 } else { unsafe { count.read_unaligned() } };
        unsafe {
            list(&sources, from, count)?;
            list(&targets, to, &mut again)
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphNodeGetDependencies(node: Handle, to: *mut Handle, count: *mut usize) -> CUresult {
    api("cuGraphNodeGetDependencies", || {
        let graph = graph_of(node)?;
        let nodes = lock(&graph.nodes);
        let found = nodes.iter().find(|entry| entry.handle == node).ok_or(CUresult::ERROR_INVALID_VALUE)?;
        unsafe { list(&found.dependencies, to, count) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphNodeGetDependentNodes(node: Handle, to: *mut Handle, count: *mut usize) -> CUresult {
    api("cuGraphNodeGetDependentNodes", || {
        let graph = graph_of(node)?;
        let nodes = lock(&graph.nodes);
        let dependents = nodes.iter().filter(|entry| entry.dependencies.contains(&node));
        unsafe { list(&dependents.map(|entry| entry.handle).collect::<Vec<_>>(), to, count) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphNodeGetType(node: Handle, node_type: *mut u32) -> CUresult {
    api("cuGraphNodeGetType", || unsafe { out(node_type, "type", op_of(node)?.node_type()) })
}

macro_rules! setters {
    ($($in_graph:ident, $in_executable:ident($params:ty) $op:ident;)*) => {
        $(
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $in_graph(node: Handle, params: *const $params) -> CUresult {
                api(stringify!($in_graph), || set_in_graph(node, unsafe { $op(params)? }))
            }

            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $in_executable(
                executable: Handle,
                node: Handle,
                params: *const $params,
            ) -> CUresult {
                api(stringify!($in_executable), || set_in_executable(executable, node, unsafe { $op(params)? }))
            }
        )*
    };
}

setters! {
    cuGraphKernelNodeSetParams_v2, cuGraphExecKernelNodeSetParams_v2(KernelParams) kernel_op;
    cuGraphHostNodeSetParams, cuGraphExecHostNodeSetParams(HostParams) host_op;
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphMemsetNodeSetParams(node: Handle, params: *const MemsetParams) -> CUresult {
    api("cuGraphMemsetNodeSetParams", || set_in_graph(node, unsafe { memset_op(params)? }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphExecMemsetNodeSetParams(
    executable: Handle,
    node: Handle,
    params: *const MemsetParams,
    _context: Handle,
) -> CUresult {
    api("cuGraphExecMemsetNodeSetParams", || set_in_executable(executable, node, unsafe { memset_op(params)? }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphMemcpyNodeSetParams(node: Handle, params: *const Copy3D) -> CUresult {
    api("cuGraphMemcpyNodeSetParams", || set_in_graph(node, unsafe { pitched::op_3d(params)? }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphExecMemcpyNodeSetParams(
    executable: Handle,
    node: Handle,
    params: *const Copy3D,
    _context: Handle,
) -> CUresult {
    api("cuGraphExecMemcpyNodeSetParams", || set_in_executable(executable, node, unsafe { pitched::op_3d(params)? }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphKernelNodeGetParams_v2(node: Handle, params: *mut KernelParams) -> CUresult {
    api("cuGraphKernelNodeGetParams_v2", || match &*op_of(node)? {
        Op::Launch(launch) => unsafe { out(params, "nodeParams", launch.node_params()) },
        _ => Err(CUresult::ERROR_INVALID_VALUE.with("not a kernel node")),
    })
}

/// The executable graph, and the place in it, of a node that may be left out.
fn optional(executable: Handle, node: Handle) -> Outcome<(Arc<Executable>, usize)> {
    driver()?;
    let executable = EXECUTABLES.get(executable)?;
    let place = executable.place(node)?;
    // Kernels, copies and sets can be.
    if lock(&executable.nodes)[place].op.node_type() > 2 {
        return Err(CUresult::ERROR_INVALID_VALUE.with("only kernel, copy and set nodes can be left out"));
    }
    Ok((executable, place))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphNodeSetEnabled(executable: Handle, node: Handle, enabled: u32) -> CUresult {
    api("cuGraphNodeSetEnabled", || {
        let (executable, place) = optional(executable, node)?;
        lock(&executable.disabled)[place] = enabled == 0;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphNodeGetEnabled(executable: Handle, node: Handle, enabled: *mut u32) -> CUresult {
    api("cuGraphNodeGetEnabled", || {
        let (executable, place) = optional(executable, node)?;
        let disabled = lock(&executable.disabled)[place];
        unsafe { out(enabled, "isEnabled", (!disabled).into()) }
    })
}

/// `CUgraphEdgeData`: zero for the plain dependency, the only kind there is here.
type EdgeData = u64;

/// # Safety
/// Null or `count` elements.
unsafe fn plain_edges(data: *const EdgeData, count: usize) -> Outcome {
    let kinds = |place: usize| unsafe { data.add(place).read_unaligned() };
    if !data.is_null() && (0..count).map(kinds).any(|kind| kind != 0) {
        return Err(super::unsupported("an edge of a graph that is not a plain dependency"));
    }
    Ok(())
}

/// Writes as many plain edges as `count` says there are by now.
unsafe fn give_plain_edges(to: *mut EdgeData, count: *const usize) {
    if !to.is_null() && !count.is_null() {
        // SAFETY: the caller's array has as many places as the count, which is now that of what was listed.
        unsafe { (0..count.read_unaligned()).for_each(|place| to.add(place).write_unaligned(0)) };
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphAddDependencies_v2(
    graph: Handle,
    from: *const Handle,
    to: *const Handle,
    data: *const EdgeData,
    count: usize,
) -> CUresult {
    api("cuGraphAddDependencies_v2", || unsafe {
        plain_edges(data, count)?;
        change_edges(graph, from, to, count, true)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphRemoveDependencies_v2(
    graph: Handle,
    from: *const Handle,
    to: *const Handle,
    data: *const EdgeData,
    count: usize,
) -> CUresult {
    api("cuGraphRemoveDependencies_v2", || unsafe {
        plain_edges(data, count)?;
        change_edges(graph, from, to, count, false)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphGetEdges_v2(
    graph: Handle,
    from: *mut Handle,
    to: *mut Handle,
    data: *mut EdgeData,
    count: *mut usize,
) -> CUresult {
    let listed = unsafe { cuGraphGetEdges(graph, from, to, count) };
    if listed == CUresult::SUCCESS && !from.is_null() {
        unsafe { give_plain_edges(data, count) };
    }
    listed
}

macro_rules! with_edges {
    ($($name:ident $plain:ident;)*) => {
        $(
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(
                node: Handle,
                to: *mut Handle,
                data: *mut EdgeData,
                count: *mut usize,
            ) -> CUresult {
                let listed = unsafe { $plain(node, to, count) };
                if listed == CUresult::SUCCESS && !to.is_null() {
                    unsafe { give_plain_edges(data, count) };
                }
                listed
            }
        )*
    };
}

with_edges! {
    cuGraphNodeGetDependencies_v2 cuGraphNodeGetDependencies;
    cuGraphNodeGetDependentNodes_v2 cuGraphNodeGetDependentNodes;
}
