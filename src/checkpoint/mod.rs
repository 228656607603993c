//! MoE blocks of Hugging Face checkpoints, as they are on the hub (feature `checkpoint`).
//!
//! A folder holds `config.json` and `model.safetensors`, or shards with an index. [`Model::open`] maps the files into memory and finds the family
//! by `model_type` ([`families`]); [`Model::blocks`] are its MoE blocks; [`Block::load`] reads one of them onto a device, one expert at a time and without a
//! second copy in the host's memory, as a [`LayerDesc`](crate::layer::LayerDesc) with the weights that [`crate::layer`] takes.
//!
//! ```no_run
//! use half::bf16;
//! use moe_kernels::checkpoint::Model;
//! use moe_kernels::layer::LayerArgs;
//! use moe_kernels::{Dtype, Kernels, Workspace, device};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let stream = device::open(0)?.default_stream();
//! let kernels = Kernels::new(stream.context())?;
//!
//! let model = Model::open("Qwen3-30B-A3B".as_ref())?;
//! let block = model.block(Some("model.layers.0.mlp"))?;
//! let loaded = block.load(&stream, Dtype::Bf16, &mut |progress| println!("{} of {}", progress.bytes, progress.of))?;
//!
//! let (tokens, hidden) = (64, loaded.desc.hidden);
//! let plan = loaded.desc.plan(tokens, kernels.device())?;
//! let mut workspace = Workspace::new(&stream, plan.workspace_bytes())?;
//! let (x, mut y) = (stream.alloc_zeros::<bf16>(tokens * hidden)?, stream.alloc_zeros::<bf16>(tokens * hidden)?);
//! plan.forward(&kernels, &stream, &loaded.weights.layer()?, LayerArgs::new(&x, &mut y), &mut workspace)?;
//! # Ok(())
//! # }
//! ```
//!
//! Nothing is guessed: an unknown `model_type`, a key of `config.json` that would change the block, a tensor of the block that nothing reads, a
//! tensor of another shape or type than expected is a [`CheckpointError`] that names it.

mod backward;
mod config;
mod error;
mod facts;
mod families;
mod family;
mod files;
mod folder;
mod foreign;
mod kind;
mod load;
mod locate;
mod model;
mod nearest;
mod places;
mod run;
mod spec;
mod store;
mod table;
mod tensors;
mod weights;

pub use backward::{BlockBackward, BlockGradients};
pub use config::Config;
pub use error::{CheckpointError, Lost};
pub use facts::{Experts, Matrices};
pub use families::families;
pub use family::Family;
pub use folder::Checkpoint;
pub use kind::{Bank, Kind, Network};
pub use load::Progress;
pub use model::{Block, Model, Needs};
pub use places::{ByName, Places, Values};
pub use run::{BlockInputs, BlockRun, Results};
pub use store::{DeviceBuffer, HostBuffer};
pub use table::{COLUMNS, table};
pub use tensors::{FileTensor, TensorFile};
pub use weights::{AroundWeights, BlockWeights, DeviceBlock, HostBlock, Loaded, MatrixWeight};
