//! Routing maps: the experts of each token as a row of bytes, one for each expert, and as ids.
//!
//! Megatron-LM and TransformerEngine route by a boolean map `[T, E]` with probabilities `[T, E]`; the operations here go by ids `[T, k]` with
//! weights `[T, k]`. [`to_ids`] and [`from_ids`] are the ways between, on the device. Ids that come from a map rise within a token, so a dispatch of
//! them has the rows that a map's columns, one after the other, would have.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{BLOCK_WARPS, Kernel};
use crate::rules::IdFormat;
use crate::runtime::builder::{buffers, settings};
use crate::runtime::ids::Ids;
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::{IdsToMapParams, MapToIdsParams};
use crate::runtime::shape;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "routing_map";

/// Sizes of a map and of its ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RoutingMapDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts `E`, any number from 1 on.
    pub experts: usize,
    /// Ids of a token `k`, any number from 1 on.
    pub top_k: usize,
    /// How ids are stored that become a map. Ids that a map becomes are `i32`.
    pub ids: IdFormat,
}

impl RoutingMapDesc {
    /// `tokens` rows of `experts` experts, with `top_k` ids each.
    pub const fn new(tokens: usize, experts: usize, top_k: usize) -> RoutingMapDesc {
        RoutingMapDesc { tokens, experts, top_k, ids: IdFormat::I32 }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::positive(OPERATION, "experts", self.experts)?;
        shape::positive(OPERATION, "top_k", self.top_k)?;
        shape::product_i32(OPERATION, "map", &[self.tokens, self.experts])?;
        shape::product_i32(OPERATION, "ids", &[self.tokens, self.top_k]).map(drop)
    }

    fn selection(&self, kernel: Kernel, device: &DeviceInfo) -> Result<Selection, Error> {
        self.validate()?;
        let blocks = self.tokens.div_ceil(BLOCK_WARPS as usize) as u32;
        Ok(Selection::new(kernel, [blocks.clamp(1, 8 * device.multiprocessors), 1, 1]))
    }
}

settings!(RoutingMapDesc { ids: IdFormat });

/// Buffers of a map that becomes ids.
#[non_exhaustive]
pub struct ToIdsArgs<'a> {
    /// `[T, E]`: an expert is chosen where it is not 0.
    pub map: In<'a, u8>,
    /// `[T, E]`, with `weights`.
    pub probs: Option<In<'a, f32>>,
    /// `[T, k]`, written: the chosen experts, rising, then -1.
    pub ids: Out<'a, i32>,
    /// `[T, k]`, written, with `probs`: those of the chosen, then 0.
    pub weights: Option<Out<'a, f32>>,
    /// `[1]`, written: chosen experts past a token's first `k`, which are left out.
    pub over: Option<Out<'a, i32>>,
}

impl<'a> ToIdsArgs<'a> {
    /// `map` to `ids`.
    pub fn new(map: impl Into<In<'a, u8>>, ids: impl Into<Out<'a, i32>>) -> ToIdsArgs<'a> {
        ToIdsArgs { map: map.into(), probs: None, ids: ids.into(), weights: None, over: None }
    }
}

buffers!(ToIdsArgs<'a> { probs: In<f32>, weights: Out<f32>, over: Out<i32> });

/// Buffers of ids that become a map.
#[non_exhaustive]
pub struct FromIdsArgs<'a> {
    /// `[T, k]`; one outside `0..E` is nothing.
    pub ids: Ids<'a>,
    /// `[T, k]`, with `probs`.
    pub weights: Option<In<'a, f32>>,
    /// `[T, E]`, written: 1 for the experts of a token, else 0.
    pub map: Out<'a, u8>,
    /// `[T, E]`, written, with `weights`: the sum of the weights of an expert's ids in a token's row, in order; else 0.
    pub probs: Option<Out<'a, f32>>,
}

impl<'a> FromIdsArgs<'a> {
    /// `ids` to `map`.
    pub fn new(ids: impl Into<Ids<'a>>, map: impl Into<Out<'a, u8>>) -> FromIdsArgs<'a> {
        FromIdsArgs { ids: ids.into(), weights: None, map: map.into(), probs: None }
    }
}

