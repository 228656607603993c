//! Kernels for Mixture-of-Experts layers, written by hand in PTX, behind safe Rust.
//!
//! Letters used everywhere: `T` tokens, `H` hidden size, `I` expert intermediate size, `E` experts, `k` experts per token,
//! `S = T*k` slots (one slot is one token sent to one expert). Matrices are row-major.
//!
//! ```text
//! x [T,H] --router--> logits [T,E] --gating--> ids [T,k], weights [T,k]
//!   --dispatch--> counts [E], offsets [E+1], slot_token [S], token_slot [T,k], tiles
//!   --gemm, gathers rows of x, activation--> h [S,I] --gemm--> y_slots [S,H] --combine--> y [T,H]
//! ```
//!
//! Each operation stands alone ([`routers::router`], [`routers::gating`], [`capacity::dispatch`], [`experts::gemm`],
//! [`experts::combine`]), and [`layer`] composes them.
//! An operation is a descriptor, which is checked; a pure function `select` from descriptor and [`DeviceInfo`] to kernel and
//! grid; and a function `forward` that checks buffers and enqueues one launch on the caller's stream. Nothing allocates,
//! frees or waits inside an operation, and no count returns to the host. What is wrong is an [`Error`] that names the
//! argument, and nothing has been launched then. [`mod@reference`] defines every operation in plain CPU code.
//!
//! Buffers are cudarc's. The crate uses whatever CUDA driver the process has; without one, [`device::open`] says so.
//!
//! # A layer
//!
//! ```
//! use half::bf16;
//! use moe_kernels::experts::Weight;
//! use moe_kernels::layer::{ExpertWeights, LayerArgs, LayerDesc, LayerWeights, RouteArgs, RouterWeights};
//! use moe_kernels::{Dtype, Kernels, Workspace, device};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! let stream = device::open(0)?.default_stream();
//! let kernels = Kernels::new(stream.context())?;
//!
//! // Mixtral's rules: the 2 best of 8 experts by softmax, renormalised; SiLU-gated experts.
//! let (tokens, hidden, intermediate, experts, top_k) = (3, 64, 96, 8, 2);
//! let desc = LayerDesc::new(Dtype::Bf16, hidden, intermediate, experts, top_k);
//! let plan = desc.plan(tokens, kernels.device())?;
//! assert_eq!(plan.launches(), 3); // five for more than eight tokens
//!
//! let random = |n: usize| (0..n).map(|i| bf16::from_f32((i * 7919 % 251) as f32 / 1000.0 - 0.125)).collect::<Vec<_>>();
//! let router = stream.clone_htod(&random(experts * hidden))?;
//! let gate_up = stream.clone_htod(&random(experts * 2 * intermediate * hidden))?;
//! let down = stream.clone_htod(&random(experts * hidden * intermediate))?;
//! let experts_here = ExpertWeights::new(Weight::new(&gate_up), Weight::new(&down));
//! let weights = LayerWeights::new(RouterWeights::new(&router), experts_here);
//!
//! let x = stream.clone_htod(&random(tokens * hidden))?;
//! let mut y = stream.alloc_zeros::<bf16>(tokens * hidden)?;
//! let mut ids = stream.alloc_zeros::<i32>(tokens * top_k)?;
//! let mut workspace = Workspace::new(&stream, plan.workspace_bytes())?;
//! let args = LayerArgs::new(&x, &mut y).route(RouteArgs::new().ids(&mut ids));
//! plan.forward(&kernels, &stream, &weights, args, &mut workspace)?;
//!
//! assert!(stream.clone_dtoh(&ids)?.iter().all(|&id| (0..experts as i32).contains(&id)));
//! assert!(stream.clone_dtoh(&y)?.iter().any(|&value| value != bf16::ZERO));
//! # Ok(())
//! # }
//! ```
//!
//! # Checkpoints
//!
//! The feature `checkpoint` adds a module of that name, which reads the MoE blocks of Hugging Face checkpoints into a
//! [`layer::LayerDesc`] and its weights on the device.
//!
//! # Order across streams
//!
//! Operations are enqueued on the caller's stream. A buffer of cudarc's carries an event of its last read and one of its last
//! write: what an operation reads waits for the last write on any stream, and what it writes for the last read and write. That
//! holds among the streams of one `Arc<CudaContext>` (operations refuse buffers and streams of another value, also of the same
//! device: [`Error::DifferentContext`]), as long as event tracking is on (it is, until `disable_event_tracking`). It does not hold,
//! and the caller orders, where
//!
//! * **several streams read a buffer**: it has one read event, so that a later write, or the memory's release when it is dropped,
//!   waits for the reader that asked last. Before weights are overwritten or dropped, let the writer's stream join every reader's
//!   (`writer.join(&reader)?`; for a drop the stream that the buffer was allocated on, `buffer.stream()`), or synchronise the
//!   context.
//! * **a buffer is lent by address** ([`In::from_raw`], [`Out::from_raw`], `interop`): nothing is tracked.
//! * **streams are dropped before any operation ran on two**: cudarc orders only while a stream of `CudaContext::new_stream` is
//!   alive, and a dropped one's work may be under way. [`Kernels`] closes this: once an operation sees a context that orders its
//!   streams, or a per-thread stream, it keeps an idle stream of its own as long as it lives (the first operation on a per-thread
//!   stream waits once for the context's work). Work that other code puts on streams before that, or after the kernels are dropped,
//!   is cudarc's matter: keep one stream of your own alive.
//! * **per-thread streams** end with their thread: a thread that enqueued work synchronises before it ends.
//!
//! # CUDA graphs
//!
//! All operations can be captured. The first two steps are an [`Error::Capture`] when left out (`tests/graphs.rs` is the
//! whole):
//!
//! 1. `unsafe { context.disable_event_tracking() }` before the graph's buffers are allocated: events of work outside cannot be
//!    waited for in a capture. From then on the caller orders streams.
//! 2. [`Kernels::preload`] of what the plan or `select` names, or one run of the operations: no module may be loaded during a
//!    capture.
//! 3. Allocate buffers and workspace, synchronise, then `begin_capture` on a stream of `new_stream` (`THREAD_LOCAL`, so that other
//!    threads may go on), the operations, `end_capture`.
//! 4. Launch it as often as wanted, while everything that it was captured with lives.
//!
//! The graph holds addresses, not buffers: **a launch after a buffer, the workspace or the [`Kernels`] was dropped reads freed
//! memory**, and cudarc's `CudaGraph::launch` is a safe function. Keep them in one value with the graph, the graph first, so that
//! it is dropped first, and synchronise the stream before it goes:
//!
//! ```
//! struct Captured {
//!     graph: cudarc::driver::CudaGraph,
//!     workspace: moe_kernels::Workspace,
//!     weights: Vec<cudarc::driver::CudaSlice<half::bf16>>,
//!     kernels: std::sync::Arc<moe_kernels::Kernels>,
//! }
//! ```
//!
//! # After a fault
//!
//! A fault of any kernel in the process (an illegal address, a trap) breaks its context for good: every later call returns the
//! fault's error. [`device::open`], [`Kernels::new`] and all operations say so ([`Error::Driver`] with the driver's code); planning
//! asks no device and cannot know. The way back is a context made anew: drop every `Arc` of it — [`Kernels`], buffers, workspaces,
//! streams, events, graphs, and the values of other crates that hold the same primary context — and open the device again. NVIDIA's
//! manual asks for a new process after an illegal address; where that is so, `open` goes on returning the error.
//!
//! # Shares of a device
//!
//! [`DeviceInfo::of`] counts the multiprocessors that the context may use: those of a green context, or of an execution affinity
//! under MPS, where the driver can say (CUDA 12.4 and 11.4). Kernels whose blocks meet at a barrier are launched with no more
//! blocks than the driver's occupancy for the loaded kernel allows on these; results are the same, but for Sinkhorn's potentials,
//! whose sums are grouped by blocks. A share that is changed after [`Kernels::new`], or a thread percentage that the driver does
//! not report, is not seen: such a launch fails with the driver's `CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE`.
//! [`Kernels::on_multiprocessors`] asks for fewer than there are, of kernels whose blocks stay.
//!
//! # Beside other crates
//!
//! cudarc takes one way of linking and one version of the bindings in a binary. The default features leave both to other crates and
//! to the toolkit that `nvcc` tells of, else take dynamic loading and the newest version; `CUDARC_CUDA_VERSION` (`12080`)
//! overrides, unless a version is named by a feature. To choose here: `default-features = false` and `dynamic-loading`,
//! `dynamic-linking` or `static-linking`, with `cuda-12000` to `cuda-13040`. What other libraries made enters by [`interop`], what
//! `cust` made with the feature `cust`.

