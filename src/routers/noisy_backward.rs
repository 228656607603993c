//! The way back through noisy top-k gating ([`crate::routers::noisy`]): to both products' gradients, from those of weights and of both losses.
//!
//! A kept expert's weight is a softmax of noisy logits `H = clean + n d`, `d = softplus(raw) + epsilon`: `dclean = dH`, and
//! `draw = dH n sigmoid(raw)`. The chance of being kept that the load sums up compares `clean` with a threshold, the noisy logit of another
//! expert, to whose products its gradient goes on (the authors' code does not detach it). The noise is that of the forward pass, drawn again.
//! Counts have no gradient. See [`crate::reference::noisy::noisy_backward`].

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::noisy::{HeldLogits, NoisyLogits, check_rule};
use crate::experts::Dispatched;
use crate::registry::{BLOCK_WARPS, Kernel};
use crate::rules::NoisyRule;
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{Address, SCALAR, Scope, optional};
use crate::runtime::params::NoisyBackwardParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "noisy_backward";

/// Shapes, rule and losses of a noisy gating's backward pass.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct NoisyBackwardDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// The rule of the forward pass, with its source of noise.
    pub rule: NoisyRule,
    /// Factor of `CV(importance)^2`, 0 for none.
    pub importance: f32,
    /// Factor of `CV(load)^2`, 0 for none.
    pub load: f32,
    /// Adds to the gradients instead of writing them.
    pub accumulate: bool,
}

impl NoisyBackwardDesc {
    /// Of choices by `rule` for `tokens` tokens among `experts` experts, without losses.
    pub const fn new(tokens: usize, experts: usize, rule: NoisyRule) -> NoisyBackwardDesc {
        NoisyBackwardDesc { tokens, experts, rule, importance: 0.0, load: 0.0, accumulate: false }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::experts(OPERATION, self.experts)?;
        check_rule(OPERATION, &self.rule, self.experts)?;
        shape::product(OPERATION, "logits", &[self.tokens, 2, self.experts])?;
        shape::product_i32(OPERATION, "ids", &[self.tokens, self.rule.top_k])?;
        check_factors(OPERATION, [self.importance, self.load])
    }
}

settings!(NoisyBackwardDesc { importance: f32, load: f32, accumulate: bool });

pub(crate) fn check_factors(operation: &'static str, [importance, load]: [f32; 2]) -> Result<(), Error> {
    for (argument, factor) in [("importance", importance), ("load", load)] {
        if !factor.is_finite() {
            return Err(Error::invalid(operation, argument, "a finite number", factor));
        }
    }
    Ok(())
}

/// Where gradients of the router's two products go.
#[non_exhaustive]
pub enum NoisyGradients<'a> {
    /// Two matrices.
    Apart {
        /// `[T, E]`, of `x Wg`.
        clean: Out<'a, f32>,
        /// `[T, E]`, of `x Wnoise`.
        raw: Out<'a, f32>,
    },
    /// `[T, 2E]`, a token's gradients of `x Wg` and then those of `x Wnoise`: what [`crate::routers::router_backward`] takes of one product.
    Together(Out<'a, f32>),
}

impl<'a> NoisyGradients<'a> {
    /// Two matrices.
    pub fn apart(clean: impl Into<Out<'a, f32>>, raw: impl Into<Out<'a, f32>>) -> NoisyGradients<'a> {
        NoisyGradients::Apart { clean: clean.into(), raw: raw.into() }
    }

    /// One matrix, of which a row holds both.
    pub fn together(logits: impl Into<Out<'a, f32>>) -> NoisyGradients<'a> {
        NoisyGradients::Together(logits.into())
    }
}

/// Buffers of a noisy gating's backward pass.
#[non_exhaustive]
pub struct NoisyBackwardArgs<'a> {
    /// The forward pass's.
    pub logits: NoisyLogits<'a>,
    /// `[T, k]`, as the forward pass wrote them: a token whose ids are -1 is padding, without a gradient.
    pub ids: In<'a, i32>,
    /// `[T, k]`: gradients of the weights; with `dispatched` `[slots]`, by slot.
    pub d_weights: In<'a, f32>,
    /// The dispatch that `ids` went through. A choice without a slot has no gradient of its own.
    pub dispatched: Option<&'a Dispatched>,
    /// `[2]`: that of the forward pass, if it had one, with the same content.
    pub noise_state: Option<In<'a, u64>>,
    /// `[E]`, of the forward pass: exactly where its loss has a factor.
    pub importance: Option<In<'a, f32>>,
    /// `[E]`, of the forward pass: exactly where its loss has a factor.
    pub load: Option<In<'a, f32>>,
    /// `[E]`: what else each expert's load is worth.
    pub d_load: Option<In<'a, f32>>,
    /// Written, or added to.
    pub d_logits: NoisyGradients<'a>,
}

