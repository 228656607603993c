//! The way back of an [admission](crate::capacity::admission): from gradients of what tokens got to those of the weights that they chose by.
//!
//! Who gets what is no function of the weights. What a token got has the gradient of the candidate that it was, and where it was divided by its sum,
//! that division's too; a candidate that was dropped or passed over has none.
//!
//! ```
//! use moe_kernels::capacity::admission::AdmissionDesc;
//! use moe_kernels::capacity::admission_backward::{self, AdmissionBackwardArgs};
//! use moe_kernels::rules::AdmissionRule;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = moe_kernels::Kernels::new(stream.context())?;
//! // One expert of two candidates: the second token was passed on to its second one.
//! let desc = AdmissionDesc::new(2, AdmissionRule::new(4, 1, 1, 2).candidates(2));
//! let (ids, admitted) = (stream.clone_htod(&[3, 0, 3, 1])?, stream.clone_htod(&[3, 1])?);
//! let d_admitted = stream.clone_htod(&[0.5_f32, -2.0])?;
//! let mut d_weights = stream.alloc_zeros(4)?;
//! let args = AdmissionBackwardArgs::new(&ids, &admitted, &d_admitted, &mut d_weights);
//! admission_backward::forward(&kernels, &stream, &desc, args)?;
//! assert_eq!(stream.clone_dtoh(&d_weights)?, [0.5, 0.0, 0.0, -2.0]);
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::admission::AdmissionDesc;
use crate::experts::dispatched::Dispatched;
use crate::registry::{BLOCK_WARPS, Kernel};
use crate::runtime::builder::buffers;
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::AdmissionBackwardParams;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "admission_backward";

/// Buffers of an admission's way back; `n = top_k`.
#[non_exhaustive]
pub struct AdmissionBackwardArgs<'a> {
    /// `[T, K]`: the choices that were to be admitted.
    pub ids: In<'a, i32>,
    /// `[T, K]`: their weights, exactly where the rule divides by what is left of them.
    pub weights: Option<In<'a, f32>>,
    /// `[T, n]`: what was admitted.
    pub admitted: In<'a, i32>,
    /// `[T, n]`: gradients of the admitted weights; with `dispatched` `[slots]`, by row.
    pub d_admitted: In<'a, f32>,
    /// The rows that the admitted choices became; one without a row has the gradient 0.
    pub dispatched: Option<&'a Dispatched>,
    /// `[T, K]`, written.
    pub d_weights: Out<'a, f32>,
}

impl<'a> AdmissionBackwardArgs<'a> {
    /// `d_admitted` of `admitted` to `d_weights` of `ids`.
    pub fn new(
        ids: impl Into<In<'a, i32>>,
        admitted: impl Into<In<'a, i32>>,
        d_admitted: impl Into<In<'a, f32>>,
        d_weights: impl Into<Out<'a, f32>>,
    ) -> AdmissionBackwardArgs<'a> {
        let (ids, admitted, d_admitted) = (ids.into(), admitted.into(), d_admitted.into());
        AdmissionBackwardArgs {
            ids,
            weights: None,
            admitted,
            d_admitted,
            dispatched: None,
            d_weights: d_weights.into(),
        }
    }

    /// With gradients by row.
    #[must_use]
    pub fn dispatched(self, dispatched: &'a Dispatched) -> AdmissionBackwardArgs<'a> {
        AdmissionBackwardArgs { dispatched: Some(dispatched), ..self }
    }
}

buffers!(AdmissionBackwardArgs<'a> { weights: In<f32> });

/// Chooses kernel and grid: a warp for each token up to eight blocks a multiprocessor.
///
/// # Errors
/// Those of [`AdmissionDesc::validate`].
pub fn select(desc: &AdmissionDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate().map_err(|error| error.within(OPERATION))?;
    let blocks = (desc.tokens as u32).div_ceil(BLOCK_WARPS).min(8 * device.multiprocessors).max(1);
    Ok(Selection::new(Kernel::AdmissionBackward, [blocks, 1, 1]))
}

/// Computes gradients of the candidates' weights. Where a token's divisor is 0, as its weights stayed as they were, they are 0.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`AdmissionDesc::validate`]; [`Error::Missing`] or [`Error::Unexpected`] for weights against the rule; [`Error::Invalid`] for a dispatch of another
/// shape; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &AdmissionDesc,
    args: AdmissionBackwardArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let (operation, argument, rule) = (OPERATION, "weights", &desc.rule);
    match (rule.renormalise.is_some(), args.weights.is_some()) {
        (true, false) => {
            return Err(Error::Missing { operation, argument, reason: "the rule divides by their sum" });
        }
        (false, true) => {
            return Err(Error::Unexpected { operation, argument, reason: "the rule leaves weights as they are" });
        }
        _ => {}
    }
    if let Some(shape) = args.dispatched.map(Dispatched::shape)
        && (shape.tokens, shape.top_k) != (desc.tokens, Some(rule.top_k))
    {
        let expected = format!("a dispatch of {} tokens with {} choices each", desc.tokens, rule.top_k);
        return Err(Error::invalid(OPERATION, "dispatched", expected, format!("{shape:?}")));
    }
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    if desc.tokens == 0 {
        return Ok(());
    }
    let (choices, places) = (desc.tokens * rule.candidates, desc.tokens * rule.top_k);
    let ids = scope.read("ids", args.ids, choices, SCALAR)?;
    let weights = scope.read_some("weights", args.weights, choices, SCALAR)?;
    let admitted = scope.read("admitted", args.admitted, places, SCALAR)?;
    let gradients = args.dispatched.map_or(places, |dispatched| dispatched.shape().slots);
    let d_admitted = scope.read("d_admitted", args.d_admitted, gradients, SCALAR)?;
    let lists = args.dispatched.map(|dispatched| dispatched.read(&scope)).transpose()?;
    let d_weights = scope.write("d_weights", args.d_weights, choices, SCALAR)?;
    let (plus, least) = rule.divisor();
    scope.launch(
        &selection,
        AdmissionBackwardParams {
            ids: ids.address().into(),
            weights: optional(&weights).into(),
            admitted: admitted.address().into(),
            token_slot: lists.as_ref().map(|lists| lists.addresses().token_slot).into(),
            d_places: d_admitted.address().into(),
            d_weights: d_weights.address().into(),
            tokens: desc.tokens as u32,
            candidates: rule.candidates as u32,
            top_k: rule.top_k as u32,
            renormalises: u32::from(rule.renormalise.is_some()),
            renormalise_plus: plus,
            renormalise_least: least,
        },
    )
}