#![warn(missing_docs)]
#![deny(unsafe_code)]
#![deny(unsafe_op_in_unsafe_fn)]

pub mod capacity;
#[cfg(feature = "checkpoint")]
pub mod checkpoint;
pub mod experts;
pub mod layer;
pub mod reference;
/// Which variants exist: for this project's own tests, and no part of the API.
#[doc(hidden)]
#[path = "../kernels/registry.rs"]
pub mod registry;
pub mod routers;
pub mod rules;
pub mod runtime;

pub use rules::kinds::Dtype;
pub use runtime::buffer::{In, Out};
pub use runtime::device::{self, DeviceInfo};
pub use runtime::element::{Element, OutTensor, Tensor};
pub use runtime::error::Error;
pub use runtime::interop;
pub use runtime::kernels::{self, Kernels};
pub use runtime::selection::{Kernel, Selection};
pub use runtime::token_mask::TokenMask;
pub use runtime::workspace::Workspace;

/// Most experts that a layer may have.
pub const MAX_EXPERTS: usize = 4096;

/// Most experts that are counted and sorted by where nothing else is asked ([`capacity::dispatch`] of given ids, without a capacity).
pub const MAX_COUNTED_EXPERTS: usize = 8192;

/// Most experts that a token may go to: gating by a score alone, dispatch, sums, layers. Other operations have a limit of 32, which their
/// errors name.
pub const MAX_TOP_K: usize = 64;

/// The README's example is compiled with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
