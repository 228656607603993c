//! Expert maps: from the router's expert numbers to what a device holds.
//!
//! It stands between gating (or [`crate::capacity::admission`]) and [`crate::capacity::dispatch`], and turns ids by a table `[E, R]`:
//!
//! - **expert parallelism**: the local number of a global expert, or [`NONE`](crate::rules::NONE) where another device has it; dispatch skips -1, and a
//!   token's outputs add up over devices;
//! - **physical replicas** (DeepSeek-V3, section 3.4): an expert with several copies takes turns among them, by a hash of the slot's
//!   number, even in the long run and the same each time;
//! - **null experts** (LongCat-Flash, section 2.1): an id that means no computation. [`NONE`](crate::rules::NONE) is an expert whose output is zero;
//!   [`IDENTITY`](crate::rules::IDENTITY) one whose output is its input.
//!
//! How a null expert flows: its slot becomes -1, so that it has no row in dispatch, no tile in the grouped GEMM, and adds nothing
//! of `y_slots` in combine. Identity experts leave the sum of their weights for each token, and
//! [`crate::experts::combine::CombineArgs::identity`] adds that times x. Dispatch and GEMMs are told the number of local experts.
//!
//! ```
//! use moe_kernels::capacity::expert_map::{self, ExpertMapArgs, ExpertMapDesc};
//! use moe_kernels::rules::{IDENTITY, NONE};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = moe_kernels::Kernels::new(stream.context())?;
//! // Of three experts the first is local number 0, the second is elsewhere, the third passes its input on.
//! let map = stream.clone_htod(&[0, NONE, IDENTITY])?;
//! let ids = stream.clone_htod(&[1, 0, 2, 0])?;
//! let weights = stream.clone_htod(&[0.5_f32, 0.5, 0.75, 0.25])?;
//! let mut local_ids = stream.alloc_zeros(4)?;
//! let mut identity_weight = stream.alloc_zeros(2)?;
//! let args = ExpertMapArgs::new(&ids, &map, &mut local_ids).weights(&weights).identity_weight(&mut identity_weight);
//! expert_map::forward(&kernels, &stream, &ExpertMapDesc::new(2, 3, 2), args)?;
//! assert_eq!(stream.clone_dtoh(&local_ids)?, [-1, 0, -1, 0]);
//! assert_eq!(stream.clone_dtoh(&identity_weight)?, [0.0, 0.75]);
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{BLOCK_WARPS, Kernel};
use crate::rules::IdFormat;
use crate::runtime::builder::{buffers, settings};
use crate::runtime::ids::Ids;
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::ExpertMapParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "expert_map";

/// Shapes of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExpertMapDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts that the router knows, null ones included, 1 to 4096.
    pub experts: usize,
    /// Experts per token `k`, 1 to 32.
    pub top_k: usize,
    /// How ids are stored.
    pub ids: IdFormat,
    /// Columns of the map `R`, at least 1: most replicas of an expert.
    pub max_replicas: usize,
    /// Chooses the hash that deals slots to replicas.
    pub seed: u32,
}

impl ExpertMapDesc {
    /// The ids of `top_k` of `experts` experts for each of `tokens` tokens, each expert at one place at most.
    pub const fn new(tokens: usize, experts: usize, top_k: usize) -> ExpertMapDesc {
        ExpertMapDesc { tokens, experts, top_k, ids: IdFormat::I32, max_replicas: 1, seed: 0 }
    }
}

settings!(ExpertMapDesc { ids: IdFormat, max_replicas: usize, seed: u32 });

/// Buffers of a mapping.
#[non_exhaustive]
pub struct ExpertMapArgs<'a> {
    /// `[T, k]`. One outside `0..E` stays unmapped: -1.
    pub ids: Ids<'a>,
    /// `[T, k]`, for `identity_weight`; absent, every weight is 1.
    pub weights: Option<In<'a, f32>>,
    /// `[E, R]`: local numbers, [`NONE`](crate::rules::NONE) or [`IDENTITY`](crate::rules::IDENTITY).
    pub map: In<'a, i32>,
    /// `[E]`: how many of an expert's row count, 1 to R; absent, the first alone.
    pub replicas: Option<In<'a, i32>>,
    /// `[T, k]`, written: local numbers, -1 for slots that no expert here takes.
    pub local_ids: Out<'a, i32>,
    /// `[T]`, written: the sum of the weights of a token's identity experts.
    pub identity_weight: Option<Out<'a, f32>>,
}

