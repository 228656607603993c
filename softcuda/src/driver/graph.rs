//! Graphs made by stream capture: `cuGraph*`.

use std::sync::Arc;

use super::context::Context;
use super::handles::{Handle, Table, fresh};
use super::status::{CUresult, Outcome};
use super::stream::stream;
use super::work::Op;
use super::{api, control, driver, lock, out};

/// An operation and the nodes that must be done before it, all earlier in the list.
#[derive(Clone)]
pub(super) struct Node {
    pub op: Arc<Op>,
    pub dependencies: Vec<usize>,
}

pub(super) struct Graph {
    nodes: Vec<Node>,
    handles: Vec<Handle>,
}

/// An instantiated graph.
pub(super) struct Executable {
    nodes: Vec<Node>,
}

pub(super) static GRAPHS: Table<Graph> = Table::new("graph", CUresult::ERROR_INVALID_VALUE);
static EXECUTABLES: Table<Executable> = Table::new("executable graph", CUresult::ERROR_INVALID_VALUE);

/// Types of nodes by their handles.
static NODES: Table<u32> = Table::new("graph node", CUresult::ERROR_INVALID_VALUE);

impl Graph {
    pub fn new(nodes: Vec<Node>) -> Graph {
        let handles = nodes.iter().map(|node| {
            let handle = fresh();
            NODES.insert(handle, Arc::new(node.op.node_type()));
            handle
        });
        let handles = handles.collect();
        Graph { nodes, handles }
    }
}

impl Executable {
    pub fn may_wait(&self) -> bool {
        self.nodes.iter().any(|node| node.op.may_wait())
    }

    /// Runs all nodes. Any order that respects the dependencies is right: the seed picks one, 0 the order of capture.
    pub fn run(&self, context: &Context) -> Outcome {
        let mut random = control::seed();
        let mut waiting: Vec<usize> = self.nodes.iter().map(|node| node.dependencies.len()).collect();
        let mut followers = vec![Vec::new(); self.nodes.len()];
        for (index, node) in self.nodes.iter().enumerate() {
            for &dependency in &node.dependencies {
                followers[dependency].push(index);
            }
        }
        let mut ready: Vec<usize> = (0..self.nodes.len()).filter(|&node| waiting[node] == 0).collect();
        while !ready.is_empty() {
            let pick = if random == 0 {
                ready.iter().enumerate().min_by_key(|(_, node)| **node).map_or(0, |(place, _)| place)
            } else {
                random = mix(random);
                (random % ready.len() as u64) as usize
            };
            let node = ready.swap_remove(pick);
            let op = &self.nodes[node].op;
            if let Err(failure) = op.check() {
                // What was allocated at capture is gone at launch: the device meets it, not the launching call.
                let fault = CUresult::ERROR_ILLEGAL_ADDRESS.with(failure.detail.unwrap_or_default());
                control::record_fault(fault.detail.as_deref().unwrap_or_default());
                context.set_fault(fault);
                return Ok(());
            }
            op.run(context)?;
            if context.check().is_err() {
                return Ok(());
            }
            for &follower in &followers[node] {
                waiting[follower] -= 1;
                if waiting[follower] == 0 {
                    ready.push(follower);
                }
            }
        }
        Ok(())
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
    // CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH, UPLOAD, DEVICE_LAUNCH, USE_NODE_PRIORITY
    let (auto_free, device_launch) = (1, 4);
    if flags > 15 || flags & (auto_free | device_launch) == auto_free | device_launch {
        return Err(CUresult::ERROR_INVALID_VALUE.with(format!("{flags:#x} are not flags of cuGraphInstantiate")));
    }
    if flags & device_launch != 0 {
        return Err(super::unsupported("a graph launched from the device"));
    }
    unsafe { out(to, "phGraphExec", EXECUTABLES.add(Executable { nodes: graph.nodes.clone() })) }
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
        if let Some(captured) = &*lock(&stream.capture) {
            captured.capture.invalidate();
            return Err(super::unsupported("the capture of a graph launch"));
        }
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
        for &node in &GRAPHS.remove(graph)?.handles {
            let _ = NODES.remove(node);
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

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphGetNodes(graph: Handle, nodes: *mut Handle, count: *mut usize) -> CUresult {
    api("cuGraphGetNodes", || {
        driver()?;
        unsafe { list(&GRAPHS.get(graph)?.handles, nodes, count) }
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
        driver()?;
        let graph = GRAPHS.get(graph)?;
        let edges = graph
            .nodes
            .iter()
            .zip(&graph.handles)
            .flat_map(|(node, &handle)| node.dependencies.iter().map(move |&dependency| (dependency, handle)));
        let (sources, targets): (Vec<_>, Vec<_>) =
            edges.map(|(dependency, handle)| (graph.handles[dependency], handle)).unzip();
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
pub unsafe extern "C" fn cuGraphNodeGetType(node: Handle, node_type: *mut u32) -> CUresult {
    api("cuGraphNodeGetType", || {
        driver()?;
        unsafe { out(node_type, "type", *NODES.get(node)?) }
    })
}
