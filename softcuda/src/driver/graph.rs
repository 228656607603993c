//! Graphs, made by capture or node by node, and their executable form: `cuGraph*`. Nodes are added by `graph_nodes`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::context::Context;
use super::handles::{Handle, Table, fresh};
use super::status::{CUresult, Outcome};
use super::stream::stream;
use super::work::Op;
use super::{api, control, driver, lock, out};

/// An operation and the nodes that must be done before it.
#[derive(Clone)]
pub(super) struct Node {
    pub op: Arc<Op>,
    pub dependencies: Vec<usize>,
}

/// A node of a graph that can still change.
#[derive(Clone)]
pub(super) struct Entry {
    pub handle: Handle,
    pub op: Arc<Op>,
    pub dependencies: Vec<Handle>,
}

#[derive(Default)]
pub(super) struct Graph {
    /// In the order in which they were made.
    pub nodes: Mutex<Vec<Entry>>,
}

/// An instantiated graph.
pub(super) struct Executable {
    pub nodes: Mutex<Vec<Node>>,
    /// The nodes of the graph that it was made of, in the order of its own.
    pub sources: Vec<Handle>,
    /// Nodes that are left out.
    pub disabled: Mutex<Vec<bool>>,
    flags: u64,
}

pub(super) static GRAPHS: Table<Graph> = Table::new("graph", CUresult::ERROR_INVALID_VALUE);
pub(super) static EXECUTABLES: Table<Executable> = Table::new("executable graph", CUresult::ERROR_INVALID_VALUE);

/// Graphs of nodes by the nodes' handles.
pub(super) static NODES: Table<Handle> = Table::new("graph node", CUresult::ERROR_INVALID_VALUE);

/// Makes a graph of nodes whose handles are new.
pub(super) fn add(nodes: Vec<Entry>) -> Handle {
    let graph = fresh();
    for node in &nodes {
        NODES.insert(node.handle, Arc::new(graph));
    }
    GRAPHS.insert(graph, Arc::new(Graph { nodes: Mutex::new(nodes) }));
    graph
}

impl Graph {
    /// The graph as it is now, ready to run.
    pub fn executable(&self, flags: u64) -> Outcome<Executable> {
        let nodes = lock(&self.nodes);
        let places: HashMap<Handle, usize> = nodes.iter().enumerate().map(|(at, node)| (node.handle, at)).collect();
        let ready: Vec<Node> = nodes
            .iter()
            .map(|node| Node {
                op: node.op.clone(),
                dependencies: node.dependencies.iter().map(|dependency| places[dependency]).collect(),
            })
            .collect();
        if order(&ready, |ready| ready.len() - 1).len() < ready.len() {
            return Err(CUresult::ERROR_INVALID_VALUE.with("the graph has a cycle"));
        }
        let sources = nodes.iter().map(|node| node.handle).collect();
        let disabled = Mutex::new(vec![false; ready.len()]);
        Ok(Executable { nodes: Mutex::new(ready), sources, disabled, flags })
    }
}

/// An order of the nodes that respects their dependencies, `pick` choosing among those that are ready; short of some if there
/// is a cycle.
fn order(nodes: &[Node], mut pick: impl FnMut(&[usize]) -> usize) -> Vec<usize> {
    let mut waiting: Vec<usize> = nodes.iter().map(|node| node.dependencies.len()).collect();
    let mut followers = vec![Vec::new(); nodes.len()];
    for (index, node) in nodes.iter().enumerate() {
        for &dependency in &node.dependencies {
            followers[dependency].push(index);
        }
    }
    let mut ready: Vec<usize> = (0..nodes.len()).filter(|&node| waiting[node] == 0).collect();
    let mut order = Vec::with_capacity(nodes.len());
    while !ready.is_empty() {
        let node = ready.swap_remove(pick(&ready));
        order.push(node);
        for &follower in &followers[node] {
            waiting[follower] -= 1;
            if waiting[follower] == 0 {
                ready.push(follower);
            }
        }
    }
    order
}

impl Executable {
    pub fn may_wait(&self) -> bool {
        lock(&self.nodes).iter().any(|node| node.op.may_wait())
    }

    /// Runs all nodes. Any order that respects the dependencies is right: the seed picks one, 0 the order of making.
    pub fn run(&self, context: &Context) -> Outcome {
        let mut random = control::seed();
        let nodes = lock(&self.nodes).clone();
        let disabled = lock(&self.disabled).clone();
        let order = order(&nodes, |ready| {
            if random == 0 {
                return ready.iter().enumerate().min_by_key(|(_, node)| **node).map_or(0, |(place, _)| place);
            }
            random = mix(random);
            (random % ready.len() as u64) as usize
        });
        for node in order.into_iter().filter(|&node| !disabled[node]) {
            let op = &nodes[node].op;
            if let Err(failure) = op.check() {
                // What was allocated when the node was made is gone: the device meets it, not the launching call.
                let fault = CUresult::ERROR_ILLEGAL_ADDRESS.with(failure.detail.unwrap_or_default());
                control::record_fault(fault.detail.as_deref().unwrap_or_default());
                context.set_fault(fault);
                return Ok(());
            }
            op.run(context)?;
            if context.check().is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// The place of the node that was made of `source`.
    pub fn place(&self, source: Handle) -> Outcome<usize> {
        self.sources.iter().position(|&known| known == source).ok_or_else(|| {
            CUresult::ERROR_INVALID_VALUE.with(format!("{source:#x} is not a node of the instantiated graph"))
        })
    }
}

/// One step of splitmix64.
fn mix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)).max(1)
}

