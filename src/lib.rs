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
//! Each operation stands alone ([`router`], [`gating`], [`dispatch`], [`gemm`], [`combine`]), and [`layer`] composes them.
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
//! assert_eq!(plan.launches(), 5);
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

#![warn(missing_docs)]
#![deny(unsafe_code)]
#![deny(unsafe_op_in_unsafe_fn)]

pub mod capacity;
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
pub use runtime::element::{Element, Tensor};
pub use runtime::error::Error;
pub use runtime::kernels::{self, Kernels};
pub use runtime::selection::{Kernel, Selection};
pub use runtime::workspace::Workspace;

/// Most experts that a layer may have.
pub const MAX_EXPERTS: usize = 4096;

/// Most experts that a token may go to.
pub const MAX_TOP_K: usize = 32;

/// The README's example is compiled with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