buffers!(FromIdsArgs<'a> { weights: In<f32>, probs: Out<f32> });

/// Kernel and grid of [`to_ids`].
///
/// # Errors
/// Those of [`RoutingMapDesc::validate`].
pub fn select_to_ids(desc: &RoutingMapDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.selection(Kernel::MapToIds, device)
}

/// Kernel and grid of [`from_ids`].
///
/// # Errors
/// Those of [`RoutingMapDesc::validate`].
pub fn select_from_ids(desc: &RoutingMapDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.selection(Kernel::IdsToMap { ids_bytes: desc.ids.bytes() }, device)
}

/// Weights and probabilities come together.
fn check_pair(weights: bool, probs: bool) -> Result<(), Error> {
    match (weights, probs) {
        (true, false) => Err(Error::Missing { operation: OPERATION, argument: "probs", reason: "there are weights" }),
        (false, true) => Err(Error::Missing { operation: OPERATION, argument: "weights", reason: "there are probs" }),
        _ => Ok(()),
    }
}

/// A map's experts as ids.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`RoutingMapDesc::validate`]; [`Error::Missing`] for weights without probabilities or the other way; those of a buffer:
/// [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn to_ids(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &RoutingMapDesc,
    args: ToIdsArgs<'_>,
) -> Result<(), Error> {
    let selection = select_to_ids(desc, kernels.device())?;
    check_pair(args.weights.is_some(), args.probs.is_some())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let (all, chosen) = (desc.tokens * desc.experts, desc.tokens * desc.top_k);
    let map = scope.read("map", args.map, all, 1)?;
    let probs = scope.read_some("probs", args.probs, all, SCALAR)?;
    let ids = scope.write("ids", args.ids, chosen, SCALAR)?;
    let weights = scope.write_some("weights", args.weights, chosen, SCALAR)?;
    let over = scope.write_some("over", args.over, 1, SCALAR)?;
    if let Some(over) = optional(&over) {
        scope.zero(over, size_of::<i32>())?;
    }
    if desc.tokens == 0 {
        return Ok(());
    }
    scope.launch(
        &selection,
        MapToIdsParams {
            map: map.address().into(),
            probs: optional(&probs).into(),
            ids: ids.address().into(),
            weights: optional(&weights).into(),
            over: optional(&over).into(),
            tokens: desc.tokens as u32,
            experts: desc.experts as u32,
            top_k: desc.top_k as u32,
        },
    )
}

/// Ids as a map.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`to_ids`].
pub fn from_ids(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &RoutingMapDesc,
    args: FromIdsArgs<'_>,
) -> Result<(), Error> {
    let selection = select_from_ids(desc, kernels.device())?;
    check_pair(args.weights.is_some(), args.probs.is_some())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let (all, chosen) = (desc.tokens * desc.experts, desc.tokens * desc.top_k);
    let ids = args.ids.open(&scope, "ids", desc.ids, chosen)?;
    let weights = scope.read_some("weights", args.weights, chosen, SCALAR)?;
    let map = scope.write("map", args.map, all, 1)?;
    let probs = scope.write_some("probs", args.probs, all, SCALAR)?;
    if desc.tokens == 0 {
        return Ok(());
    }
    scope.launch(
        &selection,
        IdsToMapParams {
            ids: ids.address().into(),
            weights: optional(&weights).into(),
            map: map.address().into(),
            probs: optional(&probs).into(),
            tokens: desc.tokens as u32,
            experts: desc.experts as u32,
            top_k: desc.top_k as u32,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::device::A100;

    #[test]
    fn faults_name_their_field() {
        let fault = |desc: RoutingMapDesc| desc.validate().unwrap_err().argument().unwrap();
        let desc = RoutingMapDesc::new(100, 8, 2);
        assert_eq!(select_to_ids(&desc, &A100).unwrap().grid, [13, 1, 1]);
        assert_eq!(fault(RoutingMapDesc { experts: 0, ..desc }), "experts");
        assert_eq!(fault(RoutingMapDesc { top_k: 0, ..desc }), "top_k");
        assert_eq!(fault(RoutingMapDesc { experts: 1 << 25, ..desc }), "map");
        assert_eq!(fault(RoutingMapDesc { top_k: 1 << 25, ..desc }), "ids");
        assert_eq!(check_pair(true, false).unwrap_err().argument(), Some("probs"));
        assert_eq!(check_pair(false, true).unwrap_err().argument(), Some("weights"));
    }
}