impl<'a> NoisyBackwardArgs<'a> {
    /// `d_weights` of `ids` to `d_logits`.
    pub fn new(
        logits: NoisyLogits<'a>,
        ids: impl Into<In<'a, i32>>,
        d_weights: impl Into<In<'a, f32>>,
        d_logits: NoisyGradients<'a>,
    ) -> NoisyBackwardArgs<'a> {
        NoisyBackwardArgs {
            logits,
            ids: ids.into(),
            d_weights: d_weights.into(),
            dispatched: None,
            noise_state: None,
            importance: None,
            load: None,
            d_load: None,
            d_logits,
        }
    }

    /// With `d_weights` by the slots of `dispatched`.
    #[must_use]
    pub fn dispatched(self, dispatched: &'a Dispatched) -> NoisyBackwardArgs<'a> {
        NoisyBackwardArgs { dispatched: Some(dispatched), ..self }
    }
}

buffers!(NoisyBackwardArgs<'a> { noise_state: In<u64>, importance: In<f32>, load: In<f32>, d_load: In<f32> });

/// Chooses kernel and grid: a warp for each token up to six blocks a multiprocessor.
///
/// # Errors
/// Those of [`NoisyBackwardDesc::validate`].
pub fn select(desc: &NoisyBackwardDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    Ok(select_rows(desc.tokens, false, device))
}

pub(crate) fn select_rows(rows: usize, grouped: bool, device: &DeviceInfo) -> Selection {
    let blocks = rows.div_ceil(BLOCK_WARPS as usize).clamp(1, 6 * device.multiprocessors as usize);
    Selection::new(Kernel::NoisyBackward { grouped }, [blocks as u32, 1, 1])
}

/// Sums that a loss is made of are there exactly where it has a factor.
pub(crate) fn check_sums(operation: &'static str, sums: [(&'static str, f32, bool); 2]) -> Result<(), Error> {
    for (argument, factor, given) in sums {
        match (factor != 0.0, given) {
            (true, false) => return Err(Error::Missing { operation, argument, reason: "its loss has a factor" }),
            (false, true) => return Err(Error::Unexpected { operation, argument, reason: "its loss has no factor" }),
            _ => {}
        }
    }
    Ok(())
}

/// Opens gradients of both products for writing.
pub(crate) fn open_gradients<'a, 'c: 'a>(
    scope: &Scope<'a>,
    gradients: NoisyGradients<'c>,
    [clean_name, raw_name, both_name]: [&'static str; 3],
    rows: usize,
    experts: usize,
) -> Result<HeldLogits<'a>, Error> {
    Ok(match gradients {
        NoisyGradients::Apart { clean, raw } => HeldLogits::Apart(
            scope.write(clean_name, clean, rows * experts, SCALAR)?,
            scope.write(raw_name, raw, rows * experts, SCALAR)?,
            experts,
        ),
        NoisyGradients::Together(both) => {
            HeldLogits::Together(scope.write(both_name, both, rows * 2 * experts, SCALAR)?, experts)
        }
    })
}

