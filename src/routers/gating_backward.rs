//! The gradient of logits, from those of the chosen experts' weights and of the losses that the router is trained with.
//!
//! With the weights of [`crate::routers::gating`], `w[t,j] = scale p / D` of the scores p of the chosen, and a loss L:
//!
//! `dL/dl[t,e] = sum_j dL/dw[t,j] dw[t,j]/dl[t,e] + balance d(balance loss)/dl[t,e] + z d(z-loss)/dl[t,e]`
//!
//! What a rule's gradient reaches follows from its formula: a softmax over all experts that is not renormalised every logit; renormalised
//! without an epsilon, and the softmax over the chosen, only the chosen; sigmoid scores the chosen. One renormalised choice has exactly none.
//! The choice is constant: correction bias and groups have no gradient, and neither has what an expert turned away (give it -1 and its weight's
//! gradient is not read). The counts of the balancing loss are constant (Switch Transformers, section 2.2).

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::experts::Dispatched;
use crate::registry::{BLOCK_WARPS, Kernel};
use crate::rules::{ChoiceBy, Gating, LossGradient, LossScore, Renormalise, Score};
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::GatingBackwardParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "gating_backward";

/// Shapes and rule of a gating's backward pass.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct GatingBackwardDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// Experts per token `k`, 1 to 64.
    pub top_k: usize,
    /// The rule of the forward pass.
    pub gating: Gating,
    /// Losses of the router.
    pub losses: Option<LossGradient>,
    /// Adds to `d_logits` instead of writing it.
    pub accumulate: bool,
}

impl GatingBackwardDesc {
    /// Of `top_k` of `experts` experts for each of `tokens` tokens, without losses.
    pub const fn new(tokens: usize, experts: usize, top_k: usize, gating: Gating) -> GatingBackwardDesc {
        GatingBackwardDesc { tokens, experts, top_k, gating, losses: None, accumulate: false }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field. Not supported are
    /// [`Score::SparseMixer`], whose published gradient is an estimate of its own, learned scales, appended experts and an infinite p-norm.
    pub fn validate(&self) -> Result<(), Error> {
        let gating = &self.gating;
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::experts(OPERATION, self.experts)?;
        let enough = if gating.choice == ChoiceBy::Given { usize::MAX } else { self.experts };
        shape::top_k_up_to(OPERATION, self.top_k, enough, crate::MAX_TOP_K)?;
        shape::product_i32(OPERATION, "ids", &[self.tokens, self.top_k])?;
        shape::product(OPERATION, "logits", &[self.tokens, self.experts])?;
        let unsupported = |argument, supported: &str, got: String| {
            Err(Error::unsupported(OPERATION, argument, supported.to_owned(), got))
        };
        if gating.score == Score::SparseMixer {
            return unsupported("gating.score", "Softmax, TopkSoftmax, Sigmoid or SqrtSoftplus", "SparseMixer".into());
        }
        if gating.expert_scale || gating.global_scale {
            let argument = if gating.expert_scale { "gating.expert_scale" } else { "gating.global_scale" };
            return unsupported(argument, "no learned scale", "true".into());
        }
        if let Some(appended) = gating.appended {
            return unsupported("gating.appended", "none", format!("{appended:?}"));
        }
        if !gating.scale.is_finite() {
            return Err(Error::invalid(OPERATION, "gating.scale", "a finite number", gating.scale));
        }
        match gating.renormalise {
            Some(Renormalise::Plus(epsilon) | Renormalise::AtLeast(epsilon))
                if !(epsilon.is_finite() && epsilon >= 0.0) =>
            {
                return Err(Error::invalid(OPERATION, "gating.renormalise", "an epsilon of at least 0", epsilon));
            }
            Some(Renormalise::PNorm(p)) if !(p.is_finite() && p > 0.0) => {
                return unsupported("gating.renormalise", "a p-norm of finite p above 0", p.to_string());
            }
            _ => {}
        }
        if let Some(losses) = &self.losses {
            for (argument, value) in [("losses.balance", losses.balance), ("losses.z", losses.z)] {
                if !value.is_finite() {
                    return Err(Error::invalid(OPERATION, argument, "a finite number", value));
                }
            }
        }
        Ok(())
    }

    fn balances(&self) -> bool {
        self.losses.is_some_and(|losses| losses.balance != 0.0)
    }
}

settings!(GatingBackwardDesc { losses: Option<LossGradient>, accumulate: bool });

/// Buffers of a gating's backward pass.
#[non_exhaustive]
pub struct GatingBackwardArgs<'a> {
    /// `[T, E]`, those of the forward pass.
    pub logits: In<'a, f32>,
    /// `[T, k]`: what was chosen. One that is no expert's is no choice; a token of which none is an expert's is padding, without a gradient.
    pub ids: In<'a, i32>,
    /// `[T, k]`: gradients of the weights; those of no choice are not used. With `dispatched` `[slots]`, by slot.
    pub d_weights: In<'a, f32>,
    /// The dispatch that `ids` went through, whose slots `d_weights` are of
    /// ([`crate::experts::activation_backward::ActivationBackwardArgs::d_slot_weight`]). A choice without a slot has no gradient of its own; its score
    /// is in the sums that others were divided by.
    pub dispatched: Option<&'a Dispatched>,
    /// `[E]`: the slots that the balancing loss counts, exactly where it has a factor.
    pub counts: Option<In<'a, i32>>,
    /// `[1]`: tokens of which the losses are means, T if absent. The first word of [`crate::routers::measured_gating::RouterStats`].
    pub counted: Option<In<'a, u32>>,
    /// `[T, E]`, written, or added to.
    pub d_logits: Out<'a, f32>,
}

