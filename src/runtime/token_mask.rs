//! Which tokens of a batch count: the others are padding.

use super::buffer::In;
use super::launch::{Address, Held, SCALAR, Scope, optional};
use crate::Error;

/// Which tokens of a batch count. The others are padding: they get ids -1 and weights 0, take no slot, and are in no loss, statistic, capacity
/// or update of a bias. By default all tokens count.
///
/// A mask says it token by token, a number of valid tokens for those behind it; with both, a token counts that both let count. Both are read on
/// the device when the work runs: one CUDA graph serves every batch up to its size.
#[derive(Clone, Copy, Default)]
pub struct TokenMask<'a> {
    mask: Option<In<'a, u8>>,
    ones_are_padding: bool,
    valid_tokens: Option<In<'a, u32>>,
}

impl<'a> TokenMask<'a> {
    /// All tokens count.
    pub const fn all() -> TokenMask<'a> {
        TokenMask { mask: None, ones_are_padding: false, valid_tokens: None }
    }

    /// `[T]`: a token counts where it is not 0 (transformers' `attention_mask`).
    pub fn attention(mask: impl Into<In<'a, u8>>) -> TokenMask<'a> {
        TokenMask { mask: Some(mask.into()), ..TokenMask::all() }
    }

    /// `[T]`: a token counts where it is 0 (Megatron-LM's `padding_mask`, vLLM's `is_padding`).
    pub fn padding(mask: impl Into<In<'a, u8>>) -> TokenMask<'a> {
        TokenMask { mask: Some(mask.into()), ones_are_padding: true, ..TokenMask::all() }
    }

    /// `[1]`: the first so many tokens count; more than there are is all of them.
    pub fn first(valid_tokens: impl Into<In<'a, u32>>) -> TokenMask<'a> {
        TokenMask::all().valid_tokens(valid_tokens)
    }

    /// Of those that count, only the first so many tokens of the batch; `[1]`.
    #[must_use]
    pub fn valid_tokens(self, valid_tokens: impl Into<In<'a, u32>>) -> TokenMask<'a> {
        TokenMask { valid_tokens: Some(valid_tokens.into()), ..self }
    }

    /// Whether any token may be padding.
    pub fn is_all(&self) -> bool {
        self.mask.is_none() && self.valid_tokens.is_none()
    }

    pub(crate) fn open<'b>(self, scope: &Scope<'b>, tokens: usize) -> Result<HeldMask<'b>, Error>
    where
        Self: 'b,
    {
        Ok(HeldMask {
            mask: scope.read_some("mask", self.mask, tokens, 1)?,
            ones_are_padding: self.ones_are_padding,
            valid_tokens: scope.read_some("valid_tokens", self.valid_tokens, 1, SCALAR)?,
        })
    }
}

/// A token mask whose buffers are opened.
pub(crate) struct HeldMask<'a> {
    mask: Option<Held<'a>>,
    ones_are_padding: bool,
    valid_tokens: Option<Held<'a>>,
}

impl HeldMask<'_> {
    pub(crate) fn addresses(&self) -> MaskAddresses<'_> {
        MaskAddresses {
            mask: optional(&self.mask),
            ones_are_padding: self.ones_are_padding,
            valid_tokens: optional(&self.valid_tokens),
        }
    }
}

/// A token mask as kernels take it.
#[derive(Clone, Copy, Default)]
pub(crate) struct MaskAddresses<'a> {
    pub(crate) mask: Option<Address<'a>>,
    ones_are_padding: bool,
    pub(crate) valid_tokens: Option<Address<'a>>,
}

impl<'a> MaskAddresses<'a> {
    /// Bit 0 of a kernel's `token_flags`.
    pub(crate) fn flags(&self) -> u32 {
        u32::from(self.ones_are_padding)
    }

    /// The same buffers for an operation inside another.
    pub(crate) fn input(&self, tokens: usize) -> TokenMask<'a> {
        TokenMask {
            mask: self.mask.map(|mask| mask.input(tokens)),
            ones_are_padding: self.ones_are_padding,
            valid_tokens: self.valid_tokens.map(|count| count.input(1)),
        }
    }
}
