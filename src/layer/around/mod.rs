//! What may stand round a layer's router and experts: RMS norms, and projections to a width of the experts' own.
//!
//! ```text
//! x --norms.router--> router
//! x --norms.experts--> --latent.input--> --latent.norm--> experts --norms.slots--> weighted sum --latent.output--> + shared(x) --norms.output--> + residual
//! ```

mod plan;
mod weights;

pub(super) use plan::{AroundPlan, KeptSums, Tail};
pub(super) use weights::{HeldAround, open_norm};
pub use weights::{LatentWeights, NormWeights};

use crate::rules::{Dtype, RmsNorm, WeightDesc};
use crate::runtime::builder::settings;

/// RMS norms inside a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Norms {
    /// Of what the router sees (Gemma 4: the router's `scale` is the weight, `H^-0.5` the factor); not rounded before a router of f32
    /// ([`crate::layer::LayerDesc::router_dtype`]). Not beside a gated shared expert, whose gate sees what the router sees.
    pub router: Option<RmsNorm>,
    /// Of what the routed experts see (Gemma 4's second norm before its feed-forward part). Shared experts see `x`.
    pub experts: Option<RmsNorm>,
    /// Of each routed expert's output, before it is weighted (Muse Spark).
    pub slots: Option<RmsNorm>,
    /// Of the sum of routed and shared experts, before a residual is added (A.X K1).
    pub output: Option<RmsNorm>,
}

impl Norms {
    /// None.
    pub const fn new() -> Norms {
        Norms { router: None, experts: None, slots: None, output: None }
    }
}

settings!(Norms {
    router: Option<RmsNorm>,
    experts: Option<RmsNorm>,
    slots: Option<RmsNorm>,
    output: Option<RmsNorm>,
});

/// Experts of a width of their own, between two projections; router and shared experts see `x` (Nemotron-H, Muse Spark; LatentMoE).
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct LatentDesc {
    /// Width `L` of the routed experts' input and output.
    pub width: usize,
    /// The projection `[L, H]` before them.
    pub input: WeightDesc,
    /// Of the projected rows.
    pub norm: Option<RmsNorm>,
    /// The projection `[H, L]` of their sum.
    pub output: WeightDesc,
}

impl LatentDesc {
    /// Between K-contiguous projections, without a norm.
    pub const fn new(dtype: Dtype, width: usize) -> LatentDesc {
        let weight = WeightDesc::new(dtype);
        LatentDesc { width, input: weight, norm: None, output: weight }
    }
}

settings!(LatentDesc { input: WeightDesc, norm: Option<RmsNorm>, output: WeightDesc });