impl<'a> GatingBackwardArgs<'a> {
    /// `d_weights` of `ids` to `d_logits`.
    pub fn new(
        logits: impl Into<In<'a, f32>>,
        ids: impl Into<In<'a, i32>>,
        d_weights: impl Into<In<'a, f32>>,
        d_logits: impl Into<Out<'a, f32>>,
    ) -> GatingBackwardArgs<'a> {
        GatingBackwardArgs {
            logits: logits.into(),
            ids: ids.into(),
            d_weights: d_weights.into(),
            dispatched: None,
            counts: None,
            counted: None,
            d_logits: d_logits.into(),
        }
    }
}

impl<'a> GatingBackwardArgs<'a> {
    /// With `d_weights` by the slots of `dispatched`.
    #[must_use]
    pub fn dispatched(self, dispatched: &'a Dispatched) -> GatingBackwardArgs<'a> {
        GatingBackwardArgs { dispatched: Some(dispatched), ..self }
    }
}

buffers!(GatingBackwardArgs<'a> { counts: In<i32>, counted: In<u32> });

/// Chooses kernel and grid: a warp for each token up to eight blocks a multiprocessor.
///
/// # Errors
/// Those of [`GatingBackwardDesc::validate`].
pub fn select(desc: &GatingBackwardDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let blocks = (desc.tokens as u32).div_ceil(BLOCK_WARPS).min(8 * device.multiprocessors).max(1);
    Ok(Selection::new(Kernel::GatingBackward, [blocks, 1, 1]))
}

const RENORMALISE: u32 = 1;
const AT_LEAST: u32 = 2;
const BY_NORM: u32 = 4;
const ADD: u32 = 8;
const SIGMOIDS: u32 = 16;
const BALANCE: u32 = 32;
const Z: u32 = 64;
const PLAIN: u32 = 128;

/// Computes the gradient of the logits.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`GatingBackwardDesc::validate`]; [`Error::Missing`] or [`Error::Unexpected`] for counts against the descriptor; those of a
/// buffer: [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &GatingBackwardDesc,
    args: GatingBackwardArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let (operation, argument) = (OPERATION, "counts");
    match (desc.balances(), args.counts.is_some()) {
        (true, false) => {
            let reason = "the balancing loss has a factor";
            return Err(Error::Missing { operation, argument, reason });
        }
        (false, true) => {
            let reason = "no balancing loss has a factor";
            return Err(Error::Unexpected { operation, argument, reason });
        }
        _ => {}
    }
    if args.counted.is_some() && desc.losses.is_none() {
        let reason = "there are no losses";
        return Err(Error::Unexpected { operation, argument: "counted", reason });
    }
    if let Some(shape) = args.dispatched.map(Dispatched::shape)
        && (shape.tokens, shape.top_k) != (desc.tokens, Some(desc.top_k))
    {
        let expected = format!("a dispatch of {} tokens with {} choices each", desc.tokens, desc.top_k);
        return Err(Error::invalid(OPERATION, "dispatched", expected, format!("{shape:?}")));
    }
    if desc.tokens == 0 {
        return Ok(());
    }
    let (elements, choices) = (desc.tokens * desc.experts, desc.tokens * desc.top_k);
    let logits = scope.read("logits", args.logits, elements, SCALAR)?;
    let ids = scope.read("ids", args.ids, choices, SCALAR)?;
    let gradients = args.dispatched.map_or(choices, |dispatched| dispatched.shape().slots);
    let d_weights = scope.read("d_weights", args.d_weights, gradients, SCALAR)?;
    let lists = args.dispatched.map(|dispatched| dispatched.read(&scope)).transpose()?;
    let counts = scope.read_some("counts", args.counts, desc.experts, SCALAR)?;
    let counted = scope.read_some("counted", args.counted, 1, SCALAR)?;
    let d_logits = scope.write("d_logits", args.d_logits, elements, SCALAR)?;
    let (rule, epsilon, power) = match desc.gating.renormalise {
        None => (0, 0.0, 1.0),
        Some(Renormalise::Plus(epsilon)) => (RENORMALISE, epsilon, 1.0),
        Some(Renormalise::AtLeast(epsilon)) => (RENORMALISE | AT_LEAST, epsilon, 1.0),
        Some(Renormalise::PNorm(1.0)) => (RENORMALISE, 0.0, 1.0),
        Some(Renormalise::PNorm(p)) => (RENORMALISE | BY_NORM, 0.0, p),
    };
    let losses = desc.losses.unwrap_or(LossGradient::new(LossScore::Softmax));
    let flag = |set: bool, flag: u32| if set { flag } else { 0 };
    let score = match desc.gating.score {
        Score::Softmax => 0,
        Score::TopkSoftmax => 1,
        Score::Sigmoid => 2,
        Score::SqrtSoftplus | Score::SparseMixer => 3,
    };
    scope.launch(
        &selection,
        GatingBackwardParams {
            logits: logits.address().into(),
            ids: ids.address().into(),
            d_weights: d_weights.address().into(),
            token_slot: lists.as_ref().map(|lists| lists.addresses().token_slot).into(),
            counts: optional(&counts).into(),
            counted: optional(&counted).into(),
            d_logits: d_logits.address().into(),
            tokens: desc.tokens as u32,
            experts: desc.experts as u32,
            top_k: desc.top_k as u32,
            score,
            flags: rule
                | flag(desc.accumulate, ADD)
                | flag(losses.score != LossScore::Softmax, SIGMOIDS)
                | flag(losses.score == LossScore::PlainSigmoid, PLAIN)
                | flag(desc.balances(), BALANCE)
                | flag(losses.z != 0.0, Z),
            scale: desc.gating.scale,
            epsilon,
            power,
            balance: losses.balance * desc.experts as f32,
            z: losses.z,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::{Appended, AppendedWeight};

    #[test]
    fn faults_name_their_field() {
        let with = |gating| GatingBackwardDesc::new(16, 64, 8, gating);
        let plain = Gating::new(Score::Softmax);
        let fault = |desc: GatingBackwardDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(with(plain).validate(), Ok(()));
        assert_eq!(with(plain.renormalise(Some(Renormalise::PNorm(0.5)))).validate(), Ok(()));
        assert_eq!(fault(GatingBackwardDesc { experts: 0, ..with(plain) }), "experts");
        assert_eq!(fault(GatingBackwardDesc { top_k: 65, ..with(plain) }), "top_k");
        assert_eq!(fault(GatingBackwardDesc { tokens: 1 << 40, ..with(plain) }), "tokens");
        assert_eq!(fault(with(Gating::new(Score::SparseMixer))), "gating.score");
        assert_eq!(fault(with(plain.expert_scale(true))), "gating.expert_scale");
        assert_eq!(fault(with(plain.global_scale(true))), "gating.global_scale");
        assert_eq!(fault(with(plain.appended(Some(Appended::new(1, AppendedWeight::Fixed(1.0)))))), "gating.appended");
        assert_eq!(fault(with(plain.renormalise(Some(Renormalise::PNorm(f32::INFINITY))))), "gating.renormalise");
        assert_eq!(fault(with(plain.renormalise(Some(Renormalise::Plus(-1.0))))), "gating.renormalise");
        assert_eq!(fault(with(plain.scale(f32::NAN))), "gating.scale");
        let losses = LossGradient::new(LossScore::Softmax);
        assert_eq!(fault(with(plain).losses(Some(losses.balance(f32::NAN)))), "losses.balance");
        assert_eq!(fault(with(plain).losses(Some(losses.z(f32::INFINITY)))), "losses.z");
    }
}