impl<'a> ExpertMapArgs<'a> {
    /// `ids` to `local_ids` by `map`, of each row the first entry.
    pub fn new(
        ids: impl Into<Ids<'a>>,
        map: impl Into<In<'a, i32>>,
        local_ids: impl Into<Out<'a, i32>>,
    ) -> ExpertMapArgs<'a> {
        ExpertMapArgs {
            ids: ids.into(),
            weights: None,
            map: map.into(),
            replicas: None,
            local_ids: local_ids.into(),
            identity_weight: None,
        }
    }
}

buffers!(ExpertMapArgs<'a> { weights: In<f32>, replicas: In<i32>, identity_weight: Out<f32> });

impl ExpertMapDesc {
    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::experts(OPERATION, self.experts)?;
        shape::top_k(OPERATION, self.top_k, usize::MAX)?;
        shape::positive(OPERATION, "max_replicas", self.max_replicas)?;
        shape::product_i32(OPERATION, "map", &[self.experts, self.max_replicas])?;
        shape::product_i32(OPERATION, "ids", &[self.tokens, self.top_k]).map(drop)
    }
}

/// Chooses kernel and grid.
///
/// # Errors
/// Those of [`ExpertMapDesc::validate`].
pub fn select(desc: &ExpertMapDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let of_block = BLOCK_WARPS as usize * (32 / desc.top_k);
    let blocks = (desc.tokens.div_ceil(of_block) as u32).min(8 * device.multiprocessors).max(1);
    Ok(Selection::new(Kernel::ExpertMap { ids_bytes: desc.ids.bytes() }, [blocks, 1, 1]))
}

/// Maps ids.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`ExpertMapDesc::validate`]; [`Error::Unexpected`] for weights without `identity_weight`; those of a buffer:
/// [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &ExpertMapDesc,
    args: ExpertMapArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    if args.weights.is_some() && args.identity_weight.is_none() {
        let reason = "only identity_weight is made of them";
        return Err(Error::Unexpected { operation: OPERATION, argument: "weights", reason });
    }
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    if desc.tokens == 0 {
        return Ok(());
    }
    let slots = desc.tokens * desc.top_k;
    let ids = args.ids.open(&scope, "ids", desc.ids, slots)?;
    let weights = scope.read_some("weights", args.weights, slots, SCALAR)?;
    let map = scope.read("map", args.map, desc.experts * desc.max_replicas, SCALAR)?;
    let replicas = scope.read_some("replicas", args.replicas, desc.experts, SCALAR)?;
    let local_ids = scope.write("local_ids", args.local_ids, slots, SCALAR)?;
    let identity_weight = scope.write_some("identity_weight", args.identity_weight, desc.tokens, SCALAR)?;
    scope.launch(
        &selection,
        ExpertMapParams {
            ids: ids.address().into(),
            weights: optional(&weights).into(),
            map: map.address().into(),
            replicas: optional(&replicas).into(),
            local_ids: local_ids.address().into(),
            identity_weight: optional(&identity_weight).into(),
            tokens: desc.tokens as u32,
            experts: desc.experts as u32,
            top_k: desc.top_k as u32,
            max_replicas: desc.max_replicas as u32,
            seed: desc.seed,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const DESC: ExpertMapDesc = ExpertMapDesc::new(100, 8, 10).max_replicas(2).seed(1);

    #[test]
    fn faults_name_their_field() {
        let fault = |desc: ExpertMapDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(DESC.validate(), Ok(()));
        assert_eq!(fault(ExpertMapDesc { experts: 4097, ..DESC }), "experts");
        assert_eq!(fault(ExpertMapDesc { top_k: 33, ..DESC }), "top_k");
        assert_eq!(fault(ExpertMapDesc { max_replicas: 0, ..DESC }), "max_replicas");
        assert_eq!(fault(ExpertMapDesc { max_replicas: 1 << 30, ..DESC }), "map");
        assert_eq!(fault(ExpertMapDesc { tokens: 1 << 30, ..DESC }), "ids");
        assert_eq!(select(&DESC, &crate::runtime::device::A100).unwrap().grid, [5, 1, 1]);
    }
}
