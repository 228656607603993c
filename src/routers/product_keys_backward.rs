//! The way back through a choice by product keys ([`crate::routers::product_keys`]): from gradients of weights to those of both lists' scores.
//! The choice is constant; a key that several choices share adds up theirs.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::product_keys::ProductKeysDesc;
use crate::registry::{BLOCK_WARPS, Kernel};
use crate::runtime::builder::settings;
use crate::runtime::launch::{SCALAR, Scope};
use crate::runtime::params::ProductKeysBackwardParams;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "product_keys_backward";

/// Shapes of the backward pass of a choice by product keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProductKeysBackwardDesc {
    /// The forward pass.
    pub forward: ProductKeysDesc,
    /// Adds to `d_scores` instead of writing it.
    pub accumulate: bool,
}

impl ProductKeysBackwardDesc {
    /// Of `forward`.
    pub const fn new(forward: ProductKeysDesc) -> ProductKeysBackwardDesc {
        ProductKeysBackwardDesc { forward, accumulate: false }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// Those of [`ProductKeysDesc::validate`].
    pub fn validate(&self) -> Result<(), Error> {
        self.forward.validate().map_err(|error| error.within(OPERATION))
    }
}

settings!(ProductKeysBackwardDesc { accumulate: bool });

/// Buffers of the backward pass of a choice by product keys.
#[non_exhaustive]
pub struct ProductKeysBackwardArgs<'a> {
    /// `[T, 2n]`: the forward pass's.
    pub scores: In<'a, f32>,
    /// `[T, k]`: what was chosen; one beyond `n^2` is no choice.
    pub ids: In<'a, i32>,
    /// `[T, k]`: gradients of the weights.
    pub d_weights: In<'a, f32>,
    /// `[T, 2n]`, written, or added to.
    pub d_scores: Out<'a, f32>,
}

impl<'a> ProductKeysBackwardArgs<'a> {
    /// `d_weights` of `ids` to `d_scores`.
    pub fn new(
        scores: impl Into<In<'a, f32>>,
        ids: impl Into<In<'a, i32>>,
        d_weights: impl Into<In<'a, f32>>,
        d_scores: impl Into<Out<'a, f32>>,
    ) -> ProductKeysBackwardArgs<'a> {
        ProductKeysBackwardArgs {
            scores: scores.into(),
            ids: ids.into(),
            d_weights: d_weights.into(),
            d_scores: d_scores.into(),
        }
    }
}

/// Chooses kernel and grid: a warp a token.
///
/// # Errors
/// Those of [`ProductKeysBackwardDesc::validate`].
pub fn select(desc: &ProductKeysBackwardDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let blocks = (desc.forward.tokens as u32).div_ceil(BLOCK_WARPS).max(1);
    Ok(Selection::new(Kernel::ProductKeysBackward, [blocks, 1, 1]))
}

/// Computes the gradient of the scores.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`ProductKeysBackwardDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &ProductKeysBackwardDesc,
    args: ProductKeysBackwardArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let ProductKeysDesc { tokens, keys, top_k, split, .. } = desc.forward;
    if tokens == 0 {
        return Ok(());
    }
    let scores = scope.read("scores", args.scores, tokens * 2 * keys, SCALAR)?;
    let ids = scope.read("ids", args.ids, tokens * top_k, SCALAR)?;
    let d_weights = scope.read("d_weights", args.d_weights, tokens * top_k, SCALAR)?;
    let d_scores = scope.write("d_scores", args.d_scores, tokens * 2 * keys, SCALAR)?;
    // Both lists' places rise by the same from token to token.
    let [[_, second], [stride, _]] = [split.places(0, tokens, keys), split.places(1, tokens, keys)];
    scope.launch(
        &selection,
        ProductKeysBackwardParams {
            scores: scores.address().into(),
            ids: ids.address().into(),
            d_weights: d_weights.address().into(),
            d_scores: d_scores.address().into(),
            tokens: tokens as u32,
            keys: keys as u32,
            top_k: top_k as u32,
            stride: stride as u32,
            second_lo: second as u32,
            second_hi: (second as u64 >> 32) as u32,
            accumulate: u32::from(desc.accumulate),
        },
    )
}