fn instantiate(to: *mut Handle, graph: Handle, flags: u64) -> Outcome {
    driver()?;
    let graph = GRAPHS.get(graph)?;
    let executable = graph.executable(flags)?;
    // CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH, UPLOAD, DEVICE_LAUNCH, USE_NODE_PRIORITY
    let (auto_free, device_launch) = (1, 4);
    if flags > 15 || flags & (auto_free | device_launch) == auto_free | device_launch {
        return Err(CUresult::ERROR_INVALID_VALUE.with(format!("{flags:#x} are not flags of cuGraphInstantiate")));
    }
    if flags & device_launch != 0 {
        return Err(super::unsupported("a graph launched from the device"));
    }
    unsafe { out(to, "phGraphExec", EXECUTABLES.add(executable)) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphInstantiateWithFlags(to: *mut Handle, graph: Handle, flags: u64) -> CUresult {
    api("cuGraphInstantiateWithFlags", || instantiate(to, graph, flags))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphLaunch(executable: Handle, stream_handle: Handle) -> CUresult {
    api("cuGraphLaunch", || {
        let stream = stream(stream_handle)?;
        let executable = EXECUTABLES.get(executable)?;
        stream.submit(Op::Graph(executable))
    })
}

/// Nothing is uploaded: an executable graph is ready as it is.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphUpload(executable: Handle, stream_handle: Handle) -> CUresult {
    api("cuGraphUpload", || {
        stream(stream_handle)?;
        EXECUTABLES.get(executable).map(drop)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphDestroy(graph: Handle) -> CUresult {
    api("cuGraphDestroy", || {
        driver()?;
        for node in lock(&GRAPHS.remove(graph)?.nodes).iter() {
            let _ = NODES.remove(node.handle);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphExecDestroy(executable: Handle) -> CUresult {
    api("cuGraphExecDestroy", || {
        driver()?;
        EXECUTABLES.remove(executable).map(drop)
    })
}

/// `CUDA_GRAPH_INSTANTIATE_PARAMS`.
#[repr(C)]
pub struct InstantiateParams {
    flags: u64,
    upload_stream: Handle,
    error_node: Handle,
    result: u32,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphInstantiateWithParams(
    to: *mut Handle,
    graph: Handle,
    params: *mut InstantiateParams,
) -> CUresult {
    api("cuGraphInstantiateWithParams", || {
        // SAFETY: null, or the caller's structure.
        let params = unsafe { params.as_mut() };
        let params = params.ok_or_else(|| CUresult::ERROR_INVALID_VALUE.with("`instantiateParams` is null"))?;
        let outcome = instantiate(to, graph, params.flags);
        // CUDA_GRAPH_INSTANTIATE_SUCCESS, ERROR
        params.result = outcome.is_err().into();
        params.error_node = 0;
        outcome
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphExecGetFlags(executable: Handle, flags: *mut u64) -> CUresult {
    api("cuGraphExecGetFlags", || {
        driver()?;
        unsafe { out(flags, "flags", EXECUTABLES.get(executable)?.flags) }
    })
}

/// `CUgraphExecUpdateResultInfo`.
#[repr(C)]
pub struct UpdateResult {
    result: u32,
    error_node: Handle,
    error_from_node: Handle,
}

/// Gives an executable graph the operations of a graph of the same form.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphExecUpdate_v2(
    executable: Handle,
    graph: Handle,
    result: *mut UpdateResult,
) -> CUresult {
    api("cuGraphExecUpdate_v2", || {
        driver()?;
        let executable = EXECUTABLES.get(executable)?;
        let graph = GRAPHS.get(graph)?;
        let new = graph.executable(0)?;
        let new_nodes = lock(&new.nodes);
        let mut nodes = lock(&executable.nodes);
        // CU_GRAPH_EXEC_UPDATE_SUCCESS, ERROR_TOPOLOGY_CHANGED, ERROR_NODE_TYPE_CHANGED
        let (mut code, mut culprit) = (0, 0);
        if nodes.len() != new_nodes.len() {
            code = 2;
        }
        for (at, (old, new_node)) in nodes.iter().zip(new_nodes.iter()).enumerate() {
            let sorted = |node: &Node| {
                let mut dependencies = node.dependencies.clone();
                dependencies.sort_unstable();
                dependencies
            };
            if code == 0 && sorted(old) != sorted(new_node) {
                (code, culprit) = (2, new.sources[at]);
            }
            if code == 0 && old.op.node_type() != new_node.op.node_type() {
                (code, culprit) = (3, new.sources[at]);
            }
        }
        unsafe { out(result, "resultInfo", UpdateResult { result: code, error_node: culprit, error_from_node: 0 })? };
        if code != 0 {
            let why = if code == 2 { "the graph's form differs" } else { "a node's type differs" };
            return Err(CUresult::ERROR_GRAPH_EXEC_UPDATE_FAILURE.with(why));
        }
        for (old, new) in nodes.iter_mut().zip(new_nodes.iter()) {
            old.op = new.op.clone();
        }
        Ok(())
    })
}