/// Computes the gradients of both products.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`NoisyBackwardDesc::validate`]; [`Error::Missing`] or [`Error::Unexpected`] for sums against the descriptor; those of a buffer:
/// [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &NoisyBackwardDesc,
    args: NoisyBackwardArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let sums = [("importance", desc.importance, args.importance.is_some()), ("load", desc.load, args.load.is_some())];
    check_sums(OPERATION, sums)?;
    let NoisyBackwardDesc { tokens, experts, rule, .. } = *desc;
    if let Some(shape) = args.dispatched.map(Dispatched::shape)
        && (shape.tokens, shape.top_k) != (tokens, Some(rule.top_k))
    {
        let expected = format!("a dispatch of {tokens} tokens with {} choices each", rule.top_k);
        return Err(Error::invalid(OPERATION, "dispatched", expected, format!("{shape:?}")));
    }
    if tokens == 0 {
        return Ok(());
    }
    let logits = HeldLogits::open(&scope, args.logits, ["clean", "raw", "logits"], tokens, experts)?;
    let choices = tokens * rule.top_k;
    let ids = scope.read("ids", args.ids, choices, SCALAR)?;
    let gradients = args.dispatched.map_or(choices, |dispatched| dispatched.shape().slots);
    let d_weights = scope.read("d_weights", args.d_weights, gradients, SCALAR)?;
    let lists = args.dispatched.map(|dispatched| dispatched.read(&scope)).transpose()?;
    let noise_state = scope.read_noise_state(args.noise_state)?;
    let importance = scope.read_some("importance", args.importance, experts, SCALAR)?;
    let load = scope.read_some("load", args.load, experts, SCALAR)?;
    let d_load = scope.read_some("d_load", args.d_load, experts, SCALAR)?;
    let d_logits = open_gradients(&scope, args.d_logits, ["d_clean", "d_raw", "d_logits"], tokens, experts)?;
    let at = Addresses {
        logits: logits.addresses(),
        ids: ids.address(),
        d_weights: d_weights.address(),
        token_slot: lists.as_ref().map(|lists| lists.addresses().token_slot),
        noise_state: optional(&noise_state),
        importance: optional(&importance),
        load: optional(&load),
        d_load: optional(&d_load),
        d_logits: d_logits.addresses(),
    };
    enqueue(&scope, desc, &selection, at)
}

/// What the way back of one level reads and writes.
pub(crate) struct Addresses<'a> {
    pub(crate) logits: (Address<'a>, Address<'a>, u32),
    pub(crate) ids: Address<'a>,
    pub(crate) d_weights: Address<'a>,
    pub(crate) token_slot: Option<Address<'a>>,
    pub(crate) noise_state: Option<Address<'a>>,
    pub(crate) importance: Option<Address<'a>>,
    pub(crate) load: Option<Address<'a>>,
    pub(crate) d_load: Option<Address<'a>>,
    pub(crate) d_logits: (Address<'a>, Address<'a>, u32),
}

/// Enqueues the way back of the first level, or the only one.
pub(crate) fn enqueue(
    scope: &Scope<'_>,
    desc: &NoisyBackwardDesc,
    selection: &Selection,
    at: Addresses<'_>,
) -> Result<(), Error> {
    let NoisyRule { top_k, noise_epsilon, noise } = desc.rule;
    let (clean, raw, row_stride) = at.logits;
    let (d_clean, d_raw, d_row_stride) = at.d_logits;
    let [seed_lo, seed_hi, offset_lo, offset_hi] = noise.words_of_source();
    scope.launch(
        selection,
        NoisyBackwardParams {
            clean_logits: clean.into(),
            noise_logits: raw.into(),
            row_stride,
            ids: at.ids.into(),
            d_weights: at.d_weights.into(),
            token_slot: at.token_slot.into(),
            tokens: desc.tokens as u32,
            experts: desc.experts as u32,
            top_k: top_k as u32,
            epsilon: noise_epsilon,
            seed_lo,
            seed_hi,
            offset_lo,
            offset_hi,
            noise_state: at.noise_state.into(),
            importance: at.importance.into(),
            importance_factor: desc.importance,
            load: at.load.into(),
            load_factor: desc.load,
            d_load: at.d_load.into(),
            d_clean: d_clean.into(),
            d_raw: d_raw.into(),
            d_row_stride,
            accumulate: u32::from(desc.accumulate),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::NoiseSource;

    #[test]
    fn faults_name_their_field() {
        let desc = NoisyBackwardDesc::new(10, 8, NoisyRule::new(2, NoiseSource::new(1, 0)));
        let fault = |desc: NoisyBackwardDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(desc.importance(1.0).load(1.0).validate(), Ok(()));
        assert_eq!(fault(NoisyBackwardDesc { experts: 0, ..desc }), "experts");
        assert_eq!(fault(NoisyBackwardDesc { tokens: 1 << 40, ..desc }), "tokens");
        assert_eq!(fault(NoisyBackwardDesc { experts: 1, ..desc }), "top_k");
        assert_eq!(fault(desc.importance(f32::NAN)), "importance");
        assert_eq!(fault(desc.load(f32::INFINITY)), "load");
    }
}
