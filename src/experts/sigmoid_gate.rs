//! A shared expert's gate `s[t] = sigmoid(l[t])` by itself, and the way back through it: `d_l[t] = d_s[t] s[t] (1 - s[t])`.
//!
//! [`crate::experts::combine`] applies the gate on its own; a backward pass needs its values as weights of rows.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::Kernel;
use crate::runtime::builder::buffers;
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::SigmoidGateParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "sigmoid_gate";

/// Buffers of a gate.
#[non_exhaustive]
pub struct SigmoidGateArgs<'a> {
    /// `[T]`.
    pub logits: In<'a, f32>,
    /// `[T]`: gradients of the gates. With them the result is that of the logits, else the gates.
    pub d: Option<In<'a, f32>>,
    /// `[T]`, written.
    pub out: Out<'a, f32>,
}

impl<'a> SigmoidGateArgs<'a> {
    /// The gates of `logits`.
    pub fn new(logits: impl Into<In<'a, f32>>, out: impl Into<Out<'a, f32>>) -> SigmoidGateArgs<'a> {
        SigmoidGateArgs { logits: logits.into(), d: None, out: out.into() }
    }
}

buffers!(SigmoidGateArgs<'a> { d: In<f32> });

/// Chooses kernel and grid: a thread a token, of which there are `tokens`.
///
/// # Errors
/// [`Error::Overflow`], naming `tokens`.
pub fn select(tokens: usize, _device: &DeviceInfo) -> Result<Selection, Error> {
    let tokens = shape::size(OPERATION, "tokens", tokens)?;
    Ok(Selection::new(Kernel::SigmoidGate, [tokens.div_ceil(Kernel::SigmoidGate.threads()).max(1), 1, 1]))
}

/// Computes the gates of `tokens` tokens, or the gradients of their logits.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`select`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    tokens: usize,
    args: SigmoidGateArgs<'_>,
) -> Result<(), Error> {
    let selection = select(tokens, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    if tokens == 0 {
        return Ok(());
    }
    let logits = scope.read("logits", args.logits, tokens, SCALAR)?;
    let d = scope.read_some("d", args.d, tokens, SCALAR)?;
    let out = scope.write("out", args.out, tokens, SCALAR)?;
    scope.launch(
        &selection,
        SigmoidGateParams {
            logits: logits.address().into(),
            d: optional(&d).into(),
            out: out.address().into(),
            tokens: tokens as u32,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::device::A100;

    #[test]
    fn blocks_cover_the_tokens() {
        assert_eq!(select(257, &A100).unwrap().grid, [2, 1, 1]);
        assert_eq!(select(1 << 31, &A100).unwrap_err().argument(), Some("tokens"));
    }
}
