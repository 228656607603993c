//! Banks of experts by token type: a mask for each bank, of the tokens that are its own (ERNIE 4.5 VL, where text and vision have routers and
//! experts of their own). [`crate::layer::BanksPlan`] runs a layer for each.
//!
//! ```
//! use moe_kernels::routers::token_banks::{self, TokenBanksArgs, TokenBanksDesc};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = moe_kernels::Kernels::new(stream.context())?;
//! // Text, a video's token, an image's.
//! let types = stream.clone_htod(&[0, 2, 1])?;
//! let mut masks = stream.alloc_zeros(2 * 3)?;
//! token_banks::forward(&kernels, &stream, &TokenBanksDesc::new(3, 2), TokenBanksArgs::new(&types, &mut masks))?;
//! assert_eq!(stream.clone_dtoh(&masks)?, [1, 0, 0, 0, 1, 1]);
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::capacity::Ids;
use crate::registry::Kernel;
use crate::rules::IdFormat;
use crate::runtime::builder::settings;
use crate::runtime::launch::Scope;
use crate::runtime::params::TokenBanksParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Error, Kernels, Out, Selection};

const OPERATION: &str = "token_banks";

/// Shapes of a split by token type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TokenBanksDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Banks `B`, at least 1. Types from `B - 1` on are the last one's.
    pub banks: usize,
    /// How the types are stored.
    pub types: IdFormat,
}

impl TokenBanksDesc {
    /// `banks` masks of `tokens` tokens, by types of 32 bits.
    pub const fn new(tokens: usize, banks: usize) -> TokenBanksDesc {
        TokenBanksDesc { tokens, banks, types: IdFormat::I32 }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::positive(OPERATION, "banks", self.banks)?;
        shape::product(OPERATION, "masks", &[self.banks, self.tokens]).map(drop)
    }
}

settings!(TokenBanksDesc { types: IdFormat });

/// Buffers of a split by token type.
#[non_exhaustive]
pub struct TokenBanksArgs<'a> {
    /// `[T]`.
    pub types: Ids<'a>,
    /// `[B, T]`, written: 1 for a bank's own tokens ([`crate::TokenMask::attention`]).
    pub masks: Out<'a, u8>,
}

impl<'a> TokenBanksArgs<'a> {
    /// `types` to `masks`.
    pub fn new(types: impl Into<Ids<'a>>, masks: impl Into<Out<'a, u8>>) -> TokenBanksArgs<'a> {
        TokenBanksArgs { types: types.into(), masks: masks.into() }
    }
}

/// Chooses kernel and grid: a thread a token.
///
/// # Errors
/// Those of [`TokenBanksDesc::validate`].
pub fn select(desc: &TokenBanksDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let kernel = Kernel::TokenBanks { ids_bytes: desc.types.bytes() };
    let blocks = (desc.tokens as u32).div_ceil(kernel.threads()).max(1);
    Ok(Selection::new(kernel, [blocks, 1, 1]))
}

/// Writes every bank's mask.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`TokenBanksDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`], types
/// of another format; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &TokenBanksDesc,
    args: TokenBanksArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    if desc.tokens == 0 {
        return Ok(());
    }
    let types = args.types.open(&scope, "types", desc.types, desc.tokens)?;
    let masks = scope.write("masks", args.masks, desc.banks * desc.tokens, 1)?;
    scope.launch(
        &selection,
        TokenBanksParams {
            types: types.address().into(),
            masks: masks.address().into(),
            tokens: desc.tokens as u32,
            banks: desc.banks as u32,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_field() {
        let desc = TokenBanksDesc::new(10, 2);
        let fault = |desc: TokenBanksDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(desc.validate(), Ok(()));
        assert_eq!(fault(TokenBanksDesc { banks: 0, ..desc }), "banks");
        assert_eq!(fault(TokenBanksDesc { tokens: 1 << 31, ..desc }), "tokens");
    }
}
