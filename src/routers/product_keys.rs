//! Product keys: of `n^2` experts the `k` with the largest sums of two keys' scores (Lample et al., *Large Memory Layers with Product Keys*, 2019;
//! PEER: He, *Mixture of A Million Experts*, 2024; Doge).
//!
//! The router yields `2n` scores for each token ([`super::router`] with `2n` experts), a list for the first key and one for the second. Expert
//! `a n + b` has the score `first[a] + second[b]`; the weights are the softmax over the chosen. See
//! [`crate::reference::product_keys::product_keys`] for the order of equal sums and of what is no number.
//!
//! The way back is [`crate::routers::product_keys_backward`].
//!
//! ```
//! use moe_kernels::routers::product_keys::{self, ProductKeysArgs, ProductKeysDesc};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = moe_kernels::Kernels::new(stream.context())?;
//! // Keys 1 and 0 are the best of their lists.
//! let scores = stream.clone_htod(&[1.0_f32, 3.0, 2.0, 0.0])?;
//! let (mut ids, mut weights) = (stream.alloc_zeros(1)?, stream.alloc_zeros(1)?);
//! let desc = ProductKeysDesc::new(1, 2, 1);
//! product_keys::forward(&kernels, &stream, &desc, ProductKeysArgs::new(&scores, &mut ids, &mut weights))?;
//! assert_eq!((stream.clone_dtoh(&ids)?, stream.clone_dtoh(&weights)?), (vec![2], vec![1.0]));
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{BLOCK_WARPS, Kernel, MAX_PRODUCT_KEYS, MAX_UNIT_TOP_K};
use crate::rules::KeySplit;
use crate::runtime::builder::settings;
use crate::runtime::launch::{SCALAR, Scope};
use crate::runtime::params::ProductKeysParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "product_keys";

/// Shapes of a choice by product keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProductKeysDesc {
    /// Tokens `T` (with several heads, tokens times heads); 0 is allowed.
    pub tokens: usize,
    /// Keys of a list `n`, 1 to 128: `n^2` experts.
    pub keys: usize,
    /// Experts per token `k`, 1 to 64 and at most `n^2`.
    pub top_k: usize,
    /// Where a token's lists lie.
    pub split: KeySplit,
}

impl ProductKeysDesc {
    /// `top_k` of `keys^2` experts for each of `tokens` tokens, whose own row has both lists.
    pub const fn new(tokens: usize, keys: usize, top_k: usize) -> ProductKeysDesc {
        ProductKeysDesc { tokens, keys, top_k, split: KeySplit::Row }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::positive(OPERATION, "keys", self.keys)?;
        if self.keys > MAX_PRODUCT_KEYS as usize {
            return Err(Error::unsupported(OPERATION, "keys", format!("at most {MAX_PRODUCT_KEYS}"), self.keys));
        }
        shape::positive(OPERATION, "top_k", self.top_k)?;
        let experts = self.keys * self.keys;
        if self.top_k > experts {
            let expected = format!("at most the number of experts, {experts}");
            return Err(Error::invalid(OPERATION, "top_k", expected, self.top_k));
        }
        if self.top_k > MAX_UNIT_TOP_K as usize {
            return Err(Error::unsupported(OPERATION, "top_k", format!("at most {MAX_UNIT_TOP_K}"), self.top_k));
        }
        shape::product(OPERATION, "scores", &[self.tokens, 2 * self.keys])?;
        shape::product_i32(OPERATION, "ids", &[self.tokens, self.top_k]).map(drop)
    }
}

settings!(ProductKeysDesc { split: KeySplit });

/// Buffers of a choice by product keys.
#[non_exhaustive]
pub struct ProductKeysArgs<'a> {
    /// `[T, 2n]`.
    pub scores: In<'a, f32>,
    /// `[T, k]`, written: by falling score.
    pub ids: Out<'a, i32>,
    /// `[T, k]`, written.
    pub weights: Out<'a, f32>,
}

impl<'a> ProductKeysArgs<'a> {
    /// `scores` to `ids` and `weights`.
    pub fn new(
        scores: impl Into<In<'a, f32>>,
        ids: impl Into<Out<'a, i32>>,
        weights: impl Into<Out<'a, f32>>,
    ) -> ProductKeysArgs<'a> {
        ProductKeysArgs { scores: scores.into(), ids: ids.into(), weights: weights.into() }
    }
}

/// Chooses kernel and grid: a warp a token.
///
/// # Errors
/// Those of [`ProductKeysDesc::validate`].
pub fn select(desc: &ProductKeysDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let blocks = (desc.tokens as u32).div_ceil(BLOCK_WARPS).max(1);
    Ok(Selection::new(Kernel::ProductKeys, [blocks, 1, 1]))
}

/// Chooses every token's experts.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`ProductKeysDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`]; and those
/// of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &ProductKeysDesc,
    args: ProductKeysArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    if desc.tokens == 0 {
        return Ok(());
    }
    let &ProductKeysDesc { tokens, keys, top_k, split } = desc;
    let scores = scope.read("scores", args.scores, tokens * 2 * keys, SCALAR)?;
    let ids = scope.write("ids", args.ids, tokens * top_k, SCALAR)?;
    let weights = scope.write("weights", args.weights, tokens * top_k, SCALAR)?;
    // Both lists' places rise by the same from token to token.
    let [[_, second], [stride, _]] = [split.places(0, tokens, keys), split.places(1, tokens, keys)];
    scope.launch(
        &selection,
        ProductKeysParams {
            scores: scores.address().into(),
            ids: ids.address().into(),
            weights: weights.address().into(),
            tokens: tokens as u32,
            keys: keys as u32,
            top_k: top_k as u32,
            stride: stride as u32,
            second_lo: second as u32,
            second_hi: (second as u64 >> 32) as u32,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_field() {
        let desc = ProductKeysDesc::new(10, 8, 4);
        let fault = |desc: ProductKeysDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(desc.validate(), Ok(()));
        assert_eq!(fault(ProductKeysDesc { keys: 0, ..desc }), "keys");
        assert_eq!(fault(ProductKeysDesc { keys: 129, ..desc }), "keys");
        assert_eq!(fault(ProductKeysDesc { keys: 2, top_k: 5, ..desc }), "top_k");
        assert_eq!(fault(ProductKeysDesc { top_k: 0, ..desc }), "top_k");
        assert_eq!(fault(ProductKeysDesc { keys: 9, top_k: 65, ..desc }), "top_k");
        assert_eq!(fault(ProductKeysDesc { tokens: 1 << 30, ..desc }), "ids");
    }
}
